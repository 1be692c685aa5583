"""Blocking clients over http.client, safe to use from many threads: JobClient for workers, AdminClient for operators.

Says nothing about the calls themselves: those are in calls.py and admin_calls.py.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from types import TracebackType
from typing import Any, BinaryIO, Concatenate, Final, ParamSpec, Self, TypeVar

from jobd.client import admin_requests, worker_requests
from jobd.client.backup_progress import LOOK_S, StallTimeout, Told
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
_IDLE_CONNECTIONS: Final = 8
_PIECE_BYTES: Final = 256 << 10


class _HttpConnection(http.client.HTTPConnection):
    """A connection to `endpoint`: a Unix socket, TCP, or TLS."""

    def __init__(self, endpoint: Endpoint, tls: ssl.SSLContext | None) -> None:
        super().__init__(endpoint.host, endpoint.port or 80, timeout=_CONNECT_S)
        self._endpoint = endpoint
        self._tls = tls
        self._held: list[bytes] | None = None
        self.idle_since_s = 0.0

    def ask(self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> None:
        """Send a request in one piece. http.client sends the body by itself: then the daemon has to wait for it."""
        held: list[bytes] = []
        self._held = held
        try:
            self.request(method, path, body, headers)
        finally:
            self._held = None
        self.send(b"".join(held))

    def send(self, data: Any) -> None:
        if self._held is None:
            super().send(data)
        else:
            self._held.append(data)

    def connect(self) -> None:
        if self._endpoint.path is not None:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.settimeout(_CONNECT_S)
            self.sock.connect(self._endpoint.path)
            return
        super().connect()
        if self._tls is not None:
            self.sock = self._tls.wrap_socket(self.sock, server_hostname=self._endpoint.host)


class _Client:
    """Idle connections to one listener, and the calls over them. Every method may be called from any thread."""

    _events_path = EVENTS

    def __init__(self, endpoint: Endpoint, *, timeout_s: float, retry_for_s: float, tls: ssl.SSLContext | None) -> None:
        self.endpoint: Final = endpoint
        self._policy = RetryPolicy(total_s=retry_for_s, timeout_s=timeout_s)
        self._tls = (tls or ssl.create_default_context()) if endpoint.tls else None
        self._guard = threading.Lock()
        self._idle: list[_HttpConnection] = []
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the idle connections. Calls that are under way in other threads end by themselves."""
        with self._guard:
            idle, self._idle, self._is_closed = self._idle, [], True
        for connection in idle:
            connection.close()

    def send(self, request: ApiRequest[T], policy: RetryPolicy | None = None) -> T:
        """Send `request`, again by the retry policy where that is safe, and give its result. Raises JobdError."""
        tries = RetryState(policy or self._policy, request, time.monotonic())
        while True:
            try:
                return read_result(request, self._exchange(request, tries.timeout_s(time.monotonic())))
            except JobdError as error:
                wait_s = tries.wait_s(error, time.monotonic(), random.random())
            time.sleep(wait_s)

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
    ) -> Generator[StreamedEvent, None, None]:
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

    def _listen(
        self, listening: EventSubscription, on_lost: Callable[[JobdError], None] | None
    ) -> Generator[StreamedEvent, None, None]:
        request = listening.request()
        tries = RetryState(self._policy, request, time.monotonic())
        while True:
            try:
                for piece in self._pieces(listening, request):
                    tries = RetryState(RECONNECT, request, time.monotonic())
                    yield from listening.read(piece)
                if not listening.follow:
                    return
                raise Unreachable(f"The daemon at {self.endpoint} ended the stream of events.")
            except JobdError as error:
                wait_s = tries.wait_s(error, time.monotonic(), random.random())
                if on_lost is not None:
                    on_lost(error)
            time.sleep(wait_s)
            request = listening.request()

    def _pieces(self, listening: EventSubscription, request: ApiRequest[Any]) -> Iterator[bytes]:
        """What comes over one connection, as it comes."""
        connection = _HttpConnection(self.endpoint, self._tls)
        try:
            response = self._ask(connection, request, SILENCE_S)
            body = response.read() if response.status >= 400 else b""
            listening.begin(ApiResponse(response.status, _lower(response), body))
            while piece := response.read1(_PIECE_BYTES):
                yield piece
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        finally:
            connection.close()

    def _exchange(self, request: ApiRequest[Any], timeout_s: float) -> ApiResponse:
        """One try. An idle connection that the daemon has closed meanwhile is replaced once, in silence."""
        connection = self._take_idle() if request.repeatable else None
        if connection is not None:
            try:
                return self._talk(connection, request, timeout_s)
            except ConnectionError:
                pass
            except (OSError, http.client.HTTPException) as error:
                raise self._unreachable(error) from error
        try:
            return self._talk(_HttpConnection(self.endpoint, self._tls), request, timeout_s)
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error

    def _talk(self, connection: _HttpConnection, request: ApiRequest[Any], timeout_s: float) -> ApiResponse:
        try:
            response = self._ask(connection, request, timeout_s)
            reply = ApiResponse(response.status, _lower(response), response.read())
        except BaseException:  # an interrupt too: what comes next on this connection is not ours
            connection.close()
            raise
        self._give_back(connection)
        return reply

    def _ask(
        self,
        connection: _HttpConnection,
        request: ApiRequest[Any],
        timeout_s: float,
        body: Iterator[bytes] | None = None,
    ) -> http.client.HTTPResponse:
        self._put(connection, request, timeout_s, body)
        return connection.getresponse()

    def _put(
        self,
        connection: _HttpConnection,
        request: ApiRequest[Any],
        timeout_s: float,
        body: Iterator[bytes] | None = None,
    ) -> None:
        """Send it; its answer may take `timeout_s`."""
        if connection.sock is None:
            connection.timeout = min(_CONNECT_S, timeout_s)
            connection.connect()
        connection.sock.settimeout(timeout_s)
        headers = {**request.headers, **self.endpoint.headers}
        path = self.endpoint.prefix + request.path
        if body is None:
            connection.ask(request.method, path, request.body, headers)
        else:
            connection.request(request.method, path, body, headers, encode_chunked=True)

    def _take_idle(self) -> _HttpConnection | None:
        with self._guard:
            while self._idle:
                connection = self._idle.pop()
                if time.monotonic() - connection.idle_since_s < _IDLE_S:
                    return connection
                connection.close()
        return None

    def _give_back(self, connection: _HttpConnection) -> None:
        """Keep the connection for the next call, unless the daemon closes it."""
        connection.idle_since_s = time.monotonic()
        with self._guard:
            if connection.sock is not None and not self._is_closed and len(self._idle) < _IDLE_CONNECTIONS:
                self._idle.append(connection)
                return
        connection.close()

    def _unreachable(self, error: Exception) -> Unreachable:
        said = "no answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
        return Unreachable(f"The daemon at {self.endpoint} cannot be reached: {said}.")


