"""The rules for schedules. The times are computed outside (maintenance/cron.py); the rules only compare numbers."""

from __future__ import annotations

from hashlib import blake2b
from heapq import nsmallest
from typing import Any

import msgspec
from msgspec import UNSET, Raw
from msgspec.structs import replace

from jobd.core import guards, views
from jobd.core.rules import create_rules
from jobd.core.transaction import Transaction
from jobd.model import commands
from jobd.model.errors import api_error
from jobd.model.events import QueuePause
from jobd.model.job import LIVE, SECOND_MS, Extra, Job
from jobd.model.responses import Response, ScheduleList
from jobd.model.schedules import Schedule, Timing

MAX_JOB_BYTES = 64 << 10  # of the fields of the jobs of a schedule, which stay in memory


def put(tx: Transaction, command: commands.PutSchedule) -> Response:
    """Create or replace a schedule. An operator's request without a source takes it over."""
    if (command.cron is None) == (command.every_ms is None):
        given = "Neither cron nor every_ms is" if command.cron is None else "cron and every_ms are both"
        raise guards.invalid("cron", f"{given} given. Give either cron or every_ms.")
    if command.source is None and not tx.call.admin:
        raise guards.invalid("source", "Name the program that maintains the schedule, such as app:shop.")
    known = tx.state.schedules.get(command.id)
    if known is None:
        _check_room(tx)
    elif command.source not in (None, known.source):
        owner = "an operator" if known.source is None else known.source
        message = (
            f"Schedule {command.id} belongs to {owner}. Use another id, or delete it: jobctl schedule rm {command.id}"
        )
        raise api_error("schedule_owned", message, source=known.source)
    schedule = _requested(tx, command, known)
    if schedule != known:
        _change(tx, command.id, "schedule_put", schedule.queue, row=msgspec.to_builtins(schedule))
    return Response(views.schedule_view(tx.state, schedule, tx.now), status=201 if known is None else 200)


def _check_room(tx: Transaction) -> None:
    if len(tx.state.schedules) >= (limit := tx.policy.schedules):
        message = f"There are {limit} schedules (limits.schedules). Delete some, or raise the limit."
        raise api_error("too_many_schedules", message, limit=limit)


def _requested(tx: Transaction, command: commands.PutSchedule, known: Schedule | None) -> Schedule:
    """Return the schedule after the request, `known` itself if nothing changes."""
    text = msgspec.json.encode(command.job)
    if len(text) > MAX_JOB_BYTES:
        message = f"job has {len(text)} bytes, at most {MAX_JOB_BYTES} are allowed. Store the data elsewhere."
        raise guards.invalid("job", message)
    if command.job.backoff is not UNSET:
        guards.check_backoff(command.job.backoff)
    fields: dict[str, Any] = {
        "timing": Timing(command.cron, command.every_ms, command.offset_ms, command.timezone),
        "job": msgspec.json.decode(text),
        "overlap": command.overlap,
        "catch_up": command.catch_up,
        "jitter_ms": command.jitter_ms,
        "source": command.source,
    }
    now, number = tx.now, tx.state.next_event
    if known is None:
        pause = QueuePause(now, tx.call.by) if command.paused else None
        return Schedule(
            id=command.id, pause=pause, created_at=now, updated_at=now, timed_from=now, version=number, **fields
        )
    if all(getattr(known, name) == value for name, value in fields.items()):
        return known
    if fields["timing"] != known.timing:
        fields |= {"timed_from": now, "version": number}
    return replace(known, updated_at=now, **fields)


def fire(tx: Transaction, command: commands.Fire) -> Response:
    """Create the job of a time. Each time fires once, and none while the clock is suspect."""
    schedule = tx.state.schedules.get(command.id)
    at = command.scheduled_at
    if (
        schedule is None
        or schedule.version != command.version
        or schedule.pause is not None
        or tx.at.suspect
        or schedule.is_over(at, tx.now)
    ):
        return Response(None)
    job_id, queue = commands.scheduled_job_id(schedule.id, at), schedule.queue
    if command.is_missed:
        _change(tx, schedule.id, "schedule_missed", queue, scheduled_at=at, missed=command.missed + 1)
    elif (reason := _skip_reason(tx, schedule, job_id)) is not None:
        _change(tx, schedule.id, "schedule_skipped", queue, reason, scheduled_at=at, missed=command.missed)
    else:
        _create(tx, schedule, job_id, at, {"scheduled_at": at, "missed": command.missed})
    return Response(None)


def _skip_reason(tx: Transaction, schedule: Schedule, job_id: str) -> str | None:
    if schedule.overlap == "skip" and (last := _unfinished(tx, schedule)) is not None:
        return f"{last.id} of this schedule is still {last.status}."
    if tx.state.get(job_id) is not None or job_id in tx.state.quarantined:
        return f"id_taken: another request created a job {job_id}."
    return None


