"""Handle the files next to the database (lock, epoch, reserve file) and disk space. Define the errors of a store.

All calls block: do not call them on the event loop.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import tempfile
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from jobd.model.job import LAST_EPOCH, TOKEN_COUNTER_BITS
from jobd.model.storage import RESERVE_BYTES, SPARE_BYTES, DiskFull, DiskSpace

RESERVE_FILE_BYTES: Final = RESERVE_BYTES
DISK_FULL_ERRNOS: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
TEMPORARY: Final = ".tmp-"  # in the names of unfinished copies next to a store, which the next start removes
SCRATCH: Final = ".accepting"  # directory of `jobd cluster accept-loss` next to a store
_LOCK_BYTES: Final = 16
# SQLite locks these bytes of the database, from its PENDING byte on.
_SQLITE_LOCKS: Final = (0x40000000, 512)
_FLOCK: Final = "hhqqi4x"


class StoreError(Exception):
    """A store cannot be used. `exit_code` is the exit code of the program."""

    exit_code = 78


class StoreBusy(StoreError):
    """Another process holds the store; `pid` is None if it is unknown."""

    exit_code = 75

    def __init__(self, path: str, pid: int | None) -> None:
        holder = "another process" if pid is None else f"process {pid}"
        super().__init__(f"{path} is in use by {holder}: stop it first, or choose another store.path")
        self.pid = pid


class StoreTooNew(StoreError):
    """A newer version wrote the store. The store was not changed."""


class StoreUnreadable(StoreError):
    """The store or its metadata cannot be read. A restart does not help."""


class NotAStore(StoreUnreadable):
    """The file is not a database, or another program wrote it."""


class MigrationNeedsSpace(StoreError):
    """The disk has no space for a migration. A restart does not help."""


class StoreFailed(StoreError):
    """The disk failed while the store was opened. A restart may help."""

    exit_code = 74


class StoreBroken(StoreError):
    """An earlier write failed and the content of the disk is unknown. The connection accepts no more calls."""

    exit_code = 74


class FileLock(contextlib.AbstractContextManager["FileLock"]):
    """An exclusive lock on a store, held through an open `<path>.lock`. It ends with the process; the file remains."""

    def __init__(self, path: str) -> None:
        """Lock the store at `path` or raise StoreBusy. Touches no other file."""
        # Root must not follow a link that the owner of the directory has made, here and in `replace`.
        self._fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with contextlib.suppress(PermissionError):  # root of a container may lack the capability
            give_to_owner(f"{path}.lock", path)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = _lock_owner(self._fd)
            os.close(self._fd)
            raise StoreBusy(path, pid) from error
        # Overwriting in place needs no new block, so it works on a full disk.
        with contextlib.suppress(OSError):
            os.pwrite(self._fd, str(os.getpid()).encode().ljust(_LOCK_BYTES - 1) + b"\n", 0)

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __exit__(self, *_: object) -> None:
        self.release()


def check_not_held(path: str) -> None:
    """Raise StoreBusy if a process holds the lock. Writes nothing and takes no lock."""
    try:
        lock = os.open(f"{path}.lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StoreBusy(path, _lock_owner(lock)) from error
    finally:
        os.close(lock)


def _lock_owner(lock: int) -> int | None:
    pid = os.pread(lock, _LOCK_BYTES, 0).split()
    return int(pid[0]) if pid and pid[0].isdigit() else None


def has_sqlite_lock(path: str) -> bool:
    """Return whether a program holds an SQLite lock on the database at `path`."""
    lock = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, *_SQLITE_LOCKS, 0)
    with open(path, "rb") as file:
        result = fcntl.fcntl(file, fcntl.F_OFD_GETLK, lock)
    return bool(struct.unpack(_FLOCK, result)[0] != fcntl.F_UNLCK)


@contextlib.contextmanager
def raising_disk_full() -> Iterator[None]:
    """Inside the context, translate an OSError for a full disk or quota into DiskFull."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL_ERRNOS:
            raise DiskFull(str(error)) from error
        raise


