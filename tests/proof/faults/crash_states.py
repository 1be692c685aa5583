"""The states that a disk may have after a crash: everything synced, and none, all or some of the rest, down to sectors.

They are built from the log of system calls that writes.c writes.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Final, Literal

SUFFIXES: Final = ("", "-wal", "-journal")
SECTOR: Final = 512

UnsyncedOutcome = Literal["dropped", "kept", "partly kept", "torn"]
UNSYNCED_OUTCOMES: Final[tuple[UnsyncedOutcome, ...]] = ("dropped", "kept", "partly kept", "torn")


class FileCall(IntEnum):
    """The kinds of logged calls. The values are those in writes.c."""

    OPEN = 1
    WRITE = 2
    TRUNCATE = 3
    SYNC = 4
    SYNC_NAMES = 5
    UNLINK = 6


_HEAD: Final = struct.Struct("<BBHIqq")


@dataclass(frozen=True)
class LoggedCall:
    """A call that succeeded, or a write that a kill may have prevented.

    `file` indexes SUFFIXES, `at` is an offset or a size, `time_s` is time.monotonic().
    """

    what: int
    file: int
    at: int
    time_s: float
    content: bytes


def records(log: Path) -> Iterator[LoggedCall]:
    """Yield all logged calls in their order."""
    text = memoryview(log.read_bytes())
    place = 0
    while place < len(text):
        what, file, _, length, at, time_ns = _HEAD.unpack_from(text, place)
        place += _HEAD.size
        yield LoggedCall(what, file, at, time_ns / 1e9, bytes(text[place : place + length]))
        place += length


@dataclass
class _File:
    """A file. `synced` is certainly on disk; `later` has the calls since the last sync, in order."""

    synced: bytearray = field(default_factory=bytearray)
    later: list[LoggedCall] = field(default_factory=list)

    def sync(self) -> None:
        for record in self.later:
            _change(self.synced, record)
        self.later.clear()

    def after_a_crash(self, outcome: UnsyncedOutcome, chance: random.Random) -> bytes:
        content = bytearray(self.synced)
        for record in self.later if outcome != "dropped" else ():
            if outcome == "torn" and record.what == FileCall.WRITE:
                for sector in _sectors(record):
                    if chance.random() < 0.5:
                        _change(content, sector)
            elif outcome == "kept" or chance.random() < 0.5:
                _change(content, record)
        return bytes(content)


def _change(content: bytearray, record: LoggedCall) -> None:
    if record.what == FileCall.TRUNCATE:
        del content[record.at :]
        content.extend(bytes(record.at - len(content)))
        return
    content.extend(bytes(max(0, record.at - len(content))))
    content[record.at : record.at + len(record.content)] = record.content


def _sectors(record: LoggedCall) -> Iterator[LoggedCall]:
    start, end = record.at, record.at + len(record.content)
    while start < end:
        next_start = min(end, (start // SECTOR + 1) * SECTOR)
        content = record.content[start - record.at : next_start - record.at]
        yield LoggedCall(FileCall.WRITE, record.file, start, record.time_s, content)
        start = next_start


class ReplayedDisk:
    """The files of a store after a prefix of its logged calls."""

    def __init__(self) -> None:
        self._named: dict[int, _File] = {}  # as the process sees it
        self._durable: dict[int, _File] = {}  # as it certainly is on disk
        self._renamings: list[tuple[int, _File | None]] = []  # name changes since the directory was synced

    def apply(self, record: LoggedCall) -> None:
        file = self._named.get(record.file)
        match record.what:
            case FileCall.OPEN if file is None:
                self._named[record.file] = made = _File()
                self._renamings.append((record.file, made))
            case FileCall.UNLINK:
                self._named.pop(record.file, None)
                self._renamings.append((record.file, None))
            case FileCall.SYNC_NAMES:
                self._durable = dict(self._named)
                self._renamings.clear()
            case FileCall.SYNC if file is not None:
                file.sync()
            case FileCall.WRITE | FileCall.TRUNCATE if file is not None:
                file.later.append(record)

    def has_unsynced(self) -> bool:
        return bool(self._renamings) or any(file.later for file in self._named.values())

    def after_a_crash(self, outcome: UnsyncedOutcome, seed: str) -> dict[str, bytes]:
        """Return the contents by suffix. Name changes apply in order; writes do not."""
        chance = random.Random(seed)
        here = dict(self._durable)
        kept = {"dropped": 0, "kept": len(self._renamings)}.get(outcome, chance.randint(0, len(self._renamings)))
        for number, file in self._renamings[:kept]:
            if file is None:
                here.pop(number, None)
            else:
                here[number] = file
        return {SUFFIXES[number]: file.after_a_crash(outcome, chance) for number, file in here.items()}
