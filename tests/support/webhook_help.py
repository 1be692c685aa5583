"""Helpers for tests of webhooks: a fake transport, a clock, and webhooks with a store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from jobd.model.commands import Moment
from jobd.model.events import Change
from jobd.model.responses import AlertView
from jobd.model.storage import OutboxStorage
from jobd.model.webhooks import Delivery, DeliveryOutcome, WebhookEndpoint
from jobd.storage.store import Store
from jobd.webhooks.context import DispatchContext
from jobd.webhooks.manager import WebhookManager
from jobd.webhooks.retry import RetryPolicy
from tests.support.factories import NOW, ChangeFactory

YES = DeliveryOutcome(204)
NO = DeliveryOutcome(500, "500: broken")
HASTY = RetryPolicy(retry_ms=20, retry_at_most_ms=80, least_tries=3, opens_after=5, pause_ms=40, pause_at_most_ms=80)
KEY = b"k" * 24


def endpoint(name: str = "e", **fields: Any) -> WebhookEndpoint:
    return WebhookEndpoint(name, f"https://{name}.test/hook?token=hush", (KEY,), **fields)


class Clock:
    """A wall clock that advances by itself and can be stepped."""

    def __init__(self) -> None:
        self.step_ms = NOW - time.time_ns() // 1_000_000

    def moment(self) -> Moment:
        now = time.time_ns() // 1_000_000 + self.step_ms
        return Moment(now=now, lease=0, offset=now)


class Posts:
    """The transport of every endpoint: records deliveries and returns what `answer` says."""

    def __init__(self, answer: Callable[[Delivery], DeliveryOutcome] = lambda _: YES) -> None:
        self.answer = answer
        self.tried: list[Delivery] = []
        self.taken: list[Delivery] = []
        self.open = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.most_at_once = 0
        self._at_once = 0

    def __call__(self, _: WebhookEndpoint) -> Posts:
        self.open += 1
        return self

    async def post(self, endpoint: WebhookEndpoint, delivery: Delivery) -> DeliveryOutcome:
        self.tried.append(delivery)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            await self.gate.wait()
            await asyncio.sleep(0)
        finally:
            self._at_once -= 1
        outcome = self.answer(delivery)
        if outcome.error is None:
            self.taken.append(delivery)
        return outcome

    async def close(self) -> None:
        self.open -= 1

    def types(self) -> list[str]:
        return [each.type for each in self.taken]

    def subjects(self) -> list[tuple[str, str]]:
        return [(each.subject, each.type) for each in self.taken]


class Site:
    """Webhooks on a store, with a source of changes."""

    def __init__(self, store: Store, posts: Posts, maker: ChangeFactory, clock: Clock, disk: OutboxStorage) -> None:
        self.store = store
        self.posts = posts
        self.maker = maker
        self.clock = clock
        self.firing: dict[str, int] | None = {}  # firing alert -> since
        self.may_write = True
        self.listeners: list[Callable[[Any], None]] = []
        self.office = DispatchContext(
            disk=disk,
            moment=clock.moment,
            source="/jobd/test",
            may_write=lambda: self.may_write,
            alerts=self._alerts,
            chance=lambda: 0.5,
            retry_policy=HASTY,
        )
        self.webhooks = WebhookManager(self.office, listen=self.listeners.append, post=posts)

    def _alerts(self) -> list[AlertView] | None:
        if self.firing is None:
            return None
        names = ("stuck_jobs", "database")
        return [AlertView(name, name in self.firing, self.firing.get(name), 1.0, 0.0, "Look.") for name in names]

    async def commit(self, *changes: Change) -> None:
        batch = self.maker.batch(list(changes))
        await self.store.write(batch)
        for listener in self.listeners:
            listener(batch.changes)

    def fire(self, name: str, at: int = NOW) -> None:
        assert self.firing is not None
        self.firing[name] = at
        self.webhooks.alerts_changed()

    def resolve(self, name: str) -> None:
        assert self.firing is not None
        del self.firing[name]
        self.webhooks.alerts_changed()


@asynccontextmanager
async def at_work(
    path: Path | str,
    *endpoints: WebhookEndpoint,
    posts: Posts | None = None,
    maker: ChangeFactory | None = None,
    clock: Clock | None = None,
    wrap: Callable[[Store], Any] = lambda store: store,
    **site: Any,
) -> AsyncIterator[Site]:
    """Run webhooks until the end of the block, then stop them as the daemon does."""
    store, _ = await Store.open(str(path))
    async with store:
        made = Site(store, posts or Posts(), maker or ChangeFactory(), clock or Clock(), wrap(store))
        for name, value in site.items():
            setattr(made, name, value)
        made.webhooks.set_endpoints(endpoints or [endpoint()])
        running = asyncio.create_task(made.webhooks.run())
        try:
            await until(lambda: len(made.webhooks.metrics()) == len(endpoints or [1]))
            yield made
        finally:
            made.webhooks.stop()
            await running
            assert made.posts.open == 0, "a sender was not closed"


async def until(condition: Callable[[], bool], *, seconds: float = 20.0) -> None:
    """Wait until the condition holds."""
    end = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < end, "it never happened"
        await asyncio.sleep(0.002)
