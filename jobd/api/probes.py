"""Liveness and readiness probes, the same on every listener. They need no token."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

from jobd.api.services import Services
from jobd.http.app import App, NoFields
from jobd.http.request import RequestContext
from jobd.http.routing import Route
from jobd.model.responses import Response


class Probe(Struct, frozen=True):
    """The result of a probe."""

    status: Annotated[Literal["ok", "unavailable"], Meta(description="Whether the probe succeeded.")]


def _probe(is_ok: bool) -> Response:
    return Response(Probe("ok")) if is_ok else Response(Probe("unavailable"), status=503)


async def _alive(app: App[Services], ctx: RequestContext, command: NoFields) -> Response:
    return _probe(app.services.is_alive())


async def _ready(app: App[Services], ctx: RequestContext, command: NoFields) -> Response:
    return _probe(app.services.is_ready())


PROBES: Final = (
    Route(
        method="GET",
        path="/healthz",
        request=NoFields,
        response=Probe,
        auth="anyone",
        on_standby=True,
        tag="The daemon",
        handler=_alive,
        summary="Return whether the daemon is alive.",
        other_statuses={503: "The daemon is not alive."},
    ),
    Route(
        method="GET",
        path="/readyz",
        request=NoFields,
        response=Probe,
        auth="anyone",
        on_standby=True,
        tag="The daemon",
        handler=_ready,
        summary="Return whether the daemon accepts requests. It does even if a full disk makes it reject new jobs.",
        other_statuses={503: "The daemon does not accept requests yet, or is stopping."},
    ),
)
