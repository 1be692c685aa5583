"""Audit entries: in the transaction of the change, also for rejected actions, and only for operators."""

from __future__ import annotations

import asyncio
from typing import Any, get_args

import pytest
from msgspec.structs import replace

from jobd.api import admin_routes
from jobd.core import audit
from jobd.core.rules.plan_rules import version
from jobd.engine.disk_full import WriteLimit
from jobd.model import commands as cmd
from jobd.model.job import SECOND_MS
from jobd.model.responses import AuditPage, EmptyResponse, Response
from jobd.model.storage import AUDITED_READS, SIGN_INS, AuditEntry, audit_share
from tests.support.rule_harness import RuleHarness
from tests.support.virtual_engine import VirtualEngine, in_engine

EVE = cmd.Operator("eve", "10.0.0.7")
AUDIT_NAMES = {kind: kind.audit_name for kind in get_args(cmd.AnyCommand) if kind.audit_name is not None}


def audit_entries(engine: VirtualEngine) -> list[AuditEntry]:
    return list(engine.disk.audited.values())


def entry(rules: RuleHarness, command: cmd.AnyCommand, operator: cmd.Operator | None = EVE) -> AuditEntry | None:
    by = "client" if operator is None else operator.by
    decision = rules.decide(command, by=by, admin=True)
    return audit.entry(
        cmd.IssuedCommand(command, by, b"", True, operator), decision.answer, decision.changes, rules.now
    )


def test_every_command_of_operators_is_audited() -> None:
    commands = {
        route.request for route in admin_routes.ROUTES if route.changes and route.request in get_args(cmd.AnyCommand)
    }
    missing = {kind.__name__ for kind in commands if kind.audit_name is None} - {"ImportCheck"}  # changes nothing
    assert not missing, f"{missing} need an audit_name (model/commands/)"
    assert not [kind for kind in AUDIT_NAMES if kind.admission == "read"]


def test_the_audit_name_of_a_command_is_that_of_its_call() -> None:
    calls = {route.request: route for route in admin_routes.ROUTES if route.request in AUDIT_NAMES}
    verbs = {"DELETE": "delete", "PUT": "put"}
    names = {
        request: verbs.get(route.method, route.path.rpartition("/")[2])
        + ("-schedule" if "/schedules/" in route.path else "")
        for request, route in calls.items()
    }
    # The call of Recover continues until nothing is stuck.
    assert names | {cmd.Recover: "recover-stuck", cmd.EndQuietRule: "resume"} == AUDIT_NAMES, (
        "an audit_name is the last part of the path of its route"
    )


def test_commands_without_an_operator_and_reads_have_no_entry(rules: RuleHarness) -> None:
    rules.create("a")
    assert entry(rules, cmd.Get(id="a")) is None
    assert entry(rules, cmd.Create(id="b")) is None
    assert entry(rules, cmd.Cancel(id="a"), operator=None) is None


def test_a_change_of_a_schedule_names_it_and_one_without_effect_has_no_entry(rules: RuleHarness) -> None:
    put = cmd.PutSchedule(id="s", every_ms=1_000, job=cmd.ScheduledJob(queue="q"))
    made = entry(rules, put)
    assert made is not None
    assert (made.what, made.queue, made.details, made.jobs) == ("put-schedule", "q", {"schedule": "s"}, 0)
    assert entry(rules, put) is None
    ran = entry(rules, cmd.RunSchedule(id="s"))
    assert ran is not None
    assert (ran.job_id, ran.jobs) == (rules.last().job_id, 1)
    rejected = entry(rules, cmd.PauseSchedule(id="nope"))
    assert rejected is not None
    assert (rejected.outcome, rejected.details) == ("schedule_not_found", {"schedule": "nope"})


def test_a_dry_run_has_no_entry(rules: RuleHarness) -> None:
    rules.create("a")
    for job_id in ("a", "b"):
        for command in (
            cmd.RunNow(id=job_id),
            cmd.Update(id=job_id),
            cmd.Transition(id=job_id, from_="queued", to="failed"),
        ):
            assert entry(rules, replace(command, dry_run=True)) is None
            assert entry(rules, command) is not None


def test_an_entry_has_operator_address_action_reason_and_outcome(rules: RuleHarness) -> None:
    rules.create("a", queue="video")
    found = entry(rules, cmd.ForceFail(id="a", reason="broken"))
    details = {"from": "queued", "to": "failed", "event": rules.last().seq}
    expected = AuditEntry(rules.now, "eve", "10.0.0.7", "force-fail", "a", "video", "broken", "done", 1, details)
    assert found == expected
    nameless = entry(rules, cmd.ForceReset(id="a"), cmd.Operator("", "::1"))
    assert nameless is not None
    assert (nameless.who, nameless.address, nameless.reason) == ("admin", "::1", None)


