"""Conditions of a queue and a kind: its due jobs, its workers, and how its attempts end."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Final

from jobd.core.stats import KindDurations
from jobd.core.worker_presence import WorkerPresence
from jobd.model.job import MINUTE_MS, first_line
from jobd.model.problems import Cure, Subject
from jobd.model.times import duration
from jobd.monitoring.problems.condition import (
    CLOSE_RATIO,
    Crew,
    DuePair,
    Finding,
    Scene,
    clock_time,
    plural,
    problem_id,
)
from jobd.monitoring.problems.pair_counts import CREATED, ENDED, EXPIRED, FAILED, FAR

SETTLED_MS: Final = 3 * MINUTE_MS  # presence begins empty: until then a worker may not have claimed again
NOTICEABLE_MS: Final = 100  # a smaller difference never counts as slower, whatever the ratio
TAKES: Final = ("busy", "waiting", "idle")  # states of workers that take jobs, as sentences list them
MANY_FAIL: Final = 0.9
FEW_EXPIRED: Final = 10
EXPIRED_SHARE: Final = 0.1  # of the jobs that ended
MANY_FAR: Final = 20


def no_workers(scene: Scene) -> Iterator[Finding | None]:
    """A job is due, and no worker that takes its queue and kind is there."""
    presence, limit_ms = scene.state.presence, scene.limits.queue_without_workers_ms
    for pair in scene.due if scene.up_ms >= SETTLED_MS else ():
        yield None
        key = pair.queue, pair.kind
        if pair.wait_ms <= limit_ms or pair.queue in scene.state.paused or key in scene.running:
            continue
        crew = crew_of(scene, *key)
        if any(crew.states.get(state) for state in ("silent", *TAKES)):
            continue  # the jobs of a silent worker are a problem of their own
        due = f"{_due(pair)}, and no worker takes them." if pair.due != 1 else f"{_due(pair)}, and no worker takes it."
        yield Finding(
            subject=pair.subject,
            title=due if crew.last is None else f"{due} {_last_word(presence, crew.last)}",
            value=pair.wait_ms,
            jobs=pair.due,
            wait_ms=pair.wait_ms,
            severity="warning" if crew.last is None else "critical",
            cure=(
                Cure("Start a worker", f"jobctl run --queue {shlex.quote(pair.queue)} -- CMD"),
                Cure("See why it waits", f"jobctl why {pair.job_id}", f"/jobs/{pair.job_id}"),
            ),
        )


def waits(scene: Scene) -> Iterator[Finding | None]:
    """The oldest due job of a pair waits for too long although workers take it."""
    limit_ms = scene.limits.queue_waits_ms
    for pair in scene.due:
        yield None
        subject = pair.subject
        too_long = scene.exceeds(problem_id("waits", subject), pair.wait_ms, limit_ms, limit_ms * 0.8)
        if not too_long or pair.queue in scene.state.paused:
            continue
        key = pair.queue, pair.kind
        yield Finding(
            subject=subject,
            title=f"{_due(pair)}. {_workers(scene, crew_of(scene, *key), scene.running.get(key))}",
            value=pair.wait_ms,
            jobs=pair.due,
            wait_ms=pair.wait_ms,
            cause="Jobs of a higher priority come first." if pair.is_behind else "",
            cure=(
                Cure("See why it waits", f"jobctl why {pair.job_id}", f"/jobs/{pair.job_id}"),
                Cure("See its workers", "jobctl workers", "/workers"),
            ),
        )


def failing(scene: Scene) -> Iterator[Finding | None]:
    """Too large a share of the attempts of a pair ended by `fail`."""
    limits, now = scene.limits, scene.at.now
    for (queue, kind), counts in list(scene.counts.pairs.items()):
        yield None
        if counts.error is None:
            continue
        sums = counts.sums(now)
        failed, ended = sums[FAILED], sums[ENDED] + sums[FAILED]
        if not failed or ended < limits.failure_rate_attempts:
            continue
        subject = Subject(type="pair", queue=queue, kind=kind)
        is_open = problem_id("failing", subject) in scene.opened
        share = failed / ended
        if share < limits.failure_rate * (CLOSE_RATIO if is_open else 1):
            continue
        error = f"{counts.error.code}: " if counts.error.code else ""
        error += first_line(counts.error.message or "no message")[:200]
        since = clock_time(counts.first(FAILED, now))
        name = shlex.quote(queue)
        yield Finding(
            subject=subject,
            title=f"{failed:,} of {ended:,} attempts failed since {since}: {error}",
            value=100 * share,
            jobs=failed,
            severity="critical" if share >= MANY_FAIL else None,
            cure=(
                Cure("See the errors", "jobctl failures", "/failures"),
                Cure("See the failed jobs", f"jobctl jobs --queue {name} --status failed", f"/jobs?queue={queue}"),
            ),
        )


def expiring(scene: Scene) -> Iterator[Finding | None]:
    """Jobs of a pair expire before a worker takes them."""
    for (queue, kind), counts in list(scene.counts.pairs.items()):
        yield None
        sums = counts.sums(scene.at.now)
        expired, ended = sums[EXPIRED], sums[EXPIRED] + sums[ENDED] + sums[FAILED]
        if expired < FEW_EXPIRED or expired < EXPIRED_SHARE * ended:
            continue
        yield Finding(
            subject=Subject(type="pair", queue=queue, kind=kind),
            title=f"{expired:,} of {ended:,} jobs expired before a worker took them. "
            f"{_workers(scene, crew_of(scene, queue, kind), scene.running.get((queue, kind)))}",
            value=100 * expired / ended,
            jobs=expired,
            severity="critical" if 2 * expired >= ended else None,
            cure=(Cure("See its workers", "jobctl workers", "/workers"),),
        )


def due_far(scene: Scene) -> Iterator[Finding | None]:
    """Most jobs that are created for a pair are due in more than a week."""
    for (queue, kind), counts in list(scene.counts.pairs.items()):
        yield None
        sums = counts.sums(scene.at.now)
        far, created = sums[FAR], sums[CREATED]
        if far < MANY_FAR or 2 * far <= created:
            continue
        command = f"jobctl jobs --queue {shlex.quote(queue)} --status queued"
        yield Finding(
            subject=Subject(type="pair", queue=queue, kind=kind),
            title=f"{far:,} of {created:,} jobs created in the last 10 minutes are due in over a week.",
            value=far,
            jobs=far,
            cause="Such jobs usually start at once: seconds and milliseconds mixed up?",
            cure=(Cure("See them", command, f"/jobs?queue={queue}"),),
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
            title=f"95 % take up to {duration(each.last_hour_ms)}, usually {duration(each.usual_ms)}.",
            value=100 * ratio,
            jobs=each.completed,
            cause="The machine, the disk, or a service that these jobs use may be slow.",
            cure=(Cure("See the oldest jobs", "jobctl stats", "/"),),
        )


def crew_of(scene: Scene, queue: str, kind: str) -> Crew:
    """Return the workers whose latest claim takes the pair."""
    joined = Crew({})
    for claims in scene.state.presence.claim_sets(queue):
        crew = scene.crews.get(claims)
        if crew is None or not claims.takes(kind):
            continue
        for state, count in crew.states.items():
            joined.states[state] = joined.states.get(state, 0) + count
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


def _workers(scene: Scene, crew: Crew, running: list[int] | None) -> str:
    there = {state: count for state in TAKES if (count := crew.states.get(state, 0))}
    total = sum(there.values())
    if not total:
        return "No worker claims this queue and kind."
    if there.get("busy") != total:
        return f"{plural(total, 'worker')}: {', '.join(f'{count} {state}' for state, count in there.items())}."
    since = "" if running is None else f", the longest for {duration(scene.at.now - running[1])}"
    return f"Its only worker is busy{since}." if total == 1 else f"All {total} workers are busy{since}."


def _ratio(each: KindDurations) -> float | None:
    """Return the ratio of the last hour to the usual duration; None if unknown or too close."""
    if each.last_hour_ms is None or each.usual_ms is None or each.last_hour_ms - each.usual_ms < NOTICEABLE_MS:
        return None
    return round(each.last_hour_ms / max(each.usual_ms, 1), 2)
