"""An event loop in virtual time: time advances only when no callback is ready, and the order of callbacks is random.

It uses no sockets, threads or signals.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import Context, ContextVar, copy_context
from random import Random
from typing import Any, Final, TypeVarTuple

Ts = TypeVarTuple("Ts")

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


class SimHandle(asyncio.TimerHandle):
    """A callback of a SimLoop, without the support of asyncio for debugging."""

    __slots__ = ("args", "call", "context", "is_cancelled", "loop", "when_s")

    def __init__(self, loop: SimLoop, call: Callable[..., Any], args: tuple[Any, ...], context: Context) -> None:
        self.loop = loop
        self.call = call
        self.args = args
        self.context = context
        self.when_s: float | None = None  # of a timer
        self.is_cancelled = False

    def cancel(self) -> None:
        if not self.is_cancelled:
            self.is_cancelled = True
            self.args = ()

    def cancelled(self) -> bool:
        return self.is_cancelled

    def when(self) -> float:
        return self.loop.now_s if self.when_s is None else self.when_s


class SimLoop(asyncio.BaseEventLoop):
    """`now_s` is the loop's time. Callbacks that are ready together run in random order."""

    def __init__(self, dice: Random) -> None:
        super().__init__()
        self.now_s = 1_000.0
        self.on_error: Callable[[str], None] = lambda message: None
        self._is_stopping = False
        self._turns = 0  # since time advanced last
        self._dice = dice
        self._ready: list[SimHandle] = []
        self._timers: list[tuple[float, int, SimHandle]] = []  # a heap; equal times are in the order of the calls
        self._timers_made = 0
        self._held: dict[object, list[SimHandle]] = {}  # callbacks of suspended processes that are ready
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
        self._ready += self._held.pop(which, ())

    def _hold_suspended(self) -> None:
        """Keep the ready callbacks of suspended processes for later."""
        ready, self._ready = self._ready, []
        for handle in ready:
            self._held.get(handle.context.get(process), self._ready).append(handle)

    def _failed(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        about = context.get("exception") or context.get("task") or context.get("future")
        self.on_error(f"{context.get('message')}: {about!r}")

    # -- asyncio.AbstractEventLoop

    def call_soon(self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None) -> SimHandle:
        handle = SimHandle(self, callback, args, copy_context() if context is None else context)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> SimHandle:
        handle = SimHandle(self, callback, args, copy_context() if context is None else context)
        handle.when_s = when
        self._timers_made += 1
        heapq.heappush(self._timers, (when, self._timers_made, handle))
        return handle

    def call_later(
        self, delay: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> SimHandle:
        handle = SimHandle(self, callback, args, copy_context() if context is None else context)
        handle.when_s = self.now_s + delay
        self._timers_made += 1
        heapq.heappush(self._timers, (handle.when_s, self._timers_made, handle))
        return handle

    def stop(self) -> None:
        super().stop()
        self._is_stopping = True

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:  # noqa: ASYNC109 - as in asyncio
        """Do nothing: the executor has no threads. asyncio would start one, for which this loop does not wait."""

    # -- asyncio.BaseEventLoop

    def _run_once(self) -> None:
        """Run until `stop`: in each turn all callbacks that are ready, in random order."""
        self._is_stopping = False
        shuffle = self._dice.shuffle
        while not self._is_stopping:
            self._advance()
            if self._held:
                self._hold_suspended()
            ready, self._ready = self._ready, []
            if len(ready) > 1:
                shuffle(ready)
            for handle in ready:
                if handle.is_cancelled:
                    continue
                try:
                    handle.context.run(handle.call, *handle.args)
                except Exception as error:
                    self.call_exception_handler({"message": f"{handle.call!r} failed", "exception": error})

    def _advance(self) -> None:
        """Make the timers ready that are due. If no callback is ready, time jumps to the next timer."""
        timers, ready = self._timers, self._ready
        while timers and timers[0][2].is_cancelled:
            heapq.heappop(timers)
        if ready:
            self._turns += 1
        elif timers:
            due_s = timers[0][0]
            self._turns = self._turns + 1 if self.now_s >= due_s else 0
            self.now_s = max(self.now_s, due_s)
        else:
            raise RuntimeError("everybody waits for something that will never happen")
        if self._turns == BUSY:
            self.on_error(f"busy loop: no task waits, {BUSY} turns of the loop at one time")
        while timers and timers[0][0] <= self.now_s:
            handle = heapq.heappop(timers)[2]
            if not handle.is_cancelled:
                ready.append(handle)
