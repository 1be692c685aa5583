"""One request on its way: what it asks for, and what the actor and the log line of a refusal need to know of it.

Reads no body and judges nothing.
"""

from __future__ import annotations

import asyncio

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import HttpVersion, RawRequestMessage
from aiohttp.streams import EmptyStreamReader, StreamReader
from aiohttp.web_protocol import RequestHandler
from msgspec import Struct
from multidict import MultiMapping

from jobd.commands import KeyUse
from jobd.routes import Route


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
        "admin", "allow", "by", "connection", "head", "job_id", "key", "method", "path", "query", "request", "route",
        "size",
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
