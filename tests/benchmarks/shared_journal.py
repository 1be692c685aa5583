"""Measure appends to the journal in PostgreSQL: `python -m tests.benchmarks.shared_journal [--appends N]`.

One writer appends the next record when the last is acknowledged, to one server and to a quorum of two of three. It
prints JSON. All servers are on this machine, with their real fsync.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Final

import uvloop

from jobd.journal.postgres.journal import PostgresJournal, create
from jobd.model.journal import Record
from tests.support import postgres
from tests.support.postgres import PostgresServer

EVENT_BYTES: Final = 300
WARM_UP: Final = 200  # appends


async def _measure(url: str, name: str, events: int, appends: int) -> dict[str, float]:
    await create(url, name, name)
    journal = await PostgresJournal.open(url, name, 3000)
    await journal.take_over(await journal.head(), holder="a", url="", epoch=1)
    body = os.urandom(EVENT_BYTES * events)
    times = []
    for number in range(1, WARM_UP + appends + 1):
        began = time.perf_counter()
        await journal.append(Record(number, number, number, 1, 0, body), number - 1)
        times.append(time.perf_counter() - began)
    await journal.close()
    found = sorted(times[WARM_UP:])
    return {
        "p50_ms": round(found[len(found) // 2] * 1000, 3),
        "p99_ms": round(found[len(found) * 99 // 100] * 1000, 3),
        "max_ms": round(found[-1] * 1000, 3),
        "events_per_s": round(appends * events / sum(found)),
    }


async def _both(url: str, appends: int) -> dict[str, dict[str, float]]:
    return {
        f"{events} events": await _measure(url, f"bench-{events}", events, appends // (1 if events == 1 else 4))
        for events in (1, 64)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--appends", type=int, default=4000)
    appends = parser.parse_args().appends
    result: dict[str, object] = {"postgresql": postgres.version(), "appends": appends, "load": os.getloadavg()[0]}
    settings = {"shared_buffers": "128MB", "max_wal_size": "2GB"}
    with postgres.postgres(**settings) as server:
        result["one server"] = _run(server, appends)
    with postgres.postgres_cluster(2, **settings) as servers:
        result["quorum of two of three"] = _run(servers[0], appends)
    print(json.dumps(result, indent=2))


def _run(server: PostgresServer, appends: int) -> dict[str, dict[str, float]]:
    return uvloop.run(_both(server.socket_url(), appends))


if __name__ == "__main__":
    main()
