"""The calls of the admin API as requests: one function each, its signature and text are those of AdminClient's methods.

Sends nothing. Names on the wire are those that dashboards use; here they are in snake case.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from msgspec import Raw, Struct

from jobd.client.protocol import NDJSON_TYPE, ApiRequest, JobInfo, JobInfoPage, T, get, job_path, post, reader, uuid7
from jobd.client.worker_requests import read_job, read_page, read_queues, read_timeline, read_why, read_workers
from jobd.model.commands import MAINTENANCE_ACTIONS, PlanAction, WorkerState
from jobd.model.events import EventView
from jobd.model.job import Status
from jobd.model.responses import (
    AdminLockView,
    AlertList,
    AlertView,
    AuditPage,
    BackupList,
    BackupView,
    CheckedRows,
    CleanupReport,
    CleanupState,
    ClockView,
    DeliveryPage,
    DeliveryState,
    DeliveryView,
    FailuresView,
    HealthView,
    LateResultList,
    LateResultView,
    LockedJob,
    LockList,
    PausedView,
    PlanResult,
    PlanView,
    PreviewView,
    QuarantinedJob,
    QuarantineList,
    QueueView,
    RecoverStuckView,
    ReportList,
    Resent,
    StatsView,
    TakeBackView,
    TransitionView,
    ValidateJobView,
    WebhookList,
    WebhookView,
    WhyView,
    WorkerList,
    WorkerView,
)

BASE: Final = "/admin/job-management"
JOBS: Final = f"{BASE}/jobs"


class RefusedLine(Struct, frozen=True):
    """A line of an import that was not taken. `line` counts from 1."""

    line: int
    reason: str
    id: str | None = None


class ImportResult(Struct, frozen=True, rename="camel"):
    """How many jobs of an import were created, how many ids existed already, and how many lines were refused.

    `refused` shows the first of them, `refused_count` counts all.
    """

    imported: int
    skipped: int
    refused_count: int = 0
    refused: list[RefusedLine] = []


class ForeseenLine(Struct, frozen=True):
    """What would become of a line of an import: `what` is create, skip or refuse, `status` the job's afterwards."""

    line: int
    what: str
    id: str | None = None
    status: str | None = None
    reason: str | None = None


class ImportForeseen(Struct, frozen=True, rename="camel"):
    """What an import would do. `lines` shows the first of them, `more`: there are more.

    At line `stops_at` it would end early, for `stop_reason`; None: it would not.
    """

    would_import: int
    would_skip: int
    would_refuse: int
    lines: list[ForeseenLine] = []
    more: bool = False
    stops_at: int | None = None
    stop_reason: str | None = None


class JobLines(Struct, frozen=True):
    """A page of jobs, oldest first, each a line of JSON as an import takes it. `next_cursor` is None on the last."""

    lines: list[bytes]
    next_cursor: str | None


class ValidatedJob(ValidateJobView, frozen=True, rename="camel"):
    """A job and what is wrong with it."""

    job: JobInfo


_read_stats = reader(StatsView)
_read_health = reader(HealthView)
_read_report = reader(CleanupReport)
_read_cleanup = reader(CleanupState)
_read_recovered = reader(RecoverStuckView)
_read_taken_back = reader(TakeBackView)
_read_validated = reader(ValidatedJob)
_read_forced = reader(TransitionView)
_read_lock = reader(AdminLockView)
_read_late = reader(LateResultList)
_read_locks = reader(LockList)
_read_reports = reader(ReportList)
_read_audit = reader(AuditPage)
_read_failures = reader(FailuresView)
_read_preview = reader(PreviewView)
_read_plan = reader(PlanView)
_read_plan_result = reader(PlanResult)
_read_alerts = reader(AlertList)
_read_paused = reader(PausedView)
_read_webhooks = reader(WebhookList)
_read_deliveries = reader(DeliveryPage)
_read_delivery = reader(DeliveryView)
_read_resent = reader(Resent)
_read_clock = reader(ClockView)
_read_quarantine = reader(QuarantineList)
_read_checked = reader(CheckedRows)
_read_backups = reader(BackupList)
read_imported = reader(ImportResult)
_read_foreseen = reader(ImportForeseen)


