"""Judge the lease of leadership by the monotonic clock of this node alone.

A leader measures from the moment before it sent the last acknowledged renewal, and stops early by a margin. A standby
measures from the moment when it first saw that renewal. So the lease of a leader is over before a standby takes over,
regardless of the wall clocks. `now_s` has to count the time in which the machine is suspended.

It does not count the time in which a virtual machine is paused. The wall clock may show that time afterwards, so a
leader renews its lease when the two clocks have moved apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, NamedTuple

from jobd.model.clocks import BootS
from jobd.model.journal import Head, NodeEntry

MARGIN: Final = 0.1  # of the lease; clocks may differ in speed by this much
RENEWALS: Final = 3  # in one lease, while nothing is appended
JUMP_S: Final = 0.3  # between the wall clock and the clock of the lease


def boot_clock_s() -> BootS:
    """Return seconds since boot, including the time of suspends."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)  # type: ignore[return-value]  # a BootS


def lease_of(holder: str | None, nodes: list[NodeEntry]) -> float:
    """Return the seconds of the lease of process `holder`, by its own setting; 0 if it is not known."""
    return max((node.lease_ms / 1000 for node in nodes if node.process == holder), default=0.0)


class Instant(NamedTuple):
    """A moment by the clock of the lease, and how far the wall clock was ahead of it."""

    at_s: BootS
    ahead_s: float


class LeaderLease:
    """The lease as its leader counts it. It is over until `renewed` is called."""

    def __init__(
        self, lease_s: float, now_s: Callable[[], BootS] = boot_clock_s, wall_s: Callable[[], float] = time.time
    ) -> None:
        self.lease_s = lease_s
        self._now_s = now_s
        self._wall_s = wall_s
        self._sent: Instant | None = None  # when the latest renewal that was acknowledged was sent

    def now(self) -> Instant:
        """Return the moment to pass to `renewed`, before the renewal is sent."""
        at_s = self._now_s()
        return Instant(at_s, self._wall_s() - at_s)  # type: ignore[operator]  # elsewhere they never mix

    def renewed(self, sent: Instant) -> None:
        """Record that a renewal sent at this moment was acknowledged."""
        if self._sent is None or sent.at_s >= self._sent.at_s:
            self._sent = sent

    def _until(self, part: float) -> float:
        return 0.0 if self._sent is None else max(self._sent.at_s + self.lease_s * part - self._now_s(), 0.0)

    @property
    def left_s(self) -> float:
        """The seconds until the lease is over, 0 if it is."""
        return self._until(1 - MARGIN)

    @property
    def is_over(self) -> bool:
        return self.left_s <= 0

    @property
    def is_in_doubt(self) -> bool:
        """Whether the clocks have moved apart since the latest renewal, as in a virtual machine that was paused."""
        return self._sent is not None and abs(self.now().ahead_s - self._sent.ahead_s) > JUMP_S

    @property
    def renewal_in_s(self) -> float:
        """The seconds until the next renewal is due, unless an append renews the lease before."""
        return self._until(1 / RENEWALS)


class StandbyLease:
    """The lease of the leader as a standby sees it."""

    def __init__(self, lease_s: float, now_s: Callable[[], BootS] = boot_clock_s) -> None:
        self.lease_s = lease_s
        self._now_s = now_s
        self._leader_s = 0.0  # the lease of the leader by its own setting, as far as known
        self._seen: tuple[int, int, str] | None = None
        self._seen_s = BootS(0.0)

    def see(self, head: Head) -> bool:
        """Record the head that was just read. Return whether a takeover is allowed.

        It is if the lease was released, or if the head has not changed for a whole lease.
        """
        now_s, seen = self._now_s(), (head.epoch, head.number, head.renewed)
        if seen != self._seen:
            if self._seen is None or head.epoch != self._seen[0]:
                self._leader_s = 0.0
            self._seen, self._seen_s = seen, now_s
        return head.holder is None or self.is_over

    def respect(self, leader_s: float) -> bool:
        """Respect the lease that the leader has by its own setting. Return whether a takeover is still allowed."""
        self._leader_s = leader_s
        return self.is_over

    @property
    def is_over(self) -> bool:
        """Whether the head has not changed, or could not be read, for the length of the lease."""
        return self._seen is not None and self._now_s() - self._seen_s >= max(self.lease_s, self._leader_s)
