"""What the couriers of all webhooks share: the disk and the clock as they see them, and the numbers of deliveries.

Does nothing by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from msgspec import Struct

from jobd.model.commands import Moment
from jobd.model.responses import AlertView
from jobd.model.storage import OutboxStorage
from jobd.model.webhooks import Delivery, DeliveryOutcome, WebhookEndpoint
from jobd.webhooks.message import Message
from jobd.webhooks.retry import RetryPolicy


class Transport(Protocol):
    async def post(self, endpoint: WebhookEndpoint, delivery: Delivery) -> DeliveryOutcome: ...
    async def close(self) -> None: ...


class DispatchContext(Struct):
    """What all couriers share. `next_delivery` is the next number to give; one that was given is never given again."""

    disk: OutboxStorage
    moment: Callable[[], Moment]
    source: str  # what CloudEvents call this daemon
    may_write: Callable[[], bool]  # not while the disk is full: its last room is for the endings of jobs
    alerts: Callable[[], Sequence[AlertView] | None]  # as they are; None where nobody has looked yet
    chance: Callable[[], float]  # 0 to 1
    retry_policy: RetryPolicy = RetryPolicy()
    next_delivery: int = 1

    def new_delivery(self, letter: Message, endpoint: str, now: int) -> Delivery:
        """The letter as a delivery that waits."""
        id_, self.next_delivery = self.next_delivery, self.next_delivery + 1
        return Delivery(
            id=id_,
            endpoint=endpoint,
            state="waiting",
            subject=letter.subject,
            type=letter.type,
            event_id=letter.event_id,
            seq=letter.seq,
            at=now,
            due_at=now,
            tries=0,
            ended_at=None,
            status=None,
            error=None,
            body=letter.body,
        )


class DeliveryStats(Struct):
    """What was done since the process started, and how the last tries went. Times in Unix ms."""

    delivered: int = 0
    failed: int = 0  # tries
    given_up: int = 0
    last_success_at: int | None = None
    last_error: str | None = None
    last_error_at: int | None = None
