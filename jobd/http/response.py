"""Encode responses, each into one bytes object."""

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

WRITE_TIMEOUT_S: Final = 75.0  # for the client to read a response
RETRY_AFTER_S: Final = 1

HTTP_VERSION: Final = b"HTTP/1.1 "  # every response begins with it

# Headers of every response. It may contain secrets, and browsers must not guess its type.
SAFE_HEADERS: Final = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}

_encode: Final = msgspec.json.Encoder().encode
_BLANKS: Final = bytes.maketrans(b"\r\n", b"  ")


class RawBody(Struct, frozen=True):
    """A body that is not JSON. `headers` are added to the usual ones, or replace them."""

    content_type: str
    body: bytes
    headers: dict[str, str] = {}


class _SuccessBody(Struct, frozen=True, gc=False):
    """The envelope of a successful JSON response."""

    success: Literal[True]
    data: Any


class ErrorBody(Struct, frozen=True):
    """An error response."""

    error: Annotated[str, Meta(description="The error code.")]
    message: Annotated[str, Meta(description="A human-readable message.")]
    details: Annotated[dict[str, Any], Meta(description="Machine-readable details of the error.")]
    success: Annotated[bool, Meta(description="Whether the request succeeded.")] = False


class LineError(ErrorBody, frozen=True, kw_only=True):
    """An error in a stream of responses."""

    status: int


class _Date:
    """The Date header, formatted once a second."""

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
    """A complete response as bytes, which is much faster than aiohttp's Response.

    `on_lost` is called if the connection closes before the first byte is written. `close` closes the connection after
    the rest of the request has been read and dropped, `close_at_once` without reading it.
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
        connection = b"" if not self.close and ctx.head.version >= (1, 1) else self._connection()
        length = b"Content-Length: %d\r\n\r\n" % len(body)
        self.data = b"".join((head, _date.line(), connection, length, b"" if ctx.method == hdrs.METH_HEAD else body))

    def _connection(self) -> bytes:
        return b"Connection: close\r\n" if self.close else b"Connection: keep-alive\r\n"

    def write(self, transport: asyncio.Transport | None, ahead: int = 0) -> bool:
        """Write the response. If that fails, call `on_lost` and return False. `ahead` bytes have been sent already."""
        if transport is not None and not transport.is_closing():
            transport.write(self.data[ahead:] if ahead else self.data)
            if not transport.is_closing():  # a failed write closes the transport
                return True
        if self.on_lost is not None:
            self.on_lost()
        return False


class PreparedResponse(web.StreamResponse):
    """An HttpResponse in the form that aiohttp accepts from a handler."""

    def __init__(self, response: HttpResponse, request: HttpRequest) -> None:
        self._response = response
        self._request = request
        self._keep_alive = not response.close

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        return request.writer

    async def write_eof(self, data: bytes = b"") -> None:
        transport, request = self._request.transport, self._request
        request.probe = b""
        if request.probed is not None and transport is not None and self._response.on_lost is not None:
            try:
                await request.probed(transport)
            except asyncio.CancelledError:
                self._response.on_lost()
                raise
        if not self._response.write(transport, request.ahead):
            raise ConnectionResetError("the client has disconnected")
        assert transport is not None
        if self._request.protocol.writing_paused:
            await self._drain(transport)
        if self._response.close_at_once:
            transport.close()

    async def _drain(self, transport: asyncio.Transport) -> None:
        """Wait for a slow client for at most WRITE_TIMEOUT_S."""
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await self._request.writer.drain()
        except TimeoutError:
            transport.abort()


def abort_later(transport: asyncio.Transport) -> asyncio.TimerHandle:
    """Abort the connection of a slow client, unless the timer is cancelled in time."""
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
    """Build the response `{"success": true, "data": …}`, or one with a raw body. `status` may be 503, too."""
    if type(data) is RawBody:
        return HttpResponse(ctx, _head(status, data.content_type, **data.headers), data.body, close=close)
    body = _encode(_SuccessBody(True, data))
    head = _HEADS[status] + _REPLAYED if replayed else _HEADS[status]
    return HttpResponse(ctx, head, body, close=close, on_lost=on_lost)


def response_line(response: Response) -> bytes:
    """Build one line of a stream of responses: the response object with its status."""
    more = b',"replayed":true' if response.replayed else b""
    return b'{"success":true,"data":%b,"status":%d%b}\n' % (_in_one_line(_encode(response.data)), response.status, more)


def error_line(error: ApiError) -> bytes:
    """Build one line of a stream of responses from an error."""
    details = error.details
    if error.code == "overloaded":
        details = {"retry_after_ms": RETRY_AFTER_S * 1000, **details}
    body = LineError(error.code, error.message, details, status=error.status)
    return _encode(body) + b"\n"


def _in_one_line(body: bytes) -> bytes:
    """Replace line breaks, which payloads and metadata may contain between values."""
    return body.translate(_BLANKS) if b"\n" in body or b"\r" in body else body


def error_response(
    ctx: RequestContext,
    error: ApiError,
    *,
    allow: frozenset[str] = frozenset(),
    close: bool = False,
    page: RawBody | None = None,
) -> HttpResponse:
    """Build the response to an error: the error object or `page`, with the headers that the error requires."""
    more: dict[str, str] = {}
    if allow:
        more["Allow"] = ", ".join(sorted(allow))
    if error.code == "unauthorized":
        more["WWW_Authenticate"] = "Bearer"
    if error.code == "overloaded":
        more["Retry_After"] = str(RETRY_AFTER_S)
    if page is None:
        page = RawBody(JSON, _encode(ErrorBody(error.code, error.message, error.details)))
    late = error.code == "request_timeout"
    head = _head(error.status, page.content_type, **page.headers, **more)
    return HttpResponse(ctx, head, page.body, close=close or late, close_at_once=late)
