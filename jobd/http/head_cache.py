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

MOST_KNOWN: Final = 512
LONGEST: Final = 2048  # bytes

# Heads that nobody can read in two ways.
_FIRST_LINE: Final = re.compile(rb"(GET|POST) (/[A-Za-z0-9._:%/-]*(?:\?[A-Za-z0-9._:%=&-]*)?) HTTP/1\.1")
_OTHER_LINES: Final = re.compile(rb"(?:\r\n[A-Za-z0-9-]+: ?[!-~](?:[ -~]*[!-~])?)+\r\n\r\n")
_VALUE: Final = re.compile(rb"[!-~](?:[ -~]{0,300}[!-~])?")
# What is secret or new each time is cut out: the head is kept without it.
_CUT_OUT: Final = ((b"\r\nAuthorization: ", hdrs.AUTHORIZATION), (b"\r\nIdempotency-Key: ", istr("Idempotency-Key")))
_NOT_KEPT: Final = (hdrs.COOKIE, hdrs.PROXY_AUTHORIZATION, *(name for _, name in _CUT_OUT))


class Whole(Struct, frozen=True):
    """A request with all of its body."""

    method: str
    target: str
    head: RequestHead
    body: bytes


class _Known(Struct, frozen=True):
    """A head, the length of the body that it announces, and the first line that it came with: many come again."""

    head: RequestHead
    length: int
    line: bytes
    method: str
    target: str


class Heads:
    """What heads mean, but for their first lines. Where there are too many it begins anew."""

    def __init__(self) -> None:
        self._known: dict[bytes, _Known] = {}

    def read(self, data: bytes) -> Whole | None:
        """The one request that `data` is, where its head is known."""
        at, end = _bounds(data)
        lines, values = _cut(data[at:end])
        known = self._known.get(lines)
        if known is None or len(data) != end + known.length:
            return None
        if data.startswith(known.line):
            method, target = known.method, known.target
        elif (line := _FIRST_LINE.fullmatch(data, 0, at)) is not None:
            method, target = line[1].decode(), line[2].decode()
        else:
            return None
        return Whole(method, target, _with(known.head, values) if values else known.head, data[end:])

    def learn(self, data: bytes, message: object, payload: StreamReader) -> bool:
        """Whether `data` was one request, of which the parser made `message` with all of its `payload`."""
        at, end = _bounds(data)
        if not is_whole(message, payload) or _OTHER_LINES.fullmatch(data, at, end) is None:
            return False
        head = RequestHead.of(message, payload)
        length = int(head.headers.get(hdrs.CONTENT_LENGTH, 0))
        line = _FIRST_LINE.fullmatch(data, 0, at)
        if len(data) != end + length or message.upgrade or line is None:
            return False
        if head.keep_alive and not message.chunked:
            known = _Known(head, length, data[: at + 2], line[1].decode(), line[2].decode())
            self._keep(*_cut(data[at:end]), known)
        return True

    def _keep(self, lines: bytes, values: list[tuple[istr, str]], known: _Known) -> None:
        if not lines:
            return
        headers = CIMultiDict(known.head.headers)
        for name, value in values:
            if headers.popall(name) != [value]:
                return
        if any(name in headers for name in _NOT_KEPT):
            return
        if len(self._known) >= MOST_KNOWN:
            self._known.clear()
        self._known[lines] = replace(known, head=replace(known.head, headers=CIMultiDictProxy(headers)))


def is_whole(message: object, payload: StreamReader) -> TypeGuard[RawRequestMessage]:
    """Whether this is a request, and not a fault, and its body is there."""
    return isinstance(message, RawRequestMessage) and payload.is_eof() and payload.exception() is None


def _cut(lines: bytes) -> tuple[bytes, list[tuple[istr, str]]]:
    """A head without the values that are cut out of it, and those; nothing where one of them is not plain."""
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
    """Where the first line of a head ends, and where the head does; nothing is between them where it does not."""
    at = data.find(b"\r\n", 0, LONGEST)
    return at, data.find(b"\r\n\r\n", 0, LONGEST) + 4
