"""The dashboard for Grafana."""

from __future__ import annotations

import json
from string import ascii_uppercase
from typing import Any, Final

Panel = dict[str, Any]

COLUMNS: Final = 24  # of the grid of a page
SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
# What words in capitals stand for in an expression: what is chosen on the page, and an interval with several scrapes.
_WORDS: Final = {"INSTANCE": 'instance=~"$instance"', "QUEUE": 'queue=~"$queue"', "RATE": "$__rate_interval"}


def dashboard() -> str:
    """Return the JSON that Grafana imports."""
    source = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "refresh": 1}
    variables = [
        {**source, "current": {}},
        _variable("instance", "Daemon", "label_values(jobd_build_info, instance)"),
        _variable("queue", "Queue", "label_values(jobd_queue_jobs{INSTANCE}, queue)"),
    ]
    page = {
        "title": "jobd",
        "uid": "jobd",
        "description": "A running jobd daemon: queues, workers, durations, disk, alerts.",
        "tags": ["jobd", "jobs"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "timezone": "browser",
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": variables},
        "annotations": {"list": []},
        "links": [],
        "panels": _placed(PANELS),
    }
    return json.dumps(page, indent=1)


def _variable(name: str, label: str, query: str) -> dict[str, Any]:
    """Return a choice of the values of a label."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": _expanded(query), "refId": name},
        "definition": _expanded(query),
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _expanded(expression: str) -> str:
    for word, meaning in _WORDS.items():
        expression = expression.replace(word, meaning)
    return expression


def _placed(panels: tuple[Panel, ...]) -> list[Panel]:
    """Place the panels from left to right, then down. Those beside each other have the same height."""
    placed, x, y = [], 0, 0
    for panel in panels:
        size = panel["gridPos"]
        placed.append({**panel, "gridPos": {**size, "x": x, "y": y}})
        x += size["w"]
        if x + size["w"] > COLUMNS:
            x, y = 0, y + size["h"]
    return placed


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of panels. The ids are parts of the URLs of the panels, so they do not change.


def _row(id_: int, title: str) -> Panel:
    size = {"h": 1, "w": COLUMNS}
    return {"id": id_, "type": "row", "title": title, "collapsed": False, "gridPos": size, "panels": []}


def _stat(
    id_: int,
    title: str,
    unit: str,
    description: str,
    expression: str,
    *colours: tuple[float, str],
    lowest: str = "green",
    **more: Any,
) -> Panel:
    """Return a panel with one value, in the colour of the highest number that it reaches."""
    options = {
        "colorMode": "value",
        "graphMode": "none",
        "justifyMode": "auto",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "textMode": "auto",
    }
    field = {"unit": unit, **_thresholds(*colours, lowest=lowest), **more}
    return _graph(id_, "stat", title, description, (3, 4), field, options, {"": expression})


def _lines(
    id_: int,
    title: str,
    unit: str,
    description: str,
    curves: dict[str, str],
    *,
    width: int = 8,
    red: float | None = None,
    stacked: bool = False,
) -> Panel:
    """Return a panel with curves over time, by legend, and a line at `red`."""
    style: dict[str, Any] = {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 40 if stacked else 10}
    style |= {"showPoints": "never", "spanNulls": False}
    field = {"unit": unit, "min": 0, "custom": style}
    if stacked:
        style["stacking"] = {"mode": "normal", "group": "A"}
    if red is not None:
        style["thresholdsStyle"] = {"mode": "line"}
        field |= _thresholds((red, "red"))
    options = {"legend": _legend(shown=True), "tooltip": {"mode": "multi", "sort": "desc"}}
    return _graph(id_, "timeseries", title, description, (width, 8), field, options, curves)


def _states(id_: int, title: str, description: str, curves: dict[str, str]) -> Panel:
    """Return a panel with a bar for each curve, which is red while its value is 1."""
    field = {
        "custom": {"fillOpacity": 80, "lineWidth": 0},
        "mappings": _named({"text": "quiet", "color": "green"}, {"text": "firing", "color": "red"}),
        **_thresholds((1, "red")),
    }
    options = {"mergeValues": True, "showValue": "never", "legend": _legend(shown=False), "tooltip": {"mode": "single"}}
    return _graph(id_, "state-timeline", title, description, (COLUMNS, 7), field, options, curves)


def _graph(
    id_: int,
    kind: str,
    title: str,
    description: str,
    size: tuple[int, int],
    field: dict[str, Any],
    options: dict[str, Any],
    curves: dict[str, str],
) -> Panel:
    targets = [
        {"refId": ref, "datasource": SOURCE, "expr": _expanded(expression), "legendFormat": legend}
        for ref, (legend, expression) in zip(ascii_uppercase, curves.items(), strict=False)
    ]
    return {
        "id": id_,
        "type": kind,
        "title": title,
        "description": description,
        "datasource": SOURCE,
        "gridPos": {"h": size[1], "w": size[0]},
        "fieldConfig": {"defaults": field, "overrides": []},
        "options": options,
        "targets": targets,
    }


def _thresholds(*colours: tuple[float, str], lowest: str = "green") -> dict[str, Any]:
    steps = [(None, lowest), *colours]
    return {"thresholds": {"mode": "absolute", "steps": [{"color": color, "value": value} for value, color in steps]}}


def _named(zero: dict[str, str], one: dict[str, str]) -> list[dict[str, Any]]:
    return [{"type": "value", "options": {"0": zero, "1": one}}]


def _legend(*, shown: bool) -> dict[str, Any]:
    return {"displayMode": "list", "placement": "bottom", "showLegend": shown}


PANELS: Final = (
    _row(1, "Now"),
    _stat(2, "Up", "none", "Whether the daemon responds to Prometheus.",
          'min(up{job="jobd", INSTANCE})', (1, "green"), lowest="red",
          mappings=_named({"text": "down"}, {"text": "up"}), noValue="unknown"),
    _stat(3, "Problems", "none", "Open problems. jobctl status shows their subjects, causes and cures.",
          "sum(jobd_problems{INSTANCE})", (1, "red")),
    _stat(4, "Queued", "short", "Queued jobs, due or not.",
          'sum(jobd_jobs{status="queued", INSTANCE})'),
    _stat(5, "Processing", "short", "Jobs that a worker holds.",
          'sum(jobd_jobs{status="processing", INSTANCE})'),
    _stat(6, "Stalled", "short", "Processing jobs whose worker has stalled.",
          "sum(jobd_stalled_jobs{INSTANCE})", (1, "orange")),
    _stat(7, "Paused queues", "short", "Queues whose jobs wait until they are resumed.",
          "sum(jobd_queue_paused{INSTANCE})", (1, "orange")),
    _stat(8, "Oldest due job", "s", "How long it has been waiting, over all queues.",
          "max(jobd_queue_oldest_due_seconds{INSTANCE})", (600, "orange"), (3600, "red")),
    _stat(9, "Quarantined", "short", "Jobs with damaged rows. jobd doctor names them.",
          "sum(jobd_quarantined_jobs{INSTANCE})", (1, "red")),
    _states(10, "Alerts and problems",
        "When each alert of jobd fired, when problems opened, and queues with problems.", {
        "{{alert}}": "max by (alert) (jobd_alert_firing{INSTANCE})",
        "{{condition}} opened":
            "clamp_max(sum by (condition) (increase(jobd_problems_opened_total{INSTANCE}[RATE])), 1)",
        "{{condition}} {{queue}}": "clamp_max(max by (condition, queue) (jobd_problem_jobs{INSTANCE}), 1)",
    }),
    _row(11, "Jobs"),
    _lines(12, "Jobs by status", "short", "Live jobs. Finished jobs are not counted.", {
        "{{status}}": 'sum by (status) (jobd_jobs{status=~"queued|processing", INSTANCE})',
    }),
    _lines(13, "Grants and completions", "ops", "Jobs granted to workers and jobs completed, per second.", {
        "granted": "sum(rate(jobd_grants_total{INSTANCE, QUEUE}[RATE]))",
        "completed": "sum(rate(jobd_processing_seconds_count{INSTANCE, QUEUE}[RATE]))",
    }),
    _lines(14, "Stalls and recoveries", "ops",
        "Grants that ended because the worker stalled, and how the jobs were recovered.", {
        "stalled": "sum(rate(jobd_stalls_total{INSTANCE}[RATE]))",
        "{{action}}": "sum by (action) (rate(jobd_recovered_total{INSTANCE}[RATE]))",
    }),
    _lines(15, "Queued, by queue", "short", "The queues with the most waiting jobs.", {
        "{{queue}}": 'topk(10, sum by (queue) (jobd_queue_jobs{status="queued", INSTANCE, QUEUE}))',
    }, stacked=True),
    _lines(16, "Processing, by queue", "short", "The queues with the most processing jobs.", {
        "{{queue}}": 'topk(10, sum by (queue) (jobd_queue_jobs{status="processing", INSTANCE, QUEUE}))',
    }, stacked=True),
    _lines(17, "Oldest due job, by queue", "s", "How long the oldest due job has been waiting.", {
        "{{queue}}": "topk(10, max by (queue) (jobd_queue_oldest_due_seconds{INSTANCE, QUEUE}))",
    }, red=3600),
    _lines(18, "Failed jobs, by queue", "short",
        "Failed jobs that are kept. A step up is new failures, a step down is retention.", {
        "{{queue}}": 'topk(10, sum by (queue) (jobd_queue_jobs{status="failed", INSTANCE, QUEUE}))',
    }),
    _lines(19, "Locks", "short", "Processing jobs whose lock has not expired, and stalled jobs.", {
        "locked": "sum(jobd_locked_jobs{INSTANCE})",
        "stalled": "sum(jobd_stalled_jobs{INSTANCE})",
    }),
    _lines(20, "Double grants", "short",
        "Jobs granted to a second worker while the first one still had time on its lock, per hour.", {
        "double grants": "sum(increase(jobd_granted_twice_total{INSTANCE}[1h]))",
    }, red=1),
    _row(21, "Durations"),
    _lines(22, "Processing time, 95th percentile, by queue", "s", "From grant to completion.", {
        "{{queue}}":
            "histogram_quantile(0.95, sum by (queue, le) "
            "(rate(jobd_processing_seconds_bucket{INSTANCE, QUEUE}[RATE])))",
    }),
    _lines(23, "Processing time, 95th percentile, by kind", "s", "The last hour, which jobd compares with the usual.", {
        "{{kind}}": 'topk(10, max by (kind) (jobd_processing_p95_seconds{window="hour", INSTANCE}))',
    }),
    _lines(24, "Ratio to the usual duration, by kind", "none",
        "The last hour divided by the usual duration of the kind.", {
        "{{kind}}":
            'topk(10, max by (kind) (jobd_processing_p95_seconds{window="hour", INSTANCE}) / '
            'max by (kind) (jobd_processing_p95_seconds{window="usual", INSTANCE}))',
    }, red=2),
    _row(25, "Listeners and mailbox"),
    _lines(26, "Errors, by code", "ops",
        "already_locked is lock contention. overloaded and storage_full are caused by the daemon.", {
        "{{code}}": "sum by (code) (rate(jobd_rejections_total{INSTANCE}[RATE])) > 0",
    }, width=6, stacked=True),
    _lines(27, "Mailbox", "percentunit", "Waiting commands, as a fraction of limits.mailbox.", {
        "filled": "max(jobd_mailbox_commands{INSTANCE} / jobd_mailbox_limit_commands{INSTANCE})",
    }, width=6, red=0.5),
    _lines(28, "Waiting claims", "short", "Claims that wait for a job: idle workers.", {
        "waiting claims": "sum(jobd_parked_claims{INSTANCE})",
    }, width=6),
    _lines(51, "Unread responses", "bytes",
        "Bytes of responses that clients have not read. Above limits.response_bytes, new jobs, claims and reads are "
        "rejected.", {
        "unread": "sum(jobd_response_bytes{INSTANCE})",
    }, width=6),
    _row(29, "Disk and event loop"),
    _lines(30, "Commit time", "s", "One commit with its fsync. Every response waits for one.", {
        "p50": "histogram_quantile(0.5, sum by (le) (rate(jobd_commit_seconds_bucket{INSTANCE}[RATE])))",
        "p99": "histogram_quantile(0.99, sum by (le) (rate(jobd_commit_seconds_bucket{INSTANCE}[RATE])))",
    }, red=0.1),
    _lines(31, "Commands per commit", "short", "Batches form under load by themselves.", {
        "on average":
            "sum(rate(jobd_batch_commands_sum{INSTANCE}[RATE])) / sum(rate(jobd_batch_commands_count{INSTANCE}[RATE]))",
    }),
    _lines(32, "Lag of the event loop", "s", "The worst lag in the last 20 s.", {
        "{{instance}}": "max by (instance) (jobd_loop_lag_seconds{INSTANCE})",
    }, red=0.5),
    _lines(33, "Size on disk", "bytes", "The database file, its write-ahead log, and the free space on their disk.", {
        "database": "sum(jobd_database_bytes{INSTANCE})",
        "write-ahead log": "sum(jobd_wal_bytes{INSTANCE})",
        "free on the disk": "min(jobd_disk_free_bytes{INSTANCE})",
        "size of the disk": "min(jobd_disk_total_bytes{INSTANCE})",
    }),
    _lines(34, "Last cleanup run", "s", "How long ago it ended.", {
        "{{instance}}": "time() - max by (instance) (jobd_cleanup_last_timestamp_seconds{INSTANCE})",
    }, red=900),
    _lines(35, "Jobs found by cleanup", "short",
        "Jobs that recovery and cleanup runs acted on, and validation issues, per hour; failed runs since the last "
        "successful one.", {
        "{{kind}}": "sum by (kind) (increase(jobd_cleanup_found_total{INSTANCE}[1h]))",
        "issues: {{type}}": "sum by (type) (increase(jobd_validation_issues_total{INSTANCE}[1h]))",
        "{{instance}} failed cleanup runs": "sum by (instance) (jobd_cleanup_failed_runs{INSTANCE})",
    }),
    _row(36, "Daemon"),
    _lines(37, "Version", "none", "A new line is an upgrade.", {
        "{{instance}}: jobd {{version}}, Python {{python}}":
            "max by (instance, version, python) (jobd_build_info{INSTANCE})",
    }, width=12),
    _lines(38, "Cleanup runs, clock and full disk", "none",
        "Cleanup runs per hour. A suspect clock stops deletion by age. A full disk rejects creates (1), all but "
        "endings (2), every change (3).", {
        "cleanup runs": "sum(increase(jobd_cleanup_runs_total{INSTANCE}[1h]))",
        "clock suspect": "max(jobd_clock_suspect{INSTANCE})",
        "disk full": "max(jobd_disk_full{INSTANCE})",
        "commits in a thread": 'max(jobd_commit_mode{INSTANCE,mode="thread"})',
        "tables far behind": "max(jobd_tail_events{INSTANCE}) > bool 20000",
    }, width=12),
    _row(39, "Results and events"),
    _lines(40, "Late results", "none", "Results submitted after the lock was lost, kept and adopted, per hour.", {
        "{{action}}": "sum by (action) (increase(jobd_late_results_total{INSTANCE}[1h]))",
    }),
    _lines(41, "Artifacts", "none",
        "Artifacts of deleted jobs that wait for deletion, how long the oldest has been due, and the outcome of the "
        "others, per hour.", {
        "waiting": "sum(jobd_artifact_tombstones{INSTANCE})",
        "{{outcome}}": "sum by (outcome) (increase(jobd_artifacts_swept_total{INSTANCE}[1h]))",
        "seconds behind": "max(jobd_artifact_sweep_behind_seconds{INSTANCE})",
    }),
    _lines(42, "Events", "none",
        "Committed events per second by type, open event streams, and streams closed for reading too slowly, per "
        "hour.", {
        "{{type}}": "sum by (type) (rate(jobd_events_total{INSTANCE}[5m]))",
        "streams": "sum(jobd_event_streams{INSTANCE})",
        "dropped streams": "sum(increase(jobd_event_streams_dropped_total{INSTANCE}[1h]))",
    }),
    _row(43, "Webhooks"),
    _lines(44, "Deliveries", "none",
        "Webhook messages per hour: delivered, failed attempts, dead-lettered, and gaps.", {
        "{{webhook}} {{outcome}}": "sum by (webhook, outcome) (increase(jobd_webhook_deliveries_total{INSTANCE}[1h]))",
    }),
    _lines(45, "Waiting deliveries", "none", "Messages that wait for delivery, and events not read yet.", {
        "{{webhook}} waiting": "sum by (webhook) (jobd_webhook_waiting_deliveries{INSTANCE})",
        "{{webhook}} lag": "sum by (webhook) (jobd_webhook_lag_events{INSTANCE})",
    }),
    _lines(46, "Open circuit breakers", "none", "1 while the circuit breaker of the webhook is open or half-open.", {
        "{{webhook}}": "max by (webhook) (jobd_webhook_paused{INSTANCE})",
    }),
    _row(47, "Cluster"),
    _lines(48, "Leader", "none", "1 for the node that leads. Empty without a cluster.", {
        "{{instance}}": "max by (instance) (jobd_leader{INSTANCE})",
    }),
    _lines(49, "Lag of standbys", "short",
        "Events that a node has not applied. It rises under load for moments only.", {
        "{{instance}}": "max by (instance) (jobd_standby_lag_events{INSTANCE})",
    }),
    _lines(50, "Append time", "s", "One append to the journal in PostgreSQL, by the leader. It is part of a commit.", {
        "p50": "histogram_quantile(0.5, sum by (le) (rate(jobd_journal_append_seconds_bucket{INSTANCE}[RATE])))",
        "p99": "histogram_quantile(0.99, sum by (le) (rate(jobd_journal_append_seconds_bucket{INSTANCE}[RATE])))",
    }, red=0.1),
    _lines(52, "Schedules", "none",
        "Times of schedules that created a job, were skipped, or passed while nothing could fire.", {
        "{{outcome}}": "sum by (outcome) (increase(jobd_schedule_fired_total{INSTANCE}[1h]))",
    }),
)  # fmt: skip
