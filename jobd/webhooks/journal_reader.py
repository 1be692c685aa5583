"""What an endpoint is to be told: the journal from where it is, and alerts, as deliveries in its outbox.

The journal is the queue: an event is committed before anybody here knows of it, and the cursor moves in the transaction
that puts its delivery into the outbox. So whatever crashes, nothing is passed over. Sends nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

import structlog
from msgspec.structs import replace

from jobd.model.events import Change
from jobd.model.storage import JournalPage
from jobd.model.webhooks import EVENTS_GONE, GAP_PENDING, Delivery, WebhookCursor, WebhookEndpoint
from jobd.webhooks.alert_source import AlertSource
from jobd.webhooks.context import DispatchContext
from jobd.webhooks.message import Message, event_message, gap_message

PAGE: Final = 100  # events of the journal read in one go: below 2 ms
PAGE_PAUSE_S: Final = 0.002  # after a page, where there is more, so that workers get the disk in between
READ_INTERVAL_S: Final = 0.05  # between two looks at the journal: a look for each commit would cost the workers dear
SAVE_S: Final = 10.0  # a cursor that only passed by what nobody wanted is written so seldom
LAGGING_AFTER_S: Final = 60.0  # who has not read the journal to its end for so long lags

log = structlog.get_logger("jobd.webhooks")


class JournalReader:
    """`read_on` puts what is new into the outbox, and calls `put` with it. `committed` is told of every commit.

    `position`: every event up to it was looked at; `newest`: the newest that there is.
    """

    def __init__(
        self,
        endpoint: WebhookEndpoint,
        cursor: WebhookCursor,
        last: int,
        office: DispatchContext,
        put: Callable[[list[Delivery]], None],
    ) -> None:
        self.position = cursor.position if endpoint.reads_journal else last
        self.newest = last
        self.has_news = endpoint.reads_journal
        self.gaps = 0
        self.alerts = AlertSource(endpoint, cursor.alerts, office)
        self._endpoint = endpoint
        self._cursor = cursor  # as it is on the disk
        self._context = office
        self._enqueue = put
        self._loop_time = asyncio.get_running_loop().time
        self._is_reading = False
        self._read_at_s: float | None = None  # when the journal was read to its end
        self._next_read_s = 0.0
        self._unsaved_since_s: float | None = None
        self._writing = asyncio.Lock()

    def committed(self, changes: Sequence[Change]) -> bool:
        """Changes are on the disk; whether there is something to do now that there was not before.

        Who has read everything before them passes by what he does not want, without a look at the disk.
        """
        is_up_to_date = not self.has_news and not self._is_reading
        self.newest = changes[-1].event.seq
        if self._endpoint.reads_journal and not is_up_to_date:
            return False
        if self._endpoint.reads_journal and any(self._endpoint.wants(change.event) for change in changes):
            self.has_news = True
            return True
        self.position = self.newest
        return self._note_unsaved()

    @property
    def lag(self) -> int:
        """Events that were not looked at yet."""
        return max(self.newest - self.position, 0)

    @property
    def lags(self) -> bool:
        """Whether the journal was not read to its end for a while, or not at all yet."""
        if not self._endpoint.reads_journal:
            return False
        return self._read_at_s is None or (self.has_news and self._loop_time() - self._read_at_s > LAGGING_AFTER_S)

    def next_work_in_s(self, *, has_room: bool) -> list[float]:
        """In how many seconds there is something to do: none, where only news would change that."""
        now_s, waits = self._loop_time(), []
        if self.has_news and has_room:
            waits.append(self._next_read_s - now_s)
        if self._unsaved_since_s is not None:
            waits.append(self._unsaved_since_s + SAVE_S - now_s)
        return waits

    async def read(self, *, has_room: bool, tells_gaps: bool) -> None:
        """Alerts, and where there is room a page of the journal. Raises DiskFull, and nothing has been passed over.

        One who has to read the state anew is not told so again while he does not take that: `tells_gaps` is False.
        """
        now, source, name = self._context.moment().now, self._context.source, self._endpoint.name
        letters, told = self.alerts.poll(), self.alerts.announced
        alerts = len(letters)
        gone_to, position = self._cursor.gone_to, self.position
        is_whole = False
        if gone_to == GAP_PENDING and tells_gaps:
            letters.append(gap_message(name, 0, position, now, source))
            gone_to = position
        if self.has_news and has_room and self._loop_time() >= self._next_read_s:
            page = await self._page()
            if page.gone_to > max(position, gone_to):
                gone_to = page.gone_to
                letters.append(gap_message(name, position, gone_to, now, source))
            letters += [event_message(event, source) for event in page.events if self._endpoint.wants(event)]
            is_whole = not page.more
            position = page.end
        if letters or told != self._cursor.alerts:
            await self._write(letters, now, position, gone_to, told)
            self.alerts.written(alerts)
        elif position != self.position:
            self.position = position
            self._note_unsaved()
        if is_whole:
            self.has_news, self._read_at_s = self.position < self.newest, self._loop_time()

    async def add(self, letter: Message) -> Delivery:
        """A message beside the journal. Raises DiskFull."""
        return (await self._write([letter], self._context.moment().now))[0]

    async def settle(self, settled: list[Delivery], now: int) -> None:
        """Note what came of deliveries. Where of what was given up some is kept no longer, that is a gap."""
        async with self._writing:
            if await self._context.disk.settle_deliveries(settled, now):
                self._cursor = replace(self._cursor, gone_to=GAP_PENDING)

    async def save(self, *, at_once: bool = False) -> None:
        """A cursor that does not move on the disk would seem to have missed what is pruned behind it."""
        since_s = self._unsaved_since_s
        if since_s is not None and (at_once or self._loop_time() >= since_s + SAVE_S):
            await self._write([], self._context.moment().now)

    async def _page(self) -> JournalPage:
        self._is_reading = True
        try:
            page = await self._context.disk.journal(self.position, PAGE)
        finally:
            self._is_reading = False
        self._next_read_s = self._loop_time() + (PAGE_PAUSE_S if page.more else READ_INTERVAL_S)
        return page

    async def _write(
        self,
        letters: list[Message],
        now: int,
        position: int | None = None,
        gone_to: int | None = None,
        told: dict[str, int] | None = None,
    ) -> list[Delivery]:
        """Deliveries and cursor, together. What is not given stays as it is."""
        name, office = self._endpoint.name, self._context
        async with self._writing:
            new = [office.new_delivery(letter, name, now) for letter in letters]
            cursor = WebhookCursor(
                name,
                self.position if position is None else position,
                self._cursor.gone_to if gone_to is None else gone_to,
                office.next_delivery,
                self._cursor.alerts if told is None else told,
                now,
            )
            await office.disk.plan_deliveries(cursor, new)
            self._cursor, self._unsaved_since_s = cursor, None
            self.position = max(self.position, cursor.position)
            if self.position > cursor.position:
                self._note_unsaved()  # it has passed by more meanwhile
        self._enqueue(new)
        if any(letter.type == EVENTS_GONE for letter in letters):
            self.gaps += 1
            log.warning("webhook_gap", webhook=name, upto=cursor.gone_to)
        return new

    def _note_unsaved(self) -> bool:
        """Whether it was not so before."""
        if self._unsaved_since_s is not None:
            return False
        self._unsaved_since_s = self._loop_time()
        return True
