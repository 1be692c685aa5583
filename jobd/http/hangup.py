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


def has_unacknowledged_bytes(transport: BaseTransport) -> bool:
    """Return whether the client's system has not acknowledged all bytes that were sent."""
    count = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    return bool(struct.unpack("i", count)[0])
