"""One endpoint of a webhook: from its outbox to the receiver, in order of each subject, and what came of it is noted.

It never raises, holds up nobody, and tells nobody but its own endpoint. A crash at any point sends again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import islice
from typing import Final

import structlog
from msgspec.structs import replace

from jobd.model.events import Change
from jobd.model.job import MINUTE_MS, SECOND_MS
from jobd.model.storage import DiskFull
from jobd.model.webhooks import MAX_BACKLOG, Delivery, DeliveryOutcome, Outbox, WebhookEndpoint
from jobd.webhooks.context import DeliveryStats, DispatchContext, Transport
from jobd.webhooks.delivery_queue import DeliveryQueue, QueuedDelivery
from jobd.webhooks.journal_reader import PAGE, JournalReader
from jobd.webhooks.message import Message, test_message
from jobd.webhooks.retry import BreakerState, CircuitBreaker, is_exhausted, retry_wait_ms
from jobd.webhooks.url_policy import redacted

PARALLEL: Final = 8  # deliveries of one endpoint on their way at once
GRACE_S: Final = 1.0  # for what is on its way when the daemon stops; after it, it is sent again at the next start
DISK_FULL_RETRY_S: Final = 1.0  # until a full disk is asked again
FAILURE_RETRY_S: Final = 5.0  # after a failure of our own
MAX_RECENT: Final = 256  # messages that are sent from memory, as they have just been written
SLICE: Final = 200  # deliveries given up, or sent again, in one transaction
SLICE_PAUSE_S: Final = 0.01  # between those, so that workers get the disk in between

log = structlog.get_logger("jobd.webhooks")


class Dispatcher:
    """`run` until `stop`. `committed` is told of every commit; `wake` where alerts have changed."""

    def __init__(
        self, endpoint: WebhookEndpoint, outbox: Outbox, office: DispatchContext, tally: DeliveryStats
    ) -> None:
        self.endpoint = endpoint
        self.stats = tally
        self.queue = DeliveryQueue()
        self.breaker = CircuitBreaker(office.retry_policy)
        self.reader = JournalReader(endpoint, outbox.cursors[endpoint.name], outbox.last, office, self._enqueue)
        self._context = office
        self._loop_time = asyncio.get_running_loop().time
        self._wake = asyncio.Event()
        self._stopping = False
        self._next_clearing_s = 0.0
        self._in_flight: dict[int, asyncio.Task[None]] = {}
        self._sent_before_probe: set[int] = set()  # of those: who went before somebody asked for a try in a break
        self._outcomes: list[tuple[Delivery, DeliveryOutcome]] = []  # that are not noted yet
        self._recent: dict[int, Delivery] = {}
        self._is_failing = False
        now, ms = office.moment().now, self._now_ms()
        for each in outbox.waiting[endpoint.name]:
            # By a clock that never steps; what was put off by another clock waits no longer than anything may.
            left_ms = min(max(each.due_at - now, 0), office.retry_policy.retry_at_most_ms)
            self.queue.add(QueuedDelivery(each.id, each.subject, ms + left_ms if left_ms else 0, each.tries))

    # -- from outside -------------------------------------------------------------------------------------------------

    async def run(self, poster: Transport) -> None:
        """Until `stop`, which lets what is on its way arrive if it is quick. Survives whatever fails."""
        try:
            while not self._stopping:
                await self._pause(await self._guarded_round(poster))
        finally:
            await self._shut_down(poster)

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()

    def wake(self) -> None:
        """Something is new."""
        self._wake.set()

    def committed(self, changes: Sequence[Change]) -> None:
        """Changes are on the disk."""
        if self.reader.committed(changes):
            self._wake.set()

    async def test(self) -> Delivery:
        """Put a message into the outbox that says it is a test, and end a break: who tests a receiver waits for what
        it says. Raises DiskFull.
        """
        office = self._context
        letter = test_message(self.endpoint.name, office.next_delivery, office.moment().now, office.source)
        delivery = await self.reader.add(letter)
        self._probe_now()
        return delivery

    async def redeliver(self, id_: int) -> Delivery | None:
        """Send a delivery again, now, whatever became of it; None where there is none of this number.

        One that waits does not wait for its time any more. Raises DiskFull.
        """
        found: Delivery | None
        if id_ in self.queue:
            self.queue.expedite(id_)
            (found,) = await self._context.disk.deliveries([id_]) or (None,)
        else:
            now = self._context.moment().now
            found = await self._context.disk.deliver_again(self.endpoint.name, id_, now)
            if found is not None and id_ not in self.queue:
                self.queue.add(QueuedDelivery(id_, found.subject, 0))
        self._probe_now()
        return found

    async def redeliver_all(self, upto: int) -> int:
        """Send again what was given up, up to the number `upto`, slice by slice; how many. Raises DiskFull."""
        count = 0
        while not self._stopping:
            now = self._context.moment().now
            found = await self._context.disk.deliver_all_again(self.endpoint.name, upto, SLICE, now)
            for each in found:
                if each.id not in self.queue:
                    self.queue.add(QueuedDelivery(each.id, each.subject, 0))
            count += len(found)
            if not found:
                break
            self._probe_now()
            await asyncio.sleep(SLICE_PAUSE_S)
        return count

    def _probe_now(self) -> None:
        """Somebody thinks that it is worth a try: it is not given up for its age before that was made."""
        if self.breaker.until is not None:
            self.breaker.until = self._now_ms()
            self._sent_before_probe = set(self._in_flight)  # their failures say nothing of that try
        self._next_clearing_s = max(self._next_clearing_s, self._loop_time() + MINUTE_MS / SECOND_MS)
        self._wake.set()

    @property
    def state(self) -> BreakerState:
        return self.breaker.state(self._now_ms())

    @property
    def failing_ms(self) -> int | None:
        """Since the first of the failures after the last success; None where the last try was one."""
        return None if self.breaker.since is None else self._now_ms() - self.breaker.since

    @property
    def next_try_in_ms(self) -> int | None:
        """Until the next try may be made; None where one may now, or nothing waits to be tried again."""
        now = self._now_ms()
        until = max(self.breaker.until or 0, self.queue.next_due() or 0)
        return until - now if until > now else None

    # -- a round ------------------------------------------------------------------------------------------------------

    async def _guarded_round(self, poster: Transport) -> float | None:
        """How long to wait for the next."""
        try:
            wait_s = await self._round(poster)
        except DiskFull:
            self._deliver_alerts_directly(poster)
            if not self._is_failing:
                log.warning("webhook_waits", webhook=self.endpoint.name, reason="the disk of the store is full")
            wait_s, self._is_failing = DISK_FULL_RETRY_S, True
        except Exception as error:
            # The disk of the store has failed, or we have: told in full the first time.
            name, said = self.endpoint.name, f"{type(error).__name__}: {error}"
            log.error("webhook_failed", webhook=name, error=said, exc_info=not self._is_failing)
            wait_s, self._is_failing = FAILURE_RETRY_S, True
        else:
            self._is_failing = False
        return wait_s

    async def _round(self, poster: Transport) -> float | None:
        may_write = self._context.may_write()
        if may_write:
            await self._save_outcomes()
            await self._give_up_old()
            await self.reader.read(
                has_room=self._has_room, tells_gaps=not self.queue.has_subject(self.endpoint.subject)
            )
            await self.reader.save()
        else:
            self._deliver_alerts_directly(poster)
        if not self._outcomes:  # what cannot be noted is not sent either: it would be sent again and again
            await self._start_deliveries(poster)
        return self._wait_s() if may_write else DISK_FULL_RETRY_S

    def _wait_s(self) -> float | None:
        """Until time itself gives us something to do."""
        waits = self.reader.next_work_in_s(has_room=self._has_room)
        if self.breaker.since is not None:
            waits.append(self._next_clearing_s - self._loop_time())
        if (due := self.queue.next_due()) is not None and len(self._in_flight) < PARALLEL and not self._outcomes:
            until = self.breaker.until
            if until is None:
                waits.append((due - self._now_ms()) / SECOND_MS)
            elif not self._in_flight:  # else that one will tell
                waits.append((max(due, until) - self._now_ms()) / SECOND_MS)
        return max(min(waits), 0.0) if waits else None

    @property
    def _has_room(self) -> bool:
        return len(self.queue) + PAGE <= MAX_BACKLOG

    async def _pause(self, seconds: float | None) -> None:
        """Until something is new, or for so long."""
        timer = None
        if seconds is not None:
            timer = asyncio.get_running_loop().call_later(seconds, self._wake.set)
        if not self._stopping:
            await self._wake.wait()
        self._wake.clear()
        if timer is not None:
            timer.cancel()

    def _enqueue(self, new: list[Delivery]) -> None:
        """These are in the outbox now."""
        for each in new:
            self.queue.add(QueuedDelivery(each.id, each.subject, 0))
            if len(self._recent) < MAX_RECENT:
                self._recent[each.id] = each

    # -- out of the outbox --------------------------------------------------------------------------------------------

    async def _start_deliveries(self, poster: Transport) -> None:
        """As many as may be on their way at once; where the endpoint is on trial, one."""
        taken: list[QueuedDelivery] = []
        ms = self._now_ms()
        state = self.breaker.state(ms)
        most = {"closed": PARALLEL, "half_open": 1, "open": 0}[state]
        while len(self._in_flight) + len(taken) < most:
            first = self.queue.take(ms) if state == "closed" else self.queue.take_probe(ms)
            if first is None:
                break
            taken.append(first)
        if not taken:
            return
        try:
            messages = await self._load([each.id for each in taken])
        except BaseException:
            for each in taken:
                self.queue.requeue(each.id)
            raise
        for each in taken:
            if (message := messages.get(each.id)) is None:
                self.queue.remove(each.id)  # its row was damaged, and set aside
            else:
                going = asyncio.create_task(self._deliver(poster, message), name=f"webhook {self.endpoint.name}")
                self._in_flight[each.id] = going

    async def _load(self, ids: list[int]) -> dict[int, Delivery]:
        found = {id_: self._recent.pop(id_) for id_ in ids if id_ in self._recent}
        if unknown := [id_ for id_ in ids if id_ not in found]:
            found |= {each.id: each for each in await self._context.disk.deliveries(unknown)}
        return found

    async def _deliver(self, poster: Transport, message: Delivery) -> None:
        try:
            outcome = await self._try(poster, message)
        finally:
            del self._in_flight[message.id]
        self._outcomes.append((message, outcome))
        self._update_breaker(outcome, went_before=message.id in self._sent_before_probe)
        self._sent_before_probe.discard(message.id)
        self._wake.set()

    async def _try(self, poster: Transport, message: Delivery) -> DeliveryOutcome:
        """Once. Where we fail ourselves, it has failed."""
        try:
            return await poster.post(self.endpoint, message)
        except Exception as bug:
            told = RuntimeError(redacted(self.endpoint.url, f"{type(bug).__name__}: {bug}"))
            log.error("webhook_bug", webhook=self.endpoint.name, exc_info=told.with_traceback(bug.__traceback__))
            return DeliveryOutcome(None, f"This is a bug in jobd: {type(bug).__name__}.")

    def _deliver_alerts_directly(self, poster: Transport) -> None:
        """The outbox cannot be written: what is new of alerts is told without it, and by it once there is room."""
        name = self.endpoint.name

        async def post(letter: Message) -> DeliveryOutcome:
            # Its number is a passing one: in the outbox the same letter gets another.
            message = self._context.new_delivery(letter, name, self._context.moment().now)
            outcome = await self._try(poster, message)
            self._update_breaker(outcome)
            told = {"webhook": name, "type": letter.type, "subject": letter.subject}
            log.info("webhook_told_without_outbox", **told, error=outcome.error)
            return outcome

        self.reader.alerts.deliver_directly(post)

    def _update_breaker(self, outcome: DeliveryOutcome, *, went_before: bool = False) -> None:
        """What it means for the endpoint. A failure of one that went before a try was asked for begins no new break."""
        name, now = self.endpoint.name, self._context.moment().now
        if outcome.error is None:
            self.stats.last_success_at = now
            if self.breaker.succeeded():
                log.info("webhook_back", webhook=name)
                self.queue.expedite()
            return
        self.stats.failed += 1
        self.stats.last_error, self.stats.last_error_at = outcome.error, now
        if not went_before and self.breaker.failed(outcome, self._now_ms(), self._context.chance()):
            pause_ms = (self.breaker.until or 0) - self._now_ms()
            log.warning("webhook_paused", webhook=name, pause_ms=pause_ms, error=outcome.error)

    async def _save_outcomes(self) -> None:
        """Note what came of those that are back."""
        count = len(self._outcomes)
        if not count:
            return
        at, ms = self._context.moment(), self._now_ms()
        now = at.now
        settled, waits = [], []
        for message, outcome in self._outcomes[:count]:
            tried = replace(message, tries=message.tries + 1, status=outcome.status, error=outcome.error)
            wait_ms = 0
            if outcome.error is None:
                tried = replace(tried, state="delivered", ended_at=now)
            elif is_exhausted(tried, self.endpoint, at.believed, self._context.retry_policy):
                tried = replace(tried, state="given_up", ended_at=now)
            else:
                chance, asked_ms = self._context.chance(), outcome.retry_after_ms
                wait_ms = retry_wait_ms(tried.tries, chance, self._context.retry_policy, asked_ms)
                tried = replace(tried, due_at=now + wait_ms)
            settled.append(tried)
            waits.append(wait_ms)
        await self.reader.settle(settled, at.believed)
        del self._outcomes[:count]
        for tried, wait_ms in zip(settled, waits, strict=True):
            if tried.state == "waiting":
                self.queue.postpone(tried.id, ms + wait_ms)
            else:
                self.queue.remove(tried.id)
            self._log_outcome(tried)

    def _log_outcome(self, tried: Delivery) -> None:
        told = {"webhook": tried.endpoint, "delivery": tried.id, "type": tried.type, "subject": tried.subject}
        if tried.state == "delivered":
            self.stats.delivered += 1
            log.debug("webhook_delivered", **told, tries=tried.tries)
        elif tried.state == "given_up":
            self.stats.given_up += 1
            log.error("webhook_given_up", **told, tries=tried.tries, error=tried.error)
        else:
            log.info("webhook_not_delivered", **told, tries=tried.tries, error=tried.error)

    async def _give_up_old(self) -> None:
        """Of an endpoint that has taken nothing for too long, what is too old is given up without being tried."""
        failing_ms = self.failing_ms
        if failing_ms is None or self._loop_time() < self._next_clearing_s:
            return
        self._next_clearing_s = self._loop_time() + MINUTE_MS / SECOND_MS
        if failing_ms < self.endpoint.give_up_after_ms:
            return
        at = self._context.moment()
        ids = list(islice(self.queue.ids(), SLICE))
        old = [
            replace(each, state="given_up", ended_at=at.now, error=each.error or self.stats.last_error)
            for each in await self._context.disk.deliveries(ids)
            if at.believed - each.at >= self.endpoint.give_up_after_ms
        ]
        if not old:
            return
        await self.reader.settle(old, at.believed)
        for each in old:
            self._recent.pop(each.id, None)
            self.queue.remove(each.id)
            self._log_outcome(each)
        if len(old) == SLICE:
            self._next_clearing_s = 0.0

    async def _shut_down(self, poster: Transport) -> None:
        """What is back is noted, what is on its way gets a moment; all else is there at the next start."""
        going = [*self._in_flight.values(), *self.reader.alerts.in_flight()]
        if going:
            await asyncio.wait(going, timeout=GRACE_S)
        left = [task for task in going if not task.done()]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        try:
            if self._context.may_write():
                await self._save_outcomes()
                await self.reader.save(at_once=True)
        except Exception as error:
            log.warning("webhook_not_noted", webhook=self.endpoint.name, error=f"{type(error).__name__}: {error}")
        await poster.close()

    def _now_ms(self) -> int:
        """By a clock that never steps."""
        return int(self._loop_time() * SECOND_MS)
