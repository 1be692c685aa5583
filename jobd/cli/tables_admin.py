"""Print responses about the daemon on stdout, one function for each kind of response."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Final, Literal

from jobd.cli import tables, terminal
from jobd.cli.terminal import Columns, Listing, ago
from jobd.model.sizes import byte_size
from jobd.model.times import duration, utc

if TYPE_CHECKING:
    from jobd.model import responses
    from jobd.model.commands import About, WorkerState
    from jobd.model.problems import ProblemList

MAX_NAMES: Final = 4  # queues or kinds of a worker


def queue_columns(views: Sequence[responses.QueueView]) -> Columns:
    """Return the columns of queues. If one is paused, the last one describes the pauses."""
    if any(queue.paused for queue in views):
        return {**_QUEUES, "PAUSED": lambda queue: queue.pause.describe() if queue.paused else None}
    return _QUEUES


_QUEUES: Final[Columns] = {
    "QUEUE": "name",
    "STATE": lambda queue: "paused" if queue.paused else "open",
    ">QUEUED": "queued",
    ">PROCESSING": "processing",
    ">COMPLETED": "completed",
    ">FAILED": "failed",
    ">CANCELLED": "cancelled",
    "OLDEST DUE": ago("oldest_due_at"),
}


SCHEDULES: Final = Listing(
    "schedules",
    "No schedules yet. An app creates them, or a file: jobctl settings apply FILE",
    {
        "SCHEDULE": "id",
        "WHEN": "explanation",
        "NEXT": lambda view: "paused" if view.paused else terminal.when(view.next_at) if view.next_at else None,
        "LAST JOB": "last_job_id",
        "STATUS": "last_status",
        ">SKIPPED": "skipped",
        ">MISSED": "missed",
        "SOURCE": lambda view: view.source or "operator",
    },
)


def schedule(view: responses.ScheduleView) -> None:
    """Show all fields of a schedule that are not empty."""
    skip = view.last_skip
    terminal.pairs(
        [
            ("id", view.id),
            ("when", view.explanation),
            ("cron", view.cron),
            ("time zone", view.timezone if view.cron else None),
            ("paused", view.pause.describe() if view.paused else None),
            ("next", ", ".join(utc(at) for at in view.next_times) or None),
            ("overlap", view.overlap),
            ("catch up", view.catch_up),
            ("jitter", duration(view.jitter_ms) if view.jitter_ms else None),
            ("job", terminal.as_json(view.job, may_indent=False)),
            ("source", view.source or "operator"),
            ("last fired", terminal.when(view.last_fired_at) if view.last_fired_at else None),
            ("last job", f"{view.last_job_id} ({view.last_status or 'deleted'})" if view.last_job_id else None),
            ("skipped", view.skipped),
            ("missed", view.missed),
            ("last skip", f"{utc(skip.scheduled_at)}: {skip.reason}" if skip else None),
        ]
    )


def workers(views: Sequence[responses.WorkerView], page: responses.WorkerList, state: WorkerState | None) -> None:
    """Show workers in a table. `page` is the last page: its counts and `since` cover all workers."""
    since = f"since the start at {utc(page.since)}"
    empty = f"No worker has been seen recently, {since}." if state is None else f"No worker is {state}."
    columns: Columns = {
        "WORKER": "worker",
        "STATE": worker_state,
        ">HOLDS": "held",
        "LAST SEEN": ago("last_seen_at"),
        "CLAIMS": claims,
        "ABOUT": lambda worker: about(worker.about),
        "JOBS": _held,
    }
    terminal.table(columns, views, empty=empty)
    for away, count in page.by_state.items():
        if state is None and away in ("died", "gone") and count:
            terminal.say(f"{count} more {'died' if away == 'died' else 'left'}: jobctl workers --state {away}")


def worker_groups(page: responses.WorkerList, by: Literal["host", "version"]) -> None:
    """Show how many workers of each host or version are in each state."""
    counts: dict[str, Counter[str]] = {}
    for group in page.groups:
        counts.setdefault(getattr(group, by) or "", Counter()).update(group.by_state, quiet=group.quiet)
    columns: Columns = {
        by.upper(): itemgetter("name"),
        **{f">{state.upper()}": itemgetter(state) for state in (*page.by_state, "quiet")},
    }
    rows = [{"name": name or "unknown", **states} for name, states in sorted(counts.items())]
    terminal.table(columns, rows, empty="No worker has been seen since the start.")


def worker_state(worker: responses.WorkerView) -> str:
    """Return the state of a worker: `idle`, `idle, quiet` or, until it obeys a directive, `idle, quiet pending`."""
    quiet = ["quiet"] if worker.quiet and worker.directive != "quiet" else []
    return ", ".join([worker.state, *quiet, *([f"{worker.directive} pending"] if worker.directive else [])])


def claims(worker: responses.WorkerView) -> str | None:
    """Describe the queues and kinds of the latest claim: `mail images (kinds: resize)`."""
    if worker.queues is None:
        return None
    kinds = "" if worker.kinds is None else f" (kinds: {_few(kind or '(none)' for kind in worker.kinds)})"
    return f"{_few(worker.queues)}{kinds}"


def about(worker: About | None) -> str | None:
    """Describe a worker's process: `box, pid 42, version 1.0, concurrency 4`."""
    if worker is None:
        return None
    parts = [
        worker.host,
        f"pid {worker.pid}" if worker.pid is not None else None,
        f"version {worker.version}" if worker.version else None,
        f"concurrency {worker.concurrency}" if worker.concurrency is not None else None,
        worker.instance,
    ]
    return ", ".join(part for part in parts if part)


