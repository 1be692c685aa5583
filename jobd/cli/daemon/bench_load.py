"""The load of `jobd bench`, in its own process.

`python -m jobd.cli.daemon.bench_load SCENARIO SOCKET SECONDS CONNECTIONS` prints the measurements as JSON.
The client is minimal, so that it takes little CPU time from the daemon.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final, Self, cast

import msgspec
import uvloop

PAYLOAD: Final = "x" * 198  # 200 bytes as JSON
_CLOSED: Final = "the daemon closed the connection"
_END: Final = b"\r\n\r\n"  # of a head
_LENGTH: Final = b"\r\ncontent-length: "
_PERCENTILES: Final = {"p50_ms": 50.0, "p90_ms": 90.0, "p99_ms": 99.0, "p99_9_ms": 99.9}

encode: Final = msgspec.json.Encoder().encode
decode: Final = msgspec.json.Decoder().decode
clock: Final = time.perf_counter

CREATE: Final = encode({"payload": PAYLOAD})

Measurements = dict[str, Any]


class RequestFailed(Exception):
    """The daemon responded with an error."""


class SerialConnection(asyncio.Protocol):
    """One connection with one request at a time. A subclass finds the end of a response and calls `_finish`.

    asyncio's streams would take half as long again for each request.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._response: asyncio.Future[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's class is not a subclass

    def connection_lost(self, exc: Exception | None) -> None:
        if self._response is not None and not self._response.done():
            self._response.set_exception(exc or ConnectionResetError(_CLOSED))

    def ask(self, request: bytes) -> Awaitable[bytes]:
        """Send `request` and return its response. Raises ConnectionError."""
        if self._transport.is_closing():
            raise ConnectionResetError(_CLOSED)
        self._response = self._loop.create_future()
        self._transport.write(request)
        return self._response

    def close(self) -> None:
        self._transport.close()

    def _finish(self, response: bytes) -> None:
        assert self._response is not None
        if not self._response.done():  # it is done if the request was cancelled
            self._response.set_result(response)


class LoadConnection(SerialConnection):
    """One keep-alive HTTP connection over a Unix socket. Raises RequestFailed if a response is an error."""

    def __init__(self, token: str | None = None) -> None:
        super().__init__()
        self._own = f"Host: x\r\nAuthorization: Bearer {token}\r\n" if token else "Host: x\r\n"
        self._head = b""  # the part of the response head that has arrived
        self._left: int | None = None  # bytes of the body to come, once the head is complete
        self._body: list[bytes] = []
        self._keeps = True

    @classmethod
    async def open(cls, path: str, token: str | None = None) -> Self:
        _, connection = await asyncio.get_running_loop().create_unix_connection(partial(cls, token), path)
        return connection

    def data_received(self, data: bytes) -> None:
        if self._left is None:
            self._head, end, data = (self._head + data).partition(_END)
            if not end:
                return
            self._left = int(self._head.lower().partition(_LENGTH)[2].partition(b"\r")[0])
            self._head = b""
        self._left -= len(data)
        if self._keeps:
            self._body.append(data)
        if self._left <= 0:
            self._left = None
            body, self._body = b"".join(self._body), []
            self._finish(body)

    async def post(self, path: str, body: bytes, *, may_fail: bool = False) -> Any:
        """Return the `data` of the response; None for an error if the request may fail."""
        return self._data(await self._post(path, "application/json", body), may_fail)

    async def lines(self, path: str, lines: bytes) -> Any:
        """Send a stream of commands as one body."""
        return self._data(await self._post(path, "application/x-ndjson", lines), False)

    async def get(self, path: str) -> Any:
        return self._data(await self.ask(f"GET {path} HTTP/1.1\r\n{self._own}\r\n".encode()), False)

    async def drop(self, path: str) -> None:
        """Read a response to its end and discard it."""
        self._keeps = False
        try:
            await self.ask(f"GET {path} HTTP/1.1\r\n{self._own}\r\n".encode())
        finally:
            self._keeps = True

    def _post(self, path: str, kind: str, body: bytes) -> Awaitable[bytes]:
        head = f"POST {path} HTTP/1.1\r\n{self._own}Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        return self.ask(head.encode() + body)

    def _data(self, body: bytes, may_fail: bool) -> Any:
        if not body.startswith(b'{"'):
            return body  # text
        response = decode(body)
        if response["success"]:
            return response["data"]
        if may_fail:
            return None
        raise RequestFailed(f"{response['error']}: {response['message']}")


