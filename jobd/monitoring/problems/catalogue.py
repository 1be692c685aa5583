"""The catalogue: every condition, once."""

from __future__ import annotations

from typing import Final

from jobd.monitoring.problems import cluster, daemon, queues_and_kinds, schedules, workers
from jobd.monitoring.problems.condition import Condition

CONDITIONS: Final = (
    Condition("stalled_jobs", "notice", daemon.stalled_jobs, alert="stalled_jobs"),
    Condition("processing_jobs", "notice", daemon.processing_jobs, alert="processing_jobs"),
    Condition("average_processing", "notice", daemon.average_processing, "ms", alert="average_processing"),
    Condition("cleanup_issues", "warning", daemon.cleanup_issues, alert="cleanup_issues"),
    Condition("granted_twice", "critical", daemon.granted_twice, alert="granted_twice"),
    Condition("slow_kind", "warning", queues_and_kinds.slow_kinds, "percent", alert="slower_than_usual"),
    Condition("damaged", "warning", daemon.damaged, alert="database"),
    Condition("database", "critical", daemon.database, alert="database"),
    Condition("cache", "critical", daemon.cache, alert="cache"),
    Condition("storage", "warning", daemon.storage, alert="storage"),
    Condition("webhook", "warning", daemon.webhooks, "ms", alert="webhook_failing"),
    Condition(
        "no_workers",
        "critical",
        queues_and_kinds.no_workers,
        "ms",
        alert="queue_without_workers",
        hides=("waits", "backlog_grows"),
        of_pairs=True,
    ),
    Condition("waits", "warning", queues_and_kinds.waits, "ms", alert="queue_waits", of_pairs=True),
    Condition("backlog_grows", "warning", queues_and_kinds.backlog_grows, of_pairs=True),
    Condition(
        "failing",
        "warning",
        queues_and_kinds.failing,
        "percent",
        alert="failure_rate",
        hides=("retry_backlog",),
        of_pairs=True,
    ),
    Condition("retry_backlog", "warning", queues_and_kinds.retry_backlog, of_pairs=True),
    Condition("disk", "warning", daemon.disk, "percent", alert="disk_nearly_full", per=1, hides=("database",)),
    Condition("release_loop", "warning", workers.release_loops, alert="release_loop"),
    Condition("expiring", "warning", queues_and_kinds.expiring, "percent", of_pairs=True),
    Condition("due_far", "warning", queues_and_kinds.due_far, of_pairs=True),
    Condition("no_progress", "warning", workers.no_progress, "ms"),
    Condition("kills_workers", "warning", workers.kills_workers),
    Condition("workers_die", "warning", workers.workers_die, "percent", hides=("worker_silent", "stalled_jobs")),
    Condition("worker_silent", "warning", workers.silent_workers, hides=("stalled_jobs",)),
    Condition("paused_without_reason", "notice", daemon.paused_without_reason, of_pairs=True),
    Condition("quiet_long", "notice", workers.quiet_long, of_pairs=True),
    Condition("schedule_skipping", "warning", schedules.skipping),
    Condition("schedule_missed", "warning", schedules.missed),
    Condition("rejecting", "warning", daemon.rejecting),
    Condition("clock", "warning", daemon.clock, "ms"),
    Condition("standby_behind", "warning", cluster.standby_behind, "ms", alert="standby_behind", of_cluster=True),
    Condition(
        "no_standby", "warning", cluster.no_standby, alert="no_standby", hides=("standby_behind",), of_cluster=True
    ),
    Condition(
        "journal_not_synchronous", "critical", cluster.not_synchronous, alert="journal_not_synchronous", of_cluster=True
    ),
    Condition("two_primaries", "critical", cluster.two_primaries, alert="two_primaries", of_cluster=True),
    Condition("database_horizon", "warning", cluster.database_horizon, "ms", alert="database_horizon", of_cluster=True),
    Condition("clocks_differ", "warning", cluster.clocks_differ, "ms", alert="clocks_differ", of_cluster=True),
)
ALERT_OF: Final = {each.name: each.alert for each in CONDITIONS}
# Of two conditions with the same alert, the latter defines it.
ALERTS: Final = {each.alert: each for each in CONDITIONS if each.alert}
