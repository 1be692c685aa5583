"""Write files completely or not at all, and never over a file that a daemon or another program uses."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, cast

import click

from jobd.cli import exit_codes
from jobd.storage.files import StoreBusy, check_not_held, has_sqlite_lock, sync_directory

# The files of a store. With a new lock file a second daemon could start.
_SUFFIXES: Final = ("-wal", "-shm", "-journal", ".lock", ".epoch", ".ballast")


class ProgressFile:
    """A file that reports how many bytes were written."""

    def __init__(self, file: BinaryIO, report: Callable[[int], None]) -> None:
        self._file = file
        self._report = report
        self.count = 0

    def write(self, piece: bytes) -> int:
        self._file.write(piece)
        self.count += len(piece)
        self._report(self.count)
        return len(piece)


@contextmanager
def atomic_file(path: Path, report: Callable[[int], None]) -> Iterator[BinaryIO]:
    """Yield a file that becomes `path` (mode 0600) at the end of the block, or is removed if the block raises.

    Raises OSError, UsageError if `path` is not a regular file or its .part belongs to another user, and CliError (75)
    if `path` belongs to a store in use or another program is writing it.
    """
    target = resolve_target(path)
    part = target.with_name(target.name + ".part")
    check_unused(part)
    with os.fdopen(_open_part(part), "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samefile(file.fileno(), part)  # not if another program has just renamed it
        except (BlockingIOError, FileNotFoundError):
            is_ours = False
        if not is_ours:
            raise exit_codes.CliError(f"Another program is writing {part}: wait for it", exit_codes.TRY_AGAIN)
        try:
            file.truncate(0)
            yield cast(BinaryIO, ProgressFile(file, report))
            file.flush()
            os.fsync(file.fileno())
            resolve_target(target)  # a daemon may have started there meanwhile
            os.replace(part, target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                part.unlink()
            raise
    sync_directory(str(target))


def _open_part(part: Path) -> int:
    """Open `part` for this user only. Raises UsageError if it is left over from another user, who could read it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(part, flags | os.O_EXCL, 0o600)
    except FileExistsError:
        handle = os.open(part, flags, 0o600)
    if os.fstat(handle).st_uid != os.geteuid():
        os.close(handle)
        raise click.UsageError(f"{part} belongs to another user: remove it, or name another file")
    os.fchmod(handle, 0o600)
    return handle


def check_target(file: Path, *, yes: bool) -> None:
    """Raise UsageError if `file` is not a regular file, or exists without `yes`; CliError (75) if a store uses it."""
    resolve_target(file)
    if file.exists() and not yes:
        raise click.UsageError(f"{file} exists: add --yes to overwrite it")


def resolve_target(file: Path) -> Path:
    """Return the path that `file` leads to if it may be written. A symlink stays, and its target is replaced."""
    if file.exists() and not file.is_file():
        raise click.UsageError(f"{file} is not a regular file: name a new one, or one to overwrite")
    target = Path(os.path.realpath(file))
    for name in dict.fromkeys((target, Path(os.path.abspath(file)))):  # the daemon may have opened it by the symlink
        check_unused(name)
    return target


def check_unused(path: Path) -> None:
    """Raise CliError (75) if a running daemon or another program uses `path` or the store that `path` belongs to.

    A daemon would continue to write to the replaced file, which no longer has a name, and lose every commit from then
    on.
    """
    for store, relation in _stores(path):
        try:
            check_not_held(store)
        except StoreBusy as error:
            if error.pid is not None:  # without a pid, the lock is not a daemon's and may belong to our caller
                text = f"{path} {relation} of a running daemon (process {error.pid}): name another file"
                raise exit_codes.CliError(text, exit_codes.TRY_AGAIN) from None
        if os.path.isfile(store) and has_sqlite_lock(store):
            text = f"{path} {relation} that another program uses: name another file"
            raise exit_codes.CliError(text, exit_codes.TRY_AGAIN)
    check_no_log(path)


def check_no_log(path: Path) -> None:
    """Raise UsageError if a log with the name of that of `path` is left over. It can have the latest commits."""
    for suffix in ("-wal", "-journal"):
        log = f"{path}{suffix}"
        if os.path.isfile(log) and os.path.getsize(log) > 0:
            text = f"{log} is left over from another database, and SQLite would read it into {path}"
            raise click.UsageError(f"{text}: rename it like its database, or remove it if nothing needs it")


def _stores(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the stores that `path` can belong to, each with a phrase for the error message."""
    yield str(path), "is the store"
    for suffix in _SUFFIXES:
        if path.name.endswith(suffix) and path.name != suffix:
            yield str(path).removesuffix(suffix), "belongs to the store"
