"""The parsed head of a request and the context that handlers share."""

from __future__ import annotations

import asyncio
import re
import secrets
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import HttpVersion, RawRequestMessage
from aiohttp.streams import EmptyStreamReader, StreamReader
from aiohttp.web_protocol import RequestHandler
from msgspec import Struct
from msgspec.structs import replace
from multidict import CIMultiDict, CIMultiDictProxy, MultiMapping

from jobd.http.auth import OPERATOR_HEADER, is_plain_json, operator_name
from jobd.http.routing import Route
from jobd.model.commands import IdempotencyKey, Operator

_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid
# A request target in absolute form. One with a user or another scheme is rejected as an unknown path.
_URI: Final = re.compile(r"https?://([^/?#@]+)([/?].*)?", re.IGNORECASE)


class RequestHead(Struct, frozen=True):
    """The headers of a request, and what follows from them for its body and connection."""

    headers: MultiMapping[str]
    version: HttpVersion
    keep_alive: bool
    has_body: bool
    is_json: bool  # by is_plain_json
    expects: str  # the header Expect, in lower case

    @classmethod
    def of(cls, message: RawRequestMessage, payload: StreamReader) -> RequestHead:
        has_body = type(payload) is not EmptyStreamReader
        is_json = has_body and is_plain_json(message.headers)
        expects = ", ".join(message.headers.getall(hdrs.EXPECT)).lower() if hdrs.EXPECT in message.headers else ""
        return cls(message.headers, message.version, not message.should_close, has_body, is_json, expects)


class RequestContext:
    """A request as handlers see it. `request` is aiohttp's object, None on the fast path."""

    __slots__ = (
        "admin", "allow", "by", "connection", "head", "job_id", "key", "method", "operator", "path", "query", "request",
        "route", "size",
    )  # fmt: skip

    def __init__(
        self,
        method: str,
        target: str,
        head: RequestHead,
        connection: RequestHandler,
        request: HttpRequest | None = None,
    ) -> None:
        self.method = method
        self.path, _, self.query = target.partition("?")  # not decoded
        self.head = head
        self.connection = connection
        self.request = request
        self.by = "client"
        self.admin = False  # whether the response may contain lock ids
        self.operator: Operator | None = None  # if the call may change state
        self.route: Route | None = None
        self.allow: frozenset[str] = frozenset()
        self.key: IdempotencyKey | None = None
        self.size = 0
        self.job_id: str | None = None

    @classmethod
    def of(
        cls,
        message: RawRequestMessage,
        payload: StreamReader,
        connection: RequestHandler,
        request: HttpRequest | None = None,
    ) -> RequestContext:
        """Make the context of a parsed request. A client may send an absolute URI as the target, as to a proxy."""
        target, head = message.path, RequestHead.of(message, payload)
        if not target.startswith("/"):
            target, head = _without_authority(target, head)
        return cls(message.method, target, head, connection, request)

    @property
    def is_disconnected(self) -> bool:
        """Whether the connection is closed or closing."""
        transport = self.connection.transport
        return transport is None or transport.is_closing()


def _without_authority(target: str, head: RequestHead) -> tuple[str, RequestHead]:
    """Return the path and query of a URI. Its host replaces the Host header (RFC 9112, 3.2.2)."""
    uri = _URI.fullmatch(target)
    if uri is None:
        return target, head
    headers = CIMultiDict(head.headers)
    headers[hdrs.HOST] = uri[1]
    path = uri[2] or "/"
    return path if path.startswith("/") else f"/{path}", replace(head, headers=CIMultiDictProxy(headers))


def client_address(ctx: RequestContext) -> str:
    """Return the IP address of the client, or its user id on a Unix socket."""
    transport = ctx.connection.transport
    if transport is None:
        return "gone"
    peer = transport.get_extra_info("peername")
    if isinstance(peer, tuple):
        return str(peer[0])
    opened = transport.get_extra_info("socket")
    _, uid, _ = _CREDENTIALS.unpack(opened.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return f"unix uid={uid}"


def operator_of(ctx: RequestContext, name: str = "") -> Operator:
    """Return the operator who requests a change. `name` takes precedence over the header."""
    return Operator(name or operator_name(ctx.head.headers.get(OPERATOR_HEADER, "")), client_address(ctx))


def reading_operator(ctx: RequestContext, name: str = "") -> Operator:
    """Return the operator who reads audited data. A read-only token without a name is `reader`."""
    if ctx.operator is not None:
        return ctx.operator
    name = name or operator_name(ctx.head.headers.get(OPERATOR_HEADER, ""))
    return Operator(name or ("reader" if ctx.by == "reader" else ""), client_address(ctx))


def as_one_entry(operator: Operator | None) -> Operator | None:
    """Return `operator` for an action of many commands with one audit entry."""
    return None if operator is None else replace(operator, part_of=secrets.token_hex(8))


class HttpRequest(web.BaseRequest):
    """aiohttp's request, for a request that waits for its body or gets a streamed response.

    `is_truncated`: the client stopped sending before the end of the body. `probe` holds the next bytes of the response
    if they are known. `ahead` bytes of the response have been sent as a probe, and `probed` waits for their receipt:
    see `ServerConnection.eof_received`.
    """

    is_truncated = False
    probe = b""
    ahead = 0
    probed: Callable[[asyncio.Transport], Awaitable[None]] | None = None

    def __init__(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: RequestHandler,
        writer: AbstractStreamWriter,
        task: asyncio.Task[None],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        super().__init__(message, payload, protocol, writer, task, loop)
        self.ctx = RequestContext.of(message, payload, protocol, self)
