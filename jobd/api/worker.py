"""Routes of the worker API."""

from __future__ import annotations

from typing import Any, Final

from jobd.api.command_stream import StreamedCommand, StreamedResponse, serve_command_stream
from jobd.api.events import EventsRequest, send_events
from jobd.api.openapi import document_at, tagged, with_document
from jobd.api.probes import PROBES, cluster_route
from jobd.http.auth import LINES
from jobd.http.routing import EVENT_STREAM, Route
from jobd.model import commands, responses
from jobd.model.commands import Command
from jobd.model.events import StreamedEvent


def _call(method: str, path: str, request: type[Command], response: Any, **options: Any) -> Route:
    """Return a route. `options` are other fields of Route."""
    return Route(method=method, path=path, request=request, response=response, auth="worker", **options)


_ROUTES: Final = (
    *tagged(
        "Jobs",
        _call(
            "POST",
            "/v1/jobs",
            commands.Create,
            responses.JobView,
            key=True,
            status=201,
            other_statuses={200: "An earlier request with the same content created this job."},
        ),
        _call("POST", "/v1/jobs/bulk", commands.Bulk, responses.JobList, key=True, status=201),
        _call("GET", "/v1/jobs", commands.ListJobs, responses.JobPage),
        _call("GET", "/v1/jobs/{id}", commands.Get, responses.JobView),
        _call("GET", "/v1/jobs/{id}/timeline", commands.Timeline, responses.TimelineView),
        _call("GET", "/v1/jobs/{id}/why", commands.Why, responses.WhyView),
        _call("GET", "/v1/jobs/{id}/validate", commands.Validate, responses.Validation),
        _call("POST", "/v1/jobs/{id}/start", commands.Start, responses.GrantView, key=True),
        _call("POST", "/v1/claim", commands.Claim, responses.Grants, key=True),
        _call("POST", "/v1/jobs/{id}/progress", commands.Progress, responses.LockState),
        _call("POST", "/v1/jobs/{id}/extend", commands.Extend, responses.LockState),
        _call("POST", "/v1/jobs/{id}/complete", commands.Complete, responses.JobView),
        _call("POST", "/v1/jobs/{id}/fail", commands.Fail, responses.JobView),
        _call("POST", "/v1/jobs/{id}/release", commands.Release, responses.JobView),
        _call("POST", "/v1/jobs/{id}/cancel", commands.Cancel, responses.JobView, key=True),
        _call(
            "POST",
            "/v1/commands",
            StreamedCommand,
            StreamedResponse,
            handler=serve_command_stream,
            body="lines",
            content_type=LINES,
        ),
    ),
    *tagged(
        "Queues and workers",
        _call("GET", "/v1/queues", commands.Queues, responses.QueueList),
        _call("GET", "/v1/workers", commands.Workers, responses.WorkerList),
    ),
    *tagged(
        "Events",
        _call("GET", "/v1/events", EventsRequest, StreamedEvent, handler=send_events, content_type=EVENT_STREAM),
    ),
    *PROBES,
    cluster_route("worker"),
)
TITLE: Final = "jobd worker API"
ROUTES: Final = with_document(TITLE, _ROUTES)
# The document of the worker API, served on the admin listener too.
DOCUMENT: Final = document_at("/docs/worker.json", TITLE, lambda: ROUTES)
