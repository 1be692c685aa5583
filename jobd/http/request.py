"""A request as handlers see it, and its streamed response. Each listener has its own subclass."""

from __future__ import annotations

import re
import secrets
import socket
import struct
from asyncio import Transport
from collections.abc import Mapping
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from jobd.engine.envelope import Envelope
from jobd.http.auth import CLIENT_HEADER, OPERATOR_HEADER, header_text, printable_name
from jobd.http.response import stream_head
from jobd.http.routing import ResolvedRoute, Route
from jobd.model.commands import IdempotencyKey, Operator

_OPERATOR: Final = OPERATOR_HEADER.lower()
_CLIENT: Final = CLIENT_HEADER.lower()
_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid
# A request target in absolute form. One with a user or another scheme is rejected as an unknown path.
_URI: Final = re.compile(r"https?://((?:\[[0-9a-f:.]+\]|[^/?#@\[\]]+)(?::[0-9]*)?)([/?].*)?", re.IGNORECASE)


class BodyError(Exception):
    """The framing of a body is malformed."""


class RequestContext(Struct, eq=False):
    """A request as handlers see it. Each listener has a subclass with the methods that are not implemented here.

    `path` and `query` are not decoded. `headers` have lower-case names and raw values (see `header`); the values of a
    repeated header are joined by commas (cookies by semicolons), and `repeated` contains its name. `version` is "1.1"
    or "1.0"; others are rejected. `is_truncated`: the client stopped sending before the end of the body. If
    `keep_alive` is false, the connection ends after the response. `resolved` is None before `HttpApp.authorize`, and if
    there is no such route.
    """

    method: str
    path: str
    query: str
    headers: Mapping[str, bytes]
    repeated: frozenset[str]
    version: str
    keep_alive: bool
    has_body: bool
    is_truncated: bool = False
    by: str = "client"
    admin: bool = False  # whether the response may contain lock ids
    operator: Operator | None = None  # if the call may change state
    resolved: ResolvedRoute | None = None
    path_value: str | None = None
    allow: frozenset[str] = frozenset()
    key: IdempotencyKey | None = None
    expected: str | None = None  # the version in If-Match
    size: int = 0
    envelope: Envelope | None = None  # while the actor has the command
    job_id: str | None = None
    is_streamed: bool = False
    _is_chunked: bool = False

    @property
    def route(self) -> Route | None:
        return None if self.resolved is None else self.resolved.route

    def header(self, name: str) -> str:
        """Return the value of a header, "" if it is missing."""
        return header_text(self.headers, name)

    # -- connection ----------------------------------------------------------------------------------------------------

    @property
    def transport(self) -> Transport | None:
        """The transport of the connection, None after its end."""
        raise NotImplementedError

    def open_transport(self) -> Transport:
        """Return the transport. Raises ConnectionError if the client has disconnected."""
        transport = self.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has disconnected")
        return transport

    @property
    def is_disconnected(self) -> bool:
        """Whether the connection is closed or closing."""
        transport = self.transport
        return transport is None or transport.is_closing()

    @property
    def local_address(self) -> object:
        """The address that the client connected to: host and port, or the path of a Unix socket."""
        return None if self.transport is None else self.transport.get_extra_info("sockname")

    @property
    def is_tls(self) -> bool:
        return self.transport is not None and self.transport.get_extra_info("sslcontext") is not None

    def abort(self) -> None:
        """Reset the connection."""
        if self.transport is not None:
            self.transport.abort()

    # -- body ----------------------------------------------------------------------------------------------------------

    @property
    def is_complete(self) -> bool:
        """Whether the whole body has arrived."""
        raise NotImplementedError

    def send_continue(self) -> None:
        """Send `100 Continue` to a client that waits for it before it sends its body. HTTP/1.0 does not have it."""
        transport, waits = self.transport, self.version == "1.1" and self.headers.get("expect")
        if waits and not self.is_complete and transport is not None:
            transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    async def read(self) -> bytes:
        """Return the next bytes of the body, none at its end. Raises BodyError."""
        raise NotImplementedError

    # -- streamed response ---------------------------------------------------------------------------------------------

    def start(self, headers: Mapping[str, str], length: int | None = None) -> None:
        """Send the head of a streamed response. Raises ConnectionError."""
        transport = self.open_transport()
        self.is_streamed = True
        self._is_chunked = length is None and self.version == "1.1"
        if length is None and not self._is_chunked:
            self.keep_alive = False
        transport.write(stream_head(self, headers, length))

    def send(self, piece: bytes) -> None:
        """Send a part of the body, without waiting. Raises ConnectionError."""
        transport = self.open_transport()
        transport.write(b"%x\r\n%b\r\n" % (len(piece), piece) if self._is_chunked else piece)
        self.open_transport()  # the write shows if the client has disconnected

    async def drain(self) -> None:
        """Wait until the client has read enough. Raises ConnectionError."""
        raise NotImplementedError

    async def write(self, piece: bytes) -> None:
        """Send a part of the body, and wait while the client reads too slowly. Raises ConnectionError."""
        self.send(piece)
        await self.drain()

    async def finish(self) -> None:
        """Send the end of the body, and wait until all of it is sent. Raises ConnectionError."""
        if self._is_chunked:
            self._is_chunked = False  # no probe after this
            self.open_transport().write(b"0\r\n\r\n")
        await self.drain()


