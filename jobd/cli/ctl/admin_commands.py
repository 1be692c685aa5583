"""The commands for operators that do not act on single jobs: state, maintenance, queues, the audit log."""

from __future__ import annotations

from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

import click

from jobd.cli import exit_codes, tables_admin, terminal
from jobd.cli.confirm import ask_reason, confirm, destructive_options, need_terminal, reason_option
from jobd.cli.connection import admin_client, admin_options, read_pages
from jobd.cli.ctl import plan_commands
from jobd.cli.ctl.completion import JOB, JOB_ID, QUEUE
from jobd.cli.params import MOMENT, NAME, PAST, command, json_option, limit_option
from jobd.cli.progress import busy
from jobd.cli.terminal import Listing
from jobd.model.times import utc

if TYPE_CHECKING:
    from jobd.client import AdminClient
    from jobd.model.commands import WorkerState
    from jobd.model.problems import Severity
    from jobd.model.responses import PlanView, PreviewView, WorkerView

_REASON: Final = reason_option("Stored in the audit log.")


@command(json_option, admin_options)
def stats(as_json: bool) -> None:
    """Show the number of jobs by status, and their average duration."""
    view = admin_client().stats()
    terminal.emit_json(view) if as_json else tables_admin.stats(view)


@command(json_option, admin_options)
def disk(as_json: bool) -> None:
    """Show what takes the space on the disk of the store.

    How much the jobs of a queue and kind take is an estimate.
    """
    with busy("measuring"):
        view = admin_client().disk()
    terminal.emit_json(view) if as_json else tables_admin.disk(view)


@command(
    click.option("--problems", is_flag=True, help="Also exit 1 if a problem is critical."), json_option, admin_options
)
def health(problems: bool, as_json: bool) -> int:
    """Show the health of the daemon. Exit 1 if it is unhealthy."""
    view = admin_client().health()
    terminal.emit_json(view) if as_json else tables_admin.health(view)
    is_bad = view.status == "unhealthy" or (problems and bool(view.critical_problems))
    return exit_codes.FAILED if is_bad else exit_codes.DONE


@command(
    click.option("--severity", type=click.Choice(["critical", "warning", "notice"]), help="List only these."),
    click.option("--queue", type=QUEUE, help="List only problems of this queue."),
    json_option,
    admin_options,
)
def status(severity: Severity | None, queue: str | None, as_json: bool) -> int:
    """List what needs an operator, the most urgent first. Exit 1 if a problem is critical or a warning."""
    view = admin_client().problems(severity, queue)
    terminal.emit_json(view) if as_json else tables_admin.problems(view)
    return exit_codes.FAILED if any(each.severity != "notice" for each in view.problems) else exit_codes.DONE


alerts = copy(status)  # the name of the hand-written job manager
alerts.name, alerts.hidden = "alerts", True


@click.command()
@click.option("--last", is_flag=True, help="Show the report of the last cleanup run instead.")
@click.option("--dry-run", is_flag=True, help="Only print what a cleanup run would do.")
@_REASON
@json_option
@admin_options
def cleanup(last: bool, dry_run: bool, reason: str | None, as_json: bool) -> int:
    """Run cleanup now and show its report. Exit 1 if a step failed."""
    client = admin_client()
    if dry_run:
        plan, seen = plan_commands.plan_if_allowed(client, "cleanup", reason), client.preview()
        terminal.emit_json(_with_plan_id(seen, plan)) if as_json else tables_admin.preview(seen)
        plan_commands.show_apply_command(plan)
        return exit_codes.DONE
    if last:
        state = client.cleanup_state()
        terminal.emit_json(state) if as_json else tables_admin.cleanup_state(state)
        return exit_codes.DONE
    with busy("cleanup"):
        report = client.force_cleanup(reason)
    terminal.emit_json(report) if as_json else tables_admin.report(report)
    return exit_codes.FAILED if report.errors else exit_codes.DONE


@click.command("recover-stuck")
@click.option("--dry-run", is_flag=True, help="Only print what would be done.")
@_REASON
@json_option
@admin_options
def recover_stuck(dry_run: bool, reason: str | None, as_json: bool) -> None:
    """Recover stalled jobs now. Jobs whose lock has not expired do not change."""
    if dry_run:
        client = admin_client()
        plan, seen = plan_commands.plan_if_allowed(client, "recover-stuck", reason), client.preview()
        shown = _with_plan_id(seen, plan)
        some = {name: shown[name] for name in ("recover", "more", "plan_id")}
        terminal.emit_json(some) if as_json else tables_admin.planned_recoveries(seen)
        plan_commands.show_apply_command(plan)
        return
    with busy("recovery"):
        view = admin_client().detect_and_recover_stuck_jobs(reason)
    terminal.emit_json(view) if as_json else tables_admin.recovered(view)


