"""What the daemon sends to itself: recovery, cleanup, clocks."""

from __future__ import annotations

from typing import Any, Literal

from jobd.model.clocks import LockMs
from jobd.model.commands.command import Command, Read


class Preview(Read, frozen=True, kw_only=True):
    """Return what recovery and expiry would do now, up to `limit` jobs of each. Changes nothing."""

    dry_run = True

    limit: int


# Operator actions that are not job commands. They are recorded with RecordAction.
RecordedAction = Literal[
    "import",
    "cleanup",
    "accept-clock",
    "step-down",
    "resend-delivery",
    "resend-dead-lettered",
    "test-webhook",
    "backup",
    "export",
    "artifact",
    "sign-in",
    "sign-out",
]


class RecordAction(Command, frozen=True, kw_only=True):
    """Record an operator action that is not a job command, or the end of a plan. Changes nothing else.

    `what` is a RecordedAction or `plan-ACTION`, `outcome` is "done" or an error code, `job_id` the job that was read.
    """

    admission = "change"

    what: str
    details: dict[str, Any] | None = None
    job_id: str | None = None
    outcome: str = "done"
    reason: str | None = None


class Recover(Command, frozen=True, kw_only=True):
    """Recover up to `limit` stalled jobs and clear up to `limit` expired locks, judged when the command is applied.

    `reason` is the operator's, for the audit log. The timeline of each job says why it was recovered.
    """

    admission = "ending"
    audit_name = "recover-stuck"

    limit: int
    reason: str | None = None


class Expire(Command, frozen=True, kw_only=True):
    """Fail up to `limit` queued jobs whose `expires_at` has passed."""

    admission = "ending"

    limit: int


class DeleteExpired(Command, frozen=True, kw_only=True):
    """Delete the jobs in `ids` that are finished and expired when the command is applied."""

    admission = "ending"

    ids: list[str]

    def job_ids(self) -> list[str]:
        return self.ids

    def deleted_ids(self) -> list[str]:
        return self.ids


class RepairJobs(Command, frozen=True, kw_only=True):
    """Validate the jobs `ids` and apply the fixes that are safe."""

    admission = "change"

    ids: list[str]

    def job_ids(self) -> list[str]:
        return self.ids


class EndPauses(Command, frozen=True, kw_only=True):
    """Resume the queues whose pause has ended, and end the quiet rules whose time is over."""

    admission = "change"


class EndGrants(Command, frozen=True, kw_only=True):
    """End the grants of the processing jobs `ids` by their stall rule, after a restored backup or lost records.

    With `last`, the mark of a restored backup is removed from the store in the same transaction. `cause` is a sentence.
    """

    admission = "ending"

    ids: list[str]
    last: bool
    cause: str = "The store was restored from a backup, which ends every grant in it."

    def weight(self) -> int:
        return len(self.ids)


class ExtendAfterPause(Command, frozen=True, kw_only=True):
    """Extend the deadlines of the processing jobs `ids` by `grace_ms` after a time in which the daemon did not run.

    `since` is the lock time at which the daemon runs again (None: now). A lock that was live then is not lost while
    this command waits for a slow disk.
    """

    admission = "ending"

    ids: list[str]
    grace_ms: int
    since: LockMs | None = None

    def weight(self) -> int:
        return len(self.ids)


class KeepDue(Command, frozen=True, kw_only=True):
    """Keep the live jobs due that were due before the wall clock was set back: id -> `run_at` at that time.

    A job whose `run_at` has changed since then is not affected.
    """

    admission = "ending"

    jobs: dict[str, int]

    def weight(self) -> int:
        return len(self.jobs)


class Tick(Command, frozen=True, kw_only=True):
    """Persist the lock time. Changes no job."""

    admission = "change"


class Ping(Command, frozen=True, kw_only=True):
    """Pass through the mailbox and change nothing."""

    admission = "ping"


class Report(Command, frozen=True, kw_only=True):
    """Store the report of a cleanup run (JSON text)."""

    admission = "change"

    body: bytes