def add_header(headers: dict[str, bytes], name: str, value: bytes) -> bool:
    """Add a header with a lower-case name. Return whether it is a repetition."""
    if name not in headers:
        headers[name] = value
        return False
    headers[name] += (b"; " if name == "cookie" else b", ") + value
    return True


def announces_body(headers: Mapping[str, bytes]) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", b"").strip(b"0 \t") != b""


def without_authority(target: str, headers: dict[str, bytes]) -> str:
    """Return the path and query of a URI. Its host replaces the Host header (RFC 9112, 3.2.2)."""
    uri = _URI.fullmatch(target)
    if uri is None:
        return target
    headers["host"] = uri[1].encode("utf-8", "surrogateescape")
    path = uri[2] or "/"
    return path if path.startswith("/") else f"/{path}"


def _peer(ctx: RequestContext, unix: str) -> str:
    """Return the IP address of the client. On a Unix socket, return `unix` with its `pid` and `uid`."""
    transport = ctx.transport
    if transport is None:
        return "gone"
    peer = transport.get_extra_info("peername")
    if isinstance(peer, tuple):
        return str(peer[0])
    opened = transport.get_extra_info("socket")
    pid, uid, _ = _CREDENTIALS.unpack(opened.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return unix.format(pid=pid, uid=uid)


def client_address(ctx: RequestContext) -> str:
    """Return the IP address of the client, or its user id on a Unix socket."""
    return _peer(ctx, "unix uid={uid}")


def canceller(ctx: RequestContext) -> str:
    """Return the author of a cancel of a client: its name, if it sends one, and user, process or address."""
    name, peer = printable_name(ctx.header(_CLIENT)), _peer(ctx, "uid {uid}, pid {pid}")
    return f"client:{name} ({peer})" if name else f"client:{peer}"


def operator_of(ctx: RequestContext, name: str = "") -> Operator:
    """Return the operator who requests a change. `name` takes precedence over the header."""
    return Operator(name or printable_name(ctx.header(_OPERATOR)), client_address(ctx))


def reading_operator(ctx: RequestContext, name: str = "") -> Operator:
    """Return the operator who reads audited data. A read-only token without a name is `reader`."""
    if ctx.operator is not None:
        return ctx.operator
    name = name or printable_name(ctx.header(_OPERATOR))
    return Operator(name or ("reader" if ctx.by == "reader" else ""), client_address(ctx))


def as_one_entry(operator: Operator | None) -> Operator | None:
    """Return `operator` for an action of many commands with one audit entry."""
    return None if operator is None else replace(operator, part_of=secrets.token_hex(8))
