"""Lifecycles a second over many connections that are driven by one loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

PAYLOAD: Final = "x" * 198  # 200 bytes as JSON, as in jobd bench


async def lifecycles(workers: Sequence[Callable[[], Awaitable[None]]], seconds: float) -> float:
    """Each worker does one lifecycle after the other for so long."""
    began, done = time.perf_counter(), 0

    async def go_on(work: Callable[[], Awaitable[None]]) -> None:
        nonlocal done
        while time.perf_counter() - began < seconds:
            await work()
            done += 1

    await asyncio.gather(*map(go_on, workers))
    return done / (time.perf_counter() - began)
