"""The actor: batches, finished jobs on disk, damaged rows, and commits with an unknown outcome.

Tests run in virtual time: a wait of a second takes no time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
from msgspec import Raw
from structlog.testing import capture_logs

from jobd.core import decide
from jobd.core.transaction import Transaction
from jobd.engine.actor import BATCH_BYTES, BATCH_WEIGHT, Bounds, DiskBroken
from jobd.model import commands as cmd
from jobd.model.clocks import MonotonicS
from jobd.model.errors import ApiError
from jobd.model.job import DAY_MS, Policy
from jobd.model.journal import Fenced, JournalOutcomeUnknown, LeadershipLost
from jobd.model.responses import EmptyResponse, JobView, Response
from jobd.model.storage import BadRows, Batch, JobQuery, LateResultQuery, LateResultRows, LoadedRows, Quarantined
from tests.support.memory_storage import MemoryStorage
from tests.support.virtual_engine import (
    VirtualEngine,
    ask_all,
    assert_consistent,
    checked_engine,
    finished_disk,
    granted_ids,
    in_checked_engine,
    in_context,
    in_virtual_time,
    seconds,
    settle,
    start_task,
    waiting_claim,
)

# -- mailbox -----------------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_the_mailbox_reserves_space_for_running_work() -> None:
    """Creates fill a part of it; starts and reads may use more; calls for running work may use all of it."""
    engine = VirtualEngine(bounds=Bounds(mailbox=20))
    tasks = ask_all(engine, [cmd.Create() for _ in range(20)])
    await settle()
    assert [task.result().code for task in tasks if task.done()] == ["overloaded"] * 6
    tasks += ask_all(
        engine,
        [
            cmd.Get(id="x"),
            cmd.Claim(worker="w"),
            cmd.Start(id="x", worker="w"),
            cmd.Stats(),
            cmd.ListJobs(),
            cmd.Why(id="x"),
        ],
    )
    await settle()
    assert engine.actor.waiting == 17
    assert (await engine.actor.ask(cmd.Import(id="x"))).code == "overloaded"  # type: ignore[union-attr]
    last: list[cmd.AnyCommand] = [
        cmd.Ping(),
        cmd.Progress(id="x", lock_id="l", progress=1),
        cmd.ForceFail(id="x"),
        cmd.Tick(),
    ]
    tasks += ask_all(engine, last)
    await settle()
    assert engine.actor.waiting == 20
    rejection = tasks[-1].result()
    assert (rejection.code, rejection.status) == ("overloaded", 503)
    assert rejection.message.endswith("try again in a second.")
    async with engine:
        await settle()
        assert all(task.done() for task in tasks)
    assert engine.actor.waiting == 0
    assert (engine.state.totals["queued"], engine.state.totals["processing"]) == (13, 1)


@in_virtual_time
async def test_the_bytes_in_flight_reserve_space_for_running_work() -> None:
    engine = VirtualEngine(bounds=Bounds(inflight_bytes=100))
    assert (await engine.actor.ask(cmd.Create(), size=71)).code == "overloaded"  # type: ignore[union-attr]
    first = start_task(engine.actor.ask(cmd.Create(), size=70))
    await settle()
    assert (await engine.actor.ask(cmd.Get(id="x"), size=16)).code == "overloaded"  # type: ignore[union-attr]
    second = start_task(engine.actor.ask(cmd.Complete(id="x", lock_id="l"), size=30))
    await settle()
    assert (await engine.actor.ask(cmd.Tick(), size=1)).code == "overloaded"  # type: ignore[union-attr]
    async with engine:
        assert isinstance(await first, Response)
        assert (await second).code == "job_not_found"
        await engine.respond(cmd.Create(), size=70)  # the bytes are free again


@in_checked_engine(bounds=Bounds(parked_claims=1, claim_wait_ms=1_000))
async def test_waiting_claims_are_limited(engine: VirtualEngine) -> None:
    rejection = await engine.no(cmd.Claim(worker="w", wait_ms=1_001))
    assert (rejection.code, rejection.details) == ("invalid_request", {"field": "$.wait_ms"})
    waiting = await waiting_claim(engine, "w", wait_ms=1_000)
    assert (await engine.no(cmd.Claim(worker="w", wait_ms=1))).code == "overloaded"
    assert (await engine.yes(cmd.Claim(worker="w"))).grants == []
    assert granted_ids(await waiting) == []


@in_virtual_time
async def test_waiting_commands_form_one_batch() -> None:
    """Each command sees the changes of the ones before it, and one transaction writes all of them."""
    engine = VirtualEngine()
    tasks = ask_all(
        engine,
        [cmd.Create(id="a", payload=Raw(b"7")), cmd.Start(id="a", worker="w"), cmd.Create(id="a"), cmd.Get(id="a")],
    )
    async with engine:
        created, started, twice, got = [await task for task in tasks]
        assert (created.status, created.data.status) == (201, "queued")
        assert started.data.job.payload == got.data.payload == Raw(b"7")
        assert twice.code == "job_exists"
        assert got.data.status == "processing"
        assert [len(batch.changes) for batch in engine.disk.batches] == [2]
        assert_consistent(engine)


@in_virtual_time
async def test_the_commands_of_a_batch_are_decided_at_one_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = VirtualEngine()
    moments, loop_times = iter([engine.clock.moment()]), iter(map(MonotonicS, range(9)))
    monkeypatch.setattr(engine.clock, "moment", lambda: next(moments))
    monkeypatch.setattr(engine.actor._decider, "_loop_time", lambda: next(loop_times))
    key = cmd.IdempotencyKey("key", "body")
    claims = [cmd.Claim(worker="w", queues=[queue], wait_ms=9_000) for queue in "pq"]
    tasks = [start_task(engine.actor.ask(cmd.Create(id="a"), key=key)), *ask_all(engine, claims)]
    await asyncio.sleep(0)
    await engine.actor._turn(engine.actor._take())
    assert [envelope.deadline for envelope, _, _ in engine.actor.waiting_claims.by_ticket.values()] == [9.0, 9.0]
    engine.actor._send_responses()
    assert (await tasks[0]).status == 201
    for task in tasks[1:]:
        task.cancel()


@in_virtual_time
async def test_a_batch_is_limited_by_what_it_writes() -> None:
    engine = VirtualEngine()
    bulk = cmd.Bulk(jobs=[cmd.Create() for _ in range(BATCH_WEIGHT)])
    tasks = ask_all(engine, [bulk, bulk, *(cmd.Claim(worker="w", limit=100) for _ in range(11))])
    async with engine:
        for task in tasks:
            await task
        assert [len(batch.changes) for batch in engine.disk.batches] == [1_000, 1_000, 1_000, 100]


@in_virtual_time
async def test_a_batch_is_limited_by_the_bytes_of_its_bodies() -> None:
    """In a cluster, a record has to reach a quorum within one lock_ms."""
    engine = VirtualEngine()
    half = BATCH_BYTES // 2
    sizes = [half, 0, half, 1, 0, BATCH_BYTES, BATCH_BYTES + 1, 2, 3]
    tasks = [start_task(engine.actor.ask(cmd.Create(), size=size)) for size in sizes]
    await settle()
    engine.actor.enqueue_internal(cmd.Tick())  # has no body
    async with engine:
        for task in tasks:
            assert isinstance(await task, Response)
        assert [len(batch.changes) for batch in engine.disk.batches] == [3, 2, 1, 1, 2]


@in_virtual_time
async def test_calls_that_store_the_view_of_a_job_weigh_as_much_as_payloads() -> None:
    """A thousand cancels with a key would make a record of 256 MB."""

    async def batches(*calls: cmd.Adopt | cmd.Cancel) -> list[int]:
        written = len(engine.disk.batches)
        tasks = [
            start_task(engine.actor.ask(call, admin=True, key=cmd.IdempotencyKey(call.id, "body"))) for call in calls
        ]
        for task in tasks:
            assert isinstance(await task, Response)
        return [len(batch.keys) for batch in engine.disk.batches[written:]]

    async with checked_engine() as engine:
        ids = [f"job-{number}" for number in range(60)]
        for job_id in ids:
            lock_id = await engine.held(job_id)
            await engine.yes(cmd.ForceFail(id=job_id), admin=True)
            await engine.no(cmd.Complete(id=job_id, lock_id=lock_id, file_path="/out"))
        assert await batches(*(cmd.Adopt(id=job_id) for job_id in ids)) == [20, 20, 20]
        await engine.yes(cmd.Bulk(jobs=[cmd.Create(id=f"other-{job_id}") for job_id in ids]))
        assert await batches(*(cmd.Cancel(id=f"other-{job_id}") for job_id in ids)) == [20, 20, 20]


@in_checked_engine()
async def test_no_response_is_sent_before_the_commit(engine: VirtualEngine) -> None:
    creating = await engine.writing(cmd.Create(id="a"))
    reading = start_task(engine.actor.ask(cmd.Get(id="a")))
    await settle()
    assert not creating.done()
    assert not reading.done()
    received: list[str] = []
    engine.actor.on_commit.append(lambda changes: received.extend(change.type for change in changes))
    engine.disk.gate.set()
    assert isinstance(await creating, Response)
    assert (await reading).data.id == "a"
    assert received == ["created"]
    assert sum(engine.actor.commit_seconds.counts) == 1
    assert engine.actor.batch_commands.total == 1


@in_virtual_time
async def test_a_bug_in_a_rule_costs_one_command() -> None:
    engine = VirtualEngine()
    original = decide.decide

    def broken(tx: Transaction, call: cmd.IssuedCommand) -> Response | ApiError:
        if isinstance(call.command, cmd.Claim):
            raise ZeroDivisionError
        return original(tx, call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decide, "decide", broken)
        tasks = ask_all(engine, [cmd.Create(id="a"), cmd.Claim(worker="w", wait_ms=9), cmd.Create(id="b")])
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
        before = disk.numbers.lock_ms
        await asyncio.sleep(2)
        assert await engine.yes(cmd.Tick()) == EmptyResponse()
        assert disk.numbers.lock_ms == before + 2_000
        assert await engine.yes(cmd.Report(body=b"{}")) == EmptyResponse()
        assert list(disk.kept_reports) == [b"{}"]
        await engine.yes(cmd.EndGrants(ids=[], last=False))
        assert disk.marked
        await engine.yes(cmd.EndGrants(ids=[], last=True))
        assert not disk.marked
        written = len(disk.batches)
        await engine.yes(cmd.Ping())
        await engine.yes(cmd.Stats())
        assert len(disk.batches) == written


@in_checked_engine()
async def test_the_daemon_extends_many_locks_in_batches_before_other_commands(engine: VirtualEngine) -> None:
    count = 5 * BATCH_WEIGHT // 2
    for first in range(0, count, 500):
        ids = [f"job-{number}" for number in range(first, first + 500)]
        await engine.yes(cmd.Bulk(jobs=[cmd.Create(id=job_id) for job_id in ids]))
        for _ in range(5):
            await engine.yes(cmd.Claim(worker="w", limit=100))
    held, written = list(engine.state.processing), len(engine.disk.batches)
    for first in range(0, count, 500):
        engine.actor.enqueue_internal(cmd.ExtendAfterPause(ids=held[first : first + 500], grace_ms=3_600_000))
    await engine.yes(cmd.Create(id="late"))
    found = [[change.type for change in batch.changes] for batch in engine.disk.batches[written:]]
    assert [len(each) for each in found] == [BATCH_WEIGHT, BATCH_WEIGHT, BATCH_WEIGHT // 2 + 1]
    assert found[-1][-1] == "created"


# -- finished jobs -----------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_finished_jobs_are_loaded_when_a_command_names_them() -> None:
    async with checked_engine(await finished_disk()) as engine:
        assert engine.state.get("done") is None
        assert engine.state.total() == 1
        view: JobView = await engine.yes(cmd.Get(id="done"))
        assert (view.status, view.payload, view.file_path) == ("completed", Raw(b'"p"'), "/f")
        assert (await engine.no(cmd.Get(id="never"))).code == "job_not_found"
        assert (await engine.no(cmd.Create(id="done"))).code == "job_exists"
        assert (await engine.yes(cmd.Import(id="done"))).skipped
        same = await engine.respond(cmd.Create(id="done", payload=Raw(b'"p"')))
        assert (same.status, same.data.status, same.data.payload) == (200, "completed", Raw(b'"p"'))
        assert (await engine.yes(cmd.Delete(id="done"))).payload == Raw(b'"p"')
        assert engine.disk.jobs == {}


@in_virtual_time
async def test_a_bulk_create_finds_finished_jobs() -> None:
    async with checked_engine(await finished_disk()) as engine:
        made = await engine.yes(cmd.Bulk(jobs=[cmd.Create(), cmd.Create(id="done", payload=Raw(b'"p"'))]))
        assert (made.jobs[1].status, made.jobs[1].payload) == ("completed", Raw(b'"p"'))


@in_virtual_time
async def test_history_is_read_between_batches() -> None:
    async with checked_engine(await finished_disk()) as engine:
        events = (await engine.yes(cmd.Timeline(id="done"))).events
        assert [event.type for event in events] == ["created", "granted", "completed"]
        for number in range(3):
            await engine.yes(cmd.Create(id=f"{number}"))
        page = await engine.yes(cmd.ListJobs(limit=2))
        assert [job.id for job in page.jobs] == ["2", "1"]
        page = await engine.yes(cmd.ListJobs(limit=2, cursor=page.next_cursor))
        assert ([job.id for job in page.jobs], page.next_cursor) == (["0", "done"], None)
        assert page.jobs[1].payload == Raw(b'"p"')
        assert [job.id for job in (await engine.yes(cmd.ListJobs(status="completed", queue="default"))).jobs] == [
            "done"
        ]
        page = await engine.yes(cmd.Export(limit=3))
        assert [job.id for job in page.jobs] == ["done", "0", "1"]
        assert page.jobs[0].payload == Raw(b'"p"')
        page = await engine.yes(cmd.Export(limit=3, cursor=page.next_cursor))
        assert ([job.id for job in page.jobs], page.next_cursor) == (["2"], None)
        assert [job.id for job in (await engine.yes(cmd.Export(status="completed", queue="default"))).jobs] == ["done"]
        assert (await engine.yes(cmd.Export(queue="other"))).jobs == []
        engine.disk.errors["timeline"] = OSError("unreadable")
        assert (await engine.no(cmd.Timeline(id="done"))).code == "internal_error"
        assert (await engine.yes(cmd.Get(id="0"))).id == "0"


@in_virtual_time
async def test_reads_of_history_are_answered_before_the_actor_stops() -> None:
    engine = VirtualEngine(await finished_disk())
    async with engine:
        tasks = ask_all(engine, [cmd.Timeline(id="done") for _ in range(10)])
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
    tasks = ask_all(engine, [cmd.Get(id="done"), cmd.DeleteExpired(ids=["done"]), cmd.Get(id="done")])
    async with engine:
        shown, deleted, gone = [await task for task in tasks]
        assert shown.data.payload == Raw(b'"p"')
        assert deleted.data.done == 1
        assert gone.code == "job_not_found"
        assert disk.batches[-1].payloads == []  # its row is gone by then
        assert_consistent(engine)


# -- damaged rows ------------------------------------------------------------------------------------------------------


@in_checked_engine()
async def test_a_damaged_payload_affects_only_its_job(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a"))
    await engine.yes(cmd.Create(id="b"))
    engine.disk.bad_payloads[1] = "checksum"
    tasks = ask_all(engine, [cmd.Get(id="a"), cmd.Get(id="b"), cmd.Create(id="c")])
    bad, good, made = [await task for task in tasks]
    assert (bad.code, bad.details) == ("job_quarantined", {"job_id": "a", "reason": "checksum"})
    assert isinstance(good, Response)
    assert made.status == 201
    assert engine.disk.quarantined == engine.state.quarantined == {"a": "checksum"}
    assert granted_ids(await engine.actor.ask(cmd.Claim(worker="w", limit=9))) == ["b", "c"]


@pytest.mark.parametrize("first", [None, cmd.Get(id="a"), cmd.Create(id="a")], ids=["grant", "read", "decision"])
@in_checked_engine()
async def test_a_damaged_payload_is_neither_granted_nor_served(
    engine: VirtualEngine, first: cmd.AnyCommand | None
) -> None:
    await engine.yes(cmd.Create(id="a"))
    await engine.yes(cmd.Create(id="b"))
    engine.disk.bad_payloads[1] = "checksum"
    if first is not None:
        assert (await engine.no(first)).code == "job_quarantined"
    assert granted_ids(await engine.actor.ask(cmd.Claim(worker="w"))) == ["b"]


@in_virtual_time
async def test_a_row_that_is_damaged_while_the_daemon_runs_is_quarantined() -> None:
    async with VirtualEngine(await finished_disk()) as engine:
        engine.disk.bad_jobs["done"] = "checksum"
        assert (await engine.no(cmd.Get(id="done"))).code == "job_quarantined"
        assert (await engine.no(cmd.Get(id="done"))).code == "job_quarantined"
        assert engine.disk.quarantined == engine.state.quarantined == {"done": "checksum"}
        # A row that could not be moved is found and reported again, but counted and logged once.
        with capture_logs() as lines:
            engine.disk.on_quarantined(Quarantined("done", "checksum, still", is_moved=False))
        assert lines == []
        assert engine.state.quarantined == {"done": "checksum, still"}
        assert engine.state.totals["completed"] == 0


@in_checked_engine()
async def test_a_page_skips_damaged_rows(engine: VirtualEngine) -> None:
    for name in "abc":
        await engine.yes(cmd.Create(id=name))
    engine.disk.bad_payloads[2] = "checksum"
    assert [job.id for job in (await engine.yes(cmd.ListJobs())).jobs] == ["c", "a"]
    assert engine.state.quarantined == {"b": "checksum"}
    assert (await engine.no(cmd.Start(id="b", worker="w"))).code == "job_quarantined"


@in_checked_engine()
async def test_a_deleted_or_quarantined_job_no_longer_needs_validation(engine: VirtualEngine) -> None:
    for name in "ab":
        await engine.yes(cmd.Import(id=name, status="failed", error_message="e"))
    assert set(engine.state.unvalidated.values()) == {"a", "b"}
    await engine.yes(cmd.Delete(id="a"))
    assert engine.state.unvalidated == engine.disk.unvalidated == {2: "b"}
    await engine.yes(cmd.RepairJobs(ids=["b"]))
    assert engine.state.unvalidated == engine.disk.unvalidated == {}


def test_bad_rows_name_their_jobs() -> None:
    assert BadRows({"a": "checksum"}).jobs == {"a": "checksum"}


# -- unknown outcome ---------------------------------------------------------------------------------------------------


@asynccontextmanager
async def ending_engine(
    disk: MemoryStorage | None = None, *, code: str = "shutting_down"
) -> AsyncIterator[VirtualEngine]:
    """Run an actor that has ended because of the disk when the context ends, and responds with `code` then."""
    engine = VirtualEngine(disk)
    running = start_task(engine.actor.run())
    yield engine
    with pytest.raises(DiskBroken):
        await running
    assert (await engine.no(cmd.Ping())).code == code


in_ending_engine = in_context(ending_engine)
in_fenced_engine = in_context(partial(ending_engine, code="not_leader"))


@pytest.mark.usefixtures("both_commit_modes")
@pytest.mark.parametrize("error", [Fenced(), JournalOutcomeUnknown("no response")])
@in_fenced_engine
async def test_a_leader_that_is_fenced_reports_unknown_outcomes_and_ends_the_actor(
    engine: VirtualEngine, error: Exception
) -> None:
    waiting = await waiting_claim(engine, "w", queues=["other"])
    engine.disk.write_errors.append(error)
    task = await engine.writing(cmd.Create(id="a"))
    later = start_task(engine.actor.ask(cmd.Create(id="b")))
    await settle()
    engine.disk.gate.set()
    with capture_logs() as logs:
        rejection = await task
    assert (rejection.code, rejection.details) == ("outcome_unknown", {"outcome": "unknown"})
    assert [(log["event"], log["reason"], log["commands"]) for log in logs] == [("leadership_lost", str(error), 1)]
    for undone in (waiting, later, start_task(engine.actor.ask(cmd.Create(id="c")))):
        rejection = await undone
        assert (rejection.code, rejection.details) == ("not_leader", {"leader": None}), "nothing was done"


@in_fenced_engine
async def test_no_read_is_served_after_the_check_before_a_batch_fails(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a"))

    def fail() -> None:
        raise LeadershipLost("the lease is over")

    engine.actor.before_batch = fail
    assert (await engine.no(cmd.Get(id="a"))).code == "not_leader"


@pytest.mark.usefixtures("both_commit_modes")
@in_ending_engine
async def test_an_unknown_outcome_is_reported_and_ends_the_actor(engine: VirtualEngine) -> None:
    waiting = await waiting_claim(engine, "w", queues=["other"])
    engine.disk.lost_commits = 1
    engine.disk.gate.clear()
    tasks = ask_all(engine, [cmd.Create(id="a"), cmd.Get(id="a")])
    await engine.disk.at_gate.wait()
    later = start_task(engine.actor.ask(cmd.Create(id="b")))
    await settle()
    engine.disk.gate.set()
    for task in [*tasks, waiting]:
        rejection = await task
        assert (rejection.code, rejection.status, rejection.details) == ("outcome_unknown", 503, {"outcome": "unknown"})
    assert (await later).code == "shutting_down"
    assert engine.disk.job("a") is not None  # it was written; a start finds it
    assert engine.disk.job("b") is None


@pytest.mark.usefixtures("both_commit_modes")
@pytest.mark.parametrize("method", ["write", "load"])
@in_virtual_time
async def test_any_disk_error_ends_the_actor(method: str) -> None:
    async with ending_engine(await finished_disk()) as engine:
        engine.disk.errors[method] = OSError("EIO")
        tasks = ask_all(engine, [cmd.Get(id="done"), cmd.Create(id="a")])
        assert {(await task).code for task in tasks} == {"outcome_unknown"}


@pytest.mark.usefixtures("both_commit_modes")
@in_ending_engine
async def test_damaged_rows_of_unknown_jobs_end_the_actor(engine: VirtualEngine) -> None:
    """Nothing could be quarantined, so deciding again would fail forever."""
    engine.disk.write_errors.append(BadRows({"seq 7": "the payload is missing"}))
    assert (await engine.no(cmd.Create())).code == "outcome_unknown"


@pytest.mark.usefixtures("both_commit_modes")
@in_checked_engine()
async def test_damaged_rows_already_in_quarantine_change_nothing(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a"))
    engine.disk.bad_jobs["a"] = "checksum"
    engine.disk.write_errors.append(BadRows({"a": "the payload is damaged"}))
    # The rollback reads the row, finds the damage and quarantines it.
    assert (await engine.no(cmd.Start(id="a", worker="w"))).code == "job_quarantined"


@pytest.mark.usefixtures("both_commit_modes")
@in_checked_engine()
async def test_a_row_quarantined_by_a_concurrent_read_affects_only_its_command(engine: VirtualEngine) -> None:
    """Found by simulation, seed 5000: a read of history quarantined the row between decision and write."""
    await engine.yes(cmd.Create(id="a"))
    await engine.yes(cmd.Create(id="b"))
    lock_id = (await engine.yes(cmd.Start(id="a", worker="w"))).lock_id
    engine.disk.bad_jobs["a"] = "checksum"
    late = await engine.writing(cmd.Progress(id="a", lock_id=lock_id, progress=5))
    assert [job.id for job, _ in (await engine.disk.find_jobs(JobQuery())).jobs] == ["b"]
    other = start_task(engine.actor.ask(cmd.Start(id="b", worker="w")))
    engine.disk.gate.set()
    assert (await late).code == "job_quarantined"
    assert isinstance(await other, Response)
    assert engine.state.totals == {"queued": 0, "processing": 1, "completed": 0, "failed": 0, "cancelled": 0}


class QuarantiningStorage(MemoryStorage):
    """Quarantines the row of `job_id` right before a payload is read or a job is deleted."""

    job_id = "bad"

    async def load(self, ids: list[str], payloads: list[int], digests: list[str]) -> LoadedRows:
        await self._meet(payloads)
        return await super().load(ids, payloads, digests)

    async def write(self, batch: Batch) -> dict[int, bytes]:
        await self._meet([*batch.payloads, *(change.job_seq for change in batch.changes if change.after is None)])
        return await super().write(batch)

    async def _meet(self, seqs: list[int]) -> None:
        for seq in seqs:
            if seq in self.jobs and self.jobs[seq].id == self.job_id:
                await self.quarantine(self.jobs[seq], "damaged")


@pytest.mark.parametrize("beside", ["nothing", "a change"])
@in_virtual_time
async def test_a_row_quarantined_while_its_job_is_shown_affects_only_its_command(beside: str) -> None:
    async with checked_engine(QuarantiningStorage()) as engine:
        await engine.yes(cmd.Create(id="bad"))
        slow = await engine.writing(cmd.Tick())
        tasks = ask_all(engine, [cmd.Get(id="bad"), cmd.Create(id="other") if beside == "a change" else cmd.Ping()])
        engine.disk.gate.set()
        await slow
        rejected, other = [await task for task in tasks]
        assert rejected.code == "job_quarantined"
        assert isinstance(other, Response)
        assert engine.state.totals["queued"] == (beside == "a change")


@in_virtual_time
async def test_a_quarantined_finished_job_is_no_longer_counted() -> None:
    """Also if it was being deleted. The next write has the right count."""
    disk = QuarantiningStorage()
    disk.job_id = "none yet"
    for name in ("bad", "good", "worse"):
        async with VirtualEngine(disk) as engine:
            await engine.yes(cmd.Create(id=name))
            await engine.yes(cmd.Cancel(id=name))
    async with VirtualEngine(disk) as engine:
        disk.job_id, disk.bad_jobs["worse"] = "bad", "checksum"
        assert (await engine.no(cmd.Get(id="worse"))).code == "job_quarantined"
        assert engine.state.totals["cancelled"] == 2
        assert (await engine.no(cmd.Delete(id="bad"))).code == "job_quarantined"
        assert engine.state.totals["cancelled"] == 1
        await engine.yes(cmd.Create(id="new"))
        await engine.yes(cmd.Cancel(id="new"))
        assert disk.queues["default"].cancelled == engine.state.totals["cancelled"] == 2


def assert_counts_match_disk(engine: VirtualEngine) -> None:
    """Check the counts of finished jobs: in memory, in the queue rows, and of the job rows."""
    disk = engine.disk
    for status in ("completed", "failed", "cancelled"):
        rows = sum(job.status == status for job in disk.jobs.values())
        counted = sum(getattr(row, status) for row in disk.queues.values())
        assert engine.state.totals[status] == counted == rows, status


@in_checked_engine()
async def test_a_damaged_finished_job_is_uncounted_once_when_its_row_is_moved(engine: VirtualEngine) -> None:
    for name in ("bad", "good"):
        await engine.yes(cmd.Create(id=name))
        await engine.yes(cmd.Cancel(id=name))
    engine.disk.bad_payloads[1] = "checksum"
    engine.disk.can_move = lambda job: False
    for _ in range(2):
        assert [job.id for job in (await engine.yes(cmd.ListJobs())).jobs] == ["good"]
        assert (await engine.no(cmd.Get(id="bad"))).code == "job_quarantined"
        assert_counts_match_disk(engine)
    await engine.yes(cmd.Create(id="more"))
    await engine.yes(cmd.Cancel(id="more"))
    assert_counts_match_disk(engine)
    engine.disk.can_move = lambda job: True
    await engine.yes(cmd.ListJobs())
    assert engine.disk.quarantined == {"bad": "checksum"}
    assert engine.state.totals["cancelled"] == 2
    assert_counts_match_disk(engine)
    await engine.yes(cmd.Delete(id="more"))
    assert_counts_match_disk(engine)
    await engine.yes(cmd.Create(id="last"))
    await engine.yes(cmd.Cancel(id="last"))
    engine.state.finished.drop("last")
    engine.disk.bad_jobs["last"] = "checksum"
    await engine.disk.find_jobs(JobQuery())
    assert_counts_match_disk(engine)


@pytest.mark.parametrize("has_artifacts", [False, True])
@in_virtual_time
async def test_a_deleted_artifact_leaves_a_tombstone_if_artifacts_are_swept(has_artifacts: bool) -> None:
    async with checked_engine(policy=Policy(artifacts=has_artifacts)) as engine:
        await engine.yes(cmd.Complete(id="a", lock_id=await engine.held(), storage_key="k"))
        await engine.yes(cmd.Delete(id="a"))
        batch = engine.disk.batches[-1]
        assert ([each.key for each in batch.tombstones], batch.sweeps) == (["k"] * has_artifacts, has_artifacts)


@pytest.mark.parametrize("damage", ["row", "payload"])
@pytest.mark.parametrize("end", ["written", "moved", "taken back", "moved and taken back"])
@pytest.mark.parametrize("what", ["complete", "delete", "reset", "adopt"])
@in_checked_engine()
async def test_the_counts_of_a_damaged_row_match_the_disk_after_any_batch(
    engine: VirtualEngine, what: str, end: str, damage: str
) -> None:
    """A read of history finds it after a batch about its job was decided, and the disk is too full to move it."""
    disk = engine.disk
    await engine.yes(cmd.Create(id="a"))
    lock_id = (await engine.yes(cmd.Start(id="a", worker="w"))).lock_id
    commands: dict[str, cmd.AnyCommand] = {
        "complete": cmd.Complete(id="a", lock_id=lock_id, file_path="/x"),
        "delete": cmd.Delete(id="a"),
        "reset": cmd.ForceReset(id="a"),
        "adopt": cmd.Adopt(id="a"),
    }
    if what != "complete":
        await engine.yes(cmd.Cancel(id="a"))
        await engine.no(commands["complete"])  # stored as a late result
    disk.gate.clear()
    task = start_task(engine.actor.ask(commands[what], admin=True))
    await disk.at_gate.wait()
    if damage == "row":
        disk.bad_jobs["a"] = "checksum"
    else:
        disk.bad_payloads[1] = "checksum"
    disk.can_move = lambda job: end == "moved"
    assert (await disk.find_jobs(JobQuery())).jobs == []
    assert list(engine.state.quarantined) == ["a"]
    if "taken back" in end:
        disk.fits = lambda batch: False
    if end == "moved and taken back":
        disk.can_move = lambda job: True
    disk.gate.set()
    await task
    assert_counts_match_disk(engine)
    disk.free()
    await seconds(3)
    disk.can_move = lambda job: True
    await disk.find_jobs(JobQuery())
    await engine.yes(cmd.Create(id="b"))
    await engine.yes(cmd.Cancel(id="b"))
    assert_counts_match_disk(engine)
    assert engine.state.totals["queued"] == engine.state.totals["processing"] == 0


class CountingStorage(MemoryStorage):
    """Records how many jobs each read of late results names."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    async def read_late_results(self, wanted: list[LateResultQuery]) -> LateResultRows:
        self.asked.append(len(wanted))
        return await super().read_late_results(wanted)


