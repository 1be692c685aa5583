"""Notices that the daemon was away while it ran: its process stopped, its machine suspended or starved.

Says so before the next command is decided, and how long it was. What follows from that is decided elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from jobd.engine.clock import boot_clock_ms

BEAT_S: Final = 1.0
PAUSED_AFTER_MS: Final = (
    3_000  # a loop that has not turned for so long was away; a slow disk does not keep it from turning
)


class SuspendDetector:
    """`run` beats until `stop`; `look` is called before commands are decided. Whichever comes first calls `was_away`.

    `was_away` is given the milliseconds since it was last known to be there.
    """

    def __init__(self, was_away: Callable[[int], None], *, boot: Callable[[], int] = boot_clock_ms) -> None:
        self._on_pause = was_away
        self._boot = boot
        self._seen = boot()
        self._wake = asyncio.Event()
        self._stopping = False

    def check(self) -> None:
        now = self._boot()
        away_ms, self._seen = now - self._seen, now
        if away_ms > PAUSED_AFTER_MS:
            self._on_pause(away_ms)

    async def run(self) -> None:
        while not self._stopping:
            self.check()
            timer = asyncio.get_running_loop().call_later(BEAT_S, self._wake.set)
            await self._wake.wait()
            timer.cancel()
            self._wake.clear()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()
