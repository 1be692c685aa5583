"""Wait in real time for a condition. tests/support/virtual_engine.py does so in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


async def wait_until(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    """Wait until `condition` holds. The timeout of the test limits the wait."""
    while True:
        result = condition()
        if result if isinstance(result, bool) else await result:
            return
        await asyncio.sleep(0.005)
