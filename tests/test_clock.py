"""The clock: lease time survives restarts, holds and steps; wall time is only shown."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobd.clock import SUSPECT_AHEAD_MS, Clock, boot_clock_ms, wall_clock_ms
from jobd.commands import Moment

WALL = 1_700_000_000_000


class Sources:
    """Clocks that stand still until told."""

    def __init__(self) -> None:
        self.wall_ms = WALL
        self.boot_ms = 5_000

    def wall(self) -> int:
        return self.wall_ms

    def boot(self) -> int:
        return self.boot_ms

    def pass_ms(self, ms: int) -> None:
        self.wall_ms += ms
        self.boot_ms += ms


@pytest.fixture
def sources() -> Sources:
    return Sources()


def clock(sources: Sources, lease_ms: int = 0, wall_ms: int = 0) -> Clock:
    return Clock(lease_ms, wall_ms, wall=sources.wall, boot=sources.boot)


def test_lease_time_starts_where_it_was_persisted_and_goes_on(sources: Sources) -> None:
    it = clock(sources, lease_ms=1_000)
    assert it.moment() == Moment(now=WALL, lease=1_000, offset=WALL - 1_000)
    sources.pass_ms(250)
    assert it.moment() == Moment(now=WALL + 250, lease=1_250, offset=WALL - 1_000)


@pytest.mark.parametrize("step_ms", [-3_600_000, 3_600_000, 40 * 86_400_000])
def test_a_step_of_the_wall_clock_moves_no_lease(sources: Sources, step_ms: int) -> None:
    it = clock(sources, lease_ms=1_000)
    sources.pass_ms(10)
    sources.wall_ms += step_ms
    at = it.moment()
    assert at.lease == 1_010
    assert at.now == sources.wall_ms
    assert at.wall(1_010) == sources.wall_ms
    assert not it.suspect  # judged at the start only


def test_the_offset_does_not_flicker(sources: Sources) -> None:
    it = clock(sources)
    first = it.moment().offset
    sources.wall_ms += 1
    assert it.moment().offset == first
    sources.wall_ms -= 2
    assert it.moment().offset == first
    sources.wall_ms += 3
    assert it.moment().offset == first + 2


def test_lease_time_never_goes_back(sources: Sources) -> None:
    it = clock(sources, lease_ms=100)
    sources.pass_ms(50)
    assert it.moment().lease == 150
    sources.boot_ms -= 40
    assert it.moment().lease == 150
    sources.boot_ms += 45
    assert it.moment().lease == 195  # it counts on from where the clock is: nothing waits until that has caught up


def test_a_hold_stops_lease_time_and_only_that(sources: Sources) -> None:
    it = clock(sources)
    sources.pass_ms(10)
    it.hold()
    it.hold()
    assert it.held
    sources.pass_ms(1_000)
    at = it.moment()
    assert (at.lease, at.now, at.wall(at.lease)) == (10, WALL + 1_010, WALL + 1_010)
    it.resume()
    assert not it.held
    sources.pass_ms(5)
    assert it.moment().lease == 15
    it.resume()
    assert it.moment().lease == 15


def test_a_stop_is_a_hold_that_nothing_ends(sources: Sources) -> None:
    it = clock(sources)
    sources.pass_ms(10)
    it.stop()
    it.hold()
    it.resume()
    sources.pass_ms(1_000)
    assert (it.moment().lease, it.moment().now) == (10, WALL + 1_010)


@pytest.mark.parametrize(
    ("wall_ms", "suspect"),
    [
        (0, False),  # a new store
        (WALL, False),
        (WALL + 10 * SUSPECT_AHEAD_MS, False),  # the clock went back: nothing is old by that
        (WALL - SUSPECT_AHEAD_MS, False),
        (WALL - SUSPECT_AHEAD_MS - 1, True),
    ],
)
def test_a_wall_clock_far_ahead_at_the_start_is_suspect(sources: Sources, wall_ms: int, suspect: bool) -> None:
    it = clock(sources, wall_ms=wall_ms)
    assert it.suspect is suspect
    it.accept()
    assert it.suspect is False


@given(st.lists(st.tuples(st.integers(-1_000, 5_000), st.integers(-(10**9), 10**9), st.sampled_from("hrn"))))
def test_whatever_the_clocks_do_lease_time_is_monotonic_and_bounded(
    steps: list[tuple[int, int, str]],
) -> None:
    sources = Sources()
    it = clock(sources, lease_ms=7)
    last, forward = 7, 0
    for boot_ms, wall_ms, what in steps:
        sources.boot_ms += boot_ms
        sources.wall_ms += wall_ms
        forward += max(0, boot_ms)
        if what == "h":
            it.hold()
        elif what == "r":
            it.resume()
        at = it.moment()
        assert last <= at.lease <= 7 + forward
        assert abs(at.now - at.wall(at.lease)) <= 1
        last = at.lease


def test_the_real_clocks_are_those_of_the_system() -> None:
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000
    it = Clock(lease_ms=42)
    assert it.moment().lease >= 42
    assert before <= boot_clock_ms()
    assert abs(wall_clock_ms() - time.time() * 1_000) < 60_000
