"""What `jobd doctor --running` looks at: a running daemon, over its admin API. Every problem with its mend.

Changes nothing. The check of a database that nobody has open is doctor.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from jobd.cli import terminal
from jobd.model.job import DAY_MS

if TYPE_CHECKING:
    from jobd.client import AdminClient

# Passes run every 5 minutes unless the configuration says otherwise; three of them missing is no accident.
OVERDUE_MS: Final = 15 * 60 * 1000


MOST_NAMED: Final = 10  # of queues in which work waits
_MIB: Final = 1 << 20


class Finding(Struct, frozen=True):
    """A problem: where, what, and what to do about it."""

    where: str
    what: str
    mend: str


def examine(client: AdminClient) -> list[Finding]:
    """Everything that is wrong with the daemon. Raises JobdError where it cannot be asked."""
    return [
        *_health(client),
        *_clock(client),
        *_quarantine(client),
        *_cleanup(client),
        *_jobs(client),
        *_webhooks(client),
        *_figures(client.metrics()),
        *_alerts(client),
    ]


_PART_MENDS: Final = {
    "database": "look at the daemon's log; free disk space if it is full, else stop jobd and run: jobd doctor",
    "cache": "memory and disk differ: look at the log, then restart jobd, which reads everything anew",
    "storage": "check the place that [artifacts] url names, its rights and its free space",
}


def _health(client: AdminClient) -> Iterator[Finding]:
    view = client.health()
    for name, part in (("database", view.database), ("cache", view.cache), ("storage", view.storage)):
        if part.status != "healthy":
            yield Finding(name, f"{part.status}: {part.message}", _PART_MENDS[name])


def _clock(client: AdminClient) -> Iterator[Finding]:
    clock = client.clock()
    if clock.suspect:
        mend = "if this time is right: jobctl clock accept; if not, set the clock"
        yield Finding("clock", f"{clock.message} The daemon's time is {terminal.instant(clock.now)}.", mend)


def _quarantine(client: AdminClient) -> Iterator[Finding]:
    for job in client.quarantine():
        mend = f"restore a backup, or stop jobd, correct the row and take it as it is: jobd doctor --accept {job.id}"
        yield Finding(f"job {job.id}", f"in quarantine: {job.reason}", mend)


def _cleanup(client: AdminClient) -> Iterator[Finding]:
    state = client.cleanup_state()
    since_ms = state.time_since_last_cleanup
    if since_ms is not None and since_ms > OVERDUE_MS and not state.cleanup_running:
        what = f"the last successful pass was {terminal.span(since_ms)} ago"
        yield Finding("cleanup", what, "look at the log for the reason, then run: jobctl cleanup")
    report = state.last_report
    if report is None:
        return
    for error in report.errors:
        yield Finding("cleanup", f"a step of the last pass failed: {error}", "mend its cause, then run: jobctl cleanup")
    left = report.validation_issues_found - report.validation_issues_fixed
    if left > 0:
        mend = "the log names the jobs; look with jobctl validate ID, mend with jobctl transition or force-reset"
        yield Finding("validation", f"the last pass found {left} issues without a safe fix", mend)


def _jobs(client: AdminClient) -> Iterator[Finding]:
    stuck = client.stats().stuck_jobs
    if stuck:
        mend = "recovery acts within seconds; if they stay: jobctl recover-stuck, and look at their workers"
        yield Finding("jobs", f"{stuck} stuck now", mend)


def _webhooks(client: AdminClient) -> Iterator[Finding]:
    since = client.clock().now - DAY_MS
    for webhook in client.webhooks():
        where = f"webhook {webhook.name}"
        if webhook.failing_since is not None:
            what = f"takes nothing since {terminal.when(webhook.failing_since)}, {webhook.waiting} messages wait"
            mend = f"mend its receiver, or its url, then: jobctl webhooks test {webhook.name}"
            yield Finding(where, f"{what}: {webhook.last_error or 'not tried since the start'}", mend)
        for lost in client.deliveries(webhook.name, state="given_up", limit=1).deliveries:
            if (lost.ended_at or lost.at) > since:
                what = f"messages were given up, the latest {terminal.when(lost.ended_at)}: {lost.error or 'untried'}"
                yield Finding(where, what, f"send them again: jobctl webhooks resend {webhook.name} --state given_up")


class Threshold(Struct, frozen=True):
    """A figure that is compared with a bound, as the `rule` of the same name for Prometheus does it, but at once.

    It is a problem above `bound`, or below it where `is_least`. `said` puts it into words.
    """

    rule: str
    metric: str
    bound: float
    where: str
    said: Callable[[float], str]
    mend: str
    is_least: bool = False

    def is_passed(self, value: float) -> bool:
        return value < self.bound if self.is_least else value > self.bound


THRESHOLDS: Final = (
    Threshold(
        "JobdDiskFilling",
        "jobd_disk_free_bytes",
        256 * _MIB,
        "disk",
        lambda value: f"only {terminal.size(int(value))} are left on the disk of the store",
        "free some, or shorten [retention]: when it is full new jobs are refused",
        is_least=True,
    ),
    Threshold(
        "JobdWalGrows",
        "jobd_wal_bytes",
        256 * _MIB,
        "write-ahead log",
        lambda value: f"it has grown to {terminal.size(int(value))}",
        "is a backup under way? The log says when one began: journalctl -u jobd --grep backup_started",
    ),
    Threshold(
        "JobdLoopLag",
        "jobd_loop_lag_seconds",
        0.5,
        "event loop",
        lambda value: f"it was {value:.1f} s late within the last 20 s",
        "the machine is starved (CPU, memory, swap); SIGUSR1 writes the stacks to the log",
    ),
    Threshold(
        "JobdMailboxFilling",
        "jobd_mailbox_commands",
        0.5,
        "mailbox",
        lambda value: f"it is {value:.0%} full",
        "commands come faster than they are committed: look at the disk, and at who sends so much",
    ),
    Threshold(
        "JobdArtifactsBehind",
        "jobd_artifact_sweep_behind_seconds",
        900,
        "artifacts",
        lambda value: (
            f"stored objects of deleted jobs are still there, {terminal.span(int(value * 1000))} after they could go"
        ),
        "look at the store of artifacts.url, and at what the log says: journalctl -u jobd --grep artifact",
    ),
    Threshold(
        "JobdWorkWaitsLong",
        "jobd_queue_oldest_due_seconds",
        3600,
        "queue",
        lambda value: f"a job has been due for {terminal.span(int(value * 1000))}",
        "does any worker ask for this queue, and for all its kinds? jobctl workers, jobctl why ID",
    ),
)


def _figures(text: str) -> Iterator[Finding]:
    """The daemon's metrics against the thresholds of the shipped rules."""
    from prometheus_client.parser import text_string_to_metric_families

    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    alone = {sample.name: sample.value for sample in samples if not sample.labels}
    paused = {each.labels["queue"] for each in samples if each.name == "jobd_queue_paused" and each.value}
    for threshold in THRESHOLDS:
        if threshold.where == "queue":
            waits = {
                each.labels["queue"]: each.value
                for each in samples
                if each.name == threshold.metric and each.labels["queue"] not in paused
            }
            passed = sorted((value, name) for name, value in waits.items() if threshold.is_passed(value))[::-1]
            for value, name in passed[:MOST_NAMED]:
                yield Finding(f"queue {name}", threshold.said(value), threshold.mend)
            if len(passed) > MOST_NAMED:
                yield Finding("queues", f"in {len(passed) - MOST_NAMED} more work waits as long", threshold.mend)
        elif threshold.metric in alone:
            whole = alone["jobd_mailbox_limit_commands"] if threshold.rule == "JobdMailboxFilling" else 1
            figure = alone[threshold.metric] / whole
            if threshold.is_passed(figure):
                yield Finding(threshold.where, threshold.said(figure), threshold.mend)


def _alerts(client: AdminClient) -> Iterator[Finding]:
    for alert in client.alerts():
        if alert.firing:
            since = terminal.when(alert.since)
            what = f"{alert.severity}, firing since {since}: {alert.value:g}, threshold {alert.threshold:g}"
            yield Finding(f"alert {alert.name}", what, alert.hint)
