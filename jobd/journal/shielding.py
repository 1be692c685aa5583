"""Run a coroutine to its end even if the caller is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_running: set[asyncio.Task[None]] = set()  # the event loop itself keeps no reference


async def to_end(work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`. A cancelled caller stops waiting for it; it runs on, and its error is dropped."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()
    task = loop.create_task(_run(work, outcome))
    _running.add(task)
    task.add_done_callback(_running.discard)
    return await outcome


async def _run(work: Coroutine[Any, Any, T], outcome: asyncio.Future[T]) -> None:
    """Set `outcome` at once, which asyncio.shield does one turn of the event loop later."""
    try:
        result = await work
    except asyncio.CancelledError:
        outcome.cancel()
        raise
    except BaseException as error:
        if not outcome.done():
            outcome.set_exception(error)
        if not isinstance(error, Exception):
            raise
    else:
        if not outcome.done():
            outcome.set_result(result)
