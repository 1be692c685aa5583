"""Run irreversible actions on jobs: support --dry-run, ask unless --yes is given, then act on each job."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from jobd.cli import exit_codes, terminal

if TYPE_CHECKING:
    from jobd.client.errors import JobdError
    from jobd.model.responses import JobView


@dataclass(frozen=True, slots=True)
class Confirmation:
    """An action that needs a confirmation, such as force-fail.

    `to` is the resulting status: None if the job is deleted, "" if its status does not change. `run` gets the id, and
    the version of the job that the operator confirmed, if there is one. `allowed_from` limits the statuses that allow
    the action; by default, the table of transitions decides. `details` describes the effect on the job, from it and the
    response to a dry run (None without one), `note` warns about it. `dry_run` checks the action on the daemon; without
    it, or with a read-only token, only the status is checked. `scope` says which jobs allow the action.
    """

    action: str
    get_job: Callable[[str], JobView]
    to: str | None
    run: Callable[[str, str | None], Any]
    describe: Callable[[Any], str]
    allowed_from: tuple[str, ...] = ()
    details: Callable[[JobView, Any], str] = lambda job, response: ""
    dry_run: Callable[[str], object] | None = None
    note: Callable[[JobView], str | None] = lambda job: None
    scope: str = ""


def destructive_options(command: Any) -> Any:
    """Add --yes, --dry-run and --json to a command that needs a confirmation."""
    command = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object per job.")(command)
    command = dry_run_option(command)
    return click.option("-y", "--yes", is_flag=True, help="Do not ask.")(command)


def dry_run_option(command: Any) -> Any:
    return click.option("--dry-run", is_flag=True, help="Only print what would be done.")(command)


def reason_option(where_stored: str) -> Callable[[Any], Any]:
    """Add --reason. `where_stored` is a sentence for the help."""
    return click.option("--reason", metavar="TEXT", help=f"Why you do this. {where_stored}")


def ask_reason(reason: str | None) -> str | None:
    """Return the reason. On a terminal it is asked for if it was not given; an empty answer is none."""
    if reason is None and sys.stdin.isatty() and sys.stderr.isatty():
        reason = click.prompt("Reason", default="", show_default=False, err=True)
    return reason.strip() or None if reason is not None else None


def run_action(confirmation: Confirmation, ids: Sequence[str], *, yes: bool, dry_run: bool, as_json: bool) -> int:
    """Apply the action to each job, continue after errors, and return the exit code of the first error."""
    if dry_run:
        return _each(ids, lambda job_id: _show_dry_run(confirmation, job_id, terminal.emit, as_json))
    seen = None if yes else _ask(confirmation, ids)
    return _each(ids, lambda job_id: _show_done(confirmation, job_id, confirmation.run(job_id, seen), as_json))


def _each(ids: Sequence[str], act: Callable[[str], int]) -> int:
    from jobd.client.errors import JobdError

    worst = exit_codes.DONE
    for job_id in ids:
        try:
            code = act(job_id)
        except JobdError as error:
            code = exit_codes.exit_code_of(error.code)
            if len(ids) == 1 or code in (exit_codes.UNREACHABLE, exit_codes.UNAUTHORISED, exit_codes.TRY_AGAIN):
                raise  # the other jobs would fail too
            terminal.say(f"{job_id}: {error.message} [{error.code}]")
        worst = worst or code
    return worst


def _show_done(confirmation: Confirmation, job_id: str, response: Any, as_json: bool) -> int:
    terminal.emit_json(response) if as_json else terminal.emit(f"{job_id}: {confirmation.describe(response)}")
    return exit_codes.DONE


def _show_dry_run(
    confirmation: Confirmation, job_id: str, print_line: Callable[[str], None], as_json: bool = False
) -> int:
    job = confirmation.get_job(job_id)
    response, error = _dry_run(confirmation, job_id)
    is_read_only = error is not None and exit_codes.exit_code_of(error.code) == exit_codes.UNAUTHORISED
    if error is not None and not is_read_only:
        terminal.say(f"{job_id}: {confirmation.action} would be rejected: {error.message} [{error.code}]")
        return exit_codes.exit_code_of(error.code)
    if not _allowed(job.status, confirmation):
        terminal.say(f"{job_id}: {confirmation.action} would be rejected: it is {state(job)}")
        return exit_codes.REJECTED
    if as_json and response is not None:
        terminal.emit_json(response)
    else:
        print_line(f"{job_id}: would {confirmation.action}{confirmation.details(job, response)}: it is {state(job)}")
        if note := confirmation.note(job):
            print_line(note)
    if is_read_only:
        terminal.say(
            "This token is read-only, so only the status was checked. A dry run on the daemon needs the admin token."
        )
    return exit_codes.DONE


def _dry_run(confirmation: Confirmation, job_id: str) -> tuple[object, JobdError | None]:
    """Return the response of a dry run, None if the action has none; or its error."""
    from jobd.client.errors import JobdError

    try:
        return None if confirmation.dry_run is None else confirmation.dry_run(job_id), None
    except JobdError as error:
        if exit_codes.exit_code_of(error.code) not in (exit_codes.REJECTED, exit_codes.UNAUTHORISED):
            raise  # the error is not about the job
        return None, error


def _allowed(status: str, confirmation: Confirmation) -> bool:
    from jobd.model.job import FINISHED, TRANSITIONS

    if confirmation.allowed_from and status not in confirmation.allowed_from:
        return False
    if confirmation.to == "processing":  # only a grant makes a job processing
        return False
    if confirmation.to == "":
        return True
    return status in FINISHED if confirmation.to is None else (status, confirmation.to) in TRANSITIONS


def _ask(confirmation: Confirmation, ids: Sequence[str]) -> str | None:
    """Ask whether to apply the action. Return the version of the job that was shown, None without one.

    Raises CliError (1) if the operator declines, and CliError (4) if the status of the only job does not allow it.
    """
    need_terminal()
    if len(ids) > 1:
        _each(ids, lambda job_id: _show_dry_run(confirmation, job_id, terminal.say))
        confirm(f"{confirmation.action} {len(ids)} jobs")
        return None
    job = confirmation.get_job(ids[0])
    # Fails here if the action would fail later.
    response = None if confirmation.dry_run is None else confirmation.dry_run(ids[0])
    if not _allowed(job.status, confirmation):
        text = f"{job.id}: {confirmation.action} is rejected: it is {job.status}. {confirmation.scope}"
        raise exit_codes.CliError(text, exit_codes.REJECTED)
    if note := confirmation.note(job):
        terminal.say(note)
    details = confirmation.details(job, response)
    confirm(f"{confirmation.action}{f'{details}:' if details else ''} job {job.id}, which is {state(job)}")
    return job.version or None


def need_terminal() -> None:
    """Raise UsageError without a terminal to ask on."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        advice = "add --yes to skip it"
        if any("--dry-run" in parameter.opts for parameter in click.get_current_context().command.params):
            advice += ", or --dry-run to preview the effect"
        raise click.UsageError(f"this command asks for confirmation, but there is no terminal: {advice}")


def confirm(what: str) -> None:
    """Ask whether to do `what`. Raises CliError (1) if the operator declines."""
    need_terminal()
    if not click.confirm(terminal.clean(f"{what}?"), default=False, err=True):
        raise exit_codes.CliError("nothing has changed")


def state(job: JobView) -> str:
    """Describe a job's status: `processing at 45 %, held by w-7`."""
    if job.status != "processing":
        return job.status
    if job.lock:
        holder = f"held by {job.lock.worker}"
    else:
        holder = f"held by {job.worker}, whose lock has expired" if job.worker else "held by no worker"
    return f"processing at {terminal.cell(job.progress)} %, {holder}"
