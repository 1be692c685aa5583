"""What each answer of the daemon looks like for people. One function an answer, data on stdout.

Asks nobody and decides nothing; the words for times and spans are those of show.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from jobd.cli import show
from jobd.commands import (
    AlertView,
    CleanupReport,
    CleanupState,
    ClockView,
    HealthView,
    JobView,
    LockedJob,
    QueueView,
    RecoverStuckView,
    StatsView,
    Validation,
    WhyView,
    WorkerView,
)
from jobd.events import EventView

_LONG = 4_000


def jobs(page: Sequence[JobView]) -> None:
    """A page of jobs, one a line."""
    show.table(
        ["ID", "QUEUE", "KIND", "STATUS", ">%", "ATTEMPT", "WORKER", "UPDATED", "NOTE"],
        [
            (
                job.id,
                job.queue,
                job.kind,
                job.status,
                job.progress,
                f"{job.attempt}/{job.max_attempts}",
                job.lock.worker if job.lock else None,
                show.age(job.updated_at),
                show.clip(note(job), 60),
            )
            for job in page
        ],
        empty="No jobs.",
    )


def note(job: JobView) -> str:
    """The one thing to know beside the status: the error of a failed job, else the last progress message."""
    if job.status == "failed" or (job.error_message and not job.progress_message):
        return job.error_message or ""
    return job.progress_message or ""


def job(view: JobView) -> None:
    """Everything about one job; what is empty is left out."""
    lock = view.lock
    fields: list[tuple[str, object]] = [
        ("id", view.id),
        ("queue", view.queue),
        ("kind", view.kind),
        ("status", view.status),
        ("progress", f"{show.cell(view.progress)} %"),
        ("message", view.progress_message),
        ("attempt", f"{view.attempt} of {view.max_attempts}"),
        ("stalls", f"{view.stalls}, at most {view.max_stalls} (then: {view.on_stall})"),
        ("priority", view.priority),
        ("created", show.when(view.created_at)),
        ("updated", show.when(view.updated_at)),
        ("due", show.when(view.run_at)),
        ("started", show.when(view.started_at) if view.started_at else None),
        ("finished", show.when(view.finished_at) if view.finished_at else None),
        ("expires", show.when(view.expires_at) if view.expires_at else None),
        ("held by", f"{lock.worker} (fencing token {lock.fencing_token})" if lock else None),
        ("lock expires", show.when(lock.expires_at) if lock else None),
        ("stuck after", show.span(view.stuck_after_ms)),
        ("ceiling", show.span(view.max_processing_ms) if view.max_processing_ms else "none"),
        ("error", view.error_message),
        ("error code", view.error_code),
        ("download", view.download_url),
        ("file", view.file_path),
        ("storage key", view.storage_key),
        ("metadata", _json(view.metadata)),
        ("payload", _json(view.payload)),
    ]
    show.pairs((name, value) for name, value in fields if value not in (None, ""))


def _json(raw: Any) -> str | None:
    """JSON text of a job as one line; None where there is none. Very long text is cut."""
    if not isinstance(raw, msgspec.Raw) or bytes(raw) == b"null":
        return None
    text = bytes(raw).decode("utf-8", "replace")
    return text if len(text) <= _LONG else text[:_LONG] + "… (--json shows all)"


def timeline(events: Sequence[EventView]) -> None:
    """A job's events, oldest first, with the time since the first."""
    first = events[0].at if events else 0
    show.table(
        ["TIME", ">AFTER", "EVENT", "STATUS", "BY", "REASON"],
        [
            (
                show.local(event.at),
                show.span(max(event.at - first, 0)),
                event.type,
                _step(event),
                event.by,
                " ".join(filter(None, [event.reason, _details(event.details)])),
            )
            for event in events
        ],
        empty="No events: the job is older than its journal.",
    )


def _step(event: EventView) -> str:
    return event.to or "" if event.from_ in (None, event.to) else f"{event.from_} → {event.to or 'gone'}"


def _details(details: dict[str, Any]) -> str:
    return ", ".join(f"{name}={_detail(name, value)}" for name, value in details.items() if value is not None)


