"""The blocking client of the worker API, over http.client. It is thread-safe."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, Final, Self

from jobd.client.api_request import ApiRequest, ApiResponse, T, lower_headers, read_result
from jobd.client.apis import CHUNK_BYTES, CONNECT_S, IDLE_S, BaseClient, WorkerApi, unreachable
from jobd.client.endpoint import Endpoint
from jobd.client.errors import JobdError, Unreachable
from jobd.client.event_subscription import RECONNECT, EventSubscription
from jobd.client.job_wait import JobWait
from jobd.client.methods import P, PageWalk, command_of, described
from jobd.client.retries import RetryOptions, RetryState
from jobd.model.api_call import ApiCall
from jobd.model.events import StreamedEvent
from jobd.model.responses import JobView

_IDLE_CONNECTIONS: Final = 8
CONNECTION_ERRORS: Final = (OSError, http.client.HTTPException)


class DaemonConnection(http.client.HTTPConnection):
    """A connection to `endpoint`: a Unix socket, TCP, or TLS."""

    def __init__(self, endpoint: Endpoint, tls: ssl.SSLContext | None) -> None:
        super().__init__(endpoint.host, endpoint.port or 80, timeout=CONNECT_S)
        self.endpoint = endpoint
        self._tls = tls if endpoint.tls else None
        self._parts: list[bytes] | None = None
        self.idle_since_s = 0.0

    def request_at_once(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> None:
        """Send a request in one write. http.client would send the body separately, and the daemon would wait for it."""
        parts: list[bytes] = []
        self._parts = parts
        try:
            self.request(method, path, body, headers)
        finally:
            self._parts = None
        self.send(b"".join(parts))

    def send(self, data: Any) -> None:
        if self._parts is None:
            super().send(data)
        else:
            self._parts.append(data)

    def connect(self) -> None:
        try:
            if self.endpoint.path is not None:
                self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self.sock.settimeout(self.timeout)
                self.sock.connect(self.endpoint.path)
                return
            super().connect()
            if self._tls is not None:
                self.sock = self._tls.wrap_socket(self.sock, server_hostname=self.endpoint.host)
        except TimeoutError as error:
            raise OSError("no connection in time") from error


class BlockingClient(BaseClient):
    """A pool of idle connections, and calls over them. Every method is thread-safe."""

    def _reset_connections(self) -> None:
        self._guard = threading.Lock()
        self._idle: list[DaemonConnection] = []
        self._is_closed = False
        self._pid = os.getpid()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the idle connections. Calls of other threads continue."""
        with self._guard:
            idle, self._idle, self._is_closed = self._idle, [], True
        for connection in idle:
            connection.close()

    def method(self, call: ApiCall[P, T], /) -> Callable[P, T]:
        """Return the method that sends the request of `call`."""

        def send(*args: P.args, **kwargs: P.kwargs) -> T:
            return self.send(self._request(call, command_of(call, args, kwargs)))

        return described(send, call)

    def send(self, request: ApiRequest[T], retry: RetryOptions | None = None) -> T:
        """Send `request`, with retries if that is safe, and return its result. Raises JobdError."""
        state = self._attempts(request, retry)
        while True:
            try:
                response = self._exchange(state.endpoint, request, state.timeout_s(time.monotonic()))
                result = read_result(request, response)
            except JobdError as error:
                wait_s = self._wait_s(state, error, self.on_retry)
            else:
                state.served()
                return result
            time.sleep(wait_s)

    def iterate(self, pages: PageWalk[T]) -> Iterator[T]:
        """Iterate over the items of all pages."""
        page = self.send(pages.request(None))
        yield from pages.items(page)
        while page.next_cursor is not None:
            page = self.send(pages.request(page.next_cursor))
            yield from pages.items(page)

    def listen(self, subscription: EventSubscription) -> Generator[StreamedEvent, None, None]:
        """Iterate over the events of a subscription. Reconnects if the connection is lost."""
        request = subscription.request()
        state = self._attempts(request)
        while True:
            try:
                for chunk in self._event_chunks(subscription, request, state):
                    state.served()
                    state = self._attempts(request, RECONNECT)
                    yield from subscription.read(chunk)
                if not subscription.follow:
                    return
                raise Unreachable(f"The daemon at {state.endpoint} ended the stream of events.")
            except JobdError as error:
                wait_s = self._wait_s(state, error, subscription.on_lost)
            time.sleep(wait_s)
            request = subscription.request()

    def _event_chunks(
        self, subscription: EventSubscription, request: ApiRequest[Any], state: RetryState
    ) -> Iterator[bytes]:
        connection = DaemonConnection(state.endpoint, self._tls)
        silence_s = self._silence_s
        try:
            head_s = silence_s if self._nodes.is_single else min(silence_s, state.timeout_s(time.monotonic()))
            self._write(connection, request, head_s)
            stream = connection.sock  # the response takes it from the connection
            response = connection.getresponse()
            stream.settimeout(silence_s)
            body = response.read() if response.status >= 400 else b""
            subscription.begin(ApiResponse(response.status, lower_headers(response.getheaders()), body))
            while chunk := response.read1(CHUNK_BYTES):
                yield chunk
        except CONNECTION_ERRORS as error:
            raise unreachable(connection.endpoint, error) from error
        finally:
            connection.close()

    def _exchange(self, endpoint: Endpoint, request: ApiRequest[Any], timeout_s: float) -> ApiResponse:
        """Send `request` once. If the daemon has closed the idle connection, repeat it on a new one."""
        idle = self._take_idle(endpoint) if request.repeatable else None
        try:
            if idle is not None:
                with contextlib.suppress(ConnectionError):
                    return self._exchange_over(idle, request, timeout_s)
            return self._exchange_over(DaemonConnection(endpoint, self._tls), request, timeout_s)
        except CONNECTION_ERRORS as error:
            raise unreachable(endpoint, error) from error

    def _exchange_over(self, connection: DaemonConnection, request: ApiRequest[Any], timeout_s: float) -> ApiResponse:
        try:
            head = self._write(connection, request, timeout_s).getresponse()
            response = ApiResponse(head.status, lower_headers(head.getheaders()), head.read())
        except BaseException:  # also KeyboardInterrupt: the next call would read the rest of this response
            connection.close()
            raise
        self._keep(connection)
        return response

    def _write(
        self,
        connection: DaemonConnection,
        request: ApiRequest[Any],
        timeout_s: float,
        body: Iterator[bytes] | None = None,
    ) -> DaemonConnection:
        """Send `request`, and return the connection. The response may take `timeout_s`."""
        if connection.sock is None:
            connection.timeout = min(self._connect_s, timeout_s)
            connection.connect()
        connection.sock.settimeout(timeout_s)
        headers = {**request.headers, **connection.endpoint.headers}
        path = connection.endpoint.prefix + request.path
        if body is None:
            connection.request_at_once(request.method, path, request.body, headers)
        else:
            connection.request(request.method, path, body, headers, encode_chunked=True)
        return connection

    def _take_idle(self, endpoint: Endpoint) -> DaemonConnection | None:
        """Return the connection to `endpoint` that was used last. Close those that are old or to another node."""
        if self._pid != os.getpid():  # a fork: its parent reads responses from the same sockets
            idle = self._idle
            self._reset_connections()
            for connection in idle:
                connection.close()
        with self._guard:
            while self._idle:
                connection = self._idle.pop()
                if connection.endpoint == endpoint and time.monotonic() - connection.idle_since_s < IDLE_S:
                    return connection
                connection.close()
        return None

    def _keep(self, connection: DaemonConnection) -> None:
        """Keep the connection for the next call, unless it is closed."""
        connection.idle_since_s = time.monotonic()
        with self._guard:
            if connection.sock is not None and not self._is_closed and len(self._idle) < _IDLE_CONNECTIONS:
                self._idle.append(connection)
                return
        connection.close()


