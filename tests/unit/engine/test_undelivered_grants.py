"""Grants that no caller received are released."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from jobd.model import commands as cmd
from jobd.model.events import Event
from jobd.model.responses import Response
from tests.support.memory_storage import MemoryStorage
from tests.support.virtual_engine import (
    VirtualEngine,
    checked_engine,
    in_checked_engine,
    in_virtual_time,
    key,
    settle,
    start_task,
)


@in_checked_engine()
async def test_an_undelivered_grant_is_released(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a"))
    answer = await engine.respond(cmd.Start(id="a", worker="w"))
    engine.actor.undelivered(answer)
    await settle()
    view = await engine.yes(cmd.Get(id="a"))
    assert (view.status, view.attempt) == ("queued", 0)
    assert [event.type for event in engine.disk.events] == ["created", "granted", "undelivered"]
    repeated = await engine.respond(cmd.Start(id="a", worker="w"))
    engine.actor.undelivered(answer)  # an old response ends no newer grant
    await settle()
    assert engine.state.holds("a", repeated.data.lock_id)


@in_virtual_time
async def test_a_caller_that_leaves_before_the_batch_gets_no_grant() -> None:
    engine = VirtualEngine()
    await asyncio.sleep(0)
    created = start_task(engine.actor.ask(cmd.Create(id="a")))
    abandoned = start_task(engine.actor.ask(cmd.Start(id="a", worker="w")))
    await settle()
    abandoned.cancel()
    await settle()
    async with engine:
        await created
        await settle()
        assert [event.type for event in engine.disk.events] == ["created"]


@in_virtual_time
async def test_the_grant_of_a_caller_that_leaves_during_the_commit_is_released() -> None:
    for name in (None, key("k")):
        async with checked_engine() as engine:
            await engine.yes(cmd.Create(id="a"))
            abandoned = await engine.writing(cmd.Claim(worker="w"), key=name)
            abandoned.cancel()
            await settle()
            engine.disk.gate.set()
            await settle()
            assert [event.type for event in engine.disk.events] == ["created", "granted", "undelivered"]
            assert engine.disk.keys == {}


@in_checked_engine()
async def test_the_grant_of_a_caller_that_leaves_after_the_commit_is_released(engine: VirtualEngine) -> None:
    """The response is set, but the waiting task is cancelled before it reads it."""
    await engine.yes(cmd.Create(id="a"))
    abandoned = start_task(engine.actor.ask(cmd.Start(id="a", worker="w")))

    def hang_up(changes: Sequence[Event]) -> None:
        abandoned.cancel()

    engine.actor.on_commit.append(hang_up)
    with pytest.raises(asyncio.CancelledError):
        await abandoned
    engine.actor.on_commit.pop()
    await settle()
    assert engine.state.totals == {"queued": 1, "processing": 0, "completed": 0, "failed": 0, "cancelled": 0}


@in_checked_engine()
async def test_a_keyed_grant_stays_while_one_connection_received_it(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a"))
    start = cmd.Start(id="a", worker="w")
    first = await engine.respond(start, key=key("k"))
    second = await engine.respond(start, key=key("k"))
    engine.actor.undelivered(first)
    await settle()
    assert engine.state.totals["processing"] == 1
    engine.actor.undelivered(second)
    await settle()
    assert engine.state.totals["queued"] == 1
    assert engine.disk.keys == {}
    # The stored response was deleted in the same transaction as the grant.
    assert engine.disk.batches[-1].forget_keys == ["k"]


@in_checked_engine()
async def test_a_repeat_before_the_release_keeps_the_grant(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a"))
    start = cmd.Start(id="a", worker="w")
    first = await engine.respond(start, key=key("k"))
    repeat = start_task(engine.actor.ask(start, key=key("k")))
    await asyncio.sleep(0)  # the release is in the mailbox
    engine.actor.undelivered(first)
    repeated = await repeat
    await settle()
    assert repeated.replayed
    assert engine.state.holds("a", repeated.data.lock_id)


@in_checked_engine()
async def test_an_abandoned_repeat_does_not_release_the_grant(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a"))
    start = cmd.Start(id="a", worker="w")
    first = await engine.writing(start, key=key("k"))
    repeat = start_task(engine.actor.ask(start, key=key("k")))
    await settle()
    repeat.cancel()
    await settle()
    engine.disk.gate.set()
    answer = await first
    await settle()
    assert engine.state.holds("a", answer.data.lock_id)
    engine.actor.undelivered(answer)
    await settle()
    assert engine.state.totals["queued"] == 1


@in_checked_engine()
async def test_the_grant_of_an_abandoned_call_stays_for_its_repeat(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a"))
    start = cmd.Start(id="a", worker="w")
    first = await engine.writing(start, key=key("k"))
    repeat = start_task(engine.actor.ask(start, key=key("k")))
    await settle()
    first.cancel()
    await settle()
    engine.disk.gate.set()
    repeated = await repeat
    await settle()
    assert engine.state.holds("a", repeated.data.lock_id)


@in_virtual_time
async def test_a_grant_that_an_earlier_daemon_may_have_sent_is_not_released() -> None:
    """Found by simulation, seed 22611: a power cut after delivery, then an abandoned repeat under the key."""
    disk, start = MemoryStorage(), cmd.Start(id="a", worker="w")
    async with VirtualEngine(disk) as engine:
        await engine.yes(cmd.Create(id="a"))
        first = await engine.yes(start, key=key("k"))
    async with VirtualEngine(disk) as engine:
        repeated = await engine.respond(start, key=key("k"))
        assert repeated.replayed
        engine.actor.undelivered(repeated)
        await settle()
        assert engine.state.holds("a", first.lock_id)
        await engine.yes(cmd.Complete(id="a", lock_id=first.lock_id))


@in_checked_engine()
async def test_a_keyed_grant_is_forgotten_at_its_end_and_not_at_that_of_another(engine: VirtualEngine) -> None:
    other = await engine.held("other")
    await engine.yes(cmd.Create(id="a"))
    granted = await engine.yes(cmd.Start(id="a", worker="w"), key=key("k"))
    await engine.yes(cmd.Complete(id="other", lock_id=other))
    assert engine.actor._decider._receivers == {granted.lock_id: 1}
    await engine.yes(cmd.Complete(id="a", lock_id=granted.lock_id))
    assert not engine.actor._decider._receivers


@in_virtual_time
async def test_nothing_is_remembered_of_a_keyed_grant_that_ended_before_its_caller_left() -> None:
    engine = VirtualEngine()
    engine.disk.gate.clear()
    created = start_task(engine.actor.ask(cmd.Create(id="a")))
    started = start_task(engine.actor.ask(cmd.Start(id="a", worker="w"), key=key("k")))
    cancelled = start_task(engine.actor.ask(cmd.Cancel(id="a")))
    await settle()
    async with engine:
        await engine.disk.at_gate.wait()
        started.cancel()
        await settle()
        engine.disk.gate.set()
        assert isinstance(await created, Response)
        assert isinstance(await cancelled, Response)
        await settle()
        assert not engine.actor._decider._receivers
