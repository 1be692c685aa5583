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


def start_task(ask: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    return asyncio.create_task(ask)


async def settle() -> None:
    """Run all tasks that need no time to pass."""
    for _ in range(50):
        await asyncio.sleep(0)


async def waiting_claim(engine: VirtualEngine, worker: str, **fields: Any) -> asyncio.Task[Any]:
    """Start a claim that waits for work."""
    waiting = {"wait_ms": 30_000} | fields
    name = waiting.pop("key", None)
    task = start_task(engine.actor.ask(Claim(worker=worker, **waiting), key=name))
    await settle()
    assert not task.done()
    return task


def granted_ids(answer: Any) -> list[str]:
    assert isinstance(answer, Response), answer
    return [granted.job.id for granted in answer.data.grants]


def assert_consistent(engine: VirtualEngine) -> None:
    """Check that memory equals what a start would load, and that both equal the folded journal."""
    opened = engine.disk.opened()
    fresh = Book.opened(opened)
    assert engine.book.jobs == fresh.jobs
    counts = {name: count for name, count in engine.book.counts.items() if any(count.values())}
    assert counts == {name: count for name, count in fresh.counts.items() if any(count.values())}
    assert engine.book.totals == fresh.totals
    assert engine.book.paused == fresh.paused
    assert engine.book.suspects == engine.disk.suspects
    for job in engine.book.finished.values():
        assert engine.disk.job(job.id) == job
    folded: dict[int, Job | None] = {}
    for event in engine.disk.events:
        if event.job_seq:
            folded[event.job_seq] = fold(folded.get(event.job_seq), event)
    for seq, row in folded.items():
        if seq in engine.disk.jobs:
            assert row == engine.disk.jobs[seq]


@asynccontextmanager
async def checked_engine(disk: MemoryStorage | None = None, **parts: Any) -> AsyncIterator[VirtualEngine]:
    """Run an engine and check at the end that memory and disk agree."""
    async with VirtualEngine(disk, **parts) as engine:
        yield engine
        await settle()
        assert_consistent(engine)


# -- the mailbox ------------------------------------------------------------------------------------------------------


def ask_all(engine: VirtualEngine, commands: Iterable[AnyCommand], size: int = 0) -> list[asyncio.Task[Any]]:
    return [start_task(engine.actor.ask(command, size=size)) for command in commands]


@in_virtual_time
async def test_the_mailbox_reserves_space_for_running_work() -> None:
    """Creates fill a part of it; starts and reads may use more; calls for running work may use all of it."""
    engine = VirtualEngine(bounds=Bounds(mailbox=20))
    tasks = ask_all(engine, [Create() for _ in range(20)])
    await settle()
    assert [task.result().code for task in tasks if task.done()] == ["overloaded"] * 6
    tasks += ask_all(
        engine, [Get(id="x"), Claim(worker="w"), Start(id="x", worker="w"), Stats(), ListJobs(), Why(id="x")]
    )
    await settle()
    assert engine.actor.waiting == 17
    assert (await engine.actor.ask(Import(id="x"))).code == "overloaded"  # type: ignore[union-attr]
    last: list[AnyCommand] = [Ping(), Progress(id="x", lock_id="l", progress=1), ForceFail(id="x"), Tick()]
    tasks += ask_all(engine, last)
    await settle()
    assert engine.actor.waiting == 20
    refusal = tasks[-1].result()
    assert (refusal.code, refusal.status) == ("overloaded", 503)
    async with engine:
        await settle()
        assert all(task.done() for task in tasks)
    assert engine.actor.waiting == 0
    assert (engine.book.totals["queued"], engine.book.totals["processing"]) == (13, 1)


@in_virtual_time
async def test_the_bytes_in_flight_reserve_space_for_running_work() -> None:
    engine = VirtualEngine(bounds=Bounds(inflight_bytes=100))
    assert (await engine.actor.ask(Create(), size=71)).code == "overloaded"  # type: ignore[union-attr]
    first = start_task(engine.actor.ask(Create(), size=70))
    await settle()
    assert (await engine.actor.ask(Get(id="x"), size=16)).code == "overloaded"  # type: ignore[union-attr]
    second = start_task(engine.actor.ask(Complete(id="x", lock_id="l"), size=30))
    await settle()
    assert (await engine.actor.ask(Tick(), size=1)).code == "overloaded"  # type: ignore[union-attr]
    async with engine:
        assert isinstance(await first, Response)
        assert (await second).code == "job_not_found"
        assert isinstance(await engine.actor.ask(Create(), size=70), Response)  # the bytes are free again


@in_virtual_time
async def test_waiting_claims_are_limited() -> None:
    async with checked_engine(bounds=Bounds(parked_claims=1, claim_wait_ms=1_000)) as engine:
        refusal = await engine.no(Claim(worker="w", wait_ms=1_001))
        assert (refusal.code, refusal.details) == ("invalid_request", {"field": "$.wait_ms"})
        waiting = await waiting_claim(engine, "w", wait_ms=1_000)
        assert (await engine.no(Claim(worker="w", wait_ms=1))).code == "overloaded"
        assert (await engine.yes(Claim(worker="w"))).grants == []
        assert granted_ids(await waiting) == []


@in_virtual_time
async def test_waiting_commands_form_one_batch() -> None:
    """Each command sees the changes of the ones before it, and one transaction writes all of them."""
    engine = VirtualEngine()
    tasks = ask_all(engine, [Create(id="a", payload=Raw(b"7")), Start(id="a", worker="w"), Create(id="a"), Get(id="a")])
    async with engine:
        created, started, twice, got = [await task for task in tasks]
        assert (created.status, created.data.status) == (201, "queued")
        assert started.data.job.payload == got.data.payload == Raw(b"7")
        assert twice.code == "job_exists"
        assert got.data.status == "processing"
        assert [len(batch.changes) for batch in engine.disk.batches] == [2]
        assert_consistent(engine)


@in_virtual_time
async def test_a_batch_is_limited_by_what_it_writes() -> None:
    engine = VirtualEngine()
    bulk = Bulk(jobs=[Create() for _ in range(BATCH_WEIGHT)])
    tasks = ask_all(engine, [bulk, bulk, *(Claim(worker="w", limit=100) for _ in range(11))])
    async with engine:
        for task in tasks:
            await task
        assert [len(batch.changes) for batch in engine.disk.batches] == [1_000, 1_000, 1_000, 100]


@in_virtual_time
async def test_no_response_is_sent_before_the_commit() -> None:
    async with checked_engine() as engine:
        engine.disk.gate.clear()
        creating = start_task(engine.actor.ask(Create(id="a")))
        await engine.disk.at_gate.wait()
        reading = start_task(engine.actor.ask(Get(id="a")))
        await settle()
        assert not creating.done()
        assert not reading.done()
        heard: list[str] = []
        engine.actor.on_commit.append(lambda changes: heard.extend(change.event.type for change in changes))
        engine.disk.gate.set()
        assert isinstance(await creating, Response)
        assert (await reading).data.id == "a"
        assert heard == ["created"]
        assert sum(engine.actor.commit_seconds.counts) == 1
        assert engine.actor.batch_commands.total == 1


@in_virtual_time
async def test_a_bug_in_a_rule_costs_one_command() -> None:
    engine = VirtualEngine()
    original = decide.decide

    def broken(book: Book, call: Call, at: Moment, policy: Policy) -> Decision:
        if isinstance(call.command, Pause):
            raise ZeroDivisionError
        return original(book, call, at, policy)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decide, "decide", broken)
        tasks = ask_all(engine, [Create(id="a"), Pause(name="q"), Create(id="b")])
        async with engine:
            answers = [await task for task in tasks]
            assert_consistent(engine)
    assert [answer.status for answer in answers] == [201, 500, 201]
    assert answers[1].code == "internal_error"


@in_virtual_time
async def test_internal_commands_are_written() -> None:
    disk = MemoryStorage()
    disk.marked = True
    async with checked_engine(disk) as engine:
        before = disk.numbers.lease_ms
        await asyncio.sleep(2)
        assert await engine.yes(Tick()) == EmptyResponse()
        assert disk.numbers.lease_ms == before + 2_000
        assert await engine.yes(Report(body=b"{}")) == EmptyResponse()
        assert list(disk.kept_reports) == [b"{}"]
        await engine.yes(EndGrants(ids=[], last=False))
        assert disk.marked
        await engine.yes(EndGrants(ids=[], last=True))
        assert not disk.marked
        written = len(disk.batches)
        await engine.yes(Ping())
        await engine.yes(Stats())
        assert len(disk.batches) == written


# -- what lies on the disk --------------------------------------------------------------------------------------------


async def finished_disk() -> MemoryStorage:
    """Return a disk with one completed job, `done`."""
    async with checked_engine() as engine:
        await engine.yes(Create(id="done", payload=Raw(b'"p"')))
        granted = await engine.yes(Start(id="done", worker="w"))
        await engine.yes(Complete(id="done", lock_id=granted.lock_id, file_path="/f"))
        return engine.disk


@in_virtual_time
async def test_finished_jobs_are_loaded_when_a_command_names_them() -> None:
    async with checked_engine(await finished_disk()) as engine:
        assert engine.book.get("done") is None
        assert engine.book.total() == 1
        view: JobView = await engine.yes(Get(id="done"))
        assert (view.status, view.payload, view.file_path) == ("completed", Raw(b'"p"'), "/f")
        assert (await engine.no(Get(id="never"))).code == "job_not_found"
        assert (await engine.no(Create(id="done"))).code == "job_exists"
        assert (await engine.yes(Import(id="done"))).skipped
        same = await engine.actor.ask(Create(id="done", payload=Raw(b'"p"')))
        assert isinstance(same, Response)
        assert (same.status, same.data.status, same.data.payload) == (200, "completed", Raw(b'"p"'))
        assert (await engine.yes(Delete(id="done"))).payload == Raw(b'"p"')
        assert engine.disk.jobs == {}


@in_virtual_time
async def test_a_bulk_create_finds_finished_jobs() -> None:
    async with checked_engine(await finished_disk()) as engine:
        made = await engine.yes(Bulk(jobs=[Create(), Create(id="done", payload=Raw(b'"p"'))]))
        assert (made.jobs[1].status, made.jobs[1].payload) == ("completed", Raw(b'"p"'))


@in_virtual_time
async def test_history_is_read_between_batches() -> None:
    async with checked_engine(await finished_disk()) as engine:
        events = (await engine.yes(Timeline(id="done"))).events
        assert [event.type for event in events] == ["created", "granted", "completed"]
        for number in range(3):
            await engine.yes(Create(id=f"{number}"))
        page = await engine.yes(ListJobs(limit=2))
        assert [job.id for job in page.jobs] == ["2", "1"]
        page = await engine.yes(ListJobs(limit=2, cursor=page.next_cursor))
        assert ([job.id for job in page.jobs], page.next_cursor) == (["0", "done"], None)
        assert page.jobs[1].payload == Raw(b'"p"')
        assert [job.id for job in (await engine.yes(ListJobs(status="completed", queue="default"))).jobs] == ["done"]
        page = await engine.yes(Export(limit=3))
        assert [job.id for job in page.jobs] == ["done", "0", "1"]
        assert page.jobs[0].payload == Raw(b'"p"')
        page = await engine.yes(Export(limit=3, cursor=page.next_cursor))
        assert ([job.id for job in page.jobs], page.next_cursor) == (["2"], None)
        assert [job.id for job in (await engine.yes(Export(status="completed", queue="default"))).jobs] == ["done"]
        engine.disk.errors["timeline"] = OSError("unreadable")
        assert (await engine.no(Timeline(id="done"))).code == "internal_error"
        assert (await engine.yes(Get(id="0"))).id == "0"


@in_virtual_time
async def test_reads_of_history_are_answered_before_the_actor_stops() -> None:
    engine = VirtualEngine(await finished_disk())
    async with engine:
        tasks = ask_all(engine, [Timeline(id="done") for _ in range(10)])
        await asyncio.sleep(0)
        engine.actor.stop()
    await asyncio.sleep(0)
    assert [len(task.result().data.events) for task in tasks] == [3] * 10


@in_virtual_time
async def test_one_batch_can_show_and_delete_a_job() -> None:
    disk = await finished_disk()
    engine = VirtualEngine(disk)
    engine.step_ms = 8 * DAY_MS
    engine.clock.accept()
    tasks = ask_all(engine, [Get(id="done"), DeleteExpired(ids=["done"]), Get(id="done")])
    async with engine:
        shown, deleted, gone = [await task for task in tasks]
        assert shown.data.payload == Raw(b'"p"')
        assert deleted.data.done == 1
        assert gone.code == "job_not_found"
        assert disk.batches[-1].payloads == []  # its row is gone by then
        assert_consistent(engine)


# -- parked claims ----------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_waiting_claims_are_served_in_order_of_arrival() -> None:
    async with checked_engine() as engine:
        waiting = [await waiting_claim(engine, f"w-{number}", limit=limit) for number, limit in enumerate((1, 2, 1))]
        await engine.yes(Bulk(jobs=[Create(id=name) for name in "abcde"]))
        assert [granted_ids(await task) for task in waiting] == [["a"], ["b", "c"], ["d"]]
        assert len(engine.actor.parked) == 0
        assert engine.disk.batches[0].changes[0].event.type == "created"  # all in one transaction
        assert len(engine.disk.batches) == 1


