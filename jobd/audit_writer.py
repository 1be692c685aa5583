"""The audit log on its way to the disk: a row for each deed, one for all that came as parts of one; old rows go.

Opens no transaction: tables.py calls it inside of one.
"""

from __future__ import annotations

import sqlite3
from typing import Final

from msgspec.structs import replace

from jobd import rows
from jobd.batch import Audited
from jobd.job_writer import insert
from jobd.rows import AUDIT_COLUMNS

KEEP_AUDIT: Final = 100_000  # rows; of a busy operator's room more than the time that they are kept for
OPEN_DEEDS: Final = 64  # deeds of many parts that go on side by side; beyond it the oldest goes on in a new row

AUDIT_SQL: Final = f"{', '.join(AUDIT_COLUMNS)}, crc"
_WRITE: Final = insert("audit", (*AUDIT_COLUMNS, "crc"), "REPLACE")
_READ: Final = f"SELECT {AUDIT_SQL} FROM audit WHERE seq = ?"
_LAST: Final = "SELECT ifnull(max(seq), 0) FROM audit"
# Only the oldest are looked at: a row that seems young keeps those behind it until there are too many.
_TRIM: Final = (
    "DELETE FROM audit WHERE seq IN (SELECT seq FROM (SELECT seq, at FROM audit ORDER BY seq LIMIT ?) "
    "WHERE (at < ? OR seq <= ?) AND seq < ?)"
)


class AuditWriter:
    """Writes through one connection. What a transaction took back is found to be missing, and written anew."""

    def __init__(self, conn: sqlite3.Connection) -> None:
        self._conn = conn
        self._open: dict[str, int] = {}  # part_of -> seq of its row

    def write(self, audit: list[Audited]) -> None:
        (last,) = self._conn.execute(_LAST).fetchone()
        for audited in audit:
            known = self._known(audited)
            if known is None:
                last += 1
                known = last, audited
            seq, whole = known
            self._conn.execute(_WRITE, rows.audit_row(seq, whole))
            if audited.part_of is not None:
                self._open[audited.part_of] = seq
        while len(self._open) > OPEN_DEEDS:
            del self._open[next(iter(self._open))]

    def _known(self, part: Audited) -> tuple[int, Audited] | None:
        """The row that `part` belongs to, with what it adds."""
        seq = None if part.part_of is None else self._open.pop(part.part_of, None)
        if seq is None:
            return None
        found = self._conn.execute(_READ, (seq,)).fetchone()
        if found is None or rows.fault(found) is not None:
            return None
        before = rows.audited(found)
        if before.part_of != part.part_of:
            return None
        details = before.details if part.details is None else part.details
        return seq, replace(before, jobs=before.jobs + part.jobs, details=details)

    def trim(self, before: int, limit: int) -> int:
        """Delete up to `limit` of the oldest rows, those that were written before wall time `before` or are too many.

        The newest stays, so that its number is not given again.
        """
        (last,) = self._conn.execute(_LAST).fetchone()
        return self._conn.execute(_TRIM, (limit, before, last - KEEP_AUDIT, last)).rowcount
