"""Encode responses, each into one bytes object."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import Annotated, Any, Final, Literal, Protocol

import msgspec
from msgspec import Struct

from jobd.model.api_call import JSON
from jobd.model.errors import ApiError
from jobd.model.fields import doc
from jobd.model.responses import Response

RETRY_AFTER_S: Final = 1

HTTP_VERSION: Final = b"HTTP/1.1 "  # every response begins with it

# Headers of every response. It may contain secrets, and browsers must not guess its type.
SAFE_HEADERS: Final = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}

_encode: Final = msgspec.json.Encoder().encode
_encode_into: Final = msgspec.json.Encoder().encode_into
_buffer: Final = bytearray()  # of one line at a time: `encode` begins with 32 bytes and moves them as they grow
_BLANKS: Final = bytes.maketrans(b"\r\n", b"  ")
# Integers, because a search for bytes of length 1 takes several times as long.
_CR: Final = ord("\r")
_LF: Final = ord("\n")


class _Request(Protocol):
    """What a response depends on."""

    method: str
    version: str
    keep_alive: bool


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

    error: Annotated[str, doc("The error code.")]
    message: Annotated[str, doc("A human-readable message.")]
    details: Annotated[dict[str, Any], doc("Machine-readable details of the error.")]
    success: Annotated[bool, doc("Whether the request succeeded.")] = False


class LineError(ErrorBody, frozen=True, kw_only=True):
    """An error in a stream of responses."""

    status: int


class _Date:
    """The Date header, formatted once a second."""

    def __init__(self) -> None:
        self._valid_until = 0.0
        self._line = b""

    def line(self) -> bytes:
        now = time.time()
        if not self._valid_until - 1 <= now < self._valid_until:
            self._valid_until = int(now) + 1.0
            self._line = f"Date: {formatdate(int(now), usegmt=True)}\r\n".encode()
        return self._line


_date: Final = _Date()


def _head(status: int, headers: Mapping[str, str]) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{lines}".encode()


_JSON_HEADERS: Final = {"Content-Type": JSON, **SAFE_HEADERS}
_REPLAYED_HEADERS: Final = {**_JSON_HEADERS, "Idempotent-Replayed": "true"}
_JSON_HEADS: Final = {int(status): _head(status, _JSON_HEADERS) for status in HTTPStatus}


@lru_cache
def _length_line(size: int) -> bytes:
    return b"Content-Length: %d\r\n\r\n" % size


class HttpResponse(Struct, eq=False):
    """A complete response.

    `on_lost` is called if the connection closes before the first byte is written. `close` closes the connection after
    the rest of the request has been read and dropped, `close_at_once` without reading it. `grants` is their number.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    close: bool = False
    close_at_once: bool = False
    on_lost: Callable[[], None] | None = None
    grants: int = 0

    def encode(self, ctx: _Request) -> bytes:
        head = _JSON_HEADS[self.status] if self.headers is _JSON_HEADERS else _head(self.status, self.headers)
        is_usual = ctx.version == "1.1" and ctx.keep_alive and not self.close
        connection = b"" if is_usual else connection_line(ctx, self.close)
        body = b"" if ctx.method == "HEAD" else self.body
        return b"".join((head, _date.line(), connection, _length_line(len(self.body)), body))


def stream_head(ctx: _Request, headers: Mapping[str, str], length: int | None) -> bytes:
    """Return the head of a streamed response. Without `length`, its body is chunked or ends with the connection."""
    if length is not None:
        body = _length_line(length)
    else:
        body = b"Transfer-Encoding: chunked\r\n\r\n" if ctx.version == "1.1" else b"\r\n"
    return b"".join((_head(200, headers), _date.line(), connection_line(ctx), body))


def connection_line(ctx: _Request, close: bool = False) -> bytes:
    """Return the Connection header, or nothing if it would only state the default of the HTTP version."""
    if close or not ctx.keep_alive:
        return b"Connection: close\r\n"
    return b"" if ctx.version == "1.1" else b"Connection: keep-alive\r\n"


def ok_response(response: Response, close: bool, on_lost: Callable[[], None] | None) -> HttpResponse:
    """Build the response `{"success": true, "data": …}`, or one with a raw body. The status may be 503, too."""
    data = response.data
    if type(data) is RawBody:
        return HttpResponse(response.status, _page_headers(data), data.body, close)
    headers = _REPLAYED_HEADERS if response.replayed else _JSON_HEADERS
    return HttpResponse(
        response.status, headers, _encode(_SuccessBody(True, data)), close, False, on_lost, len(response.grants)
    )


def _page_headers(page: RawBody) -> dict[str, str]:
    return {"Content-Type": page.content_type, **SAFE_HEADERS, **page.headers}


def response_line(response: Response) -> bytes:
    """Build one line of a stream of responses: the response object with its status.

    Line breaks, which payloads and metadata may contain between values, are replaced.
    """
    _encode_into(response.data, _buffer)
    data = _buffer.translate(_BLANKS) if _LF in _buffer or _CR in _buffer else _buffer
    return b"".join((b'{"success":true,"data":', data, _line_end(response.status, response.replayed)))


@lru_cache
def _line_end(status: int, replayed: bool) -> bytes:
    return b',"status":%d%b}\n' % (status, b',"replayed":true' if replayed else b"")


def error_line(error: ApiError) -> bytes:
    """Build one line of a stream of responses from an error."""
    details = error.details
    if error.code == "overloaded":
        details = {"retry_after_ms": RETRY_AFTER_S * 1000, **details}
    body = LineError(error.code, error.message, details, status=error.status)
    return _encode(body) + b"\n"


def error_response(
    error: ApiError, *, allow: frozenset[str] = frozenset(), close: bool = False, page: RawBody | None = None
) -> HttpResponse:
    """Build the response to an error: the error object or `page`, with the headers that the error requires."""
    headers: Mapping[str, str] = _JSON_HEADERS if page is None else _page_headers(page)
    if allow:
        headers = {**headers, "Allow": ", ".join(sorted(allow))}
    if error.code == "unauthorized":
        headers = {**headers, "WWW-Authenticate": "Bearer"}
    if error.code == "overloaded":
        headers = {**headers, "Retry-After": str(RETRY_AFTER_S)}
    body = _encode(ErrorBody(error.code, error.message, error.details)) if page is None else page.body
    late = error.code == "request_timeout"
    return HttpResponse(error.status, headers, body, close=close or late, close_at_once=late)
