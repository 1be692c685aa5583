"""Change one job: cancel it, and the actions of operators. `jobId` is the name that existing dashboards send."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final

from msgspec import UNSET, Struct, UnsetType, field

from jobd.model import fields
from jobd.model.commands.command import JobCommand, NamedJobCommand
from jobd.model.fields import doc
from jobd.model.job import STATUSES, Status

ADOPT_WEIGHT: Final = 20  # its late results are read with their metadata
NO_REASON: Final = "Failed by an operator."  # error message of a force-fail without a reason


class Cancel(JobCommand, frozen=True):
    """Cancel a queued or processing job. The next call of its worker gets `lock_lost`."""

    admission = "ending"
    audit_name = "cancel"
    errors = ("invalid_transition",)
    allowed_from = ("queued", "processing")
    leads_to = "cancelled"
    plan_scope = "Only queued and processing jobs can be cancelled."

    reason: fields.Reason | None = None


class ForceFail(NamedJobCommand, frozen=True):
    """Fail a queued or processing job. Its grant ends immediately. `reason` becomes `error_message`."""

    admission = "ending"
    audit_name = "force-fail"
    errors = ("invalid_transition",)
    allowed_from = ("queued", "processing")
    leads_to = "failed"
    plan_scope = "Only queued and processing jobs can be failed."

    reason: fields.Reason | None = None


class ForceReset(NamedJobCommand, frozen=True):
    """Requeue a processing, failed or cancelled job as if it were new. A worker that holds it loses it."""

    admission = "change"
    audit_name = "force-reset"
    errors = ("invalid_transition",)
    allowed_from: ClassVar[tuple[Status, ...]] = ("processing", "failed", "cancelled")
    leads_to = "queued"
    plan_scope: ClassVar[str] = "Only processing, failed and cancelled jobs can be reset."

    reason: fields.Reason | None = None
    run_at: fields.DueAt | None = None


class RetryJob(ForceReset, frozen=True):
    """Requeue a failed or cancelled job as if it were new."""

    audit_name = "retry"
    allowed_from = ("failed", "cancelled")
    plan_scope = "Only failed and cancelled jobs can be retried."


class Updates(Struct, frozen=True, forbid_unknown_fields=True):
    """Fields that a transition sets in addition to the status. Omitted fields stay unchanged."""

    error_message: fields.ErrorMessage | None = None
    priority: fields.Priority | None = None
    run_at: fields.DueAt | None = None
    max_attempts: fields.MaxAttempts | None = None
    download_url: fields.DownloadUrl | None = None
    file_path: fields.FilePath | None = None
    storage_key: fields.StorageKey | None = None
    metadata: fields.Metadata = None


class Transition(NamedJobCommand, frozen=True, kw_only=True):
    """Change the status of a job from `from` to `to`, if it still is `from`. `to` cannot be `processing`.

    A job that no worker has taken may become `completed`; this is final, and `validation.require_download_url` applies.
    """

    admission = "change"
    audit_name = "transition"
    errors = ("invalid_transition",)

    from_: Annotated[Status, doc("The expected status of the job.")] = field(name="from")
    to: Annotated[Status, doc("The new status.")]
    updates: Annotated[Updates, doc("Fields to set together with the status. Omitted fields stay unchanged.")] = (
        Updates()
    )
    reason: fields.Reason | None = None
    dry_run: fields.DryRun = False  # type: ignore[misc]  # of the class in others


class ExtendLock(NamedJobCommand, frozen=True):
    """Extend a lock on behalf of its worker."""

    admission = "change"
    audit_name = "extend-lock"
    errors = ("lock_lost", "invalid_transition", "progress_timeout")
    allowed_from = ("processing",)

    lock_id: fields.LockId = field(name="lockId")
    additional_ms: fields.AdditionalMs | None = field(name="additionalTime", default=None)
    reason: fields.Reason | None = None


class ReleaseLock(NamedJobCommand, frozen=True):
    """Return a job to its queue on behalf of its worker."""

    admission = "ending"
    audit_name = "release-lock"
    errors = ("lock_lost", "invalid_transition")
    allowed_from = ("processing",)
    leads_to = "queued"

    lock_id: fields.LockId = field(name="lockId")
    reason: fields.Reason | None = None


class RunNow(JobCommand, frozen=True):
    """Make a queued job due now."""

    admission = "change"
    audit_name = "run-now"
    errors = ("invalid_transition",)
    allowed_from = ("queued",)

    reason: fields.Reason | None = None
    dry_run: fields.DryRun = False  # type: ignore[misc]  # of the class in others


class Update(JobCommand, frozen=True, kw_only=True):
    """Change the priority, due time or maximum attempts of a job that is not completed."""

    admission = "change"
    audit_name = "update"
    errors = ("invalid_transition",)
    allowed_from = ("queued", "processing", "failed", "cancelled")

    priority: fields.Priority | None = None
    run_at: fields.DueAt | None = None
    max_attempts: fields.MaxAttempts | None = None
    reason: fields.Reason | None = None
    dry_run: fields.DryRun = False  # type: ignore[misc]  # of the class in others


class Adopt(JobCommand, frozen=True):
    """Complete a queued, failed or cancelled job with a late result, by default the result of the latest grant."""

    admission = "change"
    audit_name = "adopt"
    errors = ("invalid_transition", "late_result_not_found")
    allowed_from = ("queued", "failed", "cancelled")
    leads_to = "completed"

    result: Annotated[int, doc("The `seq` of the late result. Default: that of the latest grant.", ge=1)] | None = None
    reason: fields.Reason | None = None
    dry_run: fields.DryRun = False  # type: ignore[misc]  # of the class in others

    def weight(self) -> int:
        return ADOPT_WEIGHT


class Copy(JobCommand, frozen=True, kw_only=True):
    """Create a job that is due now, with the options, headers and payload of another one, or with a new payload."""

    admission = "create"
    audit_name = "copy"
    errors = ("invalid_transition", "too_many_jobs", "too_many_queues", "upgrade_incomplete")
    allowed_from = STATUSES
    needs_payload = True

    payload: Annotated[fields.AnyJson | UnsetType, doc("The payload of the new job. Default: that of the old one.")] = (
        UNSET
    )
    reason: fields.Reason | None = None


class Delete(JobCommand, frozen=True):
    """Delete a finished job with its history and its artifacts."""

    admission = "ending"
    audit_name = "delete"
    errors = ("invalid_transition",)
    allowed_from = ("failed", "cancelled", "completed")
    leads_to = "deleted"
    plan_scope = "Only finished jobs can be deleted."
    needs_payload = True

    reason: fields.Reason | None = None
