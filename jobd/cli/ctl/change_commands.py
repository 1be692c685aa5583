"""The commands for operators that change jobs."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import click

from jobd.cli import exit_codes, tables, terminal
from jobd.cli.confirm import Confirmation, destructive_options, dry_run_option, reason_option, run_action
from jobd.cli.connection import admin_client, admin_options
from jobd.cli.ctl.completion import IDS, JOB
from jobd.cli.ctl.plan_commands import Pace, act, is_plan, pace_options, run_plans, where_option
from jobd.cli.params import MAX_ATTEMPTS, MOMENT, PRIORITY, STATUS, command, json_option, json_text, read_stdin

if TYPE_CHECKING:
    from jobd.client import AdminClient
    from jobd.model.commands import PlanRate
    from jobd.model.job import Status
    from jobd.model.responses import ErrorView, JobView, LateResultView

_REASON: Final = reason_option("Stored with the job.")
_UPDATE_FIELDS: Final = ("priority", "run_at", "max_attempts")  # in the order in which they are shown


@command(IDS, where_option, pace_options, _REASON, destructive_options, admin_options)
def retry(
    ids: tuple[str, ...], where: tuple[str, ...], trial: bool, rate: PlanRate | None, reason: str | None, **how: bool
) -> int:
    """Requeue failed and cancelled jobs as new.

    Shows a plan and asks before applying it. Jobs that change in the meantime are skipped.

    \b
    Example: jobctl retry --where error=48fc8598bfad --where finished_since=1h --trial --rate 10/s
    """
    is_plan(ids, where)
    return run_plans("retry", ids, where, reason, **how, pace=Pace(trial, rate))


@command(IDS, where_option, _REASON, destructive_options, admin_options, name="force-fail")
def force_fail(ids: tuple[str, ...], where: tuple[str, ...], reason: str | None, **how: bool) -> int:
    """Fail queued and processing jobs, even while a worker holds them.

    The reason becomes the error message. A worker that holds a job loses the lock.
    """
    return act("force-fail", ids, where, reason, **how)


@command(IDS, where_option, _REASON, destructive_options, admin_options, name="force-reset")
def force_reset(ids: tuple[str, ...], where: tuple[str, ...], reason: str | None, **how: bool) -> int:
    """Requeue jobs as new, even while a worker holds them.

    They are due now. A worker that holds a job loses the lock. `jobctl retry` does the same, but only for failed and
    cancelled jobs.

    \b
    Example: jobctl force-reset --where status=processing --where worker=w-7
    """
    return act("force-reset", ids, where, reason, **how)


@click.command()
@JOB
@click.argument("from_status", metavar="FROM", type=STATUS)
@click.argument("to_status", metavar="TO", type=STATUS)
@click.option("--set", "updates", metavar="NAME=VALUE", multiple=True, help="Also set a field; VALUE is JSON or text.")
@_REASON
@destructive_options
@admin_options
def transition(
    job_id: str, from_status: Status, to_status: Status, updates: tuple[str, ...], reason: str | None, **how: bool
) -> int:
    """Change a job's status from FROM to TO.

    Fails if the status is no longer FROM.

    \b
    Fields for --set: error_message, priority, run_at, max_attempts, download_url, file_path,
    storage_key, metadata. Example: jobctl transition j1 queued completed --set file_path=/srv/out.mp4
    """
    fields = dict(_update(text) for text in updates)
    settings = _settings(fields)
    client = admin_client()

    def do(one: str, _version: str | None = None, *, dry_run: bool = False) -> Any:
        return client.transition_job_state(
            one, from_status, to_status, updates=fields or None, reason=reason, dry_run=dry_run
        )

    confirmation = Confirmation(
        f"transition {from_status} → {to_status}",
        client.get_job,
        to_status,
        do,
        lambda response: f"{response.previous_status} → {response.status}",
        allowed_from=(from_status,),
        details=lambda *_: settings,
        dry_run=partial(do, dry_run=True),
    )
    return run_action(confirmation, (job_id,), **how)


def _settings(fields: dict[str, Any]) -> str:
    """Describe the fields to set. Raises UsageError if the daemon would reject them."""
    import msgspec

    from jobd.model.commands import Updates
    from jobd.model.job import storage_key_error

    try:
        updates = msgspec.json.decode(msgspec.json.encode(fields), type=Updates)
    except msgspec.ValidationError as error:
        raise click.UsageError(f"--set: {str(error).replace('$.', '')}") from None
    if updates.storage_key is not None and (invalid := storage_key_error(updates.storage_key)) is not None:
        raise click.UsageError(f"--set: storage_key {invalid}")
    shown = [f"{name} {terminal.clip(msgspec.json.encode(value).decode())}" for name, value in fields.items()]
    return f" and set {', '.join(shown)}" if shown else ""


def _update(text: str) -> tuple[str, Any]:
    """Parse `name=value`, the value as JSON if it is JSON and else as text."""
    import msgspec

    name, sign, value = text.partition("=")
    if not sign or not name:
        raise click.UsageError(f"--set {text!r} must be NAME=VALUE")
    try:
        return name, msgspec.json.decode(value)
    except msgspec.DecodeError:
        return name, value


@command(IDS, where_option, reason_option("Stored in the audit log."), destructive_options, admin_options)
def delete(ids: tuple[str, ...], where: tuple[str, ...], reason: str | None, **how: bool) -> int:
    """Delete finished jobs with their history and artifacts."""
    return act("delete", ids, where, reason, **how)


@click.command()
@JOB
@click.option(
    "--result",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of the late result, as in jobctl late.  [default: the result of the latest grant]",
)
@_REASON
@destructive_options
@admin_options
def adopt(job_id: str, result: int | None, reason: str | None, **how: bool) -> int:
    """Complete a job with a late result.

    A late result is one that a worker submitted after it had lost its lock. The job must be queued, failed or
    cancelled.
    """
    from jobd.model.commands import Adopt

    client = admin_client()
    chosen, details = result, ""
    rejection: ErrorView | None = None

    def load(one: str) -> Any:
        nonlocal chosen, details, rejection
        matching = [late for late in client.late_results(one) if result in (None, late.seq)]
        if not matching:
            from jobd.client.errors import LateResultNotFound

            raise LateResultNotFound(f"Job {one} has no such late result. List its late results: jobctl late {one}")
        latest = max(matching, key=lambda late: late.fencing_token)
        chosen, details = latest.seq, f" {_describe_late_result(latest)}"  # a newer one may arrive before the adoption
        rejection = latest.rejection
        return client.get_job(one)

    def do(one: str, _version: str | None) -> Any:
        return client.adopt(one, chosen, reason=reason)

    def dry(one: str) -> Any:
        from jobd.client.errors import Forbidden, JobdError

        try:
            return client.adopt(one, chosen, reason=reason, dry_run=True)
        except Forbidden:
            if rejection is None:
                raise
            raise JobdError(rejection.message, code=rejection.error) from None

    confirmation = Confirmation(
        "adopt",
        load,
        "completed",
        do,
        lambda job: job.status,
        allowed_from=Adopt.allowed_from,
        details=lambda *_: details,
        dry_run=dry,
    )
    return run_action(confirmation, (job_id,), **how)


def _describe_late_result(late: LateResultView) -> str:
    """Describe a late result in one line: its number, worker and fields."""
    fields = {name: getattr(late, name) for name in ("download_url", "file_path", "storage_key")}
    fields["metadata"] = tables.json_text(late.metadata)
    parts = [f"{name} {terminal.clip(value)}" for name, value in fields.items() if value is not None]
    return f"late result {late.seq} of {late.worker} ({', '.join(parts) or 'without data'})"


@command(JOB, _REASON, dry_run_option, json_option, admin_options, name="run-now")
def run_now(job_id: str, reason: str | None, **how: bool) -> int:
    """Make a queued job due now."""
    from jobd.model.commands import RunNow

    client = admin_client()
    now = round(time.time() * 1000)
    do = partial(client.run_now, reason=reason)
    return _change(
        "run-now", job_id, client, do, RunNow.allowed_from, lambda job: {"run_at": min(job.run_at, now)}, **how
    )


@click.command()
@JOB
@click.option("--priority", type=PRIORITY, metavar="N", help="Jobs with a smaller number run first.")
@click.option("--run-at", type=MOMENT, help="Due at this time (UTC), or a duration from now.")
@click.option("--max-attempts", type=MAX_ATTEMPTS, metavar="N", help="Maximum number of attempts.")
@_REASON
@dry_run_option
@json_option
@admin_options
def update(job_id: str, reason: str | None, dry_run: bool, as_json: bool, **fields: Any) -> int:
    """Change the priority, due time or maximum attempts of a job."""
    if all(value is None for value in fields.values()):
        raise click.UsageError("nothing to change: give --priority, --run-at or --max-attempts")
    from jobd.model.commands import Update

    client = admin_client()
    new = {name: fields[name] for name in _UPDATE_FIELDS if fields[name] is not None}
    do = partial(client.update_job, reason=reason, **new)
    return _change("update", job_id, client, do, Update.allowed_from, lambda job: new, dry_run=dry_run, as_json=as_json)


@command(JOB, _REASON, json_option, admin_options)
@click.argument("payload", required=False)
def copy(job_id: str, payload: str | None, reason: str | None, as_json: bool) -> int:
    """Create a job like another one and print its id.

    It gets the payload of that job, or PAYLOAD: JSON, or - to read it from stdin.
    """
    from msgspec import UNSET

    text = read_stdin("the payload") if payload == "-" else payload
    body = UNSET if text is None else json_text(text, "PAYLOAD")
    job = admin_client().copy_job(job_id, payload=body, reason=reason)
    if as_json:
        terminal.emit_json(job)
    else:
        terminal.emit(job.id)
    return exit_codes.DONE


def _change(
    action: str,
    job_id: str,
    client: AdminClient,
    do: Callable[..., Any],
    allowed_from: tuple[str, ...],
    new_values: Callable[[JobView], dict[str, int]],
    *,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Set fields of a job without changing its status. A dry run shows old and new values.

    `new_values` returns the new values that can be computed without the daemon, for read-only tokens.
    """

    def details(job: JobView, would_be: JobView | None) -> str:
        after = new_values(job)
        if would_be is not None:
            after = {name: getattr(would_be, name) for name in after}
        return f" ({_differences(job, after)})"

    dry_run_of = partial(do, dry_run=True)
    confirmation = Confirmation(
        action, client.get_job, "", lambda one, _version: do(one), _fields, allowed_from, details, dry_run_of
    )
    return run_action(confirmation, (job_id,), yes=True, dry_run=dry_run, as_json=as_json)


def _differences(job: JobView, after: dict[str, int]) -> str:
    """Describe what `after` changes: `priority 0 → 5, due … → …`."""
    shown = []
    for name, value in after.items():
        before = getattr(job, name)
        if name == "run_at" and before != value:
            shown.append(f"due {terminal.when(before)} → {terminal.when(value)}")
        elif before != value:
            shown.append(f"{name} {before} → {value}")
    return ", ".join(shown) or "no change"


def _fields(job: JobView) -> str:
    return f"{job.status}, priority {job.priority}, due {terminal.when(job.run_at)}"
