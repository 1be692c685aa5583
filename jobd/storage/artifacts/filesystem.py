"""Store artifacts in a directory. No key can name a file outside it.

One thread makes all file system calls, so that a hanging mount blocks nothing else.
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
from concurrent.futures import Future
from functools import partial
from hashlib import blake2b
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, TypeVar

from jobd.storage.artifacts.base import ArtifactReader, ArtifactStoreError, Deletion, Judge, kept

T = TypeVar("T")
CallQueue = SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]

MAX_QUEUED: Final = 100  # calls in the queue of the thread

# Symbolic links are not followed, because they could point outside the directory.
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OBJECT: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe must not block
_PROBE: Final = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC


class FileArtifactStore:
    """The artifact store of `file:///DIRECTORY`. Keys are paths in it. `daemon_directories` are never accessed."""

    def __init__(self, directory: str, owner: str, daemon_directories: Iterable[str] = ()) -> None:
        self.place = directory
        self._daemon_directories = tuple(daemon_directories)
        self._probe_name = f".jobd-probe-{owner}"
        self._mount_point = ""  # of the file system that had the directory
        self._calls: CallQueue = SimpleQueue()
        # Not from a pool: the interpreter waits for pool threads when it exits, and this one may hang.
        self._thread = threading.Thread(target=_run_calls, args=(self._calls,), name="artifacts", daemon=True)

    async def open(self, key: str) -> ArtifactReader | None:
        opened = await self.run(lambda: self._open(key), undo=_close)
        if opened is None:
            return None
        handle, size = opened
        return ArtifactReader(
            f"{self.place}: a file",
            size,
            lambda start, end: self.run(lambda: os.pread(handle, end - start, start)),
            close=lambda: self._calls.put((Future(), partial(os.close, handle))),  # after pending reads
        )

    async def delete(self, key: str, judge: Judge) -> Deletion:
        return await self.run(lambda: self._delete(key, judge))

    async def probe(self) -> None:
        await self.run(self._probe)

    async def close(self) -> None:
        """Ask the thread to end. Does not wait."""
        self._calls.put(None)

    async def run(self, work: Callable[[], T], *, undo: Callable[[T], object] = lambda result: None) -> T:
        """Run `work` in the thread. Raises its errors, and ArtifactStoreError for an OSError or a full queue.

        If the caller was cancelled, `undo` gets the result, in the thread.
        """
        if self._calls.qsize() >= MAX_QUEUED:
            raise ArtifactStoreError(f"{self.place} does not respond: {MAX_QUEUED} calls are waiting.")
        if self._thread.ident is None:
            self._thread.start()
        future: Future[T] = Future()
        self._calls.put((future, work))
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(lambda done: self._undo(done, undo))
            raise
        except OSError as error:
            raise ArtifactStoreError(f"{self.place}: {error.strerror or error}") from error

    def _undo(self, done: Future[T], undo: Callable[[T], object]) -> None:
        if not done.cancelled() and done.exception() is None:
            self._calls.put((Future(), partial(undo, done.result())))

    # -- in the thread ------------------------------------------------------------------------------------------------

    def _open(self, key: str) -> tuple[int, int] | None:
        """Open a file. Return its handle and size; None if there is no file `key`."""
        *folders, name = key.split("/")
        if _is_invalid_name(folders, name):
            return None
        try:
            with self._directory_handle(folders) as folder:
                if self._has_daemon_files(folder):
                    return None
                handle = os.open(name, _OBJECT, dir_fd=folder)
        except FileNotFoundError:
            self._check_root()
            return None
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO):  # not a valid name, a link, a socket
                return None
            raise ArtifactStoreError(f"{self.place}/{key}: {error.strerror}") from error
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            os.close(handle)
            return None
        return handle, status.st_size

    def _delete(self, key: str, judge: Judge) -> Deletion:
        *folders, name = key.split("/")
        if _is_invalid_name(folders, name):
            return Deletion("left", "the key is not a valid file name")
        try:
            with self._directory_handle(folders) as folder:
                if self._has_daemon_files(folder):
                    return Deletion("left", "the directory has files of the daemon")
                return _delete_in(folder, name, judge)
        except FileNotFoundError:
            self._check_root()
            return Deletion("missing")
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return Deletion("missing")
            raise ArtifactStoreError(f"{self.place}/{key}: {error.strerror}") from error

    @contextlib.contextmanager
    def _directory_handle(self, folders: list[str]) -> Iterator[int]:
        """Yield the handle of a directory in the store. Raises FileNotFoundError or ArtifactStoreError."""
        folder = os.open(self.place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # the operator may use a link here
        try:
            for name in folders:
                try:
                    inner = os.open(name, _DIRECTORY, dir_fd=folder)
                except OSError as error:
                    if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                        raise
                    if not stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                        raise FileNotFoundError(name) from error  # a file, not a directory
                    path = "/".join(folders)
                    message = (
                        f"{self.place}/{path}: {name} is a symbolic link, which jobd does not follow; use a bind mount"
                    )
                    raise ArtifactStoreError(message) from error
                os.close(folder)
                folder = inner
            yield folder
        finally:
            os.close(folder)

    def _has_daemon_files(self, folder: int) -> bool:
        """Return whether the directory has files of the daemon, even through a bind mount."""
        folder_status = os.fstat(folder)
        for path in self._daemon_directories:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                if os.path.samestat(os.stat(path), folder_status):
                    return True
        return False

    def _check_root(self) -> None:
        """Raise ArtifactStoreError if the directory is missing or not mounted: its objects may still exist.

        An empty directory remains where a file system was mounted.
        """
        if not Path(self.place).is_dir():
            raise ArtifactStoreError(f"{self.place} is not a directory. Create it, or change artifacts.url.")
        mount_point = _mount_point_of(self.place)
        if len(mount_point) < len(self._mount_point):
            raise ArtifactStoreError(
                f"{self._mount_point} is no longer mounted. Mount it again, or restart the daemon if this is intended."
            )
        self._mount_point = mount_point

    def _probe(self) -> None:
        fault = directory_fault(self.place)
        if fault is not None:
            raise ArtifactStoreError(fault)
        self._check_root()
        value = secrets.token_bytes(16)
        with self._directory_handle([]) as folder:
            probe = os.open(self._probe_name, _PROBE, 0o600, dir_fd=folder)
            try:
                os.write(probe, value)
                os.fsync(probe)
                read = os.pread(probe, 32, 0)
            finally:
                os.close(probe)
                os.unlink(self._probe_name, dir_fd=folder)
        if read != value:
            raise ArtifactStoreError(f"{self.place}: a probe read back a value that differs from the one it wrote.")


def _mount_point_of(path: str) -> str:
    """Return where the file system of `path` is mounted."""
    path = os.path.realpath(path)
    while not os.path.ismount(path):
        path = os.path.dirname(path)
    return path


def _is_invalid_name(folders: list[str], name: str) -> bool:
    """Return whether the path is invalid. The API rejects such keys, but edited rows may contain them."""
    return any(part in ("", ".", "..") or "\0" in part for part in (*folders, name))


def _close(opened: tuple[int, int] | None) -> None:
    if opened is not None:
        os.close(opened[0])


def _run_calls(calls: CallQueue) -> None:
    """Run the queued calls in order until None arrives. This is the target of the thread."""
    while (call := calls.get()) is not None:
        future, work = call
        if not future.set_running_or_notify_cancel():
            continue
        try:
            result = work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)


def _delete_in(folder: int, name: str, judge: Judge) -> Deletion:
    """Delete a file that was judged, but not a file that replaces it in the meantime.

    `unlink` deletes any file that has the name at that moment. So this first renames the file to a name that no other
    program uses, and compares it again. A crash in between leaves the renamed file, which the next attempt finds.
    """
    renamed = f".jobd-gone-{blake2b(os.fsencode(name), digest_size=8).hexdigest()}"
    _recover(folder, name, renamed, judge)
    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if stat.S_ISDIR(status.st_mode):
        return Deletion("left", "it is a directory")
    # Programs cannot set ctime: a copy that keeps the mtime of its source is still new.
    modified_at = max(status.st_mtime_ns, status.st_ctime_ns) // 1_000_000
    if (left := kept(judge(modified_at), modified_at)) is not None:
        return left
    os.rename(name, renamed, src_dir_fd=folder, dst_dir_fd=folder)
    if _identity(os.stat(renamed, dir_fd=folder, follow_symlinks=False)) != _identity(status):
        _restore_name(folder, name, renamed)
        return _delete_in(folder, name, judge)
    os.unlink(renamed, dir_fd=folder)
    os.fsync(folder)
    return Deletion("deleted")


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_mtime_ns, status.st_size


def _recover(folder: int, name: str, renamed: str, judge: Judge) -> None:
    """Judge a renamed file that a crash has left once more, because it may not be the file that was judged."""
    try:
        status = os.stat(renamed, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return
    if judge(status.st_mtime_ns // 1_000_000) == "delete":  # the rename has changed its ctime
        os.unlink(renamed, dir_fd=folder)
    else:
        _restore_name(folder, name, renamed)
    os.fsync(folder)


def _restore_name(folder: int, name: str, renamed: str) -> None:
    with contextlib.suppress(FileExistsError):  # a newer file took the name
        os.link(renamed, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    os.unlink(renamed, dir_fd=folder)


def directory_fault(directory: str) -> str | None:
    """Return why `directory` cannot store artifacts, or None. Blocks: do not call it on the event loop."""
    try:
        if not Path(directory).is_dir():
            return f"{directory} is not a directory. Create it, or change artifacts.url."
        if not os.access(directory, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
            return f"{directory} is not writable. Give the daemon's user write permission."
        usage = os.statvfs(directory)
    except OSError as error:
        return f"{directory} is not accessible ({error.strerror}). Give the daemon's user permission."
    if usage.f_bavail == 0 or (usage.f_files and usage.f_favail == 0):
        return f"{directory} is full. Free some space."
    return None
