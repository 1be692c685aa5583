"""The lease of leadership: the leader stops before any standby takes over, whatever their clocks show."""

from __future__ import annotations

import time

import pytest

from jobd.cluster.lease import LeaderLease, StandbyLease, boot_clock_s
from jobd.model.clocks import BootS
from jobd.model.journal import Head

LEASE_S = 3.0


class FakeClock:
    def __init__(self, now_s: float = 100.0) -> None:
        self.now_s = now_s

    def __call__(self) -> BootS:
        return BootS(self.now_s)


def head(number: int = 1, epoch: int = 7, renewed: str = "a", holder: str | None = "x", at: int = 0) -> Head:
    return Head(number, epoch, holder, "http://a:8771", number, renewed, at=at)


def test_a_leader_counts_from_before_it_sent_the_renewal() -> None:
    clock = FakeClock()
    lease = LeaderLease(LEASE_S, clock, lambda: clock.now_s)
    assert (lease.is_over, lease.left_s, lease.renewal_in_s) == (True, 0, 0)
    sent = lease.now()
    clock.now_s += 1  # the server took that long
    lease.renewed(sent)
    assert lease.left_s == pytest.approx(1.7)
    assert lease.renewal_in_s == 0, "a third of the lease has passed since it was sent"
    clock.now_s += 1.69
    assert not lease.is_over
    clock.now_s += 0.02
    assert (lease.is_over, lease.left_s) == (True, 0)


def test_an_acknowledgement_that_arrives_late_does_not_shorten_the_lease() -> None:
    clock = FakeClock()
    lease = LeaderLease(LEASE_S, clock, lambda: clock.now_s)
    first = lease.now()
    clock.now_s += 1
    lease.renewed(lease.now())
    lease.renewed(first)
    assert lease.left_s == pytest.approx(2.7)
    assert lease.renewal_in_s == pytest.approx(1)


@pytest.mark.parametrize("change", [{"number": 2}, {"epoch": 8}, {"renewed": "b"}])
def test_a_standby_waits_for_a_whole_lease_without_a_change(change: dict[str, int]) -> None:
    clock = FakeClock()
    lease = StandbyLease(LEASE_S, clock)
    assert not lease.see(head())
    clock.now_s += 2.99
    assert not lease.see(head())
    assert not lease.see(head(**change)), "any change starts the lease again"  # type: ignore[arg-type]
    clock.now_s += 2.99
    assert not lease.see(head(**change))  # type: ignore[arg-type]
    clock.now_s += 0.02
    assert lease.see(head(**change))  # type: ignore[arg-type]


@pytest.mark.parametrize("step_ms", [-3_600_000, 3_600_000])
def test_the_wall_clock_of_the_server_does_not_matter(step_ms: int) -> None:
    clock = FakeClock()
    lease = StandbyLease(LEASE_S, clock)
    assert not lease.see(head())
    clock.now_s += 2.99
    assert not lease.see(head(at=step_ms))
    clock.now_s += 0.02
    assert lease.see(head(at=step_ms))


def test_a_later_acknowledged_record_does_not_renew_the_lease() -> None:
    clock = FakeClock()
    lease = StandbyLease(LEASE_S, clock)
    lease.see(Head(2, 7, "x", None, 1, "a"))
    clock.now_s += LEASE_S
    assert lease.see(Head(2, 7, "x", None, 2, "a"))


def test_a_lease_without_a_holder_is_over_at_once() -> None:
    assert StandbyLease(LEASE_S, FakeClock()).see(head(holder=None))


@pytest.mark.parametrize("apart_s", [-3600.0, 0.0, 3600.0])
@pytest.mark.parametrize("delay_s", [0.0, 0.2, 2.9])
def test_the_leader_stops_before_a_standby_takes_over(apart_s: float, delay_s: float) -> None:
    """The clocks of both nodes are `apart_s` apart, and the standby sees the renewal `delay_s` after it was sent."""
    leader_clock, standby_clock = FakeClock(), FakeClock(100 + apart_s)
    leader = LeaderLease(LEASE_S, leader_clock, lambda: leader_clock.now_s)
    standby = StandbyLease(LEASE_S, standby_clock)
    leader.renewed(leader.now())
    for clock in (leader_clock, standby_clock):
        clock.now_s += delay_s
    steps = 0
    while not standby.see(head()):
        for clock in (leader_clock, standby_clock):
            clock.now_s += 0.05
        steps += 1
    assert leader.is_over
    assert steps >= 59


def test_the_clock_of_a_node_counts_suspends() -> None:
    assert boot_clock_s() == pytest.approx(time.clock_gettime(time.CLOCK_BOOTTIME), abs=5)


def test_a_standby_respects_a_longer_lease_of_the_leader() -> None:
    clock = FakeClock()
    lease = StandbyLease(LEASE_S, clock)
    assert not lease.see(head())
    clock.now_s += LEASE_S
    assert lease.see(head())
    assert lease.respect(1.0), "its own lease counts, if it is longer"
    assert not lease.respect(10.0)
    clock.now_s += 6.99
    assert not lease.see(head())
    clock.now_s += 0.02
    assert lease.see(head())
    assert not lease.see(head(renewed="b"))
    clock.now_s += LEASE_S
    assert not lease.see(head(renewed="b")), "a renewal does not shorten it"
    assert not lease.see(head(epoch=8))
    clock.now_s += LEASE_S
    assert lease.see(head(epoch=8)), "the next leader may have another lease"
