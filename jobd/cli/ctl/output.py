"""`jobctl output`: what a job printed."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Final

import click

from jobd.cli import terminal
from jobd.cli.connection import worker_options
from jobd.cli.ctl.completion import JOB
from jobd.cli.ctl.wait import waiting_client
from jobd.cli.params import json_option
from jobd.model.times import utc

if TYPE_CHECKING:
    from jobd.model.responses import GrantOutput, OutputView

_WAIT_MS: Final = 30_000  # of one request with --follow
_LINE_END: Final = re.compile(r"\r\n?|\n")


@click.command()
@JOB
@click.option("-f", "--follow", is_flag=True, help="Print new output as it comes, until the job is finished.")
@json_option
@worker_options
def output(job_id: str, follow: bool, as_json: bool) -> None:
    """Print what a job printed or logged.

    This is the output of a program under `jobctl run`, or the text of `current_job().log`. The daemon keeps the last
    64 KiB of each of its last 5 grants. With several grants, each begins with a line of its own. With -f, it continues
    through retries, and exits with 0 when the job is finished. On a terminal, control characters are escaped.
    """
    client, printer = waiting_client(), _Printer(sys.stdout.isatty())
    view = client.output(job_id)
    try:
        while True:
            if not as_json:
                printer.show(view)
            elif view.grants or not follow:
                terminal.emit_json(view, may_indent=not follow)
            sys.stdout.flush()
            if view.finished or not follow:
                break
            view = client.output(job_id, after=view.position, wait_ms=_WAIT_MS)
    except KeyboardInterrupt:
        printer.end_line()
        raise
    printer.end_line()
    if printer.token is None and not as_json:
        hint = f"to follow it: jobctl output -f {job_id}"
        if view.finished:
            hint = "it printed nothing, or the text was removed for newer output (limits.output_bytes)"
        terminal.say(f"no output of job {job_id} ({view.status}) is kept; {hint}")


class _Printer:
    """Print views of one job in their order. `token` is that of the grant whose text was printed last."""

    def __init__(self, is_terminal: bool) -> None:
        self.token: int | None = None
        self._is_terminal = is_terminal
        self._end = 0  # of the grant's output that was printed
        self._is_inside = False  # a line

    def show(self, view: OutputView) -> None:
        for grant in view.grants:
            if grant.fencing_token != self.token:
                if self.token is not None or len(view.grants) > 1:
                    self._note(f"==> attempt {grant.attempt} by {grant.worker}, {utc(grant.begins_at)} <==")
                self.token, self._end = grant.fencing_token, 0
            self._print(grant)

    def _print(self, grant: GrantOutput) -> None:
        if grant.offset > self._end:
            self._note(f"… {grant.offset - self._end} bytes are no longer kept")
        text = grant.text
        if self._is_terminal:
            text = "\n".join(terminal.clean(line) for line in _LINE_END.split(text.replace("\t", "    ")))
        sys.stdout.write(text)
        self._end, self._is_inside = grant.end, not text.endswith("\n")

    def _note(self, text: str) -> None:
        self.end_line()
        terminal.emit(text)

    def end_line(self) -> None:
        """End the open line, so that a message or the prompt begins a line of its own."""
        if self._is_inside:
            sys.stdout.write("\n")
            self._is_inside = False
