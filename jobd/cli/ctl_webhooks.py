"""jobctl's verb for webhooks: who is told of what happens, what waits for them, and sending again.

Holds no logic: reads the command line, asks the client, shows the answer.
"""

from __future__ import annotations

import click

from jobd.cli import show
from jobd.cli.group import json_option
from jobd.cli.places import admin_client, admin_options

STATES = ("waiting", "delivered", "given_up")


@click.command()
@click.argument("what", required=False, type=click.Choice(["deliveries", "resend", "test"]))
@click.argument("name", required=False)
@click.argument("delivery", required=False, type=click.IntRange(1))
@click.option("--state", type=click.Choice(STATES), help="Only deliveries in this state.")
@click.option("--limit", type=click.IntRange(1, 200), default=50, show_default=True, help="How many at most.")
@json_option
@admin_options
def webhooks(
    what: str | None, name: str | None, delivery: int | None, state: str | None, limit: int, as_json: bool
) -> None:
    """List the webhooks and how they are going.

    `webhooks deliveries NAME` lists what waits for one and what became of the latest, `webhooks resend NAME DELIVERY`
    sends one again, `webhooks test NAME` sends a message that says it is a test.
    """
    from jobd.cli import tables_admin

    client = admin_client()
    if what is None:
        found = client.webhooks()
        show.emit_json({"webhooks": found}) if as_json else tables_admin.webhooks(found)
        return
    if name is None:
        raise click.UsageError(f"Which webhook? jobctl webhooks {what} NAME; jobctl webhooks lists them.")
    if what == "deliveries":
        page = client.deliveries(name, state=state, limit=limit)  # type: ignore[arg-type]  # one of STATES
        show.emit_json(page) if as_json else tables_admin.deliveries(page)
        return
    if what == "resend":
        if delivery is None:
            raise click.UsageError("Which delivery? jobctl webhooks deliveries NAME lists them.")
        sent = client.deliver_again(name, delivery)
    else:
        sent = client.test_webhook(name)
    if as_json:
        show.emit_json(sent)
    else:
        show.emit(f"Delivery {sent.id} ({sent.type}) is on its way: jobctl webhooks deliveries {name}")
