"""The requests that need more than the declaration of their call: Python values, several ids, or a body in pieces.

The methods of the clients get their signatures and docstrings from these functions. Durations are in milliseconds,
times in Unix milliseconds, as in the API.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from msgspec import Raw, Struct

from jobd.client.api_request import LINE_ENDS_TO_SPACES, ApiRequest, build, uuid7
from jobd.model.calls import AdminJobRequests, JobRequests, ManyJobRequests
from jobd.model.commands import MAINTENANCE_ACTIONS, About, PlanAction
from jobd.model.job import BackoffOptions, OnStall, Status
from jobd.model.responses import GrantView, JobView, PlanView, TransitionView


def create_job(
    payload: Any = None,
    *,
    queue: str | None = None,
    kind: str | None = None,
    id: str | None = None,
    priority: int | None = None,
    max_attempts: int | None = None,
    backoff: BackoffOptions | Mapping[str, Any] | None = None,
    max_stalls: int | None = None,
    on_stall: OnStall | None = None,
    stall_after_ms: int | None = None,
    progress_timeout_ms: int | None = None,
    run_at: int | None = None,
    delay_ms: int | None = None,
    expires_at: int | None = None,
    expires_in_ms: int | None = None,
    headers: Mapping[str, str] | None = None,
    idempotency_key: str | None = None,
) -> ApiRequest[JobView]:
    """Create a job and return it. The daemon has defaults for all options.

    `payload` is any value that JSON can express (msgspec.Raw is sent unchanged). A smaller `priority` runs first.
    `backoff` is a mapping such as `{"kind": "fixed", "base_ms": 5000}`. Times are Unix ms. Every grant has the
    `headers`, up to 20 texts of 2 KiB together. Without `id`, the client generates one (UUIDv7), so a retry after a
    lost response does not create a second job. With an `id`, a repeated call returns the same job if its arguments are
    the same: pass `delay_ms` and `expires_in_ms`, not times computed from now. Raises JobExists if a different request
    created this `id`, TooLarge if the payload is above the limit, TooManyJobs, TooManyQueues, UpgradeIncomplete,
    StorageFull.
    """
    fields = {**locals(), "id": id or uuid7()}
    return build(JobRequests.create, fields, key=fields.pop("idempotency_key"), has_id=True)


def create_jobs(jobs: Iterable[Mapping[str, Any]], *, idempotency_key: str | None = None) -> ApiRequest[list[JobView]]:
    """Create up to 1000 jobs, all or none, in the given order.

    Each is a mapping with the arguments of `create_job`; those without an `id` get a UUIDv7. Raises the same errors.
    """
    with_ids = [{"id": job.get("id") or uuid7()} | {name: job[name] for name in job if name != "id"} for job in jobs]
    return build(JobRequests.bulk, {"jobs": with_ids}, key=idempotency_key).then(lambda view: view.jobs)


def claim(
    worker: str,
    *,
    queues: Sequence[str] | None = None,
    kinds: Sequence[str] | None = None,
    limit: int | None = None,
    wait_ms: int = 0,
    lock_ttl_ms: int | None = None,
    stall_after_ms: int | None = None,
    progress_timeout_ms: int | None = None,
    about: About | None = None,
    idempotency_key: str | None = None,
) -> ApiRequest[list[GrantView]]:
    """Lock the first due jobs for `worker`, at most `limit` (1 by default, up to 100). The list may be empty.

    `queues` is `["default"]` by default. Without `kinds`, all kinds match. With `wait_ms` (up to 60 000), the call
    waits up to that long for a job. The other options are those of `start_processing`.
    """
    fields = {**locals(), "queues": _listed(queues), "kinds": _listed(kinds), "wait_ms": wait_ms or None}
    key = fields.pop("idempotency_key")
    return build(JobRequests.claim, fields, key=key, wait_ms=wait_ms).then(lambda view: view.grants)


def _listed(names: Sequence[str] | None) -> list[str] | None:
    return [names] if isinstance(names, str) else None if names is None else list(names)


def complete_job(
    job_id: str,
    *,
    lock_id: str,
    download_url: str | None = None,
    file_path: str | None = None,
    storage_key: str | None = None,
    metadata: Any = None,
    expires_at: int | None = None,
) -> ApiRequest[JobView]:
    """Complete the job with its result. It is deleted at `expires_at`, by default after the daemon's retention.

    Repeating the call returns the same result. Raises LockLost, and InvalidTransition if you ended the job differently.
    """
    fields = locals()
    return build(JobRequests.complete, fields, fields.pop("job_id"))


# ---------------------------------------------------------------------------------------------------------------------
# The admin API.


class JobLines(Struct, frozen=True):
    """A page of jobs, oldest first, each a line of JSON for an import. `next_cursor` is None on the last page."""

    lines: list[bytes]
    next_cursor: str | None


class _RawExportPage(Struct):
    jobs: list[Raw]
    next_cursor: str | None


def _job_lines(page: Any) -> JobLines:
    return JobLines([bytes(job).translate(LINE_ENDS_TO_SPACES) for job in page.jobs], page.next_cursor)


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
    return build(ManyJobRequests.export, locals(), shape=_RawExportPage).then(_job_lines)


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
    """Change the status if it is `from_status` now. Only a grant can make it processing.

    `updates` may set error_message, priority, run_at, max_attempts, download_url, file_path, storage_key, metadata.
    With `dry_run`, the result or error is the same, but nothing changes. Raises JobNotFound, InvalidTransition, and
    InvalidRequest if `to_status` is completed, there is no download_url, and the daemon requires one.
    """
    fields: dict[str, Any] = {"jobId": job_id, "from": from_status, "to": to_status, "updates": updates}
    fields |= {"reason": reason, "dry_run": dry_run or None}
    return build(AdminJobRequests.transition, fields, key=idempotency_key)


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
    text: str | None = None,
    error: str | None = None,
    cursor: str | None = None,
    reason: str | None = None,
) -> ApiRequest[PlanView]:
    """Plan `action` for the jobs `ids`, or for those that match the filters. Nothing changes before apply_plan.

    `action` is retry, force-reset, cancel, force-fail or delete. It can also be recover-stuck or cleanup; these take no
    ids, filters or cursor, because the daemon selects the jobs. The plan lists the `jobs` that would change, at most
    10 000, and those that would be `skipped`. The filters are those of list_jobs. If the plan has `more`, pass its
    `next_cursor` as `cursor` to make the next plan.
    """
    parameters = {name: value for name, value in locals().items() if value is not None}
    fields = {name: parameters.pop(name, None) for name in ("action", "ids", "cursor", "reason")}
    if ids is None and (parameters or action not in MAINTENANCE_ACTIONS):
        fields["filter"] = parameters
    return build(ManyJobRequests.plan, fields)
