"""Webhooks on a real store: no event is lost, order per job, isolation of failing endpoints, and limits."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from traceback import walk_tb
from typing import Any

import pytest
import structlog
from msgspec.structs import replace

from jobd.model.clocks import LockMs
from jobd.model.commands import Moment
from jobd.model.events import Event
from jobd.model.job import DAY_MS, HOUR_MS, Job
from jobd.model.storage import DiskFull, FormatNotRead
from jobd.model.webhooks import Delivery, DeliveryOutcome, Outbox, WebhookEndpoint
from jobd.storage import outbox
from jobd.storage.events import event_queries
from jobd.storage.store import Store
from jobd.webhooks import dispatcher, event_reader, problem_source
from jobd.webhooks.manager import WebhookManager
from tests.support.factories import NOW, ChangeFactory
from tests.support.polling import wait_until
from tests.support.store_files import edit_store, job_of
from tests.support.webhook_harness import (
    DELIVERED,
    FAST_RETRY,
    REJECTED,
    SLOW_RETRY,
    FakeTransport,
    SteppedWallClock,
    endpoint,
    running_webhooks,
)

FINISHED = frozenset({"job.completed", "job.failed"})


@pytest.fixture(autouse=True)
def logged() -> Iterator[list[Any]]:
    """Collect log entries. The tracebacks of the console renderer read files, which blocks the loop."""
    with structlog.testing.capture_logs() as lines:
        yield lines


@pytest.fixture(autouse=True)
def short_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("dispatcher", "manager"):
        monkeypatch.setattr(f"jobd.webhooks.{name}.DISK_FULL_RETRY_S", 0.02)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobd.db"


class CountingStore:
    """A store that counts its calls and fails on demand."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.calls: Counter[str] = Counter()
        self.faults: dict[str, Exception] = {}

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def call(*args: Any) -> Any:
            self.calls[name] += 1
            if name in self.faults:
                raise self.faults[name]
            return await getattr(self.store, name)(*args)

        return call


def lifecycle(maker: ChangeFactory, job_id: str) -> list[Event]:
    """Commit four events of one job."""
    created = maker.create(job_id)
    granted = maker.grant(job_of(created))
    progress = maker.progress(job_of(granted))
    return [created, granted, progress, maker.finish(job_of(progress))]


# -- from the journal to the receiver ----------------------------------------------------------------------------------


async def test_events_are_delivered_in_order_and_once(path: Path) -> None:
    async with running_webhooks(path) as at:
        await at.commit(*lifecycle(at.maker, "a"))
        await at.commit(at.maker.queue_event("video", True))
        await wait_until(lambda: len(at.posts.delivered) == 4)
        assert [each for each in at.posts.subjects() if each[0] == "jobs/a"] == [
            ("jobs/a", "job.created"),
            ("jobs/a", "job.granted"),
            ("jobs/a", "job.completed"),
        ]
        assert ("queues/video", "queue.paused") in at.posts.subjects()
        (view,) = at.webhooks.views()
        await wait_until(lambda: at.webhooks.views()[0].delivered == 4)
        (view,) = at.webhooks.views()
        assert (view.lag, view.waiting, view.failed, view.state) == (0, 0, 0, "closed")
        page = await at.webhooks.page("e", None, None, 99)
        assert [each.state for each in page.deliveries] == ["delivered"] * 4
        assert all(each.attempts == 1 and each.status == 204 and each.ended_at for each in page.deliveries)
    assert len(at.posts.tried) == 4


async def test_every_endpoint_gets_the_events_it_subscribed_to(path: Path) -> None:
    ends = endpoint("ends", events=FINISHED)
    mail = endpoint("mail", queues=frozenset({"mail"}))
    signs = endpoint("signs", events=frozenset({"job.progress"}))
    async with running_webhooks(path, ends, mail, signs) as at:
        lives = [lifecycle(at.maker, f"job-{number}") for number in range(12)]
        await at.commit(*(change for life in lives for change in life))
        of_mail = sum(job_of(life[0]).options.queue == "mail" for life in lives)
        assert 0 < of_mail < 12
        await wait_until(lambda: len(at.posts.delivered) == 12 + 3 * of_mail + 12)
        by_name = Counter(each.endpoint for each in at.posts.delivered)
        assert by_name == {"ends": 12, "mail": 3 * of_mail, "signs": 12}
        assert {each.type for each in at.posts.delivered if each.endpoint == "ends"} <= FINISHED


async def test_unwanted_events_are_skipped_without_reading_the_disk(path: Path) -> None:
    only_ends = endpoint(events=frozenset({"job.failed"}))
    async with running_webhooks(path, only_ends, wrap=CountingStore) as at:
        await wait_until(lambda: at.storage.calls["events_after"] == 1)
        await asyncio.sleep(0.1)
        for number in range(20):
            await at.commit(at.maker.create(f"job-{number}"))
        assert at.webhooks.views()[0].position == at.maker.numbers.next_event - 1
        assert (at.storage.calls["events_after"], at.storage.calls["plan_deliveries"]) == (1, 0)


async def test_a_cursor_that_only_skipped_events_is_saved(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_ends = endpoint(events=frozenset({"job.failed"}))
    async with running_webhooks(path, only_ends) as at:
        await at.commit(at.maker.create())
        await wait_until(lambda: at.webhooks.views()[0].lag == 0)
    with edit_store(str(path)) as conn:
        assert conn.execute("SELECT position FROM webhooks").fetchone() == (1,)
    monkeypatch.setattr(event_reader, "SAVE_S", 0.05)
    async with running_webhooks(path, only_ends, maker=at.maker) as at:
        await at.commit(at.maker.create())
        sql = "SELECT position FROM webhooks"
        await wait_until(lambda: at.store._connection.raw.execute(sql).fetchone() == (2,))


async def test_an_idle_webhook_does_no_work(path: Path) -> None:
    async with running_webhooks(path, wrap=CountingStore) as at:
        await at.commit(*lifecycle(at.maker, "a"))
        await wait_until(lambda: at.webhooks.views()[0].delivered == 3)
        await asyncio.sleep(0.2)
        calls = dict(at.storage.calls)
        await asyncio.sleep(0.5)
        assert at.storage.calls == calls


async def test_without_webhooks_nothing_subscribes(path: Path) -> None:
    async with running_webhooks(path) as at:
        posts: Any = at.posts
        manager = WebhookManager(at.context, subscribe=lambda _: pytest.fail("it subscribes"), make_transport=posts)
        manager.set_endpoints([])
        assert manager.views() == []
        assert (manager.failing(), manager.event_hold_ms(), manager.metrics()) == ([], 0, {})


async def test_concurrent_deliveries_are_limited(path: Path) -> None:
    async with running_webhooks(path) as at:
        at.posts.gate.clear()
        await at.commit(*(at.maker.create(f"job-{number}") for number in range(50)))
        await wait_until(lambda: len(at.posts.tried) == dispatcher.PARALLEL)
        await asyncio.sleep(0.05)
        assert len(at.posts.tried) == dispatcher.PARALLEL
        at.posts.gate.set()
        await wait_until(lambda: len(at.posts.delivered) == 50)
        assert at.posts.most_at_once == dispatcher.PARALLEL


async def test_pages_cut_short_by_large_events_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_queries, "SLICE_BYTES", 2_000)
    async with running_webhooks(path) as at:
        await at.commit(*(at.maker.create(f"job-{number}") for number in range(60)))
        await wait_until(lambda: len(at.posts.delivered) == 60)
        assert len({each.message_id for each in at.posts.delivered}) == 60
        assert at.webhooks.views()[0].lag == 0


