"""How long the daemon takes for each page of the dashboard with many jobs: `python -m tests.bench_pages` prints JSON.

Times are those of a client on loopback, in ms, request to last byte: the daemon's and a little more.
"""

from __future__ import annotations

import argparse
import http.client
import json
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from tests.process import TOKEN
from tests.scenes import Scene

BULK: Final = 1_000
QUEUES: Final = ("video", "mail", "reports", "imports", "images")
PATHS: Final = {
    "overview": "/",
    "overview, renewed": "/",
    "chart": "/chart.json",
    "jobs": "/jobs",
    "jobs by queue and status": "/jobs?status=queued&queue=mail",
    "jobs that match none": "/jobs?kind=none",
    "jobs with a text": "/jobs?q=xxxx",
    "jobs with a text that is nowhere": "/jobs?q=nowhere",
    "failures": "/failures",
    "job": "/jobs/job-99",
    "confirm": "/jobs/job-99/confirm?verb=cancel",
    "queues": "/queues",
    "workers": "/workers",
    "cleanup": "/cleanup",
    "webhooks": "/webhooks",
    "audit": "/audit",
    "alerts": "/alerts",
    "docs": "/docs",
}


def fill(daemon: Scene, count: int, in_work: int) -> None:
    for first in range(0, count, BULK):
        numbers = range(first, min(first + BULK, count))
        jobs = [
            {"id": f"job-{n}", "queue": QUEUES[n % 5], "kind": f"kind-{n % 7}", "payload": {"n": n, "text": "x" * 200}}
            for n in numbers
        ]
        daemon.do("jobs/bulk", jobs=jobs)
    for number in range(0, in_work, 100):
        daemon.do("claim", worker=f"worker-{number // 100}", queues=list(QUEUES), limit=min(100, in_work - number))


def measure(daemon: Scene, rounds: int) -> dict[str, Any]:
    measured = {}
    with closing(http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=60)) as connection:
        for name, path in PATHS.items():
            headers = {"Authorization": f"Bearer {TOKEN}"} | ({"HX-Request": "true"} if "renewed" in name else {})
            times = []
            for _ in range(rounds):
                began = time.perf_counter()
                connection.request("GET", path, headers=headers)
                response = connection.getresponse()
                size = len(response.read())
                times.append((time.perf_counter() - began) * 1000)
                assert response.status == 200, (path, response.status)
            times.sort()
            measured[name] = {
                "median_ms": round(times[rounds // 2], 2),
                "p95_ms": round(times[int(rounds * 0.95)], 2),
                "most_ms": round(times[-1], 2),
                "bytes": size,
            }
    return measured


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--jobs", type=int, default=100_000)
    options.add_argument("--in-work", type=int, default=1_000)
    options.add_argument("--rounds", type=int, default=40)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as directory, Scene(Path(directory)) as daemon:
        fill(daemon, chosen.jobs, chosen.in_work)
        pages = measure(daemon, chosen.rounds)
    print(
        json.dumps({"jobs": chosen.jobs, "in_work": chosen.in_work, "rounds": chosen.rounds, "pages": pages}, indent=2)
    )


if __name__ == "__main__":
    main()
