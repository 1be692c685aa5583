"""A long run: create, complete and delete jobs at full speed, and sample the size of the database."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any, Final

from jobd.cli.daemon.bench_load import LoadConnection, Measurements, lifecycle
from tests.benchmarks import beside
from tests.benchmarks.work import LoadRequest

KEPT_MS: Final = 1_000  # from the completion of a job to its deletion
SAMPLES: Final = 60


async def soak(request: LoadRequest) -> Measurements:
    """`growth` compares the size in the last quarter with that in the second, when deletion had started."""
    sizes: list[tuple[float, float]] = []
    async with beside.running_beside(beside.clean(request), _sample_sizes(request, sizes)):
        figures = await lifecycle(request.socket, request.seconds, request.connections, _soon_deleted)
    database, log = ([each[at] for each in sizes] for at in (0, 1))
    quarter = max(len(sizes) // 4, 1)
    growth = statistics.median(database[-quarter:]) / statistics.median(database[quarter : 2 * quarter] or database)
    return {
        "lifecycles_per_s": figures["lifecycles_per_s"],
        "growth": growth,
        "database_mb": max(database),
        "log_mb": max(log),
        "series": {"database_mb": database, "log_mb": log},
    }


def _soon_deleted() -> dict[str, Any]:
    return {"expires_at": time.time_ns() // 1_000_000 + KEPT_MS}


async def _sample_sizes(request: LoadRequest, sizes: list[tuple[float, float]]) -> None:
    wire = await LoadConnection.open(request.admin, request.token)
    while True:
        metrics = (await wire.get("/metrics")).decode().splitlines()
        values = dict(line.rsplit(" ", 1) for line in metrics if line.startswith("jobd_") and "{" not in line)
        sizes.append((float(values["jobd_database_bytes"]) / 1e6, float(values["jobd_wal_bytes"]) / 1e6))
        await asyncio.sleep(request.seconds / SAMPLES)
