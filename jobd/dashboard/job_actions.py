"""What an operator may do to one job, as data: from which states to which, and the command that does it.

Decides nothing: whether it can be done is the actor's to say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

import msgspec
from msgspec import UNSET, Struct

from jobd.dashboard.urls import curl_prefix
from jobd.model.commands import Adopt, Cancel, Command, Delete, ExtendLock, ForceFail, ForceReset, ReleaseLock, RunNow
from jobd.model.responses import JobView

Verb = Literal["run-now", "extend", "release", "force-reset", "force-fail", "cancel", "delete", "adopt"]


class ActionTarget(Struct, frozen=True):
    """What a action is done to, and how. `reason`: None where none was given; `lock_id`: the lock's secret, or "";
    `result`: the number of a late result, None where it is about none."""

    id: str
    reason: str | None = None
    lock_id: str = ""
    result: int | None = None


class JobAction(Struct, frozen=True):
    """`to` is the status afterwards, None where it stays; `shell` is the same for a terminal, "" where there is none.

    `wants_result`: it is about one of the job's late results, and its button is beside that. `call`: method and path of
    the same in the admin API; where that has no `{id}` the body names the job.
    """

    verb: Verb
    label: str
    description: str
    allowed_from: frozenset[str]
    to: str | None
    make_command: Callable[[ActionTarget], Command]
    needs_lock: bool = False
    needs_late_result: bool = False
    destructive: bool = False
    cli_command: str = ""
    api_call: str = ""


_ALL: Final = (
    JobAction(
        "run-now",
        "Run now",
        "It becomes due at once. Its place among jobs of the same priority is that of now.",
        frozenset({"queued"}),
        None,
        lambda on: RunNow(id=on.id, reason=on.reason),
        cli_command="jobctl run-now",
        api_call="POST jobs/{id}/run-now",
    ),
    JobAction(
        "extend",
        "Extend lock",
        "The lock lives for its whole time again, from now on. The worker keeps the job and notices nothing.",
        frozenset({"processing"}),
        None,
        lambda on: ExtendLock(id=on.id, lock_id=on.lock_id, reason=on.reason),
        needs_lock=True,
        api_call="POST extend-lock",
    ),
    JobAction(
        "release",
        "Release",
        "The job goes back to its queue and keeps its place; the attempt does not count. The worker has lost it.",
        frozenset({"processing"}),
        "queued",
        lambda on: ReleaseLock(id=on.id, lock_id=on.lock_id, reason=on.reason),
        needs_lock=True,
        api_call="POST release-lock",
    ),
    JobAction(
        "force-reset",
        "Reset",
        "The job waits again as if it were new: no attempts, no stalls, no error, due now. A worker that holds it has "
        "lost it, and may have done half of the work.",
        frozenset({"processing", "failed", "cancelled"}),
        "queued",
        lambda on: ForceReset(id=on.id, reason=on.reason),
        destructive=True,
        cli_command="jobctl force-reset",
        api_call="POST force-reset",
    ),
    JobAction(
        "force-fail",
        "Fail",
        "The job ends as failed, with your reason as its error. A worker that holds it has lost it.",
        frozenset({"queued", "processing"}),
        "failed",
        lambda on: ForceFail(id=on.id, reason=on.reason),
        destructive=True,
        cli_command="jobctl force-fail",
        api_call="POST force-fail",
    ),
    JobAction(
        "cancel",
        "Cancel",
        "The job ends as cancelled. A worker that holds it is told to stop with its next call.",
        frozenset({"queued", "processing"}),
        "cancelled",
        lambda on: Cancel(id=on.id, reason=on.reason),
        destructive=True,
        cli_command="jobctl cancel",
        api_call="POST jobs/{id}/cancel",
    ),
    JobAction(
        "delete",
        "Delete",
        "The job and its history are gone for good.",
        frozenset({"completed", "failed", "cancelled"}),
        "gone",
        lambda on: Delete(id=on.id, reason=on.reason),
        destructive=True,
        cli_command="jobctl delete",
        api_call="DELETE jobs/{id}",
    ),
    JobAction(
        "adopt",
        "Adopt",
        "The job is completed with what this worker brought after it had lost its lock. Nothing of the job runs again.",
        frozenset({"queued", "failed", "cancelled"}),
        "completed",
        lambda on: Adopt(id=on.id, result=on.result, reason=on.reason),
        needs_late_result=True,
        cli_command="jobctl adopt",
        api_call="POST jobs/{id}/adopt",
    ),
)
JOB_ACTIONS: Final[dict[str, JobAction]] = {action.verb: action for action in _ALL}


def visible_lock_id(job: JobView) -> str:
    """The secret of the job's lock, "" where there is none or it is not shown."""
    return "" if job.lock is None or job.lock.lock_id is UNSET else job.lock.lock_id


def available_actions(job: JobView, now: int) -> list[JobAction]:
    """What can be done to `job` as it is."""
    return [action for action in _ALL if not action.needs_late_result and is_allowed(action, job, now)]


def is_allowed(action: JobAction, job: JobView, now: int) -> bool:
    if action.verb == "run-now" and job.run_at <= now:
        return False
    return job.status in action.allowed_from and (not action.needs_lock or visible_lock_id(job) != "")


def curl_command(action: JobAction, on: ActionTarget, base: str) -> str:
    """The action as a call of curl; the lock's secret is left to who has it."""
    method, _, path = action.api_call.partition(" ")
    body: dict[str, object] = {} if "{id}" in path else {"jobId": on.id}
    if action.needs_lock:
        body["lockId"] = "LOCK_ID"
    if action.needs_late_result and on.result is not None:
        body["result"] = on.result
    body["reason"] = "WHY"
    sent = f" -H 'Content-Type: application/json' -d '{msgspec.json.encode(body).decode()}'"
    place = f"{base}/admin/job-management/{path.replace('{id}', on.id)}"
    call = curl_prefix(on.id if "{id}" in path else "")
    return f'{call} -X {method} -H "Authorization: Bearer $ADMIN_TOKEN"{sent} {place}'
