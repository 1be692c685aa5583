"""Measure throughput and reads with slow syncs, per commit mode: `python -m tests.benchmarks.slow_disk` prints JSON.

strace slows the disk down and is attached in all runs, so this needs root. The runs are in turns. For each delay and
mode: lifecycles per second, statistics of the commits, and the duration of concurrent reads of a live job and of
/healthz. With `--history`, pages of finished jobs are read, too, one every 100 ms. `explained` is the share of time
spent in commits: near 1, nothing else delays the work, and each commit carries the commands that arrived during the
previous one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any, Final, get_args

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from jobd.storage.commit_mode import CommitSetting
from tests.benchmarks.work import LoadRequest
from tests.proof.faults.slow_disk import FIRST_SLOW_SYNC
from tests.proof.faults.strace import SYNCS, Strace
from tests.support.daemon_process import DaemonProcess, call

PAUSE_S: Final = 0.005  # between two reads, so that the reads are not a load themselves
PAGE_EVERY_S: Final = 0.1
PAGE: Final = "/admin/job-management/jobs?limit=200&status=completed"
READS: Final = {"read": "/v1/jobs/read", "healthz": "/healthz"}
SUMS: Final = ("jobd_commit_seconds_count", "jobd_commit_seconds_sum", "jobd_batch_commands_sum")


def measure(commit: str, delay_ms: float, seconds: float, connections: int, with_history: bool) -> dict[str, float]:
    config = f'[store]\ncommit = "{commit}"\n'
    with tempfile.TemporaryDirectory() as directory, DaemonProcess.not_started(Path(directory), config) as daemon:
        Strace(daemon, SYNCS, f"fdatasync:delay_enter={delay_ms * 1000:.0f}:when={FIRST_SLOW_SYNC}+")
        daemon.start()
        assert daemon.post("/v1/jobs", {"id": "read", "queue": "aside"}).status == 201
        request = msgspec.json.encode(LoadRequest("lifecycle", daemon.socket, seconds=seconds, connections=connections))
        before, began_s = sums(daemon), time.perf_counter()
        load = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.load", request.decode()], stdout=subprocess.PIPE, text=True
        )
        pages_ms: list[float] = []
        pages = threading.Thread(target=read_pages, args=(daemon, load, pages_ms))
        if with_history:
            pages.start()
        read_ms = read_repeatedly(daemon, load)
        if with_history:
            pages.join()
        took_s, after = time.perf_counter() - began_s, sums(daemon)
        assert load.stdout is not None
        figures: dict[str, Any] = json.loads(load.stdout.read())
        assert load.wait() == 0
        assert daemon.stop() == 0
    commits, in_commits_s, commands = (after[name] - before[name] for name in SUMS)
    found = {
        "lifecycles_per_s": round(figures["lifecycles_per_s"]),
        "commands_per_commit": round(commands / commits, 1),
        "commit_ms": round(in_commits_s / commits * 1000, 2),
        "explained": round(in_commits_s / took_s, 3),
    }
    durations = {name: read_ms[path] for name, path in READS.items()} | ({"page": pages_ms} if with_history else {})
    for name, times in durations.items():
        percent = statistics.quantiles(times, n=100)
        found |= {f"{name}_p50_ms": round(percent[49], 2), f"{name}_p99_ms": round(percent[98], 2)}
    return found


def read_repeatedly(daemon: DaemonProcess, load: subprocess.Popen[str]) -> dict[str, list[float]]:
    """Read a live job and /healthz repeatedly while the load runs; return the durations in ms by path."""
    found: dict[str, list[float]] = {path: [] for path in READS.values()}
    with closing(daemon.worker()) as connection:
        while load.poll() is None:
            for path, times in found.items():
                began_s = time.perf_counter()
                assert call(connection, "GET", path).status == 200
                times.append((time.perf_counter() - began_s) * 1000)
            time.sleep(PAUSE_S)
    return found


def read_pages(daemon: DaemonProcess, load: subprocess.Popen[str], durations_ms: list[float]) -> None:
    """Read a page of finished jobs every PAGE_EVERY_S while the load runs."""
    while load.poll() is None:
        began_s = time.perf_counter()
        assert daemon.admin("GET", PAGE).status == 200
        took_s = time.perf_counter() - began_s
        durations_ms.append(took_s * 1000)
        time.sleep(max(0.0, PAGE_EVERY_S - took_s))


def sums(daemon: DaemonProcess) -> dict[str, float]:
    families = text_string_to_metric_families(daemon.admin("GET", "/metrics").body.decode())
    found = {sample.name: sample.value for family in families for sample in family.samples}
    return {name: found[name] for name in SUMS}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--delay-ms", type=float, nargs="*", default=[0.0, 5.0, 20.0])
    options.add_argument("--commit", nargs="*", default=list(get_args(CommitSetting)))
    options.add_argument("--seconds", type=float, default=5.0)
    options.add_argument("--connections", type=int, nargs="*", default=[16, 64])
    options.add_argument("--runs", type=int, default=3, help="number of runs; the medians are printed")
    options.add_argument("--history", action="store_true", help="read pages of finished jobs, too")
    chosen = options.parse_args()
    places = list(product(chosen.connections, chosen.delay_ms, chosen.commit))
    runs = [
        [
            measure(commit, delay_ms, chosen.seconds, connections, chosen.history)
            for connections, delay_ms, commit in places
        ]
        for _ in range(chosen.runs)
    ]
    found = [
        {"connections": connections, "delay_ms": delay_ms, "commit": commit}
        | {key: statistics.median(run[index][key] for run in runs) for key in runs[0][index]}
        for index, (connections, delay_ms, commit) in enumerate(places)
    ]
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
