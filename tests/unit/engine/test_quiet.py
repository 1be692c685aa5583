"""Directives to workers, and quiet rules: what claims get, and when."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import UNSET
from msgspec.structs import replace

from jobd.core.quiet import REPEAT_MS, directive_for, quiet_takers
from jobd.core.replay import apply
from jobd.core.state import State
from jobd.model import commands as cmd
from jobd.model.responses import DirectiveView, Grants
from jobd.model.storage import DiskFull
from tests.support.virtual_engine import (
    VirtualEngine,
    checked_engine,
    granted_ids,
    in_checked_engine,
    in_virtual_time,
    seconds,
    settle,
    waiting_claim,
)

OLD = cmd.About(instance="i", host="b", version="2.4.1")
NEW = cmd.About(instance="j", host="a", version="2.4.0")
OPERATOR = cmd.Operator("ana", "here")
QUIET = cmd.AddQuietRule(host="b", version="2.4.1", reason="dies")


async def told(engine: VirtualEngine, **fields: Any) -> str | None:
    """Return the action of the directive in the response to a claim that does not wait."""
    grants = await engine.yes(cmd.Claim(worker="w", **({"about": OLD} | fields)))
    assert not (grants.grants and grants.directive is not UNSET)
    return None if grants.directive is UNSET else grants.directive.action


async def seen(engine: VirtualEngine, name: str = "w") -> tuple[bool, str | None]:
    [view] = [each for each in (await engine.yes(cmd.Workers())).workers if each.worker == name]
    return view.quiet, view.directive


@in_checked_engine()
async def test_a_waiting_claim_is_answered_with_a_directive_at_once(engine: VirtualEngine) -> None:
    waiting, other = await waiting_claim(engine, "w", about=OLD), await waiting_claim(engine, "other")
    view = await engine.yes(cmd.QuietWorker(name="w", reason="bad"), by="admin:ana", operator=OPERATOR)
    assert engine.disk.batches[-1].audit[0].details == {"worker": "w"}
    assert (view.worker, view.action, view.state, view.sent) == ("w", "quiet", "waiting", True)
    assert (await waiting).data == Grants([], DirectiveView("quiet", "admin:ana", "bad"))
    quiet = await waiting_claim(engine, "w", limit=0, about=OLD)
    assert await seen(engine) == (True, None), "it obeys"
    await engine.yes(cmd.Bulk(jobs=[cmd.Create(id="a"), cmd.Create(id="b")]))
    assert granted_ids(await other) == ["a"]
    assert not quiet.done()
    await engine.yes(cmd.ResumeWorker(name="w"))
    assert (await quiet).data.directive.action == "resume"
    assert granted_ids(await engine.respond(cmd.Claim(worker="w", about=OLD))) == ["b"]
    assert await seen(engine) == (False, None)
    assert not engine.state.presence.directed


@in_checked_engine()
async def test_a_directive_that_a_waiting_claim_obeys_is_not_pending(engine: VirtualEngine) -> None:
    await waiting_claim(engine, "w", about=OLD)
    assert (await engine.yes(cmd.ResumeWorker(name="w"))).sent
    assert await seen(engine) == (False, None)
    await engine.yes(cmd.QuietWorker(name="w"))
    quiet = await waiting_claim(engine, "w", limit=0, about=replace(OLD, quiet=True))
    assert (await engine.yes(cmd.QuietWorker(name="w"))).sent
    assert await seen(engine) == (True, None)
    await engine.yes(cmd.ResumeWorker(name="w"))
    assert (await quiet).data.directive.action == "resume"
    assert await seen(engine) == (True, "resume")
    assert not (await engine.yes(cmd.QuietWorker(name="w"))).sent
    assert await seen(engine) == (True, "quiet"), "it replaces the one that was sent"
    await engine.yes(cmd.Claim(worker="w", limit=0, about=replace(OLD, quiet=True)))
    assert await seen(engine) == (True, None)
    assert not (await engine.yes(cmd.QuietWorker(name="w"))).sent
    assert await seen(engine) == (True, "quiet"), "no claim of it waits"


@in_checked_engine()
async def test_a_busy_worker_waits_for_directives_only_and_is_not_quiet(engine: VirtualEngine) -> None:
    busy = await waiting_claim(engine, "w", limit=0, busy=True, about=OLD)
    assert await seen(engine) == (False, None)
    await engine.yes(cmd.Create(id="a"))
    assert granted_ids(await engine.respond(cmd.Claim(worker="other"))) == ["a"]
    rule = (await engine.yes(cmd.AddQuietRule(queue="q", reason="r"))).id  # its claim stays
    await engine.yes(cmd.EndQuietRule(rule=rule))
    assert not busy.done()
    assert (await engine.yes(cmd.QuietWorker(name="w"))).sent
    assert (await busy).data.directive.action == "quiet"
    assert await seen(engine) == (False, "quiet")
    quiet = await waiting_claim(engine, "w", limit=0, about=OLD)
    assert await seen(engine) == (True, None)
    await engine.yes(cmd.ResumeWorker(name="w"))
    assert (await quiet).data.directive.action == "resume"
    assert await told(engine, limit=0, busy=True) is None
    assert await seen(engine) == (False, None)


@in_checked_engine()
async def test_a_worker_that_does_not_obey_gets_no_jobs_and_is_told_again(engine: VirtualEngine) -> None:
    """A lost response is repeated, but a program that knows no directives must not claim in a loop."""
    assert directive_for(engine.state, cmd.Claim(worker="w")) is None
    assert await told(engine) is None
    assert not (await engine.yes(cmd.QuietWorker(name="w"))).sent
    await engine.yes(cmd.Create(id="a"))
    assert [await told(engine), await told(engine)] == ["quiet", None]
    held = await waiting_claim(engine, "w", wait_ms=REPEAT_MS - 1, about=OLD)
    assert await seen(engine) == (True, "quiet")
    await seconds(REPEAT_MS / 1000)
    assert (await held).data.directive.action == "quiet", "in the response at the end of the wait"
    await seconds(REPEAT_MS / 1000)
    assert await told(engine) == "quiet"
    waiting = await waiting_claim(engine, "w", about=OLD)
    await engine.yes(cmd.ResumeWorker(name="w"))
    assert granted_ids(await waiting) == ["a"]


@pytest.mark.parametrize("about", [NEW, None], ids=["of another process", "of no process"])
def test_a_directive_is_for_the_process_that_had_the_name(about: cmd.About | None) -> None:
    @in_virtual_time
    async def check() -> None:
        async with checked_engine() as engine:
            await told(engine)
            await engine.yes(cmd.StopWorker(name="w"))
            assert await told(engine, about=about) == (None if about is NEW else "stop")

    check()


@pytest.mark.parametrize("how", ["goodbye", "another process"])
def test_a_claim_that_waited_for_a_directive_gets_jobs_once_that_is_over(how: str) -> None:
    @in_virtual_time
    async def check() -> None:
        async with checked_engine() as engine:
            await told(engine)
            await engine.yes(cmd.QuietWorker(name="w"))
            await told(engine)
            waiting = await waiting_claim(engine, "w", about=OLD)
            await engine.yes(cmd.Create(id="a"))
            await engine.yes(
                cmd.Goodbye("w", "i") if how == "goodbye" else cmd.Claim(worker="w", queues=["q"], about=NEW)
            )
            await settle()
            assert granted_ids(await waiting) == ["a"]

    check()


@in_checked_engine()
async def test_stop_is_repeated_until_the_goodbye(engine: VirtualEngine) -> None:
    waiting = await waiting_claim(engine, "w", about=OLD)
    await engine.yes(cmd.StopWorker(name="w"))
    assert (await waiting).data.directive.action == "stop"
    await seconds(2)
    assert await told(engine, limit=0) == "stop"
    await engine.yes(cmd.Goodbye("w", "i"))
    rejection = await engine.no(cmd.QuietWorker(name="w"))
    assert rejection.code == "worker_gone"
    assert "jobctl quiet --host" in rejection.message
    assert "jobctl quiet lists the rules" in (await engine.no(cmd.ResumeWorker(name="w"))).message
    assert (await engine.no(cmd.StopWorker(name="x"))).code == "worker_not_found"
    await engine.yes(cmd.Claim(worker="x-1"))
    assert "Did you mean x-1?" in (await engine.no(cmd.StopWorker(name="x"))).message
    assert await told(engine) is None, "the name is used again"


@in_checked_engine()
async def test_a_rule_covers_waiting_and_later_workers_of_a_host_and_version(engine: VirtualEngine) -> None:
    old, new = await waiting_claim(engine, "old", about=OLD), await waiting_claim(engine, "new", about=NEW)
    rule = await engine.yes(QUIET)
    assert engine.disk.batches[-1].queues == {}, "a rule of no queue changes none"
    assert (rule.workers, rule.queue, rule.until) == (1, None, None)
    assert rule.described == engine.state.quiet[rule.id].describe()
    assert rule.described.endswith("until resumed: dies")
    await engine.yes(cmd.Bulk(jobs=[cmd.Create(id=each) for each in "abc"]))
    assert granted_ids(await new) == ["a"]
    assert [await told(engine), await told(engine)] == ["quiet", None], "it is told once"
    later = await waiting_claim(engine, "w", about=OLD)
    await engine.yes(cmd.Claim(worker="gone", about=OLD))
    await engine.yes(cmd.Goodbye("gone", "i"))
    names = [name for name, _ in quiet_takers(engine.state, "default", "")]
    assert (names, quiet_takers(engine.state, "q", "")) == (["old", "w"], [])
    [group] = [each for each in (await engine.yes(cmd.Workers())).groups if each.host == "b"]
    assert (group.quiet, (await engine.yes(cmd.QuietRules())).rules[0].workers) == (2, 2)
    await engine.yes(cmd.EndQuietRule(rule=rule.id, reason="mended"), operator=OPERATOR)
    assert engine.disk.batches[-1].changes[0].reason == "mended"
    [entry] = engine.disk.batches[-1].audit
    assert (entry.what, entry.details, entry.queue) == ("resume", {"rule": rule.id}, None)
    assert [granted_ids(await task) for task in (old, later)] == [["b"], ["c"]]
    assert (await engine.no(cmd.EndQuietRule(rule=rule.id))).code == "quiet_rule_not_found"


@in_checked_engine()
async def test_a_claim_that_is_held_by_a_rule_says_so_at_the_end_of_its_wait(engine: VirtualEngine) -> None:
    held = await waiting_claim(engine, "w", wait_ms=5, about=OLD)
    rule = await engine.yes(QUIET)
    await seconds(0.01)
    assert (await held).data.directive == DirectiveView("quiet", "client", "dies", rule.id)


@in_checked_engine()
async def test_a_rule_for_a_queue_leaves_the_others(engine: VirtualEngine) -> None:
    await engine.yes(cmd.AddQuietRule(queue="mail", reason="bad"), operator=OPERATOR)
    assert engine.disk.batches[-1].audit[0].queue == "mail"
    for queue in ("mail", "other"):
        await engine.yes(cmd.Claim(worker=queue, queues=[queue]))
    assert (await engine.yes(cmd.QuietRules())).rules[0].workers == 1
    assert (await engine.yes(cmd.AddQuietRule(version="9", reason="r"))).workers == 0
    waiting = await waiting_claim(engine, "w", queues=["mail", "other"])
    await engine.yes(cmd.Bulk(jobs=[cmd.Create(id="a", queue="mail"), cmd.Create(id="b", queue="other")]))
    assert granted_ids(await waiting) == ["b"]
    assert await seen(engine) == (False, None)
    await seconds(601)
    assert (await engine.yes(cmd.QuietRules())).rules[0].workers == 0, "it is gone"
    job = engine.state.get("a")
    assert job is not None
    await engine.yes(cmd.Claim(worker="mail", queues=["mail"]))
    engine.state.presence.note_lost("mail", job)
    assert (await engine.yes(cmd.QuietRules())).rules[0].workers == 0, "it has died"
    assert sum(group.quiet for group in (await engine.yes(cmd.Workers())).groups) == 0
    assert "mail died" in (await engine.no(cmd.QuietWorker(name="mail"))).message


@in_checked_engine()
async def test_a_second_rule_for_the_same_workers_replaces_reason_and_end(engine: VirtualEngine) -> None:
    first = await engine.yes(QUIET)
    await seconds(1)
    until = engine.now + 60_000
    again = await engine.yes(cmd.AddQuietRule(host="b", version="2.4.1", reason="why", until=until), by="admin:eve")
    assert (again.id, again.at, again.reason, again.until, again.by) == (first.id, first.at, "why", until, "admin:eve")
    batches = len(engine.disk.batches)
    assert await engine.yes(cmd.AddQuietRule(host="b", version="2.4.1", reason="why", until=until)) == again
    assert len(engine.disk.batches) == batches
    engine.run_maintainer()
    await seconds(61)
    assert (await engine.yes(cmd.QuietRules())).rules == []
    assert [change.by for batch in engine.disk.batches for change in batch.changes][-1] == "daemon"


@in_checked_engine()
async def test_rules_that_are_wrong_or_too_many_are_rejected(engine: VirtualEngine) -> None:
    assert (await engine.no(cmd.AddQuietRule(reason="r"))).details == {"field": "$.host"}
    assert (await engine.no(cmd.AddQuietRule(host="h", reason="r", until=1))).details == {"field": "$.until"}
    for number in range(cmd.MAX_QUIET_RULES):
        await engine.yes(cmd.AddQuietRule(queue=f"q-{number}", reason="r"))
    rejected = await engine.no(cmd.AddQuietRule(queue="more", reason="r"))
    assert (rejected.code, rejected.details) == ("too_many_quiet_rules", {"limit": cmd.MAX_QUIET_RULES})


@in_virtual_time
async def test_rules_survive_a_restart_and_a_takeover() -> None:
    async with checked_engine() as engine:
        rule = await engine.yes(QUIET)
        ended = await engine.yes(cmd.AddQuietRule(host="c", reason="r"))
        await engine.yes(cmd.EndQuietRule(rule=ended.id))
        standby = State()
        for batch in engine.disk.batches:
            apply(standby, batch)
        assert standby.quiet == engine.state.quiet
    async with checked_engine(engine.disk) as engine:
        await engine.yes(cmd.Create(id="a"))
        assert await told(engine) == "quiet"
        assert await told(engine, about=NEW) is None
        assert [each.id for each in (await engine.yes(cmd.QuietRules())).rules] == [rule.id]


@in_checked_engine()
async def test_a_rule_that_is_not_written_is_undone(engine: VirtualEngine) -> None:
    waiting = await waiting_claim(engine, "w", about=OLD)
    engine.disk.write_errors += [DiskFull("full"), DiskFull("full")]
    engine.disk.has_reserve = False
    assert (await engine.no(QUIET)).code == "storage_full"
    assert not engine.state.quiet
    await engine.free_disk()
    await engine.yes(cmd.Create(id="a"))
    await settle()
    assert granted_ids(await waiting) == ["a"]


@in_checked_engine()
async def test_why_names_the_quiet_workers(engine: VirtualEngine) -> None:
    await engine.yes(QUIET)
    await told(engine)
    await engine.yes(cmd.Create(id="a"))
    view = await engine.yes(cmd.Why(id="a"))
    assert "one worker that takes such jobs is quiet: w" in view.because
    await engine.yes(cmd.Claim(worker="x", about=OLD))
    assert "2 workers that take them are quiet: w, x" in (await engine.yes(cmd.Why(id="a"))).because
