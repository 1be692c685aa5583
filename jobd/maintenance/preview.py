"""Preview what recovery and a cleanup run would do now.

The preview reads what a cleanup run reads, in slices with pauses, and within a time limit.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import islice
from typing import Final

from jobd.maintenance.cleanup_run import SCAN, MaintenanceContext
from jobd.model.commands import Preview
from jobd.model.job import Job
from jobd.model.responses import PreviewResult, PreviewView

MAX_SHOWN: Final = 1_000  # jobs of each kind
SCAN_S: Final = 0.5  # without pauses: enough to validate about 50,000 jobs
MAX_IDS: Final = 100_000  # ids copied at a time


async def preview(context: MaintenanceContext, scan_s: float = SCAN_S) -> PreviewView:
    """Return what recovery and a cleanup run would do now. Each scan takes at most `scan_s` seconds.

    Raises CommandRejected or Unfinished.
    """
    seen: PreviewResult = await context.ask(Preview(limit=MAX_SHOWN), "daemon")
    at = context.clock.moment()
    nothing: tuple[list[str], bool] = [], False
    past = await _expired_jobs(context, at.now, scan_s)
    # Nothing is deleted until the clock is trusted.
    (old, more_old), (held, more_kept) = (nothing, past) if at.suspect else (past, nothing)
    wrong, more_wrong = await _jobs_with_issues(context, scan_s)
    handled = {*(each.job_id for each in seen.details), *seen.expired, *old}  # these steps come before validation
    return PreviewView(
        recover=seen.details,
        expired_locks=seen.locks,
        overdue_jobs=seen.expired,
        deleted_jobs=old,
        invalid_jobs=[job_id for job_id in wrong if job_id not in handled],
        kept_jobs=held,
        more_kept=more_kept,
        more_invalid=more_wrong,
        more=seen.more or more_old or more_wrong,
        timestamp=at.now,
    )


async def _expired_jobs(context: MaintenanceContext, now: int, scan_s: float) -> tuple[list[str], bool]:
    """Return finished jobs past their retention, and whether there may be more."""
    found: dict[str, None] = {}
    skipped, spent_s = 0, 0.0
    while len(found) <= MAX_SHOWN:
        if spent_s >= scan_s:
            return list(found), True
        began_s = time.perf_counter()
        page = await context.actor.disk.expired_jobs(now, MAX_SHOWN + 1 - len(found), skipped)
        spent_s += time.perf_counter() - began_s
        skipped += len(page)
        found |= dict.fromkeys(page)
        if not page:
            return list(found), False
        await context.yield_to_workers()
    return list(found)[:MAX_SHOWN], True


async def _jobs_with_issues(context: MaintenanceContext, scan_s: float) -> tuple[list[str], bool]:
    """Return jobs that a cleanup run would report or repair, and whether there may be more.

    Imported and hand-edited rows come first, then live jobs. The scan ends after `scan_s`, because a read-only token is
    enough to request it.
    """
    state, spent_s = context.actor.state, 0.0
    wrong: dict[str, None] = {}
    jobs: Iterable[Job]
    for is_unvalidated, ids in ((True, state.unvalidated.values()), (False, state.jobs.touched())):
        snapshot = list(islice(ids, MAX_IDS + 1))  # they change during the pauses
        left = islice(snapshot, MAX_IDS)
        while page := list(islice(left, SCAN)):
            if spent_s >= scan_s:
                return list(wrong), True
            began_s = time.perf_counter()
            if is_unvalidated:
                jobs = (await context.actor.disk.load(page, [], [])).jobs.values()
            else:
                jobs = filter(None, map(state.jobs.find, page))
            wrong |= {job.id: None for job in jobs if context.has_issues(job)}
            spent_s += time.perf_counter() - began_s
            if len(wrong) > MAX_SHOWN:
                return list(wrong)[:MAX_SHOWN], True
            await context.yield_to_workers()
        if len(snapshot) > MAX_IDS:
            return list(wrong), True
    return list(wrong), False
