"""Actions on many jobs: make plans, show them, ask, and apply them. Also `jobctl apply`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import click

from jobd.cli import confirm, exit_codes, terminal
from jobd.cli.confirm import Confirmation, destructive_options
from jobd.cli.connection import admin_client, admin_options
from jobd.cli.params import past_ms
from jobd.cli.progress import busy
from jobd.model.times import utc

if TYPE_CHECKING:
    from jobd.client import AdminClient, JobClient
    from jobd.model.commands import PlanAction, PlanRate
    from jobd.model.responses import JobView, PlannedJob, PlanResult, PlanView

_TIMES: Final = ("since", "until", "finished_since", "finished_until")
_NAMES: Final = ("status", "queue", "kind", "worker", *_TIMES, "text", "error")
_DELETED_TOO: Final = "Their history and artifacts are deleted too."
_SHOWN: Final = 20  # jobs of a plan; --json shows all
_POLL_S: Final = 0.5  # of a trial
_UNITS: Final = {1_000: "s", 60_000: "m", 3_600_000: "h"}
_MAX_PLANS: Final = 5  # plans that one question covers; the daemon keeps 20 plans, of 100 000 jobs in all


def where_option(command: Any) -> Any:
    """Add --where NAME=VALUE, which can be repeated."""
    text = (
        "Select jobs by a filter instead of by ID; may be repeated, and a job must match every filter. NAME is status, "
        "queue, kind, worker, text, error (an ERROR of jobctl failures), since or until (creation time), "
        "finished_since or finished_until. A time is in UTC, or an age such as 2h."
    )
    return click.option("--where", "where", metavar="NAME=VALUE", multiple=True, help=text)(command)


def is_plan(ids: Sequence[str], where: Sequence[str]) -> bool:
    """Return whether to make a plan: for --where or several IDs. Raises UsageError for neither or both."""
    if bool(ids) == bool(where):
        raise click.UsageError("give either job IDs or --where NAME=VALUE")
    return bool(where) or len(ids) > 1


def _filter(where: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in where:
        name, sign, value = text.partition("=")
        if not sign or name not in _NAMES:
            raise click.UsageError(f"--where {text!r}: it must be NAME=VALUE, NAME one of {', '.join(_NAMES)}")
        if name in found:
            raise click.UsageError(f"--where {name} is given twice: a job must match all filters")
        found[name] = value
    for name in _TIMES:
        if name in found:
            try:
                found[name] = past_ms(found[name], round(time.time() * 1000))
            except ValueError as error:
                raise click.UsageError(f"--where {name}={found[name]}: {error}") from None
    return found


class Pace(NamedTuple):
    """How the jobs of a retry follow each other."""

    trial: bool = False
    rate: PlanRate | None = None

    @property
    def options(self) -> str:
        """The same as options of a command."""
        rate = "" if self.rate is None else f" --rate {self.rate.count}/{_UNITS[self.rate.per_ms]}"
        return f"{' --trial' if self.trial else ''}{rate}"


NO_PACE: Final = Pace()


def pace_options(command: Any) -> Any:
    """Add --trial and --rate."""
    trial = "Retry one job first. The others follow by themselves once it completes, and not at all if it fails."
    rate = "Make the jobs due one after the other: N in a second (N/s), minute (N/m) or hour (N/h)."
    command = click.option("--rate", metavar="N/s", callback=lambda *given: _rate(given[2]), help=rate)(command)
    return click.option("--trial", is_flag=True, help=trial)(command)


def _rate(text: str | None) -> PlanRate | None:
    from jobd.model.commands import PlanRate

    if text is None:
        return None
    count, _, unit = text.partition("/")
    times = {name: time_ms for time_ms, name in _UNITS.items()}
    if not (count.isascii() and count.isdecimal() and 1 <= int(count) <= 1_000_000 and unit in times):
        raise click.BadParameter(f"{text!r} must be a number from 1 to 1000000, and /s, /m or /h, such as 10/s")
    return PlanRate(int(count), times[unit])


def run_plans(
    action: PlanAction,
    ids: Sequence[str],
    where: Sequence[str],
    reason: str | None,
    *,
    yes: bool,
    dry_run: bool,
    as_json: bool,
    pace: Pace = NO_PACE,
) -> int:
    """Make plans, show them, ask, and apply them, until no matching job is left. A `pace` is for one plan.

    Return exit code 4 if some jobs could not be changed.
    """
    wanted: dict[str, Any] = _filter(where) if where else {"ids": list(ids)}
    if not (yes or dry_run):
        confirm.need_terminal()
    client = admin_client(timeout_s=60.0)
    code, cursor, is_first = exit_codes.DONE, None, True
    while is_first or cursor is not None:
        most = 1 if pace.options else _MAX_PLANS
        plans, cursor = _make_plans(client, action, cursor, {"reason": reason, **wanted}, most)
        is_incomplete = bool(ids) and any(plan.skipped_count for plan in plans)
        count = sum(plan.count for plan in plans)
        if dry_run:
            _show_all(plans, cursor, as_json=as_json, options=pace.options)
            return exit_codes.REJECTED if is_incomplete else exit_codes.DONE
        if yes and action == "retry" and where:
            _check_ages(plans, wanted)
        if not yes:
            _show_plans(plans, is_more=cursor is not None)
            if count:
                confirm.confirm(f"{action} {_jobs(count)}")
        if count:
            is_incomplete = not _apply(client, plans, as_json=as_json, pace=pace) or is_incomplete
        elif is_first or any(plan.skipped_count for plan in plans):
            skipped = " ".join(_skipped(plan) for plan in plans if plan.skipped_count)
            terminal.say(f"No job can be changed: {skipped}" if skipped else "No jobs match.")
            is_incomplete = bool(ids)
            if as_json and is_first:
                _apply(client, plans[:1], as_json=True)  # for its result
        code, is_first = exit_codes.REJECTED if is_incomplete else code, False
        if pace.options and cursor is not None:
            terminal.say(
                "There are more jobs. One plan cannot hold all of them: repeat the command when these are done."
            )
            break
    return code


def _check_ages(plans: Sequence[PlanView], filters: Mapping[str, Any]) -> None:
    """Raise CliError (4) if the jobs of a plan ended hours apart, unless a filter says which of them are meant."""
    ages = next((plan.ages for plan in plans if len(plan.ages) > 1), None)
    if ages is None or filters.keys() & {"finished_since", "finished_until"}:
        return
    latest, *older = ages
    shown = ", ".join(
        [f"{latest.jobs} since {utc(latest.since)}", *(f"{age.jobs} until {utc(age.until)}" for age in older)]
    )
    times = [f"--where finished_since='{utc(age.since)}'" for age in (latest, ages[-1])]
    text = f"The jobs ended hours apart: {shown}. --yes needs the time: {times[0]} for the latest, {times[1]} for all"
    raise exit_codes.CliError(text, exit_codes.REJECTED)


def act(action: PlanAction, ids: Sequence[str], where: Sequence[str], reason: str | None, **how: bool) -> int:
    """Apply an action to one job, or by plans to several: exactly as a question or a dry run showed it, or not."""
    if is_plan(ids, where):
        return run_plans(action, ids, where, reason, pace=NO_PACE, **how)
    client = admin_client()
    plan = plan_if_allowed(client, action, reason, ids=list(ids)) if how["dry_run"] else None
    code = confirm.run_action(action_on_one(client, action, reason), ids, **how)
    if code == exit_codes.DONE and plan is not None:
        _name_plans([plan])
    return code


_METHODS: Final = {
    "cancel": "cancel_job",
    "force-fail": "force_fail",
    "force-reset": "force_reset",
    "delete": "delete_job",
}


def action_on_one(client: AdminClient | JobClient, action: PlanAction, reason: str | None) -> Confirmation:
    """Return the action on one job. With an admin client it changes the job only as the operator has seen it."""
    from jobd.model.commands import PLAN_COMMANDS

    def run(job_id: str, version: str | None) -> Any:
        changing: Any = client if version is None else cast("AdminClient", client).if_match(version)
        return getattr(changing, _METHODS[action])(job_id, reason)

    def details(job: JobView, _: object) -> str:
        is_kept = action != "delete" or not job.storage_key
        return "" if is_kept else f" with its artifact {job.storage_key} (artifacts.url)"

    command, to = PLAN_COMMANDS[action], PLAN_COMMANDS[action].leads_to
    return Confirmation(
        action,
        client.get_job,
        None if to == "deleted" else to,
        run,
        partial(_outcome, action),
        command.allowed_from,
        details,
        note=lambda job: _late_note(client, action, job),
        scope=command.plan_scope,
    )


def _outcome(action: PlanAction, response: Any) -> str:
    before = getattr(response, "previous_status", None)
    return "deleted" if action == "delete" else f"{before} → {response.status}" if before else str(response.status)


def _late_note(client: AdminClient | JobClient, action: PlanAction, job: JobView) -> str | None:
    """Return a warning about late results that can be adopted. The worker API does not show them."""
    from jobd.client import AdminClient
    from jobd.model.job import may_adopt
    from jobd.model.responses import late_results_note

    count = len(client.late_results(job.id)) if isinstance(client, AdminClient) and may_adopt(job.status) else 0
    note = late_results_note(action, [count])
    return note and f"{note} See: jobctl late {job.id}"


def plan_if_allowed(
    client: AdminClient, action: PlanAction, reason: str | None, *, ids: list[str] | None = None
) -> PlanView | None:
    """Return a plan; None if it would do nothing or the token is read-only."""
    from jobd.client.errors import Forbidden

    with suppress(Forbidden):
        plan = client.make_plan(action, ids=ids, reason=reason)
        return plan if plan.count else None
    return None


def _make_plans(
    client: AdminClient, action: PlanAction, cursor: str | None, wanted: dict[str, Any], most: int
) -> tuple[list[PlanView], str | None]:
    """Return at least one plan, and the cursor of the next plan (None: there is none)."""
    plans: list[PlanView] = []
    while True:
        with busy(f"plan: {_jobs(sum(plan.count for plan in plans))} so far"):
            plan = client.make_plan(action, cursor=cursor, **wanted)
        cursor = plan.next_cursor
        if plan.count or not (plan.more or plans):
            plans.append(plan)
        if cursor is None or len(plans) >= most:
            return plans, cursor


def _apply(client: AdminClient, plans: Sequence[PlanView], *, as_json: bool, pace: Pace = NO_PACE) -> bool:
    """Apply the plans. Return whether every job was changed."""
    results = []
    for plan in plans:
        results.append(_apply_one(client, plan, pace))
        if as_json:
            terminal.emit_json(results[-1])
    if not as_json:
        _show_results(plans, results)
    return not any(result.changed_meanwhile or result.rejected or result.left for result in results)


def _apply_one(client: AdminClient, plan: PlanView, pace: Pace) -> PlanResult:
    from jobd.client.errors import JobdError

    try:
        with busy(f"{plan.action}: {_jobs(plan.count)}"):
            result = client.apply_plan(plan.plan_id, trial=pace.trial, rate=pace.rate)
        if result.trial is not None and result.trial.state == "waiting":
            terminal.say(
                f"The trial is {result.trial.job_id}; the rest ({_jobs(result.left)}) follows once it completes, also "
                f"without this command. See: jobctl apply {plan.plan_id} --dry-run"
            )
            with busy(f"waiting for {result.trial.job_id}"):
                while (seen := client.get_plan(plan.plan_id)).result is None:
                    time.sleep(_POLL_S)
            result = seen.result
        return result
    except JobdError:
        terminal.say(f"To continue this plan: jobctl apply {plan.plan_id}")
        raise


def _show_all(plans: Sequence[PlanView], cursor: str | None, *, as_json: bool, options: str = "") -> None:
    """Show plans of a dry run, and the command that applies them."""
    if as_json:
        for plan in plans:
            terminal.emit_json(plan)
    else:
        _show_plans(plans, is_more=cursor is not None)
    _name_plans([plan for plan in plans if plan.count], options=options)
    if cursor is not None:
        terminal.say("There are more jobs. Without --dry-run, all of them are changed, these first.")


def _name_plans(plans: Sequence[PlanView], but: str = "", options: str = "") -> None:
    if plans:
        names = " ".join(plan.plan_id for plan in plans)
        terminal.say(f"To apply exactly this{but}, until {utc(plans[0].expires_at)}: jobctl apply {names}{options}")


def show_apply_command(plan: PlanView | None) -> None:
    """Show the command that applies the plan, and what the plan does not cover."""
    if plan is None:
        return
    _name_plans([plan], ", except for the fixes" if plan.action == "cleanup" else "")
    if plan.more:
        terminal.say("One plan cannot hold all jobs. Apply it, then repeat --dry-run for the next one.")


def _show_plans(plans: Sequence[PlanView], *, is_more: bool) -> None:
    jobs = [job for plan in plans for job in plan.jobs]
    names = f"plan {plans[0].plan_id}" if len(plans) == 1 else f"{len(plans)} plans"
    more = ", and more after these" if is_more else ""
    terminal.emit(f"{plans[0].action}: {_jobs(len(jobs))} ({names}){more}")
    for plan in plans:
        if plan.aged:
            terminal.emit(plan.aged)
        if plan.filter is not None and len(plan.ages) > 1:
            terminal.emit(f"Only the latest: add --where finished_since='{utc(plan.ages[0].since)}'")
    if jobs:
        columns: terminal.Columns = {"JOB": "id", "WOULD BE": lambda job: f"{job.from_} → {job.to or 'deleted'}"}
        terminal.table(columns, jobs[:_SHOWN])
    if len(jobs) > _SHOWN:
        terminal.emit(f"… and {len(jobs) - _SHOWN} more (--json shows all)")
    if any(job.to is None for job in jobs):
        terminal.emit(_DELETED_TOO)
    _show_late(plans[0].action, [job for plan in plans if plan.result is None for job in plan.jobs])
    for plan in plans:
        if plan.skipped_count:
            terminal.emit(_skipped(plan))
        elif not plan.count and plan.scope:
            terminal.emit(plan.scope)


def _show_late(action: PlanAction, jobs: Sequence[PlannedJob]) -> None:
    """List the jobs with late results that can be adopted, even those that the table omits."""
    from jobd.model.responses import plan_late_results_note

    if (note := plan_late_results_note(action, jobs)) is None:
        return
    late = [job.id for job in jobs if job.late_results]
    more = f" … and {len(late) - _SHOWN} more (--json shows all)" if len(late) > _SHOWN else ""
    terminal.emit(f"{note} See jobctl late ID: {' '.join(late[:_SHOWN])}{more}")


def _skipped(plan: PlanView) -> str:
    reasons = dict.fromkeys(f"{job.reason}" for job in plan.skipped)
    return f"{_jobs(plan.skipped_count)} skipped: {' '.join(list(reasons)[:3])}"


def _show_results(plans: Sequence[PlanView], results: Sequence[PlanResult]) -> None:
    before = " before, none now" if all(result.repeated for result in results) else ""
    terminal.emit(f"{plans[0].action}: {_jobs(sum(result.applied for result in results))} done{before}")
    for result in results:
        _show_trial(result)
    _show_not_done(results)
    for plan in plans:
        if plan.skipped_count:
            terminal.say(_skipped(plan))


def _show_trial(result: PlanResult) -> None:
    if result.trial is not None and result.trial.state == "failed":
        terminal.say(
            f"The trial {result.trial.job_id} did not complete, so the rest ({_jobs(result.left)}) stays as it was. "
            f"See: jobctl why {result.trial.job_id}"
        )
    if result.due_until is not None:
        terminal.emit(f"the last is due at {utc(result.due_until)}")


def _show_not_done(results: Sequence[PlanResult]) -> None:
    changed = [job for result in results for job in result.changed_meanwhile]
    rejected = [job for result in results for job in result.rejected]
    for title, jobs in (("changed since the plan", changed), ("rejected", rejected)):
        for job in jobs[:_SHOWN]:
            terminal.say(f"{job.id}: {title}: {job.from_} → {job.now or 'deleted'}. {job.reason}")
        if len(jobs) > _SHOWN:
            terminal.say(f"… and {len(jobs) - _SHOWN} more {title} (--json shows all)")


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count} jobs"


@click.command("apply")
@click.argument("plan_ids", metavar="PLAN_ID...", nargs=-1, required=True)
@pace_options
@destructive_options
@admin_options
def apply_plans(
    plan_ids: tuple[str, ...], *, trial: bool, rate: PlanRate | None, yes: bool, dry_run: bool, as_json: bool
) -> int:
    """Apply plans that a dry run or the dashboard made.

    With an admin token, --dry-run of retry, cancel, force-fail, force-reset, delete, recover-stuck and cleanup prints
    the ids of its plans. In the dashboard, the id is the last part of a plan's URL. Plans are kept for 15 minutes.
    Exactly the listed jobs are changed, and jobs that have changed since are skipped. For a plan that was applied, it
    shows how the jobs of a retry have ended since.

    \b
    Example: jobctl delete --where status=completed --dry-run; jobctl apply 3fa29c01d2e4b587
    """
    from jobd.model.commands import MAINTENANCE_ACTIONS

    pace = Pace(trial, rate)
    if pace.options and len(set(plan_ids)) > 1:
        raise click.UsageError(f"{pace.options.split()[0]} is for one plan")
    client = admin_client(timeout_s=60.0)
    plans = [client.get_plan(plan_id) for plan_id in dict.fromkeys(plan_ids)]
    if not (yes or dry_run):
        confirm.need_terminal()
    new = [plan for plan in plans if plan.result is None]
    for plan in plans:
        if plan.result is not None:
            terminal.say(
                f"Plan {plan.plan_id} was applied {terminal.when(plan.result.applied_at)}; a plan is applied only once."
            )
            if plan.outcome is not None:
                terminal.say(f"Since then: {plan.outcome}.")
        elif not as_json and not yes:
            _show_plans([plan], is_more=plan.more)
            if plan.reason:
                terminal.emit(f"Reason: {plan.reason}")
    if dry_run and as_json:
        for plan in plans:
            terminal.emit_json(plan)
    if dry_run:
        return exit_codes.DONE
    if new and not yes:
        confirm.confirm(
            " and ".join(f"{MAINTENANCE_ACTIONS.get(plan.action, plan.action)} {_jobs(plan.count)}" for plan in new)
        )
    is_complete = all([_apply(client, [plan], as_json=as_json, pace=pace) for plan in plans if plan.count or as_json])
    return exit_codes.DONE if is_complete else exit_codes.REJECTED
