"""Shorten the timelines of jobs: delete old heartbeats, and grants that were given back."""

from __future__ import annotations

import contextlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice
from operator import attrgetter
from typing import Any, Final

from jobd.journal import event_codec
from jobd.journal.event_codec import EVENT_COLUMNS
from jobd.model.events import GIVEN_BACK, HEARTBEATS, KEEP_FIRST_GRANTS, KEEP_GRANTS, KEEP_HEARTBEATS, Event
from jobd.model.job import LIVE
from jobd.model.storage import DiskFull
from jobd.storage.codec import SQL, Row
from jobd.storage.database import Database, StructureDamaged, raising_structure_damaged
from jobd.storage.events import event_rows
from jobd.storage.events.event_rows import fault

SHORTENED_AT_ONCE: Final = 1_000  # events of a timeline that are read by one `shorten`
GIVEN_BACK_KEPT: Final = 10_000  # jobs whose returned grants are counted
_READ_AT_ONCE: Final = 50  # rows of events
_ROWS: Final = f"SELECT {SQL['events']} FROM events WHERE job_seq = ? AND seq > ?"
_TYPE: Final = EVENT_COLUMNS.index("type")
_seq = attrgetter("seq")
_RowAndEvents = tuple[Row, list[Event]]


class TimelineShortener:
    """Counts the heartbeats and returned grants of jobs, and shortens the timelines with too many of them."""

    def __init__(self, db: Database) -> None:
        self._db = db
        # For each grant seen since the start: the seq of its event, and its heartbeats since the last thinning.
        self._heartbeats: dict[int, tuple[int, int]] = {}
        # For each job: the event up to which its timeline is short (0: unknown), and the grants returned since then.
        self._returned_grants: dict[int, tuple[int, int]] = {}
        # Timelines to thin or shorten, oldest first, with the event to start from.
        self._waiting: dict[tuple[Callable[[int, int], None], int], int] = {}

    @property
    def has_work(self) -> bool:
        """Whether a timeline is too long."""
        return bool(self._waiting)

    def note(self, changes: Sequence[Event]) -> None:
        """Count the events that were written."""
        for event in changes:
            if event.type == "granted":
                self._heartbeats[event.job_seq] = (event.seq, 0)
            elif event.type in HEARTBEATS:
                # For a grant made before the start the count is unknown, so thin its timeline once.
                begin, heartbeats = self._heartbeats.get(event.job_seq, (0, KEEP_HEARTBEATS))
                self._heartbeats[event.job_seq] = (begin, heartbeats + 1)
                if heartbeats >= KEEP_HEARTBEATS:
                    self._waiting.setdefault((self._thin, event.job_seq), begin)
            elif event.to_status != "processing" and event.from_status is not None:
                self._heartbeats.pop(event.job_seq, None)
                if event.type in GIVEN_BACK:
                    self._count_returned_grant(event.job_seq)
                elif event.to_status not in LIVE:
                    self._returned_grants.pop(event.job_seq, None)

    def _count_returned_grant(self, job_seq: int) -> None:
        """Count a returned grant of this job. Above the limit, forget the job that was counted longest ago."""
        begin, count = self._returned_grants.pop(job_seq, (0, 0))
        self._returned_grants[job_seq] = (begin, (count + 1) % KEEP_GRANTS)
        if count + 1 == KEEP_GRANTS:
            self._waiting.setdefault((self._shorten, job_seq), begin)
        if len(self._returned_grants) > GIVEN_BACK_KEPT:
            del self._returned_grants[next(iter(self._returned_grants))]

    def shorten(self) -> None:
        """Shorten one timeline, in a transaction of its own."""
        shorten, job_seq = next(iter(self._waiting))
        with contextlib.suppress(DiskFull, StructureDamaged):
            self._db.commit(shorten, job_seq, self._waiting.pop((shorten, job_seq)))

    def _thin(self, job_seq: int, begin: int) -> None:
        if job_seq in self._heartbeats:  # else the job no longer has a grant
            self._heartbeats[job_seq] = (self._heartbeats[job_seq][0], 0)
        rows = self._rows(f"{_ROWS} ORDER BY seq", (job_seq, begin - event_rows.SPAN))
        if not any(fault(row) for row in rows):  # timeline quarantines a damaged row and names it
            found = [_read(row) for row in rows if row[1] >= begin]
            self._write(found, event_codec.thin(_events(found)))

    def _shorten(self, job_seq: int, begin: int) -> None:
        """Shorten the timeline of a job from the event `begin` on (0: after its first grants) up to its last grants."""
        if not begin:
            begin = self._nth_grant(job_seq, "ASC", KEEP_FIRST_GRANTS)
        end = self._nth_grant(job_seq, "DESC", KEEP_GRANTS - 1)
        if begin >= end:
            return
        sql = f"{_ROWS} AND seq <= ? ORDER BY seq LIMIT ?"
        rows = self._rows(sql, (job_seq, begin - event_rows.SPAN, end, SHORTENED_AT_ONCE + event_rows.SPAN))
        rows = [row for row in rows if fault(row) or row[1] >= begin][:SHORTENED_AT_ONCE]
        damaged = [index for index, row in enumerate(rows) if fault(row)]
        found: list[_RowAndEvents] = []
        size = 0
        for row in rows[damaged[-1] + 1 if damaged else 0 :]:
            if size >= SHORTENED_AT_ONCE:
                break
            found.append(_read(row))
            size += len(found[-1][1])
        upto = found[-1][0][1] if found else max(rows[-1][0], begin) if rows else end
        events = _events(found)
        first, last = bisect_left(events, begin, key=_seq), bisect_right(events, end, key=_seq)
        self._write(found, events[:first] + event_codec.shorten(events[first:last]) + events[last:])
        if upto < end:  # continue later, from the last grant, which did not change
            grants = [event.seq for event in events[first + 1 : last] if event.type == "granted"]
            end = grants[-1] if grants else upto + 1
            self._waiting[self._shorten, job_seq] = end
        if job_seq in self._returned_grants:
            self._returned_grants[job_seq] = (end, self._returned_grants[job_seq][1])

    def _nth_grant(self, job_seq: int, order: str, skipped: int) -> int:
        """Return the seq of the grant after `skipped` others (from the end with DESC); 0 if there is none."""
        return next(islice(self._grants(job_seq, order), skipped, None), 0)

    def _grants(self, job_seq: int, order: str) -> Iterator[int]:
        """Yield the seqs of the grants of a job. Reads a few rows at once."""
        sql = f"SELECT {SQL['events']} FROM events WHERE job_seq = ? ORDER BY seq {order} LIMIT ?, ?"
        for offset in count(0, _READ_AT_ONCE):
            rows = self._rows(sql, (job_seq, offset, _READ_AT_ONCE))
            for row in rows:
                events = [] if fault(row) else event_rows.unpack(row)
                grants = [event[0] for event in events if event[_TYPE] == "granted"]
                yield from grants if order == "ASC" else reversed(grants)
            if len(rows) < _READ_AT_ONCE:
                return

    def _rows(self, sql: str, args: tuple[Any, ...]) -> list[Row]:
        with raising_structure_damaged(of_index=True):
            return self._db.rows(sql, args)

    def _write(self, found: list[_RowAndEvents], kept: list[Event]) -> None:
        """Write the rows from the first to the last with an event that changed or is not kept."""
        left = {event.seq: event for event in kept}
        changed = [at for at, (_, events) in enumerate(found) if any(left.get(e.seq) is not e for e in events)]
        if changed:
            part = found[changed[0] : changed[-1] + 1]
            encoded = [event_codec.encode(left[event.seq]) for event in _events(part) if event.seq in left]
            event_rows.rewrite(self._db.conn, [row for row, _ in part], encoded)


def _read(row: Row) -> _RowAndEvents:
    return row, [event_codec.decode(event) for event in event_rows.unpack(row)]


def _events(found: Iterable[_RowAndEvents]) -> list[Event]:
    return [event for _, events in found for event in events]
