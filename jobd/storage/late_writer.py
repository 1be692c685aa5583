"""Late results on their way to the disk and out of it, and what goes with those that named stored objects.

Opens no transaction: tables.py calls it inside of one. What a damaged row says is not believed: it is kept for people.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Final

from jobd.model.events import Change, Event
from jobd.model.job import KEEP_LATE
from jobd.model.storage import Tombstone
from jobd.storage import codec
from jobd.storage.codec import LATE_COLUMNS, Row, fault
from jobd.storage.writers import insert

ReadRows = Callable[[str, Row], list[Row]]

_INSERT_LATE: Final = insert("late_results", (*LATE_COLUMNS, "crc"))
_LATE_OF_JOB: Final = "SELECT seq FROM late_results INDEXED BY late_results_job WHERE job_seq = ?"
_EXCESS_LATE: Final = (
    "SELECT seq FROM late_results INDEXED BY late_results_job WHERE job_seq = ? "
    f"ORDER BY fencing_token DESC LIMIT -1 OFFSET {KEEP_LATE}"
)
_LATE_ROW: Final = f"SELECT {', '.join(LATE_COLUMNS)}, crc FROM late_results NOT INDEXED WHERE seq = ?"
_DELETE_LATE: Final = "DELETE FROM late_results WHERE seq = ?"
_QUARANTINE_ROW: Final = insert("bad_rows", ("place", "what", "at", "row"))


class LateWriter:
    """Writes through one connection. `read` gives the rows of a query, whatever bytes they hold."""

    def __init__(self, conn: sqlite3.Connection, read: ReadRows, note: Callable[[str], object]) -> None:
        self._conn = conn
        self._read = read
        self._note = note

    def write(self, changes: list[Change], *, sweeps: bool) -> list[Tombstone]:
        """Keep what came late, of each job the latest few; what belongs to a job that is deleted goes with it.

        Gives what that leaves to be deleted of stored objects, where anybody `sweeps`: the object of each that goes.
        """
        touched = [change for change in changes if change.late is not None or change.after is None]
        kept = [(change.event.job_seq, change.late) for change in touched if change.late is not None]
        if kept:
            self._conn.executemany(_INSERT_LATE, [codec.late_row(job_seq, late) for job_seq, late in kept])
        left: list[Tombstone] = []
        # A job's last event says when: those of one that is deleted in this very batch go with it.
        for event in {change.event.job_seq: change.event for change in touched}.values():
            if event.job_seq:
                going = self._read(_EXCESS_LATE if event.type == "late_result" else _LATE_OF_JOB, (event.job_seq,))
                if sweeps:
                    left += self._named(event, going)
                self._conn.executemany(_DELETE_LATE, going)
        return left

    def _named(self, event: Event, going: list[Row]) -> list[Tombstone]:
        found = [row for each in going for row in self._read(_LATE_ROW, each)]
        keys = [(row[0], self._key(row, event.at)) for row in found]
        return [Tombstone(-seq, event.job_id, key, event.at, event.at) for seq, key in keys if key is not None]

    def _key(self, row: Row, now: int) -> str | None:
        """The storage_key that it names."""
        if (wrong := fault(row)) is None:
            return codec.late(row, whole=True).result.storage_key
        shown = codec.as_text((*LATE_COLUMNS, "crc"), row)
        self._conn.execute(_QUARANTINE_ROW, ("late_results", f"{row[0]}: {wrong}", now, shown))
        self._note(f"late_results {row[0]}: {wrong}; the row was set aside, and what it named is not deleted")
        return None
