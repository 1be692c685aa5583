"""Many abusive clients beside a normal one: idle connections, slow readers, half-sent bodies, too many connections.

The abusive clients run in other processes (crowd_process.py). These checks measure the delay of a normal client.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any, Final

from tests.proof.faults.crowd_process import connection_limit
from tests.proof.faults.harness import Counts, Tool, Trial, check, program
from tests.support.daemon_process import DaemonProcess, call, die_with_us
from tests.support.polling import poll_until

MAX_SLOWDOWN: Final = 2.0  # the highest p99 with the others, relative to the one without
LIFECYCLES: Final = 150
FLOODERS: Final = 24
DESCRIPTORS: Final = 200
IDLE: Final = 10_000
MANY_FILES = Tool(
    f"room for {IDLE} connections", "none: raise the limit of open files", lambda: connection_limit() > IDLE
)


@contextmanager
def crowd(kind: str, daemon: DaemonProcess, count: int) -> Iterator[dict[str, int]]:
    """Keep many connections open while the block runs. Yield their number and, after the block, their results."""
    command = [sys.executable, "-m", "tests.proof.faults.crowd_process", kind, daemon.socket, str(count)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_us
    )
    assert process.stdin is not None
    assert process.stdout is not None
    report: dict[str, int] = {}
    try:
        report |= json.loads(process.stdout.readline())
        yield report
        process.stdin.close()
        report |= json.loads(process.stdout.readline())
        assert process.wait(150) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def descriptors(daemon: DaemonProcess) -> int:
    """Return the number of files and sockets that the daemon has open."""
    return len(os.listdir(f"/proc/{daemon.process.pid}/fd"))


def wait_until(daemon: DaemonProcess, least: float, most: float) -> None:
    """Wait until the daemon has this number of descriptors open."""
    poll_until(lambda: least <= descriptors(daemon) <= most)


def p99_ms(daemon: DaemonProcess, lifecycles: int) -> float:
    """Return the p99 of the calls of whole lifecycles on one connection."""
    took_s: list[float] = []
    with closing(daemon.worker()) as connection:

        def ask(path: str, body: Any) -> Any:
            began_s = time.perf_counter()
            reply = call(connection, "POST", path, body)
            took_s.append(time.perf_counter() - began_s)
            return reply.data

        for _ in range(lifecycles):
            path = f"/v1/jobs/{ask('/v1/jobs', {'queue': 'honest', 'payload': {'a': 1}})['id']}"
            lock = {"lock_id": ask(f"{path}/start", {"worker": "honest"})["lock_id"]}
            ask(f"{path}/progress", {**lock, "progress": 50})
            ask(f"{path}/complete", {**lock, "metadata": 1})
    return statistics.quantiles(took_s, n=100)[98] * 1000


def measure_with_crowd(kind: str, count: int, trial: Trial, prepare: Any = None) -> Counts:
    """Measure a normal client's p99 with and without the others, alternating."""
    alone: list[float] = []
    together: list[float] = []
    outcomes: Counter[str] = Counter()
    lifecycles = LIFECYCLES if trial.timed else LIFECYCLES // 5
    with DaemonProcess(trial.directory) as daemon:
        if prepare is not None:
            prepare(daemon)
        p99_ms(daemon, lifecycles)
        few = descriptors(daemon)
        for _ in range(trial.rounds):
            alone.append(p99_ms(daemon, lifecycles))
            with crowd(kind, daemon, count) as report:
                wait_until(daemon, report["count"], math.inf)
                together.append(p99_ms(daemon, lifecycles))
                assert descriptors(daemon) >= report["count"] * 0.5, "the other clients disconnected"
            outcomes.update({what: number for what, number in report.items() if what != "count"})
            wait_until(daemon, 0, few + 2)
        assert daemon.stop() == 0
        assert b" level=error " not in daemon.log
    ratio = statistics.median(together) / statistics.median(alone)
    assert ratio <= MAX_SLOWDOWN or not trial.timed, f"p99 {alone} ms alone, {together} ms beside them"
    times = {"p99 alone, us": alone, "p99 with them, us": together}
    figures = {what: round(statistics.median(values) * 1000) for what, values in times.items()}
    return {"connections": count, **figures, "percent of its own p99": round(ratio * 100), **outcomes}


@check(rounds=5, needs=(MANY_FILES,))
def idle_connections(trial: Trial) -> Counts:
    """10 000 idle connections: a normal client's p99 at most doubles."""
    return measure_with_crowd("idle", IDLE if trial.timed else 1_000, trial)


