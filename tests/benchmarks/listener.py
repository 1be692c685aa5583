"""Measure the worker listener alone: `python -m tests.benchmarks.listener --against DIR --runs 5`.

An actor responds in the next turn of the loop; the load comes from another process. Shown are the medians of requests
per second and of microseconds of processor time per request, in turns with the listener of another tree, and their
ratios. `--idle N` measures the memory of N idle connections, and a request beside them.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

import uvloop

from jobd.api.worker_routes import ROUTES
from jobd.engine.envelope import Envelope
from jobd.engine.unread_responses import UnreadResponses
from jobd.http.auth import Authenticator
from jobd.http.decoding import Limits
from jobd.model.responses import EmptyResponse, Response
from tests.support.http_harness import TOKEN, HttpHarness

KINDS: Final = ("get", "create", "claim", "complete", "create with a token", "stream")
CONNECTIONS: Final = {"create": (1, 16, 64), "stream": (1, 4)}  # others: 16
LINES: Final = 16  # in flight on a stream
_CREATE: Final = b'{"queue":"mail","kind":"send","payload":"' + b"x" * 200 + b'"}'
_COMPLETE: Final = b'{"lock_id":"0123456789abcdef0123456789abcdef","metadata":{"ok":true}}'
_CLAIM: Final = b'{"worker":"w-1"}'
_LINE: Final = b'{"op":"create",' + _CREATE[1:] + b"\n"


class InstantActor:
    """Respond to all commands in the next turn of the loop."""

    def __init__(self) -> None:
        self.state = SimpleNamespace(queue_names=[], quarantined={})
        self.full_disk = SimpleNamespace(reject=lambda command: None)
        self.unread = UnreadResponses()
        self._waiters: list[Any] = []

    def send(self, command: Any, waiter: Any, *, by: str = "", key: Any = None, size: int = 0, **_: Any) -> Envelope:
        if not self._waiters:
            asyncio.get_running_loop().call_soon(self._respond)
        self._waiters.append(waiter)
        return Envelope(command, by, key=key, size=size, futures=waiter)

    async def ask(self, command: Any, **options: Any) -> Any:
        response = asyncio.get_running_loop().create_future()
        self.send(command, response)
        return await response

    def _respond(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(Response(EmptyResponse()))

    def abandon(self, envelope: Envelope) -> None: ...


class Client(asyncio.Protocol):
    """Send one request after the other, or the lines of a stream. `count` counts the responses of all clients."""

    count = 0

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._received = 0  # of the lines in flight

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if self._kind == "stream":
            self._transport.write(_head("POST", "/v1/commands", "application/x-ndjson", "Transfer-Encoding: chunked"))
            self._send_lines()
        else:
            self._transport.write(self._request())

    def data_received(self, data: bytes) -> None:
        if b'"success":false' in data:
            print(data, file=sys.stderr)
            os._exit(1)
        if self._kind != "stream":
            Client.count += 1
            self._transport.write(self._request())
            return
        done = data.count(b'"success":true')
        Client.count += done
        self._received += done
        if self._received >= LINES:
            self._received -= LINES
            self._send_lines()

    def _send_lines(self) -> None:
        lines = _LINE * LINES
        self._transport.write(b"%x\r\n%b\r\n" % (len(lines), lines))

    def _request(self) -> bytes:
        if self._kind == "get":
            return _head("GET", f"/v1/jobs/job-{Client.count:09d}")
        path, body = ("/v1/jobs", _CREATE)
        if self._kind == "complete":
            path, body = f"/v1/jobs/job-{Client.count:09d}/complete", _COMPLETE
        elif self._kind == "claim":
            path, body = "/v1/claim", _CLAIM
        token = f"\r\nAuthorization: Bearer {TOKEN}" if self._kind == "create with a token" else ""
        return _head("POST", path, "application/json", f"Content-Length: {len(body)}{token}") + body


def _head(method: str, path: str, content_type: str = "", more: str = "") -> bytes:
    body = f"Content-Type: {content_type}\r\n{more}\r\n" if content_type else ""
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n{body}\r\n".encode()


async def _load(path: str, kind: str, connections: int, seconds: float) -> None:
    """Send requests. Print when the measurement begins, and at its end the number of responses and the seconds."""
    for _ in range(connections):
        await asyncio.get_running_loop().create_unix_connection(lambda: Client(kind), path)
    await asyncio.sleep(seconds / 4)
    before, began_s = Client.count, time.perf_counter()
    print(flush=True)
    await asyncio.sleep(seconds)
    print(json.dumps([Client.count - before, time.perf_counter() - began_s]), flush=True)


def _raise_file_limit() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _hold(path: str, connections: int) -> None:
    """Send a request on each connection, then leave them idle until the end of input."""
    _raise_file_limit()
    pairs = []
    for _ in range(connections):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(_head("GET", "/v1/jobs"))
        await reader.readuntil(b"\r\n\r\n")
        pairs.append((reader, writer))
    print(flush=True)
    await asyncio.to_thread(sys.stdin.read)


async def _child(*words: object) -> Process:
    command = [sys.executable, __file__, *map(str, words)]
    environ = {"PYTHONPATH": os.pathsep.join(sys.path)}
    return await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, env=environ)


def _harness(directory: str, kind: str) -> HttpHarness:
    authenticator = Authenticator("worker", tokens=[TOKEN] if kind == "create with a token" else None)
    limits = Limits(idle_s=3600)
    return HttpHarness(ROUTES, Path(directory), authenticator=authenticator, actor=InstantActor(), limits=limits)


async def measure(kind: str, connections: int, seconds: float) -> None:
    """Print requests per second, and microseconds of processor time per request."""
    with tempfile.TemporaryDirectory() as directory:
        async with _harness(directory, kind) as harness:
            load = await _child("--load", harness.path, kind, connections, seconds)
            assert load.stdout is not None
            await load.stdout.readline()
            before_s = time.process_time()
            count, took_s = json.loads(await load.stdout.readline())
            print(json.dumps([count / took_s, (time.process_time() - before_s) / count * 1e6]))
            await load.wait()


async def measure_idle(connections: int) -> None:
    """Print the memory of an idle connection, and the median and the maximum of the milliseconds of a request."""
    _raise_file_limit()
    with tempfile.TemporaryDirectory() as directory:
        async with _harness(directory, "get") as harness:
            client = await harness.connect()
            before = _resident_bytes()
            holder = await _child("--hold", harness.path, connections)
            assert holder.stdout is not None
            await holder.stdout.readline()
            size, times = (_resident_bytes() - before) / connections, []
            for _ in range(200):
                began_s = time.perf_counter()
                assert (await client.request("GET", "/v1/jobs")).status == 200
                times.append((time.perf_counter() - began_s) * 1e3)
            print(
                f"{harness.listener.connections - 1} idle connections: {size:.0f} bytes each; a request takes", end=" "
            )
            print(f"{statistics.median(times):.2f} ms, {max(times):.1f} at most")
            await holder.communicate(b"")  # without input, Python 3.11 leaves stdin open


def _resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def _in_turns(trees: list[Path], runs: int, seconds: float) -> None:
    cases = [(kind, count) for kind in KINDS for count in CONNECTIONS.get(kind, (16,))]
    found: dict[tuple[str, int, Path], list[list[float]]] = {}
    for number in range(runs):
        for kind, count in cases:
            for tree in trees if number % 2 else trees[::-1]:
                words = [sys.executable, __file__, "--one", kind, str(count), str(seconds)]
                done = subprocess.run(
                    words, cwd=tree, env={"PYTHONPATH": str(tree)}, stdout=subprocess.PIPE, check=True
                )
                found.setdefault((kind, count, tree), []).append(json.loads(done.stdout))
    for kind, count in cases:
        figures = [[statistics.median(each) for each in zip(*found[kind, count, tree], strict=True)] for tree in trees]
        shown = " and ".join(f"{rate:,.0f}/s {us:.2f} us" for rate, us in figures)
        ratios = " ".join(f"{new / old:.2f}" for old, new in zip(figures[0], figures[-1], strict=True))
        print(f"{kind}, {count} connections: {shown}, ratios {ratios}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--idle", type=int)
    for name in ("--one", "--load", "--hold"):
        parser.add_argument(name, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        kind, count, seconds = options.one
        uvloop.run(measure(kind, int(count), float(seconds)))
    elif options.load:
        path, kind, count, seconds = options.load
        uvloop.run(_load(path, kind, int(count), float(seconds)))
    elif options.hold:
        uvloop.run(_hold(options.hold[0], int(options.hold[1])))
    elif options.idle:
        uvloop.run(measure_idle(options.idle))
    else:
        here = Path(__file__).parents[2]
        _in_turns(
            [here] if options.against is None else [options.against.resolve(), here], options.runs, options.seconds
        )


if __name__ == "__main__":
    main()
