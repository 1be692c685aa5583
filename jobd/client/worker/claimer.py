"""Claim jobs, several at a time, and start the work on each."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from msgspec import UNSET
from msgspec.structs import replace

from jobd import __version__
from jobd.client.aio import AsyncJobClient
from jobd.client.api_request import ApiRequest, build, uuid7
from jobd.client.errors import IdempotencyKeyReused, JobdError
from jobd.client.retries import RETRIED, RetryOptions
from jobd.client.worker.aio_utils import first_of
from jobd.client.worker.service_thread import Log
from jobd.model.calls import JobRequests
from jobd.model.commands import About
from jobd.model.events import describe_author
from jobd.model.fields import PRINTABLE
from jobd.model.responses import DirectiveView, Grants, GrantView

MAX_CONCURRENCY: Final = 100_000  # the bound of About.concurrency
MAX_VERSION: Final = 100  # the bound of About.version
POLL_MS: Final = 30_000
NODE_POLL_MS: Final = 10_000  # with several nodes, as the one that holds the claim may no longer lead
LOCK_TTL_MS: Final = 60_000
ARRIVAL_S: Final = 0.05  # after `stop`, for a response that is on its way
RETRY_FOR_S: Final = 30.0  # of a claim with `once` or `drain`, while the daemon is unreachable
LISTEN_AFTER_S: Final = 0.5  # without a free slot, so that short jobs cost no request more
PROBE_S: Final = 1.0  # for each request for grants that were missed
PROBES: Final = 3  # at most, because over TCP the daemon notices a cancelled claim a little later
# A claim is also retried after errors that the daemon can recover from: a full disk, an internal error.
RETRIED_CLAIM: Final = RETRIED | {"storage_full", "internal_error", "request_timeout"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimOptions:
    """Which jobs to claim, for which worker, and for how long.

    Another worker can get a job whose lock was not extended for `lock_ttl_ms`. By default there is no progress timeout
    (`progress_timeout_ms` is 0), so long work without progress reports keeps its lock. At most `concurrency` jobs run
    at a time. `once` ends the worker after one job, `drain` when no job is due, none is running, and no retry of an
    attempt that this worker failed is awaited.
    """

    worker: str
    queues: Sequence[str] = ("default",)
    kinds: Sequence[str] | None = None
    lock_ttl_ms: int = LOCK_TTL_MS
    progress_timeout_ms: int = 0
    about: About | None = None
    concurrency: int = 1
    once: bool = False
    drain: bool = False

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ValueError("concurrency must be at least 1")


class Claimer:
    """The main loop of a worker. It calls `work` with each grant.

    The second argument of `work` says whether the claim was sent more than once, in which case the grant may be old.
    While the daemon is unreachable, a claim is retried, with `once` or `drain` only for RETRY_FOR_S. `on_stop` is
    called when an operator stops the worker. One that was told to be quiet waits for the next directive.
    """

    def __init__(
        self,
        client: AsyncJobClient,
        options: ClaimOptions,
        work: Callable[[GrantView, bool], Awaitable[None]],
        log: Log,
        on_stop: Callable[[], None],
    ) -> None:
        self._client = client
        self._options = options
        self._poll_ms = POLL_MS if len(client.endpoints) == 1 else NODE_POLL_MS
        self._work = work
        self._log = log
        self._on_stop = on_stop
        self._is_quiet = False
        self._concurrency = 1 if options.once else options.concurrency
        self._stopping = asyncio.Event()
        self._running: set[asyncio.Future[None]] = set()
        self._retries: dict[str, float] = {}  # job id -> loop time at which its retry is due
        self._is_resent = False
        self.has_claimed = False

    @property
    def is_stopping(self) -> bool:
        """Whether `stop` was called. A response that was on its way may still bring grants."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """Stop claiming. Running work continues."""
        self._stopping.set()

    def await_retry(self, job_id: str, in_s: float) -> None:
        """Record a retry of a job, for which `drain` waits."""
        self._retries[job_id] = asyncio.get_running_loop().time() + in_s

    async def run(self) -> None:
        """Claim until stopped, then wait for running work. Raises the JobdError that prevents claiming."""
        try:
            await self._loop()
        finally:
            ended = await asyncio.gather(*self._running, return_exceptions=True)
            self._running.clear()
        for bug in ended:
            if isinstance(bug, BaseException):
                raise bug

    async def _loop(self) -> None:
        while not self._stopping.is_set():
            if len(self._running) >= self._concurrency:
                await self._wait_for_one()
                continue
            begun_s = asyncio.get_running_loop().time()
            claimed = await self._claim(0 if self._is_quiet else self._concurrency - len(self._running))
            grants = claimed.grants
            if claimed.directive is not UNSET:
                self._obey(claimed.directive)
                continue
            for grant in grants:
                self._retries.pop(grant.job.id, None)
                self._running.add(asyncio.ensure_future(self._work(grant, self._is_resent)))
            if self._options.once and grants:
                return
            if self._options.drain and not grants:
                # A retry that was due before this claim has another worker, or waits for an operator.
                self._retries = {job_id: due_s for job_id, due_s in self._retries.items() if due_s > begun_s}
                if self._retries:
                    continue
                if not self._running:
                    return
                await self._wait_for_one()

    def _obey(self, directive: DirectiveView) -> None:
        who, why = describe_author(directive.by), f": {directive.reason}" if directive.reason else ""
        if directive.rule is not UNSET:
            text = f"gets no jobs while quiet rule {directive.rule} of {who} lasts"
        elif directive.action == "stop":
            text = f"was stopped by {who}"
            self._on_stop()
        else:
            self._is_quiet = directive.action == "quiet"
            text = f"was told by {who} to {'take no new jobs' if self._is_quiet else 'take jobs again'}"
        self._log(f"worker {self._options.worker} {text}{why}")

    async def _wait_for_one(self) -> None:
        """Wait until one of the running jobs has ended or `stop` was called. Meanwhile, obey directives."""
        stopping = asyncio.ensure_future(self._stopping.wait())
        listening = asyncio.ensure_future(self._listen())
        try:
            await first_of(stopping, *self._running)
        finally:
            stopping.cancel()
            listening.cancel()  # a directive that is on its way is repeated
            await asyncio.gather(listening, return_exceptions=True)
        ended = {job for job in self._running if job.done()}
        self._running -= ended
        for job in ended:
            job.result()  # raises a bug in `work`

    async def _listen(self) -> None:
        """Claim nothing, and wait for directives. An error ends this: the next claim gets it too."""
        await asyncio.sleep(LISTEN_AFTER_S)
        retry = RetryOptions(total_s=None, timeout_s=10.0, codes=RETRIED_CLAIM)
        with contextlib.suppress(JobdError):
            while True:
                grants = await self._client.send(self._request(0, self._poll_ms, uuid7()), retry)
                if grants.directive is not UNSET:
                    self._obey(grants.directive)

    async def _claim(self, limit: int) -> Grants:
        """Claim up to `limit` jobs. Retries with the same key until the daemon responds or `stop` is called."""
        self.has_claimed = True
        key = uuid7()
        wait_ms = self._poll_ms
        if self._options.drain:
            wait_ms = min(wait_ms, self._retry_wait_ms())
        request = self._request(limit, wait_ms, key)
        self._is_resent = False
        retry_for_s = RETRY_FOR_S if self._options.once or self._options.drain else None
        retry = RetryOptions(total_s=retry_for_s, timeout_s=10.0, codes=RETRIED_CLAIM)
        claim = asyncio.ensure_future(self._client.send(request, retry, self._on_retry))
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await first_of(claim, stopping)
            if not claim.done():
                await asyncio.wait([claim], timeout=ARRIVAL_S)
        finally:
            stopping.cancel()
            if not claim.done():
                claim.cancel()  # the daemon takes back a grant if it has not begun to send the response
                await asyncio.gather(claim, return_exceptions=True)
        if claim.cancelled():
            return await self._missed_grants(request, self._request(limit, 0, key))
        grants = claim.result()
        if self._is_resent:
            self._log("the daemon responds again.")
        return grants

    def _retry_wait_ms(self) -> int:
        """Return the time until the next retry is due, in ms; 0 if none is awaited."""
        next_s = min(self._retries.values(), default=0.0) - asyncio.get_running_loop().time()
        return max(0, math.ceil(next_s * 1000))

    def _request(self, limit: int, wait_ms: int, key: str) -> ApiRequest[Grants]:
        options = self._options
        about = replace(options.about, quiet=True) if options.about is not None and self._is_quiet else options.about
        fields = {
            "worker": options.worker,
            "queues": list(options.queues),
            "kinds": None if options.kinds is None else list(options.kinds),
            "limit": min(limit, 100),
            "wait_ms": wait_ms or None,
            "lock_ttl_ms": options.lock_ttl_ms,
            "stall_after_ms": 0,
            "progress_timeout_ms": options.progress_timeout_ms,
            "about": about,
            "busy": True if limit == 0 and not self._is_quiet else None,
        }
        return build(JobRequests.claim, fields, key=key, wait_ms=wait_ms)

    async def _missed_grants(self, cancelled: ApiRequest[Grants], probe: ApiRequest[Grants]) -> Grants:
        """Return the grants of a cancelled claim whose response was on its way.

        The daemon rejects the probe, which has the same key and another body, only if there are such grants, or if the
        cancelled claim still waits. The probe itself does not wait, so no response to it is missed.
        """
        once = RetryOptions(total_s=0, timeout_s=PROBE_S)
        with contextlib.suppress(JobdError):
            for _ in range(PROBES):
                with contextlib.suppress(IdempotencyKeyReused):
                    return await self._client.send(probe, once)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PROBE_S):
                        return await self._client.send(cancelled, once)
        return Grants([])

    def _on_retry(self, error: JobdError) -> None:
        if not self._is_resent:
            self._is_resent = True
            self._log(f"cannot claim: {error.message} Retrying.")


def describe_process(concurrency: int) -> About:
    host, version = socket.gethostname(), os.environ.get("JOBD_WORKER_VERSION") or __version__
    return About(
        instance=uuid7(),
        host=host if re.fullmatch(PRINTABLE, host) else None,
        pid=os.getpid(),
        version=version[:MAX_VERSION] if re.fullmatch(PRINTABLE, version) else None,
        concurrency=min(concurrency, MAX_CONCURRENCY),
    )


def describe_claims(options: ClaimOptions, client: AsyncJobClient) -> str:
    """Return the line that a worker logs at its start: what it claims, and the addresses of the daemon."""
    queues = f"{'queue' if len(options.queues) == 1 else 'queues'} {', '.join(options.queues)}"
    kinds = "" if options.kinds is None else f" (only {', '.join(options.kinds)})"
    many = f", {options.concurrency} at a time,"
    return f"worker {options.worker} claims jobs of {queues}{kinds}{many} at {', '.join(map(str, client.endpoints))}"


def default_name() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"
