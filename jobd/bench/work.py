"""What is asked of a load, and the work that most of them do: jobs that are created, claimed and completed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from msgspec import Struct

from jobd.bench.spread import percentiles
from jobd.bench.wire import Wire, encode

PAYLOAD: Final = "x" * 198  # 200 bytes as JSON
CREATE: Final = encode({"payload": PAYLOAD})
BASE: Final = "/admin/job-management"

clock: Final = time.perf_counter


class Asked(Struct):
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


Figures = dict[str, Any]


async def run_one(wire: Wire, worker: bytes, **ending: Any) -> None:
    """Create, claim, complete. The claimed job may be another connection's; all are done in the end."""
    await wire.post("/v1/jobs", CREATE)
    grant = (await wire.post("/v1/claim", worker))["grants"][0]
    body = encode({"lock_id": grant["lock_id"], "metadata": 1, **ending})
    await wire.post(f"/v1/jobs/{grant['job']['id']}/complete", body)


def worker(number: int) -> bytes:
    return encode({"worker": f"w-{number}"})


async def wires_of(asked: Asked) -> list[Wire]:
    return [await Wire.open(asked.socket) for _ in range(asked.connections)]


async def turn(due: float) -> float:
    """Wait until `due` (by `clock`), and give the time from which on what is done then counts: no later than `due`.

    The loop's timers are early by up to half a millisecond.
    """
    await asyncio.sleep(max(due - clock(), 0))
    return min(due, clock())


async def over(seconds: float, workers: list[Callable[[], Awaitable[int]]]) -> tuple[float, list[float]]:
    """Every worker does its work again and again for so long: how much of it a second, and how long each took."""
    began, times, done = clock(), list[float](), 0

    async def go_on(work: Callable[[], Awaitable[int]]) -> None:
        nonlocal done
        while (started := clock()) - began < seconds:
            count = await work()
            times.append(clock() - started)
            done += count

    await asyncio.gather(*map(go_on, workers))
    return done / (clock() - began), times


async def lifecycle(asked: Asked, ending: Callable[[], dict[str, Any]] = dict) -> Figures:
    """Create, claim, complete, one request each. `ending`: what each complete brings beside the usual."""

    def work(number: int, wire: Wire) -> Callable[[], Awaitable[int]]:
        async def once() -> int:
            await run_one(wire, worker(number), **ending())
            return 1

        return once

    wires = await wires_of(asked)
    per_s, times = await over(asked.seconds, [work(number, wire) for number, wire in enumerate(wires)])
    return {"lifecycles_per_s": per_s, "lifecycle": percentiles(times)}
