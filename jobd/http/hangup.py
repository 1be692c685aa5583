"""Find out from the system whether the client of a half-closed connection is still connected."""

from __future__ import annotations

import fcntl
import select
import struct
import termios
from asyncio import BaseTransport, Transport, get_running_loop
from typing import Final

# Delay between two checks of whether the client has closed a half-closed connection. It doubles up to CHECK_S.
FIRST_CHECK_S: Final = 0.01
CHECK_S: Final = 1.0


class HangupCheck:
    """Abort a connection once its client has closed it. asyncio does not watch a connection after its end of file."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._loop = get_running_loop()
        self._timer = self._loop.call_later(FIRST_CHECK_S, self._check, FIRST_CHECK_S)

    def cancel(self) -> None:
        self._timer.cancel()

    def _check(self, delay_s: float) -> None:
        if self._transport.is_closing():
            return
        if is_hung_up(self._transport):
            self._transport.abort()
        else:
            delay_s = min(2 * delay_s, CHECK_S)
            self._timer = self._loop.call_later(delay_s, self._check, delay_s)


def is_hung_up(transport: BaseTransport) -> bool:
    """Return whether the client has closed its Unix socket, or reset the TCP connection."""
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), 0)
    return bool(poll.poll(0))


def unacknowledged_bytes(transport: BaseTransport) -> int:
    """Return how many of the bytes sent the client's system has not acknowledged; none on a closed socket."""
    descriptor = transport.get_extra_info("socket").fileno()
    if descriptor < 0:
        return 0
    count: int = struct.unpack("i", fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4)))[0]
    return count


def is_probing(transport: Transport) -> bool:
    """Return whether the client's system has neither acknowledged all sent bytes nor reset the connection."""
    return not transport.is_closing() and not is_hung_up(transport) and unacknowledged_bytes(transport) > 0