def test_the_details_of_an_update_have_the_new_values(rules: RuleHarness) -> None:
    rules.create("a")
    found = entry(rules, cmd.Update(id="a", priority=-3, reason="urgent"))
    assert found is not None
    assert found.reason == "urgent"
    assert found.details == {"priority": -3, "from": "queued", "to": "queued", "event": rules.last().seq}


def test_an_action_that_changed_nothing_has_an_entry(rules: RuleHarness) -> None:
    rules.create("a")
    for command, queue in ((cmd.RunNow(id="a"), None), (cmd.Pause(name="q"), "q"), (cmd.Pause(name="q"), "q")):
        found = entry(rules, command)
        assert found is not None
        assert (found.outcome, found.jobs, found.queue) == ("done", 0, queue)


def test_the_outcome_of_a_rejected_action_is_its_error_code(rules: RuleHarness) -> None:
    rules.create("a")
    missing = entry(rules, cmd.Cancel(id="nobody", reason="why"))
    assert missing == AuditEntry(rules.now, "eve", "10.0.0.7", "cancel", "nobody", None, "why", "job_not_found")
    rejected = entry(rules, cmd.Delete(id="a"))
    assert rejected is not None
    assert (rejected.outcome, rejected.jobs, rejected.details) == ("invalid_transition", 0, None)


def test_an_action_of_many_commands_counts_its_jobs_and_names_none(rules: RuleHarness) -> None:
    operator = replace(EVE, part_of="p1")
    line = entry(rules, cmd.Import(id="a", status="failed", error_message="x"), operator)
    assert line == AuditEntry(rules.now, "eve", "10.0.0.7", "import", jobs=1, part_of="p1")
    assert entry(rules, cmd.Import(id="a", status="failed"), operator) is None  # skipped
    none = entry(rules, cmd.Recover(limit=9), operator)
    assert none == AuditEntry(rules.now, "eve", "10.0.0.7", "recover-stuck", part_of="p1")


@pytest.mark.parametrize(("others", "named"), [(["b"], None), ([], "a")])
def test_a_plan_counts_the_jobs_that_it_changed_and_names_a_single_one(
    rules: RuleHarness, others: list[str], named: str | None
) -> None:
    rules.create("a")
    jobs = [cmd.ExpectedVersion("a", version(rules.job())), *(cmd.ExpectedVersion(other, "x") for other in others)]
    found = entry(rules, cmd.ApplyEndings(action="cancel", jobs=jobs, reason="why"), replace(EVE, part_of="p1"))
    one: dict[str, Any] = {"jobs": 1, "part_of": "p1", "changed_ids": ["a"]}
    assert found == AuditEntry(rules.now, "eve", "10.0.0.7", "plan-cancel", named, reason="why", **one)


def test_a_recorded_action_is_stored_unchanged() -> None:
    call = cmd.IssuedCommand(cmd.RecordAction(what="backup", details={"n": 1}, reason="why"), operator=EVE)
    found = audit.entry(call, Response(EmptyResponse()), [], 5)
    assert found == AuditEntry(5, "eve", "10.0.0.7", "backup", reason="why", details={"n": 1})


# -- through the actor ------------------------------------------------------------------------------------------------


