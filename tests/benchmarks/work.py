"""What a load is asked for, and what several loads use."""

from __future__ import annotations

import asyncio
from typing import Final

from msgspec import Struct

from jobd.cli.daemon.bench_load import LoadConnection, clock, open_connections

BASE: Final = "/admin/job-management"


class LoadRequest(Struct):
    """What is asked of a load. `count`: of jobs, `rate`: of lifecycles a second, `beside`: what else goes on."""

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


async def connections_of(asked: LoadRequest) -> list[LoadConnection]:
    return await open_connections(asked.socket, asked.connections)


async def wait_until(due: float) -> float:
    """Wait until `due` (by `clock`), and give the time from which on what is done then counts: no later than `due`.

    The loop's timers are early by up to half a millisecond.
    """
    await asyncio.sleep(max(due - clock(), 0))
    return min(due, clock())
