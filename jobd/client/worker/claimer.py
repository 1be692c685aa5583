"""Claims jobs and hands them on, up to N at a time, until it is told to stop.

Does no work of a job and ends none: whoever gets a grant does.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from jobd import __version__
from jobd.client import worker_requests
from jobd.client.aio import AsyncJobClient
from jobd.client.errors import JobdError
from jobd.client.protocol import RETRIED, GrantInfo, RetryPolicy, uuid7
from jobd.client.worker.aio_utils import first_of
from jobd.client.worker.service_thread import Say
from jobd.model.commands import PRINTABLE, About

MOST_CONCURRENCY: Final = 100_000  # the bound of About.concurrency
POLL_MS: Final = 30_000
LOCK_TTL_MS: Final = 60_000
# A worker outlasts whatever the daemon may get over: a full disk, a fault of its own.
RETRIED_CLAIM: Final = RETRIED | {"storage_full", "internal_error", "request_timeout"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimOptions:
    """What is claimed, for whom. A job that is held for `lock_ttl_ms` without a sign of life is another's at once.

    The locks have no ceiling (`max_processing_ms` 0), so long work without progress reports keeps its lock.
    """

    worker: str
    queues: Sequence[str] = ("default",)
    kinds: Sequence[str] | None = None
    lock_ttl_ms: int = LOCK_TTL_MS
    max_processing_ms: int = 0
    about: About | None = None


class Claimer:
    """The loop of a worker: `work` is called with each grant, at most `concurrency` of them at a time.

    `once` ends after one job, `drain` when there is no due job and none is running. An unreachable daemon is waited for
    `patience_s`, for ever where that is None.
    """

    def __init__(
        self,
        client: AsyncJobClient,
        wanted: ClaimOptions,
        work: Callable[[GrantInfo, bool], Awaitable[None]],
        say: Say,
        *,
        concurrency: int = 1,
        once: bool = False,
        drain: bool = False,
        patience_s: float | None = None,
    ) -> None:
        self._client = client
        self._wanted = wanted
        self._work = work
        self._say = say
        self._concurrency = 1 if once else concurrency
        self._once = once
        self._drain = drain
        self._patience_s = patience_s
        self._stopping = asyncio.Event()
        self._running: set[asyncio.Future[None]] = set()
        self._is_resent = False

    def stop(self) -> None:
        """Claim no more; what runs goes on."""
        self._stopping.set()

    async def run(self) -> None:
        """Claim and hand on until told to stop, then wait for what runs. Raises what made claiming impossible."""
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
                await self._one_ended()
                continue
            grants = await self._claim(self._concurrency - len(self._running))
            for grant in grants:
                self._running.add(asyncio.ensure_future(self._work(grant, self._is_resent)))
            if self._once and grants:
                return
            if self._drain and not grants:
                if not self._running:
                    return
                await self._one_ended()

    async def _one_ended(self) -> None:
        """Until one of the running jobs has ended, or we are told to stop."""
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await first_of(stopping, *self._running)
        finally:
            stopping.cancel()
        self._reap()

    def _reap(self) -> None:
        """Let go of the jobs that have ended. What goes wrong in `work` is a bug, and raised."""
        ended = {job for job in self._running if job.done()}
        self._running -= ended
        for job in ended:
            job.result()

    async def _claim(self, limit: int) -> list[GrantInfo]:
        """One claim, sent again under the same key until it is answered, or until we are told to stop."""
        wanted = self._wanted
        request = worker_requests.claim(
            wanted.worker,
            queues=wanted.queues,
            kinds=wanted.kinds,
            limit=min(limit, 100),
            wait_ms=0 if self._drain else POLL_MS,
            lock_ttl_ms=wanted.lock_ttl_ms,
            stuck_after_ms=0,
            max_processing_ms=wanted.max_processing_ms,
            about=wanted.about,
        )
        self._is_resent = False
        policy = RetryPolicy(total_s=self._patience_s, timeout_s=10.0, codes=RETRIED_CLAIM)
        claim = asyncio.ensure_future(self._client.send(request, policy, self._resend))
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await first_of(claim, stopping)
        finally:
            stopping.cancel()
            if not claim.done():
                claim.cancel()  # the daemon takes a grant back whose reply it could not write
                await asyncio.gather(claim, return_exceptions=True)
        if claim.cancelled():
            return []
        grants = claim.result()
        if self._is_resent:
            self._say("the daemon answers again.")
        return grants

    def _resend(self, error: JobdError) -> None:
        if not self._is_resent:
            self._is_resent = True
            self._say(f"cannot claim: {error.message} Trying again.")


def describe_process(concurrency: int) -> About:
    """Describe this process to the operators."""
    host = socket.gethostname()
    return About(
        instance=uuid7(),
        host=host if re.fullmatch(PRINTABLE, host) else None,
        pid=os.getpid(),
        version=__version__,
        concurrency=min(concurrency, MOST_CONCURRENCY),
    )


def default_name() -> str:
    """The name of a worker that was given none: host and process."""
    return f"{socket.gethostname()}-{os.getpid()}"
