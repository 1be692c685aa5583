"""Find out from the system whether the client of a half-closed connection is still connected."""

from __future__ import annotations

import fcntl
import select
import struct
import termios
from asyncio import BaseTransport


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
