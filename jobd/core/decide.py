"""Decide a command: call its rule and return the response."""

from __future__ import annotations

from typing import assert_never

from jobd.core import late_result_rules, maintenance_rules, operator_rules, plan_rules, queries
from jobd.core.transaction import Transaction
from jobd.core.worker_rules import (
    _PLANNED,
    bulk,
    cancel,
    claim,
    complete,
    create,
    extend,
    extend_lock,
    fail,
    progress,
    release,
    release_lock,
    start,
    undelivered,
)
from jobd.model.commands import (
    Adopt,
    AnyCommand,
    ApplyPlan,
    AuditLog,
    Bulk,
    Call,
    Cancel,
    Claim,
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


def decide(tx: Transaction, call: Call) -> Response | ApiError:
    """Decide `call` in the transaction. If its rule raises, or it is a dry run, its changes are undone."""
    tx.begin(call)
    try:
        moved = None if call.expected is None else plan_rules.moved(tx, call.command, call.expected)
        response = moved or _answer(tx, call.command)
    except Exception:
        tx.undo()
        raise
    if tx.is_dry_run:
        tx.undo()
    return response


def _answer(tx: Transaction, command: AnyCommand) -> Response | ApiError:
    match command:
        case Claim():
            return claim(tx, command)
        case Create():
            return create(tx, command)
        case Start():
            return start(tx, command)
        case Complete():
            return complete(tx, command)
        case Progress():
            return progress(tx, command)
        case Extend():
            return extend(tx, command)
        case Fail():
            return fail(tx, command)
        case Release():
            return release(tx, command)
        case Cancel():
            return cancel(tx, command)
        case Bulk():
            return bulk(tx, command)
        case Undelivered():
            return undelivered(tx, command)
        case (
            Get()
            | GetVersion()
            | Timeline()
            | Why()
            | Validate()
            | LateResults()
            | ListJobs()
            | Queues()
            | Workers()
            | Stats()
            | Locks()
            | Export()
            | AuditLog()
        ):
            return queries.answer(tx, command)
        case ForceFail():
            return operator_rules.force_fail(tx, command)
        case ForceReset():
            return operator_rules.force_reset(tx, command)
        case Transition():
            return operator_rules.transition(tx, command)
        case ExtendLock():
            return extend_lock(tx, command)
        case ReleaseLock():
            return release_lock(tx, command)
        case RunNow():
            return operator_rules.run_now(tx, command)
        case Update():
            return operator_rules.update(tx, command)
        case Adopt():
            return late_result_rules.adopt(tx, command)
        case Delete():
            return operator_rules.delete(tx, command)
        case Pause():
            return operator_rules.pause(tx, command)
        case Resume():
            return operator_rules.resume(tx, command)
        case ImportCheck():
            return operator_rules.check_import(tx, command)
        case Import():
            return operator_rules.import_job(tx, command)
        case ApplyPlan():
            return plan_rules.apply(tx, command, _PLANNED)
        case Preview():
            return maintenance_rules.preview(tx, command)
        case TakeBack():
            return maintenance_rules.take_back(tx, command)
        case Recover():
            return maintenance_rules.recover(tx, command)
        case Expire():
            return maintenance_rules.expire(tx, command)
        case DeleteExpired():
            return maintenance_rules.delete_expired(tx, command)
        case RepairJobs():
            return maintenance_rules.mend(tx, command)
        case ExtendAfterPause():
            return maintenance_rules.credit_absence(tx, command)
        case EndGrants():
            return maintenance_rules.end_grants(tx, command)
        case EndPauses():
            return maintenance_rules.end_pauses(tx)
        case Tick() | Ping() | Report() | RecordAction():
            return Response(EmptyResponse())
        case _:
            assert_never(command)
