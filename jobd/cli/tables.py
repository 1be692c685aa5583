"""Print responses about jobs on stdout, one function for each kind of response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from jobd.cli import terminal
from jobd.cli.terminal import Columns, ago
from jobd.model.times import duration, utc

if TYPE_CHECKING:
    from jobd.model.events import EventView, StreamedEvent
    from jobd.model.problems import Problem
    from jobd.model.responses import JobView, QueueWhyView, Validation, WhyView

_LONG = 4_000


def holder(job: JobView) -> str | None:
    """Return the worker that holds the job, marked `(silent)` if its lock has expired."""
    if job.lock is not None:
        return job.lock.worker
    return f"{job.worker} (silent)" if job.worker else None


def note(job: JobView) -> str:
    """Return when a queued job becomes due, the error of a failed job, else its last progress message."""
    if job.status == "queued" and not job.error_message and (due := terminal.age(job.run_at)).startswith("in "):
        return f"due {due}"
    if job.status == "failed" or (job.error_message and not job.progress_message):
        return terminal.one_line(job.error_message or "")
    return terminal.clip(job.progress_message or "", 60)


JOBS: Final[Columns] = {
    "ID": "id",
    "QUEUE": "queue",
    "KIND": "kind",
    "STATUS": "status",
    ">%": "progress",
    "ATTEMPT": lambda job: f"{job.attempt}/{job.max_attempts}",
    "WORKER": holder,
    "UPDATED": ago("updated_at"),
    "NOTE": note,
}


def job(view: JobView, events: Sequence[EventView] = ()) -> None:
    """Print all fields of a job that are not empty. `events` name the worker of a finished job."""
    lock = view.lock
    last_worker = next(
        (event.by.removeprefix("worker:") for event in reversed(events) if event.type == "granted"), None
    )
    ends = "kept until" if view.finished_at else "expires"
    fields: list[tuple[str, object]] = [
        ("id", view.id),
        ("queue", view.queue),
        ("kind", view.kind),
        ("status", view.status),
        ("progress", f"{terminal.cell(view.progress)} %"),
        ("message", view.progress_message),
        ("attempt", f"{view.attempt} of {view.max_attempts}"),
        ("stalls", f"{view.stalls}, at most {view.max_stalls} (on stall: {view.on_stall})"),
        ("priority", view.priority),
        ("created", terminal.when(view.created_at)),
        ("updated", terminal.when(view.updated_at)),
        ("due", terminal.when(view.run_at)),
        ("started", terminal.when(view.started_at) if view.started_at else None),
        ("finished", terminal.when(view.finished_at) if view.finished_at else None),
        (ends, terminal.when(view.expires_at) if view.expires_at else None),
        ("last worker", last_worker),
        ("held by", f"{lock.worker} (fencing token {lock.fencing_token})" if lock else holder(view)),
        ("lock expires", terminal.when(lock.expires_at) if lock else None),
        ("stalled after", duration(view.stall_after_ms)),
        ("progress timeout", duration(view.progress_timeout_ms) if view.progress_timeout_ms else "none"),
        ("error", view.error_message),
        ("error code", view.error_code),
        ("download", view.download_url),
        ("file", view.file_path),
        ("storage key", view.storage_key),
        ("metadata", json_text(view.metadata)),
        ("payload", json_text(view.payload)),
    ]
    terminal.pairs((name, value) for name, value in fields if value not in (None, ""))


def json_text(raw: Any) -> str | None:
    """Return JSON text, cut if it is very long. None if there is none or it is null."""
    import msgspec

    if not isinstance(raw, msgspec.Raw) or bytes(raw) == b"null":
        return None
    text = bytes(raw).decode("utf-8", "replace")
    return text if len(text) <= _LONG else text[:_LONG] + "… (--json shows all)"


def timeline(events: Sequence[EventView]) -> None:
    """Print a job's events, oldest first, with the time since the first."""
    first = events[0].at if events else 0
    columns: Columns = {
        "TIME": lambda event: utc(event.at),
        ">AFTER": lambda event: duration(event.at - first),
        "EVENT": "type",
        "STATUS": _status_change,
        "BY": "by",
        "REASON": lambda event: " ".join(filter(None, [_reason(event), _details(event.details)])),
    }
    terminal.table(columns, events, empty="No events: the event log no longer has them.")


def event_line(event: StreamedEvent) -> str:
    about = f"{event.job_id} ({event.queue})" if event.job_id is not None else f"queue {event.queue}"
    parts = [utc(event.at), str(event.seq), event.type, about, _status_change(event), event.by, _reason(event)]
    return "  ".join(filter(None, [*parts, _details(event.details)]))


def _reason(event: EventView) -> str:
    return terminal.one_line(event.reason or "")


def _status_change(event: EventView) -> str:
    return event.to or "" if event.from_ in (None, event.to) else f"{event.from_} → {event.to or 'deleted'}"


def _details(details: dict[str, Any]) -> str:
    return ", ".join(f"{name}={_detail(name, value)}" for name, value in details.items() if value is not None)


def _detail(name: str, value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        if name.endswith("_at"):
            return utc(value)
        if name.endswith("_ms"):
            return duration(value)
    return terminal.cell(value)


# The codes among the values of `blocked_by`; the others are phrases.
_BLOCKED_BY: Final = {
    "queue_paused": "the pause of its queue",
    "run_at": "its due time",
    "expires_at": "its expiry",
    "clock": "the suspect clock",
}


def why(view: WhyView) -> None:
    """Print the open problem, the state, its reason, the next event and what to do."""
    if view.problem:
        _problem(view.problem)
    terminal.emit(terminal.one_line(f"{view.state}: {view.because}"))
    if view.next is not None:
        at = "" if view.next.at is None else f": {terminal.when(view.next.at)}"
        if view.next.latest_at is not None:
            at += f", at the latest {utc(view.next.latest_at)}"
        terminal.emit(f"next: {view.next.what.rstrip('.')}{at} [{view.next.rule}]")
    if view.blocked_by:
        terminal.emit(f"blocked by: {_BLOCKED_BY.get(view.blocked_by, view.blocked_by)}")
    for hint in view.do:
        terminal.emit(f"do: {hint}")


def _problem(problem: Problem) -> None:
    terminal.emit(terminal.one_line(f"problem: {problem.name}: {problem.sentence}"))
    for cure in problem.cure:
        terminal.emit(f"cure: {cure.label}: {cure.command}" if cure.command else f"cure: {cure.label}")


def queue_why(view: QueueWhyView) -> None:
    """Print the problems and the state of a queue, and of each kind why its oldest due job waits."""
    for problem in view.problems:
        _problem(problem)
    terminal.emit(view.because)
    for each in view.kinds:
        terminal.emit("")
        terminal.emit(f"kind {each.kind or '-'}: {each.due:,} due, the oldest is {each.job_id}")
        why(each.why)


def validation(view: Validation) -> None:
    if view.is_valid and not view.issues:
        terminal.emit("valid: no issues")
        return
    terminal.table({"TYPE": "type", "FIELD": "field", "ISSUE": "message", "FIX": "fix"}, view.issues)
