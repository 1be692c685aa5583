"""Clients for asyncio over aiohttp: AsyncJobClient for workers, AsyncAdminClient for operators.

Says nothing about the calls themselves: those are in calls.py and admin_calls.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import io
import random
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Mapping
from types import TracebackType
from typing import Any, BinaryIO, Concatenate, Final, ParamSpec, Self, TypeVar

import aiohttp
from yarl import URL

from jobd.client import admin_requests, worker_requests
from jobd.client.backup_progress import LOOK_S, StallTimeout, Told
from jobd.client.command_stream import CommandStream, command_line
from jobd.client.endpoint import Endpoint, admin_endpoint, worker_endpoint
from jobd.client.errors import JobdError, Unreachable
from jobd.client.event_subscription import ADMIN_EVENTS, EVENTS, RECONNECT, SILENCE_S, EventSubscription
from jobd.client.protocol import (
    ApiRequest,
    ApiResponse,
    JobInfo,
    JobInfoPage,
    RetryPolicy,
    RetryState,
    json_lines,
    raise_error,
    read_result,
    signed,
    uuid7,
)
from jobd.model.commands import MAX_PAGE
from jobd.model.events import StreamedEvent
from jobd.model.job import Status
from jobd.model.responses import QueueView

P = ParamSpec("P")
T = TypeVar("T")

_CONNECT_S: Final = 5.0
_IDLE_S: Final = 60.0  # the daemon closes idle connections after 75 s
_PIECE_BYTES: Final = 256 << 10

# What aiohttp raises for a connection that cannot be made or breaks.
_BROKEN: Final = (aiohttp.ClientError, OSError)
# Among these, what an idle connection says that the daemon has closed meanwhile.
_STALE: Final = (aiohttp.ServerDisconnectedError, ConnectionResetError, BrokenPipeError)


class _AsyncClient:
    """A pool of connections to one listener, and the calls over them. Belongs to the event loop of its first call."""

    _events_path = EVENTS

    def __init__(self, endpoint: Endpoint, *, timeout_s: float, retry_for_s: float, tls: ssl.SSLContext | None) -> None:
        self.endpoint: Final = endpoint
        self._policy = RetryPolicy(total_s=retry_for_s, timeout_s=timeout_s)
        self._tls = (tls or ssl.create_default_context()) if endpoint.tls else None
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def twin(self) -> Self:
        """Make a client like this one with connections of its own, for another event loop."""
        twin = copy.copy(self)
        twin._session = None
        return twin

    async def send(
        self,
        request: ApiRequest[T],
        policy: RetryPolicy | None = None,
        on_retry: Callable[[JobdError], None] | None = None,
    ) -> T:
        """Send `request`, again by the retry policy where that is safe, and give its result. Raises JobdError.

        `on_retry` hears of each error that leads to another try.
        """
        tries = RetryState(policy or self._policy, request, time.monotonic())
        while True:
            try:
                return read_result(request, await self._exchange(request, tries.timeout_s(time.monotonic())))
            except JobdError as error:
                wait_s = tries.wait_s(error, time.monotonic(), random.random())
                if on_retry is not None:
                    on_retry(error)
            await asyncio.sleep(wait_s)

    def events(
        self,
        *,
        queue: str | Iterable[str] | None = None,
        job_id: str | Iterable[str] | None = None,
        type: str | Iterable[str] | None = None,
        after: int | None = None,
        last: int | None = None,
        follow: bool = True,
        on_lost: Callable[[JobdError], None] | None = None,
    ) -> AsyncIterator[StreamedEvent]:
        """Events as they happen, each once and in order. Goes on for ever, over breaks and restarts of the daemon.

        `queue`, `job_id`, `type` (a name, or several): only these. It begins now; with `after` behind the event of that
        `seq`; with `last` up to so many events ago. With `follow` False it ends where the journal does. The first
        connection is tried as other calls are, a later one until it succeeds; `on_lost` hears of each that is lost.
        Raises EventsGone where events behind `after` are no longer in the journal: read the state anew, then listen.
        """
        asked = EventSubscription(
            self._events_path, queue=queue, job_id=job_id, type=type, after=after, last=last, follow=follow
        )
        return self._listen(asked, on_lost)

    async def _listen(
        self, listening: EventSubscription, on_lost: Callable[[JobdError], None] | None
    ) -> AsyncIterator[StreamedEvent]:
        request = listening.request()
        tries = RetryState(self._policy, request, time.monotonic())
        while True:
            try:
                async with contextlib.aclosing(self._pieces(listening, request)) as pieces:
                    async for piece in pieces:
                        tries = RetryState(RECONNECT, request, time.monotonic())
                        for event in listening.read(piece):
                            yield event
                if not listening.follow:
                    return
                raise Unreachable(f"The daemon at {self.endpoint} ended the stream of events.")
            except JobdError as error:
                wait_s = tries.wait_s(error, time.monotonic(), random.random())
                if on_lost is not None:
                    on_lost(error)
            await asyncio.sleep(wait_s)
            request = listening.request()

    async def _pieces(self, listening: EventSubscription, request: ApiRequest[Any]) -> AsyncGenerator[bytes]:
        """What comes over one connection, as it comes."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=SILENCE_S)
        try:
            async with self._open(request, timeout) as response:
                body = await response.read() if response.status >= 400 else b""
                listening.begin(ApiResponse(response.status, _lower(response), body))
                while piece := await response.content.readany():
                    yield piece
        except _BROKEN as error:
            raise self._unreachable(error) from error

    async def _exchange(self, request: ApiRequest[Any], timeout_s: float) -> ApiResponse:
        """One try. An idle connection that the daemon has closed meanwhile is replaced once, in silence."""
        try:
            return await self._talk(request, timeout_s)
        except _STALE as error:
            if not request.repeatable:
                raise self._unreachable(error) from error
        except _BROKEN as error:
            raise self._unreachable(error) from error
        try:
            return await self._talk(request, timeout_s)
        except _BROKEN as error:
            raise self._unreachable(error) from error

    async def _talk(
        self, request: ApiRequest[Any], timeout_s: float, data: AsyncIterator[bytes] | None = None
    ) -> ApiResponse:
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(_CONNECT_S, timeout_s))
        async with self._open(request, timeout, data) as response:
            return ApiResponse(response.status, _lower(response), await response.read())

    def _open(
        self, request: ApiRequest[Any], timeout: aiohttp.ClientTimeout, data: AsyncIterator[bytes] | None = None
    ) -> Any:
        url = URL(f"{self.endpoint.origin}{request.path}", encoded=True)
        headers = {"Accept-Encoding": "identity", **request.headers, **self.endpoint.headers}
        body = None if request.body is None else io.BytesIO(request.body)  # bytes of over 1 MiB make aiohttp warn
        return self._connected().request(
            request.method, url, data=data or body, headers=headers, timeout=timeout, allow_redirects=False
        )

    def _connected(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector: aiohttp.BaseConnector
            # No limit: a hundred parked claims must not keep an extension waiting.
            if self.endpoint.path is not None:
                connector = aiohttp.UnixConnector(self.endpoint.path, limit=0, keepalive_timeout=_IDLE_S)
            else:
                connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S, ssl=self._tls or True)
            self._session = aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False
            )
        return self._session

    def _unreachable(self, error: BaseException) -> Unreachable:
        said = "no answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
        return Unreachable(f"The daemon at {self.endpoint} cannot be reached: {said}.")


