"""Liveness and readiness probes: the same on every listener, without a token."""

from __future__ import annotations

from typing import Final, Literal

from msgspec import Struct

from jobd.answers import Answer
from jobd.rooms import Rooms
from jobd.routes import Route
from jobd.visits import Visit
from jobd.web import Nothing, Web


class Probe(Struct, frozen=True):
    status: Literal["ok", "unavailable"]


def _probe(is_well: bool) -> Answer:
    return Answer(Probe("ok")) if is_well else Answer(Probe("unavailable"), status=503)


async def _alive(site: Web[Rooms], visit: Visit, asked: Nothing) -> Answer:
    return _probe(site.rooms.is_alive())


async def _ready(site: Web[Rooms], visit: Visit, asked: Nothing) -> Answer:
    return _probe(site.rooms.is_ready())


PROBES: Final = (
    Route(method="GET", path="/healthz", asks=Nothing, gives=Probe, who="anyone", via=_alive),
    Route(method="GET", path="/readyz", asks=Nothing, gives=Probe, who="anyone", via=_ready),
)
