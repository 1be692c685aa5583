"""`jobctl webhooks`: list webhooks and deliveries, resend deliveries, and send tests."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import click

from jobd.cli import confirm, exit_codes, tables_admin, terminal
from jobd.cli.connection import admin_client, admin_options, read_pages
from jobd.cli.params import json_option, limit_option

if TYPE_CHECKING:
    from jobd.model.responses import DeliveryPage, DeliveryState

STATES: Final = ("waiting", "delivered", "dead-lettered")


@click.command()
@click.argument("what", required=False, type=click.Choice(["deliveries", "resend", "test"]))
@click.argument("name", required=False)
@click.argument("delivery", required=False, type=click.IntRange(1))
@click.option("--state", type=click.Choice(STATES), help="Only deliveries in this state.")
@limit_option("deliveries", 50, 200)
@click.option("--cursor", metavar="CURSOR", help="Continue after the page that printed this cursor.")
@click.option("--all", "everything", is_flag=True, help="List all deliveries.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Only print what would be sent.")
@confirm.reason_option("Stored in the audit log if something is sent.")
@json_option
@admin_options
def webhooks(
    what: str | None,
    name: str | None,
    delivery: int | None,
    state: DeliveryState | None,
    limit: int,
    cursor: str | None,
    everything: bool,
    yes: bool,
    dry_run: bool,
    reason: str | None,
    as_json: bool,
) -> None:
    """List webhooks and deliveries, resend deliveries, send tests.

    \b
    webhooks                                list the webhooks and their state
    webhooks deliveries NAME                list waiting and recent deliveries
    webhooks resend NAME DELIVERY           resend one delivery
    webhooks resend NAME --state dead-lettered   resend all dead-lettered deliveries
    webhooks test NAME                      send a test message
    """
    if what is None:
        terminal.show_list(tables_admin.WEBHOOKS, admin_client().webhooks(), as_json)
        return
    if name is None:
        raise click.UsageError(f"Which webhook? jobctl webhooks {what} NAME; jobctl webhooks lists them.")
    if what == "deliveries":
        page = _deliveries_of(name, state, None if everything else limit, cursor)
        terminal.emit_json(page) if as_json else tables_admin.deliveries(page)
    elif what == "resend" and delivery is None:
        if state != "dead-lettered":
            raise click.UsageError(
                "Which delivery? jobctl webhooks deliveries NAME lists them; --state dead-lettered selects all "
                "of these."
            )
        _resend_all(name, reason, yes=yes, dry_run=dry_run, as_json=as_json)
    else:
        _send(name, delivery if what == "resend" else None, reason, dry_run=dry_run, as_json=as_json)


def _deliveries_of(name: str, state: DeliveryState | None, limit: int | None, cursor: str | None) -> DeliveryPage:
    """Return up to `limit` deliveries (None: all)."""
    from jobd.model.responses import DeliveryPage

    get = partial(admin_client().deliveries, name, state=state)
    return DeliveryPage(*read_pages(get, "deliveries", limit, cursor))


def _resend_all(name: str, reason: str | None, *, yes: bool, dry_run: bool, as_json: bool) -> None:
    """Count the dead-lettered deliveries, ask, and resend those that were counted."""
    if not (yes or dry_run):
        confirm.need_terminal()
    found = _deliveries_of(name, "dead-lettered", None, None).deliveries
    if dry_run or not found:
        message = f"{_deliveries(len(found))} would be resent" if found else f"No delivery of {name} is dead-lettered."
        terminal.emit_json({"resent": 0, "would": len(found)}) if as_json else terminal.emit(message)
        return
    if not yes:
        confirm.confirm(f"resend {_deliveries(len(found))}")
    count = admin_client(timeout_s=60.0).resend_dead_lettered(name, found[0].id, reason)
    message = f"{_deliveries(count)} queued: jobctl webhooks deliveries {name}"
    terminal.emit_json({"resent": count, "would": len(found)}) if as_json else terminal.emit(message)


def _send(name: str, delivery: int | None, reason: str | None, *, dry_run: bool, as_json: bool) -> None:
    """Resend one delivery, or send a test."""
    if dry_run:
        _would_send(name, delivery, as_json=as_json)
        return
    client = admin_client()
    sent = client.test_webhook(name, reason) if delivery is None else client.resend_delivery(name, delivery, reason)
    message = f"Delivery {sent.id} ({sent.type}) is queued: jobctl webhooks deliveries {name}"
    terminal.emit_json(sent) if as_json else terminal.emit(message)


def _would_send(name: str, delivery: int | None, *, as_json: bool) -> None:
    """Check that the webhook and the delivery exist. If not, fail as the command without --dry-run does."""
    found = _deliveries_of(name, None, 1 if delivery is None else None, None).deliveries
    if delivery is not None and all(each.id != delivery for each in found):
        raise exit_codes.CliError(f"Webhook {name} has no delivery {delivery}.", exit_codes.REJECTED)
    message = f"A test would be sent to {name}" if delivery is None else f"Delivery {delivery} would be resent"
    terminal.emit_json({"would": 1}) if as_json else terminal.emit(message)


def _deliveries(count: int) -> str:
    return "1 delivery" if count == 1 else f"{count} deliveries"
