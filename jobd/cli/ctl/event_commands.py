"""The commands `jobctl events` and `jobctl top`."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING, Final

import click

from jobd.cli import exit_codes, tables, terminal
from jobd.cli.connection import admin_client, admin_options
from jobd.cli.ctl.completion import JOB_ID, QUEUE
from jobd.cli.params import DURATION, NAME, json_option

if TYPE_CHECKING:
    from jobd.client import JobdError

SHOWN: Final = 100
MAX_SHOWN: Final = 10_000  # both are limits of the daemon
MAX_NAMES: Final = 100
MIN_INTERVAL_MS: Final = 100


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Follow new events until Ctrl-C.")
@click.option("--queue", type=QUEUE, multiple=True, help="Only events of this queue; may be repeated.")
@click.option("--job", type=JOB_ID, multiple=True, help="Only events of this job; may be repeated.")
@click.option(
    "--type",
    "type_",
    type=NAME,
    metavar="TYPE",
    multiple=True,
    help="Only events of this type, such as completed; may be repeated.",
)
@click.option("--after", metavar="SEQ", type=click.IntRange(0), help="Start after the event with this number.")
@click.option("--last", metavar="N", type=click.IntRange(1, MAX_SHOWN), help="Start with the last N events.")
@json_option
@admin_options
def events(
    follow: bool,
    queue: tuple[str, ...],
    job: tuple[str, ...],
    type_: tuple[str, ...],
    after: int | None,
    last: int | None,
    as_json: bool,
) -> None:
    """Print events, one per line.

    Without --last, --after and -f, prints the events that match among the last 100. With -f, continues with new
    events; if the connection is lost, it reconnects and misses no event.
    """
    if after is not None and last is not None:
        raise click.UsageError("--after and --last are mutually exclusive: give one of them")
    if after is None and last is None and not follow:
        last = SHOWN
    position = [after]

    def lost(error: JobdError) -> None:
        since = "" if position[0] is None else f" after event {position[0]}"
        terminal.say(f"jobctl: {error.message} Reconnecting{since}.")

    for names in (queue, job, type_):
        if len(names) > MAX_NAMES:
            raise click.UsageError(f"an option can be repeated at most {MAX_NAMES} times")
    stream = admin_client().events(
        queue=queue, job_id=job, type=type_, after=after, last=last, follow=follow, on_lost=lost
    )
    with closing(stream):
        for event in stream:
            position[0] = event.seq
            terminal.emit_json(event, may_indent=False) if as_json else terminal.emit(tables.event_line(event))
            if follow:
                sys.stdout.flush()


@click.command("top")
@click.option("--interval", type=DURATION, default="2s", show_default=True, help="Time between two updates.")
@click.option("--once", is_flag=True, help="Print the table once and exit; needs no terminal.")
@json_option
@admin_options
def top_command(interval: int, once: bool, as_json: bool) -> int:
    """Watch jobs, throughput, queues, workers and problems.

    Press q or Ctrl-C to exit. Rates cover the last 10 s, or one interval with --once or --json.
    """
    from jobd.cli.ctl import top

    if interval < MIN_INTERVAL_MS:
        raise click.UsageError(f"--interval must be at least {MIN_INTERVAL_MS}ms")
    if not (once or as_json or sys.stdout.isatty()):
        raise click.UsageError("top needs a terminal; without one, give --once or --json")
    client = admin_client()
    samples = top.Sampler()
    if once or as_json:
        samples.rates(client.metrics())
        top.pause(interval / 1000)
        frame = samples.take(client)
        terminal.emit_json(frame) if as_json else top.draw_once(frame)
        return exit_codes.DONE
    top.watch(client, samples, interval / 1000)
    return exit_codes.DONE
