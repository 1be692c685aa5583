"""All webhooks: a courier for each endpoint that is configured, while it is; and what operators see and ask of them.

Where none is configured this is nothing but a name: it hears of no commit and has no connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import structlog
from msgspec import Struct

from jobd.model.events import Change
from jobd.model.responses import DeliveryPage, DeliveryState, DeliveryView, WebhookView
from jobd.model.storage import DiskFull
from jobd.model.webhooks import Delivery, WebhookEndpoint
from jobd.webhooks.context import DeliveryStats, DispatchContext, Transport
from jobd.webhooks.dispatcher import DISK_FULL_RETRY_S, FAILURE_RETRY_S, Dispatcher
from jobd.webhooks.url_policy import public_url

NEWEST: Final = (1 << 63) - 1

log = structlog.get_logger("jobd.webhooks")


class FailingEndpoint(Struct, frozen=True):
    """The endpoint that has taken nothing for longest."""

    name: str
    for_ms: int
    error: str


class WebhookMetrics(Struct, frozen=True):
    """Of one endpoint, for metrics."""

    delivered: int
    failed: int
    given_up: int
    gaps: int
    waiting: int
    lag: int
    paused: bool


class WebhookManager:
    """`run` until `stop`. `listen` is called with `committed` once there is an endpoint; `post` makes its sender."""

    def __init__(
        self,
        office: DispatchContext,
        *,
        listen: Callable[[Callable[[Sequence[Change]], None]], None],
        post: Callable[[WebhookEndpoint], Transport],
    ) -> None:
        self._context = office
        self._subscribe = listen
        self._make_transport = post
        self._endpoints: dict[str, WebhookEndpoint] = {}
        self._dispatchers: dict[str, Dispatcher] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stats: dict[str, DeliveryStats] = {}
        self._is_subscribed = False
        self._stopping = False
        self._wake = asyncio.Event()

    # -- at work ------------------------------------------------------------------------------------------------------

    def set_endpoints(self, endpoints: Iterable[WebhookEndpoint]) -> None:
        """These and no others, from now on. One that has changed goes on where it was."""
        self._endpoints = {each.name: each for each in endpoints}
        if self._endpoints and not self._is_subscribed:
            self._is_subscribed = True
            self._subscribe(self.committed)
        self._wake.set()

    async def run(self) -> None:
        """Survives whatever fails."""
        while not self._stopping:
            wait_s = None
            try:
                await self._reconcile()
            except DiskFull:
                wait_s = DISK_FULL_RETRY_S
            except Exception as error:
                log.error("webhooks_failed", error=f"{type(error).__name__}: {error}")
                wait_s = FAILURE_RETRY_S
            timer = None if wait_s is None else asyncio.get_running_loop().call_later(wait_s, self._wake.set)
            if not self._stopping:
                await self._wake.wait()
            self._wake.clear()
            if timer is not None:
                timer.cancel()
        await self._stop_dispatchers(list(self._dispatchers))

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()

    def committed(self, changes: Sequence[Change]) -> None:
        """Changes are on the disk. Called on the actor's turn: it takes a note and returns."""
        for courier in self._dispatchers.values():
            courier.committed(changes)

    def alerts_changed(self) -> None:
        """One fires, or fires no more."""
        for courier in self._dispatchers.values():
            courier.wake()

    async def _reconcile(self) -> None:
        """Those that are not wanted any more, or not as they were, end; then the new ones begin."""
        endpoints = self._endpoints
        await self._stop_dispatchers(
            [name for name, each in self._dispatchers.items() if endpoints.get(name) != each.endpoint]
        )
        new = [name for name in endpoints if name not in self._dispatchers]
        if not new:
            return
        office = self._context
        outbox = await office.disk.open_outbox(list(endpoints), office.moment().now)
        office.next_delivery = max(office.next_delivery, outbox.next_delivery)
        for name in new:
            endpoint = endpoints[name]
            courier = Dispatcher(endpoint, outbox, office, self._stats.setdefault(name, DeliveryStats()))
            self._dispatchers[name] = courier
            self._tasks[name] = asyncio.create_task(courier.run(self._make_transport(endpoint)), name=f"webhook {name}")
            log.info("webhook_begins", webhook=name, waiting=len(courier.queue), position=courier.reader.position)

    async def _stop_dispatchers(self, names: list[str]) -> None:
        for name in names:
            self._dispatchers[name].stop()
        for name in names:
            await self._tasks.pop(name)
            del self._dispatchers[name]

    # -- what is seen of them -----------------------------------------------------------------------------------------

    def views(self) -> list[WebhookView]:
        """All that are configured, in the order of the configuration."""
        return [self._view(endpoint) for endpoint in self._endpoints.values()]

    def _view(self, endpoint: WebhookEndpoint) -> WebhookView:
        courier, tally = self._dispatchers.get(endpoint.name), self._stats.get(endpoint.name, DeliveryStats())
        failing_ms = None if courier is None else courier.failing_ms
        put_off_ms = None if courier is None else courier.next_try_in_ms
        now = self._context.moment().now
        return WebhookView(
            name=endpoint.name,
            url=public_url(endpoint.url),
            events=sorted(endpoint.events),
            queues=sorted(endpoint.queues),
            state="starting" if courier is None else courier.state,
            failing_since=None if failing_ms is None else now - failing_ms,
            next_try_at=None if put_off_ms is None else now + put_off_ms,
            position=0 if courier is None else courier.reader.position,
            lag=0 if courier is None else courier.reader.lag,
            waiting=0 if courier is None else len(courier.queue),
            delivered=tally.delivered,
            failed=tally.failed,
            given_up=tally.given_up,
            last_success_at=tally.last_success_at,
            last_error=tally.last_error,
            last_error_at=tally.last_error_at,
        )

    def has(self, name: str) -> bool:
        return name in self._endpoints

    async def page(self, name: str, state: DeliveryState | None, before: int | None, limit: int) -> DeliveryPage:
        """Deliveries of an endpoint, newest first."""
        below = NEWEST if before is None else before
        found = await self._context.disk.page_of_deliveries(name, state, below, limit + 1)
        shown = [delivery_view(each) for each in found[:limit]]
        return DeliveryPage(shown, str(shown[-1].id) if len(found) > limit else None)

    async def given_up(self, name: str) -> tuple[int, int]:
        """How many deliveries of an endpoint were given up and are kept, and the number of the newest; 0 where none."""
        return await self._context.disk.given_up(name)

    async def redeliver(self, name: str, id_: int) -> DeliveryView | None:
        """Send a delivery again; None where there is none of this number. Raises DiskFull."""
        found = await self._courier(name).redeliver(id_)
        return None if found is None else delivery_view(found)

    async def redeliver_all(self, name: str, upto: int | None) -> int:
        """Send again what was given up, up to the number `upto` (None: all); how many. Raises DiskFull."""
        return await self._courier(name).redeliver_all(NEWEST if upto is None else upto)

    async def test(self, name: str) -> DeliveryView:
        """Send a message that says it is a test. Raises DiskFull."""
        return delivery_view(await self._courier(name).test())

    def _courier(self, name: str) -> Dispatcher:
        if (courier := self._dispatchers.get(name)) is None or not self._context.may_write():
            raise DiskFull("the outbox cannot be written")
        return courier

    def worst(self) -> FailingEndpoint | None:
        """The one that has been failing for longest, None where all tries go well."""
        failing = [
            FailingEndpoint(name, for_ms, self._stats[name].last_error or "")
            for name, courier in self._dispatchers.items()
            if (for_ms := courier.failing_ms) is not None
        ]
        return max(failing, key=lambda each: each.for_ms, default=None)

    def journal_hold_ms(self) -> int:
        """For how long the journal has to be kept, for those that have not read it to its end; 0 where all have."""
        behind = (
            endpoint.give_up_after_ms
            for name, endpoint in self._endpoints.items()
            if endpoint.reads_journal and (name not in self._dispatchers or self._dispatchers[name].reader.lags)
        )
        return max(behind, default=0)

    def metrics(self) -> dict[str, WebhookMetrics]:
        """By name, in the order of the configuration."""
        found = {}
        for name in self._endpoints:
            if (courier := self._dispatchers.get(name)) is not None:
                tally, reader = courier.stats, courier.reader
                found[name] = WebhookMetrics(
                    tally.delivered,
                    tally.failed,
                    tally.given_up,
                    reader.gaps,
                    len(courier.queue),
                    reader.lag,
                    courier.state != "closed",
                )
        return found


def delivery_view(delivery: Delivery) -> DeliveryView:
    """As operators see it: without its body, which tells what the journal tells."""
    return DeliveryView(
        id=delivery.id,
        state=delivery.state,
        type=delivery.type,
        subject=delivery.subject,
        event_id=delivery.event_id,
        seq=delivery.seq or None,
        at=delivery.at,
        due_at=delivery.due_at if delivery.state == "waiting" else None,
        tries=delivery.tries,
        ended_at=delivery.ended_at,
        status=delivery.status,
        error=delivery.error,
    )
