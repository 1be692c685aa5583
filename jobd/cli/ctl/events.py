"""jobctl's verbs that go on: events as they happen, and a live table. Over the admin API.

Hold no logic of jobs: read the command line, ask the client, show the answer.
"""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING, Final

import click

from jobd.cli import exit_codes, terminal
from jobd.cli.connection import admin_client, admin_options
from jobd.cli.params import DURATION, NAME, json_option

if TYPE_CHECKING:
    from jobd.client import JobdError

SHOWN: Final = 100
MAX_SHOWN: Final = 10_000  # as the daemon allows, both
MAX_NAMES: Final = 100
MIN_INTERVAL_MS: Final = 100


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on with events as they happen, until Ctrl-C.")
@click.option("--queue", type=NAME, metavar="Q", multiple=True, help="Only of this queue; may be repeated.")
@click.option("--job", type=NAME, metavar="ID", multiple=True, help="Only of this job; may be repeated.")
@click.option(
    "--type", "type_", type=NAME, metavar="T", multiple=True, help="Only of this type (completed, …); may be repeated."
)
@click.option("--after", metavar="SEQ", type=click.IntRange(0), help="Begin behind the event of this number.")
@click.option("--last", metavar="N", type=click.IntRange(1, MAX_SHOWN), help="Begin N events ago.")
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
    """Show what has happened, one event a line; with -f as it happens.

    Without -f: of the last 100 events (--last), or of those behind --after, the ones that match, up to now.
    With -f: from now on. A lost connection is made again, and nothing in between is missed.
    """
    from jobd.cli import tables

    if after is not None and last is not None:
        raise click.UsageError("--after and --last say two beginnings: give one")
    if after is None and last is None and not follow:
        last = SHOWN
    position = [after]

    def lost(error: JobdError) -> None:
        terminal.say(f"jobctl: {error.message} Connecting again{_from(position[0])}.")

    for names in (queue, job, type_):
        if len(names) > MAX_NAMES:
            raise click.UsageError(f"an option may be given {MAX_NAMES} times at most")
    heard = admin_client().events(
        queue=queue, job_id=job, type=type_, after=after, last=last, follow=follow, on_lost=lost
    )
    with closing(heard):
        for event in heard:
            position[0] = event.seq
            terminal.emit_json_line(event) if as_json else terminal.emit(tables.event_line(event))
            if follow:
                sys.stdout.flush()


def _from(position: int | None) -> str:
    return "" if position is None else f", behind event {position}"


@click.command()
@click.option("--interval", type=DURATION, default="2s", show_default=True, help="Time between two looks.")
@click.option("--once", is_flag=True, help="Show one frame and end; needs no terminal.")
@json_option
@admin_options
def top(interval: int, once: bool, as_json: bool) -> int:
    """Watch the daemon: jobs, throughput, queues, workers, alerts.

    Ends with q or Ctrl-C. Rates are those of the last 10 s, with --once and --json of one interval.
    """
    from jobd.cli.ctl import top as view

    if interval < MIN_INTERVAL_MS:
        raise click.UsageError(f"--interval must be {MIN_INTERVAL_MS}ms at least")
    if not (once or as_json or sys.stdout.isatty()):
        raise click.UsageError("top draws on a terminal: give --once for one frame, or --json")
    client = admin_client()
    samples = view.Sampler()
    if once or as_json:
        samples.rates(client.metrics())
        view.pause(interval / 1000)
        frame = samples.take(client)
        terminal.emit_json(frame) if as_json else view.draw_once(frame)
        return exit_codes.DONE
    view.watch(client, samples, interval / 1000)
    return exit_codes.DONE


VERBS: Final = (events, top)
