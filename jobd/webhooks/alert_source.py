"""Turn alert changes into messages for one webhook.

Messages are kept here until they are in the outbox. While the outbox cannot be written, they are delivered directly,
because an alert about a full disk must not wait for free space.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from jobd.model.job import SECOND_MS
from jobd.model.webhooks import DeliveryOutcome, WebhookEndpoint
from jobd.webhooks.context import DispatchContext
from jobd.webhooks.message import Message, alert_message
from jobd.webhooks.retry import retry_wait_ms

MAX_PENDING: Final = 4  # changes kept per alert: firing and resolved, twice
MAX_TRIES: Final = 5  # direct attempts per change, over a little more than a minute


class PendingAlert(Struct, eq=False):
    """A message that is not in the outbox yet. `due` is the earliest next attempt, in monotonic ms."""

    message: Message
    tries: int = 0
    due: int = 0
    is_done: bool = False  # delivered directly, or out of attempts; it goes into the outbox in any case


class AlertSource:
    """Collects alert changes with `poll`. Then call either `written` or `deliver_directly`.

    `announced` maps each firing alert to the time when it began to fire (Unix ms), according to all messages made so
    far, including pending ones.
    """

    def __init__(self, endpoint: WebhookEndpoint, announced: dict[str, int], context: DispatchContext) -> None:
        self.announced = announced
        self._endpoint = endpoint
        self._context = context
        self._pending: list[PendingAlert] = []
        self._in_flight: dict[str, asyncio.Task[None]] = {}  # by subject

    def poll(self) -> list[Message]:
        """Return all messages that are not in the outbox yet, oldest first. Repeated calls return them again."""
        views = self._context.alerts() if self._endpoint.wants_alerts else None
        announced, now = dict(self.announced), self._context.moment().now
        for view in views or ():
            if view.firing == (view.name in announced):
                continue
            if view.firing:
                announced[view.name] = now if view.since is None else view.since
            else:
                view = replace(view, since=announced.pop(view.name))
            message = alert_message(view, now, self._context.source)
            if message.type in self._endpoint.events:
                self._add(message)
        if announced != self.announced:
            self.announced = announced
        return [pending.message for pending in self._pending]

    def written(self, count: int) -> None:
        """Forget the first `count` messages of `poll`, which are in the outbox now."""
        del self._pending[:count]

    def deliver_directly(self, post: Callable[[Message], Awaitable[DeliveryOutcome]]) -> None:
        """Start the direct attempts that are due: one at a time per alert, in order."""
        self.poll()
        ms, newest = _now_ms(), {pending.message.subject: pending for pending in self._pending}
        seen: set[str] = set()
        for pending in self._pending:
            subject = pending.message.subject
            # A newer change does not wait for retries of an older one.
            is_outdated = pending.tries > 0 and pending is not newest[subject]
            if subject in self._in_flight or subject in seen or pending.is_done or is_outdated:
                continue
            seen.add(subject)
            if pending.due <= ms:
                self._in_flight[subject] = asyncio.create_task(
                    self._try(pending, post), name=f"webhook {self._endpoint.name}"
                )

    def in_flight(self) -> list[asyncio.Task[None]]:
        return list(self._in_flight.values())

    async def _try(self, pending: PendingAlert, post: Callable[[Message], Awaitable[DeliveryOutcome]]) -> None:
        pending.tries += 1
        try:
            outcome = await post(pending.message)
        finally:
            del self._in_flight[pending.message.subject]
        pending.is_done = outcome.error is None or pending.tries >= MAX_TRIES
        context = self._context
        pending.due = _now_ms() + retry_wait_ms(
            pending.tries, context.chance(), context.retry_policy, outcome.retry_after_ms
        )

    def _add(self, message: Message) -> None:
        """Keep a message. If an alert flaps, drop its oldest pair of firing and resolved."""
        self._pending.append(PendingAlert(message))
        if Counter(pending.message.subject for pending in self._pending)[message.subject] > MAX_PENDING:
            for old in [pending for pending in self._pending if pending.message.subject == message.subject][:2]:
                self._pending.remove(old)


def _now_ms() -> int:
    return int(asyncio.get_running_loop().time() * SECOND_MS)
