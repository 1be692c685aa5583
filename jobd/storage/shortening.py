"""Shorten the journals of jobs: delete old heartbeats, and grants that were given back."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any, Final

from jobd.journal import facts
from jobd.journal.facts import EVENT_COLUMNS
from jobd.model.events import (
    GIVEN_BACK,
    HEARTBEATS,
    KEEP_FIRST_GRANTS,
    KEEP_GRANTS,
    KEEP_HEARTBEATS,
    Change,
    Event,
)
from jobd.model.job import LIVE
from jobd.model.storage import DiskFull
from jobd.storage.codec import Row, fault, sealed
from jobd.storage.database import EVENT_SQL, Database, StructureDamaged, is_corrupt

COMPACTED_AT_ONCE: Final = 1_000  # events of a journal that are read by one `shorten`
GIVEN_BACK_KEPT: Final = 10_000  # jobs whose returned grants are counted
_UPDATE_EVENT: Final = (
    f"UPDATE events SET {', '.join(f'{name} = ?' for name in (*EVENT_COLUMNS[-1:], 'crc'))} WHERE seq = ?"
)


class JournalShortener:
    """Counts the heartbeats and returned grants of jobs, and shortens the journals with too many of them."""

    def __init__(self, db: Database) -> None:
        self._db = db
        # For each grant seen since the start: the seq of its event, and its heartbeats since the last thinning.
        self._heartbeats: dict[int, tuple[int, int]] = {}
        # For each job: the event up to which its journal is compact (0: unknown), and the grants returned since then.
        self._returned_grants: dict[int, tuple[int, int]] = {}
        # Journals to thin or compact, oldest first, with the event to start from.
        self._waiting: dict[tuple[Callable[[int, int], None], int], int] = {}

    @property
    def has_work(self) -> bool:
        """Whether a journal is too long."""
        return bool(self._waiting)

    def note(self, changes: Sequence[Change]) -> None:
        """Count the events that were written."""
        for change in changes:
            event = change.event
            if event.type in HEARTBEATS:
                # For a grant made before the start the count is unknown, so thin its journal once.
                begin, heartbeats = self._heartbeats.get(event.job_seq, (0, KEEP_HEARTBEATS))
                self._heartbeats[event.job_seq] = (begin, heartbeats + 1)
                if heartbeats >= KEEP_HEARTBEATS:
                    self._waiting.setdefault((self._thin, event.job_seq), begin)
            elif event.type == "granted":
                self._heartbeats[event.job_seq] = (event.seq, 0)
            elif event.after != "processing":
                self._heartbeats.pop(event.job_seq, None)
                if event.type in GIVEN_BACK:
                    self._count_returned_grant(event.job_seq)
                elif event.after not in LIVE:
                    self._returned_grants.pop(event.job_seq, None)

    def _count_returned_grant(self, job_seq: int) -> None:
        """Count a returned grant of this job. Above the limit, forget the job that was counted longest ago."""
        begin, count = self._returned_grants.pop(job_seq, (0, 0))
        self._returned_grants[job_seq] = (begin, (count + 1) % KEEP_GRANTS)
        if count + 1 == KEEP_GRANTS:
            self._waiting.setdefault((self._compact, job_seq), begin)
        if len(self._returned_grants) > GIVEN_BACK_KEPT:
            del self._returned_grants[next(iter(self._returned_grants))]

    def shorten(self) -> None:
        """Shorten one journal, in a transaction of its own."""
        shorten, job_seq = next(iter(self._waiting))
        with contextlib.suppress(DiskFull, StructureDamaged):
            self._db.commit(shorten, job_seq, self._waiting.pop((shorten, job_seq)))

    def _thin(self, job_seq: int, begin: int) -> None:
        if job_seq in self._heartbeats:  # else the job no longer has a grant
            self._heartbeats[job_seq] = (self._heartbeats[job_seq][0], 0)
        sql = f"SELECT {EVENT_SQL} FROM events WHERE job_seq = ? AND seq >= ? ORDER BY seq"
        rows = self._rows(sql, (job_seq, begin))
        if any(fault(row) for row in rows):
            return  # timeline quarantines the row and names it
        self._write(*facts.thin([facts.event(row) for row in rows]))

    def _compact(self, job_seq: int, begin: int) -> None:
        """Compact the journal of a job from the event `begin` on (0: after its first grants) up to its last grants."""
        if not begin:
            begin = self._nth_grant(job_seq, "ASC", KEEP_FIRST_GRANTS)
        end = self._nth_grant(job_seq, "DESC", KEEP_GRANTS - 1)
        if begin >= end:
            return
        sql = f"SELECT {EVENT_SQL} FROM events WHERE job_seq = ? AND seq BETWEEN ? AND ? ORDER BY seq LIMIT ?"
        rows = self._rows(sql, (job_seq, begin, end, COMPACTED_AT_ONCE))
        damaged = [index for index, row in enumerate(rows) if fault(row)]
        events = [facts.event(row) for row in rows[damaged[-1] + 1 if damaged else 0 :]]
        self._write(*facts.compact(events))
        if rows and rows[-1][0] < end:  # continue later, from the last grant, which did not change
            grants = [event.seq for event in events[1:] if event.type == "granted"]
            end = grants[-1] if grants else rows[-1][0] + 1
            self._waiting[self._compact, job_seq] = end
        if job_seq in self._returned_grants:
            self._returned_grants[job_seq] = (end, self._returned_grants[job_seq][1])

    def _nth_grant(self, job_seq: int, order: str, skipped: int) -> int:
        """Return the seq of the grant after `skipped` others (from the end with DESC); 0 if there is none."""
        sql = (
            "SELECT seq FROM events INDEXED BY events_job WHERE job_seq = ? AND type = 'granted' "
            f"ORDER BY seq {order} LIMIT 1 OFFSET ?"
        )
        return next((seq for (seq,) in self._rows(sql, (job_seq, skipped))), 0)

    def _rows(self, sql: str, args: tuple[Any, ...]) -> list[Row]:
        try:
            return self._db.rows(sql, args)
        except sqlite3.DatabaseError as error:
            if is_corrupt(error):
                raise StructureDamaged(str(error)) from error
            raise

    def _write(self, deleted: list[int], changed: list[Event]) -> None:
        executemany = self._db.conn.executemany
        executemany("DELETE FROM events WHERE seq = ?", [(seq,) for seq in deleted])
        merged = [sealed(facts.event_row(event)) for event in changed]
        executemany(_UPDATE_EVENT, [(*row[-2:], row[0]) for row in merged])
