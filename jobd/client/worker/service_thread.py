"""An event loop in a separate thread. It extends locks, so a handler that blocks its own loop loses none."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Final

from jobd.client.worker.aio_utils import call_on, settle

LOG_S: Final = 1.0  # at the end, for a log that is not read
Log = Callable[[str], None]


class ServiceThread:
    """Run one coroutine on a separate event loop in a separate thread.

    It is a daemon thread, which ends with the process. Otherwise it could extend the locks of work that has ended.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop: Final = asyncio.new_event_loop()
        self._messages: Final[queue.SimpleQueue[tuple[Log, str] | None]] = queue.SimpleQueue()
        self._logging: threading.Thread | None = None

    def background(self, log: Log) -> Log:
        """Return a function that calls `log` in another thread, because writing a log may block. Logs share the thread.

        It is a daemon thread too. The end of `run` waits for it for at most LOG_S, and the messages that are left are
        dropped. Errors of `log` are ignored.
        """
        if self._logging is None:
            name = f"{self._name}: messages"
            self._logging = threading.Thread(target=_log_all, args=(self._messages,), name=name, daemon=True)
            self._logging.start()
        return lambda text: self._messages.put((log, text))

    def call(self, function: Callable[..., object]) -> None:
        """Schedule `function` on this loop. Thread-safe. Does nothing after `run` has ended."""
        call_on(self._loop, function)

    async def run(self, work: Callable[[], Coroutine[Any, Any, None]], stop: Callable[[], object]) -> None:
        """Run `work` in the thread until it ends. If the caller is cancelled, call `stop` there and wait."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        threading.Thread(target=self._run, args=(work, done), name=self._name, daemon=True).start()
        try:
            await asyncio.shield(done)
        except asyncio.CancelledError:
            self.call(stop)
            await asyncio.wait([done])
            if done.exception() is None:
                raise
            done.result()

    def _run(self, work: Callable[[], Coroutine[Any, Any, None]], done: asyncio.Future[None]) -> None:
        error: BaseException | None = None
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(work())
        except BaseException as raised:  # `run` raises it in the caller's thread
            error = raised
        if self._logging is not None:
            self._messages.put(None)
            self._logging.join(LOG_S)
        call_on(done.get_loop(), settle, done, None, error)


def _log_all(messages: queue.SimpleQueue[tuple[Log, str] | None]) -> None:
    while (message := messages.get()) is not None:
        log, text = message
        with contextlib.suppress(Exception):  # a log that is full or closed must not end the work
            log(text)
