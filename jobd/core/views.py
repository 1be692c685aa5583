"""Views of jobs, grants, queues and workers, as responses show them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from heapq import nlargest, nsmallest
from itertools import islice
from typing import Any, Final, get_args

import msgspec
from msgspec import UNSET, Raw, UnsetType
from msgspec.structs import astuple, replace

from jobd.core.state import State
from jobd.core.stats import Counters
from jobd.core.transaction import Transaction
from jobd.core.worker_presence import WorkerPresence, WorkerSeen
from jobd.model import responses
from jobd.model.commands import Import, Locks, Moment, Queues, Workers, WorkerState
from jobd.model.events import QueuePause
from jobd.model.flat_job import NO_ERROR, NO_RESULT, PARTS, maker
from jobd.model.job import (
    STATUSES,
    Grant,
    Job,
    LateResult,
    LockDeadlines,
    Policy,
    extra_keys,
    granted_bytes,
    shown_bytes,
)
from jobd.model.responses import GrantView, JobView, LockState, Response
from jobd.model.schedules import Schedule

JOBS_SHOWN: Final = 100  # of a worker
GROUPS_SHOWN: Final = 100


def lock_view(job: Job, at: Moment, *, admin: bool = False) -> responses.LockView | None:
    """Return the lock of `job`; None if its expiry was recorded or the job is not processing."""
    if job.grant is None or job.deadlines is None or job.deadlines.cleared:
        return None
    grant = job.grant
    return responses.LockView(
        grant.worker,
        grant.fencing_token,
        grant.acquired_at,
        at.wall(job.deadlines.expires),
        grant.lock_id if admin else UNSET,
    )


def job_view(job: Job, at: Moment, policy: Policy, *, admin: bool = False, payload: Raw | UnsetType = UNSET) -> JobView:
    """Return the view of `job`. Durations that the creator did not set are shown as they apply now."""
    options, grant = job.options, job.grant
    lock: responses.LockView | None = None
    worker: str | UnsetType = UNSET
    durations = options if grant is None else grant
    stall_after_ms, progress_timeout_ms = durations.stall_after_ms, durations.progress_timeout_ms
    if stall_after_ms is None:
        stall_after_ms = policy.stall_after_ms
    if progress_timeout_ms is None:
        progress_timeout_ms = policy.progress_timeout_ms
    if grant is not None:
        lock = lock_view(job, at, admin=admin)
        if lock is None and job.deadlines is not None:
            worker = grant.worker
    view = _view(
        job,
        options,
        job.result or NO_RESULT,
        job.error or NO_ERROR,
        payload,
        stall_after_ms,
        progress_timeout_ms,
        lock,
        worker,
    )
    if (extra := job.extra) is not None:
        view.schedule_id = UNSET if extra.schedule_id is None else extra.schedule_id
        view.scheduled_at = UNSET if extra.scheduled_at is None else extra.scheduled_at
        view.copied_from = extra.copied_from or UNSET
    return view


def unread(job: Job, view: JobView) -> list[tuple[int, JobView]]:
    """Return the bodies that `view` lacks, for Response.unread_payloads."""
    return [(job.seq, view), *((key, view) for key in extra_keys(job))]


def body_field(key: int, body: bytes) -> tuple[str, Any]:
    """Return the field of a view with these headers or this checkpoint, and its value."""
    return ("checkpoint", Raw(body)) if key % 2 else ("headers", msgspec.json.decode(body))


def job_response(tx: Transaction, job: Job, *, repeated: bool | UnsetType = UNSET) -> Response:
    """Return the current view of the job. The actor adds the payload before the response is sent."""
    view = job_view(job, tx.at, tx.policy, admin=tx.call.admin)
    view.repeated = repeated
    unread_payloads = [(job.seq, view)] if job.extra is None else unread(job, view)
    return Response(view, unread_payloads=unread_payloads, large_bytes=shown_bytes(job))


# By position: a claim makes up to a hundred of these, and keyword arguments take six times as long.
_view = maker(JobView, f"{PARTS}, payload, stall_after_ms, progress_timeout_ms, lock, worker")
_import = maker(Import, f"{PARTS}, payload, worker", by_name=True)


def as_import(job: Job, payload: Raw, bodies: Mapping[int, bytes]) -> Import:
    """Return the job in the form that an import takes, even if it is invalid: the import rejects or repairs it."""
    worker = job.grant.worker if job.grant else None
    line = _import(job, job.options, job.result or NO_RESULT, job.error or NO_ERROR, payload, worker)
    if (extra := job.extra) is None:
        return line
    fields = dict(body_field(key, bodies[key]) for key in extra_keys(job) if key in bodies)
    fields["copied_from"] = extra.copied_from or UNSET
    return replace(line, schedule_id=extra.schedule_id, scheduled_at=extra.scheduled_at, **fields)


def late_view(late: LateResult, not_adoptable: str | None = None) -> responses.LateResultView:
    """Return the view of a late result. `not_adoptable` is the message of the error that its adoption returns."""
    result = late.result
    return responses.LateResultView(
        late.seq,
        late.at,
        late.worker,
        late.fencing_token,
        result.download_url,
        result.file_path,
        result.storage_key,
        result.metadata,
        late.expires_at,
        None if not_adoptable is None else responses.ErrorView("invalid_request", not_adoptable),
    )


def progress_due_at(deadlines: LockDeadlines, at: Moment) -> int | None:
    return None if deadlines.progress_due is None else at.wall(deadlines.progress_due)


def lock_state(grant: Grant, deadlines: LockDeadlines, at: Moment, extended: bool | UnsetType = UNSET) -> LockState:
    return LockState(at.wall(deadlines.expires), grant.ttl_ms, progress_due_at(deadlines, at), extended=extended)


def grant_view(job: Job, at: Moment, view: JobView) -> GrantView:
    """Return the current grant of `job`, for its holder."""
    assert job.grant is not None and job.deadlines is not None
    grant, deadlines = job.grant, job.deadlines
    return GrantView(
        view,
        grant.lock_id,
        grant.fencing_token,
        at.wall(deadlines.expires),
        grant.ttl_ms,
        progress_due_at(deadlines, at),
    )


def granted(jobs: Iterable[Job], at: Moment, policy: Policy, *, admin: bool) -> Response:
    """Return the response with the current grants of `jobs`."""
    shown, unread_payloads, grants, large_bytes = [], [], [], 0
    for job in jobs:
        view = job_view(job, at, policy, admin=admin)
        shown.append(grant := grant_view(job, at, view))
        unread_payloads += [(job.seq, view)] if job.extra is None else unread(job, view)
        grants.append((job.id, grant.lock_id))
        large_bytes += granted_bytes(job)
    return Response(responses.Grants(shown), 200, unread_payloads, grants, large_bytes=large_bytes)


def queues(state: State, command: Queues) -> responses.QueueList:
    """Return a page of the queues after the cursor, by name, or the busiest queues."""
    if command.busiest:
        busiest = nsmallest(command.limit, _named(state, command), key=partial(_by_load, state))
        return responses.QueueList([_queue(state, name) for name in busiest])
    found = list(islice(_named(state, command), command.limit + 1))
    shown = found[: command.limit]
    return responses.QueueList([_queue(state, name) for name in shown], shown[-1] if len(found) > len(shown) else None)


def _by_load(state: State, name: str) -> tuple[int, str]:
    counts = state.counts.get(name)
    return (0 if counts is None else -counts["queued"] - counts["processing"]), name


def _named(state: State, command: Queues) -> Iterator[str]:
    """Return the names after the cursor of all queues, or only of paused or unpaused ones."""
    after = command.cursor or ""
    if command.paused:
        return iter(sorted(name for name in state.paused if name > after))
    names = state.queue_names.after(after)
    return names if command.paused is None else (name for name in names if name not in state.paused)


def _queue(state: State, name: str) -> responses.QueueView:
    counts = state.counts.get(name, {})
    by_status = {status: counts.get(status, 0) for status in STATUSES}
    pause = state.paused.get(name, QueuePause())
    return responses.QueueView(
        name=name,
        paused=name in state.paused,
        oldest_due_at=state.oldest_due_at(name),
        paused_at=pause.at,
        paused_by=pause.by,
        pause_reason=pause.reason,
        paused_until=pause.until,
        **by_status,
    )


def paused_view(queue: str, pause: QueuePause | None) -> responses.PausedView:
    return responses.PausedView(queue, pause is not None, *(() if pause is None else astuple(pause)))


def schedule_view(state: State, schedule: Schedule, now: int) -> responses.ScheduleView:
    """Return the view of a schedule, without what follows from its timing: `next_at` is a time before the next one."""
    timing, pause, last = schedule.timing, schedule.pause or QueuePause(), state.get(schedule.last_job_id or "")
    skip = schedule.last_skip
    return responses.ScheduleView(
        id=schedule.id,
        cron=timing.cron,
        every_ms=timing.every_ms,
        offset_ms=timing.offset_ms,
        timezone=timing.timezone,
        job=schedule.job,
        overlap=schedule.overlap,
        catch_up=schedule.catch_up,
        jitter_ms=schedule.jitter_ms,
        source=schedule.source,
        paused=schedule.pause is not None,
        paused_at=pause.at,
        paused_by=pause.by,
        pause_reason=pause.reason,
        paused_until=pause.until,
        created_at=schedule.created_at,
        updated_at=schedule.updated_at,
        next_at=max(schedule.fires_after(now), now),
        last_fired_at=schedule.last_fired_at,
        last_job_id=schedule.last_job_id,
        last_status=None if last is None else last.status,
        skipped=schedule.skipped,
        missed=schedule.missed,
        last_skip=None if skip is None else responses.SkipView(skip.scheduled_at, skip.reason),
    )


def workers(state: State, at: Moment, command: Workers) -> responses.WorkerList:
    """Return a page of the workers in a state, or of all that are there, most recently seen first.

    A worker that is seen between two pages moves to the front, so later pages may lack it.
    """
    presence = state.presence
    by_state, groups = dict.fromkeys(get_args(WorkerState), 0), {}
    quiet: Counter[tuple[str | None, str | None]] = Counter()
    selected: list[tuple[str, WorkerSeen]] = []
    for each in presence.remembered(in_order=True):
        activity, about = presence.state(each[1]), each[1].about
        by_state[activity] += 1
        key = (about.host, about.version) if about is not None else (None, None)
        if key not in groups:
            groups[key] = dict.fromkeys(by_state, 0)
        groups[key][activity] += 1
        quiet[key] += each[1].is_quiet and activity not in ("died", "gone")
        if activity == command.state or (command.state is None and activity not in ("died", "gone")):
            selected.append(each)
    if command.cursor is not None:
        before, _, last = command.cursor.partition(" ")
        selected = [each for each in selected if _by_latest(each) > (-int(before), last)]
    selected.reverse()  # nearly in order, so sorting is cheap
    selected.sort(key=_by_latest)
    shown = selected[: command.limit]
    following = f"{shown[-1][1].last_seen_at} {shown[-1][0]}" if len(selected) > len(shown) else None
    since = at.now if presence.started_at is None else presence.started_at
    largest = nlargest(GROUPS_SHOWN, groups.items(), key=lambda each: sum(each[1].values()))
    grouped = [responses.WorkerGroup(*key, states, quiet[key]) for key, states in largest]
    return responses.WorkerList([_worker(presence, *each) for each in shown], following, by_state, grouped, since)


def _by_latest(each: tuple[str, WorkerSeen]) -> tuple[int, str]:
    return -each[1].last_seen_at, each[0]


def _worker(presence: WorkerPresence, name: str, seen: WorkerSeen) -> responses.WorkerView:
    claims = seen.claims
    return responses.WorkerView(
        name,
        presence.state(seen),
        list(islice(seen.jobs, JOBS_SHOWN)),
        len(seen.jobs),
        len(seen.expired),
        None if claims is None else claims.queues,
        None if claims is None else claims.kinds,
        seen.waiting > 0,
        seen.about,
        presence.heard_at(seen),
        seen.goodbye,
        None if seen.lost is None else responses.LostJobView(*seen.lost),
        seen.is_quiet,
        None if seen.directive is None else seen.directive.view.action,
    )


def locks(state: State, at: Moment, command: Locks, *, admin: bool) -> responses.LockList:
    """Return current grants after the cursor (a fencing token), oldest first."""
    after = int(command.cursor or 0)
    held = ((job, job.grant, job.deadlines) for job in state.processing.values() if job.grant and job.deadlines)
    selected = (each for each in held if each[1].fencing_token > after) if after else held
    shown = [_locked(*each, at, admin) for each in islice(selected, command.limit)]
    is_last = command.limit is None or len(shown) < command.limit or next(selected, None) is None
    return responses.LockList(shown, None if is_last else str(shown[-1].fencing_token))


def _locked(job: Job, grant: Grant, deadlines: LockDeadlines, at: Moment, admin: bool) -> responses.LockedJob:
    return responses.LockedJob(
        id=job.id,
        queue=job.options.queue,
        kind=job.options.kind,
        worker=grant.worker,
        lock_id=grant.lock_id if admin else UNSET,
        fencing_token=grant.fencing_token,
        acquired_at=grant.acquired_at,
        expires_at=at.wall(deadlines.expires),
        live=deadlines.is_live(at.lock_ms),
        progress_due_at=progress_due_at(deadlines, at),
        stalled_at=at.wall(deadlines.stalled_at),
        progress=job.progress,
    )


def stats(state: State, counters: Counters, at: Moment) -> responses.StatsView:
    oldest = None
    if (job := next(iter(state.processing.values()), None)) is not None:
        age_s = round(max(at.now - (job.started_at or job.created_at), 0) / 1000, 3)
        oldest = responses.OldestProcessing(job.id, age_s, job.progress)
    return responses.StatsView(
        total_jobs=state.total(),
        by_status={status: state.totals[status] for status in STATUSES},
        stuck_jobs=len(state.processing.stalled),
        locked_jobs=state.processing.live_locks(),
        average_processing_time=average_processing_s(state, counters, at),
        oldest_processing_job=oldest,
        stuck_jobs_recovered=counters.recovered_last_day(at.now),
        timestamp=at.now,
    )


def oldest_due(state: State) -> responses.OldestDue | None:
    """Return the job that has been due longest, also in a paused queue."""
    if (found := state.oldest_due()) is None:
        return None
    queue, entry = found
    pause = state.paused.get(queue)
    return responses.OldestDue(entry[3], queue, entry[1], None if pause is None else pause.describe())


def average_processing_s(state: State, counters: Counters, at: Moment) -> float:
    """Return the average time since the latest grant in seconds, of jobs completed in the last hour or processing."""
    count, total_ms = counters.completed_last_hour(at.now)
    running = len(state.processing)
    total_ms += running * at.now - state.processing.started_sum
    return round(max(total_ms, 0) / 1000 / (count + running), 3) if count + running else 0.0
