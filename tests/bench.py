"""Figures of a real daemon on a real disk, as JSON: `python -m tests.bench`. A script, not a test: nothing is asserted.

Lifecycles (create, claim, complete; one request each, every answer after its fsync) over a Unix socket, the latency of
one connection, memory per live job, and the time to start with many of them. The load comes from this process, the
daemon is another one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop

from tests.process import die_with_us

PAYLOAD = "x" * 198  # 200 bytes as JSON
CONNECTIONS = 16


class Wire:
    """One keep-alive connection that speaks just enough HTTP to be no limit."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, path: str) -> Wire:
        return cls(*await asyncio.open_unix_connection(path, limit=1 << 24))

    async def call(self, path: str, body: bytes) -> Any:
        """The `data` of a POST; anything but success ends the run."""
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._writer.write(head.encode() + body)
        head_bytes = await self._reader.readuntil(b"\r\n\r\n")
        length = int(head_bytes.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        answer = json.loads(await self._reader.readexactly(length))
        if not answer["success"]:
            raise SystemExit(f"{path}: {answer}")
        return answer["data"]

    def close(self) -> None:
        self._writer.close()


async def lifecycle(wire: Wire, worker: str) -> None:
    """Create, claim, complete. The claimed job may be another connection's; all are done in the end."""
    await wire.call("/v1/jobs", b'{"payload":"%b"}' % PAYLOAD.encode())
    grant = (await wire.call("/v1/claim", b'{"worker":"%b"}' % worker.encode()))["grants"][0]
    body = b'{"lock_id":"%b","metadata":{"ok":true}}' % grant["lock_id"].encode()
    await wire.call(f"/v1/jobs/{grant['job']['id']}/complete", body)


async def throughput(path: str, connections: int, seconds: float) -> float:
    """Lifecycles a second over so many connections."""
    wires = [await Wire.open(path) for _ in range(connections)]
    done = 0
    started = time.perf_counter()

    async def work(number: int, wire: Wire) -> None:
        nonlocal done
        while time.perf_counter() - started < seconds:
            await lifecycle(wire, f"w-{number}")
            done += 1

    await asyncio.gather(*(work(number, wire) for number, wire in enumerate(wires)))
    elapsed = time.perf_counter() - started
    for wire in wires:
        wire.close()
    return done / elapsed


async def latency(path: str, count: int) -> dict[str, float]:
    """Milliseconds of a whole lifecycle on one connection."""
    wire = await Wire.open(path)
    times = []
    for _ in range(count):
        started = time.perf_counter()
        await lifecycle(wire, "w-1")
        times.append((time.perf_counter() - started) * 1000)
    wire.close()
    times.sort()
    return {"p50_ms": round(times[count // 2], 3), "p99_ms": round(times[int(count * 0.99)], 3)}


async def fill(path: str, count: int) -> None:
    """So many live jobs with a 200-byte payload."""
    wire = await Wire.open(path)
    body = json.dumps({"jobs": [{"payload": PAYLOAD}] * 1000}).encode()
    for _ in range(count // 1000):
        await wire.call("/v1/jobs/bulk", body)
    wire.close()


class Daemon:
    """A `jobd serve` of its own, in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.socket = str(directory / "worker.sock")
        self._directory = directory
        self._environ = os.environ | {
            "ADMIN_TOKEN": "benchmark-token-of-this-run-only",
            "JOBD_WORKER_SOCKET": self.socket,
            "JOBD_ADMIN_LISTEN": f"unix:{directory}/admin.sock",
            "JOBD_STORE_PATH": str(directory / "jobd.db"),
            "JOBD_LOG_LEVEL": "warning",
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Seconds until the socket answers."""
        started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jobd", "serve"], env=self._environ, preexec_fn=die_with_us
        )
        while subprocess.run(self._probe(), capture_output=True, check=False).returncode:
            if self.process.poll() is not None:
                raise SystemExit("the daemon ended")
            time.sleep(0.01)
        return time.perf_counter() - started

    def _probe(self) -> list[str]:
        return ["curl", "-sf", "--unix-socket", self.socket, "http://x/readyz"]

    def stop(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)

    def memory(self) -> int:
        """Resident bytes."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024

    def cpu_s(self) -> float:
        assert self.process is not None
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(directory: Path, seconds: float, runs: int, live: int) -> dict[str, Any]:
    daemon = Daemon(directory)
    empty_start_s = daemon.start()
    try:
        cpu, wall = daemon.cpu_s(), time.perf_counter()
        own = time.process_time()
        rates = [uvloop.run(throughput(daemon.socket, CONNECTIONS, seconds)) for _ in range(runs)]
        wall = time.perf_counter() - wall
        used = {"daemon": round((daemon.cpu_s() - cpu) / wall, 2), "load": round((time.process_time() - own) / wall, 2)}
        one = uvloop.run(latency(daemon.socket, 1000))
        daemon.stop()
        daemon.start()
        before = daemon.memory()
        uvloop.run(fill(daemon.socket, live))
        daemon.stop()
        start_s = daemon.start()
        after = daemon.memory()
    finally:
        daemon.stop()
    return {
        "lifecycles_per_s": {
            "median": round(statistics.median(rates)),
            "min": round(min(rates)),
            "max": round(max(rates)),
        },
        "cpu_cores": used,
        "one_connection": one,
        "live_jobs": live,
        "bytes_per_live_job": round((after - before) / live),
        "resident_mb": round(after / 1e6, 1),
        "start_s": round(start_s, 3),
        "start_empty_s": round(empty_start_s, 3),
        "machine": {"python": platform.python_version(), "sqlite": sqlite3.sqlite_version, "cpus": os.cpu_count()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--live", type=int, default=100_000)
    parser.add_argument("--dir", default=None, help="where the store lies (default: a temporary directory)")
    asked = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="jobd-bench-", dir=asked.dir))
    try:
        print(json.dumps(measure(directory, asked.seconds, asked.runs, asked.live), indent=1))
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
