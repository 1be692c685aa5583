"""The actor on a disk that fails when asked: batches, shares, parked claims, keys, lost connections, a full disk.

In virtual time: what waits for a second waits no longer than its commands take.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
from msgspec import UNSET, Raw
from structlog.testing import capture_logs

from jobd.core import decide
from jobd.core.changeset import Decision
from jobd.core.state import Book
from jobd.core.worker_presence import WorkerPresence
from jobd.engine import history
from jobd.engine.actor import BATCH_WEIGHT, CLOCK_LOOK_S, Bounds, DiskBroken
from jobd.engine.disk_full import Closed
from jobd.engine.idempotency import KEPT_MS
from jobd.engine.mailbox import Envelope
from jobd.engine.waiting_claims import Parked
from jobd.model.commands import (
    Adopt,
    AnyCommand,
    Bulk,
    Call,
    Cancel,
    Claim,
    Complete,
    Create,
    Delete,
    DeleteExpired,
    EndGrants,
    Export,
    Extend,
    ExtendAfterPause,
    Fail,
    ForceFail,
    ForceReset,
    Get,
    GetVersion,
    IdempotencyKey,
    Import,
    LateResults,
    ListJobs,
    Moment,
    Pause,
    Ping,
    Progress,
    Recover,
    Release,
    RepairJobs,
    Report,
    Resume,
    RunNow,
    SearchJobs,
    Start,
    Stats,
    Tick,
    Timeline,
    Update,
    Why,
)
from jobd.model.errors import ApiError
from jobd.model.events import Change, fold
from jobd.model.fingerprints import fingerprint
from jobd.model.job import COUNTER_MASK, DAY_MS, MINUTE_MS, TOKEN_COUNTER_BITS, Job, Policy, new_epoch
from jobd.model.responses import EmptyResponse, ErrorView, JobView, Response
from jobd.model.storage import (
    BadRows,
    Batch,
    DiskFull,
    DiskSpace,
    JobQuery,
    JobRows,
    LateResultQuery,
    LateResultRows,
    LoadedRows,
    Numbers,
    Quarantined,
    QueueRow,
    StoredResponse,
)
from tests.support.memory_storage import MemoryStorage
from tests.support.virtual_engine import VirtualEngine, in_virtual_time, seconds

TTL = 15 * MINUTE_MS


def key(name: str, body: str = "body") -> IdempotencyKey:
    return IdempotencyKey(name, body)


def begin(ask: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    return asyncio.create_task(ask)


async def settle() -> None:
    """Let everything happen that needs no time to pass."""
    for _ in range(50):
        await asyncio.sleep(0)


async def parked(house: VirtualEngine, worker: str, **fields: Any) -> asyncio.Task[Any]:
    """A claim that waits for work."""
    waiting = {"wait_ms": 30_000} | fields
    name = waiting.pop("key", None)
    task = begin(house.actor.ask(Claim(worker=worker, **waiting), key=name))
    await settle()
    assert not task.done()
    return task


def ids_of(answer: Any) -> list[str]:
    assert isinstance(answer, Response), answer
    return [granted.job.id for granted in answer.data.grants]


def compare(house: VirtualEngine) -> None:
    """Memory is what a start would load, and both are what the journal folds into."""
    opened = house.disk.opened()
    fresh = Book.opened(opened)
    assert house.book.jobs == fresh.jobs
    counts = {name: count for name, count in house.book.counts.items() if any(count.values())}
    assert counts == {name: count for name, count in fresh.counts.items() if any(count.values())}
    assert house.book.totals == fresh.totals
    assert house.book.paused == fresh.paused
    assert house.book.suspects == house.disk.suspects
    for job in house.book.finished.values():
        assert house.disk.job(job.id) == job
    folded: dict[int, Job | None] = {}
    for event in house.disk.events:
        if event.job_seq:
            folded[event.job_seq] = fold(folded.get(event.job_seq), event)
    for seq, row in folded.items():
        if seq in house.disk.jobs:
            assert row == house.disk.jobs[seq]


@asynccontextmanager
async def household(disk: MemoryStorage | None = None, **parts: Any) -> AsyncIterator[VirtualEngine]:
    """A household whose memory and disk agree at the end."""
    async with VirtualEngine(disk, **parts) as house:
        yield house
        await settle()
        compare(house)


# -- the mailbox ------------------------------------------------------------------------------------------------------


def fill(house: VirtualEngine, commands: Iterable[AnyCommand], size: int = 0) -> list[asyncio.Task[Any]]:
    return [begin(house.actor.ask(command, size=size)) for command in commands]


@in_virtual_time
async def test_shares_of_the_mailbox() -> None:
    """Under a flood of creates there is room for starts and reads, and in the end for running work alone."""
    house = VirtualEngine(bounds=Bounds(mailbox=20))
    tasks = fill(house, [Create() for _ in range(20)])
    await settle()
    assert [task.result().code for task in tasks if task.done()] == ["overloaded"] * 6
    tasks += fill(house, [Get(id="x"), Claim(worker="w"), Start(id="x", worker="w"), Stats(), ListJobs(), Why(id="x")])
    await settle()
    assert house.actor.waiting == 17
    assert (await house.actor.ask(Import(id="x"))).code == "overloaded"  # type: ignore[union-attr]
    last: list[AnyCommand] = [Ping(), Progress(id="x", lock_id="l", progress=1), ForceFail(id="x"), Tick()]
    tasks += fill(house, last)
    await settle()
    assert house.actor.waiting == 20
    refusal = tasks[-1].result()
    assert (refusal.code, refusal.status) == ("overloaded", 503)
    async with house:
        await settle()
        assert all(task.done() for task in tasks)
    assert house.actor.waiting == 0
    assert (house.book.totals["queued"], house.book.totals["processing"]) == (13, 1)


@in_virtual_time
async def test_shares_of_the_bytes_in_flight() -> None:
    house = VirtualEngine(bounds=Bounds(inflight_bytes=100))
    assert (await house.actor.ask(Create(), size=71)).code == "overloaded"  # type: ignore[union-attr]
    first = begin(house.actor.ask(Create(), size=70))
    await settle()
    assert (await house.actor.ask(Get(id="x"), size=16)).code == "overloaded"  # type: ignore[union-attr]
    second = begin(house.actor.ask(Complete(id="x", lock_id="l"), size=30))
    await settle()
    assert (await house.actor.ask(Tick(), size=1)).code == "overloaded"  # type: ignore[union-attr]
    async with house:
        assert isinstance(await first, Response)
        assert (await second).code == "job_not_found"
        assert isinstance(await house.actor.ask(Create(), size=70), Response)  # the bytes are given back


@in_virtual_time
async def test_waits_have_limits() -> None:
    async with household(bounds=Bounds(parked_claims=1, claim_wait_ms=1_000)) as house:
        refusal = await house.no(Claim(worker="w", wait_ms=1_001))
        assert (refusal.code, refusal.details) == ("invalid_request", {"field": "$.wait_ms"})
        waiting = await parked(house, "w", wait_ms=1_000)
        assert (await house.no(Claim(worker="w", wait_ms=1))).code == "overloaded"
        assert (await house.yes(Claim(worker="w"))).grants == []
        assert ids_of(await waiting) == []


@in_virtual_time
async def test_what_waits_is_one_batch() -> None:
    """Command 2 sees what command 1 did, and one transaction holds all of it."""
    house = VirtualEngine()
    tasks = fill(house, [Create(id="a", payload=Raw(b"7")), Start(id="a", worker="w"), Create(id="a"), Get(id="a")])
    async with house:
        created, started, twice, got = [await task for task in tasks]
        assert (created.status, created.data.status) == (201, "queued")
        assert started.data.job.payload == got.data.payload == Raw(b"7")
        assert twice.code == "job_exists"
        assert got.data.status == "processing"
        assert [len(batch.changes) for batch in house.disk.batches] == [2]
        compare(house)


@in_virtual_time
async def test_a_batch_is_bounded_by_what_it_writes() -> None:
    house = VirtualEngine()
    bulk = Bulk(jobs=[Create() for _ in range(BATCH_WEIGHT)])
    tasks = fill(house, [bulk, bulk, *(Claim(worker="w", limit=100) for _ in range(11))])
    async with house:
        for task in tasks:
            await task
        assert [len(batch.changes) for batch in house.disk.batches] == [1_000, 1_000, 1_000, 100]


@in_virtual_time
async def test_nobody_is_told_before_the_commit() -> None:
    async with household() as house:
        house.disk.gate.clear()
        creating = begin(house.actor.ask(Create(id="a")))
        await house.disk.at_gate.wait()
        reading = begin(house.actor.ask(Get(id="a")))
        await settle()
        assert not creating.done()
        assert not reading.done()
        heard: list[str] = []
        house.actor.on_commit.append(lambda changes: heard.extend(change.event.type for change in changes))
        house.disk.gate.set()
        assert isinstance(await creating, Response)
        assert (await reading).data.id == "a"
        assert heard == ["created"]
        assert sum(house.actor.commit_seconds.counts) == 1
        assert house.actor.batch_commands.total == 1


@in_virtual_time
async def test_a_bug_in_a_rule_costs_one_command() -> None:
    house = VirtualEngine()
    original = decide.decide

    def broken(book: Book, call: Call, at: Moment, policy: Policy) -> Decision:
        if isinstance(call.command, Pause):
            raise ZeroDivisionError
        return original(book, call, at, policy)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decide, "decide", broken)
        tasks = fill(house, [Create(id="a"), Pause(name="q"), Create(id="b")])
        async with house:
            answers = [await task for task in tasks]
            compare(house)
    assert [answer.status for answer in answers] == [201, 500, 201]
    assert answers[1].code == "internal_error"


@in_virtual_time
async def test_what_the_daemon_itself_writes() -> None:
    disk = MemoryStorage()
    disk.marked = True
    async with household(disk) as house:
        before = disk.numbers.lease_ms
        await asyncio.sleep(2)
        assert await house.yes(Tick()) == EmptyResponse()
        assert disk.numbers.lease_ms == before + 2_000
        assert await house.yes(Report(body=b"{}")) == EmptyResponse()
        assert list(disk.kept_reports) == [b"{}"]
        await house.yes(EndGrants(ids=[], last=False))
        assert disk.marked
        await house.yes(EndGrants(ids=[], last=True))
        assert not disk.marked
        written = len(disk.batches)
        await house.yes(Ping())
        await house.yes(Stats())
        assert len(disk.batches) == written


# -- what lies on the disk --------------------------------------------------------------------------------------------


async def finished_disk() -> MemoryStorage:
    """A disk that holds one completed job, `done`, and nothing in memory."""
    async with household() as house:
        await house.yes(Create(id="done", payload=Raw(b'"p"')))
        granted = await house.yes(Start(id="done", worker="w"))
        await house.yes(Complete(id="done", lock_id=granted.lock_id, file_path="/f"))
        return house.disk


@in_virtual_time
async def test_finished_jobs_are_read_when_they_are_named() -> None:
    async with household(await finished_disk()) as house:
        assert house.book.get("done") is None
        assert house.book.total() == 1
        view: JobView = await house.yes(Get(id="done"))
        assert (view.status, view.payload, view.file_path) == ("completed", Raw(b'"p"'), "/f")
        assert (await house.no(Get(id="never"))).code == "job_not_found"
        assert (await house.no(Create(id="done"))).code == "job_exists"
        assert (await house.yes(Import(id="done"))).skipped
        same = await house.actor.ask(Create(id="done", payload=Raw(b'"p"')))
        assert isinstance(same, Response)
        assert (same.status, same.data.status, same.data.payload) == (200, "completed", Raw(b'"p"'))
        assert (await house.yes(Delete(id="done"))).payload == Raw(b'"p"')
        assert house.disk.jobs == {}


@in_virtual_time
async def test_a_bulk_finds_jobs_of_the_disk() -> None:
    async with household(await finished_disk()) as house:
        made = await house.yes(Bulk(jobs=[Create(), Create(id="done", payload=Raw(b'"p"'))]))
        assert (made.jobs[1].status, made.jobs[1].payload) == ("completed", Raw(b'"p"'))


@in_virtual_time
async def test_history_is_read_beside_the_batches() -> None:
    async with household(await finished_disk()) as house:
        events = (await house.yes(Timeline(id="done"))).events
        assert [event.type for event in events] == ["created", "granted", "completed"]
        for number in range(3):
            await house.yes(Create(id=f"{number}"))
        page = await house.yes(ListJobs(limit=2))
        assert [job.id for job in page.jobs] == ["2", "1"]
        page = await house.yes(ListJobs(limit=2, cursor=page.next_cursor))
        assert ([job.id for job in page.jobs], page.next_cursor) == (["0", "done"], None)
        assert page.jobs[1].payload == Raw(b'"p"')
        assert [job.id for job in (await house.yes(ListJobs(status="completed", queue="default"))).jobs] == ["done"]
        page = await house.yes(Export(limit=3))
        assert [job.id for job in page.jobs] == ["done", "0", "1"]
        assert page.jobs[0].payload == Raw(b'"p"')
        page = await house.yes(Export(limit=3, cursor=page.next_cursor))
        assert ([job.id for job in page.jobs], page.next_cursor) == (["2"], None)
        assert [job.id for job in (await house.yes(Export(status="completed", queue="default"))).jobs] == ["done"]
        house.disk.errors["timeline"] = OSError("unreadable")
        assert (await house.no(Timeline(id="done"))).code == "internal_error"
        assert (await house.yes(Get(id="0"))).id == "0"


@in_virtual_time
async def test_what_was_asked_of_history_is_answered_before_the_end() -> None:
    house = VirtualEngine(await finished_disk())
    async with house:
        tasks = fill(house, [Timeline(id="done") for _ in range(10)])
        await asyncio.sleep(0)
        house.actor.stop()
    await asyncio.sleep(0)
    assert [len(task.result().data.events) for task in tasks] == [3] * 10


@in_virtual_time
async def test_a_job_may_be_shown_and_deleted_in_one_batch() -> None:
    disk = await finished_disk()
    house = VirtualEngine(disk)
    house.step_ms = 8 * DAY_MS
    house.clock.accept()
    tasks = fill(house, [Get(id="done"), DeleteExpired(ids=["done"]), Get(id="done")])
    async with house:
        shown, deleted, gone = [await task for task in tasks]
        assert shown.data.payload == Raw(b'"p"')
        assert deleted.data.done == 1
        assert gone.code == "job_not_found"
        assert disk.batches[-1].payloads == []  # it would be looked for among rows that are gone
        compare(house)


# -- parked claims ----------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_waiting_claims_are_served_in_order_of_arrival() -> None:
    async with household() as house:
        waiting = [await parked(house, f"w-{number}", limit=limit) for number, limit in enumerate((1, 2, 1))]
        await house.yes(Bulk(jobs=[Create(id=name) for name in "abcde"]))
        assert [ids_of(await task) for task in waiting] == [["a"], ["b", "c"], ["d"]]
        assert len(house.actor.parked) == 0
        assert house.disk.batches[0].changes[0].event.type == "created"  # and all in one transaction
        assert len(house.disk.batches) == 1


@in_virtual_time
async def test_the_order_of_arrival_holds_over_all_queues() -> None:
    """Who waits for several queues does not take a job for which another has waited longer."""
    async with household() as house:
        first = await parked(house, "first", queues=["q"])
        second = await parked(house, "second", queues=["default", "q"])
        await house.yes(Bulk(jobs=[Create(id="a"), Create(id="b", queue="q", priority=-1)]))
        assert ids_of(await first) == ["b"]
        assert ids_of(await second) == ["a"]


@in_virtual_time
async def test_a_waiting_claim_that_was_nearly_served_is_answered_where_the_disk_fails() -> None:
    house = VirtualEngine()
    running = asyncio.create_task(house.actor.run())
    waiting = await parked(house, "w")
    house.disk.write_errors.append(OSError("EIO"))
    refusal = await house.no(Create(id="a"))
    assert refusal.code == "outcome_unknown"
    answer = await waiting
    assert isinstance(answer, ApiError)
    assert answer.code == "outcome_unknown"
    with pytest.raises(DiskBroken):
        await running


@in_virtual_time
async def test_a_waiting_claim_comes_before_a_new_one() -> None:
    async with household() as house:
        waiting = await parked(house, "first")
        tasks = fill(house, [Create(id="a"), Claim(worker="second")])
        assert ids_of(await waiting) == ["a"]
        assert ids_of(await tasks[1]) == []


@in_virtual_time
async def test_claims_wait_for_their_queues_and_kinds() -> None:
    async with household() as house:
        one = await parked(house, "one", queues=["q", "r", "q"], kinds=["k", "l", "k"])
        any_kind = await parked(house, "any", queues=["q"])
        two = await parked(house, "two", queues=["q"], kinds=["k"])
        await house.yes(Create(id="a", queue="elsewhere", kind="k"))
        await house.yes(Create(id="b", queue="r", kind="m"))
        await settle()
        assert len(house.actor.parked) == 3
        await house.yes(Create(id="c", queue="q", kind="m"))
        assert ids_of(await any_kind) == ["c"]
        await house.yes(Create(id="d", queue="r", kind="l"))
        assert ids_of(await one) == ["d"]
        await house.yes(Create(id="e", queue="q", kind="k"))
        assert ids_of(await two) == ["e"]


@in_virtual_time
async def test_what_brings_work_to_a_waiting_claim() -> None:
    async with household() as house:
        lock_id = await house.held("a", lock_ttl_ms=60_000)
        waiting = await parked(house, "w")
        await house.yes(Release(id="a", lock_id=lock_id))
        assert ids_of(await waiting) == ["a"]
        waiting = await parked(house, "w")
        await house.yes(ForceReset(id="a"))
        assert ids_of(await waiting) == ["a"]
        await house.yes(Pause(name="default"))
        await house.yes(Create(id="b"))
        waiting = await parked(house, "w")
        await house.yes(Resume(name="default"))
        assert ids_of(await waiting) == ["b"]
        await house.yes(Create(id="c", delay_ms=DAY_MS))
        waiting = await parked(house, "w")
        await house.yes(RunNow(id="c"))
        assert ids_of(await waiting) == ["c"]


@in_virtual_time
async def test_a_delayed_job_goes_to_who_waits_when_it_is_due() -> None:
    async with household() as house:
        await house.yes(Create(id="a", delay_ms=2_500))
        waiting = await parked(house, "w")
        begun = house.now
        assert ids_of(await waiting) == ["a"]
        assert house.now == begun + 2_500


@in_virtual_time
async def test_a_step_of_the_clock_that_makes_a_job_eligible_wakes_a_waiting_claim() -> None:
    async with household() as house:
        await house.yes(Create(id="a", delay_ms=DAY_MS // 2))
        await house.yes(Create(id="b", queue="q", expires_at=house.now + DAY_MS // 4))
        ahead = await parked(house, "ahead")
        begun = asyncio.get_running_loop().time()
        house.step_ms += DAY_MS // 2
        assert ids_of(await ahead) == ["a"]
        back = await parked(house, "back", queues=["q"])
        house.step_ms -= DAY_MS // 2
        assert ids_of(await back) == ["b"]
        assert asyncio.get_running_loop().time() - begun == 2 * CLOCK_LOOK_S


@in_virtual_time
async def test_a_wait_that_is_over_is_answered_empty() -> None:
    async with household() as house:
        short = await parked(house, "short", wait_ms=1_000)
        long = await parked(house, "long", wait_ms=2_000)
        begun = house.now
        answer = await short
        assert (ids_of(answer), house.now - begun) == ([], 1_000)
        assert len(house.actor.parked) == 1
        assert (ids_of(await long), house.now - begun) == ([], 2_000)
        assert house.disk.batches == []


@in_virtual_time
async def test_a_claim_whose_caller_has_gone_gets_nothing() -> None:
    async with household() as house:
        gone, waiting = await parked(house, "gone"), await parked(house, "here")
        gone.cancel()
        await settle()
        assert len(house.actor.parked) == 1
        await house.yes(Create(id="a"))
        assert ids_of(await waiting) == ["a"]


@in_virtual_time
async def test_a_claim_skips_overdue_jobs_and_waits() -> None:
    async with household() as house:
        await house.yes(Create(id="a", expires_at=house.now + 1_000))
        await asyncio.sleep(1)
        waiting = await parked(house, "w")
        assert (await house.yes(Get(id="a"))).status == "queued"
        await house.yes(Create(id="b", expires_at=house.now + 1_000, delay_ms=1_000))
        await asyncio.sleep(1)
        await settle()
        assert (await house.yes(Get(id="b"))).status == "queued"
        await house.yes(Create(id="c"))
        assert ids_of(await waiting) == ["c"]


@in_virtual_time
async def test_stop_parking_answers_everybody_and_lets_nobody_wait() -> None:
    async with household() as house:
        waiting = [await parked(house, "w"), await parked(house, "w", key=key("k"))]
        house.actor.stop_parking()
        assert [ids_of(await task) for task in waiting] == [[], []]
        assert ids_of(await house.actor.ask(Claim(worker="w", wait_ms=30_000))) == []
        await house.yes(Create())  # all else goes on


@in_virtual_time
async def test_stop_empties_the_mailbox_and_ends() -> None:
    house = VirtualEngine()
    running = begin(house.actor.run())
    waiting = await parked(house, "w")
    house.disk.gate.clear()
    under_way = begin(house.actor.ask(Create(id="a", queue="q")))
    await house.disk.at_gate.wait()
    in_mailbox = begin(house.actor.ask(Create(id="b", queue="q")))
    await settle()
    house.actor.stop()
    assert (await house.actor.ask(Ping())).code == "shutting_down"  # type: ignore[union-attr]
    house.disk.gate.set()
    await running
    assert [(await task).status for task in (under_way, in_mailbox)] == [201, 201]
    assert ids_of(await waiting) == []
    compare(house)


@in_virtual_time
async def test_stop_wakes_an_idle_actor() -> None:
    house = VirtualEngine()
    running = begin(house.actor.run())
    await settle()
    house.actor.stop()
    await running


# -- idempotency keys -------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_the_same_key_gets_the_same_answer_once() -> None:
    async with household() as house:
        create = Create(payload=Raw(b"[1]"))
        first = await house.actor.ask(create, key=key("k"))
        second = await house.actor.ask(create, key=key("k"))
        assert isinstance(first, Response)
        assert isinstance(second, Response)
        assert (first.replayed, second.replayed) == (False, True)
        assert (first.status, second.status) == (201, 201)
        assert first.data.id.encode() in bytes(second.data)
        assert b'"payload":[1]' in bytes(second.data)
        assert len(house.disk.jobs) == 1
        other = await house.no(create, key=key("k", "another body"))
        assert (other.code, other.status) == ("idempotency_key_reused", 422)
        await asyncio.sleep(KEPT_MS / 1000)
        again = await house.actor.ask(create, key=key("k"))
        assert isinstance(again, Response)
        assert not again.replayed
        assert len(house.disk.jobs) == 2


@in_virtual_time
async def test_a_repeat_while_the_first_is_in_flight_waits_for_it() -> None:
    house = VirtualEngine()
    create = Create(id="a", payload=Raw(b"[1]"))
    tasks = [begin(house.actor.ask(create, key=key("k"))) for _ in range(3)]
    tasks.append(begin(house.actor.ask(create, key=key("k", "other"))))
    async with house:
        first, second, third, other = [await task for task in tasks]
        assert (first.replayed, second.replayed, third.replayed) == (False, True, True)
        assert bytes(second.data) == bytes(third.data)
        assert other.code == "idempotency_key_reused"
        house.disk.gate.clear()
        slow = begin(house.actor.ask(Create(), key=key("l")))
        await house.disk.at_gate.wait()
        repeat = begin(house.actor.ask(Create(), key=key("l")))
        await settle()
        assert not repeat.done()
        house.disk.gate.set()
        assert not (await slow).replayed
        assert (await repeat).replayed
        compare(house)


@in_virtual_time
async def test_keys_outlive_a_restart() -> None:
    async with household() as house:
        await house.yes(Create(id="a"), key=key("create"))
        await house.yes(Start(id="a", worker="w"), key=key("start"))
        disk = house.disk
    async with household(disk) as house:
        again = await house.actor.ask(Create(id="a"), key=key("create"))
        assert isinstance(again, Response)
        assert (again.replayed, again.status) == (True, 201)
        again = await house.actor.ask(Start(id="a", worker="w"), key=key("start"))
        assert isinstance(again, Response)
        assert again.replayed
        assert again.data.job.lock.worker == "w"


@in_virtual_time
async def test_an_answer_that_is_damaged_says_so() -> None:
    async with household() as house:
        await house.yes(Create(), key=key("k"))
        house.disk.keys.clear()
        assert (await house.no(Create(), key=key("k"))).code == "internal_error"
        assert len(house.disk.jobs) == 1


@in_virtual_time
async def test_a_key_whose_grants_are_no_longer_current_is_judged_anew() -> None:
    """Such a row is left where a start finds a key whose grants ended while nobody looked: in a restored backup."""
    disk = MemoryStorage()
    disk.keys["k"] = StoredResponse("k", "body", 0, grants=[("a", "old")])
    async with household(disk) as house:
        await house.yes(Create(id="a"))
        answer = await house.actor.ask(Start(id="a", worker="w"), key=key("k"))
        assert isinstance(answer, Response)
        assert not answer.replayed
        assert disk.keys["k"].grants == [("a", answer.data.lock_id)]


@in_virtual_time
async def test_what_changed_nothing_is_not_stored() -> None:
    async with household() as house:
        assert (await house.no(Cancel(id="a"), key=key("k"))).code == "job_not_found"
        await house.yes(Create(id="a"))
        assert (await house.yes(Cancel(id="a"), key=key("k"))).status == "cancelled"
        again = await house.actor.ask(Cancel(id="a"), key=key("k"))
        assert isinstance(again, Response)
        assert again.replayed
        await house.yes(Claim(worker="w"), key=key("empty"))
        await house.yes(Create(id="b"))
        assert ids_of(await house.actor.ask(Claim(worker="w"), key=key("empty"))) == ["b"]


@in_virtual_time
async def test_an_empty_claim_is_never_stored_even_where_jobs_expired_on_its_way() -> None:
    async with household() as house:
        await house.yes(Create(id="a", expires_at=house.now + 1_000))
        await asyncio.sleep(1)
        assert ids_of(await house.actor.ask(Claim(worker="w"), key=key("k"))) == []
        await house.yes(Create(id="b"))
        assert ids_of(await house.actor.ask(Claim(worker="w"), key=key("k"))) == ["b"]


@pytest.mark.parametrize(
    "command",
    [
        Update(id="a", priority=3),
        Cancel(id="a", reason="r"),
        ForceFail(id="a"),
        Delete(id="done"),
        Pause(name="q"),
        Bulk(jobs=[Create(id="x", payload=Raw(b"5")), Create(id="done", payload=Raw(b'"p"'))]),
        RunNow(id="a"),
    ],
    ids=lambda command: type(command).__name__,
)
def test_a_stored_answer_is_the_whole_answer(command: AnyCommand) -> None:
    async def test() -> None:
        disk = await finished_disk()
        async with household(disk) as house:
            await house.yes(Create(id="a", payload=Raw(b"[9]"), delay_ms=5))
            first = await house.actor.ask(command, key=key("k"))
            again = await house.actor.ask(command, key=key("k"))
            assert isinstance(first, Response)
            assert isinstance(again, Response)
            assert again.replayed
            assert again.status == first.status
            body = bytes(again.data)
            if isinstance(first.data, JobView):
                assert first.data.payload is not UNSET
                assert bytes(first.data.payload) in body

    in_virtual_time(test)()


@in_virtual_time
async def test_a_started_job_is_given_again_while_its_grant_is_current() -> None:
    async with household() as house:
        await house.yes(Create(id="a", payload=Raw(b"1")))
        start = Start(id="a", worker="w")
        first = await house.actor.ask(start, key=key("k"))
        assert isinstance(first, Response)
        await house.yes(Progress(id="a", lock_id=first.data.lock_id, progress=40))
        again = await house.actor.ask(start, key=key("k"))
        assert isinstance(again, Response)
        assert (again.replayed, again.data.lock_id) == (True, first.data.lock_id)
        assert (again.data.job.progress, again.data.job.payload) == (40, Raw(b"1"))
        await house.yes(Release(id="a", lock_id=first.data.lock_id))
        assert house.disk.keys == {}
        anew = await house.actor.ask(start, key=key("k"))
        assert isinstance(anew, Response)
        assert not anew.replayed
        assert anew.data.fencing_token == first.data.fencing_token + 1
        await house.yes(ForceReset(id="a"))
        await house.yes(Start(id="a", worker="other"))
        refusal = await house.no(start, key=key("k"))
        assert (refusal.code, refusal.details["locked_by"]) == ("already_locked", "other")


@in_virtual_time
async def test_a_repeated_claim_gives_the_grants_that_are_left() -> None:
    async with household() as house:
        for name in "abc":
            await house.yes(Create(id=name))
        claim = Claim(worker="w", limit=2)
        first = await house.actor.ask(claim, key=key("k"))
        assert ids_of(first) == ["a", "b"]
        assert isinstance(first, Response)
        await house.yes(Complete(id="a", lock_id=first.data.grants[0].lock_id))
        assert ids_of(await house.actor.ask(claim, key=key("k"))) == ["b"]
        await house.yes(Complete(id="b", lock_id=first.data.grants[1].lock_id))
        assert house.disk.keys == {}
        assert ids_of(await house.actor.ask(claim, key=key("k"))) == ["c"]


@in_virtual_time
async def test_a_parked_claim_that_is_repeated_waits_once() -> None:
    async with household() as house:
        first = await parked(house, "w", key=key("k"))
        repeat = await parked(house, "w", key=key("k"))
        other = await house.no(Claim(worker="w", wait_ms=30_000), key=key("k", "other"))
        assert other.code == "idempotency_key_reused"
        assert len(house.actor.parked) == 1
        await house.yes(Create(id="a"))
        assert ids_of(await first) == ids_of(await repeat) == ["a"]
        assert house.book.totals["processing"] == 1
        house.actor.undelivered(await first)
        await settle()
        assert house.book.totals["processing"] == 1  # the other connection has it
        house.actor.undelivered(await repeat)
        await settle()
        assert house.book.totals["processing"] == 0
        assert house.disk.keys == {}


@in_virtual_time
async def test_a_parked_claim_goes_when_all_who_asked_have_gone() -> None:
    async with household() as house:
        first = await parked(house, "w", key=key("k"))
        repeat = await parked(house, "w", key=key("k"))
        first.cancel()
        await settle()
        assert len(house.actor.parked) == 1
        repeat.cancel()
        await settle()
        assert len(house.actor.parked) == 0
        await house.yes(Create(id="a"))
        assert house.book.totals["queued"] == 1


@in_virtual_time
async def test_a_repeat_gets_the_grant_that_the_first_did_not_wait_for() -> None:
    async with household() as house:
        first = await parked(house, "w", key=key("k"))
        repeat = await parked(house, "w", key=key("k"))
        first.cancel()
        await house.yes(Create(id="a"))
        assert ids_of(await repeat) == ["a"]
        await settle()
        assert house.book.totals["processing"] == 1


@in_virtual_time
async def test_at_the_cap_keyed_calls_are_refused() -> None:
    house = VirtualEngine()
    house.actor._decider.keys.limit = 1
    async with house:
        await house.yes(Create(), key=key("k"))
        refusal = await house.no(Create(), key=key("l"))
        assert (refusal.code, refusal.status) == ("overloaded", 503)
        await house.yes(Create())
        await asyncio.sleep(600)
        assert (await house.no(RunNow(id="a", dry_run=True), key=key("m"))).code == "job_not_found"
        await house.yes(Create())
        assert set(house.disk.keys) == {"k"}, "what is not done needs no place among the keys"
        await house.yes(Create(), key=key("l"))
        assert set(house.disk.keys) == {"l"}


# -- grants that nobody received --------------------------------------------------------------------------------------


@in_virtual_time
async def test_an_undelivered_grant_goes_back() -> None:
    async with household() as house:
        await house.yes(Create(id="a"))
        answer = await house.actor.ask(Start(id="a", worker="w"))
        assert isinstance(answer, Response)
        house.actor.undelivered(answer)
        await settle()
        view = await house.yes(Get(id="a"))
        assert (view.status, view.attempt) == ("queued", 0)
        assert [event.type for event in house.disk.events] == ["created", "granted", "undelivered"]
        again = await house.actor.ask(Start(id="a", worker="w"))
        house.actor.undelivered(answer)  # an old answer ends no newer grant
        await settle()
        assert isinstance(again, Response)
        assert house.book.holds("a", again.data.lock_id)


@in_virtual_time
async def test_a_caller_that_has_gone_before_the_batch_gets_no_grant() -> None:
    house = VirtualEngine()
    await asyncio.sleep(0)
    created = begin(house.actor.ask(Create(id="a")))
    gone = begin(house.actor.ask(Start(id="a", worker="w")))
    await settle()
    gone.cancel()
    await settle()
    async with house:
        await created
        await settle()
        assert [event.type for event in house.disk.events] == ["created"]


@in_virtual_time
async def test_a_caller_that_goes_during_the_commit_gives_its_grant_back() -> None:
    for name in (None, key("k")):
        async with household() as house:
            await house.yes(Create(id="a"))
            house.disk.gate.clear()
            gone = begin(house.actor.ask(Claim(worker="w"), key=name))
            await house.disk.at_gate.wait()
            gone.cancel()
            await settle()
            house.disk.gate.set()
            await settle()
            assert [event.type for event in house.disk.events] == ["created", "granted", "undelivered"]
            assert house.disk.keys == {}


@in_virtual_time
async def test_a_caller_that_goes_after_the_commit_gives_its_grant_back() -> None:
    """The answer is set, but the task that waits for it is cancelled before it could read it."""
    async with household() as house:
        await house.yes(Create(id="a"))
        gone = begin(house.actor.ask(Start(id="a", worker="w")))

        def hang_up(changes: Sequence[Change]) -> None:
            gone.cancel()

        house.actor.on_commit.append(hang_up)
        with pytest.raises(asyncio.CancelledError):
            await gone
        house.actor.on_commit.pop()
        await settle()
        assert house.book.totals == {"queued": 1, "processing": 0, "completed": 0, "failed": 0, "cancelled": 0}


@in_virtual_time
async def test_a_keyed_grant_stays_while_one_connection_has_it() -> None:
    async with household() as house:
        await house.yes(Create(id="a"))
        start = Start(id="a", worker="w")
        first = await house.actor.ask(start, key=key("k"))
        second = await house.actor.ask(start, key=key("k"))
        assert isinstance(first, Response)
        assert isinstance(second, Response)
        house.actor.undelivered(first)
        await settle()
        assert house.book.totals["processing"] == 1
        house.actor.undelivered(second)
        await settle()
        assert house.book.totals["queued"] == 1
        assert house.disk.keys == {}
        # The stored answer went in the same transaction as the grant.
        assert house.disk.batches[-1].forget_keys == ["k"]


@in_virtual_time
async def test_a_repeat_that_overtakes_the_release_keeps_the_grant() -> None:
    async with household() as house:
        await house.yes(Create(id="a"))
        start = Start(id="a", worker="w")
        first = await house.actor.ask(start, key=key("k"))
        repeat = begin(house.actor.ask(start, key=key("k")))
        await asyncio.sleep(0)  # it is in the mailbox
        assert isinstance(first, Response)
        house.actor.undelivered(first)
        again = await repeat
        await settle()
        assert again.replayed
        assert house.book.holds("a", again.data.lock_id)


@in_virtual_time
async def test_a_repeat_whose_caller_has_gone_does_not_take_the_grant_from_the_first() -> None:
    async with household() as house:
        await house.yes(Create(id="a"))
        start = Start(id="a", worker="w")
        house.disk.gate.clear()
        first = begin(house.actor.ask(start, key=key("k")))
        await house.disk.at_gate.wait()
        repeat = begin(house.actor.ask(start, key=key("k")))
        await settle()
        repeat.cancel()
        await settle()
        house.disk.gate.set()
        answer = await first
        await settle()
        assert house.book.holds("a", answer.data.lock_id)
        house.actor.undelivered(answer)
        await settle()
        assert house.book.totals["queued"] == 1


@in_virtual_time
async def test_a_grant_that_an_earlier_daemon_may_have_sent_is_not_taken_back() -> None:
    """Simulation, seed 22611: received, then a power cut; who asked again for it under its key hung up."""
    disk, start = MemoryStorage(), Start(id="a", worker="w")
    async with VirtualEngine(disk) as house:
        await house.yes(Create(id="a"))
        first = await house.yes(start, key=key("k"))
    async with VirtualEngine(disk) as house:
        again = await house.actor.ask(start, key=key("k"))
        assert isinstance(again, Response)
        assert again.replayed
        house.actor.undelivered(again)
        await settle()
        assert house.book.holds("a", first.lock_id)
        await house.yes(Complete(id="a", lock_id=first.lock_id))


# -- a full disk ------------------------------------------------------------------------------------------------------


def closed(house: VirtualEngine) -> str:
    return house.actor.full_disk.closed.name


@in_virtual_time
async def test_first_only_creates_are_refused() -> None:
    async with household() as house:
        lock_id = await house.held("a")
        house.disk.fill_nearly()
        tasks = fill(house, [Create(id="b"), Progress(id="a", lock_id=lock_id, progress=5), Bulk(jobs=[Create()])])
        created, reported, bulk = [await task for task in tasks]
        assert (created.code, created.status, bulk.code) == ("storage_full", 507, "storage_full")
        assert isinstance(reported, Response)
        assert closed(house) == "CREATES"
        assert not house.clock.held
        assert (await house.no(Import(id="c"))).code == "storage_full"
        await house.yes(Get(id="a"))
        writes = house.disk.calls["write"]
        await house.no(Create())
        assert house.disk.calls["write"] == writes  # refused before it is decided


@in_virtual_time
async def test_a_probe_once_a_second_finds_the_room_again() -> None:
    async with household() as house:
        house.disk.fits = lambda batch: False
        assert (await house.no(Create(id="a"))).code == "storage_full"
        assert closed(house) == "CREATES"
        probes = house.disk.calls.get("probe", 0)
        await asyncio.sleep(3.5)
        assert house.disk.calls["probe"] == probes + 3
        assert closed(house) == "CREATES"
        house.disk.free()
        await asyncio.sleep(1)
        assert closed(house) == "NOTHING"
        assert (await house.yes(Create(id="a"))).id == "a"
        probes = house.disk.calls["probe"]
        await asyncio.sleep(10)
        assert house.disk.calls["probe"] == probes


@in_virtual_time
async def test_then_the_ballast_goes_and_only_endings_are_taken() -> None:
    async with household() as house:
        ending, signing = await house.held("a"), await house.held("b")
        house.disk.fill()
        tasks = fill(house, [
            Complete(id="a", lock_id=ending), Progress(id="b", lock_id=signing, progress=5), Create(), Tick(),
            Claim(worker="w", wait_ms=1_000), Get(id="b"), Pause(name="q"),
        ])  # fmt: skip
        answers = [await task for task in tasks]
        assert [answer.status for answer in answers] == [200, 507, 507, 507, 507, 200, 507]
        assert closed(house) == "ALL_BUT_ENDINGS"
        assert not house.disk.has_ballast
        assert house.clock.held
        house.disk.has_spare = False
        lease = house.clock.moment().lease
        await asyncio.sleep(3.5)
        assert house.clock.moment().lease == lease  # no sign of life can be taken, so no lock ages
        assert closed(house) == "ALL_BUT_ENDINGS"
        assert not house.disk.has_ballast
        house.disk.free()
        await asyncio.sleep(1)
        assert closed(house) == "NOTHING"
        assert house.disk.has_ballast
        assert not house.clock.held
        await house.yes(Progress(id="b", lock_id=signing, progress=5))


@in_virtual_time
async def test_at_worst_every_write_is_refused_and_reads_go_on() -> None:
    async with household() as house:
        lock_id = await house.held("a")
        house.disk.fits = lambda batch: False
        tasks = fill(house, [Complete(id="a", lock_id=lock_id), Get(id="a"), Stats(), Timeline(id="a"), ListJobs()])
        answers = [await task for task in tasks]
        assert [answer.status for answer in answers] == [507, 200, 200, 200, 200]
        assert answers[1].data.status == "processing"
        assert closed(house) == "ALL_WRITES"
        assert (await house.no(Delete(id="a"))).code == "storage_full"
        house.disk.free()
        await asyncio.sleep(1)
        assert (await house.yes(Complete(id="a", lock_id=lock_id))).status == "completed"


@pytest.mark.parametrize("error", [DiskFull("no room for 16 MiB"), OSError("the file cannot be made")])
def test_writes_are_accepted_without_room_for_the_reserve_file(error: Exception) -> None:
    @in_virtual_time
    async def test() -> None:
        async with household() as house:
            lock_id = await house.held("a")
            house.disk.fill()
            await house.no(Progress(id="a", lock_id=lock_id, progress=1))
            assert house.actor.full_disk.has_reserve  # its room is there for endings
            house.disk.errors["build_reserve"] = error
            with capture_logs() as lines:
                await asyncio.sleep(1.1)
                assert closed(house) == "NOTHING"
                assert not house.clock.held
                await house.yes(Create())
                await asyncio.sleep(5)
            assert closed(house) == "NOTHING"
            assert not house.actor.full_disk.has_reserve
            told = ["disk_has_room"] + ["reserve_file_not_rebuilt"] * isinstance(error, OSError)
            assert [line["event"] for line in lines] == told
            house.disk.free()
            del house.disk.errors["build_reserve"]
            await asyncio.sleep(1.1)
            assert house.disk.has_ballast
            assert house.actor.full_disk.has_reserve
            tries = house.disk.calls["build_reserve"]
            await asyncio.sleep(5)
            assert house.disk.calls["build_reserve"] == tries

    test()


@in_virtual_time
async def test_a_write_that_fits_is_not_enough_without_spare_room() -> None:
    async with household() as house:
        house.disk.fits = lambda batch: False
        await house.no(Create())
        house.disk.free()
        house.disk.has_spare = False
        await asyncio.sleep(3)
        assert closed(house) == "CREATES"
        house.disk.has_spare = True
        await asyncio.sleep(1.1)
        assert closed(house) == "NOTHING"


@in_virtual_time
async def test_endings_are_tried_again_before_there_is_spare_room() -> None:
    async with household() as house:
        lock_id = await house.held("a")
        house.disk.fits = lambda batch: False
        await house.no(Complete(id="a", lock_id=lock_id))
        assert closed(house) == "ALL_WRITES"
        house.disk.free()
        house.disk.has_spare = False
        await asyncio.sleep(1.1)
        assert closed(house) == "ALL_BUT_ENDINGS"
        assert house.clock.held
        assert (await house.no(Create())).code == "storage_full"
        await house.yes(Complete(id="a", lock_id=lock_id))


@in_virtual_time
async def test_a_disk_that_stays_full_is_logged_once_a_step() -> None:
    async with household() as house:
        lock_id = await house.held("a")
        house.disk.fits = lambda batch: False
        with capture_logs() as lines:
            for _ in range(5):
                await house.no(Complete(id="a", lock_id=lock_id))
                house.disk.free()
                house.disk.has_spare = False
                await asyncio.sleep(1.1)  # endings are tried again, and do not fit
                house.disk.fits = lambda batch: False
        assert [line["refused"] for line in lines] == ["creates", "all_but_endings", "all_writes"]
        house.disk.free()
        with capture_logs() as lines:
            await asyncio.sleep(1.1)
            house.disk.fits = lambda batch: False
            await house.no(Complete(id="a", lock_id=lock_id))
        told = ["disk_has_room", "reserve_file_rebuilt", "disk_full", "disk_full", "disk_full"]
        assert [line["event"] for line in lines] == told


@in_virtual_time
async def test_room_that_is_used_up_at_once_ages_no_lock() -> None:
    """Each second the probe succeeds, and the next write does not fit: locks age only while writes are accepted."""
    async with household() as house:
        lock_id = await house.held("a")
        house.disk.fits = lambda batch: False
        await house.no(Complete(id="a", lock_id=lock_id))
        began = house.clock.moment().lease
        for _ in range(60):
            house.disk.free()
            await asyncio.sleep(1.1)
            assert closed(house) == "NOTHING"
            house.disk.fits = lambda batch: False
            await house.no(Complete(id="a", lock_id=lock_id))
            assert house.clock.held
        assert house.clock.moment().lease - began < 60 * 150  # of 66 s
        house.disk.free()
        await asyncio.sleep(1.1)
        await house.yes(Complete(id="a", lock_id=lock_id))


@in_virtual_time
async def test_the_refusal_names_path_and_free_bytes() -> None:
    async with household() as house:
        lock_id = await house.held("a")
        house.disk.fits = lambda batch: False
        house.disk.disk_space = DiskSpace("/disk/jobd.db", 4096, 20 << 20)
        no = await house.no(Create())
        assert no.message.startswith("The disk of the store is full (4096 bytes free at /disk/jobd.db); nothing was ")
        assert no.details == {"path": "/disk/jobd.db", "free_bytes": 4096, "total_bytes": 20 << 20}
        house.disk.disk_space = DiskSpace("/disk/jobd.db", 512, 20 << 20)
        await asyncio.sleep(1.1)
        assert "(512 bytes free at" in (await house.no(Create())).message
        house.disk.has_ballast = False  # deleted by hand
        message = (await house.no(Complete(id="a", lock_id=lock_id))).message
        assert "the reserve file is missing, so endings may not fit either" in message
        house.disk.disk_space = None
        await asyncio.sleep(1.1)
        no = await house.no(Create())
        assert no.message.startswith("The disk of the store is full, and the reserve file is missing")
        assert no.details == {}


@in_virtual_time
async def test_a_start_on_a_full_disk() -> None:
    disk = await finished_disk()
    disk.fits = lambda batch: False
    async with household(disk) as house:
        assert closed(house) == "CREATES"
        assert (await house.no(Create())).code == "storage_full"
        assert disk.calls.get("write", 0) == 3  # none since
        await house.yes(Get(id="done"))


@in_virtual_time
async def test_a_refused_batch_leaves_nothing_behind() -> None:
    async with household() as house:
        lock_id = await house.held("a")
        await house.yes(Create(id="b"))
        token = (await house.yes(Start(id="b", worker="w"))).fencing_token
        await house.yes(Complete(id="b", lock_id=house.book.jobs["b"].grant.lock_id))  # type: ignore[union-attr]
        await house.yes(Pause(name="paused", reason="deploy"))
        before = dict(house.book.paused)
        keys = dict(house.disk.keys)
        house.disk.fits = lambda batch: False
        tasks = fill(house, [
            Create(id="c"), Import(id="d", status="failed", error_message="e"), Delete(id="b"), Create(id="b"),
            Release(id="a", lock_id=lock_id), Start(id="a", worker="w"), Pause(name="q"), Resume(name="paused"),
            Pause(name="paused", reason="again"),
        ])  # fmt: skip
        keyed = begin(house.actor.ask(Claim(worker="w"), key=key("k")))
        assert {(await task).code for task in tasks} == {"storage_full"}
        assert (await keyed).code == "storage_full"
        compare(house)
        assert house.disk.keys == keys
        assert (house.book.paused, house.book.suspects) == (before, {})
        assert house.book.holds("a", lock_id)
        house.disk.free()
        await asyncio.sleep(1)
        await house.yes(Release(id="a", lock_id=lock_id))
        assert (await house.yes(Start(id="a", worker="w"))).fencing_token > token + 1  # what was handed out is burnt


class TokenDisk(MemoryStorage):
    """Notes every fencing token that it was asked to write, also those of batches that it refuses."""

    def __init__(self, numbers: Numbers | None = None) -> None:
        super().__init__(numbers)
        self.tokens: list[int] = []

    async def write(self, batch: Batch) -> dict[int, bytes]:
        grants = [change.after.grant for change in batch.changes if change.after and change.event.type == "granted"]
        self.tokens += [grant.fencing_token for grant in grants if grant is not None]
        return await super().write(batch)


@in_virtual_time
async def test_a_token_of_a_refused_batch_is_never_issued_again() -> None:
    disk = TokenDisk()
    async with household(disk) as house:
        await house.yes(Bulk(jobs=[Create(id=f"job-{number}") for number in range(4)]))
        disk.write_errors.append(DiskFull("full"))
        answers = [await task for task in fill(house, [Start(id=f"job-{number}", worker="w") for number in range(3)])]
        last = await house.yes(Start(id="job-3", worker="w"))
        assert len(disk.tokens) == 7
        assert disk.tokens == sorted(set(disk.tokens))
        assert [answer.data.fencing_token for answer in answers] == disk.tokens[3:6]
        assert disk.numbers.next_token == last.fencing_token - (1 << TOKEN_COUNTER_BITS) + 1


@in_virtual_time
async def test_a_full_counter_begins_the_next_epoch_within_a_batch() -> None:
    disk = TokenDisk(Numbers(epoch=5, next_token=COUNTER_MASK))
    async with household(disk) as house:
        await house.yes(Bulk(jobs=[Create(id=f"job-{number}") for number in range(4)]))
        epoch = new_epoch(5, house.now)
        disk.write_errors.append(DiskFull("full"))  # its tokens are not used again either
        answers = [await task for task in fill(house, [Start(id=f"job-{number}", worker="w") for number in range(3)])]
        expected = [5 << TOKEN_COUNTER_BITS | COUNTER_MASK, *((epoch << TOKEN_COUNTER_BITS) + n for n in range(1, 6))]
        assert disk.tokens == expected
        assert [answer.data.fencing_token for answer in answers] == expected[3:]
        assert (disk.numbers.epoch, disk.numbers.next_token) == (epoch, 6)


@in_virtual_time
async def test_a_keyed_start_whose_batch_is_refused_is_judged_anew() -> None:
    async with household() as house:
        await house.yes(Create(id="a"))
        house.disk.write_errors.append(DiskFull("once"))
        answer = await house.actor.ask(Start(id="a", worker="w"), key=key("k"))
        assert isinstance(answer, Response)
        assert not answer.replayed
        house.actor.undelivered(answer)
        await settle()
        assert house.book.totals["queued"] == 1  # counted once, so one lost connection is enough


@in_virtual_time
async def test_a_repeat_in_a_refused_batch_counts_as_one_connection() -> None:
    async with household() as house:
        await house.yes(Create(id="a"))
        start = Start(id="a", worker="w")
        first = await house.actor.ask(start, key=key("k"))
        house.disk.gate.clear()
        slow = begin(house.actor.ask(Tick()))
        await house.disk.at_gate.wait()
        house.disk.write_errors += [None, DiskFull("once")]
        repeat = begin(house.actor.ask(start, key=key("k")))
        await settle()
        tick = begin(house.actor.ask(Tick()))
        await settle()
        house.disk.gate.set()
        await slow
        second = await repeat
        assert second.replayed
        await tick
        house.actor.undelivered(second)
        await settle()
        assert house.book.totals["processing"] == 1
        assert isinstance(first, Response)
        house.actor.undelivered(first)
        await settle()
        assert house.book.totals["queued"] == 1


@in_virtual_time
async def test_a_repeat_on_a_full_disk_gets_its_answer() -> None:
    """What was done is not refused a second time: the client would take it for not done."""
    async with household() as house:
        await house.yes(Create(id="a"), key=key("create"))
        await house.yes(Start(id="a", worker="w"), key=key("start"))
        house.disk.fits = lambda batch: False
        await house.no(Complete(id="a", lock_id=house.book.jobs["a"].grant.lock_id))  # type: ignore[union-attr]
        assert closed(house) == "ALL_WRITES"
        for command, name in ((Create(id="a"), "create"), (Start(id="a", worker="w"), "start")):
            again = await house.actor.ask(command, key=key(name))
            assert isinstance(again, Response)
            assert again.replayed
        assert (await house.no(Create(id="b"), key=key("new"))).code == "storage_full"


@in_virtual_time
async def test_an_id_that_a_refused_batch_gave_to_a_job_of_another_queue() -> None:
    """What is taken back is another job: the queue of each counts its own."""
    again = Import(id="a", queue="y", status="completed"), Import(id="a", queue="y", status="cancelled")
    for command in (Create(id="a", queue="y"), *again):
        async with household() as house:
            await house.yes(Create(id="a", queue="x"))
            await house.yes(Cancel(id="a"))
            house.disk.write_errors.append(DiskFull("once"))
            deleted, made = fill(house, [Delete(id="a"), command])
            assert isinstance(await deleted, Response)
            assert isinstance(await made, ApiError)
            compare(house)
            await asyncio.sleep(1)
            await house.yes(Create(queue="x"))
            assert house.disk.queues["x"] == QueueRow()


@in_virtual_time
async def test_waiting_claims_keep_their_place_over_a_refused_batch() -> None:
    async with household() as house:
        first, second = await parked(house, "first"), await parked(house, "second")
        house.disk.write_errors.append(DiskFull("once"))
        await house.no(Create(id="a"))
        assert len(house.actor.parked) == 2
        await asyncio.sleep(1)
        await house.yes(Create(id="b"))
        assert ids_of(await first) == ["b"]
        await house.yes(Create(id="c"))
        assert ids_of(await second) == ["c"]


@in_virtual_time
async def test_a_claim_that_was_parked_by_a_refused_batch_is_parked_once() -> None:
    house = VirtualEngine()
    house.disk.write_errors.append(DiskFull("once"))
    claim = Claim(worker="w", wait_ms=30_000)
    tasks = [begin(house.actor.ask(claim, key=key("k"))) for _ in range(2)]
    tasks += fill(house, [Tick()])
    async with house:
        assert isinstance(await tasks[2], Response)
        assert len(house.actor.parked) == 1
        await asyncio.sleep(1)
        await house.yes(Create(id="a"))
        assert [ids_of(await task) for task in tasks[:2]] == [["a"], ["a"]]
        await settle()
        assert house.book.totals["processing"] == 1
        compare(house)


@in_virtual_time
async def test_a_claim_that_a_refused_batch_both_parked_and_served_is_decided_anew() -> None:
    async with household() as house:
        await house.yes(Create(id="a", delay_ms=DAY_MS))
        house.disk.gate.clear()
        slow = begin(house.actor.ask(Tick()))
        await house.disk.at_gate.wait()
        house.disk.write_errors += [None, DiskFull("once")]
        tasks = fill(house, [Claim(worker="w", wait_ms=30_000), RunNow(id="a")])
        await settle()
        house.disk.gate.set()
        assert ids_of(await tasks[0]) == ["a"]
        assert isinstance(await tasks[1], Response)
        await slow
        assert closed(house) == "CREATES"
        assert [event.type for event in house.disk.events] == ["created", "updated", "granted"]


@in_virtual_time
async def test_a_due_job_goes_to_who_waits_after_its_batch_was_refused_once() -> None:
    """The claim was served in a batch that the disk refused: it must not wait on beside a job that is due."""
    async with household() as house:
        await house.yes(Create(id="a", delay_ms=2_000))
        waiting = await parked(house, "w")
        house.disk.write_errors.append(DiskFull("once"))
        begun = house.now
        assert ids_of(await waiting) == ["a"]
        assert house.now == begun + 2_000


@in_virtual_time
async def test_jobs_that_became_due_on_a_full_disk_are_handed_out_once_there_is_room() -> None:
    async with household() as house:
        await house.yes(Create(id="a", delay_ms=2_000))
        waiting = await parked(house, "w")
        house.disk.fill()
        house.disk.has_spare = False
        await house.no(Tick())
        assert closed(house) == "ALL_BUT_ENDINGS"
        await asyncio.sleep(5)
        assert not waiting.done()
        house.disk.free()
        await asyncio.sleep(1.1)
        assert waiting.done()
        assert ids_of(await waiting) == ["a"]


@in_virtual_time
async def test_a_release_that_is_undelivered_on_a_full_disk_is_not_lost() -> None:
    """Giving a grant back frees nothing, but ends a grant: it is taken with the ballast given up."""
    async with household() as house:
        await house.yes(Create(id="a"))
        answer = await house.actor.ask(Start(id="a", worker="w"))
        assert isinstance(answer, Response)
        house.disk.fill()
        house.actor.undelivered(answer)
        await settle()
        assert house.book.totals["queued"] == 1


@in_virtual_time
async def test_what_a_start_owes_on_a_full_disk_comes_before_all_else_once_there_is_room() -> None:
    """A backup was put back: until its grants are ended nobody is taken for their holder."""
    async with household() as house:
        lock_id = await house.held("a")
        house.disk.fits = lambda batch: False
        house.actor.owe(EndGrants(ids=["a"], last=True))
        await settle()
        assert closed(house) == "ALL_WRITES"
        assert (await house.no(Complete(id="a", lock_id=lock_id))).code == "storage_full"
        assert house.clock.held
        house.disk.free()
        ending = begin(house.actor.ask(Complete(id="a", lock_id=lock_id)))
        assert (await ending).code == "storage_full"
        await asyncio.sleep(1.1)
        assert house.book.totals["queued"] == 1
        late = await house.no(Complete(id="a", lock_id=lock_id))
        assert (late.code, late.details["rule"]) == ("lock_lost", "restore")


@in_virtual_time
async def test_the_grace_after_a_start_is_owed_on_a_full_disk() -> None:
    async with household() as house:
        await house.held("a")
        house.disk.fits = lambda batch: False
        house.actor.owe(ExtendAfterPause(ids=["a"], grace_ms=30 * MINUTE_MS))
        await asyncio.sleep(20)  # lease time stands still meanwhile
        house.disk.free()
        await asyncio.sleep(1.1)
        lease = house.book.jobs["a"].lease
        assert lease is not None
        assert lease.expires >= house.clock.moment().lease + 30 * MINUTE_MS - 2_000


@in_virtual_time
async def test_a_grant_that_nobody_got_is_given_back_once_there_is_room() -> None:
    async with household() as house:
        await house.yes(Create(id="a"))
        answer = await house.actor.ask(Start(id="a", worker="w"))
        assert isinstance(answer, Response)
        house.disk.fits = lambda batch: False
        house.actor.undelivered(answer)
        await settle()
        assert house.book.totals["processing"] == 1
        house.disk.free()
        await asyncio.sleep(1.1)
        assert house.book.totals["queued"] == 1


@in_virtual_time
async def test_a_store_too_small_for_its_ballast_opens_again_without() -> None:
    async with household() as house:
        house.disk.errors["build_reserve"] = DiskFull("too small")
        house.disk.has_ballast = False
        house.disk.fits = lambda batch: False
        await house.no(Tick())
        assert closed(house) == "ALL_BUT_ENDINGS"
        house.disk.free()
        await asyncio.sleep(1.1)
        assert closed(house) == "NOTHING"
        assert not house.clock.held


@in_virtual_time
async def test_keys_do_not_grow_old_by_a_clock_that_nobody_believes() -> None:
    async with household() as house:
        first = await house.actor.ask(Create(), key=key("k"))
        house.step_ms = 40 * DAY_MS
        again = await house.actor.ask(Create(), key=key("k"))
        assert isinstance(first, Response)
        assert isinstance(again, Response)
        assert again.replayed
        house.clock.accept()
        anew = await house.actor.ask(Create(), key=key("k"))
        assert isinstance(anew, Response)
        assert not anew.replayed


@in_virtual_time
async def test_a_commit_of_others_that_failed_ends_everything() -> None:
    house = VirtualEngine()
    running = begin(house.actor.run())
    await house.yes(Create(id="a"))
    house.actor.lose_disk(OSError("EIO"))
    await broken(house, running)


class Raising:
    """A waiter that breaks its word."""

    def __init__(self) -> None:
        self._is_over = False

    def done(self) -> bool:
        return self._is_over

    def cancelled(self) -> bool:
        return False

    def set_result(self, _: Response | ApiError) -> None:
        self._is_over = True
        raise ValueError("canary")


class Ready:
    """A waiter that makes its answer ready. `heard` is what it was given, in order."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []

    def done(self) -> bool:
        return any(what == "told" for what, _ in self.heard)

    def cancelled(self) -> bool:
        return False

    def prepare(self, answer: Response) -> None:
        self.heard.append(("ready", answer))

    def set_result(self, answer: Response | ApiError, /) -> None:
        self.heard.append(("told", answer))


