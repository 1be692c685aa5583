"""Read the tail of the journal: the records of committed batches that the tables lack. Writes nothing."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import Final

from msgspec import Struct

from jobd.journal import record
from jobd.journal.event_codec import EventRow
from jobd.journal.sqlite import SqliteJournal
from jobd.model.journal import BadRecord
from jobd.model.storage import Batch
from jobd.storage.files import StoreUnreadable

_READ_AT_ONCE: Final = 100  # records
_ROW: Final = "SELECT 1 FROM jobs WHERE seq = :seq UNION ALL SELECT 1 FROM quarantined_jobs WHERE seq = :seq"


class Pending(Struct, gc=False):
    """A record that the tables lack. `events` are its rows of events, and `size` their number, at least 1.

    `crc` is its checksum if the store belongs to a cluster.
    """

    number: int
    batch: Batch
    events: list[EventRow]
    body_bytes: int
    crc: int = 0

    @property
    def size(self) -> int:
        return max(len(self.events), 1)


class JournalTail(Struct):
    """The usable records of a tail, up to the first that cannot be used because of `error`."""

    pending: list[Pending] = []
    error: BadRecord | None = None

    def __str__(self) -> str:
        """Describe its size, for example "3 committed batches (17 events)"."""
        batches, events = len(self.pending), sum(len(each.events) for each in self.pending)
        return f"{counted(batches, 'committed batch', 'es')} ({counted(events, 'event')})"

    def check(self, path: str) -> None:
        """Raise StoreUnreadable if a record cannot be used."""
        if self.error is not None:
            raise StoreUnreadable(f"{path}: {self.error}, and the tables lack it: {fix(self.error)}") from self.error


def counted(count: int, noun: str, plural: str = "s") -> str:
    return f"{count} {noun}{'' if count == 1 else plural}"


def fix(error: BadRecord) -> str:
    """Say how to continue without the record that cannot be used."""
    return (
        f"run `jobd doctor --cut-journal {error.number}` to continue without it and all later changes, "
        "or restore a backup with `jobd restore`"
    )


def read_tail(journal: SqliteJournal, projected_to: int) -> JournalTail:
    """Read and check the records after `projected_to`."""
    tail = JournalTail()
    last = projected_to
    try:
        journal.check(projected_to)
        while records := journal.read(last, _READ_AT_ONCE):
            for each in records:
                tail.pending.append(Pending(each.number, *record.decode(each), len(each.body)))
            last = records[-1].number
    except BadRecord as error:
        tail.error = error
    return tail


def jobs_without_row(conn: sqlite3.Connection, tail: Iterable[Pending]) -> list[str]:
    """Return the ids of jobs that the tail changes and does not create, without a row in `jobs` or in quarantine."""
    known: set[int] = set()
    missing: list[str] = []
    for event in (event for pending in tail for event in pending.batch.changes):
        if event.job_seq == 0 or event.job_seq in known:
            continue
        known.add(event.job_seq)
        if event.from_status is not None and conn.execute(_ROW, {"seq": event.job_seq}).fetchone() is None:
            missing.append(event.job_id)
    return missing
