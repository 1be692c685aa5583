"""Decide a command: call its rule and return the response with the changes to write."""

from __future__ import annotations

from typing import assert_never

from jobd.core import late_result_rules, maintenance_rules, operator_rules, plan_rules, queries
from jobd.core.changeset import Decision, Draft
from jobd.core.state import Book
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
    Moment,
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
    is_dry_run,
)
from jobd.model.errors import ApiError
from jobd.model.job import Policy
from jobd.model.responses import EmptyResponse, Response


def decide(book: Book, call: Call, at: Moment, policy: Policy) -> Decision:
    """What `call` comes to at `at`: an answer or a refusal, and the changes to write. The book is only read."""
    draft = Draft(book, call, at, policy)
    moved = None if call.expected is None else plan_rules.moved(draft, call.command, call.expected)
    answer = moved or _answer(draft, call.command)
    if is_dry_run(call.command):
        draft.changes.clear()  # the answer alone was asked for
    report = call.command.body if isinstance(call.command, Report) else None
    return Decision(answer, draft.changes, draft.checked, report)


def _answer(draft: Draft, command: AnyCommand) -> Response | ApiError:
    match command:
        case Claim():
            return claim(draft, command)
        case Create():
            return create(draft, command)
        case Start():
            return start(draft, command)
        case Complete():
            return complete(draft, command)
        case Progress():
            return progress(draft, command)
        case Extend():
            return extend(draft, command)
        case Fail():
            return fail(draft, command)
        case Release():
            return release(draft, command)
        case Cancel():
            return cancel(draft, command)
        case Bulk():
            return bulk(draft, command)
        case Undelivered():
            return undelivered(draft, command)
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
            return queries.answer(draft, command)
        case ForceFail():
            return operator_rules.force_fail(draft, command)
        case ForceReset():
            return operator_rules.force_reset(draft, command)
        case Transition():
            return operator_rules.transition(draft, command)
        case ExtendLock():
            return extend_lock(draft, command)
        case ReleaseLock():
            return release_lock(draft, command)
        case RunNow():
            return operator_rules.run_now(draft, command)
        case Update():
            return operator_rules.update(draft, command)
        case Adopt():
            return late_result_rules.adopt(draft, command)
        case Delete():
            return operator_rules.delete(draft, command)
        case Pause():
            return operator_rules.pause(draft, command)
        case Resume():
            return operator_rules.resume(draft, command)
        case ImportCheck():
            return operator_rules.check_import(draft, command)
        case Import():
            return operator_rules.import_job(draft, command)
        case ApplyPlan():
            return plan_rules.apply(draft, command, _PLANNED)
        case Preview():
            return maintenance_rules.preview(draft, command)
        case TakeBack():
            return maintenance_rules.take_back(draft, command)
        case Recover():
            return maintenance_rules.recover(draft, command)
        case Expire():
            return maintenance_rules.expire(draft, command)
        case DeleteExpired():
            return maintenance_rules.delete_expired(draft, command)
        case RepairJobs():
            return maintenance_rules.mend(draft, command)
        case ExtendAfterPause():
            return maintenance_rules.credit_absence(draft, command)
        case EndGrants():
            return maintenance_rules.end_grants(draft, command)
        case EndPauses():
            return maintenance_rules.end_pauses(draft)
        case Tick() | Ping() | Report() | RecordAction():
            return Response(EmptyResponse())
        case _:
            assert_never(command)
