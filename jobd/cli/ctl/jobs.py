"""The commands that read jobs over the worker API, and `cancel`, which uses either API."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import click

from jobd.cli import exit_codes, tables, terminal
from jobd.cli.confirm import destructive_options, reason_option, run_action
from jobd.cli.connection import admin_client, all_options, has_admin_token, job_client, read_pages, worker_options
from jobd.cli.ctl import plan_commands
from jobd.cli.ctl.completion import IDS, JOB, JOB_ID, KIND, QUEUE
from jobd.cli.ctl.plan_commands import is_plan, where_option
from jobd.cli.params import NAME, PAST, STATUS, command, json_option, limit_option

_ADMIN_FILTERS: Final = frozenset({"since", "until", "finished_since", "finished_until", "text", "error"})


@click.command()
@click.option("--status", type=STATUS, help="Only jobs with this status.")
@click.option("--queue", type=QUEUE, help="Only jobs of this queue.")
@click.option("--kind", type=KIND, help="Only jobs of this kind.")
@click.option("--worker", type=NAME, help="Only jobs that this worker holds or was the last to hold.")
@click.option("--since", type=PAST, help="Only jobs created at or after this time (UTC), or an age such as 2h. *")
@click.option("--until", type=PAST, help="Only jobs created before this time. *")
@click.option("--finished-since", type=PAST, help="Only jobs finished at or after this time. *")
@click.option("--finished-until", type=PAST, help="Only jobs finished before this time. *")
@click.option("--text", metavar="TEXT", help="Only jobs with this text in their id, payload or error message. *")
@click.option("--error", metavar="ERROR", help="Only jobs whose error is in this group of jobctl failures. *")
@limit_option("jobs", 50)
@click.option("--all", "everything", is_flag=True, help="List all jobs.")
@click.option("--cursor", metavar="CURSOR", help="Continue after the page that printed this cursor.")
@click.option("-q", "--quiet", is_flag=True, help="Print only ids, one per line.")
@json_option
@all_options
def jobs(limit: int, everything: bool, cursor: str | None, quiet: bool, as_json: bool, **match: Any) -> None:
    """List jobs, newest first. With a finished --status, the latest to end is first.

    Options marked * use the admin API instead of the worker API.
    """
    filters = {name: value for name, value in match.items() if value is not None}
    client = admin_client() if _ADMIN_FILTERS & filters.keys() else job_client()
    found, following = read_pages(partial(client.list_jobs, **filters), "jobs", None if everything else limit, cursor)
    if as_json:
        terminal.emit_json({"jobs": found, "next_cursor": following})
        return
    if quiet:
        for job in found:
            terminal.emit(job.id)
    else:
        terminal.table(tables.JOBS, found, empty="No jobs.")
    if following is not None:
        terminal.say(f"There are more: --cursor {following} continues, --all lists all.")


@command(JOB, json_option, worker_options)
def job(job_id: str, as_json: bool) -> None:
    """Show all fields of a job."""
    client = job_client()
    view = client.get_job(job_id)
    if as_json:
        terminal.emit_json(view)
    else:
        tables.job(view, client.timeline(job_id) if view.finished_at and view.started_at else ())


@click.command()
@click.argument("job_id", metavar="[ID]", type=JOB_ID, required=False)
@click.option("--queue", type=QUEUE, help="Explain the oldest due job of each kind of this queue. *")
@json_option
@all_options
def why(job_id: str | None, queue: str | None, as_json: bool) -> None:
    """Explain a job's status and what happens next.

    The option marked * uses the admin API instead of the worker API.
    """
    if (job_id is None) == (queue is None):
        raise click.UsageError("Give either the ID of a job or --queue NAME.")
    if job_id is not None:
        view = job_client().why(job_id)
        terminal.emit_json(view) if as_json else tables.why(view)
    elif queue is not None:
        of_queue = admin_client().why_queue(queue)
        terminal.emit_json(of_queue) if as_json else tables.queue_why(of_queue)


@command(JOB, json_option, worker_options)
def timeline(job_id: str, as_json: bool) -> None:
    """List the events of a job, oldest first."""
    events = job_client().timeline(job_id)
    terminal.emit_json({"events": events}) if as_json else tables.timeline(events)


@command(JOB, json_option, worker_options)
def validate(job_id: str, as_json: bool) -> int:
    """Check the fields of a job for issues. Exit 0 if there are none, else 1."""
    found = job_client().validate_job_state(job_id)
    terminal.emit_json(found) if as_json else tables.validation(found)
    return exit_codes.DONE if found.is_valid else exit_codes.FAILED


@command(IDS, where_option, reason_option("Stored with the job."), destructive_options, all_options)
def cancel(ids: tuple[str, ...], where: tuple[str, ...], reason: str | None, **how: bool) -> int:
    """Cancel jobs that are not finished.

    If a worker holds a job, it loses the lock and stops the work. With an admin token, jobctl uses the admin API: it
    shows a plan first, and the audit log records the cancellation with your name. Without one, or with --socket or
    --url, it cancels the named jobs one by one over the worker API, without an audit entry.

    \b
    Example: jobctl cancel --where queue=video --where status=queued
    """
    if where or has_admin_token():
        return plan_commands.act("cancel", ids, where, reason, **how)
    is_plan(ids, where)
    return run_action(plan_commands.action_on_one(job_client(), "cancel", reason), ids, **how)
