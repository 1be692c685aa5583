"""Doing something to all jobs that a filter finds: a plan is made and shown, then applied; and jobctl retry.

Knows nothing of jobs: the daemon makes the plan and says what would be done, and what was.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from jobd.cli import deeds, exits, show
from jobd.cli.deeds import destructive
from jobd.cli.kinds import past_ms
from jobd.cli.places import admin_client, admin_options
from jobd.cli.waiting import busy

if TYPE_CHECKING:
    from jobd.answers import ChangedJob, PlanResult, PlanView
    from jobd.commands import PlanAction

_TIMES: Final = ("since", "until", "finished_since", "finished_until")
_NAMES: Final = ("status", "queue", "kind", "worker", *_TIMES, "text", "error")
_SHOWN: Final = 20  # jobs of a plan; --json shows all


def where_option(verb: Any) -> Any:
    """--where NAME=VALUE, as often as it takes."""
    text = (
        "Instead of IDs: all jobs that fit. NAME is status, queue, kind, worker, text, error (see "
        "jobctl failures), since or until (of the creation), finished_since or finished_until; several have to fit "
        "together."
    )
    return click.option("--where", "where", metavar="NAME=VALUE", multiple=True, help=text)(verb)


def is_plan(ids: Sequence[str], where: Sequence[str]) -> bool:
    """Whether jobs are found by --where. Usage error unless there are either IDs or --where."""
    if bool(ids) == bool(where):
        raise click.UsageError("name jobs by their IDs, or say which with --where NAME=VALUE: one of them")
    return bool(where)


def _filter(where: Sequence[str]) -> dict[str, Any]:
    """The filters of --where."""
    found: dict[str, Any] = {}
    for text in where:
        name, sign, value = text.partition("=")
        if not sign or name not in _NAMES:
            raise click.UsageError(f"--where {text!r}: it has to be NAME=VALUE, NAME one of {', '.join(_NAMES)}")
        if name in found:
            raise click.UsageError(f"--where {name} is given twice: a job has to fit all of them")
        found[name] = value
    for name in _TIMES:
        if name in found:
            try:
                found[name] = past_ms(found[name], round(time.time() * 1000))
            except ValueError as error:
                raise click.UsageError(f"--where {name}={found[name]}: {error}") from None
    if "text" in found:
        found["q"] = found.pop("text")
    return found


def carry_out(
    action: PlanAction,
    ids: Sequence[str],
    where: Sequence[str],
    reason: str | None,
    *,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Make a plan, show it, ask, apply it. Exit 4 where something of it could not be done."""
    wanted: dict[str, Any] = _filter(where) if where else {"ids": list(ids)}
    if not (yes or dry_run):
        deeds.need_terminal()
    client = admin_client(timeout_s=60.0)
    with busy("plan"):
        plan = client.make_plan(action, reason=reason, **wanted)
    if dry_run:
        show.emit_json(plan) if as_json else _show_plan(plan)
        return exits.REFUSED if ids and plan.skipped else exits.DONE
    if not yes:
        _show_plan(plan)
        if plan.count:
            deeds.confirm(f"{action} {_jobs(plan.count)}")
    if not plan.count:
        show.say(f"No job can be done: {_skipped(plan)}." if plan.skipped_count else "No job fits.")
        return exits.REFUSED if ids else exits.DONE
    with busy(action):
        result = client.apply_plan(plan.plan_id)
    show.emit_json(result) if as_json else _show_result(plan, result)
    left = result.changed or result.refused or (ids and plan.skipped_count)
    return exits.REFUSED if left else exits.DONE


def _show_plan(plan: PlanView) -> None:
    show.emit(
        f"{plan.action}: {_jobs(plan.count)}" + (", and there are more than one plan may have" if plan.more else "")
    )
    rows = [(job.id, f"{job.from_} → {job.to or 'deleted'}") for job in plan.jobs[:_SHOWN]]
    if rows:
        show.table(["JOB", "WOULD BE"], rows)
    if plan.count > _SHOWN:
        show.emit(f"… and {plan.count - _SHOWN} more (--json shows all)")
    if plan.skipped_count:
        show.emit(_skipped(plan))


def _skipped(plan: PlanView) -> str:
    """How many are left alone, and the reasons."""
    reasons = dict.fromkeys(f"{job.why}" for job in plan.skipped)
    return f"{_jobs(plan.skipped_count)} left alone: {' '.join(list(reasons)[:3])}"


def _show_result(plan: PlanView, result: PlanResult) -> None:
    show.emit(f"{result.action}: {_jobs(result.applied)} done")
    for title, left in (("changed meanwhile", result.changed), ("refused", result.refused)):
        for job in left[:_SHOWN]:
            show.say(f"{job.id}: {title}: {_moved(job)}")
        if len(left) > _SHOWN:
            show.say(f"… and {len(left) - _SHOWN} more {title} (--json shows all)")
    if plan.skipped_count:
        show.say(_skipped(plan))


def _moved(job: ChangedJob) -> str:
    return f"{job.from_} → {job.now or 'gone'}. {job.why}"


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count} jobs"


@click.command()
@click.argument("ids", metavar="[ID...]", nargs=-1)
@where_option
@click.option("--reason", metavar="TEXT", help="Kept with the jobs.")
@destructive
@admin_options
def retry(ids: tuple[str, ...], where: tuple[str, ...], reason: str | None, **how: bool) -> int:
    """Put failed and cancelled jobs back into their queue as new.

    What would be done is shown first. A job that changes meanwhile is left alone.

    \b
    Example: jobctl retry --where queue=video --where status=failed --where since=1d
    """
    is_plan(ids, where)
    return carry_out("retry", ids, where, reason, **how)