def _lower(response: http.client.HTTPResponse) -> dict[str, str]:
    return {name.lower(): value for name, value in response.getheaders()}


def _method(build: Callable[P, ApiRequest[T]]) -> Callable[Concatenate[_Client, P], T]:
    """A client's method that sends what `build` makes: same arguments, same text, the result itself."""

    @functools.wraps(build)
    def method(self: _Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.send(build(*args, **kwargs))

    return signed(method, build)


def _pages(build: Callable[P, ApiRequest[JobInfoPage]]) -> Callable[Concatenate[_Client, P], Iterator[JobInfo]]:
    """The method that walks through all pages of a list."""

    def method(self: _Client, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[JobInfo]:
        """Every job that matches, newest first, page by page. Asks as `list_jobs` does; `limit` is that of a page."""
        while True:
            page = self.send(build(*args, **kwargs))
            yield from page.jobs
            if page.next_cursor is None:
                return
            kwargs["cursor"] = page.next_cursor

    return signed(method, build)


def _all_queues(page: worker_requests.QueuePage) -> Callable[[_Client], Iterator[QueueView]]:
    """Build the method that reads all pages of queues."""

    def iterate_queues(self: _Client) -> Iterator[QueueView]:
        """Iterate over all queues by name: counts by status, the oldest due job, and the pause if there is one."""
        cursor = None
        while True:
            found = self.send(page(cursor=cursor))
            yield from found
            if len(found) < MAX_PAGE:
                return
            cursor = found[-1].name

    return iterate_queues


class JobClient(_Client):
    """The worker API for blocking code. Times are Unix ms, durations `*_ms` milliseconds.

    `endpoint` is `unix:/path`, `http://host:port`, or None for $JOBD_SOCKET, $JOBD_URL or the daemon's default.
    A call is tried again, where that is safe, while the daemon is unreachable or overloaded, for `retry_for_s`
    seconds in all (0: never); one answer may take `timeout_s`. Every method raises JobdError, most often one of its
    subclasses: see each. Use it as a context manager, or close it.
    """

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


class AdminClient(_Client):
    """The admin API for blocking code. Times are Unix ms; units of durations are with each result.

    `endpoint` is `http://host:port`, `unix:/path`, or None for $JOBD_ADMIN_URL or http://127.0.0.1:8770; the token
    is $ADMIN_TOKEN or the first line of $ADMIN_TOKEN_FILE if it is not given. `operator` is your name in the audit log
    and in timelines. Otherwise as JobClient.
    """

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

    def export_jobs(
        self, *, status: Status | None = None, queue: str | None = None, kind: str | None = None
    ) -> Iterator[bytes]:
        """Every job that matches as a line of JSON, oldest first, for import_jobs. It asks page by page.

        Each is as it was when its page was read; what was created before the first page is there, unless it was
        deleted meanwhile.
        """
        cursor = None
        while True:
            page = self.export_page(status=status, queue=queue, kind=kind, cursor=cursor)
            yield from page.lines
            if page.next_cursor is None:
                return
            cursor = page.next_cursor

    def import_jobs(self, jobs: Iterable[Mapping[str, Any] | bytes | str]) -> admin_requests.ImportResult:
        """Move jobs in, of any status and with their own times: mappings, or ready lines of JSON.

        Each is created or refused by itself, an id that exists is skipped, so an import that broke off may simply be
        run again. It is not tried again by itself. `timeout_s` is the time that one piece may take.
        """
        return self._send_lines(admin_requests.import_jobs(), jobs)

    def preview_import(self, jobs: Iterable[Mapping[str, Any] | bytes | str]) -> admin_requests.ImportForeseen:
        """What import_jobs would do with the same lines, line by line. Nothing is done."""
        return self._send_lines(admin_requests.preview_import(), jobs)

    def _send_lines(self, request: ApiRequest[T], jobs: Iterable[Mapping[str, Any] | bytes | str]) -> T:
        connection = _HttpConnection(self.endpoint, self._tls)
        try:
            return read_result(request, self._pour(connection, request, json_lines(iter(jobs))))
        finally:
            connection.close()

    def _pour(self, connection: _HttpConnection, request: ApiRequest[Any], pieces: Iterator[bytes]) -> ApiResponse:
        """Send a stream. A daemon that refuses it may answer and close before the end: then that is the answer."""
        try:
            try:
                response = self._ask(connection, request, self._policy.timeout_s, pieces)
            except (BrokenPipeError, ConnectionResetError):
                if connection.sock is None:
                    raise
                response = http.client.HTTPResponse(connection.sock, method=request.method)
                response.begin()
            return ApiResponse(response.status, _lower(response), response.read())
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error

    def backup(self, file: BinaryIO, *, told: Told | None = None) -> int:
        """Write a copy of the database, as it is now, to `file`; gives its bytes.

        `told` hears twice a second how far it is: it is copied, checked, sent. It may take as long as it moves;
        `timeout_s` is the time that it may be silent. Raises Unreachable where it is silent for longer, and where the
        stream broke off: what was written is no backup then. An error of `file` is raised as it is.
        """
        patience = StallTimeout(uuid7(), told, self._policy.timeout_s, time.monotonic())
        connection = _HttpConnection(self.endpoint, self._tls)
        try:
            response = self._awaited(connection, admin_requests.backup(patience.id), patience)
            return self._save(response, file, patience)
        finally:
            connection.close()

    def _awaited(
        self, connection: _HttpConnection, request: ApiRequest[Any], patience: StallTimeout
    ) -> http.client.HTTPResponse:
        """The head of the answer, however long it takes, while what it is about moves.

        A thread waits for it: a socket that is read with a deadline cannot be read again after that.
        """
        head: Future[http.client.HTTPResponse] = Future()

        def wait() -> None:
            try:
                head.set_result(connection.getresponse())
            except Exception as error:
                head.set_exception(error)

        thread = threading.Thread(target=wait, name="jobd-backup", daemon=True)
        try:
            self._put(connection, request, self._policy.timeout_s)
            connection.sock.settimeout(None)
            thread.start()
            while not wait_for([head], LOOK_S).done:
                self._look(patience)
            response = head.result()
            connection.sock.settimeout(self._policy.timeout_s)
            return response
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        finally:
            if thread.is_alive() and not head.done():
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)
                thread.join()

    def _look(self, patience: StallTimeout) -> None:
        once = RetryPolicy(total_s=0, timeout_s=min(patience.silence_s, self._policy.timeout_s))
        with contextlib.suppress(JobdError):  # then it is silent
            patience.look(self.send(admin_requests.backups(), once), time.monotonic())
        if patience.is_over(time.monotonic()):
            raise Unreachable(f"The daemon at {self.endpoint}: {patience.words()}")

    def download_artifact(self, job_id: str, file: BinaryIO, late_result: int | None = None) -> int:
        """Write what lies in the store of artifacts under the job's `storage_key` to `file`; gives its bytes.

        With `late_result`, the `seq` of one, that under the key of this. Raises JobNotFound, LateResultNotFound,
        NotFound (no store, no key, or nothing under it), StorageUnavailable, and Unreachable where it broke off: what
        was written is not all of it then. An error of `file` is raised as it is.
        """
        return self._download(admin_requests.download_artifact(job_id, late_result), file)

    def _download(self, request: ApiRequest[bytes], file: BinaryIO) -> int:
        connection = _HttpConnection(self.endpoint, self._tls)
        try:
            return self._copy(connection, request, file)
        finally:
            connection.close()

    def _copy(self, connection: _HttpConnection, request: ApiRequest[Any], file: BinaryIO) -> int:
        try:
            response = self._ask(connection, request, self._policy.timeout_s)
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        return self._save(response, file)

    def _save(self, response: http.client.HTTPResponse, file: BinaryIO, patience: StallTimeout | None = None) -> int:
        copied, total = 0, response.length
        try:
            piece = response.read() if response.status >= 400 else response.read(_PIECE_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        if response.status >= 400:
            raise_error(ApiResponse(response.status, _lower(response), piece))
        while piece:
            copied += file.write(piece)
            if patience is not None:
                patience.received(copied, total)
            try:
                piece = response.read(_PIECE_BYTES)
            except (OSError, http.client.HTTPException) as error:
                raise self._unreachable(error) from error
        if response.length:  # a stream with a length that ends early is no error to http.client
            raise Unreachable(f"The daemon at {self.endpoint} broke off after {copied} bytes.")
        return copied
