"""What recovery and a cleanup pass would do now, for who wants to know before they ask for one.

Changes nothing: it looks where a pass looks (passes.py), in slices, gives way between them, and has an end.
"""

from __future__ import annotations

import time
from itertools import islice
from typing import Final

from jobd.core.validation import counts, validate
from jobd.maintenance.cleanup_pass import SCAN, MaintenanceContext
from jobd.model.commands import Preview
from jobd.model.job import Job
from jobd.model.responses import PreviewResult, PreviewView

MAX_SHOWN: Final = 1_000  # jobs of each kind
SCAN_S: Final = 0.5  # at what is wrong with jobs, without the pauses: some 50 000 of them
MAX_IDS: Final = 100_000  # ids that are noted for it: a copy of them is made in one go


async def preview(hands: MaintenanceContext, look_s: float = SCAN_S) -> PreviewView:
    """`look_s`: so long it looks for what is old, and for what is wrong.

    Raises passes.Refused where the actor takes no question.
    """
    seen: PreviewResult = await hands.ask(Preview(limit=MAX_SHOWN), "daemon")
    at = hands.clock.moment()
    nothing: tuple[list[str], bool] = [], False
    past = await _expired_jobs(hands, at.now, look_s)
    # Nothing is deleted until the clock is trusted.
    (old, more_old), (held, more_held) = (nothing, past) if at.suspect else (past, nothing)
    wrong, more_wrong = await _jobs_with_issues(hands, look_s)
    settled = {*(each.job_id for each in seen.details), *seen.expired, *old}  # before a pass comes to what is wrong
    return PreviewView(
        recover=seen.details,
        expired_locks=seen.locks,
        expired_jobs=seen.expired,
        deleted_jobs=old,
        mended_jobs=[job_id for job_id in wrong if job_id not in settled],
        held_jobs=held,
        more_held=more_held,
        more_mended=more_wrong,
        more=seen.more or more_old or more_wrong,
        timestamp=at.now,
    )


async def _expired_jobs(hands: MaintenanceContext, now: int, look_s: float) -> tuple[list[str], bool]:
    """Finished jobs whose time is over, and whether there may be more. Of large ones few are read at a time."""
    found: dict[str, None] = {}
    looked, spent_s = 0, 0.0
    while len(found) <= MAX_SHOWN:
        if spent_s >= look_s:
            return list(found), True
        began_s = time.perf_counter()
        some = await hands.actor.disk.expired(now, MAX_SHOWN + 1 - len(found), looked)
        spent_s += time.perf_counter() - began_s
        looked += len(some)
        found |= dict.fromkeys(some)
        if not some:
            return list(found), False
        await hands.yield_to_workers()
    return list(found)[:MAX_SHOWN], True


async def _jobs_with_issues(hands: MaintenanceContext, look_s: float) -> tuple[list[str], bool]:
    """Jobs that a pass would report or mend, and whether there may be more: whose rows were brought, then who is alive.

    Whoever may look can ask for this, as often as he likes: it ends after `look_s`, without the pauses.
    """
    book, spent_s = hands.actor.book, 0.0
    wrong: dict[str, None] = {}
    for brought, ids in ((True, book.suspects.values()), (False, book.jobs.touched())):
        noted = list(islice(ids, MAX_IDS + 1))  # they come and go while we give way
        left = islice(noted, MAX_IDS)
        while some := list(islice(left, SCAN)):
            if spent_s >= look_s:
                return list(wrong), True
            began_s = time.perf_counter()
            jobs = await _loaded(hands, some) if brought else [book.jobs.find(job_id) for job_id in some]
            wrong |= {job.id: None for job in jobs if job is not None and _has_issues(hands, job)}
            spent_s += time.perf_counter() - began_s
            if len(wrong) > MAX_SHOWN:
                return list(wrong)[:MAX_SHOWN], True
            await hands.yield_to_workers()
        if len(noted) > MAX_IDS:
            return list(wrong), True
    return list(wrong), False


async def _loaded(hands: MaintenanceContext, ids: list[str]) -> list[Job | None]:
    loaded = await hands.actor.disk.load(ids, [], [])
    return list(loaded.jobs.values())


def _has_issues(hands: MaintenanceContext, job: Job) -> bool:
    return any(map(counts, validate(job, hands.clock.moment(), hands.actor.policy).issues))
