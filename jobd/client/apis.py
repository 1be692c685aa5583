"""The settings and methods that the blocking and the asyncio clients share."""

from __future__ import annotations

import os
import random
import ssl
import time
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any, Final, Self

from jobd.client import requests
from jobd.client.api_request import ApiRequest, T, checked_key, request_of
from jobd.client.endpoint import Address, Endpoint, admin_endpoints, worker_endpoints
from jobd.client.errors import JobdError, Unreachable
from jobd.client.event_subscription import NODE_SILENCE_S, SILENCE_S, EventSubscription
from jobd.client.methods import EventMethod, Method, PagedMethod, requesting
from jobd.client.retries import NodeList, RetryOptions, RetryState
from jobd.model import calls
from jobd.model.api_call import ApiCall
from jobd.model.commands import Command

CONNECT_S: Final = 5.0
NODE_CONNECT_S: Final = 2.0  # to one of several nodes
IDLE_S: Final = 60.0  # the daemon closes idle connections after 75 s
CHUNK_BYTES: Final = 256 << 10

_ITERATE_JOBS: Final = """Iterate over all jobs that match, newest first, page by page.

Takes the arguments of `list_jobs`; `limit` is the size of a page.
"""
_ITERATE_QUEUES: Final = (
    "Iterate over all queues by name: counts by status, the oldest due job, and the pause if there is one."
)
_ITERATE_SCHEDULES: Final = "Iterate over all schedules by id: timing, next times, the latest job, skips and pauses."
_EXPORT_JOBS: Final = """Export all jobs that match as lines of JSON for import_jobs, oldest first, page by page.

Takes the arguments of `export_page`. Each job is in its state when its page was read. Jobs created before the first
page are included unless they are deleted before their page is read.
"""
_EVENTS: Final = """\
Iterate over events as they happen, each once and in order, across lost connections and restarts of the daemon.

`queue`, `job_id` and `type` (one name or several) select events. The stream starts now; with `after`, after the
event with that `seq`; with `last`, up to that many events ago. It never ends unless `follow` is False; then it ends
at the end of the event log. The first connection is retried like other calls, later ones until they succeed.
`on_lost` is called with the error of each lost connection. Raises EventsGone if events after `after` are no longer
in the event log: read the current state, then subscribe without `after`.
"""


