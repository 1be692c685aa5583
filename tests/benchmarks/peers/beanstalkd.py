"""beanstalkd, with its binlog synced before each response (-f0) or without a binlog."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop

from jobd.cli.daemon.bench_load import SerialConnection
from tests.benchmarks.peers.clock import PAYLOAD, lifecycles
from tests.benchmarks.peers.server import running, tool
from tests.support.daemon_process import free_port


def durable(directory: Path, connections: int, seconds: float) -> float:
    return _measure(directory, connections, seconds, ["-b", str(directory), "-f0"])


def in_memory(directory: Path, connections: int, seconds: float) -> float:
    return _measure(directory, connections, seconds, [])


def _measure(directory: Path, connections: int, seconds: float, options: list[str]) -> float:
    port = free_port()
    words = [tool("beanstalkd", "beanstalkd"), "-l", "127.0.0.1", "-p", str(port), *options]

    def is_up() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    with running(words, directory, is_up):
        return uvloop.run(_load(port, connections, seconds))


class _Wire(SerialConnection):
    """A connection whose responses are their first line, returned once the whole response has arrived."""

    def __init__(self) -> None:
        super().__init__()
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        self._received += data
        line, end, body = self._received.partition(b"\r\n")
        size = int(line.split()[2]) + 2 if line.startswith(b"RESERVED ") and end else 0
        if end and len(body) >= size:
            self._received = b""
            self._finish(line)


async def _load(port: int, connections: int, seconds: float) -> float:
    body = f'"{PAYLOAD}"'.encode()
    put = b"put 100 0 60 %d\r\n%b\r\n" % (len(body), body)

    async def worker() -> Callable[[], Awaitable[None]]:
        _, wire = await asyncio.get_running_loop().create_connection(_Wire, "127.0.0.1", port)

        async def once() -> None:
            _expect(await wire.ask(put), b"INSERTED")
            reserved = _expect(await wire.ask(b"reserve\r\n"), b"RESERVED")
            _expect(await wire.ask(b"delete %b\r\n" % reserved.split()[1]), b"DELETED")

        return once

    return await lifecycles([await worker() for _ in range(connections)], seconds)


def _expect(response: bytes, word: bytes) -> bytes:
    if not response.startswith(word):
        raise SystemExit(f"beanstalkd: {response!r}")
    return response
