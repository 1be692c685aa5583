"""Conditions of a queue and a kind: its due jobs, its workers, and how its attempts end."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from functools import partial
from typing import Final
from urllib.parse import urlencode

from jobd.core.stats import KindDurations
from jobd.core.worker_presence import WorkerPresence
from jobd.model.job import MINUTE_MS, Failure, first_line
from jobd.model.problems import Cure, Subject
from jobd.model.times import clock_time, duration
from jobd.monitoring.problems.condition import (
    CLOSE_RATIO,
    Crew,
    Draft,
    DuePair,
    Finding,
    Scene,
    pair_id,
    plural,
    problem_id,
    rank_of,
)
from jobd.monitoring.problems.queue_kind_counts import CREATED, ENDED, FAILED, MINUTES, Tally

SETTLED_MS: Final = 3 * MINUTE_MS  # presence begins empty: until then a worker may not have claimed again
LEFT_MS: Final = SETTLED_MS - MINUTE_MS // 2  # the same for a pair whose worker claimed since the start, and left
NOTICEABLE_MS: Final = 100  # a smaller difference never counts as slower, whatever the ratio
TAKES: Final = ("busy", "waiting", "idle")  # states of workers that take jobs, as sentences list them
STATES: Final = ("silent", *TAKES)  # that a Crew counts
MANY_FAIL: Final = 0.9


def no_workers(scene: Scene) -> Iterator[Draft | None]:
    """A job is due, and no worker that takes its queue and kind is there."""
    limit_ms, others = scene.limits.queue_without_workers_ms, scene.crews.get(None)
    # The holders of jobs that have not claimed since the start may take any pair.
    has_others = others is not None and (others.busy or others.silent)
    is_settled = scene.up_ms >= SETTLED_MS
    for pair in scene.due if is_settled or (scene.up_ms >= LEFT_MS and not has_others) else ():
        yield None
        key = pair.queue, pair.kind
        if pair.wait_ms <= limit_ms or pair.queue in scene.state.paused or pair_id("running", *key) in scene.running:
            continue
        crew = crew_of(scene, *key)
        if any(getattr(crew, state) for state in STATES):
            continue  # the jobs of a silent worker are a problem of their own
        if not is_settled and crew.last is None:
            continue
        yield Draft(pair_id("no_workers", *key), pair.rank, partial(_missing, scene, pair, crew))


def _missing(scene: Scene, pair: DuePair, crew: Crew) -> Finding:
    due = f"{_due(pair)}, and no worker takes {'it' if pair.due == 1 else 'them'}."
    return Finding(
        subject=pair.subject,
        title=due if crew.last is None else f"{due} {_last_word(scene.state.presence, crew.last)}",
        value=pair.wait_ms,
        jobs=pair.due,
        wait_ms=pair.wait_ms,
        severity="warning" if crew.last is None else "critical",
        cure=(
            _more_workers(pair.queue),
            Cure("See why it waits", f"jobctl why {pair.job_id}", f"/jobs/{pair.job_id}"),
        ),
    )


def waits(scene: Scene) -> Iterator[Draft | None]:
    """The oldest due job of a pair waits for too long although workers take it."""
    limit_ms = scene.limits.queue_waits_ms
    for pair in scene.due:
        yield None
        id_ = pair_id("waits", pair.queue, pair.kind)
        if scene.exceeds(id_, pair.wait_ms, limit_ms, limit_ms * 0.8) and pair.queue not in scene.state.paused:
            yield Draft(id_, pair.rank, partial(_waiting, scene, pair))


def _waiting(scene: Scene, pair: DuePair) -> Finding:
    key = pair.queue, pair.kind
    return Finding(
        subject=pair.subject,
        title=f"{_due(pair)}. {_workers(scene, *key)}",
        value=pair.wait_ms,
        jobs=pair.due,
        wait_ms=pair.wait_ms,
        cause="Jobs of a higher priority come first." if pair.is_behind else "",
        cure=(Cure("See why it waits", f"jobctl why {pair.job_id}", f"/jobs/{pair.job_id}"), _more_workers(pair.queue)),
    )


def failing(scene: Scene) -> Iterator[Draft | None]:
    """Too large a share of the attempts of a pair ended by `fail`."""
    limits = scene.limits
    for tally in scene.tallies:
        yield None
        if not tally.failed or tally.attempts < limits.failure_rate_attempts or tally.pair.error is None:
            continue
        share, id_ = tally.failed / tally.attempts, pair_id("failing", tally.queue, tally.kind)
        if share >= limits.failure_rate * (CLOSE_RATIO if id_ in scene.opened else 1):
            yield Draft(id_, rank_of(tally.failed), partial(_failing, tally, tally.pair.error, scene.at.now))


def _failing(tally: Tally, error: Failure, now: int) -> Finding:
    share = tally.failed / tally.attempts
    first_at = tally.pair.first(FAILED, now)
    # Failures from before the counts are not known here: then the first one is no beginning.
    since = "in the last 10 minutes" if now - first_at >= (MINUTES - 1) * MINUTE_MS else f"since {clock_time(first_at)}"
    command = f"jobctl jobs --queue {shlex.quote(tally.queue)} --status failed"
    return Finding(
        subject=tally.subject,
        title=f"{tally.failed:,} of {tally.attempts:,} attempts failed {since}: {_error(error)}",
        value=100 * share,
        jobs=tally.failed,
        severity="critical" if share >= MANY_FAIL else None,
        cure=(
            Cure("See the errors", "jobctl failures", "/failures"),
            Cure("See the failed jobs", command, f"/jobs?queue={tally.queue}"),
        ),
    )


def backlog_grows(scene: Scene) -> Iterator[Finding | None]:
    """The due jobs of a pair rise, because more are created than end."""
    for pair in scene.due:
        yield None
        key = pair.queue, pair.kind
        is_open = (id_ := pair_id("backlog_grows", *key)) in scene.opened
        rise, counts = scene.trends.rise(id_, is_open=is_open), scene.counts.pairs.get(key)
        if rise is None or counts is None or pair.queue in scene.state.paused:
            continue
        grown, created = rise[1] - rise[0], counts.sums(scene.at.now)[CREATED]
        is_new = grown >= scene.limits.backlog_grows and 2 * grown >= rise[0] and 2 * created >= grown
        if not (is_open or is_new):
            continue
        came = created / MINUTES
        yield Finding(
            subject=pair.subject,
            title=f"The backlog grows: {pair.due:,} due, {came:,.0f} in and {max(came - grown / MINUTES, 0):,.0f} out "
            f"a minute.",
            value=pair.due,
            jobs=pair.due,
            wait_ms=pair.wait_ms,
            cause=_workers(scene, *key),
            cure=(_more_workers(pair.queue), Cure("See its workers", "jobctl workers", "/workers")),
        )


def retry_backlog(scene: Scene) -> Iterator[Finding | None]:
    """More and more jobs of a queue wait for a retry."""
    for queue, count in list(scene.state.retrying.items()):
        yield None
        is_open = (id_ := pair_id("retry_backlog", queue)) in scene.opened
        if count < scene.limits.retry_backlog or (rise := scene.trends.rise(id_, is_open=is_open)) is None:
            continue
        title = f"{count:,} wait for a retry, {max(rise[1] - rise[0], 0) / MINUTES:,.0f} more a minute"
        pairs = [scene.counts.pairs.get((queue, kind)) for kind in scene.state.queued_kinds(queue)]
        sums = [pair.sums(scene.at.now) for pair in pairs if pair is not None]
        failed, attempts = sum(each[FAILED] for each in sums), sum(each[FAILED] + each[ENDED] for each in sums)
        error = next((pair.error for pair in pairs if pair is not None and pair.error is not None), None)
        if error is not None and attempts:
            title += f"; {100 * failed / attempts:.0f} % of attempts fail: {_error(error)}"
        yield Finding(
            subject=Subject(type="queue", queue=queue),
            title=title,
            value=count,
            jobs=count,
            cure=(Cure("See the errors", "jobctl failures", "/failures"),),
        )


def expiring(scene: Scene) -> Iterator[Finding | None]:
    """Jobs of a pair expire before a worker takes them."""
    for tally in scene.tallies:
        yield None
        expired, ended = tally.expired, tally.expired + tally.attempts
        if expired < scene.limits.expiring_jobs or expired < scene.limits.expiring * ended:
            continue
        key = tally.queue, tally.kind
        yield Finding(
            subject=tally.subject,
            title=f"{expired:,} of {ended:,} jobs expired before a worker took them. {_workers(scene, *key)}",
            value=100 * expired / ended,
            jobs=expired,
            severity="critical" if 2 * expired >= ended else None,
            cure=(_more_workers(tally.queue), Cure("See its workers", "jobctl workers", "/workers")),
        )


def due_far(scene: Scene) -> Iterator[Finding | None]:
    """Most jobs that are created for a pair are due in more than a week, other than on the day before."""
    for tally in scene.tallies:
        yield None
        far, created = tally.far, tally.created
        if far < scene.limits.due_far_jobs or 2 * far <= created or tally.pair.is_usual(scene.at.now):
            continue
        selects = {"queue": tally.queue, "status": "queued"} | ({"kind": tally.kind} if tally.kind else {})
        shown = " ".join(f"--{name} {shlex.quote(value)}" for name, value in selects.items())
        plan = " ".join(f"--where {name}={shlex.quote(value)}" for name, value in (selects | {"since": "10m"}).items())
        page = f"/jobs?{urlencode(selects)}"
        yield Finding(
            subject=tally.subject,
            title=f"{far:,} of {created:,} jobs created in the last 10 minutes are due in over a week.",
            value=far,
            jobs=far,
            cause="Such jobs usually start at once. Perhaps seconds and milliseconds were mixed up.",
            cure=(
                Cure("See them", f"jobctl jobs {shown}", page),
                Cure("Plan to cancel the latest", f"jobctl cancel {plan}", f"{page}&since=10m", changes=True),
            ),
        )


def slow_kinds(scene: Scene) -> Iterator[Finding | None]:
    """The jobs of a kind take too long compared with their usual duration."""
    limit = scene.limits.slower_than_usual
    for each in scene.durations:
        ratio = _ratio(each)
        subject = Subject(type="kind", kind=each.kind)
        if ratio is None or not scene.exceeds(problem_id("slow_kind", subject), ratio, limit, limit * CLOSE_RATIO):
            continue
        assert each.last_hour_ms is not None and each.usual_ms is not None  # it has a ratio
        yield Finding(
            subject=subject,
            title=f"95 % of its jobs take up to {duration(each.last_hour_ms)}, usually {duration(each.usual_ms)}.",
            value=100 * ratio,
            jobs=each.completed,
            cause="The machine, the disk, or a service that these jobs use may be slow.",
            cure=(Cure("See the oldest jobs", "jobctl stats", "/"),),
        )


def _more_workers(queue: str) -> Cure:
    return Cure("Start a worker", f"jobctl run --queue {shlex.quote(queue)} -- CMD")


def crew_of(scene: Scene, queue: str, kind: str) -> Crew:
    """Return the workers whose latest claim takes the pair."""
    joined = Crew()
    for claims in scene.state.presence.claim_sets(queue):
        crew = scene.crews.get(claims)
        if crew is None or not claims.takes(kind):
            continue
        for state in STATES:
            setattr(joined, state, getattr(joined, state) + getattr(crew, state))
        if crew.last is not None and (joined.last is None or _heard(scene, crew.last) > _heard(scene, joined.last)):
            joined.last = crew.last
    return joined


def _heard(scene: Scene, name: str) -> int:
    worker = scene.state.presence.workers.get(name)
    return 0 if worker is None else worker.last_seen_at


def _due(pair: DuePair) -> str:
    jobs = f"{plural(pair.due, 'job')} {'is' if pair.due == 1 else 'are'} due"
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


def _workers(scene: Scene, queue: str, kind: str) -> str:
    crew, running_since = crew_of(scene, queue, kind), scene.running.get(pair_id("running", queue, kind))
    there = {state: count for state in TAKES if (count := getattr(crew, state))}
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


def _ratio(each: KindDurations) -> float | None:
    """Return the ratio of the last hour to the usual duration; None if unknown or too close."""
    if each.last_hour_ms is None or each.usual_ms is None or each.slow_ms is None:
        return None
    slow_ms = min(each.last_hour_ms, each.slow_ms)
    return None if slow_ms - each.usual_ms < NOTICEABLE_MS else round(slow_ms / max(each.usual_ms, 1), 2)
