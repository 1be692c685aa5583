"""Turn alert changes into messages for one webhook.

A message is kept here until the outbox holds it. While the outbox cannot be written, messages are delivered directly:
an alert about a full disk must not wait until the disk has room.
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

MAX_PENDING: Final = 4  # kept changes of one alert: two times firing, two times resolved
MAX_TRIES: Final = 5  # direct attempts for one change, over a bit more than a minute


class PendingAlert(Struct, eq=False):
    """A message that the outbox has not. `due`: not tried before, in ms of a clock that never steps."""

    message: Message
    tries: int = 0
    due: int = 0
    is_done: bool = False  # delivered directly, or out of direct attempts; the outbox still delivers it


class AlertSource:
    """Collect alert changes with `poll`; then either mark them `written` or `deliver_directly`.

    `announced` maps the alerts that the receiver knows as firing, once it has all pending messages, to the time since
    which they fire (Unix ms).
    """

    def __init__(self, endpoint: WebhookEndpoint, announced: dict[str, int], context: DispatchContext) -> None:
        self.announced = announced
        self._endpoint = endpoint
        self._context = context
        self._pending: list[PendingAlert] = []
        self._in_flight: dict[str, asyncio.Task[None]] = {}  # by subject

    def poll(self) -> list[Message]:
        """Return all messages that are not in the outbox, oldest first. Repeated calls return the same messages."""
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
        """Forget the first `count` messages of `poll`: they are in the outbox."""
        del self._pending[:count]

    def deliver_directly(self, post: Callable[[Message], Awaitable[DeliveryOutcome]]) -> None:
        """Start the due direct attempts: one at a time per alert, in order."""
        self.poll()
        ms, newest = _now_ms(), {pending.message.subject: pending for pending in self._pending}
        seen: set[str] = set()
        for pending in self._pending:
            subject = pending.message.subject
            is_past = pending.tries > 0 and pending is not newest[subject]  # a newer change does not wait for retries
            if subject in self._in_flight or subject in seen or pending.is_done or is_past:
                continue
            seen.add(subject)
            if pending.due <= ms:
                self._in_flight[subject] = asyncio.create_task(
                    self._try(pending, post), name=f"webhook {self._endpoint.name}"
                )

    def in_flight(self) -> list[asyncio.Task[None]]:
        """Return the running attempts."""
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
        """Keep a message. If an alert flaps, drop its oldest firing and resolved pair."""
        self._pending.append(PendingAlert(message))
        if Counter(pending.message.subject for pending in self._pending)[message.subject] > MAX_PENDING:
            for old in [pending for pending in self._pending if pending.message.subject == message.subject][:2]:
                self._pending.remove(old)


def _now_ms() -> int:
    """Return monotonic milliseconds."""
    return int(asyncio.get_running_loop().time() * SECOND_MS)
