"""The server of the shared journal, and the network between it and the nodes.

A statement that was sent runs on the server, whatever happens to its node meanwhile. A node that gets no response in
time gives up, while the statement goes on.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from functools import partial
from random import Random
from typing import Any, Final, TypeVar

from jobd.model.journal import Head, JournalOutcomeUnknown, JournalUnavailable, Record
from jobd.model.storage import DiskFull
from tests.support.memory_journal import MemoryHead, MemoryServer, MemorySharedJournal

T = TypeVar("T")
Statement = Callable[[], Coroutine[Any, Any, T]]

RESPONSE_S: Final = (0.02, 0.3, 2.0)  # after which a node gives up
LEADING: Final = frozenset({"append", "renew", "take_over", "resolve"})

is_stalled: ContextVar[bool] = ContextVar("is_stalled", default=False)  # a statement waits long for the quorum


class SimServer(MemoryServer):
    """Calls `on_durable` with the number of its last durable record. `holders` has the process of each epoch."""

    def __init__(self, now_ms: Callable[[], int]) -> None:
        super().__init__(now_ms)
        self.on_durable: Callable[[int], None] = lambda number: None
        self.holders: dict[int, str | None] = {}
        self.is_full = False

    def change(self, head: MemoryHead) -> MemoryHead:
        made = super().change(head)
        self.holders[made.epoch] = made.holder
        return made

    def confirm(self, head: MemoryHead) -> None:
        super().confirm(head)
        self.on_durable(self.durable.number)

    def record(self, number: int) -> Record | None:
        """Return the record at the place of `number`."""
        index = number - self.records[0].number if self.records else -1
        return self.records[index] if 0 <= index < len(self.records) else None

    def epoch_of(self, number: int) -> int:
        """Return the epoch in which a record was written."""
        return max(epoch for epoch, first in self.epochs if first <= number)


class Network(MemorySharedJournal):
    """The access of one process. `slowness_s` delays statements, and `lost` is what happens to the next one.

    "request": it never arrives. "late request": it arrives after the node gave up. "response": it is done, and the node
    does not learn of it. "quorum": it is visible, and durable only after the node gave up.
    """

    server: SimServer

    def __init__(self, server: SimServer, dice: Random, fired: Callable[[str], None]) -> None:
        super().__init__(server)
        self.slowness_s = 0.0
        self.lost: str | None = None
        self.on_sent: Callable[[], None] | None = None  # called once, with the next statement of a leader
        self.before, self.after = self._travel, self._replicate
        self._running: set[asyncio.Task[None]] = set()
        self._dice = dice
        self._fired = fired
        self._response_s = dice.choice(RESPONSE_S)

    async def _travel(self, call: str) -> None:
        await asyncio.sleep(self._delay_s())
        if call == "append" and self.server.is_full:
            raise DiskFull("the simulated server is full")

    async def _replicate(self, call: str) -> None:
        await asyncio.sleep(self._late_s() if is_stalled.get() else self._delay_s())

    def _late_s(self) -> float:
        return self._dice.choice((0.4, 2.0, 20.0))

    def _delay_s(self) -> float:
        return self._dice.random() * (self.slowness_s or 0.002)

    # -- statements ---------------------------------------------------------------------------------------------------

    async def head(self) -> Head:
        return await self._ask("head", super().head)

    async def read(self, after: int, limit: int) -> list[Record]:
        return await self._ask("read", partial(super().read, after, limit))

    async def append(self, record: Record, acked: int) -> None:
        await self._ask("append", partial(self._append, record, acked, self.epoch))

    async def renew(self, acked: int) -> int:
        return await self._ask("renew", partial(self._renew, acked, self.epoch))

    async def take_over(self, seen: Head, *, holder: str, url: str, epoch: int) -> Head | None:
        return await self._ask("take_over", partial(self._take_over, seen, holder, url, epoch))

    async def resolve(self, epoch: int) -> Head:
        return await self._ask("resolve", partial(self._resolve, epoch))

    async def _ask(self, call: str, statement: Statement[T]) -> T:
        """Send a statement and wait for its response."""
        loop = asyncio.get_running_loop()
        response: asyncio.Future[T] = loop.create_future()
        lost, self.lost = self.lost if call in LEADING else None, None if call in LEADING else self.lost
        if lost is not None and not self.is_reachable:
            lost = None
        if lost is not None:
            self._fired(f"journal {call}: lost {lost}")
        running = loop.create_task(self._run(statement, response, lost), context=contextvars.Context())
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        if call in LEADING and self.on_sent is not None:
            self.on_sent()
            self.on_sent = None
        give_up_s = min(self._response_s, 0.3) if lost is not None else self._response_s
        timer = loop.call_later(give_up_s, self._give_up, call, response)
        try:
            return await response
        finally:
            timer.cancel()

    def _give_up(self, call: str, response: asyncio.Future[T]) -> None:
        if not response.done():
            self._fired(f"journal {call}: no response")
            error = JournalOutcomeUnknown() if call in LEADING else JournalUnavailable("the server does not respond")
            response.set_exception(error)

    async def _run(self, statement: Statement[T], response: asyncio.Future[T], lost: str | None) -> None:
        """Run a statement on the server."""
        if lost == "request":
            return
        if lost == "late request":
            await asyncio.sleep(self._late_s())
        is_stalled.set(lost == "quorum")
        try:
            result = await statement()
        except Exception as error:
            if not response.done() and lost is None:
                response.set_exception(error)
            return
        if lost is None and self.is_reachable and not response.done():
            response.set_result(result)