def has_space(directory: str) -> bool:
    """Return whether 64 KiB can be allocated in `directory`. True on errors other than a full disk or quota."""
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            os.posix_fallocate(file.fileno(), 0, 64 << 10)
    except OSError as error:
        return error.errno not in DISK_FULL_ERRNOS
    return True


def log_of(path: str) -> str:
    """Return the path of the write-ahead log of the database at `path`. SQLite follows symbolic links."""
    return f"{os.path.realpath(path)}-wal"


def shared_memory_of(path: str) -> str:
    """Return the path of the shared memory file of the same log."""
    return f"{os.path.realpath(path)}-shm"


def sync(path: str) -> None:
    """Make the content and the name of the file at `path` durable."""
    _fsync(path, os.O_RDONLY | os.O_CLOEXEC)
    sync_directory(path)


def sync_directory(path: str) -> None:
    """Make the names in the directory of `path` durable."""
    _fsync(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _fsync(path: str, flags: int) -> None:
    fd = os.open(path, flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def dated_name(path: str) -> str:
    """Return an unused name for the database at `path`, with the present time."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    name, number = f"{path}.{stamp}", 1
    while os.path.exists(name):
        number += 1
        name = f"{path}.{stamp}-{number}"
    return name


def set_aside(path: str, name: str | None = None) -> str:
    """Rename the database at `path` and its write-ahead log. Return the new name.

    Without `name`, the database replaces the one that was set aside before.
    """
    old = name or f"{path}.old"
    for suffix in ("-wal", "-shm", ""):
        if os.path.exists(path + suffix):
            os.replace(path + suffix, old + suffix)
        elif suffix:
            Path(old + suffix).unlink(missing_ok=True)
    sync_directory(path)
    return old


def remove(path: str) -> None:
    """Remove the closed database at `path`."""
    for suffix in ("-wal", "-shm", ""):
        Path(path + suffix).unlink(missing_ok=True)
    sync_directory(path)


def put_in_place(new: str, path: str) -> None:
    """Make the content of `new` durable, and rename it to `path`."""
    sync(new)
    os.replace(new, path)
    sync_directory(path)


def create_private(path: str) -> bool:
    """Durably create an empty file with mode 0600. Return False if it already exists."""
    with raising_disk_full():
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            return False
        os.close(fd)
        sync_directory(path)
    return True


def replace(path: str, content: bytes, like: str | None = None) -> None:
    """Durably replace the file at `path`; a crash leaves either the old or the new file. Raises DiskFull.

    The file has mode 0600, or the mode of the file `like`. If root writes it, it also gets the owner of `like`.
    """
    new = f"{path}.new"
    with raising_disk_full():
        try:
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                if like is not None and os.path.exists(like):
                    model = os.stat(like)
                    if os.geteuid() == 0:
                        os.fchown(fd, model.st_uid, model.st_gid)
                    os.fchmod(fd, stat.S_IMODE(model.st_mode))
                os.write(fd, content)
                os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(new, path)
        except OSError:
            Path(new).unlink(missing_ok=True)
            raise
        sync_directory(path)


def give_to_owner(name: str, path: str) -> None:
    """Give a file that root has written to the daemon's user: the owner of the store at `path`, or of its directory."""
    if os.geteuid() == 0:
        model = _owner(path)
        os.chown(name, model.st_uid, model.st_gid, follow_symlinks=False)


def _owner(path: str) -> os.stat_result:
    """Return the status of the store at `path`, or of its directory if there is no store."""
    return os.stat(path if os.path.exists(path) else Path(path).resolve().parent)


@contextlib.contextmanager
def keeping_owner(path: str) -> Iterator[None]:
    """If root writes the store at `path`, keep its owner, or that of its directory: the daemon's user."""
    model = _owner(path)
    try:
        yield
    finally:
        if os.geteuid() == 0:
            for suffix in ("", ".lock", ".epoch", ".ballast"):
                with contextlib.suppress(FileNotFoundError):
                    os.chown(f"{path}{suffix}", model.st_uid, model.st_gid)


def read_epoch(path: str) -> int | None:
    """Return the highest epoch in the epoch file of the store at `path`, None if there is no file.

    Raises StoreUnreadable if it is damaged: a guessed epoch could grant one fencing token twice.
    """
    name = f"{path}.epoch"
    try:
        fields = Path(name).read_bytes().split()
    except FileNotFoundError:
        return None
    except (PermissionError, IsADirectoryError) as error:
        hint = f"make it a file of the owner of {path}, with mode 0600"
        raise StoreUnreadable(f"{name} cannot be read ({error.strerror}): {hint}") from error
    epoch = int(fields[0]) if fields and fields[0].isdigit() else LAST_EPOCH + 1
    by_operator = len(fields) == 1
    if epoch > LAST_EPOCH or not (by_operator or fields[1:] == [b"%d" % TOKEN_COUNTER_BITS, _epoch_crc(epoch)]):
        raise StoreUnreadable(
            f"{name} is damaged: write a number into it that is higher than all epochs of this store, such as the "
            f"current one: echo $(($(date +%s) - 1577836800)) > {name}"
        )
    return epoch


def _epoch_crc(epoch: int) -> bytes:
    return b"%08x" % zlib.crc32(b"%d %d" % (epoch, TOKEN_COUNTER_BITS))


def write_epoch(path: str, epoch: int) -> None:
    """Write the epoch file of the store at `path`, with the owner and mode of the store. Raises DiskFull."""
    replace(f"{path}.epoch", b"%d %d %s\n" % (epoch, TOKEN_COUNTER_BITS, _epoch_crc(epoch)), like=path)


def space(path: str) -> DiskSpace | None:
    """Return free and total bytes of the disk of `path`; None if the file system does not report them."""
    path = os.path.abspath(path)
    try:
        disk = os.statvfs(path)
    except OSError:
        return None
    return DiskSpace(path, disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize)


def check_permission(directory: str) -> None:
    """Raise PermissionError if this user may not create files in `directory`. A read-only file system is no reason."""
    is_read_only = os.statvfs(directory).f_flag & os.ST_RDONLY
    if not is_read_only and not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), directory)