def _detail(name: str, value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        if name.endswith("_at"):
            return show.local(value)
        if name.endswith("_ms"):
            return show.span(value)
    return show.cell(value)


def why(view: WhyView) -> None:
    """State, reason, what happens next, what to do: a few sentences."""
    show.emit(f"{view.state}: {view.because}")
    if view.next is not None:
        show.emit(f"next: {view.next.what.rstrip('.')}: {show.when(view.next.at)} [{view.next.rule}]")
    if view.blocked_by:
        show.emit(f"blocked by: {view.blocked_by}")
    for hint in view.do:
        show.emit(f"do: {hint}")


def validation(view: Validation) -> None:
    if view.is_valid and not view.issues:
        show.emit("valid: nothing found")
        return
    rows = [(issue.type, issue.field, issue.message, issue.fix) for issue in view.issues]
    show.table(["TYPE", "FIELD", "WHAT IS WRONG", "FIX"], rows)


def queues(views: Sequence[QueueView]) -> None:
    rows = [
        (
            queue.name,
            "paused" if queue.paused else "open",
            queue.queued,
            queue.processing,
            queue.completed,
            queue.failed,
            queue.cancelled,
            show.age(queue.oldest_due_at) if queue.oldest_due_at is not None else None,
        )
        for queue in views
    ]
    columns = ["QUEUE", "STATE", ">QUEUED", ">PROCESSING", ">COMPLETED", ">FAILED", ">CANCELLED", "OLDEST DUE"]
    show.table(columns, rows, empty="No queues: no job was ever submitted.")


def workers(views: Sequence[WorkerView]) -> None:
    rows = [(worker.worker, len(worker.jobs), show.age(worker.last_seen_at), " ".join(worker.jobs)) for worker in views]
    show.table(["WORKER", ">HOLDS", "LAST SEEN", "JOBS"], rows, empty="No workers were seen.")


def stats(view: StatsView) -> None:
    oldest = view.oldest_processing_job
    fields: list[tuple[str, object]] = [("jobs", view.total_jobs)]
    fields += [(f"  {status}", count) for status, count in view.by_status.items()]
    fields += [
        ("stuck now", view.stuck_jobs),
        ("recovered in 24 h", view.stuck_jobs_recovered),
        ("locked", view.locked_jobs),
        ("average processing", show.span(view.average_processing_time * 1000)),
    ]
    if oldest is not None:
        fields.append(
            ("longest running", f"{oldest.id}, {show.span(oldest.age * 1000)}, {show.cell(oldest.progress)} %")
        )
    fields.append(("cleanup", _cleanup(view.cleanup_running, view.time_since_last_cleanup)))
    show.pairs(fields)


def _cleanup(running: bool, since_ms: int | None) -> str:
    last = "no pass yet" if since_ms is None else f"last pass {show.span(since_ms)} ago"
    return f"{last}, one is running now" if running else last


def health(view: HealthView) -> None:
    clean = view.cleanup_status
    rows = [
        ("database", view.database.status, view.database.message),
        ("cache", view.cache.status, view.cache.message),
        ("storage", view.storage.status, view.storage.message),
        (
            "cleanup",
            "running" if clean.running else "idle",
            clean.message or _cleanup(False, clean.time_since_last_cleanup),
        ),
        ("all", view.status, f"measured {show.age(view.timestamp)}"),
    ]
    show.table(["PART", "STATUS", "MESSAGE"], rows)


def report(view: CleanupReport) -> None:
    show.pairs(
        [
            ("at", show.when(view.timestamp)),
            ("stuck jobs recovered", view.stuck_jobs_recovered),
            ("expired locks cleared", view.expired_locks_cleared),
            ("expired jobs deleted", view.expired_jobs_deleted),
            ("issues found", view.validation_issues_found),
            ("issues fixed", view.validation_issues_fixed),
            ("took", show.span(view.total_processing_time)),
            ("errors", "; ".join(view.errors) or "none"),
        ]
    )


def cleanup_state(view: CleanupState) -> None:
    show.emit(_cleanup(view.cleanup_running, view.time_since_last_cleanup))
    if view.last_report is not None:
        report(view.last_report)


def reports(views: Sequence[CleanupReport]) -> None:
    columns = ["AT", ">RECOVERED", ">LOCKS", ">DELETED", ">FOUND", ">FIXED", ">TOOK", "FORCED", "ERRORS"]
    rows = [
        (
            show.when(view.timestamp),
            view.stuck_jobs_recovered,
            view.expired_locks_cleared,
            view.expired_jobs_deleted,
            view.validation_issues_found,
            view.validation_issues_fixed,
            show.span(view.total_processing_time),
            view.forced,
            "; ".join(view.errors),
        )
        for view in views
    ]
    show.table(columns, rows, empty="No cleanup pass has run yet.")


def recovered(view: RecoverStuckView) -> None:
    show.emit(f"{view.recovered_jobs} recovered: {view.reset_jobs} back in their queue, {view.failed_jobs} failed")
    if view.details:
        show.table(["JOB", "ACTION", "REASON"], [(item.job_id, item.action, item.reason) for item in view.details])


def locks(views: Sequence[LockedJob]) -> None:
    rows = [
        (
            lock.id,
            lock.worker,
            "live" if lock.live else "expired",
            show.age(lock.expires_at),
            show.age(lock.stuck_at),
            show.age(lock.ceiling_at) if lock.ceiling_at is not None else "none",
            lock.progress,
            lock.fencing_token,
        )
        for lock in views
    ]
    columns = ["JOB", "WORKER", "LOCK", "EXPIRES", "STUCK", "CEILING", ">%", ">TOKEN"]
    show.table(columns, rows, empty="No locks.")


def alerts(views: Sequence[AlertView], *, firing: bool = False) -> None:
    rows = [
        (
            alert.name,
            "firing" if alert.firing else "quiet",
            show.when(alert.since),
            round(alert.value, 2),
            round(alert.threshold, 2),
            alert.hint,
        )
        for alert in views
    ]
    empty = "No alert is firing." if firing else "No alerts are defined."
    show.table(["ALERT", "STATE", "SINCE", ">VALUE", ">THRESHOLD", "HINT"], rows, empty=empty)


def clock(view: ClockView) -> None:
    show.pairs([("daemon's time", show.local(view.now)), ("suspect", view.suspect), ("", view.message)])
