"""Find out from the system whether the client of a half-closed connection is still connected.

`eof_received` (worker_connection.py) means that the client sends no more. It may have half-closed the connection
(`shutdown`) and wait for its response, or be gone. A grant must not be given to a client that is gone.

    idle at the end of the input ──────────────────────────> close
    TLS, or a hang-up is seen ─────────────────────────────> close
    requests left ──> _is_half_closed ──┬ check for a hang-up after 10 ms, 20 ms … 1 s ──> abort
                      probe             ├ responses to the requests that have arrived ──> close
                                        └ a body that is incomplete ends: a 400 (truncated)

- TLS has no half-closed state, so the end of its input closes the connection.
- On a Unix socket, poll tells a client that has closed from one that is half-closed.
- On TCP it does so only after a write: the system of a client that is gone answers with a reset. So the first bytes of
  the response that are known already are sent as a probe: of a command the version of HTTP, in a chunked body that has
  begun a leading zero of the size of the next chunk, and otherwise nothing. `_ahead` has the number of bytes of the
  current response that were sent so, which `_write` omits.
- A response with grants then waits until all sent bytes are acknowledged, for at most PROBE_S, else the connection is
  aborted and the grants go back. An acknowledgement after the end of the input shows that the client's system still
  has the connection; it does not show that the program reads.
- asyncio does not watch a connection after its end of input, hence the checks by a timer.
- While a connection is half-closed, reading is not paused or resumed, because no more input comes.
"""

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
