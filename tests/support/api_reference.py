"""Generate the tables of calls in docs/api.md from their declarations.

`python -m tests.support.api_reference` rewrites the page. A test fails if it is out of date. The text of a call is the
summary of its declaration, or the docstring of its command.
"""

from __future__ import annotations

from collections.abc import Iterable
from inspect import cleandoc
from pathlib import Path
from typing import Any, Final

from msgspec import structs

from jobd.api import admin_routes, worker_routes
from jobd.api.command_stream import StreamedResponse
from jobd.api.probes import Probe
from jobd.http.routing import Route
from jobd.model import calls, events, responses
from jobd.model.api_call import LINES
from jobd.model.problems import Cure, Problem, ProblemList, Subject
from jobd.model.requests import NoFields
from tests import ROOT

PAGE: Final = ROOT / "docs/api.md"
NONE: Final = "\N{EN DASH}"
COMMAND: Final = "python -m tests.support.api_reference"
BEGIN: Final = f"<!-- generated from jobd/model/calls.py by `{COMMAND}` -->\n"
END: Final = "<!-- end of the generated part -->\n"

# The names of response shapes in the column `response` and in the table of shapes.
SHAPES: Final[dict[str, Any]] = {
    "job": responses.JobView,
    "lock": responses.LockView,
    "grant": responses.GrantView,
    "lock state": responses.LockState,
    "jobs": responses.JobList,
    "job ends": responses.JobEnds,
    "output end": responses.OutputEnd,
    "output": responses.OutputView,
    "grant output": responses.GrantOutput,
    "page": responses.JobPage,
    "grants": responses.Grants,
    "timeline": responses.TimelineView,
    "late results": responses.LateResultList,
    "late result": responses.LateResultView,
    "event": events.EventView,
    "streamed event": events.StreamedEvent,
    "streamed response": StreamedResponse,
    "why": responses.WhyView,
    "queue why": responses.QueueWhyView,
    "kind why": responses.KindWhy,
    "next": responses.NextEvent,
    "validation": responses.Validation,
    "issue": responses.Issue,
    "queues": responses.QueueList,
    "queue": responses.QueueView,
    "workers": responses.WorkerList,
    "worker": responses.WorkerView,
    "schedules": responses.ScheduleList,
    "schedule": responses.ScheduleView,
    "skip": responses.SkipView,
    "stats": responses.StatsView,
    "health": responses.HealthView,
    "report": responses.CleanupReport,
    "cleanup state": responses.CleanupState,
    "recovered": responses.RecoverStuckView,
    "taken back": responses.TakeBackView,
    "goodbye": responses.GoodbyeView,
    "directed": responses.DirectedView,
    "directive": responses.DirectiveView,
    "quiet rule": responses.QuietRuleView,
    "quiet rules": responses.QuietRuleList,
    "recovery": responses.Recovery,
    "validated job": responses.ValidateJobView,
    "forced": responses.TransitionView,
    "admin lock": responses.AdminLockView,
    "import report": responses.ImportResult,
    "import preview": responses.ImportPreview,
    "failures": responses.FailuresView,
    "failure group": responses.FailureGroup,
    "preview": responses.PreviewView,
    "plan": responses.PlanView,
    "planned job": responses.PlannedJob,
    "planned age": responses.PlannedAge,
    "plan trial": responses.PlanTrial,
    "plan outcome": responses.PlanOutcome,
    "skipped job": responses.SkippedJob,
    "plan result": responses.PlanResult,
    "unchanged job": responses.UnchangedJob,
    "audit page": responses.AuditPage,
    "audit entry": responses.AuditView,
    "export page": responses.ExportPage,
    "locks": responses.LockList,
    "locked job": responses.LockedJob,
    "reports": responses.ReportList,
    "alerts": responses.AlertList,
    "alert": responses.AlertView,
    "problems": ProblemList,
    "problem": Problem,
    "subject": Subject,
    "cure": Cure,
    "webhooks": responses.WebhookList,
    "webhook": responses.WebhookView,
    "deliveries": responses.DeliveryPage,
    "delivery": responses.DeliveryView,
    "resent": responses.Resent,
    "clock": responses.ClockView,
    "cluster": responses.ClusterView,
    "node": responses.NodeView,
    "quarantine": responses.QuarantineList,
    "disk use": responses.DiskUse,
    "checked rows": responses.CheckedRows,
    "backups": responses.BackupList,
    "backup": responses.BackupView,
    "paused": responses.PausedView,
}
OTHER_SHAPES: Final[dict[Any, str]] = {bytes: "bytes", str: "bytes", Probe: "probe"}
# What the row of a call says beside its declaration, mostly where to read more.
SEE: Final[dict[Any, str]] = {
    calls.JobRequests.create: "See [job options](#job-options).",
    calls.JobCalls.list_jobs: "See [filters](#filters).",
    calls.JobCalls.release_job: "See [releases](#releases).",
    calls.QueueCalls.workers: "See [workers](#workers).",
    calls.EventRequests.events: "See [event stream](#event-stream).",
    calls.AdminJobCalls.extend_lock: "`additionalTime` is in ms.",
    calls.AdminJobRequests.transition: "See [updates and dry runs](#updates-and-dry-runs).",
    calls.AdminJobRequests.artifact: "See [artifacts](operations.md#artifacts).",
    calls.AdminJobCalls.list_jobs: "`lock` has `lock_id`. See [filters](#filters).",
    calls.AdminJobCalls.get_job: "`lock` has `lock_id`.",
    calls.AdminJobCalls.delete_job: "See [artifacts](operations.md#artifacts).",
    calls.AdminJobCalls.late_results: "See [late results](#late-results).",
    calls.ManyJobRequests.import_jobs: "See [import](#import).",
    calls.ManyJobRequests.preview_import: "See [import](#import).",
    calls.ManyJobRequests.plan: "See [plans](#plans).",
    calls.ManyJobCalls.failures: "See [failures](#failures).",
    calls.AdminEventCalls.audit: "See [audit log](#audit-log).",
    calls.AdminNodeCalls.metrics: "See [metrics](operations.md#metrics).",
    calls.StoreRequests.backup: "`jobd backup` writes it safely. See [backups](#backups).",
    calls.StoreCalls.check_rows: "See [checking the store](operations.md#checking-the-store).",
}


