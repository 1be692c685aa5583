"""Why a job is where it is and what happens next, in words for a tired operator.

Pure reading. Every job that is not finished has a next thing that will happen to it, at a known time, by a named rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec.structs import replace

from jobd.answers import Next, WhyView
from jobd.book import Book
from jobd.commands import NO_REASON, Moment
from jobd.events import Event, QueuePause, by_in_words
from jobd.job import DELAYED_FROM, Grant, Job, LateResult, Lease, Policy
from jobd.late_rules import refuse_adoption
from jobd.steps import in_words, is_overdue

# What ends a job by somebody's hand. Of the others (stalled, expired) the message says all.
_BY_HAND: Final = frozenset({"completed", "adopted", "cancelled", "force_failed", "transitioned", "imported"})


def explain(job: Job, book: Book, at: Moment, policy: Policy) -> WhyView:
    view = _explained(job, book, at)
    late = book.late.results.get(job.seq)
    return replace(view, do=[*_late(job, late, policy), *view.do]) if late else view


def _late(job: Job, late: list[LateResult], policy: Policy) -> list[str]:
    """What may be done with the late results of a job: of those that can be adopted the latest is named."""
    if job.status == "completed":
        return []
    latest = max(late, key=lambda each: each.fencing_token)
    fit = [each for each in late if refuse_adoption(each, policy) is None]
    best = max(fit, key=lambda each: each.fencing_token, default=latest)
    first, status = "", job.status
    if job.status == "processing":
        first, status = f"jobctl force-fail {job.id}, then ", "failed"
    is_there = f"A late result of worker {best.worker} is there"
    if fit:
        number = "" if best is latest else f" --result {best.seq}"
        return [f"{is_there}. To take it: {first}jobctl adopt {job.id}{number}"]
    lacks = "it has no download_url, which [validation] require_download_url asks for"
    by_hand = f"{first}jobctl transition {job.id} {status} completed --set download_url=URL"
    by_hand += " (what else of it is to stay is set there, too)"
    return [
        f"{is_there}, but it cannot be adopted: {lacks}. Look at it: jobctl late {job.id}. If it is whole: {by_hand}"
    ]


def _explained(job: Job, book: Book, at: Moment) -> WhyView:
    match job.status:
        case "queued":
            return _queued(job, book, at)
        case "processing":
            return _processing(job, at)
        case _:
            return _finished(job, at)


def _queued(job: Job, book: Book, at: Moment) -> WhyView:
    queue, back = job.options.queue, _returned(job)
    expires = None
    if is_overdue(job, at.now):
        return _overdue(job, at, back)
    if job.expires_at is not None:
        expires = Next("It fails as expired, if no worker has taken it by then.", job.expires_at, "expires_at")
    if (pause := book.paused.get(queue)) is not None:
        because = f"Queue {queue} is paused {pause.in_words()}. No job of it is granted.{back}"
        return WhyView("queued", because, _pause_ends(pause, expires), "queue_paused", _resuming(queue, pause))
    if job.run_at > at.now:
        because = f"It is not due for another {in_words(job.run_at - at.now)}.{back}"
        due = Next("It becomes due and is offered to workers.", job.run_at, "run_at")
        if job.releases >= DELAYED_FROM:
            due = Next("The next worker gets it.", job.run_at, "release delay")
        first = due if expires is None or job.run_at < expires.at else expires
        do = [*_look_at_releases(job), f"Run it now: jobctl run-now {job.id}"]
        return WhyView("queued", because, first, "run_at", do)
    view = _waiting(job, book, at, expires, back)
    return replace(view, do=[*_look_at_releases(job), *view.do])


def _look_at_releases(job: Job) -> list[str]:
    if job.releases < DELAYED_FROM or job.ended is None:
        return []
    return [f"Find out why its workers release it; {job.ended.worker} was the last."]


def _pause_ends(pause: QueuePause, expires: Next | None) -> Next | None:
    if pause.until is None or (expires is not None and expires.at <= pause.until):
        return expires
    return Next("The daemon resumes the queue.", pause.until, "pause")


def _resuming(queue: str, pause: QueuePause) -> list[str]:
    """Advise to resume only with the reason for the pause in sight."""
    by = "the operator who paused it" if pause.by is None else by_in_words(pause.by)
    reason = f" The pause says: {pause.reason}" if pause.reason else " The pause gives no reason: ask first."
    return [f"If {by} no longer needs the pause: jobctl resume {queue}.{reason}"]


def _overdue(job: Job, at: Moment, back: str) -> WhyView:
    assert job.expires_at is not None
    because = f"Its expires_at passed {in_words(at.now - job.expires_at)} ago, so no worker gets it any more.{back}"
    if at.suspect:
        because += " The wall clock is suspect, so the job is not failed either."
        do = ["Check the date of the daemon's machine. If it is right: jobctl clock accept"]
        return WhyView("queued", because, None, "clock", do)
    soon = Next("It fails as expired, with the next recovery or cleanup pass.", at.now, "expires_at")
    return WhyView("queued", because, soon, "expires_at", [f"If it is still wanted: jobctl force-reset {job.id}"])


def _waiting(job: Job, book: Book, at: Moment, expires: Next | None, back: str) -> WhyView:
    queue, kind = job.options.queue, job.options.kind
    waiting = in_words(at.now - job.run_at)
    first = next(book.due([queue], [kind]), None)
    ahead = "It is the next of its kind." if first is not None and first.id == job.id else "Other jobs are before it."
    because = f"It has been due for {waiting} and waits for a worker that claims queue {queue}. {ahead}{back}"
    held = book.counts[queue]["processing"]
    do = [
        f"See who works: jobctl workers. Queue {queue} has {held} {'job' if held == 1 else 'jobs'} in work.",
        f"Start a worker: jobctl run --queue {queue} -- CMD",
    ]
    offered = Next("It is handed to the next worker that claims its queue.", at.now, "claim")
    return WhyView("queued", because, expires or offered, "no free worker", do)


def _returned(job: Job) -> str:
    """What brought the job back to its queue, if something did."""
    back = _released(job)
    if job.error is not None and job.error.message:
        return f"{back} Its last attempt failed: {job.error.message}"
    if job.ended is None:
        return back
    return f"{back} Its last grant, to worker {job.ended.worker}, ended by {job.ended.rule}."


def _released(job: Job, when: str = "") -> str:
    """That the job is released again and again, once that delays it."""
    if job.releases < DELAYED_FROM:
        return ""
    return f" It was released {job.releases} times in a row without progress{when}."


def _processing(job: Job, at: Moment) -> WhyView:
    grant, lease = job.grant, job.lease
    if grant is None or lease is None:
        because = "The row says processing, but nobody holds the job. Such rows come from imports or from hands."
        soon = Next("The next cleanup pass treats it as stalled.", at.now, "validation")
        return WhyView("processing", because, soon, None, ["Run a pass now: jobctl cleanup"])
    since = in_words(at.now - grant.acquired_at)
    because = f"Worker {grant.worker} has held it for {since}, at {job.progress:g} %."
    if lease.is_live(at.lease):
        until = in_words(lease.expires - at.lease)
        because += f" Its lock is live for another {until}."
    elif lease.is_past_ceiling(at.lease):
        because += " Its lock has expired, and it is too late to report progress; the worker may still end it."
    else:
        because += " Its lock has expired; the worker may still end it or report."
    because += _ceiling(grant, lease, at) + _released(job, " before this grant" if job.progress == 0 else "")
    return WhyView("processing", because, _next_of(grant, lease, at), None, _advice(job, grant))


def _ceiling(grant: Grant, lease: Lease, at: Moment) -> str:
    """The ceiling of this grant while it lies ahead, or that there is none."""
    if lease.ceiling is None:
        return " This grant has no ceiling (max_processing_ms 0)."
    left = lease.ceiling - at.lease
    if left <= 0:
        return ""
    return f" Its ceiling is in {in_words(left)} (max_processing_ms {grant.max_processing_ms}); progress moves it."


def _next_of(grant: Grant, lease: Lease, at: Moment) -> Next:
    if at.lease >= lease.stuck:
        return Next("Recovery acts on it: on_stall decides between its queue and failed.", at.now, "recovery")
    if lease.is_live(at.lease) and lease.expires < lease.stuck:
        what = f"The lock expires, unless worker {grant.worker} extends it or reports progress."
        return Next(what, at.wall(lease.expires), "lock expiry")
    what = f"It counts as stuck and is recovered, unless worker {grant.worker}"
    if lease.ceiling is not None and lease.stuck == lease.ceiling:  # which more time for the lock does not move
        return Next(f"{what} reports progress or ends it.", at.wall(lease.stuck), "max_processing")
    return Next(f"{what} is heard of.", at.wall(lease.stuck), "stuck_after")


def _advice(job: Job, grant: Grant) -> list[str]:
    return [
        f"Is the worker alive? Look at {grant.worker}.",
        f"If it is dead and you cannot wait: jobctl force-reset {job.id} (runs it again) or jobctl force-fail {job.id}",
    ]


def _finished(job: Job, at: Moment) -> WhyView:
    deleted = None
    if job.expires_at is not None:
        what = "A cleanup pass deletes it" + (" once the clock is no longer suspect." if at.suspect else ".")
        deleted = Next(what, max(job.expires_at, at.now), "retention")
    match job.status:
        case "completed":
            return WhyView("completed", ending(job), deleted, None, [])
        case "failed":
            do = [f"Mend the cause, then run it again: jobctl force-reset {job.id}"]
            return WhyView("failed", ending(job), deleted, None, do)
        case "cancelled":
            do = [f"If it is wanted after all: jobctl force-reset {job.id}"]
            return WhyView("cancelled", ending(job), deleted, None, do)
        case _:
            do = ["Correct the row with the daemon stopped, then: jobd doctor --accept ID"]
            return WhyView(job.status, f"Status {job.status} is unknown, so no rule applies to it.", None, None, do)


def ending(job: Job, events: Sequence[Event] = ()) -> str:
    """How a finished job ended; by whom, and why they said, as far as its latest events tell."""
    end = next((event for event in reversed(events) if event.after == job.status != event.before), None)
    if job.status == "failed":
        return _failed(job, end)
    how = job.status if end is None or end.type not in _BY_HAND else _by_hand(end)
    return f"It was {how}; that is final." if job.status == "completed" else f"It was {how}."


def _failed(job: Job, end: Event | None) -> str:
    message = (job.error.message if job.error else None) or "without a message."
    if end is not None and end.type == "failed":
        return f"It failed at {by_in_words(end.by)}: {message}"
    if end is None or end.type not in _BY_HAND:
        return f"It failed: {message}"
    is_said = message in (end.reason, NO_REASON)
    return f"It was {_by_hand(end)}." if is_said else f"It was {_by_hand(end)}. Its error: {message}"


def _by_hand(end: Event) -> str:
    """`cancelled by operator ana: no longer needed`."""
    how = f"imported as {end.after}" if end.type == "imported" else str(end.after)
    if end.type == "adopted":
        how += f" with a late result of worker {(end.details or {}).get('worker')}"
    reason = f": {end.reason.removesuffix('.')}" if end.reason not in (None, "", NO_REASON) else ""
    return f"{how} by {by_in_words(end.by)}{reason}"
