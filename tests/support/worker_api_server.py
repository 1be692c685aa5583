"""The worker API over the real actor with a store in memory."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from jobd.api.worker_routes import ROUTES
from jobd.core.state import State
from jobd.engine.actor import Actor, Bounds
from jobd.engine.clock import Clock
from jobd.engine.idempotency import IdempotencyStore
from jobd.model.job import Policy
from tests.support.http_harness import HttpHarness
from tests.support.memory_storage import MemoryStorage


class WorkerApiServer:
    """The harness, the actor, and the storage, which can be made to fail."""

    def __init__(self, harness: HttpHarness, actor: Actor, disk: MemoryStorage) -> None:
        self.harness = harness
        self.actor = actor
        self.disk = disk

    async def job(self, job_id: str) -> Any:
        """Get a job through the worker API."""
        return (await self.harness.request("GET", f"/v1/jobs/{job_id}")).data


@asynccontextmanager
async def worker_api_server(
    directory: Path, *, bounds: Bounds | None = None, **options: Any
) -> AsyncIterator[WorkerApiServer]:
    """Serve the worker API. `options` are those of HttpHarness."""
    disk = MemoryStorage()
    keys = IdempotencyStore([], 100)
    actor = Actor(disk, State.opened(disk.opened()), keys, Clock(), Policy(), random=os.urandom, bounds=bounds)
    running = asyncio.create_task(actor.run())
    async with HttpHarness(ROUTES, directory, actor=actor, **options) as harness:
        yield WorkerApiServer(harness, actor, disk)
        disk.gate.set()
        actor.end_claim_waits()
    actor.stop()
    await running