def run(tx: Transaction, command: commands.RunSchedule) -> Response:
    """Create one job now, or that of a time."""
    schedule, at = find(tx, command.id), command.scheduled_at
    if at is not None and at % SECOND_MS:
        raise guards.invalid("scheduled_at", f"scheduled_at {at} is not in full seconds; it is in Unix milliseconds.")
    if at is not None and (there := tx.state.get(job_id := commands.scheduled_job_id(schedule.id, at))) is not None:
        if there.extra is None or there.extra.schedule_id != schedule.id:
            message = f"Job {job_id} exists, and another request created it. Delete it first."
            raise api_error("job_exists", message, job_id=job_id, status=there.status)
        return views.job_response(tx, there)
    if schedule.overlap == "skip" and not command.force and (last := _unfinished(tx, schedule)) is not None:
        message = f"{last.id} of schedule {schedule.id} is still {last.status}. Wait for its end, or use force."
        raise api_error("schedule_busy", message, job_id=last.id, status=last.status)
    if at is None:
        job = _create(tx, schedule, f"{schedule.id}:run:{tx.job_id(0)}", None, {})
    else:
        job = _create(tx, schedule, job_id, at, {"scheduled_at": at})
    return replace(views.job_response(tx, job), status=201)


def pause(tx: Transaction, command: commands.PauseSchedule) -> Response:
    schedule = find(tx, command.id)
    guards.check_until(tx, command.until, "Leave it out to pause until an operator resumes the schedule.")
    known, given = schedule.pause, (command.reason, command.until)
    if known is None or given not in ((None, None), (known.reason, known.until)):
        _change(tx, schedule.id, "schedule_paused", schedule.queue, command.reason, until=command.until)
    return Response(views.schedule_view(tx.state, tx.state.schedules[schedule.id], tx.now))


def resume(tx: Transaction, command: commands.ResumeSchedule) -> Response:
    schedule = find(tx, command.id)
    if schedule.pause is not None:
        _change(tx, schedule.id, "schedule_resumed", schedule.queue, command.reason)
    return Response(views.schedule_view(tx.state, tx.state.schedules[schedule.id], tx.now))


def delete(tx: Transaction, command: commands.DeleteSchedule) -> Response:
    schedule = find(tx, command.id)
    response = Response(views.schedule_view(tx.state, schedule, tx.now))
    _change(tx, schedule.id, "schedule_deleted", schedule.queue, command.reason)
    return response


def get(tx: Transaction, command: commands.GetSchedule) -> Response:
    return Response(views.schedule_view(tx.state, find(tx, command.id), tx.now))


def list_page(tx: Transaction, command: commands.Schedules) -> Response:
    after, source, known = command.cursor or "", command.source, tx.state.schedules
    names = nsmallest(
        command.limit + 1, (name for name in known if name > after and source in (None, known[name].source))
    )
    page = [views.schedule_view(tx.state, known[name], tx.now) for name in names[: command.limit]]
    return Response(ScheduleList(page, page[-1].id if len(names) > command.limit else None))


def find(tx: Transaction, name: str) -> Schedule:
    if (schedule := tx.state.schedules.get(name)) is None:
        message = f"There is no schedule {name}. List them: jobctl schedules"
        raise api_error("schedule_not_found", message, schedule=name)
    return schedule


def _change(tx: Transaction, *event: Any, **details: Any) -> None:
    guards.check_format(tx, "schedules")
    tx.change_schedule(*event, **details)


def _unfinished(tx: Transaction, schedule: Schedule) -> Job | None:
    """Return the last job of the schedule if it is not finished."""
    last = None if schedule.last_job_id is None else tx.state.get(schedule.last_job_id)
    return last if last is not None and last.status in LIVE else None


def _create(tx: Transaction, schedule: Schedule, job_id: str, at: int | None, details: dict[str, Any]) -> Job:
    """Create a job of the schedule. Its `run_at` is its time, with the jitter of the schedule."""
    guards.check_format(tx, "schedules")
    fields = {name: value for name, value in schedule.job.items() if name != "payload"}
    payload = Raw(msgspec.json.encode(schedule.job.get("payload")))
    request = msgspec.convert({"payload": payload, **fields}, commands.Create)
    run_at = tx.now if at is None else at + _jitter_ms(schedule, at)
    details = {"schedule": schedule.id, **details}
    job, _ = create_rules.add_job(tx, request, job_id, run_at, "", Extra(schedule.id, at), details)
    return job


def _jitter_ms(schedule: Schedule, at: int) -> int:
    digest = blake2b(f"{schedule.id} {at}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % (schedule.jitter_ms + 1)
