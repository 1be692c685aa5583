"""`jobctl export`, `import` and `artifact`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, Final

import click

from jobd.cli import exit_codes, terminal
from jobd.cli.connection import admin_client, admin_options
from jobd.cli.ctl.completion import JOB, KIND, QUEUE
from jobd.cli.params import STATUS, json_option, number_option
from jobd.cli.progress import Advance, bar
from jobd.model.sizes import byte_size

if TYPE_CHECKING:
    from jobd.client import AdminClient
    from jobd.model.job import Status
    from jobd.model.responses import ImportPreview

_TIMEOUT_S: Final = 120.0  # for one chunk of a stream, or one page, on a slow disk


@click.command()
@click.argument("file", default="-", type=click.Path(dir_okay=False, allow_dash=True, path_type=Path))
@click.option("--status", type=STATUS, help="Only jobs with this status.")
@click.option("--queue", type=QUEUE, help="Only jobs of this queue.")
@click.option("--kind", type=KIND, help="Only jobs of this kind.")
@click.option("-y", "--yes", is_flag=True, help="Overwrite FILE if it exists.")
@admin_options
def export(file: Path, status: Status | None, queue: str | None, kind: str | None, yes: bool) -> int:
    """Write jobs to FILE (default: stdout), one JSON object per line.

    The oldest jobs come first. `jobctl import` reads the file, for example into another daemon, which handles
    jobs that were processing as stalled. Payloads and results are included; history, locks and queue pauses are not.
    Exit 1 if jobs are in quarantine, because these are missing.
    """
    if str(file) != "-":
        from jobd.cli.files import check_target

        check_target(file, yes=yes)
    client = admin_client(timeout_s=_TIMEOUT_S)
    total = None if kind is not None else _expected(client, status, queue)
    count = 0
    with bar("export", unit="jobs") as advance, _opened(file) as target:
        for count, line in enumerate(client.export_jobs(status=status, queue=queue, kind=kind), 1):
            target.write(line + b"\n")
            advance(count, None if total is None else max(total, count))
    terminal.say(f"{count} {'job' if count == 1 else 'jobs'} exported")
    if missing := client.quarantine():
        what = "1 damaged job is" if len(missing) == 1 else f"{len(missing)} damaged jobs are"
        terminal.say(f"{what} in quarantine and missing from the export. Show them: jobd doctor --running")
    return exit_codes.FAILED if missing else exit_codes.DONE


def _expected(client: AdminClient, status: Status | None, queue: str | None) -> int:
    """Count the jobs, for the progress display."""
    counted = STATUS.choices if status is None else (status,)
    named = [each for each in client.iterate_queues() if queue in (None, each.name)]
    return sum(getattr(each, name) for each in named for name in counted)


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    """Yield stdout, or a file that is written completely or not at all."""
    if str(file) == "-":
        yield sys.stdout.buffer
        sys.stdout.flush()
        return
    from jobd.cli.files import atomic_file

    with atomic_file(file, lambda size: None) as target:
        yield target


@click.command("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option("--dry-run", is_flag=True, help="Only print what would happen to each line.")
@json_option
@admin_options
def import_(file: str, dry_run: bool, as_json: bool) -> int:
    """Import jobs from FILE (- for stdin), one JSON object per line.

    Jobs keep their status and times. A job whose id exists is skipped, so an import can be repeated. Exit 1 if a line
    was rejected. With --dry-run, nothing is written, and the exit code is the one that the import would have.
    """
    client = admin_client(timeout_s=_TIMEOUT_S)
    if dry_run:
        with click.open_file(file, "rb") as lines, bar("import") as advance:
            seen = client.preview_import(_read(lines, file, advance))
        terminal.emit_json(seen) if as_json else _preview(seen)
        return exit_codes.FAILED if seen.would_reject or seen.stops_at is not None else exit_codes.DONE
    with click.open_file(file, "rb") as lines, bar("import") as advance:
        result = client.import_jobs(_read(lines, file, advance))
    if as_json:
        terminal.emit_json(result)
    else:
        terminal.emit(f"{result.imported} imported, {result.skipped} skipped, {result.refused_count} rejected")
        for line in result.refused:
            terminal.say(f"line {line.line}{f' ({line.id})' if line.id else ''}: {line.reason}")
    return exit_codes.FAILED if result.refused_count else exit_codes.DONE


_WOULD: Final = {"create": "would be created", "skip": "would be skipped", "reject": "would be rejected"}


def _preview(seen: ImportPreview) -> None:
    for line in seen.lines:
        status = f" as {line.status}" if line.what == "create" else ""
        reason = f": {line.reason}" if line.reason else ""
        terminal.emit(f"line {line.line}{f' ({line.id})' if line.id else ''}: {_WOULD[line.what]}{status}{reason}")
    if seen.more:
        terminal.say(f"Only the first {len(seen.lines)} lines are shown.")
    if seen.stops_at is not None:
        terminal.say(f"The import would stop at line {seen.stops_at}: {seen.stop_reason}")
    terminal.say(f"{seen.would_import} would be imported, {seen.would_skip} skipped, {seen.would_reject} rejected")


def _read(lines: IO[bytes], name: str, advance: Advance) -> Iterator[bytes]:
    total = None if name == "-" else Path(name).stat().st_size
    done = 0
    try:
        for line in lines:
            done += len(line)
            yield line
            advance(done, total)
    except OSError as error:
        raise exit_codes.CliError(f"Cannot read {name}: {error.strerror or error}", exit_codes.IO_ERROR) from error


@click.command()
@JOB
@click.option(
    "-o",
    "--output",
    "file",
    metavar="FILE",
    default="-",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    help="File to write.  [default: stdout]",
)
@click.option("-y", "--yes", is_flag=True, help="Overwrite FILE if it exists.")
@number_option("--late-result", "Download the artifact of late result N (see jobctl late) instead.", kind=click.INT)
@admin_options
def artifact(job_id: str, file: Path, yes: bool, late_result: int | None) -> None:
    """Download the artifact of a job.

    The artifact is the object under the job's storage_key. FILE is written completely or not at all. Output on
    stdout is complete only if the exit code is 0.
    """
    client = admin_client(timeout_s=_TIMEOUT_S)
    if str(file) == "-":
        if sys.stdout.isatty():
            raise click.UsageError(
                "a result can contain control characters: name a file (-o FILE) or redirect the output"
            )
        client.download_artifact(job_id, sys.stdout.buffer, late_result=late_result)
        sys.stdout.flush()
        return
    from jobd.cli.files import atomic_file, check_target

    check_target(file, yes=yes)
    with bar("artifact") as advance, atomic_file(file, lambda done: advance(done, None)) as target:
        count = client.download_artifact(job_id, target, late_result=late_result)
    terminal.emit(f"{file}: {byte_size(count)}")
