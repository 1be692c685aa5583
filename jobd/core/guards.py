"""The guards of the rules: whether a command is allowed, by the job, the limits and the time, and the error if not."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any, Final

import msgspec
from msgspec import UNSET, Raw

from jobd.core.transaction import Transaction
from jobd.model.clocks import LockMs
from jobd.model.commands import AnyCommand, Complete, Moment
from jobd.model.errors import ApiException, api_error
from jobd.model.job import CHECKPOINT_BYTES, HEADER_BYTES, TRANSITIONS, BackoffOptions, Job, Policy, storage_key_error
from jobd.model.storage import EXTRA_FORMAT

NULL: Final = Raw(b"null")
encode: Final = msgspec.json.Encoder().encode
CLOCK_SUSPECT: Final = (
    "The wall clock is suspect, so nothing is deleted or failed by age. Check it. If it is correct: jobctl clock accept"
)


def find(tx: Transaction, job_id: str) -> Job:
    """Return the job. Raises ApiException if it does not exist or is in quarantine."""
    job = tx.state.get(job_id)
    if job is None:
        raise no_such_job(tx, job_id)
    return job


def no_such_job(tx: Transaction, job_id: str) -> ApiException:
    """Return the error about a job that does not exist or is in quarantine."""
    reason = tx.state.quarantined.get(job_id)
    if reason is not None:
        message = f"Job {job_id} is in quarantine: {reason}. An operator can repair it: jobd doctor shows how."
        return api_error("job_quarantined", message, job_id=job_id, reason=reason)
    message = (
        f"There is no job {job_id}: it was never created, or it was deleted. "
        "Search the list of jobs: GET /v1/jobs or jobctl jobs."
    )
    return api_error("job_not_found", message, job_id=job_id)


def invalid_transition(job: Job, to: str, what: str) -> ApiException:
    """Return the error of a transition that the status does not allow. `what` says what to do instead.

    Its detail `allowed` has the statuses that an operator may set.
    """
    allowed = sorted(status for source, status in TRANSITIONS if source == job.status and status != "processing")
    message = f"Job {job.id} is {job.status}. {what}"
    return api_error("invalid_transition", message, status=job.status, to=to, allowed=allowed)


def check_live_jobs(tx: Transaction) -> None:
    """Reject a new job if the limit of unfinished jobs is reached."""
    limit = tx.policy.live_jobs
    if tx.state.live_count < limit:
        return
    message = f"There are {limit} unfinished jobs (limits.live_jobs). Wait until some are finished, or raise the limit."
    raise api_error("too_many_jobs", message, limit=limit)


def check_until(tx: Transaction, until: int | None, otherwise: str) -> None:
    """Reject an end that is not in the future."""
    if until is not None and until <= tx.at.believed:
        raise invalid("until", f"until {until} is not in the future; it is in Unix milliseconds. {otherwise}")


def check_queue(tx: Transaction, queue: str) -> None:
    """Reject the first job of a queue above the limit. Queues that exist above a lowered limit still get jobs."""
    known, limit = tx.state.counts, tx.policy.queues
    if queue in known or len(known) < limit:
        return
    message = (
        f"Queue {queue} would be new, and {len(known)} queues have jobs (limits.queues {limit}). "
        "Use a queue that has jobs, raise the limit, or wait until a queue has none. Finished jobs count too, until "
        "they are deleted."
    )
    raise api_error("too_many_queues", message, queue=queue, limit=limit)


def invalid(field: str, message: str) -> ApiException:
    return api_error("invalid_request", message, field=f"$.{field}")


def check_format(tx: Transaction, what: str) -> None:
    """Reject a request that stores `what`, if a node of the cluster does not read records with it."""
    node = tx.state.too_old_for(EXTRA_FORMAT)
    if node is None:
        return
    message = (
        f"Node {node} of the cluster runs an older version, which does not read {what}. Upgrade it, or "
        f"remove its entry if it is gone (jobd cluster forget {node}), and try again. Nothing was changed."
    )
    raise api_error("upgrade_incomplete", message, node=node)


def check_backoff(backoff: BackoffOptions) -> None:
    if backoff.max_ms < backoff.base_ms:
        message = f"max_ms {backoff.max_ms} is less than base_ms {backoff.base_ms}. Raise max_ms, or lower base_ms."
        raise invalid("backoff.max_ms", message)


def headers_body(tx: Transaction, headers: dict[str, str]) -> bytes:
    """Return the text of the headers of a new job. Rejects headers that are too long."""
    size = sum(len(name.encode()) + len(value.encode()) for name, value in headers.items())
    if size > HEADER_BYTES:
        message = f"The headers have {size} bytes, but may have {HEADER_BYTES}. Use the payload instead."
        raise invalid("headers", message)
    check_format(tx, "headers of jobs")
    return encode(headers)


def checkpoint_body(tx: Transaction, checkpoint: Any) -> bytes | None:
    """Return the text of a checkpoint, empty to remove it, None if there is none. Rejects one that is too large."""
    if checkpoint is UNSET:
        return None
    if len(checkpoint) > CHECKPOINT_BYTES:
        message = (
            f"The checkpoint has {len(checkpoint)} bytes, but may have {CHECKPOINT_BYTES}. Store the data elsewhere, "
            "and its place in the checkpoint."
        )
        raise invalid("checkpoint", message)
    check_format(tx, "checkpoints of jobs")
    return b"" if checkpoint == NULL else bytes(checkpoint)


def check_expiry(tx: Transaction, expires_at: int | None) -> None:
    if expires_at is not None and expires_at <= tx.at.believed:
        raise invalid("expires_at", f"expires_at {expires_at} is not in the future; it is in Unix milliseconds.")


def check_result(tx: Transaction, command: Complete) -> None:
    """Reject a result that may not complete a job."""
    if command.storage_key is not None and (fault := storage_key_error(command.storage_key)) is not None:
        raise invalid("storage_key", f"storage_key {fault}.")
    check_expiry(tx, command.expires_at)
    check_url(tx.policy, command.download_url)


def check_url(policy: Policy, download_url: str | None, field: str = "download_url") -> None:
    """Reject a completion with this download_url, or without one, if the configuration requires one."""
    if lacks_url(policy, download_url):
        raise invalid(field, "download_url is missing; [validation] require_download_url requires it.")


def lacks_url(policy: Policy, download_url: str | None) -> bool:
    """Return whether the configuration requires a download_url and this one is missing."""
    return policy.require_download_url and not download_url


def was_due(job: Job, now: int) -> bool:
    """Return whether the job was due when it last changed, and is not due `now`: the wall clock was set back.

    A `run_at` before `created_at` was set after that step: `updated_at` is never before `created_at`.
    """
    return now < job.run_at and job.created_at <= job.run_at <= job.updated_at


def may_expire(job: Job, at: Moment) -> bool:
    """Return whether the job is overdue by a clock that is not suspect. Then it fails."""
    return not at.suspect and is_overdue(job, at.now)


def is_overdue(job: Job, now: int) -> bool:
    """Return whether the job is queued and past its `expires_at`."""
    return job.status == "queued" and job.expires_at is not None and job.expires_at <= now


def is_stalled(job: Job, lock_ms: LockMs) -> bool:
    """Return whether the job is processing and stalled at lock time `lock_ms`. Without a grant it always is."""
    return job.status == "processing" and (
        job.deadlines is None or job.grant is None or lock_ms >= job.deadlines.stalled_at
    )


def digest(command: AnyCommand) -> str:
    """Return a hash of a command, the same for equal commands however their JSON was written."""
    return blake2b(encode(command), digest_size=16).hexdigest()
