"""Detect that the daemon did not run for a while: its process was stopped, or the machine suspended or overloaded.

A pause is reported before the next command is decided.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from jobd.engine.clock import boot_clock_ms

CHECK_EVERY_S: Final = 1.0
PAUSED_AFTER_MS: Final = 3_000  # a slow disk does not stop the event loop for this long


class SuspendDetector:
    """Report pauses to `on_pause`, in ms since the last check.

    `run` checks every second until `stop`. The actor also calls `check` before it decides commands.
    """

    def __init__(self, on_pause: Callable[[int], None], *, boot: Callable[[], int] = boot_clock_ms) -> None:
        self._on_pause = on_pause
        self._boot = boot
        self._seen = boot()
        self._wake = asyncio.Event()
        self._stopping = False

    def check(self) -> None:
        now = self._boot()
        paused_ms, self._seen = now - self._seen, now
        if paused_ms > PAUSED_AFTER_MS:
            self._on_pause(paused_ms)

    async def run(self) -> None:
        while not self._stopping:
            self.check()
            timer = asyncio.get_running_loop().call_later(CHECK_EVERY_S, self._wake.set)
            await self._wake.wait()
            timer.cancel()
            self._wake.clear()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()
