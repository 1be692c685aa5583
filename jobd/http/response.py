"""How answers leave: one prepared piece of bytes for each, and the words that every answer carries.

Decides nothing and knows no route.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from email.utils import formatdate
from http import HTTPStatus
from typing import Annotated, Any, Final, Literal

import msgspec
from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter
from msgspec import Meta, Struct

from jobd.http.auth import JSON
from jobd.http.request import HttpRequest, RequestContext
from jobd.model.errors import ApiError
from jobd.model.responses import Response

WRITE_TIMEOUT_S: Final = 75.0  # how long an answer may wait for a client that does not read it
RETRY_AFTER_S: Final = 1

HTTP_VERSION: Final = b"HTTP/1.1 "  # how every response begins

# What every answer says of itself: it may hold secrets, and it is of the type that it says.
SAFE_HEADERS: Final = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}

_encode: Final = msgspec.json.Encoder().encode
_BLANKS: Final = bytes.maketrans(b"\r\n", b"  ")


class RawBody(Struct, frozen=True):
    """An answer's data that is no JSON and goes out as it is. `more`: headers beside the usual, or in their place."""

    content_type: str
    body: bytes
    headers: dict[str, str] = {}


class _SuccessBody(Struct, frozen=True, gc=False):
    """What every answer that is JSON is, which is no refusal. One that was encoded piece by piece would be copied."""

    success: Literal[True]
    data: Any


class ErrorBody(Struct, frozen=True):
    """An error."""

    error: Annotated[str, Meta(description="The error code.")]
    message: Annotated[str, Meta(description="A sentence for people.")]
    details: Annotated[dict[str, Any], Meta(description="More about the error, for programs.")]
    success: Annotated[bool, Meta(description="Whether the request succeeded.")] = False


class LineError(ErrorBody, frozen=True, kw_only=True):
    """The error object in a stream of answers."""

    status: int


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
    fields = {"Content-Type": kind, **SAFE_HEADERS, **more}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{lines}".encode()


_HEADS: Final = {int(status): _head(status, JSON) for status in HTTPStatus}
_REPLAYED: Final = b"Idempotent-Replayed: true\r\n"


class HttpResponse:
    """A whole answer in one piece of bytes. aiohttp's own Response spends more time on headers than all the rest.

    `lost` is called where the connection is gone before the first byte was written. `close` ends the connection once
    the rest of the request has been read and dropped, `hang_up` at once.
    """

    __slots__ = ("close", "close_at_once", "data", "on_lost")

    def __init__(
        self,
        ctx: RequestContext,
        head: bytes,
        body: bytes,
        *,
        close: bool = False,
        close_at_once: bool = False,
        on_lost: Callable[[], None] | None = None,
    ) -> None:
        self.on_lost = on_lost
        self.close_at_once = close_at_once
        self.close = close or not ctx.head.keep_alive
        told = b"" if not self.close and ctx.head.version >= (1, 1) else self._connection()
        length = b"Content-Length: %d\r\n\r\n" % len(body)
        self.data = b"".join((head, _date.line(), told, length, b"" if ctx.method == hdrs.METH_HEAD else body))

    def _connection(self) -> bytes:
        return b"Connection: close\r\n" if self.close else b"Connection: keep-alive\r\n"

    def write(self, transport: asyncio.Transport | None, ahead: int = 0) -> bool:
        """Write it. Return whether that succeeded; if not, `lost` has been called. `ahead` bytes have been sent."""
        if transport is not None and not transport.is_closing():
            transport.write(self.data[ahead:] if ahead else self.data)
            if not transport.is_closing():  # the client may be gone, and we learn it by writing to it
                return True
        if self.on_lost is not None:
            self.on_lost()
        return False


class PreparedResponse(web.StreamResponse):
    """A reply as aiohttp takes it from a handler."""

    def __init__(self, reply: HttpResponse, request: HttpRequest) -> None:
        self._reply = reply
        self._request = request
        self._keep_alive = not reply.close

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        return request.writer

    async def write_eof(self, data: bytes = b"") -> None:
        transport, request = self._request.transport, self._request
        request.probe = b""
        if request.probed is not None and transport is not None and self._reply.on_lost is not None:
            try:
                await request.probed(transport)
            except asyncio.CancelledError:
                self._reply.on_lost()
                raise
        if not self._reply.write(transport, request.ahead):
            raise ConnectionResetError("the client is gone")
        assert transport is not None
        if self._request.protocol.writing_paused:
            await self._drain(transport)
        if self._reply.close_at_once:
            transport.close()

    async def _drain(self, transport: asyncio.Transport) -> None:
        """Wait for a slow reader, but not for ever."""
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await self._request.writer.drain()
        except TimeoutError:
            transport.abort()


def abort_later(transport: asyncio.Transport) -> asyncio.TimerHandle:
    """Ends the connection of a slow reader, unless the timer is cancelled in time."""
    return asyncio.get_running_loop().call_later(WRITE_TIMEOUT_S, transport.abort)


def ok_response(
    ctx: RequestContext,
    data: Any,
    status: int,
    *,
    replayed: bool = False,
    close: bool = False,
    on_lost: Callable[[], None] | None = None,
) -> HttpResponse:
    """The answer `{"success": true, "data": …}`, or the text as it is. It was answered, whatever it says: 503 too."""
    if type(data) is RawBody:
        return HttpResponse(ctx, _head(status, data.content_type, **data.headers), data.body, close=close)
    body = _encode(_SuccessBody(True, data))
    head = _HEADS[status] + _REPLAYED if replayed else _HEADS[status]
    return HttpResponse(ctx, head, body, close=close, on_lost=on_lost)


def response_line(answer: Response) -> bytes:
    """An answer in a stream of answers: the usual object with its status, in one line."""
    more = b',"replayed":true' if answer.replayed else b""
    return b'{"success":true,"data":%b,"status":%d%b}\n' % (_in_one_line(_encode(answer.data)), answer.status, more)


def error_line(refusal: ApiError) -> bytes:
    """A refusal in a stream of answers."""
    details = refusal.details
    if refusal.code == "overloaded":
        details = {"retry_after_ms": RETRY_AFTER_S * 1000, **details}
    body = LineError(refusal.code, refusal.message, details, status=refusal.status)
    return _encode(body) + b"\n"


def _in_one_line(body: bytes) -> bytes:
    """Payloads and metadata are as their makers wrote them. In JSON a line break stands between values only."""
    return body.translate(_BLANKS) if b"\n" in body or b"\r" in body else body


def error_response(
    ctx: RequestContext,
    refusal: ApiError,
    *,
    allow: frozenset[str] = frozenset(),
    close: bool = False,
    page: RawBody | None = None,
) -> HttpResponse:
    """The error object, or what is `shown` in its place, with the headers that its status asks for."""
    more: dict[str, str] = {}
    if allow:
        more["Allow"] = ", ".join(sorted(allow))
    if refusal.code == "unauthorized":
        more["WWW_Authenticate"] = "Bearer"
    if refusal.code == "overloaded":
        more["Retry_After"] = str(RETRY_AFTER_S)
    if page is None:
        page = RawBody(JSON, _encode(ErrorBody(refusal.code, refusal.message, refusal.details)))
    late = refusal.code == "request_timeout"
    head = _head(refusal.status, page.content_type, **page.headers, **more)
    return HttpResponse(ctx, head, page.body, close=close or late, close_at_once=late)
