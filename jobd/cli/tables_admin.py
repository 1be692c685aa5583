"""Print responses about the daemon on stdout, one function for each kind of response."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final

from jobd.cli import tables, terminal
from jobd.model.times import duration, utc

if TYPE_CHECKING:
    from jobd.model.commands import About, WorkerState
    from jobd.model.responses import (
        AlertView,
        AuditView,
        CleanupReport,
        CleanupState,
        ClockView,
        DeliveryPage,
        FailuresView,
        HealthView,
        LateResultView,
        LockedJob,
        PreviewView,
        QueueView,
        RecoverStuckView,
        StatsView,
        TakeBackView,
        WebhookView,
        WorkerList,
        WorkerView,
    )

MAX_NAMES: Final = 4  # queues or kinds of a worker


def queues(views: Sequence[QueueView]) -> None:
    """Show queues in a table. If one is paused, a column describes the pauses."""
    is_described = any(queue.paused for queue in views)
    rows = [
        (
            queue.name,
            "paused" if queue.paused else "open",
            queue.queued,
            queue.processing,
            queue.completed,
            queue.failed,
            queue.cancelled,
            terminal.age(queue.oldest_due_at) if queue.oldest_due_at is not None else None,
            *([queue.pause.describe() if queue.paused else None] if is_described else ()),
        )
        for queue in views
    ]
    columns = ["QUEUE", "STATE", ">QUEUED", ">PROCESSING", ">COMPLETED", ">FAILED", ">CANCELLED", "OLDEST DUE"]
    if is_described:
        columns.append("PAUSED")
    terminal.table(columns, rows, empty="No queues: no job has been submitted yet.")


def workers(views: Sequence[WorkerView], page: WorkerList, state: WorkerState | None) -> None:
    """Show workers in a table. `page` is the last page: its counts and `since` cover all workers."""
    rows = [
        (
            worker.worker,
            worker.state,
            worker.held,
            terminal.age(worker.last_seen_at),
            claims(worker),
            about(worker.about),
            _held(worker),
        )
        for worker in views
    ]
    since = f"since the start at {utc(page.since)}"
    empty = f"No worker has been seen recently, {since}." if state is None else f"No worker is {state}."
    terminal.table(["WORKER", "STATE", ">HOLDS", "LAST SEEN", "CLAIMS", "ABOUT", "JOBS"], rows, empty=empty)
    gone = page.by_state["gone"]
    if gone and state is None:
        terminal.say(f"{gone} more {'is' if gone == 1 else 'are'} gone: jobctl workers --state gone")


def claims(worker: WorkerView) -> str | None:
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


def take_back(view: TakeBackView, print_line: Callable[[str], None], *, would: bool) -> None:
    """Print the effect of a take-back on each job. `would`: nothing has changed yet."""
    done = {"reset": "requeued", "failed": "failed"}
    planned = {"reset": "would be requeued", "failed": "would fail"}
    for each in view.details:
        print_line(f"{each.job_id}: {(planned if would else done)[each.action]}: {each.reason}")
    jobs = "1 job" if view.recovered_jobs == 1 else f"{view.recovered_jobs} jobs"
    how = f"{view.reset_jobs} requeued, {view.failed_jobs} failed{'; there are more' if view.more else ''}"
    print_line(f"{'would take' if would else 'took'} back {jobs} of {view.worker}: {how}")


def _held(worker: WorkerView) -> str:
    more = worker.held - len(worker.jobs)
    return " ".join([*worker.jobs, f"and {more} more"] if more else worker.jobs)


def stats(view: StatsView) -> None:
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


def _cleanup(running: bool, since_ms: int | None) -> str:
    last = "no run has succeeded yet" if since_ms is None else f"last successful run {duration(since_ms)} ago"
    return f"{last}, one is running now" if running else last


def health(view: HealthView) -> None:
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
        free, total = terminal.size(database.free_bytes), terminal.size(database.total_bytes)
        rows.insert(1, ("disk", "-", f"{free} free of {total} ({database.path})"))
    terminal.table(["PART", "STATUS", "MESSAGE"], rows)


def report(view: CleanupReport) -> None:
    terminal.pairs(
        [
            ("at", terminal.when(view.timestamp)),
            ("stalled jobs recovered", view.stuck_jobs_recovered),
            ("expired locks cleared", view.expired_locks_cleared),
            ("expired jobs deleted", view.expired_jobs_deleted),
            ("issues found", view.validation_issues_found),
            ("issues fixed", view.validation_issues_fixed),
            ("took", duration(view.total_processing_time)),
            ("errors", "; ".join(view.errors) or "none"),
        ]
    )


def cleanup_state(view: CleanupState) -> None:
    terminal.emit(_cleanup(view.cleanup_running, view.time_since_last_cleanup))
    if view.last_failure is not None:
        runs = "1 run has" if view.failed_since_last_success == 1 else f"{view.failed_since_last_success} runs have"
        terminal.emit(f"{runs} failed since then, the last one {terminal.age(view.last_failure.timestamp)}")
    if view.last_report is not None:
        report(view.last_report)


def reports(views: Sequence[CleanupReport]) -> None:
    columns = ["AT", ">RECOVERED", ">LOCKS", ">DELETED", ">FOUND", ">FIXED", ">TOOK", "FORCED", "ERRORS"]
    rows = [
        (
            terminal.when(view.timestamp),
            view.stuck_jobs_recovered,
            view.expired_locks_cleared,
            view.expired_jobs_deleted,
            view.validation_issues_found,
            view.validation_issues_fixed,
            duration(view.total_processing_time),
            view.forced,
            "; ".join(view.errors),
        )
        for view in views
    ]
    terminal.table(columns, rows, empty="Cleanup has not run yet.")


def recovered(view: RecoverStuckView) -> None:
    terminal.emit(f"{view.recovered_jobs} recovered: {view.reset_jobs} requeued, {view.failed_jobs} failed")
    if view.details:
        terminal.table(["JOB", "ACTION", "REASON"], [(item.job_id, item.action, item.reason) for item in view.details])


def failures(view: FailuresView) -> None:
    rows = [
        (
            group.count,
            group.older_than_day,
            group.retrying,
            group.fingerprint,
            group.error_code,
            terminal.age(group.last_at),
            " ".join(kind or "-" for kind in group.kinds),
            " ".join(group.queues),
            terminal.one_line(group.message),
        )
        for group in view.groups
    ]
    columns = [">FAILED", ">OVER A DAY AGO", ">RETRYING", "ERROR", "CODE", "LAST", "KINDS", "QUEUES", "LATEST MESSAGE"]
    terminal.table(columns, rows, empty="No job has failed.")
    if view.other:
        terminal.say(f"{view.other} of {view.total} failed jobs are not in these groups.")
    if view.other_retrying:
        terminal.say(f"{view.other_retrying} of {view.retrying} jobs that wait for a retry are not in these groups.")
    if not view.whole:
        terminal.say("Jobs from before the start of the daemon are still being counted.")


def planned_recoveries(view: PreviewView) -> None:
    """Print what recovery would do."""
    terminal.emit(f"{len(view.recover)} would be recovered")
    if view.recover:
        terminal.table(
            ["JOB", "WOULD BE", "REASON"], [(item.job_id, item.action, item.reason) for item in view.recover]
        )


def preview(view: PreviewView) -> None:
    """Print what cleanup would do."""
    planned_recoveries(view)
    terminal.pairs(
        [
            ("expired locks to clear", view.expired_locks),
            ("queued jobs to expire", _named(view.expired_jobs)),
            ("finished jobs to delete", _named(view.deleted_jobs)),
            ("jobs with issues", _named(view.mended_jobs)),
            *([("", "there are too many jobs to check all of them for issues")] if view.more_mended else []),
            *([("", "there are more: only the first of each kind are counted")] if view.more else []),
            *([("kept while the clock is suspect", held_count(view))] if view.held_jobs else []),
        ]
    )


def held_count(view: PreviewView) -> str:
    """Return the number and some ids of the jobs that would be deleted by age if the clock were accepted."""
    return ("more than " if view.more_held else "") + _named(view.held_jobs)


def _named(ids: Sequence[str]) -> str:
    shown = " ".join(ids[:5]) + (" …" if len(ids) > 5 else "")
    return f"{len(ids)}: {shown}" if ids else "0"


def locks(views: Sequence[LockedJob]) -> None:
    rows = [
        (
            lock.id,
            lock.worker if lock.live else f"{lock.worker} (silent)",
            "live" if lock.live else "expired",
            terminal.age(lock.expires_at),
            terminal.age(lock.stalled_at),
            terminal.age(lock.progress_due_at) if lock.progress_due_at is not None else "none",
            lock.progress,
            lock.fencing_token,
        )
        for lock in views
    ]
    columns = ["JOB", "WORKER", "LOCK", "EXPIRES", "STALLS", "PROGRESS TIMEOUT", ">%", ">TOKEN"]
    terminal.table(columns, rows, empty="No locks.")


def late_results(views: Sequence[LateResultView]) -> None:
    rows = [
        (
            late.seq,
            utc(late.at),
            late.worker,
            late.fencing_token,
            " ".join(filter(None, (late.download_url, late.file_path, late.storage_key))),
            tables.json_text(late.metadata),
        )
        for late in views
    ]
    columns = [">RESULT", "TIME", "WORKER", ">TOKEN", "LOCATION", "METADATA"]
    terminal.table(columns, rows, empty="No late results.")
    for late in views:
        if late.rejection is not None:
            terminal.emit(late.rejection.message)


def audit(views: Sequence[AuditView]) -> None:
    rows = [
        (
            utc(entry.at),
            entry.who,
            entry.address,
            entry.what,
            _target(entry),
            _outcome(entry),
            terminal.clip(entry.reason) if entry.reason else None,
        )
        for entry in views
    ]
    columns = ["TIME", "WHO", "FROM", "ACTION", "TARGET", "OUTCOME", "REASON"]
    terminal.table(columns, rows, empty="No matching entries.")


def _target(entry: AuditView) -> str | None:
    """Return the target of an action: a job, queue or webhook, else the number of jobs."""
    if entry.job_id or entry.queue:
        return entry.job_id or f"queue {entry.queue}"
    if webhook := entry.details.get("webhook"):
        delivery = entry.details.get("delivery")
        return f"webhook {webhook}" if delivery is None else f"webhook {webhook}, delivery {delivery}"
    return "1 job" if entry.changed == 1 else f"{entry.changed} jobs" if entry.changed else None


def _outcome(entry: AuditView) -> str:
    before, after = entry.details.get("from"), entry.details.get("to")
    if times := entry.details.get("times"):
        return f"{entry.outcome}, {times} times"
    if undone := (entry.details.get("changed_meanwhile") or 0) + (entry.details.get("rejected") or 0):
        return f"{entry.outcome}, {undone} not changed"
    if entry.outcome != "done" or before is None:
        return entry.outcome
    return f"{before} → {after}" if after else f"{before} → deleted"


def alerts(views: Sequence[AlertView], *, firing: bool = False) -> None:
    rows = [
        (
            alert.name,
            alert.severity,
            "firing" if alert.firing else "quiet",
            terminal.when(alert.since),
            round(alert.value, 2),
            round(alert.threshold, 2),
            alert.hint,
        )
        for alert in views
    ]
    empty = "No alert is firing." if firing else "No alerts are defined."
    terminal.table(["ALERT", "SEVERITY", "STATE", "SINCE", ">VALUE", ">THRESHOLD", "HINT"], rows, empty=empty)


def _state(view: WebhookView) -> str:
    """Return the state as the dashboard shows it."""
    if view.state == "closed":
        return "failing" if view.failing_since is not None else "healthy"
    return {"starting": "starting", "open": "paused after errors", "half_open": "retrying one message"}[view.state]


def webhooks(views: Sequence[WebhookView]) -> None:
    rows = [
        (
            view.name,
            view.url,
            _state(view),
            terminal.age(view.next_try_at) if view.next_try_at is not None else "-",
            view.waiting,
            view.lag,
            view.delivered,
            view.dead_lettered,
            terminal.age(view.last_success_at) if view.last_success_at is not None else "-",
            view.last_error or "-",
        )
        for view in views
    ]
    columns = ["WEBHOOK", "URL", "STATE", "NEXT ATTEMPT", ">WAITING", ">LAG", ">DELIVERED", ">DEAD-LETTERED"]
    columns += ["LAST SUCCESS", "LAST ERROR"]
    terminal.table(columns, rows, empty="No webhook is configured.")


def deliveries(page: DeliveryPage) -> None:
    rows = [
        (
            each.id,
            each.type,
            each.subject,
            "dead-lettered" if each.state == "dead-lettered" else each.state,
            each.tries,
            utc(each.at),
            terminal.age(each.due_at) if each.due_at is not None else terminal.age(each.ended_at or each.at),
            each.error or each.status or "-",
        )
        for each in page.deliveries
    ]
    columns = [">DELIVERY", "TYPE", "SUBJECT", "STATE", ">ATTEMPTS", "CREATED", "DUE OR ENDED", "LAST RESPONSE"]
    terminal.table(columns, rows, empty="No deliveries.")
    if page.next_cursor is not None:
        terminal.say(f"There are more: --cursor {page.next_cursor} continues, --all lists all.")


def clock(view: ClockView) -> None:
    terminal.pairs([("daemon's time", utc(view.now)), ("suspect", view.suspect), ("", view.message)])
