"""Check the rows of the running daemon's store: some slices per call, with pauses."""

from __future__ import annotations

import asyncio
from typing import Final

from jobd.model.errors import ApiError
from jobd.model.responses import CheckedRows, DamagedRow
from jobd.storage.scrub import TABLES
from jobd.storage.store import Store

CALL_S: Final = 0.25  # of one call, pauses included


class Scrubber:
    """Scans one slice at a time; calls wait for each other."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = asyncio.Lock()

    async def scan(self, cursor: str | None) -> CheckedRows | ApiError:
        """Continue the scan at `cursor` (`TABLE:ROWID`; None: from the beginning)."""
        table, _, after_text = (cursor or f"{TABLES[0]}:0").partition(":")
        if table not in TABLES:
            return ApiError("invalid_request", "`cursor` must be the `next_cursor` of the previous call.")
        after, checked, damaged = int(after_text), 0, []
        loop = asyncio.get_running_loop()
        async with self._lock:
            until_s = loop.time() + CALL_S
            while True:
                began_s = loop.time()
                seen = await self._store.check_rows(table, after)
                checked += seen.checked
                damaged += [DamagedRow(where, what) for where, what in seen.damaged]
                if seen.last is None:
                    following = TABLES[TABLES.index(table) + 1 :]
                    return CheckedRows(table, checked, damaged, f"{following[0]}:0" if following else None)
                after = seen.last
                if loop.time() >= until_s:
                    return CheckedRows(table, checked, damaged, f"{table}:{after}")
                # Others get the storage thread and the GIL for at least as long as this slice took.
                await asyncio.sleep(loop.time() - began_s)
