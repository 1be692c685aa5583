"""Notice a client that stops reading its response. A client that reads slowly has all the time it needs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Final

from jobd.engine.unread_responses import UnreadResponses
from jobd.http.hangup import unacknowledged_bytes

WRITE_TIMEOUT_S: Final = 75.0  # without progress, for the client to read some of a response
CHECKS: Final = 15  # per timeout
TLS_PIECE_BYTES: Final = 64 << 10


class ReadDeadline:
    """Call `on_stall` once the client has read nothing for WRITE_TIMEOUT_S, unless it is cancelled before.

    Until then, `responses` counts the response as unread, with its `size`.
    """

    __slots__ = ("_loop", "_on_stall", "_responses", "_since", "_size", "_timer", "_transport", "_unread")

    def __init__(
        self, transport: asyncio.Transport, on_stall: Callable[[], None], responses: UnreadResponses, size: int
    ) -> None:
        responses.add(size)
        self._responses = responses
        self._size = size
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._on_stall = on_stall
        self._unread = unread_bytes(transport)
        self._since = self._loop.time()
        self._timer = self._loop.call_later(WRITE_TIMEOUT_S / CHECKS, self._check)

    def cancel(self) -> None:
        self._timer.cancel()
        self._responses.remove(self._size)

    def extend(self) -> None:
        """Start anew, because the client has read a piece."""
        self._since = self._loop.time()

    def _check(self) -> None:
        now, unread = self._loop.time(), unread_bytes(self._transport)
        if unread != self._unread:
            self._unread, self._since = unread, now
        if now - self._since >= WRITE_TIMEOUT_S:
            self._on_stall()
        else:
            self._timer = self._loop.call_later(WRITE_TIMEOUT_S / CHECKS, self._check)


@asynccontextmanager
async def read_deadline(
    transport: asyncio.Transport | None, responses: UnreadResponses | None = None, size: int = 0
) -> AsyncIterator[Callable[[], None]]:
    """Raise TimeoutError in the block once the client has read nothing for WRITE_TIMEOUT_S, or since the last call."""
    if transport is None:  # the block raises ConnectionError
        yield lambda: None
        return
    async with asyncio.timeout(None) as limit:
        deadline = ReadDeadline(transport, lambda: limit.reschedule(0), responses or UnreadResponses(), size)
        try:
            yield deadline.extend
        finally:
            deadline.cancel()


def pieces(transport: asyncio.Transport, data: bytes) -> Iterator[bytes | memoryview]:
    """Return the parts of a response to write one by one, each once the transport does not pause.

    A TLS transport passes all that it has to the TCP transport at once, and no longer says that it is unsent.
    """
    if len(data) <= TLS_PIECE_BYTES or transport.get_extra_info("sslcontext") is None:
        return iter((data,))
    view = memoryview(data)
    return (view[begin : begin + TLS_PIECE_BYTES] for begin in range(0, len(data), TLS_PIECE_BYTES))


def unread_bytes(transport: asyncio.Transport) -> int:
    """Return the bytes that the client's system has not acknowledged: those in the transport and in the socket."""
    return transport.get_write_buffer_size() + unacknowledged_bytes(transport)


def slow_client() -> str:
    """Return why a response is cut off, for the log."""
    return f"the client read nothing for {WRITE_TIMEOUT_S:g} s"
