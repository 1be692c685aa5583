"""Connections for load: just enough HTTP over a Unix socket to be no limit. What is refused ends the run."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Final

import msgspec

_LIMIT: Final = 1 << 24  # bytes that a reader buffers
_PIECE: Final = 1 << 16

encode: Final = msgspec.json.Encoder().encode
decode: Final = msgspec.json.Decoder().decode


class Refused(Exception):
    """The daemon said no."""


class Wire:
    """One keep-alive connection, one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: str | None) -> None:
        self._reader = reader
        self._writer = writer
        self._own = f"Host: x\r\nAuthorization: Bearer {token}\r\n" if token else "Host: x\r\n"

    @classmethod
    async def open(cls, path: str, token: str | None = None, *, limit: int = _LIMIT) -> Wire:
        return cls(*await asyncio.open_unix_connection(path, limit=limit), token)

    async def post(self, path: str, body: bytes, *, may_fail: bool = False) -> Any:
        """The `data` of the answer; where it may fail, None for a refusal."""
        self._send(path, "application/json", body)
        return await self._answer(may_fail)

    async def lines(self, path: str, lines: bytes) -> Any:
        """A stream that is there as a whole."""
        self._send(path, "application/x-ndjson", lines)
        return await self._answer(False)

    async def get(self, path: str) -> Any:
        self._writer.write(f"GET {path} HTTP/1.1\r\n{self._own}\r\n".encode())
        return await self._answer(False)

    async def drop(self, path: str) -> None:
        """Read an answer of whatever size to its end, piece by piece, and keep nothing of it."""
        self._writer.write(f"GET {path} HTTP/1.1\r\n{self._own}\r\n".encode())
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        left = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
        while left:
            left -= len(await self._reader.read(min(left, _PIECE)))

    def _send(self, path: str, kind: str, body: bytes) -> None:
        head = f"POST {path} HTTP/1.1\r\n{self._own}Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)

    async def _answer(self, may_fail: bool) -> Any:
        head = await self._reader.readuntil(b"\r\n\r\n")
        body = await self._body(head.lower())
        if not body.startswith(b'{"'):
            return body  # text
        answer = decode(body)
        if answer["success"]:
            return answer["data"]
        if may_fail:
            return None
        raise Refused(f"{answer['error']}: {answer['message']}")

    async def _body(self, head: bytes) -> bytes:
        return await self._reader.readexactly(int(head.partition(b"content-length:")[2].partition(b"\r\n")[0]))

    def close(self) -> None:
        self._writer.close()


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
