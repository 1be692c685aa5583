"""Open listening sockets, and close them without losing requests in flight."""

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
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import structlog

from jobd.http.http_app import HttpApp
from jobd.http.worker_connection import WorkerConnection

BACKLOG: Final = 1024
CLOSE_S: Final = 1.0  # for TLS clients to confirm the end of a connection
LOCK_S: Final = 1.0  # to wait for the lock of a directory, which a daemon holds for some milliseconds
POLL_S: Final = 0.005  # while connections are closing, or a directory is locked

log = structlog.get_logger("jobd.web")


class HttpListener(ABC):
    """The listening sockets of one app. Create it inside the event loop. `tls` is the context of its certificate."""

    def __init__(self, app: HttpApp[Any]) -> None:
        self.app = app
        self.tls: ssl.SSLContext | None = None
        self._sockets: list[asyncio.Server] = []
        self._inodes: dict[str, int] = {}  # of the Unix sockets, by path
        self._is_closing = False

    @abstractmethod
    def protocol_factory(self) -> Callable[[], asyncio.Protocol]:
        """Return the function that makes the protocol of a connection."""

    async def open_tcp(self, host: str, port: int, *, tls: ssl.SSLContext | None = None) -> list[tuple[str, int]]:
        """Listen on `host` and `port` (0: any free port). Return the addresses. Raises OSError."""
        factory = self.protocol_factory()
        server = await asyncio.get_running_loop().create_server(factory, host, port, ssl=tls, backlog=BACKLOG)
        self._sockets.append(server)
        return [opened.getsockname()[:2] for opened in server.sockets]

    async def open_unix(self, path: str, mode: int) -> None:
        """Listen on the Unix socket `path` with the permissions `mode`. Replaces a stale socket.

        Raises OSError if the directory is missing, the path is longer than 107 bytes, the file is not a socket, or
        another process listens on it (EADDRINUSE).
        """
        opened, inode = await asyncio.to_thread(_bind, path, mode)
        await self.open_socket(opened)
        self._inodes[path] = inode

    async def open_socket(self, opened: socket.socket, *, tls: ssl.SSLContext | None = None) -> None:
        """Listen on a bound socket, such as one from systemd."""
        loop, factory = asyncio.get_running_loop(), self.protocol_factory()
        if opened.family == socket.AF_UNIX:
            # Since Python 3.13 a loop unlinks the socket when it closes, but systemd's sockets must stay.
            keep: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
            server = await loop.create_unix_server(factory, sock=opened, ssl=tls, backlog=BACKLOG, **keep)
        else:
            server = await loop.create_server(factory, sock=opened, ssl=tls, backlog=BACKLOG)
        self._sockets.append(server)

    @property
    @abstractmethod
    def connections(self) -> int:
        """The number of open connections."""

    @property
    def unread_grants(self) -> int:
        """The number of grants in responses that wait for their clients to read them."""
        return 0

    async def stop_accepting(self) -> None:
        """Accept no more connections, and close idle ones. Does nothing the second time."""
        if self._is_closing:
            return
        self._is_closing = True
        self.app.close()
        # Unlink while still listening: later, the paths could belong to another daemon.
        await asyncio.to_thread(_unlink, self._inodes)
        for server in self._sockets:
            server.close()
        self.close_idle()

    def reject_incomplete(self) -> None:
        """Reject the requests whose body has not arrived. Call this after `stop_accepting`."""
        self.app.reject_incomplete()

    async def stop(self, deadline_s: float) -> None:
        """Accept no more requests, close idle connections, wait for the responses to pending requests, then close.

        Aborts the rest after `deadline_s` seconds. Waiting claims are pending requests, which the actor must end.
        """
        await self.stop_accepting()
        try:
            async with asyncio.timeout(deadline_s):
                await self.app.wait_idle()
                await self.close_all()
        except TimeoutError:
            name, grants = self.app.authenticator.name, self.unread_grants
            log.warning("requests_cut_off", listener=name, connections=self.connections, grants=grants)
            await self.abort_all()

    @abstractmethod
    def close_idle(self) -> None:
        """Close the connections without a request in progress."""

    @abstractmethod
    async def close_all(self) -> None:
        """Close all connections once their responses are sent."""

    @abstractmethod
    async def abort_all(self) -> None:
        """Abort all connections, and cancel the requests in progress."""


