"""`jobctl schedules`, `schedule` and `settings`: show and control schedules, and keep them in a file."""

from __future__ import annotations

import importlib
import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from jobd.cli import exit_codes, tables_admin, terminal
from jobd.cli.confirm import reason_option
from jobd.cli.connection import admin_client, admin_options
from jobd.cli.params import MOMENT, PAST, command, json_option

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from jobd.client import AdminClient
    from jobd.model.responses import ScheduleView

VERBS: Final = ("run", "pause", "resume", "rm")
# The fields of the file beside those of its jobs.
_FIELDS: Final = ("cron", "every_ms", "offset_ms", "timezone", "overlap", "catch_up", "jitter_ms", "paused")


@command(json_option, admin_options)
def schedules(as_json: bool) -> None:
    """List the schedules, their next time and their latest job."""
    terminal.show_list(tables_admin.SCHEDULES, list(admin_client().iterate_schedules()), as_json)


@command(
    click.argument("verb_or_id", metavar="[VERB] ID"),
    click.argument("name", metavar="", required=False),
    click.option("--at", type=PAST, help="run: create the job of this time, in the past. Repeating it does nothing."),
    click.option("--force", is_flag=True, help="run: although the last job is unfinished."),
    click.option("--until", type=MOMENT, help="pause: resume at this time."),
    reason_option("Stored in the audit log and shown with a pause."),
    json_option,
    admin_options,
)
def schedule(
    verb_or_id: str, name: str | None, at: int | None, force: bool, until: int | None, reason: str | None, as_json: bool
) -> None:
    """Show a schedule, or run, pause, resume or delete (rm) it.

    \b
    schedule ID              show it, with its next times
    schedule run ID          create one job now; --at TIME: the job of that time
    schedule pause ID        create no jobs until it is resumed
    schedule resume ID       create jobs again, from now on
    schedule rm ID           delete it; its jobs stay
    """
    client = admin_client()
    if name is None:
        view = client.get_schedule(id=verb_or_id)
    elif verb_or_id == "run":
        job = client.run_schedule(
            id=name, scheduled_at=None if at is None else at // 1_000 * 1_000, force=force, reason=reason
        )
        terminal.emit_json(job) if as_json else terminal.emit(job.id)
        return
    elif verb_or_id == "pause":
        view = client.pause_schedule(id=name, reason=reason, until=until)
    elif verb_or_id == "resume":
        view = client.resume_schedule(id=name, reason=reason)
    elif verb_or_id == "rm":
        view = client.delete_schedule(id=name, reason=reason)
    else:
        raise click.UsageError(
            f"{verb_or_id} is not a verb: use {', '.join(VERBS)}, or an id alone to show a schedule."
        )
    if as_json:
        terminal.emit_json(view)
    elif verb_or_id == "rm":
        terminal.emit(f"{view.id}: deleted")
    else:
        tables_admin.schedule(view)


@command(
    click.argument("what", type=click.Choice(["apply", "export"])),
    click.argument("source", metavar="[FILE | MODULE:APP]", required=False),
    click.option("--prune", is_flag=True, help="apply: delete the schedules that it had earlier."),
    click.option("--dry-run", is_flag=True, help="apply: only print what would change."),
    admin_options,
)
def settings(what: str, source: str | None, prune: bool, dry_run: bool) -> None:
    """Keep schedules in a TOML file, or in the app of a program.

    \b
    settings apply FILE        create and change the schedules of [[schedules]] in the file
    settings apply MODULE:APP  create and change the schedules of app.schedule, as its workers do
    settings export            print all schedules in the form of a file

    A schedule belongs to the file or app that made it. No other one can change it, and --prune deletes no others.
    """
    from jobd.client.errors import JobdError

    client = admin_client()
    if what == "export":
        for view in client.iterate_schedules():
            for line in _toml(view):
                terminal.emit(line)
        return
    if source is None:
        raise click.UsageError("Apply what? jobctl settings apply FILE, or MODULE:APP")
    owner, wanted = _wanted(source)
    there = {view.id: view for view in client.iterate_schedules()}
    for name, fields in wanted.items():
        try:
            change = _apply(client, name, fields, there.get(name), owner, dry_run=dry_run)
        except JobdError as error:
            error.message = f"{source}: schedule {name}: {error.message}"
            raise
        terminal.emit(f"{name}: {change}")
    for name, view in there.items():
        if prune and view.source == owner and name not in wanted:
            if not dry_run:
                client.delete_schedule(id=name, reason=f"It is not in {source} any more.")
            terminal.emit(f"{name}: deleted")


