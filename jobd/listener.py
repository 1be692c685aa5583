"""Sockets: open them, hold connections to their deadlines, close them so that no request in flight is lost.

Knows nothing of routes or jobs: every request goes to one `Web`.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import stat
import sys
from functools import partial
from typing import Any, Final

import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from aiohttp.web_protocol import RequestHandler

from jobd.commands import Refusal
from jobd.web import BUG, Visit, Web

BACKLOG: Final = 1024
PIECE: Final = 16 << 10  # bytes that are parsed in one turn of the loop, where they have
PIECE_LINES: Final = 2_000  # more lines than this
LINGER_S: Final = 5.0  # how long the rest of a refused body is read, so that the client gets to see the answer
LAST_BREATH_S: Final = 0.1  # after the deadline of a stop, for cancelled handlers to end

log = structlog.get_logger("jobd.web")


class Connection(RequestHandler):
    """aiohttp's connection, with our error object where it would send text, and without its tracebacks."""

    __slots__ = ("_rest", "_web")

    def __init__(self, manager: web.Server, site: Web, **options: Any) -> None:
        super().__init__(manager, **options)
        self._web = site
        self._rest = bytearray()  # has been read, and is parsed in the next turns of the loop

    def data_received(self, data: bytes) -> None:
        """What is made of ever so many lines (chunks of one byte) is parsed piece by piece: others get their turns."""
        if not data or (not self._rest and (len(data) <= PIECE or data.count(b"\r\n") <= PIECE_LINES)):
            super().data_received(data)
            return
        is_first = not self._rest
        self._rest += data
        if is_first:
            self._feed()

    def _feed(self) -> None:
        transport = self.transport
        piece = bytes(self._rest[:PIECE])
        del self._rest[:PIECE]
        if transport is not None:
            super().data_received(piece)
        if transport is None or transport.is_closing():
            self._rest.clear()
        elif self._rest:
            transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._feed)
        elif not (self._reading_paused or self._buffer_paused):
            transport.resume_reading()

    def resume_reading(self, resume_parser: bool = True) -> None:
        """A body that is read asks for more each time: that costs a turn of the parser, so only where it has paused."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def close_if_idle(self) -> None:
        """End the connection where no request, or only a part of its head, has come."""
        if self._waiter is not None and not self._waiter.done():
            self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what is not HTTP. Its own text stays out of it: it may hold a token."""
        assert isinstance(request, Visit)
        if isinstance(exc, ConnectionError):
            raise exc
        if isinstance(exc, HttpProcessingError):
            line = f"a line of its head is over {self.max_line_size} bytes"
            why = line if isinstance(exc, LineTooLong) else "its head or its framing is wrong"
            refusal = Refusal("invalid_request", f"The request is not readable as HTTP/1.1: {why}.")
        else:
            self.log_exception("connection_bug", exc_info=exc)
            refusal = BUG
        return self._web.refuse(request, refusal, close=True)

    def log_exception(self, *args: Any, **kw: Any) -> None:
        exc = kw.get("exc_info")
        log.error("connection_bug", error=type(exc).__name__)

    def log_debug(self, *args: Any, **kw: Any) -> None:
        """aiohttp's own chatter about clients that went away."""


class _Server(web.Server):
    """Makes a Connection where aiohttp would make its own."""

    def __init__(self, site: Web, **options: Any) -> None:
        visit = partial(Visit, loop=asyncio.get_running_loop())
        super().__init__(site.handle, request_factory=visit, handler_cancellation=True)
        self._site = site
        self._options = options

    def __call__(self) -> RequestHandler:
        return Connection(self, self._site, loop=self._loop, **self._options)


class Listener:
    """The sockets of one `Web`. Make it inside the event loop."""

    def __init__(self, site: Web) -> None:
        self.site = site
        self._server = _Server(
            site,
            access_log=None,
            auto_decompress=False,
            keepalive_timeout=site.limits.idle_s,
            lingering_time=LINGER_S,
        )
        self._sockets: list[asyncio.Server] = []
        self._paths: list[str] = []

    async def open_tcp(self, host: str, port: int, *, tls: ssl.SSLContext | None = None) -> list[tuple[str, int]]:
        """Listen on `host` and `port` (0: any free one). Gives the addresses. Raises OSError."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(self._server, host, port, ssl=tls, backlog=BACKLOG)
        self._sockets.append(server)
        return [opened.getsockname()[:2] for opened in server.sockets]

    async def open_unix(self, path: str, mode: int) -> None:
        """Listen on the Unix socket `path` with the permissions `mode`. A socket left behind is replaced.

        Raises OSError: the directory is missing, the path is over 107 bytes or names something that is no socket.
        """
        await self.open_socket(await asyncio.to_thread(_bind, path, mode))
        self._paths.append(path)

    async def open_socket(self, opened: socket.socket, *, tls: ssl.SSLContext | None = None) -> None:
        """Listen on a bound socket, as systemd hands it over."""
        loop = asyncio.get_running_loop()
        if opened.family == socket.AF_UNIX:
            # From Python 3.13 on a loop unlinks the socket when it closes; what is systemd's has to stay.
            keep: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
            server = await loop.create_unix_server(self._server, sock=opened, ssl=tls, backlog=BACKLOG, **keep)
        else:
            server = await loop.create_server(self._server, sock=opened, ssl=tls, backlog=BACKLOG)
        self._sockets.append(server)

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._server.connections)

    async def stop(self, deadline_s: float) -> None:
        """Take no more requests, close idle connections, wait for the answers of those in flight, then close.

        After `deadline_s` seconds the rest is cut off. Parked claims are in flight: the actor has to answer them.
        """
        self.site.closing = True
        for server in self._sockets:
            server.close()
        await asyncio.to_thread(_unlink, self._paths)
        for connection in self._server.connections:
            assert isinstance(connection, Connection)
            connection.close_if_idle()
        for _ in range(3):  # a request that has just been read gets as far as its handler
            await asyncio.sleep(0)
        try:
            async with asyncio.timeout(deadline_s):
                await self.site.quiet()
                await self._server.shutdown(None)
        except TimeoutError:
            log.warning("requests_cut_off", door=self.site.gate.name, connections=self.connections)
            await self._server.shutdown(LAST_BREATH_S)


def _bind(path: str, mode: int) -> socket.socket:
    """A bound Unix socket that has its permissions before anybody can connect, put in place in one step."""
    if os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise OSError(f"{path} exists and is no socket: move it away or choose another path")
    draft = f"{path}.{os.getpid()}"
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        opened.bind(draft)
        os.chmod(draft, mode)
        os.rename(draft, path)
    except BaseException:
        opened.close()
        _unlink([draft])
        raise
    opened.setblocking(False)
    return opened


def _unlink(paths: list[str]) -> None:
    for path in paths:
        if os.path.lexists(path):
            os.unlink(path)