def table(routes: Iterable[Route], others: Iterable[Route] = ()) -> str:
    """Return the table of `routes`. A call with the command of a route of `others` refers to it."""
    see = {(call.method, call.path): text for call, text in SEE.items()}
    see["POST", "/v1/commands"] = "See [command streams](#command-streams)."
    known = {route.request: route for route in others if route.request is not NoFields}
    lines = ["| call | body or query | response | key | description |", "| --- | --- | --- | --- | --- |"]
    for route in routes:
        same = known.get(route.request)
        text = text_of(route) if same is None else f"As {same.method} `{same.path}`."
        more = see.get((route.method, route.path), "")
        key = "yes" if route.key else ""
        cells = f"{fields_of(route)} | {shape_of(route)} | {key} | {f'{text} {more}'.strip()}".replace("|  |", "| |")
        lines.append(f"| {route.method} `{route.path}` | {cells} |")
    return "\n".join(lines)


def fields_of(route: Route) -> str:
    """Return the fields of the body or the query, with `?` if they are optional."""
    if route.body == "lines":
        return f"JSON lines (`{LINES}`)"
    fields = [each for each in structs.fields(route.request) if each.name != route.path_field]
    return ", ".join(f"`{each.encode_name}{'' if each.required else '?'}`" for each in fields) or NONE


def shape_of(route: Route) -> str:
    """Return the name of the response. Raises KeyError if it has no name in SHAPES."""
    names: dict[Any, str] = OTHER_SHAPES | {shape: name for name, shape in SHAPES.items()}
    return names[route.response]


def text_of(route: Route) -> str:
    """Return what a call does, with its other statuses, in one line."""
    parts = [" ".join((route.summary or cleandoc(route.request.__doc__ or "")).split())]
    if route.status != 200:
        parts.append(f"{route.status}.")
    parts += [f"{status}: {meaning}" for status, meaning in route.other_statuses.items()]
    if route.auth == "anyone":
        parts.append("No token.")
    elif route.on_standby:
        parts.append("A standby serves it too.")
    return " ".join(parts).replace("|", "\\|")


def generated() -> dict[Path, str]:
    """Return the page with the text that it must have."""
    worker, admin = worker_routes.ROUTES, admin_routes.ROUTES
    parts = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = [part.partition(END)[2] for part in parts[1:]]
    tables = (table(worker), table(admin, others=worker))
    pieces = [f"{BEGIN}\n{each}\n\n{END}{rest}" for each, rest in zip(tables, after, strict=True)]
    return {PAGE: "".join([parts[0], *pieces])}


def main() -> None:
    """Write the page."""
    for file, content in generated().items():
        file.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
