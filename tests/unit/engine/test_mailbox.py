"""Per command: its share of the mailbox, the jobs that it names, and whether a full disk accepts it."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from msgspec.structs import fields

from jobd.engine.mailbox import deleted_ids, named_ids, share
from jobd.model.commands import (
    AnyCommand,
    ApplyEndings,
    ApplyPlan,
    Bulk,
    Create,
    DeleteExpired,
    EndGrants,
    ExpectedVersion,
    PlanAction,
    Recover,
    RepairJobs,
)
from jobd.model.commands import ExtendAfterPause as Credit

COMMANDS = get_args(AnyCommand)

BY_ADMISSION: dict[str, set[str]] = {
    "create": {"Create", "Bulk", "Import", "ImportCheck"},
    "read": {
        "Get", "GetVersion", "Timeline", "Why", "Validate", "LateResults", "ListJobs", "SearchJobs", "Queues",
        "Workers", "Stats", "Locks", "Export", "AuditLog", "Preview",
    },
    "ping": {"Ping"},
    "grant": {"Start", "Claim"},
    "change": {
        "Adopt", "ApplyPlan", "Progress", "Extend", "ExtendLock", "ForceReset", "Transition", "RunNow", "Update",
        "Pause", "Resume", "EndPauses", "RepairJobs", "RecordAction", "Tick", "Report",
    },
    "ending": {
        "Complete", "Fail", "Release", "Cancel", "ForceFail", "ReleaseLock", "Undelivered", "Recover", "TakeBack",
        "Expire", "EndGrants", "ExtendAfterPause", "Delete", "DeleteExpired", "ApplyEndings",
    },
}  # fmt: skip


def test_every_command_has_its_admission_class() -> None:
    """There is no default: it would reject a read on a full disk, or accept a create."""
    found: dict[str, set[str]] = {}
    for kind in COMMANDS:
        found.setdefault(kind.admission, set()).add(kind.__name__)
    assert found == BY_ADMISSION


@pytest.mark.parametrize("kind", COMMANDS, ids=lambda kind: kind.__name__)
def test_every_command_has_a_share_of_the_mailbox(kind: Any) -> None:
    expected = {"create": 0.70, "read": 0.85, "grant": 0.85}.get(kind.admission, 1.0)
    assert share(_made(kind)) == expected


@pytest.mark.parametrize("kind", COMMANDS, ids=lambda kind: kind.__name__)
def test_the_jobs_that_a_command_names_are_loaded_first(kind: Any) -> None:
    """Those that end or credit grants name live jobs, which memory holds."""
    names = {field.name for field in fields(kind)}
    named = named_ids(_made(kind))
    if kind is Bulk or issubclass(kind, ApplyPlan):
        assert named == ["a", "b"]
    elif kind in (Credit, EndGrants, Recover):
        assert named == []
    elif "ids" in names:
        assert kind in (DeleteExpired, RepairJobs)
        assert named == ["a", "b"]
    else:
        assert named == (["a"] if "id" in names else [])


def test_a_plan_that_can_delete_names_its_jobs() -> None:
    """A later command of the batch that shows one of its jobs needs the payload before the deletion."""
    jobs = [ExpectedVersion("a", "1")]
    deleting = {action for action in get_args(PlanAction) if deleted_ids(ApplyEndings(action=action, jobs=jobs))}
    assert deleting == {"delete", "cleanup"}


def _made(kind: Any) -> Any:
    """Return a command of this type with unvalidated values."""
    given: dict[str, Any] = {field.name: None for field in fields(kind) if field.required}
    if "id" in kind.__struct_fields__:
        given["id"] = "a"
    if "ids" in kind.__struct_fields__:
        given["ids"] = ["a", "b"]
    if issubclass(kind, ApplyPlan):
        given["jobs"] = [ExpectedVersion("a", "1"), ExpectedVersion("b", "2")]
    if kind is Bulk:
        given["jobs"] = [Create(id="a"), Create(), Create(id="b")]
    return kind(**given)
