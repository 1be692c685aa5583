"""Send committed events to listeners: first from the event log, then live, in order, each event once.

Publishing only queues the changes, so it never blocks the actor. A listener that reads too slowly is cut off; its
client can resume from the event that it received last.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import structlog

from jobd.engine.change_watchers import Watcher, Watchers
from jobd.engine.clock import loop_time
from jobd.model.clocks import MonotonicS
from jobd.model.errors import api_error
from jobd.model.events import Event, EventFilter, StreamedEvent, streamed_event
from jobd.model.storage import EventPage, EventStorage

RETRY_MS: Final = 2_000  # how long a client should wait before it connects again
HEARTBEAT_S: Final = 15.0  # longest time without data, so that proxies and clients detect a dead peer
GATHER_S: Final = 0.01  # between two rounds, because each round wakes every listener
BACKLOG_BYTES: Final = 8 << 20  # of events that listeners have not received; all listeners share it
PIECE_BYTES: Final = 64 << 10  # approximate size of one write
PAGE: Final = 100  # events of the event log read between two batches: below 2 ms
PAUSE_S: Final = 0.002  # after each page, so that workers get the disk in between
SHARED_PAGES: Final = 8  # kept for listeners that resume from about the same event
JOIN_WITHIN: Final = 2_000  # events before the newest; from there on a listener also gets live events
CLOSING_S: Final = 1.0  # for the last pieces to be written when the daemon stops

log = structlog.get_logger("jobd.feed")

_encode: Final = msgspec.json.Encoder().encode


def _encoded(event: Event) -> tuple[StreamedEvent, bytes]:
    """Return an event with its text for listeners."""
    shown = streamed_event(event)
    return shown, b"id: %d\nevent: %b\ndata: %b\n\n" % (shown.seq, shown.type.encode(), _encode(shown))


class EventBatch:
    """The events of one round. `text` has all of them."""

    __slots__ = ("frames", "text")

    def __init__(self, events: Sequence[Event]) -> None:
        self.frames = [_encoded(event) for event in events]
        self.text = b"".join(text for _, text in self.frames)

    def since(self, position: int, wanted: EventFilter) -> bytes:
        """Return the events after `position` that `wanted` selects."""
        if wanted.matches_everything and self.frames[0][0].seq > position:
            return self.text
        return b"".join(text for event, text in self.frames if event.seq > position and wanted.matches(event))

    @property
    def last(self) -> int:
        return self.frames[-1][0].seq


class Piece:
    """A page of the event log: every event after `begin` up to `end`. Listeners that continue within it share it.

    `last` and `gone_to` are those of the log when it was read. `more`: the log had later events. `number` counts reads.
    """

    __slots__ = ("_round", "begin", "end", "events", "gone_to", "last", "more", "number")

    def __init__(self, after: int, page: EventPage, number: int) -> None:
        self.events = page.events
        self.begin, self.end = after, page.end
        self.last, self.gone_to, self.more = page.last, page.gone_to, page.more
        self.number = number
        self._round: EventBatch | None = None

    def since(self, position: int, wanted: EventFilter) -> bytes:
        """Return the events after `position` that `wanted` selects."""
        if not wanted.matches_everything:
            some = (event for event in self.events if event.seq > position and wanted.matches(event))
            return b"".join(_encoded(event)[1] for event in some)
        return self.round.since(position, wanted) if self.events else b""

    @property
    def round(self) -> EventBatch:
        """The encoded events, made once for all listeners without a filter."""
        if self._round is None:
            self._round = EventBatch(self.events)
        return self._round


class LogReader:
    """Reads pages of the event log, one at a time, and keeps the latest ones for listeners that resume together."""

    def __init__(self, storage: EventStorage) -> None:
        self._storage = storage
        self._turn = asyncio.Lock()
        self._pieces: deque[Piece] = deque(maxlen=SHARED_PAGES)
        self._reads = 0

    async def page(self, after: int, *, is_first: bool = False) -> Piece:
        """Return the page after event `after`. With `is_first`, it is not older than the call.

        Raises ApiException (410) if later events are gone.
        """
        began = self._reads + (is_first or not self._turn.locked())  # the first read that is new enough
        if (piece := self._kept(after, began, is_first)) is not None:
            await asyncio.sleep(0)
            return piece
        async with self._turn:
            if (piece := self._kept(after, began, is_first)) is not None:
                return piece
            self._reads += 1
            piece = Piece(after, await self._storage.events_after(after, PAGE), self._reads)
            _check_piece(after, piece)
            self._pieces.append(piece)
            await asyncio.sleep(PAUSE_S)
            return piece

    def _kept(self, after: int, began: int, is_first: bool) -> Piece | None:
        """Return a page with the events after `after`. One that was read before `began` must be complete."""
        for each in self._pieces:
            is_new = each.number >= began
            end = each.end + 1 if is_new and not each.more else each.end
            if each.begin <= after < end and (is_new or (each.more and not is_first)):
                return each
        return None

    def forget(self) -> None:
        self._pieces.clear()


def _check_piece(after: int, piece: Piece) -> None:
    if after > piece.last:
        message = f"Event {after} does not exist yet; it may come from another store. {_READ_AGAIN}"
        raise api_error("events_gone", message, last=piece.last)
    if after < piece.gone_to:
        message = f"Some events after {after} are no longer in the event log. {_READ_AGAIN}"
        raise api_error("events_gone", message, last=piece.last)


class EventFeed:
    """Send committed events to listeners. `last` is the seq of the newest event.

    `most` is the limit of listeners; `dropped` counts those that were cut off because they read too slowly.
    """

    def __init__(self, storage: EventStorage, last: int, most: int) -> None:
        self.last = last
        self.dropped = 0
        self.is_closed = False
        self.rounds: deque[EventBatch] = deque()
        self.first = 0  # the number of rounds[0] among all rounds
        self._most = most
        self._listeners: set[Subscriber] = set()
        self._watchers = Watchers()
        self._live = 0  # listeners that get live events
        self._bytes = 0
        self._news: list[Sequence[Event]] = []
        self._next_round_s = MonotonicS(0.0)
        self._timer: asyncio.TimerHandle | None = None
        self.reader = LogReader(storage)

    @property
    def listeners(self) -> int:
        return len(self._listeners) + len(self._watchers)

    def publish(self, changes: Sequence[Event]) -> None:
        """Queue committed changes, in their order. The actor calls this."""
        self.last = changes[-1].seq
        if self._watchers:
            self._watchers.notify(changes)
        if self._live:
            self._news.append(changes)
            if self._timer is None:
                wait_s = max(self._next_round_s - loop_time(), 0.0)
                self._timer = asyncio.get_running_loop().call_later(wait_s, self._begin_round)

    def listen(self, wanted: EventFilter, *, follow: bool, cut: Callable[[], None]) -> Subscriber:
        """Add a listener, which `leave` removes. `cut` closes the connection of one that does not read.

        Raises ApiException if the daemon is stopping, or if there are too many listeners.
        """
        self._check_place()
        listener = Subscriber(self, wanted, follow=follow, cut=cut)
        self._listeners.add(listener)
        return listener

    def watch(self, *, queue: str | None, job_id: str | None, cut: Callable[[], None]) -> Watcher:
        """Add a watcher, which only learns that something has changed. Raises ApiException, as `listen` does."""
        self._check_place()
        return Watcher(self._watchers, queue, job_id, cut)

    def touch(self, job_id: str) -> None:
        """Wake the watchers of a job, of which something has changed that is no event."""
        self._watchers.touch(job_id)

    def _check_place(self) -> None:
        if self.is_closed:
            raise api_error("shutting_down", "The daemon is stopping; connect again in a moment.")
        if self.listeners >= self._most:
            message = f"{self._most} event streams are open already (limits.event_streams); try again later."
            raise api_error("overloaded", message)

    def close(self) -> None:
        """Send the remaining events, then end all streams. Cut off slow listeners after CLOSING_S."""
        self._begin_round()
        self.is_closed = True
        self._wake()
        self._watchers.end()
        if self.listeners:
            asyncio.get_running_loop().call_later(CLOSING_S, self._cut_all)

    def join(self) -> int:
        """Count a listener of live events. Return the number of its first round."""
        self._live += 1
        return self.first + len(self.rounds)

    def leave(self, listener: Subscriber, *, was_live: bool) -> None:
        self._listeners.discard(listener)
        self._live -= was_live
        if not self._listeners:
            self.reader.forget()
        if not self._live:
            self._bytes = 0
            self.first += len(self.rounds)
            self.rounds.clear()
            self._news.clear()

    # -- rounds --------------------------------------------------------------------------------------------------------

    def _begin_round(self) -> None:
        """Make a round of the events since the last one, and wake the listeners."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._next_round_s = loop_time() + GATHER_S
        events = [event for events in self._news for event in events]
        self._news.clear()
        if events:
            self.rounds.append(EventBatch(events))
            self._bytes += len(self.rounds[-1].text)
            self._forget()
            self._wake()

    def _forget(self) -> None:
        """Drop the oldest rounds over BACKLOG_BYTES, and cut off the listeners that have not received them."""
        first = self.first
        while self._bytes > BACKLOG_BYTES and len(self.rounds) > 1:
            self._bytes -= len(self.rounds.popleft().text)
            self.first += 1
        if self.first > first:
            for listener in [each for each in self._listeners if each.is_behind and not each.is_cut]:
                self.dropped += 1
                log.info("event_stream_dropped", position=listener.position, newest=self.last)
                listener.cut()

    def _wake(self) -> None:
        for listener in self._listeners:
            listener.news.set()

    def _cut_all(self) -> None:
        for listener in list(self._listeners):
            listener.cut()
        self._watchers.cut()


