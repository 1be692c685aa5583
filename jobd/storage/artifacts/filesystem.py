"""Artifacts in a directory: read and deleted by name, never followed out of it.

Touches the file system in a thread of its own, one call after the other, so that a mount that hangs holds nobody up.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from hashlib import blake2b
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, TypeVar

from jobd.storage.artifacts.base import PIECE_BYTES, ArtifactStoreError, Deletion, Judge

T = TypeVar("T")
Undo = Callable[[Any], None]
# Who waits (None: nobody), what is done, and what becomes of its result where nobody waits any more.
Calls = SimpleQueue[tuple[asyncio.Future[Any] | None, Callable[[], Any], Undo] | None]

WAITING: Final = 100  # calls for which the thread has had no time yet

# No symbolic link is followed on the way to an object: whoever may write into the directory could lead us out of it.
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OBJECT: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe there must not hold us up
_PROBE: Final = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC


def _nothing(_: object) -> None:
    pass


class FileArtifactStore:
    """The store of `file:///DIRECTORY`; a key is a path in it. In a directory of `own_places` no file is touched."""

    def __init__(self, directory: str, owner: str, own_places: Iterable[str] = ()) -> None:
        self.place = directory
        self._own_places = tuple(own_places)
        self._probe_name = f".jobd-probe-{owner}"
        self._calls: Calls = SimpleQueue()
        # Not of a pool: the interpreter waits for those threads at its end, and one that hangs would never let it go.
        self._thread = threading.Thread(target=_work, args=(self._calls,), name="artifacts", daemon=True)

    async def open(self, key: str) -> FileReader | None:
        opened = await self.ask(lambda: self._open(key), _close)
        return None if opened is None else FileReader(self, *opened)

    async def delete(self, key: str, judge: Judge) -> Deletion:
        return await self.ask(lambda: self._delete(key, judge))

    async def probe(self) -> None:
        await self.ask(self._probe)

    async def close(self) -> None:
        """Waits for nothing: the thread ends when it comes to it, or with the process."""
        self._calls.put(None)

    async def read(self, handle: int) -> bytes:
        """The next piece of an open file."""
        return await self.ask(lambda: os.read(handle, PIECE_BYTES))

    def shut(self, handle: int) -> None:
        """Close an open file after what is still being read of it."""
        self._calls.put((None, partial(os.close, handle), _nothing))

    async def ask(self, work: Callable[[], T], undo: Callable[[T], None] = _nothing) -> T:
        """`work`, done in the thread. Raises what it raises, and StoreFault for an OSError or where too much waits.

        Where nobody waits any more for what it gives, `undo` gets that.
        """
        if self._calls.qsize() >= WAITING:
            raise ArtifactStoreError(f"{self.place} has not answered: {WAITING} calls wait for it already.")
        if self._thread.ident is None:
            self._thread.start()
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._calls.put((future, work, undo))
        try:
            return await future
        except OSError as error:
            raise ArtifactStoreError(f"{self.place}: {error.strerror or error}") from error

    # -- in the thread ------------------------------------------------------------------------------------------------

    def _open(self, key: str) -> tuple[int, int] | None:
        """An open file and its size; None where the key names none."""
        *folders, name = key.split("/")
        if _is_invalid_name(folders, name):
            return None
        try:
            with self._opened(folders) as folder:
                if self._is_own(folder):
                    return None
                handle = os.open(name, _OBJECT, dir_fd=folder)
        except FileNotFoundError:
            self._check_root()
            return None
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO):  # no name, a link, a socket
                return None
            raise ArtifactStoreError(f"{self.place}/{key}: {error.strerror}") from error
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            os.close(handle)
            return None
        return handle, found.st_size

    def _delete(self, key: str, judge: Judge) -> Deletion:
        *folders, name = key.split("/")
        if _is_invalid_name(folders, name):
            return Deletion("left", "such a key names no file in the directory")
        try:
            with self._opened(folders) as folder:
                if self._is_own(folder):
                    return Deletion("left", "the daemon's own files lie there")
                return _delete_in(folder, name, judge)
        except FileNotFoundError:
            self._check_root()
            return Deletion("missing")
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return Deletion("missing")
            raise ArtifactStoreError(f"{self.place}/{key}: {error.strerror}") from error

    @contextlib.contextmanager
    def _opened(self, folders: list[str]) -> Iterator[int]:
        """The directory that the folders lead to. Raises FileNotFoundError where there is none, or StoreFault."""
        folder = os.open(self.place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # may be a link, by the operator
        try:
            for name in folders:
                try:
                    inner = os.open(name, _DIRECTORY, dir_fd=folder)
                except OSError as error:
                    if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                        raise
                    if not stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                        raise FileNotFoundError(name) from error  # a file: nothing lies under it
                    way = "/".join(folders)
                    told = f"{self.place}/{way}: {name} is a symbolic link, which is not followed; mount it there"
                    raise ArtifactStoreError(told) from error
                os.close(folder)
                folder = inner
            yield folder
        finally:
            os.close(folder)

    def _is_own(self, folder: int) -> bool:
        """Whether the daemon's own files lie there: by a bind mount, say, which no name betrays."""
        place = os.fstat(folder)
        for path in self._own_places:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                if os.path.samestat(os.stat(path), place):
                    return True
        return False

    def _check_root(self) -> None:
        """A directory that is not there, or not mounted, is a fault: it does not mean that its objects are gone."""
        if not Path(self.place).is_dir():
            raise ArtifactStoreError(f"{self.place} is no directory. Make it, or change artifacts.url.")

    def _probe(self) -> None:
        fault = directory_fault(self.place)
        if fault is not None:
            raise ArtifactStoreError(fault)
        value = secrets.token_bytes(16)
        with self._opened([]) as folder:
            probe = os.open(self._probe_name, _PROBE, 0o600, dir_fd=folder)
            try:
                os.write(probe, value)
                os.fsync(probe)
                read = os.pread(probe, 32, 0)
            finally:
                os.close(probe)
                os.unlink(self._probe_name, dir_fd=folder)
        if read != value:
            raise ArtifactStoreError(f"{self.place}: a probe read back something else than it had written.")