async def test_a_page_of_damaged_events_is_reported_as_a_gap_and_skipped(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_queries, "SLICE_BYTES", 1)  # one event per page
    async with running_webhooks(path) as at:
        at.store._connection.raw.execute(
            "CREATE TRIGGER spoil AFTER INSERT ON events WHEN new.seq = 2 BEGIN "
            "UPDATE events SET at = 0 WHERE seq = new.seq; END"
        )
        await at.commit(*(at.maker.create(f"job-{number}") for number in range(4)))
        await wait_until(lambda: at.webhooks.views()[0].lag == 0)
        await wait_until(lambda: len(at.posts.delivered) >= 4)
        types = [each.type for each in at.posts.delivered]
        assert types.count("job.created") == 3
        assert "events.gone" in types


# -- order, failures, circuit breaker ----------------------------------------------------------------------------------


async def test_a_failing_message_blocks_only_its_own_job(path: Path) -> None:
    bad = {"jobs/a": 3}

    def response(delivery: Delivery) -> DeliveryOutcome:
        if bad.get(delivery.subject, 0) > 0:
            bad[delivery.subject] -= 1
            return REJECTED
        return DELIVERED

    async with running_webhooks(path, posts=FakeTransport(response)) as at:
        lives = [lifecycle(at.maker, name) for name in "abc"]
        await at.commit(*(change for step in zip(*lives, strict=True) for change in step))
        await wait_until(lambda: at.webhooks.views()[0].delivered == 9)
        types = ["job.created", "job.granted", "job.completed"]
        for name in "abc":
            assert [type_ for subject, type_ in at.posts.subjects() if subject == f"jobs/{name}"] == types
        first_of_a = at.posts.subjects().index(("jobs/a", "job.created"))
        assert at.posts.subjects().index(("jobs/b", "job.completed")) < first_of_a
        page = await at.webhooks.page("e", None, None, 99)
        assert sorted(each.attempts for each in page.deliveries) == [1] * 8 + [4]


async def test_consecutive_failures_open_the_breaker_and_a_probe_closes_it(path: Path) -> None:
    async with running_webhooks(path, posts=FakeTransport(lambda _: REJECTED)) as at:
        await at.commit(*(at.maker.create(f"job-{number}") for number in range(30)))
        await wait_until(lambda: at.webhooks.views()[0].state == "open")
        tried = len(at.posts.tried)
        assert tried <= FAST_RETRY.opens_after + dispatcher.PARALLEL
        begun = time.monotonic()
        await wait_until(lambda: len(at.posts.tried) >= tried + 4)
        assert time.monotonic() - begun > 0.05  # one at a time, with a pause between them
        (view,) = at.webhooks.views()
        assert view.failing_since is not None
        assert view.last_error == REJECTED.error
        (failing,) = at.webhooks.failing()
        assert (failing.name, failing.error, failing.wants_problems) == ("e", REJECTED.error, True)
        at.posts.respond = lambda _: DELIVERED
        await wait_until(lambda: len(at.posts.delivered) == 30)
        (view,) = at.webhooks.views()
        assert (view.state, view.failing_since, view.next_attempt_at) == ("closed", None, None)
        assert at.webhooks.failing() == []


async def test_a_view_shows_the_time_of_the_next_attempt(path: Path) -> None:
    slow = replace(SLOW_RETRY, retry_ms=100_000, max_retry_ms=100_000)
    clock = SteppedWallClock()
    async with running_webhooks(path, posts=FakeTransport(lambda _: REJECTED), clock=clock, retry=slow) as at:

        def left_ms() -> int | None:
            (view,) = at.webhooks.views()
            return None if view.next_attempt_at is None else view.next_attempt_at - clock.moment().now

        assert left_ms() is None
        at.posts.gate.clear()
        await at.commit(at.maker.create("a"))
        await wait_until(lambda: bool(at.posts.tried))
        clock.step_ms += HOUR_MS
        at.posts.gate.set()
        await wait_until(lambda: left_ms() is not None)
        assert at.webhooks.views()[0].state == "closed"
        assert 0 < (left_ms() or 0) <= 75_000
        for number, (step_ms, at_most_ms) in enumerate([(0, 75_000), (20_000, 55_000), (-HOUR_MS, 100_000)], 1):
            clock.step_ms += step_ms
            changed, before = endpoint(dead_letter_after_ms=number * DAY_MS), at.webhooks._dispatchers["e"]
            at.webhooks.set_endpoints([changed])
            await wait_until(lambda: at.webhooks._dispatchers.get("e") not in (None, before))  # noqa: B023
            assert at_most_ms - 20_000 < (left_ms() or 0) <= at_most_ms, "it is kept, and limited after a clock step"
            assert [each.tries for each in at.webhooks._dispatchers["e"].queue._subjects["jobs/a"]] == [1]
        await at.commit(*(at.maker.create(f"job-{number}") for number in range(6)))
        await wait_until(lambda: at.webhooks.views()[0].state == "open")
        assert 250_000 < (left_ms() or 0) <= 600_000, "not before the breaker is half-open"
        clock.step_ms += HOUR_MS  # a clock step does not change the time of an attempt
        assert 250_000 < (left_ms() or 0) <= 600_000


async def test_a_reload_does_not_end_the_failure_of_an_endpoint_but_its_removal_does(path: Path) -> None:
    async with running_webhooks(path, posts=FakeTransport(lambda _: REJECTED), retry=SLOW_RETRY) as at:
        await at.commit(at.maker.create("a"))
        await wait_until(lambda: bool(at.webhooks.failing()) and at.webhooks.views()[0].next_attempt_at is not None)
        before = at.webhooks._dispatchers["e"]
        at.webhooks.set_endpoints([endpoint(timeout_ms=5_000)])
        await wait_until(lambda: at.webhooks._dispatchers.get("e") not in (None, before))
        assert at.webhooks.failing()
        at.webhooks.set_endpoints([])
        await wait_until(lambda: at.posts.open == 0)
        at.webhooks.set_endpoints([endpoint()])
        await wait_until(lambda: at.posts.open == 1)
        assert at.webhooks.failing() == []