class AtHand(MemoryStorage):
    """Has the payloads of the jobs that it names at hand."""

    def __init__(self, *job_seqs: int) -> None:
        super().__init__()
        self._job_seqs = job_seqs

    def cached_payloads(self, job_seqs: list[int]) -> dict[int, bytes]:
        return {seq: b"1" for seq in job_seqs if seq in self._job_seqs}


@in_virtual_time
async def test_answers_are_made_ready_while_the_disk_is_at_work() -> None:
    """Where all that they show is known: what has to be read comes with the commit."""
    disk = AtHand(1)
    async with household(disk) as house:
        await house.yes(Create(id="a", payload=Raw(b"1")))
        await house.yes(Create(id="b", payload=Raw(b"2")))
        for job_id, ready in (("a", True), ("b", False)):
            waiter = Ready()
            disk.gate.clear()
            assert isinstance(house.actor.send(Start(id=job_id, worker="w"), waiter), Envelope)
            await disk.at_gate.wait()
            await settle()
            assert [what for what, _ in waiter.heard] == ["ready"] * ready
            disk.gate.set()
            await settle()
            *before, (what, told) = waiter.heard
            assert what == "told"
            assert bytes(told.data.job.payload) == (b"1" if ready else b"2")
            assert all(answer is told for _, answer in before)


