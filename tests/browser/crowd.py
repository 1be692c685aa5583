"""A daemon with very many jobs, for screenshots."""

from __future__ import annotations

from typing import Final

from tests.browser.scenarios import DashboardDaemon

BULK: Final = 1_000
QUEUES: Final = ("video", "mail", "reports", "imports", "images")
ERRORS: Final = 40  # different error messages
TRIES: Final = 200  # of the job with the long timeline


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
