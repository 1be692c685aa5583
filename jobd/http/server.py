"""Sockets: open them, close them so that no request in flight is lost.

Knows nothing of routes or jobs: every request goes to one `Web`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import ssl
import stat
import sys
from collections.abc import Iterator
from typing import Any, Final

import structlog
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from jobd.http.app import App
from jobd.http.head_cache import Heads
from jobd.http.protocol import HttpConnection, begin

BACKLOG: Final = 1024
LINGER_S: Final = 5.0  # how long the rest of a refused body is read, so that the client gets to see the answer
CANCEL_GRACE_S: Final = 0.1  # after the deadline of a stop, for cancelled handlers to end

log = structlog.get_logger("jobd.web")


class _Server(web.Server):
    """Makes a Connection where aiohttp would make its own."""

    def __init__(self, app: App[Any], **options: Any) -> None:
        super().__init__(app.handle, request_factory=begin, handler_cancellation=True)
        self._app = app
        self._heads = Heads()
        self._options = options

    def __call__(self) -> RequestHandler:
        return HttpConnection(self, self._app, self._heads, loop=self._loop, **self._options)


class HttpListener:
    """The sockets of one `Web`. Make it inside the event loop."""

    def __init__(self, app: App[Any]) -> None:
        self.app = app
        self._server = _Server(
            app,
            access_log=None,
            auto_decompress=False,
            keepalive_timeout=app.limits.idle_s,
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

        Raises OSError: the directory is missing, the path is over 107 bytes, names something that is no socket, or one
        at which another process listens (EADDRINUSE).
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
        self.app.close()
        # Names go while we still listen: a moment later they could be those of another daemon's sockets.
        await asyncio.to_thread(_unlink, self._paths)
        for server in self._sockets:
            server.close()
        self._close_idle()
        for _ in range(3):  # a request that has just been read gets as far as its handler
            await asyncio.sleep(0)
        try:
            async with asyncio.timeout(deadline_s):
                await self.app.wait_idle()
                self._close_idle()  # those whose slow readers had an answer from before the stop
                await self._server.shutdown(None)
        except TimeoutError:
            log.warning("requests_cut_off", door=self.app.authenticator.name, connections=self.connections)
            await self._server.shutdown(CANCEL_GRACE_S)

    def _close_idle(self) -> None:
        for connection in self._server.connections:
            assert isinstance(connection, HttpConnection)
            connection.close_if_idle()


def is_in_use(place: str | tuple[str, int]) -> bool:
    """Whether a process listens at `place`: the path of a Unix socket, or a host with its port. It blocks.

    Whatever else may be wrong with the place is said when it is opened.
    """
    try:
        _connect_or_bind(place)
    except OSError as error:
        return error.errno in (errno.EADDRINUSE, errno.EAGAIN)  # EAGAIN: its backlog is full
    return isinstance(place, str)


def _connect_or_bind(place: str | tuple[str, int]) -> None:
    """Connect to a Unix socket; bind to an address, and leave it."""
    if isinstance(place, str):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            probe.connect(place)
        return
    for family, kind, _, _, address in socket.getaddrinfo(*place, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(address)


def _bind(path: str, mode: int) -> socket.socket:
    """A listening Unix socket that has its permissions before anybody can connect, put in place in one step.

    Of several processes that want the same place at the same moment, one gets it.
    """
    if os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise OSError(f"{path} exists and is no socket: move it away or choose another path")
    draft = f"{path}.{os.getpid()}"
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        opened.bind(draft)
        os.chmod(draft, mode)
        opened.listen(BACKLOG)
        with _directory_lock(os.path.dirname(path) or "."):
            if is_in_use(path):
                raise OSError(errno.EADDRINUSE, "another process listens there")
            os.rename(draft, path)
    except BaseException:
        opened.close()
        _unlink([draft])
        raise
    opened.setblocking(False)
    return opened


@contextlib.contextmanager
def _directory_lock(directory: str) -> Iterator[None]:
    """Nobody else is here at the same time: between a look at a socket and its replacement nobody may come in."""
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def _unlink(paths: list[str]) -> None:
    for path in paths:
        if os.path.lexists(path):
            os.unlink(path)