@in_virtual_time
async def test_the_order_of_arrival_holds_across_queues() -> None:
    """A claim for several queues does not take a job that another claim has waited for longer."""
    async with checked_engine() as engine:
        first = await waiting_claim(engine, "first", queues=["q"])
        second = await waiting_claim(engine, "second", queues=["default", "q"])
        await engine.yes(Bulk(jobs=[Create(id="a"), Create(id="b", queue="q", priority=-1)]))
        assert granted_ids(await first) == ["b"]
        assert granted_ids(await second) == ["a"]


@in_virtual_time
async def test_a_waiting_claim_is_answered_when_the_disk_fails() -> None:
    engine = VirtualEngine()
    running = asyncio.create_task(engine.actor.run())
    waiting = await waiting_claim(engine, "w")
    engine.disk.write_errors.append(OSError("EIO"))
    refusal = await engine.no(Create(id="a"))
    assert refusal.code == "outcome_unknown"
    answer = await waiting
    assert isinstance(answer, ApiError)
    assert answer.code == "outcome_unknown"
    with pytest.raises(DiskBroken):
        await running


@in_virtual_time
async def test_a_waiting_claim_is_served_before_a_new_one() -> None:
    async with checked_engine() as engine:
        waiting = await waiting_claim(engine, "first")
        tasks = ask_all(engine, [Create(id="a"), Claim(worker="second")])
        assert granted_ids(await waiting) == ["a"]
        assert granted_ids(await tasks[1]) == []


@in_virtual_time
async def test_a_claim_waits_for_its_queues_and_kinds() -> None:
    async with checked_engine() as engine:
        one = await waiting_claim(engine, "one", queues=["q", "r", "q"], kinds=["k", "l", "k"])
        any_kind = await waiting_claim(engine, "any", queues=["q"])
        two = await waiting_claim(engine, "two", queues=["q"], kinds=["k"])
        await engine.yes(Create(id="a", queue="elsewhere", kind="k"))
        await engine.yes(Create(id="b", queue="r", kind="m"))
        await settle()
        assert len(engine.actor.parked) == 3
        await engine.yes(Create(id="c", queue="q", kind="m"))
        assert granted_ids(await any_kind) == ["c"]
        await engine.yes(Create(id="d", queue="r", kind="l"))
        assert granted_ids(await one) == ["d"]
        await engine.yes(Create(id="e", queue="q", kind="k"))
        assert granted_ids(await two) == ["e"]


@in_virtual_time
async def test_commands_that_make_a_job_due_serve_a_waiting_claim() -> None:
    async with checked_engine() as engine:
        lock_id = await engine.held("a", lock_ttl_ms=60_000)
        waiting = await waiting_claim(engine, "w")
        await engine.yes(Release(id="a", lock_id=lock_id))
        assert granted_ids(await waiting) == ["a"]
        waiting = await waiting_claim(engine, "w")
        await engine.yes(ForceReset(id="a"))
        assert granted_ids(await waiting) == ["a"]
        await engine.yes(Pause(name="default"))
        await engine.yes(Create(id="b"))
        waiting = await waiting_claim(engine, "w")
        await engine.yes(Resume(name="default"))
        assert granted_ids(await waiting) == ["b"]
        await engine.yes(Create(id="c", delay_ms=DAY_MS))
        waiting = await waiting_claim(engine, "w")
        await engine.yes(RunNow(id="c"))
        assert granted_ids(await waiting) == ["c"]


@in_virtual_time
async def test_a_waiting_claim_gets_a_delayed_job_when_it_is_due() -> None:
    async with checked_engine() as engine:
        await engine.yes(Create(id="a", delay_ms=2_500))
        waiting = await waiting_claim(engine, "w")
        begun = engine.now
        assert granted_ids(await waiting) == ["a"]
        assert engine.now == begun + 2_500


