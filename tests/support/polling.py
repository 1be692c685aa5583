"""Wait in real time for a condition. tests/support/virtual_engine.py does so in virtual time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def wait_until(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    """Wait until `condition` holds. The timeout of the test limits the wait."""
    while True:
        result = condition()
        if result if isinstance(result, bool) else await result:
            return
        await asyncio.sleep(0.005)


def poll_until(condition: Callable[[], T], timeout_s: float = 120.0, *, every_s: float = 0.01) -> T:
    """Wait until `condition` holds, without an event loop. Return what it returned then."""
    deadline_s = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < deadline_s, f"it did not happen in time: {result}"
        time.sleep(every_s)
    return result
