"""The request for a load, and what several loads use."""

from __future__ import annotations

import asyncio
from typing import Final

from msgspec import Struct

from jobd.cli.daemon.bench_load import LoadConnection, clock, open_connections

BASE: Final = "/admin/job-management"


class LoadRequest(Struct):
    """A request for a load: `count` of jobs, `rate` of lifecycles per second, `beside` names what else runs.

    `store` is the path of the daemon's database.
    """

    kind: str
    socket: str
    admin: str = ""
    token: str = ""
    connections: int = 16
    seconds: float = 5.0
    count: int = 0
    rate: float = 0.0
    beside: str = "nothing"
    expired: bool = False
    store: str = ""


async def connections_of(request: LoadRequest) -> list[LoadConnection]:
    return await open_connections(request.socket, request.connections)


async def wait_until(due: float) -> float:
    """Wait until `due` and return the time from which to measure: `due`, or now if the timer was early."""
    await asyncio.sleep(max(due - clock(), 0))
    return min(due, clock())
