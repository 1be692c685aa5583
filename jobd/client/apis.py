"""The settings and methods that the blocking and the asyncio clients share."""

from __future__ import annotations

import os
import ssl
import time
from typing import Any, Final

from jobd.client import admin_requests, worker_requests
from jobd.client.endpoint import Address, Endpoint, admin_endpoints, worker_endpoints
from jobd.client.errors import Unreachable
from jobd.client.event_subscription import ADMIN_EVENTS, EVENTS, NODE_SILENCE_S, SILENCE_S, EventSubscription
from jobd.client.methods import EventMethod, Method, PagedMethod
from jobd.client.protocol import ApiRequest
from jobd.client.retries import NodeList, RetryOptions, RetryState

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
_EXPORT_JOBS: Final = """Export all jobs that match as lines of JSON for import_jobs, oldest first, page by page.

Takes the arguments of `export_page`. Each job is in its state when its page was read. Jobs created before the first
page are included unless they are deleted before their page is read.
"""
_EVENTS: Final = """\
Iterate over events as they happen, each once and in order, across lost connections and restarts of the daemon.

`queue`, `job_id` and `type` (one name or several) select events. The stream starts now; with `after`, after the
event with that `seq`; with `last`, up to that many events ago. It never ends unless `follow` is False; then it ends
at the end of the journal. The first connection is retried like other calls, later ones until they succeed.
`on_lost` is called with the error of each lost connection. Raises EventsGone if events after `after` are no longer
in the journal: read the current state, then subscribe without `after`.
"""


class BaseClient:
    """Endpoints, timeouts and TLS of a client."""

    _follows_unlisted = True

    def __init__(
        self,
        endpoint: Address | None = None,
        *,
        token: str | None = None,
        timeout_s: float = 30.0,
        retry_for_s: float = 30.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._nodes = NodeList(worker_endpoints(endpoint, token), follows_unlisted=self._follows_unlisted)
        self._retry = RetryOptions(total_s=retry_for_s, timeout_s=timeout_s)
        needs_tls = any(each.tls for each in self.endpoints)
        self._tls = (tls or ssl.create_default_context()) if needs_tls else None
        self._connect_s = CONNECT_S if self._nodes.is_single else NODE_CONNECT_S
        self._reset_connections()

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

    def _attempts(self, request: ApiRequest[Any], retry: RetryOptions | None = None) -> RetryState:
        return RetryState(retry or self._retry, request, self._nodes, time.monotonic())

    @property
    def _silence_s(self) -> float:
        """How long a stream of events may be silent."""
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


class WorkerApi(BaseClient):
    """The methods of JobClient and AsyncJobClient."""

    create_job = Method(worker_requests.create_job)
    create_jobs = Method(worker_requests.create_jobs)
    get_job = Method(worker_requests.get_job)
    list_jobs = Method(worker_requests.list_jobs)
    timeline = Method(worker_requests.timeline)
    why = Method(worker_requests.why)
    validate_job_state = Method(worker_requests.validate_job_state)
    start_processing = Method(worker_requests.start_processing)
    claim = Method(worker_requests.claim)
    update_progress = Method(worker_requests.update_progress)
    extend_job_lock = Method(worker_requests.extend_job_lock)
    complete_job = Method(worker_requests.complete_job)
    fail_job = Method(worker_requests.fail_job)
    release_job = Method(worker_requests.release_job)
    cancel_job = Method(worker_requests.cancel_job)
    queues = Method(worker_requests.queues)
    workers = Method(worker_requests.workers)
    worker_page = Method(worker_requests.worker_page)
    cluster = Method(worker_requests.cluster)
    iterate_jobs = PagedMethod(worker_requests.list_jobs, lambda page: page.jobs, _ITERATE_JOBS)
    iterate_queues = PagedMethod(worker_requests.queue_page, lambda page: page.queues, _ITERATE_QUEUES)
    events = EventMethod(EventSubscription, EVENTS, _EVENTS)


class AdminApi(BaseClient):
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

    stats = Method(admin_requests.stats)
    health = Method(admin_requests.health)
    force_cleanup = Method(admin_requests.force_cleanup)
    cleanup_state = Method(admin_requests.cleanup_state)
    detect_and_recover_stuck_jobs = Method(admin_requests.detect_and_recover_stuck_jobs)
    validate_job = Method(admin_requests.validate_job)
    force_fail = Method(admin_requests.force_fail)
    force_reset = Method(admin_requests.force_reset)
    transition_job_state = Method(admin_requests.transition_job_state)
    extend_lock = Method(admin_requests.extend_lock)
    release_lock = Method(admin_requests.release_lock)
    cancel_job = Method(admin_requests.cancel_job)
    run_now = Method(admin_requests.run_now)
    update_job = Method(admin_requests.update_job)
    late_results = Method(admin_requests.late_results)
    adopt = Method(admin_requests.adopt)
    delete_job = Method(admin_requests.delete_job)
    list_jobs = Method(admin_requests.list_jobs)
    iterate_jobs = PagedMethod(admin_requests.list_jobs, lambda page: page.jobs, _ITERATE_JOBS)
    get_job = Method(admin_requests.get_job)
    timeline = Method(admin_requests.timeline)
    why = Method(admin_requests.why)
    locks = Method(admin_requests.locks)
    queues = Method(admin_requests.queues)
    iterate_queues = PagedMethod(admin_requests.queue_page, lambda page: page.queues, _ITERATE_QUEUES)
    workers = Method(admin_requests.workers)
    worker_page = Method(admin_requests.worker_page)
    take_back = Method(admin_requests.take_back)
    reports = Method(admin_requests.reports)
    audit = Method(admin_requests.audit)
    failures = Method(admin_requests.failures)
    preview = Method(admin_requests.preview)
    make_plan = Method(admin_requests.make_plan)
    get_plan = Method(admin_requests.get_plan)
    apply_plan = Method(admin_requests.apply_plan)
    alerts = Method(admin_requests.alerts)
    pause_queue = Method(admin_requests.pause_queue)
    resume_queue = Method(admin_requests.resume_queue)
    webhooks = Method(admin_requests.webhooks)
    deliveries = Method(admin_requests.deliveries)
    deliver_again = Method(admin_requests.deliver_again)
    deliver_all_again = Method(admin_requests.deliver_all_again)
    test_webhook = Method(admin_requests.test_webhook)
    clock = Method(admin_requests.clock)
    accept_clock = Method(admin_requests.accept_clock)
    cluster = Method(worker_requests.cluster)
    step_down = Method(admin_requests.step_down)
    quarantine = Method(admin_requests.quarantine)
    backups = Method(admin_requests.backups)
    check_rows = Method(admin_requests.check_rows)
    metrics = Method(admin_requests.metrics)
    export_page = Method(admin_requests.export_page)
    export_jobs = PagedMethod(admin_requests.export_page, lambda page: page.lines, _EXPORT_JOBS)
    events = EventMethod(EventSubscription, ADMIN_EVENTS, _EVENTS)
