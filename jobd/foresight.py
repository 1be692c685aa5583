"""What recovery and a cleanup pass would do now, for who wants to know before they ask for one.

Changes nothing: it looks where a pass looks (passes.py), in slices, and gives way between them.
"""

from __future__ import annotations

from itertools import islice
from typing import Final

from jobd.answers import Foreseen, PreviewView
from jobd.commands import Preview
from jobd.job import Job
from jobd.passes import SCAN, Hands
from jobd.validation import counts, validate

SHOWN: Final = 1_000  # jobs of each kind


async def foresee(hands: Hands) -> PreviewView:
    """Raises passes.Refused where the actor takes no question."""
    seen: Foreseen = await hands.ask(Preview(limit=SHOWN), "daemon")
    now = hands.clock.moment().now
    past = await hands.actor.disk.expired(now, SHOWN + 1)
    old, held = ([], past) if hands.clock.suspect else (past, [])  # deletion waits until the clock is accepted
    wrong, more_wrong = await _wrong(hands)
    settled = {*(each.job_id for each in seen.details), *seen.expired, *old}  # before a pass comes to what is wrong
    return PreviewView(
        recover=seen.details,
        expired_locks=seen.locks,
        expired_jobs=seen.expired,
        deleted_jobs=old[:SHOWN],
        mended_jobs=[job_id for job_id in wrong if job_id not in settled],
        held_jobs=held[:SHOWN],
        more_held=len(held) > SHOWN,
        more=seen.more or len(old) > SHOWN or more_wrong,
        timestamp=now,
    )


async def _wrong(hands: Hands) -> tuple[list[str], bool]:
    """Jobs that a pass would report or mend: of those whose rows were brought, and of all that are alive."""
    book = hands.actor.book
    wrong: dict[str, None] = {}
    for brought, ids in ((True, dict.fromkeys(book.suspects.values())), (False, dict.fromkeys(book.jobs.touched()))):
        left = iter(ids)
        while some := list(islice(left, SCAN)):
            jobs = await _loaded(hands, some) if brought else [book.jobs.find(job_id) for job_id in some]
            wrong |= {job.id: None for job in jobs if job is not None and _looks_wrong(hands, job)}
            if len(wrong) > SHOWN:
                return list(wrong)[:SHOWN], True
            await hands.breathe()
    return list(wrong), False


async def _loaded(hands: Hands, ids: list[str]) -> list[Job | None]:
    loaded = await hands.actor.disk.load(ids, [], [])
    return list(loaded.jobs.values())


def _looks_wrong(hands: Hands, job: Job) -> bool:
    return any(map(counts, validate(job, hands.clock.moment(), hands.actor.policy).issues))
