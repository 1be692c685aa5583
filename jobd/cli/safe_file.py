"""Writing a file so that it is there whole or not at all: FILE.part, fsync, rename, fsync of the directory."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from jobd.cli import exit_codes, files


class Counted:
    """A file that tells how much has been written to it."""

    def __init__(self, file: BinaryIO, told: Callable[[int], None]) -> None:
        self._file = file
        self._told = told
        self.count = 0

    def write(self, piece: bytes) -> int:
        self._file.write(piece)
        self.count += len(piece)
        self._told(self.count)
        return len(piece)


@contextmanager
def whole_file(path: Path, told: Callable[[int], None]) -> Iterator[BinaryIO]:
    """A file to write to that becomes `path` (mode 0600) at the end of the block, or vanishes if the block raises.

    Raises OSError, UsageError where `path` is no regular file, and Problem (75) where it is of a store at work, or
    another program is writing it.
    """
    target = files.resolved(path)
    part = target.with_name(target.name + ".part")
    files.refuse_used(part)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600), "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise exit_codes.Problem(f"Another program is writing {part}: wait for it", exit_codes.TRY_AGAIN) from None
        try:
            file.truncate(0)
            yield cast(BinaryIO, Counted(file, told))
            file.flush()
            os.fsync(file.fileno())
            files.resolved(target)  # a daemon may have started there meanwhile
            os.replace(part, target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                part.unlink()
            raise
    _sync_directory(target.parent)


def _sync_directory(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