async def open_connections(socket: str, count: int) -> list[LoadConnection]:
    return [await LoadConnection.open(socket) for _ in range(count)]


def worker(number: int) -> bytes:
    return encode({"worker": f"w-{number}"})


async def run_one(connection: LoadConnection, worker: bytes, **ending: Any) -> None:
    """Create, claim and complete a job. The claimed job may be that of another connection."""
    await connection.post("/v1/jobs", CREATE)
    grant = (await connection.post("/v1/claim", worker))["grants"][0]
    body = encode({"lock_id": grant["lock_id"], "metadata": 1, **ending})
    await connection.post(f"/v1/jobs/{grant['job']['id']}/complete", body)


async def repeat(seconds: float, workers: Sequence[Callable[[], Awaitable[int]]]) -> tuple[float, list[float]]:
    """Call every worker repeatedly. Return the sum of their results per second, and the duration of each call."""
    began, times, done = clock(), list[float](), 0

    async def go_on(work: Callable[[], Awaitable[int]]) -> None:
        nonlocal done
        while (started := clock()) - began < seconds:
            count = await work()
            times.append(clock() - started)
            done += count

    await asyncio.gather(*map(go_on, workers))
    return done / (clock() - began), times


async def lifecycle(
    socket: str, seconds: float, connections: int, ending: Callable[[], dict[str, Any]] = dict
) -> Measurements:
    """Create, claim and complete jobs with one request each. `ending` returns additional fields of a complete."""

    def work(number: int, connection: LoadConnection) -> Callable[[], Awaitable[int]]:
        async def once() -> int:
            await run_one(connection, worker(number), **ending())
            return 1

        return once

    opened = await open_connections(socket, connections)
    per_s, times = await repeat(seconds, [work(number, each) for number, each in enumerate(opened)])
    return {"lifecycles_per_s": per_s, "lifecycle": percentiles(times)}


async def claim(socket: str, seconds: float, connections: int = 1) -> Measurements:
    """Claim a job on one connection and release it at once. Creates a job if none is due."""
    connection, times = await LoadConnection.open(socket), list[float]()
    began = clock()
    while not times or clock() - began < seconds:
        started = clock()
        grants = (await connection.post("/v1/claim", worker(1)))["grants"]
        if not grants:
            await connection.post("/v1/jobs", CREATE)
            continue
        times.append(clock() - started)
        await connection.post(f"/v1/jobs/{grants[0]['job']['id']}/release", encode({"lock_id": grants[0]["lock_id"]}))
    return {"claim": percentiles(times)}


def percentiles(times_s: Sequence[float]) -> dict[str, float]:
    """Return percentiles and the maximum, in ms, of at least one time in seconds."""
    ordered = sorted(times_s)
    found = {name: _at(ordered, percent) for name, percent in _PERCENTILES.items()} | {"max_ms": ordered[-1]}
    return {name: round(seconds * 1000, 3) for name, seconds in found.items()}


def _at(ordered: Sequence[float], percent: float) -> float:
    """Return the smallest value that at least `percent` of all values do not exceed."""
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(int(rank), 1) - 1]


def main(scenario: str, socket: str, seconds: str, connections: str) -> None:
    load = lifecycle if scenario == "lifecycle" else claim
    print(encode(uvloop.run(load(socket, float(seconds), int(connections)))).decode())


if __name__ == "__main__":
    main(*sys.argv[1:])
