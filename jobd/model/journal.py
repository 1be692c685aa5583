"""The journal interface: one record for each committed batch, in order."""

from __future__ import annotations

from typing import Protocol

from msgspec import Struct


class Record(Struct, frozen=True, gc=False):
    """A committed batch. Numbers count from 1 without gaps.

    `first_event` and `last_event` are the seqs of its events, and `last_event` is `first_event` - 1 if it has none.
    `epoch` is that of the fencing tokens. `at` is wall time, Unix ms. `body` is the batch (journal/record.py).
    """

    number: int
    first_event: int
    last_event: int
    epoch: int
    at: int
    body: bytes


class BadRecord(Exception):
    """A record cannot be used: it is damaged, missing, or in a format that this version does not know."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"record {number} of the journal {reason}")
        self.number = number
        self.reason = reason


class Journal(Protocol):
    """An append-only log of records. All calls block."""

    def append(self, record: Record) -> None:
        """Write `record`. It is durable when this returns.

        Raises DiskFull if nothing was written. After any other exception the outcome is unknown.
        """

    def read(self, after: int, limit: int) -> list[Record]:
        """Return up to `limit` records with a number above `after`, in order. Raises BadRecord."""

    def trim(self, upto: int) -> None:
        """Delete the records with a number up to `upto`, which the tables have."""