class JobClient(WorkerApi, BlockingClient):
    """The worker API for blocking code. Times are Unix ms, durations `*_ms` milliseconds.

    `endpoint` is `unix:/path`, `http://host:port`, or None for $JOBD_SOCKET, $JOBD_URL or the daemon's default. If jobd
    runs on several machines, it is the list of their URLs: a sequence, or text with commas. Calls then go to the
    leader, and wait for a takeover as below. The timeline of a job that the client cancels has its `name`.

    While the daemon is unreachable or overloaded, calls are retried if that is safe, for `retry_for_s` seconds in total
    (0: no retries). `timeout_s` limits the wait for one response. Every method raises JobdError, usually one of the
    subclasses that its documentation names. Close the client, or use it as a context manager.
    """

    def wait_for_job(
        self, job_id: str, *, timeout_s: float | None = None, on_poll: Callable[[JobView], object] | None = None
    ) -> JobView:
        """Wait until the job is finished, and return it. Its `status` says how it ended.

        The daemon responds when the job ends. `on_poll` is called once a second until then. Raises TimeoutError if the
        job is not known to be finished after `timeout_s` seconds (None: no limit), JobNotFound, Unreachable.
        """
        wait = JobWait(timeout_s, time.monotonic(), polls=on_poll is not None)
        while True:
            try:
                now_s = time.monotonic()
                job = self.send(wait.request(job_id, now_s), wait.retry(self._retry, now_s))
            except Unreachable as error:
                wait.check_deadline(job_id, error, time.monotonic())
                raise
            if wait.is_over(job, time.monotonic()):
                return job
            if on_poll is not None:
                on_poll(job)
