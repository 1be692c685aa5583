"""What an operator may do to one job, as data: from which states to which, and the command that does it.

Decides nothing: whether it can be done is the actor's to say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

import msgspec
from msgspec import UNSET, Struct

from jobd.dashboard.urls import curl_for
from jobd.model.commands import Adopt, Cancel, Command, Delete, ExtendLock, ForceFail, ForceReset, ReleaseLock, RunNow
from jobd.model.responses import JobView

Verb = Literal["run-now", "extend", "release", "force-reset", "force-fail", "cancel", "delete", "adopt"]


class Chosen(Struct, frozen=True):
    """What a deed is done to, and how. `reason`: None where none was given; `lock_id`: the lock's secret, or "";
    `result`: the number of a late result, None where it is about none."""

    id: str
    reason: str | None = None
    lock_id: str = ""
    result: int | None = None


class Deed(Struct, frozen=True):
    """`to` is the status afterwards, None where it stays; `shell` is the same for a terminal, "" where there is none.

    `wants_result`: it is about one of the job's late results, and its button is beside that. `call`: method and path of
    the same in the admin API; where that has no `{id}` the body names the job.
    """

    verb: Verb
    label: str
    says: str
    froms: frozenset[str]
    to: str | None
    make: Callable[[Chosen], Command]
    wants_lock: bool = False
    wants_result: bool = False
    is_grave: bool = False
    shell: str = ""
    call: str = ""


_ALL: Final = (
    Deed(
        "run-now",
        "Run now",
        "It becomes due at once. Its place among jobs of the same priority is that of now.",
        frozenset({"queued"}),
        None,
        lambda on: RunNow(id=on.id, reason=on.reason),
        shell="jobctl run-now",
        call="POST jobs/{id}/run-now",
    ),
    Deed(
        "extend",
        "Extend lock",
        "The lock lives for its whole time again, from now on. The worker keeps the job and notices nothing.",
        frozenset({"processing"}),
        None,
        lambda on: ExtendLock(id=on.id, lock_id=on.lock_id, reason=on.reason),
        wants_lock=True,
        call="POST extend-lock",
    ),
    Deed(
        "release",
        "Release",
        "The job goes back to its queue and keeps its place; the attempt does not count. The worker has lost it.",
        frozenset({"processing"}),
        "queued",
        lambda on: ReleaseLock(id=on.id, lock_id=on.lock_id, reason=on.reason),
        wants_lock=True,
        call="POST release-lock",
    ),
    Deed(
        "force-reset",
        "Reset",
        "The job waits again as if it were new: no attempts, no stalls, no error, due now. A worker that holds it has "
        "lost it, and may have done half of the work.",
        frozenset({"processing", "failed", "cancelled"}),
        "queued",
        lambda on: ForceReset(id=on.id, reason=on.reason),
        is_grave=True,
        shell="jobctl force-reset",
        call="POST force-reset",
    ),
    Deed(
        "force-fail",
        "Fail",
        "The job ends as failed, with your reason as its error. A worker that holds it has lost it.",
        frozenset({"queued", "processing"}),
        "failed",
        lambda on: ForceFail(id=on.id, reason=on.reason),
        is_grave=True,
        shell="jobctl force-fail",
        call="POST force-fail",
    ),
    Deed(
        "cancel",
        "Cancel",
        "The job ends as cancelled. A worker that holds it is told to stop with its next call.",
        frozenset({"queued", "processing"}),
        "cancelled",
        lambda on: Cancel(id=on.id, reason=on.reason),
        is_grave=True,
        shell="jobctl cancel",
        call="POST jobs/{id}/cancel",
    ),
    Deed(
        "delete",
        "Delete",
        "The job and its history are gone for good.",
        frozenset({"completed", "failed", "cancelled"}),
        "gone",
        lambda on: Delete(id=on.id, reason=on.reason),
        is_grave=True,
        shell="jobctl delete",
        call="DELETE jobs/{id}",
    ),
    Deed(
        "adopt",
        "Adopt",
        "The job is completed with what this worker brought after it had lost its lock. Nothing of the job runs again.",
        frozenset({"queued", "failed", "cancelled"}),
        "completed",
        lambda on: Adopt(id=on.id, result=on.result, reason=on.reason),
        wants_result=True,
        shell="jobctl adopt",
        call="POST jobs/{id}/adopt",
    ),
)
DEEDS: Final[dict[str, Deed]] = {deed.verb: deed for deed in _ALL}


def lock_id_of(job: JobView) -> str:
    """The secret of the job's lock, "" where there is none or it is not shown."""
    return "" if job.lock is None or job.lock.lock_id is UNSET else job.lock.lock_id


def open_to(job: JobView, now: int) -> list[Deed]:
    """What can be done to `job` as it is."""
    return [deed for deed in _ALL if not deed.wants_result and can(deed, job, now)]


def can(deed: Deed, job: JobView, now: int) -> bool:
    if deed.verb == "run-now" and job.run_at <= now:
        return False
    return job.status in deed.froms and (not deed.wants_lock or lock_id_of(job) != "")


def curl(deed: Deed, on: Chosen, base: str) -> str:
    """The deed as a call of curl; the lock's secret is left to who has it."""
    method, _, path = deed.call.partition(" ")
    body: dict[str, object] = {} if "{id}" in path else {"jobId": on.id}
    if deed.wants_lock:
        body["lockId"] = "LOCK_ID"
    if deed.wants_result and on.result is not None:
        body["result"] = on.result
    body["reason"] = "WHY"
    sent = f" -H 'Content-Type: application/json' -d '{msgspec.json.encode(body).decode()}'"
    place = f"{base}/admin/job-management/{path.replace('{id}', on.id)}"
    call = curl_for(on.id if "{id}" in path else "")
    return f'{call} -X {method} -H "Authorization: Bearer $ADMIN_TOKEN"{sent} {place}'
