"""What every command declares, and the kinds of commands."""

from __future__ import annotations

from typing import ClassVar, Final, Literal

from msgspec import Struct, field

from jobd.model import fields
from jobd.model.job import Status

MAX_NAMES: Final = 100  # queues or kinds of one claim
MAX_WAIT_MS: Final = 60_000

# The admission class of a command (engine/envelope.py, engine/disk_full.py). As the mailbox fills up, `create` is
# rejected first, then `read` and `grant`. A full disk first rejects `create`, then everything but `ending`, `read` and
# `ping`. `ending` commands free space or store the result of work that was done.
Admission = Literal["create", "read", "ping", "grant", "change", "ending"]


class Command(Struct, frozen=True, gc=False, forbid_unknown_fields=True, kw_only=True):
    """A request to the actor. Decoded directly from a body; unknown fields are rejected."""

    admission: ClassVar[Admission]  # of commands that reach the actor
    audit_name: ClassVar[str | None] = None  # `action` of its audit entries; None: no entries
    errors: ClassVar[tuple[str, ...]] = ()  # in addition to those that every call can return
    is_of_job: ClassVar[bool] = False  # a JobCommand; isinstance() is slow for a struct of another class
    is_of_holder: ClassVar[bool] = False  # it names a grant of its job
    dry_run: ClassVar[bool] = False  # the response shows the effect, but nothing is changed
    can_wait: ClassVar[bool] = False  # the response may wait for a job
    needs_payload: ClassVar[bool] = False  # the decision needs the payload or the request hash of its jobs
    stores_job: ClassVar[bool] = False  # a stored response shows its job with payload and metadata

    def sender(self) -> str | None:
        """Return the worker that sends the command, in the form of `Event.by`, if the command names it."""
        return None

    def job_ids(self) -> list[str]:
        """Return the ids of the jobs that the rule finds by id."""
        return []

    def deleted_ids(self) -> list[str]:
        """Return the ids of the jobs that the command may delete without naming them alone."""
        return []

    def weight(self) -> int:
        """Return how much the command counts in a batch, by what it writes, so that a batch takes a few ms."""
        return 1


class Read(Command, frozen=True):
    """A command that changes nothing."""

    admission = "read"


class JobCommand(Command, frozen=True):
    """A command on one job. Over HTTP the path gives its id.

    The class of an operator's action also declares `allowed_from`, the statuses that allow it, and `leads_to`, the
    status afterwards: None if it does not change. `plan_scope` says which jobs a plan of the action contains.
    """

    allowed_from: ClassVar[tuple[Status, ...]]
    leads_to: ClassVar[Status | Literal["deleted"] | None] = None
    plan_scope: ClassVar[str]
    is_of_job = True
    stores_job: ClassVar[bool] = True

    id: fields.NamedJobId

    def job_ids(self) -> list[str]:
        return [self.id]


class JobRead(JobCommand, Read, frozen=True):
    """A read of one job."""


class NamedJobCommand(JobCommand, frozen=True):
    """A command whose body names the job as `jobId`."""

    id: fields.NamedJobId = field(name="jobId")


class HolderCommand(JobCommand, frozen=True, kw_only=True):
    """A command of the worker that holds the job."""

    is_of_holder: ClassVar[bool] = True

    lock_id: fields.LockId
