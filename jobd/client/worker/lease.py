"""Keeps one grant: extends its lock by itself, carries progress, notices when it is lost, and ends it.

Only an answer means a lost lock: while the daemon is unreachable the work goes on and the call is tried again.
Does no work of the job; worker.py and run.py do.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass
from typing import Any, Final

from jobd.client import worker_requests
from jobd.client.aio import AsyncJobClient
from jobd.client.errors import (
    IdempotencyKeyReused,
    InternalError,
    InvalidRequest,
    InvalidTransition,
    JobdError,
    JobNotFound,
    JobQuarantined,
    LockLost,
    MaxProcessingTimeExceeded,
    TooLarge,
)
from jobd.client.protocol import RETRIED, ApiRequest, GrantInfo, JobInfo, RetryPolicy
from jobd.client.worker.aio_utils import within
from jobd.client.worker.service_thread import Say
from jobd.model.responses import LockState

# A call on a held job is tried again at least every 5 s: one try takes 4 s at most, the wait after it 1 s.
TRY_S: Final = 4.0
WAIT_S: Final = 1.0
ONE_TRY: Final = RetryPolicy(total_s=0, timeout_s=TRY_S)

# The job is somebody else's, or nobody's: nothing that its former holder says counts any more.
LOST: Final = (LockLost, MaxProcessingTimeExceeded, JobNotFound, JobQuarantined)
# The daemon will say the same of this ending for ever.
_REFUSED: Final = (InvalidRequest, TooLarge, IdempotencyKeyReused)
_BUGS_BORNE: Final = 5  # answers `internal_error` to one ending before it is given up


@dataclass(slots=True)
class _ProgressReport:
    """Progress that waits to be sent, and who waits for that."""

    progress: float
    message: str | None
    told: asyncio.Future[None]


class LeaseKeeper:
    """One grant while it is worked on. Start it with `start`, end it with one of complete, fail and release.

    `lost` is done as soon as an answer says that the job is no longer held; its result is that answer. Progress is
    sent every `progress_every_s` at most, for a source that does not wait for its reports.
    """

    def __init__(self, client: AsyncJobClient, grant: GrantInfo, say: Say, *, progress_every_s: float = 0) -> None:
        self.grant: Final = grant
        self.lost: Final[asyncio.Future[JobdError]] = asyncio.get_running_loop().create_future()
        self._client = client
        self._say = say
        self._gap_s = progress_every_s
        self._heard_s = asyncio.get_running_loop().time()
        self._ttl_s = grant.ttl_ms / 1000
        self._pending: _ProgressReport | None = None
        self._wake = asyncio.Event()
        self._is_reachable = True
        self._is_over = False
        self._beat: asyncio.Task[None] | None = None

    @property
    def _is_gone(self) -> bool:
        """An ending is of no use any more. Past the ceiling one is still taken until recovery has acted."""
        return self.lost.done() and not isinstance(self.lost.result(), MaxProcessingTimeExceeded)

    @property
    def id(self) -> str:
        return self.grant.job.id

    def start(self, *, at_once: bool = False) -> None:
        """Begin to extend the lock: at a third of its TTL, or `at_once` where the grant may be an old one."""
        self._beat = asyncio.create_task(self._keep(0.0 if at_once else self._ttl_s / 3))

    def report(self, progress: float, message: str | None = None) -> asyncio.Future[None]:
        """Send this progress as soon as possible; of several that wait, only the latest is sent.

        The future is done once it was answered, or cannot be now: then it is sent when the daemon is back. Its error
        is the daemon's refusal, or the loss of the lock.
        """
        told = self._pending.told if self._pending else asyncio.get_running_loop().create_future()
        if self.lost.done() or self._is_over:
            _settle(told, self.lost.result() if self.lost.done() else LockLost("This run of the job has ended."))
            return told
        self._pending = _ProgressReport(progress, message, told)
        if self._is_reachable:
            self._wake.set()
        else:
            _settle(told)
        return told

    async def complete(self, give_up: asyncio.Event, **result: Any) -> bool:
        """Complete the job; whether that was accepted. Where its result is refused, the job fails and says so."""
        return await self._end(
            "complete", worker_requests.complete_job(self.id, lock_id=self.grant.lock_id, **result), give_up
        )

    async def fail(self, give_up: asyncio.Event, message: str, **how: Any) -> bool:
        """Fail the job; whether that was accepted. Progress that was not sent yet goes first, if it can."""
        await self.stop(flush=True)
        return await self._end(
            "fail", worker_requests.fail_job(self.id, lock_id=self.grant.lock_id, error_message=message, **how), give_up
        )

    async def release(self, give_up: asyncio.Event, delay_ms: int | None = None) -> bool:
        """Give the job back; whether that was accepted."""
        return await self._end(
            "release", worker_requests.release_job(self.id, lock_id=self.grant.lock_id, delay_ms=delay_ms), give_up
        )

    async def stop(self, *, flush: bool = False) -> None:
        """Extend the lock no more. With `flush` progress that still waits is tried once."""
        self._is_over = True
        if self._beat is not None:
            beat, self._beat = self._beat, None
            beat.cancel()
            await asyncio.gather(beat, return_exceptions=True)
        if self._pending is not None and not self.lost.done():
            report, self._pending = self._pending, None
            if flush:
                await self._try(report)
            _settle(report.told)

    # -----------------------------------------------------------------------------------------------------------------

    async def _keep(self, first_s: float) -> None:
        loop = asyncio.get_running_loop()
        due, failures = loop.time() + first_s, 0
        while not self.lost.done():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._wake.wait()
            self._wake.clear()
            sent = loop.time()
            report, self._pending = self._pending, None
            try:
                state = await self._try(report)
            except asyncio.CancelledError:
                self._pending = self._pending or report
                raise
            if state is not None:
                failures, self._heard_s, self._ttl_s = 0, sent, state.ttl_ms / 1000
                due = sent + self._ttl_s / 3
                await asyncio.sleep(self._gap_s)
            else:
                failures += 1
                due = loop.time() + _wait_s(failures)

    async def _try(self, report: _ProgressReport | None) -> LockState | None:
        """One sign of life: the progress that waits, or an extension. None where it was not accepted."""
        lock_id = self.grant.lock_id
        request = (
            worker_requests.extend_job_lock(self.id, lock_id=lock_id)
            if report is None
            else worker_requests.update_progress(
                self.id, lock_id=lock_id, progress=report.progress, message=report.message
            )
        )
        try:
            state = await self._client.send(request, ONE_TRY)
        except LOST as error:
            self._lose(error, report)
        except JobdError as error:
            self._note(error, report)
        else:
            self._reached()
            if report is not None:
                _settle(report.told)
            return state
        return None

    def _lose(self, error: JobdError, report: _ProgressReport | None) -> None:
        for waiting in (report, self._pending):
            if waiting is not None:
                _settle(waiting.told, error)
        if not self.lost.done():
            self.lost.set_result(error)

    def _note(self, error: JobdError, report: _ProgressReport | None) -> None:
        """A call that was not accepted, though the lock is not lost: refused progress is dropped, the rest kept."""
        if error.code not in RETRIED and report is not None:
            self._reached()
            _settle(report.told, error)
            return
        if self._is_reachable:
            self._is_reachable = False
            self._say(f"job {self.id}: {error.message} The work goes on; trying again.")
        if report is not None:
            self._pending = self._pending or report
            _settle(report.told)

    def _reached(self) -> None:
        if not self._is_reachable:
            self._is_reachable = True
            self._say(f"job {self.id}: the daemon answers again.")

    async def _end(self, verb: str, request: ApiRequest[JobInfo], give_up: asyncio.Event) -> bool:
        """Say how the job ended, again and again until the daemon answers or `give_up` is set."""
        await self.stop()
        bugs, failures = 0, 0
        while not self._is_gone:
            try:
                await self._client.send(request, ONE_TRY)
            except LOST as error:
                self._lose(error, None)
                break
            except InvalidTransition as error:
                self._say(f"job {self.id}: {verb} was refused: {error.message}")
                return False
            except JobdError as error:
                bugs += isinstance(error, InternalError)
                if isinstance(error, _REFUSED) or bugs >= _BUGS_BORNE:
                    return await self._refused(verb, error, give_up)
                failures += 1
                if failures == 1:
                    self._say(f"job {self.id}: cannot {verb} it yet: {error.message} Trying until there is an answer.")
                if not await self._again(verb, error, give_up, failures):
                    return False
                await self._hold_on()
            else:
                self._reached()
                return True
        self._say(f"job {self.id}: {verb} comes too late: {self.lost.result().message}")
        return False

    async def _again(self, verb: str, error: JobdError, give_up: asyncio.Event, failures: int) -> bool:
        """Wait for the next try of an ending; False where there is to be none."""
        self._is_reachable = False
        if give_up.is_set():
            self._say(f"job {self.id}: could not {verb} it: {error.message} Its lock will run out.")
            return False
        await within(_wait_s(failures), give_up)
        return True

    async def _hold_on(self) -> None:
        """Keep the lock while its ending is put off. What this call says does not count: the ending may be done."""
        now = asyncio.get_running_loop().time()
        if now - self._heard_s < self._ttl_s / 3:
            return
        with contextlib.suppress(JobdError):
            await self._client.send(worker_requests.extend_job_lock(self.id, lock_id=self.grant.lock_id), ONE_TRY)
            self._heard_s = now

    async def _refused(self, verb: str, error: JobdError, give_up: asyncio.Event) -> bool:
        """The daemon will not take this ending. A plain failure that says so is better than a job that gets stuck."""
        self._say(f"job {self.id}: {verb} was refused: {error.message}")
        if verb in ("complete", "fail"):
            message = f"The work has ended, but the daemon refused its `{verb}`: {error.message}"[:4096]
            plain = worker_requests.fail_job(
                self.id, lock_id=self.grant.lock_id, error_message=message, error_code=f"{verb}:{error.code}"
            )
            await self._end("the plain failure", plain, give_up)
        return False


def _wait_s(failures: int) -> float:
    """The wait after that many tries in a row without an answer."""
    return random.uniform(0.5, 1) * min(WAIT_S, 0.1 * 2.0 ** min(failures, 10))


def _settle(told: asyncio.Future[None], error: JobdError | None = None) -> None:
    if told.done():
        return
    if error is None:
        told.set_result(None)
    else:
        told.set_exception(error)
        told.exception()  # nobody needs to ask
