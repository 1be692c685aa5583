"""All commands, and a command with its caller and time."""

from __future__ import annotations

from typing import Final, get_args

from msgspec import Struct

from jobd.model.clocks import LockMs
from jobd.model.commands import (
    grants,
    internal,
    job_control,
    job_creation,
    plans,
    queues,
    reads,
    schedule_control,
    worker_control,
)
from jobd.model.commands.command import Command


class IdempotencyKey(Struct, frozen=True):
    """An Idempotency-Key in use: `digest` of listener, method, path and key; `body_hash` of the body."""

    digest: str
    body_hash: str


class Operator(Struct, frozen=True):
    """An operator: the name given in the request ("" for none), and the address that it came from.

    `part_of` identifies an action that consists of many commands (an import, a plan) and has one audit entry.
    """

    name: str
    address: str
    part_of: str | None = None

    @property
    def who(self) -> str:
        return self.name or "admin"

    @property
    def by(self) -> str:
        """The operator in the form of `Event.by`."""
        return f"admin:{self.name}" if self.name else "admin"


class ClockStep(Struct, frozen=True, gc=False):
    """A step that made the wall clock suspect: the last time that was trusted, and the ms that the clock was ahead."""

    since: int
    ahead_ms: int


class ClockTrust(Struct, frozen=True, gc=False):
    """What is persisted about the wall clock. `step_since` and `step_ms` are those of the step while it is suspect."""

    suspect: bool = False
    expected_ms: int = 0  # the wall time that is expected; a clock that was set back is behind it
    step_since: int = 0
    step_ms: int = 0


class Moment(Struct, frozen=True, gc=False):
    """The time at which a batch is decided: wall time, lock time and their difference, in ms."""

    now: int
    lock_ms: LockMs
    offset: int  # wall time minus lock time; constant between steps of the wall clock, so displayed times are stable
    trusted: int | None = None  # the expected wall time while the clock is suspect, else None
    ahead: int = 0  # wall time minus its expected value
    step: ClockStep | None = None  # while the clock is suspect
    held: bool = False  # lock time stands still, because a full disk rejects the reports of workers

    @property
    def suspect(self) -> bool:
        """Whether wall time is too far ahead of the expected time. While it is, nothing is deleted or failed by age."""
        return self.trusted is not None

    @property
    def believed(self) -> int:
        """The wall time to persist. It ignores a suspect jump."""
        return self.now if self.trusted is None else self.trusted

    @property
    def expected(self) -> int:
        """The expected wall time, by which stored responses age: no step moves it while the daemon runs."""
        return self.now - self.ahead if self.trusted is None else self.trusted

    @property
    def latest(self) -> int:
        """The wall time from which retention and `expires_in_ms` count.

        While the clock is behind its expected value, that value: otherwise a job that finishes now would be deleted as
        soon as the clock is put right, and a new one would expire.
        """
        return self.now - min(self.ahead, 0)

    @property
    def aging(self) -> int:
        """The wall time by which deliveries of webhooks age: `believed`, or the expected time if that is later.

        So a delivery that begins while the clock is behind is not old when the clock is put right.
        """
        return max(self.believed, self.expected)

    @property
    def clock(self) -> ClockTrust:
        """What to persist about the clock."""
        if self.step is None:
            return ClockTrust(self.suspect, self.expected)
        return ClockTrust(self.suspect, self.expected, self.step.since, self.step.ahead_ms)

    def wall(self, lock_ms: LockMs) -> int:
        """Return the wall time at which lock time will be `lock_ms`."""
        return lock_ms + self.offset  # type: ignore[return-value]  # elsewhere they never mix


# The commands of a stream, by the `op` of their lines.
STREAMED_COMMANDS: Final[dict[str, type[Command]]] = {
    command.__name__.lower(): command
    for command in (
        job_creation.Create,
        job_creation.Bulk,
        grants.Start,
        grants.Claim,
        grants.Progress,
        grants.Extend,
        grants.Complete,
        grants.Fail,
        grants.Release,
        job_control.Cancel,
        reads.Get,
    )
}

AnyCommand = (
    job_creation.Create
    | job_creation.Bulk
    | reads.Get
    | reads.WaitForJobs
    | reads.Timeline
    | reads.Why
    | queues.WhyQueue
    | reads.Validate
    | reads.ListJobs
    | reads.SearchJobs
    | grants.Start
    | grants.Claim
    | grants.Progress
    | grants.Extend
    | grants.AppendOutput
    | grants.Complete
    | grants.Fail
    | grants.Release
    | job_control.Cancel
    | queues.Queues
    | worker_control.Workers
    | job_control.ForceFail
    | job_control.ForceReset
    | job_control.RetryJob
    | job_control.Transition
    | job_control.ExtendLock
    | job_control.ReleaseLock
    | job_control.RunNow
    | job_control.Update
    | reads.GetVersion
    | reads.LateResults
    | job_control.Adopt
    | job_control.Copy
    | job_control.Delete
    | queues.Pause
    | queues.Resume
    | worker_control.TakeBack
    | worker_control.QuietWorker
    | worker_control.ResumeWorker
    | worker_control.StopWorker
    | worker_control.AddQuietRule
    | worker_control.EndQuietRule
    | worker_control.QuietRules
    | job_creation.Import
    | job_creation.ImportCheck
    | reads.Export
    | reads.AuditLog
    | plans.ApplyPlan
    | plans.ApplyEndings
    | internal.Preview
    | reads.Stats
    | reads.Locks
    | worker_control.Goodbye
    | schedule_control.PutSchedule
    | schedule_control.GetSchedule
    | schedule_control.Schedules
    | schedule_control.RunSchedule
    | schedule_control.PauseSchedule
    | schedule_control.ResumeSchedule
    | schedule_control.DeleteSchedule
    | schedule_control.Fire
    | grants.Undelivered
    | internal.ExtendAfterPause
    | internal.KeepDue
    | internal.EndGrants
    | internal.Recover
    | internal.Expire
    | internal.DeleteExpired
    | internal.RepairJobs
    | internal.RecordAction
    | internal.EndPauses
    | internal.Tick
    | internal.Ping
    | internal.Report
)
# Every `action` of an audit entry.
AUDITED_ACTIONS: Final = tuple(
    dict.fromkeys(
        [
            *(kind.audit_name for kind in get_args(AnyCommand) if kind.audit_name is not None),
            *get_args(internal.RecordedAction),
            *(f"plan-{action}" for action in get_args(plans.PlanAction)),
        ]
    )
)


class IssuedCommand(Struct):
    """A command with its caller and the randomness that it may use. `admin` callers see lock ids.

    `operator` is set for requests of operators. `expected` is the version of the job that the caller has seen
    (core/rules/plan_rules.py): if the job has changed since, the command is rejected.
    """

    command: AnyCommand
    by: str = "client"
    seed: bytes = b""
    admin: bool = False
    operator: Operator | None = None
    expected: str | None = None