class Subscriber:
    """One stream. Call `begin`, then `more` until it returns nothing, and `leave` in any case.

    All selected events up to `position` were returned.
    """

    def __init__(self, feed: EventFeed, wanted: EventFilter, *, follow: bool, cut: Callable[[], None]) -> None:
        self.position = 0
        self.news = asyncio.Event()
        self._feed = feed
        self._wanted = wanted
        self._follow = follow
        self._cut = cut
        self._is_live = False  # gets live events
        self._is_caught_up = False  # needs no more events from the event log
        self.is_cut = False
        self._round = 0
        self._until = 0  # later events are live; a stream that does not follow ends here
        self._page: Piece | None = None
        self._idle_since_s = MonotonicS(0.0)

    @property
    def is_behind(self) -> bool:
        """Whether the backlog has lost a round that this stream has not returned."""
        return self._is_live and self._round < self._feed.first

    async def begin(self, after: int | None, back: int = 0) -> bytes:
        """Return the first bytes. The stream starts after the event `after`, else `back` events ago, else now.

        Raises ApiException if events after `after` are no longer in the event log.
        """
        self._until = self._feed.last
        if after is not None:
            self._page = await self._feed.reader.page(after, is_first=True)
            self.position = after
        elif back:
            self._page = await self._page_from_back(back)
        else:
            self.position = self._feed.last
            self._join()
            self._is_caught_up = True
        return b"retry: %d\nid: %d\n\n" % (RETRY_MS, self.position)

    async def more(self) -> bytes:
        """Return the next events or a heartbeat, nothing at the end. Raises ApiException, as `begin` does."""
        if self._feed.is_closed and not self._is_caught_up:
            if self._follow:
                return b""
            raise api_error("shutting_down", "The daemon is stopping, and some events were not sent.")
        self._idle_since_s = loop_time()
        return await (self._from_backlog() if self._is_caught_up else self._from_storage())

    def cut(self) -> None:
        """Close the connection, because the client reads too slowly."""
        self.is_cut = True
        self._cut()
        self.news.set()

    def leave(self) -> None:
        self._feed.leave(self, was_live=self._is_live)
        self._is_live = False

    def _join(self) -> None:
        self._round = self._feed.join()
        self._is_live = True
        self._until = self._feed.last

    async def _page_from_back(self, back: int) -> Piece:
        """Return the page that begins `back` events ago, or after the last gap in the event log."""
        page = await self._feed.reader.page(self._feed.last, is_first=True)
        self.position = max(page.last - back, page.gone_to, 0)
        return await self._feed.reader.page(self.position, is_first=True)

    async def _from_storage(self) -> bytes:
        """Return the selected events of the next page. Near the end of the event log, begin to queue live events.

        So no event is missed, even if events are committed faster than the pages are read.
        """
        page, self._page = self._page or await self._feed.reader.page(self.position), None
        text = page.since(self.position, self._wanted)
        self.position = max(self.position, page.end)
        if self._follow and not self._is_live and self._feed.last - self.position < JOIN_WITHIN:
            self._join()
        self._is_caught_up = self.position >= self._until and (self._is_live or not self._follow)
        return text or self._marker()

    async def _from_backlog(self) -> bytes:
        """Return live events of about PIECE_BYTES. Wait if there are none; after HEARTBEAT_S, return a heartbeat."""
        if not self._follow:
            return b""
        while not (text := self._take()):
            if self.is_cut or self._feed.is_closed:
                return b""
            left_s = self._idle_since_s + HEARTBEAT_S - loop_time()
            try:
                async with asyncio.timeout(left_s):
                    await self.news.wait()
            except TimeoutError:
                return b": still here\n" + self._marker()
        return text

    def _take(self) -> bytes:
        self.news.clear()
        taken, size = [], 0
        if self.is_behind:
            return b""
        while size < PIECE_BYTES and (at := self._round - self._feed.first) < len(self._feed.rounds):
            news = self._feed.rounds[at]
            taken.append(news.since(self.position, self._wanted))
            size += len(taken[-1])
            self.position = max(self.position, news.last)
            self._round += 1
        return b"".join(taken)

    def _marker(self) -> bytes:
        """Return an id that moves the client's Last-Event-ID past events that were not selected."""
        return b"id: %d\n\n" % self.position


_READ_AGAIN: Final = "Read the state again, then connect without Last-Event-ID."
