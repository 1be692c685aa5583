"""Measure each page of the dashboard with many jobs: `python -m tests.benchmarks.pages` prints JSON.

Times are measured by a client on loopback, in ms from request to last byte. Some jobs are processing or completed, some
failed with different errors, one has a long timeline. There are audit entries, and a webhook that lags behind. Exit
code 1 if the median of a page is above `--max-ms`.
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

from tests.browser.scenarios import WEBHOOK, DashboardDaemon
from tests.support.daemon_process import TOKEN

BULK: Final = 1_000
QUEUES: Final = ("video", "mail", "reports", "imports", "images")
ERRORS: Final = 40  # different error messages
TRIES: Final = 200  # of the job with the long timeline
ENOUGH_MS: Final = 50.0
HOOK: Final = f'{WEBHOOK}events = ["job.failed"]\n'
PATHS: Final = {
    "overview": "/",
    "overview, live update": "/",
    "chart": "/chart.json",
    "jobs": "/jobs",
    "jobs by queue and status": "/jobs?status=queued&queue=mail",
    "jobs without a match": "/jobs?kind=none",
    "jobs with a text": "/jobs?q=xxxx",
    "jobs with a text, without a match": "/jobs?q=nowhere",
    "failed jobs": "/jobs?status=failed",
    "completed jobs": "/jobs?status=completed",
    "completed jobs, without a match": "/jobs?status=completed&kind=none",
    "failures": "/failures",
    "job": "/jobs/job-99",
    "job with a long timeline": "/jobs/story",
    "plan for thousands": "",
    "confirm": "/jobs/job-99/confirm?verb=cancel",
    "queues": "/queues",
    "workers": "/workers",
    "cleanup": "/cleanup",
    "cleanup, preview of a run": "/cleanup/confirm?what=run",
    "cleanup, preview of recovery": "/cleanup/confirm?what=recover",
    "clock": "/clock",
    "webhooks": "/webhooks",
    "webhook with thousands of messages": "/webhooks/billing",
    "webhook, before a retry of all": "/webhooks/billing/again",
    "audit": "/audit",
    "alerts": "/alerts",
    "docs": "/docs",
}


def fill(daemon: DashboardDaemon, count: int, processing: int, failed: int, completed: int) -> None:
    create_job_with_long_timeline(daemon)
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
    for number in range(0, processing, 100):
        daemon.do("claim", worker=f"worker-{number // 100}", queues=list(QUEUES), limit=min(100, processing - number))
    for number in range(0, completed, 100):
        claimed = daemon.do("claim", worker="completes", queues=list(QUEUES), limit=min(100, completed - number))
        for grant in claimed["grants"]:
            daemon.do(f"jobs/{grant['job']['id']}/complete", lock_id=grant["lock_id"], metadata={"pages": number})
    for number in range(60):
        daemon.operator("POST", "force-fail", {"jobId": f"job-{count - 1 - number}", "reason": "benchmark"})


def create_job_with_long_timeline(daemon: DashboardDaemon) -> None:
    """Create a job with a large payload and many attempts."""
    daemon.do("jobs", id="story", queue="story", max_attempts=TRIES + 1, payload={"text": "x" * 200_000})
    for _ in range(TRIES):
        lock_id = daemon.do("jobs/story/start", worker="tries")["lock_id"]
        for progress in (10, 50):
            daemon.do("jobs/story/progress", lock_id=lock_id, progress=progress, message="in progress")
        daemon.do("jobs/story/fail", lock_id=lock_id, error_message="not yet", retry_after_ms=0)


def plan_path(daemon: DashboardDaemon) -> str:
    """Make a plan and return the path of its page."""
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    with closing(http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=60)) as connection:
        body = json.dumps({"action": "retry", "filter": {"status": "failed"}})
        connection.request("POST", "/admin/job-management/plans", body, headers)
        response = json.loads(connection.getresponse().read())
    return f"/plans/{response['data']['plan_id']}"


def measure(daemon: DashboardDaemon, rounds: int) -> dict[str, Any]:
    measured = {}
    paths = PATHS | {"plan for thousands": plan_path(daemon)}
    with closing(http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=60)) as connection:
        for name, path in paths.items():
            headers = {"Authorization": f"Bearer {TOKEN}"} | ({"HX-Request": "true"} if "live update" in name else {})
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
                "max_ms": round(times[-1], 2),
                "bytes": size,
            }
    return measured


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--jobs", type=int, default=100_000)
    options.add_argument("--processing", type=int, default=1_000)
    options.add_argument("--failed", type=int, default=5_000)
    options.add_argument("--completed", type=int, default=20_000)
    options.add_argument("--rounds", type=int, default=40)
    options.add_argument("--max-ms", type=float, default=ENOUGH_MS, help="median of a page above which it is slow")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as directory, DashboardDaemon(Path(directory), HOOK) as daemon:
        fill(daemon, chosen.jobs, chosen.processing, chosen.failed, chosen.completed)
        pages = measure(daemon, chosen.rounds)
    names = ("jobs", "processing", "failed", "completed", "rounds")
    parameters = {name: getattr(chosen, name) for name in names}
    print(json.dumps({**parameters, "pages": pages}, indent=2))
    slow = [name for name, found in pages.items() if found["median_ms"] > chosen.max_ms]
    if slow:
        sys.exit(f"over {chosen.max_ms:g} ms: {', '.join(slow)}")


if __name__ == "__main__":
    main()