def _few(names: Iterable[str]) -> str:
    shown = list(names)
    more = [f"and {len(shown) - MAX_NAMES} more"] if len(shown) > MAX_NAMES else []
    return " ".join([*shown[:MAX_NAMES], *more])


def take_back(view: responses.TakeBackView, print_line: Callable[[str], None], *, would: bool) -> None:
    """Print the effect of a take-back on each job. `would`: nothing has changed yet."""
    done = {"reset": "requeued", "failed": "failed"}
    planned = {"reset": "would be requeued", "failed": "would fail"}
    for each in view.details:
        print_line(f"{each.job_id}: {(planned if would else done)[each.action]}: {each.reason}")
    jobs = "1 job" if view.recovered_jobs == 1 else f"{view.recovered_jobs} jobs"
    how = f"{view.reset_jobs} requeued, {view.failed_jobs} failed{'; there are more' if view.more else ''}"
    print_line(f"{'would take' if would else 'took'} back {jobs} of {view.worker}: {how}")


def _held(worker: responses.WorkerView) -> str:
    more = worker.held - len(worker.jobs)
    return " ".join([*worker.jobs, f"and {more} more"] if more else worker.jobs)


def stats(view: responses.StatsView) -> None:
    oldest, average = view.oldest_processing_job, duration(view.average_processing_time * 1000)
    fields: list[tuple[str, object]] = [("jobs", view.total_jobs)]
    fields += [(f"  {status}", count) for status, count in view.by_status.items()]
    fields += [
        ("stalled now", view.stuck_jobs),
        ("recovered in 24 h", view.stuck_jobs_recovered),
        ("locked", view.locked_jobs),
        ("average processing", f"{average} (jobs completed in the last hour or processing)"),
    ]
    if oldest is not None:
        fields.append(
            ("longest running", f"{oldest.id}, {duration(oldest.age * 1000)}, {terminal.cell(oldest.progress)} %")
        )
    fields.append(("cleanup", _cleanup(view.cleanup_running, view.time_since_last_cleanup)))
    if view.disk is not None:
        fields.append(("disk", terminal.disk_space(view.disk)))
    elif view.store:
        fields.append(("store", view.store))
    terminal.pairs(fields)


