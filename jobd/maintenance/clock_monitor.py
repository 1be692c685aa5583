"""Detect that the daemon did not run for a while, and that the wall clock was set back or ahead.

A daemon does not run while its process is stopped, or its machine suspended or overloaded. All three are reported
before the next command is decided.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from jobd.engine.clock import boot_clock_ms
from jobd.maintenance.stoppable_loop import StoppableLoop
from jobd.model.clocks import BootMs, LockMs
from jobd.model.commands import Moment
from jobd.model.job import SECOND_MS

CHECK_EVERY_S: Final = 1.0
PAUSED_AFTER_MS: Final = 3_000  # a slow disk does not stop the event loop for this long
SET_BACK_MS: Final = SECOND_MS  # smaller steps are not reported
SET_AHEAD_MS: Final = 10 * SECOND_MS  # the same; no decision depends on these steps


class ClockMonitor(StoppableLoop):
    """Report pauses and steps of the wall clock.

    `on_pause` gets the ms of the pause and the lock time at which it began; `on_set_back` the ms of the step and the
    wall time that it would be now without the step, as far as the clock was trusted; `on_set_ahead` the ms of a step
    after which the clock is still trusted. `run` checks every second until `stop`. The actor also calls `check` before
    it decides commands.
    """

    def __init__(
        self,
        on_pause: Callable[[int, LockMs], None],
        on_set_back: Callable[[int, int], None],
        moment: Callable[[], Moment],
        *,
        boot: Callable[[], BootMs] = boot_clock_ms,
        on_set_ahead: Callable[[int], None] = lambda ahead_ms: None,
    ) -> None:
        super().__init__()
        self._on_pause = on_pause
        self._on_set_back = on_set_back
        self._on_set_ahead = on_set_ahead
        self._moment = moment
        self._boot = boot
        self._boot_seen = boot()
        self._seen = moment()

    def check(self) -> None:
        boot, at, seen = self._boot(), self._moment(), self._seen
        pause_ms, back_ms = boot - self._boot_seen, seen.offset - at.offset
        ahead_ms = at.now - seen.now - pause_ms  # not by lock time, which a full disk holds
        self._boot_seen, self._seen = boot, at
        if pause_ms > PAUSED_AFTER_MS:
            self._on_pause(pause_ms, seen.lock_ms)
        if back_ms >= SET_BACK_MS:
            self._on_set_back(back_ms, seen.believed + (at.lock_ms - seen.lock_ms))
        if ahead_ms >= SET_AHEAD_MS and not at.suspect:
            self._on_set_ahead(ahead_ms)

    async def run(self) -> None:
        while not self._stopping:
            self.check()
            await self._pause(CHECK_EVERY_S)
