"""Webhooks on a real store, with a fake transport and a clock that can be stepped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

from msgspec.structs import replace

from jobd.model.clocks import LockMs
from jobd.model.commands import Moment
from jobd.model.events import Event
from jobd.model.problems import Problem, Subject
from jobd.model.storage import OutboxStorage
from jobd.model.webhooks import Delivery, DeliveryOutcome, OpenProblems, WebhookEndpoint
from jobd.storage.store import Store
from jobd.webhooks.context import DispatchContext
from jobd.webhooks.manager import WebhookManager
from jobd.webhooks.retry import RetryPolicy
from tests.support.factories import NOW, ChangeFactory
from tests.support.polling import wait_until

DELIVERED = DeliveryOutcome(204)
REJECTED = DeliveryOutcome(500, "500: broken")
FAST_RETRY = RetryPolicy(retry_ms=20, max_retry_ms=80, min_tries=3, opens_after=5, pause_ms=40, max_pause_ms=80)
SLOW_RETRY = replace(FAST_RETRY, retry_ms=600_000, max_retry_ms=600_000, pause_ms=600_000, max_pause_ms=600_000)
KEY = b"k" * 24


def endpoint(name: str = "e", **fields: Any) -> WebhookEndpoint:
    return WebhookEndpoint(name, f"https://{name}.test/hook?token=hush", (KEY,), **fields)


class SteppedWallClock:
    """A wall clock that runs and can be stepped."""

    def __init__(self) -> None:
        self.step_ms = NOW - time.time_ns() // 1_000_000
        self.behind_ms = 0

    def moment(self) -> Moment:
        now = time.time_ns() // 1_000_000 + self.step_ms
        return Moment(now=now - self.behind_ms, lock_ms=LockMs(0), offset=now, ahead=-self.behind_ms)


class FakeTransport:
    """The transport of every endpoint. Record deliveries, and return the outcomes that `respond` gives."""

    def __init__(self, respond: Callable[[Delivery], DeliveryOutcome] = lambda _: DELIVERED) -> None:
        self.respond = respond
        self.tried: list[Delivery] = []
        self.delivered: list[Delivery] = []
        self.open = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.most_at_once = 0
        self._at_once = 0

    def __call__(self, _: WebhookEndpoint) -> FakeTransport:
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
        outcome = self.respond(delivery)
        if outcome.error is None:
            self.delivered.append(delivery)
        return outcome

    async def close(self) -> None:
        self.open -= 1

    def types(self) -> list[str]:
        return [each.type for each in self.delivered]

    def subjects(self) -> list[tuple[str, str]]:
        return [(each.subject, each.type) for each in self.delivered]


class WebhookHarness:
    """Webhooks on a store, with a source of changes."""

    def __init__(
        self, store: Store, posts: FakeTransport, maker: ChangeFactory, clock: SteppedWallClock, disk: OutboxStorage
    ) -> None:
        self.store = store
        self.posts = posts
        self.maker = maker
        self.clock = clock
        self.firing: dict[str, int] | None = {}  # id of an open problem -> since
        self.changed_at: dict[str, int] = {}
        self.is_settled = True
        self.may_write = self.may_send = True
        self.listeners: list[Callable[[Any], None]] = []
        self.storage: Any = disk
        self.context = DispatchContext(
            storage=disk,
            moment=clock.moment,
            source="/jobd/test",
            may_write=lambda: self.may_write,
            may_send=lambda: self.may_send,
            problems=self._problems,
            chance=lambda: 0.5,
            retry_policy=FAST_RETRY,
        )
        self.webhooks = WebhookManager(self.context, subscribe=self.listeners.append, make_transport=cast(Any, posts))

    def _problems(self) -> OpenProblems | None:
        if self.firing is None:
            return None
        found = [
            Problem(
                id=id_, condition=id_.partition("/")[0], severity="warning", subject=Subject(type="daemon"), since=at
            )
            for id_, at in self.firing.items()
        ]
        return OpenProblems(found, self.changed_at, self.is_settled)

    async def commit(self, *changes: Event) -> None:
        batch = self.maker.batch(list(changes))
        await self.store.write(batch)
        for listener in self.listeners:
            listener(batch.changes)

    def fire(self, name: str, at: int = NOW) -> None:
        assert self.firing is not None
        self.firing[name] = at
        self.webhooks.problems_changed()

    def resolve(self, name: str) -> None:
        assert self.firing is not None
        del self.firing[name]
        self.webhooks.problems_changed()


@asynccontextmanager
async def running_webhooks(
    path: Path | str,
    *endpoints: WebhookEndpoint,
    posts: FakeTransport | None = None,
    maker: ChangeFactory | None = None,
    clock: SteppedWallClock | None = None,
    retry: RetryPolicy = FAST_RETRY,
    wrap: Callable[[Store], Any] = lambda store: store,
    **site: Any,
) -> AsyncIterator[WebhookHarness]:
    """Run webhooks until the end of the block, then stop them as the daemon does."""
    store, _ = await Store.open(str(path))
    async with store:
        made = WebhookHarness(
            store, posts or FakeTransport(), maker or ChangeFactory(), clock or SteppedWallClock(), wrap(store)
        )
        made.context.retry_policy = retry
        for name, value in site.items():
            setattr(made, name, value)
        made.webhooks.set_endpoints(endpoints or [endpoint()])
        running = asyncio.create_task(made.webhooks.run())
        try:
            await wait_until(lambda: len(made.webhooks.metrics()) == len(endpoints or [1]))
            yield made
        finally:
            made.webhooks.stop()
            await running
            assert made.posts.open == 0, "a sender was not closed"
