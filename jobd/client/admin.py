"""The blocking client of the admin API. It is thread-safe."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, BinaryIO, Final

from msgspec.structs import replace

from jobd.client.api_request import (
    ApiRequest,
    ApiResponse,
    T,
    json_lines,
    lines_request,
    lower_headers,
    raise_error,
    read_result,
    request_for,
    uuid7,
)
from jobd.client.apis import CHUNK_BYTES, AdminApi, unreachable
from jobd.client.errors import JobdError, Unreachable
from jobd.client.retries import RetryOptions
from jobd.client.sync import CONNECTION_ERRORS, BlockingClient, DaemonConnection
from jobd.model.calls import AdminJobRequests, ManyJobRequests, StoreCalls, StoreRequests
from jobd.model.responses import BackupView, ImportPreview, ImportResult

POLL_S: Final = 0.5  # between two requests for the progress of a backup


class AdminClient(AdminApi, BlockingClient):
    """The admin API for blocking code. Times are Unix ms; the units of durations are in each result.

    `endpoint` is `http://host:port`, `unix:/path`, a list of several, or None for $JOBD_ADMIN_URL or
    http://127.0.0.1:8770. `token` is by default $ADMIN_TOKEN or the first line of $ADMIN_TOKEN_FILE. `operator` is your
    name in the audit log and in timelines. The rest is as in JobClient.
    """

    def import_jobs(self, jobs: Iterable[Mapping[str, Any] | bytes | str]) -> ImportResult:
        """Import jobs with any status and with their own times: mappings, or lines of JSON.

        Each job is created or rejected on its own, and existing ids are skipped, so an interrupted import can be
        repeated. The client does not retry it. `timeout_s` limits each write and the wait for the response. Raises
        StorageFull, TooManyJobs.
        """
        return self._send_lines(lines_request(ManyJobRequests.import_jobs), jobs)

    def preview_import(self, jobs: Iterable[Mapping[str, Any] | bytes | str]) -> ImportPreview:
        """Return what import_jobs would do with the same jobs, line by line. Changes nothing."""
        return self._send_lines(lines_request(ManyJobRequests.preview_import), jobs)

    def _connection(self) -> DaemonConnection:
        """Return a new connection for a request that cannot be repeated: to the leader if there are several nodes."""
        if not self._nodes.is_single:
            self.clock()  # any call finds the leader
        return DaemonConnection(self.endpoint, self._tls)

    def _send_lines(self, request: ApiRequest[T], jobs: Iterable[Mapping[str, Any] | bytes | str]) -> T:
        with contextlib.closing(self._connection()) as connection:
            return read_result(request, self._upload(connection, request, json_lines(iter(jobs))))

    def _upload(self, connection: DaemonConnection, request: ApiRequest[Any], chunks: Iterator[bytes]) -> ApiResponse:
        """Send a stream. A daemon that rejects it may respond and close the connection before the stream ends."""
        try:
            try:
                response = self._write(connection, request, self._retry.timeout_s, chunks).getresponse()
            except (BrokenPipeError, ConnectionResetError):
                if connection.sock is None:
                    raise
                response = http.client.HTTPResponse(connection.sock, method=request.method)
                response.begin()
            return ApiResponse(response.status, lower_headers(response.getheaders()), response.read())
        except CONNECTION_ERRORS as error:
            raise unreachable(self.endpoint, error) from error

    def backup(self, file: BinaryIO, *, on_progress: Callable[[BackupView], None] | None = None) -> int:
        """Write a copy of the current database to `file` and return its size in bytes.

        `on_progress` is called twice a second while the daemon copies, checks and sends the database. The duration of a
        backup is not limited, but `timeout_s` limits the time without progress. Raises Unreachable if there is no
        progress for longer, or if the stream is interrupted; `file` is then incomplete. Errors of `file` are raised
        unchanged.
        """
        stall = StallTimeout(uuid7(), on_progress, self._retry.timeout_s, time.monotonic())
        with contextlib.closing(self._connection()) as connection:
            return self._save(self._await_backup(connection, stall), file, stall)

    def _await_backup(self, connection: DaemonConnection, stall: StallTimeout) -> http.client.HTTPResponse:
        """Wait for the head of the response as long as the backup makes progress.

        A thread waits, because a socket cannot be read again after a read has timed out.
        """
        head: Future[http.client.HTTPResponse] = Future()

        def wait() -> None:
            try:
                head.set_result(connection.getresponse())
            except Exception as error:
                head.set_exception(error)

        thread = threading.Thread(target=wait, name="jobd-backup", daemon=True)
        try:
            self._write(connection, request_for(StoreRequests.backup, id=stall.id), self._retry.timeout_s)
            connection.sock.settimeout(None)
            thread.start()
            while not concurrent.futures.wait([head], POLL_S).done:
                self._poll(stall)
            response = head.result()
            connection.sock.settimeout(self._retry.timeout_s)
            return response
        except CONNECTION_ERRORS as error:
            raise unreachable(self.endpoint, error) from error
        finally:
            if thread.is_alive() and not head.done():
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)
                thread.join()

    def _poll(self, stall: StallTimeout) -> None:
        once = RetryOptions(total_s=0, timeout_s=min(stall.limit_s, self._retry.timeout_s))
        with contextlib.suppress(JobdError):  # counts as no progress
            stall.update(self.send(request_for(StoreCalls.backups), once), time.monotonic())
        if stall.is_over(time.monotonic()):
            raise Unreachable(f"The daemon at {self.endpoint}: {stall.describe()}")

    def download_artifact(self, job_id: str, file: BinaryIO, late_result: int | None = None) -> int:
        """Write the artifact under the job's `storage_key` to `file` and return its size in bytes.

        `late_result`, the `seq` of a late result, selects the artifact of that result. Raises JobNotFound,
        LateResultNotFound, NotFound (no artifact store, no key, or no artifact), ArtifactsUnavailable, and Unreachable
        if the stream is interrupted; `file` is then incomplete. Errors of `file` are raised unchanged.
        """
        request = request_for(AdminJobRequests.artifact, job_id, late_result=late_result)
        with contextlib.closing(self._connection()) as connection:
            try:
                response = self._write(connection, request, self._retry.timeout_s).getresponse()
            except CONNECTION_ERRORS as error:
                raise unreachable(self.endpoint, error) from error
            return self._save(response, file)

    def _save(self, response: http.client.HTTPResponse, file: BinaryIO, stall: StallTimeout | None = None) -> int:
        copied, total = 0, response.length
        if response.status >= 400:
            raise_error(ApiResponse(response.status, lower_headers(response.getheaders()), self._read(response)))
        while chunk := self._read(response, CHUNK_BYTES):
            copied += file.write(chunk)
            if stall is not None:
                stall.received(copied, total)
        if response.length:  # http.client does not report that a response with a length ended early
            raise Unreachable(f"The daemon at {self.endpoint} ended the stream after {copied} bytes.")
        return copied

    def _read(self, response: http.client.HTTPResponse, size: int | None = None) -> bytes:
        try:
            return response.read(size)
        except CONNECTION_ERRORS as error:
            raise unreachable(self.endpoint, error) from error


class StallTimeout:
    """Limit the time that the backup `id` may make no progress. `on_progress` is called with its state."""

    def __init__(
        self, id_: str, on_progress: Callable[[BackupView], None] | None, limit_s: float, now_s: float
    ) -> None:
        self.id = id_
        self.limit_s = limit_s
        self._on_progress = on_progress
        self._progress_s = now_s
        self._seen: BackupView | None = None

    def update(self, backups: list[BackupView], now_s: float) -> None:
        """Record the daemon's list of backups. A backup that is not listed makes no progress."""
        seen = next((each for each in backups if each.id == self.id), None)
        if seen is not None:
            self._progress_s = max(self._progress_s, now_s - seen.since_progress_ms / 1000)
            self._report(seen)

    def is_over(self, now_s: float) -> bool:
        """Return whether the backup has made no progress for too long."""
        return now_s - self._progress_s > self.limit_s

    def received(self, done: int, total: int | None) -> None:
        if self._seen is not None:
            self._report(replace(self._seen, state="sending", bytes_done=done, bytes_total=total, since_progress_ms=0))

    def describe(self) -> str:
        last = "" if self._seen is None else f" It was {self._seen.state} at {self._seen.bytes_done} bytes."
        return f"the backup has made no progress for {self.limit_s:g} s.{last}"

    def _report(self, seen: BackupView) -> None:
        self._seen = seen
        if self._on_progress is not None:
            self._on_progress(seen)