class BaseClient:
    """Endpoints, timeouts and TLS of a client.

    `on_retry` is called with each error that leads to another attempt, unless a standby only named the leader.
    """

    _follows_unlisted = True
    on_retry: Callable[[JobdError], object] | None = None
    idempotency_key: str | None = None  # of all calls, see with_key
    job_version: str | None = None  # of the job that all calls change, see if_match

    def __init__(
        self,
        endpoint: Address | None = None,
        *,
        token: str | None = None,
        name: str | None = None,
        timeout_s: float = 30.0,
        retry_for_s: float = 30.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._nodes = NodeList(worker_endpoints(endpoint, token, client=name), follows_unlisted=self._follows_unlisted)
        self._retry = RetryOptions(total_s=retry_for_s, timeout_s=timeout_s)
        needs_tls = any(each.tls for each in self.endpoints)
        self._tls = (tls or ssl.create_default_context()) if needs_tls else None
        self._connect_s = CONNECT_S if self._nodes.is_single else NODE_CONNECT_S
        self._reset_connections()

    def with_key(self, key: str) -> Self:
        """Return a client that shares the connections and sends `key` as the Idempotency-Key of its calls.

        The clients generate keys, so this is for a request that another process may repeat.
        """
        keyed = copy(self)
        keyed.idempotency_key = checked_key(key)
        return keyed

    @property
    def endpoint(self) -> Endpoint:
        """The endpoint that the next call uses first: of several, usually that of the leader."""
        return self._nodes.first

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """The endpoints that the client was given."""
        return self._nodes.endpoints

    def _reset_connections(self) -> None:
        """Start without connections."""

    def _request(self, call: ApiCall[Any, T], command: Command) -> ApiRequest[T]:
        request = request_of(call, command, self.idempotency_key)
        if self.job_version is None or call.method == "GET":
            return request
        return replace(request, headers={**request.headers, "If-Match": f'"{self.job_version}"'})

    def _attempts(self, request: ApiRequest[Any], retry: RetryOptions | None = None) -> RetryState:
        return RetryState(retry or self._retry, request, self._nodes, time.monotonic())

    @staticmethod
    def _wait_s(state: RetryState, error: JobdError, on_error: Callable[[JobdError], object] | None) -> float:
        """Return the delay before the next attempt, and report the error. Raises an error if there is none."""
        wait_s = state.wait_s(error, time.monotonic(), random.random())
        if on_error is not None and not state.is_redirected:
            on_error(error)
        return wait_s

    @property
    def _silence_s(self) -> float:
        """How long a stream of events may be idle."""
        return SILENCE_S if self._nodes.is_single else NODE_SILENCE_S


def unreachable(endpoint: Endpoint, error: BaseException) -> Unreachable:
    """Return the error for a connection that could not be made, broke, or had no response in time."""
    is_slow = isinstance(error, TimeoutError)
    reason = "no response in time" if is_slow else connection_reason(error)
    found = Unreachable(f"The daemon at {endpoint} cannot be reached: {reason}.")
    found.is_slow = is_slow
    return found


def connection_reason(error: BaseException) -> str:
    """Return the text of the operating system for a connection error, and not that of aiohttp."""
    cause = getattr(error, "os_error", error)
    if isinstance(cause, ConnectionError) and cause.errno:
        return os.strerror(cause.errno)
    return getattr(cause, "strerror", None) or str(error) or type(error).__name__


class WorkerApi(calls.JobCalls, calls.QueueCalls, calls.ScheduleCalls, calls.NodeCalls, BaseClient):
    """The methods of JobClient and AsyncJobClient."""

    create_job = Method(requests.create_job)
    create_jobs = Method(requests.create_jobs)
    claim = Method(requests.claim)
    complete_job = Method(requests.complete_job)
    iterate_jobs = PagedMethod(requesting(calls.JobCalls.list_jobs), lambda page: page.jobs, _ITERATE_JOBS)
    iterate_queues = PagedMethod(requesting(calls.QueueCalls.queue_page), lambda page: page.queues, _ITERATE_QUEUES)
    iterate_schedules = PagedMethod(
        requesting(calls.ScheduleCalls.schedule_page), lambda page: page.schedules, _ITERATE_SCHEDULES
    )
    events = EventMethod(EventSubscription, calls.EventRequests.events, _EVENTS)


class AdminApi(
    calls.AdminJobCalls,
    calls.ManyJobCalls,
    calls.AdminQueueCalls,
    calls.AdminScheduleCalls,
    calls.AdminEventCalls,
    calls.DaemonCalls,
    calls.AdminNodeCalls,
    calls.StoreCalls,
    BaseClient,
):
    """The methods of AdminClient and AsyncAdminClient."""

    # An admin token is sent only to addresses that the caller gave. A standby names the worker API of the leader.
    _follows_unlisted = False

    def __init__(
        self,
        endpoint: Address | None = None,
        *,
        token: str | None = None,
        operator: str | None = None,
        timeout_s: float = 30.0,
        retry_for_s: float = 30.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        super().__init__(
            admin_endpoints(endpoint, token, operator=operator), timeout_s=timeout_s, retry_for_s=retry_for_s, tls=tls
        )

    def if_match(self, version: str) -> Self:
        """Return a client that shares the connections, and changes a job only if its `version` is still this one.

        `get_job` returns the version. A job that has changed is rejected with InvalidTransition.
        """
        conditional = copy(self)
        conditional.job_version = version
        return conditional

    transition_job_state = Method(requests.transition_job_state)
    make_plan = Method(requests.make_plan)
    export_page = Method(requests.export_page)
    export_jobs = PagedMethod(requests.export_page, lambda page: page.lines, _EXPORT_JOBS)
    iterate_jobs = PagedMethod(requesting(calls.AdminJobCalls.list_jobs), lambda page: page.jobs, _ITERATE_JOBS)
    iterate_queues = PagedMethod(
        requesting(calls.AdminQueueCalls.queue_page), lambda page: page.queues, _ITERATE_QUEUES
    )
    iterate_schedules = PagedMethod(
        requesting(calls.AdminScheduleCalls.schedule_page), lambda page: page.schedules, _ITERATE_SCHEDULES
    )
    events = EventMethod(EventSubscription, calls.AdminEventRequests.events, _EVENTS)
