"""Lifecycles per second over many connections of one event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

PAYLOAD: Final = "x" * 198  # 200 bytes as JSON, as in jobd bench


async def lifecycles(workers: Sequence[Callable[[], Awaitable[None]]], seconds: float) -> float:
    """Run lifecycles one after the other in each worker for `seconds`; return lifecycles per second."""
    began, done = time.perf_counter(), 0

    async def run(work: Callable[[], Awaitable[None]]) -> None:
        nonlocal done
        while time.perf_counter() - began < seconds:
            await work()
            done += 1

    await asyncio.gather(*map(run, workers))
    return done / (time.perf_counter() - began)
