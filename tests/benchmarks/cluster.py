"""Measure a cluster beside a single daemon: `python -m tests.benchmarks.cluster` prints JSON after some ten minutes.

Everything runs on this machine, PostgreSQL with its real fsync. The parts are:

throughput
- lifecycles per second of a daemon with a local journal, of one with a journal on one server and of one with a quorum
  of two of three, in turns: medians, and medians of the ratios to the local journal of the same turn
- bytes of WAL per lifecycle
- events that a standby of the quorum has not applied during the same loads, as it reports them

snapshots, with `--live` queued and as many finished jobs, and a quorum of two of three
- durations of lifecycles without and with a standby that writes snapshots all the time
- seconds from the start of a node with an empty disk until it has all records

takeover, with `--live` jobs, a quorum of two of three and the default lease
- milliseconds from the end of the leader until a standby tries to lead, leads, is ready and has acknowledged a change
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from jobd.cluster.snapshot_schedule import MIN_RECORDS
from jobd.journal.postgres.journal import create
from tests import ROOT
from tests.benchmarks.stage import BenchFailed
from tests.benchmarks.work import LoadRequest
from tests.support import postgres
from tests.support.daemon_process import TOKEN, DaemonProcess, call
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
SAMPLE_S: Final = 0.02  # between two samples of the lag of a standby
LEASE: Final = "3s"  # the default
CLAIM: Final = 100  # jobs of one claim
IDLE_S: Final = 0.5  # without a record: the former takeover is over
POLL_S: Final = 0.005  # between two requests to the next leader
STEPS: Final = ("noticed", "leads", "ready", "acknowledged")


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
def node(
    directory: Path, server: PostgresServer, name: str, snapshot_every: str = "1d", **environ: str
) -> Iterator[NodeProcess]:
    """Run a node of the journal on `server`, and wait until it is a standby, at least."""
    settings = {"JOBD_JOURNAL_SNAPSHOT_EVERY": snapshot_every} | environ
    with NodeProcess(directory / name, server.url(), name, **settings) as made:
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
        lags = _lags(directory, quorum, led, turns * seconds)
    return {label: _medians([turn[label] for turn in measured]) | {"standby": lags[label]} for label in LOADS}


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


def _lags(directory: Path, server: PostgresServer, leader: NodeProcess, seconds: float) -> dict[str, dict[str, float]]:
    """Run each load with a standby, and sample how far it is behind."""
    found: dict[str, dict[str, float]] = {}
    with node(directory, server, "standby") as standby:
        for label, (kind, connections) in LOADS.items():
            _wait_until_followed(standby, leader)
            with _sampling(lambda: int(standby.cluster()["lag_events"])) as lags:
                per_s = load(leader, kind, connections=connections, seconds=seconds)["lifecycles_per_s"]
            found[label] = {
                "lifecycles_per_s": round(per_s),
                "samples": len(lags),
                "lag_events_p50": statistics.median(lags),
                "lag_events_max": max(lags),
            }
    return found


@contextlib.contextmanager
def _sampling(read: Callable[[], int]) -> Iterator[list[int]]:
    """Collect what `read` returns, until the context ends."""
    samples: list[int] = []
    is_over = threading.Event()

    def sample() -> None:
        while not is_over.wait(SAMPLE_S):
            samples.append(read())

    with ThreadPoolExecutor(1) as pool:
        sampling = pool.submit(sample)
        try:
            yield samples
        finally:
            is_over.set()
        sampling.result()


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

    def has_followed() -> bool:
        seen = standby.cluster()
        return bool((seen["record"] or 0) >= record and seen["lag_events"] == 0)

    poll_until(has_followed)


# -- takeovers -------------------------------------------------------------------------------------------------------


def takeovers(server: PostgresServer, live: int, times: int, lock_ttl_ms: int) -> dict[str, Any]:
    """Measure takeovers of a warm standby, `times` of each kind: first with queued jobs, then with half processing."""
    settings = {"JOBD_JOURNAL_LEASE": LEASE}
    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        leader = stack.enter_context(node(directory, server, "a", **settings))
        leader.wait_leads()
        load(leader, "fill", count=live)
        standby = stack.enter_context(node(directory, server, "b", **settings))
        for population, processing in (("queued", 0), ("half processing", live // 2)):
            _claim(leader, processing, lock_ttl_ms)
            for way, stop in (("process killed", signal.SIGKILL), ("machine lost", signal.SIGSTOP)):
                rounds = []
                for _ in range(times):
                    _wait_until_idle(leader)
                    _wait_until_followed(standby, leader)
                    rounds.append(_takeover(leader, standby, stop))
                    leader, standby = standby, leader
                    held = leader.admin("GET", "stats").data["byStatus"]["processing"]
                    if held != processing:
                        raise BenchFailed(f"{held} jobs are processing, not {processing}")
                found[f"{population}, {way}"] = {step: _summary([each[step] for each in rounds]) for step in STEPS}
    return found


def _wait_until_idle(leader: NodeProcess) -> None:
    """Wait until the leader writes no records, so that the standby has nothing to catch up with."""
    record = None
    while record != (record := leader.cluster()["record"]):
        time.sleep(IDLE_S)


def _claim(leader: NodeProcess, count: int, lock_ttl_ms: int) -> None:
    for claimed in range(0, count, CLAIM):
        claim = {"worker": "holder", "limit": min(CLAIM, count - claimed), "lock_ttl_ms": lock_ttl_ms}
        response = leader.post("/v1/claim", claim)
        if response.status != 200:
            raise BenchFailed(f"a claim failed: {response.body}")


def _takeover(leader: NodeProcess, standby: NodeProcess, stop: signal.Signals) -> dict[str, float]:
    """Stop the leader, and return the milliseconds until each step of the takeover. The leader is a standby then."""
    assert leader.process is not None
    with ThreadPoolExecutor(2) as pool:
        began_s = time.time()
        leader.process.send_signal(stop)
        ready = pool.submit(_first_success, standby, "GET", "/readyz")
        acknowledged = pool.submit(_first_success, standby, "POST", "/v1/jobs")
        at_s = {
            "noticed": _logged_at_s(standby, b"event=takes_over"),
            "leads": _logged_at_s(standby, b"event=leads"),
            "ready": ready.result(),
            "acknowledged": acknowledged.result(),
        }
    standby.wait_leads()
    if stop == signal.SIGSTOP:
        leader.process.send_signal(signal.SIGCONT)
        leader.process.wait()  # it is fenced
    leader.kill()
    leader.start()
    return {step: (at_s[step] - began_s) * 1000 for step in STEPS}


def _first_success(daemon: NodeProcess, method: str, path: str) -> float:
    """Repeat a request until it succeeds, and return the time of the response."""
    with contextlib.closing(daemon.worker()) as connection:
        while call(connection, method, path, {} if method == "POST" else None).status >= 300:
            time.sleep(POLL_S)
        return time.time()


def _logged_at_s(daemon: NodeProcess, event: bytes) -> float:
    return datetime.fromisoformat(daemon.wait_for_log(event).split()[0].removeprefix("timestamp=")).timestamp()


def _summary(times_ms: list[float]) -> dict[str, float]:
    return {"median_ms": round(statistics.median(times_ms)), "max_ms": round(max(times_ms))}


# --------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load")
    parser.add_argument("--live", type=int, default=100_000, help="jobs")
    parser.add_argument("--starts", type=int, default=3, help="of a node with an empty disk")
    parser.add_argument("--takeovers", type=int, default=10, help="of each kind")
    parser.add_argument("--lock-ttl-ms", type=int, default=900_000, help="of the jobs that are processing")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    found: dict[str, Any] = {"postgresql": postgres.version(), "load": os.getloadavg()[0]}
    for part in options.parts or PARTS:
        with postgres.postgres_cluster(2, **SERVER) as servers:
            asyncio.run(create(servers[0].url(), "main", "main"))
            found[part] = PARTS[part](servers[0], options)
    print(json.dumps(found, indent=2))


def _throughput(quorum: PostgresServer, options: argparse.Namespace) -> dict[str, Any]:
    with postgres.postgres(**SERVER) as one:
        asyncio.run(create(one.url(), "main", "main"))
        return throughput(one, quorum, options.turns, options.seconds)


PARTS: Final[dict[str, Callable[[PostgresServer, argparse.Namespace], dict[str, Any]]]] = {
    "throughput": _throughput,
    "snapshots": lambda server, options: snapshots(server, options.live, 4 * options.seconds, options.starts),
    "takeover": lambda server, options: takeovers(server, options.live, options.takeovers, options.lock_ttl_ms),
}


if __name__ == "__main__":
    main()