def disk(use: responses.DiskUse) -> None:
    fields: list[tuple[str, object]] = [
        ("database", byte_size(use.database_bytes)),
        ("  tail", f"{byte_size(use.tail_bytes)}, written to the tables soon"),
        ("  other", f"{byte_size(use.other_bytes)}: indexes, audit log, stored responses, events of deleted jobs"),
        ("free pages", f"{byte_size(use.free_page_bytes)}, used again"),
        ("log (WAL)", byte_size(use.wal_bytes)),
        ("side files", byte_size(use.side_bytes)),
    ]
    if use.total_bytes is not None and use.free_bytes is not None and use.not_jobd_bytes is not None:
        fields.append(("not jobd", byte_size(use.not_jobd_bytes)))
        fields.append(("free", f"{byte_size(use.free_bytes)} of {byte_size(use.total_bytes)} ({use.path})"))
    terminal.pairs(fields)
    terminal.emit("")
    terminal.table(STORED_KINDS, use.kinds, empty="No jobs.")
    if use.more_kinds:
        terminal.say(f"And {use.more_kinds} more queues and kinds.")
    if use.kinds:
        terminal.say(f"Sizes of queues and kinds are estimates from a sample of {use.jobs_read} jobs.")
        which = f"--where queue={shlex.quote(use.kinds[0].queue)} --where status=completed --where finished_until=2d"
        terminal.say(f"Delete jobs that completed long ago: jobctl delete {which}")


def _cleanup(running: bool, since_ms: int | None) -> str:
    last = "no run has succeeded yet" if since_ms is None else f"last successful run {duration(since_ms)} ago"
    return f"{last}, one is running now" if running else last


def health(view: responses.HealthView) -> None:
    clean, database = view.cleanup_status, view.database
    rows = [
        ("database", database.status, database.message),
        *([("journal", view.journal.status, view.journal.message)] if view.journal else []),
        ("cache", view.cache.status, view.cache.message),
        ("storage", view.storage.status, view.storage.message),
        (
            "cleanup",
            "running" if clean.running else "idle",
            clean.message or _cleanup(False, clean.time_since_last_cleanup),
        ),
        ("all", view.status, f"measured {terminal.age(view.timestamp)}"),
    ]
    if database.path is not None and database.free_bytes is not None and database.total_bytes is not None:
        free, total = byte_size(database.free_bytes), byte_size(database.total_bytes)
        rows.insert(1, ("disk", "-", f"{free} free of {total} ({database.path})"))
    if view.problems:
        critical = f", {view.critical_problems} critical" if view.critical_problems else ""
        what = f"{view.problems} problem{'' if view.problems == 1 else 's'}{critical}: jobctl status"
        rows.insert(-1, ("problems", "-", what))
    terminal.table({"PART": itemgetter(0), "STATUS": itemgetter(1), "MESSAGE": itemgetter(2)}, rows)


def problems(view: ProblemList) -> None:
    """Show one line for each problem, and what to do below it."""
    if view.evaluated_at is None:
        terminal.emit("Not known yet: the daemon has just started.")
        return
    critical = sum(each.severity == "critical" for each in view.problems)
    count = len(view.problems)
    terminal.emit(f"{count or 'No'} problem{'' if count == 1 else 's'}{f', {critical} critical' if critical else ''}")
    width = max((len(each.name) for each in view.problems), default=0)
    for each in view.problems:
        since = duration(view.evaluated_at - each.since)
        terminal.emit(f"{each.severity[0].upper()} {each.name:{width}}  {since:>12}  {each.sentence}")
        if commands := [cure.command for cure in each.cure if cure.command]:
            terminal.emit(f"  {'':{width}}  {'':12}  {'    '.join(commands)}")
    if view.rest:
        terminal.emit(f"And {view.rest:,} more subjects.")
    for each in view.known:
        terminal.emit(f"known: {each.name}: {each.title}")


def report(view: responses.CleanupReport) -> None:
    terminal.pairs(
        [
            ("at", terminal.when(view.timestamp)),
            ("stalled jobs recovered", view.stuck_jobs_recovered),
            ("expired locks cleared", view.expired_locks_cleared),
            ("expired jobs deleted", view.expired_jobs_deleted),
            ("issues found", view.validation_issues_found),
            ("issues fixed", view.validation_issues_fixed),
            ("took", duration(view.total_processing_time)),
            ("errors", _errors(view) or "none"),
        ]
    )


