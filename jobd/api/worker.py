"""The calls of workers and of those who create jobs: a table, no logic."""

from __future__ import annotations

from typing import Final

from jobd.api.command_stream import StreamedAnswer, StreamedCommand, serve
from jobd.api.descriptions import WORKER_TITLE
from jobd.api.events import EVENT_STREAM, Follow, follow
from jobd.api.openapi import document_at, with_document
from jobd.api.probes import PROBES
from jobd.http.auth import LINES
from jobd.http.routing import Route, Who
from jobd.model.commands import (
    Bulk,
    Cancel,
    Claim,
    Complete,
    Create,
    Extend,
    Fail,
    Get,
    ListJobs,
    Progress,
    Queues,
    Release,
    Start,
    Timeline,
    Validate,
    Why,
    Workers,
)
from jobd.model.events import StreamedEvent
from jobd.model.responses import (
    Grants,
    GrantView,
    JobList,
    JobPage,
    JobView,
    LockState,
    QueueList,
    TimelineView,
    Validation,
    WhyView,
    WorkerList,
)

_W: Final[Who] = "worker"

_ROUTES: Final = (
    Route(method="POST", path="/v1/jobs", asks=Create, gives=JobView, who=_W, key=True, status=201),
    Route(method="POST", path="/v1/jobs/bulk", asks=Bulk, gives=JobList, who=_W, key=True, status=201),
    Route(method="GET", path="/v1/jobs", asks=ListJobs, gives=JobPage, who=_W),
    Route(method="GET", path="/v1/jobs/{id}", asks=Get, gives=JobView, who=_W),
    Route(method="GET", path="/v1/jobs/{id}/timeline", asks=Timeline, gives=TimelineView, who=_W),
    Route(method="GET", path="/v1/jobs/{id}/why", asks=Why, gives=WhyView, who=_W),
    Route(method="GET", path="/v1/jobs/{id}/validate", asks=Validate, gives=Validation, who=_W),
    Route(method="POST", path="/v1/jobs/{id}/start", asks=Start, gives=GrantView, who=_W, key=True),
    Route(method="POST", path="/v1/claim", asks=Claim, gives=Grants, who=_W, key=True),
    Route(method="POST", path="/v1/jobs/{id}/progress", asks=Progress, gives=LockState, who=_W),
    Route(method="POST", path="/v1/jobs/{id}/extend", asks=Extend, gives=LockState, who=_W),
    Route(method="POST", path="/v1/jobs/{id}/complete", asks=Complete, gives=JobView, who=_W),
    Route(method="POST", path="/v1/jobs/{id}/fail", asks=Fail, gives=JobView, who=_W),
    Route(method="POST", path="/v1/jobs/{id}/release", asks=Release, gives=JobView, who=_W),
    Route(method="POST", path="/v1/jobs/{id}/cancel", asks=Cancel, gives=JobView, who=_W, key=True),
    Route(
        method="POST",
        path="/v1/commands",
        asks=StreamedCommand,
        gives=StreamedAnswer,
        who=_W,
        via=serve,
        reads="lines",
        sends=LINES,
    ),
    Route(method="GET", path="/v1/queues", asks=Queues, gives=QueueList, who=_W),
    Route(method="GET", path="/v1/workers", asks=Workers, gives=WorkerList, who=_W),
    Route(method="GET", path="/v1/events", asks=Follow, gives=StreamedEvent, who=_W, via=follow, sends=EVENT_STREAM),
    *PROBES,
)
ROUTES: Final = with_document(WORKER_TITLE, _ROUTES)
# For operators to read at their own door.
DOCUMENT: Final = document_at("/docs/worker.json", WORKER_TITLE, lambda: ROUTES)
