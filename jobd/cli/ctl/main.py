"""The program jobctl. Imports only what the command line needs, so that --help is quick."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from jobd import __version__
from jobd.cli import exit_codes
from jobd.cli.connection import all_options
from jobd.cli.ctl import admin, change, cluster, completion, events, jobs, run, submit, transfer, wait, webhooks
from jobd.cli.params import SETTINGS, CommandGroup


@click.group(cls=CommandGroup, context_settings=SETTINGS)
@click.version_option(__version__, prog_name="jobctl")
@all_options
def jobctl() -> None:
    """Submit, run and inspect jobs, and operate a running jobd.

    \b
    Exit codes: 0 done, 1 failed, 2 usage, 3 daemon unreachable, 4 not found or rejected,
    5 unauthorized, 74 I/O error, 75 try again, 78 configuration, 130 interrupted (Ctrl-C).
    """


jobctl.add_all(
    "Jobs (worker API)",
    submit.submit,
    run.run,
    wait.wait,
    jobs.jobs,
    jobs.job,
    jobs.why,
    jobs.timeline,
    jobs.validate,
    jobs.cancel,
    completion.completion,
)
jobctl.add_all(
    "Operators (admin API)",
    *admin.COMMANDS,
    webhooks.webhooks,
    cluster.cluster,
    *events.COMMANDS,
    *transfer.COMMANDS,
    *change.COMMANDS,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run jobctl and return the exit code."""
    return exit_codes.run(jobctl, "jobctl", argv)


if __name__ == "__main__":
    sys.exit(main())
