"""Send the output of a running job on the event loop of its lock keeper, at most SEND_BYTES once a second."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Final

from jobd.client.errors import JobdError
from jobd.client.retries import RETRIED
from jobd.client.worker.aio_utils import call_on, within
from jobd.client.worker.service_thread import Log

SEND_BYTES: Final = 16 << 10  # the limit of the daemon
FIRST_S: Final = 0.2  # between the first text and its request, so that a short job sends one
EVERY_S: Final = 1.0
FLUSH_S: Final = 1.0  # how long the end of a job waits for its last output, at most
_NOTICE_BYTES: Final = 64
# After these errors the text is sent again with the next request.
_KEPT: Final = RETRIED | {"too_frequent"}
# After these errors, no later request of the grant succeeds. A daemon of an older version does not have the path.
_OFF: Final = {"output_off", "not_found", "method_not_allowed", "lock_lost", "progress_timeout", "job_not_found"}


class JobOutput:
    """The output of one grant. `add` is thread-safe and does not wait; `end` is called on the loop.

    Of text that is added faster than it can be sent, the end is kept. An error drops text at most.
    """

    def __init__(self, job_id: str, send: Callable[[str], Awaitable[object]], log: Log) -> None:
        self._job_id = job_id
        self._send = send
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._guard = threading.Lock()  # of the text
        self._text = bytearray()
        self._left_out = 0  # bytes before the text that were not sent
        self._is_off = False
        self._has_text = False
        self._has_warned = False
        self._ending = asyncio.Event()
        self._sending: asyncio.Task[None] | None = None

    def add(self, text: str) -> None:
        data = text.encode(errors="replace")
        with self._guard:
            if self._is_off or not data:
                return
            self._text += data
            if len(self._text) > 2 * SEND_BYTES:
                self._cut(SEND_BYTES)
            is_first, self._has_text = not self._has_text, True
        if is_first:
            call_on(self._loop, self._begin)

    async def end(self, *, flush: bool) -> None:
        """End the output. With `flush`, try once to send the rest, for FLUSH_S at most."""
        if not flush:
            self._turn_off()
        self._ending.set()
        if self._has_text:
            self._begin()
        if self._sending is not None:
            await asyncio.wait([self._sending], timeout=FLUSH_S)
            self._sending.cancel()
        self._turn_off()

    def _begin(self) -> None:
        if self._sending is None and not self._is_off:
            self._sending = asyncio.create_task(self._send_all())

    async def _send_all(self) -> None:
        await within(FIRST_S, self._ending)
        while not self._is_off:
            is_last = self._ending.is_set()
            await self._send_once()
            if is_last:
                return
            await within(EVERY_S, self._ending)

    async def _send_once(self) -> None:
        with self._guard:
            if self._left_out or len(self._text) > SEND_BYTES:
                self._cut(SEND_BYTES - _NOTICE_BYTES)
            data, left_out = bytes(self._text), self._left_out
            self._text.clear()
            self._left_out = 0
        if not data:
            return
        notice = f"… {left_out} bytes left out\n" if left_out else ""
        try:
            await self._send(notice + data.decode())
        except JobdError as error:
            if error.code in _OFF:
                self._turn_off()
                return
            if error.code in _KEPT:
                self._put_back(data, left_out)
            if error.code != "too_frequent" and not self._has_warned:
                self._has_warned = True
                self._log(f"job {self._job_id}: its output cannot be sent: {error.message} The work continues.")

    def _put_back(self, data: bytes, left_out: int) -> None:
        with self._guard:
            if self._left_out:  # of the text after `data`
                self._left_out += left_out + len(data)
            else:
                self._text[:0], self._left_out = data, left_out

    def _cut(self, keep: int) -> None:
        """Keep at most the last `keep` bytes, beginning with a whole character."""
        start = max(len(self._text) - keep, 0)
        while start < len(self._text) and self._text[start] & 0xC0 == 0x80:
            start += 1
        self._left_out += start
        del self._text[:start]

    def _turn_off(self) -> None:
        with self._guard:
            self._is_off = True
            self._text.clear()
