"""Per command: its share of the mailbox, the jobs that it names, and whether a full disk accepts it."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from msgspec import inspect
from msgspec.structs import fields

from jobd.engine.envelope import SHARES
from jobd.model import commands as cmd
from jobd.model.job import FINISHED, LIVE, Job
from jobd.model.responses import EmptyResponse, Response
from tests.support.rule_harness import RuleHarness

COMMANDS = get_args(cmd.AnyCommand)

# The admission class that follows from what a command does, the strongest effect first.
CLASS_OF_EFFECT: dict[str, str] = {
    "creates": "create", "grants": "grant", "ends": "ending", "changes": "change", "reads": "read"
}  # fmt: skip
# Exceptions by purpose. An operator's requeue waits until the disk has space. Downtime of the daemon costs no worker
# its lock, even on a full disk. A takeover keeps jobs due even then. The check of an import is accepted when the import
# would be. The action of a plan selects one of two classes. RepairJobs changes only damaged jobs. Ping measures the
# mailbox. A new schedule needs space, and its deletion frees space.
BY_PURPOSE: dict[Any, str] = {
    cmd.ForceReset: "change", cmd.RetryJob: "change", cmd.ExtendAfterPause: "ending", cmd.KeepDue: "ending",
    cmd.ImportCheck: "create", cmd.ApplyPlan: "change", cmd.ApplyEndings: "ending", cmd.RepairJobs: "change",
    cmd.Ping: "ping", cmd.PutSchedule: "create", cmd.DeleteSchedule: "ending", cmd.Fire: "create",
}  # fmt: skip
OF_SCHEDULES = [kind for kind in COMMANDS if "Schedule" in kind.__name__ or kind is cmd.Fire]
JOB_IDS = ["new", "due", "running", "stalled", "failed", "expired"]


@pytest.mark.parametrize("kind", COMMANDS, ids=lambda kind: kind.__name__)
def test_the_admission_class_of_a_command_follows_from_its_effect(kind: Any) -> None:
    """A wrong class would reject a read on a full disk, or accept a create."""
    effects = _effects(kind)
    strongest = next((effect for effect in CLASS_OF_EFFECT if effect in effects), "changes")
    assert kind.admission == BY_PURPOSE.get(kind, CLASS_OF_EFFECT[strongest])


def _effects(kind: Any) -> set[str]:
    """Decide commands of this type about jobs in each state, and return what they do."""
    of_grants = kind in (cmd.EndGrants, cmd.ExtendAfterPause)
    required = {field.name: _value(field.type) for field in _fields(kind) if field.required}
    found: set[str] = set()
    is_of_jobs = {"id", "ids"} & {*required} and kind not in OF_SCHEDULES
    for job_id in ("running", "stalled") if of_grants else JOB_IDS if is_of_jobs else ("any",):
        rules, locks = RuleHarness(), {}
        rules.completed("expired")
        rules.accept(cmd.Fail(id="failed", lock_id=rules.held("failed"), error_message="e"))
        locks["stalled"] = rules.held("stalled", worker="silent")
        rules.create("late", expires_at=rules.now + 1)
        rules.accept_admin(cmd.Pause(name="paused", until=rules.now + 1))
        rules.accept_admin(cmd.PutSchedule(id="any", every_ms=1_000, job=cmd.ScheduledJob()))
        rules.advance(rules.policy.keep_completed_ms + 1)
        locks["running"] = rules.held("running")
        rules.create("due")
        known: dict[str, Any] = {"id": job_id, "ids": [job_id], "lock_id": locks.get(job_id, "other"), "name": "silent"}
        if kind is cmd.Bulk:
            known["jobs"] = [cmd.Create()]
        decision = rules.decide(kind(**{name: known.get(name, value) for name, value in required.items()}), admin=True)
        found |= {_effect(change.before, change.after) for change in decision.changes}
        if isinstance(decision.answer, Response) and not isinstance(decision.answer.data, EmptyResponse):
            found.add("changes" if kind.audit_name else "reads")
    return found


def _fields(kind: Any) -> tuple[inspect.Field, ...]:
    type_ = inspect.type_info(kind)
    assert isinstance(type_, inspect.StructType)
    return type_.fields


def _value(type_: inspect.Type) -> Any:
    """Return a value of this type."""
    match type_:
        case inspect.Metadata():
            return _value(type_.type)
        case inspect.LiteralType():
            return type_.values[0]
        case inspect.IntType() | inspect.FloatType():
            return 10
        case inspect.BoolType():
            return False
        case inspect.BytesType():
            return b"{}"
        case inspect.ListType():
            return []
        case inspect.DictType():
            return {}
        case _:
            return "text"


def _effect(before: Job | None, after: Job | None) -> str:
    """Name what a change does to a job. Without a row it is about a queue."""
    if before is None:
        return "changes" if after is None else "creates"
    if after is None or (before.status in LIVE and after.status in FINISHED):
        return "ends"
    if after.status != before.status:
        return "grants" if after.status == "processing" else "ends"
    return "changes"


@pytest.mark.parametrize("kind", COMMANDS, ids=lambda kind: kind.__name__)
def test_every_command_has_a_share_of_the_mailbox(kind: Any) -> None:
    expected = {"create": 0.70, "read": 0.85, "grant": 0.85}.get(kind.admission, 1.0)
    assert SHARES[_made(kind).admission] == expected


@pytest.mark.parametrize("kind", COMMANDS, ids=lambda kind: kind.__name__)
def test_only_commands_with_several_jobs_or_reads_have_a_weight_of_their_own(kind: Any) -> None:
    assert kind.weight is not cmd.Command.weight or _made(kind).weight() == 1


@pytest.mark.parametrize("kind", COMMANDS, ids=lambda kind: kind.__name__)
def test_the_jobs_that_a_command_names_are_loaded_first(kind: Any) -> None:
    """Those that end or credit grants, or keep jobs due, name live jobs, which memory holds."""
    names = {field.name for field in fields(kind)}
    named = _made(kind).job_ids()
    if kind is cmd.Bulk or issubclass(kind, cmd.ApplyPlan):
        assert named == ["a", "b"]
    elif kind in OF_SCHEDULES:
        assert named == (["a:1970-01-01T00:00:00Z"] if kind is cmd.Fire else [])
    elif kind in (cmd.ExtendAfterPause, cmd.EndGrants, cmd.KeepDue, cmd.Recover):
        assert named == []
    elif "ids" in names:
        assert kind in (cmd.DeleteExpired, cmd.RepairJobs, cmd.WaitForJobs)
        assert named == ["a", "b"]
    else:
        assert named == (["a"] if "id" in names else [])


def test_a_plan_that_can_delete_names_its_jobs() -> None:
    """A later command of the batch that shows one of its jobs needs the payload before the deletion."""
    jobs = [cmd.ExpectedVersion("a", "1")]
    deleting = {
        action for action in get_args(cmd.PlanAction) if cmd.ApplyEndings(action=action, jobs=jobs).deleted_ids()
    }
    assert deleting == {"delete", "cleanup"}


def _made(kind: Any) -> Any:
    """Return a command of this type with unvalidated values."""
    given: dict[str, Any] = {field.name: None for field in fields(kind) if field.required}
    if "id" in kind.__struct_fields__:
        given["id"] = "a"
    if "ids" in kind.__struct_fields__:
        given["ids"] = ["a", "b"]
    if issubclass(kind, cmd.ApplyPlan):
        given["jobs"] = [cmd.ExpectedVersion("a", "1"), cmd.ExpectedVersion("b", "2")]
    if kind is cmd.Bulk:
        given["jobs"] = [cmd.Create(id="a"), cmd.Create(), cmd.Create(id="b")]
    if kind is cmd.Fire:
        given["scheduled_at"] = 0
    if kind is cmd.KeepDue:
        given["jobs"] = {"a": 1, "b": 2}
    return kind(**given)
