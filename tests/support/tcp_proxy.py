"""A proxy on loopback that loses what it forwards, on demand."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Self


class TcpProxy:
    """Forwards connections to a port. `port` is its own."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.loses_requests = False
        self.loses_responses = False
        self.rewrite: Callable[[bytes], bytes] = lambda response: response
        self.lost = asyncio.Event()  # set when something was lost
        self._writers: list[asyncio.StreamWriter] = []

    def cut(self) -> None:
        """End all connections, and forward new ones."""
        self.loses_requests = self.loses_responses = False
        self.lost.clear()
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, to_server = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._writers += [writer, to_server]
        requests = self._forward(reader, to_server, lambda: self.loses_requests, lambda sent: sent)
        responses = self._forward(there, writer, lambda: self.loses_responses, lambda sent: self.rewrite(sent))
        await asyncio.gather(requests, responses)

    async def _forward(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        loses: Callable[[], bool],
        rewrite: Callable[[bytes], bytes],
    ) -> None:
        try:
            while sent := await reader.read(1 << 16):
                if loses():
                    self.lost.set()
                else:
                    writer.write(rewrite(sent))
        except OSError:
            pass
        finally:
            writer.transport.abort()


@asynccontextmanager
async def tcp_proxy(target: int) -> AsyncIterator[TcpProxy]:
    """Run a proxy."""
    proxy = TcpProxy(target)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        proxy.cut()


class ProxyThread:
    """A proxy with a loop of its own, in a thread."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _run(self) -> None:
        self.loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with tcp_proxy(self._target) as self.proxy:
            self._ready.set()
            await self._stop.wait()

    def lose(self, *, requests: bool, responses: bool) -> None:
        """Forward nothing in these directions, and leave the connections open."""
        self.proxy.loses_requests, self.proxy.loses_responses = requests, responses

    def cut(self) -> None:
        """End all connections, and forward new ones."""
        self.loop.call_soon_threadsafe(self.proxy.cut)