@in_virtual_time
async def test_late_completes_weigh_as_much_as_their_journal_reads() -> None:
    """A thousand of them would delay a batch by 165 ms."""
    disk = CountingStorage()
    async with checked_engine(disk) as engine:
        locks: dict[str, str] = {}
        for number in range(100):
            name = f"job-{number}"
            await engine.yes(cmd.Create(id=name))
            locks[name] = (await engine.yes(cmd.Start(id=name, worker="w"))).lock_id
            await engine.yes(cmd.ForceReset(id=name))
            await engine.yes(cmd.Start(id=name, worker="w"))
        tasks = ask_all(
            engine, [cmd.Complete(id=name, lock_id=lock_id, file_path="/f") for name, lock_id in locks.items()]
        )
        answers = [await task for task in tasks]
        assert all(answer.code == "lock_lost" and "late_result" in answer.details for answer in answers)
        assert disk.asked == [20] * 5


@in_ending_engine
async def test_a_missing_payload_without_a_reason_ends_the_actor(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a"))
    engine.disk.payloads.clear()
    assert (await engine.no(cmd.Get(id="a"))).code == "outcome_unknown"


@in_ending_engine
async def test_a_failing_probe_ends_the_actor(engine: VirtualEngine) -> None:
    engine.disk.fits = lambda batch: False
    assert (await engine.no(cmd.Create())).code == "storage_full"
    engine.disk.errors["probe"] = OSError("EIO")


@in_ending_engine
async def test_a_reserve_file_that_cannot_be_dropped_ends_the_actor(engine: VirtualEngine) -> None:
    engine.disk.errors["drop_reserve"] = OSError("EIO")
    engine.disk.fits = lambda batch: False
    assert (await engine.no(cmd.Tick())).code == "outcome_unknown"


@in_ending_engine
async def test_a_failed_commit_outside_the_actor_ends_it(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a"))
    engine.actor.lose_disk(OSError("EIO"))
