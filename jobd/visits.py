"""One request on its way: what it asks for, and what the actor and the log line of a refusal need to know of it.

Reads no body and judges nothing.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import struct
from typing import Final

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import HttpVersion, RawRequestMessage
from aiohttp.streams import EmptyStreamReader, StreamReader
from aiohttp.web_protocol import RequestHandler
from msgspec import Struct
from msgspec.structs import replace
from multidict import MultiMapping

from jobd.commands import KeyUse, Operator
from jobd.doors import OPERATOR, operator_name
from jobd.routes import Route

_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid


class Head(Struct, frozen=True):
    """What a request says of itself beside its first line."""

    headers: MultiMapping[str]
    version: HttpVersion
    keep_alive: bool
    has_body: bool

    @classmethod
    def of(cls, message: RawRequestMessage, payload: StreamReader) -> Head:
        has_body = type(payload) is not EmptyStreamReader
        return cls(message.headers, message.version, not message.should_close, has_body)


class Visit:
    """A request, as everybody here sees it. `request` is aiohttp's own object, where it was made."""

    __slots__ = (
        "admin", "allow", "by", "connection", "head", "job_id", "key", "method", "operator", "path", "query", "request",
        "route", "size",
    )  # fmt: skip

    def __init__(
        self,
        method: str,
        target: str,
        head: Head,
        connection: RequestHandler,
        request: web.BaseRequest | None = None,
    ) -> None:
        self.method = method
        self.path, _, self.query = target.partition("?")  # as they came
        self.head = head
        self.connection = connection
        self.request = request
        self.by = "client"
        self.admin = False  # whether the answer may hold secrets
        self.operator: Operator | None = None  # who of the operators asks for a change
        self.route: Route | None = None
        self.allow: frozenset[str] = frozenset()
        self.key: KeyUse | None = None
        self.size = 0
        self.job_id: str | None = None

    @property
    def is_cut(self) -> bool:
        """Whether the connection is gone, or going."""
        transport = self.connection.transport
        return transport is None or transport.is_closing()


def address_of(visit: Visit) -> str:
    """Where the connection comes from: an address, or the user at the other end of a Unix socket."""
    transport = visit.connection.transport
    if transport is None:
        return "gone"
    peer = transport.get_extra_info("peername")
    if isinstance(peer, tuple):
        return str(peer[0])
    opened = transport.get_extra_info("socket")
    _, uid, _ = _CREDENTIALS.unpack(opened.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return f"unix uid={uid}"


def operator_of(visit: Visit, name: str = "") -> Operator:
    """Who asks for a change: by `name`, where it is known, else by the one that the request gives."""
    return Operator(name or operator_name(visit.head.headers.get(OPERATOR, "")), address_of(visit))


def looker_of(visit: Visit, name: str = "") -> Operator:
    """Who looks at what is worth an entry in the audit log; who has no name and may only look is `reader`."""
    if visit.operator is not None:
        return visit.operator
    name = name or operator_name(visit.head.headers.get(OPERATOR, ""))
    return Operator(name or ("reader" if visit.by == "reader" else ""), address_of(visit))


def in_parts(operator: Operator | None) -> Operator | None:
    """`operator` for a deed of many commands, which is one row of the audit log."""
    return None if operator is None else replace(operator, part_of=secrets.token_hex(8))


class Request(web.BaseRequest):
    """aiohttp's request, for what takes its time: it waits for its body, or is answered bit by bit."""

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
        self.visit = Visit(message.method, message.path, Head.of(message, payload), protocol, self)
