"""Claims that wait for work."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from jobd.core.worker_presence import WorkerPresence
from jobd.engine.actor import CLOCK_CHECK_S, DiskBroken
from jobd.engine.envelope import Envelope
from jobd.engine.waiting_claims import FEW, WaitingClaims
from jobd.model import commands as cmd
from jobd.model.clocks import MonotonicS
from jobd.model.errors import ApiError
from jobd.model.job import DAY_MS
from jobd.model.storage import DiskFull, JobQuery
from tests.support.virtual_engine import (
    VirtualEngine,
    ask_all,
    assert_consistent,
    checked_engine,
    granted_ids,
    in_checked_engine,
    in_virtual_time,
    key,
    settle,
    start_task,
    waiting_claim,
)

# -- the actor ---------------------------------------------------------------------------------------------------------


@in_checked_engine()
async def test_waiting_claims_are_served_in_order_of_arrival(engine: VirtualEngine) -> None:
    waiting = [await waiting_claim(engine, f"w-{number}", limit=limit) for number, limit in enumerate((1, 2, 1))]
    await engine.yes(cmd.Bulk(jobs=[cmd.Create(id=name) for name in "abcde"]))
    assert [granted_ids(await task) for task in waiting] == [["a"], ["b", "c"], ["d"]]
    assert len(engine.actor.waiting_claims) == 0
    assert engine.disk.batches[0].changes[0].type == "created"  # all in one transaction
    assert len(engine.disk.batches) == 1


@in_checked_engine()
async def test_the_order_of_arrival_holds_across_queues(engine: VirtualEngine) -> None:
    """A claim for several queues does not take a job that another claim has waited for longer."""
    first = await waiting_claim(engine, "first", queues=["q"])
    second = await waiting_claim(engine, "second", queues=["default", "q"])
    await engine.yes(cmd.Bulk(jobs=[cmd.Create(id="a"), cmd.Create(id="b", queue="q", priority=-1)]))
    assert granted_ids(await first) == ["b"]
    assert granted_ids(await second) == ["a"]


@in_virtual_time
async def test_a_waiting_claim_is_answered_when_the_disk_fails() -> None:
    engine = VirtualEngine()
    running = asyncio.create_task(engine.actor.run())
    waiting = await waiting_claim(engine, "w")
    engine.disk.write_errors.append(OSError("EIO"))
    rejection = await engine.no(cmd.Create(id="a"))
    assert rejection.code == "outcome_unknown"
    answer = await waiting
    assert isinstance(answer, ApiError)
    assert answer.code == "outcome_unknown"
    with pytest.raises(DiskBroken):
        await running


@in_checked_engine()
async def test_a_waiting_claim_is_served_before_a_new_one(engine: VirtualEngine) -> None:
    waiting = await waiting_claim(engine, "first")
    tasks = ask_all(engine, [cmd.Create(id="a"), cmd.Claim(worker="second")])
    assert granted_ids(await waiting) == ["a"]
    assert granted_ids(await tasks[1]) == []


@in_checked_engine()
async def test_a_claim_waits_for_its_queues_and_kinds(engine: VirtualEngine) -> None:
    one = await waiting_claim(engine, "one", queues=["q", "r", "q"], kinds=["k", "l", "k"])
    any_kind = await waiting_claim(engine, "any", queues=["q"])
    two = await waiting_claim(engine, "two", queues=["q"], kinds=["k"])
    await engine.yes(cmd.Create(id="a", queue="elsewhere", kind="k"))
    await engine.yes(cmd.Create(id="b", queue="r", kind="m"))
    await settle()
    assert len(engine.actor.waiting_claims) == 3
    await engine.yes(cmd.Create(id="c", queue="q", kind="m"))
    assert granted_ids(await any_kind) == ["c"]
    await engine.yes(cmd.Create(id="d", queue="r", kind="l"))
    assert granted_ids(await one) == ["d"]
    await engine.yes(cmd.Create(id="e", queue="q", kind="k"))
    assert granted_ids(await two) == ["e"]


@in_checked_engine()
async def test_commands_that_make_a_job_due_serve_a_waiting_claim(engine: VirtualEngine) -> None:
    lock_id = await engine.held("a", lock_ttl_ms=60_000)
    waiting = await waiting_claim(engine, "w")
    await engine.yes(cmd.Release(id="a", lock_id=lock_id))
    assert granted_ids(await waiting) == ["a"]
    waiting = await waiting_claim(engine, "w")
    await engine.yes(cmd.ForceReset(id="a"))
    assert granted_ids(await waiting) == ["a"]
    await engine.yes(cmd.Pause(name="default"))
    await engine.yes(cmd.Create(id="b"))
    waiting = await waiting_claim(engine, "w")
    await engine.yes(cmd.Resume(name="default"))
    assert granted_ids(await waiting) == ["b"]
    await engine.yes(cmd.Create(id="c", delay_ms=DAY_MS))
    waiting = await waiting_claim(engine, "w")
    await engine.yes(cmd.RunNow(id="c"))
    assert granted_ids(await waiting) == ["c"]


@in_checked_engine()
async def test_a_waiting_claim_gets_a_delayed_job_when_it_is_due(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a", delay_ms=2_500))
    waiting = await waiting_claim(engine, "w")
    begun = engine.now
    assert granted_ids(await waiting) == ["a"]
    assert engine.now == begun + 2_500


@in_checked_engine()
async def test_a_step_of_the_clock_that_makes_a_job_eligible_wakes_a_waiting_claim(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a", delay_ms=DAY_MS // 2))
    await engine.yes(cmd.Create(id="b", queue="q", expires_at=engine.now + DAY_MS // 4))
    ahead = await waiting_claim(engine, "ahead")
    begun = asyncio.get_running_loop().time()
    engine.step_ms += DAY_MS // 2
    assert granted_ids(await ahead) == ["a"]
    back = await waiting_claim(engine, "back", queues=["q"])
    engine.step_ms -= DAY_MS // 2
    assert granted_ids(await back) == ["b"]
    assert asyncio.get_running_loop().time() - begun == 2 * CLOCK_CHECK_S


@in_checked_engine()
async def test_a_claim_is_answered_empty_when_its_wait_ends(engine: VirtualEngine) -> None:
    short = await waiting_claim(engine, "short", wait_ms=1_000)
    long = await waiting_claim(engine, "long", wait_ms=2_000)
    begun = engine.now
    answer = await short
    assert (granted_ids(answer), engine.now - begun) == ([], 1_000)
    assert len(engine.actor.waiting_claims) == 1
    assert (granted_ids(await long), engine.now - begun) == ([], 2_000)
    assert engine.disk.batches == []


@in_checked_engine()
async def test_an_abandoned_claim_gets_no_job(engine: VirtualEngine) -> None:
    left, waiting = await waiting_claim(engine, "gone"), await waiting_claim(engine, "here")
    left.cancel()
    await settle()
    assert len(engine.actor.waiting_claims) == 1
    await engine.yes(cmd.Create(id="a"))
    assert granted_ids(await waiting) == ["a"]


@in_checked_engine()
async def test_a_claim_skips_overdue_jobs_and_waits(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a", expires_at=engine.now + 1_000))
    await asyncio.sleep(1)
    waiting = await waiting_claim(engine, "w")
    assert (await engine.yes(cmd.Get(id="a"))).status == "queued"
    await engine.yes(cmd.Create(id="b", expires_at=engine.now + 1_000, delay_ms=1_000))
    await asyncio.sleep(1)
    await settle()
    assert (await engine.yes(cmd.Get(id="b"))).status == "queued"
    await engine.yes(cmd.Create(id="c"))
    assert granted_ids(await waiting) == ["c"]


@in_checked_engine()
async def test_end_claim_waits_answers_waiting_claims_and_accepts_no_new_ones(engine: VirtualEngine) -> None:
    waiting = [await waiting_claim(engine, "w"), await waiting_claim(engine, "w", key=key("k"))]
    engine.actor.end_claim_waits()
    assert [granted_ids(await task) for task in waiting] == [[], []]
    assert granted_ids(await engine.actor.ask(cmd.Claim(worker="w", wait_ms=30_000))) == []
    await engine.yes(cmd.Create())  # other commands continue


@in_virtual_time
async def test_stop_drains_the_mailbox() -> None:
    engine = VirtualEngine()
    running = start_task(engine.actor.run())
    waiting = await waiting_claim(engine, "w")
    under_way = await engine.writing(cmd.Create(id="a", queue="q"))
    in_mailbox = start_task(engine.actor.ask(cmd.Create(id="b", queue="q")))
    await settle()
    engine.actor.stop()
    assert (await engine.actor.ask(cmd.Ping())).code == "shutting_down"  # type: ignore[union-attr]
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


# -- WaitingClaims -----------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_the_claim_that_waits_longest_is_found() -> None:
    claims = WaitingClaims(WorkerPresence())
    loop = asyncio.get_running_loop()

    def claim(deadline: float, **fields: Any) -> Envelope:
        envelope = Envelope(cmd.Claim(worker="w", **fields), futures=[loop.create_future()])
        envelope.deadline = MonotonicS(deadline)
        return envelope

    first, second, third = claim(5, kinds=["k"]), claim(3), claim(4, kinds=["k", "l"])
    for envelope in (first, second, third):
        claims.add(envelope)
    assert (claims.first("default", "k"), claims.first("default", "l")) == (first, second)
    assert claims.first("other", "k") is None
    assert claims.next_deadline() == 3
    assert claims.remove(first)
    assert not claims.remove(first)
    assert claims.first("default", "k") is second
    claims.add(first)  # its batch was rejected: it has its old place again
    assert claims.first("default", "k") is first
    assert list(claims.take_expired(MonotonicS(4))) == [second, third]
    assert (len(claims), claims.next_deadline()) == (1, MonotonicS(5))
    assert claims.take_all() == [first]
    assert claims.next_deadline() is None


@in_virtual_time
async def test_a_claim_of_many_queues_and_kinds_takes_few_places() -> None:
    """10,000 claims with a place for each queue and kind would take 11 GiB."""
    many = {"queues": [f"q-{number}" for number in range(100)], "kinds": [f"k-{number}" for number in range(100)]}
    async with checked_engine() as engine:
        first = await waiting_claim(engine, "first", **many | {"kinds": many["kinds"][:99]})
        waiting = [await waiting_claim(engine, f"w-{number}", **many) for number in range(2)]
        last = await waiting_claim(engine, "last", queues=["q-7"], kinds=["k-99"])
        await waiting_claim(engine, "few", **many | {"kinds": many["kinds"][:2]})
        places = [places for _, places, _ in engine.actor.waiting_claims.by_ticket.values()]
        assert [len(each) for each in places] == [100, 100, 100, 1, FEW]
        await engine.yes(cmd.Bulk(jobs=[cmd.Create(id=name, queue="q-7", kind="k-99") for name in "abc"]))
        assert [granted_ids(await task) for task in [*waiting, last]] == [["a"], ["b"], ["c"]]
        await engine.yes(cmd.Create(id="d", queue="q-7", kind="k-9"))
        assert granted_ids(await first) == ["d"]


@in_checked_engine()
async def test_a_claim_gets_the_next_job_if_its_first_one_is_quarantined_before_the_commit(
    engine: VirtualEngine,
) -> None:
    await engine.yes(
        cmd.Bulk(jobs=[cmd.Create(id="a", kind="k", delay_ms=10), cmd.Create(id="b", kind="l", delay_ms=10)])
    )
    waiting = await waiting_claim(engine, "w")
    engine.disk.gate.clear()
    await engine.disk.at_gate.wait()
    engine.disk.bad_jobs["a"] = "checksum"
    await engine.disk.find_jobs(JobQuery())
    engine.disk.gate.set()
    assert granted_ids(await waiting) == ["b"]


@in_virtual_time
async def test_a_keyed_claim_whose_caller_leaves_before_the_batch_does_not_wait() -> None:
    engine = VirtualEngine()
    left = start_task(engine.actor.ask(cmd.Claim(worker="gone", wait_ms=30_000), key=key("k")))
    await settle()
    left.cancel()
    await settle()
    async with engine:
        await settle()
        assert len(engine.actor.waiting_claims) == 0
        await engine.yes(cmd.Create(id="a"))
        assert [event.type for event in engine.disk.events] == ["created"]


@in_checked_engine()
async def test_a_claim_whose_caller_leaves_during_a_failed_commit_does_not_wait_again(engine: VirtualEngine) -> None:
    waiting = await waiting_claim(engine, "w")
    engine.disk.gate.clear()
    engine.disk.write_errors.append(DiskFull("full"))
    created = start_task(engine.actor.ask(cmd.Create(id="a")))
    await engine.disk.at_gate.wait()
    waiting.cancel()
    await settle()
    engine.disk.gate.set()
    assert isinstance(await created, ApiError)
    assert len(engine.actor.waiting_claims) == 0
