"""Helpers to wait for futures and events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any


async def first_of(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


async def within(time_s: float, event: asyncio.Event) -> bool:
    """Wait for `event`, but at most `time_s`. Return whether it is set."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(time_s):
            await event.wait()
    return event.is_set()


async def done_within(time_s: float, future: asyncio.Future[Any], event: asyncio.Event) -> None:
    """Wait until `future` is done or `event` is set, but at most `time_s`."""
    timeout = asyncio.ensure_future(within(time_s, event))
    await first_of(future, timeout)
    timeout.cancel()


def settle(future: asyncio.Future[Any], result: object = None, error: BaseException | None = None) -> None:
    """End `future`, unless it has ended."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
        future.exception()  # marks it as retrieved, because the caller may ignore it


def call_on(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: object, **how: Any) -> None:
    """Schedule `function` on the loop of another thread. Does nothing if that loop is closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, *args, **how)