@in_virtual_time
async def test_an_answer_whose_commit_has_failed_is_never_told() -> None:
    disk = MemoryStorage()
    async with household(disk) as house:
        waiter = Ready()
        disk.write_errors.append(DiskFull("full"))
        assert isinstance(house.actor.send(Create(id="a"), waiter), Envelope)
        await settle()
        (_, ready), (_, told) = waiter.heard
        assert isinstance(ready, Response)
        assert isinstance(told, ApiError)
        assert told.code == "storage_full"


@in_virtual_time
async def test_what_writes_nothing_and_what_looks_at_history_are_not_made_ready() -> None:
    async with household(MemoryStorage()) as house:
        await house.yes(Create(id="a"))
        for look in (Get(id="a"), Timeline(id="a")):
            waiter = Ready()
            house.actor.send(look, waiter)
            await settle()
            assert [what for what, _ in waiter.heard] == ["told"]
        waiter = Ready()
        house.actor.send(Create(id="b"), Ready())
        house.actor.send(Timeline(id="a"), waiter)
        await settle()
        assert [what for what, _ in waiter.heard] == ["told"]


@pytest.mark.parametrize("others", [0, 1])
def test_a_bug_while_answers_leave_ends_everything(others: int) -> None:
    """Also where they leave while the next batch is being written: those behind it would wait for ever."""

    @in_virtual_time
    async def run() -> None:
        house = VirtualEngine()
        running = begin(house.actor.run())
        house.disk.gate.clear()
        house.actor.send(Create(id="a"), Raising())
        await house.disk.at_gate.wait()
        asked = fill(house, [Create(id="b")] * others)
        await settle()
        house.disk.gate.set()
        with pytest.raises(DiskBroken, match="canary"):
            await running
        await asyncio.gather(*asked)  # nobody waits for ever

    run()