async def test_a_message_that_always_fails_does_not_keep_the_breaker_open(path: Path) -> None:
    posts = FakeTransport(lambda each: REJECTED if each.subject == "jobs/bad" else DELIVERED)
    often = replace(FAST_RETRY, retry_ms=1, max_retry_ms=1)  # due at every probe
    async with running_webhooks(path, posts=posts, retry=often) as at:
        await at.commit(at.maker.create("bad"))
        await wait_until(lambda: at.webhooks.views()[0].state != "closed")
        await at.commit(at.maker.create("good"))
        await wait_until(lambda: ("jobs/good", "job.created") in at.posts.subjects())


async def test_an_old_message_is_dead_lettered_after_enough_attempts_and_the_next_one_starts(path: Path) -> None:
    clock = SteppedWallClock()
    posts = FakeTransport(lambda each: REJECTED if each.type == "job.created" else DELIVERED)
    async with running_webhooks(path, endpoint(dead_letter_after_ms=HOUR_MS), posts=posts, clock=clock) as at:
        await at.commit(*lifecycle(at.maker, "a"))
        await wait_until(lambda: len(at.posts.tried) > FAST_RETRY.min_tries)
        assert at.posts.delivered == []
        clock.step_ms += HOUR_MS
        await wait_until(lambda: at.posts.types() == ["job.granted", "job.completed"])
        await wait_until(lambda: at.webhooks.views()[0].delivered == 2)
        assert at.webhooks.views()[0].dead_lettered == 1
        (lost,) = (await at.webhooks.page("e", "dead-lettered", None, 9)).deliveries
        assert (lost.type, lost.status, lost.error) == ("job.created", 500, REJECTED.error)


async def test_a_clock_that_was_behind_and_is_put_right_dead_letters_nothing(path: Path) -> None:
    clock = SteppedWallClock()
    clock.behind_ms = 100 * DAY_MS
    async with running_webhooks(path, endpoint(), posts=FakeTransport(lambda _: REJECTED), clock=clock) as at:
        await at.commit(at.maker.create("a"))
        await wait_until(lambda: len(at.posts.tried) > FAST_RETRY.min_tries)
        clock.behind_ms = 0
        tries = len(at.posts.tried)
        await wait_until(lambda: len(at.posts.tried) > tries + 1 or at.webhooks.views()[0].dead_lettered > 0)
        assert at.webhooks.views()[0].dead_lettered == 0


async def test_old_messages_of_an_endpoint_that_keeps_failing_are_dead_lettered_without_an_attempt(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "SLICE", 10)
    monkeypatch.setattr(dispatcher, "MINUTE_MS", 10)
    slow = replace(FAST_RETRY, pause_ms=600_000, max_pause_ms=600_000)
    posts = FakeTransport(lambda _: REJECTED)
    async with running_webhooks(path, endpoint(dead_letter_after_ms=200), posts=posts, retry=slow) as at:
        await at.commit(*(at.maker.create(f"job-{number}") for number in range(60)))
        await wait_until(lambda: at.webhooks.views()[0].dead_lettered == 60)
        (view,) = at.webhooks.views()
        assert (view.waiting, view.state, view.next_attempt_at) == (0, "open", None)
        page = await at.webhooks.page("e", "dead-lettered", None, 99)
        assert {each.error for each in page.deliveries} == {REJECTED.error}
        assert min(each.attempts for each in page.deliveries) == 0


async def test_a_bug_in_the_transport_is_a_failed_attempt_and_does_not_show_the_url(
    path: Path, logged: list[Any]
) -> None:
    bugs = [ValueError("https://e.test/hook?token=hush is odd")]

    def response(_: Delivery) -> DeliveryOutcome:
        if bugs:
            raise bugs.pop()
        return DELIVERED

    async with running_webhooks(path, posts=FakeTransport(response)) as at:
        await at.commit(at.maker.create("a"))
        await wait_until(lambda: len(at.posts.delivered) == 1)
        assert at.webhooks.views()[0].last_error == "This is a bug in jobd: ValueError."
    (posted,) = (line["exc_info"] for line in logged if line["event"] == "webhook_bug")
    assert str(posted) == "ValueError: https://e.test… is odd"
    assert posted.__context__ is posted.__cause__ is None
    assert "response" in [frame.f_code.co_name for frame, _ in walk_tb(posted.__traceback__)]


# -- restarts, crashes, full disks -------------------------------------------------------------------------------------


async def test_waiting_messages_are_sent_unchanged_after_a_restart(path: Path) -> None:
    async with running_webhooks(path, posts=FakeTransport(lambda _: REJECTED)) as at:
        await at.commit(*lifecycle(at.maker, "a"))
        await wait_until(lambda: bool(at.posts.tried))
    first = at.posts.tried[0]
    async with running_webhooks(path, maker=at.maker) as then:
        await wait_until(lambda: len(then.posts.delivered) == 3)
        assert then.posts.types() == ["job.created", "job.granted", "job.completed"]
        repeated = then.posts.delivered[0]
        assert (repeated.message_id, repeated.body, repeated.id) == (first.message_id, first.body, first.id)


async def test_events_from_before_a_restart_are_delivered_after_it(path: Path) -> None:
    async with running_webhooks(path) as at:
        pass
    store, _ = await Store.open(str(path))
    async with store:
        await store.write(at.maker.batch(lifecycle(at.maker, "a")))
    async with running_webhooks(path, maker=at.maker) as then:
        await wait_until(lambda: then.posts.types() == ["job.created", "job.granted", "job.completed"])


async def test_a_delivery_whose_result_was_not_stored_is_repeated(path: Path) -> None:
    async with running_webhooks(path, wrap=CountingStore) as at:
        at.storage.faults["store_outcomes"] = RuntimeError("crash")
        await at.commit(*lifecycle(at.maker, "a"))
        await wait_until(lambda: at.posts.types() == ["job.created"])
        await asyncio.sleep(0.1)
        assert at.posts.types() == ["job.created"]  # the next one waits until this result is stored
    async with running_webhooks(path, maker=at.maker) as then:
        await wait_until(lambda: then.posts.types() == ["job.created", "job.granted", "job.completed"])
        assert then.posts.delivered[0] == at.posts.delivered[0]


