"""A scripted peer for the clients' tests: a real HTTP server that answers, refuses, or drops as it is told.

Decides nothing about jobs; what the daemon does is tested against the daemon.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

Step = Callable[[web.BaseRequest], web.StreamResponse | None]
EarlyStep = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


def ok(data: Any, status: int = 200) -> Step:
    """Answer with success."""
    return lambda request: _json({"success": True, "data": data}, status)


def early(step: Step) -> EarlyStep:
    """Answer before the body was read."""

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        response = step(request)
        assert response is not None
        return response

    return answer


def no(code: str, status: int, message: str = "No.", *, headers: dict[str, str] | None = None, **details: Any) -> Step:
    """Refuse."""
    body = {"success": False, "error": code, "message": message, "details": details}
    return lambda request: _json(body, status, headers)


def raw(body: bytes, status: int = 200, kind: str = "text/html") -> Step:
    """Answer with bytes that are no jobd answer."""
    return lambda request: web.Response(body=body, status=status, content_type=kind)


def drop(request: web.BaseRequest) -> None:
    """Take the request and close the connection without a word."""


class closing:
    """Answer, and close the connection afterwards without having said so: an idle connection that went stale."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def __call__(self, request: web.BaseRequest) -> web.StreamResponse | None:
        return self.step(request)


def _json(body: Any, status: int, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json", headers=headers)


class Asked(msgspec.Struct):
    """One request as the peer got it. `connection` tells connections apart."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)


class Peer:
    """Answers requests by its script, step by step; a route in `always` answers what the script does not."""

    def __init__(self, *script: Step) -> None:
        self.script = list(script)
        self.always: Callable[[Asked], Step] | None = None
        self.early: list[EarlyStep] = []  # answers before the body was read
        self.asked: list[Asked] = []
        self.closed = threading.Event()  # a `closing` step has closed its connection
        self.hanging = asyncio.Event()
        self._connections: dict[Any, int] = {}

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        transport = request.transport
        connection = self._connections.setdefault(request.protocol, len(self._connections))
        if self.early:
            return await self.early.pop(0)(request)
        body = await request.read()
        asked = Asked(request.method, request.path_qs, dict(request.headers), body, connection)
        self.asked.append(asked)
        step = self.script.pop(0) if self.script else self.always(asked) if self.always else no("not_found", 404)
        if step == self.hang:
            await self.hanging.wait()
            return web.Response()
        response = step(request)
        assert transport is not None
        if response is None:
            transport.abort()
            return web.Response()
        if isinstance(step, closing):
            await response.prepare(request)
            await response.write_eof()
            transport.close()
            self.closed.set()
        return response

    def hang(self, request: web.BaseRequest) -> None:
        """Take the request and never answer."""

    @staticmethod
    def cut(start: bytes, chunked: bool) -> EarlyStep:
        """Send a part of a file, then break off."""

        async def step(request: web.BaseRequest) -> web.StreamResponse:
            response = web.StreamResponse()
            if chunked:
                response.enable_chunked_encoding()
            else:
                response.content_length = 2 * len(start)
            await response.prepare(request)
            await response.write(start)
            assert request.transport is not None
            request.transport.close()
            return response

        return step


@contextmanager
def serving(peer: Peer, path: Path | None = None) -> Iterator[str]:
    """Serve `peer` from a thread: on the Unix socket `path`, or on a loopback port. Gives its endpoint."""
    ready: list[str] = []
    started = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def run() -> None:
        runner = web.ServerRunner(web.Server(peer.handle))
        await runner.setup()
        if path is not None:
            await web.UnixSite(runner, str(path)).start()
            ready.append(f"unix:{path}")
        else:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            ready.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        started.set()
        await stop.wait()
        peer.hanging.set()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    try:
        assert started.wait(10)
        yield ready[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