def _is_invalid_name(folders: list[str], name: str) -> bool:
    """No API takes such keys; hands do."""
    return any(part in ("", ".", "..") or "\0" in part for part in (*folders, name))


def _close(opened: tuple[int, int] | None) -> None:
    if opened is not None:
        os.close(opened[0])


class FileReader:
    """An open file that is read as far as it was long when it was opened."""

    def __init__(self, store: FileArtifactStore, handle: int, size: int) -> None:
        self.size = size
        self._store = store
        self._handle = handle
        self._left = size

    async def more(self) -> bytes:
        if not self._left:
            return b""
        piece = (await self._store.read(self._handle))[: self._left]
        if not piece:
            raise ArtifactStoreError(f"{self._store.place}: a file became shorter while it was read.")
        self._left -= len(piece)
        return piece

    def close(self) -> None:
        self._store.shut(self._handle)


def _work(asked: Calls) -> None:
    """What the thread does: one call after the other, until there is None."""
    while (call := asked.get()) is not None:
        future, work, undo = call
        if future is not None and future.cancelled():
            continue
        result, error = None, None
        try:
            result = work()
        except BaseException as fault:
            error = fault
        if future is None or (error is not None and future.cancelled()):
            continue
        if future.cancelled():
            undo(result)
        else:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process is about to end
                future.get_loop().call_soon_threadsafe(_settle, asked, future, result, error, undo)


def _settle(asked: Calls, future: asyncio.Future[Any], result: Any, error: BaseException | None, undo: Undo) -> None:
    if future.cancelled():
        if error is None:
            asked.put((None, partial(undo, result), _nothing))
    elif error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _delete_in(folder: int, name: str, judge: Judge) -> Deletion:
    """Delete a file that was looked at, and no other: one that takes its place meanwhile is put back.

    `unlink` takes whatever has the name by then. So the name is moved aside first, which nobody else does, and what was
    moved is looked at again. A crash in between leaves it aside, under a name that the next try knows.
    """
    aside = f".jobd-gone-{blake2b(os.fsencode(name), digest_size=8).hexdigest()}"
    _recover(folder, name, aside, judge)
    found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if stat.S_ISDIR(found.st_mode):
        return Deletion("left", "it is a directory")
    # The second is set by the system alone: a copy that keeps the old time of its source is new all the same.
    modified_at = max(found.st_mtime_ns, found.st_ctime_ns) // 1_000_000
    verdict = judge(modified_at)
    if verdict != "delete":
        why = "it was written after the job had been deleted" if verdict == "leave" else ""
        return Deletion("left" if verdict == "leave" else "young", why, modified_at)
    os.rename(name, aside, src_dir_fd=folder, dst_dir_fd=folder)
    if _identity(os.stat(aside, dir_fd=folder, follow_symlinks=False)) != _identity(found):
        _put_back(folder, name, aside)
        return _delete_in(folder, name, judge)
    os.unlink(aside, dir_fd=folder)
    os.fsync(folder)
    return Deletion("deleted")


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_ino, found.st_mtime_ns, found.st_size


def _recover(folder: int, name: str, aside: str, judge: Judge) -> None:
    """What a crash has left aside goes on its way: it was judged, but perhaps it was not what had been judged."""
    try:
        found = os.stat(aside, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return
    if judge(found.st_mtime_ns // 1_000_000) == "delete":  # moving it has changed its other time
        os.unlink(aside, dir_fd=folder)
    else:
        _put_back(folder, name, aside)
    os.fsync(folder)


def _put_back(folder: int, name: str, aside: str) -> None:
    with contextlib.suppress(FileExistsError):  # one that is newer still
        os.link(aside, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    os.unlink(aside, dir_fd=folder)


def directory_fault(directory: str) -> str | None:
    """Why artifacts cannot be kept in `directory`, or None. Touches the file system: call it off the event loop."""
    try:
        if not Path(directory).is_dir():
            return f"{directory} is no directory. Make it, or change artifacts.url."
        if not os.access(directory, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
            return f"{directory} cannot be written to. Give the daemon's user the right to."
        usage = os.statvfs(directory)
    except OSError as error:
        return f"{directory} cannot be looked at ({error.strerror}). Give the daemon's user the right to."
    if usage.f_bavail == 0 or (usage.f_files and usage.f_favail == 0):
        return f"{directory} is full. Free some space."
    return None
