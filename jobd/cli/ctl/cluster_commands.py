"""`jobctl cluster`: show the nodes of a cluster, and hand over leadership."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import click

from jobd.cli import confirm, exit_codes, terminal
from jobd.cli.connection import TAKEOVER_S, admin_client, admin_options
from jobd.cli.params import json_option
from jobd.model.times import duration

if TYPE_CHECKING:
    from jobd.client import AdminClient
    from jobd.model.responses import ClusterView, NodeView

_POLL_S: Final = 0.1


@click.command()
@click.argument("what", required=False, type=click.Choice(["step-down"]))
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--force", is_flag=True, help="Step down even if no standby is ready to take over.")
@confirm.reason_option("Stored in the audit log.")
@json_option
@admin_options
def cluster(what: str | None, yes: bool, force: bool, reason: str | None, as_json: bool) -> int:
    """Show the nodes of the cluster and its leader. Exit 1 if no node leads.

    \b
    cluster              show nodes, leader, epoch, and how far each node is behind
    cluster step-down    make the leader step down, and wait until another node leads if its URL is known
    """
    if (yes or force or reason) and what is None:
        raise click.UsageError("--yes, --force and --reason need `step-down`: jobctl cluster step-down")
    client = admin_client()
    view, has_successor = client.cluster(), True
    if what == "step-down":
        view, has_successor = _step_down(client, view, reason, yes=yes, force=force)
    if as_json:
        terminal.emit_json(view)
    elif not has_successor:
        terminal.emit(
            f"{view.leader} has stepped down. To see which node leads, name the admin URLs of the others too."
        )
    elif what == "step-down":
        terminal.emit(f"{view.leader} leads, epoch {view.epoch}")
    else:
        _show(view)
    return exit_codes.DONE if view.role == "single" or view.leader is not None else exit_codes.FAILED


def _step_down(
    client: AdminClient, before: ClusterView, reason: str | None, *, yes: bool, force: bool
) -> tuple[ClusterView, bool]:
    """Make the leader step down, and wait until another leader has a later epoch. Return the cluster, and true.

    If the leader has stepped down and no node responds, return the cluster as before, and false: only its URL is known.
    """
    from jobd.client import Unreachable

    if not yes and before.role != "single":
        ready = sum(node.is_ready for node in before.nodes)
        confirm.confirm(f"make {before.leader or 'the leader'} step down; standbys that are ready: {ready}")
    has_responded = False
    try:
        before = client.step_down(reason, force=force)
        has_responded = True
    except Unreachable:  # the response may have been lost, as the process ends
        terminal.say("The leader did not respond; waiting for another one.")
    give_up_s = time.monotonic() + TAKEOVER_S
    while True:
        try:
            view = client.cluster()
        except Unreachable:
            if has_responded:
                return before, False
            raise
        if view.leader is not None and (view.epoch or 0) > (before.epoch or 0):
            return view, True
        if time.monotonic() > give_up_s:
            text = f"no node took over within {TAKEOVER_S:g} s. Is a standby running? See: jobctl cluster"
            raise exit_codes.CliError(text, exit_codes.TRY_AGAIN)
        time.sleep(_POLL_S)


def _show(view: ClusterView) -> None:
    if view.role == "single":
        terminal.emit("This daemon has a journal of its own; it is not part of a cluster.")
        return
    behind = f", {view.lag_events} {'event' if view.lag_events == 1 else 'events'} behind" if view.lag_events else ""
    fields: list[tuple[str, Any]] = [
        ("journal", view.journal),
        ("leader", view.leader or "none"),
        ("epoch", view.epoch),
        ("record", view.record),
        ("lease", None if view.lease_ms is None else duration(view.lease_ms)),
        ("synchronous", "unknown" if view.synchronous is None else view.synchronous),
        ("as seen by", f"{view.node} ({view.role}{behind})"),
        *[("warning", warning) for warning in view.warnings],
    ]
    terminal.pairs(fields)
    terminal.emit("")
    terminal.table(_NODES, view.nodes, empty="No nodes.")


def _note(node: NodeView) -> str:
    notes = ["not seen"] if node.is_unseen else ["ready"] if node.is_ready else []
    return ", ".join([*notes, *(["configuration differs from the leader's"] if node.config_differs else [])])


_NODES: Final[terminal.Columns] = {
    "NODE": "name",
    "ROLE": "role",
    "URL": "url",
    ">LAG": lambda node: duration(node.lag_ms) if node.role == "standby" else None,
    "SEEN": lambda node: f"{duration(node.seen_ms)} ago",
    ">FORMAT": "format",
    ">SCHEMA": lambda node: node.schema_version or None,
    "NOTE": _note,
}
