"""The commands of jobd for its files: backup, restore and doctor."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from jobd.cli import exit_codes, terminal
from jobd.cli.confirm import confirm, need_terminal
from jobd.cli.connection import admin_client, admin_options
from jobd.cli.daemon.settings import config_option, store_option, store_path
from jobd.cli.params import json_option
from jobd.model.sizes import byte_size

if TYPE_CHECKING:
    from jobd.cli.progress import Advance
    from jobd.client import AdminClient
    from jobd.model.responses import BackupView
    from jobd.storage.offline.doctor import Defect

STALL_TIMEOUT_S: Final = 60.0  # a backup without progress for longer has failed


@click.command("backup")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("-y", "--yes", is_flag=True, help="Overwrite FILE if it exists.")
@admin_options
def backup_command(file: Path, yes: bool) -> None:
    """Back up the database of the running daemon to FILE.

    The copy is consistent and checked. Restore it with `jobd restore`. A database that a daemon uses is never
    overwritten.
    """
    from jobd.cli.files import atomic_file, check_target
    from jobd.cli.progress import bar

    check_target(file, yes=yes)
    with bar("backup") as advance, atomic_file(file, lambda done: None) as target:
        count = admin_client(timeout_s=STALL_TIMEOUT_S).backup(target, on_progress=lambda seen: _show(seen, advance))
    terminal.emit(f"{file}: {byte_size(count)}")


def _show(seen: BackupView, advance: Advance) -> None:
    is_known = seen.state in ("copying", "sending")  # the duration of a check is unknown
    advance(seen.bytes_done if is_known else 0, seen.bytes_total if is_known else None, f"backup: {seen.state}")


@click.command("restore")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", "is_dry_run", is_flag=True, help="Only check, and print what would be done.")
@store_option
@config_option
def restore_command(file: Path, yes: bool, is_dry_run: bool, store: str | None, config: str | None) -> None:
    """Replace the database with a backup. The daemon must be stopped.

    The old database is kept in the same directory. Jobs that were processing when the backup was made are handled as
    stalled. No fencing token is issued twice.
    """
    path = store_path(store, config)
    if not file.exists():
        raise exit_codes.CliError(f"{file} does not exist: name a file that jobd backup wrote", exit_codes.IO_ERROR)
    from jobd.cli.files import check_no_log
    from jobd.cli.progress import busy
    from jobd.storage.backup import restore
    from jobd.storage.offline import dry_run

    if not Path(path).exists():
        check_no_log(Path(path))
    with exit_codes.explaining_full_disk():
        if is_dry_run:
            with busy(f"checking {file}"):
                lines = dry_run.restore(str(file), path)
            for line in lines:
                terminal.emit(line)
            return
        if Path(path).exists() and not yes:
            confirm(f"replace the database {path} with {file} (the old one is kept in the same directory)")
        with busy(f"checking and copying {file}"):
            old_path = restore(str(file), path)
    terminal.emit(path)
    if old_path is not None:
        terminal.say(f"The old database is kept as {old_path}.")


@click.command("doctor")
@click.option("--running", is_flag=True, help="Check the running daemon over its admin API.")
@click.option("--rows", is_flag=True, help="With --running: also verify the checksum of every row (takes minutes).")
@click.option(
    "--accept",
    metavar="ID",
    multiple=True,
    is_flag=False,
    flag_value="",
    help="Accept the edited rows of these jobs as they are (--accept ID ...). The daemon then validates the jobs.",
)
@click.option("--all", "everything", is_flag=True, help="With --accept: all jobs in quarantine or with a damaged row.")
@click.option("--recount", is_flag=True, help="Accept missing rows: count the rows again and store the new counts.")
@click.option("--refold", is_flag=True, help="Also compute each job from its events, and compare it with its row.")
@click.option(
    "--cut-journal",
    "cut_from",
    metavar="N",
    type=click.IntRange(1, (1 << 63) - 1),
    help="Delete record N of the journal and all later ones, which the tables lack. Keeps a copy of the database.",
)
@click.option("-y", "--yes", is_flag=True, help="Do not ask (--accept, --recount, --cut-journal).")
@click.option(
    "--dry-run", "is_dry_run", is_flag=True, help="Only print the changes (--accept, --recount, --cut-journal)."
)
@click.argument("ids", nargs=-1, metavar="[ID...]")
@json_option
@store_option
@config_option
@admin_options
def doctor_command(
    running: bool,
    rows: bool,
    accept: tuple[str, ...],
    everything: bool,
    ids: tuple[str, ...],
    recount: bool,
    refold: bool,
    cut_from: int | None,
    yes: bool,
    is_dry_run: bool,
    as_json: bool,
    store: str | None,
    config: str | None,
) -> int:
    """Find the defects of a database, and print how to fix each.

    The daemon must be stopped, unless --running is given. Exit 0 if nothing is wrong, else 1.
    """
    named = [*filter(None, accept), *ids]
    if (ids or everything) and not accept:
        raise click.UsageError("job ids and --all need --accept")
    if accept and bool(named) == everything:
        raise click.UsageError("--accept needs job ids or --all, not both")
    repairs = bool(accept) + recount + (cut_from is not None)
    if running + refold + repairs > 1 or (running and (store or config)):
        names = "--running, --refold, --accept, --recount and --cut-journal"
        raise click.UsageError(f"{names} are mutually exclusive; --running takes no database")
    if (yes or is_dry_run) and not repairs:
        names = "--accept, --recount or --cut-journal"
        raise click.UsageError(f"--yes and --dry-run need {names}: without them, nothing is written")
    if rows and not running:
        raise click.UsageError("--rows needs --running: without it, all rows are always checked")
    if running:
        return _diagnosis(_checkup(admin_client(), rows=rows), as_json)
    from jobd.storage.offline import doctor, journal_cut

    path = store_path(store, config)
    if recount:
        return _repair(partial(doctor.recount, path), path, yes=yes, is_dry_run=is_dry_run)
    if accept:
        chosen = None if everything else named
        return _repair(partial(doctor.accept, path, chosen), path, yes=yes, is_dry_run=is_dry_run)
    if cut_from is not None:
        return _repair(partial(journal_cut.cut, path, cut_from), path, yes=yes, is_dry_run=is_dry_run)
    notes: list[str] = []
    return _diagnosis(_check(path, notes, refold=refold), as_json, notes)


def _check(path: str, notes: list[str], *, refold: bool) -> Sequence[Any]:
    """Return the defects of a database that no daemon has open. Raises CliError (75) if one has."""
    from jobd.cli.progress import busy
    from jobd.storage.files import StoreBusy
    from jobd.storage.offline import doctor

    try:
        with exit_codes.explaining_full_disk(), busy(f"checking {path}"):
            return doctor.check(path, refold=refold, on_note=notes.append)
    except StoreBusy as error:
        text = f"{error}; or check the running daemon: jobd doctor --running"
        raise exit_codes.CliError(text, exit_codes.TRY_AGAIN) from None


def _checkup(client: AdminClient, *, rows: bool) -> list[Defect]:
    from jobd.cli.daemon.checkup import check_rows, examine

    damaged = check_rows(client) if rows else []
    found = examine(client)  # after the rows: it lists what they put into quarantine
    return found + [each for each in damaged if each.where not in {known.where for known in found}]


def _repair(repair: Callable[..., str], path: str, *, yes: bool, is_dry_run: bool) -> int:
    """Show what `repair` changes, ask, and call it."""
    from jobd.cli.progress import busy

    if not yes:
        if not is_dry_run:
            need_terminal()
        with exit_codes.explaining_full_disk(), busy(f"checking {path}"):
            shown = repair(is_dry_run=True)
        for line in shown.splitlines():
            terminal.emit(line) if is_dry_run else terminal.say(line)
        if is_dry_run:
            return exit_codes.DONE
        confirm("write these changes")
    with exit_codes.explaining_full_disk(), contextlib.redirect_stdout(sys.stderr):  # log lines about a migration
        done = repair()
    for line in done.splitlines():
        terminal.emit(line)
    return exit_codes.DONE


def _diagnosis(defects: Sequence[Any], as_json: bool, notes: Sequence[str] = ()) -> int:
    """Print defects, and notes about what is not one. Return the exit code: 0 without defects."""
    if as_json:
        terminal.emit_json({"defects": defects, "notes": notes})
    else:
        for line in notes if defects else [*notes, "nothing is wrong"]:
            terminal.emit(line)
        for defect in defects:
            terminal.emit(f"{defect.where}: {defect.what}")
            terminal.emit(f"    fix: {defect.fix}")
    return exit_codes.FAILED if defects else exit_codes.DONE
