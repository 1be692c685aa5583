"""The clock: lock time survives restarts, holds and steps; wall time is only shown."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import MutableMapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from jobd.engine import clock as clock_module
from jobd.engine.clock import Clock, boot_clock_ms, is_synchronised, wall_clock_ms
from jobd.model.clocks import BootMs, LockMs
from jobd.model.commands import Moment
from jobd.model.job import DAY_MS, HOUR_MS, MINUTE_MS, SECOND_MS
from jobd.model.storage import Numbers

WALL = 1_700_000_000_000
WEEK_MS = 7 * DAY_MS


class ManualClocks:
    """Clocks that move only when a test moves them."""

    def __init__(self) -> None:
        self.wall_ms = WALL
        self.boot_ms = 5_000
        self.synchronised = False
        self.synchronisation_reads = 0  # of the kernel's synchronisation

    def is_synchronised(self) -> bool:
        self.synchronisation_reads += 1
        return self.synchronised

    def wall(self) -> int:
        return self.wall_ms

    def boot(self) -> BootMs:
        return BootMs(self.boot_ms)

    def advance(self, ms: int) -> None:
        self.wall_ms += ms
        self.boot_ms += ms


@pytest.fixture
def sources() -> ManualClocks:
    return ManualClocks()


def clock(
    sources: ManualClocks, lock_ms: int = 0, wall_ms: int = 0, *, suspect: bool = False, keep_ms: int = WEEK_MS
) -> Clock:
    return started(sources, Numbers(lock_ms=LockMs(lock_ms), wall_ms=wall_ms, clock_suspect=suspect), keep_ms)


def started(sources: ManualClocks, numbers: Numbers, keep_ms: int = WEEK_MS) -> Clock:
    return Clock(
        numbers,
        keep_ms=keep_ms,
        wall=sources.wall,
        boot=sources.boot,
        synchronised=sources.is_synchronised,
    )


def log_events(logs: list[MutableMapping[str, Any]]) -> list[tuple[str, str]]:
    """Return event and level of the log lines about trust."""
    return [(line["event"], line["log_level"]) for line in logs]


@pytest.fixture
def daemon_clock(sources: ManualClocks) -> Clock:
    return clock(sources)


def test_lock_time_continues_from_its_persisted_value(sources: ManualClocks) -> None:
    daemon_clock = clock(sources, lock_ms=1_000)
    assert daemon_clock.moment() == Moment(now=WALL, lock_ms=LockMs(1_000), offset=WALL - 1_000)
    sources.advance(250)
    assert daemon_clock.moment() == Moment(now=WALL + 250, lock_ms=LockMs(1_250), offset=WALL - 1_000)


@pytest.mark.parametrize("step_ms", [-3_600_000, 3_600_000, 40 * 86_400_000])
def test_a_step_of_the_wall_clock_moves_no_lock_deadline(sources: ManualClocks, step_ms: int) -> None:
    daemon_clock = clock(sources, lock_ms=1_000)
    sources.advance(10)
    sources.wall_ms += step_ms
    at = daemon_clock.moment()
    assert at.lock_ms == 1_010
    assert at.now == sources.wall_ms
    assert at.wall(LockMs(1_010)) == sources.wall_ms


def test_the_offset_does_not_flicker(sources: ManualClocks, daemon_clock: Clock) -> None:
    first = daemon_clock.moment().offset
    sources.wall_ms += 1
    assert daemon_clock.moment().offset == first
    sources.wall_ms -= 2
    assert daemon_clock.moment().offset == first
    sources.wall_ms += 3
    assert daemon_clock.moment().offset == first + 2


def test_a_pause_between_two_reads_is_not_a_step(sources: ManualClocks) -> None:
    reads: list[int] = []

    def paused() -> BootMs:
        reads.append(sources.boot_ms)
        sources.advance(7 if len(reads) == 3 else 0)  # after the wall clock was read
        return sources.boot()

    made = Clock(wall=sources.wall, boot=paused, synchronised=sources.is_synchronised)
    before = made.moment()
    after = made.moment()
    assert after.offset == before.offset
    assert (after.now, after.lock_ms) == (before.now + 7, before.lock_ms + 7)


def test_a_process_that_is_paused_at_each_read_goes_on(sources: ManualClocks) -> None:
    def paused() -> BootMs:
        sources.advance(7)
        return sources.boot()

    made = Clock(wall=sources.wall, boot=paused, synchronised=sources.is_synchronised)
    assert made.moment().lock_ms < made.moment().lock_ms


def test_lock_time_never_goes_back(sources: ManualClocks) -> None:
    daemon_clock = clock(sources, lock_ms=100)
    sources.advance(50)
    assert daemon_clock.moment().lock_ms == 150
    sources.boot_ms -= 40
    assert daemon_clock.moment().lock_ms == 150
    sources.boot_ms += 45
    assert (
        daemon_clock.moment().lock_ms == 195
    )  # it continues from the current reading without waiting until the clock has caught up


def test_a_hold_stops_lock_time_and_only_that(sources: ManualClocks, daemon_clock: Clock) -> None:
    sources.advance(10)
    daemon_clock.hold()
    daemon_clock.hold()
    assert daemon_clock.held
    boot_ms = daemon_clock.boot_ms()
    sources.advance(1_000)
    at = daemon_clock.moment()
    assert (at.lock_ms, at.now, at.wall(at.lock_ms)) == (LockMs(10), WALL + 1_010, WALL + 1_010)
    assert daemon_clock.boot_ms() == boot_ms + 1_000
    daemon_clock.resume()
    assert not daemon_clock.held
    sources.advance(5)
    assert daemon_clock.moment().lock_ms == 15
    daemon_clock.resume()
    assert daemon_clock.moment().lock_ms == 15


def test_a_stop_is_a_permanent_hold(sources: ManualClocks, daemon_clock: Clock) -> None:
    sources.advance(10)
    daemon_clock.stop()
    daemon_clock.hold()
    daemon_clock.resume()
    sources.advance(1_000)
    assert (daemon_clock.moment().lock_ms, daemon_clock.moment().now) == (LockMs(10), WALL + 1_010)


# -- trust ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep_ms", "bound_ms"),
    [(WEEK_MS, DAY_MS), (2 * DAY_MS, DAY_MS), (DAY_MS, 12 * HOUR_MS), (MINUTE_MS, 30 * SECOND_MS), (1, SECOND_MS)],
)
def test_while_running_a_day_or_half_the_shortest_retention_ahead_is_suspect(
    sources: ManualClocks, keep_ms: int, bound_ms: int
) -> None:
    daemon_clock = clock(sources, keep_ms=keep_ms)
    sources.advance(10 * DAY_MS)  # boot time also continues
    assert not daemon_clock.suspect
    sources.wall_ms += bound_ms
    assert not daemon_clock.moment().suspect
    sources.wall_ms += 1
    at = daemon_clock.moment()
    assert at.suspect
    assert (at.now, at.believed) == (sources.wall_ms, sources.wall_ms - bound_ms - 1)


def test_the_first_moment_after_a_step_is_suspect_and_expects_boot_time_to_continue(
    sources: ManualClocks, daemon_clock: Clock
) -> None:
    sources.wall_ms += 40 * DAY_MS
    assert daemon_clock.moment().believed == WALL
    sources.advance(HOUR_MS)
    assert daemon_clock.moment().believed == WALL + HOUR_MS
    daemon_clock.hold()  # the full disk stops lock time, not the expected time
    sources.advance(HOUR_MS)
    assert daemon_clock.moment().believed == WALL + 2 * HOUR_MS


def test_small_steps_ahead_add_up_and_suspend_is_none(sources: ManualClocks, daemon_clock: Clock) -> None:
    sources.advance(30 * DAY_MS)  # a suspend, which boot time includes
    assert not daemon_clock.suspect
    for _ in range(2):
        sources.wall_ms += 12 * HOUR_MS
        assert not daemon_clock.suspect
    sources.wall_ms += 12 * HOUR_MS
    assert daemon_clock.suspect


@pytest.mark.parametrize("back_ms", [1, 5 * SECOND_MS, 3 * DAY_MS, 50 * 365 * DAY_MS])
def test_a_step_back_is_trusted_and_later_steps_are_measured_from_before_it(
    sources: ManualClocks, back_ms: int, daemon_clock: Clock
) -> None:
    sources.wall_ms -= back_ms
    assert not daemon_clock.suspect
    sources.advance(HOUR_MS)
    sources.wall_ms += back_ms + DAY_MS
    assert not daemon_clock.suspect
    sources.wall_ms += 2
    assert daemon_clock.suspect


def restarted(sources: ManualClocks, daemon_clock: Clock, away_ms: int = 0, step_ms: int = 0) -> Clock:
    """Return the clock of the next start, after `away_ms`, with the wall clock moved by `step_ms` meanwhile."""
    at = daemon_clock.moment()
    sources.advance(away_ms)
    sources.wall_ms += step_ms
    clock = at.clock
    kept = Numbers(
        lock_ms=at.lock_ms,
        wall_ms=at.believed,
        clock_suspect=clock.suspect,
        expected_ms=clock.expected_ms,
        step_since=clock.step_since,
        step_ms=clock.step_ms,
    )
    return started(sources, kept)


def test_a_clock_that_starts_behind_and_is_put_right_is_not_suspect(sources: ManualClocks) -> None:
    before = clock(sources)
    behind = restarted(sources, before, HOUR_MS, -40 * DAY_MS)
    assert not behind.suspect
    assert "39 d 23 h behind its expected value (2023-11-14 22:13:20 UTC)" in (behind.behind_reason() or "")
    sources.advance(HOUR_MS)
    sources.wall_ms += 40 * DAY_MS
    assert (behind.suspect, behind.behind_reason()) == (False, None)
    sources.wall_ms += DAY_MS + 1
    assert behind.suspect, "it is now measured from the time that is right"


def test_a_clock_that_starts_behind_may_be_put_right_in_the_next_run(sources: ManualClocks) -> None:
    behind = restarted(sources, clock(sources), HOUR_MS, -40 * DAY_MS)
    again = restarted(sources, behind, HOUR_MS)
    assert again.moment().latest == WALL, "the time of the downtime is unknown"
    right = restarted(sources, again, HOUR_MS, 40 * DAY_MS)
    assert (right.suspect, right.moment().ahead) == (False, 0)


@pytest.mark.parametrize(("away_days", "suspect"), [(3, False), (4, True)])
def test_a_clock_that_was_behind_since_the_start_may_be_put_right_by_as_much_as_at_a_start(
    sources: ManualClocks, away_days: int, suspect: bool
) -> None:
    behind = restarted(sources, clock(sources), away_days * DAY_MS, -40 * DAY_MS)
    assert not behind.suspect
    sources.wall_ms += 40 * DAY_MS
    with capture_logs() as logs:
        assert behind.suspect is suspect
    assert log_events(logs) == [("clock_suspect", "warning")] * suspect


def test_a_clock_that_is_set_ahead_from_behind_is_suspect_and_stays_so(sources: ManualClocks) -> None:
    behind = restarted(sources, clock(sources), 0, -40 * DAY_MS)
    sources.wall_ms += 80 * DAY_MS
    assert behind.suspect
    for _ in range(3):
        behind = restarted(sources, behind, HOUR_MS)
        assert (behind.suspect, behind.moment().believed) == (True, WALL)
    right = restarted(sources, behind, 0, -40 * DAY_MS)
    assert not right.suspect


def test_steps_add_up_over_restarts(sources: ManualClocks) -> None:
    daemon_clock = clock(sources)
    for _ in range(2):
        sources.wall_ms += 12 * HOUR_MS
        daemon_clock = restarted(sources, daemon_clock, HOUR_MS)
        assert not daemon_clock.suspect
    sources.wall_ms += 1
    assert daemon_clock.suspect


def test_a_clock_that_was_ahead_and_was_set_back_is_trusted_no_further_once_synchronised(sources: ManualClocks) -> None:
    daemon_clock = restarted(sources, clock(sources), 0, 3 * DAY_MS)
    assert not daemon_clock.suspect
    sources.wall_ms -= 3 * DAY_MS
    sources.synchronised = True
    with capture_logs() as logs:
        assert not after(sources, daemon_clock, 11 * MINUTE_MS)
    assert (logs, daemon_clock.behind_reason()) == ([], None)
    sources.wall_ms += DAY_MS + 1
    assert daemon_clock.suspect


def test_an_operator_can_accept_a_clock_that_is_behind(sources: ManualClocks, daemon_clock: Clock) -> None:
    sources.wall_ms -= 3 * DAY_MS
    assert daemon_clock.moment().latest == WALL
    daemon_clock.accept()
    assert daemon_clock.moment().latest == WALL - 3 * DAY_MS


def test_the_sentence_names_the_step_also_after_a_restart(sources: ManualClocks, daemon_clock: Clock) -> None:
    sources.wall_ms += 40 * DAY_MS
    daemon_clock.moment()
    sources.wall_ms += 2 * DAY_MS
    for each in (daemon_clock, restarted(sources, daemon_clock, DAY_MS)):
        reason = each.suspect_reason() or ""
        assert "was set ahead by 40 d after 2023-11-14 22:13:20 UTC" in reason


@pytest.mark.parametrize(
    ("wall_ms", "keep_ms", "suspect"),
    [
        (0, WEEK_MS, False),  # a new store
        (WALL, WEEK_MS, False),
        (WALL + 100 * DAY_MS, WEEK_MS, False),  # the clock went back, which makes nothing old
        (WALL - WEEK_MS // 2, WEEK_MS, False),
        (WALL - WEEK_MS // 2 - 1, WEEK_MS, True),
        (WALL - 29 * DAY_MS, WEEK_MS, True),
        (WALL - HOUR_MS // 2, HOUR_MS, False),
        (WALL - HOUR_MS // 2 - 1, HOUR_MS, True),
    ],
)
def test_a_start_half_the_shortest_retention_ahead_is_suspect(
    sources: ManualClocks, wall_ms: int, keep_ms: int, suspect: bool
) -> None:
    daemon_clock = clock(sources, wall_ms=wall_ms, keep_ms=keep_ms)
    assert daemon_clock.suspect is suspect
    assert daemon_clock.moment().believed == (wall_ms if suspect else WALL)


def test_a_start_after_a_suspect_clock_is_suspect_even_if_the_jump_alone_would_not_be(sources: ManualClocks) -> None:
    assert not clock(sources, wall_ms=WALL - 2 * DAY_MS).suspect
    daemon_clock = clock(sources, wall_ms=WALL - 2 * DAY_MS, suspect=True)
    assert daemon_clock.suspect
    assert daemon_clock.moment().believed == WALL - 2 * DAY_MS


def test_a_new_retention_counts_at_once(sources: ManualClocks, daemon_clock: Clock) -> None:
    sources.wall_ms += 20 * HOUR_MS
    assert not daemon_clock.suspect
    daemon_clock.keep_ms = DAY_MS
    assert daemon_clock.suspect
    daemon_clock.keep_ms = WEEK_MS
    assert not daemon_clock.suspect


def test_a_suspect_clock_is_logged_once_with_the_jump_and_what_to_do(sources: ManualClocks) -> None:
    with capture_logs() as logs:
        daemon_clock = clock(sources)
        assert daemon_clock.suspect_reason() is None
        sources.wall_ms += 40 * DAY_MS
        for _ in range(3):
            daemon_clock.moment()
            sources.advance(SECOND_MS)
    assert log_events(logs) == [("clock_suspect", "warning")]
    assert logs[0]["ahead_ms"] == 40 * DAY_MS
    for text in (logs[0]["message"], daemon_clock.suspect_reason()):
        assert text is not None
        assert "40 d ahead of its expected value (2023-11-14 22:13:2" in text
        assert "jobctl clock accept" in text
    with capture_logs() as logs:
        clock(sources, wall_ms=WALL)
    assert log_events(logs) == [("clock_suspect", "warning")]


def test_an_operator_can_accept_a_suspect_clock(sources: ManualClocks, daemon_clock: Clock) -> None:
    daemon_clock.accept()
    sources.wall_ms += 40 * DAY_MS
    assert daemon_clock.suspect
    with capture_logs() as logs:
        daemon_clock.accept()
        daemon_clock.accept()
        assert daemon_clock.moment() == Moment(WALL + 40 * DAY_MS, LockMs(0), WALL + 40 * DAY_MS)
    assert log_events(logs) == [("clock_trusted", "info")]
    assert logs[0]["reason"] == "an operator accepted the clock"
    sources.wall_ms += DAY_MS + 1
    assert daemon_clock.suspect


@pytest.mark.parametrize("left_ms", [-3 * DAY_MS, 0, DAY_MS])
def test_a_wall_time_that_agrees_again_is_trusted(sources: ManualClocks, left_ms: int, daemon_clock: Clock) -> None:
    sources.wall_ms += 40 * DAY_MS
    assert daemon_clock.suspect
    sources.advance(HOUR_MS)
    sources.wall_ms += left_ms - 40 * DAY_MS + 1
    assert daemon_clock.suspect is (left_ms == DAY_MS)
    with capture_logs() as logs:
        sources.wall_ms -= 1
        at = daemon_clock.moment()
        assert (at.now, at.lock_ms, at.trusted, at.ahead) == (WALL + HOUR_MS + left_ms, LockMs(HOUR_MS), None, left_ms)
    assert [line["reason"] for line in logs] == ["wall time agrees with its expected value again"] * (left_ms == DAY_MS)


def test_a_clock_that_is_set_right_while_the_daemon_is_down_is_trusted_at_the_start(sources: ManualClocks) -> None:
    with capture_logs() as logs:
        daemon_clock = clock(sources, wall_ms=WALL - HOUR_MS, suspect=True)
        assert not daemon_clock.suspect
    assert log_events(logs)[-1] == ("clock_trusted", "info")


def after(sources: ManualClocks, daemon_clock: Clock, ms: int, *, step_ms: int = 10 * SECOND_MS) -> bool:
    """Return whether the clock is suspect after that time, with a read every `step_ms`."""
    for _ in range(ms // step_ms):
        sources.advance(step_ms)
        daemon_clock.moment()
    return daemon_clock.suspect


def test_a_kernel_that_is_synchronised_for_ten_minutes_is_trusted(sources: ManualClocks, daemon_clock: Clock) -> None:
    sources.wall_ms += 40 * DAY_MS
    assert daemon_clock.suspect
    assert after(sources, daemon_clock, HOUR_MS)
    sources.synchronised = True
    assert after(sources, daemon_clock, 10 * MINUTE_MS)
    with capture_logs() as logs:
        assert not after(sources, daemon_clock, 10 * SECOND_MS)
    assert log_events(logs) == [("clock_trusted", "info")]
    assert logs[0]["reason"] == "the kernel has reported the clock as synchronised for 10 min"
    assert daemon_clock.moment().believed == sources.wall_ms
    looks = sources.synchronisation_reads
    assert not after(sources, daemon_clock, HOUR_MS)
    assert sources.synchronisation_reads == looks, "a trusted clock needs no read"
    sources.wall_ms += 2 * DAY_MS
    assert daemon_clock.suspect, "reads before the step no longer count"


def test_the_ten_minutes_of_synchronisation_restart_after_a_gap(sources: ManualClocks, daemon_clock: Clock) -> None:
    sources.wall_ms += 40 * DAY_MS
    sources.synchronised = True
    assert after(sources, daemon_clock, 9 * MINUTE_MS)
    sources.synchronised = False
    assert after(sources, daemon_clock, 10 * SECOND_MS)
    sources.synchronised = True
    assert after(sources, daemon_clock, 10 * MINUTE_MS)
    sources.advance(MINUTE_MS + 1)  # no read in this time, so synchronisation is unknown
    assert daemon_clock.suspect
    assert after(sources, daemon_clock, 10 * MINUTE_MS - 10 * SECOND_MS)
    sources.wall_ms += HOUR_MS  # the kernel has not confirmed this time long enough
    assert daemon_clock.suspect
    assert after(sources, daemon_clock, 10 * MINUTE_MS - 10 * SECOND_MS)
    assert not after(sources, daemon_clock, 10 * SECOND_MS)


def test_a_busy_daemon_asks_the_kernel_once_a_second(sources: ManualClocks, daemon_clock: Clock) -> None:
    sources.wall_ms += 40 * DAY_MS
    assert after(sources, daemon_clock, 10 * SECOND_MS, step_ms=10)
    assert sources.synchronisation_reads == 10


@pytest.mark.parametrize(
    ("state", "status", "synchronised"), [(0, 0, True), (5, 0x40, False), (5, 0, True), (-1, 0, False)]
)
def test_synchronisation_is_read_from_the_kernels_status(
    monkeypatch: pytest.MonkeyPatch, state: int, status: int, synchronised: bool
) -> None:
    def adjtimex(timex: Any) -> int:
        assert timex._obj.modes == 0, "it must set nothing"
        timex._obj.status = status
        return state

    monkeypatch.setattr(clock_module, "_adjtimex", adjtimex)
    assert is_synchronised() is synchronised


def test_a_system_without_adjtimex_is_not_synchronised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock_module, "_adjtimex", None)
    assert not is_synchronised()


def test_the_real_kernel_reports_its_synchronisation() -> None:
    buffer = ctypes.create_string_buffer(512)
    state = ctypes.CDLL(None).adjtimex(buffer)
    unsynchronised = bool(int.from_bytes(buffer.raw[40:44], sys.byteorder) & 0x40)
    assert is_synchronised() is (state >= 0 and not unsynchronised)


@given(st.lists(st.tuples(st.integers(-1_000, 5_000), st.integers(-(10**9), 10**9), st.sampled_from("hrn"))))
def test_lock_time_is_monotonic_and_bounded_for_any_clocks(
    steps: list[tuple[int, int, str]],
) -> None:
    sources = ManualClocks()
    daemon_clock = clock(sources, lock_ms=7)
    last, forward = LockMs(7), 0
    for boot_ms, wall_ms, what in steps:
        sources.boot_ms += boot_ms
        sources.wall_ms += wall_ms
        forward += max(0, boot_ms)
        if what == "h":
            daemon_clock.hold()
        elif what == "r":
            daemon_clock.resume()
        at = daemon_clock.moment()
        assert last <= at.lock_ms <= LockMs(7 + forward)
        assert abs(at.now - at.wall(at.lock_ms)) <= 1
        last = at.lock_ms


def test_the_default_clocks_are_those_of_the_system() -> None:
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000
    daemon_clock = Clock(Numbers(lock_ms=LockMs(42)))
    assert daemon_clock.moment().lock_ms >= LockMs(42)
    assert BootMs(before) <= boot_clock_ms()
    assert abs(wall_clock_ms() - time.time() * 1_000) < 60_000
