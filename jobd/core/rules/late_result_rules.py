"""The rules for calls whose grant has ended: the journal records them, and the result of a complete is stored.

Late results are on disk. Before a batch is decided, the actor reads those that `late_results_needed` returns, and the
state has them during the batch. A late result never changes the holder of a job.
"""

from __future__ import annotations

from typing import Any, Final

from msgspec.structs import replace

from jobd.core import guards, transitions, views
from jobd.core.state import State
from jobd.core.transaction import Transaction
from jobd.model.commands import Adopt, AnyCommand, Complete, Extend, Fail, Progress, Release, Why
from jobd.model.errors import ApiError, ApiException, api_error
from jobd.model.job import MAX_LATE_RESULTS, Job, LateResult, Policy, PreviousGrant, Result, storage_key_error
from jobd.model.responses import Response
from jobd.model.storage import LateResultQuery

LACKS_URL: Final = "it has no download_url, which [validation] require_download_url requires"
_BY_HAND: Final = (
    "jobctl transition ID STATUS completed --set download_url=URL (also set the other fields that you want to keep)"
)

Calls = Progress | Extend | Complete | Fail | Release
_CALLS: Final[dict[type, tuple[str, str]]] = {  # the verb, and what the worker tried to do
    Progress: ("progress", "report progress"),
    Extend: ("extend", "extend the lock"),
    Complete: ("complete", "complete the job"),
    Fail: ("fail", "fail the job"),
    Release: ("release", "release the job"),
}

_USES_LATE_RESULTS: Final = frozenset({Complete, Why, Adopt})


def late_results_needed(state: State, command: AnyCommand, policy: Policy) -> LateResultQuery | None:
    """Return the late results to read before `command` is decided."""
    if type(command) not in _USES_LATE_RESULTS:
        return None
    assert isinstance(command, (Complete, Why, Adopt))
    if isinstance(command, Complete) and not is_late(state, command):
        return None
    job = state.get(command.id)
    if job is None:
        return None
    if not isinstance(command, Complete):
        return LateResultQuery(job.seq, with_results=isinstance(command, Adopt))
    last = job.ended if job.ended is not None and job.ended.lock_id == command.lock_id else None
    if policy.late_policy(job.options.queue) == "drop" or (last is not None and last.verb):
        return None  # it is dropped, or it repeats the ending of its holder
    return LateResultQuery(job.seq, command.lock_id if last is None else None)


def is_late(state: State, command: Complete) -> bool:
    """Return whether `command` does not come from the holder of the job."""
    return not state.holds(command.id, command.lock_id)


def complete(tx: Transaction, command: Complete, rejection: ApiError) -> Response:
    """Decide a complete that gets `lock_lost`: drop, store or accept its result, by the policy of the queue.

    Only the lock of a former grant of this job has an effect, and for each grant only the first complete counts.
    """
    job = guards.find(tx, command.id)
    granted = _granted(tx, job, command.lock_id)
    policy = tx.policy.late_policy(job.options.queue)
    if granted is None or policy == "drop":
        note_call(tx, job, command)
        raise ApiException(rejection)
    worker, token = granted
    given = Result(command.download_url, command.file_path, command.storage_key, command.metadata)
    result = transitions.normalize_result(given) or Result()
    late = LateResult(0, tx.at.now, worker, token, guards.digest(command), command.expires_at, result)
    is_free = policy == "adopt_if_unclaimed" and _is_unclaimed(tx, job, command.lock_id)
    if is_free and _is_valid(tx, command):
        return _accept(tx, job, late)
    stored = _stored(tx, job, late)
    if stored is None:
        note_call(tx, job, command)
        raise ApiException(rejection)
    raise ApiException(_with_late_result(tx, job, stored, rejection))


def _is_valid(tx: Transaction, command: Complete) -> bool:
    try:
        guards.check_result(tx, command)
    except ApiException:
        return False
    return True


def note_call(tx: Transaction, job: Job, command: Calls) -> None:
    """Record the first rejected call of each verb of an ended grant in the journal.

    Only calls of the last ended grant, which is in memory, are recorded: unknown locks leave nothing, and no call needs
    a read from disk.
    """
    ended = job.ended
    if ended is None or ended.lock_id != command.lock_id or not tx.policy.late_calls:
        return
    verb, action = _CALLS[type(command)]
    if (job.seq, ended.fencing_token, verb) in tx.state.late_calls:
        return
    lost = f"after its lock was lost ({ended.rule})"
    reason = f"Worker {ended.worker} tried to {action} {lost}; {_holder(job)}. The call was rejected."
    details = {"verb": verb, "worker": ended.worker, "fencing_token": ended.fencing_token, **_call_details(command)}
    tx.note_call(job, ended.worker, reason, details)


def adopt(tx: Transaction, command: Adopt) -> Response:
    """Complete the job with one of its late results."""
    job = guards.find(tx, command.id)
    if job.status not in Adopt.allowed_from:
        raise guards.invalid_transition(job, "completed", _advice(job))
    late = _chosen(tx.late.results.get(job.seq, []), command.result)
    if late is None:
        which = "late result" if command.result is None else f"late result {command.result}"
        message = f"Job {job.id} has no {which}. List its late results: jobctl late {job.id}"
        raise api_error("late_result_not_found", message, job_id=job.id)
    if (why := not_adoptable(late, tx.policy)) is not None:
        raise guards.invalid("download_url", why)
    details = {"late_result": late.seq, "worker": late.worker, "fencing_token": late.fencing_token}
    expires_at = late.expires_at if late.expires_at is not None and late.expires_at > tx.at.now else None
    return _complete(tx, job, late.result, job.ended, expires_at=expires_at, reason=command.reason, details=details)


