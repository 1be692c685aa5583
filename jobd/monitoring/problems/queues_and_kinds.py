"""Conditions of a queue and a kind: its due jobs, its workers, and how its attempts end."""

from __future__ import annotations

import shlex
from collections import Counter
from functools import partial
from typing import Final
from urllib.parse import urlencode

from jobd.core.stats import KindDurations
from jobd.core.worker_presence import WorkerPresence
from jobd.model.commands import WorkerState
from jobd.model.job import MINUTE_MS, Failure, first_line
from jobd.model.problems import Cure, Subject
from jobd.model.times import clock_time, duration
from jobd.monitoring.problems.condition import (
    CLOSE_RATIO,
    Draft,
    DuePair,
    Finding,
    Scene,
    job_cure,
    plural,
    problem_id,
    rank_of,
)
from jobd.monitoring.problems.queue_kind_counts import MINUTES, Pair, PairCounts

SETTLED_MS: Final = 3 * MINUTE_MS  # presence begins empty: until then a worker may not have claimed again
LEFT_MS: Final = SETTLED_MS - MINUTE_MS // 2  # the same for a pair whose worker claimed since the start, and left
NOTICEABLE_MS: Final = 100  # a smaller difference never counts as slower, whatever the ratio
TAKES: Final = ("busy", "waiting", "idle")  # states of workers that take jobs, as sentences list them
MANY_FAIL: Final = 0.9
SEE_ERRORS: Final = Cure("See the errors", "jobctl failures", "/failures")
SEE_WORKERS: Final = Cure("See its workers", "jobctl workers", "/workers")


def no_workers(scene: Scene, pair: DuePair) -> Draft | None:
    """A job is due, and no worker that takes its queue and kind is there."""
    if pair.wait_ms <= scene.limits.queue_without_workers or pair.queue in scene.state.paused:
        return None
    # The holders of jobs that have not claimed since the start may take any pair.
    others, is_settled = scene.there[None], scene.up_ms >= SETTLED_MS
    if not is_settled and (scene.up_ms < LEFT_MS or others["busy"] or others["silent"]):
        return None
    there, last = takers(scene, pair)
    # The jobs of a silent worker are a problem of their own.
    if there or (pair.queue, pair.kind) in scene.running or not (is_settled or last):
        return None
    return Draft(rank_of(pair.due, pair.wait_ms), pair.id("no_workers"), partial(_missing, scene, pair, last))


def _missing(scene: Scene, pair: DuePair, last: tuple[int, str] | None) -> Finding:
    due = f"{_due(pair)}, and no worker takes {'it' if pair.due == 1 else 'them'}."
    return Finding(
        pair.subject,
        due if last is None else f"{due} {_last_word(scene.state.presence, last[1])}",
        jobs=pair.due,
        wait_ms=pair.wait_ms,
        severity="warning" if last is None else "critical",
        cure=(_more_workers(pair.queue), job_cure("See why it waits", "why", pair.job_id)),
    )


def waits(scene: Scene, pair: DuePair) -> Draft | None:
    """The oldest due job of a pair waits for too long although workers take it."""
    id_, limit_ms = pair.id("waits"), scene.limits.queue_waits
    if pair.queue in scene.state.paused or not scene.exceeds(id_, pair.wait_ms, limit_ms, limit_ms * 0.8):
        return None
    return Draft(rank_of(pair.due, pair.wait_ms), id_, partial(_waiting, scene, pair))


def _waiting(scene: Scene, pair: DuePair) -> Finding:
    title = f"{_due(pair)}. {_workers(scene, pair)}"
    cause = "Jobs of a higher priority come first." if pair.is_behind else ""
    cure = job_cure("See why it waits", "why", pair.job_id), _more_workers(pair.queue)
    return Finding(pair.subject, title, jobs=pair.due, wait_ms=pair.wait_ms, cause=cause, cure=cure)


def failing(scene: Scene, pair: PairCounts) -> Draft | None:
    """Too large a share of the attempts of a pair ended by `fail`."""
    limits, id_, lately = scene.limits, pair.id("failing"), pair.lately
    if not lately.failed or lately.attempts < limits.failure_rate_attempts or pair.error is None:
        return None
    share = lately.failed / lately.attempts
    if share < limits.failure_rate * (CLOSE_RATIO if id_ in scene.opened else 1):
        return None
    return Draft(rank_of(lately.failed), id_, partial(_failing, pair, share, pair.error, scene.at.now))