class WorkerListener(HttpListener):
    def __init__(self, app: HttpApp[Any]) -> None:
        super().__init__(app)
        self._connections: set[WorkerConnection] = set()

    def has_peer(self, port: int) -> bool:
        """Return whether there is a TCP connection from `port`."""
        transports = [each.transport for each in self._connections if each.transport is not None]
        return any(each.get_extra_info("peername")[1] == port for each in transports)

    def protocol_factory(self) -> Callable[[], asyncio.Protocol]:
        return partial(WorkerConnection, self.app, self._connections)

    @property
    def connections(self) -> int:
        return len(self._connections)

    @property
    def unread_grants(self) -> int:
        return sum(connection.unread_grants for connection in self._connections)

    def close_idle(self) -> None:
        for connection in tuple(self._connections):
            connection.close_if_idle()

    def reject_incomplete(self) -> None:
        super().reject_incomplete()
        for connection in tuple(self._connections):
            connection.reject_if_incomplete()

    async def close_all(self) -> None:
        for connection in tuple(self._connections):
            connection.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await self._wait_closed()
        await self.abort_all()

    async def abort_all(self) -> None:
        for connection in tuple(self._connections):
            connection.abort()
        await self._wait_closed()

    async def _wait_closed(self) -> None:
        while self._connections:  # noqa: ASYNC110 - an event would cost every connection
            await asyncio.sleep(POLL_S)


def is_in_use(endpoint: str | tuple[str, int]) -> bool:
    """Return whether a process listens on a Unix socket path, or on a host and port. Blocks.

    Other errors are ignored; opening the listener reports them.
    """
    try:
        _connect_or_bind(endpoint)
    except OSError as error:
        return error.errno in (errno.EADDRINUSE, errno.EAGAIN)  # EAGAIN: its backlog is full
    return isinstance(endpoint, str)


def _connect_or_bind(endpoint: str | tuple[str, int]) -> None:
    if isinstance(endpoint, str):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            probe.connect(endpoint)
        return
    for family, kind, _, _, address in socket.getaddrinfo(*endpoint, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(address)


def _bind(path: str, mode: int) -> tuple[socket.socket, int]:
    """Create a listening Unix socket at `path`, which has its permissions before a client can connect.

    Return it with the inode of its file. If several processes bind the same path at the same time, one succeeds.
    """
    if os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise OSError(f"{path} exists and is not a socket. Move it or choose another path")
    draft = f"{path}.{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(draft)  # of a killed process with the same id, which is usual in containers
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        opened.bind(draft)
        os.chmod(draft, mode)
        inode = os.lstat(draft).st_ino
        opened.listen(BACKLOG)
        with _directory_lock(os.path.dirname(path) or "."):
            if is_in_use(path):
                raise OSError(errno.EADDRINUSE, "another process listens there")
            os.rename(draft, path)
    except BaseException:
        opened.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)
        raise
    opened.setblocking(False)
    return opened, inode


@contextlib.contextmanager
def _directory_lock(directory: str) -> Iterator[None]:
    """Lock `directory`, so that no other process replaces a socket between its check and its rename.

    Any user can lock a directory, so this goes on without the lock after LOCK_S.
    """
    until_s = time.monotonic() + LOCK_S
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        while time.monotonic() < until_s:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(POLL_S)
        yield
    finally:
        os.close(opened)


def _unlink(inodes: dict[str, int]) -> None:
    for path, inode in inodes.items():
        with contextlib.suppress(FileNotFoundError):
            if os.lstat(path).st_ino == inode:
                os.unlink(path)