@in_engine()
async def test_an_entry_is_in_the_transaction_of_its_change(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a"))
    await engine.yes(cmd.ForceFail(id="a"), by=EVE.by, admin=True, operator=EVE)
    batch = engine.disk.batches[-1]
    assert [change.type for change in batch.changes] == ["force_failed"]
    assert [change.by for change in batch.changes] == ["admin:eve"]
    assert [row.what for row in batch.audit] == ["force-fail"]


@in_engine()
async def test_a_rejected_action_has_an_entry_but_a_rejected_worker_has_none(engine: VirtualEngine) -> None:
    await engine.no(cmd.Cancel(id="a"), operator=EVE)
    await engine.no(cmd.Cancel(id="a"))
    assert [(row.what, row.outcome) for row in audit_entries(engine)] == [("cancel", "job_not_found")]


@in_engine()
async def test_a_repeated_idempotency_key_is_one_entry(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a"))
    for _ in range(2):
        await engine.yes(cmd.ForceFail(id="a"), key=cmd.IdempotencyKey("k", "body"), operator=EVE)
    assert len(audit_entries(engine)) == 1


@in_engine()
async def test_a_change_that_was_not_written_leaves_no_entry(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a"))
    engine.disk.fits = lambda batch: not batch.audit
    await engine.no(cmd.Transition(id="a", from_="queued", to="cancelled"), operator=EVE)
    assert audit_entries(engine) == []
    assert (await engine.yes(cmd.Get(id="a"))).status == "queued"
    assert engine.actor.full_disk.write_limit == WriteLimit.ALL_BUT_ENDINGS
    engine.disk.free()


@in_engine()
async def test_on_a_full_disk_endings_have_entries_and_errors_have_none(engine: VirtualEngine) -> None:
    await engine.yes(cmd.Create(id="a"))
    engine.disk.fill()
    await engine.no(cmd.Create(id="b"))
    await engine.no(cmd.Pause(name="q"))
    writes = len(engine.disk.batches)
    await engine.no(cmd.Cancel(id="nobody"), operator=EVE)
    assert len(engine.disk.batches) == writes
    await engine.no(cmd.Pause(name="q"), operator=EVE)
    await engine.yes(cmd.Cancel(id="a"), operator=EVE)
    assert [(row.what, row.outcome) for row in audit_entries(engine)] == [("cancel", "done")]
    engine.disk.free()


@in_engine()
async def test_while_creates_are_rejected_changes_have_entries_and_reads_have_none(engine: VirtualEngine) -> None:
    engine.actor.full_disk.write_limit = WriteLimit.CREATES
    engine.actor.full_disk.next_probe += 999
    for what in sorted(AUDITED_READS | SIGN_INS):
        await engine.yes(cmd.RecordAction(what=what), operator=EVE)
    await engine.yes(cmd.RecordAction(what="sign-in", outcome="unauthorized"), operator=EVE)
    await engine.no(cmd.Get(id="a"), operator=EVE)
    await engine.yes(cmd.RecordAction(what="cleanup"), operator=EVE)
    assert [row.what for row in audit_entries(engine)] == ["cleanup"]
    engine.actor.full_disk.write_limit = WriteLimit.NONE
    await engine.yes(cmd.RecordAction(what="artifact", job_id="a"), operator=EVE)
    await engine.yes(cmd.RecordAction(what="sign-in", outcome="unauthorized"), operator=EVE)
    assert [(row.what, row.job_id, row.outcome) for row in audit_entries(engine)[1:]] == [
        ("artifact", "a", "done"),
        ("sign-in", None, "unauthorized"),
    ]


@pytest.mark.parametrize(
    ("what", "outcome", "share"),
    [
        ("cancel", "done", "changes"),
        ("import", "done", "changes"),
        ("cancel", "lock_lost", "rejected"),
        ("sign-in", "unauthorized", "unknown callers"),
        ("export", "unauthorized", "rejected"),
        *((what, "done", "reads") for what in sorted(AUDITED_READS)),
        *((what, "done", "sign-ins") for what in sorted(SIGN_INS)),
    ],
)
def test_every_action_belongs_to_a_share_of_the_log(what: str, outcome: str, share: str) -> None:
    assert audit_share(what, outcome) == share


@in_engine()
async def test_recovery_has_an_entry_only_if_an_operator_requested_it(engine: VirtualEngine) -> None:
    await engine.held("a", lock_ttl_ms=SECOND_MS)
    await asyncio.sleep(60)
    await engine.maintainer.recover_stuck(replace(EVE, part_of="p"), "the rack is dark")
    await engine.maintainer.recover_stuck()
    found = [(row.what, row.who, row.jobs, row.reason) for row in audit_entries(engine)]
    assert found == [("recover-stuck", "eve", 1, "the rack is dark")]
    assert "No update from worker" in (engine.disk.events[-1].reason or "")
    assert engine.disk.events[-1].by == "admin:eve"


@in_engine()
async def test_the_log_is_read_in_pages_newest_first(engine: VirtualEngine) -> None:
    for n in range(5):
        await engine.yes(cmd.RecordAction(what=f"n{n}", details={"n": n}), operator=EVE)
    page: AuditPage = await engine.yes(cmd.AuditLog(limit=3))
    assert [(each.seq, each.action, each.details) for each in page.entries] == [
        (5, "n4", {"n": 4}),
        (4, "n3", {"n": 3}),
        (3, "n2", {"n": 2}),
    ]
    assert page.next_cursor == "3"
    rest: AuditPage = await engine.yes(cmd.AuditLog(limit=3, cursor="3"))
    assert [each.action for each in rest.entries] == ["n1", "n0"]
    assert rest.next_cursor is None
    for none in (cmd.AuditLog(who="bob"), cmd.AuditLog(since=engine.now + 1)):
        assert (await engine.yes(none)).entries == []
    await engine.yes(cmd.Pause(name="q", reason="why"), operator=EVE)
    [last] = (await engine.yes(cmd.AuditLog(limit=1))).entries
    assert (last.at, last.who, last.address, last.outcome) == (engine.now, "eve", "10.0.0.7", "done")
    assert (last.queue, last.job_id, last.reason, last.changed) == ("q", None, "why", 0)


def test_a_copy_is_found_by_both_jobs(rules: RuleHarness) -> None:
    rules.create("a")
    made = entry(rules, cmd.Copy(id="a"))
    assert made is not None
    assert (made.job_id, made.changed_ids, made.jobs) == ("a", [rules.last().job_id], 1)
