"""Routes of the worker API."""

from __future__ import annotations

from typing import Final

from jobd.api.command_stream import StreamedCommand, StreamedResponse, serve_command_stream
from jobd.api.events import EVENT_STREAM, EventsRequest, send_events
from jobd.api.openapi import document_at, tagged, with_document
from jobd.api.probes import PROBES, cluster_route
from jobd.http.auth import LINES
from jobd.http.routing import Auth, Route
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

_W: Final[Auth] = "worker"

_ROUTES: Final = (
    *tagged(
        "Jobs",
        Route(
            method="POST",
            path="/v1/jobs",
            request=Create,
            response=JobView,
            auth=_W,
            key=True,
            status=201,
            other_statuses={200: "An earlier request with the same content created this job."},
        ),
        Route(method="POST", path="/v1/jobs/bulk", request=Bulk, response=JobList, auth=_W, key=True, status=201),
        Route(method="GET", path="/v1/jobs", request=ListJobs, response=JobPage, auth=_W),
        Route(method="GET", path="/v1/jobs/{id}", request=Get, response=JobView, auth=_W),
        Route(method="GET", path="/v1/jobs/{id}/timeline", request=Timeline, response=TimelineView, auth=_W),
        Route(method="GET", path="/v1/jobs/{id}/why", request=Why, response=WhyView, auth=_W),
        Route(method="GET", path="/v1/jobs/{id}/validate", request=Validate, response=Validation, auth=_W),
        Route(method="POST", path="/v1/jobs/{id}/start", request=Start, response=GrantView, auth=_W, key=True),
        Route(method="POST", path="/v1/claim", request=Claim, response=Grants, auth=_W, key=True),
        Route(method="POST", path="/v1/jobs/{id}/progress", request=Progress, response=LockState, auth=_W),
        Route(method="POST", path="/v1/jobs/{id}/extend", request=Extend, response=LockState, auth=_W),
        Route(method="POST", path="/v1/jobs/{id}/complete", request=Complete, response=JobView, auth=_W),
        Route(method="POST", path="/v1/jobs/{id}/fail", request=Fail, response=JobView, auth=_W),
        Route(method="POST", path="/v1/jobs/{id}/release", request=Release, response=JobView, auth=_W),
        Route(method="POST", path="/v1/jobs/{id}/cancel", request=Cancel, response=JobView, auth=_W, key=True),
        Route(
            method="POST",
            path="/v1/commands",
            request=StreamedCommand,
            response=StreamedResponse,
            auth=_W,
            handler=serve_command_stream,
            body="lines",
            content_type=LINES,
        ),
    ),
    *tagged(
        "Queues and workers",
        Route(method="GET", path="/v1/queues", request=Queues, response=QueueList, auth=_W),
        Route(method="GET", path="/v1/workers", request=Workers, response=WorkerList, auth=_W),
    ),
    *tagged(
        "Events",
        Route(
            method="GET",
            path="/v1/events",
            request=EventsRequest,
            response=StreamedEvent,
            auth=_W,
            handler=send_events,
            content_type=EVENT_STREAM,
        ),
    ),
    *PROBES,
    cluster_route(_W),
)
TITLE: Final = "jobd worker API"
ROUTES: Final = with_document(TITLE, _ROUTES)
# The document of the worker API, served on the admin listener too.
DOCUMENT: Final = document_at("/docs/worker.json", TITLE, lambda: ROUTES)
