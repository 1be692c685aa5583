"""The audit log on its way to the disk: a row for each deed, one for all that came as parts of one; old rows go.

Opens no transaction: tables.py calls it inside of one.
"""

from __future__ import annotations

import sqlite3
from array import array
from typing import Final, get_args

from msgspec.structs import replace

from jobd.model.storage import Audited, Share, share_of
from jobd.storage import codec
from jobd.storage.codec import AUDIT_COLUMNS
from jobd.storage.writers import insert

KEEP_AUDIT: Final = 100_000  # changes; of a busy operator's room more than the time that they are kept for
KEEP_BESIDE: Final = 10_000  # of each other share: a script that goes in circles pushes out its like alone
LOOK: Final = 2_000  # rows that are counted in one go: below a millisecond
OPEN_DEEDS: Final = 64  # deeds of many parts that go on side by side; beyond it the oldest goes on in a new row

AUDIT_SQL: Final = f"{', '.join(AUDIT_COLUMNS)}, crc"
_PUT_AUDIT: Final = insert("audit", (*AUDIT_COLUMNS, "crc"), "REPLACE")
_AUDIT_ROW: Final = f"SELECT {AUDIT_SQL} FROM audit WHERE seq = ?"
_LAST_AUDIT: Final = "SELECT ifnull(max(seq), 0) FROM audit"
# Only the oldest are looked at: a row that seems young keeps those behind it until there are too many.
_TRIM_AUDIT: Final = (
    "DELETE FROM audit WHERE seq IN (SELECT seq FROM (SELECT seq, at FROM audit ORDER BY seq LIMIT ?) "
    "WHERE at < ? AND seq < ?)"
)
_UNCOUNTED_AUDIT: Final = "SELECT seq, what, outcome FROM audit WHERE seq > ? ORDER BY seq LIMIT ?"
_AUDIT_SHARE: Final = "SELECT what, outcome FROM audit WHERE seq = ?"


class AuditWriter:
    """Writes through one connection. What a transaction took back is found to be missing, and written anew."""

    def __init__(self, conn: sqlite3.Connection) -> None:
        self._conn = conn
        self._open: dict[str, int] = {}  # part_of -> seq of its row
        self._seen: dict[Share, array[int]] = {share: array("q") for share in get_args(Share)}  # rows, as of `look_on`
        self._seen_to = 0

    def write(self, audit: list[Audited]) -> None:
        (last,) = self._conn.execute(_LAST_AUDIT).fetchone()
        for audited in audit:
            known = self._known(audited)
            if known is None:
                last += 1
                known = last, audited
            seq, whole = known
            self._conn.execute(_PUT_AUDIT, codec.audit_row(seq, whole))
            if audited.part_of is not None:
                self._open[audited.part_of] = seq
        while len(self._open) > OPEN_DEEDS:
            del self._open[next(iter(self._open))]

    def _known(self, part: Audited) -> tuple[int, Audited] | None:
        """The row that `part` belongs to, with what it adds."""
        seq = None if part.part_of is None else self._open.pop(part.part_of, None)
        if seq is None:
            return None
        found = self._conn.execute(_AUDIT_ROW, (seq,)).fetchone()
        if found is None or codec.fault(found) is not None:
            return None
        before = codec.audited(found)
        if before.part_of != part.part_of:
            return None
        details = before.details if part.details is None else part.details
        return seq, replace(before, jobs=before.jobs + part.jobs, details=details)

    def look_on(self) -> bool:
        """Count up to LOOK rows that were not counted yet; whether there are no more. Not within a transaction."""
        found = self._conn.execute(_UNCOUNTED_AUDIT, (self._seen_to, LOOK)).fetchall()
        for seq, what, outcome in found:
            self._seen[share_of(what, outcome)].append(seq)
            self._seen_to = seq
        return len(found) < LOOK

    def trim(self, before: int, limit: int) -> int:
        """Delete up to `limit` of the oldest rows: what was written before wall time `before`, and what is too many of
        the rows of its share that `look_on` has counted.

        The newest stays, so that its number is not given again.
        """
        (last,) = self._conn.execute(_LAST_AUDIT).fetchone()
        gone = self._conn.execute(_TRIM_AUDIT, (limit, before, last)).rowcount
        for share, seqs in self._seen.items():
            keep = KEEP_AUDIT if share == "changes" else KEEP_BESIDE
            self._forget_gone(share)
            chosen = [seq for seq in seqs[: max(min(len(seqs) - keep, limit - gone), 0)] if seq < last]
            self._conn.executemany("DELETE FROM audit WHERE seq = ?", [(seq,) for seq in chosen])
            gone += len(chosen)
        return gone

    def _forget_gone(self, share: Share) -> None:
        """Rows that were deleted are counted until they are found missing: a deletion may have been taken back."""
        seqs = self._seen[share]
        for count, seq in enumerate(seqs):
            found = self._conn.execute(_AUDIT_SHARE, (seq,)).fetchone()
            if found is not None and share_of(*found) == share:
                del seqs[:count]
                return
        del seqs[:]