def _lower(response: aiohttp.ClientResponse) -> dict[str, str]:
    return {name.lower(): value for name, value in response.headers.items()}


def _method(build: Callable[P, ApiRequest[T]]) -> Callable[Concatenate[_AsyncClient, P], Coroutine[Any, Any, T]]:
    """A client's method that sends what `build` makes: same arguments, same text, the result itself."""

    @functools.wraps(build)
    async def method(self: _AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.send(build(*args, **kwargs))

    return signed(method, build)


def _pages(
    build: Callable[P, ApiRequest[JobInfoPage]],
) -> Callable[Concatenate[_AsyncClient, P], AsyncIterator[JobInfo]]:
    """The method that walks through all pages of a list."""

    async def method(self: _AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[JobInfo]:
        """Every job that matches, newest first, page by page. Asks as `list_jobs` does; `limit` is that of a page."""
        while True:
            page = await self.send(build(*args, **kwargs))
            for job in page.jobs:
                yield job
            if page.next_cursor is None:
                return
            kwargs["cursor"] = page.next_cursor

    return signed(method, build)


def _all_queues(page: worker_requests.QueuePage) -> Callable[[_AsyncClient], AsyncIterator[QueueView]]:
    """Build the method that reads all pages of queues."""

    async def iterate_queues(self: _AsyncClient) -> AsyncIterator[QueueView]:
        """Iterate over all queues by name: counts by status, the oldest due job, and the pause if there is one."""
        cursor = None
        while True:
            found = await self.send(page(cursor=cursor))
            for queue in found:
                yield queue
            if len(found) < MAX_PAGE:
                return
            cursor = found[-1].name

    return iterate_queues


class AsyncJobClient(_AsyncClient):
    """The worker API for asyncio: JobClient with every method a coroutine. See there for the arguments."""

    def __init__(
        self,
        endpoint: str | Endpoint | None = None,
        *,
        token: str | None = None,
        timeout_s: float = 30.0,
        retry_for_s: float = 30.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(worker_endpoint(endpoint, token), timeout_s=timeout_s, retry_for_s=retry_for_s, tls=tls)

    create_job = _method(worker_requests.create_job)
    create_jobs = _method(worker_requests.create_jobs)
    get_job = _method(worker_requests.get_job)
    list_jobs = _method(worker_requests.list_jobs)
    timeline = _method(worker_requests.timeline)
    why = _method(worker_requests.why)
    validate_job_state = _method(worker_requests.validate_job_state)
    start_processing = _method(worker_requests.start_processing)
    claim = _method(worker_requests.claim)
    update_progress = _method(worker_requests.update_progress)
    extend_job_lock = _method(worker_requests.extend_job_lock)
    complete_job = _method(worker_requests.complete_job)
    fail_job = _method(worker_requests.fail_job)
    release_job = _method(worker_requests.release_job)
    cancel_job = _method(worker_requests.cancel_job)
    queues = _method(worker_requests.queues)
    iterate_queues = _all_queues(worker_requests.queues)
    workers = _method(worker_requests.workers)
    worker_page = _method(worker_requests.worker_page)
    iterate_jobs = _pages(worker_requests.list_jobs)

    def stream(self) -> StreamClient:
        """The same calls over one stream: many at a time, and none waits for a connection or a commit of its own.

        async with client.stream() as jobs:
            await asyncio.gather(*(jobs.create_job(n) for n in range(1_000)))
        """
        return StreamClient(self)


class StreamClient(AsyncJobClient):
    """AsyncJobClient over a stream of commands; made by its `stream`. For many calls at a time (asyncio.gather, tasks).

    Claims that wait, lists, timelines and whatever else a stream does not take go as they always do. Where the stream
    breaks, calls are tried again over a new one, as their client would.
    """

    def __init__(self, client: AsyncJobClient) -> None:
        super().__init__(client.endpoint, tls=client._tls)
        self._policy = client._policy
        self._pipe = CommandStream(self._open_stream)

    def twin(self) -> Self:
        twin = super().twin()
        twin._pipe = CommandStream(twin._open_stream)
        return twin

    async def close(self) -> None:
        """End the stream, when what was sent has been answered, and close all connections."""
        await self._pipe.close()
        await super().close()

    async def _exchange(self, request: ApiRequest[Any], timeout_s: float) -> ApiResponse:
        line = command_line(request)
        return await (super()._exchange(request, timeout_s) if line is None else self._pipe.exchange(line, timeout_s))

    def _open_stream(self, request: ApiRequest[Any], data: AsyncIterator[bytes]) -> Any:
        return self._open(request, aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S), data)


class AsyncAdminClient(_AsyncClient):
    """The admin API for asyncio: AdminClient with every method a coroutine. See there for the arguments."""

    _events_path = ADMIN_EVENTS

    def __init__(
        self,
        endpoint: str | Endpoint | None = None,
        *,
        token: str | None = None,
        operator: str | None = None,
        timeout_s: float = 30.0,
        retry_for_s: float = 30.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(
            admin_endpoint(endpoint, token, operator=operator), timeout_s=timeout_s, retry_for_s=retry_for_s, tls=tls
        )

    stats = _method(admin_requests.stats)
    health = _method(admin_requests.health)
    force_cleanup = _method(admin_requests.force_cleanup)
    cleanup_state = _method(admin_requests.cleanup_state)
    detect_and_recover_stuck_jobs = _method(admin_requests.detect_and_recover_stuck_jobs)
    validate_job = _method(admin_requests.validate_job)
    force_fail = _method(admin_requests.force_fail)
    force_reset = _method(admin_requests.force_reset)
    transition_job_state = _method(admin_requests.transition_job_state)
    extend_lock = _method(admin_requests.extend_lock)
    release_lock = _method(admin_requests.release_lock)
    cancel_job = _method(admin_requests.cancel_job)
    run_now = _method(admin_requests.run_now)
    update_job = _method(admin_requests.update_job)
    late_results = _method(admin_requests.late_results)
    adopt = _method(admin_requests.adopt)
    delete_job = _method(admin_requests.delete_job)
    list_jobs = _method(admin_requests.list_jobs)
    get_job = _method(admin_requests.get_job)
    timeline = _method(admin_requests.timeline)
    why = _method(admin_requests.why)
    locks = _method(admin_requests.locks)
    queues = _method(admin_requests.queues)
    iterate_queues = _all_queues(admin_requests.queues)
    workers = _method(admin_requests.workers)
    worker_page = _method(admin_requests.worker_page)
    take_back = _method(admin_requests.take_back)
    reports = _method(admin_requests.reports)
    audit = _method(admin_requests.audit)
    failures = _method(admin_requests.failures)
    preview = _method(admin_requests.preview)
    make_plan = _method(admin_requests.make_plan)
    get_plan = _method(admin_requests.get_plan)
    apply_plan = _method(admin_requests.apply_plan)
    alerts = _method(admin_requests.alerts)
    pause_queue = _method(admin_requests.pause_queue)
    resume_queue = _method(admin_requests.resume_queue)
    webhooks = _method(admin_requests.webhooks)
    deliveries = _method(admin_requests.deliveries)
    deliver_again = _method(admin_requests.deliver_again)
    deliver_all_again = _method(admin_requests.deliver_all_again)
    test_webhook = _method(admin_requests.test_webhook)
    clock = _method(admin_requests.clock)
    accept_clock = _method(admin_requests.accept_clock)
    quarantine = _method(admin_requests.quarantine)
    backups = _method(admin_requests.backups)
    check_rows = _method(admin_requests.check_rows)
    metrics = _method(admin_requests.metrics)
    export_page = _method(admin_requests.export_page)
    iterate_jobs = _pages(admin_requests.list_jobs)

    async def export_jobs(
        self, *, status: Status | None = None, queue: str | None = None, kind: str | None = None
    ) -> AsyncIterator[bytes]:
        """Every job that matches as a line of JSON, oldest first, for import_jobs. It asks page by page.

        Each is as it was when its page was read; what was created before the first page is there, unless it was
        deleted meanwhile.
        """
        cursor = None
        while True:
            page = await self.export_page(status=status, queue=queue, kind=kind, cursor=cursor)
            for line in page.lines:
                yield line
            if page.next_cursor is None:
                return
            cursor = page.next_cursor

    async def import_jobs(self, jobs: Iterable[Mapping[str, Any] | bytes | str]) -> admin_requests.ImportResult:
        """Move jobs in, of any status and with their own times: mappings, or ready lines of JSON.

        Each is created or refused by itself, an id that exists is skipped, so an import that broke off may simply be
        run again. It is not tried again by itself.
        """
        return await self._send_lines(admin_requests.import_jobs(), jobs)

    async def preview_import(self, jobs: Iterable[Mapping[str, Any] | bytes | str]) -> admin_requests.ImportForeseen:
        """What import_jobs would do with the same lines, line by line. Nothing is done."""
        return await self._send_lines(admin_requests.preview_import(), jobs)

    async def _send_lines(self, request: ApiRequest[T], jobs: Iterable[Mapping[str, Any] | bytes | str]) -> T:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=self._policy.timeout_s)
        try:
            async with self._open(request, timeout, _poured(jobs)) as response:
                reply = ApiResponse(response.status, _lower(response), await response.read())
        except _BROKEN as error:
            raise self._unreachable(error) from error
        return read_result(request, reply)

    async def backup(self, file: BinaryIO, *, told: Told | None = None) -> int:
        """Write a copy of the database, as it is now, to `file` (in a thread); gives its bytes.

        `told` hears twice a second how far it is: it is copied, checked, sent. It may take as long as it moves;
        `timeout_s` is the time that it may be silent. Raises Unreachable where it is silent for longer, and where the
        stream broke off: what was written is no backup then. An error of `file` is raised as it is.
        """
        patience = StallTimeout(uuid7(), told, self._policy.timeout_s, time.monotonic())
        opening = asyncio.ensure_future(self._opened(admin_requests.backup(patience.id), None))
        try:
            while not (await asyncio.wait([opening], timeout=LOOK_S))[0]:
                await self._look(patience)
        except BaseException:
            opening.cancel()
            await asyncio.wait([opening])
            raise
        return await self._save(opening.result(), file, patience)

    async def _look(self, patience: StallTimeout) -> None:
        once = RetryPolicy(total_s=0, timeout_s=min(patience.silence_s, self._policy.timeout_s))
        with contextlib.suppress(JobdError):  # then it is silent
            patience.look(await self.send(admin_requests.backups(), once), time.monotonic())
        if patience.is_over(time.monotonic()):
            raise Unreachable(f"The daemon at {self.endpoint}: {patience.words()}")

    async def download_artifact(self, job_id: str, file: BinaryIO, late_result: int | None = None) -> int:
        """Write what lies in the store of artifacts under the job's `storage_key` to `file` (in a thread); its bytes.

        With `late_result`, the `seq` of one, that under the key of this. Raises JobNotFound, LateResultNotFound,
        NotFound (no store, no key, or nothing under it), StorageUnavailable, and Unreachable where it broke off: what
        was written is not all of it then. An error of `file` is raised as it is.
        """
        return await self._download(admin_requests.download_artifact(job_id, late_result), file)

    async def _download(self, request: ApiRequest[bytes], file: BinaryIO) -> int:
        return await self._save(await self._opened(request, self._policy.timeout_s), file)

    async def _opened(self, request: ApiRequest[bytes], silence_s: float | None) -> aiohttp.ClientResponse:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=silence_s)
        try:
            response: aiohttp.ClientResponse = await self._open(request, timeout)
        except _BROKEN as error:
            raise self._unreachable(error) from error
        return response

    async def _save(
        self, response: aiohttp.ClientResponse, file: BinaryIO, patience: StallTimeout | None = None
    ) -> int:
        copied, total = 0, response.content_length
        async with response:
            if response.status >= 400:
                raise_error(ApiResponse(response.status, _lower(response), await self._piece(response, -1)))
            while piece := await self._piece(response, _PIECE_BYTES):
                copied += await asyncio.to_thread(file.write, piece)
                if patience is not None:
                    patience.received(copied, total)
        return copied

    async def _piece(self, response: aiohttp.ClientResponse, size: int) -> bytes:
        try:
            async with asyncio.timeout(self._policy.timeout_s):
                return await response.content.read(size)
        except _BROKEN as error:
            raise self._unreachable(error) from error


async def _poured(jobs: Iterable[Mapping[str, Any] | bytes | str]) -> AsyncIterator[bytes]:
    """The jobs as pieces of a body. They may come from a file, so they are read in a thread."""
    pieces = json_lines(iter(jobs))
    while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
        yield piece
