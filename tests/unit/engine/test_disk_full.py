"""The actor on a full disk."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from msgspec import Raw
from structlog.testing import capture_logs

from jobd.engine.actor import DiskBroken
from jobd.engine.envelope import Envelope
from jobd.model import commands as cmd
from jobd.model.errors import ApiError
from jobd.model.job import COUNTER_MASK, DAY_MS, MINUTE_MS, TOKEN_COUNTER_BITS, new_epoch
from jobd.model.responses import Response
from jobd.model.storage import Batch, DiskFull, DiskSpace, JournalDiskFull, Numbers, QueueRow
from tests.support.memory_storage import MemoryStorage
from tests.support.virtual_engine import (
    VirtualEngine,
    ask_all,
    assert_consistent,
    checked_engine,
    finished_disk,
    granted_ids,
    in_checked_engine,
    in_virtual_time,
    key,
    settle,
    start_task,
    waiting_claim,
)

pytestmark = pytest.mark.usefixtures("both_commit_modes")


def write_limit(engine: VirtualEngine) -> str:
    return engine.actor.full_disk.write_limit.name


@in_checked_engine()
async def test_a_full_disk_first_rejects_only_creates(engine: VirtualEngine) -> None:
    lock_id = await engine.held("a")
    engine.disk.fill_nearly()
    tasks = ask_all(
        engine, [cmd.Create(id="b"), cmd.Progress(id="a", lock_id=lock_id, progress=5), cmd.Bulk(jobs=[cmd.Create()])]
    )
    created, reported, bulk = [await task for task in tasks]
    assert (created.code, created.status, bulk.code) == ("storage_full", 507, "storage_full")
    assert isinstance(reported, Response)
    assert write_limit(engine) == "CREATES"
    assert not engine.clock.held
    assert (await engine.no(cmd.Import(id="c"))).code == "storage_full"
    await engine.yes(cmd.Get(id="a"))
    writes = engine.disk.calls["write"]
    await engine.no(cmd.Create())
    assert engine.disk.calls["write"] == writes  # rejected before it is decided


@in_checked_engine()
async def test_a_full_disk_of_the_server_of_a_shared_journal_is_named(engine: VirtualEngine) -> None:
    full = JournalDiskFull("no room on the server")
    engine.disk.write_errors.append(full)
    engine.disk.errors["probe"] = full
    error = await engine.no(cmd.Create(id="a"))
    assert error.message.startswith("The disk of the journal's server is full; nothing was changed.")
    assert (error.code, error.details) == ("storage_full", {})
    await asyncio.sleep(1.5)
    assert engine.actor.full_disk.described() == "The disk of the journal's server is full"
    assert engine.actor.full_disk.is_remote
    assert not engine.actor.full_disk.is_local
    del engine.disk.errors["probe"]
    await asyncio.sleep(1.5)
    await engine.yes(cmd.Create(id="a"))
    assert engine.actor.full_disk.described().startswith("The disk of the store is full")


@in_checked_engine()
async def test_a_probe_each_second_finds_free_space(engine: VirtualEngine) -> None:
    engine.disk.fits = lambda batch: False
    assert (await engine.no(cmd.Create(id="a"))).code == "storage_full"
    assert write_limit(engine) == "CREATES"
    assert engine.actor.full_disk.is_local
    probes = engine.disk.calls.get("probe", 0)
    await asyncio.sleep(3.5)
    assert engine.disk.calls["probe"] == probes + 3
    assert write_limit(engine) == "CREATES"
    await engine.free_disk()
    assert write_limit(engine) == "NONE"
    assert (await engine.yes(cmd.Create(id="a"))).id == "a"
    probes = engine.disk.calls["probe"]
    await asyncio.sleep(10)
    assert engine.disk.calls["probe"] == probes


@in_checked_engine()
async def test_then_the_reserve_file_is_released_and_only_endings_are_accepted(engine: VirtualEngine) -> None:
    ending, signing = await engine.held("a"), await engine.held("b")
    engine.disk.fill()
    tasks = ask_all(engine, [
        cmd.Complete(id="a", lock_id=ending), cmd.Progress(id="b", lock_id=signing, progress=5), cmd.Create(),
        cmd.Tick(), cmd.Claim(worker="w", wait_ms=1_000), cmd.Get(id="b"), cmd.Pause(name="q"),
    ])  # fmt: skip
    answers = [await task for task in tasks]
    assert [answer.status for answer in answers] == [200, 507, 507, 507, 507, 200, 507]
    assert write_limit(engine) == "ALL_BUT_ENDINGS"
    assert not engine.disk.has_reserve
    assert engine.clock.held
    engine.disk.has_spare = False
    lock_ms = engine.clock.moment().lock_ms
    await asyncio.sleep(3.5)
    assert engine.clock.moment().lock_ms == lock_ms  # no heartbeat is accepted, so no lock ages
    assert write_limit(engine) == "ALL_BUT_ENDINGS"
    assert not engine.disk.has_reserve
    await engine.free_disk()
    assert write_limit(engine) == "NONE"
    assert engine.disk.has_reserve
    assert not engine.clock.held
    await engine.yes(cmd.Progress(id="b", lock_id=signing, progress=5))


@in_checked_engine()
async def test_at_worst_every_write_is_rejected_and_reads_continue(engine: VirtualEngine) -> None:
    lock_id = await engine.held("a")
    engine.disk.fits = lambda batch: False
    tasks = ask_all(
        engine,
        [cmd.Complete(id="a", lock_id=lock_id), cmd.Get(id="a"), cmd.Stats(), cmd.Timeline(id="a"), cmd.ListJobs()],
    )
    answers = [await task for task in tasks]
    assert [answer.status for answer in answers] == [507, 200, 200, 200, 200]
    assert answers[1].data.status == "processing"
    assert write_limit(engine) == "ALL_WRITES"
    assert (await engine.no(cmd.Delete(id="a"))).code == "storage_full"
    await engine.free_disk()
    assert (await engine.yes(cmd.Complete(id="a", lock_id=lock_id))).status == "completed"


@pytest.mark.parametrize("error", [DiskFull("no room for 16 MiB"), OSError("the file cannot be made")])
@in_checked_engine()
async def test_writes_are_accepted_without_space_for_the_reserve_file(engine: VirtualEngine, error: Exception) -> None:
    lock_id = await engine.held("a")
    engine.disk.fill()
    await engine.no(cmd.Progress(id="a", lock_id=lock_id, progress=1))
    assert engine.actor.full_disk.has_reserve  # its space is there for endings
    engine.disk.errors["build_reserve"] = error
    with capture_logs() as lines:
        await asyncio.sleep(1.1)
        assert write_limit(engine) == "NONE"
        assert not engine.clock.held
        await engine.yes(cmd.Create())
        await asyncio.sleep(5)
    assert write_limit(engine) == "NONE"
    assert not engine.actor.full_disk.has_reserve
    expected = ["disk_has_room"] + ["reserve_file_not_rebuilt"] * isinstance(error, OSError)
    assert [line["event"] for line in lines] == expected
    engine.disk.free()
    del engine.disk.errors["build_reserve"]
    await asyncio.sleep(1.1)
    assert engine.disk.has_reserve
    assert engine.actor.full_disk.has_reserve
    tries = engine.disk.calls["build_reserve"]
    await asyncio.sleep(5)
    assert engine.disk.calls["build_reserve"] == tries


@in_checked_engine()
async def test_writes_are_accepted_only_with_spare_space(engine: VirtualEngine) -> None:
    engine.disk.fits = lambda batch: False
    await engine.no(cmd.Create())
    engine.disk.free()
    engine.disk.has_spare = False
    await asyncio.sleep(3)
    assert write_limit(engine) == "CREATES"
    engine.disk.has_spare = True
    await asyncio.sleep(1.1)
    assert write_limit(engine) == "NONE"


@in_checked_engine()
async def test_endings_are_accepted_before_there_is_spare_space(engine: VirtualEngine) -> None:
    lock_id = await engine.held("a")
    engine.disk.fits = lambda batch: False
    await engine.no(cmd.Complete(id="a", lock_id=lock_id))
    assert write_limit(engine) == "ALL_WRITES"
    engine.disk.free()
    engine.disk.has_spare = False
    await asyncio.sleep(1.1)
    assert write_limit(engine) == "ALL_BUT_ENDINGS"
    assert engine.clock.held
    assert (await engine.no(cmd.Create())).code == "storage_full"
    await engine.yes(cmd.Complete(id="a", lock_id=lock_id))


@in_checked_engine()
async def test_a_disk_that_stays_full_is_logged_once_per_step(engine: VirtualEngine) -> None:
    lock_id = await engine.held("a")
    engine.disk.fits = lambda batch: False
    with capture_logs() as lines:
        for _ in range(5):
            await engine.no(cmd.Complete(id="a", lock_id=lock_id))
            engine.disk.free()
            engine.disk.has_spare = False
            await asyncio.sleep(1.1)  # endings are tried again and do not fit
            engine.disk.fits = lambda batch: False
    assert [line["rejected"] for line in lines] == ["creates", "all_but_endings", "all_writes"]
    engine.disk.free()
    with capture_logs() as lines:
        await asyncio.sleep(1.1)
        engine.disk.fits = lambda batch: False
        await engine.no(cmd.Complete(id="a", lock_id=lock_id))
    expected = ["disk_has_room", "reserve_file_rebuilt", "disk_full", "disk_full", "disk_full"]
    assert [line["event"] for line in lines] == expected


@in_checked_engine()
async def test_space_that_is_used_up_at_once_ages_no_lock(engine: VirtualEngine) -> None:
    """Each second the probe succeeds and the next write does not fit. Locks age only while writes are accepted."""
    lock_id = await engine.held("a")
    engine.disk.fits = lambda batch: False
    await engine.no(cmd.Complete(id="a", lock_id=lock_id))
    began = engine.clock.moment().lock_ms
    for _ in range(60):
        await engine.free_disk()
        assert write_limit(engine) == "NONE"
        engine.disk.fits = lambda batch: False
        await engine.no(cmd.Complete(id="a", lock_id=lock_id))
        assert engine.clock.held
    assert engine.clock.moment().lock_ms - began < 60 * 150  # of 66 s
    await engine.free_disk()
    await engine.yes(cmd.Complete(id="a", lock_id=lock_id))


@in_checked_engine()
async def test_the_error_contains_path_and_free_bytes(engine: VirtualEngine) -> None:
    lock_id = await engine.held("a")
    engine.disk.fits = lambda batch: False
    engine.disk.disk_space = DiskSpace("/disk/jobd.db", 4096, 20 << 20)
    no = await engine.no(cmd.Create())
    assert no.message.startswith("The disk of the store is full (4096 bytes free at /disk/jobd.db); nothing was ")
    assert no.details == {"path": "/disk/jobd.db", "free_bytes": 4096, "total_bytes": 20 << 20}
    engine.disk.disk_space = DiskSpace("/disk/jobd.db", 512, 20 << 20)
    await asyncio.sleep(1.1)
    assert "(512 bytes free at" in (await engine.no(cmd.Create())).message
    engine.disk.has_reserve = False  # deleted by hand
    message = (await engine.no(cmd.Complete(id="a", lock_id=lock_id))).message
    assert "the reserve file is missing, so endings may not fit either" in message
    engine.disk.disk_space = None
    await asyncio.sleep(1.1)
    no = await engine.no(cmd.Create())
    assert no.message.startswith("The disk of the store is full, and the reserve file is missing")
    assert no.details == {}


@in_virtual_time
async def test_a_start_on_a_full_disk() -> None:
    disk = await finished_disk()
    disk.fits, disk.has_reserve = lambda batch: False, False
    async with checked_engine(disk) as engine:
        assert (write_limit(engine), engine.actor.full_disk.has_reserve) == ("CREATES", False)
        assert (await engine.no(cmd.Create())).code == "storage_full"
        assert disk.calls.get("write", 0) == 3  # none since
        await engine.yes(cmd.Get(id="done"))


@in_checked_engine()
async def test_a_rejected_batch_has_no_effect(engine: VirtualEngine) -> None:
    lock_id = await engine.held("a")
    await engine.yes(cmd.Create(id="b"))
    token = (await engine.yes(cmd.Start(id="b", worker="w"))).fencing_token
    await engine.yes(cmd.Complete(id="b", lock_id=engine.state.jobs["b"].grant.lock_id))  # type: ignore[union-attr]
    await engine.yes(cmd.Pause(name="paused", reason="deploy"))
    before = dict(engine.state.paused)
    keys = dict(engine.disk.keys)
    engine.disk.fits = lambda batch: False
    tasks = ask_all(engine, [
        cmd.Create(id="c"), cmd.Import(id="d", status="failed", error_message="e"), cmd.Delete(id="b"),
        cmd.Create(id="b"), cmd.Release(id="a", lock_id=lock_id), cmd.Start(id="a", worker="w"), cmd.Pause(name="q"),
        cmd.Resume(name="paused"), cmd.Pause(name="paused", reason="again"),
    ])  # fmt: skip
    keyed = start_task(engine.actor.ask(cmd.Claim(worker="w"), key=key("k")))
    assert {(await task).code for task in tasks} == {"storage_full"}
    assert (await keyed).code == "storage_full"
    assert_consistent(engine)
    assert engine.disk.keys == keys
    assert (engine.state.paused, engine.state.unvalidated) == (before, {})
    assert engine.state.holds("a", lock_id)
    await engine.free_disk()
    await engine.yes(cmd.Release(id="a", lock_id=lock_id))
    assert (await engine.yes(cmd.Start(id="a", worker="w"))).fencing_token > token + 1  # assigned tokens are not reused


class TokenRecordingStorage(MemoryStorage):
    """Records every fencing token that it was asked to write, also in batches that it rejects."""

    def __init__(self, numbers: Numbers | None = None) -> None:
        super().__init__(numbers)
        self.tokens: list[int] = []

    async def write(self, batch: Batch) -> dict[int, bytes]:
        grants = [change.after.grant for change in batch.changes if change.after and change.type == "granted"]
        self.tokens += [grant.fencing_token for grant in grants if grant is not None]
        return await super().write(batch)


@in_virtual_time
async def test_a_token_of_a_rejected_batch_is_never_issued_again() -> None:
    disk = TokenRecordingStorage()
    async with checked_engine(disk) as engine:
        await engine.yes(cmd.Bulk(jobs=[cmd.Create(id=f"job-{number}") for number in range(4)]))
        disk.write_errors.append(DiskFull("full"))
        answers = [
            await task for task in ask_all(engine, [cmd.Start(id=f"job-{number}", worker="w") for number in range(3)])
        ]
        last = await engine.yes(cmd.Start(id="job-3", worker="w"))
        assert len(disk.tokens) == 7
        assert disk.tokens == sorted(set(disk.tokens))
        assert [answer.data.fencing_token for answer in answers] == disk.tokens[3:6]
        assert disk.numbers.next_token == last.fencing_token - (1 << TOKEN_COUNTER_BITS) + 1


@in_virtual_time
async def test_a_full_counter_begins_the_next_epoch_within_a_batch() -> None:
    disk = TokenRecordingStorage(Numbers(epoch=5, next_token=COUNTER_MASK))
    async with checked_engine(disk) as engine:
        await engine.yes(cmd.Bulk(jobs=[cmd.Create(id=f"job-{number}") for number in range(4)]))
        epoch = new_epoch(5, engine.now)
        disk.write_errors.append(DiskFull("full"))  # its tokens are not used again either
        answers = [
            await task for task in ask_all(engine, [cmd.Start(id=f"job-{number}", worker="w") for number in range(3)])
        ]
        expected = [5 << TOKEN_COUNTER_BITS | COUNTER_MASK, *((epoch << TOKEN_COUNTER_BITS) + n for n in range(1, 6))]
        assert disk.tokens == expected
        assert [answer.data.fencing_token for answer in answers] == expected[3:]
        assert (disk.numbers.epoch, disk.numbers.next_token) == (epoch, 6)


@in_checked_engine()
async def test_a_keyed_start_of_a_rejected_batch_is_decided_again(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a"))
    engine.disk.write_errors.append(DiskFull("once"))
    answer = await engine.respond(cmd.Start(id="a", worker="w"), key=key("k"))
    assert not answer.replayed
    engine.actor.undelivered(answer)
    await settle()
    assert engine.state.totals["queued"] == 1  # counted once, so one lost connection is enough


@in_checked_engine()
async def test_a_repeat_in_a_rejected_batch_counts_as_one_connection(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a"))
    start = cmd.Start(id="a", worker="w")
    first = await engine.respond(start, key=key("k"))
    slow = await engine.writing(cmd.Tick())
    engine.disk.write_errors += [None, DiskFull("once")]
    repeat = start_task(engine.actor.ask(start, key=key("k")))
    await settle()
    tick = start_task(engine.actor.ask(cmd.Tick()))
    await settle()
    engine.disk.gate.set()
    await slow
    second = await repeat
    assert second.replayed
    await tick
    engine.actor.undelivered(second)
    await settle()
    assert engine.state.totals["processing"] == 1
    engine.actor.undelivered(first)
    await settle()
    assert engine.state.totals["queued"] == 1


@in_checked_engine()
async def test_a_repeat_on_a_full_disk_gets_its_response(engine: VirtualEngine) -> None:
    """An error would tell the client that the request was not executed."""
    await engine.yes(cmd.Create(id="a"), key=key("create"))
    await engine.yes(cmd.Start(id="a", worker="w"), key=key("start"))
    engine.disk.fits = lambda batch: False
    await engine.no(cmd.Complete(id="a", lock_id=engine.state.jobs["a"].grant.lock_id))  # type: ignore[union-attr]
    assert write_limit(engine) == "ALL_WRITES"
    for command, name in ((cmd.Create(id="a"), "create"), (cmd.Start(id="a", worker="w"), "start")):
        repeated = await engine.respond(command, key=key(name))
        assert repeated.replayed
    assert (await engine.no(cmd.Create(id="b"), key=key("new"))).code == "storage_full"


@in_virtual_time
async def test_a_rejected_batch_can_reuse_an_id_in_another_queue() -> None:
    """The counts of both queues are right after the rollback."""
    repeated = cmd.Import(id="a", queue="y", status="completed"), cmd.Import(id="a", queue="y", status="cancelled")
    for command in (cmd.Create(id="a", queue="y"), *repeated):
        async with checked_engine() as engine:
            await engine.yes(cmd.Create(id="a", queue="x"))
            await engine.yes(cmd.Cancel(id="a"))
            engine.disk.write_errors.append(DiskFull("once"))
            deleted, made = ask_all(engine, [cmd.Delete(id="a"), command])
            assert isinstance(await deleted, Response)
            assert isinstance(await made, ApiError)
            assert_consistent(engine)
            await asyncio.sleep(1)
            await engine.yes(cmd.Create(queue="x"))
            assert engine.disk.queues["x"] == QueueRow()


@in_checked_engine()
async def test_waiting_claims_keep_their_order_after_a_rejected_batch(engine: VirtualEngine) -> None:
    first, second = await waiting_claim(engine, "first"), await waiting_claim(engine, "second")
    engine.disk.write_errors.append(DiskFull("once"))
    await engine.no(cmd.Create(id="a"))
    assert len(engine.actor.waiting_claims) == 2
    await asyncio.sleep(1)
    await engine.yes(cmd.Create(id="b"))
    assert granted_ids(await first) == ["b"]
    await engine.yes(cmd.Create(id="c"))
    assert granted_ids(await second) == ["c"]


@in_virtual_time
async def test_a_claim_of_a_rejected_batch_waits_once() -> None:
    engine = VirtualEngine()
    engine.disk.write_errors.append(DiskFull("once"))
    claim = cmd.Claim(worker="w", wait_ms=30_000)
    tasks = [start_task(engine.actor.ask(claim, key=key("k"))) for _ in range(2)]
    tasks += ask_all(engine, [cmd.Tick()])
    async with engine:
        assert isinstance(await tasks[2], Response)
        assert len(engine.actor.waiting_claims) == 1
        await asyncio.sleep(1)
        await engine.yes(cmd.Create(id="a"))
        assert [granted_ids(await task) for task in tasks[:2]] == [["a"], ["a"]]
        await settle()
        assert engine.state.totals["processing"] == 1
        assert_consistent(engine)


@in_checked_engine()
async def test_a_claim_that_waited_and_was_served_in_a_rejected_batch_is_decided_again(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a", delay_ms=DAY_MS))
    slow = await engine.writing(cmd.Tick())
    engine.disk.write_errors += [None, DiskFull("once")]
    tasks = ask_all(engine, [cmd.Claim(worker="w", wait_ms=30_000), cmd.RunNow(id="a")])
    await settle()
    engine.disk.gate.set()
    assert granted_ids(await tasks[0]) == ["a"]
    assert isinstance(await tasks[1], Response)
    await slow
    assert write_limit(engine) == "CREATES"
    assert [event.type for event in engine.disk.events] == ["created", "updated", "granted"]


@in_checked_engine()
async def test_a_waiting_claim_gets_a_due_job_after_its_batch_was_rejected(engine: VirtualEngine) -> None:
    """The claim must not keep waiting next to a due job."""
    await engine.yes(cmd.Create(id="a", delay_ms=2_000))
    waiting = await waiting_claim(engine, "w")
    engine.disk.write_errors.append(DiskFull("once"))
    begun = engine.now
    assert granted_ids(await waiting) == ["a"]
    assert engine.now == begun + 2_000


@in_checked_engine()
async def test_jobs_that_became_due_on_a_full_disk_are_granted_when_there_is_space(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a", delay_ms=2_000))
    waiting = await waiting_claim(engine, "w")
    engine.disk.fill()
    engine.disk.has_spare = False
    await engine.no(cmd.Tick())
    assert write_limit(engine) == "ALL_BUT_ENDINGS"
    await asyncio.sleep(5)
    assert not waiting.done()
    await engine.free_disk()
    assert waiting.done()
    assert granted_ids(await waiting) == ["a"]


@pytest.mark.parametrize("has_reserve", [True, False])
@in_checked_engine()
async def test_the_release_of_an_undelivered_grant_survives_a_full_disk(
    engine: VirtualEngine, has_reserve: bool
) -> None:
    """A release frees no space, but it ends a grant, so it is accepted once the reserve file is released."""
    await engine.yes(cmd.Create(id="a"))
    answer = await engine.respond(cmd.Start(id="a", worker="w"))
    if has_reserve:
        engine.disk.fill()
    else:
        engine.disk.fits = lambda batch: False
    engine.actor.undelivered(answer)
    await settle()
    assert engine.state.totals["queued"] == has_reserve
    await engine.free_disk()
    assert engine.state.totals["queued"] == 1


@in_checked_engine()
async def test_pending_internal_commands_run_first_when_there_is_space(engine: VirtualEngine) -> None:
    """After a restore, no lock is valid until its grants are ended."""
    lock_id = await engine.held("a")
    engine.disk.fits = lambda batch: False
    engine.actor.enqueue_internal(cmd.EndGrants(ids=["a"], last=True))
    await settle()
    assert write_limit(engine) == "ALL_WRITES"
    assert (await engine.no(cmd.Complete(id="a", lock_id=lock_id))).code == "storage_full"
    assert engine.clock.held
    engine.disk.free()
    ending = start_task(engine.actor.ask(cmd.Complete(id="a", lock_id=lock_id)))
    assert (await ending).code == "storage_full"
    await asyncio.sleep(1.1)
    assert engine.state.totals["queued"] == 1
    late = await engine.no(cmd.Complete(id="a", lock_id=lock_id))
    assert (late.code, late.details["rule"]) == ("lock_lost", "restore")


@in_checked_engine()
async def test_the_extension_after_a_pause_survives_a_full_disk(engine: VirtualEngine) -> None:
    await engine.held("a")
    engine.disk.fits = lambda batch: False
    engine.actor.enqueue_internal(cmd.ExtendAfterPause(ids=["a"], grace_ms=30 * MINUTE_MS))
    await asyncio.sleep(20)  # lock time stands still meanwhile
    await engine.free_disk()
    deadlines = engine.state.jobs["a"].deadlines
    assert deadlines is not None
    assert deadlines.expires >= engine.clock.moment().lock_ms + 30 * MINUTE_MS - 2_000


@in_checked_engine()
async def test_a_store_without_space_for_its_reserve_file_opens(engine: VirtualEngine) -> None:
    engine.disk.errors["build_reserve"] = DiskFull("too small")
    engine.disk.has_reserve = False
    engine.disk.fits = lambda batch: False
    await engine.no(cmd.Tick())
    assert write_limit(engine) == "ALL_BUT_ENDINGS"
    await engine.free_disk()
    assert write_limit(engine) == "NONE"
    assert not engine.clock.held


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
    """A responder that prepares its response. Record its calls in `received`."""

    def __init__(self) -> None:
        self.received: list[tuple[str, Any]] = []

    def done(self) -> bool:
        return any(what == "response" for what, _ in self.received)

    def cancelled(self) -> bool:
        return False

    def prepare(self, answer: Response) -> None:
        self.received.append(("ready", answer))

    def set_result(self, answer: Response | ApiError, /) -> None:
        self.received.append(("response", answer))


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
    disk.commits_inline = False
    async with checked_engine(disk) as engine:
        await engine.yes(cmd.Create(id="a", payload=Raw(b"1")))
        await engine.yes(cmd.Create(id="b", payload=Raw(b"2")))
        for job_id, ready in (("a", True), ("b", False)):
            waiter = PreparingResponder()
            disk.gate.clear()
            assert isinstance(engine.actor.send(cmd.Start(id=job_id, worker="w"), waiter), Envelope)
            await disk.at_gate.wait()
            await settle()
            assert [what for what, _ in waiter.received] == ["ready"] * ready
            disk.gate.set()
            await settle()
            *before, (what, final) = waiter.received
            assert what == "response"
            assert bytes(final.data.job.payload) == (b"1" if ready else b"2")
            assert all(answer is final for _, answer in before)


@in_checked_engine()
async def test_a_response_is_not_sent_if_its_commit_fails(engine: VirtualEngine) -> None:
    waiter = PreparingResponder()
    engine.disk.write_errors.append(DiskFull("full"))
    assert isinstance(engine.actor.send(cmd.Create(id="a"), waiter), Envelope)
    await settle()
    *prepared, (_, final) = waiter.received
    assert [type(ready) for _, ready in prepared] == [Response] * (not engine.disk.commits_inline)
    assert isinstance(final, ApiError)
    assert final.code == "storage_full"


@in_checked_engine()
async def test_reads_are_not_prepared(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a"))
    for read in (cmd.Get(id="a"), cmd.Timeline(id="a")):
        waiter = PreparingResponder()
        engine.actor.send(read, waiter)
        await settle()
        assert [what for what, _ in waiter.received] == ["response"]
    waiter = PreparingResponder()
    engine.actor.send(cmd.Create(id="b"), PreparingResponder())
    engine.actor.send(cmd.Timeline(id="a"), waiter)
    await settle()
    assert [what for what, _ in waiter.received] == ["response"]


@pytest.mark.parametrize("others", [0, 1])
@in_virtual_time
async def test_a_bug_while_responses_are_sent_ends_the_actor(others: int) -> None:
    """Also if they are sent while the next batch is written; otherwise later commands would wait forever."""
    engine = VirtualEngine()
    running = start_task(engine.actor.run())
    engine.disk.gate.clear()
    engine.actor.send(cmd.Create(id="a"), RaisingResponder())
    await engine.disk.at_gate.wait()
    requests = ask_all(engine, [cmd.Create(id="b")] * others)
    await settle()
    engine.disk.gate.set()
    with pytest.raises(DiskBroken, match="canary"):
        await running
    await asyncio.gather(*requests)  # no command waits forever
