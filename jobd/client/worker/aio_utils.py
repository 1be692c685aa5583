"""Helpers to wait for futures and events."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any


async def first_of(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


async def within(time_s: float, event: asyncio.Event) -> bool:
    """Wait for `event`, but at most `time_s`. Return whether it is set."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(time_s):
            await event.wait()
    return event.is_set()


def mark_done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
