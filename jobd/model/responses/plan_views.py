"""Plans and their results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from msgspec import Struct

from jobd.model.commands import PlanAction, PlanFilter
from jobd.model.fields import doc
from jobd.model.responses import shared
from jobd.model.times import duration, utc


class PlannedJob(Struct, frozen=True, gc=False, rename={"from_": "from"}):
    """A job that a plan would change."""

    id: shared.JobIdText
    from_: Annotated[str, doc("The status when the plan was made.")]
    to: Annotated[str | None, doc("The status afterwards. Null for a deletion.")]
    late_results: Annotated[int, doc("How many of its late results were not adopted. 0 for a completed job.")] = 0


class SkippedJob(Struct, frozen=True, gc=False):
    """A job that a plan skips."""

    id: shared.JobIdText
    status: Annotated[str | None, doc("Status of the job. Null if the job does not exist.")]
    reason: Annotated[str, doc("Why the job is skipped.")]


class UnchangedJob(Struct, frozen=True, gc=False, rename={"from_": "from"}):
    """A job of a plan that the plan did not change."""

    id: shared.JobIdText
    from_: Annotated[str, doc("The status when the plan was made.")]
    now: Annotated[str | None, doc("The current status. Null if the job was deleted.")]
    reason: Annotated[str, doc("Why the job was not changed.")]


class PlanTrial(Struct, frozen=True):
    """The first job of a plan that begins with a trial."""

    job_id: shared.JobIdText
    state: Annotated[Literal["waiting", "completed", "failed"], doc("Whether its first attempt has ended, and how.")]


class PlanOutcome(Struct, frozen=True):
    """How the jobs of an applied plan have ended since, as long as the plan is kept."""

    completed: Annotated[int, doc("How many were completed.")]
    failed: Annotated[int, doc("How many failed again.")]
    cancelled: Annotated[int, doc("How many were cancelled.")]
    waiting: Annotated[int, doc("How many are queued or processing.")]

    def __str__(self) -> str:
        """Return `118 completed, 6 failed again, 83 wait`."""
        cancelled = f", {self.cancelled:,} cancelled" if self.cancelled else ""
        return f"{self.completed:,} completed, {self.failed:,} failed again{cancelled}, {self.waiting:,} wait"


class PlannedAge(Struct, frozen=True):
    """Jobs of a plan that ended, or were created if they are unfinished, within a time without a gap of 6 h."""

    since: Annotated[int, doc("The earliest of them, in Unix ms.")]
    until: Annotated[int, doc("The latest of them, in Unix ms.")]
    jobs: Annotated[int, doc("How many.")]


class PlanResult(Struct, frozen=True):
    """The result of a plan."""

    plan_id: Annotated[str, doc("Id of the plan.")]
    action: Annotated[str, doc("The action of the plan.")]
    applied: Annotated[int, doc("How many jobs the plan changed.")]
    changed_meanwhile: Annotated[list[UnchangedJob], doc("The jobs that had changed since the plan was made.")]
    rejected: Annotated[list[UnchangedJob], doc("The jobs that a rule rejected.")]
    applied_at: Annotated[int, doc("When the last job was changed, in Unix ms.")]
    repeated: Annotated[
        bool, doc("Whether the plan had been applied before, so that this request changed nothing.")
    ] = False
    left: Annotated[int, doc("How many jobs were not tried, because the trial has not completed.")] = 0
    trial: Annotated[PlanTrial | None, doc("The trial. While it is `waiting`, the other jobs are `left`.")] = None
    due_until: Annotated[int | None, doc("When the last job is due, in Unix ms, if there is a rate.")] = None


class PlanView(Struct, frozen=True):
    """A plan: what an action would do to many jobs.

    `more`: the plan was full, or its time limit passed, before all jobs were read. The next plan continues at
    `next_cursor`; if that is null, create the plan again after applying this one.
    """

    plan_id: Annotated[str, doc("Id of the plan.")]
    action: Annotated[PlanAction, doc("What is done to each job.")]
    reason: shared.ReasonText
    filter: Annotated[
        PlanFilter | None, doc("The filter of the plan. Null for a plan by ids, for `recover-stuck` and for `cleanup`.")
    ]
    scope: Annotated[str | None, doc("Which jobs the plan contains, in words. Null for a plan by ids.")]
    count: Annotated[int, doc("How many jobs the plan would change.")]
    jobs: Annotated[list[PlannedJob], doc("The jobs that the plan would change.")]
    skipped: Annotated[list[SkippedJob], doc("The first 1000 jobs that are skipped.")]
    skipped_count: Annotated[int, doc("How many jobs are skipped.")]
    more: Annotated[bool, doc("Whether the plan may not cover all jobs.")]
    next_cursor: Annotated[str | None, doc("Cursor of the next plan, or null.")]
    created_at: Annotated[int, doc("When the plan was made, in Unix ms.")]
    expires_at: Annotated[int, doc("When the plan is removed, in Unix ms.")]
    result: Annotated[PlanResult | None, doc("The result. Null until the plan is applied.")] = None
    with_late_results: Annotated[int, doc("How many of the jobs have late results that were not adopted.")] = 0
    ages: Annotated[list[PlannedAge], doc("How old the jobs are: the latest first, at most 10.")] = []
    trial: Annotated[PlanTrial | None, doc("The trial, if the plan begins with one.")] = None
    outcome: Annotated[PlanOutcome | None, doc("How its jobs have ended since, for a retry or force-reset.")] = None

    @property
    def aged(self) -> str:
        """The ages in words: `500 since 2026-12-02 02:58:00 UTC, 60 older than 26 h`. Empty for one job."""
        if not self.ages or self.count < 2:
            return ""
        latest, *older = self.ages
        text = f"{latest.jobs:,} since {utc(latest.since)}"
        if older:
            text += f", {sum(age.jobs for age in older):,} older than {duration(self.created_at - older[0].until)}"
        return text


def late_results_note(action: str, late: Sequence[int]) -> str | None:
    """Return a warning about late results for a caller of `action`; None if there are none.

    `late` has the number of late results of each job.
    """
    jobs, results = sum(count > 0 for count in late), sum(late)
    if not jobs:
        return None
    has = "It has" if len(late) == 1 else "1 of these jobs has" if jobs == 1 else f"{jobs} of these jobs have"
    is_one = results == 1
    counted = "1 late result that was not adopted" if is_one else f"{results} late results that were not adopted"
    if action == "delete":
        return (
            f"{has} {counted}. {'It is' if is_one else 'They are'} deleted with the {'job' if jobs == 1 else 'jobs'}."
        )
    return f"{has} {counted}. Check whether {'it' if is_one else 'they'} can be adopted instead."


def plan_late_results_note(action: str, jobs: Sequence[PlannedJob]) -> str | None:
    """Return late_results_note for the jobs of a plan. Of a cleanup, only deletions affect late results."""
    if action == "cleanup":
        action, jobs = "delete", [job for job in jobs if job.to is None]
    return late_results_note(action, [job.late_results for job in jobs])


class PlanSlice(Struct):
    """The result of ApplyPlan: the number of changed jobs, and the jobs that were not changed."""

    applied: int
    changed_meanwhile: list[UnchangedJob]
    rejected: list[UnchangedJob]