def identities(path: str) -> dict[str, tuple[int, int]]:
    """Return device and inode of the database at `path`, and of its log if there is one."""
    return {each: found for each in (path, log_of(path)) if (found := identity(each)) is not None}


def replaced(known: dict[str, tuple[int, int]]) -> str | None:
    """Return the first path of `known` at which there is no longer the same file, or None."""
    return next((path for path, was in known.items() if identity(path) != was), None)


def identity(path: str) -> tuple[int, int] | None:
    """Return device and inode of the file at `path`; None if there is none."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def occupied(path: str, size: int) -> Iterator[None]:
    """Occupy `size` bytes in the directory of `path` inside the context. Raises DiskFull.

    On a disk smaller than 16 times `size`, a sixteenth of the disk is enough.
    """
    disk = space(path)
    size = size if disk is None else min(size, disk.total_bytes // 16)
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.TemporaryFile(dir=os.path.dirname(path) or "."))
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
        except OSError as error:  # any error, because none says anything about the database
            raise DiskFull(str(error)) from error
        yield


def has_reserve(path: str) -> bool:
    """Return whether the reserve file `<path>.ballast` has its full size on disk."""
    try:
        return os.stat(f"{path}.ballast").st_blocks * 512 >= RESERVE_FILE_BYTES
    except FileNotFoundError:
        return False


def build_reserve(path: str) -> None:
    """Give the reserve file `<path>.ballast` its full size, with SPARE_BYTES left free. Raises DiskFull."""
    if has_reserve(path):
        return
    name = f"{path}.ballast"
    disk = space(path)
    if disk is not None and disk.free_bytes < RESERVE_FILE_BYTES + SPARE_BYTES:
        raise DiskFull(f"{name} needs {RESERVE_FILE_BYTES + SPARE_BYTES} bytes, but only {disk.free_bytes} are free")
    with occupied(path, SPARE_BYTES), raising_disk_full():
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, RESERVE_FILE_BYTES)
            os.fsync(fd)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        sync_directory(path)


def drop_reserve(path: str) -> bool:
    """Delete the reserve file. Return whether there was one."""
    try:
        os.unlink(f"{path}.ballast")
    except FileNotFoundError:
        return False
    sync_directory(path)
    return True
