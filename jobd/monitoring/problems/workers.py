"""Conditions of workers, and of the jobs that they hold."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from itertools import islice, takewhile
from operator import itemgetter
from typing import Final
from urllib.parse import urlencode

from jobd.core import quiet
from jobd.core.stats import STEP_MS
from jobd.core.transitions import stall_outcomes
from jobd.core.worker_presence import WorkerSeen
from jobd.model.commands import About
from jobd.model.events import QueuePause
from jobd.model.job import HOUR_MS, MINUTE_MS, Job
from jobd.model.problems import Cure, Subject
from jobd.model.times import clock_time, duration
from jobd.monitoring.problems.condition import Finding, Scene, job_cure, plural
from jobd.monitoring.problems.losses import Group, GroupLosses, group_of

LOST_MS: Final = 10 * MINUTE_MS
RESTART_MS: Final = MINUTE_MS  # all workers of a machine that restarts die within it
UNKNOWN_MS: Final = HOUR_MS  # without progress, if it is not known how long the kind usually takes
HALF: Final = 0.5
NAMED: Final = 3
JOBS_READ: Final = 1_000  # of one silent worker

# By group: workers, those of them that died, and others that were there when the last did.
Crews = dict[Group, list[int]]


def dying(scene: Scene) -> Iterator[tuple[GroupLosses, Crews] | None]:
    """Find the groups with many deaths or stalls, and count the workers of all groups if there are any."""
    limits, now, presence = scene.limits, scene.at.now, scene.state.presence
    sick = {
        losses.group: losses
        for losses in scene.losses.recent(now)
        if (len(losses.workers) >= limits.workers_die or sum(losses.stalls.values()) >= limits.workers_die_stalls)
        and not _is_quiet(scene, losses.group)
    }
    crews: Crews = {}
    for name, worker in presence.remembered() if sick else ():
        yield None
        group = group_of(worker)
        losses = scene.losses.groups.get(group)
        died = losses is not None and name in losses.workers
        if died or worker.jobs or now - presence.heard_at(worker) < LOST_MS:
            counts = crews.setdefault(group, [0, 0, 0])
            counts[0] += 1
            counts[1] += died
            counts[2] += not died and group in sick and worker.first_seen_at <= sick[group].last_at
    for losses in sick.values():
        yield losses, crews


def _is_quiet(scene: Scene, group: Group) -> bool:
    """Return whether a rule keeps jobs from the group. What died had its job before, and needs no one."""
    about = About(host=group[0] or None, version=group[1] or None)
    return any(rule.queue is None and quiet.covers(rule, about) for rule in scene.state.quiet.values())


def workers_die(scene: Scene, item: tuple[GroupLosses, Crews]) -> Finding | None:
    """Many workers of one host and version died, or many of their grants stalled."""
    (losses, crews), limits = item, scene.limits
    group, stalls = losses.group, sum(losses.stalls.values())
    total, died, others = crews.get(group, [0, 0, 0])
    grants = max(sum(losses.grants.values()), stalls)
    of_workers = died / total if total and died >= limits.workers_die else 0.0
    of_grants = stalls / grants if stalls >= limits.workers_die_stalls else 0.0
    share = max(of_workers, of_grants)
    if share < limits.workers_die_share:
        return None
    if of_grants > of_workers:
        title = f"{stalls:,} of {plural(grants, 'grant')} to workers{_named(group)} stalled in the last 10 minutes."
    else:
        reported_ms = max(loss.reported_ms for loss in losses.workers.values())
        within = f"within {duration(reported_ms)} of its grant" if reported_ms else "before its first report"
        at_once = f", each {within}" if reported_ms < RESTART_MS else ""
        last = clock_time(losses.last_at)
        title = f"{died:,} of {plural(total, 'worker')}{_named(group)} died{at_once}, the last at {last}."
    for other, (count, dead, _) in sorted(crews.items(), key=itemgetter(1), reverse=True)[:NAMED]:
        title += f" Workers{_named(other)}: {dead:,} of {count:,}." if other != group else ""
    selects = {name: value for name, value in zip(("host", "version"), group, strict=True) if value}
    command = f"jobctl quiet {' '.join(f'--{name} {shlex.quote(selects[name])}' for name in selects)} --reason TEXT"
    quieting = [Cure("Quiet them", command, f"/workers/quiet?{urlencode(selects)}", changes=True)] if selects else []
    # If a machine restarts, all its workers die together, and those that start afterwards live.
    restarted = not others and max(losses.stalls) - min(losses.stalls) <= RESTART_MS // STEP_MS
    return Finding(
        Subject(type="workers", host=group[0], version=group[1]),
        title,
        jobs=stalls,
        value=100 * share,
        severity="notice" if restarted else "critical" if share >= HALF else None,
        cause="They died together, as when their machine restarts." if restarted else "",
        cure=(*quieting, Cure("See its workers", "jobctl workers --by version", "/workers")),
    )


def _named(group: Group) -> str:
    """Return the words after "workers": ` of 2.4.1 on k8s-b`."""
    host, version = group
    return f"{f' of {version}' if version else ''}{f' on {host}' if host else ''}" or " of unknown version"


def kills_workers(scene: Scene, item: tuple[str, dict[str, None]]) -> Finding | None:
    """A job was held by several workers that died."""
    job_id, names = item
    job = scene.state.jobs.find(job_id)
    if job is None or not job.stalls:  # finished, or an operator began it again
        scene.losses.holders.pop(job_id, None)
        return None
    if len(names) < scene.limits.kills_workers:
        return None
    title = f"It was held by {len(names)} workers that died: {', '.join(list(names)[:NAMED])}."
    cure = job_cure("See what happened", "timeline", job_id), job_cure("Cancel it", "cancel", job_id, changes=True)
    return Finding(Subject(type="job", job=job_id), title, jobs=1, value=len(names), cure=cure)


Loop = tuple[tuple[str, str, str], list[tuple[int, str]]]  # queue, kind and worker; releases and ids of jobs


def loops(scene: Scene) -> list[Loop]:
    """Group the jobs that are released over and over, if there are many."""
    found: dict[tuple[str, str, str], list[tuple[int, str]]] = {}
    if len(scene.state.release_loops) > scene.limits.release_loop:
        for job_id, releases in scene.state.release_loops.items():
            if (job := scene.state.jobs.get(job_id)) is not None and job.ended is not None:
                key = job.options.queue, job.options.kind, job.ended.worker
                found.setdefault(key, []).append((releases, job_id))
    return list(found.items())


def release_loop(scene: Scene, item: Loop) -> Finding:
    """Jobs that a worker releases over and over."""
    (queue, kind, worker), jobs = item
    releases, job_id = max(jobs)
    released = f"{plural(len(jobs), 'job', 'is', 'are')} released over and over by {worker}"
    quiet_it = Cure("Quiet the worker", f"jobctl quiet {shlex.quote(worker)} --reason TEXT", "/workers", changes=True)
    return Finding(
        Subject(type="pair", queue=queue, kind=kind, worker=worker),
        f"{released}; {job_id} {releases} times.",
        jobs=len(jobs),
        cause="This worker cannot process them.",
        cure=(job_cure("See who releases it, and why", "timeline", job_id), quiet_it),
    )


def silent(scene: Scene) -> Iterator[str | None]:
    """Find the workers that hold jobs whose locks have expired."""
    processing, names = scene.state.processing, dict[str, None]()
    for job_id in (*processing.expired_locks, *processing.noted_expired, *processing.stalled):
        yield None
        if (job := processing.get(job_id)) is not None and job.grant is not None:
            names[job.grant.worker] = None
    yield from names


def worker_silent(scene: Scene, name: str) -> Finding | None:
    state, at, worker = scene.state, scene.at, scene.state.presence.workers.get(name)
    if worker is None or not worker.expired:
        return None
    jobs = [job for job_id in islice(worker.expired, JOBS_READ) if (job := state.processing.get(job_id)) is not None]
    ends = [at.wall(job.deadlines.stalled_at) for job in jobs if job.deadlines is not None]
    by = max([*ends, at.now]) + (state.recovery.recover_every_ms or state.recovery.cleanup_every_ms)
    count, silent_ms = len(worker.expired), at.lock_ms - worker.heard
    title = (
        f"Silent for {duration(silent_ms)}: {plural(count, 'job')} with expired locks. "
        f"By {clock_time(by)}, {stall_outcomes(jobs)}."
    )
    cure = Cure("End these grants now", f"jobctl take-back {shlex.quote(name)}", "/workers", changes=True)
    return Finding(_worker(name, worker), title, jobs=count, wait_ms=silent_ms, cure=(cure,))


def quiet_long(scene: Scene, item: tuple[str, WorkerSeen]) -> Finding | None:
    """A worker that an operator told to be quiet long ago, although jobs wait that it takes. Quiet rules are known."""
    (name, worker), state = item, scene.state
    since, claims, told = worker.quiet_since, worker.claims, worker.obeyed
    is_young = since is None or scene.at.now - since <= scene.limits.quiet_long
    if since is None or is_young or claims is None or worker.told_rule in state.quiet:
        return None
    due = sum(pair.due for queue in claims.queues for pair in scene.due_of(queue) if claims.takes(pair.kind))
    if not due or state.presence.state(worker) in ("died", "gone"):
        return None
    said = f"for {duration(scene.at.now - since)}"  # it was told before the start
    if told is not None:
        said = QueuePause(since, told.by, told.reason).describe()
    title = f"Quiet {said}. {plural(due, 'job')} that it takes {'is' if due == 1 else 'are'} due."
    cure = Cure("Let it take jobs", f"jobctl resume-worker {shlex.quote(name)}", "/workers", changes=True)
    return Finding(_worker(name, worker), title, jobs=due, cure=(cure,))


def held_long(scene: Scene) -> Iterator[Job | None]:
    """Iterate over the jobs with live locks, the oldest grant first, until they are too young."""
    last = min(scene.at.now, scene.at.believed) - scene.limits.no_progress
    jobs = scene.running_jobs()
    return takewhile(lambda job: job is None or job.grant is None or job.grant.acquired_at <= last, jobs)


def no_progress(scene: Scene, job: Job) -> Finding | None:
    """A job runs for much longer than its kind usually does, and shows no progress."""
    state, at, limits, grant, deadlines = scene.state, scene.at, scene.limits, job.grant, job.deadlines
    if grant is None or deadlines is None:
        return None
    since = grant.acquired_at
    if (reported := state.processing.progressed.get(job.id)) is not None:
        since = at.wall(reported)
    elif job.progress:  # reported before the start
        since = max(since, state.presence.started_at or 0)
    baseline = state.counters.baselines.kinds.get(job.options.kind)
    usual_ms = None if baseline is None else baseline.usual()
    limit_ms = UNKNOWN_MS if usual_ms is None else max(limits.no_progress_times * usual_ms, limits.no_progress)
    silent_ms = min(at.now, at.believed) - since
    if silent_ms < limit_ms or 0 < grant.progress_timeout_ms <= limit_ms:  # the timeout ends it sooner
        return None
    times = "" if usual_ms is None else f", {silent_ms / max(usual_ms, 1):.0f} times the usual time"
    renewed_ms = at.lock_ms - (deadlines.stall_due - grant.stall_after_ms)
    return Finding(
        Subject(type="job", job=job.id),
        f"Has run without progress for {duration(silent_ms)}{times}. "
        f"{grant.worker} is alive: it renewed the lock {duration(renewed_ms)} ago.",
        jobs=1,
        wait_ms=silent_ms,
        severity="notice" if usual_ms is None else None,
        cure=(
            job_cure("See its latest reports", "why", job.id),
            job_cure("Cancel it", "cancel", job.id, changes=True),
        ),
    )


def _worker(name: str, worker: WorkerSeen) -> Subject:
    host, version = group_of(worker)
    return Subject(type="worker", worker=name, host=host, version=version)
