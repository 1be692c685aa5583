"""beanstalkd, with its binlog synced before each answer (-f0) or without any."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

from tests.faults.fuzz import free_port
from tests.peers.clock import PAYLOAD, lifecycles
from tests.peers.server import running, tool


def durable(place: Path, connections: int, seconds: float) -> float:
    return _measure(place, connections, seconds, ["-b", str(place), "-f0"])


def in_memory(place: Path, connections: int, seconds: float) -> float:
    return _measure(place, connections, seconds, [])


def _measure(place: Path, connections: int, seconds: float, options: list[str]) -> float:
    port = free_port()
    words = [tool("beanstalkd", "beanstalkd"), "-l", "127.0.0.1", "-p", str(port), *options]

    def is_up() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    with running(words, place, is_up):
        return asyncio.run(_load(port, connections, seconds))


async def _load(port: int, connections: int, seconds: float) -> float:
    body = f'"{PAYLOAD}"'.encode()
    put = b"put 100 0 60 %d\r\n%b\r\n" % (len(body), body)

    async def worker() -> Callable[[], Awaitable[None]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        async def once() -> None:
            writer.write(put)
            _expect(await reader.readuntil(b"\r\n"), b"INSERTED")
            writer.write(b"reserve\r\n")
            reserved = await reader.readuntil(b"\r\n")
            _expect(reserved, b"RESERVED")
            _, job_id, size = reserved.split()
            await reader.readexactly(int(size) + 2)
            writer.write(b"delete %b\r\n" % job_id)
            _expect(await reader.readuntil(b"\r\n"), b"DELETED")

        return once

    return await lifecycles([await worker() for _ in range(connections)], seconds)


def _expect(answer: bytes, word: bytes) -> None:
    if not answer.startswith(word):
        raise SystemExit(f"beanstalkd: {answer!r}")
