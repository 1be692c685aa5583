"""Read request bodies line by line, and write response bodies piece by piece."""

from __future__ import annotations

import asyncio

from jobd.http.decoding import Limits
from jobd.http.read_deadline import read_deadline
from jobd.http.request import BodyError, RequestContext
from jobd.model.errors import api_error

_LF = ord("\n")  # an integer, because a search for bytes of length 1 takes several times as long


class LineStream:
    """Iterate over the lines of a body, without line feeds. A line over `limits.body` bytes is None.

    With `idle_allowed`, any time may pass between two lines. Raises ApiException if a line does not arrive within its
    deadline (408), the framing is malformed (400), or the body ends too early (400, after its complete lines).
    """

    def __init__(self, ctx: RequestContext, limits: Limits, *, idle_allowed: bool = False) -> None:
        self._ctx = ctx
        self._limits = limits
        self._idle_allowed = idle_allowed
        self._buffer = bytearray()
        self._is_too_long = False
        self._is_last = False

    def __aiter__(self) -> LineStream:
        return self

    async def __anext__(self) -> bytes | None:
        if not self._has_line():
            await self._fill()
        if self._is_last and self._ctx.is_truncated:
            message = (
                "The stream ended too early. The bytes after the last line feed were ignored. Send that line again."
            )
            raise api_error("invalid_request", message)
        if self._is_last and not self._buffer and not self._is_too_long:
            raise StopAsyncIteration
        end = self._buffer.find(b"\n")
        line = bytes(self._buffer if end < 0 else self._buffer[:end])
        del self._buffer[: len(line) + 1]
        is_too_long = self._is_too_long or len(line) > self._limits.body
        self._is_too_long = False
        return None if is_too_long else line

    def _has_line(self) -> bool:
        return self._is_last or _LF in self._buffer

    async def _fill(self) -> None:
        try:
            if self._idle_allowed and not self._buffer:
                await self._read_piece()
            async with asyncio.timeout(self._limits.body_deadline_s):
                while not self._has_line():
                    if len(self._buffer) > self._limits.body:
                        self._is_too_long = True
                        self._buffer.clear()
                    await self._read_piece()
        except TimeoutError:
            message = f"No complete line arrived within {self._limits.body_deadline_s:g} s. Send it again."
            raise api_error("request_timeout", message) from None
        except BodyError:
            raise api_error("invalid_request", "The stream is malformed: its chunks or its length are wrong.") from None

    async def _read_piece(self) -> None:
        piece = await self._ctx.read()
        self._buffer += piece
        self._is_last = not piece


async def write(ctx: RequestContext, piece: bytes) -> None:
    """Send `piece`. Raises TimeoutError if the client does not read."""
    async with read_deadline(ctx.transport):
        await ctx.write(piece)


async def finish(ctx: RequestContext) -> None:
    """Send the end of the body. Raises TimeoutError if the client does not read."""
    async with read_deadline(ctx.transport):
        await ctx.finish()