# -- a slow disk ------------------------------------------------------------------------------------------------------

COMMIT_S = 0.02


class SlowDisk(MemoryStorage):
    """Every commit takes 20 ms, and pages of jobs are read by the same thread. `written`: how many changes each had."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = asyncio.Lock()

    async def write(self, batch: Batch) -> dict[int, bytes]:
        async with self._thread:
            await asyncio.sleep(COMMIT_S)
            return await super().write(batch)

    async def find(self, query: JobQuery) -> JobRows:
        async with self._thread:
            return await super().find(query)

    @property
    def written(self) -> list[int]:
        return [len(batch.changes) for batch in self.batches]


@pytest.mark.parametrize(("waiting", "written"), [(1, [3, 4]), (2, [3, 2, 3])])
def test_few_who_wait_get_no_commit_of_their_own(waiting: int, written: list[int]) -> None:
    """Those who have been answered come back at once: with them the commit is worth more."""

    @in_virtual_time
    async def creating() -> None:
        disk = SlowDisk()
        async with household(disk) as house:

            async def create(times: int) -> None:
                for _ in range(times):
                    await house.yes(Create())

            first = [begin(create(2)) for _ in range(3)]
            await asyncio.sleep(COMMIT_S / 2)
            await asyncio.gather(*first, *(begin(create(1)) for _ in range(waiting)))
            assert disk.written == written

    creating()


class Beside:
    """A commit is under way; behind it job "a" is to be cancelled, and what is asked comes behind that."""

    def __init__(self, house: VirtualEngine) -> None:
        self.house = house
        self.began_s = 0.0
        self.behind: asyncio.Task[Any]

    async def begin(self) -> None:
        await self.house.actor.ask(Create(id="a"))
        self.began_s = asyncio.get_running_loop().time()
        begin(self.house.actor.ask(Create(id="b")))
        await settle()
        self.behind = begin(self.house.actor.ask(Cancel(id="a")))
        await settle()

    async def ask(self, command: AnyCommand) -> tuple[Any, int]:
        """The answer, and how many commits it took."""
        answer = await self.house.actor.ask(command)
        return answer, round((asyncio.get_running_loop().time() - self.began_s) / COMMIT_S)


@pytest.mark.parametrize("look", [Get(id="a"), GetVersion(id="a"), ListJobs(), Stats(), Why(id="a"), Get(id="none")])
def test_on_a_slow_disk_a_look_waits_for_one_commit(look: AnyCommand) -> None:
    @in_virtual_time
    async def looking() -> None:
        async with household(SlowDisk()) as house:
            beside = Beside(house)
            await beside.begin()
            answer, commits = await beside.ask(look)
            assert commits == 1
            assert not beside.behind.done()
            if look == Get(id="a"):
                assert answer.data.status == "queued"
            if isinstance(look, Why):
                assert answer.data.state == "queued"
            assert (await beside.behind).data.status == "cancelled"

    looking()


@in_virtual_time
async def test_on_a_slow_disk_a_round_trip_is_one_of_a_whole_command() -> None:
    async with household(SlowDisk()) as house:
        beside = Beside(house)
        await beside.begin()
        assert (await beside.ask(Ping()))[1] == 2, "health wants to know how long a command takes"


@in_virtual_time
async def test_on_a_quick_disk_a_batch_is_decided_in_its_order() -> None:
    async with household() as house:
        await house.actor.ask(Create(id="a"))
        cancelling = begin(house.actor.ask(Cancel(id="a")))
        looking = begin(house.actor.ask(Get(id="a")))
        assert (await looking).data.status == "cancelled"
        await cancelling


@in_virtual_time
async def test_a_look_in_line_stays_behind_what_was_sent_before_it() -> None:
    async with household(SlowDisk()) as house:
        await house.actor.ask(Create(id="a"))
        told: list[asyncio.Future[Any]] = [asyncio.get_running_loop().create_future() for _ in range(2)]
        house.actor.send(Cancel(id="a"), told[0], in_line=True)
        house.actor.send(Get(id="a"), told[1], in_line=True)
        assert (await told[1]).data.status == "cancelled"


@in_virtual_time
async def test_a_look_does_not_pass_what_the_daemon_owes() -> None:
    async with household(SlowDisk()) as house:
        await house.actor.ask(Create(id="a", stuck_after_ms=0))
        await house.actor.ask(Start(id="a", worker="w", lock_ttl_ms=1_000))
        await asyncio.sleep(10)
        house.actor.owe(ExtendAfterPause(ids=["a"], grace_ms=30_000))
        stats = await house.actor.ask(Stats())
        assert isinstance(stats, Response)
        assert stats.data.stuck_jobs == 0


@in_virtual_time
async def test_a_look_does_not_wait_for_the_grants_of_claims_that_wait() -> None:
    async with household(SlowDisk()) as house:
        await house.actor.ask(Create(id="late", queue="q", delay_ms=1_000))
        claim = await parked(house, "w", queues=["q"])
        await asyncio.sleep(0.95)
        beside = Beside(house)
        await beside.begin()  # while it is being written the job becomes due
        answer, commits = await beside.ask(Get(id="late"))
        assert (answer.data.status, commits) == ("queued", 1)
        assert ids_of(await claim) == ["late"]


@in_virtual_time
async def test_who_looked_has_the_answer_though_the_commit_behind_it_fails() -> None:
    disk = SlowDisk()
    house = VirtualEngine(disk)
    running = asyncio.create_task(house.actor.run())
    await house.actor.ask(Create(id="a"))
    disk.write_errors.append(OSError("gone"))
    cancelling = begin(house.actor.ask(Cancel(id="a")))
    looking = begin(house.actor.ask(Get(id="a")))
    assert (await looking).data.status == "queued"
    assert (await cancelling).code == "outcome_unknown"
    with pytest.raises(DiskBroken):
        await running


@in_virtual_time
async def test_a_full_disk_behind_a_look_is_met_as_ever() -> None:
    async with household(SlowDisk()) as house:
        await house.actor.ask(Create(id="a"))
        house.disk.fill_nearly()
        creating = begin(house.actor.ask(Create(id="b")))
        looking = begin(house.actor.ask(Get(id="a")))
        assert (await looking).data.status == "queued"
        assert (await creating).code == "storage_full"
        house.disk.free()


# -- rows that are bad ------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_bad_payload_costs_its_own_job_only() -> None:
    async with household() as house:
        await house.yes(Create(id="a"))
        await house.yes(Create(id="b"))
        house.disk.bad_payloads[1] = "checksum"
        tasks = fill(house, [Get(id="a"), Get(id="b"), Create(id="c")])
        bad, good, made = [await task for task in tasks]
        assert (bad.code, bad.details) == ("job_quarantined", {"job_id": "a", "reason": "checksum"})
        assert isinstance(good, Response)
        assert made.status == 201
        assert house.disk.quarantined == house.book.quarantined == {"a": "checksum"}
        assert ids_of(await house.actor.ask(Claim(worker="w", limit=9))) == ["b", "c"]


@in_virtual_time
async def test_a_bad_payload_is_never_served_by_a_read() -> None:
    async with household() as house:
        await house.yes(Create(id="a"))
        house.disk.bad_payloads[1] = "checksum"
        assert (await house.no(Get(id="a"))).code == "job_quarantined"
        assert ids_of(await house.actor.ask(Claim(worker="w"))) == []


@in_virtual_time
async def test_a_bad_payload_that_a_grant_would_show() -> None:
    async with household() as house:
        await house.yes(Create(id="a"))
        await house.yes(Create(id="b"))
        house.disk.bad_payloads[1] = "checksum"
        assert ids_of(await house.actor.ask(Claim(worker="w"))) == ["b"]


@in_virtual_time
async def test_a_bad_payload_that_a_decision_needs() -> None:
    async with household() as house:
        await house.yes(Create(id="a"))
        house.disk.bad_payloads[1] = "checksum"
        assert (await house.no(Create(id="a"))).code == "job_quarantined"


@in_virtual_time
async def test_a_row_that_goes_bad_while_the_daemon_runs() -> None:
    async with VirtualEngine(await finished_disk()) as house:
        house.disk.bad_jobs["done"] = "checksum"
        assert (await house.no(Get(id="done"))).code == "job_quarantined"
        assert (await house.no(Get(id="done"))).code == "job_quarantined"
        assert house.disk.quarantined == house.book.quarantined == {"done": "checksum"}
        # A row that could not be moved is met again, and told again; it is counted and said once.
        with capture_logs() as lines:
            house.disk.on_quarantined(Quarantined("done", "checksum, still", is_moved=False))
        assert lines == []
        assert house.book.quarantined == {"done": "checksum, still"}
        assert house.book.totals["completed"] == 0


@in_virtual_time
async def test_a_page_leaves_bad_rows_out() -> None:
    async with household() as house:
        for name in "abc":
            await house.yes(Create(id=name))
        house.disk.bad_payloads[2] = "checksum"
        assert [job.id for job in (await house.yes(ListJobs())).jobs] == ["c", "a"]
        assert house.book.quarantined == {"b": "checksum"}
        assert (await house.no(Start(id="b", worker="w"))).code == "job_quarantined"


@in_virtual_time
async def test_a_job_that_is_deleted_or_set_aside_is_no_suspect_any_more() -> None:
    async with household() as house:
        for name in "ab":
            await house.yes(Import(id=name, status="failed", error_message="e"))
        assert set(house.book.suspects.values()) == {"a", "b"}
        await house.yes(Delete(id="a"))
        assert house.book.suspects == house.disk.suspects == {2: "b"}
        await house.yes(RepairJobs(ids=["b"]))
        assert house.book.suspects == house.disk.suspects == {}


# -- an unknown outcome -----------------------------------------------------------------------------------------------


async def broken(house: VirtualEngine, running: asyncio.Task[None]) -> None:
    with pytest.raises(DiskBroken):
        await running
    refusal = await house.actor.ask(Ping())
    assert isinstance(refusal, ApiError)
    assert refusal.code == "shutting_down"


@in_virtual_time
async def test_an_unknown_outcome_is_told_and_ends_everything() -> None:
    house = VirtualEngine()
    running = begin(house.actor.run())
    waiting = await parked(house, "w", queues=["other"])
    house.disk.lost_answers = 1
    house.disk.gate.clear()
    tasks = fill(house, [Create(id="a"), Get(id="a")])
    await house.disk.at_gate.wait()
    later = begin(house.actor.ask(Create(id="b")))
    await settle()
    house.disk.gate.set()
    for task in [*tasks, waiting]:
        refusal = await task
        assert (refusal.code, refusal.status, refusal.details) == ("outcome_unknown", 503, {"outcome": "unknown"})
    assert (await later).code == "shutting_down"
    await broken(house, running)
    assert house.disk.job("a") is not None  # it was done after all; a start finds it
    assert house.disk.job("b") is None


@pytest.mark.parametrize("method", ["write", "load"])
def test_any_error_of_the_disk_ends_everything(method: str) -> None:
    async def test() -> None:
        house = VirtualEngine(await finished_disk())
        running = begin(house.actor.run())
        house.disk.errors[method] = OSError("EIO")
        tasks = fill(house, [Get(id="done"), Create(id="a")])
        assert {(await task).code for task in tasks} == {"outcome_unknown"}
        await broken(house, running)

    in_virtual_time(test)()


@in_virtual_time
async def test_bad_rows_of_jobs_that_nobody_knows_end_everything() -> None:
    """Nothing could be set aside, so deciding again would come to the same, for ever."""
    house = VirtualEngine()
    running = begin(house.actor.run())
    house.disk.write_errors.append(BadRows({"seq 7": "the payload is missing"}))
    assert (await house.no(Create())).code == "outcome_unknown"
    await broken(house, running)


@in_virtual_time
async def test_bad_rows_that_were_set_aside_already_are_no_harm() -> None:
    async with household() as house:
        await house.yes(Create(id="a"))
        house.disk.bad_jobs["a"] = "checksum"
        house.disk.write_errors.append(BadRows({"a": "the payload is damaged"}))
        # Taking the batch back reads the row, finds it bad and sets it aside.
        assert (await house.no(Start(id="a", worker="w"))).code == "job_quarantined"


@in_virtual_time
async def test_a_row_that_a_page_of_jobs_sets_aside_meanwhile_costs_its_own_command() -> None:
    """Simulation, seed 5000: the batch was decided, then a look at history met the damaged row, then it was written."""
    async with household() as house:
        await house.yes(Create(id="a"))
        await house.yes(Create(id="b"))
        lock_id = (await house.yes(Start(id="a", worker="w"))).lock_id
        house.disk.bad_jobs["a"] = "checksum"
        house.disk.gate.clear()
        late = begin(house.actor.ask(Progress(id="a", lock_id=lock_id, progress=5)))
        await house.disk.at_gate.wait()
        assert [job.id for job, _ in (await house.disk.find(JobQuery())).jobs] == ["b"]
        other = begin(house.actor.ask(Start(id="b", worker="w")))
        house.disk.gate.set()
        assert (await late).code == "job_quarantined"
        assert isinstance(await other, Response)
        assert house.book.totals == {"queued": 0, "processing": 1, "completed": 0, "failed": 0, "cancelled": 0}


class Meanwhile(MemoryStorage):
    """Just before a payload is read, or a job deleted, somebody else meets the damaged row of `job_id`."""

    job_id = "bad"

    async def load(self, ids: list[str], payloads: list[int], digests: list[str]) -> LoadedRows:
        await self._meet(payloads)
        return await super().load(ids, payloads, digests)

    async def write(self, batch: Batch) -> dict[int, bytes]:
        await self._meet([*batch.payloads, *(change.event.job_seq for change in batch.changes if change.after is None)])
        return await super().write(batch)

    async def _meet(self, seqs: list[int]) -> None:
        for seq in seqs:
            if seq in self.jobs and self.jobs[seq].id == self.job_id:
                await self.quarantine(self.jobs[seq], "damaged")


@pytest.mark.parametrize("beside", ["nothing", "a change"])
def test_a_damaged_row_that_is_set_aside_while_its_job_is_shown_costs_its_own_command(beside: str) -> None:
    @in_virtual_time
    async def test() -> None:
        async with household(Meanwhile()) as house:
            await house.yes(Create(id="bad"))
            house.disk.gate.clear()
            slow = begin(house.actor.ask(Tick()))
            await house.disk.at_gate.wait()
            tasks = fill(house, [Get(id="bad"), Create(id="other") if beside == "a change" else Ping()])
            house.disk.gate.set()
            await slow
            refused, other = [await task for task in tasks]
            assert refused.code == "job_quarantined"
            assert isinstance(other, Response)
            assert house.book.totals["queued"] == (beside == "a change")

    test()


@in_virtual_time
async def test_a_finished_job_that_is_set_aside_is_not_counted_any_more() -> None:
    """Nor once more where it was being deleted. What is written next is the right count."""
    disk = Meanwhile()
    disk.job_id = "none yet"
    for name in ("bad", "good", "worse"):
        async with VirtualEngine(disk) as house:
            await house.yes(Create(id=name))
            await house.yes(Cancel(id=name))
    async with VirtualEngine(disk) as house:
        disk.job_id, disk.bad_jobs["worse"] = "bad", "checksum"
        assert (await house.no(Get(id="worse"))).code == "job_quarantined"
        assert house.book.totals["cancelled"] == 2
        assert (await house.no(Delete(id="bad"))).code == "job_quarantined"
        assert house.book.totals["cancelled"] == 1
        await house.yes(Create(id="new"))
        await house.yes(Cancel(id="new"))
        assert disk.queues["default"].cancelled == house.book.totals["cancelled"] == 2


def counted_as_on_the_disk(house: VirtualEngine) -> None:
    """The counts of finished jobs: in memory, as they are kept, and of the rows themselves."""
    disk = house.disk
    for status in ("completed", "failed", "cancelled"):
        rows = sum(job.status == status for job in disk.jobs.values())
        kept = sum(getattr(row, status) for row in disk.queues.values())
        assert house.book.totals[status] == kept == rows, status


@in_virtual_time
async def test_a_finished_job_whose_damaged_row_stays_where_it_is_is_uncounted_once_when_it_is_moved() -> None:
    async with household() as house:
        for name in ("bad", "good"):
            await house.yes(Create(id=name))
            await house.yes(Cancel(id=name))
        house.disk.bad_payloads[1] = "checksum"
        house.disk.can_move = lambda job: False
        for _ in range(2):
            assert [job.id for job in (await house.yes(ListJobs())).jobs] == ["good"]
            assert (await house.no(Get(id="bad"))).code == "job_quarantined"
            counted_as_on_the_disk(house)
        await house.yes(Create(id="more"))
        await house.yes(Cancel(id="more"))
        counted_as_on_the_disk(house)
        house.disk.can_move = lambda job: True
        await house.yes(ListJobs())
        assert house.disk.quarantined == {"bad": "checksum"}
        assert house.book.totals["cancelled"] == 2
        counted_as_on_the_disk(house)
        await house.yes(Delete(id="more"))
        counted_as_on_the_disk(house)


@pytest.mark.parametrize("damage", ["row", "payload"])
@pytest.mark.parametrize("end", ["written", "taken back", "moved and taken back"])
@pytest.mark.parametrize("what", ["complete", "delete", "reset", "adopt"])
def test_a_damaged_row_that_stays_is_counted_as_on_the_disk_whatever_becomes_of_a_batch(
    what: str, end: str, damage: str
) -> None:
    """A look at history meets it when a batch about its job has been decided, and there is no room to move it."""

    @in_virtual_time
    async def test() -> None:
        async with household() as house:
            disk = house.disk
            await house.yes(Create(id="a"))
            lock_id = (await house.yes(Start(id="a", worker="w"))).lock_id
            commands: dict[str, AnyCommand] = {
                "complete": Complete(id="a", lock_id=lock_id, file_path="/x"),
                "delete": Delete(id="a"),
                "reset": ForceReset(id="a"),
                "adopt": Adopt(id="a"),
            }
            if what != "complete":
                await house.yes(Cancel(id="a"))
                await house.no(commands["complete"])  # kept as a late result
            disk.gate.clear()
            asked = begin(house.actor.ask(commands[what], admin=True))
            await disk.at_gate.wait()
            if damage == "row":
                disk.bad_jobs["a"] = "checksum"
            else:
                disk.bad_payloads[1] = "checksum"
            disk.can_move = lambda job: False
            assert (await disk.find(JobQuery())).jobs == []
            assert list(house.book.quarantined) == ["a"]
            if end != "written":
                disk.fits = lambda batch: False
            if end == "moved and taken back":
                disk.can_move = lambda job: True
            disk.gate.set()
            await asked
            counted_as_on_the_disk(house)
            disk.free()
            await seconds(3)
            disk.can_move = lambda job: True
            await disk.find(JobQuery())
            await house.yes(Create(id="b"))
            await house.yes(Cancel(id="b"))
            counted_as_on_the_disk(house)
            assert house.book.totals["queued"] == house.book.totals["processing"] == 0

    test()


class Counting(MemoryStorage):
    """Counts of how many jobs late results are asked for at once."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    async def late(self, asked: list[LateResultQuery]) -> LateResultRows:
        self.asked.append(len(asked))
        return await super().late(asked)