def cleanup_state(view: responses.CleanupState) -> None:
    terminal.emit(_cleanup(view.cleanup_running, view.time_since_last_cleanup))
    if view.last_failure is not None:
        runs = "1 run has" if view.failed_since_last_success == 1 else f"{view.failed_since_last_success} runs have"
        terminal.emit(f"{runs} failed since then, the last one {terminal.age(view.last_failure.timestamp)}")
    if view.last_report is not None:
        report(view.last_report)


def _errors(report: responses.CleanupReport) -> str:
    return "; ".join(report.errors)


REPORTS: Final = Listing(
    "reports",
    "Cleanup has not run yet.",
    {
        "AT": lambda report: terminal.when(report.timestamp),
        ">RECOVERED": "stuck_jobs_recovered",
        ">LOCKS": "expired_locks_cleared",
        ">DELETED": "expired_jobs_deleted",
        ">FOUND": "validation_issues_found",
        ">FIXED": "validation_issues_fixed",
        ">TOOK": lambda report: duration(report.total_processing_time),
        "FORCED": "forced",
        "ERRORS": _errors,
    },
)


def recovered(view: responses.RecoverStuckView) -> None:
    terminal.emit(f"{view.recovered_jobs} recovered: {view.reset_jobs} requeued, {view.failed_jobs} failed")
    if view.details:
        terminal.table({"JOB": "job_id", "ACTION": "action", "REASON": "reason"}, view.details)


def failures(view: responses.FailuresView) -> None:
    columns: Columns = {
        ">FAILED": "count",
        ">OVER A DAY AGO": "older_than_day",
        ">RETRYING": "retrying",
        "ERROR": "fingerprint",
        "CODE": "error_code",
        "LAST": ago("last_at"),
        "KINDS": lambda group: " ".join(kind or "-" for kind in group.kinds),
        "QUEUES": lambda group: " ".join(group.queues),
        "LATEST MESSAGE": "message",
    }
    terminal.table(columns, view.groups, empty="No job has failed.")
    if largest := next((group for group in view.groups if group.count), None):
        recent = " --where finished_since=1d" if 0 < largest.older_than_day < largest.count else ""
        which = f"--where error={largest.fingerprint}{recent}"
        terminal.say(f"Retry, one job first: jobctl retry {which} --trial --rate 10/s")
    if view.other:
        terminal.say(f"{view.other} of {view.total} failed jobs are not in these groups.")
    if view.other_retrying:
        terminal.say(f"{view.other_retrying} of {view.retrying} jobs that wait for a retry are not in these groups.")
    if not view.complete:
        terminal.say("Jobs from before the start of the daemon are still being counted.")


def planned_recoveries(view: responses.PreviewView) -> None:
    """Print what recovery would do."""
    terminal.emit(f"{len(view.recover)} would be recovered")
    if view.recover:
        terminal.table({"JOB": "job_id", "WOULD BE": "action", "REASON": "reason"}, view.recover)


def preview(view: responses.PreviewView) -> None:
    """Print what cleanup would do."""
    planned_recoveries(view)
    terminal.pairs(
        [
            ("expired locks to clear", view.expired_locks),
            ("queued jobs to expire", _named(view.overdue_jobs)),
            ("finished jobs to delete", _named(view.deleted_jobs)),
            ("jobs with issues", _named(view.invalid_jobs)),
            *([("", "there are too many jobs to check all of them for issues")] if view.more_invalid else []),
            *([("", "there are more: only the first of each kind are counted")] if view.more else []),
            *([("kept while the clock is suspect", kept_count(view))] if view.kept_jobs else []),
        ]
    )


def kept_count(view: responses.PreviewView) -> str:
    """Return the number and some ids of the jobs that would be deleted by age if the clock were accepted."""
    return ("more than " if view.more_kept else "") + _named(view.kept_jobs)


def _named(ids: Sequence[str]) -> str:
    shown = " ".join(ids[:5]) + (" …" if len(ids) > 5 else "")
    return f"{len(ids)}: {shown}" if ids else "0"