def _with_plan_id(seen: PreviewView, plan: PlanView | None) -> dict[str, Any]:
    """Return a preview with the id of the plan that can be applied, or null."""
    import msgspec

    return {**msgspec.to_builtins(seen), "plan_id": plan.plan_id if plan else None}


@command(JOB, json_option, admin_options)
def late(job_id: str, as_json: bool) -> None:
    """List the late results of a job.

    A late result is one that a worker submitted after it had lost its lock. `jobctl adopt` completes the job with
    it.
    """
    found = admin_client().late_results(job_id)
    terminal.emit_json({"late_results": found}) if as_json else tables_admin.late_results(found)


@command(json_option, admin_options)
def locks(as_json: bool) -> None:
    """List the jobs that workers hold, and when their locks expire."""
    terminal.show_list(tables_admin.LOCKS, admin_client().locks(), as_json)


@command(json_option, admin_options)
def queues(as_json: bool) -> None:
    """List the queues with the number of jobs by status."""
    found = list(admin_client().iterate_queues())
    empty = "No queues: no job has been submitted yet."
    terminal.show_list(Listing("queues", empty, tables_admin.queue_columns(found)), found, as_json)


@click.command()
@click.option(
    "--state",
    type=click.Choice(["silent", "busy", "waiting", "idle", "died", "gone"]),
    help="List only workers in this state.  [default: all but died and gone]",
)
@click.option("--by", type=click.Choice(["host", "version"]), help="Count the workers instead of listing them.")
@json_option
@admin_options
def workers(state: WorkerState | None, by: Literal["host", "version"] | None, as_json: bool) -> None:
    """List the workers with their state, latest claim and jobs.

    \b
    silent   holds a job whose lock has expired (see jobctl take-back)
    busy     holds a job
    waiting  waits for a job
    idle     was seen recently, by the rhythm of its claims
    died     its last job was taken back, and it has sent nothing since
    gone     said goodbye, or closed its connection, or was not seen recently
    """
    client, cursor = admin_client(), None
    found: list[WorkerView] = []
    while True:
        page = client.worker_page(state=state, cursor=cursor)
        found += page.workers
        if (cursor := page.next_cursor) is None:
            break
    if as_json:
        listed = {"workers": found, "by_state": page.by_state, "groups": page.groups, "since": page.since}
        terminal.emit_json(listed)
    elif by is not None:
        tables_admin.worker_groups(page, by)
    else:
        tables_admin.workers(found, page, state)


@command(click.argument("worker", type=NAME), destructive_options, _REASON, admin_options, name="take-back")
def take_back(worker: str, yes: bool, dry_run: bool, reason: str | None, as_json: bool) -> None:
    """Take back the jobs of a silent worker.

    These are the jobs whose lock has expired. The on_stall rule of each decides: by default, a job at progress 0 or
    with attempts left is requeued, and any other job fails. The worker's other jobs do not change.
    """
    client = admin_client()
    if not yes and not dry_run:
        seen = client.take_back(worker, dry_run=True)
        need_terminal()
        tables_admin.take_back(seen, terminal.say, would=True)
        confirm(f"take these jobs back from worker {worker}")
    view = client.take_back(worker, reason, dry_run=dry_run)
    terminal.emit_json(view) if as_json else tables_admin.take_back(view, terminal.emit, would=dry_run)


@click.command()
@click.argument("queue", type=QUEUE)
@reason_option("Shown wherever the queue is. On a terminal it is asked for.")
@click.option(
    "--until", type=MOMENT, help="Resume the queue automatically at this time (UTC), or after a duration such as 2h."
)
@json_option
@admin_options
def pause(queue: str, reason: str | None, until: int | None, as_json: bool) -> None:
    """Pause QUEUE: grant none of its jobs until it is resumed.

    Running jobs continue. A queue can be paused before it has jobs.
    """
    client = admin_client()
    has_jobs = bool(client.list_jobs(queue=queue, limit=1).jobs)
    view = client.pause_queue(queue, ask_reason(reason), until=until)
    if not has_jobs:
        terminal.say(
            f"Queue {view.queue} has no jobs yet. If the name is wrong, undo the pause: jobctl resume {view.queue}"
        )
    terminal.emit_json(view) if as_json else terminal.emit(f"{view.queue} was paused {view.pause.describe()}")