async def test_nothing_is_sent_while_another_node_may_lead(path: Path) -> None:
    posts = FakeTransport()
    async with running_webhooks(path, wrap=CountingStore, posts=posts) as at:
        at.may_send = False
        await at.commit(at.maker.create("a"))
        await wait_until(lambda: at.webhooks.metrics()["e"].waiting == 1)
        at.fire("database")
        at.storage.faults["plan_deliveries"] = DiskFull("no room")  # otherwise the alert goes to the outbox
        await asyncio.sleep(0.1)
        assert not posts.tried
        assert at.storage.calls["plan_deliveries"] < 50
        at.storage.faults.clear()
        at.may_send = True
        await wait_until(lambda: len(posts.delivered) == 2)


async def test_a_lease_that_ends_while_deliveries_are_loaded_ends_them(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "MAX_RECENT", 0)
    async with running_webhooks(path) as at:
        loaded = at.store.deliveries

        async def deliveries(ids: list[int]) -> list[Delivery]:
            at.may_send = False
            return await loaded(ids)

        monkeypatch.setattr(at.store, "deliveries", deliveries)
        await at.commit(at.maker.create("a"))
        await wait_until(lambda: not at.may_send)
        await asyncio.sleep(0.05)
        assert not at.posts.tried
        monkeypatch.setattr(at.store, "deliveries", loaded)
        at.may_send = True
        await wait_until(lambda: at.posts.types() == ["job.created"])


@pytest.mark.parametrize("error", [DiskFull("no room"), FormatNotRead("node b is older")])
async def test_nothing_is_sent_without_the_outbox_and_nothing_is_lost(path: Path, error: Exception) -> None:
    async with running_webhooks(path, wrap=CountingStore) as at:
        at.storage.faults["store_outcomes"] = error
        await at.commit(*(at.maker.create(f"job-{number}") for number in range(30)))
        await wait_until(lambda: len(at.posts.delivered) >= dispatcher.PARALLEL)
        at.storage.faults["plan_deliveries"] = error
        await at.commit(*lifecycle(at.maker, "late"))
        await asyncio.sleep(0.2)
        sent = len(at.posts.delivered)
        assert sent <= 2 * dispatcher.PARALLEL
        at.storage.faults.clear()
        await wait_until(lambda: at.webhooks.views()[0].delivered == 33)
        assert len(at.posts.delivered) == 33  # none of them twice


async def test_webhooks_do_not_use_the_reserve_of_a_full_disk(path: Path) -> None:
    async with running_webhooks(path, wrap=CountingStore) as at:
        at.may_write = False
        await at.commit(*lifecycle(at.maker, "a"))
        await asyncio.sleep(0.2)
        assert at.storage.calls["plan_deliveries"] == at.storage.calls["store_outcomes"] == 0
        assert at.webhooks.views()[0].lag == 4
        with pytest.raises(DiskFull):
            await at.webhooks.test("e")
        with pytest.raises(DiskFull):
            await at.webhooks.redeliver("e", 1)
        at.may_write = True
        await wait_until(lambda: at.webhooks.views()[0].delivered == 3)


async def test_no_delivery_starts_while_results_cannot_be_stored(path: Path) -> None:
    async with running_webhooks(path) as at:
        at.posts.gate.clear()
        await at.commit(*(at.maker.create(f"job-{number}") for number in range(40)))
        await wait_until(lambda: len(at.posts.tried) == dispatcher.PARALLEL)
        at.may_write = False
        at.posts.gate.set()
        await asyncio.sleep(0.2)
        assert len(at.posts.tried) == dispatcher.PARALLEL
        at.may_write = True
        await wait_until(lambda: at.webhooks.views()[0].delivered == 40)
        assert len(at.posts.tried) == 40


class FullStore(CountingStore):
    """A store that accepts no new endpoint."""

    async def open_outbox(self, names: list[str], now: int) -> Outbox:
        self.calls["open_outbox"] += 1
        return await self.store.open_outbox([name for name in names if name != "new"], now)


async def test_a_new_endpoint_on_a_full_disk_does_not_delay_others(path: Path) -> None:
    async with running_webhooks(path, wrap=FullStore) as at:
        at.webhooks.set_endpoints([endpoint(timeout_ms=9), endpoint("new")])
        await wait_until(lambda: at.storage.calls["open_outbox"] > 2)
        await at.commit(at.maker.create("a"))
        await wait_until(lambda: [view.delivered for view in at.webhooks.views()] == [1, 0])


