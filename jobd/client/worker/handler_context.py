"""The argument of a handler."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from concurrent.futures import Future
from typing import Any, Final

from msgspec import UNSET

from jobd.client.api_request import ApiRequest
from jobd.client.errors import JobdError
from jobd.client.outcomes import Stopped
from jobd.client.worker.aio_utils import call_on
from jobd.client.worker.lock_keeper import LOST, LockKeeper
from jobd.model.responses import JobView, LockState

logger = logging.getLogger("jobd.client")


class BaseHandlerContext:
    """The job and its result, for both kinds of handler."""

    def __init__(self, keeper: LockKeeper) -> None:
        self._keeper = keeper
        self._service = asyncio.get_running_loop()
        self.job: Final[JobView] = keeper.grant.job
        self.fencing_token: Final = keeper.grant.fencing_token
        self.result: Final[dict[str, Any]] = {}
        self._guard = threading.Lock()  # of the latest report, which the service thread takes
        self._latest: tuple[float, str | None, Any] | None = None

    @functools.cached_property
    def checkpoint(self) -> Any:
        """The latest checkpoint of an earlier grant as Python values, None if there is none."""
        return self.job.checkpoint_value

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

    def log(self, text: str) -> None:
        """Add a line to the output of the job (see `jobctl output`), and log it to `jobd.client` at level info."""
        logger.info("job %s: %s", self.job.id, text)
        self.add_output(text)

    def add_output(self, text: str) -> None:
        """Add a line to the output of the job. Does not wait."""
        self._keeper.output.add(f"{text}\n")

    def raise_if_lost(self) -> None:
        """Raise LockLost (or ProgressTimeout) if the lock is lost."""
        if self._keeper.lost.done():
            raise self._keeper.lost.result()

    def report_latest(self, progress: float, message: str | None, checkpoint: Any = UNSET) -> None:
        """Report progress without waiting. Of several that are pending, the latest progress and checkpoint are sent."""
        with self._guard:
            pending = self._latest
            if pending is not None and checkpoint is UNSET:
                checkpoint = pending[2]
            self._latest = (progress, message, checkpoint)
        if pending is None:
            call_on(self._service, self._send_latest)

    def _send_latest(self) -> None:
        with self._guard:
            latest, self._latest = self._latest, None
        assert latest is not None
        try:
            self._keeper.report(*latest).add_done_callback(self._log_rejected)
        except (JobdError, TypeError) as error:
            logger.warning("job %s: its progress cannot be sent: %s", self.job.id, error)

    def _log_rejected(self, reported: asyncio.Future[None]) -> None:
        error = reported.exception()
        if error is not None and not isinstance(error, LOST):
            logger.warning("job %s: its progress was rejected: %s", self.job.id, error)

    def _report(self, progress: float, message: str | None, checkpoint: Any) -> Future[None]:
        """Report progress in the service thread."""
        sending = self._send(self._keeper.progress_request(progress, message, checkpoint))
        try:
            return asyncio.run_coroutine_threadsafe(sending, self._service)
        except RuntimeError:
            sending.close()
            raise Stopped("The worker has stopped.") from None

    async def _send(self, request: ApiRequest[LockState]) -> None:
        await asyncio.shield(self._keeper.send_report(request))  # other reports may wait for the same future


class AsyncHandlerContext(BaseHandlerContext):
    """The job of an async handler.

    `payload` is decoded. Pass `fencing_token` to resources that check it. If the lock is lost or the job is cancelled,
    `cancelled` is set, and the handler is cancelled (CancelledError), unless `progress` has raised LockLost in it.
    """

    def __init__(self, keeper: LockKeeper) -> None:
        super().__init__(keeper)
        self.cancelled: Final = asyncio.Event()
        self.lost_raised_in: asyncio.Task[Any] | None = None  # the task in which a call raised that the lock is lost

    async def progress(self, progress: float, message: str | None = None, *, checkpoint: Any = UNSET) -> None:
        """Report progress (0 to 100), which renews the lock. Returns at once while the daemon is unreachable.

        Every later grant of the job has the latest `checkpoint`, any JSON of up to 64 KiB; None removes it.
        Raises LockLost, ProgressTimeout, InvalidRequest.
        """
        try:
            await asyncio.wrap_future(self._report(progress, message, checkpoint))
        except LOST:
            self.lost_raised_in = asyncio.current_task()
            raise

    def raise_if_lost(self) -> None:
        if self._keeper.lost.done():
            self.lost_raised_in = asyncio.current_task()
        super().raise_if_lost()


class HandlerContext(BaseHandlerContext):
    """The job of a plain handler, which has its own thread.

    A thread cannot be cancelled: report progress, check `cancelled` (a threading.Event) or call `raise_if_lost` often,
    and end soon if the lock is lost, the worker stops, or the timeout has passed. Raise Stopped if the work is not
    finished: a normal return completes the job.
    """

    def __init__(self, keeper: LockKeeper) -> None:
        super().__init__(keeper)
        self.cancelled: Final = threading.Event()

    def progress(self, progress: float, message: str | None = None, *, checkpoint: Any = UNSET) -> None:
        """Report progress (0 to 100), which renews the lock. Returns at once while the daemon is unreachable.

        Every later grant of the job has the latest `checkpoint`, any JSON of up to 64 KiB; None removes it.
        Raises LockLost, ProgressTimeout, InvalidRequest, and Stopped if the handler has to return.
        """
        self.raise_if_lost()
        self._report(progress, message, checkpoint).result()

    def raise_if_lost(self) -> None:
        """Raise LockLost (or ProgressTimeout) if the lock is lost, Stopped if the handler has to return."""
        super().raise_if_lost()
        if self.cancelled.is_set():
            raise Stopped("The handler has to return: the worker is stopping, or the timeout has passed.")