def not_adoptable(late: LateResult, policy: Policy) -> str | None:
    """Return why the configuration forbids this late result, whatever the status of the job; None if it does not."""
    if not guards.lacks_url(policy, late.result.download_url):
        return None
    message = f"Late result {late.seq} cannot be adopted: {LACKS_URL}."
    return f"{message} If the work is complete, set a URL yourself: {_BY_HAND}"


def _granted(tx: Transaction, job: Job, lock_id: str) -> tuple[str, int] | None:
    """Return worker and token of the ended grant of `job` with this lock id; None if there was none."""
    if job.ended is not None and job.ended.lock_id == lock_id:
        return job.ended.worker, job.ended.fencing_token
    older = tx.late.grants.get((job.seq, lock_id))
    return None if older is None else (older.worker, older.fencing_token)


def _is_unclaimed(tx: Transaction, job: Job, lock_id: str) -> bool:
    """Return whether nothing has happened to the job since recovery ended this grant.

    A later grant or operator action would have changed `updated_at`, a reset also `stalls`.
    """
    ended = job.ended
    if ended is None or ended.lock_id != lock_id or ended.rule != "recovery":
        return False
    if job.updated_at != ended.at or not job.stalls or guards.is_overdue(job, tx.at.now):
        return False
    return job.status == "queued" or (
        job.status == "failed" and job.error is not None and job.error.code == transitions.STALLED
    )


def _accept(tx: Transaction, job: Job, late: LateResult) -> Response:
    """Accept the result as if the grant had not ended. A repeated complete gets the same response."""
    assert job.ended is not None  # of this grant
    ended = replace(
        job.ended, at=late.at, rule="complete", reason="complete", verb="complete", body_hash=late.body_hash
    )
    reason = f"Worker {late.worker} had lost its lock, but the job had not been granted again: its result was accepted."
    details = {"worker": late.worker, "fencing_token": late.fencing_token}
    return _complete(
        tx, job, late.result, ended, expires_at=late.expires_at, worker=late.worker, reason=reason, details=details
    )


def _complete(tx: Transaction, job: Job, result: Result, ended: PreviousGrant | None, **about: Any) -> Response:
    done = transitions.completed(job, result)
    return views.job_response(tx, transitions.finish(tx, job, done, "adopted", "completed", ended, **about))


def _stored(tx: Transaction, job: Job, late: LateResult) -> LateResult | None:
    """Store the result if it is the first of its grant, not too large, and among those of the latest grants.

    A grant whose late result was replaced by later ones stores none again, so repeated calls add nothing. Return the
    artifact, None if it is not stored.
    """
    known = tx.late.results.get(job.seq, [])
    same = next((each for each in known if each.fencing_token == late.fencing_token), None)
    if same is not None:
        return same if same.body_hash == late.body_hash else None
    result = late.result
    latest = sorted([late.fencing_token, *(each.fencing_token for each in known)])[-MAX_LATE_RESULTS:]
    if late.fencing_token not in latest:
        return None
    if result.metadata is not None and len(bytes(result.metadata)) > tx.policy.late_bytes:
        return None
    if result.storage_key is not None and storage_key_error(result.storage_key) is not None:
        return None
    reason = f"Worker {late.worker} completed the job after its lock was lost; {_holder(job)}. Its result is stored."
    details = {"worker": late.worker, "fencing_token": late.fencing_token}
    return tx.keep_late(job, late, reason, details)


def _with_late_result(tx: Transaction, job: Job, late: LateResult, rejection: ApiError) -> ApiError:
    kept = f"Its result is stored as late result {late.seq}"
    if job.status == "completed":
        kept += "."
    elif guards.lacks_url(tx.policy, late.result.download_url):
        kept += f", but cannot be adopted: {LACKS_URL}."
    else:
        kept += f"; an operator can adopt it: jobctl adopt {job.id}"
    details = rejection.details | {"late_result": late.seq}
    return replace(rejection, message=f"{rejection.message} {kept}", details=details)


def _holder(job: Job) -> str:
    return f"worker {job.grant.worker} holds the job" if job.grant is not None else f"the job is {job.status}"


def _call_details(command: Calls) -> dict[str, Any]:
    """Return the content of a rejected call, for the event."""
    details: dict[str, Any] = {}
    if isinstance(command, Progress):
        details = {"progress": transitions.normalize_number(command.progress), "message": command.message}
    elif isinstance(command, Fail):
        details = {"error_message": command.error_message, "error_code": command.error_code}
    return {name: value for name, value in details.items() if value is not None}


def _chosen(known: list[LateResult], seq: int | None) -> LateResult | None:
    if seq is None:
        return max(known, key=lambda late: late.fencing_token, default=None)
    return next((late for late in known if late.seq == seq), None)


def _advice(job: Job) -> str:
    if job.status == "completed":
        return "The late results of a completed job can be read, but not adopted."
    holder = f"Worker {job.grant.worker} holds it. " if job.grant is not None else ""
    return f"{holder}Wait until its grant ends, or end it (jobctl force-fail {job.id}); then adopt."
