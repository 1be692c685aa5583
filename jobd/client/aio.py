"""The asyncio clients of both APIs, over aiohttp."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, Final, Self

import aiohttp
from yarl import URL

from jobd.client.api_request import ApiRequest, ApiResponse, T, lower_headers, read_result
from jobd.client.apis import IDLE_S, AdminApi, BaseClient, WorkerApi, unreachable
from jobd.client.command_stream import CommandStream, command_line, is_large
from jobd.client.endpoint import Endpoint
from jobd.client.errors import JobdError, Unreachable
from jobd.client.event_subscription import RECONNECT, EventSubscription
from jobd.client.job_wait import JobWait
from jobd.client.methods import P, PageWalk, command_of, described
from jobd.client.retries import RetryOptions, RetryState
from jobd.model.api_call import ApiCall
from jobd.model.events import StreamedEvent
from jobd.model.responses import JobView

PIECE_BYTES: Final = 64 << 10
# Errors that aiohttp raises if a connection cannot be made or breaks.
_CONNECTION_ERRORS: Final = (aiohttp.ClientError, OSError)
# Those among them that it raises for an idle connection that the daemon has closed.
_STALE: Final = (aiohttp.ServerDisconnectedError, ConnectionResetError, BrokenPipeError)


class AsyncClient(BaseClient):
    """A pool of connections, and calls over them. Belongs to the event loop of its first call."""

    def _reset_connections(self) -> None:
        self._sessions: dict[Endpoint, aiohttp.ClientSession] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        sessions, self._sessions = self._sessions, {}
        for session in sessions.values():
            await session.close()

    def twin(self) -> Self:
        """Return a client for another event loop, with the same settings and its own connections."""
        twin = copy.copy(self)
        twin._reset_connections()
        return twin

    def method(self, call: ApiCall[P, T], /) -> Callable[P, Coroutine[Any, Any, T]]:
        """Return the method that sends the request of `call`."""

        async def send(*args: P.args, **kwargs: P.kwargs) -> T:
            return await self.send(self._request(call, command_of(call, args, kwargs)))

        return described(send, call)

    async def send(
        self,
        request: ApiRequest[T],
        retry: RetryOptions | None = None,
        on_retry: Callable[[JobdError], object] | None = None,
    ) -> T:
        """Send `request`, with retries if that is safe, and return its result. Raises JobdError."""
        state = self._attempts(request, retry)
        while True:
            try:
                response = await self._exchange(state.endpoint, request, state.timeout_s(time.monotonic()))
                result = read_result(request, response)
            except JobdError as error:
                wait_s = self._wait_s(state, error, on_retry or self.on_retry)
            else:
                state.served()
                return result
            await asyncio.sleep(wait_s)

    async def iterate(self, pages: PageWalk[T]) -> AsyncIterator[T]:
        """Iterate over the items of all pages."""
        cursor: str | None = None
        while True:
            page = await self.send(pages.request(cursor))
            for item in pages.items(page):
                yield item
            cursor = page.next_cursor
            if cursor is None:
                return

    async def listen(self, subscription: EventSubscription) -> AsyncIterator[StreamedEvent]:
        """Iterate over the events of a subscription. Reconnects if the connection is lost."""
        request = subscription.request()
        state = self._attempts(request)
        while True:
            try:
                async with contextlib.aclosing(self._event_chunks(subscription, request, state)) as chunks:
                    async for chunk in chunks:
                        state.served()
                        state = self._attempts(request, RECONNECT)
                        for event in subscription.read(chunk):
                            yield event
                if not subscription.follow:
                    return
                raise Unreachable(f"The daemon at {state.endpoint} ended the stream of events.")
            except JobdError as error:
                wait_s = self._wait_s(state, error, subscription.on_lost)
            await asyncio.sleep(wait_s)
            request = subscription.request()

    async def _event_chunks(
        self, subscription: EventSubscription, request: ApiRequest[Any], state: RetryState
    ) -> AsyncGenerator[bytes]:
        endpoint, silence_s = state.endpoint, self._silence_s
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._connect_s, sock_read=silence_s)
        head_s = None if self._nodes.is_single else min(silence_s, state.timeout_s(time.monotonic()))
        try:
            async with contextlib.AsyncExitStack() as stack:
                async with asyncio.timeout(head_s):
                    response = await stack.enter_async_context(self._open(endpoint, request, timeout))
                body = await response.read() if response.status >= 400 else b""
                subscription.begin(ApiResponse(response.status, lower_headers(response.headers.items()), body))
                while chunk := await response.content.readany():
                    yield chunk
        except _CONNECTION_ERRORS as error:
            raise _unreachable(endpoint, error) from error

    async def _exchange(self, endpoint: Endpoint, request: ApiRequest[Any], timeout_s: float) -> ApiResponse:
        """Send `request` once. If the daemon has closed the idle connection, repeat it on a new one."""
        try:
            try:
                return await self._exchange_over_http(endpoint, request, timeout_s)
            except _STALE:
                if not request.repeatable:
                    raise
            return await self._exchange_over_http(endpoint, request, timeout_s)
        except _CONNECTION_ERRORS as error:
            raise _unreachable(endpoint, error) from error

    async def _exchange_over_http(self, endpoint: Endpoint, request: ApiRequest[Any], timeout_s: float) -> ApiResponse:
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(self._connect_s, timeout_s))
        async with self._open(endpoint, request, timeout) as response:
            return ApiResponse(response.status, lower_headers(response.headers.items()), await response.read())

    def _open(
        self,
        endpoint: Endpoint,
        request: ApiRequest[Any],
        timeout: aiohttp.ClientTimeout,
        data: AsyncIterator[bytes] | None = None,
    ) -> Any:
        url = URL(f"{endpoint.origin}{request.path}", encoded=True)
        headers = {"Accept-Encoding": "identity", **request.headers, **endpoint.headers}
        body: Any = request.body
        if request.body is not None and is_large(request):
            body = _pieces(request.body)  # aiohttp warns about bytes of over 1 MiB, and copies io.BytesIO first
            headers["Content-Length"] = str(len(request.body))
        return self._session(endpoint).request(
            request.method,
            url,
            data=data or body,
            headers=headers,
            timeout=timeout,
            allow_redirects=False,
            expect100=is_large(request),  # a body over the limit might not arrive within the timeout
        )

    def _session(self, endpoint: Endpoint) -> aiohttp.ClientSession:
        session = self._sessions.get(endpoint)
        if session is None:
            connector: aiohttp.BaseConnector
            # No limit, because a hundred waiting claims must not delay an extension.
            if endpoint.path is not None:
                connector = aiohttp.UnixConnector(endpoint.path, limit=0, keepalive_timeout=IDLE_S)
            else:
                connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S, ssl=self._tls or True)
            session = self._sessions[endpoint] = aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False
            )
        return session


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), PIECE_BYTES):
        yield body[start : start + PIECE_BYTES]


def _unreachable(endpoint: Endpoint, error: Exception) -> Unreachable:
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        error = OSError("no connection in time")
    return unreachable(endpoint, error)


class AsyncJobClient(WorkerApi, AsyncClient):
    """The worker API for asyncio: JobClient with coroutines as methods. The arguments are the same."""

    def stream(self) -> StreamClient:
        """Return a client that sends its calls over one stream, where they share a connection and commits.

        async with client.stream() as jobs:
            await asyncio.gather(*(jobs.create_job(n) for n in range(1_000)))
        """
        return StreamClient(self)

    async def wait_for_job(
        self, job_id: str, *, timeout_s: float | None = None, on_poll: Callable[[JobView], object] | None = None
    ) -> JobView:
        """Wait until the job is finished, and return it, as JobClient does."""
        wait = JobWait(timeout_s, time.monotonic(), polls=on_poll is not None)
        while True:
            try:
                now_s = time.monotonic()
                job = await self.send(wait.request(job_id, now_s), wait.retry(self._retry, now_s))
            except Unreachable as error:
                wait.check_deadline(job_id, error, time.monotonic())
                raise
            if wait.is_over(job, time.monotonic()):
                return job
            if on_poll is not None:
                on_poll(job)


class StreamClient(AsyncJobClient):
    """AsyncJobClient over a stream of commands, made by its `stream`, for many concurrent calls.

    Calls that a stream does not support, such as claims that wait, lists and timelines, use separate requests. If the
    stream breaks, calls are retried over a new stream by the same rules.
    """

    def __init__(self, client: AsyncJobClient) -> None:
        super().__init__(client.endpoints, tls=client._tls)
        self._retry = client._retry

    def _reset_connections(self) -> None:
        super()._reset_connections()
        self._streams: dict[Endpoint, CommandStream] = {}

    async def close(self) -> None:
        """End the stream after all responses have arrived, and close all connections."""
        streams, self._streams = self._streams, {}
        await asyncio.gather(*(stream.close() for stream in streams.values()))
        await super().close()

    async def _exchange(self, endpoint: Endpoint, request: ApiRequest[Any], timeout_s: float) -> ApiResponse:
        line = command_line(request)
        if line is None:
            return await super()._exchange(endpoint, request, timeout_s)
        stream = self._streams.get(endpoint)
        if stream is None:
            stream = self._streams[endpoint] = CommandStream(functools.partial(self._open_stream, endpoint))
        return await stream.exchange(line, timeout_s)

    def _open_stream(self, endpoint: Endpoint, request: ApiRequest[Any], data: AsyncIterator[bytes]) -> Any:
        return self._open(endpoint, request, aiohttp.ClientTimeout(total=None, sock_connect=self._connect_s), data)


class AsyncAdminClient(AdminApi, AsyncClient):
    """The admin API for asyncio: AdminClient with coroutines as methods. The arguments are the same.

    Only AdminClient has import_jobs, preview_import, backup and download_artifact. Call them with asyncio.to_thread.
    """
