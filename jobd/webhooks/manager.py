"""Manage webhooks: one dispatcher per configured endpoint, and the actions of operators.

If no webhook is configured, nothing runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final, TypeVar

import msgspec
import structlog

from jobd.model.events import Event
from jobd.model.responses import DeliveryPage, DeliveryState, DeliveryView, WebhookView
from jobd.model.storage import CannotWrite, DiskFull
from jobd.model.webhooks import Delivery, FailingWebhook, WebhookEndpoint, WebhookMetrics
from jobd.webhooks.context import DeliveryStats, DispatchContext
from jobd.webhooks.dispatcher import DISK_FULL_RETRY_S, FAILURE_RETRY_S, Dispatcher, wait_for_wake
from jobd.webhooks.transport import HttpTransport
from jobd.webhooks.url_policy import public_url

NEWEST: Final = (1 << 63) - 1

T = TypeVar("T")

log = structlog.get_logger("jobd.webhooks")


class WebhookManager:
    """Runs the dispatchers until `stop`.

    `subscribe` subscribes to commits, once there is an endpoint. `make_transport` makes the transport of an endpoint.
    """

    def __init__(
        self,
        context: DispatchContext,
        *,
        subscribe: Callable[[Callable[[Sequence[Event]], None]], None],
        make_transport: Callable[[WebhookEndpoint], HttpTransport],
    ) -> None:
        self._context = context
        self._subscribe = subscribe
        self._make_transport = make_transport
        self._endpoints: dict[str, WebhookEndpoint] = {}
        self._dispatchers: dict[str, Dispatcher] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stats: dict[str, DeliveryStats] = {}
        self._reconciling = asyncio.Lock()
        self._is_subscribed = False
        self._stopping = False
        self._wake = asyncio.Event()

    # -- running -------------------------------------------------------------------------------------------------------

    def set_endpoints(self, endpoints: Iterable[WebhookEndpoint]) -> None:
        """Replace the endpoints. A changed endpoint continues at its cursor."""
        self._endpoints = {each.name: each for each in endpoints}
        if self._endpoints and not self._is_subscribed:
            self._is_subscribed = True
            self._subscribe(self.committed)
        self._wake.set()

    async def run(self) -> None:
        """Run until `stop`. Log errors and continue."""
        while not self._stopping:
            wait_s = None
            try:
                async with self._reconciling:
                    await self._reconcile()
            except CannotWrite:
                wait_s = DISK_FULL_RETRY_S
            except Exception as error:
                log.error("webhooks_failed", error=f"{type(error).__name__}: {error}")
                wait_s = FAILURE_RETRY_S
            await wait_for_wake(self._wake, wait_s)
        await self._stop_dispatchers(list(self._dispatchers))

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()

    def committed(self, changes: Sequence[Event]) -> None:
        """Pass committed changes to the dispatchers. The actor calls it, so it must be fast."""
        for dispatcher in self._dispatchers.values():
            dispatcher.committed(changes)

    def problems_changed(self) -> None:
        """Wake the dispatchers after problems opened, closed or became worse."""
        for dispatcher in self._dispatchers.values():
            dispatcher.wake()

    async def _reconcile(self) -> None:
        endpoints = self._endpoints
        await self._stop_dispatchers(
            [name for name, each in self._dispatchers.items() if endpoints.get(name) != each.endpoint]
        )
        for name in self._stats.keys() - endpoints.keys():
            self._stats[name].failing_since = None
        new = [name for name in endpoints if name not in self._dispatchers]
        if not new:
            return
        context = self._context
        outbox = await context.storage.open_outbox(list(endpoints), context.moment().aging)
        context.next_delivery = max(context.next_delivery, outbox.next_delivery)
        for name in [name for name in new if name in outbox.cursors]:
            endpoint = endpoints[name]
            dispatcher = Dispatcher(endpoint, outbox, context, self._stats.setdefault(name, DeliveryStats()))
            self._dispatchers[name] = dispatcher
            self._tasks[name] = asyncio.create_task(
                dispatcher.run(self._make_transport(endpoint)), name=f"webhook {name}"
            )
            log.info("webhook_begins", webhook=name, waiting=len(dispatcher.queue), position=dispatcher.reader.position)
        if not outbox.cursors.keys() >= set(new):
            raise DiskFull("the cursors of new webhooks cannot be written")

    async def _stop_dispatchers(self, names: list[str]) -> None:
        for name in names:
            self._dispatchers[name].stop()
        for name in names:
            await self._tasks.pop(name)
            del self._dispatchers[name]

    # -- views and operations ------------------------------------------------------------------------------------------

    def views(self) -> list[WebhookView]:
        """Return all configured webhooks in the order of the configuration."""
        return [self._view(endpoint) for endpoint in self._endpoints.values()]

    def _view(self, endpoint: WebhookEndpoint) -> WebhookView:
        dispatcher, stats = self._dispatchers.get(endpoint.name), self._stats.get(endpoint.name, DeliveryStats())
        failing_ms = None if dispatcher is None else dispatcher.failing_ms
        next_try_ms = None if dispatcher is None else dispatcher.next_try_in_ms
        now = self._context.moment().now
        counters = msgspec.structs.asdict(stats)
        del counters["gaps"]
        counters["failing_since"] = None if failing_ms is None else now - failing_ms
        return WebhookView(
            name=endpoint.name,
            url=public_url(endpoint.url),
            events=sorted(endpoint.events),
            queues=sorted(endpoint.queues),
            state="starting" if dispatcher is None else dispatcher.state,
            next_attempt_at=None if next_try_ms is None else now + next_try_ms,
            position=0 if dispatcher is None else dispatcher.reader.position,
            lag=0 if dispatcher is None else dispatcher.reader.lag,
            waiting=0 if dispatcher is None else len(dispatcher.queue),
            **counters,
        )

    def has(self, name: str) -> bool:
        return name in self._endpoints

    async def page(self, name: str, state: DeliveryState | None, before: int | None, limit: int) -> DeliveryPage:
        """Return deliveries of an endpoint, newest first."""
        below = NEWEST if before is None else before
        found = await self._context.storage.list_deliveries(name, state, below, limit + 1)
        shown = [delivery_view(each) for each in found[:limit]]
        return DeliveryPage(shown, str(shown[-1].id) if len(found) > limit else None)

    async def dead_letter_counts(self, name: str) -> tuple[int, int]:
        """Return how many dead-lettered deliveries are kept, and the id of the newest, or 0."""
        return await self._context.storage.dead_letter_counts(name)

    async def redeliver(self, name: str, id_: int) -> DeliveryView | None:
        """Send a delivery again. Return None if there is none with this number. Raises CannotWrite."""
        found = await self._act(name, lambda dispatcher: dispatcher.redeliver(id_))
        return None if found is None else delivery_view(found)

    async def redeliver_all(self, name: str, upto: int | None) -> int:
        """Send dead-lettered deliveries up to `upto` (None: all) again. Return their count. Raises CannotWrite."""
        return await self._act(name, lambda dispatcher: dispatcher.redeliver_all(NEWEST if upto is None else upto))

    async def test(self, name: str) -> DeliveryView:
        """Send a test message. Raises CannotWrite."""
        return delivery_view(await self._act(name, Dispatcher.test))

    async def _act(self, name: str, action: Callable[[Dispatcher], Awaitable[T]]) -> T:
        """Run an action of an operator to its end, even if the client disconnects. A reload waits for it.

        So the queue of the dispatcher has what the outbox has.
        """

        async def act() -> T:
            async with self._reconciling:
                if (dispatcher := self._dispatchers.get(name)) is None or not self._context.may_write():
                    raise DiskFull("the outbox cannot be written")
                return await action(dispatcher)

        return await asyncio.shield(act())

    def failing(self) -> list[FailingWebhook]:
        """Return the endpoints whose deliveries fail now."""
        return [
            FailingWebhook(
                name,
                for_ms,
                self._stats[name].last_error or "",
                len(dispatcher.queue),
                dispatcher.endpoint.wants_problems,
            )
            for name, dispatcher in self._dispatchers.items()
            if (for_ms := dispatcher.failing_ms) is not None
        ]

    def event_hold_ms(self) -> int:
        """Return how long events must be kept for lagging endpoints; 0 if there are none."""
        behind = (
            endpoint.dead_letter_after_ms
            for name, endpoint in self._endpoints.items()
            if endpoint.reads_events and (name not in self._dispatchers or self._dispatchers[name].reader.is_lagging)
        )
        return max(behind, default=0)

    def metrics(self) -> dict[str, WebhookMetrics]:
        """Return the counters by name, in the order of the configuration."""
        found = {}
        for name in self._endpoints:
            if (dispatcher := self._dispatchers.get(name)) is not None:
                stats, reader = dispatcher.stats, dispatcher.reader
                found[name] = WebhookMetrics(
                    stats.delivered,
                    stats.failed,
                    stats.dead_lettered,
                    stats.gaps,
                    len(dispatcher.queue),
                    reader.lag,
                    dispatcher.state != "closed",
                )
        return found


def delivery_view(delivery: Delivery) -> DeliveryView:
    """Return the view of a delivery, without its body."""
    return DeliveryView(
        id=delivery.id,
        state=delivery.state,
        type=delivery.type,
        subject=delivery.subject,
        message_id=delivery.message_id,
        seq=delivery.seq or None,
        at=delivery.at,
        due_at=delivery.due_at if delivery.state == "waiting" else None,
        attempts=delivery.tries,
        ended_at=delivery.ended_at,
        status=delivery.status,
        error=delivery.error,
    )
