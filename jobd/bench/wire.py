"""Connections for load: just enough HTTP over a Unix socket to be no limit. What is refused ends the run."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable
from functools import partial
from typing import Any, Final, cast

import msgspec

_LIMIT: Final = 1 << 24  # bytes that the reader of a stream buffers
_CLOSED: Final = "the connection was closed at the other end"
_END: Final = b"\r\n\r\n"  # of a head
_LENGTH: Final = b"\r\ncontent-length: "

encode: Final = msgspec.json.Encoder().encode
decode: Final = msgspec.json.Decoder().decode


class Refused(Exception):
    """The daemon said no."""


class Asking(asyncio.Protocol):
    """One connection, one request at a time; who knows where an answer ends calls `_answer`.

    asyncio's streams would take half as long again for each, and where every connection waits for an answer the daemon
    has nothing to do meanwhile.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._answered: asyncio.Future[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its type

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(exc or ConnectionResetError(_CLOSED))

    def ask(self, request: bytes) -> Awaitable[bytes]:
        """Send `request`; its answer. Raises ConnectionError."""
        if self._transport.is_closing():
            raise ConnectionResetError(_CLOSED)
        self._answered = self._loop.create_future()
        self._transport.write(request)
        return self._answered

    def close(self) -> None:
        self._transport.close()

    def _answer(self, answer: bytes) -> None:
        assert self._answered is not None
        if not self._answered.done():  # whoever asked may have been cancelled
            self._answered.set_result(answer)


class Wire(Asking):
    """One keep-alive connection of HTTP."""

    def __init__(self, token: str | None = None) -> None:
        super().__init__()
        self._own = f"Host: x\r\nAuthorization: Bearer {token}\r\n" if token else "Host: x\r\n"
        self._head = b""  # of the answer, as far as it has come
        self._left: int | None = None  # bytes of its body that are still to come, once its head is there
        self._body: list[bytes] = []
        self._keeps = True

    @classmethod
    async def open(cls, path: str, token: str | None = None) -> Wire:
        _, wire = await asyncio.get_running_loop().create_unix_connection(partial(cls, token), path)
        return wire

    def data_received(self, data: bytes) -> None:
        if self._left is None:
            self._head, end, data = (self._head + data).partition(_END)
            if not end:
                return
            self._left = int(self._head.lower().partition(_LENGTH)[2].partition(b"\r")[0])
            self._head = b""
        self._left -= len(data)
        if self._keeps:
            self._body.append(data)
        if self._left <= 0:
            self._left = None
            body, self._body = b"".join(self._body), []
            self._answer(body)

    async def post(self, path: str, body: bytes, *, may_fail: bool = False) -> Any:
        """The `data` of the answer; where it may fail, None for a refusal."""
        return self._data(await self._post(path, "application/json", body), may_fail)

    async def lines(self, path: str, lines: bytes) -> Any:
        """A stream that is there as a whole."""
        return self._data(await self._post(path, "application/x-ndjson", lines), False)

    async def get(self, path: str) -> Any:
        return self._data(await self.ask(f"GET {path} HTTP/1.1\r\n{self._own}\r\n".encode()), False)

    async def drop(self, path: str) -> None:
        """Read an answer of whatever size to its end and keep nothing of it."""
        self._keeps = False
        try:
            await self.ask(f"GET {path} HTTP/1.1\r\n{self._own}\r\n".encode())
        finally:
            self._keeps = True

    def _post(self, path: str, kind: str, body: bytes) -> Awaitable[bytes]:
        head = f"POST {path} HTTP/1.1\r\n{self._own}Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        return self.ask(head.encode() + body)

    def _data(self, body: bytes, may_fail: bool) -> Any:
        if not body.startswith(b'{"'):
            return body  # text
        answer = decode(body)
        if answer["success"]:
            return answer["data"]
        if may_fail:
            return None
        raise Refused(f"{answer['error']}: {answer['message']}")


class Flow:
    """One stream of commands: lines out, answers back in their order."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._lines: deque[bytes] = deque()
        self._rest = b""

    @classmethod
    async def open(cls, path: str) -> Flow:
        reader, writer = await asyncio.open_unix_connection(path, limit=_LIMIT)
        writer.write(
            b"POST /v1/commands HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-ndjson\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200 "):
            raise Refused(head.decode("latin-1").partition("\r\n")[0])
        return cls(reader, writer)

    def send(self, lines: bytes) -> None:
        """Whole lines with their ends."""
        self._writer.write(b"%x\r\n%b\r\n" % (len(lines), lines))

    async def answers(self) -> list[Any]:
        """The next answers, as many as have come."""
        while not self._lines:
            size = int(await self._reader.readuntil(b"\r\n"), 16)
            piece = await self._reader.readexactly(size + 2)
            *lines, self._rest = (self._rest + piece[:-2]).split(b"\n")
            self._lines.extend(lines)
        found = [decode(line) for line in self._lines]
        self._lines.clear()
        for answer in found:
            if not answer["success"]:
                raise Refused(f"{answer['error']}: {answer['message']}")
        return found

    def close(self) -> None:
        self._writer.write(b"0\r\n\r\n")
        self._writer.close()
