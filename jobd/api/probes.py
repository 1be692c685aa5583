"""Liveness and readiness probes: the same on every listener, without a token."""

from __future__ import annotations

from typing import Final, Literal

from msgspec import Struct

from jobd.api.services import Rooms
from jobd.http.app import Nothing, Web
from jobd.http.request import Visit
from jobd.http.routing import Route
from jobd.model.responses import Response


class Probe(Struct, frozen=True):
    status: Literal["ok", "unavailable"]


def _probe(is_well: bool) -> Response:
    return Response(Probe("ok")) if is_well else Response(Probe("unavailable"), status=503)


async def _alive(site: Web[Rooms], visit: Visit, asked: Nothing) -> Response:
    return _probe(site.rooms.is_alive())


async def _ready(site: Web[Rooms], visit: Visit, asked: Nothing) -> Response:
    return _probe(site.rooms.is_ready())


PROBES: Final = (
    Route(method="GET", path="/healthz", asks=Nothing, gives=Probe, who="anyone", via=_alive),
    Route(method="GET", path="/readyz", asks=Nothing, gives=Probe, who="anyone", via=_ready),
)