async def test_a_dispatcher_waits_for_a_disk_that_is_full_at_the_start(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_webhooks(path, wrap=CountingStore) as at:
        at.storage.faults["open_outbox"] = DiskFull("no room")
        at.webhooks.set_endpoints([endpoint(), endpoint("f")])
        await wait_until(lambda: at.storage.calls["open_outbox"] > 2)
        assert [view.state for view in at.webhooks.views()] == ["closed", "starting"]
        assert at.webhooks.event_hold_ms() > 0
        at.storage.faults["open_outbox"] = RuntimeError("oops")
        monkeypatch.setattr("jobd.webhooks.manager.FAILURE_RETRY_S", 0.02)
        calls = at.storage.calls["open_outbox"]
        await wait_until(lambda: at.storage.calls["open_outbox"] > calls + 1)
        at.storage.faults.clear()
        await wait_until(lambda: [view.state for view in at.webhooks.views()] == ["closed", "closed"])
        await at.commit(at.maker.create("a"))
        await wait_until(lambda: len(at.posts.delivered) == 2)


async def test_a_damaged_message_is_skipped(path: Path) -> None:
    async with running_webhooks(path, posts=FakeTransport(lambda _: REJECTED)) as at:
        await at.commit(*lifecycle(at.maker, "a"))
        await wait_until(lambda: at.webhooks.views()[0].waiting == 3)
    async with running_webhooks(path, maker=at.maker, posts=FakeTransport(lambda _: REJECTED)) as then:
        then.posts.gate.clear()
        then.store._connection.raw.execute("UPDATE deliveries SET body = X'31' WHERE type = 'job.created'")
        then.posts.respond = lambda _: DELIVERED
        then.posts.gate.set()
        await wait_until(lambda: "job.completed" in then.posts.types())


async def test_stop_does_not_wait_for_a_hanging_receiver(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "GRACE_S", 0.1)
    async with running_webhooks(path) as at:
        at.posts.gate.clear()
        await at.commit(*(at.maker.create(f"job-{number}") for number in range(20)))
        await wait_until(lambda: len(at.posts.tried) == dispatcher.PARALLEL)
    async with running_webhooks(path, maker=at.maker) as then:
        await wait_until(lambda: len(then.posts.delivered) == 20)


async def test_stop_stores_results_that_arrive_in_time(path: Path) -> None:
    async with running_webhooks(path) as at:
        at.posts.gate.clear()
        await at.commit(at.maker.create("a"))
        await wait_until(lambda: len(at.posts.tried) == 1)
        asyncio.get_running_loop().call_later(0.1, at.posts.gate.set)
    async with running_webhooks(path, maker=at.maker) as then:
        assert (await then.webhooks.page("e", "delivered", None, 9)).deliveries
        await asyncio.sleep(0.1)
    assert then.posts.tried == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
async def test_every_event_arrives_in_order_despite_failures_and_crashes(
    path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every event arrives at least once, and never before an earlier event of its job."""
    monkeypatch.setattr(dispatcher, "FAILURE_RETRY_S", 0.02)
    chance, maker = random.Random(seed), ChangeFactory(seed)
    taken: list[Delivery] = []
    jobs: dict[str, list[Job]] = {f"job-{number}": [] for number in range(12)}

    def next_change() -> Event:
        name = chance.choice([name for name, was in jobs.items() if len(was) < 3])
        was = jobs[name]
        change = maker.create(name) if not was else maker.grant(was[-1]) if len(was) == 1 else maker.finish(was[-1])
        was.append(job_of(change))
        return change

    for _ in range(60):
        posts = FakeTransport(lambda _: REJECTED if chance.random() < 0.4 else DELIVERED)
        async with running_webhooks(path, maker=maker, posts=posts, wrap=CountingStore) as at:
            for _ in range(chance.randint(1, 4)):
                left = sum(3 - len(was) for was in jobs.values())
                if some := min(left, chance.randint(0, 8)):
                    await at.commit(*(next_change() for _ in range(some)))
                at.storage.faults = {
                    name: DiskFull("no room") if chance.random() < 0.5 else RuntimeError("crash")
                    for name in ("store_outcomes", "plan_deliveries", "events_after", "deliveries")
                    if chance.random() < 0.15
                }
                await asyncio.sleep(chance.random() * 0.1)
        taken += posts.delivered
        if len({each.message_id for each in taken}) == 36:
            break
    by_job: dict[str, list[int]] = {}
    for each in taken:
        by_job.setdefault(each.subject, []).append(each.seq)
    assert len(by_job) == 12
    for seqs in by_job.values():
        firsts = list(dict.fromkeys(seqs))
        assert firsts == sorted(firsts)
        assert len(firsts) == 3


# -- bounds and gaps ---------------------------------------------------------------------------------------------------


async def test_events_wait_in_the_journal_while_the_outbox_is_at_its_limit(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "MAX_BACKLOG", 150)
    async with running_webhooks(path, posts=FakeTransport(lambda _: REJECTED)) as at:
        for first in range(0, 400, 100):
            await at.commit(*(at.maker.create(f"job-{first + number}") for number in range(100)))
        await wait_until(lambda: at.webhooks.views()[0].waiting == 100)
        await asyncio.sleep(0.2)
        (view,) = at.webhooks.views()
        assert (view.waiting, view.lag) == (100, 300)
        at.posts.respond = lambda _: DELIVERED
        await wait_until(lambda: len(at.posts.delivered) == 400)


async def test_a_lagging_endpoint_holds_the_journal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "MAX_BACKLOG", 150)
    monkeypatch.setattr(event_reader, "LAGGING_AFTER_S", 0.1)
    posts = FakeTransport(lambda _: REJECTED)
    async with running_webhooks(path, endpoint(dead_letter_after_ms=5 * DAY_MS), posts=posts) as at:
        await wait_until(lambda: at.webhooks.event_hold_ms() == 0)
        for first in range(0, 300, 100):
            await at.commit(*(at.maker.create(f"job-{first + number}") for number in range(100)))
        await wait_until(lambda: at.webhooks.event_hold_ms() == 5 * DAY_MS)


async def test_an_endpoint_behind_the_journal_gets_a_gap_message(path: Path) -> None:
    async with running_webhooks(path) as at:
        await at.commit(at.maker.create("a"))
        await wait_until(lambda: len(at.posts.delivered) == 1)
    store, _ = await Store.open(str(path))
    async with store:
        pauses = [at.maker.queue_event("video", bool(number % 2)) for number in range(4)]
        await store.write(at.maker.batch(pauses))
        assert await store.prune(at.maker.now + 3, 100) > 0
        left = (await store.events_after(1, 100)).events
    async with running_webhooks(path, maker=at.maker) as then:
        await wait_until(lambda: len(then.posts.delivered) == 1 + len(left))
        gap = next(each for each in then.posts.delivered if each.type == "events.gone")
        data = json.loads(gap.body)["data"]
        assert (data["after"], data["upto"]) == (1, 5 - len(left))
        then.webhooks.set_endpoints([])
        await wait_until(lambda: then.posts.open == 0)
        then.webhooks.set_endpoints([endpoint()])
        await wait_until(lambda: then.posts.open == 1)
        assert then.webhooks.metrics()["e"].gaps == 1, "a reload changes no counter"
    async with running_webhooks(path, maker=at.maker) as later:
        await later.commit(later.maker.create("b"))
        await wait_until(lambda: later.posts.types() == ["job.created"])


async def test_a_lost_cursor_causes_a_gap_message(path: Path) -> None:
    async with running_webhooks(path) as at:
        await at.commit(at.maker.create("a"))
        await wait_until(lambda: at.webhooks.views()[0].delivered == 1)
    with edit_store(str(path)) as conn:
        conn.execute("DELETE FROM deliveries")
        conn.execute("UPDATE webhooks SET position = 0")
    async with running_webhooks(path, maker=at.maker) as then:
        await wait_until(lambda: then.posts.types() == ["events.gone"])


async def test_dropped_dead_letters_cause_a_gap_message(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "KEEP_ENDED", {"delivered": 99, "dead-lettered": 5})
    posts = FakeTransport(lambda _: REJECTED)
    async with running_webhooks(path, endpoint(dead_letter_after_ms=0, events=FINISHED), posts=posts) as at:
        for number in range(12):
            await at.commit(*lifecycle(at.maker, f"job-{number}"))
        await wait_until(lambda: at.webhooks.views()[0].dead_lettered >= 12)
        count, _ = await at.webhooks.dead_letter_counts("e")
        assert count == 5
        gaps = at.webhooks.metrics()["e"].gaps
        assert gaps >= 1
        posts.respond = lambda _: DELIVERED
        await wait_until(lambda: "events.gone" in posts.types())
        await wait_until(lambda: at.webhooks.views()[0].waiting == 0)
        gap_data = {
            each.message_id: json.loads(each.body)["data"] for each in posts.delivered if each.type == "events.gone"
        }
        assert all(data["upto"] >= 4 for data in gap_data.values())
        await asyncio.sleep(0.1)
        assert at.webhooks.views()[0].waiting == 0, "it is not sent repeatedly"
    async with running_webhooks(path, maker=at.maker) as later:
        await later.commit(later.maker.create("b"))
        await wait_until(lambda: later.posts.types() == ["job.created"])


async def test_a_waiting_gap_message_is_not_repeated(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "KEEP_ENDED", {"delivered": 99, "dead-lettered": 1})
    slow = replace(REJECTED, retry_after_ms=60_000)
    posts = FakeTransport(lambda each: slow if each.type == "events.gone" else REJECTED)
    retry, ends = replace(FAST_RETRY, max_retry_ms=60_000), endpoint(dead_letter_after_ms=0, events=FINISHED)
    async with running_webhooks(path, ends, posts=posts, retry=retry) as at:
        for number in range(9):
            await at.commit(*lifecycle(at.maker, f"job-{number}"))
        await wait_until(lambda: at.webhooks.views()[0].dead_lettered == 9)
        page = await at.webhooks.page("e", None, None, 99)
        assert [each.type for each in page.deliveries if each.state == "waiting"] == ["events.gone"]
        assert at.webhooks.metrics()["e"].gaps == 1


# -- problems ----------------------------------------------------------------------------------------------------------


async def test_problems_are_delivered_when_they_open_and_when_they_close(path: Path) -> None:
    async with running_webhooks(path, endpoint(events=frozenset({"problem.opened", "problem.closed"}))) as at:
        at.fire("stalled_jobs", NOW + 7)
        await wait_until(lambda: at.posts.types() == ["problem.opened"])
        at.fire("stalled_jobs", NOW + 7)
        at.resolve("stalled_jobs")
        await wait_until(lambda: at.posts.types() == ["problem.opened", "problem.closed"])
        firing, resolved = (json.loads(each.body) for each in at.posts.delivered)
        assert firing["data"]["since"] == resolved["data"]["since"] == NOW + 7
        assert firing["subject"] == "problems/stalled_jobs"
        assert [each["data"]["id"] for each in (firing, resolved)] == ["stalled_jobs"] * 2
        await at.commit(at.maker.create("a"))
        await asyncio.sleep(0.1)
        assert len(at.posts.delivered) == 2
        assert at.webhooks.views()[0].lag == 0


async def test_problems_are_delivered_at_least_once_over_a_restart(path: Path) -> None:
    async with running_webhooks(path, posts=FakeTransport(lambda _: REJECTED)) as at:
        at.fire("stalled_jobs")
        at.fire("database")
        await wait_until(lambda: at.webhooks.views()[0].waiting == 2)
    async with running_webhooks(path, maker=at.maker, firing=None) as then:  # no alerts evaluated yet
        await wait_until(lambda: then.posts.types() == ["problem.opened", "problem.opened"])
        await asyncio.sleep(0.1)
        then.firing = {"database": NOW + 99}  # one of them has resolved meanwhile
        then.webhooks.problems_changed()
        await wait_until(lambda: "problem.closed" in then.posts.types())
        await asyncio.sleep(0.1)
        assert sorted(then.posts.subjects()) == [
            ("problems/database", "problem.opened"),
            ("problems/stalled_jobs", "problem.closed"),
            ("problems/stalled_jobs", "problem.opened"),
        ]


async def test_a_problem_that_becomes_worse_has_a_message_and_none_closes_before_presence_has_settled(
    path: Path,
) -> None:
    async with running_webhooks(path) as at:
        at.fire("database")
        await wait_until(lambda: at.posts.types() == ["problem.opened"])
        at.changed_at = {"database": NOW + 9}
        at.webhooks.problems_changed()
        await wait_until(lambda: at.posts.types() == ["problem.opened", "problem.changed"])
        at.is_settled = False
        at.resolve("database")
        at.fire("cache")
        await wait_until(lambda: at.posts.types()[2:] == ["problem.opened"])
        at.is_settled = True
        at.webhooks.problems_changed()
        await wait_until(lambda: at.posts.types()[3:] == ["problem.closed"])


async def test_very_many_problems_of_one_condition_have_one_message_after_the_first_twenty(path: Path) -> None:
    async with running_webhooks(path) as at:
        at.firing = {f"no_workers/q-{number:02}": NOW for number in range(30)}
        at.webhooks.problems_changed()
        await wait_until(lambda: len(at.posts.delivered) == 21)
        assert sorted(at.posts.types()) == ["problem.many", *["problem.opened"] * 20]
        (many,) = [json.loads(each.body)["data"] for each in at.posts.delivered if each.type == "problem.many"]
        assert (many["opened"], len(many["names"])) == (10, problem_source.NAMED)
        at.firing |= {"no_workers/late": NOW, "disk/disk": NOW}
        at.webhooks.problems_changed()
        await wait_until(lambda: at.posts.subjects()[21:] == [("problems/disk/disk", "problem.opened")])
        at.clock.step_ms += problem_source.WINDOW_MS
        at.webhooks.problems_changed()
        await wait_until(lambda: at.posts.subjects()[22:] == [("problems/no_workers/late", "problem.opened")])


async def test_an_endpoint_can_subscribe_to_closed_problems_only(path: Path) -> None:
    async with running_webhooks(path, endpoint(events=frozenset({"problem.closed"}))) as at:
        at.fire("database")
        await asyncio.sleep(0.1)
        at.resolve("database")
        await wait_until(lambda: at.posts.types() == ["problem.closed"])


async def test_on_a_full_disk_a_problem_is_delivered_directly_and_later_through_the_outbox(path: Path) -> None:
    async with running_webhooks(path, wrap=CountingStore) as at:
        at.may_write = False
        at.fire("database")
        await wait_until(lambda: at.posts.types() == ["problem.opened"])
        at.fire("stalled_jobs")
        await wait_until(lambda: len(at.posts.delivered) == 2)
        at.resolve("database")
        await wait_until(lambda: at.posts.types() == ["problem.opened", "problem.opened", "problem.closed"])
        await at.commit(*lifecycle(at.maker, "a"))
        await asyncio.sleep(0.2)
        assert len(at.posts.tried) == 3, "each once, because it was accepted"
        assert at.storage.calls["plan_deliveries"] == at.storage.calls["store_outcomes"] == 0
        posted = list(at.posts.delivered)
        at.may_write = True
        await wait_until(lambda: at.webhooks.views()[0].delivered == 6)
        repeated = [each for each in at.posts.delivered[3:] if each.subject.startswith("problems/")]
        assert {each.message_id: each.body for each in repeated} == {each.message_id: each.body for each in posted}
        assert [each.type for each in repeated if each.subject == "problems/database"] == [
            "problem.opened",
            "problem.closed",
        ]
        await asyncio.sleep(0.1)
        assert len(at.posts.tried) == 9
    async with running_webhooks(path, maker=at.maker, firing={"stalled_jobs": NOW}) as then:
        await asyncio.sleep(0.1)
        assert then.posts.tried == []


async def test_a_problem_whose_write_fills_the_disk_is_delivered_directly(path: Path) -> None:
    async with running_webhooks(path, wrap=CountingStore) as at:
        at.storage.faults["plan_deliveries"] = DiskFull("no room")
        at.fire("database")
        await wait_until(lambda: at.posts.types() == ["problem.opened"])
        await asyncio.sleep(0.1)
        at.storage.faults.clear()
        await wait_until(lambda: at.webhooks.views()[0].delivered == 1)
        first, second = at.posts.delivered
        assert (first.message_id, first.body) == (second.message_id, second.body)


async def test_on_a_full_disk_each_change_gets_a_few_direct_attempts_in_order(path: Path) -> None:
    async with running_webhooks(path, posts=FakeTransport(lambda _: REJECTED)) as at:
        at.may_write = False
        at.fire("database")
        await wait_until(lambda: len(at.posts.tried) == problem_source.MAX_TRIES)
        await asyncio.sleep(0.3)
        assert len(at.posts.tried) == problem_source.MAX_TRIES
        assert at.webhooks.views()[0].last_error == REJECTED.error
        at.posts.respond = lambda each: DELIVERED if each.type == "problem.closed" else REJECTED
        at.fire("stalled_jobs")
        await wait_until(lambda: at.posts.tried[-1].subject == "problems/stalled_jobs")
        at.resolve("stalled_jobs")  # it does not wait for the retry of its firing message
        await wait_until(lambda: at.posts.subjects() == [("problems/stalled_jobs", "problem.closed")])
        own = [each.type for each in at.posts.tried if each.subject == "problems/stalled_jobs"]
        assert own == sorted(own, reverse=True)
        await asyncio.sleep(0.2)
        assert len(at.posts.tried) == problem_source.MAX_TRIES + len(own)
        at.posts.respond = lambda _: DELIVERED
        at.may_write = True
        await wait_until(lambda: at.webhooks.views()[0].delivered == 3)


async def test_only_the_latest_changes_of_a_flapping_alert_are_kept(path: Path) -> None:
    async with running_webhooks(path, posts=FakeTransport(lambda _: REJECTED)) as at:
        at.may_write = False
        for number in range(9):
            at.fire("database", NOW + number)
            await wait_until(lambda: bool(at.posts.tried) and at.posts.tried[-1].type == "problem.opened")
            if number < 8:
                at.resolve("database")
                await wait_until(lambda: at.posts.tried[-1].type == "problem.closed")
        at.posts.respond = lambda _: DELIVERED
        at.posts.tried.clear()
        at.may_write = True
        await wait_until(lambda: at.webhooks.views()[0].delivered >= 3)
        await asyncio.sleep(0.1)
        posted = [each.message_id.split("_", 2)[2] for each in at.posts.delivered]
        assert list(dict.fromkeys(posted)) == [f"{NOW + 7}_opened", f"{NOW + 7}_closed", f"{NOW + 8}_opened"]


async def test_stop_on_a_full_disk_does_not_wait_for_a_hanging_receiver(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "GRACE_S", 0.05)
    async with running_webhooks(path) as at:
        at.may_write = False
        at.posts.gate.clear()
        at.fire("database")
        await wait_until(lambda: len(at.posts.tried) == 1)
    async with running_webhooks(path, maker=at.maker, firing={"database": NOW}) as then:
        await wait_until(lambda: then.posts.types() == ["problem.opened"])


# -- operators ---------------------------------------------------------------------------------------------------------


async def test_a_delivery_in_any_state_can_be_sent_again(path: Path) -> None:
    async with running_webhooks(path) as at:
        await at.commit(at.maker.create("a"))
        await wait_until(lambda: at.webhooks.views()[0].delivered == 1)
        (sent,) = (await at.webhooks.page("e", None, None, 9)).deliveries
        repeated = await at.webhooks.redeliver("e", sent.id)
        assert repeated is not None
        assert (repeated.state, repeated.attempts) == ("waiting", 0)
        await wait_until(lambda: at.webhooks.views()[0].delivered == 2)
        assert at.posts.delivered[1].message_id == at.posts.delivered[0].message_id
        assert at.posts.delivered[1].body == at.posts.delivered[0].body
        assert await at.webhooks.redeliver("e", 999) is None


class PausingStore(CountingStore):
    """A store whose next write of the outbox is durable before `written` is set, and returns after `gate` is set."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.is_pausing = False
        self.written, self.gate = asyncio.Event(), asyncio.Event()

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        write = super().__getattr__(name)

        async def call(*args: Any) -> Any:
            result = await write(*args)
            if self.is_pausing and name in ("resend_delivery", "resend_dead_lettered", "plan_deliveries"):
                self.is_pausing = False
                self.written.set()
                await self.gate.wait()
            return result

        return call


@pytest.mark.parametrize(
    ("act", "sent"),
    [
        (lambda webhooks: webhooks.redeliver("e", 1), "job.created"),
        (lambda webhooks: webhooks.redeliver_all("e", None), "job.created"),
        (lambda webhooks: webhooks.test("e"), "webhook.test"),
    ],
    ids=["redeliver", "redeliver_all", "test"],
)
async def test_a_message_is_sent_although_the_client_that_asked_for_it_disconnects(
    path: Path, act: Callable[[WebhookManager], Coroutine[Any, Any, object]], sent: str
) -> None:
    posts = FakeTransport(lambda _: REJECTED)
    async with running_webhooks(path, endpoint(dead_letter_after_ms=0), posts=posts, wrap=PausingStore) as at:
        await at.commit(at.maker.create("a"))
        await wait_until(lambda: at.webhooks.metrics()["e"].dead_lettered == 1)
        posts.respond = lambda _: DELIVERED
        at.storage.is_pausing = True
        asked = asyncio.create_task(act(at.webhooks))
        await at.storage.written.wait()
        asked.cancel()
        await asyncio.wait([asked])
        assert asked.cancelled()
        at.storage.gate.set()
        await wait_until(lambda: posts.types() == [sent])


async def test_a_message_is_sent_although_a_reload_replaces_the_dispatcher(path: Path) -> None:
    async with running_webhooks(path) as at:
        await at.commit(at.maker.create("a"))
        await wait_until(lambda: len(at.posts.delivered) == 1)
        for turns in range(6):  # of the event loop, between the reload and the request
            at.webhooks.set_endpoints([endpoint(timeout_ms=turns)])
            for _ in range(turns):
                await asyncio.sleep(0)
            at.posts.delivered.clear()
            await asyncio.gather(at.webhooks.redeliver("e", 1), at.webhooks.test("e"))
            await wait_until(lambda: len(at.posts.delivered) == 2)


@pytest.mark.parametrize("is_test", [False, True])
async def test_an_action_of_an_operator_probes_an_open_breaker(path: Path, is_test: bool) -> None:
    """Neither a waiting delivery that is sent now nor a test message waits for the end of the pause."""
    posts = FakeTransport(lambda _: REJECTED)
    async with running_webhooks(path, posts=posts, retry=SLOW_RETRY) as at:
        await at.commit(*(at.maker.create(f"job-{number}") for number in range(6)))
        await wait_until(lambda: at.webhooks.views()[0].state == "open")
        posts.respond = lambda _: DELIVERED
        if is_test:
            await at.webhooks.test("e")
        else:
            page = await at.webhooks.page("e", "waiting", None, 99)
            assert await at.webhooks.redeliver("e", page.deliveries[-1].id) is not None
        await wait_until(lambda: len(at.posts.delivered) == 6 + is_test)
        assert ("webhook.test" in at.posts.types()) == is_test
        assert at.webhooks.views()[0].state == "closed"


async def test_a_test_message_does_not_wait_for_the_retry_of_an_earlier_one(path: Path) -> None:
    posts = FakeTransport(lambda _: REJECTED)
    async with running_webhooks(path, posts=posts, retry=SLOW_RETRY) as at:
        await at.webhooks.test("e")
        await wait_until(lambda: at.webhooks.views()[0].next_attempt_at is not None)
        posts.respond = lambda _: DELIVERED
        await at.webhooks.test("e")
        await wait_until(lambda: len(posts.delivered) == 2)


async def test_failures_from_before_a_probe_do_not_open_the_breaker(path: Path) -> None:
    """Five of eight attempts have failed, three hang, and an operator reports that the receiver is back."""
    hanging = asyncio.Event()

    class Hanging(FakeTransport):
        async def post(self, endpoint: WebhookEndpoint, delivery: Delivery) -> DeliveryOutcome:
            if len(self.tried) in (5, 6, 7):
                self.tried.append(delivery)
                await hanging.wait()
                return REJECTED
            return await super().post(endpoint, delivery)

    posts = Hanging(lambda _: REJECTED)
    async with running_webhooks(path, posts=posts, retry=SLOW_RETRY) as at:
        await at.commit(*(at.maker.create(f"job-{number}") for number in range(8)))
        await wait_until(lambda: len(posts.tried) == 8 and at.webhooks.views()[0].state == "open")
        posts.respond = lambda _: DELIVERED
        assert await at.webhooks.redeliver("e", posts.tried[0].id) is not None
        hanging.set()
        await wait_until(lambda: len(posts.delivered) == 8)


async def test_dead_letters_are_sent_again_in_order(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each message gets an attempt before it can be dead-lettered for its age again."""
    monkeypatch.setattr(dispatcher, "SLICE", 10)
    monkeypatch.setattr(dispatcher, "MINUTE_MS", 10)
    posts = FakeTransport(lambda _: REJECTED)
    async with running_webhooks(path, endpoint(dead_letter_after_ms=200), posts=posts) as at:
        for number in range(15):
            await at.commit(*lifecycle(at.maker, f"job-{number}"))
        await wait_until(lambda: at.webhooks.views()[0].dead_lettered == 45)
        page = await at.webhooks.page("e", "dead-lettered", None, 99)
        newest = page.deliveries[0].id
        monkeypatch.setattr(dispatcher, "MINUTE_MS", 60_000)
        assert await at.webhooks.redeliver_all("e", 0) == 0
        posts.respond = lambda _: DELIVERED
        assert await at.webhooks.redeliver_all("e", newest - 3) == 42
        await wait_until(lambda: at.webhooks.views()[0].delivered == 42)
        assert await at.webhooks.redeliver_all("e", None) == 3
        await wait_until(lambda: at.webhooks.views()[0].delivered == 45)
        assert at.webhooks.views()[0].dead_lettered == 45
        for number in range(15):
            own = [type_ for subject, type_ in at.posts.subjects() if subject == f"jobs/job-{number}"]
            assert own == ["job.created", "job.granted", "job.completed"]
        at.may_write = False
        with pytest.raises(DiskFull):
            await at.webhooks.redeliver_all("e", None)


async def test_a_new_configuration_is_applied_while_running(path: Path) -> None:
    async with running_webhooks(path, endpoint("stays"), endpoint("goes"), endpoint("changes")) as at:
        at.webhooks.set_endpoints([endpoint("stays"), endpoint("changes", events=FINISHED), endpoint("comes")])
        await wait_until(lambda: sorted(at.webhooks.metrics()) == ["changes", "comes", "stays"])
        await wait_until(lambda: at.posts.open == 3)
        await wait_until(lambda: all(view.state == "closed" for view in at.webhooks.views()))
        await asyncio.sleep(0.1)
        await at.commit(*lifecycle(at.maker, "a"))
        await wait_until(lambda: len(at.posts.delivered) == 7)
        assert Counter(each.endpoint for each in at.posts.delivered) == {"stays": 3, "changes": 1, "comes": 3}
        at.webhooks.set_endpoints([])
        await wait_until(lambda: at.posts.open == 0)
        at.webhooks.set_endpoints([endpoint("goes")])  # it continues at its cursor
        await wait_until(lambda: len(at.posts.delivered) == 10)


class SuspectWallClock(SteppedWallClock):
    """A wall clock that is 40 days ahead of its expected value."""

    def moment(self) -> Moment:
        expected = super().moment().now
        return Moment(now=expected + 40 * DAY_MS, lock_ms=LockMs(0), offset=0, trusted=expected)


async def test_a_message_ages_by_the_expected_time_while_the_clock_is_suspect(path: Path) -> None:
    rejected = FakeTransport(lambda _: REJECTED)
    async with running_webhooks(path, endpoint(dead_letter_after_ms=0), posts=rejected, clock=SuspectWallClock()) as at:
        await at.commit(at.maker.create("a"))
        await wait_until(lambda: at.webhooks.views()[0].dead_lettered == 1)


async def test_a_missing_endpoint_keeps_its_outbox_while_the_clock_is_suspect(path: Path) -> None:
    async with running_webhooks(path, endpoint("e"), endpoint("f"), posts=FakeTransport(lambda _: REJECTED)) as at:
        await at.commit(at.maker.create("a"))
        await wait_until(lambda: all(each.waiting == 1 for each in at.webhooks.metrics().values()))
    async with running_webhooks(path, endpoint("e"), clock=SuspectWallClock()) as at:
        assert await at.store.list_deliveries("f", None, 99, 9)