def _failing(pair: PairCounts, share: float, error: Failure, now: int) -> Finding:
    lately, first_at = pair.lately, pair.first_failed(now)
    # Failures from before the counts are not known here: then the first one is no beginning.
    since = "in the last 10 minutes" if now - first_at >= (MINUTES - 1) * MINUTE_MS else f"since {clock_time(first_at)}"
    command = f"jobctl jobs --queue {shlex.quote(pair.queue)} --status failed"
    return Finding(
        pair.subject,
        f"{lately.failed:,} of {lately.attempts:,} attempts failed {since}: {_error(error)}",
        jobs=lately.failed,
        value=100 * share,
        severity="critical" if share >= MANY_FAIL else None,
        cure=(SEE_ERRORS, Cure("See the failed jobs", command, f"/jobs?queue={pair.queue}")),
    )


def backlog_grows(scene: Scene, pair: DuePair) -> Finding | None:
    """The due jobs of a pair rise, because more are created than end."""
    is_open = (id_ := pair.id("backlog_grows")) in scene.opened
    rise, counts = scene.trends.rise(id_, is_open=is_open), scene.counts.pairs.get((pair.queue, pair.kind))
    if rise is None or pair.queue in scene.state.paused:
        return None
    grown, created = rise[1] - rise[0], 0 if counts is None else counts.lately.created
    is_new = grown >= scene.limits.backlog_grows and 2 * grown >= rise[0] and 2 * created >= grown
    if not (is_open or is_new):
        return None
    came, went = created / MINUTES, max(created - grown, 0) / MINUTES
    title = f"The backlog grows: {pair.due:,} due, {came:,.0f} in and {went:,.0f} out a minute."
    cause, cure = _workers(scene, pair), (_more_workers(pair.queue), SEE_WORKERS)
    return Finding(pair.subject, title, jobs=pair.due, wait_ms=pair.wait_ms, cause=cause, cure=cure)


def retry_backlog(scene: Scene, item: tuple[str, int]) -> Finding | None:
    """More and more jobs of a queue wait for a retry."""
    queue, count = item
    id_ = f"retry_backlog/{queue}"
    rise = scene.trends.rise(id_, is_open=id_ in scene.opened)
    if count < scene.limits.retry_backlog or rise is None:
        return None
    title = f"{count:,} wait for a retry, {max(rise[1] - rise[0], 0) / MINUTES:,.0f} more a minute"
    pairs = [pair for kind in scene.state.queued_kinds(queue) if (pair := scene.counts.pairs.get((queue, kind)))]
    failed, attempts = sum(pair.lately.failed for pair in pairs), sum(pair.lately.attempts for pair in pairs)
    error = next((pair.error for pair in pairs if pair.error is not None), None)
    if error is not None and attempts:
        title += f"; {100 * failed / attempts:.0f} % of attempts fail: {_error(error)}"
    return Finding(Subject(type="queue", queue=queue), title, jobs=count, cure=(SEE_ERRORS,))


def expiring(scene: Scene, pair: PairCounts) -> Finding | None:
    """Jobs of a pair expire before a worker takes them."""
    expired, ended = pair.lately.expired, pair.lately.expired + pair.lately.attempts
    if expired < scene.limits.expiring_jobs or expired < scene.limits.expiring * ended:
        return None
    return Finding(
        pair.subject,
        f"{expired:,} of {ended:,} jobs expired before a worker took them. {_workers(scene, pair)}",
        jobs=expired,
        value=100 * expired / ended,
        severity="critical" if 2 * expired >= ended else None,
        cure=(_more_workers(pair.queue), SEE_WORKERS),
    )


