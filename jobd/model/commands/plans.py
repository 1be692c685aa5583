"""Plan an action on many jobs, and apply it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from msgspec import Struct

from jobd.model import fields
from jobd.model.commands.command import Admission, Command
from jobd.model.commands.job_control import Cancel, Delete, ForceFail, ForceReset, RetryJob
from jobd.model.fields import doc
from jobd.model.job import DAY_MS, SECOND_MS

PlanAction = Literal["retry", "force-reset", "cancel", "force-fail", "delete", "recover-stuck", "cleanup"]
# The actions that cleanup runs do too, with their names in a question.
MAINTENANCE_ACTIONS: Final[dict[PlanAction, str]] = {"recover-stuck": "recover", "cleanup": "clean up"}
# The command that each of the other actions sends for a job.
PLAN_COMMANDS: Final[dict[PlanAction, type[ForceReset | Cancel | ForceFail | Delete]]] = {
    "retry": RetryJob,
    "force-reset": ForceReset,
    "cancel": Cancel,
    "force-fail": ForceFail,
    "delete": Delete,
}
MAX_PLAN: Final = 10_000  # jobs of one plan
MAX_PLANNING_S: Final = 10.0  # a plan stops reading after this time; the next plan continues


class PlanFilter(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Selects jobs by the filters of the job list."""

    status: fields.StatusFilter | None = None
    queue: fields.QueueFilter | None = None
    kind: fields.KindFilter | None = None
    worker: fields.WorkerFilter | None = None
    since: fields.Since | None = None
    until: fields.Until | None = None
    finished_since: fields.FinishedSince | None = None
    finished_until: fields.FinishedUntil | None = None
    text: fields.SearchText | None = None
    error: fields.ErrorFilter | None = None


class MakePlan(Command, frozen=True, kw_only=True):
    """Plan an action on many jobs: those that match a filter, or those with the given ids. Changes nothing yet.

    `cursor` is the `next_cursor` of a plan with the same action and filter; the new plan continues after it. The
    actions `recover-stuck` and `cleanup` take no `filter`, `ids` or `cursor`, because the daemon selects the jobs.
    """

    action: Annotated[PlanAction, doc("The action on each job.")]
    filter: Annotated[PlanFilter | None, doc("Only jobs that match these filters.")] = None
    cursor: Annotated[fields.PlanCursor | None, doc("The `next_cursor` of the previous plan.")] = None
    ids: Annotated[list[fields.JobId], doc("Only jobs with these ids.", min_length=1, max_length=MAX_PLAN)] | None = (
        None
    )
    reason: fields.Reason | None = None


class PlanCommand(Command, frozen=True):
    """A call about a plan. The path gives its id."""

    errors = ("plan_not_found",)

    plan_id: Annotated[fields.JobId, doc("Id of the plan.")]


class PlanRate(Struct, frozen=True, forbid_unknown_fields=True):
    """At most `count` jobs in `per_ms`, evenly."""

    count: Annotated[int, doc("How many jobs.", ge=1, le=1_000_000)]
    per_ms: Annotated[int, doc("In which time, in ms.", ge=SECOND_MS, le=DAY_MS)] = SECOND_MS


class RunPlan(PlanCommand, frozen=True, kw_only=True):
    """Apply a plan to every job that has not changed since. A repeated request returns the same result.

    A `retry` or `force-reset` can begin with a trial, or make the jobs due one after the other.
    """

    trial: Annotated[
        bool, doc("Begin with one job. The others follow by themselves once it completes, and not at all if it fails.")
    ] = False
    rate: Annotated[PlanRate | None, doc("How many of the jobs become due in which time. Default: all at once.")] = None


class ExpectedVersion(Struct, frozen=True, gc=False):
    """A job of a plan, with its version (core/rules/plan_rules.py) when the plan was made, and when it is to be due."""

    id: str
    version: str
    run_at: int | None = None


class ApplyPlan(Command, frozen=True, kw_only=True):
    """Apply a slice of a plan: `action` on those of `jobs` that have not changed since the plan was made.

    The events of the jobs name the `plan` and the number of its jobs, `planned`.
    """

    admission: ClassVar[Admission] = "change"

    action: PlanAction
    jobs: list[ExpectedVersion]
    plan: str = ""
    planned: int = 0
    reason: str | None = None

    def job_ids(self) -> list[str]:
        return [expected.id for expected in self.jobs]

    def deleted_ids(self) -> list[str]:
        return self.job_ids() if self.action in ("delete", "cleanup") else []

    def weight(self) -> int:
        return len(self.jobs)


class ApplyEndings(ApplyPlan, frozen=True, kw_only=True):
    """Apply a slice of a plan that ends or deletes jobs, which is allowed on a full disk."""

    admission = "ending"
