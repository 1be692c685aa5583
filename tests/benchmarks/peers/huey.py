"""Huey on SQLite with fsync, a thread for each connection."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from tests.benchmarks.peers.clock import PAYLOAD
from tests.benchmarks.peers.server import module


def measure(directory: Path, connections: int, seconds: float) -> float:
    queue = module("huey").SqliteHuey("jobs", filename=str(directory / "huey.db"), fsync=True, timeout=60)

    @queue.task()  # type: ignore[untyped-decorator]
    def work(payload: str) -> int:
        return len(payload)

    done = [0] * connections
    began = time.perf_counter()

    def go_on(number: int) -> None:
        while time.perf_counter() - began < seconds:
            work(PAYLOAD)
            task = queue.dequeue()
            if task is not None:
                queue.execute(task)
                done[number] += 1

    threads = [threading.Thread(target=go_on, args=(number,)) for number in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - began)
