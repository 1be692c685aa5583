"""Event streams: each event once and in order, from the journal to live; slow subscribers delay nothing."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
from structlog.testing import capture_logs

from jobd.engine import event_feed
from jobd.engine.event_feed import HEARTBEAT_S, PAGE, EventFeed, Subscriber
from jobd.model.errors import ApiException
from jobd.model.events import Event, EventFilter
from tests.support.factories import ChangeFactory
from tests.support.memory_storage import MemoryStorage
from tests.support.virtual_engine import in_virtual_time, seconds

ALL = EventFilter()


class FeedHarness:
    """A journal with commits and subscribers. Commits may be published later, as the actor does."""

    def __init__(self, max_events: int = 10) -> None:
        self.disk = MemoryStorage()
        self.maker = ChangeFactory()
        self.feed = EventFeed(self.disk, 0, max_events)
        self.cuts: list[Subscriber] = []
        self._unpublished: list[Sequence[Event]] = []

    async def commit(self, count: int = 1, *, notify: bool = True, **fields: Any) -> None:
        await self.write([self.maker.create(**fields) for _ in range(count)], notify=notify)

    async def write(self, changes: list[Event], *, notify: bool = True) -> None:
        await self.disk.write(self.maker.batch(changes))
        self._unpublished.append(changes)
        if notify:
            self.publish()

    def publish(self) -> None:
        for changes in self._unpublished:
            self.feed.publish(changes)
        self._unpublished.clear()

    def listen(self, wanted: EventFilter = ALL, *, follow: bool = True) -> Subscriber:
        listener = self.feed.listen(wanted, follow=follow, cut=lambda: self.cuts.append(listener))
        return listener

    async def begun(self, wanted: EventFilter = ALL, after: int | None = None, *, follow: bool = True) -> Subscriber:
        listener = self.listen(wanted, follow=follow)
        await listener.begin(after)
        return listener


@pytest.fixture
def stage() -> FeedHarness:
    return FeedHarness()


def events_in(piece: bytes) -> list[dict[str, Any]]:
    """Return the events in the sent bytes."""
    lines = piece.decode().splitlines()
    assert all(line.startswith(("id: ", "event: ", "data: ", ": ")) for line in lines if line), piece
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


def numbers(piece: bytes) -> list[int]:
    return [event["seq"] for event in events_in(piece)]


@in_virtual_time
async def test_a_reader_that_waits_for_the_next_page_gets_it(stage: FeedHarness) -> None:
    await stage.commit(PAGE + 1)
    first, second, third = await asyncio.gather(*[stage.feed.reader.page(after) for after in (0, PAGE, PAGE)])
    assert [(page.begin, page.end, page.number) for page in (first, second)] == [(0, PAGE, 1), (PAGE, PAGE + 1, 2)]
    assert second is third, "it is read once for both"
    first, second = await asyncio.gather(*[stage.feed.reader.page(PAGE) for _ in range(2)])
    assert (first is second, first.number) == (True, 3)


async def received(listener: Subscriber, up_to: int) -> list[int]:
    """Return all that a subscriber receives up to this position."""
    found: list[int] = []
    while listener.position < up_to:
        found += numbers(await listener.more())
    return found


@in_virtual_time
async def test_an_event_is_encoded_for_the_stream(stage: FeedHarness) -> None:
    listener = stage.listen()
    assert await listener.begin(None) == b"retry: 2000\nid: 0\n\n"
    change = stage.maker.create()
    await stage.write([change])
    event = change
    head, _, data = (await listener.more()).partition(b"data: ")
    assert head == b"id: 1\nevent: created\n"
    assert data.endswith(b"\n\n")
    assert json.loads(data) == {
        "seq": 1, "at": event.at, "type": "created", "from": None, "to": "queued", "by": event.by, "reason": None,
        "details": event.details or {}, "job_id": event.job_id, "queue": event.queue,
    }  # fmt: skip


@in_virtual_time
async def test_an_event_of_a_queue_names_no_job(stage: FeedHarness) -> None:
    listener = await stage.begun()
    await stage.write([stage.maker.queue_event("video", True)])
    [event] = events_in(await listener.more())
    assert (event["job_id"], event["queue"]) == (None, "video")


@in_virtual_time
async def test_a_new_subscriber_gets_only_new_events(stage: FeedHarness) -> None:
    await stage.commit(3)
    listener = stage.listen()
    assert await listener.begin(None) == b"retry: 2000\nid: 3\n\n"
    await stage.commit(2)
    assert numbers(await listener.more()) == [4, 5]


@in_virtual_time
async def test_without_subscribers_nothing_is_kept(stage: FeedHarness) -> None:
    await stage.commit(3)
    assert (stage.feed.last, stage.feed._news, len(stage.feed.rounds)) == (3, [], 0)
    replaying = stage.listen()
    await replaying.begin(0)
    await stage.commit(3)  # it comes from the journal
    assert (stage.feed.last, stage.feed._news) == (6, [])


@in_virtual_time
async def test_an_event_is_encoded_once_for_all_subscribers(stage: FeedHarness) -> None:
    first, second = await stage.begun(), await stage.begun()
    await stage.commit(5)
    assert await first.more() is await second.more()


@in_virtual_time
async def test_frequent_events_are_sent_in_batches(stage: FeedHarness) -> None:
    listener = await stage.begun()
    await stage.commit()
    assert numbers(await listener.more()) == [1]
    for _ in range(3):
        await stage.commit()
        await seconds(event_feed.GATHER_S / 4)
    assert numbers(await listener.more()) == [2, 3, 4]
    assert len(stage.feed.rounds) == 2


@pytest.mark.parametrize("wanted", [ALL, EventFilter(types=frozenset({"created"}))], ids=["all", "filtered"])
@pytest.mark.parametrize("seed", range(10))
@in_virtual_time
async def test_the_switch_from_journal_to_live_has_no_gap_or_repeat(
    seed: int, wanted: EventFilter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commits, some published late, at every point of the switch."""

    monkeypatch.setattr(event_feed, "JOIN_WITHIN", 2 * PAGE)
    dice, stage = random.Random(seed), FeedHarness()
    for _ in range(dice.randrange(1, 4 * PAGE // 10)):
        await stage.commit(10)
    after = dice.randrange(stage.feed.last)
    listener = await stage.begun(wanted, after)
    found: list[int] = []
    for _ in range(60):
        for _ in range(dice.randrange(3)):
            await stage.commit(dice.choice((1, 5, PAGE)), notify=dice.random() < 0.5)
        more = asyncio.ensure_future(listener.more())
        for _ in range(dice.randrange(5)):
            await asyncio.sleep(dice.choice((0, 0.001, 0.005)))
            await stage.commit(notify=dice.random() < 0.5)
        stage.publish()
        found += numbers(await more)
    await stage.commit()
    found += await received(listener, stage.feed.last)
    assert found == list(range(after + 1, stage.feed.last + 1))
    assert listener._is_caught_up


@in_virtual_time
async def test_unused_numbers_are_not_a_gap(stage: FeedHarness) -> None:
    await stage.commit(3)
    stage.maker.numbers = stage.disk.numbers = type(stage.disk.numbers)(next_job=4, next_event=1000)
    assert await (await stage.begun(after=3)).more() == b"id: 999\n\n"
    listener = await stage.begun(after=2)
    assert await received(listener, 999) == [3]
    await stage.commit()
    assert await received(listener, 1000) == [1000]


@in_virtual_time
async def test_unwanted_events_are_skipped_and_the_position_advances(stage: FeedHarness) -> None:
    await stage.commit(PAGE + 10)
    name = stage.disk.events[4].job_id
    listener = await stage.begun(EventFilter(job_ids=frozenset({name})), after=0)
    assert numbers(await listener.more()) == [5]
    assert await listener.more() == b"id: %d\n\n" % (PAGE + 10)
    await listener.more()
    paused = stage.maker.queue_event("video", True)
    await stage.write([paused])
    assert await listener.more() == b": still here\nid: %d\n\n" % (PAGE + 11)


@in_virtual_time
async def test_a_filtered_stream_continues_within_a_page_that_another_has_read(stage: FeedHarness) -> None:
    await stage.commit(3 * PAGE)
    wanted = EventFilter(types=frozenset({"created"}))
    readers = [await stage.begun(wanted, after, follow=False) for after in (0, PAGE // 2)]
    for reader, after in zip(readers, (0, PAGE // 2), strict=True):
        assert await received(reader, 3 * PAGE) == list(range(after + 1, 3 * PAGE + 1))


@in_virtual_time
async def test_all_filters_have_to_match(stage: FeedHarness) -> None:
    queue = EventFilter(queues=frozenset({"video", "mail"}), types=frozenset({"queue_paused"}))
    listener = await stage.begun(queue)
    await stage.write([stage.maker.queue_event(name, name != "mail") for name in ("video", "mail", "audio")])
    assert [event["queue"] for event in events_in(await listener.more())] == ["video"]


@in_virtual_time
async def test_an_idle_stream_gets_heartbeats(stage: FeedHarness) -> None:
    listener = await stage.begun()
    loop = asyncio.get_running_loop()
    for _ in range(3):
        before = loop.time()
        assert await listener.more() == b": still here\nid: 0\n\n"
        assert loop.time() - before == pytest.approx(HEARTBEAT_S)


@in_virtual_time
async def test_a_stream_that_skips_all_events_gets_heartbeats(stage: FeedHarness) -> None:
    listener = await stage.begun(EventFilter(job_ids=frozenset({"another"})))
    loop = asyncio.get_running_loop()
    more, before = asyncio.ensure_future(listener.more()), loop.time()
    while not more.done():
        await stage.commit()
        await seconds(0.5)
    assert (await more).startswith(b": still here\n")
    assert loop.time() - before == pytest.approx(HEARTBEAT_S, abs=1)


@in_virtual_time
async def test_a_slow_subscriber_is_cut_and_the_others_continue() -> None:
    with pytest.MonkeyPatch.context() as patch, capture_logs() as logs:
        patch.setattr(event_feed, "BACKLOG_BYTES", 3_000)
        stage = FeedHarness()
        slow, quick = await stage.begun(), await stage.begun()
        for _ in range(30):
            await stage.commit()
            assert len(numbers(await quick.more())) == 1
    assert stage.cuts == [slow]
    assert (stage.feed.dropped, slow.position) == (1, 0)
    assert [(entry["event"], entry["position"]) for entry in logs] == [("event_stream_dropped", 0)]
    assert await slow.more() == b""
    slow.leave()
    again = await stage.begun(after=slow.position)  # it connects again and loses nothing
    assert await received(again, 30) == list(range(1, 31))


@in_virtual_time
async def test_one_large_batch_cuts_no_subscriber() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(event_feed, "BACKLOG_BYTES", 10)
        stage = FeedHarness()
        listener = await stage.begun()
        await stage.commit(50)
        assert len(numbers(await listener.more())) == 50
        await stage.commit(50)
        assert len(numbers(await listener.more())) == 50
    assert stage.cuts == []


@in_virtual_time
async def test_pieces_have_a_limited_size() -> None:
    stage = FeedHarness()
    listeners = [await stage.begun(), await stage.begun()]
    for _ in range(3):
        await stage.commit(2)
        await seconds(event_feed.GATHER_S)
    size = len(stage.feed.rounds[0].text)
    for limit, pieces in ((10, [[1, 2], [3, 4], [5, 6]]), (size + 1, [[1, 2, 3, 4], [5, 6]])):
        listener = listeners.pop()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(event_feed, "PIECE_BYTES", limit)
            assert [numbers(await listener.more()) for _ in pieces] == pieces


@in_virtual_time
async def test_the_number_of_streams_is_limited_and_ended_ones_do_not_count() -> None:
    stage = FeedHarness(max_events=2)
    first, second = await stage.begun(), await stage.begun(after=0)
    with pytest.raises(ApiException) as no:
        stage.listen()
    assert no.value.error.code == "overloaded"
    assert "limits.event_streams" in no.value.error.message
    await stage.commit()
    await seconds(1)
    assert len(stage.feed.rounds) == 1
    first.leave()
    assert (stage.feed.listeners, len(stage.feed.rounds)) == (1, 0)
    third = await stage.begun()
    await stage.commit()
    assert numbers(await third.more()) == [2]
    assert await received(second, 2) == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0, 37, 3 * PAGE])
@in_virtual_time
async def test_many_resuming_subscribers_catch_up_while_events_continue(spread: int) -> None:
    """Each page is read once for all of them, so each can be slower than all new events."""

    stage = FeedHarness(max_events=100)
    await stage.commit(500)
    found: dict[Subscriber, list[int]] = {}

    async def listen(after: int) -> None:
        listener = await stage.begun(after=after)
        found[listener] = [after]
        while listener.position < 3_000:
            found[listener] += numbers(await listener.more())

    listeners = [asyncio.create_task(listen(number * spread // 40)) for number in range(40)]
    while stage.feed.last < 3_000:  # 3,000 per second
        await stage.commit(15)
        await seconds(0.005)
    await asyncio.gather(*listeners)
    assert stage.cuts == []
    assert all(listener._is_caught_up for listener in found)
    assert stage.disk.calls["events_after"] < 150
    for events in found.values():
        assert events == list(range(events[0], events[-1] + 1))


@in_virtual_time
async def test_without_follow_the_stream_ends_at_the_initial_end_of_the_journal(stage: FeedHarness) -> None:
    """It would never end if many events arrive meanwhile."""
    await stage.commit(2 * PAGE + 50)
    listener = await stage.begun(after=0, follow=False)
    found: list[int] = []
    while piece := await listener.more():
        found += numbers(piece)
        await stage.commit(PAGE)
    assert found[: 2 * PAGE + 50] == list(range(1, 2 * PAGE + 51))
    assert len(found) <= 3 * PAGE


@in_virtual_time
async def test_pruned_events_are_an_error_at_the_start_and_later(stage: FeedHarness) -> None:
    await stage.commit(3 * PAGE)
    listener = await stage.begun(after=0)
    assert len(numbers(await listener.more())) == PAGE
    stage.disk.gone_to = PAGE
    assert len(numbers(await listener.more())) == PAGE  # the part that it has not read yet is complete
    stage.disk.gone_to = 3 * PAGE - 1
    for position in (listener.position, 0, 3 * PAGE - 2):
        with pytest.raises(ApiException) as no:
            await (listener.more() if position else stage.listen().begin(position))
        assert (no.value.error.code, no.value.error.details) == ("events_gone", {"last": 3 * PAGE})
        assert "Read the state again" in no.value.error.message
    assert numbers(await (await stage.begun(after=3 * PAGE - 1)).more()) == [3 * PAGE]


@in_virtual_time
async def test_a_position_beyond_the_journal_is_an_error(stage: FeedHarness) -> None:
    await stage.commit(3)
    with pytest.raises(ApiException) as no:
        await stage.begun(after=4)
    assert no.value.error.code == "events_gone"
    assert "another store" in no.value.error.message
    await stage.begun(after=3)


@in_virtual_time
async def test_a_position_that_is_committed_but_not_published_is_valid(stage: FeedHarness) -> None:
    await stage.commit(3, notify=False)
    listener = await stage.begun(after=0)
    assert await received(listener, 3) == [1, 2, 3]
    again = await stage.begun(after=3)
    stage.publish()
    await stage.commit()
    assert await received(again, 4) == [4]
    assert await received(listener, 4) == [4]


@in_virtual_time
async def test_a_stream_can_begin_some_events_back(stage: FeedHarness) -> None:
    await stage.commit(5)
    for gone_to, back, expected in ((0, 2, [4, 5]), (4, 2, [5]), (0, 100, [1, 2, 3, 4, 5])):
        stage.disk.gone_to = gone_to
        listener = stage.listen()
        assert await listener.begin(None, back) == b"retry: 2000\nid: %d\n\n" % (expected[0] - 1)
        assert numbers(await listener.more()) == expected
        listener.leave()


@in_virtual_time
async def test_without_follow_the_stream_ends_with_the_journal(stage: FeedHarness) -> None:
    await stage.commit(PAGE + 1)
    listener = await stage.begun(after=0, follow=False)
    assert len(numbers(await listener.more())) == PAGE
    await stage.commit()
    assert numbers(await listener.more()) == [PAGE + 1, PAGE + 2]
    assert await listener.more() == b""
    now = await stage.begun(follow=False)
    assert await now.more() == b""


@in_virtual_time
async def test_when_the_daemon_stops_subscribers_get_pending_events(stage: FeedHarness) -> None:
    live, stalled = await stage.begun(), await stage.begun()
    replaying, reading = await stage.begun(after=0), await stage.begun(after=0, follow=False)
    await stage.commit(3)
    stage.feed.close()
    assert numbers(await live.more()) == [1, 2, 3]
    assert await live.more() == b""
    live.leave()
    assert await replaying.more() == b""
    replaying.leave()
    with pytest.raises(ApiException) as no:  # its end would be mistaken for the end of the event log
        await reading.more()
    assert no.value.error.code == "shutting_down"
    reading.leave()
    with pytest.raises(ApiException) as no:
        stage.listen()
    assert no.value.error.code == "shutting_down"
    assert stage.cuts == []
    await seconds(event_feed.CLOSING_S)
    assert stage.cuts == [stalled]


@in_virtual_time
async def test_when_the_daemon_stops_idle_streams_end_at_once(stage: FeedHarness) -> None:
    listener = await stage.begun()
    more, before = asyncio.ensure_future(listener.more()), asyncio.get_running_loop().time()
    await seconds(1)
    stage.feed.close()
    assert await more == b""
    assert asyncio.get_running_loop().time() - before == pytest.approx(1)