@in_virtual_time
async def test_late_completes_weigh_what_their_look_into_the_journal_costs() -> None:
    """A thousand of them would hold one batch, and all who wait behind it, for 165 ms."""
    disk = Counting()
    async with household(disk) as house:
        locks: dict[str, str] = {}
        for number in range(100):
            name = f"job-{number}"
            await house.yes(Create(id=name))
            locks[name] = (await house.yes(Start(id=name, worker="w"))).lock_id
            await house.yes(ForceReset(id=name))
            await house.yes(Start(id=name, worker="w"))
        tasks = fill(house, [Complete(id=name, lock_id=lock_id, file_path="/f") for name, lock_id in locks.items()])
        answers = [await task for task in tasks]
        assert all(answer.code == "lock_lost" and "late_result" in answer.details for answer in answers)
        assert disk.asked == [20] * 5


@in_virtual_time
async def test_a_payload_that_is_gone_without_a_reason_ends_everything() -> None:
    house = VirtualEngine()
    running = begin(house.actor.run())
    await house.yes(Create(id="a"))
    house.disk.payloads.clear()
    assert (await house.no(Get(id="a"))).code == "outcome_unknown"
    await broken(house, running)


@in_virtual_time
async def test_a_probe_that_fails_otherwise_ends_everything() -> None:
    house = VirtualEngine()
    running = begin(house.actor.run())
    house.disk.fits = lambda batch: False
    assert (await house.no(Create())).code == "storage_full"
    house.disk.errors["probe"] = OSError("EIO")
    await broken(house, running)


