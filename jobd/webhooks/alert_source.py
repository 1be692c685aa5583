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
from jobd.webhooks.context import Office
from jobd.webhooks.message import Letter, of_alert
from jobd.webhooks.retry import retry_wait_ms

HELD: Final = 4  # changes of one alert that are held: the latest two times that it came and went
TRIES: Final = 5  # of one change, without the outbox: a bit more than a minute


class Held(Struct, eq=False):
    """A letter that the outbox has not. `due`: not tried before, in ms of a clock that never steps."""

    letter: Letter
    tries: int = 0
    due: int = 0
    is_over: bool = False  # it was taken, or tried often enough: the rest is for the outbox


class AlertNews:
    """`look` finds what is new. Either it is `written`, or `ring` tells it as well as can be.

    `told`: the alerts of which who has got all that is held knows that they fire, and since when (Unix ms).
    """

    def __init__(self, endpoint: WebhookEndpoint, told: dict[str, int], office: Office) -> None:
        self.told = told
        self._endpoint = endpoint
        self._office = office
        self._held: list[Held] = []
        self._going: dict[str, asyncio.Task[None]] = {}  # by subject

    def look(self) -> list[Letter]:
        """All that the outbox does not have yet, the oldest first: what is told twice is the same letter."""
        views = self._office.alerts() if self._endpoint.wants_alerts else None
        knows, now = dict(self.told), self._office.moment().now
        for view in views or ():
            if view.firing == (view.name in knows):
                continue
            if view.firing:
                knows[view.name] = now if view.since is None else view.since
            else:
                view = replace(view, since=knows.pop(view.name))
            letter = of_alert(view, now, self._office.source)
            if letter.type in self._endpoint.events:
                self._hold(letter)
        if knows != self.told:
            self.told = knows
        return [held.letter for held in self._held]

    def written(self, count: int) -> None:
        """The first `count` of what `look` gave are in the outbox."""
        del self._held[:count]

    def ring(self, post: Callable[[Letter], Awaitable[DeliveryOutcome]]) -> None:
        """Begin each try that is due of what cannot be written now: of one alert one at a time, and in order."""
        self.look()
        ms, newest = _now_ms(), {held.letter.subject: held for held in self._held}
        met: set[str] = set()
        for held in self._held:
            subject = held.letter.subject
            is_past = held.tries > 0 and held is not newest[subject]  # what is new need not wait for its next try
            if subject in self._going or subject in met or held.is_over or is_past:
                continue
            met.add(subject)
            if held.due <= ms:
                self._going[subject] = asyncio.create_task(self._try(held, post), name=f"webhook {self._endpoint.name}")

    def going(self) -> list[asyncio.Task[None]]:
        """The tries that are on their way."""
        return list(self._going.values())

    async def _try(self, held: Held, post: Callable[[Letter], Awaitable[DeliveryOutcome]]) -> None:
        held.tries += 1
        try:
            outcome = await post(held.letter)
        finally:
            del self._going[held.letter.subject]
        held.is_over = outcome.error is None or held.tries >= TRIES
        office = self._office
        held.due = _now_ms() + retry_wait_ms(held.tries, office.chance(), office.manners, outcome.retry_after_ms)

    def _hold(self, letter: Letter) -> None:
        """Where an alert comes and goes all the while, its oldest coming and going are dropped."""
        self._held.append(Held(letter))
        if Counter(held.letter.subject for held in self._held)[letter.subject] > HELD:
            for old in [held for held in self._held if held.letter.subject == letter.subject][:2]:
                self._held.remove(old)


def _now_ms() -> int:
    """By a clock that never steps."""
    return int(asyncio.get_running_loop().time() * SECOND_MS)
