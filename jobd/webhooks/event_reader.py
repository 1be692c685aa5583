"""Read events for one endpoint and put messages into its outbox.

The cursor moves in the transaction that inserts the deliveries of committed events, so a crash skips no event.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

import structlog
from msgspec.structs import replace

from jobd.model.clocks import MonotonicS
from jobd.model.events import Event
from jobd.model.storage import EventPage
from jobd.model.webhooks import EVENTS_GONE, GAP_PENDING, Delivery, WebhookCursor, WebhookEndpoint
from jobd.webhooks.context import DispatchContext
from jobd.webhooks.message import Message, event_message, gap_message
from jobd.webhooks.problem_source import ProblemSource

PAGE: Final = 100  # events per read, which takes less than 2 ms
PAGE_PAUSE_S: Final = 0.002  # between two pages, so that workers get the disk
READ_INTERVAL_S: Final = 0.05  # between two reads at the last event; more would slow workers down
SAVE_S: Final = 10.0  # after which a cursor that moved only past unwanted events is saved
LAGGING_AFTER_S: Final = 60.0  # a reader lags if it has not reached the last event for this long

log = structlog.get_logger("jobd.webhooks")


class EventReader:
    """Puts new messages into the outbox and passes them to `enqueue`. Call `committed` with every commit.

    Every event up to `position` was read. `newest` is the number of the newest event.
    """

    def __init__(
        self,
        endpoint: WebhookEndpoint,
        cursor: WebhookCursor,
        last: int,
        context: DispatchContext,
        enqueue: Callable[[list[Delivery]], None],
    ) -> None:
        self.position = cursor.position if endpoint.reads_events else last
        self.newest = last
        self.has_unread = endpoint.reads_events
        self.problems = ProblemSource(endpoint, cursor.alerts, context)
        self._endpoint = endpoint
        self._cursor = cursor  # as stored
        self._context = context
        self._enqueue = enqueue
        self._loop_time: Callable[[], MonotonicS] = asyncio.get_running_loop().time  # type: ignore[assignment]
        self._is_reading = False
        self._read_at_s: MonotonicS | None = None  # when the reader reached the last event most recently
        self._next_read_s = MonotonicS(0.0)
        self._unsaved_since_s: MonotonicS | None = None
        self._writing = asyncio.Lock()

    def committed(self, changes: Sequence[Event]) -> bool:
        """Follow committed changes. Return whether there is new work.

        A reader at the last event skips unwanted events without reading the disk.
        """
        is_up_to_date = not self.has_unread and not self._is_reading
        self.newest = changes[-1].seq
        if self._endpoint.reads_events and not is_up_to_date:
            return False
        if self._endpoint.reads_events and any(self._endpoint.selects(change) for change in changes):
            self.has_unread = True
            return True
        self.position = self.newest
        return self._note_unsaved()

    @property
    def lag(self) -> int:
        """The number of unread events."""
        return max(self.newest - self.position, 0)

    @property
    def is_lagging(self) -> bool:
        """Whether the reader has not reached the last event for a while, or since the start."""
        return self._read_at_s is None or (self.has_unread and self._loop_time() - self._read_at_s > LAGGING_AFTER_S)

    def next_work_in_s(self, *, has_room: bool) -> list[float]:
        """Return the seconds until each kind of pending work; empty if there is none before the next event."""
        now_s, waits = self._loop_time(), []
        if self.has_unread and has_room:
            waits.append(self._next_read_s - now_s)
        if self._unsaved_since_s is not None:
            waits.append(self._unsaved_since_s + SAVE_S - now_s)
        return waits

    async def read(self, *, has_room: bool, may_report_gaps: bool) -> None:
        """Put changes of problems, and a page of events if there is room, into the outbox.

        Raises CannotWrite, in which case the next call reads the same events again. `may_report_gaps` is False while
        the outbox has a gap message.
        """
        now, source, name = self._context.moment().now, self._context.source, self._endpoint.name
        messages, announced = self.problems.poll(), self.problems.announced
        problems = len(messages)
        gone_to, position = self._cursor.gone_to, self.position
        reached_end = False
        if gone_to == GAP_PENDING and may_report_gaps:
            messages.append(gap_message(name, 0, position, now, source))
            gone_to = position
        if self.has_unread and has_room and self._loop_time() >= self._next_read_s:
            page = await self._page()
            if page.gone_to > max(position, gone_to):
                gone_to = page.gone_to
                messages.append(gap_message(name, position, gone_to, now, source))
            messages += [event_message(event, source) for event in page.events if self._endpoint.selects(event)]
            reached_end = not page.more
            position = page.end
        if messages or announced != self._cursor.alerts:
            await self._write(messages, position, gone_to, announced)
            self.problems.written(problems)
        elif position != self.position:
            self.position = position
            self._note_unsaved()
        if reached_end:
            self.has_unread, self._read_at_s = self.position < self.newest, self._loop_time()

    async def add(self, message: Message) -> Delivery:
        """Put a message without an event into the outbox. Raises CannotWrite."""
        return (await self._write([message]))[0]

    async def store_outcomes(self, tried: list[Delivery], now: int) -> None:
        """Store the results of deliveries. If that dropped dead letters, report a gap later."""
        async with self._writing:
            if await self._context.storage.store_outcomes(tried, now):
                self._cursor = replace(self._cursor, gone_to=GAP_PENDING)

    async def save(self, *, at_once: bool = False) -> None:
        """Save the cursor if it moved SAVE_S ago. Pruning past an old cursor would look like a gap."""
        since_s = self._unsaved_since_s
        if since_s is not None and (at_once or self._loop_time() >= since_s + SAVE_S):
            await self._write([])

    async def _page(self) -> EventPage:
        self._is_reading = True
        try:
            page = await self._context.storage.events_after(self.position, PAGE)
        finally:
            self._is_reading = False
        self._next_read_s = self._loop_time() + (PAGE_PAUSE_S if page.more else READ_INTERVAL_S)
        return page

    async def _write(
        self,
        messages: list[Message],
        position: int | None = None,
        gone_to: int | None = None,
        announced: dict[str, int] | None = None,
    ) -> list[Delivery]:
        """Write deliveries and cursor in one transaction. Omitted values stay as they are."""
        name, context = self._endpoint.name, self._context
        async with self._writing:
            at = context.moment()  # `aging`: with the time of a clock that is ahead, retries would not end
            new = [context.new_delivery(message, name, at) for message in messages]
            cursor = WebhookCursor(
                name,
                self.position if position is None else position,
                self._cursor.gone_to if gone_to is None else gone_to,
                context.next_delivery,
                self._cursor.alerts if announced is None else announced,
                at.aging,
            )
            await context.storage.plan_deliveries(cursor, new)
            self._cursor, self._unsaved_since_s = cursor, None
            self.position = max(self.position, cursor.position)
            if self.position > cursor.position:
                self._note_unsaved()  # it moved during the write
        self._enqueue(new)
        if any(message.type == EVENTS_GONE for message in messages):
            log.warning("webhook_gap", webhook=name, upto=cursor.gone_to)
        return new

    def _note_unsaved(self) -> bool:
        """Remember that the cursor is not saved. Return whether it was saved before."""
        if self._unsaved_since_s is not None:
            return False
        self._unsaved_since_s = self._loop_time()
        return True
