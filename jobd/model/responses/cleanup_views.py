"""Recovery and cleanup runs."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Struct

from jobd.model.fields import doc
from jobd.model.responses import shared
from jobd.model.responses.job_views import Issue


class Recovery(Struct, frozen=True, rename="camel"):
    """What recovery did to one job."""

    job_id: shared.JobIdText
    action: Annotated[Literal["reset", "failed"], doc("What was done to the job, or would be done.")]
    reason: Annotated[str, doc("Why, in words.")]


class Recovered(Struct, frozen=True):
    """The result of Recover. `more`: stalled jobs or expired locks are left for the next slice."""

    details: list[Recovery]
    locks_cleared: int
    more: bool


class MaintenanceResult(Struct, frozen=True):
    """The result of Expire, DeleteExpired and RepairJobs: how many jobs changed, and what was found."""

    done: int
    found: int = 0
    issues: list[tuple[str, Issue]] = []
    more: bool = False


class RecoverStuckView(Struct, frozen=True, rename="camel"):
    """The result of a recovery."""

    recovered_jobs: Annotated[int, doc("How many stalled jobs were recovered.")]
    reset_jobs: Annotated[int, doc("How many of them returned to their queue.")]
    failed_jobs: Annotated[int, doc("How many of them failed.")]
    details: Annotated[list[Recovery], doc("What was done to each job.")]
    timestamp: shared.Timestamp


class CleanupReport(Struct, frozen=True, rename="camel"):
    """What cleanup and recovery did since the previous report, with the names that existing dashboards expect."""

    timestamp: shared.Timestamp
    stuck_jobs_recovered: Annotated[int, doc("Stalled jobs that were recovered.")]
    expired_jobs_deleted: Annotated[int, doc("Finished jobs that were deleted by age.")]
    expired_locks_cleared: Annotated[int, doc("Expired locks that were cleared.")]
    validation_issues_fixed: Annotated[int, doc("Issues that were fixed.")]
    validation_issues_found: Annotated[int, doc("Issues that were found.")]
    total_processing_time: Annotated[int, doc("How long the run took, in ms.")]
    errors: Annotated[list[str], doc("Steps of the run that failed.")]
    forced: Annotated[bool, doc("Whether an operator requested the run.")]


class CleanupState(Struct, frozen=True, rename="camel"):
    """The state of cleanup. A run with errors is a failed run."""

    last_report: Annotated[CleanupReport | None, doc("The report of the last run, or null.")]
    cleanup_running: shared.CleanupRunning
    time_since_last_cleanup: shared.SinceCleanup
    failed_since_last_success: Annotated[int, doc("Number of runs with errors since the last successful one.")] = 0
    last_failure: Annotated[
        CleanupReport | None, doc("The report of the latest failed run since the last successful one, or null.")
    ] = None


class ReportList(Struct):
    """Reports of cleanup runs."""

    reports: Annotated[list[CleanupReport], doc("The reports, newest first.")]


class PreviewResult(Struct, frozen=True):
    """The result of Preview. `more`: not everything was read."""

    details: list[Recovery]
    locks: int
    expired: list[str]
    more: bool


class PreviewView(Struct, frozen=True, rename="camel"):
    """What recovery and a cleanup run would do now: the first jobs of each kind."""

    recover: Annotated[list[Recovery], doc("Stalled jobs that would be recovered.")]
    expired_locks: Annotated[int, doc("Number of expired locks that would be cleared.")]
    overdue_jobs: Annotated[list[str], doc("Queued jobs past their `expires_at` that would fail.")]
    deleted_jobs: Annotated[list[str], doc("Finished jobs that would be deleted by age.")]
    invalid_jobs: Annotated[list[str], doc("Jobs with validation issues that would be fixed or reported.")]
    more: Annotated[bool, doc("Whether there are more jobs than are shown.")]
    timestamp: shared.Timestamp
    kept_jobs: Annotated[
        list[str], doc("Finished jobs past their retention that are kept while the clock is suspect.")
    ] = []
    more_kept: Annotated[bool, doc("Whether `keptJobs` does not show all of them.")] = False
    more_invalid: Annotated[bool, doc("Whether `invalidJobs` may be incomplete: the time limit ended the search.")] = (
        False
    )
