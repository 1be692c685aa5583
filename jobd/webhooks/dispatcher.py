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
from jobd.webhooks.context import Office, Poster, Tally
from jobd.webhooks.delivery_queue import Line, Waiting
from jobd.webhooks.journal_reader import PAGE, Reader
from jobd.webhooks.message import Letter, of_test
from jobd.webhooks.retry import Breaker, BreakerState, is_given_up, retry_wait_ms
from jobd.webhooks.webhook_url import hushed

PARALLEL: Final = 8  # deliveries of one endpoint on their way at once
GRACE_S: Final = 1.0  # for what is on its way when the daemon stops; after it, it is sent again at the next start
FULL_S: Final = 1.0  # until a full disk is asked again
TROUBLE_S: Final = 5.0  # after a failure of our own
FRESH: Final = 256  # messages that are sent from memory, as they have just been written
AT_ONCE: Final = 200  # deliveries given up, or sent again, in one transaction
SLICE_PAUSE_S: Final = 0.01  # between those, so that workers get the disk in between

log = structlog.get_logger("jobd.webhooks")


class Courier:
    """`run` until `stop`. `committed` is told of every commit; `wake` where alerts have changed."""

    def __init__(self, endpoint: WebhookEndpoint, outbox: Outbox, office: Office, tally: Tally) -> None:
        self.endpoint = endpoint
        self.tally = tally
        self.line = Line()
        self.breaker = Breaker(office.manners)
        self.reader = Reader(endpoint, outbox.cursors[endpoint.name], outbox.last, office, self._put)
        self._office = office
        self._loop_time = asyncio.get_running_loop().time
        self._wake = asyncio.Event()
        self._stopping = False
        self._next_clearing_s = 0.0
        self._going: dict[int, asyncio.Task[None]] = {}
        self._before: set[int] = set()  # of those: who went before somebody asked for a try in a break
        self._outcomes: list[tuple[Delivery, DeliveryOutcome]] = []  # that are not noted yet
        self._fresh: dict[int, Delivery] = {}
        self._is_troubled = False
        now, ms = office.moment().now, self._now_ms()
        for each in outbox.waiting[endpoint.name]:
            # By a clock that never steps; what was put off by another clock waits no longer than anything may.
            left_ms = min(max(each.due_at - now, 0), office.manners.retry_at_most_ms)
            self.line.add(Waiting(each.id, each.subject, ms + left_ms if left_ms else 0, each.tries))

    # -- from outside -------------------------------------------------------------------------------------------------

    async def run(self, poster: Poster) -> None:
        """Until `stop`, which lets what is on its way arrive if it is quick. Survives whatever fails."""
        try:
            while not self._stopping:
                await self._pause(await self._survived_round(poster))
        finally:
            await self._end(poster)

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
        office = self._office
        letter = of_test(self.endpoint.name, office.next_delivery, office.moment().now, office.source)
        delivery = await self.reader.add(letter)
        self._hurry()
        return delivery

    async def again(self, id_: int) -> Delivery | None:
        """Send a delivery again, now, whatever became of it; None where there is none of this number.

        One that waits does not wait for its time any more. Raises DiskFull.
        """
        found: Delivery | None
        if id_ in self.line:
            self.line.hurry(id_)
            (found,) = await self._office.disk.deliveries([id_]) or (None,)
        else:
            now = self._office.moment().now
            found = await self._office.disk.deliver_again(self.endpoint.name, id_, now)
            if found is not None and id_ not in self.line:
                self.line.add(Waiting(id_, found.subject, 0))
        self._hurry()
        return found

    async def again_all(self, upto: int) -> int:
        """Send again what was given up, up to the number `upto`, slice by slice; how many. Raises DiskFull."""
        count = 0
        while not self._stopping:
            now = self._office.moment().now
            found = await self._office.disk.deliver_all_again(self.endpoint.name, upto, AT_ONCE, now)
            for each in found:
                if each.id not in self.line:
                    self.line.add(Waiting(each.id, each.subject, 0))
            count += len(found)
            if not found:
                break
            self._hurry()
            await asyncio.sleep(SLICE_PAUSE_S)
        return count

    def _hurry(self) -> None:
        """Somebody thinks that it is worth a try: it is not given up for its age before that was made."""
        if self.breaker.until is not None:
            self.breaker.until = self._now_ms()
            self._before = set(self._going)  # their failures say nothing of that try
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
    def put_off_ms(self) -> int | None:
        """Until the next try may be made; None where one may now, or nothing waits to be tried again."""
        now = self._now_ms()
        until = max(self.breaker.until or 0, self.line.next_due() or 0)
        return until - now if until > now else None

    # -- a round ------------------------------------------------------------------------------------------------------

    async def _survived_round(self, poster: Poster) -> float | None:
        """How long to wait for the next."""
        try:
            wait_s = await self._round(poster)
        except DiskFull:
            self._ring(poster)
            if not self._is_troubled:
                log.warning("webhook_waits", webhook=self.endpoint.name, reason="the disk of the store is full")
            wait_s, self._is_troubled = FULL_S, True
        except Exception as error:
            # The disk of the store has failed, or we have: told in full the first time.
            name, said = self.endpoint.name, f"{type(error).__name__}: {error}"
            log.error("webhook_failed", webhook=name, error=said, exc_info=not self._is_troubled)
            wait_s, self._is_troubled = TROUBLE_S, True
        else:
            self._is_troubled = False
        return wait_s

    async def _round(self, poster: Poster) -> float | None:
        may_write = self._office.may_write()
        if may_write:
            await self._settle()
            await self._clear()
            await self.reader.read_on(has_room=self._has_room, tells_gaps=not self.line.has(self.endpoint.subject))
            await self.reader.save()
        else:
            self._ring(poster)
        if not self._outcomes:  # what cannot be noted is not sent either: it would be sent again and again
            await self._send(poster)
        return self._wait_s() if may_write else FULL_S

    def _wait_s(self) -> float | None:
        """Until time itself gives us something to do."""
        waits = self.reader.waits_s(has_room=self._has_room)
        if self.breaker.since is not None:
            waits.append(self._next_clearing_s - self._loop_time())
        if (due := self.line.next_due()) is not None and len(self._going) < PARALLEL and not self._outcomes:
            until = self.breaker.until
            if until is None:
                waits.append((due - self._now_ms()) / SECOND_MS)
            elif not self._going:  # else that one will tell
                waits.append((max(due, until) - self._now_ms()) / SECOND_MS)
        return max(min(waits), 0.0) if waits else None

    @property
    def _has_room(self) -> bool:
        return len(self.line) + PAGE <= MAX_BACKLOG

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

    def _put(self, new: list[Delivery]) -> None:
        """These are in the outbox now."""
        for each in new:
            self.line.add(Waiting(each.id, each.subject, 0))
            if len(self._fresh) < FRESH:
                self._fresh[each.id] = each

    # -- out of the outbox --------------------------------------------------------------------------------------------

    async def _send(self, poster: Poster) -> None:
        """As many as may be on their way at once; where the endpoint is on trial, one."""
        taken: list[Waiting] = []
        ms = self._now_ms()
        state = self.breaker.state(ms)
        most = {"closed": PARALLEL, "half_open": 1, "open": 0}[state]
        while len(self._going) + len(taken) < most:
            first = self.line.take(ms) if state == "closed" else self.line.take_for_trial(ms)
            if first is None:
                break
            taken.append(first)
        if not taken:
            return
        try:
            messages = await self._messages([each.id for each in taken])
        except BaseException:
            for each in taken:
                self.line.back(each.id)
            raise
        for each in taken:
            if (message := messages.get(each.id)) is None:
                self.line.gone(each.id)  # its row was damaged, and set aside
            else:
                going = asyncio.create_task(self._go(poster, message), name=f"webhook {self.endpoint.name}")
                self._going[each.id] = going

    async def _messages(self, ids: list[int]) -> dict[int, Delivery]:
        found = {id_: self._fresh.pop(id_) for id_ in ids if id_ in self._fresh}
        if unknown := [id_ for id_ in ids if id_ not in found]:
            found |= {each.id: each for each in await self._office.disk.deliveries(unknown)}
        return found

    async def _go(self, poster: Poster, message: Delivery) -> None:
        try:
            outcome = await self._try(poster, message)
        finally:
            del self._going[message.id]
        self._outcomes.append((message, outcome))
        self._judge(outcome, went_before=message.id in self._before)
        self._before.discard(message.id)
        self._wake.set()

    async def _try(self, poster: Poster, message: Delivery) -> DeliveryOutcome:
        """Once. Where we fail ourselves, it has failed."""
        try:
            return await poster.post(self.endpoint, message)
        except Exception as bug:
            told = RuntimeError(hushed(self.endpoint.url, f"{type(bug).__name__}: {bug}"))
            log.error("webhook_bug", webhook=self.endpoint.name, exc_info=told.with_traceback(bug.__traceback__))
            return DeliveryOutcome(None, f"This is a bug in jobd: {type(bug).__name__}.")

    def _ring(self, poster: Poster) -> None:
        """The outbox cannot be written: what is new of alerts is told without it, and by it once there is room."""
        name = self.endpoint.name

        async def post(letter: Letter) -> DeliveryOutcome:
            # Its number is a passing one: in the outbox the same letter gets another.
            message = self._office.number(letter, name, self._office.moment().now)
            outcome = await self._try(poster, message)
            self._judge(outcome)
            told = {"webhook": name, "type": letter.type, "subject": letter.subject}
            log.info("webhook_told_without_outbox", **told, error=outcome.error)
            return outcome

        self.reader.alerts.ring(post)

    def _judge(self, outcome: DeliveryOutcome, *, went_before: bool = False) -> None:
        """What it means for the endpoint. A failure of one that went before a try was asked for begins no new break."""
        name, now = self.endpoint.name, self._office.moment().now
        if outcome.error is None:
            self.tally.last_success_at = now
            if self.breaker.succeeded():
                log.info("webhook_back", webhook=name)
                self.line.hurry()
            return
        self.tally.failed += 1
        self.tally.last_error, self.tally.last_error_at = outcome.error, now
        if not went_before and self.breaker.failed(outcome, self._now_ms(), self._office.chance()):
            pause_ms = (self.breaker.until or 0) - self._now_ms()
            log.warning("webhook_paused", webhook=name, pause_ms=pause_ms, error=outcome.error)

    async def _settle(self) -> None:
        """Note what came of those that are back."""
        count = len(self._outcomes)
        if not count:
            return
        at, ms = self._office.moment(), self._now_ms()
        now = at.now
        settled, waits = [], []
        for message, outcome in self._outcomes[:count]:
            tried = replace(message, tries=message.tries + 1, status=outcome.status, error=outcome.error)
            wait_ms = 0
            if outcome.error is None:
                tried = replace(tried, state="delivered", ended_at=now)
            elif is_given_up(tried, self.endpoint, at.believed, self._office.manners):
                tried = replace(tried, state="given_up", ended_at=now)
            else:
                chance, asked_ms = self._office.chance(), outcome.retry_after_ms
                wait_ms = retry_wait_ms(tried.tries, chance, self._office.manners, asked_ms)
                tried = replace(tried, due_at=now + wait_ms)
            settled.append(tried)
            waits.append(wait_ms)
        await self.reader.settle(settled, at.believed)
        del self._outcomes[:count]
        for tried, wait_ms in zip(settled, waits, strict=True):
            if tried.state == "waiting":
                self.line.put_off(tried.id, ms + wait_ms)
            else:
                self.line.gone(tried.id)
            self._tell(tried)

    def _tell(self, tried: Delivery) -> None:
        told = {"webhook": tried.endpoint, "delivery": tried.id, "type": tried.type, "subject": tried.subject}
        if tried.state == "delivered":
            self.tally.delivered += 1
            log.debug("webhook_delivered", **told, tries=tried.tries)
        elif tried.state == "given_up":
            self.tally.given_up += 1
            log.error("webhook_given_up", **told, tries=tried.tries, error=tried.error)
        else:
            log.info("webhook_not_delivered", **told, tries=tried.tries, error=tried.error)

    async def _clear(self) -> None:
        """Of an endpoint that has taken nothing for too long, what is too old is given up without being tried."""
        failing_ms = self.failing_ms
        if failing_ms is None or self._loop_time() < self._next_clearing_s:
            return
        self._next_clearing_s = self._loop_time() + MINUTE_MS / SECOND_MS
        if failing_ms < self.endpoint.give_up_after_ms:
            return
        at = self._office.moment()
        ids = list(islice(self.line.ids(), AT_ONCE))
        old = [
            replace(each, state="given_up", ended_at=at.now, error=each.error or self.tally.last_error)
            for each in await self._office.disk.deliveries(ids)
            if at.believed - each.at >= self.endpoint.give_up_after_ms
        ]
        if not old:
            return
        await self.reader.settle(old, at.believed)
        for each in old:
            self._fresh.pop(each.id, None)
            self.line.gone(each.id)
            self._tell(each)
        if len(old) == AT_ONCE:
            self._next_clearing_s = 0.0

    async def _end(self, poster: Poster) -> None:
        """What is back is noted, what is on its way gets a moment; all else is there at the next start."""
        going = [*self._going.values(), *self.reader.alerts.going()]
        if going:
            await asyncio.wait(going, timeout=GRACE_S)
        left = [task for task in going if not task.done()]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        try:
            if self._office.may_write():
                await self._settle()
                await self.reader.save(at_once=True)
        except Exception as error:
            log.warning("webhook_not_noted", webhook=self.endpoint.name, error=f"{type(error).__name__}: {error}")
        await poster.close()

    def _now_ms(self) -> int:
        """By a clock that never steps."""
        return int(self._loop_time() * SECOND_MS)
