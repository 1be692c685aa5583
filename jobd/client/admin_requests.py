"""The calls of the admin API: one function each, which builds the request.

The methods of AdminClient get their signatures and docstrings from here. Results have names in snake case, although the
API uses camel case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from msgspec import Raw, Struct

from jobd.client.protocol import (
    NDJSON_TYPE,
    ApiRequest,
    JobInfo,
    JobInfoPage,
    T,
    get,
    job_path,
    post,
    reader,
    uuid7,
    with_query,
)
from jobd.model import responses
from jobd.model.commands import MAINTENANCE_ACTIONS, PlanAction, WorkerState
from jobd.model.events import EventView
from jobd.model.job import Status

BASE: Final = "/admin/job-management"
JOBS: Final = f"{BASE}/jobs"
_RUN_MS: Final = 5 * 60_000  # the time for a run over millions of jobs


class JobLines(Struct, frozen=True):
    """A page of jobs, oldest first, each a line of JSON for an import. `next_cursor` is None on the last page."""

    lines: list[bytes]
    next_cursor: str | None


class ValidatedJob(responses.ValidateJobView, frozen=True, rename="camel"):
    """A job and the problems of its record."""

    job: JobInfo


def stats() -> ApiRequest[responses.StatsView]:
    """Get the counts of jobs by status, and of stalled and locked jobs.

    The average processing time, in seconds, is over the jobs completed in the last hour and those that are processing.
    """
    return get(f"{BASE}/stats", responses.StatsView)


def health() -> ApiRequest[responses.HealthView]:
    """Get the state of the database, the memory and the artifact store, measured at most 5 s ago.

    An unhealthy daemon is a result, not an error: check `status`.
    """
    return get(f"{BASE}/health", responses.HealthView)


def force_cleanup(reason: str | None = None) -> ApiRequest[responses.CleanupReport]:
    """Run cleanup now, or wait for the current run, and return the report.

    If the response is lost, the client repeats the request, and the report can be that of a second run.
    """
    return post(f"{BASE}/cleanup", responses.CleanupReport, {"reason": reason}, wait_ms=_RUN_MS)


def cleanup_state() -> ApiRequest[responses.CleanupState]:
    """Get the latest cleanup report, whether cleanup is running, and the time since the latest run (ms)."""
    return get(f"{BASE}/cleanup", responses.CleanupState)


def detect_and_recover_stuck_jobs(reason: str | None = None) -> ApiRequest[responses.RecoverStuckView]:
    """Recover every job that is stalled now, and return what was done to each.

    The client does not repeat the request after a lost response, because a repetition would find no stalled job.
    """
    request = post(f"{BASE}/recover-stuck", responses.RecoverStuckView, {"reason": reason}, wait_ms=_RUN_MS)
    return replace(request, repeatable=False)


def failures(limit: int | None = None) -> ApiRequest[responses.FailuresView]:
    """Group failed jobs (`count`) and jobs that wait for a retry (`retrying`) by error, largest groups first.

    `limit` is at most 200, by default 50.
    """
    return get(f"{BASE}/failures", responses.FailuresView, limit=limit)


def preview() -> ApiRequest[responses.PreviewView]:
    """Get what recovery and a cleanup run would do now. Changes nothing."""
    return get(f"{BASE}/preview", responses.PreviewView)


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
) -> ApiRequest[responses.PlanView]:
    """Plan `action` for the jobs `ids`, or for those that match the filters. Nothing changes before apply_plan.

    `action` is retry, force-reset, cancel, force-fail or delete. It can also be recover-stuck or cleanup; these take no
    ids, filters or cursor, because the daemon selects the jobs. The plan lists the `jobs` that would change, at most
    10 000, and those that would be `skipped`. The filters are those of list_jobs. If the plan has `more`, pass its
    `next_cursor` as `cursor` to make the next plan.
    """
    body: dict[str, Any] = {"action": action, "ids": None if ids is None else list(ids), "reason": reason}
    if ids is None:
        body["cursor"] = cursor
        query: dict[str, str | int | None] = {"status": status, "queue": queue, "kind": kind, "worker": worker}
        query |= {"since": since, "until": until, "q": q, "error": error}
        query |= {"finished_since": finished_since, "finished_until": finished_until}
        parameters = {name: value for name, value in query.items() if value is not None}
        body["filter"] = None if action in MAINTENANCE_ACTIONS and not parameters else parameters
    return post(f"{BASE}/plans", responses.PlanView, body, wait_ms=_RUN_MS)


def get_plan(plan_id: str) -> ApiRequest[responses.PlanView]:
    """Get the plan, with its result if it was applied. Raises PlanNotFound."""
    return get(job_path(f"{BASE}/plans", plan_id), responses.PlanView)


def apply_plan(plan_id: str) -> ApiRequest[responses.PlanResult]:
    """Apply the plan to every job that has not changed since. Applying it again returns the same result.

    Raises PlanNotFound: plans are kept for 15 min, and lost when the daemon restarts.
    """
    return post(job_path(f"{BASE}/plans", plan_id, "apply"), responses.PlanResult, {}, wait_ms=_RUN_MS)


def validate_job(job_id: str) -> ApiRequest[ValidatedJob]:
    """Get the job and the problems of its record. Raises JobNotFound."""
    return get(f"{BASE}/validate-job", ValidatedJob, jobId=job_id)


def force_fail(
    job_id: str, reason: str | None = None, *, idempotency_key: str | None = None
) -> ApiRequest[responses.TransitionView]:
    """Fail a queued or processing job; a live grant is revoked. Raises JobNotFound, InvalidTransition."""
    return _change("force-fail", responses.TransitionView, {"jobId": job_id, "reason": reason}, idempotency_key)


def force_reset(
    job_id: str, reason: str | None = None, *, idempotency_key: str | None = None
) -> ApiRequest[responses.TransitionView]:
    """Return a processing, failed or cancelled job to its queue as new, with progress, attempt and stalls at 0.

    A live grant is revoked. Raises JobNotFound, InvalidTransition.
    """
    return _change("force-reset", responses.TransitionView, {"jobId": job_id, "reason": reason}, idempotency_key)


def transition_job_state(
    job_id: str,
    from_status: Status,
    to_status: Status,
    *,
    updates: Mapping[str, Any] | None = None,
    reason: str | None = None,
    dry_run: bool = False,
    idempotency_key: str | None = None,
) -> ApiRequest[responses.TransitionView]:
    """Change the status if it is `from_status` now. Only a grant can make it processing.

    `updates` may set error_message, priority, run_at, max_attempts, download_url, file_path, storage_key, metadata.
    With `dry_run`, the result or error is the same, but nothing changes. Raises JobNotFound, InvalidTransition, and
    InvalidRequest if `to_status` is completed, there is no download_url, and the daemon requires one.
    """
    body: dict[str, Any] = {"jobId": job_id, "from": from_status, "to": to_status, "updates": updates}
    body |= {"reason": reason, "dry_run": dry_run or None}
    return _change("transition", responses.TransitionView, body, idempotency_key)


def extend_lock(
    job_id: str,
    lock_id: str,
    additional_ms: int | None = None,
    reason: str | None = None,
    *,
    idempotency_key: str | None = None,
) -> ApiRequest[responses.AdminLockView]:
    """Extend the lock of a worker to at least `additional_ms` from now.

    Raises JobNotFound, InvalidTransition, LockLost, MaxProcessingTimeExceeded.
    """
    body = {"jobId": job_id, "lockId": lock_id, "additionalTime": additional_ms, "reason": reason}
    return _change("extend-lock", responses.AdminLockView, body, idempotency_key)


def release_lock(
    job_id: str, lock_id: str, reason: str | None = None, *, idempotency_key: str | None = None
) -> ApiRequest[responses.AdminLockView]:
    """Release the lock of a worker: the job returns to its queue. Raises JobNotFound, InvalidTransition, LockLost."""
    body = {"jobId": job_id, "lockId": lock_id, "reason": reason}
    return _change("release-lock", responses.AdminLockView, body, idempotency_key)


def _change(verb: str, shape: type[T], body: Mapping[str, Any], key: str | None) -> ApiRequest[T]:
    return post(f"{BASE}/{verb}", shape, body, key=key or uuid7())


def cancel_job(job_id: str, reason: str | None = None, *, idempotency_key: str | None = None) -> ApiRequest[JobInfo]:
    """Cancel an unfinished job. Raises JobNotFound, InvalidTransition."""
    return post(job_path(JOBS, job_id, "cancel"), JobInfo, {"reason": reason}, key=idempotency_key or uuid7())


def run_now(
    job_id: str, reason: str | None = None, *, dry_run: bool = False, idempotency_key: str | None = None
) -> ApiRequest[JobInfo]:
    """Make a queued job due now. With `dry_run`, the result or error is the same, but nothing changes.

    Raises JobNotFound, InvalidTransition.
    """
    body = {"reason": reason, "dry_run": dry_run or None}
    return post(job_path(JOBS, job_id, "run-now"), JobInfo, body, key=idempotency_key or uuid7())


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
    """Change the priority, the due time (Unix ms) or the maximum number of attempts.

    With `dry_run`, the result or error is the same, but nothing changes. Raises JobNotFound, InvalidTransition.
    """
    body: dict[str, Any] = {"priority": priority, "run_at": run_at, "max_attempts": max_attempts}
    body |= {"reason": reason, "dry_run": dry_run or None}
    return post(job_path(JOBS, job_id, "update"), JobInfo, body, key=idempotency_key or uuid7())


def late_results(job_id: str) -> ApiRequest[list[responses.LateResultView]]:
    """List the results that were submitted after the lock was lost, oldest grant first. Raises JobNotFound."""
    return get(job_path(JOBS, job_id, "late-results"), responses.LateResultList).then(lambda found: found.late_results)


def adopt(
    job_id: str,
    result: int | None = None,
    *,
    reason: str | None = None,
    dry_run: bool = False,
    idempotency_key: str | None = None,
) -> ApiRequest[JobInfo]:
    """Complete a queued, failed or cancelled job with a late result.

    `result` is the `seq` of the late result, by default that of the latest grant. With `dry_run`, the response or error
    is the same, but nothing changes. Raises JobNotFound, LateResultNotFound, InvalidTransition if the job is processing
    or completed, and InvalidRequest if the result has no download_url and the daemon requires one.
    """
    body = {"result": result, "reason": reason, "dry_run": dry_run or None}
    return post(job_path(JOBS, job_id, "adopt"), JobInfo, body, key=idempotency_key or uuid7())


def download_artifact(job_id: str, late_result: int | None = None) -> ApiRequest[bytes]:
    """Get the artifact under the `storage_key` of the job, or of its late result with the `seq` `late_result`.

    Raises JobNotFound, LateResultNotFound, StorageUnavailable, and NotFound if there is no artifact.
    """
    return ApiRequest("GET", with_query(job_path(JOBS, job_id, "artifact"), late_result=late_result), bytes)


def delete_job(job_id: str, reason: str | None = None, *, idempotency_key: str | None = None) -> ApiRequest[JobInfo]:
    """Delete a finished job with its history. Raises JobNotFound, InvalidTransition."""
    key = idempotency_key or uuid7()
    return post(job_path(JOBS, job_id), JobInfo, {"reason": reason}, key=key, method="DELETE")


def get_job(job_id: str) -> ApiRequest[JobInfo]:
    """Get the current state of the job, with the `lock_id` of its grant. Raises JobNotFound."""
    return get(job_path(JOBS, job_id), JobInfo)


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
    """Get a page of the jobs that match, newest first. `limit` is at most 200, by default 50.

    `worker` selects jobs that this worker holds or was the last to hold. `since` and `until` (Unix ms) limit the time
    of creation, `finished_since` and `finished_until` that of the end. `q` is text in the id, payload or error message,
    and `error` the fingerprint of a failure group. `cursor` is the `next_cursor` of the previous page. A page may be
    short; the last page has no `next_cursor`.
    """
    query = {"status": status, "queue": queue, "kind": kind, "worker": worker, "since": since, "until": until, "q": q}
    query |= {"finished_since": finished_since, "finished_until": finished_until}
    return get(JOBS, JobInfoPage, **query, error=error, limit=limit, cursor=cursor)


def timeline(job_id: str) -> ApiRequest[list[EventView]]:
    """Get the job's history, oldest event first. Raises JobNotFound."""
    return get(job_path(JOBS, job_id, "timeline"), responses.TimelineView).then(lambda found: found.events)


