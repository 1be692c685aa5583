"""Read jobs, grants, counts and the audit log."""

from __future__ import annotations

from typing import Annotated, Final

from jobd.model import fields
from jobd.model.commands.command import MAX_WAIT_MS, JobRead, Read
from jobd.model.fields import doc

MAX_WAITED: Final = 1_000  # jobs of one wait
MAX_EVENTS: Final = 1_000  # of a timeline with a limit
EndWaitMs = Annotated[int, doc("How long to wait for the end, in ms.", ge=0, le=MAX_WAIT_MS)]


class Get(JobRead, frozen=True, kw_only=True):
    """Get one job. With `wait_ms`, the response comes when the job is finished, or after this time."""

    can_wait = True

    wait_ms: EndWaitMs = 0


class GetVersion(JobRead, frozen=True, kw_only=True):
    """Get one job with its `version`, which an action on it can require in the header `If-Match`."""


class WaitForJobs(Read, frozen=True, kw_only=True):
    """Return the statuses of jobs when all are finished, or after `wait_ms`."""

    can_wait = True

    ids: Annotated[list[fields.NamedJobId], doc("The jobs.", min_length=1, max_length=MAX_WAITED)]
    wait_ms: EndWaitMs = 0

    def job_ids(self) -> list[str]:
        return self.ids

    def weight(self) -> int:
        return len(self.ids)


class Timeline(JobRead, frozen=True, kw_only=True):
    """List the events of a job, oldest first. With `limit`, only the latest ones."""

    limit: Annotated[int, doc("Maximum number of events.", ge=1, le=MAX_EVENTS)] | None = None


class Why(JobRead, frozen=True, kw_only=True):
    """Explain why a job is in its state and what happens next."""


class Validate(JobRead, frozen=True, kw_only=True):
    """List the issues that validation finds in a job."""


class LateResults(JobRead, frozen=True, kw_only=True):
    """List the results that workers submitted for this job after their lock was lost, oldest grant first."""


class ListJobs(Read, frozen=True, kw_only=True):
    """List jobs, newest first. With a finished status, the latest to end is first.

    A page may be short; `searched_to_at` then says how far jobs were read. The last page has no `next_cursor`. `worker`
    matches the worker of the latest grant, which holds the job or was the last to hold it.
    """

    status: fields.StatusFilter | None = None
    queue: fields.QueueFilter | None = None
    kind: fields.KindFilter | None = None
    worker: fields.WorkerFilter | None = None
    limit: fields.PageLimit = 50
    cursor: fields.JobCursor | None = None


class SearchJobs(ListJobs, frozen=True, kw_only=True):
    """List jobs as GET `/v1/jobs` does, with more filters.

    A search ends after half a second, so a page may be short; `searched_to_at` then says how far jobs were read. The
    last page has no `next_cursor`. `finished_since` and `finished_until` select only finished jobs.
    """

    since: fields.Since | None = None
    until: fields.Until | None = None
    finished_since: fields.FinishedSince | None = None
    finished_until: fields.FinishedUntil | None = None
    text: fields.SearchText | None = None
    error: fields.ErrorFilter | None = None


class Export(Read, frozen=True, kw_only=True):
    """List jobs, oldest first, in the form that an import takes."""

    status: fields.StatusFilter | None = None
    queue: fields.QueueFilter | None = None
    kind: fields.KindFilter | None = None
    limit: fields.PageLimit = fields.MAX_PAGE
    cursor: fields.Cursor | None = None


class Stats(Read, frozen=True, kw_only=True):
    """Count jobs and locks, and show the oldest processing job. `averageProcessingTime` and `age` are in seconds."""


class Locks(Read, frozen=True, kw_only=True):
    """List the current grants, oldest first: all of them, or a page."""

    limit: Annotated[int, doc("Maximum number of grants. Default: all.", ge=1, le=fields.MAX_PAGE)] | None = None
    cursor: fields.Cursor | None = None


class AuditLog(Read, frozen=True, kw_only=True):
    """List audit entries, newest first: changes and rejected requests of operators.

    A page may be short. The last page has no `next_cursor`.
    """

    who: Annotated[fields.OperatorName | None, doc("Only entries of this operator.")] = None
    action: (
        Annotated[str, doc("Only entries of this action, such as `force-fail`.", min_length=1, max_length=40)] | None
    ) = None
    job_id: Annotated[fields.JobId | None, doc("Only entries about this job, and plans that changed it.")] = None
    since: Annotated[fields.MomentMs | None, doc("Only entries from this time on, in Unix ms.")] = None
    limit: fields.PageLimit = 50
    cursor: fields.Cursor | None = None
