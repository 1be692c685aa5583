"""Decide a command: call its rule and return the response."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, get_args

from jobd.core import queries
from jobd.core.rules import (
    create_rules,
    late_result_rules,
    maintenance_rules,
    operator_rules,
    plan_rules,
    quiet_rules,
    schedule_rules,
    worker_rules,
)
from jobd.core.transaction import Transaction
from jobd.model import commands
from jobd.model.commands import ApplyPlan, Command, IssuedCommand
from jobd.model.errors import ApiError, ApiException
from jobd.model.responses import EmptyResponse, Response

Rule = Callable[[Transaction, Any], Response]


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
    commands.Claim: worker_rules.claim,
    commands.Create: create_rules.create,
    commands.Bulk: create_rules.bulk,
    commands.Start: worker_rules.start,
    commands.Progress: worker_rules.progress,
    commands.Extend: worker_rules.extend,
    commands.AppendOutput: worker_rules.append_output,
    commands.Complete: worker_rules.complete,
    commands.Fail: worker_rules.fail,
    commands.Release: worker_rules.release,
    commands.Cancel: worker_rules.cancel,
    commands.Undelivered: worker_rules.undelivered,
    commands.Goodbye: worker_rules.goodbye,
    commands.ExtendLock: worker_rules.extend_lock,
    commands.ReleaseLock: worker_rules.release_lock,
    commands.ForceFail: operator_rules.force_fail,
    commands.ForceReset: operator_rules.force_reset,
    commands.RetryJob: operator_rules.force_reset,
    commands.Transition: operator_rules.transition,
    commands.RunNow: operator_rules.run_now,
    commands.Update: operator_rules.update,
    commands.Copy: operator_rules.copy,
    commands.Delete: operator_rules.delete,
    commands.Pause: operator_rules.pause,
    commands.Resume: operator_rules.resume,
    commands.QuietWorker: quiet_rules.direct,
    commands.ResumeWorker: quiet_rules.direct,
    commands.StopWorker: quiet_rules.direct,
    commands.AddQuietRule: quiet_rules.add_rule,
    commands.EndQuietRule: quiet_rules.end_rule,
    commands.QuietRules: quiet_rules.list_rules,
    commands.PutSchedule: schedule_rules.put,
    commands.GetSchedule: schedule_rules.get,
    commands.Schedules: schedule_rules.list_page,
    commands.RunSchedule: schedule_rules.run,
    commands.PauseSchedule: schedule_rules.pause,
    commands.ResumeSchedule: schedule_rules.resume,
    commands.DeleteSchedule: schedule_rules.delete,
    commands.Fire: schedule_rules.fire,
    commands.Import: operator_rules.import_job,
    commands.ImportCheck: operator_rules.import_job,
    commands.Adopt: late_result_rules.adopt,
    ApplyPlan: _apply_plan,
    commands.ApplyEndings: _apply_plan,
    commands.Preview: maintenance_rules.preview,
    commands.TakeBack: maintenance_rules.take_back,
    commands.Recover: maintenance_rules.recover,
    commands.Expire: maintenance_rules.expire,
    commands.DeleteExpired: maintenance_rules.delete_expired,
    commands.RepairJobs: maintenance_rules.repair,
    commands.ExtendAfterPause: maintenance_rules.extend_after_pause,
    commands.KeepDue: maintenance_rules.keep_due,
    commands.EndGrants: maintenance_rules.end_grants,
    commands.EndPauses: maintenance_rules.end_pauses,
    **dict.fromkeys((*get_args(queries.Reading), commands.SearchJobs), queries.read),
    commands.Tick: _accept,
    commands.Ping: _accept,
    commands.Report: _accept,
    commands.RecordAction: _accept,
}


def decide(tx: Transaction, call: IssuedCommand) -> Response | ApiError:
    """Decide `call` in the transaction. A bug in its rule, or a dry run, undoes its changes.

    A rejection undoes nothing. It may leave only steps by time (a stall, an expiry) and records of late calls.
    """
    tx.begin(call)
    command = call.command
    try:
        if call.expected is not None:
            plan_rules.check_version(tx, command, call.expected)
        response: Response | ApiError = RULES[type(command)](tx, command)
    except ApiException as rejected:
        response = rejected.error
    except Exception:
        tx.undo()
        raise
    if tx.is_dry_run:
        tx.undo()
    return response