def stats() -> ApiRequest[StatsView]:
    """Counts of jobs by status, stuck and locked ones; the average processing time is in seconds."""
    return get(f"{BASE}/stats", _read_stats)


def health() -> ApiRequest[HealthView]:
    """How the database, the memory and the artifact store are, measured at most 5 s ago.

    Something unhealthy is a result, not an error: look at `status`.
    """
    return get(f"{BASE}/health", _read_health)


def force_cleanup(reason: str | None = None) -> ApiRequest[CleanupReport]:
    """Run a cleanup pass now, or wait for the one that runs, and give its report."""
    return post(f"{BASE}/cleanup", _read_report, {"reason": reason}, wait_ms=_PASS_MS)


def cleanup_state() -> ApiRequest[CleanupState]:
    """The last cleanup report, whether a pass runs now, and how long ago the last one was (ms)."""
    return get(f"{BASE}/cleanup", _read_cleanup)


def detect_and_recover_stuck_jobs(reason: str | None = None) -> ApiRequest[RecoverStuckView]:
    """Recover every job that is stuck now, and say what was done to each."""
    return post(f"{BASE}/recover-stuck", _read_recovered, {"reason": reason}, wait_ms=_PASS_MS)


_PASS_MS: Final = 5 * 60_000  # a pass over millions of jobs takes its time


def failures(limit: int | None = None) -> ApiRequest[FailuresView]:
    """Failed jobs (`count`) and those that wait to be tried again (`retrying`), grouped by their error.

    The largest groups first: `limit` of them (50 by default, up to 200).
    """
    return get(f"{BASE}/failures", _read_failures, limit=limit)


def preview() -> ApiRequest[PreviewView]:
    """What recovery and a cleanup pass would do now. Nothing is done."""
    return get(f"{BASE}/preview", _read_preview)


def make_plan(
    action: PlanAction,
    *,
    ids: Sequence[str] | None = None,
    status: Status | None = None,
    queue: str | None = None,
    kind: str | None = None,
    worker: str | None = None,
    since: int | None = None,
    until: int | None = None,
    finished_since: int | None = None,
    finished_until: int | None = None,
    q: str | None = None,
    error: str | None = None,
    cursor: str | None = None,
    reason: str | None = None,
) -> ApiRequest[PlanView]:
    """What `action` would do to the jobs `ids`, or to those that the filters find. Nothing is done before apply_plan.

    `action` is retry, force-reset, cancel, force-fail or delete; or recover-stuck or cleanup, which take no ids, no
    filter and no cursor: the daemon itself says which jobs. `jobs` are those that it would be done to, 10 000 at
    most; `skipped` are left alone. The filters are those of list_jobs. Where the plan has `more`, its `next_cursor` as
    `cursor` makes the next one.
    """
    body: dict[str, Any] = {"action": action, "ids": None if ids is None else list(ids), "reason": reason}
    if ids is None:
        body["cursor"] = cursor
        asked: dict[str, str | int | None] = {"status": status, "queue": queue, "kind": kind, "worker": worker}
        asked |= {"since": since, "until": until, "q": q, "error": error}
        asked |= {"finished_since": finished_since, "finished_until": finished_until}
        given = {name: value for name, value in asked.items() if value is not None}
        body["filter"] = None if action in MAINTENANCE_ACTIONS and not given else given
    return post(f"{BASE}/plans", _read_plan, body, wait_ms=_PASS_MS)


def get_plan(plan_id: str) -> ApiRequest[PlanView]:
    """The plan, with its result once it was applied. Raises PlanNotFound."""
    return get(job_path(f"{BASE}/plans", plan_id), _read_plan)


def apply_plan(plan_id: str) -> ApiRequest[PlanResult]:
    """Do what the plan says, to every job that is still what it saw. A plan is applied once: again gives the same.

    Raises PlanNotFound: plans are kept for 15 min and not over a restart; what was done stays done.
    """
    return post(job_path(f"{BASE}/plans", plan_id, "apply"), _read_plan_result, {}, wait_ms=_PASS_MS)


def validate_job(job_id: str) -> ApiRequest[ValidatedJob]:
    """The job and what is wrong with its record. Raises JobNotFound."""
    return get(f"{BASE}/validate-job", _read_validated, jobId=job_id)


