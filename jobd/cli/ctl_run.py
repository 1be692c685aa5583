"""jobctl run: the command line of a worker around any program. The worker itself is the client's."""

from __future__ import annotations

import click

from jobd.cli import exits
from jobd.cli.kinds import DURATION
from jobd.cli.places import current, worker_endpoint, worker_options


@click.command(context_settings={"ignore_unknown_options": False})
@worker_options
def run() -> int:
    """Work on jobs by running CMD for each."""
    return 0
