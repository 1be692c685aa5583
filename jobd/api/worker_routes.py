"""Routes of the worker API."""

from __future__ import annotations

from typing import Final

from jobd.api.command_stream import StreamedCommand, StreamedResponse, serve_command_stream
from jobd.api.event_stream import send_events
from jobd.api.explanations import send_why
from jobd.api.openapi import document_at, routes_of, with_document
from jobd.api.output import append_output, send_output
from jobd.api.probes import PROBES, send_cluster
from jobd.api.schedules import put_schedule, send_schedule, send_schedules
from jobd.http.routing import Route
from jobd.model.api_call import LINES
from jobd.model.calls import WORKER_API, EventRequests, JobCalls, NodeCalls, ScheduleCalls

_ROUTES: Final = (
    *routes_of(
        WORKER_API,
        {
            JobCalls.why: send_why,
            JobCalls.append_output: append_output,
            JobCalls.output: send_output,
            ScheduleCalls.put_schedule: put_schedule,
            ScheduleCalls.schedule_page: send_schedules,
            ScheduleCalls.get_schedule: send_schedule,
            EventRequests.events: send_events,
            NodeCalls.cluster: send_cluster,
        },
    ),
    Route(
        method="POST",
        path="/v1/commands",
        request=StreamedCommand,
        response=StreamedResponse,
        auth="worker",
        handler=serve_command_stream,
        body="lines",
        content_type=LINES,
        tag="Jobs",
    ),
    *PROBES,
)
TITLE: Final = "jobd worker API"
ROUTES: Final = with_document(TITLE, _ROUTES)
# The document of the worker API, served on the admin listener too.
DOCUMENT: Final = document_at("/docs/worker.json", TITLE, lambda: ROUTES)
