"""Doing something to jobs that cannot be taken back: look first (--dry-run), ask (or --yes), then do it to each.

Knows no verb; the daemon judges, this only asks and reports.
"""

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
    """`words` says what is done ("force-fail"), `to` is the status that it leads to, None where the job is deleted, ""
    where its status stays.

    `only_from` are the statuses from which it may be done, where they are fewer than lead to `to`; `details` says of
    the job that was looked at what there is to know beside it before it is done. `rehearse` asks the daemon for it as
    a dry run, which is refused like the deed; without it, and for who may only look, the statuses are what is judged.
    """

    action: str
    get_job: Callable[[str], JobView]
    to: str | None
    run: Callable[[str], Any]
    describe: Callable[[Any], str]
    allowed_from: tuple[str, ...] = ()
    details: Callable[[JobView], str] = lambda job: ""
    dry_run: Callable[[str], object] | None = None


def destructive_options(verb: Any) -> Any:
    """--yes, --dry-run and --json for a verb that destroys something."""
    verb = click.option("--json", "as_json", is_flag=True, help="Print the answers as JSON, one a job.")(verb)
    verb = dry_run_option(verb)
    return click.option("-y", "--yes", is_flag=True, help="Do not ask.")(verb)


def dry_run_option(verb: Any) -> Any:
    return click.option("--dry-run", is_flag=True, help="Only say what would be done.")(verb)


def reason_option(kept: str) -> Callable[[Any], Any]:
    """--reason, with what becomes of it."""
    return click.option("--reason", metavar="TEXT", help=f"Why, for those who come after you. {kept}")


def run_action(deed: Confirmation, ids: Sequence[str], *, yes: bool, dry_run: bool, as_json: bool) -> int:
    """Do `deed` to each of `ids`, going on after a refusal; the exit code is that of the first refusal."""
    if dry_run:
        return _each(ids, lambda job_id: _show_dry_run(deed, job_id, terminal.emit, as_json))
    if not yes:
        _ask(deed, ids)
    return _each(ids, lambda job_id: _run(deed, job_id, as_json))


def _each(ids: Sequence[str], act: Callable[[str], int]) -> int:
    from jobd.client.errors import JobdError

    worst = exit_codes.DONE
    for job_id in ids:
        try:
            code = act(job_id)
        except JobdError as error:
            code = exit_codes.exit_code_of(error.code)
            if len(ids) == 1 or code in (exit_codes.UNREACHABLE, exit_codes.UNAUTHORISED, exit_codes.TRY_AGAIN):
                raise  # the others would fare alike
            terminal.say(f"{job_id}: {error.message} [{error.code}]")
        worst = worst or code
    return worst


def _run(deed: Confirmation, job_id: str, as_json: bool) -> int:
    answer = deed.run(job_id)
    if as_json:
        terminal.emit_json(answer)
    else:
        terminal.emit(f"{job_id}: {deed.describe(answer)}")
    return exit_codes.DONE


def _show_dry_run(deed: Confirmation, job_id: str, tell: Callable[[str], None], as_json: bool = False) -> int:
    job = deed.get_job(job_id)
    answer = _dry_run(deed, job_id)
    no = _error(answer)
    may_only_look = no is not None and exit_codes.exit_code_of(no.code) == exit_codes.UNAUTHORISED
    if no is not None and not may_only_look:
        terminal.say(f"{job_id}: {deed.action} would be refused: {no.message} [{no.code}]")
        return exit_codes.exit_code_of(no.code)
    if not _allowed(job.status, deed):
        terminal.say(f"{job_id}: {deed.action} would be refused: it is {state(job)}")
        return exit_codes.REJECTED
    if as_json and answer is not None and no is None:
        terminal.emit_json(answer)
    else:
        tell(f"{job_id}: would {deed.action}{deed.details(job)}: it is {state(job)}")
    if may_only_look:
        terminal.say("Judged by its status alone: only who may do it can ask the daemon, and this token may only look.")
    return exit_codes.DONE


def _dry_run(deed: Confirmation, job_id: str) -> object | JobdError | None:
    """What the daemon would answer, or refuse the deed with, or the question; None where it is not asked."""
    from jobd.client.errors import JobdError

    if deed.dry_run is None:
        return None
    try:
        return deed.dry_run(job_id)
    except JobdError as error:
        if exit_codes.exit_code_of(error.code) not in (exit_codes.REJECTED, exit_codes.UNAUTHORISED):
            raise  # no word about the job
        return error


def _error(answer: object) -> JobdError | None:
    from jobd.client.errors import JobdError

    return answer if isinstance(answer, JobdError) else None


def _allowed(status: str, deed: Confirmation) -> bool:
    from jobd.model.job import FINISHED, TRANSITIONS

    if (deed.allowed_from and status not in deed.allowed_from) or deed.to == "processing":  # which only a grant makes
        return False
    if deed.to == "":
        return True
    return status in FINISHED if deed.to is None else (status, deed.to) in TRANSITIONS


def _ask(deed: Confirmation, ids: Sequence[str]) -> None:
    need_terminal()
    if len(ids) == 1:
        job = deed.get_job(ids[0])
        if deed.dry_run is not None:
            deed.dry_run(ids[0])  # nobody is asked about what would be refused
        confirm_job(deed, job)
    else:
        _each(ids, lambda job_id: _show_dry_run(deed, job_id, terminal.say))
        confirm(f"{deed.action} {len(ids)} jobs")


def need_terminal() -> None:
    """Usage error where nobody can be asked."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise click.UsageError("this asks first, and here is no terminal: add --yes to do it, --dry-run to look first")


def confirm(what: str) -> None:
    """Ask whether to do `what`. Problem (1) where the answer is no."""
    need_terminal()
    if not click.confirm(terminal.clean(f"{what}?"), default=False, err=True):
        raise exit_codes.CliError("nothing was done")


def confirm_job(deed: Confirmation, job: JobView) -> None:
    """Ask whether to do `deed` to the job, which is shown as it is. Problem (1) where the answer is no."""
    details = deed.details(job)
    confirm(f"{deed.action}{f'{details}:' if details else ''} job {job.id}, which is {state(job)}")


def state(job: JobView) -> str:
    """A job's status in a few words: `processing at 45 %, held by w-7`."""
    if job.status != "processing":
        return job.status
    if job.lock:
        holder = f"held by {job.lock.worker}"
    else:
        holder = f"held by {job.worker}, whose lock has expired" if job.worker else "held by no worker"
    return f"processing at {terminal.cell(job.progress)} %, {holder}"
