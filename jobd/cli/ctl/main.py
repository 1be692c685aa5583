"""The program jobctl. Imports the modules of its commands when they are used, because a script may run it often."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final

import click

from jobd import __version__
from jobd.cli import exit_codes
from jobd.cli.connection import all_options
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


_WORKER_API: Final = (
    ("submit", "submit"),
    ("run", "run"),
    ("worker_command", "worker"),
    ("wait", "wait"),
    ("output", "output"),
    ("jobs", "jobs job why timeline validate cancel"),
    ("completion", "completion"),
)
_ADMIN_API: Final = (
    (
        "admin_commands",
        "status alerts stats health disk queues workers take-back late locks cleanup recover-stuck failures reports",
    ),
    ("admin_commands", "audit pause resume"),
    ("directive_commands", "quiet resume-worker stop"),
    ("admin_commands", "clock"),
    ("schedules", "schedules schedule settings"),
    ("webhook_commands", "webhooks"),
    ("cluster_commands", "cluster"),
    ("event_commands", "events top"),
    ("transfer", "export import artifact"),
    ("change_commands", "retry force-fail force-reset transition adopt run-now update copy delete"),
    ("plan_commands", "apply"),
)
for _title, _modules in (("Jobs (worker API)", _WORKER_API), ("Operators (admin API)", _ADMIN_API)):
    for _module, _names in _modules:
        jobctl.add_lazily(_title, f"jobd.cli.ctl.{_module}", *_names.split())


def main(argv: Sequence[str] | None = None) -> int:
    return exit_codes.run(jobctl, "jobctl", argv)


if __name__ == "__main__":
    sys.exit(main())