def force_fail(
    job_id: str, reason: str | None = None, *, idempotency_key: str | None = None
) -> ApiRequest[TransitionView]:
    """Fail a queued or processing job; a live grant is revoked. Raises JobNotFound, InvalidTransition."""
    return _change("force-fail", _read_forced, {"jobId": job_id, "reason": reason}, idempotency_key)


def force_reset(
    job_id: str, reason: str | None = None, *, idempotency_key: str | None = None
) -> ApiRequest[TransitionView]:
    """Put a processing, failed or cancelled job back into its queue as new: progress, attempt and stalls 0.

    A live grant is revoked. Raises JobNotFound, InvalidTransition.
    """
    return _change("force-reset", _read_forced, {"jobId": job_id, "reason": reason}, idempotency_key)


def transition_job_state(
    job_id: str,
    from_status: Status,
    to_status: Status,
    *,
    updates: Mapping[str, Any] | None = None,
    reason: str | None = None,
    dry_run: bool = False,
    idempotency_key: str | None = None,
) -> ApiRequest[TransitionView]:
    """Change the status if it is `from_status` now; into processing there is no way but a grant.

    `updates` may set error_message, priority, run_at, max_attempts, download_url, file_path, storage_key, metadata.
    `dry_run`: the same answer or error, and nothing is done. Raises JobNotFound, InvalidTransition, InvalidRequest
    (into completed without a download_url, where the daemon asks for one).
    """
    body: dict[str, Any] = {"jobId": job_id, "from": from_status, "to": to_status, "updates": updates}
    body |= {"reason": reason, "dry_run": dry_run or None}
    return _change("transition", _read_forced, body, idempotency_key)


def extend_lock(
    job_id: str,
    lock_id: str,
    additional_ms: int | None = None,
    reason: str | None = None,
    *,
    idempotency_key: str | None = None,
) -> ApiRequest[AdminLockView]:
    """Extend a lock in its holder's place, to at least `additional_ms` from now. Raises LockLost, JobNotFound."""
    body = {"jobId": job_id, "lockId": lock_id, "additionalTime": additional_ms, "reason": reason}
    return _change("extend-lock", _read_lock, body, idempotency_key)


def release_lock(
    job_id: str, lock_id: str, reason: str | None = None, *, idempotency_key: str | None = None
) -> ApiRequest[AdminLockView]:
    """Release a lock in its holder's place: the job goes back to its queue. Raises LockLost, JobNotFound."""
    body = {"jobId": job_id, "lockId": lock_id, "reason": reason}
    return _change("release-lock", _read_lock, body, idempotency_key)


def _change(verb: str, read: Callable[[bytes], T], body: Mapping[str, Any], key: str | None) -> ApiRequest[T]:
    return post(f"{BASE}/{verb}", read, body, key=key or uuid7())


def cancel_job(job_id: str, reason: str | None = None, *, idempotency_key: str | None = None) -> ApiRequest[JobInfo]:
    """Cancel a job that is not finished. Raises JobNotFound, InvalidTransition."""
    return post(job_path(JOBS, job_id, "cancel"), read_job, {"reason": reason}, key=idempotency_key or uuid7())


def run_now(
    job_id: str, reason: str | None = None, *, dry_run: bool = False, idempotency_key: str | None = None
) -> ApiRequest[JobInfo]:
    """Make a queued job due now. `dry_run`: the job as it would be, or the same error, and nothing is done.

    Raises JobNotFound, InvalidTransition.
    """
    body = {"reason": reason, "dry_run": dry_run or None}
    return post(job_path(JOBS, job_id, "run-now"), read_job, body, key=idempotency_key or uuid7())


def update_job(
    job_id: str,
    *,
    priority: int | None = None,
    run_at: int | None = None,
    max_attempts: int | None = None,
    reason: str | None = None,
    dry_run: bool = False,
    idempotency_key: str | None = None,
) -> ApiRequest[JobInfo]:
    """Change priority, due time (Unix ms) or the number of attempts.

    `dry_run`: the job as it would be, or the same error, and nothing is done. Raises JobNotFound, InvalidTransition.
    """
    body: dict[str, Any] = {"priority": priority, "run_at": run_at, "max_attempts": max_attempts}
    body |= {"reason": reason, "dry_run": dry_run or None}
    return post(job_path(JOBS, job_id, "update"), read_job, body, key=idempotency_key or uuid7())


