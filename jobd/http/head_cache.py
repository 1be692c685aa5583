"""Cache parsed request heads: the same bytes mean the same head.

aiohttp's parser parses each head once. Tokens and idempotency keys are not cached.
"""

from __future__ import annotations

import re
from typing import Final, TypeGuard

from aiohttp import hdrs
from aiohttp.http import RawRequestMessage
from aiohttp.streams import StreamReader
from msgspec import Struct
from msgspec.structs import replace
from multidict import CIMultiDict, CIMultiDictProxy, istr

from jobd.http.request import RequestHead

MAX_HEADS: Final = 512
MAX_HEAD_BYTES: Final = 2048

# Only heads that every parser reads in the same way are cached.
_FIRST_LINE: Final = re.compile(rb"(GET|POST) (/[A-Za-z0-9._:%/-]*(?:\?[A-Za-z0-9._:%=&-]*)?) HTTP/1\.1")
_OTHER_LINES: Final = re.compile(rb"(?:\r\n[A-Za-z0-9-]+: ?[!-~](?:[ -~]*[!-~])?)+\r\n\r\n")
_VALUE: Final = re.compile(rb"[!-~](?:[ -~]{0,300}[!-~])?")
# Headers that are secret or differ in each request. A head is cached without them.
_CUT_OUT: Final = ((b"\r\nAuthorization: ", hdrs.AUTHORIZATION), (b"\r\nIdempotency-Key: ", istr("Idempotency-Key")))
_NEVER_CACHED: Final = (hdrs.COOKIE, hdrs.PROXY_AUTHORIZATION, *(name for _, name in _CUT_OUT))


class CachedRequest(Struct, frozen=True):
    """A complete request with a cached head."""

    method: str
    target: str
    head: RequestHead
    body: bytes


class _CachedHead(Struct, frozen=True):
    """A cached head, the length of its body, and its latest request line, which is often repeated."""

    head: RequestHead
    length: int
    line: bytes
    method: str
    target: str


class HeadCache:
    """Parsed heads by their header lines. A full cache is cleared."""

    def __init__(self) -> None:
        self._heads: dict[bytes, _CachedHead] = {}

    def read(self, data: bytes) -> CachedRequest | None:
        """Return the request if `data` is exactly one request whose head is cached, else None."""
        at, end = _bounds(data)
        lines, values = _cut(data[at:end])
        known = self._heads.get(lines)
        if known is None or len(data) != end + known.length:
            return None
        if data.startswith(known.line):
            method, target = known.method, known.target
        elif (line := _FIRST_LINE.fullmatch(data, 0, at)) is not None:
            method, target = line[1].decode(), line[2].decode()
        else:
            return None
        return CachedRequest(method, target, _with(known.head, values) if values else known.head, data[end:])

    def learn(self, data: bytes, message: object, payload: StreamReader) -> bool:
        """Cache the head of `data`, which the parser has read as `message` and `payload`.

        Return whether `data` was exactly one complete request, even if its head cannot be cached.
        """
        at, end = _bounds(data)
        if not is_complete(message, payload) or _OTHER_LINES.fullmatch(data, at, end) is None:
            return False
        head = RequestHead.of(message, payload)
        length = int(head.headers.get(hdrs.CONTENT_LENGTH, 0))
        line = _FIRST_LINE.fullmatch(data, 0, at)
        if len(data) != end + length or message.upgrade or line is None:
            return False
        if head.keep_alive and not message.chunked:
            known = _CachedHead(head, length, data[: at + 2], line[1].decode(), line[2].decode())
            self._store(*_cut(data[at:end]), known)
        return True

    def _store(self, lines: bytes, values: list[tuple[istr, str]], known: _CachedHead) -> None:
        if not lines:
            return
        headers = CIMultiDict(known.head.headers)
        for name, value in values:
            if headers.popall(name) != [value]:
                return
        if any(name in headers for name in _NEVER_CACHED):
            return
        if len(self._heads) >= MAX_HEADS:
            self._heads.clear()
        self._heads[lines] = replace(known, head=replace(known.head, headers=CIMultiDictProxy(headers)))


def is_complete(message: object, payload: StreamReader) -> TypeGuard[RawRequestMessage]:
    """Return whether this is a valid request (not a parse error) with its complete body."""
    return isinstance(message, RawRequestMessage) and payload.is_eof() and payload.exception() is None


def _cut(lines: bytes) -> tuple[bytes, list[tuple[istr, str]]]:
    """Return the header lines without the headers in _CUT_OUT, and their values; nothing if a value is unusual."""
    values = []
    for mark, name in _CUT_OUT:
        at = lines.find(mark)
        if at >= 0:
            start = at + len(mark)
            end = lines.find(b"\r\n", start)
            value = _VALUE.fullmatch(lines, start, end)
            if value is None:
                return b"", []
            values.append((name, value[0].decode()))
            lines = lines[:start] + lines[end:]
    return lines, values


def _with(head: RequestHead, values: list[tuple[istr, str]]) -> RequestHead:
    headers = CIMultiDict(head.headers)
    for name, value in values:
        headers.add(name, value)
    return replace(head, headers=CIMultiDictProxy(headers))


def _bounds(data: bytes) -> tuple[int, int]:
    """Return the ends of the request line and of the head. An incomplete head has no header lines between them."""
    at = data.find(b"\r\n", 0, MAX_HEAD_BYTES)
    return at, data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES) + 4