@in_virtual_time
async def test_a_ballast_that_cannot_be_dropped_ends_everything() -> None:
    house = VirtualEngine()
    running = begin(house.actor.run())
    house.disk.errors["drop_reserve"] = OSError("EIO")
    house.disk.fits = lambda batch: False
    assert (await house.no(Tick())).code == "outcome_unknown"
    await broken(house, running)


# -- small parts ------------------------------------------------------------------------------------------------------


def test_bad_rows_name_their_jobs() -> None:
    assert BadRows({"a": "checksum"}).jobs == {"a": "checksum"}


def test_a_claim_is_found_by_who_waited_longest() -> None:
    async def test() -> None:
        lot = Parked(WorkerPresence())
        loop = asyncio.get_running_loop()

        def claim(deadline: float, **fields: Any) -> Envelope:
            asked = Envelope(Call(Claim(worker="w", **fields)), None, 0, loop.create_future())
            asked.deadline = deadline
            return asked

        first, second, third = claim(5, kinds=["k"]), claim(3), claim(4, kinds=["k", "l"])
        for asked in (first, second, third):
            lot.add(asked)
        assert (lot.first("default", "k"), lot.first("default", "l")) == (first, second)
        assert lot.first("other", "k") is None
        assert lot.next_deadline() == 3
        assert lot.remove(first)
        assert not lot.remove(first)
        assert lot.first("default", "k") is second
        lot.add(first)  # its batch was refused: it has its old place again
        assert lot.first("default", "k") is first
        assert list(lot.take_late(4)) == [second, third]
        assert (len(lot), lot.next_deadline()) == (1, 5)
        assert lot.take_all() == [first]
        assert lot.next_deadline() is None

    in_virtual_time(test)()


