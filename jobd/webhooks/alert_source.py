"""What one webhook is to be told of alerts: held until its outbox has it, told without it while that cannot be written.

An alert for which somebody has to get up, above all a full disk, cannot wait until the disk has room. Writes nothing.
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

MAX_PENDING: Final = 4  # changes of one alert that are held: the latest two times that it came and went
MAX_TRIES: Final = 5  # of one change, without the outbox: a bit more than a minute


class PendingAlert(Struct, eq=False):
    """A letter that the outbox has not. `due`: not tried before, in ms of a clock that never steps."""

    message: Message
    tries: int = 0
    due: int = 0
    is_done: bool = False  # it was taken, or tried often enough: the rest is for the outbox


class AlertSource:
    """`look` finds what is new. Either it is `written`, or `ring` tells it as well as can be.

    `told`: the alerts of which who has got all that is held knows that they fire, and since when (Unix ms).
    """

    def __init__(self, endpoint: WebhookEndpoint, told: dict[str, int], office: DispatchContext) -> None:
        self.announced = told
        self._endpoint = endpoint
        self._context = office
        self._pending: list[PendingAlert] = []
        self._in_flight: dict[str, asyncio.Task[None]] = {}  # by subject

    def poll(self) -> list[Message]:
        """All that the outbox does not have yet, the oldest first: what is told twice is the same letter."""
        views = self._context.alerts() if self._endpoint.wants_alerts else None
        knows, now = dict(self.announced), self._context.moment().now
        for view in views or ():
            if view.firing == (view.name in knows):
                continue
            if view.firing:
                knows[view.name] = now if view.since is None else view.since
            else:
                view = replace(view, since=knows.pop(view.name))
            letter = alert_message(view, now, self._context.source)
            if letter.type in self._endpoint.events:
                self._hold(letter)
        if knows != self.announced:
            self.announced = knows
        return [held.message for held in self._pending]

    def written(self, count: int) -> None:
        """The first `count` of what `look` gave are in the outbox."""
        del self._pending[:count]

    def deliver_directly(self, post: Callable[[Message], Awaitable[DeliveryOutcome]]) -> None:
        """Begin each try that is due of what cannot be written now: of one alert one at a time, and in order."""
        self.poll()
        ms, newest = _now_ms(), {held.message.subject: held for held in self._pending}
        met: set[str] = set()
        for held in self._pending:
            subject = held.message.subject
            is_past = held.tries > 0 and held is not newest[subject]  # what is new need not wait for its next try
            if subject in self._in_flight or subject in met or held.is_done or is_past:
                continue
            met.add(subject)
            if held.due <= ms:
                self._in_flight[subject] = asyncio.create_task(
                    self._try(held, post), name=f"webhook {self._endpoint.name}"
                )

    def in_flight(self) -> list[asyncio.Task[None]]:
        """The tries that are on their way."""
        return list(self._in_flight.values())

    async def _try(self, held: PendingAlert, post: Callable[[Message], Awaitable[DeliveryOutcome]]) -> None:
        held.tries += 1
        try:
            outcome = await post(held.message)
        finally:
            del self._in_flight[held.message.subject]
        held.is_done = outcome.error is None or held.tries >= MAX_TRIES
        office = self._context
        held.due = _now_ms() + retry_wait_ms(held.tries, office.chance(), office.retry_policy, outcome.retry_after_ms)

    def _hold(self, letter: Message) -> None:
        """Where an alert comes and goes all the while, its oldest coming and going are dropped."""
        self._pending.append(PendingAlert(letter))
        if Counter(held.message.subject for held in self._pending)[letter.subject] > MAX_PENDING:
            for old in [held for held in self._pending if held.message.subject == letter.subject][:2]:
                self._pending.remove(old)


def _now_ms() -> int:
    """By a clock that never steps."""
    return int(asyncio.get_running_loop().time() * SECOND_MS)
