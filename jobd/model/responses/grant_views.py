"""Grants and locks."""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Struct, UnsetType

from jobd.model.commands import DirectiveAction
from jobd.model.fields import doc
from jobd.model.responses import shared
from jobd.model.responses.job_views import JobView, LockView


class GrantView(Struct, gc=False):
    """A grant: a job and the lock under which the worker holds it."""

    job: Annotated[JobView, doc("The job.")]
    lock_id: shared.LockSecret
    fencing_token: shared.FencingToken
    lock_expires_at: shared.LockExpiresAt
    ttl_ms: shared.TtlMs
    progress_due_at: shared.ProgressDueAt


class DirectiveView(Struct, frozen=True, gc=False):
    """What a worker should do: take no new jobs (`quiet`), take jobs again (`resume`) or end (`stop`)."""

    action: Annotated[DirectiveAction, doc("`quiet`, `resume` or `stop`.")]
    by: Annotated[str, doc("Who gave it, as in `by` of events.")]
    reason: Annotated[str | None, doc("Why, or null.")] = None
    rule: Annotated[
        str | UnsetType,
        doc("The quiet rule that the daemon applies. The worker need not keep it and claims as before."),
    ] = UNSET


class Grants(Struct, gc=False):
    """The grants of a claim."""

    grants: Annotated[list[GrantView], doc("One grant for each job. Empty if no job is due.")]
    directive: Annotated[DirectiveView | UnsetType, doc("What an operator wants of the worker.")] = UNSET


class LockState(Struct, gc=False, repr_omit_defaults=True):
    """The lock after a progress report or an extension."""

    lock_expires_at: shared.LockExpiresAt
    ttl_ms: shared.TtlMs
    progress_due_at: shared.ProgressDueAt
    cancel_requested: Annotated[bool, doc("Whether the worker should stop working on the job.")] = False
    extended: Annotated[bool | UnsetType, doc("Only in responses to an extension. False if it changed nothing.")] = (
        UNSET
    )


class LockedJob(Struct, frozen=True, kw_only=True, repr_omit_defaults=True):
    """A current grant. Read-only callers do not see the `lock_id`."""

    id: shared.JobIdText
    queue: shared.QueueText
    kind: shared.KindText
    worker: shared.WorkerText
    lock_id: shared.LockSecret | UnsetType = UNSET
    fencing_token: shared.FencingToken
    acquired_at: Annotated[int, doc("When the lock was granted, in Unix ms.")]
    expires_at: shared.LockExpiresAt
    live: Annotated[bool, doc("False if the lock has expired.")]
    progress_due_at: shared.ProgressDueAt
    stalled_at: Annotated[int, doc("When the job is stalled if the worker sends no report, in Unix ms.")]
    progress: shared.ProgressPercent


class LockList(Struct):
    """The current grants."""

    locks: Annotated[list[LockedJob], doc("The grants, oldest first.")]
    next_cursor: shared.NextCursor = None


class AdminLockView(Struct, frozen=True, rename="camel"):
    """The result of extend-lock and release-lock. `lock` is null once the job is back in its queue."""

    job_id: shared.JobIdText
    status: shared.StatusText
    lock: Annotated[LockView | None, doc("The lock, or null.")]
    lock_expires_at: Annotated[int | None, doc("When the lock expires, in Unix ms, or null.")]
    progress_due_at: shared.ProgressDueAt
    extended: Annotated[bool, doc("False if the extension changed nothing.")]
    timestamp: shared.Timestamp
