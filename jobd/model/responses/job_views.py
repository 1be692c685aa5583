"""A job, lists of jobs, and what is known about one: its timeline, explanation, issues, late results and output."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from jobd.model.events import EventView
from jobd.model.fields import Metadata, doc
from jobd.model.job import BackoffOptions
from jobd.model.problems import Problem
from jobd.model.responses import shared


class LockView(Struct, frozen=True, gc=False, repr_omit_defaults=True):
    """A lock that has not expired. Only operators see the `lock_id`."""

    worker: shared.WorkerText
    fencing_token: shared.FencingToken
    acquired_at: Annotated[int, doc("When the lock was granted, in Unix ms.")]
    expires_at: shared.LockExpiresAt
    lock_id: shared.LockSecret | UnsetType = UNSET


def public_lock(lock: LockView | None) -> LockView | None:
    """Return `lock` without its secret."""
    return None if lock is None else msgspec.structs.replace(lock, lock_id=UNSET)


class JobView(Struct, gc=False):
    """A job.

    `worker` is present only while the lock has expired (`lock` is null) and that worker may still end the job.
    """

    # `payload` is read from disk before the response is sent.

    id: shared.JobIdText
    queue: shared.QueueText
    kind: shared.KindText
    payload: Annotated[Raw | UnsetType, doc("The payload as sent by the creator.")]
    priority: Annotated[int, doc("Priority. Jobs with smaller values run first.")]
    status: shared.StatusText
    progress: shared.ProgressPercent
    progress_message: Annotated[str | None, doc("The latest message of the worker.")]
    attempt: Annotated[int, doc("Attempts used, including the running one.")]
    max_attempts: Annotated[int, doc("Maximum number of attempts.")]
    backoff: Annotated[BackoffOptions, doc("Wait between a failed attempt and the next one.")]
    stalls: Annotated[int, doc("Number of times the job has stalled.")]
    max_stalls: Annotated[int, doc("A job that stalls more often fails.")]
    on_stall: Annotated[str, doc("What happens to the job when it stalls.")]
    stall_after_ms: Annotated[
        int, doc("A job whose lock has expired is stalled this long after its latest report, in ms.")
    ]
    progress_timeout_ms: Annotated[
        int,
        doc(
            "Progress timeout, in ms: without a progress report, the lock ends after this time even if "
            "it is extended. 0: no timeout."
        ),
    ]
    created_at: Annotated[int, doc("When the job was created, in Unix ms.")]
    updated_at: Annotated[int, doc("When the job last changed, in Unix ms.")]
    run_at: Annotated[int, doc("When the job is due, in Unix ms.")]
    started_at: Annotated[int | None, doc("When the job was last granted, in Unix ms.")]
    finished_at: Annotated[int | None, doc("When the job finished, in Unix ms.")]
    expires_at: Annotated[
        int | None, doc("When a finished job is deleted, or a job that is still queued fails, in Unix ms.")
    ]
    lock: Annotated[LockView | None, doc("The lock, or null.")]
    download_url: shared.ResultUrl
    file_path: shared.ResultPath
    storage_key: shared.ResultKey
    metadata: Metadata
    error_message: Annotated[str | None, doc("A human-readable error message.")]
    error_code: Annotated[str | None, doc("A code for the failure, as the worker gave it.")]
    worker: Annotated[str | UnsetType, doc("The worker whose lock has expired and that may still end the job.")] = UNSET
    repeated: Annotated[bool | UnsetType, doc("True if an earlier request with the same content ended the job.")] = (
        UNSET
    )
    version: Annotated[
        str | UnsetType, doc("In GET /jobs/{id} of the admin API: changes with all but progress reports.")
    ] = UNSET
    schedule_id: Annotated[str | UnsetType, doc("The schedule that created the job, if one did.")] = UNSET
    scheduled_at: Annotated[int | UnsetType, doc("The time of the schedule that the job is for, in Unix ms.")] = UNSET
    headers: Annotated[dict[str, str] | UnsetType, doc("The headers of the job, if it has any.")] = UNSET
    checkpoint: Annotated[Raw | UnsetType, doc("The latest checkpoint, if there is one.")] = UNSET
    copied_from: Annotated[str | UnsetType, doc("The job of which this one is a copy.")] = UNSET

    def __repr__(self) -> str:
        """Show payload and metadata decoded, and leave out what the response does not have."""
        fields = ((name, getattr(self, name)) for name in self.__struct_fields__)
        shown = (f"{name}={_decoded(value)!r}" for name, value in fields if value is not UNSET)
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def payload_value(self) -> Any:
        """The payload as Python values. Raises msgspec.DecodeError for a value that Python cannot hold (1e999)."""
        return None if self.payload is UNSET else msgspec.json.decode(self.payload)

    @property
    def checkpoint_value(self) -> Any:
        """The checkpoint as Python values, None if there is none."""
        return None if self.checkpoint is UNSET else msgspec.json.decode(self.checkpoint)

    @property
    def metadata_value(self) -> Any:
        """The metadata of the job's result as Python values, None if there is none."""
        return None if self.metadata is None else msgspec.json.decode(self.metadata)


def _decoded(value: Any) -> Any:
    """Decode JSON text. Text that Python cannot hold, and any other value, is returned as it is."""
    if not isinstance(value, Raw):
        return value
    try:
        return msgspec.json.decode(value)
    except (msgspec.DecodeError, RecursionError):
        return bytes(value)


class JobPage(Struct):
    """A page of jobs."""

    jobs: Annotated[list[JobView], doc("The jobs.")]
    next_cursor: shared.NextCursor
    searched_to_at: Annotated[
        int | None,
        doc(
            "Creation time of the last job that was read (with a finished `status`, its end), in Unix ms, "
            "if the page ended early. Null if it is full or the last page."
        ),
    ] = None


