"""What a plan would do to a job, and by what it knows the job again when it is applied.

Pure. The rules of the actions themselves are where they are; here is only what can be told beforehand.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

import msgspec

from jobd.commands import PlanAction
from jobd.job import FINISHED, LIVE, Job

# Where each action leads to, None where the job is gone; from where it may be done, and why not from elsewhere.
TO: Final[dict[PlanAction, str | None]] = {
    "retry": "queued",
    "cancel": "cancelled",
    "force-fail": "failed",
    "delete": None,
}
_FROM: Final[dict[PlanAction, frozenset[str]]] = {
    "retry": frozenset({"failed", "cancelled"}),
    "cancel": frozenset(LIVE),
    "force-fail": frozenset(LIVE),
    "delete": frozenset(FINISHED),
}
_ONLY: Final[dict[PlanAction, str]] = {
    "retry": "Only failed and cancelled jobs are tried again.",
    "cancel": "Only queued and processing jobs can be cancelled.",
    "force-fail": "Only queued and processing jobs can be failed.",
    "delete": "Only finished jobs can be deleted.",
}


def why_not(action: PlanAction, job: Job) -> str | None:
    """Why `action` leaves this job alone; None where it does not."""
    return None if job.status in _FROM[action] else _ONLY[action]


def version(job: Job) -> str:
    """What the job is, but for the signs of life of its worker: the same text means that nothing else has happened.

    Without a grant a job has no signs of life, so that its `updated_at` tells of detours, too.
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
    )
    return blake2b(msgspec.msgpack.encode(seen), digest_size=8).hexdigest()