def why(job_id: str) -> ApiRequest[responses.WhyView]:
    """Explain in plain words why the job is in its state, and what happens next. Raises JobNotFound."""
    return get(job_path(JOBS, job_id, "why"), responses.WhyView)


def locks(*, limit: int | None = None) -> ApiRequest[list[responses.LockedJob]]:
    """List the current grants with their workers and expiry times. With `limit` (up to 200), list the oldest."""
    return get(f"{BASE}/locks", responses.LockList, limit=limit).then(lambda found: found.locks)


def queues(
    *, limit: int | None = None, cursor: str | None = None, busiest: bool = False
) -> ApiRequest[list[responses.QueueView]]:
    """Get a page of queues by name: counts by status, the oldest due job, and the pause if there is one.

    `limit` is at most 200, the default. `cursor` is the name of the last queue of the previous page. With `busiest`,
    the result is one page of the queues that have the most queued and processing jobs.
    """
    return queue_page(limit=limit, cursor=cursor, busiest="true" if busiest else None).then(lambda page: page.queues)


def queue_page(
    *, limit: int | None = None, cursor: str | None = None, busiest: str | None = None
) -> ApiRequest[responses.QueueList]:
    """Get a page of queues with its `next_cursor`."""
    return get(f"{BASE}/queues", responses.QueueList, limit=limit, cursor=cursor, busiest=busiest)


