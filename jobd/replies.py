"""How answers leave: one prepared piece of bytes for each, and the words that every answer carries.

Decides nothing and knows no route.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, Final

import msgspec
from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter
from msgspec import Struct

from jobd.commands import Refusal
from jobd.doors import JSON

PATIENCE_S: Final = 75.0  # how long an answer may wait for a client that does not read it
RETRY_AFTER_S: Final = 1

# What every answer says of itself: it may hold secrets, and it is of the type that it says.
SAFE: Final = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}

_encode: Final = msgspec.json.Encoder().encode


class Text(Struct, frozen=True):
    """An answer's data that is no JSON and goes out as it is."""

    kind: str
    body: bytes


class ErrorBody(Struct, frozen=True):
    """The error object of every API."""

    error: str
    message: str
    details: dict[str, Any]
    success: bool = False


class _Date:
    """The Date header, made once a second."""

    def __init__(self) -> None:
        self._second = 0
        self._line = b""

    def line(self) -> bytes:
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._line = f"Date: {formatdate(second, usegmt=True)}\r\n".encode()
        return self._line


_date: Final = _Date()


def _head(status: int, kind: str, **more: str) -> bytes:
    fields = {"Content-Type": kind, **SAFE, **more}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{lines}".encode()


_HEADS: Final = {int(status): _head(status, JSON) for status in HTTPStatus}
_REPLAYED: Final = b"Idempotent-Replayed: true\r\n"


class Reply(web.StreamResponse):
    """A whole answer, written in one piece. aiohttp's own Response spends more time on headers than all the rest.

    `lost` is called where the connection is gone before the first byte was written. `close` ends the connection once
    the rest of the request has been read and dropped, `hang_up` at once.
    """

    def __init__(
        self,
        request: web.BaseRequest,
        head: bytes,
        body: bytes,
        *,
        close: bool = False,
        hang_up: bool = False,
        lost: Callable[[], None] | None = None,
    ) -> None:
        self._request = request
        self._lost = lost
        self._hang_up = hang_up
        self._keep_alive = request.keep_alive and not close
        told = b"" if self._keep_alive and request.version >= (1, 1) else self._connection()
        length = b"Content-Length: %d\r\n\r\n" % len(body)
        parts = (head, _date.line(), told, length, b"" if request.method == hdrs.METH_HEAD else body)
        self._bytes = b"".join(parts)

    def _connection(self) -> bytes:
        return b"Connection: keep-alive\r\n" if self._keep_alive else b"Connection: close\r\n"

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        return request.writer

    async def write_eof(self, data: bytes = b"") -> None:
        transport = self._request.transport
        if transport is None or transport.is_closing():
            if self._lost is not None:
                self._lost()
            raise ConnectionResetError("the client is gone")
        transport.write(self._bytes)
        if self._request.protocol.writing_paused:
            await self._drain(transport)
        if self._hang_up:
            transport.close()

    async def _drain(self, transport: asyncio.Transport) -> None:
        """Wait for a slow reader, but not for ever."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._request.writer.drain()
        except TimeoutError:
            transport.abort()


def accepted(
    request: web.BaseRequest,
    data: Any,
    status: int,
    *,
    replayed: bool = False,
    close: bool = False,
    lost: Callable[[], None] | None = None,
) -> Reply:
    """The answer `{"success": true, "data": …}`, or the text as it is. It was answered, whatever it says: 503 too."""
    if type(data) is Text:
        return Reply(request, _head(status, data.kind), data.body, close=close)
    body = b'{"success":true,"data":%b}' % _encode(data)
    head = _HEADS[status] + _REPLAYED if replayed else _HEADS[status]
    return Reply(request, head, body, close=close, lost=lost)


def refusing(
    request: web.BaseRequest, refusal: Refusal, *, allow: frozenset[str] = frozenset(), close: bool = False
) -> Reply:
    """The error object, with the headers that its status asks for."""
    more: dict[str, str] = {}
    if allow:
        more["Allow"] = ", ".join(sorted(allow))
    if refusal.code == "unauthorized":
        more["WWW_Authenticate"] = "Bearer"
    if refusal.code == "overloaded":
        more["Retry_After"] = str(RETRY_AFTER_S)
    body = ErrorBody(error=refusal.code, message=refusal.message, details=refusal.details)
    late = refusal.code == "request_timeout"
    return Reply(request, _head(refusal.status, JSON, **more), _encode(body), close=close or late, hang_up=late)
