"""Create and import jobs."""

from __future__ import annotations

from typing import Annotated, ClassVar

from msgspec import UNSET, Raw, UnsetType

from jobd.model import fields
from jobd.model.commands.command import Command
from jobd.model.fields import doc
from jobd.model.job import BackoffOptions, OnStall, Status


class NewJobFields(Command, frozen=True, kw_only=True):
    """The fields of a new job, created or imported."""

    admission = "create"

    id: Annotated[fields.NewJobId | None, doc("Id of the job. Default: a new UUIDv7.")] = None
    queue: fields.NewQueueName = "default"
    kind: fields.Kind = ""
    payload: fields.Payload = Raw(b"null")
    priority: fields.Priority = 0
    max_attempts: fields.MaxAttempts = 1
    backoff: Annotated[BackoffOptions, doc("Wait between a failed attempt and the next one.")] = BackoffOptions()
    max_stalls: fields.MaxStalls | None = None
    on_stall: Annotated[OnStall | None, doc("What happens to the job when it stalls.")] = None
    stall_after_ms: fields.StallAfterMs | None = None
    progress_timeout_ms: fields.ProgressTimeoutMs | None = None
    run_at: fields.DueAt | None = None
    # A field without a value is not part of the hash of a request, so the hashes on disk do not change.
    headers: fields.Headers | UnsetType = UNSET


class Create(NewJobFields, frozen=True, kw_only=True):
    """Create a job. Repeating the request returns the same job.

    An `id` that exists with other fields is rejected; `details.differs_in` names the fields that certainly differ.
    """

    errors = ("job_exists", "job_quarantined", "too_many_jobs", "too_many_queues", "upgrade_incomplete")
    needs_payload = True

    delay_ms: Annotated[fields.DelayMs | None, doc("Time from now until the job is due, in ms.")] = None
    expires_at: Annotated[fields.UnixMs | None, doc("If the job is still queued at this time (Unix ms), it fails.")] = (
        None
    )
    expires_in_ms: Annotated[fields.ExpiresInMs | UnsetType, doc("Time from now until `expires_at`, in ms.")] = UNSET

    def job_ids(self) -> list[str]:
        return [] if self.id is None else [self.id]


class Bulk(Command, frozen=True, kw_only=True):
    """Create up to `limits.bulk` jobs in the given order, all or none."""

    admission = "create"
    errors = Create.errors
    needs_payload = True

    jobs: Annotated[list[Create], doc("The jobs to create.", min_length=1)]

    def job_ids(self) -> list[str]:
        return [job.id for job in self.jobs if job.id is not None]

    def weight(self) -> int:
        return len(self.jobs)


class Import(NewJobFields, frozen=True, kw_only=True):
    """Import jobs from a stream of JSON lines, one job per line.

    Each line is created, skipped (its id exists) or rejected independently. Missing times become the time of the
    import. A job that was processing is handled as stalled.
    """

    audit_name: ClassVar[str | None] = "import"
    errors: ClassVar[tuple[str, ...]] = ("too_many_jobs", "too_many_queues", "upgrade_incomplete")

    id: fields.NewJobId
    status: Annotated[Status, doc("Status of the job.")] = "queued"
    progress: fields.Percent | None = None
    progress_message: Annotated[fields.Text | None, doc("The latest message of the worker.")] = None
    attempt: Annotated[fields.Count, doc("Attempts used.")] = 0
    stalls: Annotated[fields.Count, doc("Number of times the job has stalled.")] = 0
    created_at: Annotated[fields.UnixMs | None, doc("When the job was created, in Unix ms.")] = None
    updated_at: Annotated[fields.UnixMs | None, doc("When the job last changed, in Unix ms.")] = None
    started_at: Annotated[fields.UnixMs | None, doc("When the job was last granted, in Unix ms.")] = None
    finished_at: Annotated[
        fields.UnixMs | None, doc("When the job was finished, in Unix ms. Ignored for an unfinished job.")
    ] = None
    expires_at: Annotated[
        fields.UnixMs | None, doc("When a finished job is deleted, or a job that is still queued fails, in Unix ms.")
    ] = None
    worker: fields.WorkerName | None = None
    download_url: fields.DownloadUrl | None = None
    file_path: fields.FilePath | None = None
    storage_key: fields.StorageKey | None = None
    metadata: fields.Metadata = None
    error_message: Annotated[fields.Text | None, doc("A human-readable error message.")] = None
    error_code: fields.FailureCode | None = None
    schedule_id: fields.ScheduleId | None = None
    scheduled_at: Annotated[fields.UnixMs | None, doc("The time of the schedule that the job is for, in Unix ms.")] = (
        None
    )
    checkpoint: fields.Checkpoint | UnsetType = UNSET
    copied_from: Annotated[fields.JobId | UnsetType, doc("The job of which this one is a copy.")] = UNSET

    def job_ids(self) -> list[str]:
        return [self.id]


class ImportCheck(Import, frozen=True, kw_only=True):
    """Show what an import of these lines would do, line by line. Changes nothing."""

    audit_name = None
    errors = ()
    dry_run = True