def workers(*, limit: int | None = None) -> ApiRequest[list[responses.WorkerView]]:
    """List up to 200 (or `limit`) workers that are not gone, most recently seen first: state, latest claim, jobs."""
    return worker_page(limit=limit).then(lambda page: page.workers)


def worker_page(
    *, state: WorkerState | None = None, limit: int | None = None, cursor: str | None = None
) -> ApiRequest[responses.WorkerList]:
    """Get a page of workers, most recently seen first. `limit` is at most 200, the default.

    `state` selects workers in that state, by default all that are not gone. `cursor` is the `next_cursor` of the
    previous page.
    """
    return get(f"{BASE}/workers", responses.WorkerList, state=state, limit=limit, cursor=cursor)


def take_back(worker: str, reason: str | None = None, *, dry_run: bool = False) -> ApiRequest[responses.TakeBackView]:
    """End the expired grants of a silent worker now, by the stall rule of each job.

    With `dry_run`, up to 200 of them are listed, and nothing changes. Without it, the client does not repeat the
    request after a lost response, because a repetition would be rejected: the worker is not silent any more.

    Raises WorkerNotFound, WorkerNotSilent.
    """
    body = {"reason": reason, "dry_run": dry_run or None}
    request = post(job_path(f"{BASE}/workers", worker, "take-back"), responses.TakeBackView, body, wait_ms=_RUN_MS)
    return replace(request, repeatable=dry_run)


