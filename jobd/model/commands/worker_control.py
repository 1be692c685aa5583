"""List workers and direct them: take back, quiet, resume, stop."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from msgspec import Struct

from jobd.model import fields
from jobd.model.commands.command import Command, Read
from jobd.model.fields import doc

WorkerState = Literal["silent", "busy", "waiting", "idle", "died", "gone"]
DirectiveAction = Literal["quiet", "resume", "stop"]
GoodbyeReason = Literal["stopped", "drained", "once", "error"]
MAX_QUIET_RULES: Final = 100
_NAMED: Final = {"expected": "printable ASCII characters"}
_INSTANCE: Final = "Distinguishes the worker from others of the same name."
Instance = Annotated[str, doc(_INSTANCE, pattern=fields.PRINTABLE, max_length=200, extra=_NAMED)]
Host = Annotated[str, doc("The machine of the worker.", pattern=fields.PRINTABLE, max_length=253, extra=_NAMED)]
Version = Annotated[str, doc("The version of the worker.", pattern=fields.PRINTABLE, max_length=100, extra=_NAMED)]


class About(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True, gc=False):
    """A worker's description of itself, for display only. The bounds keep it below 1 KiB."""

    instance: Instance | None = None
    host: Host | None = None
    pid: Annotated[int, doc("The process id of the worker.", ge=1, le=2**32 - 1)] | None = None
    version: Version | None = None
    concurrency: Annotated[int, doc("How many jobs the worker runs at the same time.", ge=1, le=100_000)] | None = None
    quiet: Annotated[bool, doc("Whether an operator has told the worker to take no new jobs.")] = False


class Workers(Read, frozen=True, kw_only=True):
    """List workers with their state, latest claim and jobs, most recently seen first.

    Workers that died or are gone are listed only with their `state`.
    """

    limit: fields.PageLimit = fields.MAX_PAGE
    cursor: Annotated[fields.WorkerCursor | None, doc("The `next_cursor` of the previous page.")] = None
    state: Annotated[
        WorkerState | None,
        doc(
            "Only workers in this state. `silent`: it holds a job whose lock has expired. `died`: its last job was "
            "taken back from it, and it was not heard since. Default: all but `died` and `gone`."
        ),
    ] = None


class Goodbye(Command, frozen=True):
    """Say that a worker ends, so that it is not taken for one that is there. Changes no job.

    It is ignored if another instance of the worker was heard later. A worker that holds a job stays busy.
    """

    admission = "read"
    errors = ("worker_not_found",)

    name: fields.WorkerName
    instance: Instance | None = None
    reason: Annotated[GoodbyeReason, doc("Why the worker ends.")] = "stopped"


class TakeBack(Command, frozen=True):
    """End the expired grants of a silent worker now. The stall rule requeues or fails each job.

    Live locks do not change. With `dry_run` the grants are only listed.
    """

    admission = "ending"
    audit_name = "take-back"
    errors = ("worker_not_found", "worker_not_silent")

    name: fields.WorkerName
    reason: fields.Reason | None = None
    dry_run: fields.DryRun = False  # type: ignore[misc]  # of the class in others


class DirectWorker(Command, frozen=True):
    """An instruction to the process that has a worker's name. It gets the instruction with its next claim.

    A waiting claim is answered at once. The daemon forgets it with the process: it does not survive a restart.
    """

    admission = "change"
    errors = ("worker_not_found", "worker_gone")
    action: ClassVar[DirectiveAction]

    name: fields.WorkerName
    reason: fields.Reason | None = None


class QuietWorker(DirectWorker, frozen=True):
    """Let a worker take no new jobs until it is resumed. Its running jobs continue.

    The process that has the name gets the directive with its next claim, a waiting one at once, and keeps it.
    """

    audit_name = "quiet"
    action = "quiet"


class ResumeWorker(DirectWorker, frozen=True):
    """Let a worker that was told to be quiet take jobs again. Quiet rules still apply to it."""

    audit_name = "resume"
    action = "resume"


class StopWorker(DirectWorker, frozen=True):
    """Let a worker end as on SIGTERM: it takes no new jobs, and its running jobs get their grace."""

    audit_name = "stop"
    action = "stop"


class AddQuietRule(Command, frozen=True, kw_only=True):
    """Grant no jobs to the workers of a host, of a version or for a queue, also to those that appear later.

    A rule applies to workers that match all of its fields. It survives a restart. A rule with the same fields replaces
    reason and end of the first one. Jobs that a worker starts by id are not affected.
    """

    admission = "change"
    audit_name = "quiet"
    errors = ("too_many_quiet_rules", "upgrade_incomplete")

    host: Host | None = None
    version: Version | None = None
    queue: fields.QueueFilter | None = None
    reason: fields.Reason
    until: Annotated[fields.UnixMs | None, doc("When the daemon ends the rule, in Unix ms.")] = None


class EndQuietRule(Command, frozen=True):
    """End a quiet rule: the workers that it covers get jobs again."""

    admission = "change"
    audit_name = "resume"
    errors = ("quiet_rule_not_found", "upgrade_incomplete")

    rule: Annotated[fields.JobId, doc("The `id` of the rule.")]
    reason: fields.Reason | None = None


class QuietRules(Read, frozen=True, kw_only=True):
    """List the quiet rules, oldest first."""
