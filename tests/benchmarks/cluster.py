"""Measure a cluster beside a single daemon: `python -m tests.benchmarks.cluster` prints JSON after some four minutes.

Everything runs on this machine, PostgreSQL with its real fsync. Shown are:

- lifecycles per second of a daemon with a local journal, of one with a journal on one server and of one with a quorum
  of two of three, in turns: medians, and medians of the ratios to the local journal of the same turn
- bytes of WAL per lifecycle
- durations of lifecycles without and with a standby that writes snapshots all the time
- seconds from the start of a node with an empty disk until it has all records

The last two with `--live` queued and as many finished jobs, and a quorum of two of three.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from jobd.cluster.snapshot_schedule import MIN_RECORDS
from jobd.journal.postgres.journal import create
from tests import ROOT
from tests.benchmarks.stage import BenchFailed
from tests.benchmarks.work import LoadRequest
from tests.support import postgres
from tests.support.daemon_process import TOKEN, DaemonProcess
from tests.support.node_process import NodeProcess
from tests.support.polling import poll_until
from tests.support.postgres import PostgresServer

LOADS: Final = {
    "16 connections": ("lifecycle", 16),
    "1 connection": ("lifecycle", 1),
    "4 streams": ("stream", 16),
}
# Without a checkpoint, which would write full pages into the WAL and disturb the turn in which it happens.
SERVER: Final = {"shared_buffers": "128MB", "max_wal_size": "8GB", "checkpoint_timeout": "1h"}
WRITTEN: Final = b"event=snapshot_written"


def load(daemon: DaemonProcess, kind: str, **asked: Any) -> dict[str, Any]:
    """Run a load of load.py in its own process, and return its figures."""
    request = msgspec.json.encode(LoadRequest(kind, daemon.socket, daemon.admin_socket, TOKEN, **asked))
    words = [sys.executable, "-m", "tests.benchmarks.load", request.decode()]
    run = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    if run.returncode:
        raise BenchFailed(f"the load {kind} ended with {run.returncode}: {run.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(run.stdout)
    return figures


@contextlib.contextmanager
def node(directory: Path, server: PostgresServer, name: str, snapshot_every: str = "1d") -> Iterator[NodeProcess]:
    """Run a node of the journal on `server`, and wait until it is a standby, at least."""
    with NodeProcess(directory / name, server.url(), name, JOBD_JOURNAL_SNAPSHOT_EVERY=snapshot_every) as made:
        yield made


# -- throughput and WAL ----------------------------------------------------------------------------------------------


def throughput(one: PostgresServer, quorum: PostgresServer, turns: int, seconds: float) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        local = stack.enter_context(DaemonProcess(directory))
        daemons: dict[str, tuple[DaemonProcess, PostgresServer | None]] = {"local": (local, None)}
        for name, server in (("one server", one), ("quorum", quorum)):
            led = stack.enter_context(node(directory, server, f"{name.split()[0]}-leader"))
            led.wait_leads()
            daemons[name] = (led, server)
        for each, _ in daemons.values():
            load(each, "lifecycle", seconds=1.0)
        measured = [
            {
                label: {name: _turn(*place, kind, connections, seconds) for name, place in daemons.items()}
                for label, (kind, connections) in LOADS.items()
            }
            for _ in range(turns)
        ]
    return {label: _medians([turn[label] for turn in measured]) for label in LOADS}


def _turn(
    daemon: DaemonProcess, server: PostgresServer | None, kind: str, connections: int, seconds: float
) -> dict[str, float]:
    before = 0 if server is None else _wal_bytes(server)
    per_s = load(daemon, kind, connections=connections, seconds=seconds)["lifecycles_per_s"]
    wal = 0 if server is None else _wal_bytes(server) - before
    return {"lifecycles_per_s": per_s, "wal_bytes": wal / (per_s * seconds)}


def _medians(turns: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name in turns[0]:
        per_s = statistics.median(turn[name]["lifecycles_per_s"] for turn in turns)
        found[name] = {"lifecycles_per_s": round(per_s)}
        if name != "local":
            ratios = [turn[name]["lifecycles_per_s"] / turn["local"]["lifecycles_per_s"] for turn in turns]
            wal = statistics.median(turn[name]["wal_bytes"] for turn in turns)
            found[name] |= {"ratio": round(statistics.median(ratios), 2), "wal_bytes_per_lifecycle": round(wal)}
    return found


def _wal_bytes(server: PostgresServer) -> int:
    return int(float(server.sql("SELECT pg_current_wal_lsn() - '0/0'")))


# -- snapshots and the first start of a node -------------------------------------------------------------------------


def snapshots(server: PostgresServer, live: int, seconds: float, starts: int) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        leader = stack.enter_context(node(directory, server, "leader"))
        leader.wait_leads()
        load(leader, "fill", count=live)
        load(leader, "finish", count=live)
        while leader.cluster()["record"] <= MIN_RECORDS:
            load(leader, "lifecycle", seconds=1.0)
        with node(directory, server, "standby") as standby:
            _wait_until_followed(standby, leader)
            quiet = load(leader, "lifecycle", seconds=seconds)
            assert standby.stop() == 0
        with node(directory, server, "standby", "1s") as standby:
            _wait_until_followed(standby, leader)
            standby.wait_for_log(WRITTEN)
            busy = load(leader, "lifecycle", seconds=seconds)
            assert standby.stop() == 0
            written = standby.log.count(WRITTEN)
        times_s = [_first_start(directory, server, leader, f"new-{number}") for number in range(starts)]
    return {
        "lifecycles": {
            "without": {"lifecycles_per_s": round(quiet["lifecycles_per_s"]), **quiet["lifecycle"]},
            "with": {"lifecycles_per_s": round(busy["lifecycles_per_s"]), **busy["lifecycle"]},
            "snapshots": written,
            "ratio_p99": round(busy["lifecycle"]["p99_ms"] / quiet["lifecycle"]["p99_ms"], 2),
        },
        "first_start_s": {"median": round(statistics.median(times_s), 2), "max": round(max(times_s), 2)},
    }


def _first_start(directory: Path, server: PostgresServer, leader: NodeProcess, name: str) -> float:
    """Start a node with an empty disk. Return the seconds until it has all records."""
    began_s = time.perf_counter()
    with node(directory, server, name) as started:
        _wait_until_followed(started, leader)
        return time.perf_counter() - began_s


def _wait_until_followed(standby: NodeProcess, leader: NodeProcess) -> None:
    record = leader.cluster()["record"]
    poll_until(lambda: (standby.cluster()["record"] or 0) >= record)


# --------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load")
    parser.add_argument("--live", type=int, default=100_000, help="queued jobs, and as many finished ones")
    parser.add_argument("--starts", type=int, default=3, help="of a node with an empty disk")
    options = parser.parse_args()
    found: dict[str, Any] = {"postgresql": postgres.version(), "load": os.getloadavg()[0]}
    with postgres.postgres(**SERVER) as one, postgres.postgres_cluster(2, **SERVER) as servers:
        for server in (one, servers[0]):
            asyncio.run(create(server.url(), "main", "main"))
        found["throughput"] = throughput(one, servers[0], options.turns, options.seconds)
    with postgres.postgres_cluster(2, **SERVER) as servers:
        asyncio.run(create(servers[0].url(), "main", "main"))
        found["snapshots"] = snapshots(servers[0], options.live, 4 * options.seconds, options.starts)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