def reports(limit: int | None = None) -> ApiRequest[list[responses.CleanupReport]]:
    """List the reports of the latest cleanup runs, newest first. `limit` is at most 500, by default 50."""
    return get(f"{BASE}/reports", responses.ReportList, limit=limit).then(lambda found: found.reports)


def audit(
    *,
    who: str | None = None,
    what: str | None = None,
    job_id: str | None = None,
    since: int | None = None,
    limit: int | None = None,
    cursor: str | None = None,
) -> ApiRequest[responses.AuditPage]:
    """Get a page of the audit log, newest entry first. `limit` is at most 200, by default 50.

    `since` is Unix ms. `cursor` is the `next_cursor` of the previous page. A page may be short; the last page has no
    `next_cursor`.
    """
    query = {"who": who, "what": what, "job_id": job_id, "since": since, "limit": limit, "cursor": cursor}
    return get(f"{BASE}/audit", responses.AuditPage, **query)


def alerts() -> ApiRequest[list[responses.AlertView]]:
    """List every alert, firing or not, with its value and threshold."""
    return get(f"{BASE}/alerts", responses.AlertList).then(lambda found: found.alerts)


def pause_queue(queue: str, reason: str | None = None, *, until: int | None = None) -> ApiRequest[responses.PausedView]:
    """Grant no job of this queue until an operator resumes it, or until `until` (Unix ms).

    Running jobs continue. Another pause replaces the reason and the end.
    """
    body = {"reason": reason, "until": until}
    return post(job_path(f"{BASE}/queues", queue, "pause"), responses.PausedView, body, key=uuid7())


