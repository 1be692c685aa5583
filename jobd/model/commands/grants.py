"""Take jobs and report on them: what a worker sends."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final

from msgspec import UNSET, UnsetType, field

from jobd.model import fields
from jobd.model.commands.command import MAX_NAMES, MAX_WAIT_MS, Command, HolderCommand, JobCommand
from jobd.model.commands.worker_control import About
from jobd.model.fields import doc

MAX_CLAIM: Final = 100


class _StartByWorker(JobCommand, frozen=True):
    worker: fields.WorkerName

    def sender(self) -> str | None:
        return f"worker:{self.worker}"


class Start(_StartByWorker, frozen=True, kw_only=True):
    """Take this job. It must be queued and due, and its queue must not be paused."""

    admission = "grant"
    errors = ("already_locked", "not_due", "queue_paused", "invalid_transition")
    stores_job = False

    lock_ttl_ms: fields.LockTtlMs | None = None
    stall_after_ms: fields.GrantStallAfterMs | None = None
    progress_timeout_ms: fields.GrantProgressTimeoutMs | None = None
    about: Annotated[About | None, doc("The worker's description of itself, for display only.")] = None


class Claim(Command, frozen=True, kw_only=True):
    """Take the first due jobs, ordered by priority, due time and creation. Wait up to `wait_ms` if there are none.

    A response with a `directive` has no grants. A worker that was told to be quiet claims with `limit` 0, which grants
    nothing and waits for the next directive. One without a free slot may do so with `busy`, and is not quiet.
    """

    admission = "grant"
    can_wait = True

    worker: fields.WorkerName
    queues: Annotated[list[fields.QueueName], doc("Only jobs of these queues.", min_length=1, max_length=MAX_NAMES)] = (
        field(default_factory=["default"].copy)
    )
    kinds: (
        Annotated[
            list[fields.Kind], doc("Only jobs of these kinds. Default: all kinds.", min_length=1, max_length=MAX_NAMES)
        ]
        | None
    ) = None
    limit: Annotated[int, doc("Maximum number of jobs, or 8 MiB of payloads. 0: none.", ge=0, le=MAX_CLAIM)] = 1
    wait_ms: Annotated[int, doc("How long to wait for a job, in ms.", ge=0, le=MAX_WAIT_MS)] = 0
    lock_ttl_ms: fields.LockTtlMs | None = None
    stall_after_ms: fields.GrantStallAfterMs | None = None
    progress_timeout_ms: fields.GrantProgressTimeoutMs | None = None
    about: Annotated[About | None, doc("The worker's description of itself, for display only.")] = None
    busy: Annotated[bool, doc("With `limit` 0: the worker has no free slot, but is not quiet.")] | UnsetType = UNSET

    @property
    def is_quiet(self) -> bool:
        return self.limit == 0 and self.busy is not True

    def sender(self) -> str | None:
        return f"worker:{self.worker}"

    def weight(self) -> int:
        return self.limit or 1


class Progress(HolderCommand, frozen=True, kw_only=True):
    """Report progress and renew the lock."""

    admission = "change"
    errors: ClassVar[tuple[str, ...]] = ("lock_lost", "invalid_transition", "progress_timeout", "upgrade_incomplete")

    progress: fields.Percent
    message: Annotated[
        fields.Text | None, doc("A human-readable message. Without one, the previous message is cleared.")
    ] = None
    checkpoint: fields.Checkpoint | UnsetType = UNSET


class AppendOutput(HolderCommand, frozen=True, kw_only=True):
    """Add to the output of the current grant. It does not renew the lock.

    `text` has at most 16 KiB of UTF-8. A grant may send about one request a second. Output can be lost, so an error of
    this call is no reason to fail the job.
    """

    admission = "read"
    errors = ("lock_lost", "too_frequent", "output_off", "output_unavailable")

    text: Annotated[str, doc("What the job printed.", min_length=1)]


class Extend(HolderCommand, frozen=True, kw_only=True):
    """Extend the lock. It is never shortened."""

    admission = "change"
    errors = ("lock_lost", "invalid_transition", "progress_timeout")

    additional_ms: fields.AdditionalMs | None = None


class Complete(HolderCommand, frozen=True, kw_only=True):
    """Complete the job. `expires_at` sets when it is deleted."""

    admission = "ending"
    errors = ("lock_lost", "invalid_transition")

    download_url: fields.DownloadUrl | None = None
    file_path: fields.FilePath | None = None
    storage_key: fields.StorageKey | None = None
    metadata: fields.Metadata = None
    expires_at: Annotated[fields.UnixMs | None, doc("When the completed job is deleted, in Unix ms.")] = None


class Fail(HolderCommand, frozen=True, kw_only=True):
    """End the attempt as failed. The job returns to its queue if attempts are left, unless `retry` is false."""

    admission = "ending"
    errors = (*Complete.errors, "upgrade_incomplete")

    error_message: fields.ErrorMessage
    error_code: fields.FailureCode | None = None
    retry: Annotated[bool, doc("Whether the job may be tried again.")] = True
    retry_after_ms: Annotated[
        fields.DelayMs | None, doc("Time until the next attempt, in ms, instead of the backoff.")
    ] = None
    checkpoint: fields.Checkpoint | UnsetType = UNSET


class Release(HolderCommand, frozen=True, kw_only=True):
    """Return the job to its queue. The attempt does not count.

    From the fifth release in a row without progress, the job waits.
    """

    admission = "ending"
    errors = Complete.errors

    delay_ms: Annotated[
        fields.DelayMs | None,
        doc(
            "Time from now until the job is due, in ms. Default: 0; from the 5th release in a row without "
            "progress on, a growing delay. A release with 1000 or more is not counted."
        ),
    ] = None


class Undelivered(JobCommand, frozen=True, kw_only=True):
    """Return a job to its queue at once: the connection closed before the first byte of the grant was written."""

    admission = "ending"

    lock_id: fields.LockId
