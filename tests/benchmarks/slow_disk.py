"""Measure throughput and reads on a disk with slow syncs: `python -m tests.benchmarks.slow_disk` prints JSON.

strace slows the disk down and is attached in both runs, so this needs root. For each run: lifecycles per second,
statistics of the commits, and the duration of concurrent reads of a live job. `explained` is the share of time spent in
commits: near 1, nothing else delays the work, and each commit carries the commands that arrived during the previous
one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from tests.benchmarks.work import LoadRequest
from tests.proof.faults.slow_disk import FIRST_SLOW_SYNC
from tests.proof.faults.strace import SYNCS, Strace
from tests.support.daemon_process import DaemonProcess, call

PAUSE_S: Final = 0.005  # between two reads, so that the reads are not a load themselves
SUMS: Final = ("jobd_commit_seconds_count", "jobd_commit_seconds_sum", "jobd_batch_commands_sum")


def measure(delay_ms: float, seconds: float, connections: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as directory, DaemonProcess.not_started(Path(directory), "") as daemon:
        Strace(daemon, SYNCS, f"fdatasync:delay_enter={delay_ms * 1000:.0f}:when={FIRST_SLOW_SYNC}+")
        daemon.start()
        assert daemon.post("/v1/jobs", {"id": "read", "queue": "aside"}).status == 201
        request = msgspec.json.encode(LoadRequest("lifecycle", daemon.socket, seconds=seconds, connections=connections))
        before, began_s = sums(daemon), time.perf_counter()
        load = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.load", request.decode()], stdout=subprocess.PIPE, text=True
        )
        reads_ms = read_repeatedly(daemon, load)
        took_s, after = time.perf_counter() - began_s, sums(daemon)
        assert load.stdout is not None
        figures: dict[str, Any] = json.loads(load.stdout.read())
        assert load.wait() == 0
        assert daemon.stop() == 0
    commits, in_commits_s, commands = (after[name] - before[name] for name in SUMS)
    percent = statistics.quantiles(reads_ms, n=100)
    return {
        "lifecycles_per_s": round(figures["lifecycles_per_s"]),
        "commands_per_commit": round(commands / commits, 1),
        "commit_ms": round(in_commits_s / commits * 1000, 2),
        "explained": round(in_commits_s / took_s, 3),
        "read_p50_ms": round(percent[49], 2),
        "read_p99_ms": round(percent[98], 2),
    }


def read_repeatedly(daemon: DaemonProcess, load: subprocess.Popen[str]) -> list[float]:
    """Read one live job repeatedly while the load runs; return the duration of each read in ms."""
    found = []
    with closing(daemon.worker()) as connection:
        while load.poll() is None:
            began_s = time.perf_counter()
            assert call(connection, "GET", "/v1/jobs/read").status == 200
            found.append((time.perf_counter() - began_s) * 1000)
            time.sleep(PAUSE_S)
    return found


def sums(daemon: DaemonProcess) -> dict[str, float]:
    families = text_string_to_metric_families(daemon.admin("GET", "/metrics").body.decode())
    found = {sample.name: sample.value for family in families for sample in family.samples}
    return {name: found[name] for name in SUMS}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--delay-ms", type=float, default=20.0)
    options.add_argument("--seconds", type=float, default=5.0)
    options.add_argument("--connections", type=int, nargs="*", default=[16, 64])
    options.add_argument("--runs", type=int, default=3, help="number of runs; the median is printed")
    chosen = options.parse_args()
    found: dict[str, Any] = {"delay_ms": chosen.delay_ms}
    for connections in chosen.connections:
        runs = [
            [measure(delay_ms, chosen.seconds, connections) for delay_ms in (0, chosen.delay_ms)]
            for _ in range(chosen.runs)
        ]
        report = {
            name: {key: statistics.median(run[place][key] for run in runs) for key in runs[0][place]}
            for place, name in enumerate(("as it is", "slow"))
        }
        found[f"{connections} connections"] = report
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