STORED_KINDS: Final[Columns] = {
    "QUEUE": "queue",
    "KIND": "kind",
    ">JOBS": "jobs",
    **{
        f">{part.upper()}": lambda kind, part=part: byte_size(getattr(kind, part))  # type: ignore[misc]
        for part in ("bytes", "payloads", "results", "events", "rows")
    },
}
LOCKS: Final = Listing(
    "locks",
    "No locks.",
    {
        "JOB": "id",
        "WORKER": lambda lock: lock.worker if lock.live else f"{lock.worker} (silent)",
        "LOCK": lambda lock: "live" if lock.live else "expired",
        "EXPIRES": ago("expires_at"),
        "STALLS": ago("stalled_at"),
        "PROGRESS TIMEOUT": ago("progress_due_at", "none"),
        ">%": "progress",
        ">TOKEN": "fencing_token",
    },
)


def late_results(views: Sequence[responses.LateResultView]) -> None:
    columns: Columns = {
        ">RESULT": "seq",
        "TIME": lambda late: utc(late.at),
        "WORKER": "worker",
        ">TOKEN": "fencing_token",
        "LOCATION": lambda late: " ".join(filter(None, (late.download_url, late.file_path, late.storage_key))),
        "METADATA": lambda late: tables.json_text(late.metadata),
    }
    terminal.table(columns, views, empty="No late results.")
    for late in views:
        if late.rejection is not None:
            terminal.emit(late.rejection.message)


def _outcome(entry: responses.AuditView) -> str:
    before, after = entry.details.get("from"), entry.details.get("to")
    if times := entry.details.get("times"):
        return f"{entry.outcome}, {times} times"
    if undone := (entry.details.get("changed_meanwhile") or 0) + (entry.details.get("rejected") or 0):
        return f"{entry.outcome}, {undone} not changed"
    if entry.outcome != "done" or before is None:
        return entry.outcome
    return f"{before} → {after}" if after else f"{before} → deleted"


AUDIT: Final[Columns] = {
    "TIME": lambda entry: utc(entry.at),
    "OPERATOR": "who",
    "FROM": "address",
    "ACTION": "action",
    "TARGET": "target",
    "OUTCOME": _outcome,
    "REASON": lambda entry: entry.reason and terminal.clip(entry.reason),
}


def _state(view: responses.WebhookView) -> str:
    """Return the state as the dashboard shows it."""
    if view.state == "closed":
        return "failing" if view.failing_since is not None else "healthy"
    return {"starting": "starting", "open": "paused after errors", "half_open": "retrying one message"}[view.state]


WEBHOOKS: Final = Listing(
    "webhooks",
    "No webhook is configured.",
    {
        "WEBHOOK": "name",
        "URL": "url",
        "STATE": _state,
        "NEXT ATTEMPT": ago("next_attempt_at"),
        ">WAITING": "waiting",
        ">LAG": "lag",
        ">DELIVERED": "delivered",
        ">DEAD-LETTERED": "dead_lettered",
        "LAST SUCCESS": ago("last_success_at"),
        "LAST ERROR": "last_error",
    },
)
DELIVERIES: Final[Columns] = {
    ">DELIVERY": "id",
    "TYPE": "type",
    "SUBJECT": "subject",
    "STATE": "state",
    ">ATTEMPTS": "attempts",
    "CREATED": lambda delivery: utc(delivery.at),
    "DUE OR ENDED": lambda delivery: terminal.age(
        (delivery.ended_at or delivery.at) if delivery.due_at is None else delivery.due_at
    ),
    "LAST RESPONSE": lambda delivery: delivery.error or delivery.status,
}


def deliveries(page: responses.DeliveryPage) -> None:
    terminal.table(DELIVERIES, page.deliveries, empty="No deliveries.")
    if page.next_cursor is not None:
        terminal.say(f"There are more: --cursor {page.next_cursor} continues, --all lists all.")


def clock(view: responses.ClockView) -> None:
    terminal.pairs([("daemon's time", utc(view.now)), ("suspect", view.suspect), ("", view.message)])
