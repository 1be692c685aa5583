"""SQLite's write-ahead log: whether commits stand in it that would be passed over, as bytes before them have changed.

Reads only, and decides nothing. SQLite takes the log up to the first frame that is not as it was written and drops the
rest without a word, as after a crash: but a crash leaves no more than the last transaction in parts, since each is
synced before the next one begins.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Final

_HEADER: Final = struct.Struct(">8I")  # magic, version, page size, checkpoint, two salts, two checksums
_FRAME: Final = struct.Struct(">6I")  # page, size of the database at a commit (else 0), two salts, two checksums
_MAGIC: Final = 0x377F0682  # the last bit says in which order the checksums take bytes
_TAKEN_AT: Final = 16  # in the shared memory file: how many frames SQLite takes
_SECTOR: Final = 512
_DEFAULT_PAGE: Final = 4096

Sums = tuple[int, int]


def frames_taken(shared: str) -> int:
    """How many frames SQLite takes of the log, from the shared memory file of a connection that has read from it."""
    with open(shared, "rb") as file:
        file.seek(_TAKEN_AT)
        return int.from_bytes(file.read(4), sys.byteorder)


def is_damaged(log: str, taken: int) -> bool:
    """Whether commits stand in `log` beyond the `taken` first frames that no crash can have left there."""
    commits, broken_commit = 0, False
    with open(log, "rb") as file:
        for frame in _frames_after(file, taken):
            if frame.is_whole and frame.is_commit:
                commits += 1
            elif frame.is_commit and frame.has_whole_head and not commits:
                broken_commit = True
            # The first commit may be that of the last transaction, in parts. The second was begun after its sync.
            if commits + broken_commit >= 2:
                return True
    return False


@dataclass(frozen=True)
class _Frame:
    """A frame of the log's present round. It is whole where its checksum continues that of the one before."""

    is_whole: bool
    is_commit: bool
    has_whole_head: bool  # a torn write cannot have put it together from two: it lies in one sector


def _frames_after(file: BinaryIO, taken: int) -> Iterator[_Frame]:
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return
    magic, _, page, _, *salts, first, second = _HEADER.unpack(header)
    if _checksum((0, 0), header[:24], big=bool(magic & 1)) == (first, second) and magic | 1 == _MAGIC | 1:
        big = bool(magic & 1)
    else:  # the header itself is damaged: the frames know as much, and nothing can be taken
        salts, page, big = [], _DEFAULT_PAGE, False
    sums: Sums = (first, second)
    place = _HEADER.size + max(0, taken - 1) * (_FRAME.size + page)
    file.seek(place)
    number = max(0, taken - 1)
    while len(frame := file.read(_FRAME.size + page)) == _FRAME.size + page:
        _, size, *own_salts, own_first, own_second = _FRAME.unpack_from(frame)
        salts = salts or own_salts
        if own_salts == salts and number >= taken:
            whole = _checksum(_checksum(sums, frame[:8], big), frame[_FRAME.size :], big) == (own_first, own_second)
            yield _Frame(whole, size > 0, place // _SECTOR == (place + 15) // _SECTOR)
        sums = (own_first, own_second)
        place += len(frame)
        number += 1


def _checksum(sums: Sums, content: bytes, big: bool) -> Sums:
    first, second = sums
    words = iter(struct.unpack(f"{'>' if big else '<'}{len(content) // 4}I", content))
    for word in words:
        first = (first + word + second) & 0xFFFFFFFF
        second = (second + next(words) + first) & 0xFFFFFFFF
    return first, second


def has_frames(log: str) -> bool:
    """Whether there is a log with anything in it."""
    return os.path.exists(log) and os.path.getsize(log) > _HEADER.size