@in_virtual_time
async def test_a_step_of_the_clock_that_makes_a_job_eligible_wakes_a_waiting_claim() -> None:
    async with checked_engine() as engine:
        await engine.yes(Create(id="a", delay_ms=DAY_MS // 2))
        await engine.yes(Create(id="b", queue="q", expires_at=engine.now + DAY_MS // 4))
        ahead = await waiting_claim(engine, "ahead")
        begun = asyncio.get_running_loop().time()
        engine.step_ms += DAY_MS // 2
        assert granted_ids(await ahead) == ["a"]
        back = await waiting_claim(engine, "back", queues=["q"])
        engine.step_ms -= DAY_MS // 2
        assert granted_ids(await back) == ["b"]
        assert asyncio.get_running_loop().time() - begun == 2 * CLOCK_LOOK_S


@in_virtual_time
async def test_a_claim_is_answered_empty_when_its_wait_ends() -> None:
    async with checked_engine() as engine:
        short = await waiting_claim(engine, "short", wait_ms=1_000)
        long = await waiting_claim(engine, "long", wait_ms=2_000)
        begun = engine.now
        answer = await short
        assert (granted_ids(answer), engine.now - begun) == ([], 1_000)
        assert len(engine.actor.parked) == 1
        assert (granted_ids(await long), engine.now - begun) == ([], 2_000)
        assert engine.disk.batches == []


@in_virtual_time
async def test_an_abandoned_claim_gets_no_job() -> None:
    async with checked_engine() as engine:
        gone, waiting = await waiting_claim(engine, "gone"), await waiting_claim(engine, "here")
        gone.cancel()
        await settle()
        assert len(engine.actor.parked) == 1
        await engine.yes(Create(id="a"))
        assert granted_ids(await waiting) == ["a"]


@in_virtual_time
async def test_a_claim_skips_overdue_jobs_and_waits() -> None:
    async with checked_engine() as engine:
        await engine.yes(Create(id="a", expires_at=engine.now + 1_000))
        await asyncio.sleep(1)
        waiting = await waiting_claim(engine, "w")
        assert (await engine.yes(Get(id="a"))).status == "queued"
        await engine.yes(Create(id="b", expires_at=engine.now + 1_000, delay_ms=1_000))
        await asyncio.sleep(1)
        await settle()
        assert (await engine.yes(Get(id="b"))).status == "queued"
        await engine.yes(Create(id="c"))
        assert granted_ids(await waiting) == ["c"]


@in_virtual_time
async def test_stop_parking_answers_waiting_claims_and_accepts_no_new_ones() -> None:
    async with checked_engine() as engine:
        waiting = [await waiting_claim(engine, "w"), await waiting_claim(engine, "w", key=key("k"))]
        engine.actor.stop_parking()
        assert [granted_ids(await task) for task in waiting] == [[], []]
        assert granted_ids(await engine.actor.ask(Claim(worker="w", wait_ms=30_000))) == []
        await engine.yes(Create())  # other commands continue


@in_virtual_time
async def test_stop_drains_the_mailbox() -> None:
    engine = VirtualEngine()
    running = start_task(engine.actor.run())
    waiting = await waiting_claim(engine, "w")
    engine.disk.gate.clear()
    under_way = start_task(engine.actor.ask(Create(id="a", queue="q")))
    await engine.disk.at_gate.wait()
    in_mailbox = start_task(engine.actor.ask(Create(id="b", queue="q")))
    await settle()
    engine.actor.stop()
    assert (await engine.actor.ask(Ping())).code == "shutting_down"  # type: ignore[union-attr]
    engine.disk.gate.set()
    await running
    assert [(await task).status for task in (under_way, in_mailbox)] == [201, 201]
    assert granted_ids(await waiting) == []
    assert_consistent(engine)


@in_virtual_time
async def test_stop_wakes_an_idle_actor() -> None:
    engine = VirtualEngine()
    running = start_task(engine.actor.run())
    await settle()
    engine.actor.stop()
    await running


# -- idempotency keys -------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_repeated_key_gets_the_same_response() -> None:
    async with checked_engine() as engine:
        create = Create(payload=Raw(b"[1]"))
        first = await engine.actor.ask(create, key=key("k"))
        second = await engine.actor.ask(create, key=key("k"))
        assert isinstance(first, Response)
        assert isinstance(second, Response)
        assert (first.replayed, second.replayed) == (False, True)
        assert (first.status, second.status) == (201, 201)
        assert first.data.id.encode() in bytes(second.data)
        assert b'"payload":[1]' in bytes(second.data)
        assert len(engine.disk.jobs) == 1
        other = await engine.no(create, key=key("k", "another body"))
        assert (other.code, other.status) == ("idempotency_key_reused", 422)
        await asyncio.sleep(KEPT_MS / 1000)
        again = await engine.actor.ask(create, key=key("k"))
        assert isinstance(again, Response)
        assert not again.replayed
        assert len(engine.disk.jobs) == 2


@in_virtual_time
async def test_a_repeat_waits_for_the_first_request_in_flight() -> None:
    engine = VirtualEngine()
    create = Create(id="a", payload=Raw(b"[1]"))
    tasks = [start_task(engine.actor.ask(create, key=key("k"))) for _ in range(3)]
    tasks.append(start_task(engine.actor.ask(create, key=key("k", "other"))))
    async with engine:
        first, second, third, other = [await task for task in tasks]
        assert (first.replayed, second.replayed, third.replayed) == (False, True, True)
        assert bytes(second.data) == bytes(third.data)
        assert other.code == "idempotency_key_reused"
        engine.disk.gate.clear()
        slow = start_task(engine.actor.ask(Create(), key=key("l")))
        await engine.disk.at_gate.wait()
        repeat = start_task(engine.actor.ask(Create(), key=key("l")))
        await settle()
        assert not repeat.done()
        engine.disk.gate.set()
        assert not (await slow).replayed
        assert (await repeat).replayed
        assert_consistent(engine)


@in_virtual_time
async def test_keys_outlive_a_restart() -> None:
    async with checked_engine() as engine:
        await engine.yes(Create(id="a"), key=key("create"))
        await engine.yes(Start(id="a", worker="w"), key=key("start"))
        disk = engine.disk
    async with checked_engine(disk) as engine:
        again = await engine.actor.ask(Create(id="a"), key=key("create"))
        assert isinstance(again, Response)
        assert (again.replayed, again.status) == (True, 201)
        again = await engine.actor.ask(Start(id="a", worker="w"), key=key("start"))
        assert isinstance(again, Response)
        assert again.replayed
        assert again.data.job.lock.worker == "w"


@in_virtual_time
async def test_a_damaged_stored_response_is_an_error() -> None:
    async with checked_engine() as engine:
        await engine.yes(Create(), key=key("k"))
        engine.disk.keys.clear()
        assert (await engine.no(Create(), key=key("k"))).code == "internal_error"
        assert len(engine.disk.jobs) == 1


@in_virtual_time
async def test_a_key_whose_grants_have_ended_is_decided_again() -> None:
    """A restored backup has such keys."""
    disk = MemoryStorage()
    disk.keys["k"] = StoredResponse("k", "body", 0, grants=[("a", "old")])
    async with checked_engine(disk) as engine:
        await engine.yes(Create(id="a"))
        answer = await engine.actor.ask(Start(id="a", worker="w"), key=key("k"))
        assert isinstance(answer, Response)
        assert not answer.replayed
        assert disk.keys["k"].grants == [("a", answer.data.lock_id)]


@in_virtual_time
async def test_a_response_that_changed_nothing_is_not_stored() -> None:
    async with checked_engine() as engine:
        assert (await engine.no(Cancel(id="a"), key=key("k"))).code == "job_not_found"
        await engine.yes(Create(id="a"))
        assert (await engine.yes(Cancel(id="a"), key=key("k"))).status == "cancelled"
        again = await engine.actor.ask(Cancel(id="a"), key=key("k"))
        assert isinstance(again, Response)
        assert again.replayed
        await engine.yes(Claim(worker="w"), key=key("empty"))
        await engine.yes(Create(id="b"))
        assert granted_ids(await engine.actor.ask(Claim(worker="w"), key=key("empty"))) == ["b"]


@in_virtual_time
async def test_an_empty_claim_is_not_stored_even_if_it_expired_jobs() -> None:
    async with checked_engine() as engine:
        await engine.yes(Create(id="a", expires_at=engine.now + 1_000))
        await asyncio.sleep(1)
        assert granted_ids(await engine.actor.ask(Claim(worker="w"), key=key("k"))) == []
        await engine.yes(Create(id="b"))
        assert granted_ids(await engine.actor.ask(Claim(worker="w"), key=key("k"))) == ["b"]


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
def test_a_stored_response_is_complete(command: AnyCommand) -> None:
    async def test() -> None:
        disk = await finished_disk()
        async with checked_engine(disk) as engine:
            await engine.yes(Create(id="a", payload=Raw(b"[9]"), delay_ms=5))
            first = await engine.actor.ask(command, key=key("k"))
            again = await engine.actor.ask(command, key=key("k"))
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
async def test_a_repeated_start_returns_its_current_grant() -> None:
    async with checked_engine() as engine:
        await engine.yes(Create(id="a", payload=Raw(b"1")))
        start = Start(id="a", worker="w")
        first = await engine.actor.ask(start, key=key("k"))
        assert isinstance(first, Response)
        await engine.yes(Progress(id="a", lock_id=first.data.lock_id, progress=40))
        again = await engine.actor.ask(start, key=key("k"))
        assert isinstance(again, Response)
        assert (again.replayed, again.data.lock_id) == (True, first.data.lock_id)
        assert (again.data.job.progress, again.data.job.payload) == (40, Raw(b"1"))
        await engine.yes(Release(id="a", lock_id=first.data.lock_id))
        assert engine.disk.keys == {}
        anew = await engine.actor.ask(start, key=key("k"))
        assert isinstance(anew, Response)
        assert not anew.replayed
        assert anew.data.fencing_token == first.data.fencing_token + 1
        await engine.yes(ForceReset(id="a"))
        await engine.yes(Start(id="a", worker="other"))
        refusal = await engine.no(start, key=key("k"))
        assert (refusal.code, refusal.details["locked_by"]) == ("already_locked", "other")


@in_virtual_time
async def test_a_repeated_claim_returns_its_current_grants() -> None:
    async with checked_engine() as engine:
        for name in "abc":
            await engine.yes(Create(id=name))
        claim = Claim(worker="w", limit=2)
        first = await engine.actor.ask(claim, key=key("k"))
        assert granted_ids(first) == ["a", "b"]
        assert isinstance(first, Response)
        await engine.yes(Complete(id="a", lock_id=first.data.grants[0].lock_id))
        assert granted_ids(await engine.actor.ask(claim, key=key("k"))) == ["b"]
        await engine.yes(Complete(id="b", lock_id=first.data.grants[1].lock_id))
        assert engine.disk.keys == {}
        assert granted_ids(await engine.actor.ask(claim, key=key("k"))) == ["c"]


@in_virtual_time
async def test_a_repeated_waiting_claim_waits_once() -> None:
    async with checked_engine() as engine:
        first = await waiting_claim(engine, "w", key=key("k"))
        repeat = await waiting_claim(engine, "w", key=key("k"))
        other = await engine.no(Claim(worker="w", wait_ms=30_000), key=key("k", "other"))
        assert other.code == "idempotency_key_reused"
        assert len(engine.actor.parked) == 1
        await engine.yes(Create(id="a"))
        assert granted_ids(await first) == granted_ids(await repeat) == ["a"]
        assert engine.book.totals["processing"] == 1
        engine.actor.undelivered(await first)
        await settle()
        assert engine.book.totals["processing"] == 1  # the other connection has it
        engine.actor.undelivered(await repeat)
        await settle()
        assert engine.book.totals["processing"] == 0
        assert engine.disk.keys == {}


@in_virtual_time
async def test_a_waiting_claim_is_removed_when_all_its_callers_are_gone() -> None:
    async with checked_engine() as engine:
        first = await waiting_claim(engine, "w", key=key("k"))
        repeat = await waiting_claim(engine, "w", key=key("k"))
        first.cancel()
        await settle()
        assert len(engine.actor.parked) == 1
        repeat.cancel()
        await settle()
        assert len(engine.actor.parked) == 0
        await engine.yes(Create(id="a"))
        assert engine.book.totals["queued"] == 1


@in_virtual_time
async def test_a_repeat_gets_the_grant_of_an_abandoned_request() -> None:
    async with checked_engine() as engine:
        first = await waiting_claim(engine, "w", key=key("k"))
        repeat = await waiting_claim(engine, "w", key=key("k"))
        first.cancel()
        await engine.yes(Create(id="a"))
        assert granted_ids(await repeat) == ["a"]
        await settle()
        assert engine.book.totals["processing"] == 1


@in_virtual_time
async def test_keyed_requests_are_rejected_at_the_limit_of_keys() -> None:
    engine = VirtualEngine()
    engine.actor._decider.keys.limit = 1
    async with engine:
        await engine.yes(Create(), key=key("k"))
        refusal = await engine.no(Create(), key=key("l"))
        assert (refusal.code, refusal.status) == ("overloaded", 503)
        await engine.yes(Create())
        await asyncio.sleep(600)
        assert (await engine.no(RunNow(id="a", dry_run=True), key=key("m"))).code == "job_not_found"
        await engine.yes(Create())
        assert set(engine.disk.keys) == {"k"}, "a dry run stores no key"
        await engine.yes(Create(), key=key("l"))
        assert set(engine.disk.keys) == {"l"}


# -- grants that nobody received --------------------------------------------------------------------------------------


@in_virtual_time
async def test_an_undelivered_grant_is_released() -> None:
    async with checked_engine() as engine:
        await engine.yes(Create(id="a"))
        answer = await engine.actor.ask(Start(id="a", worker="w"))
        assert isinstance(answer, Response)
        engine.actor.undelivered(answer)
        await settle()
        view = await engine.yes(Get(id="a"))
        assert (view.status, view.attempt) == ("queued", 0)
        assert [event.type for event in engine.disk.events] == ["created", "granted", "undelivered"]
        again = await engine.actor.ask(Start(id="a", worker="w"))
        engine.actor.undelivered(answer)  # an old answer ends no newer grant
        await settle()
        assert isinstance(again, Response)
        assert engine.book.holds("a", again.data.lock_id)


@in_virtual_time
async def test_a_caller_that_leaves_before_the_batch_gets_no_grant() -> None:
    engine = VirtualEngine()
    await asyncio.sleep(0)
    created = start_task(engine.actor.ask(Create(id="a")))
    gone = start_task(engine.actor.ask(Start(id="a", worker="w")))
    await settle()
    gone.cancel()
    await settle()
    async with engine:
        await created
        await settle()
        assert [event.type for event in engine.disk.events] == ["created"]


@in_virtual_time
async def test_the_grant_of_a_caller_that_leaves_during_the_commit_is_released() -> None:
    for name in (None, key("k")):
        async with checked_engine() as engine:
            await engine.yes(Create(id="a"))
            engine.disk.gate.clear()
            gone = start_task(engine.actor.ask(Claim(worker="w"), key=name))
            await engine.disk.at_gate.wait()
            gone.cancel()
            await settle()
            engine.disk.gate.set()
            await settle()
            assert [event.type for event in engine.disk.events] == ["created", "granted", "undelivered"]
            assert engine.disk.keys == {}


@in_virtual_time
async def test_the_grant_of_a_caller_that_leaves_after_the_commit_is_released() -> None:
    """The response is set, but the waiting task is cancelled before it reads it."""
    async with checked_engine() as engine:
        await engine.yes(Create(id="a"))
        gone = start_task(engine.actor.ask(Start(id="a", worker="w")))

        def hang_up(changes: Sequence[Change]) -> None:
            gone.cancel()

        engine.actor.on_commit.append(hang_up)
        with pytest.raises(asyncio.CancelledError):
            await gone
        engine.actor.on_commit.pop()
        await settle()
        assert engine.book.totals == {"queued": 1, "processing": 0, "completed": 0, "failed": 0, "cancelled": 0}


@in_virtual_time
async def test_a_keyed_grant_stays_while_one_connection_received_it() -> None:
    async with checked_engine() as engine:
        await engine.yes(Create(id="a"))
        start = Start(id="a", worker="w")
        first = await engine.actor.ask(start, key=key("k"))
        second = await engine.actor.ask(start, key=key("k"))
        assert isinstance(first, Response)
        assert isinstance(second, Response)
        engine.actor.undelivered(first)
        await settle()
        assert engine.book.totals["processing"] == 1
        engine.actor.undelivered(second)
        await settle()
        assert engine.book.totals["queued"] == 1
        assert engine.disk.keys == {}
        # The stored response was deleted in the same transaction as the grant.
        assert engine.disk.batches[-1].forget_keys == ["k"]


@in_virtual_time
async def test_a_repeat_before_the_release_keeps_the_grant() -> None:
    async with checked_engine() as engine:
        await engine.yes(Create(id="a"))
        start = Start(id="a", worker="w")
        first = await engine.actor.ask(start, key=key("k"))
        repeat = start_task(engine.actor.ask(start, key=key("k")))
        await asyncio.sleep(0)  # the release is in the mailbox
        assert isinstance(first, Response)
        engine.actor.undelivered(first)
        again = await repeat
        await settle()
        assert again.replayed
        assert engine.book.holds("a", again.data.lock_id)


@in_virtual_time
async def test_an_abandoned_repeat_does_not_release_the_grant() -> None:
    async with checked_engine() as engine:
        await engine.yes(Create(id="a"))
        start = Start(id="a", worker="w")
        engine.disk.gate.clear()
        first = start_task(engine.actor.ask(start, key=key("k")))
        await engine.disk.at_gate.wait()
        repeat = start_task(engine.actor.ask(start, key=key("k")))
        await settle()
        repeat.cancel()
        await settle()
        engine.disk.gate.set()
        answer = await first
        await settle()
        assert engine.book.holds("a", answer.data.lock_id)
        engine.actor.undelivered(answer)
        await settle()
        assert engine.book.totals["queued"] == 1


@in_virtual_time
async def test_a_grant_that_an_earlier_daemon_may_have_sent_is_not_released() -> None:
    """Found by simulation, seed 22611: a power cut after delivery, then an abandoned repeat under the key."""
    disk, start = MemoryStorage(), Start(id="a", worker="w")
    async with VirtualEngine(disk) as engine:
        await engine.yes(Create(id="a"))
        first = await engine.yes(start, key=key("k"))
    async with VirtualEngine(disk) as engine:
        again = await engine.actor.ask(start, key=key("k"))
        assert isinstance(again, Response)
        assert again.replayed
        engine.actor.undelivered(again)
        await settle()
        assert engine.book.holds("a", first.lock_id)
        await engine.yes(Complete(id="a", lock_id=first.lock_id))


# -- a full disk ------------------------------------------------------------------------------------------------------


def closed_level(engine: VirtualEngine) -> str:
    return engine.actor.full_disk.closed.name


@in_virtual_time
async def test_a_full_disk_first_rejects_only_creates() -> None:
    async with checked_engine() as engine:
        lock_id = await engine.held("a")
        engine.disk.fill_nearly()
        tasks = ask_all(engine, [Create(id="b"), Progress(id="a", lock_id=lock_id, progress=5), Bulk(jobs=[Create()])])
        created, reported, bulk = [await task for task in tasks]
        assert (created.code, created.status, bulk.code) == ("storage_full", 507, "storage_full")
        assert isinstance(reported, Response)
        assert closed_level(engine) == "CREATES"
        assert not engine.clock.held
        assert (await engine.no(Import(id="c"))).code == "storage_full"
        await engine.yes(Get(id="a"))
        writes = engine.disk.calls["write"]
        await engine.no(Create())
        assert engine.disk.calls["write"] == writes  # rejected before it is decided


@in_virtual_time
async def test_a_probe_each_second_finds_free_space() -> None:
    async with checked_engine() as engine:
        engine.disk.fits = lambda batch: False
        assert (await engine.no(Create(id="a"))).code == "storage_full"
        assert closed_level(engine) == "CREATES"
        probes = engine.disk.calls.get("probe", 0)
        await asyncio.sleep(3.5)
        assert engine.disk.calls["probe"] == probes + 3
        assert closed_level(engine) == "CREATES"
        engine.disk.free()
        await asyncio.sleep(1)
        assert closed_level(engine) == "NOTHING"
        assert (await engine.yes(Create(id="a"))).id == "a"
        probes = engine.disk.calls["probe"]
        await asyncio.sleep(10)
        assert engine.disk.calls["probe"] == probes


@in_virtual_time
async def test_then_the_reserve_file_is_released_and_only_endings_are_accepted() -> None:
    async with checked_engine() as engine:
        ending, signing = await engine.held("a"), await engine.held("b")
        engine.disk.fill()
        tasks = ask_all(engine, [
            Complete(id="a", lock_id=ending), Progress(id="b", lock_id=signing, progress=5), Create(), Tick(),
            Claim(worker="w", wait_ms=1_000), Get(id="b"), Pause(name="q"),
        ])  # fmt: skip
        answers = [await task for task in tasks]
        assert [answer.status for answer in answers] == [200, 507, 507, 507, 507, 200, 507]
        assert closed_level(engine) == "ALL_BUT_ENDINGS"
        assert not engine.disk.has_ballast
        assert engine.clock.held
        engine.disk.has_spare = False
        lease = engine.clock.moment().lease
        await asyncio.sleep(3.5)
        assert engine.clock.moment().lease == lease  # no heartbeat is accepted, so no lock ages
        assert closed_level(engine) == "ALL_BUT_ENDINGS"
        assert not engine.disk.has_ballast
        engine.disk.free()
        await asyncio.sleep(1)
        assert closed_level(engine) == "NOTHING"
        assert engine.disk.has_ballast
        assert not engine.clock.held
        await engine.yes(Progress(id="b", lock_id=signing, progress=5))


@in_virtual_time
async def test_at_worst_every_write_is_rejected_and_reads_continue() -> None:
    async with checked_engine() as engine:
        lock_id = await engine.held("a")
        engine.disk.fits = lambda batch: False
        tasks = ask_all(engine, [Complete(id="a", lock_id=lock_id), Get(id="a"), Stats(), Timeline(id="a"), ListJobs()])
        answers = [await task for task in tasks]
        assert [answer.status for answer in answers] == [507, 200, 200, 200, 200]
        assert answers[1].data.status == "processing"
        assert closed_level(engine) == "ALL_WRITES"
        assert (await engine.no(Delete(id="a"))).code == "storage_full"
        engine.disk.free()
        await asyncio.sleep(1)
        assert (await engine.yes(Complete(id="a", lock_id=lock_id))).status == "completed"


@pytest.mark.parametrize("error", [DiskFull("no room for 16 MiB"), OSError("the file cannot be made")])
def test_writes_are_accepted_without_space_for_the_reserve_file(error: Exception) -> None:
    @in_virtual_time
    async def test() -> None:
        async with checked_engine() as engine:
            lock_id = await engine.held("a")
            engine.disk.fill()
            await engine.no(Progress(id="a", lock_id=lock_id, progress=1))
            assert engine.actor.full_disk.has_reserve  # its space is there for endings
            engine.disk.errors["build_reserve"] = error
            with capture_logs() as lines:
                await asyncio.sleep(1.1)
                assert closed_level(engine) == "NOTHING"
                assert not engine.clock.held
                await engine.yes(Create())
                await asyncio.sleep(5)
            assert closed_level(engine) == "NOTHING"
            assert not engine.actor.full_disk.has_reserve
            told = ["disk_has_room"] + ["reserve_file_not_rebuilt"] * isinstance(error, OSError)
            assert [line["event"] for line in lines] == told
            engine.disk.free()
            del engine.disk.errors["build_reserve"]
            await asyncio.sleep(1.1)
            assert engine.disk.has_ballast
            assert engine.actor.full_disk.has_reserve
            tries = engine.disk.calls["build_reserve"]
            await asyncio.sleep(5)
            assert engine.disk.calls["build_reserve"] == tries

    test()


@in_virtual_time
async def test_writes_are_accepted_only_with_spare_space() -> None:
    async with checked_engine() as engine:
        engine.disk.fits = lambda batch: False
        await engine.no(Create())
        engine.disk.free()
        engine.disk.has_spare = False
        await asyncio.sleep(3)
        assert closed_level(engine) == "CREATES"
        engine.disk.has_spare = True
        await asyncio.sleep(1.1)
        assert closed_level(engine) == "NOTHING"


@in_virtual_time
async def test_endings_are_accepted_before_there_is_spare_space() -> None:
    async with checked_engine() as engine:
        lock_id = await engine.held("a")
        engine.disk.fits = lambda batch: False
        await engine.no(Complete(id="a", lock_id=lock_id))
        assert closed_level(engine) == "ALL_WRITES"
        engine.disk.free()
        engine.disk.has_spare = False
        await asyncio.sleep(1.1)
        assert closed_level(engine) == "ALL_BUT_ENDINGS"
        assert engine.clock.held
        assert (await engine.no(Create())).code == "storage_full"
        await engine.yes(Complete(id="a", lock_id=lock_id))


@in_virtual_time
async def test_a_disk_that_stays_full_is_logged_once_per_step() -> None:
    async with checked_engine() as engine:
        lock_id = await engine.held("a")
        engine.disk.fits = lambda batch: False
        with capture_logs() as lines:
            for _ in range(5):
                await engine.no(Complete(id="a", lock_id=lock_id))
                engine.disk.free()
                engine.disk.has_spare = False
                await asyncio.sleep(1.1)  # endings are tried again and do not fit
                engine.disk.fits = lambda batch: False
        assert [line["refused"] for line in lines] == ["creates", "all_but_endings", "all_writes"]
        engine.disk.free()
        with capture_logs() as lines:
            await asyncio.sleep(1.1)
            engine.disk.fits = lambda batch: False
            await engine.no(Complete(id="a", lock_id=lock_id))
        told = ["disk_has_room", "reserve_file_rebuilt", "disk_full", "disk_full", "disk_full"]
        assert [line["event"] for line in lines] == told


@in_virtual_time
async def test_space_that_is_used_up_at_once_ages_no_lock() -> None:
    """Each second the probe succeeds and the next write does not fit. Locks age only while writes are accepted."""
    async with checked_engine() as engine:
        lock_id = await engine.held("a")
        engine.disk.fits = lambda batch: False
        await engine.no(Complete(id="a", lock_id=lock_id))
        began = engine.clock.moment().lease
        for _ in range(60):
            engine.disk.free()
            await asyncio.sleep(1.1)
            assert closed_level(engine) == "NOTHING"
            engine.disk.fits = lambda batch: False
            await engine.no(Complete(id="a", lock_id=lock_id))
            assert engine.clock.held
        assert engine.clock.moment().lease - began < 60 * 150  # of 66 s
        engine.disk.free()
        await asyncio.sleep(1.1)
        await engine.yes(Complete(id="a", lock_id=lock_id))


@in_virtual_time
async def test_the_error_contains_path_and_free_bytes() -> None:
    async with checked_engine() as engine:
        lock_id = await engine.held("a")
        engine.disk.fits = lambda batch: False
        engine.disk.disk_space = DiskSpace("/disk/jobd.db", 4096, 20 << 20)
        no = await engine.no(Create())
        assert no.message.startswith("The disk of the store is full (4096 bytes free at /disk/jobd.db); nothing was ")
        assert no.details == {"path": "/disk/jobd.db", "free_bytes": 4096, "total_bytes": 20 << 20}
        engine.disk.disk_space = DiskSpace("/disk/jobd.db", 512, 20 << 20)
        await asyncio.sleep(1.1)
        assert "(512 bytes free at" in (await engine.no(Create())).message
        engine.disk.has_ballast = False  # deleted by hand
        message = (await engine.no(Complete(id="a", lock_id=lock_id))).message
        assert "the reserve file is missing, so endings may not fit either" in message
        engine.disk.disk_space = None
        await asyncio.sleep(1.1)
        no = await engine.no(Create())
        assert no.message.startswith("The disk of the store is full, and the reserve file is missing")
        assert no.details == {}


@in_virtual_time
async def test_a_start_on_a_full_disk() -> None:
    disk = await finished_disk()
    disk.fits = lambda batch: False
    async with checked_engine(disk) as engine:
        assert closed_level(engine) == "CREATES"
        assert (await engine.no(Create())).code == "storage_full"
        assert disk.calls.get("write", 0) == 3  # none since
        await engine.yes(Get(id="done"))


@in_virtual_time
async def test_a_rejected_batch_has_no_effect() -> None:
    async with checked_engine() as engine:
        lock_id = await engine.held("a")
        await engine.yes(Create(id="b"))
        token = (await engine.yes(Start(id="b", worker="w"))).fencing_token
        await engine.yes(Complete(id="b", lock_id=engine.book.jobs["b"].grant.lock_id))  # type: ignore[union-attr]
        await engine.yes(Pause(name="paused", reason="deploy"))
        before = dict(engine.book.paused)
        keys = dict(engine.disk.keys)
        engine.disk.fits = lambda batch: False
        tasks = ask_all(engine, [
            Create(id="c"), Import(id="d", status="failed", error_message="e"), Delete(id="b"), Create(id="b"),
            Release(id="a", lock_id=lock_id), Start(id="a", worker="w"), Pause(name="q"), Resume(name="paused"),
            Pause(name="paused", reason="again"),
        ])  # fmt: skip
        keyed = start_task(engine.actor.ask(Claim(worker="w"), key=key("k")))
        assert {(await task).code for task in tasks} == {"storage_full"}
        assert (await keyed).code == "storage_full"
        assert_consistent(engine)
        assert engine.disk.keys == keys
        assert (engine.book.paused, engine.book.suspects) == (before, {})
        assert engine.book.holds("a", lock_id)
        engine.disk.free()
        await asyncio.sleep(1)
        await engine.yes(Release(id="a", lock_id=lock_id))
        assert (await engine.yes(Start(id="a", worker="w"))).fencing_token > token + 1  # assigned tokens are not reused


class TokenRecordingStorage(MemoryStorage):
    """Records every fencing token that it was asked to write, also in batches that it rejects."""

    def __init__(self, numbers: Numbers | None = None) -> None:
        super().__init__(numbers)
        self.tokens: list[int] = []

    async def write(self, batch: Batch) -> dict[int, bytes]:
        grants = [change.after.grant for change in batch.changes if change.after and change.event.type == "granted"]
        self.tokens += [grant.fencing_token for grant in grants if grant is not None]
        return await super().write(batch)


@in_virtual_time
async def test_a_token_of_a_rejected_batch_is_never_issued_again() -> None:
    disk = TokenRecordingStorage()
    async with checked_engine(disk) as engine:
        await engine.yes(Bulk(jobs=[Create(id=f"job-{number}") for number in range(4)]))
        disk.write_errors.append(DiskFull("full"))
        answers = [
            await task for task in ask_all(engine, [Start(id=f"job-{number}", worker="w") for number in range(3)])
        ]
        last = await engine.yes(Start(id="job-3", worker="w"))
        assert len(disk.tokens) == 7
        assert disk.tokens == sorted(set(disk.tokens))
        assert [answer.data.fencing_token for answer in answers] == disk.tokens[3:6]
        assert disk.numbers.next_token == last.fencing_token - (1 << TOKEN_COUNTER_BITS) + 1


@in_virtual_time
async def test_a_full_counter_begins_the_next_epoch_within_a_batch() -> None:
    disk = TokenRecordingStorage(Numbers(epoch=5, next_token=COUNTER_MASK))
    async with checked_engine(disk) as engine:
        await engine.yes(Bulk(jobs=[Create(id=f"job-{number}") for number in range(4)]))
        epoch = new_epoch(5, engine.now)
        disk.write_errors.append(DiskFull("full"))  # its tokens are not used again either
        answers = [
            await task for task in ask_all(engine, [Start(id=f"job-{number}", worker="w") for number in range(3)])
        ]
        expected = [5 << TOKEN_COUNTER_BITS | COUNTER_MASK, *((epoch << TOKEN_COUNTER_BITS) + n for n in range(1, 6))]
        assert disk.tokens == expected
        assert [answer.data.fencing_token for answer in answers] == expected[3:]
        assert (disk.numbers.epoch, disk.numbers.next_token) == (epoch, 6)


@in_virtual_time
async def test_a_keyed_start_of_a_rejected_batch_is_decided_again() -> None:
    async with checked_engine() as engine:
        await engine.yes(Create(id="a"))
        engine.disk.write_errors.append(DiskFull("once"))
        answer = await engine.actor.ask(Start(id="a", worker="w"), key=key("k"))
        assert isinstance(answer, Response)
        assert not answer.replayed
        engine.actor.undelivered(answer)
        await settle()
        assert engine.book.totals["queued"] == 1  # counted once, so one lost connection is enough


@in_virtual_time
async def test_a_repeat_in_a_rejected_batch_counts_as_one_connection() -> None:
    async with checked_engine() as engine:
        await engine.yes(Create(id="a"))
        start = Start(id="a", worker="w")
        first = await engine.actor.ask(start, key=key("k"))
        engine.disk.gate.clear()
        slow = start_task(engine.actor.ask(Tick()))
        await engine.disk.at_gate.wait()
        engine.disk.write_errors += [None, DiskFull("once")]
        repeat = start_task(engine.actor.ask(start, key=key("k")))
        await settle()
        tick = start_task(engine.actor.ask(Tick()))
        await settle()
        engine.disk.gate.set()
        await slow
        second = await repeat
        assert second.replayed
        await tick
        engine.actor.undelivered(second)
        await settle()
        assert engine.book.totals["processing"] == 1
        assert isinstance(first, Response)
        engine.actor.undelivered(first)
        await settle()
        assert engine.book.totals["queued"] == 1


@in_virtual_time
async def test_a_repeat_on_a_full_disk_gets_its_response() -> None:
    """An error would tell the client that the request was not executed."""
    async with checked_engine() as engine:
        await engine.yes(Create(id="a"), key=key("create"))
        await engine.yes(Start(id="a", worker="w"), key=key("start"))
        engine.disk.fits = lambda batch: False
        await engine.no(Complete(id="a", lock_id=engine.book.jobs["a"].grant.lock_id))  # type: ignore[union-attr]
        assert closed_level(engine) == "ALL_WRITES"
        for command, name in ((Create(id="a"), "create"), (Start(id="a", worker="w"), "start")):
            again = await engine.actor.ask(command, key=key(name))
            assert isinstance(again, Response)
            assert again.replayed
        assert (await engine.no(Create(id="b"), key=key("new"))).code == "storage_full"


@in_virtual_time
async def test_a_rejected_batch_can_reuse_an_id_in_another_queue() -> None:
    """The counts of both queues are right after the rollback."""
    again = Import(id="a", queue="y", status="completed"), Import(id="a", queue="y", status="cancelled")
    for command in (Create(id="a", queue="y"), *again):
        async with checked_engine() as engine:
            await engine.yes(Create(id="a", queue="x"))
            await engine.yes(Cancel(id="a"))
            engine.disk.write_errors.append(DiskFull("once"))
            deleted, made = ask_all(engine, [Delete(id="a"), command])
            assert isinstance(await deleted, Response)
            assert isinstance(await made, ApiError)
            assert_consistent(engine)
            await asyncio.sleep(1)
            await engine.yes(Create(queue="x"))
            assert engine.disk.queues["x"] == QueueRow()


@in_virtual_time
async def test_waiting_claims_keep_their_order_after_a_rejected_batch() -> None:
    async with checked_engine() as engine:
        first, second = await waiting_claim(engine, "first"), await waiting_claim(engine, "second")
        engine.disk.write_errors.append(DiskFull("once"))
        await engine.no(Create(id="a"))
        assert len(engine.actor.parked) == 2
        await asyncio.sleep(1)
        await engine.yes(Create(id="b"))
        assert granted_ids(await first) == ["b"]
        await engine.yes(Create(id="c"))
        assert granted_ids(await second) == ["c"]


@in_virtual_time
async def test_a_claim_of_a_rejected_batch_waits_once() -> None:
    engine = VirtualEngine()
    engine.disk.write_errors.append(DiskFull("once"))
    claim = Claim(worker="w", wait_ms=30_000)
    tasks = [start_task(engine.actor.ask(claim, key=key("k"))) for _ in range(2)]
    tasks += ask_all(engine, [Tick()])
    async with engine:
        assert isinstance(await tasks[2], Response)
        assert len(engine.actor.parked) == 1
        await asyncio.sleep(1)
        await engine.yes(Create(id="a"))
        assert [granted_ids(await task) for task in tasks[:2]] == [["a"], ["a"]]
        await settle()
        assert engine.book.totals["processing"] == 1
        assert_consistent(engine)


@in_virtual_time
async def test_a_claim_that_waited_and_was_served_in_a_rejected_batch_is_decided_again() -> None:
    async with checked_engine() as engine:
        await engine.yes(Create(id="a", delay_ms=DAY_MS))
        engine.disk.gate.clear()
        slow = start_task(engine.actor.ask(Tick()))
        await engine.disk.at_gate.wait()
        engine.disk.write_errors += [None, DiskFull("once")]
        tasks = ask_all(engine, [Claim(worker="w", wait_ms=30_000), RunNow(id="a")])
        await settle()
        engine.disk.gate.set()
        assert granted_ids(await tasks[0]) == ["a"]
        assert isinstance(await tasks[1], Response)
        await slow
        assert closed_level(engine) == "CREATES"
        assert [event.type for event in engine.disk.events] == ["created", "updated", "granted"]


@in_virtual_time
async def test_a_waiting_claim_gets_a_due_job_after_its_batch_was_rejected() -> None:
    """The claim must not keep waiting next to a due job."""
    async with checked_engine() as engine:
        await engine.yes(Create(id="a", delay_ms=2_000))
        waiting = await waiting_claim(engine, "w")
        engine.disk.write_errors.append(DiskFull("once"))
        begun = engine.now
        assert granted_ids(await waiting) == ["a"]
        assert engine.now == begun + 2_000


@in_virtual_time
async def test_jobs_that_became_due_on_a_full_disk_are_granted_when_there_is_space() -> None:
    async with checked_engine() as engine:
        await engine.yes(Create(id="a", delay_ms=2_000))
        waiting = await waiting_claim(engine, "w")
        engine.disk.fill()
        engine.disk.has_spare = False
        await engine.no(Tick())
        assert closed_level(engine) == "ALL_BUT_ENDINGS"
        await asyncio.sleep(5)
        assert not waiting.done()
        engine.disk.free()
        await asyncio.sleep(1.1)
        assert waiting.done()
        assert granted_ids(await waiting) == ["a"]


@in_virtual_time
async def test_the_release_of_an_undelivered_grant_survives_a_full_disk() -> None:
    """A release frees no space, but it ends a grant, so it is accepted once the reserve file is released."""
    async with checked_engine() as engine:
        await engine.yes(Create(id="a"))
        answer = await engine.actor.ask(Start(id="a", worker="w"))
        assert isinstance(answer, Response)
        engine.disk.fill()
        engine.actor.undelivered(answer)
        await settle()
        assert engine.book.totals["queued"] == 1


@in_virtual_time
async def test_pending_internal_commands_run_first_when_there_is_space() -> None:
    """After a restore, no lock is valid until its grants are ended."""
    async with checked_engine() as engine:
        lock_id = await engine.held("a")
        engine.disk.fits = lambda batch: False
        engine.actor.owe(EndGrants(ids=["a"], last=True))
        await settle()
        assert closed_level(engine) == "ALL_WRITES"
        assert (await engine.no(Complete(id="a", lock_id=lock_id))).code == "storage_full"
        assert engine.clock.held
        engine.disk.free()
        ending = start_task(engine.actor.ask(Complete(id="a", lock_id=lock_id)))
        assert (await ending).code == "storage_full"
        await asyncio.sleep(1.1)
        assert engine.book.totals["queued"] == 1
        late = await engine.no(Complete(id="a", lock_id=lock_id))
        assert (late.code, late.details["rule"]) == ("lock_lost", "restore")


@in_virtual_time
async def test_the_extension_after_a_pause_survives_a_full_disk() -> None:
    async with checked_engine() as engine:
        await engine.held("a")
        engine.disk.fits = lambda batch: False
        engine.actor.owe(ExtendAfterPause(ids=["a"], grace_ms=30 * MINUTE_MS))
        await asyncio.sleep(20)  # lease time stands still meanwhile
        engine.disk.free()
        await asyncio.sleep(1.1)
        lease = engine.book.jobs["a"].lease
        assert lease is not None
        assert lease.expires >= engine.clock.moment().lease + 30 * MINUTE_MS - 2_000


@in_virtual_time
async def test_an_undelivered_grant_is_released_when_there_is_space() -> None:
    async with checked_engine() as engine:
        await engine.yes(Create(id="a"))
        answer = await engine.actor.ask(Start(id="a", worker="w"))
        assert isinstance(answer, Response)
        engine.disk.fits = lambda batch: False
        engine.actor.undelivered(answer)
        await settle()
        assert engine.book.totals["processing"] == 1
        engine.disk.free()
        await asyncio.sleep(1.1)
        assert engine.book.totals["queued"] == 1


@in_virtual_time
async def test_a_store_without_space_for_its_reserve_file_opens() -> None:
    async with checked_engine() as engine:
        engine.disk.errors["build_reserve"] = DiskFull("too small")
        engine.disk.has_ballast = False
        engine.disk.fits = lambda batch: False
        await engine.no(Tick())
        assert closed_level(engine) == "ALL_BUT_ENDINGS"
        engine.disk.free()
        await asyncio.sleep(1.1)
        assert closed_level(engine) == "NOTHING"
        assert not engine.clock.held


@in_virtual_time
async def test_keys_do_not_expire_by_a_suspect_clock() -> None:
    async with checked_engine() as engine:
        first = await engine.actor.ask(Create(), key=key("k"))
        engine.step_ms = 40 * DAY_MS
        again = await engine.actor.ask(Create(), key=key("k"))
        assert isinstance(first, Response)
        assert isinstance(again, Response)
        assert again.replayed
        engine.clock.accept()
        anew = await engine.actor.ask(Create(), key=key("k"))
        assert isinstance(anew, Response)
        assert not anew.replayed


@in_virtual_time
async def test_a_failed_commit_outside_the_actor_ends_it() -> None:
    engine = VirtualEngine()
    running = start_task(engine.actor.run())
    await engine.yes(Create(id="a"))
    engine.actor.lose_disk(OSError("EIO"))
    await broken(engine, running)


class RaisingResponder:
    """A responder that raises."""

    def __init__(self) -> None:
        self._is_over = False

    def done(self) -> bool:
        return self._is_over

    def cancelled(self) -> bool:
        return False

    def set_result(self, _: Response | ApiError) -> None:
        self._is_over = True
        raise ValueError("canary")


class PreparingResponder:
    """A responder that prepares its response. `heard` is what it was given, in order."""

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


class CachingStorage(MemoryStorage):
    """Has cached payloads."""

    def __init__(self, *job_seqs: int) -> None:
        super().__init__()
        self._job_seqs = job_seqs

    def cached_payloads(self, job_seqs: list[int]) -> dict[int, bytes]:
        return {seq: b"1" for seq in job_seqs if seq in self._job_seqs}


@in_virtual_time
async def test_responses_are_prepared_while_the_disk_writes() -> None:
    """Only if all their payloads are known before the commit."""
    disk = CachingStorage(1)
    async with checked_engine(disk) as engine:
        await engine.yes(Create(id="a", payload=Raw(b"1")))
        await engine.yes(Create(id="b", payload=Raw(b"2")))
        for job_id, ready in (("a", True), ("b", False)):
            waiter = PreparingResponder()
            disk.gate.clear()
            assert isinstance(engine.actor.send(Start(id=job_id, worker="w"), waiter), Envelope)
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
async def test_a_response_is_not_sent_if_its_commit_fails() -> None:
    disk = MemoryStorage()
    async with checked_engine(disk) as engine:
        waiter = PreparingResponder()
        disk.write_errors.append(DiskFull("full"))
        assert isinstance(engine.actor.send(Create(id="a"), waiter), Envelope)
        await settle()
        (_, ready), (_, told) = waiter.heard
        assert isinstance(ready, Response)
        assert isinstance(told, ApiError)
        assert told.code == "storage_full"


@in_virtual_time
async def test_reads_are_not_prepared() -> None:
    async with checked_engine(MemoryStorage()) as engine:
        await engine.yes(Create(id="a"))
        for look in (Get(id="a"), Timeline(id="a")):
            waiter = PreparingResponder()
            engine.actor.send(look, waiter)
            await settle()
            assert [what for what, _ in waiter.heard] == ["told"]
        waiter = PreparingResponder()
        engine.actor.send(Create(id="b"), PreparingResponder())
        engine.actor.send(Timeline(id="a"), waiter)
        await settle()
        assert [what for what, _ in waiter.heard] == ["told"]


@pytest.mark.parametrize("others", [0, 1])
def test_a_bug_while_responses_are_sent_ends_the_actor(others: int) -> None:
    """Also if they are sent while the next batch is written; otherwise later commands would wait forever."""

    @in_virtual_time
    async def run() -> None:
        engine = VirtualEngine()
        running = start_task(engine.actor.run())
        engine.disk.gate.clear()
        engine.actor.send(Create(id="a"), RaisingResponder())
        await engine.disk.at_gate.wait()
        asked = ask_all(engine, [Create(id="b")] * others)
        await settle()
        engine.disk.gate.set()
        with pytest.raises(DiskBroken, match="canary"):
            await running
        await asyncio.gather(*asked)  # no command waits forever

    run()


# -- a slow disk ------------------------------------------------------------------------------------------------------

COMMIT_S = 0.02


class SlowStorage(MemoryStorage):
    """Each commit takes 20 ms in the thread that also reads pages. `written`: the number of changes in each."""

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
def test_few_waiting_commands_join_the_next_commit(waiting: int, written: list[int]) -> None:
    """Clients that got a response send their next command at once; with them the commit holds more."""

    @in_virtual_time
    async def creating() -> None:
        disk = SlowStorage()
        async with checked_engine(disk) as engine:

            async def create(times: int) -> None:
                for _ in range(times):
                    await engine.yes(Create())

            first = [start_task(create(2)) for _ in range(3)]
            await asyncio.sleep(COMMIT_S / 2)
            await asyncio.gather(*first, *(start_task(create(1)) for _ in range(waiting)))
            assert disk.written == written

    creating()


class BusyEngine:
    """A commit is in progress; a cancel of job "a" waits behind it, and then the command under test."""

    def __init__(self, engine: VirtualEngine) -> None:
        self.engine = engine
        self.began_s = 0.0
        self.behind: asyncio.Task[Any]

    async def begin(self) -> None:
        await self.engine.actor.ask(Create(id="a"))
        self.began_s = asyncio.get_running_loop().time()
        start_task(self.engine.actor.ask(Create(id="b")))
        await settle()
        self.behind = start_task(self.engine.actor.ask(Cancel(id="a")))
        await settle()

    async def ask(self, command: AnyCommand) -> tuple[Any, int]:
        """Return the response and the number of commits until it came."""
        answer = await self.engine.actor.ask(command)
        return answer, round((asyncio.get_running_loop().time() - self.began_s) / COMMIT_S)


@pytest.mark.parametrize("look", [Get(id="a"), GetVersion(id="a"), ListJobs(), Stats(), Why(id="a"), Get(id="none")])
def test_on_a_slow_disk_a_read_waits_for_one_commit(look: AnyCommand) -> None:
    @in_virtual_time
    async def test() -> None:
        async with checked_engine(SlowStorage()) as engine:
            busy = BusyEngine(engine)
            await busy.begin()
            answer, commits = await busy.ask(look)
            assert commits == 1
            assert not busy.behind.done()
            if look == Get(id="a"):
                assert answer.data.status == "queued"
            if isinstance(look, Why):
                assert answer.data.state == "queued"
            assert (await busy.behind).data.status == "cancelled"

    test()


@in_virtual_time
async def test_on_a_slow_disk_a_ping_waits_as_long_as_a_write() -> None:
    async with checked_engine(SlowStorage()) as engine:
        busy = BusyEngine(engine)
        await busy.begin()
        assert (await busy.ask(Ping()))[1] == 2, "health measures how long a command takes"


@in_virtual_time
async def test_on_a_fast_disk_a_batch_is_decided_in_order() -> None:
    async with checked_engine() as engine:
        await engine.actor.ask(Create(id="a"))
        cancelling = start_task(engine.actor.ask(Cancel(id="a")))
        looking = start_task(engine.actor.ask(Get(id="a")))
        assert (await looking).data.status == "cancelled"
        await cancelling


@in_virtual_time
async def test_an_ordered_read_stays_behind_earlier_commands() -> None:
    async with checked_engine(SlowStorage()) as engine:
        await engine.actor.ask(Create(id="a"))
        told: list[asyncio.Future[Any]] = [asyncio.get_running_loop().create_future() for _ in range(2)]
        engine.actor.send(Cancel(id="a"), told[0], in_line=True)
        engine.actor.send(Get(id="a"), told[1], in_line=True)
        assert (await told[1]).data.status == "cancelled"


@in_virtual_time
async def test_a_read_does_not_overtake_internal_commands() -> None:
    async with checked_engine(SlowStorage()) as engine:
        await engine.actor.ask(Create(id="a", stuck_after_ms=0))
        await engine.actor.ask(Start(id="a", worker="w", lock_ttl_ms=1_000))
        await asyncio.sleep(10)
        engine.actor.owe(ExtendAfterPause(ids=["a"], grace_ms=30_000))
        stats = await engine.actor.ask(Stats())
        assert isinstance(stats, Response)
        assert stats.data.stuck_jobs == 0


@in_virtual_time
async def test_a_read_does_not_wait_for_grants_to_waiting_claims() -> None:
    async with checked_engine(SlowStorage()) as engine:
        await engine.actor.ask(Create(id="late", queue="q", delay_ms=1_000))
        claim = await waiting_claim(engine, "w", queues=["q"])
        await asyncio.sleep(0.95)
        busy = BusyEngine(engine)
        await busy.begin()  # the job becomes due during this write
        answer, commits = await busy.ask(Get(id="late"))
        assert (answer.data.status, commits) == ("queued", 1)
        assert granted_ids(await claim) == ["late"]


@in_virtual_time
async def test_a_read_is_answered_even_if_the_next_commit_fails() -> None:
    disk = SlowStorage()
    engine = VirtualEngine(disk)
    running = asyncio.create_task(engine.actor.run())
    await engine.actor.ask(Create(id="a"))
    disk.write_errors.append(OSError("gone"))
    cancelling = start_task(engine.actor.ask(Cancel(id="a")))
    looking = start_task(engine.actor.ask(Get(id="a")))
    assert (await looking).data.status == "queued"
    assert (await cancelling).code == "outcome_unknown"
    with pytest.raises(DiskBroken):
        await running


@in_virtual_time
async def test_a_full_disk_after_an_early_read_is_handled_as_usual() -> None:
    async with checked_engine(SlowStorage()) as engine:
        await engine.actor.ask(Create(id="a"))
        engine.disk.fill_nearly()
        creating = start_task(engine.actor.ask(Create(id="b")))
        looking = start_task(engine.actor.ask(Get(id="a")))
        assert (await looking).data.status == "queued"
        assert (await creating).code == "storage_full"
        engine.disk.free()


# -- rows that are bad ------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_damaged_payload_affects_only_its_job() -> None:
    async with checked_engine() as engine:
        await engine.yes(Create(id="a"))
        await engine.yes(Create(id="b"))
        engine.disk.bad_payloads[1] = "checksum"
        tasks = ask_all(engine, [Get(id="a"), Get(id="b"), Create(id="c")])
        bad, good, made = [await task for task in tasks]
        assert (bad.code, bad.details) == ("job_quarantined", {"job_id": "a", "reason": "checksum"})
        assert isinstance(good, Response)
        assert made.status == 201
        assert engine.disk.quarantined == engine.book.quarantined == {"a": "checksum"}
        assert granted_ids(await engine.actor.ask(Claim(worker="w", limit=9))) == ["b", "c"]


@in_virtual_time
async def test_a_damaged_payload_is_not_served_by_a_read() -> None:
    async with checked_engine() as engine:
        await engine.yes(Create(id="a"))
        engine.disk.bad_payloads[1] = "checksum"
        assert (await engine.no(Get(id="a"))).code == "job_quarantined"
        assert granted_ids(await engine.actor.ask(Claim(worker="w"))) == []


@in_virtual_time
async def test_a_damaged_payload_is_not_granted() -> None:
    async with checked_engine() as engine:
        await engine.yes(Create(id="a"))
        await engine.yes(Create(id="b"))
        engine.disk.bad_payloads[1] = "checksum"
        assert granted_ids(await engine.actor.ask(Claim(worker="w"))) == ["b"]


@in_virtual_time
async def test_a_damaged_payload_that_a_decision_needs_quarantines_its_job() -> None:
    async with checked_engine() as engine:
        await engine.yes(Create(id="a"))
        engine.disk.bad_payloads[1] = "checksum"
        assert (await engine.no(Create(id="a"))).code == "job_quarantined"


@in_virtual_time
async def test_a_row_that_is_damaged_while_the_daemon_runs_is_quarantined() -> None:
    async with VirtualEngine(await finished_disk()) as engine:
        engine.disk.bad_jobs["done"] = "checksum"
        assert (await engine.no(Get(id="done"))).code == "job_quarantined"
        assert (await engine.no(Get(id="done"))).code == "job_quarantined"
        assert engine.disk.quarantined == engine.book.quarantined == {"done": "checksum"}
        # A row that could not be moved is found and reported again, but counted and logged once.
        with capture_logs() as lines:
            engine.disk.on_quarantined(Quarantined("done", "checksum, still", is_moved=False))
        assert lines == []
        assert engine.book.quarantined == {"done": "checksum, still"}
        assert engine.book.totals["completed"] == 0


@in_virtual_time
async def test_a_page_skips_damaged_rows() -> None:
    async with checked_engine() as engine:
        for name in "abc":
            await engine.yes(Create(id=name))
        engine.disk.bad_payloads[2] = "checksum"
        assert [job.id for job in (await engine.yes(ListJobs())).jobs] == ["c", "a"]
        assert engine.book.quarantined == {"b": "checksum"}
        assert (await engine.no(Start(id="b", worker="w"))).code == "job_quarantined"


@in_virtual_time
async def test_a_deleted_or_quarantined_job_no_longer_needs_validation() -> None:
    async with checked_engine() as engine:
        for name in "ab":
            await engine.yes(Import(id=name, status="failed", error_message="e"))
        assert set(engine.book.suspects.values()) == {"a", "b"}
        await engine.yes(Delete(id="a"))
        assert engine.book.suspects == engine.disk.suspects == {2: "b"}
        await engine.yes(RepairJobs(ids=["b"]))
        assert engine.book.suspects == engine.disk.suspects == {}


# -- an unknown outcome -----------------------------------------------------------------------------------------------


async def broken(engine: VirtualEngine, running: asyncio.Task[None]) -> None:
    with pytest.raises(DiskBroken):
        await running
    refusal = await engine.actor.ask(Ping())
    assert isinstance(refusal, ApiError)
    assert refusal.code == "shutting_down"


@in_virtual_time
async def test_an_unknown_outcome_is_reported_and_ends_the_actor() -> None:
    engine = VirtualEngine()
    running = start_task(engine.actor.run())
    waiting = await waiting_claim(engine, "w", queues=["other"])
    engine.disk.lost_answers = 1
    engine.disk.gate.clear()
    tasks = ask_all(engine, [Create(id="a"), Get(id="a")])
    await engine.disk.at_gate.wait()
    later = start_task(engine.actor.ask(Create(id="b")))
    await settle()
    engine.disk.gate.set()
    for task in [*tasks, waiting]:
        refusal = await task
        assert (refusal.code, refusal.status, refusal.details) == ("outcome_unknown", 503, {"outcome": "unknown"})
    assert (await later).code == "shutting_down"
    await broken(engine, running)
    assert engine.disk.job("a") is not None  # it was written; a start finds it
    assert engine.disk.job("b") is None


@pytest.mark.parametrize("method", ["write", "load"])
def test_any_disk_error_ends_the_actor(method: str) -> None:
    async def test() -> None:
        engine = VirtualEngine(await finished_disk())
        running = start_task(engine.actor.run())
        engine.disk.errors[method] = OSError("EIO")
        tasks = ask_all(engine, [Get(id="done"), Create(id="a")])
        assert {(await task).code for task in tasks} == {"outcome_unknown"}
        await broken(engine, running)

    in_virtual_time(test)()


@in_virtual_time
async def test_damaged_rows_of_unknown_jobs_end_the_actor() -> None:
    """Nothing could be quarantined, so deciding again would fail forever."""
    engine = VirtualEngine()
    running = start_task(engine.actor.run())
    engine.disk.write_errors.append(BadRows({"seq 7": "the payload is missing"}))
    assert (await engine.no(Create())).code == "outcome_unknown"
    await broken(engine, running)


@in_virtual_time
async def test_damaged_rows_already_in_quarantine_do_no_harm() -> None:
    async with checked_engine() as engine:
        await engine.yes(Create(id="a"))
        engine.disk.bad_jobs["a"] = "checksum"
        engine.disk.write_errors.append(BadRows({"a": "the payload is damaged"}))
        # The rollback reads the row, finds the damage and quarantines it.
        assert (await engine.no(Start(id="a", worker="w"))).code == "job_quarantined"


@in_virtual_time
async def test_a_row_quarantined_by_a_concurrent_read_affects_only_its_command() -> None:
    """Found by simulation, seed 5000: a read of history quarantined the row between decision and write."""
    async with checked_engine() as engine:
        await engine.yes(Create(id="a"))
        await engine.yes(Create(id="b"))
        lock_id = (await engine.yes(Start(id="a", worker="w"))).lock_id
        engine.disk.bad_jobs["a"] = "checksum"
        engine.disk.gate.clear()
        late = start_task(engine.actor.ask(Progress(id="a", lock_id=lock_id, progress=5)))
        await engine.disk.at_gate.wait()
        assert [job.id for job, _ in (await engine.disk.find(JobQuery())).jobs] == ["b"]
        other = start_task(engine.actor.ask(Start(id="b", worker="w")))
        engine.disk.gate.set()
        assert (await late).code == "job_quarantined"
        assert isinstance(await other, Response)
        assert engine.book.totals == {"queued": 0, "processing": 1, "completed": 0, "failed": 0, "cancelled": 0}


class QuarantiningStorage(MemoryStorage):
    """Quarantines the row of `job_id` right before a payload is read or a job is deleted."""

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
def test_a_row_quarantined_while_its_job_is_shown_affects_only_its_command(beside: str) -> None:
    @in_virtual_time
    async def test() -> None:
        async with checked_engine(QuarantiningStorage()) as engine:
            await engine.yes(Create(id="bad"))
            engine.disk.gate.clear()
            slow = start_task(engine.actor.ask(Tick()))
            await engine.disk.at_gate.wait()
            tasks = ask_all(engine, [Get(id="bad"), Create(id="other") if beside == "a change" else Ping()])
            engine.disk.gate.set()
            await slow
            refused, other = [await task for task in tasks]
            assert refused.code == "job_quarantined"
            assert isinstance(other, Response)
            assert engine.book.totals["queued"] == (beside == "a change")

    test()


@in_virtual_time
async def test_a_quarantined_finished_job_is_no_longer_counted() -> None:
    """Also if it was being deleted. The next write has the right count."""
    disk = QuarantiningStorage()
    disk.job_id = "none yet"
    for name in ("bad", "good", "worse"):
        async with VirtualEngine(disk) as engine:
            await engine.yes(Create(id=name))
            await engine.yes(Cancel(id=name))
    async with VirtualEngine(disk) as engine:
        disk.job_id, disk.bad_jobs["worse"] = "bad", "checksum"
        assert (await engine.no(Get(id="worse"))).code == "job_quarantined"
        assert engine.book.totals["cancelled"] == 2
        assert (await engine.no(Delete(id="bad"))).code == "job_quarantined"
        assert engine.book.totals["cancelled"] == 1
        await engine.yes(Create(id="new"))
        await engine.yes(Cancel(id="new"))
        assert disk.queues["default"].cancelled == engine.book.totals["cancelled"] == 2


def assert_counts_match_disk(engine: VirtualEngine) -> None:
    """Check the counts of finished jobs: in memory, in the queue rows, and of the job rows."""
    disk = engine.disk
    for status in ("completed", "failed", "cancelled"):
        rows = sum(job.status == status for job in disk.jobs.values())
        kept = sum(getattr(row, status) for row in disk.queues.values())
        assert engine.book.totals[status] == kept == rows, status


@in_virtual_time
async def test_a_damaged_finished_job_is_uncounted_once_when_its_row_is_moved() -> None:
    async with checked_engine() as engine:
        for name in ("bad", "good"):
            await engine.yes(Create(id=name))
            await engine.yes(Cancel(id=name))
        engine.disk.bad_payloads[1] = "checksum"
        engine.disk.can_move = lambda job: False
        for _ in range(2):
            assert [job.id for job in (await engine.yes(ListJobs())).jobs] == ["good"]
            assert (await engine.no(Get(id="bad"))).code == "job_quarantined"
            assert_counts_match_disk(engine)
        await engine.yes(Create(id="more"))
        await engine.yes(Cancel(id="more"))
        assert_counts_match_disk(engine)
        engine.disk.can_move = lambda job: True
        await engine.yes(ListJobs())
        assert engine.disk.quarantined == {"bad": "checksum"}
        assert engine.book.totals["cancelled"] == 2
        assert_counts_match_disk(engine)
        await engine.yes(Delete(id="more"))
        assert_counts_match_disk(engine)


@pytest.mark.parametrize("damage", ["row", "payload"])
@pytest.mark.parametrize("end", ["written", "taken back", "moved and taken back"])
@pytest.mark.parametrize("what", ["complete", "delete", "reset", "adopt"])
def test_the_counts_of_a_damaged_row_match_the_disk_after_any_batch(what: str, end: str, damage: str) -> None:
    """A read of history finds it after a batch about its job was decided, and the disk is too full to move it."""

    @in_virtual_time
    async def test() -> None:
        async with checked_engine() as engine:
            disk = engine.disk
            await engine.yes(Create(id="a"))
            lock_id = (await engine.yes(Start(id="a", worker="w"))).lock_id
            commands: dict[str, AnyCommand] = {
                "complete": Complete(id="a", lock_id=lock_id, file_path="/x"),
                "delete": Delete(id="a"),
                "reset": ForceReset(id="a"),
                "adopt": Adopt(id="a"),
            }
            if what != "complete":
                await engine.yes(Cancel(id="a"))
                await engine.no(commands["complete"])  # stored as a late result
            disk.gate.clear()
            asked = start_task(engine.actor.ask(commands[what], admin=True))
            await disk.at_gate.wait()
            if damage == "row":
                disk.bad_jobs["a"] = "checksum"
            else:
                disk.bad_payloads[1] = "checksum"
            disk.can_move = lambda job: False
            assert (await disk.find(JobQuery())).jobs == []
            assert list(engine.book.quarantined) == ["a"]
            if end != "written":
                disk.fits = lambda batch: False
            if end == "moved and taken back":
                disk.can_move = lambda job: True
            disk.gate.set()
            await asked
            assert_counts_match_disk(engine)
            disk.free()
            await seconds(3)
            disk.can_move = lambda job: True
            await disk.find(JobQuery())
            await engine.yes(Create(id="b"))
            await engine.yes(Cancel(id="b"))
            assert_counts_match_disk(engine)
            assert engine.book.totals["queued"] == engine.book.totals["processing"] == 0

    test()


class CountingStorage(MemoryStorage):
    """Records how many jobs each read of late results names."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    async def late(self, asked: list[LateResultQuery]) -> LateResultRows:
        self.asked.append(len(asked))
        return await super().late(asked)


@in_virtual_time
async def test_late_completes_weigh_as_much_as_their_journal_reads() -> None:
    """A thousand of them would delay a batch by 165 ms."""
    disk = CountingStorage()
    async with checked_engine(disk) as engine:
        locks: dict[str, str] = {}
        for number in range(100):
            name = f"job-{number}"
            await engine.yes(Create(id=name))
            locks[name] = (await engine.yes(Start(id=name, worker="w"))).lock_id
            await engine.yes(ForceReset(id=name))
            await engine.yes(Start(id=name, worker="w"))
        tasks = ask_all(engine, [Complete(id=name, lock_id=lock_id, file_path="/f") for name, lock_id in locks.items()])
        answers = [await task for task in tasks]
        assert all(answer.code == "lock_lost" and "late_result" in answer.details for answer in answers)
        assert disk.asked == [20] * 5


@in_virtual_time
async def test_a_missing_payload_without_a_reason_ends_the_actor() -> None:
    engine = VirtualEngine()
    running = start_task(engine.actor.run())
    await engine.yes(Create(id="a"))
    engine.disk.payloads.clear()
    assert (await engine.no(Get(id="a"))).code == "outcome_unknown"
    await broken(engine, running)


@in_virtual_time
async def test_a_failing_probe_ends_the_actor() -> None:
    engine = VirtualEngine()
    running = start_task(engine.actor.run())
    engine.disk.fits = lambda batch: False
    assert (await engine.no(Create())).code == "storage_full"
    engine.disk.errors["probe"] = OSError("EIO")
    await broken(engine, running)


@in_virtual_time
async def test_a_reserve_file_that_cannot_be_dropped_ends_the_actor() -> None:
    engine = VirtualEngine()
    running = start_task(engine.actor.run())
    engine.disk.errors["drop_reserve"] = OSError("EIO")
    engine.disk.fits = lambda batch: False
    assert (await engine.no(Tick())).code == "outcome_unknown"
    await broken(engine, running)


# -- small parts ------------------------------------------------------------------------------------------------------


def test_bad_rows_name_their_jobs() -> None:
    assert BadRows({"a": "checksum"}).jobs == {"a": "checksum"}


def test_the_claim_that_waits_longest_is_found() -> None:
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
        lot.add(first)  # its batch was rejected: it has its old place again
        assert lot.first("default", "k") is first
        assert list(lot.take_late(4)) == [second, third]
        assert (len(lot), lot.next_deadline()) == (1, 5)
        assert lot.take_all() == [first]
        assert lot.next_deadline() is None

    in_virtual_time(test)()


# -- late results -----------------------------------------------------------------------------------------------------


async def lose_lock(engine: VirtualEngine, job_id: str = "a", **fields: Any) -> str:
    """Create a job whose worker has lost its lock. Return the lock id."""
    lock_id = await engine.held(job_id, **fields)
    await engine.yes(ForceFail(id=job_id), admin=True)
    return lock_id


def complete(lock_id: str, job_id: str = "a", **fields: Any) -> Complete:
    return Complete(id=job_id, lock_id=lock_id, **({"file_path": "/out"} | fields))


def stored_paths(engine: VirtualEngine, job_id: str = "a") -> list[str | None]:
    """Return the file paths in the stored late results of a job."""
    job = engine.disk.job(job_id)
    assert job is not None
    return [late.result.file_path for late in engine.disk.lates.get(job.seq, ())]


@in_virtual_time
async def test_a_late_result_is_stored_before_its_error_is_sent() -> None:
    async with checked_engine() as engine:
        lock_id = await lose_lock(engine)
        engine.disk.gate.clear()
        asking = start_task(engine.actor.ask(complete(lock_id)))
        await engine.disk.at_gate.wait()
        await settle()
        assert not asking.done()
        engine.disk.gate.set()
        refusal = await asking
        assert refusal.code == "lock_lost"
        assert stored_paths(engine) == ["/out"]


@in_virtual_time
async def test_a_late_result_that_was_not_written_is_forgotten() -> None:
    async with checked_engine() as engine:
        lock_id = await lose_lock(engine)
        version = (await engine.yes(GetVersion(id="a"))).version
        engine.disk.write_errors.append(DiskFull("full"))
        await engine.no(complete(lock_id))
        assert stored_paths(engine) == []
        assert (await engine.yes(GetVersion(id="a"))).version == version
        engine.disk.free()


@in_virtual_time
async def test_late_results_survive_a_restart_and_are_read_on_demand() -> None:
    disk = MemoryStorage()
    async with checked_engine(disk) as engine:
        lock_id = await lose_lock(engine, payload=Raw(b"[9]"))
        await engine.no(complete(lock_id, metadata=Raw(b'{"n": 1}')))
    async with checked_engine(disk) as engine:
        assert engine.book.get("a") is None
        (late,) = (await engine.yes(LateResults(id="a"), admin=True)).late_results
        assert (late.worker, late.file_path, bytes(late.metadata)) == ("w-1", "/out", b'{"n": 1}')
        assert "jobctl adopt a" in (await engine.yes(Why(id="a"))).do[0]
        assert (await engine.yes(Why(id="a"))).because == "It was failed by a client."
        again = await engine.no(complete(lock_id, metadata=Raw(b'{"n": 1}')))
        assert again.details["late_result"] == late.seq
        assert (await engine.no(Adopt(id="a", result=late.seq + 1))).code == "late_result_not_found"
        adopted = await engine.yes(Adopt(id="a", result=late.seq), admin=True, key=key("k"))
        assert (adopted.status, adopted.file_path, adopted.payload) == ("completed", "/out", Raw(b"[9]"))
        repeated = await engine.actor.ask(Adopt(id="a", result=late.seq), admin=True, key=key("k"))
        assert isinstance(repeated, Response)
        assert repeated.replayed
    async with checked_engine(disk) as engine:
        assert (await engine.yes(Get(id="a"))).file_path == "/out"
        assert (await engine.yes(Delete(id="a"), admin=True)).status == "completed"
        assert disk.lates == {}


@in_virtual_time
async def test_the_current_policy_decides_whether_a_late_result_can_be_adopted() -> None:
    async with checked_engine() as engine:
        lock_id = await lose_lock(engine)
        await engine.no(complete(lock_id))

        async def refusal_now() -> Any:
            (late,) = (await engine.yes(LateResults(id="a"), admin=True)).late_results
            return late.refusal

        assert await refusal_now() is None
        engine.actor.policy = Policy(require_download_url=True)
        refusal = await engine.no(Adopt(id="a"), admin=True)
        assert await refusal_now() == ErrorView(refusal.code, refusal.message)
        assert "cannot be adopted" in (await engine.yes(Why(id="a"))).do[0]
        engine.actor.policy = Policy()
        assert await refusal_now() is None
        written = len(engine.disk.batches)
        rehearsed = await engine.yes(Adopt(id="a", dry_run=True), admin=True, key=key("k"))
        assert (rehearsed.status, rehearsed.file_path) == ("completed", "/out")
        assert (len(engine.disk.batches), engine.disk.keys) == (written, {})
        assert (await engine.yes(Get(id="a"))).status == "failed"


@in_virtual_time
async def test_why_shows_the_location_of_a_late_result_on_disk() -> None:
    disk = MemoryStorage()
    async with checked_engine(disk) as engine:
        await engine.no(complete(await lose_lock(engine), download_url="u"))
    async with checked_engine(disk, policy=Policy(require_download_url=True)) as engine:
        assert (await engine.yes(Why(id="a"))).do[0].endswith("To take it: jobctl adopt a")


@in_virtual_time
async def test_repeated_late_completes_are_stored_once() -> None:
    async with checked_engine() as engine:
        lock_id = await lose_lock(engine)
        for _ in range(3):
            tasks = ask_all(engine, [complete(lock_id, metadata=Raw(b"%d" % number)) for number in range(40)])
            answers = [await task for task in tasks]
            assert {answer.code for answer in answers} == {"lock_lost"}
        assert [event.type for event in engine.disk.events].count("late_result") == 1
        assert stored_paths(engine) == ["/out"]
        written = len(engine.disk.batches)
        await engine.no(complete(lock_id))
        await engine.no(complete("never-one"))
        assert len(engine.disk.batches) == written


@in_virtual_time
async def test_a_lock_lost_in_the_same_batch_has_a_late_result() -> None:
    async with checked_engine() as engine:
        lock_id = await engine.held()
        tasks = ask_all(engine, [ForceReset(id="a"), complete(lock_id), complete(lock_id), Adopt(id="a")])
        reset, first, second, adopted = [await task for task in tasks]
        assert isinstance(reset, Response)
        assert first.details["late_result"] == second.details["late_result"]
        assert isinstance(adopted, Response)
        assert adopted.data.status == "completed"
        assert [event.type for event in engine.disk.events][-3:] == ["force_reset", "late_result", "adopted"]


@in_virtual_time
async def test_an_old_grant_is_found_in_the_journal() -> None:
    async with checked_engine() as engine:
        old = await engine.held()
        await engine.yes(ForceReset(id="a"), admin=True)
        await engine.yes(Start(id="a", worker="w-2"))
        await engine.yes(ForceReset(id="a"), admin=True)
        assert "late_result" in (await engine.no(complete(old))).details
        assert stored_paths(engine) == ["/out"]


class RecordingStorage(MemoryStorage):
    """Records the queries for late results."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[LateResultQuery] = []

    async def late(self, asked: list[LateResultQuery]) -> LateResultRows:
        self.asked += asked
        return await super().late(asked)


@in_virtual_time
async def test_a_lock_holder_needs_no_read_and_many_late_completes_need_one() -> None:
    disk = RecordingStorage()
    async with checked_engine(disk) as engine:
        await engine.yes(complete(await engine.held()))
        await engine.no(complete("none", "never created"))
        assert disk.asked == []
        lock_id = await lose_lock(engine, "b")
        tasks = ask_all(engine, [Adopt(id="b"), *(complete(lock_id, "b") for _ in range(9)), Why(id="b")])
        for task in tasks:
            await task
        assert disk.calls["late"] == 1
        assert [(each.lock_id, each.with_results) for each in disk.asked] == [(None, False), (None, True)]


@in_virtual_time
async def test_a_full_disk_stores_no_late_result_and_still_reports_the_lost_lock() -> None:
    """A worker without its lock gets that error at every step of a disk that fills up."""
    async with checked_engine() as engine:
        locks = {name: await lose_lock(engine, name) for name in ("a", "b", "c")}
        engine.disk.write_errors.append(DiskFull("no room for a nicety"))
        refusal = await engine.no(complete(locks["a"]))
        assert (refusal.code, "late_result" in refusal.details) == ("lock_lost", False)
        assert engine.actor.full_disk.closed == Closed.CREATES
        engine.disk.fits = lambda batch: False
        refusal = await engine.no(complete(locks["b"], "b"))
        assert (refusal.code, "late_result" in refusal.details) == ("lock_lost", False)
        assert (await engine.no(Cancel(id="a"))).code == "invalid_transition"
        for _ in range(2):
            await engine.actor.full_disk.close_further()
        assert (await engine.no(Tick())).code == "storage_full"
        assert (await engine.no(complete(locks["c"], "c"))).code == "lock_lost"
        assert engine.disk.lates == {}
        engine.disk.free()
        await asyncio.sleep(2)
        assert "late_result" in (await engine.no(complete(locks["c"], "c"))).details


def late_calls(engine: VirtualEngine) -> list[str]:
    """Return the verbs of the late calls in the journal."""
    return [(event.details or {})["verb"] for event in engine.disk.events if event.type == "late_call"]


@in_virtual_time
async def test_repeated_late_calls_are_written_once_without_a_read() -> None:
    disk = RecordingStorage()
    async with checked_engine(disk) as engine:
        lock_id = await lose_lock(engine)
        for _ in range(20):
            assert (await engine.no(Progress(id="a", lock_id=lock_id, progress=1))).code == "lock_lost"
        written = len(disk.batches)
        assert late_calls(engine) == ["progress"]
        await engine.no(Release(id="a", lock_id=lock_id))
        for _ in range(20):
            await engine.no(Release(id="a", lock_id=lock_id))
            await engine.no(Extend(id="a", lock_id="never-one"))
        assert late_calls(engine) == ["progress", "release"]
        assert len(disk.batches) == written + 1
        assert disk.asked == []
    async with checked_engine(disk) as engine:  # memory is empty again
        await engine.no(Progress(id="a", lock_id=lock_id, progress=1))
        await engine.no(Progress(id="a", lock_id=lock_id, progress=1))
        assert late_calls(engine) == ["progress", "release", "progress"]


@in_virtual_time
async def test_a_late_call_is_stored_before_its_error_is_sent() -> None:
    async with checked_engine() as engine:
        lock_id = await lose_lock(engine)
        engine.disk.gate.clear()
        asking = start_task(engine.actor.ask(Release(id="a", lock_id=lock_id)))
        await engine.disk.at_gate.wait()
        await settle()
        assert not asking.done()
        engine.disk.gate.set()
        assert (await asking).code == "lock_lost"
        assert late_calls(engine) == ["release"]


@in_virtual_time
async def test_late_calls_on_a_full_disk_are_journaled_when_there_is_space() -> None:
    async with checked_engine() as engine:
        lock_id = await lose_lock(engine)
        engine.disk.write_errors.append(DiskFull("no room for a nicety"))
        assert (await engine.no(Release(id="a", lock_id=lock_id))).code == "lock_lost"
        assert engine.actor.full_disk.closed == Closed.CREATES
        assert (await engine.no(Release(id="a", lock_id=lock_id))).code == "lock_lost"
        assert late_calls(engine) == []
        await asyncio.sleep(2)
        assert (await engine.no(Release(id="a", lock_id=lock_id))).code == "lock_lost"
        assert late_calls(engine) == ["release"]


@in_virtual_time
async def test_a_full_disk_also_rejects_lock_holders() -> None:
    async with checked_engine() as engine:
        lock_id = await engine.held()
        for _ in range(3):
            await engine.actor.full_disk.close_further()
        engine.disk.fits = lambda batch: False
        assert (await engine.no(complete(lock_id))).code == "storage_full"
        engine.disk.free()
        await asyncio.sleep(2)
        assert (await engine.yes(complete(lock_id))).status == "completed"


@in_virtual_time
async def test_a_late_result_of_an_unclaimed_job_is_adopted_at_once() -> None:
    async with checked_engine(policy=Policy(late_results="adopt_if_unclaimed")) as engine:
        lock_id = await engine.held(lock_ttl_ms=1_000)
        await asyncio.sleep(60)
        await engine.yes(Recover(limit=1))
        assert (await engine.yes(Get(id="a"))).status == "queued"
        assert (await engine.yes(complete(lock_id))).status == "completed"
        assert (await engine.yes(complete(lock_id))).repeated
        assert engine.book.figures.late_adopted == 1
        assert engine.book.figures.late_kept == 0


@in_virtual_time
async def test_late_results_are_counted() -> None:
    async with checked_engine() as engine:
        await engine.no(complete(await lose_lock(engine)))
        await engine.yes(Adopt(id="a"), admin=True)
        assert (engine.book.figures.late_kept, engine.book.figures.late_adopted) == (1, 1)


# -- searches ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scan about 7 jobs per page, in slices of 3."""
    monkeypatch.setattr(history, "SLICE", 3)
    monkeypatch.setattr(history, "MOST_LOOKED", 7)
    monkeypatch.setattr(history, "JobQuery", partial(JobQuery, scan=3))


@pytest.mark.usefixtures("small_pages")
@in_virtual_time
async def test_a_text_search_reads_slices_up_to_one_page() -> None:
    async with VirtualEngine() as engine:
        for n in range(12):
            await engine.yes(Create(id=f"j{n}", payload=Raw(b'"needle"' if n in (0, 1, 6) else b"1")))
        looks = engine.disk.calls.get("find", 0)
        page = await engine.yes(SearchJobs(q="Needle"))
        assert [job.id for job in page.jobs] == ["j6"]
        assert engine.disk.calls["find"] == looks + 3
        assert page.next_cursor is not None
        rest = await engine.yes(SearchJobs(q="needle", cursor=page.next_cursor))
        assert [job.id for job in rest.jobs] == ["j1", "j0"]
        assert rest.next_cursor is None
        first = await engine.yes(SearchJobs(q="needle", limit=1, cursor=page.next_cursor))
        assert [job.id for job in first.jobs] == ["j1"]
        assert [
            job.id for job in (await engine.yes(SearchJobs(q="needle", limit=1, cursor=first.next_cursor))).jobs
        ] == ["j0"]


@pytest.mark.usefixtures("small_pages")
@in_virtual_time
async def test_a_page_scans_until_its_row_limit() -> None:
    async with VirtualEngine() as engine:
        for n in range(15):
            await asyncio.sleep(1)
            await engine.yes(Create(id=f"j{n}", queue="b" if n in (1, 7, 8) else "a"))
        created = {f"j{n}": (await engine.yes(Get(id=f"j{n}"))).created_at for n in range(15)}
        looks = engine.disk.calls.get("find", 0)
        page = await engine.yes(ListJobs(queue="b"))
        assert [job.id for job in page.jobs] == ["j8", "j7"]
        assert (page.next_cursor is not None, page.looked_to_at) == (True, created["j6"])
        assert engine.disk.calls["find"] == looks + 3
        rest = await engine.yes(ListJobs(queue="b", cursor=page.next_cursor))
        assert ([job.id for job in rest.jobs], rest.next_cursor, rest.looked_to_at) == (["j1"], None, None)
        full = await engine.yes(ListJobs(queue="b", limit=2))
        assert ([job.id for job in full.jobs], full.looked_to_at) == (["j8", "j7"], None)
        assert full.next_cursor is not None
        none = await engine.yes(ListJobs(queue="nowhere"))
        assert (none.jobs, none.looked_to_at) == ([], created["j6"])


@pytest.fixture
def slow_pages(small_pages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scan 12 jobs per page in slices of 3, which takes 3 s."""
    monkeypatch.setattr(history, "MOST_LOOKED", 1_000)
    monkeypatch.setattr(history, "EAGER_S", 0)
    monkeypatch.setattr(history, "PAUSE_S", 1.0)
    monkeypatch.setattr(history, "PATIENCE_S", 2.5)
    monkeypatch.setattr(history, "SLOW_PATIENCE_S", 1.5)


@pytest.mark.usefixtures("slow_pages")
@in_virtual_time
async def test_a_page_scans_until_its_time_limit() -> None:
    async with VirtualEngine() as engine:
        for n in range(30):
            await engine.yes(Create(id=f"j{n}", queue="b" if n == 0 else "a"))
        began = engine.now
        page = await engine.yes(ListJobs(queue="b"))
        assert (page.jobs, page.next_cursor, engine.now - began) == ([], "19", 3_000)
        assert (await engine.yes(SearchJobs(q="nowhere"))).next_cursor == "22"
        found, pages = [], 1
        while page.next_cursor is not None:
            page = await engine.yes(ListJobs(queue="b", cursor=page.next_cursor))
            found += [job.id for job in page.jobs]
            pages += 1
        assert (found, pages) == (["j0"], 3)


@pytest.mark.usefixtures("slow_pages")
@in_virtual_time
async def test_a_long_scan_delays_no_other_request() -> None:
    async with VirtualEngine() as engine:
        for n in range(30):
            await engine.yes(Create(id=f"j{n}"))
        far = [asyncio.create_task(engine.yes(ListJobs(queue="nowhere"))) for _ in range(2 * history.AT_ONCE)]
        await asyncio.sleep(0.5)
        began = engine.now
        assert len((await engine.yes(Timeline(id="j0"))).events) == 1
        await engine.yes(Create(id="new"))
        assert len((await engine.yes(ListJobs(limit=1))).jobs) == 1
        assert engine.now == began
        assert not any(task.done() for task in far)
        assert all(page.next_cursor is not None for page in await asyncio.gather(*far))
        assert engine.now - began < 2_500 + 1_000 * len(far), "they take turns, and none runs for long"


@in_virtual_time
async def test_jobs_that_change_between_pages_are_shown_once() -> None:
    """A page begins below the one before, whichever index is used."""
    async with VirtualEngine() as engine:
        for n in range(12):
            await engine.yes(Create(id=f"j{n}"))
            if n % 2:
                await engine.yes(ForceFail(id=f"j{n}", reason="no"))
        seen: list[str] = []
        cursor = None
        while True:
            page = await engine.yes(ListJobs(status="failed", limit=2, cursor=cursor))
            seen += [job.id for job in page.jobs]
            cursor = page.next_cursor
            if cursor is None:
                break
            await engine.yes(ForceReset(id=seen[-1]))  # leaves the index that is scanned
            await engine.yes(ForceFail(id=f"j{len(seen)}", reason="no")) if len(seen) == 2 else None  # enters it
        assert seen == ["j11", "j9", "j7", "j5", "j3", "j2", "j1"]


@in_virtual_time
async def test_a_search_for_an_error_defaults_to_failed_jobs() -> None:
    async with checked_engine() as engine:
        for job_id in ("a", "b"):
            await engine.yes(Create(id=job_id))
            await engine.yes(ForceFail(id=job_id, reason="no connection"))
        await engine.yes(ForceReset(id="b"))  # this clears its error
        failed = await engine.yes(Get(id="a"))
        error = fingerprint(failed.error_message, failed.error_code)
        page = await engine.yes(SearchJobs(error=error))
        assert [job.id for job in page.jobs] == ["a"]
        assert (await engine.yes(SearchJobs(error=error, status="queued"))).jobs == []
        assert (await engine.yes(SearchJobs(error=error, worker="w"))).jobs == []


@in_virtual_time
async def test_jobs_are_found_by_finish_time_and_last_worker() -> None:
    async with checked_engine() as engine:
        lock_id = await engine.held()
        for job_id in ("b", "c"):
            await engine.yes(Create(id=job_id))
        await asyncio.sleep(10)
        middle = engine.now
        await engine.yes(Fail(id="a", lock_id=lock_id, error_message="no"))
        await asyncio.sleep(10)
        await engine.yes(ForceFail(id="b", reason="no"))

        async def found(**asked: Any) -> list[str]:
            return [job.id for job in (await engine.yes(SearchJobs(**asked))).jobs]

        assert await found(finished_since=middle) == ["b", "a"]
        assert await found(finished_since=middle, finished_until=middle + 1) == ["a"]
        assert await found(worker="w-1") == ["a"]
        assert await found(worker="w-1", status="failed", finished_since=middle) == ["a"]
        assert await found(worker="w-1", status="processing") == []


@in_virtual_time
async def test_a_search_returns_a_limited_amount_of_payload() -> None:
    async with VirtualEngine() as engine:
        for n in range(4):
            await engine.yes(Create(id=f"j{n}", payload=Raw(b'"' + b"x" * (3 << 20) + b'"')))
        page = await engine.yes(SearchJobs(q="xxx"))
        assert ([job.id for job in page.jobs], page.looked_to_at) == (["j3"], None)
        assert (await engine.yes(SearchJobs(since=0, until=engine.now + 1))).next_cursor is not None
