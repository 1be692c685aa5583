"""Keep the lock of a job: extend it, report progress, detect a lost lock, and end the grant.

A lock is lost if a response of the daemon says so, or if the daemon has rejected all calls for the TTL of the lock, for
example because of the token. While the daemon is unreachable, the work continues and calls are retried.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec
from msgspec import UNSET, Raw

from jobd.client import errors, requests
from jobd.client.aio import AsyncJobClient
from jobd.client.api_request import ApiRequest, T, request_for
from jobd.client.retries import RETRIED, RetryOptions
from jobd.client.worker.aio_utils import settle, within
from jobd.client.worker.claimer import RETRIED_CLAIM
from jobd.client.worker.error_text import MESSAGE_CHARACTERS
from jobd.client.worker.job_output import JobOutput
from jobd.client.worker.service_thread import Log
from jobd.model.api_call import ApiCall
from jobd.model.calls import JobCalls
from jobd.model.events import EventView
from jobd.model.responses import GrantView, JobView, LockState
from jobd.model.times import duration, time_left

# A call is retried at least every 5 s: an attempt takes at most 4 s, the delay after it 1 s.
ATTEMPT_S: Final = 4.0
WAIT_S: Final = 1.0
EXTENSIONS_PER_TTL: Final = 3
ONE_ATTEMPT: Final = RetryOptions(total_s=0, timeout_s=ATTEMPT_S)

# After these errors the grant has ended.
LOST: Final = (errors.LockLost, errors.ProgressTimeout, errors.JobNotFound, errors.JobQuarantined)
# A retry of the same ending would get the same error.
_REJECTED: Final = (errors.InvalidRequest, errors.TooLarge, errors.IdempotencyKeyReused)
_MAX_INTERNAL_ERRORS: Final = 5  # responses `internal_error` to one ending before it fails


@dataclass(slots=True)
class _ProgressReport:
    """Progress to send. `reported` is done when the progress was sent, or if the daemon is unreachable."""

    request: ApiRequest[LockState]
    reported: asyncio.Future[None]


class LockKeeper:
    """The lock of one job during its execution. Begin with `start`, end with complete, fail or release.

    `lost` is done when the lock is lost; its result is the error that says why. Progress is sent at most every
    `progress_every_s`, for callers that do not wait until a report is sent.
    """

    def __init__(self, client: AsyncJobClient, grant: GrantView, log: Log, *, progress_every_s: float = 0) -> None:
        self.grant: Final = grant
        self.lost: Final[asyncio.Future[errors.JobdError]] = asyncio.get_running_loop().create_future()
        self._client = client
        self._log = log
        self._progress_every_s = progress_every_s
        self._extended_s = asyncio.get_running_loop().time()
        self._ttl_s = grant.ttl_ms / 1000
        self._rejected_from_s: float | None = None  # set while calls are rejected, see `_is_rejected`
        self._pending: _ProgressReport | None = None
        self._wake = asyncio.Event()
        self._is_reachable = True
        self._is_over = False
        self.ending: tuple[str, JobView] | None = None  # the verb that the daemon has accepted, and the job after it
        self.is_discarded = False  # the failure asks for no other attempt
        self._heartbeat: asyncio.Task[None] | None = None
        self.output: Final = JobOutput(grant.job.id, self._send_output, log)

    @property
    def _is_ended(self) -> bool:
        """Whether the daemon accepts no ending. After a progress timeout, the grant ends only when recovery runs."""
        return self.lost.done() and not isinstance(self.lost.result(), errors.ProgressTimeout)

    @property
    def id(self) -> str:
        return self.grant.job.id

    def start(self, *, at_once: bool = False) -> None:
        """Start to extend the lock, first after a third of its TTL, or `at_once` if the grant may be old."""
        self._heartbeat = asyncio.create_task(self._extend(0.0 if at_once else self._ttl_s / EXTENSIONS_PER_TTL))

    def progress_request(self, progress: float, message: str | None, checkpoint: Any = UNSET) -> ApiRequest[LockState]:
        """Return the request for `send_report`. Raises TypeError or InvalidRequest if JSON cannot express it."""
        if checkpoint is None:
            checkpoint = Raw(b"null")
        return self._request(JobCalls.update_progress, progress=progress, message=message, checkpoint=checkpoint)

    def _request(self, call: ApiCall[Any, T], **fields: Any) -> ApiRequest[T]:
        return request_for(call, self.id, lock_id=self.grant.lock_id, **fields)

    def report(self, progress: float, message: str | None = None, checkpoint: Any = UNSET) -> asyncio.Future[None]:
        return self.send_report(self.progress_request(progress, message, checkpoint))

    def send_report(self, request: ApiRequest[LockState]) -> asyncio.Future[None]:
        """Send this progress as soon as possible. Of several that are pending, the latest is sent.

        It gets the latest checkpoint. The future is done after the response and raises the daemon's error, if any.
        While the daemon is unreachable, it is done at once, and the report is sent later.
        """
        reported = self._pending.reported if self._pending else asyncio.get_running_loop().create_future()
        if self.lost.done() or self._is_over:
            error = self.lost.result() if self.lost.done() else errors.LockLost("This run of the job has ended.")
            settle(reported, error=error)
            return reported
        if self._pending is not None:
            request = _with_checkpoint_of(self._pending.request, request)
        self._pending = _ProgressReport(request, reported)
        if self._is_reachable:
            self._wake.set()
        else:
            settle(reported)
        return reported

    async def complete(self, give_up: asyncio.Event, **result: Any) -> bool:
        """Complete the job, or fail it if the daemon rejects the result. Return whether it is completed."""
        request = requests.complete_job(self.id, lock_id=self.grant.lock_id, **result)
        return await self._end("complete", request, give_up) is not None

    async def fail(self, give_up: asyncio.Event, message: str, **how: Any) -> JobView | None:
        """Fail the job. Return the job if the daemon accepts this. Pending progress is sent first if possible."""
        await self.stop(flush=True)
        self.is_discarded = how.get("retry") is False
        request = self._request(JobCalls.fail_job, error_message=message, **how)
        return await self._end("fail", request, give_up)

    async def release(self, give_up: asyncio.Event, delay_ms: int | None = None) -> bool:
        """Release the job. Return whether the daemon accepts this."""
        if self._pending is not None and _checkpoint_of(self._pending.request) is not None:
            await self.stop(flush=True)
        request = self._request(JobCalls.release_job, delay_ms=delay_ms)
        return await self._end("release", request, give_up, is_final=True) is not None

    async def timeline(self, limit: int) -> list[EventView]:
        """Return the latest events of the job. Raises JobdError."""
        return await self._client.send(request_for(JobCalls.timeline, self.id, limit=limit), ONE_ATTEMPT)

    async def stop(self, *, flush: bool = False) -> None:
        """Send the rest of the output and stop extending the lock. With `flush`, try once to send pending progress."""
        self._is_over = True
        await self.output.end(flush=self._is_reachable and not self.lost.done())
        if self._heartbeat is not None:
            heartbeat, self._heartbeat = self._heartbeat, None
            heartbeat.cancel()
            await asyncio.gather(heartbeat, return_exceptions=True)
        if self._pending is not None and not self.lost.done():
            report, self._pending = self._pending, None
            if flush:
                await self._try(report)
            settle(report.reported)

    async def _send_output(self, text: str) -> None:
        await self._client.send(self._request(JobCalls.append_output, text=text), ONE_ATTEMPT)

    async def _extend(self, first_s: float) -> None:
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
                self._keep(report)
                raise
            if state is not None:
                failures, self._ttl_s = 0, state.ttl_ms / 1000
                self._on_extended(sent)
                due = sent + self._ttl_s / EXTENSIONS_PER_TTL
                await asyncio.sleep(self._progress_every_s)
            else:
                failures += 1
                due = loop.time() + _wait_s(failures)

    async def _try(self, report: _ProgressReport | None) -> LockState | None:
        """Send `report` or, without one or if it is rejected, an extension. Return None if that is not accepted."""
        request = self._request(JobCalls.extend_job_lock) if report is None else report.request
        try:
            state = await self._client.send(request, ONE_ATTEMPT)
        except LOST as error:
            self._on_lost(error, report)
        except errors.JobdError as error:
            self._on_error(error, report)
            if report is not None and self._is_reachable and not self.lost.done():
                return await self._try(None)  # or reports that are rejected one after another would use up the lock
        else:
            self._on_response()
            if report is not None:
                settle(report.reported)
            return state
        return None

    def _on_lost(self, error: errors.JobdError, report: _ProgressReport | None) -> None:
        for pending in (report, self._pending):
            if pending is not None:
                settle(pending.reported, error=error)
        if not self.lost.done():
            self.lost.set_result(error)

    def _on_error(self, error: errors.JobdError, report: _ProgressReport | None) -> None:
        """Handle an error other than a lost lock. Rejected progress is dropped, other progress is kept."""
        if self._is_rejected(error):
            self._on_lost(
                errors.LockLost(f"All calls were rejected until the lock had expired: {error.message}"), report
            )
            return
        if error.code not in RETRIED and report is not None:
            self._on_response()
            settle(report.reported, error=error)
            return
        if self._is_reachable:
            self._is_reachable = False
            self._log(f"job {self.id}: {error.message} The work continues; retrying.")
        self._keep(report)

    def _keep(self, report: _ProgressReport | None) -> None:
        """Keep progress that was not sent, unless there is newer progress. Its caller waits no longer."""
        if report is not None:
            if self._pending is None:
                self._pending = report
            else:
                self._pending.request = _with_checkpoint_of(report.request, self._pending.request)
            settle(report.reported)

    def _is_rejected(self, error: errors.JobdError) -> bool:
        """Return whether the daemon has rejected the worker's calls for the TTL of the lock, which has expired then.

        Only errors that prevent claims too, such as a wrong token, count. If the daemon was reachable before the first
        of them, the time since the last extension counts.
        """
        if error.code in RETRIED_CLAIM or isinstance(error, _REJECTED):
            return False
        now = asyncio.get_running_loop().time()
        if self._rejected_from_s is None:
            self._rejected_from_s = self._extended_s if self._is_reachable else now
        return now - self._rejected_from_s >= self._ttl_s

    def _on_extended(self, sent_s: float) -> None:
        self._extended_s, self._rejected_from_s = sent_s, None

    def _on_response(self) -> None:
        if not self._is_reachable:
            self._is_reachable = True
            self._log(f"job {self.id}: the daemon responds again.")

    async def _end(
        self, verb: str, request: ApiRequest[JobView], give_up: asyncio.Event, *, is_final: bool = False
    ) -> JobView | None:
        """Report the end of the job. Retries until the daemon responds, `give_up` is set, or `_is_rejected`.

        Return the job if the daemon accepts the ending. If the daemon rejects an ending that is not `is_final`, the job
        is failed instead, so that it does not stall.
        """
        await self.stop()
        internal_errors, failures = 0, 0
        while not self._is_ended:
            try:
                job = await self._client.send(request, ONE_ATTEMPT)
            except LOST as error:
                self._on_lost(error, None)
                break
            except errors.InvalidTransition as error:
                self._log(f"job {self.id}: {verb} was rejected: {error.message}")
                return None
            except errors.JobdError as error:
                internal_errors += isinstance(error, errors.InternalError)
                if isinstance(error, _REJECTED) or internal_errors >= _MAX_INTERNAL_ERRORS:
                    self._log(f"job {self.id}: {verb} was rejected: {error.message}")
                    if not is_final:
                        await self._fail_instead(verb, error, give_up)
                    return None
                failures += 1
                if failures == 1:
                    self._log(f"job {self.id}: cannot {verb} the job: {error.message} Retrying.")
                if not await self._wait_to_retry(verb, error, give_up, failures):
                    return None
                await self._extend_meanwhile()
            else:
                self._on_response()
                self.ending = verb, job
                return job
        self._log(f"job {self.id}: {verb} was too late: {self.lost.result().message}")
        return None

    async def _wait_to_retry(self, verb: str, error: errors.JobdError, give_up: asyncio.Event, failures: int) -> bool:
        """Wait before the next attempt. Return False if there is none."""
        is_rejected, self._is_reachable = self._is_rejected(error), False
        if give_up.is_set() or is_rejected:
            lock = "Its lock has expired." if is_rejected else "Its lock will expire."
            self._log(f"job {self.id}: could not {verb} the job: {error.message} {lock}")
            return False
        await within(_wait_s(failures), give_up)
        return True

    async def _extend_meanwhile(self) -> None:
        """Extend the lock while its ending is retried. Errors are ignored: the ending may have been applied."""
        now = asyncio.get_running_loop().time()
        if now - self._extended_s < self._ttl_s / EXTENSIONS_PER_TTL:
            return
        with contextlib.suppress(errors.JobdError):
            await self._client.send(self._request(JobCalls.extend_job_lock), ONE_ATTEMPT)
            self._on_extended(now)

    async def _fail_instead(self, verb: str, error: errors.JobdError, give_up: asyncio.Event) -> None:
        """Fail the job with the error that the daemon raised for another ending."""
        message = f"The work has ended, but the daemon rejected its `{verb}`: {error.message}"[:MESSAGE_CHARACTERS]
        failure = self._request(JobCalls.fail_job, error_message=message, error_code=f"{verb}:{error.code}")
        await self._end("fail", failure, give_up, is_final=True)


def _checkpoint_of(request: ApiRequest[LockState]) -> Raw | None:
    assert request.body is not None
    return msgspec.json.decode(request.body, type=dict[str, Raw]).get("checkpoint")


def _with_checkpoint_of(older: ApiRequest[LockState], newer: ApiRequest[LockState]) -> ApiRequest[LockState]:
    """Return the progress report `newer` with the checkpoint of `older`, which is not sent, unless it has its own."""
    checkpoint = _checkpoint_of(older)
    if checkpoint is None or _checkpoint_of(newer) is not None:
        return newer
    assert newer.body is not None
    fields = msgspec.json.decode(newer.body, type=dict[str, Raw]) | {"checkpoint": checkpoint}
    return replace(newer, body=msgspec.json.encode(fields))


def _wait_s(failures: int) -> float:
    """Return the delay after this number of consecutive attempts without a response."""
    return random.uniform(0.5, 1) * min(WAIT_S, 0.1 * 2.0 ** min(failures, 10))


def describe_end(keeper: LockKeeper, run_s: float) -> str:
    """Return the line that reports the end of a run: the job, its kind, the result, the duration, the error."""
    job, after = keeper.grant.job, f" after {duration(run_s * 1000)}"
    name = f"job {job.id}" + (f" ({job.kind})" if job.kind else "")
    if keeper.ending is None:
        why = f": {keeper.lost.result().message}" if keeper.lost.done() else "."
        return f"{name} ended here{after}, without a result{why}"
    verb, job = keeper.ending
    if verb == "fail":
        reason = (job.error_message or "").partition("\n")[0]
        return describe_failure(job, reason, name, after, is_discarded=keeper.is_discarded)
    if verb == "release" and job.run_at > job.updated_at:
        return f"{name} was put back{after}; it is due again {_delay(job)}."
    return f"{name} {'completed' if verb == 'complete' else 'was put back'}{after}."


def describe_failure(job: JobView, reason: str, name: str = "", after: str = "", *, is_discarded: bool = False) -> str:
    """Return the line that reports a failed attempt and whether there is another one."""
    failed = f"{name or f'job {job.id}'} failed{after}: {reason}"
    if job.status != "queued":
        why = "the handler raised Discard" if is_discarded else f"attempt {job.attempt} of {job.max_attempts}"
        return f"{failed}; it is not retried: {why}."
    return f"{failed}; it is retried {_delay(job)}."


def _delay(job: JobView) -> str:
    """Return how long after its last change the job is due."""
    delay_ms = job.run_at - job.updated_at
    return f"in {time_left(delay_ms)}" if delay_ms > 0 else "at once"
