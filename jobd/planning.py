"""What a plan would do to a job, and by what it knows the job again when it is applied.

Pure. The rules of the actions themselves are where they are; here is only what can be told beforehand.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

import msgspec

from jobd.commands import Filter, PlanAction
from jobd.job import Job

# Where each action leads to, None where the job is gone; from where it may be done, and why not from elsewhere.
TO: Final[dict[PlanAction, str | None]] = {
    "retry": "queued",
    "force-reset": "queued",
    "cancel": "cancelled",
    "force-fail": "failed",
    "delete": None,
}
_FROM: Final[dict[PlanAction, tuple[str, ...]]] = {
    "retry": ("failed", "cancelled"),
    "force-reset": ("processing", "failed", "cancelled"),
    "cancel": ("queued", "processing"),
    "force-fail": ("queued", "processing"),
    "delete": ("failed", "cancelled", "completed"),
}
ONLY: Final[dict[PlanAction, str]] = {
    "retry": "Only failed and cancelled jobs are tried again.",
    "force-reset": "Only processing, failed and cancelled jobs can be reset.",
    "cancel": "Only queued and processing jobs can be cancelled.",
    "force-fail": "Only queued and processing jobs can be failed.",
    "delete": "Only finished jobs can be deleted.",
}


def why_not(action: PlanAction, job: Job) -> str | None:
    """Why `action` leaves this job alone; None where it does not."""
    return None if job.status in _FROM[action] else ONLY[action]


def statuses(action: PlanAction, wanted: Filter) -> list[str]:
    """Where `action` looks for the jobs of a filter, one after the other: it does nothing to any other job.

    An error is looked for in failed jobs, as in the list of jobs, unless a status is asked for.
    """
    status = wanted.status
    if wanted.error is not None:
        status = status or "failed"
    return [each for each in _FROM[action] if status in (None, each)]


def version(job: Job, late: int | None = None) -> str:
    """What the job is, but for the signs of life of its worker: the same text means that nothing else has happened.

    Without a grant a job has no signs of life, so that its `updated_at` tells of detours, too. `late` is the late
    result that came last (Book.latest_late): its row does not tell of it, and who deletes the job deletes it as well.
    """
    seen = (
        job.seq,
        job.status,
        job.options,
        job.run_at,
        job.attempt,
        job.stalls,
        job.started_at,
        job.finished_at,
        job.expires_at,
        job.grant,
        job.ended,
        job.result,
        job.error,
        job.updated_at if job.grant is None else None,
        late,
    )
    return blake2b(msgspec.msgpack.encode(seen), digest_size=8).hexdigest()
