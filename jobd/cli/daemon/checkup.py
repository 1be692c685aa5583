"""The checks of `jobd doctor --running`, which reads a running daemon over its admin API and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from jobd.cli import terminal
from jobd.cli.progress import bar
from jobd.model.job import DAY_MS
from jobd.model.sizes import byte_size
from jobd.model.times import duration, utc
from jobd.storage.offline.doctor import Defect

if TYPE_CHECKING:
    from jobd.client import AdminClient

OVERDUE_MS: Final = 15 * 60 * 1000  # three cleanup runs at the default interval
MAX_QUEUES: Final = 10  # with a finding of their own
_MIB: Final = 1 << 20


def examine(client: AdminClient) -> list[Defect]:
    """Return every problem of the daemon. Raises JobdError if it does not respond."""
    return [
        *_health(client),
        *_clock(client),
        *_quarantine(client),
        *_cleanup(client),
        *_jobs(client),
        *_webhooks(client),
        *_metrics(client.metrics()),
        *_problems(client),
    ]


_PART_FIXES: Final = {
    "database": "do what the message says; the daemon's log has more. To check all rows without a stop: add --rows",
    "journal": "check PostgreSQL and its standbys, then: jobctl cluster",
    "cache": "memory and disk differ: read the log, then restart jobd, which loads everything again",
    "storage": "check the store that [artifacts] url names, its permissions and its free space",
}


def _health(client: AdminClient) -> Iterator[Defect]:
    view = client.health()
    parts = {"database": view.database, "journal": view.journal, "cache": view.cache, "storage": view.storage}
    for name, part in parts.items():
        if part and part.status != "healthy":
            yield Defect(name, f"{part.status}: {part.message}", _PART_FIXES[name])


def _clock(client: AdminClient) -> Iterator[Defect]:
    clock = client.clock()
    if clock.suspect:
        fix = "if this time is right: jobctl clock accept; if not, set the clock"
        yield Defect("clock", f"{clock.message} The daemon's time is {utc(clock.now)}.", fix)


def _quarantine(client: AdminClient) -> Iterator[Defect]:
    for job in client.quarantine():
        yield Defect(f"job {job.id}", f"in quarantine: {job.reason}", _accept(job.id))


def _cleanup(client: AdminClient) -> Iterator[Defect]:
    state = client.cleanup_state()
    since_ms = state.time_since_last_cleanup
    if since_ms is not None and since_ms > OVERDUE_MS and not state.cleanup_running:
        what = f"the last successful cleanup run was {duration(since_ms)} ago"
        yield Defect("cleanup", what, "read the reason in the log, then run: jobctl cleanup")
    report = state.last_report
    if report is None:
        return
    for error in report.errors:
        yield Defect("cleanup", f"a step of the last run failed: {error}", "fix its cause, then run: jobctl cleanup")
    left = report.validation_issues_found - report.validation_issues_fixed
    if left > 0:
        fix = "the log names the jobs; check with jobctl validate ID, fix with jobctl transition or retry"
        yield Defect("validation", f"the last cleanup run found {left} issues without a safe fix", fix)


def _jobs(client: AdminClient) -> Iterator[Defect]:
    stalled = client.stats().stuck_jobs
    if stalled:
        fix = "recovery acts within seconds; if they remain: jobctl recover-stuck, and check their workers"
        yield Defect("jobs", f"{stalled} stalled now", fix)


def _webhooks(client: AdminClient) -> Iterator[Defect]:
    since = client.clock().now - DAY_MS
    for webhook in client.webhooks():
        where = f"webhook {webhook.name}"
        if webhook.failing_since is not None:
            what = (
                f"has accepted no message since {terminal.when(webhook.failing_since)}; {webhook.waiting} are waiting"
            )
            fix = f"fix its receiver or its url, then: jobctl webhooks test {webhook.name}"
            yield Defect(where, f"{what}: {webhook.last_error or 'not tried since the start'}", fix)
        for lost in client.deliveries(webhook.name, state="dead-lettered", limit=1).deliveries:
            if (lost.ended_at or lost.at) > since:
                last = f"the last one {terminal.when(lost.ended_at)}: {lost.error or 'never tried'}"
                what = f"messages were dead-lettered; {last}"
                yield Defect(where, what, f"resend them: jobctl webhooks resend {webhook.name} --state dead-lettered")


class Threshold(Struct, frozen=True):
    """A metric that is a problem above `bound`, or below it if `is_least`.

    The Prometheus rule `rule` has the same bound, but fires only after some time.
    """

    rule: str
    metric: str
    bound: float
    where: str
    describe: Callable[[float], str]
    fix: str
    is_least: bool = False

    def is_exceeded(self, value: float) -> bool:
        return value < self.bound if self.is_least else value > self.bound


THRESHOLDS: Final = (
    Threshold(
        "JobdDiskFilling",
        "jobd_disk_free_bytes",
        256 * _MIB,
        "disk",
        lambda value: f"only {byte_size(int(value))} is free on the disk of the store",
        "free disk space, or shorten [retention]; when the disk is full, new jobs are rejected",
        is_least=True,
    ),
    Threshold(
        "JobdWalGrows",
        "jobd_wal_bytes",
        256 * _MIB,
        "write-ahead log",
        lambda value: f"it has grown to {byte_size(int(value))}",
        "is a backup running? The log shows when it started: journalctl -u jobd --grep backup_started",
    ),
    Threshold(
        "JobdLoopLag",
        "jobd_loop_lag_seconds",
        0.5,
        "event loop",
        lambda value: f"it was blocked for {value:.1f} s within the last 20 s",
        "the machine lacks CPU or memory, or swaps; SIGUSR1 writes the stacks to the log",
    ),
    Threshold(
        "JobdMailboxFilling",
        "jobd_mailbox_commands",
        0.5,
        "mailbox",
        lambda value: f"it is {value:.0%} full",
        "commands arrive faster than they are committed: check the disk, and which clients send so many",
    ),
    Threshold(
        "JobdArtifactsBehind",
        "jobd_artifact_sweep_behind_seconds",
        900,
        "artifacts",
        lambda value: f"deletion of artifacts is {duration(value * 1000)} behind",
        "check the store that artifacts.url names, and the log: journalctl -u jobd --grep artifact",
    ),
    Threshold(
        "JobdWorkWaitsLong",
        "jobd_queue_oldest_due_seconds",
        3600,
        "queue",
        lambda value: f"a job has been due for {duration(value * 1000)}",
        "does a worker claim this queue, and all its kinds? jobctl workers, jobctl why ID",
    ),
)


def _metrics(text: str) -> Iterator[Defect]:
    from prometheus_client.parser import text_string_to_metric_families

    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    values = {sample.name: sample.value for sample in samples if not sample.labels}
    paused = {each.labels["queue"] for each in samples if each.name == "jobd_queue_paused" and each.value}
    for threshold in THRESHOLDS:
        if threshold.where == "queue":
            due_s = [(each.value, each.labels["queue"]) for each in samples if each.name == threshold.metric]
            due_s = [(value, name) for value, name in due_s if threshold.is_exceeded(value) and name not in paused]
            exceeded = sorted(due_s, reverse=True)
            for value, name in exceeded[:MAX_QUEUES]:
                yield Defect(f"queue {name}", threshold.describe(value), threshold.fix)
            if len(exceeded) > MAX_QUEUES:
                what = f"the same is true of {len(exceeded) - MAX_QUEUES} more queues"
                yield Defect("queues", what, threshold.fix)
        elif threshold.metric in values:
            unit = values["jobd_mailbox_limit_commands"] if threshold.rule == "JobdMailboxFilling" else 1
            value = values[threshold.metric] / unit
            if threshold.is_exceeded(value):
                yield Defect(threshold.where, threshold.describe(value), threshold.fix)


def _problems(client: AdminClient) -> Iterator[Defect]:
    for each in client.problems().problems:
        what = f"{each.severity}, since {terminal.when(each.since)}: {each.title}"
        fix = next((cure.command for cure in each.cure if cure.command), "jobctl status")
        yield Defect(each.id, what, f"{each.cause} {fix}".strip())


def check_rows(client: AdminClient) -> list[Defect]:
    """Return every damaged row, for `--rows`. This takes minutes for millions of rows."""
    found: list[Defect] = []
    done, table, cursor = 0, "", None
    jobs = client.stats().total_jobs
    with bar("rows", unit="rows") as advance:
        while True:
            seen = client.check_rows(cursor)
            done = seen.checked + (done if seen.table == table else 0)
            table = seen.table
            advance(done, max(jobs, done) if table == "jobs" else None, f"checking {table}")
            found += [Defect(each.where, each.what, _row_fix(each.where)) for each in seen.damaged]
            cursor = seen.next_cursor
            if cursor is None:
                return found


def _row_fix(where: str) -> str:
    kind, _, name = where.partition(" ")
    if kind == "job":
        return _accept(name)
    return "the row is not used; check the disk, then stop jobd and check the database: jobd doctor"


def _accept(job_id: str) -> str:
    return f"restore a backup, or stop jobd, correct the row and accept it: jobd doctor --accept {job_id}"
