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
from multidict import MultiMapping

from jobd.commands import KeyUse
from jobd.routes import Route


class Visit:
    """A request, as everybody here sees it. `request` is aiohttp's own object, where it was made."""

    __slots__ = (
        "allow", "by", "connection", "has_body", "headers", "job_id", "keep_alive", "key", "method", "path", "query",
        "request", "route", "size", "version",
    )  # fmt: skip

    def __init__(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        connection: RequestHandler,
        request: web.BaseRequest | None = None,
    ) -> None:
        self.method: str = message.method
        self.path, _, self.query = message.path.partition("?")  # as they came
        self.version: HttpVersion = message.version
        self.headers: MultiMapping[str] = message.headers
        self.keep_alive: bool = not message.should_close
        self.has_body = type(payload) is not EmptyStreamReader
        self.connection = connection
        self.request = request
        self.by = "client"
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
        self.visit = Visit(message, payload, protocol, self)