class JobList(Struct):
    """A list of jobs."""

    jobs: Annotated[list[JobView], doc("The jobs.")]


class JobEnd(Struct, gc=False):
    """The status of a job. It is null if the job does not exist."""

    id: shared.JobIdText
    status: Annotated[str | None, doc("The status, null if the job does not exist.")]
    error_message: Annotated[str | None, doc("A human-readable error message.")] = None


class JobEnds(Struct, gc=False):
    """The statuses of jobs, and whether all that exist are finished."""

    jobs: Annotated[list[JobEnd], doc("The jobs in the order of the request.")]
    finished: Annotated[bool, doc("Whether no job is queued or processing.")]


class ErrorView(Struct, frozen=True):
    """The error that an action would return."""

    error: Annotated[str, doc("The error code.")]
    message: shared.MessageText


class LateResultView(Struct, frozen=True):
    """A result that was submitted after the lock of its grant was lost."""

    seq: Annotated[int, doc("Position of its event in the event log. Identifies the late result.")]
    at: Annotated[int, doc("When it was submitted, in Unix ms.")]
    worker: shared.WorkerText
    fencing_token: shared.FencingToken
    download_url: shared.ResultUrl
    file_path: shared.ResultPath
    storage_key: shared.ResultKey
    metadata: Metadata
    expires_at: Annotated[int | None, doc("Deletion time that the worker requested, in Unix ms, or null.")]
    rejection: Annotated[
        ErrorView | None,
        doc(
            "The error with which the current configuration rejects its adoption, whatever the status of "
            "the job, or null."
        ),
    ] = None


class LateResultList(Struct):
    """The late results of a job."""

    late_results: Annotated[list[LateResultView], doc("The late results, oldest grant first.")]


class TimelineView(Struct):
    """The events of a job."""

    events: Annotated[list[EventView], doc("The events, oldest first.")]


class TransitionView(Struct, frozen=True, rename="camel"):
    """The result of force-fail, force-reset, retry and transition."""

    job_id: shared.JobIdText
    previous_status: Annotated[str, doc("The status before.")]
    status: shared.StatusText
    reason: shared.ReasonText
    timestamp: shared.Timestamp


class NextEvent(Struct, frozen=True):
    """What happens to a job next without an action of a worker or an operator."""

    what: Annotated[str, doc("What will happen.")]
    at: Annotated[int | None, doc("When, in Unix ms. Null if it depends on a worker or on a full disk.")]
    rule: Annotated[str, doc("The rule by which it happens.")]
    latest_at: Annotated[
        int | None,
        doc("The latest time. Null if `at` is null, while the clock is suspect, and on a full disk."),
    ] = None


class WhyView(Struct, frozen=True):
    """Why a job is in its state, and what happens next."""

    state: Annotated[str, doc("The state of the job.")]
    because: Annotated[
        str,
        doc(
            "The reason, in words. For a finished job, it says how the job ended, if the timeline still has that event."
        ),
    ]
    next: Annotated[NextEvent | None, doc("What happens next without an action, or null.")]
    blocked_by: Annotated[str | None, doc("What prevents the job from running, or null.")]
    do: Annotated[list[str], doc("What an operator can do about it.")]
    schedule_id: Annotated[str | UnsetType, doc("The schedule that created the job, if one did.")] = UNSET
    problem: Annotated[Problem | UnsetType, doc("The most urgent open problem of the job, if there is one.")] = UNSET


class Issue(Struct, frozen=True):
    """An issue that validation finds in a job."""

    type: Annotated[Literal["warning", "error", "critical"], doc("How serious it is.")]
    field: Annotated[str, doc("The affected field.")]
    message: shared.MessageText
    fix: Annotated[str, doc("How to fix it.")]


class Validation(Struct, frozen=True, rename="camel"):
    """The issues that validation finds in a job."""

    is_valid: Annotated[bool, doc("Whether there are no issues.")]
    issues: Annotated[list[Issue], doc("The issues.")]
    can_proceed: Annotated[bool, doc("False if an issue is critical.")]


class ValidateJobView(Struct, frozen=True, rename="camel"):
    """A job and the issues that validation finds in it."""

    job_id: shared.JobIdText
    job: Annotated[JobView, doc("The job.")]
    validation: Annotated[Validation, doc("The issues that validation finds in it.")]
    timestamp: shared.Timestamp


class OutputEnd(Struct):
    """How much output a grant has sent."""

    end: Annotated[int, doc("Bytes of UTF-8 that the grant has sent so far.")]


class GrantOutput(Struct):
    """The output of a grant that is kept. Text before `offset` was removed or not asked for."""

    attempt: Annotated[int, doc("The attempt of the grant.")]
    worker: Annotated[str, doc("The worker that held the job.")]
    fencing_token: Annotated[int, doc("The fencing token of the grant.")]
    begins_at: Annotated[int, doc("When the first output came, in Unix ms.")]
    offset: Annotated[int, doc("Bytes of UTF-8 before `text`.")]
    end: Annotated[int, doc("Bytes of UTF-8 up to the end of `text`.")]
    text: Annotated[str, doc("What the job printed. It may contain control characters.")]


class OutputView(Struct):
    """What a job printed."""

    id: shared.JobIdText
    status: shared.StatusText
    finished: Annotated[bool, doc("Whether the job is finished, so that no more text comes.")]
    position: Annotated[str, doc("The end of the output. As `after` of the next request it gives only later text.")]
    grants: Annotated[list[GrantOutput], doc("The output of the latest grants, oldest first.")]


class OutputGrant(Struct):
    """The grant that output belongs to. `created_at` tells apart jobs that had the same id."""

    created_at: int
    attempt: int
    worker: str
    fencing_token: int
