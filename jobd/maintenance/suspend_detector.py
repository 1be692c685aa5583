"""Detect that the daemon was paused: its process was stopped, or the machine was suspended or starved.

The pause is reported before the next command is decided.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from jobd.engine.clock import boot_clock_ms

BEAT_S: Final = 1.0
PAUSED_AFTER_MS: Final = 3_000  # an event loop that did not run for this long was paused; a slow disk does not stop it


class SuspendDetector:
    """Report pauses to `on_pause`, in ms since the daemon was last seen running.

    `run` checks periodically until `stop`; `check` is called before commands are decided.
    """

    def __init__(self, on_pause: Callable[[int], None], *, boot: Callable[[], int] = boot_clock_ms) -> None:
        self._on_pause = on_pause
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
