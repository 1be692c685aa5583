"""What a worker leaves behind that has drained its queues: jobs that are not due, or whose queue is paused.

Only asks and tells; what it cannot learn it does not tell.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from jobd.client.aio import AsyncJobClient
from jobd.client.errors import JobdError
from jobd.client.worker.claimer import ClaimOptions

if TYPE_CHECKING:
    from jobd.model.responses import QueueView

_PATIENCE_S: Final = 5.0  # the work is done: nobody waits long for a word about what is not
_PAGE: Final = 200


async def remaining_jobs(client: AsyncJobClient, wanted: ClaimOptions) -> str | None:
    """How many jobs of `wanted` still wait and why, None where there are none, or nobody answers."""
    try:
        async with asyncio.timeout(_PATIENCE_S):
            found = {view: await _count(client, view, wanted) for view in await _views(client, wanted)}
    except (JobdError, TimeoutError):
        return None
    left = {view: count for view, count in found.items() if count}
    if not left:
        return None
    total = sum(left.values())
    return f"{total} {'job is' if total == 1 else 'jobs are'} left: {', '.join(_reasons(left))}"


async def _views(client: AsyncJobClient, wanted: ClaimOptions) -> list[QueueView]:
    return [view async for view in client.iterate_queues() if view.name in wanted.queues and view.queued]


async def _count(client: AsyncJobClient, view: QueueView, wanted: ClaimOptions) -> int:
    """Queued jobs of the kinds that are wanted. Of single kinds nobody keeps a count: they are counted page by page."""
    if wanted.kinds is None:
        return view.queued
    return sum([await _count_kind(client, view.name, kind) for kind in dict.fromkeys(wanted.kinds)])


async def _count_kind(client: AsyncJobClient, queue: str, kind: str) -> int:
    jobs = client.iterate_jobs(status="queued", queue=queue, kind=kind, limit=_PAGE)
    return sum([1 async for _ in jobs])


def _reasons(left: dict[QueueView, int]) -> Iterator[str]:
    for due, words in ((False, "not due yet"), (True, "not due yet, or only since the last claim")):
        count = sum(left[view] for view in left if not view.paused and (view.oldest_due_at is not None) == due)
        if count:
            yield f"{_are(count)} {words}"
    for view in left:
        if view.paused:
            yield f"{_are(left[view])} in queue {view.name}, which is paused {view.pause.describe()}"


def _are(count: int) -> str:
    return "1 is" if count == 1 else f"{count} are"
