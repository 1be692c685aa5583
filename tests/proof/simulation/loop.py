"""An event loop in virtual time: time advances only when no callback is ready, and the order of callbacks is random.

It uses no sockets, threads or signals.
"""

from __future__ import annotations

import asyncio
import heapq
import selectors
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from random import Random
from typing import Any, Final

BUSY: Final = 50_000  # iterations without time passing

process: ContextVar[object] = ContextVar("process", default=None)  # to which a callback belongs


class InlineExecutor(ThreadPoolExecutor):
    """Runs the calls for threads at once, so that their order does not depend on chance."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done


class _NoWait(selectors.DefaultSelector):
    """A selector that never reports an event."""

    def select(self, timeout: float | None = None) -> Any:
        return []


class SimLoop(asyncio.SelectorEventLoop):
    """`now_s` is the loop's time. Callbacks that are ready together run in random order."""

    def __init__(self, dice: Random) -> None:
        self.now_s = 1_000.0
        self._turns = 0  # since time advanced last
        self.on_error: Callable[[str], None] = lambda message: None
        self._dice = dice
        self._held: dict[object, list[Any]] = {}  # callbacks of suspended processes that are ready
        super().__init__(_NoWait())
        self.set_exception_handler(self._failed)

    def time(self) -> float:
        return self.now_s

    def freeze(self, seconds: float) -> None:
        """Stop the process for a while. Timers that were due meanwhile all fire at its end."""
        self.now_s += seconds

    def suspend(self, which: object) -> None:
        """Run nothing of a process until `resume`."""
        self._held.setdefault(which, [])

    def resume(self, which: object) -> None:
        """Let a suspended process go on. Its timers that were due meanwhile fire now."""
        loop: Any = self
        loop._ready.extend(self._held.pop(which, ()))

    def _hold_suspended(self) -> None:
        """Keep the ready callbacks of suspended processes for later."""
        loop: Any = self
        ready = list(loop._ready)
        loop._ready.clear()
        for handle in ready:
            self._held.get(handle._context.get(process), loop._ready).append(handle)

    def _failed(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        about = context.get("exception") or context.get("task") or context.get("future")
        self.on_error(f"{context.get('message')}: {about!r}")

    def _run_once(self) -> None:
        """As asyncio's, except that time jumps to the next timer and the order is random."""
        loop: Any = self  # internals without a public name
        timers: list[Any] = loop._scheduled
        while timers and timers[0]._cancelled:
            self._take(timers)
        if not loop._ready:
            if not timers:
                raise RuntimeError("everybody waits for something that will never happen")
            self._turns = self._turns + 1 if self.now_s >= timers[0].when() else 0
            self.now_s = max(self.now_s, timers[0].when())
        else:
            self._turns += 1
        if self._turns == BUSY:
            self.on_error(f"busy loop: no task waits, {BUSY} turns of the loop at one time")
        while timers and timers[0].when() <= self.now_s:
            loop._ready.append(self._take(timers))
        if self._held:
            self._hold_suspended()
        if len(loop._ready) > 1:
            self._dice.shuffle(loop._ready)
        super()._run_once()  # type: ignore[misc]

    def _take(self, timers: list[Any]) -> Any:
        timer = heapq.heappop(timers)
        timer._scheduled = False
        if timer._cancelled:
            loop: Any = self
            loop._timer_cancelled_count -= 1
        return timer
