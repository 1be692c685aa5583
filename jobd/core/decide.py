"""Decide a command: call its rule and return the response."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from jobd.core import queries
from jobd.core.rules import late_results as late_result_rules
from jobd.core.rules import maintenance as maintenance_rules
from jobd.core.rules import operator as operator_rules
from jobd.core.rules import plans as plan_rules
from jobd.core.rules import worker as worker_rules
from jobd.core.transaction import Transaction
from jobd.model.commands import (
    Adopt,
    ApplyEndings,
    ApplyPlan,
    AuditLog,
    Bulk,
    Call,
    Cancel,
    Claim,
    Command,
    Complete,
    Create,
    Delete,
    DeleteExpired,
    EndGrants,
    EndPauses,
    Expire,
    Export,
    Extend,
    ExtendAfterPause,
    ExtendLock,
    Fail,
    ForceFail,
    ForceReset,
    Get,
    GetVersion,
    Import,
    ImportCheck,
    KeepDue,
    LateResults,
    ListJobs,
    Locks,
    Pause,
    Ping,
    Preview,
    Progress,
    Queues,
    RecordAction,
    Recover,
    Release,
    ReleaseLock,
    RepairJobs,
    Report,
    Resume,
    RunNow,
    SearchJobs,
    Start,
    Stats,
    TakeBack,
    Tick,
    Timeline,
    Transition,
    Undelivered,
    Update,
    Validate,
    Why,
    Workers,
)
from jobd.model.errors import ApiError
from jobd.model.responses import EmptyResponse, Response

Rule = Callable[[Transaction, Any], Response | ApiError]


def _accept(tx: Transaction, command: Command) -> Response:
    """Accept a command that changes no job."""
    return Response(EmptyResponse())


_PLANNED: Final[plan_rules.Rules] = {
    "retry": operator_rules.force_reset,
    "force-reset": operator_rules.force_reset,
    "cancel": worker_rules.cancel,
    "force-fail": operator_rules.force_fail,
    "delete": operator_rules.delete,
    "recover-stuck": maintenance_rules.recover_one,
    "cleanup": maintenance_rules.clean_one,
}


def _apply_plan(tx: Transaction, command: ApplyPlan) -> Response:
    return plan_rules.apply(tx, command, _PLANNED)


RULES: Final[Mapping[type[Command], Rule]] = {
    Claim: worker_rules.claim,
    Create: worker_rules.create,
    Bulk: worker_rules.bulk,
    Start: worker_rules.start,
    Progress: worker_rules.progress,
    Extend: worker_rules.extend,
    Complete: worker_rules.complete,
    Fail: worker_rules.fail,
    Release: worker_rules.release,
    Cancel: worker_rules.cancel,
    Undelivered: worker_rules.undelivered,
    ExtendLock: worker_rules.extend_lock,
    ReleaseLock: worker_rules.release_lock,
    ForceFail: operator_rules.force_fail,
    ForceReset: operator_rules.force_reset,
    Transition: operator_rules.transition,
    RunNow: operator_rules.run_now,
    Update: operator_rules.update,
    Delete: operator_rules.delete,
    Pause: operator_rules.pause,
    Resume: operator_rules.resume,
    Import: operator_rules.import_job,
    ImportCheck: operator_rules.check_import,
    Adopt: late_result_rules.adopt,
    ApplyPlan: _apply_plan,
    ApplyEndings: _apply_plan,
    Preview: maintenance_rules.preview,
    TakeBack: maintenance_rules.take_back,
    Recover: maintenance_rules.recover,
    Expire: maintenance_rules.expire,
    DeleteExpired: maintenance_rules.delete_expired,
    RepairJobs: maintenance_rules.repair,
    ExtendAfterPause: maintenance_rules.extend_after_pause,
    KeepDue: maintenance_rules.keep_due,
    EndGrants: maintenance_rules.end_grants,
    EndPauses: maintenance_rules.end_pauses,
    Get: queries.read,
    GetVersion: queries.read,
    Timeline: queries.read,
    Why: queries.read,
    Validate: queries.read,
    LateResults: queries.read,
    ListJobs: queries.read,
    SearchJobs: queries.read,
    Queues: queries.read,
    Workers: queries.read,
    Stats: queries.read,
    Locks: queries.read,
    Export: queries.read,
    AuditLog: queries.read,
    Tick: _accept,
    Ping: _accept,
    Report: _accept,
    RecordAction: _accept,
}


def decide(tx: Transaction, call: Call) -> Response | ApiError:
    """Decide `call` in the transaction. If its rule raises, or it is a dry run, its changes are undone."""
    tx.begin(call)
    command = call.command
    try:
        refusal = None if call.expected is None else plan_rules.refuse_if_changed(tx, command, call.expected)
        if refusal is not None:
            return refusal
        response = RULES[type(command)](tx, command)
    except Exception:
        tx.undo()
        raise
    if tx.is_dry_run:
        tx.undo()
    return response
