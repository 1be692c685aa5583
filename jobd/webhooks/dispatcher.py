"""Deliver the messages of one webhook from its outbox, in order per subject, and store the results.

A failure affects this webhook only. After a crash, deliveries whose result was not stored are sent again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final

import structlog
from msgspec.structs import replace

from jobd.model.clocks import MonotonicS
from jobd.model.events import Event
from jobd.model.job import MINUTE_MS, SECOND_MS
from jobd.model.storage import CannotWrite
from jobd.model.webhooks import EVENTS_GONE, MAX_BACKLOG, Delivery, DeliveryOutcome, Outbox, WebhookEndpoint
from jobd.webhooks.context import DeliveryStats, DispatchContext
from jobd.webhooks.delivery_queue import DeliveryQueue, QueuedDelivery
from jobd.webhooks.event_reader import PAGE, EventReader
from jobd.webhooks.message import Message, test_message
from jobd.webhooks.retry import BreakerState, CircuitBreaker, is_exhausted, retry_wait_ms
from jobd.webhooks.transport import HttpTransport
from jobd.webhooks.url_policy import redacted

PARALLEL: Final = 8  # concurrent deliveries of one endpoint
GRACE_S: Final = 1.0  # for running deliveries when the daemon stops; slower ones are sent again after the next start
DISK_FULL_RETRY_S: Final = 1.0  # between two attempts to write the outbox
FAILURE_RETRY_S: Final = 5.0  # after an internal error
MAX_RECENT: Final = 256  # new deliveries kept in memory, to avoid reading them
SLICE: Final = 200  # deliveries dead-lettered or redelivered in one transaction
SLICE_PAUSE_S: Final = 0.01  # between slices, so that workers get the disk

log = structlog.get_logger("jobd.webhooks")


class Dispatcher:
    """Delivers from `run` until `stop`. Call `committed` with every commit, and `wake` when problems change."""

    def __init__(
        self, endpoint: WebhookEndpoint, outbox: Outbox, context: DispatchContext, stats: DeliveryStats
    ) -> None:
        self.endpoint = endpoint
        self.stats = stats
        self.queue = DeliveryQueue()
        self.breaker = CircuitBreaker(context.retry_policy)
        self.reader = EventReader(endpoint, outbox.cursors[endpoint.name], outbox.last, context, self._enqueue)
        self._context = context
        self._loop_time: Callable[[], MonotonicS] = asyncio.get_running_loop().time  # type: ignore[assignment]
        self._wake = asyncio.Event()
        self._stopping = False
        self._next_clearing_s = MonotonicS(0.0)
        self._in_flight: dict[int, asyncio.Task[None]] = {}
        # Running deliveries that started before the probe: their failures say nothing about it.
        self._sent_before_probe: set[int] = set()
        self._outcomes: list[tuple[Delivery, DeliveryOutcome]] = []  # not stored yet
        self._recent: dict[int, Delivery] = {}
        self._is_failing = False
        now, ms = context.moment().now, self._now_ms()
        for each in outbox.waiting[endpoint.name]:
            # `due_at` is wall time: a clock step must not delay a delivery for longer than the maximum.
            left_ms = min(max(each.due_at - now, 0), context.retry_policy.max_retry_ms)
            self.queue.add(QueuedDelivery(each.id, each.subject, ms + left_ms if left_ms else 0, each.tries))

    # -- interface -----------------------------------------------------------------------------------------------------
    async def run(self, transport: HttpTransport) -> None:
        """Run until `stop`, then wait briefly for running deliveries. Log errors and continue."""
        try:
            while not self._stopping:
                await wait_for_wake(self._wake, await self._guarded_round(transport))
        finally:
            await self._shut_down(transport)

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()

    def wake(self) -> None:
        """Wake up because problems changed."""
        self._wake.set()

    def committed(self, changes: Sequence[Event]) -> None:
        """Wake up if there is work in committed changes."""
        if self.reader.committed(changes):
            self._wake.set()

    async def test(self) -> Delivery:
        """Put a test message into the outbox, make all messages due, and let the breaker probe now. Raises CannotWrite.

        Otherwise an earlier test that failed would delay this one until its own retry.
        """
        context = self._context
        message = test_message(self.endpoint.name, context.next_delivery, context.moment().now, context.source)
        delivery = await self.reader.add(message)
        self.queue.expedite()
        self._probe_now()
        return delivery

    async def redeliver(self, id_: int) -> Delivery | None:
        """Send a delivery again, regardless of its state. Return None if there is none with this number.

        A waiting delivery, and those that it waits for, become due now. Raises CannotWrite.
        """
        found: Delivery | None
        if id_ in self.queue:
            (found,) = await self._context.storage.deliveries([id_]) or (None,)
        else:
            now = self._context.moment().now
            found = await self._context.storage.resend_delivery(self.endpoint.name, id_, now)
            if found is not None and id_ not in self.queue:
                self.queue.add(QueuedDelivery(id_, found.subject, 0))
        if id_ in self.queue:
            for each in self.queue.up_to(id_):
                self.queue.expedite(each)
        self._probe_now()
        return found

    async def redeliver_all(self, upto: int) -> int:
        """Send dead-lettered deliveries up to number `upto` again, in slices. Return how many. Raises CannotWrite."""
        count = 0
        while not self._stopping and (found := await self._redeliver_slice(upto)):
            count += found
            await asyncio.sleep(SLICE_PAUSE_S)
        return count

    async def _redeliver_slice(self, upto: int) -> int:
        now = self._context.moment().now
        found = await self._context.storage.resend_dead_lettered(self.endpoint.name, upto, SLICE, now)
        for each in found:
            if each.id not in self.queue:
                self.queue.add(QueuedDelivery(each.id, each.subject, 0))
        if found:
            self._probe_now()
        return len(found)

    def _probe_now(self) -> None:
        """Make an open breaker probe now. Old deliveries are not dead-lettered before the probe."""
        if self.breaker.until is not None:
            self.breaker.until = self._now_ms()
            self._sent_before_probe = set(self._in_flight)
        self._next_clearing_s = max(self._next_clearing_s, self._loop_time() + MINUTE_MS / SECOND_MS)
        self._wake.set()

    @property
    def state(self) -> BreakerState:
        return self.breaker.state(self._now_ms())

    @property
    def failing_ms(self) -> int | None:
        """Milliseconds since the first failure after the last success, or None if the last attempt succeeded."""
        return None if self.stats.failing_since is None else self._now_ms() - self.stats.failing_since

    @property
    def next_try_in_ms(self) -> int | None:
        """Milliseconds until the next attempt, or None if one may start now or none is waiting."""
        now, due = self._now_ms(), self.queue.next_due()
        until = 0 if due is None else max(self.breaker.until or 0, due)
        return until - now if until > now else None

    # -- rounds --------------------------------------------------------------------------------------------------------

    async def _guarded_round(self, transport: HttpTransport) -> float | None:
        try:
            wait_s = await self._round(transport)
        except CannotWrite as error:
            self._deliver_problems_directly(transport)
            if not self._is_failing:
                log.warning("webhook_waits", webhook=self.endpoint.name, reason=str(error))
            wait_s, self._is_failing = DISK_FULL_RETRY_S, True
        except Exception as error:
            # A storage error or an internal error. Log the traceback the first time only.
            name, description = self.endpoint.name, f"{type(error).__name__}: {error}"
            log.error("webhook_failed", webhook=name, error=description, exc_info=not self._is_failing)
            wait_s, self._is_failing = FAILURE_RETRY_S, True
        else:
            self._is_failing = False
        return wait_s

    async def _round(self, transport: HttpTransport) -> float | None:
        may_write = self._context.may_write()
        if may_write:
            await self._save_outcomes()
            await self._dead_letter_old()
            await self.reader.read(
                has_room=self._has_room, may_report_gaps=not self.queue.has_subject(self.endpoint.subject)
            )
            await self.reader.save()
        else:
            self._deliver_problems_directly(transport)
        may_send = self._context.may_send()
        if may_send and not self._outcomes:  # while results cannot be stored, messages would be sent repeatedly
            await self._start_deliveries(transport)
        return self._wait_s() if may_write and may_send else DISK_FULL_RETRY_S

    def _wait_s(self) -> float | None:
        waits = self.reader.next_work_in_s(has_room=self._has_room)
        if self.stats.failing_since is not None:
            waits.append(self._next_clearing_s - self._loop_time())
        if (due := self.queue.next_due()) is not None and len(self._in_flight) < PARALLEL and not self._outcomes:
            until = self.breaker.until
            if until is None:
                waits.append((due - self._now_ms()) / SECOND_MS)
            elif not self._in_flight:  # otherwise the result of the probe ends the wait
                waits.append((max(due, until) - self._now_ms()) / SECOND_MS)
        return max(min(waits), 0.0) if waits else None

    @property
    def _has_room(self) -> bool:
        return len(self.queue) + PAGE <= MAX_BACKLOG

    def _enqueue(self, new: list[Delivery]) -> None:
        for each in new:
            self.queue.add(QueuedDelivery(each.id, each.subject, 0))
            self.stats.gaps += each.type == EVENTS_GONE
            if len(self._recent) < MAX_RECENT:
                self._recent[each.id] = each

    # -- deliveries ----------------------------------------------------------------------------------------------------

    async def _start_deliveries(self, transport: HttpTransport) -> None:
        """Start as many deliveries as may run: none while the breaker is open, one while it is half-open."""
        taken: list[QueuedDelivery] = []
        ms = self._now_ms()
        state = self.breaker.state(ms)
        max_running = {"closed": PARALLEL, "half_open": 1, "open": 0}[state]
        while len(self._in_flight) + len(taken) < max_running:
            first = self.queue.take(ms) if state == "closed" else self.queue.take_probe(ms)
            if first is None:
                break
            taken.append(first)
        if not taken:
            return
        try:
            deliveries = await self._load([each.id for each in taken])
        except BaseException:
            for each in taken:
                self.queue.requeue(each.id)
            raise
        for each in taken:
            if (delivery := deliveries.get(each.id)) is None:
                self.queue.remove(each.id)  # its row was damaged and is quarantined
            else:
                task = asyncio.create_task(self._deliver(transport, delivery), name=f"webhook {self.endpoint.name}")
                self._in_flight[each.id] = task

    async def _load(self, ids: list[int]) -> dict[int, Delivery]:
        found = {id_: self._recent.pop(id_) for id_ in ids if id_ in self._recent}
        if unknown := [id_ for id_ in ids if id_ not in found]:
            found |= {each.id: each for each in await self._context.storage.deliveries(unknown)}
        return found

    async def _deliver(self, transport: HttpTransport, delivery: Delivery) -> None:
        if not self._context.may_send():  # again, because the deliveries were loaded meanwhile
            del self._in_flight[delivery.id]
            self.queue.requeue(delivery.id)
            self._wake.set()
            return
        try:
            outcome = await self._try(transport, delivery)
        finally:
            del self._in_flight[delivery.id]
        self._outcomes.append((delivery, outcome))
        self._update_breaker(outcome, started_before_probe=delivery.id in self._sent_before_probe)
        self._sent_before_probe.discard(delivery.id)
        self._wake.set()

    async def _try(self, transport: HttpTransport, delivery: Delivery) -> DeliveryOutcome:
        """Attempt a delivery once. An internal error counts as a failure."""
        try:
            return await transport.post(self.endpoint, delivery)
        except Exception as bug:
            redacted_bug = RuntimeError(redacted(self.endpoint.url, f"{type(bug).__name__}: {bug}"))
            log.error(
                "webhook_bug", webhook=self.endpoint.name, exc_info=redacted_bug.with_traceback(bug.__traceback__)
            )
            return DeliveryOutcome(None, f"This is a bug in jobd: {type(bug).__name__}.")

    def _deliver_problems_directly(self, transport: HttpTransport) -> None:
        """Deliver messages about problems while the outbox cannot be written. The outbox delivers them again later."""
        if not self._context.may_send():
            return
        name = self.endpoint.name

        async def post(message: Message) -> DeliveryOutcome:
            # The number is temporary. In the outbox the message gets another one.
            delivery = self._context.new_delivery(message, name, self._context.moment())
            outcome = await self._try(transport, delivery)
            self._update_breaker(outcome)
            fields = {"webhook": name, "type": message.type, "subject": message.subject}
            log.info("webhook_told_without_outbox", **fields, error=outcome.error)
            return outcome

        self.reader.problems.deliver_directly(post)

    def _update_breaker(self, outcome: DeliveryOutcome, *, started_before_probe: bool = False) -> None:
        """Update statistics and breaker. The failure of a delivery that started before a probe does not open it."""
        name, now = self.endpoint.name, self._context.moment().now
        if outcome.error is None:
            self.stats.last_success_at, self.stats.failing_since = now, None
            if self.breaker.succeeded():
                log.info("webhook_back", webhook=name)
                self.queue.expedite()
            return
        self.stats.failed += 1
        self.stats.last_error, self.stats.last_error_at = outcome.error, now
        if started_before_probe:
            return
        if self.stats.failing_since is None:
            self.stats.failing_since = self._now_ms()
        if self.breaker.failed(outcome, self._now_ms(), self._context.chance()):
            pause_ms = (self.breaker.until or 0) - self._now_ms()
            log.warning("webhook_paused", webhook=name, pause_ms=pause_ms, error=outcome.error)

    async def _save_outcomes(self) -> None:
        count = len(self._outcomes)
        if not count:
            return
        at, ms = self._context.moment(), self._now_ms()
        all_tried, waits = [], []
        for delivery, outcome in self._outcomes[:count]:
            tried = replace(delivery, tries=delivery.tries + 1, status=outcome.status, error=outcome.error)
            wait_ms = 0
            if outcome.error is None:
                tried = replace(tried, state="delivered", ended_at=at.latest)
            elif is_exhausted(tried, self.endpoint, at.aging, self._context.retry_policy):
                tried = replace(tried, state="dead-lettered", ended_at=at.latest)
            else:
                context = self._context
                wait_ms = retry_wait_ms(tried.tries, context.chance(), context.retry_policy, outcome.retry_after_ms)
                tried = replace(tried, due_at=at.now + wait_ms)
            all_tried.append(tried)
            waits.append(wait_ms)
        await self.reader.store_outcomes(all_tried, at.aging)
        del self._outcomes[:count]
        for tried, wait_ms in zip(all_tried, waits, strict=True):
            if tried.state == "waiting":
                self.queue.postpone(tried.id, ms + wait_ms)
            else:
                self.queue.remove(tried.id)
            self._log_outcome(tried)

    def _log_outcome(self, tried: Delivery) -> None:
        fields = {"webhook": tried.endpoint, "delivery": tried.id, "type": tried.type, "subject": tried.subject}
        if tried.state == "delivered":
            self.stats.delivered += 1
            log.debug("webhook_delivered", **fields, attempts=tried.tries)
        elif tried.state == "dead-lettered":
            self.stats.dead_lettered += 1
            log.error("webhook_dead_lettered", **fields, attempts=tried.tries, error=tried.error)
        else:
            log.info("webhook_not_delivered", **fields, attempts=tried.tries, error=tried.error)

    async def _dead_letter_old(self) -> None:
        """Dead-letter old deliveries if the endpoint has failed for `dead_letter_after`, `min_tries` times in a row."""
        failing_ms = self.failing_ms
        if failing_ms is None or self._loop_time() < self._next_clearing_s:
            return
        self._next_clearing_s = self._loop_time() + MINUTE_MS / SECOND_MS
        if (
            failing_ms < self.endpoint.dead_letter_after_ms
            or self.breaker.failures < self._context.retry_policy.min_tries
        ):
            return
        at = self._context.moment()
        ids = list(islice(self.queue.ids(), SLICE))
        old = [
            replace(each, state="dead-lettered", ended_at=at.latest, error=each.error or self.stats.last_error)
            for each in await self._context.storage.deliveries(ids)
            if at.aging - each.at >= self.endpoint.dead_letter_after_ms
        ]
        if not old:
            return
        await self.reader.store_outcomes(old, at.aging)
        for each in old:
            self._recent.pop(each.id, None)
            self.queue.remove(each.id)
            self._log_outcome(each)
        if len(old) == SLICE:
            self._next_clearing_s = MonotonicS(0.0)

    async def _shut_down(self, transport: HttpTransport) -> None:
        """Wait briefly for running deliveries and store the results. The rest is sent after the next start."""
        running = [*self._in_flight.values(), *self.reader.problems.in_flight()]
        if running:
            await asyncio.wait(running, timeout=GRACE_S)
        left = [task for task in running if not task.done()]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        try:
            if self._context.may_write():
                await self._save_outcomes()
                await self.reader.save(at_once=True)
        except Exception as error:
            log.warning("webhook_not_noted", webhook=self.endpoint.name, error=f"{type(error).__name__}: {error}")
        await transport.close()

    def _now_ms(self) -> int:
        return int(float(self._loop_time()) * SECOND_MS)


async def wait_for_wake(wake: asyncio.Event, seconds: float | None) -> None:
    """Wait until `wake` is set, and for at most `seconds` if given. Clear it."""
    timer = None if seconds is None else asyncio.get_running_loop().call_later(seconds, wake.set)
    await wake.wait()
    wake.clear()
    if timer is not None:
        timer.cancel()
