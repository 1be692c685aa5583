"""Detect damage in SQLite's write-ahead log that makes SQLite skip later commits.

SQLite reads the log up to the first frame with a wrong checksum and silently drops the rest, as after a crash. But a
crash damages only the last transaction, because each is synced before the next one begins.
"""

from __future__ import annotations

import contextlib
import os
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final

_HEADER: Final = struct.Struct(">8I")  # magic, version, page size, checkpoint, two salts, two checksums
_FRAME: Final = struct.Struct(">6I")  # page, size of the database at a commit (else 0), two salts, two checksums
_HEADER_SALTS: Final = slice(16, 24)
_FRAME_SALTS: Final = slice(8, 16)
_MAGIC: Final = 0x377F0682  # the last bit is the byte order of the checksums
_USED_FRAMES_AT: Final = 16  # offset in the shared memory file of the number of valid frames
_SECTOR: Final = 512
_DEFAULT_PAGE: Final = 4096

Sums = tuple[int, int]


def frames_used(shared: str) -> int:
    """Return how many frames of the log SQLite uses. `shared` is the shared memory file of a connection."""
    with open(shared, "rb") as file:
        file.seek(_USED_FRAMES_AT)
        return int.from_bytes(file.read(4), sys.byteorder)


class LogGauge:
    """Measures the log of an open store by two reads of its file, which are from the page cache."""

    def __init__(self, log: str, page_bytes: int) -> None:
        self._file = os.open(log, os.O_RDONLY | os.O_CLOEXEC)
        self._page_bytes = page_bytes

    def has(self, frames: int) -> bool:
        """Return whether at least this many frames were written since the log was last restarted."""
        header = os.pread(self._file, _HEADER.size, 0)
        at = _HEADER.size + (frames - 1) * (_FRAME.size + self._page_bytes)
        frame = os.pread(self._file, _FRAME.size, at)
        return frame[_FRAME_SALTS] == header[_HEADER_SALTS] != b""

    def close(self) -> None:
        os.close(self._file)


def extend(log: str, frames: int, page_bytes: int) -> None:
    """Fill the log with zeros up to a size of `frames`, if that is a small part of the free space on its disk.

    A sync of a file that grows takes up to three times as long, and a clean stop deletes the log. SQLite ignores what
    follows the last frame.
    """
    with open(log, "ab", buffering=0) as file:
        end, disk = file.tell(), os.fstatvfs(file.fileno())
        missing = _HEADER.size + frames * (_FRAME.size + page_bytes) - end
        if 0 < missing < disk.f_bavail * disk.f_frsize // 10:
            with contextlib.suppress(OSError):  # a quota
                file.write(bytes(missing))
                os.fsync(file.fileno())


def is_damaged(log: str, used: int) -> bool:
    """Return whether `log` has commits after the first `used` frames that a crash cannot explain."""
    commits, broken_commit = 0, False
    with open(log, "rb") as file:
        for frame in _frames_after(file, used):
            if frame.is_valid and frame.is_commit:
                commits += 1
            elif frame.is_commit and frame.is_head_in_one_sector and not commits:
                broken_commit = True
            # The first commit may belong to a torn last transaction. A second one began after the first was synced.
            if commits + broken_commit >= 2:
                return True
    return False


@dataclass(frozen=True)
class _Frame:
    """A frame of the current generation of the log. It is valid if its checksum continues that of the previous one."""

    is_valid: bool
    is_commit: bool
    is_head_in_one_sector: bool  # so the head cannot be a mix of two writes


def _frames_after(file: BinaryIO, used: int) -> Iterator[_Frame]:
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return
    magic, _, page, _, *salts, first, second = _HEADER.unpack(header)
    if _checksum((0, 0), header[:24], big=bool(magic & 1)) == (first, second) and magic | 1 == _MAGIC | 1:
        big = bool(magic & 1)
    else:  # the header is damaged, so SQLite uses no frame; take the salts from the first one
        salts, page, big = [], _DEFAULT_PAGE, False
    sums: Sums = (first, second)
    offset = _HEADER.size + max(0, used - 1) * (_FRAME.size + page)
    file.seek(offset)
    number = max(0, used - 1)
    while len(frame := file.read(_FRAME.size + page)) == _FRAME.size + page:
        _, size, *frame_salts, first_sum, second_sum = _FRAME.unpack_from(frame)
        salts = salts or frame_salts
        if frame_salts == salts and number >= used:
            is_valid = _checksum(_checksum(sums, frame[:8], big), frame[_FRAME.size :], big) == (first_sum, second_sum)
            yield _Frame(is_valid, size > 0, offset // _SECTOR == (offset + 15) // _SECTOR)
        sums = (first_sum, second_sum)
        offset += len(frame)
        number += 1


def _checksum(sums: Sums, content: bytes, big: bool) -> Sums:
    first, second = sums
    words = iter(struct.unpack(f"{'>' if big else '<'}{len(content) // 4}I", content))
    for word in words:
        first = (first + word + second) & 0xFFFFFFFF
        second = (second + next(words) + first) & 0xFFFFFFFF
    return first, second


def has_frames(log: str) -> bool:
    """Return whether the log exists and has frames."""
    return os.path.exists(log) and os.path.getsize(log) > _HEADER.size
