"""Create, read and cancel the jobs of a daemon, over clients that are made at the first call."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import weakref
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from jobd.client import requests
from jobd.client.api_request import ApiRequest, T, request_for
from jobd.client.app.job_port import NewJob
from jobd.client.endpoint import Address, Endpoint, worker_endpoints
from jobd.client.errors import InvalidTransition, JobdError, JobExists, Unreachable
from jobd.client.sync import JobClient
from jobd.model.calls import JobCalls
from jobd.model.events import EventView
from jobd.model.responses import JobView

if TYPE_CHECKING:
    from jobd.client.aio import AsyncJobClient

RETRY_FOR_S: Final = 30.0
logger = logging.getLogger("jobd.client")
_HINT: Final = " Start a daemon with `jobd dev`, or name another one: JOBD_SOCKET, JOBD_URL, or App(url=...)."


_replacement: Address | None = None  # the daemon of a test, for all apps


@contextlib.contextmanager
def replaced_daemon(address: Address) -> Iterator[None]:
    """Let all apps use another daemon, whatever their address is. For tests."""
    global _replacement
    before, _replacement = _replacement, address
    try:
        yield
    finally:
        _replacement = before


class _Warning:
    """Warn once that calls wait for the daemon, until one of them has succeeded."""

    is_given = False

    def __call__(self, error: JobdError) -> None:
        if isinstance(error, Unreachable) and not self.is_given:
            self.is_given = True
            logger.warning("%s Retrying for %g s.%s", error.message, RETRY_FOR_S, _HINT)


class DaemonJobs:
    """Jobs of the daemon at `url`. A blocking client is shared by all threads, and each event loop has a client."""

    def __init__(self, url: Address | None, token: str | None, name: str) -> None:
        self._url = url
        self._name = name
        self._token = token
        self._guard = threading.Lock()
        self._client: JobClient | None = None
        self._client_of: Address | None = None  # the replacement that it was made for
        self._clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[Address | None, AsyncJobClient]] = (
            weakref.WeakKeyDictionary()
        )
        # The end of a loop closes its asynchronous generators, and with them the connections.
        self._closers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncGenerator[None]] = (
            weakref.WeakKeyDictionary()
        )
        self._warning = _Warning()

    @property
    def is_addressed(self) -> bool:
        """Whether the app names its daemon."""
        return self._url is not None

    def use(self, url: Address) -> None:
        """Use this daemon. Called before the first call."""
        self._url = url

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """The addresses of the daemon."""
        return worker_endpoints(_replacement or self._url, self._token)

    def create(self, jobs: Sequence[NewJob]) -> None:
        with _allowing_derived(jobs):
            self._send(_creation(jobs))

    async def acreate(self, jobs: Sequence[NewJob]) -> None:
        with _allowing_derived(jobs):
            await self._asend(_creation(jobs))

    def get(self, job_id: str) -> JobView:
        return self._send(request_for(JobCalls.get_job, job_id))

    async def aget(self, job_id: str) -> JobView:
        return await self._asend(request_for(JobCalls.get_job, job_id))

    def timeline(self, job_id: str) -> list[EventView]:
        return self._send(request_for(JobCalls.timeline, job_id))

    def wait(self, job_id: str, timeout_s: float | None) -> JobView:
        with _hinting():
            return self._blocking().wait_for_job(job_id, timeout_s=timeout_s)

    async def await_end(self, job_id: str, timeout_s: float | None) -> JobView:
        with _hinting():
            return await (await self._asynchronous()).wait_for_job(job_id, timeout_s=timeout_s)

    def cancel(self, job_id: str, reason: str | None) -> bool:
        try:
            self._send(request_for(JobCalls.cancel_job, job_id, reason))
        except InvalidTransition:
            return False
        return True

    async def acancel(self, job_id: str, reason: str | None) -> bool:
        try:
            await self._asend(request_for(JobCalls.cancel_job, job_id, reason))
        except InvalidTransition:
            return False
        return True

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    async def aclose(self) -> None:
        """Close the connections of this loop and those of blocking calls."""
        self.close()
        closer = self._closers.pop(asyncio.get_running_loop(), None)
        if closer is not None:
            await closer.aclose()

    def _send(self, request: ApiRequest[T]) -> T:
        with _hinting():
            result = self._blocking().send(request)
        self._warning.is_given = False
        return result

    async def _asend(self, request: ApiRequest[T]) -> T:
        with _hinting():
            result = await (await self._asynchronous()).send(request)
        self._warning.is_given = False
        return result

    def _blocking(self) -> JobClient:
        if (found := self._client) is not None and self._client_of is _replacement:
            return found
        with self._guard:
            if self._client is None or self._client_of is not _replacement:
                self.close()
                client = JobClient(
                    _replacement or self._url, token=self._token, name=self._name, retry_for_s=RETRY_FOR_S
                )
                client.on_retry = self._warning
                weakref.finalize(self, client.close)  # also at the end of the program
                self._client_of, self._client = _replacement, client
            return self._client

    async def _asynchronous(self) -> AsyncJobClient:
        loop = asyncio.get_running_loop()
        if loop in self._clients and self._clients[loop][0] is not _replacement:
            await self._closers.pop(loop).aclose()
        if loop not in self._clients:
            closer = self._closers[loop] = self._hold_client(loop)
            await anext(closer)
        return self._clients[loop][1]

    async def _hold_client(self, loop: asyncio.AbstractEventLoop) -> AsyncGenerator[None]:
        client = self.asynchronous_client()
        self._clients[loop] = _replacement, client
        client.on_retry = self._warning
        try:
            yield
        finally:
            self._clients.pop(loop, None)
            await client.close()

    def asynchronous_client(self) -> AsyncJobClient:
        """Return a new client. Raises ModuleNotFoundError if aiohttp is not installed."""
        try:
            from jobd.client.aio import AsyncJobClient
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"Asynchronous calls and workers need the package {error.name}: pip install 'jobd-client[worker]'",
                name=error.name,
            ) from None
        return AsyncJobClient(_replacement or self._url, token=self._token, name=self._name, retry_for_s=RETRY_FOR_S)


@contextlib.contextmanager
def _hinting() -> Iterator[None]:
    """Inside the context, the error for an unreachable daemon says how to start or name one."""
    try:
        yield
    except Unreachable as error:
        error.message += _HINT
        raise


@contextlib.contextmanager
def _allowing_derived(jobs: Sequence[NewJob]) -> Iterator[None]:
    """Inside the context, jobs may exist that an earlier attempt of the running job has created, with other options."""
    try:
        yield
    except JobExists:
        if not all(job.is_derived for job in jobs):
            raise


def _creation(jobs: Sequence[NewJob]) -> ApiRequest[Any]:
    """Return the request that creates one job, or several."""
    first, *others = map(_fields, jobs)
    return requests.create_jobs([first, *others]) if others else requests.create_job(**first)


def _fields(job: NewJob) -> dict[str, Any]:
    fields = {"id": job.id, "kind": job.name, "queue": job.queue, "payload": job.payload, **job.options}
    return {**fields, "headers": job.headers} if job.headers else fields
