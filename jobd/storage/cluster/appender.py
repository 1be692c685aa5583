"""Append the records of a leader to the shared journal, one at a time, and keep them for the tables after that."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from jobd.model.journal import LeadershipLost, Record
from jobd.model.storage import DiskFull, FormatNotRead
from jobd.storage.tables.projection import Prepared

Append = Callable[[Record, int], Awaitable[None]]  # of a SharedJournal
TooOldFor = Callable[[int], str | None]

_INTERRUPTED: Final = "an append was interrupted, so its outcome is unknown"


class Appender:
    """Appends records while this node leads. `on_lost` is called with the error that ends this."""

    def __init__(self, on_lost: Callable[[Exception], None]) -> None:
        self._on_lost = on_lost
        self._order = asyncio.Lock()
        self._to_journal: Append | None = None
        self.too_old_for: TooOldFor = lambda format: None
        self._lost: Exception = LeadershipLost("this node does not lead")

    @property
    def is_leading(self) -> bool:
        return self._to_journal is not None

    def lead(self, to_journal: Append, too_old_for: TooOldFor) -> None:
        """Append with `to_journal` from now on. `too_old_for` is NodeRegistry.too_old_for."""
        self._to_journal, self.too_old_for = to_journal, too_old_for

    async def append(
        self, prepare: Callable[[], Awaitable[Prepared]], accept: Callable[[Prepared], Awaitable[None]]
    ) -> Prepared:
        """Append what `prepare` returns, and pass it to `accept` when the journal has it.

        Nothing is appended after an error other than DiskFull or FormatNotRead. Do not cancel this.
        """
        async with self._order:
            if self._to_journal is None:
                raise self._lost
            prepared = await prepare()
            self._check_format(prepared.record)
            try:
                await self._to_journal(prepared.record, prepared.record.number - 1)
            except DiskFull:
                raise
            except BaseException as error:
                self._to_journal = None
                self._lost = error if isinstance(error, Exception) else LeadershipLost(_INTERRUPTED)
                self._on_lost(self._lost)
                raise
            await accept(prepared)
            return prepared

    def _check_format(self, made: Record) -> None:
        """Raise FormatNotRead if a node does not read the record."""
        needed = made.body[0]
        if (node := self.too_old_for(needed)) is not None:
            raise FormatNotRead(
                f"it needs records of format {needed}, which node {node} does not read: see jobctl cluster"
            )
