"""A scripted peer for the clients' tests: a real HTTP server that answers, refuses, or drops as it is told.

Decides nothing about jobs; what the daemon does is tested against the daemon.
"""

from __future__ import annotations

import asyncio
import functools
import queue
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
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


class ScriptedServer:
    """Answers requests by its script, step by step; a route in `always` answers what the script does not."""

    def __init__(self, *script: Step, behind: str | None = None) -> None:
        self.script = list(script)
        self.behind = behind  # the Unix socket of a daemon that answers what the script does not
        self.loses: Callable[[Asked], bool] = lambda asked: False  # whose answers from there get lost
        self.lost: list[Asked] = []
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
        if self.behind is not None and not self.script:
            return await self._forward(request, asked)
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

    async def _forward(self, request: web.BaseRequest, asked: Asked) -> web.StreamResponse:
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(self.behind or "")) as session,
            session.request(asked.method, f"http://jobd{asked.path}", data=asked.body, headers=asked.headers) as answer,
        ):
            content = await answer.read()
        if self.loses(asked):
            self.lost.append(asked)
            assert request.transport is not None
            request.transport.abort()
        return web.Response(body=content, status=answer.status, content_type="application/json")

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
def serving(peer: ScriptedServer, path: Path | None = None, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Serve `peer` from a thread: on the Unix socket `path`, or on a loopback port. Gives its endpoint."""
    ready: queue.SimpleQueue[tuple[str, Callable[[], object]]] = queue.SimpleQueue()
    thread = threading.Thread(target=lambda: asyncio.run(_serve(peer, path, tls, ready)))
    thread.start()
    endpoint, stop = ready.get(timeout=10)
    try:
        yield endpoint
    finally:
        stop()
        thread.join(10)
        assert not thread.is_alive()


async def _serve(
    peer: ScriptedServer,
    path: Path | None,
    tls: ssl.SSLContext | None,
    ready: queue.SimpleQueue[tuple[str, Callable[[], object]]],
) -> None:
    stop = asyncio.Event()
    runner = web.ServerRunner(web.Server(peer.handle), shutdown_timeout=0.1)
    await runner.setup()
    if path is not None:
        await web.UnixSite(runner, str(path)).start()
        endpoint = f"unix:{path}"
    else:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
        endpoint = f"{'http' if tls is None else 'https'}://127.0.0.1:{runner.addresses[0][1]}"
    ready.put((endpoint, functools.partial(asyncio.get_running_loop().call_soon_threadsafe, stop.set)))
    await stop.wait()
    peer.hanging.set()
    await runner.cleanup()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    for _ in range(5):  # connections are closed in the next turns of the loop
        await asyncio.sleep(0)


async def until(is_so: Callable[[], bool | Awaitable[bool]]) -> None:
    """Wait for something that nobody tells us about; the test's own timeout bounds it."""
    while True:
        answer = is_so()
        if answer if isinstance(answer, bool) else await answer:
            return
        await asyncio.sleep(0.01)
