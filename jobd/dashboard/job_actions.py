"""The actions of operators on one job as data: names, descriptions and commands."""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec
from msgspec import UNSET, Raw, Struct

from jobd.api.admin_routes import ROUTES
from jobd.dashboard.urls import curl_prefix
from jobd.model import commands
from jobd.model.commands import JobCommand
from jobd.model.errors import api_error
from jobd.model.responses import JobView

Verb = Literal[
    "run-now", "extend", "release", "retry", "force-reset", "force-fail", "cancel", "delete", "copy", "adopt"
]


class ActionTarget(Struct, frozen=True):
    """The job and arguments of an action. `lock_id` is the secret of the lock, `result` the number of a late result.

    `payload` is the JSON text of another payload, "" for the same one.
    """

    id: str
    reason: str | None = None
    lock_id: str = ""
    result: int | None = None
    payload: str = ""


class JobAction(Struct, frozen=True):
    """An action on one job.

    `description` continues "The job" or "Each job". `command` declares the statuses that allow it and the status
    afterwards.
    """

    verb: Verb
    label: str
    description: str
    command: type[JobCommand]
    destructive: bool = False

    @property
    def cli_command(self) -> str:
        """The equivalent of jobctl, "" if there is none."""
        return "" if self.needs_lock else f"jobctl {self.verb}"

    @property
    def needs_lock(self) -> bool:
        return "lock_id" in self.command.__struct_fields__

    @property
    def needs_late_result(self) -> bool:
        return "result" in self.command.__struct_fields__

    def make_command(self, on: ActionTarget) -> JobCommand:
        fields: dict[str, Any] = {"id": on.id, "reason": on.reason}
        if self.needs_lock:
            fields["lock_id"] = on.lock_id
        if self.needs_late_result:
            fields["result"] = on.result
        if on.payload.strip():
            fields["payload"] = _json(on.payload)
        return self.command(**fields)


_ALL: Final = (
    JobAction(
        "run-now",
        "Run now",
        "becomes due now. Among jobs of the same priority it is ordered by this time.",
        commands.RunNow,
    ),
    JobAction(
        "extend",
        "Extend lock",
        "keeps its worker: the lock is extended to its full TTL from now. The worker is not notified.",
        commands.ExtendLock,
    ),
    JobAction(
        "release",
        "Release",
        "returns to its queue and keeps its position; the attempt does not count. The worker loses the lock.",
        commands.ReleaseLock,
    ),
    JobAction(
        "retry",
        "Retry",
        "is queued again as if it were new: no attempts, no stalls, no error, due now.",
        commands.RetryJob,
    ),
    JobAction(
        "force-reset",
        "Reset",
        "is queued again as if it were new: no attempts, no stalls, no error, due now. A worker that holds it "
        "loses the lock, and may have done part of the work.",
        commands.ForceReset,
        destructive=True,
    ),
    JobAction(
        "force-fail",
        "Fail",
        "fails, with your reason as its error. A worker that holds it loses the lock.",
        commands.ForceFail,
        destructive=True,
    ),
    JobAction(
        "cancel",
        "Cancel",
        "is cancelled. A worker that holds it loses the lock.",
        commands.Cancel,
        destructive=True,
    ),
    JobAction(
        "delete",
        "Delete",
        "is deleted permanently, with its history.",
        commands.Delete,
        destructive=True,
    ),
    JobAction(
        "copy",
        "Copy",
        "does not change. A new job gets its options and headers, and is due now.",
        commands.Copy,
    ),
    JobAction(
        "adopt",
        "Adopt",
        "is completed with the result that this worker submitted after it lost its lock. It will not run again.",
        commands.Adopt,
    ),
)
JOB_ACTIONS: Final[dict[str, JobAction]] = {action.verb: action for action in _ALL}
_ROUTES: Final = {route.request: route for route in ROUTES}


def visible_lock_id(job: JobView) -> str:
    """Return the secret of the job's lock, "" if there is none or it is hidden."""
    return "" if job.lock is None or job.lock.lock_id is UNSET else job.lock.lock_id


def _json(payload: str) -> Raw:
    try:
        msgspec.json.decode(payload)
    except (msgspec.DecodeError, RecursionError) as error:
        message = f"The payload is not valid JSON: {error}. Go back and correct it. A text needs quotes."
        raise api_error("invalid_request", message) from None
    return Raw(payload.encode())


def available_actions(job: JobView, now: int) -> list[JobAction]:
    """Return the actions that the job's status allows, except those on late results."""
    return [action for action in _ALL if not action.needs_late_result and is_allowed(action, job, now)]


def is_allowed(action: JobAction, job: JobView, now: int) -> bool:
    if action.verb == "run-now" and job.run_at <= now:
        return False
    if action.verb == "force-reset" and job.status in commands.RetryJob.allowed_from:
        return False  # a retry does the same
    return job.status in action.command.allowed_from and (not action.needs_lock or visible_lock_id(job) != "")


def curl_command(action: JobAction, target: ActionTarget, base_url: str) -> str:
    """Return the action as a curl command, with a placeholder for the secret of the lock."""
    route = _ROUTES[action.command]
    body: dict[str, object] = {} if route.path_field else {"jobId": target.id}
    if action.needs_lock:
        body["lockId"] = "LOCK_ID"
    if action.needs_late_result and target.result is not None:
        body["result"] = target.result
    body["reason"] = "REASON"
    content = f" -H 'Content-Type: application/json' -d '{msgspec.json.encode(body).decode()}'"
    url = base_url + route.path.replace("{id}", target.id)
    curl = curl_prefix(target.id if route.path_field else "")
    return f'{curl} -X {route.method} -H "Authorization: Bearer $ADMIN_TOKEN"{content} {url}'
