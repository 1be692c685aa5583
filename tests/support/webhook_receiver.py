"""A webhook receiver on loopback: an aiohttp server in its own thread."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, Self

import msgspec
from aiohttp import web


class ReceivedMessage(NamedTuple):
    """A received request."""

    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def event(self) -> dict[str, Any]:
        found: dict[str, Any] = msgspec.json.decode(self.body)
        return found


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def accept(_: web.Request) -> web.StreamResponse:
    return web.Response(status=204)


def responding(status: int, text: str = "", **headers: str) -> Handler:
    async def respond(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, text=text, headers=headers)

    return respond


RawHandler = Callable[[bytes], bytes]


def echoing(head: bytes, more: int = 0) -> RawHandler:
    """Build a response of `head`, the request target, and `more` bytes."""

    def respond(request: bytes) -> bytes:
        target = request.partition(b" ")[2].partition(b" ")[0]
        return head + b"Cannot POST " + target + b"\r\n" + b"x" * more

    return respond


@contextmanager
def raw_server(respond: RawHandler, tls: ssl.SSLContext | None = None) -> Iterator[int]:
    """Run a server that sends `respond` after the start of each request and closes. Yield its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection, suppress(OSError):
                        sock = connection if tls is None else tls.wrap_socket(connection, server_side=True)
                        sock.settimeout(10)
                        sock.sendall(respond(sock.recv(10_000)))
                        sock.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join(10)


class Receiver:
    """A receiver that listens at `url` while its context is open. `respond` can be replaced at any time."""

    def __init__(self, respond: Handler = accept) -> None:
        self.respond = respond
        self.received: list[ReceivedMessage] = []
        self.port = 0
        self._news = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    def wait_for(
        self, condition: Callable[[list[ReceivedMessage]], bool], seconds: float = 150.0
    ) -> list[ReceivedMessage]:
        """Wait until `condition` holds. Return the requests received so far."""
        end = time.monotonic() + seconds
        with self._news:
            while not condition(self.received):
                assert self._news.wait(max(end - time.monotonic(), 0)), f"received only {self.received}"
            return list(self.received)

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        server = web.Server(self._handle)
        runner = web.ServerRunner(server, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = runner.addresses[0][1]
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        with self._news:
            self.received.append(ReceivedMessage(request.path, request.headers.copy(), body))
            self._news.notify_all()
        return await self.respond(request)  # type: ignore[arg-type]  # the server passes no other type
