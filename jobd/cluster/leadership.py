"""Lead a shared journal: append and renew the lease, and stop before another node can lead.

`Leadership` holds the epoch, the number of the last acknowledged record (`acked`), the lease by the clock of this node
(lease.py), and the reason why leadership was lost. It begins with a takeover (standby.py); once lost, it stays lost.

    leader    sends a renewal ─────── 0.9 of a lease ───────> stops
    journal             commits it, and confirms it
    standby                   sees the change ─────── a whole lease without another ───────> may take over

The standby sees the renewal after it was sent, and waits longer. So the leader has stopped before, if the boot clocks
of both run at the same speed within a tenth. No wall clock and no clock of the server takes part.

Invariants:

- Two guards are independent. By the lease, a node that may have been replaced begins no batch and no request. By the
  epoch, PostgreSQL rejects (fences) an append of a former leader, however late. The journal is correct without the
  first one; reads need it.
- One statement is in progress at a time (`_sending`): after an unknown outcome, the next one must be `resolve`.
- `_lost` is set once and stays. After that no statement is sent.
- `append` returns when the record is on a quorum. It raises DiskFull if nothing was written, and leadership continues.
  After LeadershipLost nothing was written either. After JournalOutcomeUnknown the record may be in the journal or not;
  the actor then ends, and with it the process, which comes back as a standby.
- Within its lease a leader settles an unknown outcome itself: `resolve` takes another epoch, which fences the
  statement whose response was lost. Then the journal has the record, or never will, and the record is appended again
  if it has not. Each `resolve` raises the epoch, so tokens continue with the new one (`on_epoch`).
- The lease counts from the moment before a statement was sent, and only if that statement was acknowledged. A
  statement may be sent after the end of the lease: the journal rejects it if another node leads, and else it renews
  the lease.
- `acked` never exceeds the last record that was acknowledged. Standbys learn it with the next append or renewal.
- A wait for a response ends LATE_S after the lease, or MIN_WAIT_S after a statement that was sent later. The statement
  is not cancelled, because a cancelled commit can be durable on one server alone; it runs to its end in the
  background.
- The actor calls `confirm` before each batch, the listeners call `check` before each request. While the boot clock and
  the wall clock have moved apart, as after a pause of a virtual machine, `confirm` waits for a renewal.
- `release` is the last statement. Without it, for example after a failure, the lease ends by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import structlog

from jobd.cluster.lease import LeaderLease
from jobd.core.stats import Histogram
from jobd.engine.actor import COMMIT_BUCKETS_S
from jobd.model.journal import Head, JournalOutcomeUnknown, JournalUnavailable, LeadershipLost, Record, SharedJournal
from jobd.model.storage import DiskFull

MIN_WAIT_S: Final = 0.5  # for the response to a statement that was sent after the lease
LATE_S: Final = 0.05  # after the lease, for a response that arrived while this process stood still
RETRY_S: Final = 0.05  # while the journal cannot be reached

_OVER: Final = "the lease is over, because the journal did not confirm a renewal in time"
_JUMPED: Final = "the clocks of this machine have jumped, and no renewal of the lease has followed yet"

log = structlog.get_logger("jobd.cluster")

T = TypeVar("T")


class Leadership:
    """The leadership of `journal`, which began with `head`. `lease` was renewed by the takeover.

    `next_epoch` returns an epoch above the current one. `on_epoch` is called when leadership continues with it.
    `on_lost` is called once, when this node no longer leads and no append has reported it.
    """

    def __init__(
        self,
        journal: SharedJournal,
        head: Head,
        lease: LeaderLease,
        *,
        next_epoch: Callable[[], int],
        on_epoch: Callable[[int], None] = lambda epoch: None,
        on_lost: Callable[[Exception], None] = lambda error: None,
    ) -> None:
        self.epoch = head.epoch
        self.acked = head.number
        self.append_seconds = Histogram.empty(COMMIT_BUCKETS_S)
        self.on_epoch = on_epoch
        self.on_lost = on_lost
        self._journal = journal
        self._lease = lease
        self._next_epoch = next_epoch
        self._sending = asyncio.Lock()  # one statement at a time, because an unknown outcome ends all others
        self._stop = asyncio.Event()
        self._lost: Exception | None = None
        self._response: asyncio.Timeout | None = None  # the wait for one
        self._timer: asyncio.TimerHandle | None = None  # not after the end of the lease

    def check(self) -> None:
        """Raise an error if no more responses may be sent: leadership is lost, or the lease over by the local clock."""
        if self._lost is not None:
            raise self._lost
        if self._lease.is_over:
            raise LeadershipLost(_OVER)

    def confirm(self) -> Awaitable[None] | None:
        """Raise an error as `check` does. Return a renewal to wait for if the clocks of this machine have jumped.

        Its lease may be over then. Reads wait for this, and appends need not.
        """
        self.check()
        return self._renew_if_due() if self._lease.is_in_doubt else None

    @property
    def loss(self) -> Exception | None:
        """The error that `check` would raise, or that the clocks have jumped and no renewal has followed yet."""
        try:
            self.check()
        except Exception as lost:
            return lost
        return LeadershipLost(_JUMPED) if self._lease.is_in_doubt else None

    def check_confirmed(self) -> None:
        """Raise `loss`."""
        if (loss := self.loss) is not None:
            raise loss

    @property
    def is_waiting(self) -> bool:
        """Whether the lease lasts and a request to the journal has no response yet."""
        return self._sending.locked() and not self._lease.is_over

    async def append(self, record: Record, acked: int) -> None:
        """Write `record` and renew the lease. It is durable on a quorum when this returns.

        Resolves an unknown outcome within the lease. Raises DiskFull or LeadershipLost if nothing was written, and
        JournalOutcomeUnknown if the lease ended before that was known.
        """
        async with self._sending:
            if self._lost is not None:
                raise LeadershipLost(f"this node no longer leads: {self._lost}") from self._lost
            began_s = self._lease.now().at_s
            try:
                await self._append(record, acked)
            except (LeadershipLost, JournalOutcomeUnknown) as lost:
                self._lost = lost
                raise
            self.acked = record.number
            self.append_seconds.add(self._lease.now().at_s - began_s, COMMIT_BUCKETS_S)
            if self._lease.is_over:  # the record is durable, but another node may lead by now: see `check`
                with contextlib.suppress(LeadershipLost, JournalOutcomeUnknown):
                    await self._renew()

    async def run(self) -> None:
        """Renew the lease when nothing is appended, until `stop` or until another node leads."""
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._lease.renewal_in_s):
                    await self._stop.wait()
            if self._stop.is_set() or self._lease.renewal_in_s > 0:
                continue
            try:
                await self._renew_if_due()
            except (LeadershipLost, JournalOutcomeUnknown) as lost:
                self.on_lost(lost)
                return

    def stop(self) -> None:
        """End `run`."""
        self._stop.set()

    async def release(self) -> None:
        """Release leadership, so that another node leads at once. After a failure its lease ends by itself."""
        self.stop()
        async with self._sending:
            if self._lost is None:
                self._lost = LeadershipLost("this node has released leadership")
                with contextlib.suppress(JournalUnavailable, JournalOutcomeUnknown, DiskFull):
                    await self._journal.release()
                    log.info("leadership_released", epoch=self.epoch)

    async def _append(self, record: Record, acked: int) -> None:
        try:
            await self._retry(lambda: self._journal.append(record, acked), DiskFull)
        except JournalOutcomeUnknown:
            log.warning("append_unknown", record=record.number)
            await self._ensure_appended(record, acked)
        except _NoResponse as lost:
            raise _unknown(record, lost) from lost

    async def _renew_if_due(self) -> None:
        async with self._sending:
            if self._lost is not None:  # an append has lost leadership, which must not be taken again
                raise self._lost
            if self._lease.renewal_in_s > 0 and not self._lease.is_in_doubt:
                return  # an append came first
            try:
                await self._renew()
                while self._lease.is_over:  # the response came too late, and another node may lead by now
                    await self._renew()
            except (LeadershipLost, JournalOutcomeUnknown) as lost:
                self._lost = lost
                raise

    async def _renew(self) -> None:
        try:
            await self._retry(lambda: self._journal.renew(self.acked))
        except JournalOutcomeUnknown:
            await self._resolve()

    async def _ensure_appended(self, record: Record, acked: int) -> None:
        """Find out whether `record` is in the journal, and append it if it is not."""
        while True:
            try:
                head = await self._resolve()
                if head.number >= record.number:
                    return
                await self._retry(lambda: self._journal.append(record, acked), DiskFull)
                return
            except JournalOutcomeUnknown:
                pass
            except LeadershipLost as lost:
                raise _unknown(record, lost) from lost

    async def _resolve(self) -> Head:
        """Keep leadership after an unknown outcome, with another epoch. Raises LeadershipLost at the end of the lease.

        A statement that is still running then ends by itself. If it takes an epoch, that epoch is not used.
        """
        while True:
            with contextlib.suppress(JournalOutcomeUnknown):
                head = await self._retry(lambda: self._journal.resolve(self._next_epoch()))
                self.epoch = head.epoch
                self.on_epoch(head.epoch)
                return head
            self.check()
            await asyncio.sleep(RETRY_S)

    async def _retry(self, send: Callable[[], Awaitable[T]], *raised: type[Exception]) -> T:
        """Send a statement that renews the lease, again while the journal cannot be written and the lease lasts.

        The first attempt may come after the lease, because the journal rejects it if another node leads. After the
        errors `raised`, it is not sent again. Raises _NoResponse when the lease ends first.
        """
        is_away = False
        while True:
            sent = self._lease.now()
            try:
                result = await self._response_to(send())
            except (JournalUnavailable, DiskFull) as error:
                if isinstance(error, raised):
                    raise
                if not is_away:
                    log.warning("journal_unavailable", reason=str(error), left_s=round(self._lease.left_s, 3))
                is_away = True
                self.check()
                await asyncio.sleep(RETRY_S)
            else:
                self._lease.renewed(sent)
                return result

    async def _response_to(self, statement: Awaitable[T]) -> T:
        """Wait for a response until the lease is over. The statement runs on after that. Raises _NoResponse."""
        try:
            async with asyncio.timeout(None) as self._response:
                if self._timer is None or self._lease.is_over:
                    self._set_timer(self._lease.left_s or MIN_WAIT_S)
                return await statement
        except TimeoutError:
            raise _NoResponse(_OVER) from None
        finally:
            self._response = None

    def _set_timer(self, in_s: float, *, is_late: bool = False) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(in_s, self._end_wait, is_late)

    def _end_wait(self, is_late: bool) -> None:
        """End the wait for a response if the lease is over. One timer serves many statements."""
        self._timer = None
        if self._response is None:
            return
        if self._lease.left_s > 0:
            self._set_timer(self._lease.left_s)
        elif not is_late:
            self._set_timer(LATE_S, is_late=True)
        else:
            self._response.reschedule(asyncio.get_running_loop().time())


class _NoResponse(LeadershipLost):
    """The lease ended before the response to a statement, which may have had its effect."""


def _unknown(record: Record, lost: LeadershipLost) -> JournalOutcomeUnknown:
    return JournalOutcomeUnknown(f"record {record.number} may be in the journal or not: {lost}")
