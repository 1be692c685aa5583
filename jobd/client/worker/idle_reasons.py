"""Describe why a worker gets no jobs: its queues are paused, or their jobs are not due yet."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Final

from jobd.client.aio import AsyncJobClient
from jobd.client.errors import JobdError
from jobd.client.worker.claimer import ClaimOptions
from jobd.model.responses import QueueView

_TIMEOUT_S: Final = 5.0
_PAGE: Final = 200


async def remaining_jobs(client: AsyncJobClient, options: ClaimOptions) -> str | None:
    """Return how many jobs that match `options` are still queued, and why. None if there are none or it is unknown."""
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            counts = {
                view: await _count(client, view, options) for view in await _queues(client, options) if view.queued
            }
    except (JobdError, TimeoutError):
        return None
    left = {view: count for view, count in counts.items() if count}
    if not left:
        return None
    total = sum(left.values())
    return f"{total} {'job is' if total == 1 else 'jobs are'} left: {', '.join(_reasons(left))}"


async def pauses(client: AsyncJobClient, options: ClaimOptions) -> list[str]:
    """Return a line for each queue of the worker that is paused. Empty if it is unknown."""
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            paused = [view for view in await _queues(client, options) if view.paused]
    except (JobdError, TimeoutError):
        return []
    return [
        f"queue {view.name} was paused {view.pause.describe()}. Its jobs wait. To resume it: jobctl resume {view.name}"
        for view in paused
    ]


async def _queues(client: AsyncJobClient, options: ClaimOptions) -> list[QueueView]:
    return [view async for view in client.iterate_queues() if view.name in options.queues]


async def _count(client: AsyncJobClient, view: QueueView, options: ClaimOptions) -> int:
    """Count queued jobs. The daemon counts the jobs of a queue, but jobs of a kind have to be listed page by page."""
    if options.kinds is None:
        return view.queued
    lists = [
        client.iterate_jobs(status="queued", queue=view.name, kind=kind, limit=_PAGE)
        for kind in dict.fromkeys(options.kinds)
    ]
    return sum([1 for jobs in lists async for _ in jobs])


def _reasons(left: dict[QueueView, int]) -> Iterator[str]:
    for due, reason in ((False, "not due yet"), (True, "not due yet, or became due after the last claim")):
        count = sum(left[view] for view in left if not view.paused and (view.oldest_due_at is not None) == due)
        if count:
            yield f"{_are(count)} {reason}"
    for view in left:
        if view.paused:
            yield f"{_are(left[view])} in queue {view.name}, which was paused {view.pause.describe()}"


def _are(count: int) -> str:
    return "1 is" if count == 1 else f"{count} are"
