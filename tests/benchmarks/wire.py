"""A connection that sends a stream of commands."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, Final

from jobd.cli.daemon.bench_load import RequestFailed, decode

_LIMIT: Final = 1 << 24  # bytes that the reader of a stream buffers


class BenchmarkStream:
    """One command stream: lines go out, responses come back in order."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._lines: deque[bytes] = deque()
        self._rest = b""

    @classmethod
    async def open(cls, path: str) -> BenchmarkStream:
        reader, writer = await asyncio.open_unix_connection(path, limit=_LIMIT)
        writer.write(
            b"POST /v1/commands HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-ndjson\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200 "):
            raise RequestFailed(head.decode("latin-1").partition("\r\n")[0])
        return cls(reader, writer)

    def send(self, lines: bytes) -> None:
        """Send complete lines."""
        self._writer.write(b"%x\r\n%b\r\n" % (len(lines), lines))

    async def responses(self) -> list[Any]:
        """Return the responses that have arrived, at least one."""
        while not self._lines:
            size = int(await self._reader.readuntil(b"\r\n"), 16)
            piece = await self._reader.readexactly(size + 2)
            *lines, self._rest = (self._rest + piece[:-2]).split(b"\n")
            self._lines.extend(lines)
        found = [decode(line) for line in self._lines]
        self._lines.clear()
        for response in found:
            if not response["success"]:
                raise RequestFailed(f"{response['error']}: {response['message']}")
        return found

    def close(self) -> None:
        self._writer.write(b"0\r\n\r\n")
        self._writer.close()