def resume_queue(queue: str, reason: str | None = None) -> ApiRequest[responses.PausedView]:
    """Grant jobs of this queue again."""
    return post(job_path(f"{BASE}/queues", queue, "resume"), responses.PausedView, {"reason": reason}, key=uuid7())


def webhooks() -> ApiRequest[list[responses.WebhookView]]:
    """List the webhooks and the state of their deliveries."""
    return get(f"{BASE}/webhooks", responses.WebhookList).then(lambda found: found.webhooks)


def deliveries(
    webhook: str,
    *,
    state: responses.DeliveryState | None = None,
    limit: int | None = None,
    cursor: str | None = None,
) -> ApiRequest[responses.DeliveryPage]:
    """Get a page of a webhook's pending and latest deliveries, newest first. `limit` is at most 200, by default 50.

    `cursor` is the `next_cursor` of the previous page; the last page has none. Raises NotFound for an unknown webhook.
    """
    path = job_path(f"{BASE}/webhooks", webhook, "deliveries")
    return get(path, responses.DeliveryPage, state=state, limit=limit, cursor=cursor)


def deliver_again(webhook: str, delivery: int, reason: str | None = None) -> ApiRequest[responses.DeliveryView]:
    """Send a delivery again now, in any state. It keeps its `webhook-id`.

    The client does not repeat the request after a lost response, because a repetition could send the delivery twice.
    Raises NotFound for an unknown webhook or delivery, StorageFull.
    """
    body = {"id": delivery, "reason": reason}
    request = post(job_path(f"{BASE}/webhooks", webhook, "resend"), responses.DeliveryView, body)
    return replace(request, repeatable=False)


def deliver_all_again(webhook: str, upto: int | None = None, reason: str | None = None) -> ApiRequest[int]:
    """Send all dead-lettered deliveries again, or those up to the delivery `upto`. Return their number.

    The client does not repeat the request after a lost response, because the number of a repetition would be too low.
    Raises NotFound for an unknown webhook, StorageFull.
    """
    path = job_path(f"{BASE}/webhooks", webhook, "resend-given-up")
    request = post(path, responses.Resent, {"upto": upto, "reason": reason}).then(lambda found: found.resent)
    return replace(request, repeatable=False)


def test_webhook(webhook: str, reason: str | None = None) -> ApiRequest[responses.DeliveryView]:  # noqa: PT028 - no test function
    """Send a test message to a webhook. The client does not repeat the request after a lost response.

    Raises NotFound for an unknown webhook, StorageFull.
    """
    request = post(job_path(f"{BASE}/webhooks", webhook, "test"), responses.DeliveryView, {"reason": reason})
    return replace(request, repeatable=False)


