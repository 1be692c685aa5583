"""Measure each page of the dashboard with many jobs: `python -m tests.benchmarks.pages` prints JSON.

Times are those of a client on loopback, in ms, request to last byte: the daemon's and a little more. Some of the jobs
are in work or completed, some have failed with several errors, one has a long story; operators have done things, and a
webhook is behind. Exit code 1 where the median of a page is over `--most-ms`.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from tests.browser.scenarios import WEBHOOK, Scene
from tests.support.daemon_process import TOKEN

BULK: Final = 1_000
QUEUES: Final = ("video", "mail", "reports", "imports", "images")
ERRORS: Final = 40  # kinds of them
TRIES: Final = 200  # of the job with the long story
ENOUGH_MS: Final = 50.0
HOOK: Final = f'{WEBHOOK}events = ["job.failed"]\n'
PATHS: Final = {
    "overview": "/",
    "overview, renewed": "/",
    "chart": "/chart.json",
    "jobs": "/jobs",
    "jobs by queue and status": "/jobs?status=queued&queue=mail",
    "jobs that match none": "/jobs?kind=none",
    "jobs with a text": "/jobs?q=xxxx",
    "jobs with a text that is nowhere": "/jobs?q=nowhere",
    "failed jobs": "/jobs?status=failed",
    "completed jobs": "/jobs?status=completed",
    "completed jobs of a kind that is nowhere": "/jobs?status=completed&kind=none",
    "failures": "/failures",
    "job": "/jobs/job-99",
    "job with a long story": "/jobs/story",
    "plan for thousands": "",
    "confirm": "/jobs/job-99/confirm?verb=cancel",
    "queues": "/queues",
    "workers": "/workers",
    "cleanup": "/cleanup",
    "cleanup, before a pass": "/cleanup/confirm?what=run",
    "cleanup, before recovery": "/cleanup/confirm?what=recover",
    "clock": "/clock",
    "webhooks": "/webhooks",
    "webhook with thousands of messages": "/webhooks/billing",
    "webhook, before all go again": "/webhooks/billing/again",
    "audit": "/audit",
    "alerts": "/alerts",
    "docs": "/docs",
}


def fill(daemon: Scene, count: int, in_work: int, failed: int, completed: int) -> None:
    story(daemon)
    for first in range(0, count, BULK):
        numbers = range(first, min(first + BULK, count))
        jobs = [
            {"id": f"job-{n}", "queue": QUEUES[n % 5], "kind": f"kind-{n % 7}", "payload": {"n": n, "text": "x" * 200}}
            for n in numbers
        ]
        daemon.do("jobs/bulk", jobs=jobs)
    for number in range(0, failed, 100):
        claimed = daemon.do("claim", worker="fails", queues=list(QUEUES), limit=min(100, failed - number))
        for at, grant in enumerate(claimed["grants"]):
            error = f"{chr(97 + at % ERRORS % 26)}{at % ERRORS} broke at 0x{at:x}"
            daemon.do(f"jobs/{grant['job']['id']}/fail", lock_id=grant["lock_id"], error_message=error)
    for number in range(0, in_work, 100):
        daemon.do("claim", worker=f"worker-{number // 100}", queues=list(QUEUES), limit=min(100, in_work - number))
    for number in range(0, completed, 100):
        claimed = daemon.do("claim", worker="completes", queues=list(QUEUES), limit=min(100, completed - number))
        for grant in claimed["grants"]:
            daemon.do(f"jobs/{grant['job']['id']}/complete", lock_id=grant["lock_id"], metadata={"pages": number})
    for number in range(60):
        daemon.operator("POST", "force-fail", {"jobId": f"job-{count - 1 - number}", "reason": "a bench"})


def story(daemon: Scene) -> None:
    """A job with a large payload that was tried again and again."""
    daemon.do("jobs", id="story", queue="story", max_attempts=TRIES + 1, payload={"text": "x" * 200_000})
    for _ in range(TRIES):
        lock_id = daemon.do("jobs/story/start", worker="tries")["lock_id"]
        for progress in (10, 50):
            daemon.do("jobs/story/progress", lock_id=lock_id, progress=progress, message="on its way")
        daemon.do("jobs/story/fail", lock_id=lock_id, error_message="not yet", retry_after_ms=0)


def planned(daemon: Scene) -> str:
    """The address of a plan's page."""
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    with closing(http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=60)) as connection:
        body = json.dumps({"action": "retry", "filter": {"status": "failed"}})
        connection.request("POST", "/admin/job-management/plans", body, headers)
        answer = json.loads(connection.getresponse().read())
    return f"/plans/{answer['data']['plan_id']}"


def measure(daemon: Scene, rounds: int) -> dict[str, Any]:
    measured = {}
    paths = PATHS | {"plan for thousands": planned(daemon)}
    with closing(http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=60)) as connection:
        for name, path in paths.items():
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
    options.add_argument("--failed", type=int, default=5_000)
    options.add_argument("--completed", type=int, default=20_000)
    options.add_argument("--rounds", type=int, default=40)
    options.add_argument("--most-ms", type=float, default=ENOUGH_MS, help="median of a page above which it is slow")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as directory, Scene(Path(directory), HOOK) as daemon:
        fill(daemon, chosen.jobs, chosen.in_work, chosen.failed, chosen.completed)
        pages = measure(daemon, chosen.rounds)
    names = ("jobs", "in_work", "failed", "completed", "rounds")
    world = {name: getattr(chosen, name) for name in names}
    print(json.dumps({**world, "pages": pages}, indent=2))
    slow = [name for name, found in pages.items() if found["median_ms"] > chosen.most_ms]
    if slow:
        sys.exit(f"over {chosen.most_ms:g} ms: {', '.join(slow)}")


if __name__ == "__main__":
    main()