@check(rounds=5)
def half_sent_bodies(trial: Trial) -> Counts:
    """500 clients that never finish sending a body: the same."""
    return measure_with_crowd("half", 500 if trial.timed else 100, trial)


@check(rounds=5)
def slow_readers(trial: Trial) -> Counts:
    """100 clients that read long lists very slowly: the same."""

    def long_list(daemon: DaemonProcess) -> None:
        jobs = [{"queue": "long", "payload": "x" * 10_000} for _ in range(90)]
        for _ in range(3):
            assert daemon.post("/v1/jobs/bulk", {"jobs": jobs}).status == 201

    return measure_with_crowd("slow", 100 if trial.timed else 20, trial, long_list)


# -- a full mailbox ----------------------------------------------------------------------------------------------------


def _flood(daemon: DaemonProcess, stop: threading.Event, responses: Counter[str], lock: threading.Lock) -> None:
    with closing(daemon.worker()) as connection:
        while not stop.is_set():
            reply = call(connection, "POST", "/v1/jobs/bulk", {"jobs": [{"queue": "flood"}] * 50})
            if reply.status != 201:
                assert (reply.status, reply.error) == (503, "overloaded"), reply.body
                assert int(reply.headers["Retry-After"]) >= 1
            with lock:
                responses[str(reply.status)] += 1


@check(rounds=50)
def mailbox_flood(trial: Trial) -> Counts:
    """A full mailbox: creates get 503 with Retry-After; running jobs can report and operators can act throughout."""
    responses: Counter[str] = Counter()
    lock, stop = threading.Lock(), threading.Event()
    reports = 0
    with DaemonProcess(trial.directory, "[limits]\nmailbox = 10\n") as daemon, ExitStack() as threads:
        assert daemon.post("/v1/jobs", {"id": "held"}).status == 201
        held = {"lock_id": daemon.post("/v1/jobs/held/start", {"worker": "w"}).data["lock_id"]}
        for _ in range(FLOODERS):
            thread = threading.Thread(target=_flood, args=(daemon, stop, responses, lock))
            thread.start()
            threads.callback(thread.join)
        threads.callback(stop.set)
        while responses["503"] < 100:  # from here on the mailbox is full
            assert daemon.post("/v1/jobs/held/extend", held).status == 200
        for _ in range(trial.rounds):
            for number in range(10):
                assert daemon.post("/v1/jobs/held/progress", {**held, "progress": number}).status == 200
                assert daemon.post("/v1/jobs/held/extend", held).status == 200
            job_id = f"op-{reports}"
            assert daemon.admin("POST", "queues/other/pause").status == 200
            assert daemon.admin("POST", "force-fail", {"jobId": job_id}).status == 404
            reports += 22
        stop.set()
        threads.close()
        assert daemon.post("/v1/jobs/held/complete", held).status == 200
        created = responses["201"] * 50
        assert daemon.admin("GET", "stats").data["byStatus"]["queued"] == created, "a rejected create left a job"
        assert daemon.stop() == 0
    return {
        "reports and operator actions accepted": reports,
        "creates accepted": responses["201"],
        "creates rejected": responses["503"],
    }


# -- no descriptors left ----------------------------------------------------------------------------------------------


@check(rounds=10, needs=(program("prlimit", "util-linux"),))
def no_descriptors(trial: Trial) -> Counts:
    """More connections than file descriptors: the daemon serves open connections, and accepts new ones later."""
    excess = 0
    daemon = DaemonProcess(trial.directory)
    prlimit = shutil.which("prlimit")
    assert prlimit is not None
    daemon.prefix = [prlimit, f"--nofile={DESCRIPTORS}"]
    with daemon:
        few = descriptors(daemon)
        with closing(daemon.worker()) as early:
            job_id = call(early, "POST", "/v1/jobs", {"payload": 1}).data["id"]
            for _ in range(trial.rounds):
                lines = [socket.socket(socket.AF_UNIX) for _ in range(2 * DESCRIPTORS)]
                for line in lines:
                    line.connect(daemon.socket)
                assert call(early, "POST", f"/v1/jobs/{job_id}/update", {}).status == 404  # open connections are served
                assert call(early, "POST", "/v1/jobs", {"payload": 2}).status == 201
                for line in lines:
                    line.close()
                excess += 2 * DESCRIPTORS - (DESCRIPTORS - few)
                wait_until(daemon, 0, few + 3)
                assert daemon.get("/readyz").status == 200
        assert daemon.get(f"/v1/jobs/{job_id}").data["payload"] == 1
        assert daemon.stop() == 0
        assert len(daemon.log) < 1_000_000, "the log was flooded"
    return {"connections over the limit": excess, "bytes of log": len(daemon.log)}