def clock() -> ApiRequest[responses.ClockView]:
    """Get the daemon's clock (Unix ms), and whether deletion by age is suspended because the clock is suspect."""
    return get(f"{BASE}/clock", responses.ClockView)


def accept_clock(reason: str | None = None) -> ApiRequest[responses.ClockView]:
    """Accept the daemon's clock as correct, which resumes deletion by age. Raises StorageFull."""
    return post(f"{BASE}/clock/accept", responses.ClockView, {"reason": reason})


def step_down(reason: str | None = None, *, force: bool = False) -> ApiRequest[responses.ClusterView]:
    """Make the leader step down, whose process then ends, so that a standby takes over at once.

    The client does not repeat the request after a lost response, because it would reach the next leader. Raises
    NoStandby if no standby is ready to take over, unless `force` is True, and NotFound if the daemon has a journal of
    its own.
    """
    body = {"reason": reason, "force": force or None}
    return replace(post(f"{BASE}/cluster/step-down", responses.ClusterView, body), repeatable=False)


def quarantine() -> ApiRequest[list[responses.QuarantinedJob]]:
    """List the jobs whose rows are damaged, and the damage."""
    return get(f"{BASE}/quarantine", responses.QuarantineList).then(lambda found: found.jobs)


def metrics() -> ApiRequest[str]:
    """Get the metrics of the node that served the previous call, in the text format of Prometheus."""
    return ApiRequest("GET", "/metrics", bytes.decode)


class _RawExportPage(Struct):
    jobs: list[Raw]
    next_cursor: str | None


_LINE_ENDS_TO_SPACES: Final = bytes.maketrans(b"\r\n", b"  ")


def _job_lines(page: _RawExportPage) -> JobLines:
    """Put each job on one line. A line end in JSON is white space, never part of a string, so this changes no value."""
    return JobLines([bytes(job).translate(_LINE_ENDS_TO_SPACES) for job in page.jobs], page.next_cursor)


def export_page(
    *,
    status: Status | None = None,
    queue: str | None = None,
    kind: str | None = None,
    limit: int | None = None,
    cursor: str | None = None,
) -> ApiRequest[JobLines]:
    """Get a page of the jobs that match, oldest first, as lines for import_jobs. `limit` is at most 200, the default.

    `cursor` is the `next_cursor` of the previous page. A page may be short; the last page has no `next_cursor`.
    """
    page = get(f"{BASE}/export", _RawExportPage, status=status, queue=queue, kind=kind, limit=limit, cursor=cursor)
    return page.then(_job_lines)


def import_jobs() -> ApiRequest[responses.ImportResult]:
    """Import jobs. The body is a stream of JSON lines. Raises StorageFull, TooManyJobs."""
    return _lines(f"{BASE}/import", responses.ImportResult)


def preview_import() -> ApiRequest[responses.ImportPreview]:
    """Preview an import. The body is a stream of JSON lines."""
    return _lines(f"{BASE}/import/preview", responses.ImportPreview)


def _lines(path: str, shape: type[T]) -> ApiRequest[T]:
    return ApiRequest("POST", path, reader(shape), headers={"Content-Type": NDJSON_TYPE}, repeatable=False)


def backup(id_: str | None = None) -> ApiRequest[bytes]:
    """Get a copy of the database; the response is the file. `backups` shows the progress under the same id.

    Raises StorageFull if the disk has no space for the copy.
    """
    return ApiRequest("GET", with_query(f"{BASE}/backup", id=id_), bytes)


def check_rows(cursor: str | None = None) -> ApiRequest[responses.CheckedRows]:
    """Check the checksums of rows for a quarter of a second, and quarantine the damaged rows.

    `cursor` is the `next_cursor` of the previous call; the last call returns none.
    """
    return get(f"{BASE}/check-rows", responses.CheckedRows, cursor=cursor)


def backups() -> ApiRequest[list[responses.BackupView]]:
    """List the running and the latest finished backups, newest first."""
    return get(f"{BASE}/backups", responses.BackupList).then(lambda found: found.backups)
