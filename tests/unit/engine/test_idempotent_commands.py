"""Commands with idempotency keys, through the actor."""

from __future__ import annotations

import asyncio

import pytest
from msgspec import UNSET, Raw

from jobd.engine.idempotency import KEPT_MS
from jobd.model import commands as cmd
from jobd.model.responses import JobView
from jobd.model.storage import StoredResponse
from tests.support import virtual_engine
from tests.support.memory_storage import MemoryStorage


@virtual_engine.in_checked_engine()
async def test_a_repeated_key_gets_the_same_response(engine: virtual_engine.VirtualEngine) -> None:
    create = cmd.Create(payload=Raw(b"[1]"))
    first = await engine.respond(create, key=virtual_engine.key("k"))
    second = await engine.respond(create, key=virtual_engine.key("k"))
    assert (first.replayed, second.replayed) == (False, True)
    assert (first.status, second.status) == (201, 201)
    assert first.data.id.encode() in bytes(second.data)
    assert b'"payload":[1]' in bytes(second.data)
    assert len(engine.disk.jobs) == 1
    other = await engine.no(create, key=virtual_engine.key("k", "another body"))
    assert (other.code, other.status) == ("idempotency_key_reused", 422)
    await asyncio.sleep(KEPT_MS / 1000)
    repeated = await engine.respond(create, key=virtual_engine.key("k"))
    assert not repeated.replayed
    assert len(engine.disk.jobs) == 2


@virtual_engine.in_virtual_time
async def test_a_repeat_waits_for_the_first_request_in_flight() -> None:
    engine = virtual_engine.VirtualEngine()
    create = cmd.Create(id="a", payload=Raw(b"[1]"))
    tasks = [virtual_engine.start_task(engine.actor.ask(create, key=virtual_engine.key("k"))) for _ in range(3)]
    tasks.append(virtual_engine.start_task(engine.actor.ask(create, key=virtual_engine.key("k", "other"))))
    async with engine:
        first, second, third, other = [await task for task in tasks]
        assert (first.replayed, second.replayed, third.replayed) == (False, True, True)
        assert bytes(second.data) == bytes(third.data)
        assert other.code == "idempotency_key_reused"
        slow = await engine.writing(cmd.Create(), key=virtual_engine.key("l"))
        repeat = virtual_engine.start_task(engine.actor.ask(cmd.Create(), key=virtual_engine.key("l")))
        await virtual_engine.settle()
        assert not repeat.done()
        engine.disk.gate.set()
        assert not (await slow).replayed
        assert (await repeat).replayed
        virtual_engine.assert_consistent(engine)


@virtual_engine.in_virtual_time
async def test_keys_outlive_a_restart() -> None:
    async with virtual_engine.checked_engine() as engine:
        await engine.yes(cmd.Create(id="a"), key=virtual_engine.key("create"))
        await engine.yes(cmd.Start(id="a", worker="w"), key=virtual_engine.key("start"))
        disk = engine.disk
    async with virtual_engine.checked_engine(disk) as engine:
        repeated = await engine.respond(cmd.Create(id="a"), key=virtual_engine.key("create"))
        assert (repeated.replayed, repeated.status) == (True, 201)
        repeated = await engine.respond(cmd.Start(id="a", worker="w"), key=virtual_engine.key("start"))
        assert repeated.replayed
        assert repeated.data.job.lock.worker == "w"


@virtual_engine.in_checked_engine()
async def test_a_damaged_stored_response_is_an_error(engine: virtual_engine.VirtualEngine) -> None:
    await engine.yes(cmd.Create(), key=virtual_engine.key("k"))
    engine.disk.keys.clear()
    assert (await engine.no(cmd.Create(), key=virtual_engine.key("k"))).code == "internal_error"
    assert len(engine.disk.jobs) == 1


@virtual_engine.in_virtual_time
async def test_a_key_whose_grants_have_ended_is_decided_again() -> None:
    """A restored backup has such keys."""
    disk = MemoryStorage()
    disk.keys["k"] = StoredResponse("k", virtual_engine.key("k").body_hash, 0, grants=[("a", "old")])
    async with virtual_engine.checked_engine(disk) as engine:
        await engine.yes(cmd.Create(id="a"))
        answer = await engine.respond(cmd.Start(id="a", worker="w"), key=virtual_engine.key("k"))
        assert not answer.replayed
        assert disk.keys["k"].grants == [("a", answer.data.lock_id)]