def due_far(scene: Scene, pair: PairCounts) -> Finding | None:
    """Most jobs that are created for a pair are due in more than a week, other than on the day before."""
    far, created = pair.lately.far, pair.lately.created
    if far < scene.limits.due_far_jobs or 2 * far <= created or pair.is_usual(scene.at.now):
        return None
    selects = {"queue": pair.queue, "status": "queued"} | ({"kind": pair.kind} if pair.kind else {})
    shown = " ".join(f"--{name} {shlex.quote(value)}" for name, value in selects.items())
    plan = " ".join(f"--where {name}={shlex.quote(value)}" for name, value in (selects | {"since": "10m"}).items())
    page = f"/jobs?{urlencode(selects)}"
    return Finding(
        pair.subject,
        f"{far:,} of {created:,} jobs created in the last 10 minutes are due in over a week.",
        jobs=far,
        cause="Such jobs usually start at once. Perhaps seconds and milliseconds were mixed up.",
        cure=(
            Cure("See them", f"jobctl jobs {shown}", page),
            Cure("Plan to cancel the latest", f"jobctl cancel {plan}", f"{page}&since=10m", changes=True),
        ),
    )


def durations(scene: Scene) -> list[KindDurations]:
    return scene.state.counters.baselines.view(scene.at.now)


def slow_kind(scene: Scene, each: KindDurations) -> Finding | None:
    """The jobs of a kind take too long compared with their usual duration."""
    if each.last_hour_ms is None or each.usual_ms is None or each.slow_ms is None:
        return None
    slow_ms, limit = min(each.last_hour_ms, each.slow_ms), scene.limits.slower_than_usual
    ratio, subject = round(slow_ms / max(each.usual_ms, 1), 2), Subject(type="kind", kind=each.kind)
    is_slow = scene.exceeds(problem_id("slow_kind", subject), ratio, limit, limit * CLOSE_RATIO)
    if slow_ms - each.usual_ms < NOTICEABLE_MS or not is_slow:
        return None
    title = f"95 % of its jobs take up to {duration(each.last_hour_ms)}, usually {duration(each.usual_ms)}."
    cause = "The machine, the disk, or a service that these jobs use may be slow."
    cure = (Cure("See the oldest jobs", "jobctl stats", "/"),)
    return Finding(subject, title, jobs=each.completed, value=100 * ratio, cause=cause, cure=cure)


def _more_workers(queue: str) -> Cure:
    return Cure("Start a worker", f"jobctl run --queue {shlex.quote(queue)} -- CMD")


def takers(scene: Scene, pair: Pair) -> tuple[Counter[WorkerState], tuple[int, str] | None]:
    """Return how many workers whose latest claim takes the pair are there, by state, and the last of the others."""
    sets = [claims for claims in scene.state.presence.claim_sets(pair.queue) if claims.takes(pair.kind)]
    there = sum((scene.there[claims] for claims in sets if claims in scene.there), Counter[WorkerState]())
    return there, max((scene.left[claims] for claims in sets if claims in scene.left), default=None)


def _due(pair: DuePair) -> str:
    jobs = f"{plural(pair.due, 'job', 'is', 'are')} due"
    return f"{jobs}, {'' if pair.due == 1 else 'the oldest '}for {duration(pair.wait_ms)}"


def _last_word(presence: WorkerPresence, name: str) -> str:
    """Say what was last heard of a worker."""
    worker = presence.workers.get(name)
    if worker is None:
        return ""
    if worker.about is not None and worker.about.host and worker.about.host not in name:
        name = f"{name}@{worker.about.host}"
    at = clock_time(worker.last_seen_at)
    if worker.lost is not None:
        return f"The last, {name}, died with {worker.lost.id} at {clock_time(worker.lost.at)}."
    return f"The last, {name}, {'said goodbye' if worker.goodbye else 'was last heard'} at {at}."


def _workers(scene: Scene, pair: Pair) -> str:
    states, running_since = takers(scene, pair)[0], scene.running.get((pair.queue, pair.kind))
    there = {state: states[state] for state in TAKES if states[state]}
    total = sum(there.values())
    if not total:
        return "No worker claims this queue and kind."
    if there.get("busy") != total:
        return f"{plural(total, 'worker')}: {', '.join(f'{count} {state}' for state, count in there.items())}."
    since = "" if running_since is None else f", the longest for {duration(scene.at.now - running_since)}"
    return f"Its only worker is busy{since}." if total == 1 else f"All {total} workers are busy{since}."


def _error(error: Failure) -> str:
    """Return the code and the first line of the message, which begins with the code if it is of a Python worker."""
    message = first_line(error.message or "no message")[:200]
    return message if not error.code or message.startswith(error.code) else f"{error.code}: {message}"
