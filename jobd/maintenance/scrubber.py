"""Check the rows of the running daemon's storage, in short slices with pauses."""

from __future__ import annotations

import asyncio
from typing import Final

from jobd.engine.clock import loop_time
from jobd.model.errors import ApiError
from jobd.model.responses import CheckedRows, DamagedRow
from jobd.storage.store import Store

CALL_S: Final = 0.25  # duration of one call, pauses included


class Scrubber:
    """Checks one slice at a time. Concurrent calls wait for each other."""

    def __init__(self, storage: Store) -> None:
        self._storage = storage
        self._lock = asyncio.Lock()

    async def scan(self, cursor: str | None) -> CheckedRows | ApiError:
        """Continue the scan at `cursor` (None: from the beginning). The result covers one table."""
        checked, damaged = 0, list[DamagedRow]()
        async with self._lock:
            until_s = loop_time() + CALL_S
            while True:
                began_s = loop_time()
                part = await self._storage.check_rows(cursor)
                if part is None:
                    return ApiError("invalid_request", "`cursor` must be the `next_cursor` of the previous call.")
                checked += part.checked
                damaged += part.damaged
                cursor = part.next_cursor
                is_table_done = cursor is None or not cursor.startswith(f"{part.table}:")
                if is_table_done or loop_time() >= until_s:
                    return CheckedRows(part.table, checked, damaged, cursor)
                # Others get the storage thread and the GIL for at least as long as this slice took.
                await asyncio.sleep(loop_time() - began_s)
