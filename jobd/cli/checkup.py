"""What `jobd doctor --running` looks at: a running daemon, over its admin API. Every problem with its mend.

Changes nothing. The check of a database that nobody has open is doctor.py's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from jobd.cli import show

if TYPE_CHECKING:
    from jobd.client import AdminClient

# Passes run every 5 minutes unless the configuration says otherwise; three of them missing is no accident.
OVERDUE_MS: Final = 15 * 60 * 1000


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
        *_alerts(client),
    ]


_PART_MENDS: Final = {
    "database": "look at the daemon's log; free disk space if it is full, else stop jobd and run: jobd doctor",
    "cache": "memory and disk differ: look at the log, then restart jobd, which reads everything anew",
    "storage": "check the place that [artefacts] url names, its rights and its free space",
}


def _health(client: AdminClient) -> Iterator[Finding]:
    view = client.health()
    for name, part in (("database", view.database), ("cache", view.cache), ("storage", view.storage)):
        if part.status != "healthy":
            yield Finding(name, f"{part.status}: {part.message}", _PART_MENDS[name])


def _clock(client: AdminClient) -> Iterator[Finding]:
    clock = client.clock()
    if clock.suspect:
        mend = "if the time shown is right: jobctl clock accept; else set the clock and restart jobd"
        yield Finding("clock", f"{clock.message} The daemon's time is {show.local(clock.now)}.", mend)


def _quarantine(client: AdminClient) -> Iterator[Finding]:
    for job in client.quarantine():
        mend = f"restore a backup, or stop jobd, correct the row and take it as it is: jobd doctor --accept {job.id}"
        yield Finding(f"job {job.id}", f"in quarantine: {job.reason}", mend)


def _cleanup(client: AdminClient) -> Iterator[Finding]:
    state = client.cleanup_state()
    since_ms = state.time_since_last_cleanup
    if since_ms is not None and since_ms > OVERDUE_MS and not state.cleanup_running:
        what = f"the last pass was {show.span(since_ms)} ago"
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


def _alerts(client: AdminClient) -> Iterator[Finding]:
    for alert in client.alerts():
        if alert.firing:
            what = f"firing since {show.when(alert.since)}: {alert.value:g}, threshold {alert.threshold:g}"
            yield Finding(f"alert {alert.name}", what, alert.hint)
