"""Run a coroutine to its end even if the caller is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def to_end(work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`. A cancelled caller stops waiting for it; it runs on, and its error is dropped."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        raise
