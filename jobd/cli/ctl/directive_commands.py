"""`jobctl quiet`, `resume-worker` and `stop`: directives to a worker, and quiet rules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from jobd.cli import terminal
from jobd.cli.confirm import ask_reason, reason_option
from jobd.cli.connection import admin_client, admin_options
from jobd.cli.ctl.completion import QUEUE
from jobd.cli.params import MOMENT, NAME, command, json_option
from jobd.model.times import utc

if TYPE_CHECKING:
    from jobd.model.responses import DirectedView, QuietRuleView

_REASON: Final = reason_option("The worker logs it, and lists of workers show it. On a terminal it is asked for.")
_DONE: Final = {"quiet": "takes no new jobs", "resume": "takes jobs again", "stop": "stops"}
_RULES: Final = terminal.Listing(
    "rules",
    "No quiet rules.",
    {
        "RULE": "id",
        "HOST": "host",
        "VERSION": "version",
        "QUEUE": "queue",
        ">WORKERS": "workers",
        "BY": "by",
        "SINCE": lambda rule: utc(rule.at),
        "UNTIL": lambda rule: None if rule.until is None else utc(rule.until),
        "REASON": "reason",
    },
)


def _show_directive(view: DirectedView, as_json: bool) -> None:
    when = "now" if view.sent else "with its next claim; not told yet, see jobctl workers"
    terminal.emit_json(view) if as_json else terminal.emit(f"{view.worker} {_DONE[view.action]} ({when})")


def _show_rule(view: QuietRuleView, verb: str, as_json: bool) -> None:
    selects = {"host": view.host, "version": view.version, "queue": view.queue}
    what = ", ".join(f"{name} {value}" for name, value in selects.items() if value is not None)
    count = f"{view.workers} {'worker' if view.workers == 1 else 'workers'}"
    terminal.emit_json(view) if as_json else terminal.emit(f"rule {view.id} {verb}: {what} ({count} now)")


@click.command()
@click.argument("worker", type=NAME, required=False)
@click.option("--host", type=NAME, metavar="HOST", help="Quiet the workers of this host.")
@click.option("--version", type=NAME, metavar="VERSION", help="Quiet the workers of this version.")
@click.option("--queue", type=QUEUE, metavar="QUEUE", help="Only for jobs of this queue.")
@click.option("--until", type=MOMENT, help="End the rule then (UTC), or after a duration such as 2h.")
@_REASON
@json_option
@admin_options
def quiet(
    worker: str | None,
    host: str | None,
    version: str | None,
    queue: str | None,
    until: int | None,
    reason: str | None,
    as_json: bool,
) -> None:
    """Stop workers from taking new jobs, or list the rules for that.

    Give WORKER, or a rule with --host, --version and --queue; without them, the rules are listed. Running jobs
    continue. WORKER gets the directive with its next claim, or at once if a claim waits, and stays quiet until `jobctl
    resume-worker`; a new process with the same name does not. A rule needs a reason, survives a restart, and also
    covers workers that appear later. It covers a worker if all of its options match.

    \b
    Example: jobctl quiet --version 2.4.1 --host k8s-b --reason "dies within 5 s, see INC-4411"
    """
    client, selects = admin_client(), {"host": host, "version": version, "queue": queue}
    has_rule = any(selects.values())
    if worker is not None:
        if has_rule or until is not None:
            raise click.UsageError("give either the name of a worker, or --host, --version and --queue for a rule")
        _show_directive(client.quiet_worker(worker, ask_reason(reason)), as_json)
    elif has_rule:
        reason = ask_reason(reason)
        if reason is None:
            raise click.UsageError("a rule needs a --reason, which is shown wherever its workers are")
        _show_rule(client.add_quiet_rule(**selects, until=until, reason=reason), "began", as_json)
    elif until is not None or reason is not None:
        raise click.UsageError("give the name of a worker, or --host, --version or --queue for a rule")
    else:
        terminal.show_list(_RULES, client.quiet_rules(), as_json)


@command(
    click.argument("worker", type=NAME, required=False),
    click.option("--rule", type=NAME, metavar="RULE", help="End this quiet rule (see jobctl quiet)."),
    reason_option("Stored in the audit log."),
    json_option,
    admin_options,
    name="resume-worker",
)
def resume_worker(worker: str | None, rule: str | None, reason: str | None, as_json: bool) -> None:
    """Let WORKER take jobs again, or end a quiet rule."""
    if (worker is None) == (rule is None):
        raise click.UsageError("give either the name of a worker or --rule RULE")
    client = admin_client()
    if rule is not None:
        _show_rule(client.end_quiet_rule(rule, reason), "ended", as_json)
    else:
        assert worker is not None
        _show_directive(client.resume_worker(worker, reason), as_json)


@command(click.argument("worker", type=NAME), _REASON, json_option, admin_options)
def stop(worker: str, reason: str | None, as_json: bool) -> None:
    """Stop WORKER as SIGTERM does.

    It claims no more jobs, and its running jobs get their grace. It gets the directive with its next claim, or at once
    if a claim waits. A supervisor may start it again; `jobctl quiet` does not end it.
    """
    _show_directive(admin_client().stop_worker(worker, ask_reason(reason)), as_json)
