"""The calls of workers and of those who create jobs: a table, no logic."""

from __future__ import annotations

from typing import Final

from jobd.answers import (
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
from jobd.command_stream import serve
from jobd.commands import (
    Bulk,
    Cancel,
    Claim,
    Complete,
    Create,
    Extend,
    Fail,
    Get,
    List,
    Progress,
    Queues,
    Release,
    Start,
    Timeline,
    Validate,
    Why,
    Workers,
)
from jobd.doors import LINES
from jobd.event_stream import EVENT_STREAM, Follow, follow
from jobd.events import StreamedEvent
from jobd.glossary import WORKER_TITLE
from jobd.openapi import document_at, with_document
from jobd.probes import PROBES
from jobd.routes import Route, Who
from jobd.stream_lines import StreamedAnswer, StreamedCommand

_W: Final[Who] = "worker"

_ROUTES: Final = (
    Route(method="POST", path="/v1/jobs", asks=Create, gives=JobView, who=_W, key=True, status=201),
    Route(method="POST", path="/v1/jobs/bulk", asks=Bulk, gives=JobList, who=_W, key=True, status=201),
    Route(method="GET", path="/v1/jobs", asks=List, gives=JobPage, who=_W),
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
