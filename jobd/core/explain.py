"""Explain why a job is in its state and what happens next, in plain words for operators.

For every job that is not finished, something happens next, at a known time, by a named rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from shlex import quote
from typing import Final, NamedTuple

from msgspec.structs import replace

from jobd.core import transitions
from jobd.core.guards import is_overdue
from jobd.core.quiet import quiet_takers
from jobd.core.rules.late_result_rules import LACKS_URL, not_adoptable
from jobd.core.state import PAUSES_READ_MS, State
from jobd.core.worker_presence import ClaimSet, WorkerPresence, WorkerSeen
from jobd.model.commands import NO_REASON, Moment
from jobd.model.events import Event, QueuePause, describe_author
from jobd.model.job import DELAYED_FROM, SECOND_MS, Grant, Job, LateResult, LockDeadlines, Policy
from jobd.model.responses import KindWhy, NextEvent, QueueWhyView, WhyView
from jobd.model.times import duration, time_left, utc

MAX_KINDS: Final = 100  # of a queue that are explained
MAX_NAMED: Final = 3  # workers or kinds that a sentence lists
MAX_OUTCOMES: Final = 200  # jobs of a worker whose outcomes are counted
WITHOUT_WORKER: Final = ("no worker", "no worker of its kind")  # values of `blocked_by`
RUN_MS: Final = SECOND_MS  # between the time of an event and its commit, at most as a rule

# Events by which a worker or operator ends a job. For the others (stalled, expired) the message is enough.
_NAMES_AUTHOR: Final = frozenset({"completed", "adopted", "cancelled", "force_failed", "transitioned", "imported"})


def explain(job: Job, state: State, at: Moment, policy: Policy, late: list[LateResult] | None = None) -> WhyView:
    view = _explained(job, state, at)
    if job.extra is not None and job.extra.schedule_id is not None:
        view = replace(view, schedule_id=job.extra.schedule_id)
    return replace(view, do=[*_late(job, late, policy), *view.do]) if late else view


def explain_queue(name: str, state: State, at: Moment, policy: Policy) -> QueueWhyView:
    """Explain the job of each kind that has been due longest."""
    found = [(state.oldest_of_kind(name, kind, at.now)[1], kind) for kind in state.queued_kinds(name)]
    oldest = sorted((entry[1:4], kind) for entry, kind in found if entry is not None)[:MAX_KINDS]
    kinds = []
    for (*_, job_id), kind in oldest:
        view = explain(state.jobs[job_id], state, at, policy)
        kinds.append(KindWhy(kind, state.due_of_kind(name, kind, at.now)[0], job_id, view))
    return QueueWhyView(name, _queue_state(name, state, len(kinds), len(found)), kinds)


def _queue_state(name: str, state: State, due: int, queued: int) -> str:
    counts, pause = state.counts.get(name), state.paused.get(name)
    if counts is None and pause is None:
        return f"There is no queue {name}: it has no jobs and is not paused. List the queues: jobctl queues"
    paused = f"Queue {name} was paused {pause.describe()}. " if pause is not None else ""
    if due:
        return f"{paused}Jobs of {due} of {queued} queued kinds are due."
    live = ", ".join(f"{0 if counts is None else counts[status]:,} {status}" for status in ("queued", "processing"))
    return f"{paused}No job of queue {name} is due: {live}."


def _late(job: Job, late: list[LateResult], policy: Policy) -> list[str]:
    """Suggest what to do with the late results of a job. Names the latest one that can be adopted."""
    if job.status == "completed":
        return []
    latest = max(late, key=lambda each: each.fencing_token)
    fit = [each for each in late if not_adoptable(each, policy) is None]
    best = max(fit, key=lambda each: each.fencing_token, default=latest)
    first, status = "", job.status
    if job.status == "processing":
        first, status = f"jobctl force-fail {job.id}, then ", "failed"
    is_there = f"Worker {best.worker} submitted a late result"
    if fit:
        number = "" if best is latest else f" --result {best.seq}"
        return [f"{is_there}. To adopt it: {first}jobctl adopt {job.id}{number}"]
    by_hand = f"{first}jobctl transition {job.id} {status} completed --set download_url=URL"
    by_hand += " (also set the other fields that you want to keep)"
    return [
        f"{is_there}, but it cannot be adopted: {LACKS_URL}. Inspect it: jobctl late {job.id}. "
        f"If the work is complete: {by_hand}"
    ]


def _explained(job: Job, state: State, at: Moment) -> WhyView:
    match job.status:
        case "queued":
            return _queued(job, state, at)
        case "processing":
            return _processing(job, state, at)
        case _:
            return _finished(job, state, at)


def _queued(job: Job, state: State, at: Moment) -> WhyView:
    queue, back = job.options.queue, _returned(job)
    expires = None
    if is_overdue(job, at.now):
        return _overdue(job, state, at, back)
    if job.expires_at is not None:
        what = "It fails as expired if no worker has taken it by then" + _once_trusted(at)
        expires = _by_recovery(what, job.expires_at, "expires_at", state, at)
    if (pause := state.paused.get(queue)) is not None:
        because = f"Queue {queue} was paused {pause.describe()}. None of its jobs is granted.{back}"
        first = _first(expires, _pause_ends(pause, at), at)
        return WhyView("queued", because, first, "queue_paused", _resuming(queue, pause))
    if job.run_at > at.now:
        because = f"It is not due for another {time_left(job.run_at - at.now)}."
        if job.ended is not None and job.ended.verb == "fail":
            tries = "once" if job.attempt == 1 else f"{job.attempt} times"
            if job.stalls:  # which can have used attempts too
                tries = f"in attempt {job.attempt}"
            of = f"attempt {job.attempt + 1} of {job.options.max_attempts}"
            because = f"It failed {tries} and is retried in {time_left(job.run_at - at.now)}, {of}."
        outlook = _outlook(job, state, at)
        has_no_worker = outlook.blocked_by in WITHOUT_WORKER
        if has_no_worker:
            because += f" At present, {outlook.clause}."
        because += back
        rule = "release delay" if job.releases >= DELAYED_FROM else "run_at"
        due = _next("It becomes due and is offered to workers.", job.run_at, rule, at)
        do = [*_look_at_releases(job), f"Run it now: jobctl run-now {job.id}", *(outlook.do if has_no_worker else [])]
        return WhyView("queued", because, _first(expires, due, at), "run_at", do)
    view = _waiting(job, state, at, expires, back)
    return replace(view, do=[*_look_at_releases(job), *view.do])


def _look_at_releases(job: Job) -> list[str]:
    if job.releases < DELAYED_FROM or job.ended is None:
        return []
    return [f"Find out why its workers release it; {job.ended.worker} was the last."]


def _pause_ends(pause: QueuePause, at: Moment) -> NextEvent | None:
    if pause.until is None:
        return None
    until = max(pause.until + at.now - at.believed, at.now)
    return _next("The daemon resumes the queue.", until, "pause", at, PAUSES_READ_MS)


def _first(expires: NextEvent | None, other: NextEvent | None, at: Moment) -> NextEvent | None:
    """Return which of both happens first. A job does not expire while the clock is suspect."""
    if expires is None or other is None or expires.at is None:
        return expires or other
    if other.at is None:
        return expires
    return other if at.suspect or other.at < expires.at else expires


def _next(what: str, first: int, rule: str, at: Moment, within_ms: int = 0) -> NextEvent:
    """Return what happens from `first` on, within `within_ms`. The latest time is unknown while something is wrong."""
    return NextEvent(what, first, rule, None if at.suspect or at.held else first + within_ms + RUN_MS)


def _resuming(queue: str, pause: QueuePause) -> list[str]:
    """Suggest resuming the queue, and quote the reason for the pause."""
    by = "the operator who paused it" if pause.by is None else describe_author(pause.by)
    reason = (
        f" Reason for the pause: {pause.reason}" if pause.reason else " No reason was given for the pause; ask first."
    )
    return [f"If {by} no longer needs the pause: jobctl resume {queue}.{reason}"]


def _overdue(job: Job, state: State, at: Moment, back: str) -> WhyView:
    assert job.expires_at is not None
    because = f"Its expires_at passed {duration(at.now - job.expires_at)} ago, so no worker can claim it.{back}"
    if at.suspect:
        because += " The wall clock is suspect, so recovery does not fail it."
        do = ["Check the clock of the daemon's machine. If it is correct: jobctl clock accept"]
        return WhyView("queued", because, None, "clock", do)
    do = [f"If it is still needed, once it has failed: jobctl retry {job.id}"]
    what = f"{_recovery(state)} fails it as expired."
    return WhyView("queued", because, _by_recovery(what, at.now, "expires_at", state, at), "expires_at", do)


def _recovery(state: State) -> str:
    return "Recovery" if state.recovery.recover_every_ms else "The next cleanup run (recover_every is 0)"


def _by_recovery(what: str, due_at: int, rule: str, state: State, at: Moment) -> NextEvent:
    """Return what recovery does to a job from `due_at` on. It runs in intervals, and takes up to RUN_MS."""
    schedule, first = state.recovery, max(due_at, at.now)
    if not schedule.recover_every_ms:
        first = max(first, schedule.next_cleanup_at)
    return _next(what, first, rule, at, schedule.recover_every_ms or schedule.cleanup_every_ms)


def _waiting(job: Job, state: State, at: Moment, expires: NextEvent | None, back: str) -> WhyView:
    queue, kind = job.options.queue, job.options.kind
    first = next(state.due([queue], [kind]), None)
    is_first = first is not None and first.id == job.id
    ahead = "It is next in line" if is_first else "Other jobs come first"
    if is_first and len(state.queued_kinds(queue)) > 1:
        ahead += " for its kind"
    outlook = _outlook(job, state, at, is_first=is_first)
    because = f"It has waited for {duration(at.now - job.waits_since(at.now))}: {outlook.clause}. {ahead}.{back}"
    return WhyView("queued", because, _first(expires, outlook.next, at), outlook.blocked_by, outlook.do)


class _Outlook(NamedTuple):
    """The workers that could take a due job, as `why` reports them."""

    clause: str
    next: NextEvent
    blocked_by: str | None
    do: list[str]


def _outlook(job: Job, state: State, at: Moment, *, is_first: bool = False) -> _Outlook:
    queue, kind = job.options.queue, job.options.kind
    presence = state.presence
    if at.held:
        resumed = NextEvent("Jobs are granted again once the disk has room.", None, "disk")
        clause = "the disk is full, so no job is granted and lock time stands still"
        return _Outlook(clause, resumed, "full disk", ["See what takes the space: jobctl disk"])
    sets = list(presence.claim_sets(queue))
    fitting = [claims for claims in sets if claims.takes(kind)]
    see, start = "List the workers: jobctl workers", f"Start a worker: jobctl run --queue {queue} -- CMD"
    what = "The first worker that claims its queue and kind gets it, unless another job comes first."
    offered = NextEvent(what, None, "claim")
    if any(claims.waiting for claims in fitting):
        at_once = _next("A waiting worker gets it at once.", at.now, "claim", at) if is_first else offered
        return _Outlook("a worker waits for such jobs", at_once, None, [see])
    workers = [(name, presence.workers[name]) for claims in fitting for name in claims.workers]
    idle = [each for each in workers if presence.state(each[1]) in ("waiting", "idle")]
    busy = [each for each in workers if len(each[1].jobs) > len(each[1].expired)]
    silent = [name for name, each in workers if each.expired]
    take_back = [f"Take back the jobs of {name}: jobctl take-back {quote(name)}" for name in silent[:MAX_NAMED]]
    if idle:
        return _Outlook(_idle(idle, busy, state, at), offered, "no waiting worker", [see, start])
    if busy:
        return _Outlook(_busy(busy, silent, state, at), offered, "no free worker", [see, *take_back, start])
    if silent:
        clause = f"no worker takes such jobs now; silent, with an expired lock: {_listed(silent)}"
        return _Outlook(clause, offered, "no worker", [see, *take_back, start])
    if takers := [name for name, _ in quiet_takers(state, queue, kind)]:
        are = "one worker that takes such jobs is" if len(takers) == 1 else f"{len(takers)} workers that take them are"
        do = "Let them take jobs again: jobctl resume-worker NAME, or --rule RULE for those of a rule: jobctl quiet"
        return _Outlook(f"{are} quiet: {_listed(takers)}", offered, "no worker", [see, do])
    if fitting:
        last = max(claims.claimed for claims in fitting)
        who = next((f", by {name}, which {_departure(each)}" for name, each in workers if each.claimed == last), "")
        clause = f"no worker claims such jobs now; the last claim was {duration(presence.lock_ms - last)} ago{who}"
        return _Outlook(clause, offered, "no worker", [see, start])
    if sets and (others := _others(sets, presence)):
        clause = f"{others}; no worker has claimed {_of_kind(kind)} of this queue {_since(presence, at)}"
        return _Outlook(clause, offered, "no worker of its kind", [see, f"{start} (it takes all kinds)"])
    jobs = f"queue `{queue}`" if not sets else f"{_of_kind(kind)} of queue `{queue}`"
    return _Outlook(f"no worker has claimed {jobs} {_since(presence, at)}", offered, "no worker", [see, start])


def _idle(idle: list[tuple[str, WorkerSeen]], busy: list[tuple[str, WorkerSeen]], state: State, at: Moment) -> str:
    name, latest = max(idle, key=lambda each: each[1].claimed)
    last = f"{name} claimed this queue {duration(state.presence.lock_ms - latest.claimed)} ago"
    others = "" if len(idle) == 1 else f"; {len(idle) - 1} more {'is' if len(idle) == 2 else 'are'} idle"
    if not busy:
        return f"no worker is waiting now; {last}{others}"
    who, longest = f"{len(busy)} are busy, the longest", _longest(busy, state, at)
    if len(busy) == 1:
        who = f"{busy[0][0]} has been busy"
    return f"no worker is waiting now: {who} for {longest}; {last}{others}"


def _busy(busy: list[tuple[str, WorkerSeen]], silent: list[str], state: State, at: Moment) -> str:
    longest = _longest(busy, state, at)
    count = len(busy)
    if count == 1:
        clause = f"{busy[0][0]}, the only worker that takes such jobs, has been busy for {longest}"
    else:
        everyone = "both" if count == 2 else f"all {count}"
        clause = f"{everyone} workers that take such jobs are busy, the longest for {longest}"
    return f"{clause}; silent, with an expired lock: {_listed(silent)}" if silent else clause


def _departure(worker: WorkerSeen) -> str:
    """Describe why a worker is not there any more."""
    if worker.lost is not None:
        return f"died with {worker.lost.id}"
    return "is gone" if worker.goodbye is None else "said goodbye"


def _longest(busy: list[tuple[str, WorkerSeen]], state: State, at: Moment) -> str:
    return duration(at.now - min(_busy_since(worker, state) for _, worker in busy))


def _busy_since(worker: WorkerSeen, state: State) -> int:
    """Return the wall time of the oldest grant that the worker holds."""
    grant = state.processing[next(iter(worker.jobs))].grant
    assert grant is not None
    return grant.acquired_at


def _others(sets: list[ClaimSet], presence: WorkerPresence) -> str:
    """Describe the workers of the queue that take other kinds only; empty if all of them are gone."""
    found = [(name, presence.workers[name]) for claims in sets for name in claims.workers]
    there = [each for each in found if presence.state(each[1]) not in ("died", "gone")]
    if not there:
        return ""
    name, worker = max(there, key=lambda each: (each[1].waiting > 0, each[1].claimed))
    assert worker.claims is not None and worker.claims.kinds is not None
    does = "waits on" if worker.waiting else "claims"
    more = "" if len(there) == 1 else f" ({len(there) - 1} more {'takes' if len(there) == 2 else 'take'} other kinds)"
    kinds = [kind or "jobs without a kind" for kind in worker.claims.kinds]
    return f"{name} {does} this queue but takes only: {_listed(kinds)}{more}"


def _listed(names: list[str]) -> str:
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _of_kind(kind: str) -> str:
    return f"kind `{kind}`" if kind else "jobs without a kind"


def _since(presence: WorkerPresence, at: Moment) -> str:
    if presence.has_forgotten or presence.started_at is None:
        return f"since {utc(at.wall(presence.since))}"
    return f"since the start at {utc(presence.started_at)}"


def _returned(job: Job) -> str:
    """Return sentences about how the job came back to its queue, if it did."""
    back, ended = _released(job), job.ended
    if ended is not None and ended.rule != "fail":
        back += f" Its last grant, to worker {ended.worker}, was ended by {ended.rule}."
    return f"{back} Its last error: {job.error.message}" if job.error is not None and job.error.message else back


def _released(job: Job, when: str = "") -> str:
    """Return a sentence about repeated releases, once they delay the job."""
    if job.releases < DELAYED_FROM:
        return ""
    return f" It was released {job.releases} times in a row without progress{when}."


def _processing(job: Job, state: State, at: Moment) -> WhyView:
    grant, deadlines = job.grant, job.deadlines
    if grant is None or deadlines is None:
        because = "Its status is processing, but no worker holds it. Such rows come from imports or manual edits."
        what = f"The next cleanup run treats it as stalled: {transitions.stall_outcome(job)}."
        cleanup_at = max(state.recovery.next_cleanup_at, at.now)
        soon = _next(what, cleanup_at, "validation", at, state.recovery.cleanup_every_ms)
        return WhyView("processing", because, soon, None, ["Start a cleanup run: jobctl cleanup"])
    since = duration(at.now - grant.acquired_at)
    because = f"Worker {grant.worker} has held it for {since}, at {job.progress:g} %.{_signs(job, grant, state, at)}"
    if deadlines.is_live(at.lock_ms):
        until = time_left(deadlines.expires - at.lock_ms)
        because += f" Its lock expires in {until}."
    else:
        may = "may still end the job or report."
        if deadlines.is_past_progress_due(at.lock_ms):
            may = "can no longer report progress, but may still end the job."
        because += f" Its lock has expired: the worker is silent. It {may}"
    because += _progress_due(grant, deadlines, at) + _released(job, " before this grant" if job.progress == 0 else "")
    return WhyView(
        "processing", because, _next_of(job, grant, deadlines, state, at), None, _advice(job, grant, state, at)
    )


def _progress_due(grant: Grant, deadlines: LockDeadlines, at: Moment) -> str:
    """Return a sentence about the progress timeout of this grant; empty once it has passed."""
    if deadlines.progress_due is None:
        return " This grant has no progress timeout (progress_timeout_ms 0)."
    left = deadlines.progress_due - at.lock_ms
    if left <= 0:
        return ""
    return f" Its progress timeout ends in {time_left(left)} (progress_timeout_ms {grant.progress_timeout_ms})."


def _signs(job: Job, grant: Grant, state: State, at: Moment) -> str:
    """Describe the signs of life of a job: its lock, its progress, and how long its kind usually takes."""
    assert job.deadlines is not None
    renewed_ms = at.lock_ms - (job.deadlines.stall_due - grant.stall_after_ms)
    renewed = f" Its lock was renewed {duration(renewed_ms)} ago"
    if renewed_ms < 0:  # by restart_grace.py
        renewed = " The daemon has extended its lock, because no worker could report for a while"
    reported = state.processing.progressed.get(job.id)
    if reported is not None:
        progress = f"; its last progress was {duration(at.lock_ms - reported)} ago."
    else:
        progress = "; it has shown no progress." if job.progress == 0 else "; it showed no progress since the start."
    baseline = state.counters.baselines.kinds.get(job.options.kind)
    usual_ms = None if baseline is None else baseline.usual()
    return renewed + progress + (f" 95 % of its kind take up to {duration(usual_ms)}." if usual_ms is not None else "")


def _next_of(job: Job, grant: Grant, deadlines: LockDeadlines, state: State, at: Moment) -> NextEvent:
    outcome = transitions.stall_outcome(job)
    if at.lock_ms >= deadlines.stalled_at:
        what = f"{_recovery(state)} ends its grant: {outcome}."
        rule = "recovery" if state.recovery.recover_every_ms else "cleanup"
        return _by_recovery(what, at.now, rule, state, at)
    if at.held:
        left = time_left(deadlines.stalled_at - at.lock_ms)
        what = f"Lock time stands still. If worker {grant.worker} is not heard for {left} of lock time, {outcome}."
        return NextEvent(what, None, "disk")
    stalled_at = at.wall(deadlines.stalled_at)
    is_progress_due = deadlines.progress_due is not None and deadlines.stalled_at == deadlines.progress_due
    if is_progress_due:  # an extension does not move it
        what = f"If worker {grant.worker} reports no progress by {utc(stalled_at, at.now)}, {outcome}."
        return _by_recovery(what, stalled_at, "progress_timeout", state, at)
    what = f"If nothing is heard of worker {grant.worker} by {utc(stalled_at, at.now)}, {outcome}."
    return _by_recovery(what, stalled_at, "stall_after", state, at)


def _advice(job: Job, grant: Grant, state: State, at: Moment) -> list[str]:
    do = [f"Check whether worker {grant.worker} is alive, and what the job printed: jobctl output {job.id}"]
    assert job.deadlines is not None
    if not job.deadlines.is_live(at.lock_ms):
        expired = state.presence.workers[grant.worker].expired
        outcomes = transitions.stall_outcomes(state.processing[each] for each in islice(expired, MAX_OUTCOMES))
        more = f"; {len(expired) - MAX_OUTCOMES:,} more" if len(expired) > MAX_OUTCOMES else ""
        then = f"jobctl take-back {quote(grant.worker)} ({outcomes}{more})"
        do.append(f"Take back its jobs with expired locks: {then}")
    again = f"jobctl force-fail {job.id}, and to run it again: jobctl retry {job.id}"
    stops = f"this ends it at once, and its work stops at the next report, at most {duration(grant.ttl_ms // 3)} later"
    cancel = f"jobctl cancel {job.id} ({stops})"
    return [*do, f"If it is dead and you cannot wait: {again}", f"If it is not needed: {cancel}"]


def _finished(job: Job, state: State, at: Moment) -> WhyView:
    deleted = None
    if job.expires_at is not None:
        what, first = "The first cleanup run from then on deletes it" + _once_trusted(at), max(job.expires_at, at.now)
        deleted = _next(what, first, "retention", at, state.recovery.cleanup_every_ms)
    match job.status:
        case "completed":
            do = []
        case "failed":
            do = [f"Fix the cause, then run it again: jobctl retry {job.id}"]
        case "cancelled":
            do = [f"If it is needed after all: jobctl retry {job.id}"]
        case _:
            do = ["Correct the row with the daemon stopped, then: jobd doctor --accept ID"]
            return WhyView(job.status, f"Status {job.status} is unknown, so no rule applies to it.", None, None, do)
    return WhyView(job.status, ending(job), deleted, None, do)


def _once_trusted(at: Moment) -> str:
    """End a sentence about something that waits while the clock is suspect."""
    return " once the clock is no longer suspect." if at.suspect else "."


def ending(job: Job, events: Sequence[Event] = ()) -> str:
    """Explain how a finished job ended, by whom and why, as far as its latest events say."""
    end = next((event for event in reversed(events) if event.to_status == job.status != event.from_status), None)
    if job.status == "failed":
        return _failed(job, end)
    how = job.status if end is None or end.type not in _NAMES_AUTHOR else _ended_by(end)
    return f"It was {how}; that is final." if job.status == "completed" else f"It was {how}."


def _failed(job: Job, end: Event | None) -> str:
    message = (job.error.message if job.error else None) or "no error message was recorded."
    if end is None or end.type not in _NAMES_AUTHOR:
        where = f" on {describe_author(end.by)}" if end is not None and end.type == "failed" else ""
        return f"It failed{where}{_finality(job)}: {message}"
    is_said = message in (end.reason, NO_REASON)
    return f"It was {_ended_by(end)}." if is_said else f"It was {_ended_by(end)}. Its error: {message}"


def _finality(job: Job) -> str:
    """Return a clause that says why there is no retry of an attempt that failed."""
    if job.ended is None or job.ended.verb != "fail":
        return ""
    used, allowed = job.attempt, job.options.max_attempts
    if used >= allowed:
        return f", with no attempts left ({used} of {allowed})"
    return f", and its worker asked for no retry ({used} of {allowed} attempts used)"


def _ended_by(end: Event) -> str:
    """Return for example `cancelled by operator ana: no longer needed`."""
    how = f"imported as {end.to_status}" if end.type == "imported" else str(end.to_status)
    if end.type == "adopted":
        how += f" with a late result of worker {(end.details or {}).get('worker')}"
    reason = f": {end.reason.removesuffix('.')}" if end.reason not in (None, "", NO_REASON) else ""
    details = end.details or {}
    plan = f" with plan {details['plan']} ({details['planned']:,} jobs)" if details.get("planned", 0) > 1 else ""
    return f"{how} by {describe_author(end.by)}{plan}{reason}"
