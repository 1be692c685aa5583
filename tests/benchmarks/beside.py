"""Work that runs beside a load (cleanup, deletion, backups, history, scrapes), and the latency of a request then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final

from jobd.cli.daemon.bench_load import LoadConnection, Measurements, clock, percentiles
from tests.benchmarks.work import BASE, LoadRequest, wait_until

PROBE_EVERY_S: Final = 0.002


@asynccontextmanager
async def running_beside(*works: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `works` while the block runs. Raise the error of one that fails."""
    running = [asyncio.ensure_future(work) for work in works]
    try:
        yield
    finally:
        for each in running:
            each.cancel()
        ended = await asyncio.gather(*running, return_exceptions=True)
    if faults := [each for each in ended if isinstance(each, Exception)]:
        raise faults[0]


async def lag(request: LoadRequest) -> Measurements:
    """Measure the smallest request, which waits for the event loop only, while something else runs.

    One request is due every PROBE_EVERY_S. Its time counts from then, even if earlier requests delay it.
    """
    wire, times = await LoadConnection.open(request.socket), list[float]()
    async with running_beside(WORKS[request.beside](request)):
        began, number = clock(), 0
        while (due := began + number * PROBE_EVERY_S) - began < request.seconds:
            begins_at = await wait_until(due)
            await wire.get("/healthz")
            times.append(clock() - begins_at)
            number += 1
    return {"wait": percentiles(times)}


async def clean(request: LoadRequest) -> None:
    """Run cleanup every second."""
    wire = await LoadConnection.open(request.admin, request.token)
    while True:
        await wire.post(f"{BASE}/cleanup", b"{}")
        await asyncio.sleep(1)


async def _nothing(_: LoadRequest) -> None: ...


async def _delete(request: LoadRequest) -> None:
    """Run cleanup with many jobs to delete, enough to last until the last probe."""
    wire = await LoadConnection.open(request.admin, request.token)
    await wire.post(f"{BASE}/cleanup", b"{}")


async def _scrape(request: LoadRequest) -> None:
    wire = await LoadConnection.open(request.admin, request.token)
    while True:
        await wire.get("/metrics")


async def _back_up(request: LoadRequest) -> None:
    """Make one backup after the other, and discard them, because storing them would delay the probes."""
    wire = await LoadConnection.open(request.admin, request.token)
    while True:
        await wire.drop(f"{BASE}/backup")


async def _history(request: LoadRequest) -> None:
    """Read all completed jobs, page by page."""
    wire, cursor = await LoadConnection.open(request.admin, request.token), ""
    while True:
        page = await wire.get(f"{BASE}/jobs?limit=200&status=completed{cursor}")
        cursor = f"&cursor={page['next_cursor']}" if page["next_cursor"] else ""


WORKS: Final[dict[str, Callable[[LoadRequest], Coroutine[Any, Any, None]]]] = {
    "nothing": _nothing,
    "passes": clean,
    "deletion": _delete,
    "backup": _back_up,
    "history": _history,
    "scrapes": _scrape,
}