def late_results(job_id: str) -> ApiRequest[list[LateResultView]]:
    """What completes of this job brought whose locks were lost, the oldest grant first. Raises JobNotFound."""
    return get(job_path(JOBS, job_id, "late-results"), lambda body: _read_late(body).late_results)


def adopt(
    job_id: str,
    result: int | None = None,
    *,
    reason: str | None = None,
    dry_run: bool = False,
    idempotency_key: str | None = None,
) -> ApiRequest[JobInfo]:
    """Complete a queued, failed or cancelled job with a late result: the one with this `seq`, or the latest grant's.

    `dry_run`: the job as it would be, or the same error, and nothing is done. Raises JobNotFound, LateResultNotFound,
    InvalidTransition (somebody holds it, or it is completed), InvalidRequest (it has no download_url, where the daemon
    asks for one).
    """
    body = {"result": result, "reason": reason, "dry_run": dry_run or None}
    return post(job_path(JOBS, job_id, "adopt"), read_job, body, key=idempotency_key or uuid7())


def download_artifact(job_id: str, late_result: int | None = None) -> ApiRequest[bytes]:
    """What lies in the store of artifacts under the job's `storage_key`, or that of its late result with this `seq`."""
    return get(job_path(JOBS, job_id, "artifact"), bytes, late_result=late_result)


def delete_job(job_id: str, reason: str | None = None, *, idempotency_key: str | None = None) -> ApiRequest[JobInfo]:
    """Delete a finished job with its history. Raises JobNotFound, InvalidTransition."""
    sent = post(job_path(JOBS, job_id), read_job, {"reason": reason}, key=idempotency_key or uuid7())
    return replace(sent, method="DELETE")


def get_job(job_id: str) -> ApiRequest[JobInfo]:
    """The job as it is now, with the `lock_id` of its holder. Raises JobNotFound."""
    return get(job_path(JOBS, job_id), read_job)


def list_jobs(
    *,
    status: Status | None = None,
    queue: str | None = None,
    kind: str | None = None,
    worker: str | None = None,
    since: int | None = None,
    until: int | None = None,
    finished_since: int | None = None,
    finished_until: int | None = None,
    q: str | None = None,
    error: str | None = None,
    limit: int | None = None,
    cursor: str | None = None,
) -> ApiRequest[JobInfoPage]:
    """A page of the jobs that match, newest first: `limit` of them at most (50 by default, up to 200).

    `worker` holds the job or was the last to hold it. `since` and `until` (Unix ms) bound the time of creation,
    `finished_since` and `finished_until` that of the end; `q` is a text in id, payload or error message, `error` the
    fingerprint of a failure. A page may be short; the last one has no `next_cursor`. `cursor` is the `next_cursor` of
    the page before.
    """
    asked = {"status": status, "queue": queue, "kind": kind, "worker": worker, "since": since, "until": until, "q": q}
    asked |= {"finished_since": finished_since, "finished_until": finished_until}
    return get(JOBS, read_page, **asked, error=error, limit=limit, cursor=cursor)


def timeline(job_id: str) -> ApiRequest[list[EventView]]:
    """What happened to the job, oldest first. Raises JobNotFound."""
    return get(job_path(JOBS, job_id, "timeline"), read_timeline)


def why(job_id: str) -> ApiRequest[WhyView]:
    """Why the job is in its state, and what happens next, in plain words. Raises JobNotFound."""
    return get(job_path(JOBS, job_id, "why"), read_why)


def locks(*, limit: int | None = None) -> ApiRequest[list[LockedJob]]:
    """The current grants: who holds what, until when. With a `limit` (up to 200) the oldest."""
    return get(f"{BASE}/locks", lambda body: _read_locks(body).locks, limit=limit)


