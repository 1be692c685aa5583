"""A day of a small shop, replayed through the worker API, so that all numbers of a page come from the same jobs."""

from __future__ import annotations

import heapq
import math
import mmap
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final, NamedTuple

from jobd.model.job import DAY_MS, HOUR_MS, MINUTE_MS, SECOND_MS
from jobd.monitoring.timeseries import STEP_MS
from tests.browser.scenarios import DashboardDaemon
from tests.support.daemon_process import call

END_OF_DAY_MS: Final = 16 * HOUR_MS - STEP_MS  # the time in UTC at which a replay ends
# Times before the end. The daemon keeps jobs for a day, so the days without jobs leave no trace.
UP_MS: Final = 12 * DAY_MS + 4 * HOUR_MS
BUSY_MS: Final = DAY_MS + HOUR_MS
PAUSED_MS: Final = 35 * MINUTE_MS
CONFIG: Final = "[retention]\ncompleted = '1d'\nfailed = '1d'\ncancelled = '1d'\n"


class Work(NamedTuple):
    """The jobs of a queue: `per_step` in 10 s of the busiest hour, `limit` at once per worker, `fails` per attempt."""

    kind: str
    per_step: float
    takes_s: tuple[int, int]
    workers: tuple[str, ...]
    limit: int
    payload: dict[str, Any]
    fails: float
    error_code: str
    error: str


QUEUES: Final = {
    "mail": Work(
        "confirmation", 2, (10, 20), ("web-1", "web-2"), 4, {"template": "order", "language": "en"},
        0.02, "smtp", "451 4.7.1 mx.example: Greylisted, try again in 60 seconds",
    ),
    "images": Work(
        "thumbnail", 1.5, (10, 30), ("web-1", "web-2"), 4, {"file": "/srv/in/lamp.jpg", "widths": [160, 640]},
        0.01, "decode", "PIL.UnidentifiedImageError: cannot identify image file '/srv/in/lamp.jpg'",
    ),
    "video": Work(
        "transcode", 0.12, (240, 540), ("render-1", "render-2"), 4, {"file": "/srv/in/lamp.mov", "height": 1080},
        0.06, "ffmpeg", "ffmpeg exited with status 1: moov atom not found",
    ),
    "imports": Work(
        "price-list", 0.2, (20, 60), ("office-1",), 2, {"supplier": "Lumen", "file": "/srv/in/prices.csv"},
        0.05, "csv", "line 214: column vat is missing",
    ),
}  # fmt: skip


class Running(NamedTuple):
    """A granted job. It ends at `ends_at`; `at` is its next report or its end."""

    at: int
    job_id: str
    lock_id: str
    queue: str
    worker: str
    started_at: int
    ends_at: int


class Shop(DashboardDaemon):
    """A daemon whose clocks start 12 days before `end_ms` and are moved by `replay`."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, CONFIG)
        self.variant = "replayed_time"
        now = time.time_ns() // 1_000_000
        self.end_ms = now - (now - END_OF_DAY_MS) % DAY_MS
        self._at = self.end_ms - BUSY_MS
        self._chance = random.Random(7)
        self._running: list[Running] = []
        self._count = 61_200
        self._waiting: Counter[str] = Counter()
        file = directory / "behind_ns"
        file.write_bytes(bytes(8))
        with file.open("r+b") as shared:
            self._behind = mmap.mmap(shared.fileno(), 8)
        self._set_time(self.end_ms - UP_MS)

    def _set_time(self, at_ms: int) -> None:
        self._behind[:] = (time.time_ns() - at_ms * 1_000_000).to_bytes(8)

    @property
    def video(self) -> str:
        """The id of the transcode that has run longest, which the overview shows too."""
        return min((each.started_at, each.job_id) for each in self._running if each.queue == "video")[1]

    def replay(self, until_ms: int) -> None:
        """Create and run jobs up to this time, and at it."""
        self._calls = self.worker()
        while self._at <= until_ms:
            self._set_time(self._at)
            self._report()
            self._create()
            self._claim()
            if self._at == self.end_ms - PAUSED_MS:
                self.operator("POST", "queues/imports/pause", {"reason": "no VAT column in the list of Lumen"})
            if (self.end_ms - 2 * MINUTE_MS - self._at) % (5 * MINUTE_MS) == 0:
                self.operator("POST", "cleanup")
            self._at += STEP_MS
        self._calls.close()

    def _do(self, path: str, **body: Any) -> Any:
        return call(self._calls, "POST", f"/v1/{path}", body).data

    def _create(self) -> None:
        hour = self._at % DAY_MS / HOUR_MS
        busy = 0.55 + 0.45 * math.cos((hour - 14) / 24 * 2 * math.pi)
        jobs = []
        for queue, work in QUEUES.items():
            usual = busy * work.per_step
            most = math.ceil(usual) + 1
            for _ in range(sum(self._chance.random() < usual / most for _ in range(most))):
                self._count += 1
                self._waiting[queue] += 1
                payload = {"order": self._count // 3, **work.payload}
                jobs.append({"id": f"{work.kind}-{self._count}", "queue": queue, "kind": work.kind, "payload": payload})
        if jobs:
            self._do("jobs/bulk", jobs=[{**job, "max_attempts": 3} for job in jobs])
        if self._chance.random() < 0.01 and jobs:
            self._do(f"jobs/{jobs[0]['id']}/cancel", reason="the customer has cancelled the order")

    def _claim(self) -> None:
        busy = Counter((each.queue, each.worker) for each in self._running)
        for queue, work in QUEUES.items():
            for index, worker in enumerate(work.workers):
                limit = work.limit - busy[queue, worker]
                if limit and (self._waiting[queue] or self._at % MINUTE_MS == 0):  # a claim shows that it is alive
                    about = {"host": worker, "pid": 810 + index, "version": "0.1.0", "concurrency": work.limit}
                    for grant in self._do("claim", worker=worker, queues=[queue], limit=limit, about=about)["grants"]:
                        self._waiting[queue] -= 1
                        ends_at = self._at + self._chance.randint(*work.takes_s) * SECOND_MS
                        first = min(self._at + MINUTE_MS, ends_at)
                        job_id, lock = grant["job"]["id"], grant["lock_id"]
                        heapq.heappush(self._running, Running(first, job_id, lock, queue, worker, self._at, ends_at))

    def _report(self) -> None:
        """Report progress, or the end, of the jobs that are due."""
        while self._running and self._running[0].at <= self._at:
            job = heapq.heappop(self._running)
            work, path, lock = QUEUES[job.queue], f"jobs/{job.job_id}", job.lock_id
            if job.at < job.ends_at:
                progress = 100 * (job.at - job.started_at) // (job.ends_at - job.started_at)
                self._do(f"{path}/progress", lock_id=lock, progress=progress, message=f"pass {1 + progress // 50} of 2")
                heapq.heappush(self._running, job._replace(at=min(job.at + MINUTE_MS, job.ends_at)))
            elif self._chance.random() < work.fails:
                retry = self._chance.random() < 0.7
                self._waiting[job.queue] += retry
                self._do(
                    f"{path}/fail", lock_id=lock, retry=retry, error_code=work.error_code, error_message=work.error
                )
            else:
                self._do(f"{path}/complete", lock_id=lock, metadata={"host": job.worker})
