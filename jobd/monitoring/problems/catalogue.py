"""The catalogue: every condition, once."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import Final

from jobd.monitoring.problems import cluster, daemon, workers
from jobd.monitoring.problems import queues_and_kinds as pairs
from jobd.monitoring.problems.condition import Condition, DuePair, Scene


def due(scene: Scene) -> Iterable[DuePair]:
    return scene.due.values()


_RECENT: Final = attrgetter("recent")
_FIRST: Final = (
    Condition("stalled_jobs", "notice", daemon.stalled_jobs, alert="stalled_jobs"),
    Condition("processing_jobs", "notice", daemon.processing_jobs, alert="processing_jobs"),
    Condition("average_processing", "notice", daemon.average_processing, unit="ms", alert="average_processing"),
    Condition("cleanup_issues", "warning", daemon.cleanup_issues, alert="cleanup_issues"),
    Condition("granted_twice", "critical", daemon.granted_twice, alert="granted_twice"),
    Condition("slow_kind", "warning", pairs.slow_kind, pairs.durations, "percent", "slower_than_usual"),
    Condition("damaged", "warning", daemon.damaged, alert="database"),
    Condition("database", "critical", daemon.database, alert="database"),
    Condition("cache", "critical", daemon.cache, alert="cache"),
    Condition("storage", "warning", daemon.storage, alert="storage"),
    Condition("webhook", "warning", daemon.webhook, lambda scene: scene.failing_webhooks(), "ms", "webhook_failing"),
)
# These read all queues and kinds, and are evaluated less often if they are many.
OF_PAIRS: Final = (
    Condition(
        "no_workers",
        "critical",
        pairs.no_workers,
        due,
        "ms",
        "queue_without_workers",
        hides=("waits", "backlog_grows"),
    ),
    Condition("waits", "warning", pairs.waits, due, "ms", "queue_waits"),
    Condition("backlog_grows", "warning", pairs.backlog_grows, due),
    Condition("failing", "warning", pairs.failing, _RECENT, "percent", "failure_rate", hides=("retry_backlog",)),
    Condition("retry_backlog", "warning", pairs.retry_backlog, lambda scene: list(scene.state.retrying.items())),
    Condition("expiring", "warning", pairs.expiring, _RECENT, "percent"),
    Condition("due_far", "warning", pairs.due_far, _RECENT),
    Condition("paused_without_reason", "notice", daemon.paused_without_reason, daemon.pauses),
    Condition("quiet_long", "notice", workers.quiet_long, lambda scene: scene.state.presence.remembered()),
)
_OTHERS: Final = (
    Condition("disk", "warning", daemon.disk, unit="percent", alert="disk_nearly_full", hides=("database",)),
    Condition("release_loop", "warning", workers.release_loop, workers.loops, alert="release_loop"),
    Condition("no_progress", "warning", workers.no_progress, workers.held_long, "ms"),
    Condition("kills_workers", "warning", workers.kills_workers, lambda scene: list(scene.losses.holders.items())),
    Condition(
        "workers_die", "warning", workers.workers_die, workers.dying, "percent", hides=("worker_silent", "stalled_jobs")
    ),
    Condition("worker_silent", "warning", workers.worker_silent, workers.silent, hides=("stalled_jobs",)),
    Condition("schedule_skipping", "warning", daemon.schedule_skipping, daemon.firing),
    Condition("schedule_missed", "warning", daemon.schedule_missed, daemon.firing),
    Condition("rejecting", "warning", daemon.rejecting, lambda scene: daemon.REJECTED),
    Condition("clock", "warning", daemon.clock, unit="ms"),
)
OF_CLUSTER: Final = (
    Condition("standby_behind", "warning", cluster.standby_behind, cluster.nodes, "ms", "standby_behind"),
    Condition("no_standby", "warning", cluster.no_standby, alert="no_standby", hides=("standby_behind",)),
    Condition("journal_not_synchronous", "critical", cluster.not_synchronous, alert="journal_not_synchronous"),
    Condition("two_primaries", "critical", cluster.two_primaries, alert="two_primaries"),
    Condition("database_horizon", "warning", cluster.database_horizon, unit="ms", alert="database_horizon"),
    Condition("clocks_differ", "warning", cluster.clocks_differ, cluster.nodes, "ms", "clocks_differ"),
)
CONDITIONS: Final = (*_FIRST, *OF_PAIRS, *_OTHERS, *OF_CLUSTER)  # in the order of the alerts
# An operator explained these, so they need no action.
KNOWN: Final = (
    Condition("paused", "notice", daemon.paused_with_reason, daemon.pauses),
    Condition("quiet", "notice", daemon.quieted, lambda scene: list(scene.state.quiet.values())),
)
ALERT_OF: Final = {each.name: each.alert for each in CONDITIONS}
# Of two conditions with the same alert, the latter defines it.
ALERTS: Final = {each.alert: each for each in CONDITIONS if each.alert}