def queues(
    *, limit: int | None = None, cursor: str | None = None, busiest: bool = False
) -> ApiRequest[list[QueueView]]:
    """Get a page of queues by name: counts by status, the oldest due job, and the pause if there is one.

    `limit` is at most 200, the default. `cursor` is the name of the last queue of the page before. `busiest` gives one
    page with the queues that have the most queued and processing jobs.
    """
    return get(f"{BASE}/queues", read_queues, limit=limit, cursor=cursor, busiest="true" if busiest else None)


def workers(*, limit: int | None = None) -> ApiRequest[list[WorkerView]]:
    """List up to 200 (or `limit`) workers that are not gone, most recently seen first: state, latest claim, jobs."""
    return get(f"{BASE}/workers", lambda body: read_workers(body).workers, limit=limit)


def worker_page(
    *, state: WorkerState | None = None, limit: int | None = None, cursor: str | None = None
) -> ApiRequest[WorkerList]:
    """Get a page of workers, most recently seen first. `limit` is at most 200, the default.

    `state` selects workers in that state; without it, all that are not gone. `cursor` is the `next_cursor` of the page
    before.
    """
    return get(f"{BASE}/workers", read_workers, state=state, limit=limit, cursor=cursor)


def take_back(worker: str, reason: str | None = None, *, dry_run: bool = False) -> ApiRequest[TakeBackView]:
    """End the expired grants of a silent worker by their stall rule, now. `dry_run` only lists them, up to 200.

    Raises WorkerNotFound, WorkerNotSilent.
    """
    body = {"reason": reason, "dry_run": dry_run or None}
    return post(job_path(f"{BASE}/workers", worker, "take-back"), _read_taken_back, body, wait_ms=_PASS_MS)


def reports(limit: int | None = None) -> ApiRequest[list[CleanupReport]]:
    """The kept reports of cleanup passes, newest first: `limit` of them (50 by default, up to 500)."""
    return get(f"{BASE}/reports", lambda body: _read_reports(body).reports, limit=limit)


def audit(
    *,
    who: str | None = None,
    what: str | None = None,
    job_id: str | None = None,
    since: int | None = None,
    limit: int | None = None,
    cursor: str | None = None,
) -> ApiRequest[AuditPage]:
    """A page of what operators did and were refused, newest first: `limit` of them at most (50 by default, up to 200).

    `since` is Unix ms. A page may be short; the last one has no `next_cursor`, which is the `cursor` of the next one.
    """
    asked = {"who": who, "what": what, "job_id": job_id, "since": since, "limit": limit, "cursor": cursor}
    return get(f"{BASE}/audit", _read_audit, **asked)


def alerts() -> ApiRequest[list[AlertView]]:
    """Every alert, firing or not, with its value and threshold."""
    return get(f"{BASE}/alerts", lambda body: _read_alerts(body).alerts)


def pause_queue(queue: str, reason: str | None = None, *, until: int | None = None) -> ApiRequest[PausedView]:
    """Grant no job of this queue until an operator resumes it, or until the daemon does so at `until` (Unix ms).

    Holders continue. A second pause replaces the reason and end of the first one.
    """
    body = {"reason": reason, "until": until}
    return post(job_path(f"{BASE}/queues", queue, "pause"), _read_paused, body, key=uuid7())


def resume_queue(queue: str, reason: str | None = None) -> ApiRequest[PausedView]:
    """Grant jobs of this queue again."""
    return post(job_path(f"{BASE}/queues", queue, "resume"), _read_paused, {"reason": reason}, key=uuid7())


def webhooks() -> ApiRequest[list[WebhookView]]:
    """Who is told of what happens, and how that is going."""
    return get(f"{BASE}/webhooks", lambda body: _read_webhooks(body).webhooks)


def deliveries(
    webhook: str,
    *,
    state: DeliveryState | None = None,
    limit: int | None = None,
    cursor: str | None = None,
) -> ApiRequest[DeliveryPage]:
    """What waits for a webhook, and what became of the latest: newest first, `limit` of them at most (50; up to 200).

    `cursor` is the `next_cursor` of the page before; the last one has none.
    """
    path = job_path(f"{BASE}/webhooks", webhook, "deliveries")
    return get(path, _read_deliveries, state=state, limit=limit, cursor=cursor)