def _wanted(source: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """Return the source of the schedules in a file or app, and the arguments of put_schedule by id."""
    file = Path(source)
    if file.is_file():
        return f"file:{file.resolve()}", _read(file)
    if ":" not in source:
        raise click.UsageError(f"There is no file {source}. The app of a program is given as MODULE:APP.")
    from jobd.cli.ctl.worker_command import load_app

    app, _ = load_app(source)
    for module in app.include:
        importlib.import_module(module)
    try:
        return app.schedules.source, app.schedules.requests()
    except TypeError as error:
        raise exit_codes.CliError(f"{source}: {error}", exit_codes.CONFIG) from None


def _apply(
    client: AdminClient, name: str, fields: dict[str, Any], there: ScheduleView | None, source: str, *, dry_run: bool
) -> str:
    """Put one schedule. Return what changed."""
    if not dry_run:
        view = client.put_schedule(id=name, source=source, **fields)
        return "new" if there is None else "unchanged" if view.updated_at == there.updated_at else "changed"
    if there is None:
        return "new"
    if there.source != source:
        raise exit_codes.CliError(f"Schedule {name} belongs to {there.source or 'an operator'}.", exit_codes.REJECTED)
    given = {field: fields.get(field, default) for field, default in _DEFAULTS.items()} | {"job": fields["job"]}
    return "unchanged" if all(getattr(there, field) == value for field, value in given.items()) else "changed"


_DEFAULTS: Final[Mapping[str, Any]] = {
    "cron": None,
    "every_ms": None,
    "offset_ms": 0,
    "timezone": "UTC",
    "overlap": "skip",
    "catch_up": "latest",
    "jitter_ms": 0,
}


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """Return the arguments of put_schedule by id."""
    try:
        content = tomllib.loads(file.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise exit_codes.CliError(f"{file}: {error}", exit_codes.CONFIG) from None
    if unknown := sorted(content.keys() - {"schedules"}):
        raise exit_codes.CliError(f"{file}: {unknown[0]} is unknown. The file has [[schedules]].", exit_codes.CONFIG)
    found: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(content.get("schedules", []), 1):
        name = entry.pop("id", None)
        if not isinstance(name, str) or name in found:
            reason = "needs an id" if name is None else f"has the id {name!r} of another one, or no text as its id"
            raise exit_codes.CliError(f"{file}: schedule {number} {reason}.", exit_codes.CONFIG)
        fields = {field: entry.pop(field) for field in _FIELDS if field in entry}
        if "payload_json" in entry:
            try:
                entry["payload"] = json.loads(entry.pop("payload_json"))
            except (TypeError, ValueError) as error:
                message = f"{file}: schedule {name}: payload_json is no JSON text: {error}."
                raise exit_codes.CliError(message, exit_codes.CONFIG) from None
        found[name] = {**fields, "job": entry}
    return found


def _toml(view: ScheduleView) -> Iterator[str]:
    """Yield the lines of a schedule."""
    yield "[[schedules]]"
    yield f"id = {_value(view.id)}"
    for field, default in _DEFAULTS.items():
        if (value := getattr(view, field)) != default:
            yield f"{field} = {_value(value)}"
    for field, value in view.job.items():
        if _has_null(value):
            yield f"{field}_json = {_value(json.dumps(value))}"
        else:
            yield f"{field} = {_value(value)}"
    yield ""


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_value(name)} = {_value(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value).replace("\x7f", "\\u007f")  # strings, numbers and booleans look as in JSON


def _has_null(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_has_null, value.values() if isinstance(value, dict) else value))
    return value is None