# -- late results -----------------------------------------------------------------------------------------------------


async def lost(house: VirtualEngine, job_id: str = "a", **fields: Any) -> str:
    """A failed job that was taken from its worker: the lock that is lost."""
    lock_id = await house.held(job_id, **fields)
    await house.yes(ForceFail(id=job_id), admin=True)
    return lock_id


def done(lock_id: str, job_id: str = "a", **fields: Any) -> Complete:
    return Complete(id=job_id, lock_id=lock_id, **({"file_path": "/out"} | fields))


def kept_by(house: VirtualEngine, job_id: str = "a") -> list[str | None]:
    """Where the late results of a job on the disk say that the work is."""
    job = house.disk.job(job_id)
    assert job is not None
    return [late.result.file_path for late in house.disk.lates.get(job.seq, ())]


@in_virtual_time
async def test_a_late_result_is_on_the_disk_before_it_is_refused() -> None:
    async with household() as house:
        lock_id = await lost(house)
        house.disk.gate.clear()
        asking = begin(house.actor.ask(done(lock_id)))
        await house.disk.at_gate.wait()
        await settle()
        assert not asking.done()
        house.disk.gate.set()
        refusal = await asking
        assert refusal.code == "lock_lost"
        assert kept_by(house) == ["/out"]


@in_virtual_time
async def test_a_late_result_that_could_not_be_written_is_not_remembered() -> None:
    async with household() as house:
        lock_id = await lost(house)
        version = (await house.yes(GetVersion(id="a"))).version
        house.disk.write_errors.append(DiskFull("full"))
        await house.no(done(lock_id))
        assert kept_by(house) == []
        assert (await house.yes(GetVersion(id="a"))).version == version
        house.disk.free()


@in_virtual_time
async def test_late_results_outlive_the_daemon_and_are_read_when_asked_for() -> None:
    disk = MemoryStorage()
    async with household(disk) as house:
        lock_id = await lost(house, payload=Raw(b"[9]"))
        await house.no(done(lock_id, metadata=Raw(b'{"n": 1}')))
    async with household(disk) as house:
        assert house.book.get("a") is None
        (late,) = (await house.yes(LateResults(id="a"), admin=True)).late_results
        assert (late.worker, late.file_path, bytes(late.metadata)) == ("w-1", "/out", b'{"n": 1}')
        assert "jobctl adopt a" in (await house.yes(Why(id="a"))).do[0]
        assert (await house.yes(Why(id="a"))).because == "It was failed by a client."
        again = await house.no(done(lock_id, metadata=Raw(b'{"n": 1}')))
        assert again.details["late_result"] == late.seq
        assert (await house.no(Adopt(id="a", result=late.seq + 1))).code == "late_result_not_found"
        adopted = await house.yes(Adopt(id="a", result=late.seq), admin=True, key=key("k"))
        assert (adopted.status, adopted.file_path, adopted.payload) == ("completed", "/out", Raw(b"[9]"))
        repeated = await house.actor.ask(Adopt(id="a", result=late.seq), admin=True, key=key("k"))
        assert isinstance(repeated, Response)
        assert repeated.replayed
    async with household(disk) as house:
        assert (await house.yes(Get(id="a"))).file_path == "/out"
        assert (await house.yes(Delete(id="a"), admin=True)).status == "completed"
        assert disk.lates == {}


@in_virtual_time
async def test_whether_a_late_result_can_be_adopted_is_judged_by_the_policy_of_now() -> None:
    async with household() as house:
        lock_id = await lost(house)
        await house.no(done(lock_id))

        async def refusal_now() -> Any:
            (late,) = (await house.yes(LateResults(id="a"), admin=True)).late_results
            return late.refusal

        assert await refusal_now() is None
        house.actor.policy = Policy(require_download_url=True)
        refusal = await house.no(Adopt(id="a"), admin=True)
        assert await refusal_now() == ErrorView(refusal.code, refusal.message)
        assert "cannot be adopted" in (await house.yes(Why(id="a"))).do[0]
        house.actor.policy = Policy()
        assert await refusal_now() is None
        written = len(house.disk.batches)
        rehearsed = await house.yes(Adopt(id="a", dry_run=True), admin=True, key=key("k"))
        assert (rehearsed.status, rehearsed.file_path) == ("completed", "/out")
        assert (len(house.disk.batches), house.disk.keys) == (written, {})
        assert (await house.yes(Get(id="a"))).status == "failed"


@in_virtual_time
async def test_why_sees_the_address_of_a_late_result_that_only_the_disk_has() -> None:
    disk = MemoryStorage()
    async with household(disk) as house:
        await house.no(done(await lost(house), download_url="u"))
    async with household(disk, policy=Policy(require_download_url=True)) as house:
        assert (await house.yes(Why(id="a"))).do[0].endswith("To take it: jobctl adopt a")


@in_virtual_time
async def test_a_loop_of_late_completes_adds_nothing() -> None:
    async with household() as house:
        lock_id = await lost(house)
        for _ in range(3):
            tasks = fill(house, [done(lock_id, metadata=Raw(b"%d" % number)) for number in range(40)])
            answers = [await task for task in tasks]
            assert {answer.code for answer in answers} == {"lock_lost"}
        assert [event.type for event in house.disk.events].count("late_result") == 1
        assert kept_by(house) == ["/out"]
        written = len(house.disk.batches)
        await house.no(done(lock_id))
        await house.no(done("never-one"))
        assert len(house.disk.batches) == written


@in_virtual_time
async def test_a_lock_that_is_lost_in_the_same_batch_has_its_late_result() -> None:
    async with household() as house:
        lock_id = await house.held()
        tasks = fill(house, [ForceReset(id="a"), done(lock_id), done(lock_id), Adopt(id="a")])
        reset, first, second, adopted = [await task for task in tasks]
        assert isinstance(reset, Response)
        assert first.details["late_result"] == second.details["late_result"]
        assert isinstance(adopted, Response)
        assert adopted.data.status == "completed"
        assert [event.type for event in house.disk.events][-3:] == ["force_reset", "late_result", "adopted"]


@in_virtual_time
async def test_a_grant_of_long_ago_is_told_by_the_journal() -> None:
    async with household() as house:
        old = await house.held()
        await house.yes(ForceReset(id="a"), admin=True)
        await house.yes(Start(id="a", worker="w-2"))
        await house.yes(ForceReset(id="a"), admin=True)
        assert "late_result" in (await house.no(done(old))).details
        assert kept_by(house) == ["/out"]