def deliver_again(webhook: str, delivery: int, reason: str | None = None) -> ApiRequest[DeliveryView]:
    """Send a delivery again, now, whatever became of it. Its receiver knows it by the same `webhook-id`."""
    body = {"id": delivery, "reason": reason}
    return post(job_path(f"{BASE}/webhooks", webhook, "resend"), _read_delivery, body)


def deliver_all_again(webhook: str, upto: int | None = None, reason: str | None = None) -> ApiRequest[int]:
    """Send again what was given up, all of it or up to the delivery `upto`; how many there were."""
    body = {"upto": upto, "reason": reason}
    return post(job_path(f"{BASE}/webhooks", webhook, "resend-given-up"), lambda said: _read_resent(said).resent, body)


def test_webhook(webhook: str, reason: str | None = None) -> ApiRequest[DeliveryView]:  # noqa: PT028 - no test function
    """Send a webhook a message that says it is a test."""
    return post(job_path(f"{BASE}/webhooks", webhook, "test"), _read_delivery, {"reason": reason})


def clock() -> ApiRequest[ClockView]:
    """The daemon's clock (Unix ms), and whether it holds back deletion by age because the clock is suspect."""
    return get(f"{BASE}/clock", _read_clock)


def accept_clock(reason: str | None = None) -> ApiRequest[ClockView]:
    """Say that the daemon's clock is right: deletion by age goes on."""
    return post(f"{BASE}/clock/accept", _read_clock, {"reason": reason})


def quarantine() -> ApiRequest[list[QuarantinedJob]]:
    """The jobs whose rows are damaged, and how."""
    return get(f"{BASE}/quarantine", lambda body: _read_quarantine(body).jobs)


def metrics() -> ApiRequest[str]:
    """The daemon's figures in Prometheus' text format."""
    return get("/metrics", lambda body: body.decode())


class _Exported(Struct):
    jobs: list[Raw]
    next_cursor: str | None


_read_exported = reader(_Exported)
_ONE_LINE: Final = bytes.maketrans(b"\r\n", b"  ")


def _read_lines(body: bytes) -> JobLines:
    """Payloads are as they came, and JSON may be broken into lines; there a line break is white space, never text."""
    page = _read_exported(body)
    return JobLines([bytes(job).translate(_ONE_LINE) for job in page.jobs], page.next_cursor)


def export_page(
    *,
    status: Status | None = None,
    queue: str | None = None,
    kind: str | None = None,
    limit: int | None = None,
    cursor: str | None = None,
) -> ApiRequest[JobLines]:
    """A page of the jobs that match, oldest first, as lines for import_jobs: `limit` of them at most (200).

    A page may be short; the last one has no `next_cursor`. `cursor` is the `next_cursor` of the page before.
    """
    return get(f"{BASE}/export", _read_lines, status=status, queue=queue, kind=kind, limit=limit, cursor=cursor)


def import_jobs() -> ApiRequest[ImportResult]:
    """Move jobs in; the body is a stream of JSON lines."""
    return ApiRequest("POST", f"{BASE}/import", read_imported, headers={"Content-Type": NDJSON_TYPE}, repeatable=False)


def preview_import() -> ApiRequest[ImportForeseen]:
    """What an import would do; the body is a stream of JSON lines."""
    headers = {"Content-Type": NDJSON_TYPE}
    return ApiRequest("POST", f"{BASE}/import/preview", _read_foreseen, headers=headers, repeatable=False)


def backup(id_: str | None = None) -> ApiRequest[bytes]:
    """A copy of the database as it is now; the answer is the file. Under the id `backups` tells how far it is."""
    return ApiRequest("GET", f"{BASE}/backup{'' if id_ is None else f'?id={id_}'}", bytes)


def check_rows(cursor: str | None = None) -> ApiRequest[CheckedRows]:
    """Go on with a walk over the checksums of all rows: a quarter of a second's worth of it.

    `cursor` is the `next_cursor` of the call before; the last one has none. Damaged rows are set aside, and named.
    """
    return get(f"{BASE}/check-rows", _read_checked, cursor=cursor)


def backups() -> ApiRequest[list[BackupView]]:
    """The backups that are under way and the last that have ended, newest first."""
    return get(f"{BASE}/backups", lambda body: _read_backups(body).backups)