@virtual_engine.in_checked_engine()
async def test_a_response_that_changed_nothing_is_not_stored(engine: virtual_engine.VirtualEngine) -> None:
    assert (await engine.no(cmd.Cancel(id="a"), key=virtual_engine.key("k"))).code == "job_not_found"
    await engine.yes(cmd.Create(id="a"))
    assert (await engine.yes(cmd.Cancel(id="a"), key=virtual_engine.key("k"))).status == "cancelled"
    repeated = await engine.respond(cmd.Cancel(id="a"), key=virtual_engine.key("k"))
    assert repeated.replayed
    await engine.yes(cmd.Claim(worker="w"), key=virtual_engine.key("empty"))
    await engine.yes(cmd.Create(id="b"))
    assert virtual_engine.granted_ids(
        await engine.actor.ask(cmd.Claim(worker="w"), key=virtual_engine.key("empty"))
    ) == ["b"]


@virtual_engine.in_checked_engine()
async def test_an_empty_claim_is_not_stored_even_if_it_expired_jobs(engine: virtual_engine.VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a", expires_at=engine.now + 1_000))
    await asyncio.sleep(1)
    assert virtual_engine.granted_ids(await engine.actor.ask(cmd.Claim(worker="w"), key=virtual_engine.key("k"))) == []
    await engine.yes(cmd.Create(id="b"))
    assert virtual_engine.granted_ids(await engine.actor.ask(cmd.Claim(worker="w"), key=virtual_engine.key("k"))) == [
        "b"
    ]


@pytest.mark.parametrize(
    "command",
    [
        cmd.Update(id="a", priority=3),
        cmd.Cancel(id="a", reason="r"),
        cmd.ForceFail(id="a"),
        cmd.Delete(id="done"),
        cmd.Pause(name="q"),
        cmd.Bulk(jobs=[cmd.Create(id="x", payload=Raw(b"5")), cmd.Create(id="done", payload=Raw(b'"p"'))]),
        cmd.RunNow(id="a"),
    ],
    ids=lambda command: type(command).__name__,
)
@virtual_engine.in_virtual_time
async def test_a_stored_response_is_complete(command: cmd.AnyCommand) -> None:
    disk = await virtual_engine.finished_disk()
    async with virtual_engine.checked_engine(disk) as engine:
        await engine.yes(cmd.Create(id="a", payload=Raw(b"[9]"), delay_ms=5))
        first = await engine.respond(command, key=virtual_engine.key("k"))
        repeated = await engine.respond(command, key=virtual_engine.key("k"))
        assert repeated.replayed
        assert repeated.status == first.status
        body = bytes(repeated.data)
        if isinstance(first.data, JobView):
            assert first.data.payload is not UNSET
            assert bytes(first.data.payload) in body


@virtual_engine.in_checked_engine()
async def test_a_repeated_start_returns_its_current_grant(engine: virtual_engine.VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a", payload=Raw(b"1")))
    start = cmd.Start(id="a", worker="w")
    first = await engine.respond(start, key=virtual_engine.key("k"))
    await engine.yes(cmd.Progress(id="a", lock_id=first.data.lock_id, progress=40))
    repeated = await engine.respond(start, key=virtual_engine.key("k"))
    assert (repeated.replayed, repeated.data.lock_id) == (True, first.data.lock_id)
    assert (repeated.data.job.progress, repeated.data.job.payload) == (40, Raw(b"1"))
    await engine.yes(cmd.Release(id="a", lock_id=first.data.lock_id))
    assert engine.disk.keys == {}
    anew = await engine.respond(start, key=virtual_engine.key("k"))
    assert not anew.replayed
    assert anew.data.fencing_token == first.data.fencing_token + 1
    await engine.yes(cmd.ForceReset(id="a"))
    await engine.yes(cmd.Start(id="a", worker="other"))
    rejection = await engine.no(start, key=virtual_engine.key("k"))
    assert (rejection.code, rejection.details["locked_by"]) == ("already_locked", "other")


@virtual_engine.in_checked_engine()
async def test_a_repeated_claim_returns_its_current_grants(engine: virtual_engine.VirtualEngine) -> None:
    for name in "abc":
        await engine.yes(cmd.Create(id=name))
    claim = cmd.Claim(worker="w", limit=2)
    first = await engine.respond(claim, key=virtual_engine.key("k"))
    assert virtual_engine.granted_ids(first) == ["a", "b"]
    assert (await engine.no(claim, key=virtual_engine.key("k", "other"))).code == "idempotency_key_reused"
    await engine.yes(cmd.Complete(id="a", lock_id=first.data.grants[0].lock_id))
    assert virtual_engine.granted_ids(await engine.actor.ask(claim, key=virtual_engine.key("k"))) == ["b"]
    await engine.yes(cmd.Complete(id="b", lock_id=first.data.grants[1].lock_id))
    assert engine.disk.keys == {}
    assert virtual_engine.granted_ids(await engine.actor.ask(claim, key=virtual_engine.key("k"))) == ["c"]


@virtual_engine.in_checked_engine()
async def test_a_repeated_waiting_claim_waits_once(engine: virtual_engine.VirtualEngine) -> None:
    first = await virtual_engine.waiting_claim(engine, "w", key=virtual_engine.key("k"))
    repeat = await virtual_engine.waiting_claim(engine, "w", key=virtual_engine.key("k"))
    other = await engine.no(cmd.Claim(worker="w", wait_ms=30_000), key=virtual_engine.key("k", "other"))
    assert other.code == "idempotency_key_reused"
    assert len(engine.actor.waiting_claims) == 1
    await engine.yes(cmd.Create(id="a"))
    assert virtual_engine.granted_ids(await first) == virtual_engine.granted_ids(await repeat) == ["a"]
    assert engine.state.totals["processing"] == 1
    engine.actor.undelivered(await first)
    await virtual_engine.settle()
    assert engine.state.totals["processing"] == 1  # the other connection has it
    engine.actor.undelivered(await repeat)
    await virtual_engine.settle()
    assert engine.state.totals["processing"] == 0
    assert engine.disk.keys == {}


@virtual_engine.in_checked_engine()
async def test_a_waiting_claim_is_removed_when_all_its_callers_are_gone(engine: virtual_engine.VirtualEngine) -> None:
    first = await virtual_engine.waiting_claim(engine, "w", key=virtual_engine.key("k"))
    repeat = await virtual_engine.waiting_claim(engine, "w", key=virtual_engine.key("k"))
    first.cancel()
    await virtual_engine.settle()
    assert len(engine.actor.waiting_claims) == 1
    repeat.cancel()
    await virtual_engine.settle()
    assert len(engine.actor.waiting_claims) == 0
    await engine.yes(cmd.Create(id="a"))
    assert engine.state.totals["queued"] == 1


@virtual_engine.in_checked_engine()
async def test_a_repeat_gets_the_grant_of_an_abandoned_request(engine: virtual_engine.VirtualEngine) -> None:
    first = await virtual_engine.waiting_claim(engine, "w", key=virtual_engine.key("k"))
    repeat = await virtual_engine.waiting_claim(engine, "w", key=virtual_engine.key("k"))
    first.cancel()
    await engine.yes(cmd.Create(id="a"))
    assert virtual_engine.granted_ids(await repeat) == ["a"]
    await virtual_engine.settle()
    assert engine.state.totals["processing"] == 1


@virtual_engine.in_virtual_time
async def test_keyed_requests_are_rejected_at_the_limit_of_keys() -> None:
    engine = virtual_engine.VirtualEngine()
    engine.actor._decider.keys.limit = 1
    async with engine:
        await engine.yes(cmd.Create(), key=virtual_engine.key("k"))
        rejection = await engine.no(cmd.Create(), key=virtual_engine.key("l"))
        assert (rejection.code, rejection.status) == ("overloaded", 503)
        await engine.yes(cmd.Create())
        await asyncio.sleep(600)
        assert (await engine.no(cmd.RunNow(id="a", dry_run=True), key=virtual_engine.key("m"))).code == "job_not_found"
        await engine.yes(cmd.Create())
        assert set(engine.disk.keys) == {"k"}, "a dry run stores no key"
        await engine.yes(cmd.Create(), key=virtual_engine.key("l"))
        assert set(engine.disk.keys) == {"l"}
