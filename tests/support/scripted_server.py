"""A real HTTP server for the tests of the clients. It responds, fails or drops connections by a script."""

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
    """Respond with success."""
    return lambda request: _json({"success": True, "data": data}, status)


def early(step: Step) -> EarlyStep:
    """Respond before the body is read."""

    async def respond(request: web.BaseRequest) -> web.StreamResponse:
        response = step(request)
        assert response is not None
        return response

    return respond


def rejected(
    code: str, status: int, message: str = "No.", *, headers: dict[str, str] | None = None, **details: Any
) -> Step:
    """Respond with an error."""
    body = {"success": False, "error": code, "message": message, "details": details}
    return lambda request: _json(body, status, headers)


def raw(body: bytes, status: int = 200, kind: str = "text/html") -> Step:
    """Respond with any bytes."""
    return lambda request: web.Response(body=body, status=status, content_type=kind)


def drop(request: web.BaseRequest) -> None:
    """Close the connection without a response."""


class closing:
    """Respond, and close the connection afterwards without announcing it, so that the client keeps it as idle."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def __call__(self, request: web.BaseRequest) -> web.StreamResponse | None:
        return self.step(request)


def _json(body: Any, status: int, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json", headers=headers)


class ReceivedRequest(msgspec.Struct):
    """A request that the server received. Each connection has a number."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)


class ScriptedServer:
    """Respond by `script`, step by step, and by `always` after its end."""

    def __init__(self, *script: Step, behind: str | None = None) -> None:
        self.script = list(script)
        self.behind = behind  # the Unix socket of a daemon that responds after the end of the script
        self.loses: Callable[[ReceivedRequest], bool] = lambda received: False  # drops this response of the daemon
        self.lost: list[ReceivedRequest] = []
        self.always: Callable[[ReceivedRequest], Step] | None = None
        self.early: list[EarlyStep] = []  # responses before the body is read
        self.received: list[ReceivedRequest] = []
        self.closed = threading.Event()  # a `closing` step has closed its connection
        self.hanging = asyncio.Event()
        self._connections: dict[Any, int] = {}

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        transport = request.transport
        connection = self._connections.setdefault(request.protocol, len(self._connections))
        if self.early:
            return await self.early.pop(0)(request)
        if request.path == "/v1/commands":
            return await self._stream(request, connection)
        body = await request.read()
        received = ReceivedRequest(request.method, request.path_qs, dict(request.headers), body, connection)
        self.received.append(received)
        if self.behind is not None and not self.script:
            return await self._forward(request, received)
        step = self._next_step(received)
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

    def _next_step(self, received: ReceivedRequest) -> Step:
        if self.script:
            return self.script.pop(0)
        return self.always(received) if self.always else rejected("not_found", 404)

    async def _stream(self, request: web.BaseRequest, connection: int) -> web.StreamResponse:
        """Respond to each line of a stream of commands. An error 503 to the first line rejects the stream."""
        stream: web.StreamResponse | None = None
        async for line in request.content:
            received = ReceivedRequest("POST", request.path_qs, dict(request.headers), line, connection)
            self.received.append(received)
            step = self._next_step(received)
            if step == self.hang:
                await self.hanging.wait()
                return web.Response()
            response = step(request)
            if not isinstance(response, web.Response):
                assert request.transport is not None
                request.transport.abort()
                return web.Response()
            if stream is None:
                if response.status == 503:
                    return response
                stream = web.StreamResponse()
                await stream.prepare(request)
            assert isinstance(response.body, bytes)
            await stream.write(b'{"status":%d,' % response.status + response.body[1:] + b"\n")
        return stream or web.Response()

    async def _forward(self, request: web.BaseRequest, received: ReceivedRequest) -> web.StreamResponse:
        url = f"http://jobd{received.path}"
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(self.behind or "")) as session,
            session.request(received.method, url, data=received.body, headers=received.headers) as response,
        ):
            content = await response.read()
        if self.loses(received):
            self.lost.append(received)
            assert request.transport is not None
            request.transport.abort()
        return web.Response(body=content, status=response.status, content_type="application/json")

    def hang(self, request: web.BaseRequest) -> None:
        """Never respond."""

    @staticmethod
    def cut(start: bytes, chunked: bool) -> EarlyStep:
        """Send a part of a file, then close the connection."""

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
def serving(server: ScriptedServer, path: Path | None = None, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Run `server` in a thread, on the Unix socket `path` or a loopback port. Yields its endpoint."""
    ready: queue.SimpleQueue[tuple[str, Callable[[], object]]] = queue.SimpleQueue()
    thread = threading.Thread(target=lambda: asyncio.run(_serve(server, path, tls, ready)))
    thread.start()
    endpoint, stop = ready.get(timeout=60)
    try:
        yield endpoint
    finally:
        stop()
        thread.join(10)
        assert not thread.is_alive()


async def _serve(
    server: ScriptedServer,
    path: Path | None,
    tls: ssl.SSLContext | None,
    ready: queue.SimpleQueue[tuple[str, Callable[[], object]]],
) -> None:
    stop = asyncio.Event()
    runner = web.ServerRunner(web.Server(server.handle), shutdown_timeout=0.1)
    await runner.setup()
    if path is not None:
        await web.UnixSite(runner, str(path)).start()
        endpoint = f"unix:{path}"
    else:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
        endpoint = f"{'http' if tls is None else 'https'}://127.0.0.1:{runner.addresses[0][1]}"
    ready.put((endpoint, functools.partial(asyncio.get_running_loop().call_soon_threadsafe, stop.set)))
    await stop.wait()
    server.hanging.set()
    await runner.cleanup()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    for _ in range(5):  # connections are closed in the next iterations of the loop
        await asyncio.sleep(0)
