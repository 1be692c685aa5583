"""Conditions of workers, and of the jobs that they hold."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from itertools import islice
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
from jobd.monitoring.problems.condition import Finding, Scene, Thresholds, plural
from jobd.monitoring.problems.losses import Group, GroupLosses, group_of

LOST_MS: Final = 10 * MINUTE_MS
RESTART_MS: Final = MINUTE_MS  # all workers of a machine that restarts die within it
UNKNOWN_MS: Final = HOUR_MS  # without progress, if it is not known how long the kind usually takes
HALF: Final = 0.5
NAMED: Final = 3
RUNNING_READ: Final = 10_000
JOBS_READ: Final = 1_000  # of one silent worker


def workers_die(scene: Scene) -> Iterator[Finding | None]:
    """Many workers of one host and version died, or many of their grants stalled."""
    limits, now = scene.limits, scene.at.now
    sick = {
        group: losses
        for group, losses in scene.losses.recent(now)
        if (len(losses.workers) >= limits.workers_die or sum(losses.stalls.values()) >= limits.workers_die_stalls)
        and not _is_quiet(scene, group)
    }
    last_at = {group: max((loss.at for loss in losses.workers.values()), default=0) for group, losses in sick.items()}
    crews: dict[Group, list[int]] = {}  # workers, those of them that died, and others that were there when the last did
    for name, worker in scene.state.presence.remembered() if sick else ():
        yield None
        group = group_of(worker)
        losses = scene.losses.groups.get(group)
        died = losses is not None and name in losses.workers
        if died or worker.jobs or now - scene.state.presence.heard_at(worker) < LOST_MS:
            counts = crews.setdefault(group, [0, 0, 0])
            counts[0] += 1
            counts[1] += died
            counts[2] += not died and worker.first_seen_at <= last_at.get(group, 0)
    for group, losses in sick.items():
        if (finding := _dying(scene.limits, group, losses, crews)) is not None:
            yield finding


def _is_quiet(scene: Scene, group: Group) -> bool:
    """Return whether a rule keeps jobs from the group. What died had its job before, and needs no one."""
    about = About(host=group[0] or None, version=group[1] or None)
    return any(rule.queue is None and quiet.covers(rule, about) for rule in scene.state.quiet.values())


def _dying(limits: Thresholds, group: Group, losses: GroupLosses, crews: dict[Group, list[int]]) -> Finding | None:
    total, died, others = crews.get(group, [0, 0, 0])
    stalls = sum(losses.stalls.values())
    grants = max(sum(losses.grants.values()), stalls)
    of_workers = died / total if total and died >= limits.workers_die else 0.0
    of_grants = stalls / grants if stalls >= limits.workers_die_stalls else 0.0
    share = max(of_workers, of_grants)
    if share < limits.workers_die_share:
        return None
    if of_grants > of_workers:
        title = f"{stalls:,} of {plural(grants, 'grant')} to workers{_named(group)} stalled in the last 10 minutes."
    else:
        last = f"the last at {clock_time(max(loss.at for loss in losses.workers.values()))}"
        reported_ms = max(loss.reported_ms for loss in losses.workers.values())
        within = f"within {duration(reported_ms)} of its grant" if reported_ms else "before its first report"
        at_once = f", each {within}" if reported_ms < RESTART_MS else ""
        title = f"{died:,} of {plural(total, 'worker')}{_named(group)} died{at_once}, {last}."
    for other, (count, dead, _) in sorted(crews.items(), key=itemgetter(1), reverse=True)[:NAMED]:
        title += f" Workers{_named(other)}: {dead:,} of {count:,}." if other != group else ""
    # If a machine restarts, all its workers die together, and those that start afterwards live.
    restarted = not others and max(losses.stalls) - min(losses.stalls) <= RESTART_MS // STEP_MS
    return Finding(
        subject=Subject(type="workers", host=group[0], version=group[1]),
        title=title,
        value=100 * share,
        jobs=stalls,
        severity="notice" if restarted else "critical" if share >= HALF else None,
        cause="They died together, as when their machine restarts." if restarted else "",
        cure=(*_quieting(group), Cure("See its workers", "jobctl workers --by version", "/workers")),
    )


def _quieting(group: Group) -> Iterator[Cure]:
    """Suggest a quiet rule for a group that says what it is."""
    selects = {name: value for name, value in zip(("host", "version"), group, strict=True) if value}
    if selects:
        options = " ".join(f"--{name} {shlex.quote(value)}" for name, value in selects.items())
        page = f"/workers/quiet?{urlencode(selects)}"
        yield Cure("Quiet them", f"jobctl quiet {options} --reason TEXT", page, changes=True)


def _named(group: Group) -> str:
    """Return the words after "workers": ` of 2.4.1 on k8s-b`."""
    host, version = group
    return f"{f' of {version}' if version else ''}{f' on {host}' if host else ''}" or " of unknown version"


def kills_workers(scene: Scene) -> Iterator[Finding | None]:
    """A job was held by several workers that died."""
    for job_id, names in list(scene.losses.holders.items()):
        yield None
        job = scene.state.jobs.find(job_id)
        if job is None or not job.stalls:  # finished, or an operator began it again
            scene.losses.holders.pop(job_id, None)
        elif len(names) >= scene.limits.kills_workers:
            yield Finding(
                subject=_job(job),
                title=f"It was held by {len(names)} workers that died: {', '.join(list(names)[:NAMED])}.",
                value=len(names),
                jobs=1,
                cure=(
                    Cure("See what happened", f"jobctl timeline {job_id}", f"/jobs/{job_id}"),
                    Cure("Cancel it", f"jobctl cancel {job_id}", f"/jobs/{job_id}", changes=True),
                ),
            )


def release_loops(scene: Scene) -> Iterator[Finding]:
    """Jobs that a worker releases over and over, by queue, kind and worker."""
    loops = scene.state.release_loops
    if len(loops) <= scene.limits.release_loop:
        return
    found: dict[tuple[str, str, str], list[tuple[int, str]]] = {}
    for job_id, releases in list(loops.items()):
        if (job := scene.state.jobs.get(job_id)) is not None and job.ended is not None:
            found.setdefault((job.options.queue, job.options.kind, job.ended.worker), []).append((releases, job_id))
    for (queue, kind, worker), jobs in found.items():
        releases, job_id = max(jobs)
        yield Finding(
            subject=Subject(type="pair", queue=queue, kind=kind, worker=worker),
            title=f"{plural(len(jobs), 'job')} {'is' if len(jobs) == 1 else 'are'} released over and over by {worker}; "
            f"{job_id} {releases} times.",
            value=len(jobs),
            jobs=len(jobs),
            cause="This worker cannot process them.",
            cure=(
                Cure("See who releases it, and why", f"jobctl timeline {job_id}", f"/jobs/{job_id}"),
                Cure("Quiet the worker", f"jobctl quiet {shlex.quote(worker)} --reason TEXT", "/workers", changes=True),
            ),
        )


def silent_workers(scene: Scene) -> Iterator[Finding | None]:
    """Workers that hold jobs whose locks have expired."""
    state, at = scene.state, scene.at
    names: dict[str, None] = {}
    for job_id in (*state.processing.expired_locks, *state.processing.noted_expired, *state.processing.stalled):
        yield None
        if (job := state.processing.get(job_id)) is not None and job.grant is not None:
            names[job.grant.worker] = None
    for name in names:
        yield None
        worker = state.presence.workers.get(name)
        if worker is None or not (count := len(worker.expired)):
            continue
        jobs = [
            job for job_id in islice(worker.expired, JOBS_READ) if (job := state.processing.get(job_id)) is not None
        ]
        ends = [at.wall(job.deadlines.stalled_at) for job in jobs if job.deadlines is not None]
        by = max([*ends, at.now]) + (state.recovery.recover_every_ms or state.recovery.cleanup_every_ms)
        silent_ms = at.lock_ms - worker.heard
        yield Finding(
            subject=_worker(name, worker),
            title=f"Silent for {duration(silent_ms)}: {plural(count, 'job')} with expired locks. "
            f"By {clock_time(by)}, {stall_outcomes(jobs)}.",
            value=count,
            jobs=count,
            wait_ms=silent_ms,
            cure=(Cure("End these grants now", f"jobctl take-back {shlex.quote(name)}", "/workers", changes=True),),
        )


def quiet_long(scene: Scene) -> Iterator[Finding | None]:
    """Workers that an operator told to be quiet long ago, although jobs wait that they take. Quiet rules are known."""
    state, limit_ms = scene.state, scene.limits.quiet_long_ms
    for name, worker in state.presence.remembered():
        yield None
        since, claims = worker.quiet_since, worker.claims
        is_young = since is None or scene.at.now - since <= limit_ms
        if since is None or is_young or claims is None or worker.told_rule in state.quiet:
            continue
        queues = set(claims.queues)
        due = sum(pair.due for pair in scene.due if pair.queue in queues and claims.takes(pair.kind))
        if due and state.presence.state(worker) not in ("died", "gone"):
            told = worker.obeyed  # None if that was before the start
            said = f"for {duration(scene.at.now - since)}"
            if told is not None:
                said = QueuePause(since, told.by, told.reason).describe()
            yield Finding(
                subject=_worker(name, worker),
                title=f"Quiet {said}. {plural(due, 'job')} that it takes {'is' if due == 1 else 'are'} due.",
                value=due,
                jobs=due,
                cure=(Cure("Let it take jobs", f"jobctl resume-worker {shlex.quote(name)}", "/workers", changes=True),),
            )


def no_progress(scene: Scene) -> Iterator[Finding | None]:
    """A job runs for much longer than its kind usually does, and shows no progress."""
    state, at, limits = scene.state, scene.at, scene.limits
    now, presence = min(at.now, at.believed), state.presence
    for job in list(islice(state.processing.values(), RUNNING_READ)):
        yield None
        grant, deadlines = job.grant, job.deadlines
        if grant is None or deadlines is None or not deadlines.is_live(at.lock_ms):
            continue
        if now - grant.acquired_at < limits.no_progress_ms:
            return  # the others were granted later
        since = grant.acquired_at
        if (reported := state.processing.progressed.get(job.id)) is not None:
            since = at.wall(reported)
        elif job.progress:  # reported before the start
            since = max(since, presence.started_at or 0)
        baseline = state.counters.baselines.kinds.get(job.options.kind)
        usual_ms = None if baseline is None else baseline.usual()
        limit_ms = UNKNOWN_MS if usual_ms is None else max(limits.no_progress_times * usual_ms, limits.no_progress_ms)
        silent_ms = now - since
        if silent_ms < limit_ms or 0 < grant.progress_timeout_ms <= limit_ms:  # the timeout ends it sooner
            continue
        times = "" if usual_ms is None else f", {silent_ms / max(usual_ms, 1):.0f} times the usual time"
        renewed_ms = at.lock_ms - (deadlines.stall_due - grant.stall_after_ms)
        yield Finding(
            subject=_job(job),
            title=f"Has run without progress for {duration(silent_ms)}{times}. "
            f"{grant.worker} is alive: it renewed the lock {duration(renewed_ms)} ago.",
            value=silent_ms,
            jobs=1,
            wait_ms=silent_ms,
            severity="notice" if usual_ms is None else None,
            cure=(
                Cure("See its latest reports", f"jobctl why {job.id}", f"/jobs/{job.id}"),
                Cure("Cancel it", f"jobctl cancel {job.id}", f"/jobs/{job.id}", changes=True),
            ),
        )


def _worker(name: str, worker: WorkerSeen) -> Subject:
    host, version = group_of(worker)
    return Subject(type="worker", worker=name, host=host, version=version)


def _job(job: Job) -> Subject:
    return Subject(type="job", job=job.id)