def _is_known(client: AdminClient, queue: str) -> bool:
    """Return whether the queue exists, or True if that cannot be determined. Used only for a hint."""
    from jobd.client import JobdError

    try:
        return any(each.name == queue for each in client.iterate_queues())
    except JobdError:
        return True


@command(click.argument("queue", type=QUEUE), _REASON, json_option, admin_options)
def resume(queue: str, reason: str | None, as_json: bool) -> None:
    """Resume QUEUE: grant its jobs again."""
    client = admin_client()
    is_known = _is_known(client, queue)
    view = client.resume_queue(queue, reason)
    if not is_known:
        terminal.say(f"Queue {view.queue} has no jobs and was not paused. List the queues: jobctl queues")
    terminal.emit_json(view) if as_json else terminal.emit(f"{view.queue} is open")


@click.command()
@click.argument("what", required=False, type=click.Choice(["accept"]))
@click.option("-y", "--yes", is_flag=True, help="Accept the clock without asking.")
@click.option("--dry-run", is_flag=True, help="Only print what accepting the clock would delete.")
@_REASON
@json_option
@admin_options
def clock(what: str | None, reason: str | None, yes: bool, dry_run: bool, as_json: bool) -> None:
    """Show the daemon's clock, or accept it after a jump.

    While the clock is suspect, no job expires or is deleted by age. If the clock is right, run `jobctl clock accept`.
    It lists the jobs that would be deleted, and asks first.
    """
    if (yes or dry_run) and what is None:
        raise click.UsageError("--yes and --dry-run need `accept`: jobctl clock accept")
    client = admin_client()
    view = client.clock()
    if what == "accept" and (dry_run or (view.suspect and not yes)):
        if not dry_run:
            need_terminal()
        seen = client.preview()
        if dry_run and as_json:
            terminal.emit_json({"keptJobs": seen.kept_jobs, "moreKept": seen.more_kept})
            return
        text = f"{tables_admin.kept_count(seen)} finished jobs would be deleted by age; the daemon's time is "
        text += f"{utc(view.now)}" if view.suspect else f"{utc(view.now)}, and is not suspect"
        if dry_run:
            terminal.emit(text)
            return
        terminal.say(text)
        confirm("accept the clock")
    if what == "accept":
        view = client.accept_clock(reason)
    terminal.emit_json(view) if as_json else tables_admin.clock(view)


@command(limit_option("reports", 20, 500), json_option, admin_options)
def reports(limit: int, as_json: bool) -> None:
    """List the reports of cleanup runs, newest first."""
    terminal.show_list(tables_admin.REPORTS, admin_client().reports(limit), as_json)


@command(limit_option("groups", 20, 200), json_option, admin_options)
def failures(limit: int, as_json: bool) -> None:
    """Group failed jobs by error, largest groups first.

    OVER A DAY AGO counts failed jobs that ended more than a day ago, by whole hours. RETRYING counts jobs that wait for
    another attempt. Errors that differ only in numbers, quoted names, paths, tracebacks
    and the like are in one group.

    \b
    List the jobs of a group:    jobctl jobs --error ERROR
    Retry its failed jobs:       jobctl retry --where error=ERROR --where finished_since=1d --trial
    List its waiting jobs:       jobctl jobs --error ERROR --status queued
    Run a waiting job now:       jobctl run-now ID
    """
    view = admin_client().failures(limit)
    terminal.emit_json(view) if as_json else tables_admin.failures(view)


@click.command()
@click.option("--who", type=NAME, help="Only actions of this operator.")
@click.option("--action", type=NAME, metavar="ACTION", help="Only this action, such as force-fail.")
@click.option("--job", "job_id", type=JOB_ID, help="Only actions on this job, also by a plan.")
@click.option("--since", type=PAST, help="Only since this time (UTC), or an age such as 2h.")
@limit_option("entries", 50)
@json_option
@admin_options
def audit(limit: int, as_json: bool, **match: Any) -> None:
    """List the actions of operators, including rejected ones, newest first."""
    found, cursor = read_pages(partial(admin_client().audit, **match), "entries", limit)
    if as_json:
        terminal.emit_json({"entries": found, "next_cursor": cursor})
    else:
        terminal.table(tables_admin.AUDIT, found, empty="No matching entries.")
