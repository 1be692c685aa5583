"""Notice a client that stops reading its response. A client that reads slowly has all the time it needs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from jobd.http.hangup import unacknowledged_bytes

WRITE_TIMEOUT_S: Final = 75.0  # without progress, for the client to read some of a response
CHECKS: Final = 15  # per timeout


class ReadDeadline:
    """Call `on_stall` once the client has read nothing for WRITE_TIMEOUT_S, unless it is cancelled before."""

    __slots__ = ("_loop", "_on_stall", "_since", "_timer", "_transport", "_unread")

    def __init__(self, transport: asyncio.Transport, on_stall: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._on_stall = on_stall
        self._unread = unread_bytes(transport)
        self._since = self._loop.time()
        self._timer = self._loop.call_later(WRITE_TIMEOUT_S / CHECKS, self._check)

    def cancel(self) -> None:
        self._timer.cancel()

    def _check(self) -> None:
        now, unread = self._loop.time(), unread_bytes(self._transport)
        if unread != self._unread:
            self._unread, self._since = unread, now
        if now - self._since >= WRITE_TIMEOUT_S:
            self._on_stall()
        else:
            self._timer = self._loop.call_later(WRITE_TIMEOUT_S / CHECKS, self._check)


@asynccontextmanager
async def read_deadline(transport: asyncio.Transport | None) -> AsyncIterator[None]:
    """Raise TimeoutError in the block once the client has read nothing for WRITE_TIMEOUT_S."""
    if transport is None:  # the block raises ConnectionError
        yield
        return
    async with asyncio.timeout(None) as limit:
        deadline = ReadDeadline(transport, lambda: limit.reschedule(0))
        try:
            yield
        finally:
            deadline.cancel()


def unread_bytes(transport: asyncio.Transport) -> int:
    """Return the bytes that the client's system has not acknowledged: those in the transport and in the socket."""
    return transport.get_write_buffer_size() + unacknowledged_bytes(transport)


def slow_client() -> str:
    """Return why a response is cut off, for the log."""
    return f"the client read nothing for {WRITE_TIMEOUT_S:g} s"