class Looked(MemoryStorage):
    """Remembers what was asked of late results."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[LateResultQuery] = []

    async def late(self, asked: list[LateResultQuery]) -> LateResultRows:
        self.asked += asked
        return await super().late(asked)


@in_virtual_time
async def test_who_holds_the_job_costs_no_look_and_a_crowd_one() -> None:
    disk = Looked()
    async with household(disk) as house:
        await house.yes(done(await house.held()))
        await house.no(done("none", "never created"))
        assert disk.asked == []
        lock_id = await lost(house, "b")
        tasks = fill(house, [Adopt(id="b"), *(done(lock_id, "b") for _ in range(9)), Why(id="b")])
        for task in tasks:
            await task
        assert disk.calls["late"] == 1
        assert [(each.lock_id, each.with_results) for each in disk.asked] == [(None, False), (None, True)]


@in_virtual_time
async def test_a_full_disk_keeps_nothing_and_refuses_as_ever() -> None:
    """Whoever has lost the lock is told so, at every step of a disk that fills up."""
    async with household() as house:
        locks = {name: await lost(house, name) for name in ("a", "b", "c")}
        house.disk.write_errors.append(DiskFull("no room for a nicety"))
        refusal = await house.no(done(locks["a"]))
        assert (refusal.code, "late_result" in refusal.details) == ("lock_lost", False)
        assert house.actor.full_disk.closed == Closed.CREATES
        house.disk.fits = lambda batch: False
        refusal = await house.no(done(locks["b"], "b"))
        assert (refusal.code, "late_result" in refusal.details) == ("lock_lost", False)
        assert (await house.no(Cancel(id="a"))).code == "invalid_transition"
        for _ in range(2):
            await house.actor.full_disk.close_further()
        assert (await house.no(Tick())).code == "storage_full"
        assert (await house.no(done(locks["c"], "c"))).code == "lock_lost"
        assert house.disk.lates == {}
        house.disk.free()
        await asyncio.sleep(2)
        assert "late_result" in (await house.no(done(locks["c"], "c"))).details


def told(house: VirtualEngine) -> list[str]:
    """The verbs of the late calls that the journal on the disk tells of."""
    return [(event.details or {})["verb"] for event in house.disk.events if event.type == "late_call"]


@in_virtual_time
async def test_a_worker_that_talks_on_writes_once_and_is_looked_up_nowhere() -> None:
    disk = Looked()
    async with household(disk) as house:
        lock_id = await lost(house)
        for _ in range(20):
            assert (await house.no(Progress(id="a", lock_id=lock_id, progress=1))).code == "lock_lost"
        written = len(disk.batches)
        assert told(house) == ["progress"]
        await house.no(Release(id="a", lock_id=lock_id))
        for _ in range(20):
            await house.no(Release(id="a", lock_id=lock_id))
            await house.no(Extend(id="a", lock_id="never-one"))
        assert told(house) == ["progress", "release"]
        assert len(disk.batches) == written + 1
        assert disk.asked == []
    async with household(disk) as house:  # memory begins anew
        await house.no(Progress(id="a", lock_id=lock_id, progress=1))
        await house.no(Progress(id="a", lock_id=lock_id, progress=1))
        assert told(house) == ["progress", "release", "progress"]


@in_virtual_time
async def test_a_late_call_is_on_the_disk_before_it_is_refused() -> None:
    async with household() as house:
        lock_id = await lost(house)
        house.disk.gate.clear()
        asking = begin(house.actor.ask(Release(id="a", lock_id=lock_id)))
        await house.disk.at_gate.wait()
        await settle()
        assert not asking.done()
        house.disk.gate.set()
        assert (await asking).code == "lock_lost"
        assert told(house) == ["release"]


@in_virtual_time
async def test_on_a_full_disk_late_calls_are_refused_as_ever_and_told_once_there_is_room() -> None:
    async with household() as house:
        lock_id = await lost(house)
        house.disk.write_errors.append(DiskFull("no room for a nicety"))
        assert (await house.no(Release(id="a", lock_id=lock_id))).code == "lock_lost"
        assert house.actor.full_disk.closed == Closed.CREATES
        assert (await house.no(Release(id="a", lock_id=lock_id))).code == "lock_lost"
        assert told(house) == []
        await asyncio.sleep(2)
        assert (await house.no(Release(id="a", lock_id=lock_id))).code == "lock_lost"
        assert told(house) == ["release"]


@in_virtual_time
async def test_a_holder_is_not_let_past_a_full_disk() -> None:
    async with household() as house:
        lock_id = await house.held()
        for _ in range(3):
            await house.actor.full_disk.close_further()
        house.disk.fits = lambda batch: False
        assert (await house.no(done(lock_id))).code == "storage_full"
        house.disk.free()
        await asyncio.sleep(2)
        assert (await house.yes(done(lock_id))).status == "completed"


@in_virtual_time
async def test_what_was_left_alone_is_taken_at_once() -> None:
    async with household(policy=Policy(late_results="adopt_if_unclaimed")) as house:
        lock_id = await house.held(lock_ttl_ms=1_000)
        await asyncio.sleep(60)
        await house.yes(Recover(limit=1))
        assert (await house.yes(Get(id="a"))).status == "queued"
        assert (await house.yes(done(lock_id))).status == "completed"
        assert (await house.yes(done(lock_id))).repeated
        assert house.book.figures.late_adopted == 1
        assert house.book.figures.late_kept == 0


@in_virtual_time
async def test_late_results_are_counted() -> None:
    async with household() as house:
        await house.no(done(await lost(house)))
        await house.yes(Adopt(id="a"), admin=True)
        assert (house.book.figures.late_kept, house.book.figures.late_adopted) == (1, 1)


# -- searches ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page looks at 7 jobs or a few more, in slices of 3."""
    monkeypatch.setattr(history, "SLICE", 3)
    monkeypatch.setattr(history, "MOST_LOOKED", 7)
    monkeypatch.setattr(history, "JobQuery", partial(JobQuery, scan=3))


@pytest.mark.usefixtures("small_pages")
@in_virtual_time
async def test_a_search_for_text_looks_slice_by_slice_and_at_a_page_at_most() -> None:
    async with VirtualEngine() as house:
        for n in range(12):
            await house.yes(Create(id=f"j{n}", payload=Raw(b'"needle"' if n in (0, 1, 6) else b"1")))
        looks = house.disk.calls.get("find", 0)
        page = await house.yes(SearchJobs(q="Needle"))
        assert [job.id for job in page.jobs] == ["j6"]
        assert house.disk.calls["find"] == looks + 3
        assert page.next_cursor is not None
        rest = await house.yes(SearchJobs(q="needle", cursor=page.next_cursor))
        assert [job.id for job in rest.jobs] == ["j1", "j0"]
        assert rest.next_cursor is None
        first = await house.yes(SearchJobs(q="needle", limit=1, cursor=page.next_cursor))
        assert [job.id for job in first.jobs] == ["j1"]
        assert [
            job.id for job in (await house.yes(SearchJobs(q="needle", limit=1, cursor=first.next_cursor))).jobs
        ] == ["j0"]


@pytest.mark.usefixtures("small_pages")
@in_virtual_time
async def test_a_page_goes_on_looking_until_it_has_looked_at_enough() -> None:
    async with VirtualEngine() as house:
        for n in range(15):
            await asyncio.sleep(1)
            await house.yes(Create(id=f"j{n}", queue="b" if n in (1, 7, 8) else "a"))
        created = {f"j{n}": (await house.yes(Get(id=f"j{n}"))).created_at for n in range(15)}
        looks = house.disk.calls.get("find", 0)
        page = await house.yes(ListJobs(queue="b"))
        assert [job.id for job in page.jobs] == ["j8", "j7"]
        assert (page.next_cursor is not None, page.looked_to_at) == (True, created["j6"])
        assert house.disk.calls["find"] == looks + 3
        rest = await house.yes(ListJobs(queue="b", cursor=page.next_cursor))
        assert ([job.id for job in rest.jobs], rest.next_cursor, rest.looked_to_at) == (["j1"], None, None)
        full = await house.yes(ListJobs(queue="b", limit=2))
        assert ([job.id for job in full.jobs], full.looked_to_at) == (["j8", "j7"], None)
        assert full.next_cursor is not None
        none = await house.yes(ListJobs(queue="nowhere"))
        assert (none.jobs, none.looked_to_at) == ([], created["j6"])


@pytest.fixture
def slow_pages(small_pages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page looks at 12 jobs in slices of 3, which takes 3 s."""
    monkeypatch.setattr(history, "MOST_LOOKED", 1_000)
    monkeypatch.setattr(history, "EAGER_S", 0)
    monkeypatch.setattr(history, "PAUSE_S", 1.0)
    monkeypatch.setattr(history, "PATIENCE_S", 2.5)
    monkeypatch.setattr(history, "SLOW_PATIENCE_S", 1.5)


@pytest.mark.usefixtures("slow_pages")
@in_virtual_time
async def test_a_page_goes_on_looking_until_its_time_is_up() -> None:
    async with VirtualEngine() as house:
        for n in range(30):
            await house.yes(Create(id=f"j{n}", queue="b" if n == 0 else "a"))
        began = house.now
        page = await house.yes(ListJobs(queue="b"))
        assert (page.jobs, page.next_cursor, house.now - began) == ([], "19", 3_000)
        assert (await house.yes(SearchJobs(q="nowhere"))).next_cursor == "22"
        found, pages = [], 1
        while page.next_cursor is not None:
            page = await house.yes(ListJobs(queue="b", cursor=page.next_cursor))
            found += [job.id for job in page.jobs]
            pages += 1
        assert (found, pages) == (["j0"], 3)


@pytest.mark.usefixtures("slow_pages")
@in_virtual_time
async def test_who_looks_far_back_holds_up_nobody_else() -> None:
    async with VirtualEngine() as house:
        for n in range(30):
            await house.yes(Create(id=f"j{n}"))
        far = [asyncio.create_task(house.yes(ListJobs(queue="nowhere"))) for _ in range(2 * history.AT_ONCE)]
        await asyncio.sleep(0.5)
        began = house.now
        assert len((await house.yes(Timeline(id="j0"))).events) == 1
        await house.yes(Create(id="new"))
        assert len((await house.yes(ListJobs(limit=1))).jobs) == 1
        assert house.now == began
        assert not any(task.done() for task in far)
        assert all(page.next_cursor is not None for page in await asyncio.gather(*far))
        assert house.now - began < 2_500 + 1_000 * len(far), "they take turns, and none goes on for long"


@in_virtual_time
async def test_jobs_that_move_while_one_pages_are_neither_shown_twice_nor_left_out() -> None:
    """A page begins below the one before, wherever its jobs are looked for."""
    async with VirtualEngine() as house:
        for n in range(12):
            await house.yes(Create(id=f"j{n}"))
            if n % 2:
                await house.yes(ForceFail(id=f"j{n}", reason="no"))
        seen: list[str] = []
        cursor = None
        while True:
            page = await house.yes(ListJobs(status="failed", limit=2, cursor=cursor))
            seen += [job.id for job in page.jobs]
            cursor = page.next_cursor
            if cursor is None:
                break
            await house.yes(ForceReset(id=seen[-1]))  # it leaves the index that the walk goes along,
            await house.yes(ForceFail(id=f"j{len(seen)}", reason="no")) if len(seen) == 2 else None  # and one comes
        assert seen == ["j11", "j9", "j7", "j5", "j3", "j2", "j1"]


@in_virtual_time
async def test_a_search_for_an_error_looks_at_failed_jobs_where_nothing_else_is_said() -> None:
    async with household() as house:
        for job_id in ("a", "b"):
            await house.yes(Create(id=job_id))
            await house.yes(ForceFail(id=job_id, reason="no connection"))
        await house.yes(ForceReset(id="b"))  # its error is gone with it
        failed = await house.yes(Get(id="a"))
        error = fingerprint(failed.error_message, failed.error_code)
        page = await house.yes(SearchJobs(error=error))
        assert [job.id for job in page.jobs] == ["a"]
        assert (await house.yes(SearchJobs(error=error, status="queued"))).jobs == []
        assert (await house.yes(SearchJobs(error=error, worker="w"))).jobs == []


@in_virtual_time
async def test_jobs_are_found_by_when_they_finished_and_by_who_had_them_last() -> None:
    async with household() as house:
        lock_id = await house.held()
        for job_id in ("b", "c"):
            await house.yes(Create(id=job_id))
        await asyncio.sleep(10)
        middle = house.now
        await house.yes(Fail(id="a", lock_id=lock_id, error_message="no"))
        await asyncio.sleep(10)
        await house.yes(ForceFail(id="b", reason="no"))

        async def found(**asked: Any) -> list[str]:
            return [job.id for job in (await house.yes(SearchJobs(**asked))).jobs]

        assert await found(finished_since=middle) == ["b", "a"]
        assert await found(finished_since=middle, finished_until=middle + 1) == ["a"]
        assert await found(worker="w-1") == ["a"]
        assert await found(worker="w-1", status="failed", finished_since=middle) == ["a"]
        assert await found(worker="w-1", status="processing") == []


@in_virtual_time
async def test_a_search_carries_a_page_of_payload_at_most() -> None:
    async with VirtualEngine() as house:
        for n in range(4):
            await house.yes(Create(id=f"j{n}", payload=Raw(b'"' + b"x" * (3 << 20) + b'"')))
        page = await house.yes(SearchJobs(q="xxx"))
        assert ([job.id for job in page.jobs], page.looked_to_at) == (["j3"], None)
        assert (await house.yes(SearchJobs(since=0, until=house.now + 1))).next_cursor is not None
