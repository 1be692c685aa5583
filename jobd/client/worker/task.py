"""The argument of a handler, and the exceptions that it can raise."""

from __future__ import annotations

import asyncio
import functools
import threading
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, Final

from jobd.client.worker.lock_keeper import LOST, LockKeeper
from jobd.model.job import SECOND_MS, YEAR_MS
from jobd.model.responses import JobView


class Retry(Exception):
    """Raised by a handler to fail this attempt and retry after `after_ms` (by default the job's backoff).

    Raises TypeError if `after_ms` is not a whole number.
    """

    after_ms: int | None = None  # of a subclass that does not call `__init__`

    def __init__(self, message: str = "The handler asked for a retry.", *, after_ms: int | None = None) -> None:
        if not isinstance(after_ms, int | None):
            raise TypeError(f"after_ms must be a whole number of milliseconds, not {type(after_ms).__name__}")
        super().__init__(message)
        self.after_ms = after_ms


class Discard(Exception):
    """Raised by a handler to fail the job without further attempts."""

    def __init__(self, message: str = "The handler discarded the job.") -> None:
        super().__init__(message)


class Snooze(Exception):
    """Raised by a handler to put its job back for `after` (a timedelta, or seconds), at least 1 s. It is no failure.

    The attempt does not count. Raises ValueError unless `after` is from 0 to 365 days.
    """

    after_ms: int | None = None  # of a subclass that does not call `__init__`

    def __init__(self, after: timedelta | float, message: str = "The handler snoozed the job.") -> None:
        after_s = after.total_seconds() if isinstance(after, timedelta) else after
        if not 0 <= after_s * 1000 <= YEAR_MS:
            raise ValueError(f"after must be from 0 to 365 days, not {after_s} s")
        super().__init__(message)
        self.after_ms = max(
            round(after_s * 1000), SECOND_MS
        )  # otherwise, a job could be claimed again at once for ever


class Stopped(Exception):
    """Raised in a plain handler that has to return, because the worker stops or the timeout has passed."""


class BaseTask:
    """The job and its result, for both kinds of handler."""

    def __init__(self, keeper: LockKeeper) -> None:
        self._keeper = keeper
        self._service = asyncio.get_running_loop()
        self.job: Final[JobView] = keeper.grant.job
        self.fencing_token: Final = keeper.grant.fencing_token
        self.result: Final[dict[str, Any]] = {}

    @functools.cached_property
    def payload(self) -> Any:
        """The payload as Python values. Raises msgspec.DecodeError for a value that Python cannot hold (1e999)."""
        return self.job.payload_value

    def set_result(
        self,
        *,
        download_url: str | None = None,
        file_path: str | None = None,
        storage_key: str | None = None,
        metadata: Any = None,
    ) -> None:
        """Set fields of the job's result. Fields that are not given do not change."""
        named = {"download_url": download_url, "file_path": file_path, "storage_key": storage_key, "metadata": metadata}
        self.result.update({name: value for name, value in named.items() if value is not None})

    def raise_if_lost(self) -> None:
        """Raise LockLost (or ProgressTimeout) if the lock is lost."""
        if self._keeper.lost.done():
            raise self._keeper.lost.result()

    def _report(self, progress: float, message: str | None) -> Future[None]:
        """Report progress in the service thread."""
        request = self._keeper.progress_request(progress, message)
        reported: Future[None] = Future()

        def report() -> None:
            self._keeper.send_report(request).add_done_callback(functools.partial(_copy, reported))

        try:
            self._service.call_soon_threadsafe(report)
        except RuntimeError:
            raise Stopped("The worker has stopped.") from None
        return reported


def _copy(target: Future[None], source: asyncio.Future[None]) -> None:
    if not target.set_running_or_notify_cancel():
        return
    if (error := source.exception()) is None:
        target.set_result(None)
    else:
        target.set_exception(error)


class Task(BaseTask):
    """The job of an async handler.

    `payload` is decoded. Pass `fencing_token` to resources that check it. If the lock is lost or the job is cancelled,
    `cancelled` is set, and the handler is cancelled (CancelledError), unless `progress` has raised LockLost in it.
    """

    def __init__(self, keeper: LockKeeper) -> None:
        super().__init__(keeper)
        self.cancelled: Final = asyncio.Event()
        self.lost_raised_in: asyncio.Task[Any] | None = None  # the task in which a call raised that the lock is lost

    async def progress(self, progress: float, message: str | None = None) -> None:
        """Report progress (0 to 100), which renews the lock. Returns at once while the daemon is unreachable.

        Raises LockLost, ProgressTimeout, InvalidRequest.
        """
        try:
            await asyncio.wrap_future(self._report(progress, message))
        except LOST:
            self.lost_raised_in = asyncio.current_task()
            raise

    def raise_if_lost(self) -> None:
        if self._keeper.lost.done():
            self.lost_raised_in = asyncio.current_task()
        super().raise_if_lost()


class SyncTask(BaseTask):
    """The job of a plain handler, which has its own thread.

    Like Task, but a thread cannot be cancelled: report progress, check `cancelled` (a threading.Event) or call
    `raise_if_lost` often, and end soon if the lock is lost, the worker stops, or the timeout has passed. Raise Stopped
    if the work is not finished: a normal return completes the job.
    """

    def __init__(self, keeper: LockKeeper) -> None:
        super().__init__(keeper)
        self.cancelled: Final = threading.Event()

    def progress(self, progress: float, message: str | None = None) -> None:
        """Report progress (0 to 100), which renews the lock. Returns at once while the daemon is unreachable.

        Raises LockLost, ProgressTimeout, InvalidRequest, and Stopped if the handler has to return.
        """
        self.raise_if_lost()
        self._report(progress, message).result()

    def raise_if_lost(self) -> None:
        """Raise LockLost (or ProgressTimeout) if the lock is lost, Stopped if the handler has to return."""
        super().raise_if_lost()
        if self.cancelled.is_set():
            raise Stopped("The handler has to return: the worker is stopping, or the timeout has passed.")
