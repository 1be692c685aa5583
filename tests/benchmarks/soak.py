"""A long run: create, complete and delete jobs at full speed, and sample the size of the database.

The file does not shrink when rows are deleted, so the pages in use show whether the content grows.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path
from typing import Any, Final

from jobd.cli.daemon.bench_load import LoadConnection, Measurements, lifecycle
from tests.benchmarks import beside
from tests.benchmarks.work import LoadRequest

KEPT_MS: Final = 5_000  # from the request that completes a job to its deletion; longer than a request waits
SAMPLES: Final = 100


async def soak(request: LoadRequest) -> Measurements:
    """`growth` compares the pages in use in the last quarter with those in the second, when deletion had started."""
    samples: list[tuple[float, float, float]] = []
    async with beside.running_beside(beside.clean(request), _sample_sizes(request, samples)):
        figures = await lifecycle(request.socket, request.seconds, request.connections, _soon_deleted)
    database, used, log = ([each[at] for each in samples] for at in range(3))
    quarter = max(len(samples) // 4, 1)
    growth = statistics.median(used[-quarter:]) / statistics.median(used[quarter : 2 * quarter] or used)
    return {
        "lifecycles_per_s": figures["lifecycles_per_s"],
        "growth": growth,
        "database_mb": max(database),
        "log_mb": max(log),
        "series": {"database_mb": database, "used_mb": used, "log_mb": log},
    }


def _soon_deleted() -> dict[str, Any]:
    return {"expires_at": time.time_ns() // 1_000_000 + KEPT_MS}


async def _sample_sizes(request: LoadRequest, samples: list[tuple[float, float, float]]) -> None:
    wire = await LoadConnection.open(request.admin, request.token)
    while True:
        metrics = (await wire.get("/metrics")).decode().splitlines()
        values = dict(line.rsplit(" ", 1) for line in metrics if line.startswith("jobd_") and "{" not in line)
        size, log = (float(values[f"jobd_{name}_bytes"]) / 1e6 for name in ("database", "wal"))
        samples.append((size, used_bytes(Path(request.store)) / 1e6, log))
        await asyncio.sleep(request.seconds / SAMPLES)


def used_bytes(path: Path) -> int:
    """Return the size of the pages in use as of the last checkpoint, from the header of the file."""
    with path.open("rb") as file:
        header = file.read(100)
    page_bytes, pages, free = (int.from_bytes(header[at : at + size]) for at, size in ((16, 2), (28, 4), (36, 4)))
    return (pages - free) * page_bytes
