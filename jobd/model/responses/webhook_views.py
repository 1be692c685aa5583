"""Webhooks and their deliveries."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Struct

from jobd.model.fields import doc
from jobd.model.responses import shared


class WebhookView(Struct, frozen=True):
    """A webhook and the state of its deliveries. Counters start at 0 with the daemon."""

    name: Annotated[str, doc("Name of the webhook.")]
    url: Annotated[str, doc("Scheme and host of its URL. Parts that may be secret are left out.")]
    events: Annotated[list[str], doc("The types of its events.")]
    queues: Annotated[list[str], doc("Only events of these queues. Empty: all queues.")]
    state: Annotated[
        Literal["starting", "closed", "open", "half_open"],
        doc(
            "State of its circuit breaker: `closed` is normal, `open` sends nothing, `half_open` sends one "
            "delivery as a trial."
        ),
    ]
    failing_since: Annotated[int | None, doc("Since when every attempt has failed, in Unix ms, or null.")]
    next_attempt_at: Annotated[
        int | None, doc("When the next attempt is possible, in Unix ms. Null: now, or no delivery waits for a retry.")
    ]
    position: Annotated[int, doc("The newest event that was read for it.")]
    lag: Annotated[int, doc("How many events have not been read for it yet.")]
    waiting: Annotated[int, doc("How many deliveries are waiting.")]
    delivered: Annotated[int, doc("How many deliveries succeeded.")]
    failed: Annotated[int, doc("How many attempts failed.")]
    dead_lettered: Annotated[int, doc("How many deliveries were dead-lettered.")]
    last_success_at: Annotated[int | None, doc("When a delivery last succeeded, in Unix ms, or null.")]
    last_error: Annotated[str | None, doc("The error of the last attempt that failed, or null.")]
    last_error_at: Annotated[int | None, doc("When that attempt failed, in Unix ms, or null.")]


class WebhookList(Struct):
    """The configured webhooks."""

    webhooks: Annotated[list[WebhookView], doc("The webhooks.")]


DeliveryState = Literal["waiting", "delivered", "dead-lettered"]


class DeliveryView(Struct, frozen=True):
    """A delivery: one message to one webhook."""

    id: Annotated[int, doc("Number of the delivery.")]
    state: Annotated[DeliveryState, doc("`waiting`, `delivered` or `dead-lettered`.")]
    type: Annotated[str, doc("Type of the message.")]
    subject: Annotated[str, doc("What it is about: `jobs/ID`, `queues/NAME`, `problems/ID`.")]
    message_id: Annotated[str, doc("Id of the message: its header `webhook-id`.")]
    seq: Annotated[int | None, doc("Position of the event in the event log. Null if it is not an event.")]
    at: Annotated[int, doc("When the delivery was created, in Unix ms.")]
    due_at: Annotated[int | None, doc("When the next attempt is due, in Unix ms. Null once it has ended.")]
    attempts: Annotated[int, doc("Number of attempts so far.")]
    ended_at: Annotated[int | None, doc("When it was delivered or dead-lettered, in Unix ms, or null.")]
    status: Annotated[int | None, doc("HTTP status of the last response, or null.")]
    error: Annotated[str | None, doc("What was wrong with the last attempt, or null.")]


class DeliveryPage(Struct):
    """A page of deliveries, newest first."""

    deliveries: Annotated[list[DeliveryView], doc("The deliveries.")]
    next_cursor: shared.NextCursor


class Resent(Struct):
    """The result of retrying dead-lettered deliveries."""

    resent: Annotated[int, doc("How many dead-lettered deliveries are queued again.")]
