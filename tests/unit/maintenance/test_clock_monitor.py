"""Pauses of the daemon and steps back of the wall clock: reported once, before anything is decided."""

from __future__ import annotations

import asyncio

import pytest

from jobd.engine.clock import Clock
from jobd.maintenance import clock_monitor
from jobd.maintenance.clock_monitor import PAUSED_AFTER_MS, SET_AHEAD_MS, SET_BACK_MS, ClockMonitor
from jobd.model.clocks import BootMs, LockMs
from jobd.model.job import DAY_MS, HOUR_MS

WALL = 1_700_000_000_000


def ignore(ms: int, time: object) -> None:
    raise AssertionError(f"{ms} ms were reported")


class WatchedClock:
    """A clock whose boot and wall time the test sets, and what its monitor reports."""

    def __init__(self) -> None:
        self.boot_ms, self.wall_ms = 1_000, WALL
        self.clock = Clock(
            wall=lambda: self.wall_ms, boot=lambda: BootMs(self.boot_ms), synchronised=lambda: False, keep_ms=7 * DAY_MS
        )
        self.pauses: list[tuple[int, LockMs]] = []
        self.steps: list[tuple[int, int]] = []
        self.steps_ahead: list[int] = []
        self._monitor = ClockMonitor(
            lambda pause_ms, since: self.pauses.append((pause_ms, since)),
            lambda back_ms, until: self.steps.append((back_ms, until)),
            self.clock.moment,
            boot=lambda: BootMs(self.boot_ms),
            on_set_ahead=self.steps_ahead.append,
        )

    def passes(self, ms: int, *, step_ms: int = 0) -> None:
        """Let time pass, step the wall clock, and check."""
        self.boot_ms += ms
        self.wall_ms += ms + step_ms
        self._monitor.check()


def test_a_long_pause_is_reported_once_and_a_short_one_is_not() -> None:
    watched = WatchedClock()
    for ms in (0, PAUSED_AFTER_MS, 1, PAUSED_AFTER_MS + 1, 0, 40_000):
        watched.passes(ms)
    assert watched.pauses == [
        (PAUSED_AFTER_MS + 1, LockMs(PAUSED_AFTER_MS + 1)),
        (40_000, LockMs(2 * (PAUSED_AFTER_MS + 1))),
    ]
    assert watched.steps == []


def test_a_pause_while_lock_time_stands_still_revives_no_lock() -> None:
    watched = WatchedClock()
    watched.passes(1_000)
    watched.clock.hold()
    watched.passes(40_000)
    assert watched.pauses == [(40_000, LockMs(1_000))]
    assert watched.clock.moment().lock_ms == 1_000


def test_a_step_back_of_the_wall_clock_is_reported_once_and_a_small_one_or_one_ahead_is_not() -> None:
    watched = WatchedClock()
    for step_ms in (0, 1, 1 - SET_BACK_MS, HOUR_MS, -SET_BACK_MS, 0, -HOUR_MS):
        watched.passes(10, step_ms=step_ms)
    until = [WALL + 50 + 1 + 1 - SET_BACK_MS + HOUR_MS, WALL + 70 + 2 - 2 * SET_BACK_MS + HOUR_MS]
    assert watched.steps == [(SET_BACK_MS, until[0]), (HOUR_MS, until[1])]
    assert watched.pauses == []


def test_a_step_back_during_a_pause_is_reported() -> None:
    watched = WatchedClock()
    watched.passes(40_000, step_ms=-30_000)
    assert watched.steps == [(30_000, WALL + 40_000)]


def test_what_a_suspect_clock_showed_does_not_count() -> None:
    watched = WatchedClock()
    watched.passes(10, step_ms=40 * DAY_MS)
    watched.passes(10, step_ms=-40 * DAY_MS)
    assert watched.steps == [(40 * DAY_MS, WALL + 20)]


def test_a_step_ahead_is_reported_once_unless_it_makes_the_clock_suspect() -> None:
    watched = WatchedClock()
    for ms, step_ms in ((1_000, SET_AHEAD_MS - 1), (1_000, 0), (1_000, 2 * HOUR_MS), (1_000, 0), (40_000, 0)):
        watched.passes(ms, step_ms=step_ms)
    assert watched.steps_ahead == [2 * HOUR_MS]
    watched.clock.hold()  # lock time stands still, and the wall clock goes on
    watched.passes(20_000)
    watched.passes(1_000, step_ms=40 * DAY_MS)
    assert watched.clock.suspect
    assert watched.steps_ahead == [2 * HOUR_MS]
    assert watched.steps == []


async def test_an_idle_daemon_is_not_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock_monitor, "CHECK_EVERY_S", 0)
    reads, enough = 0, asyncio.Event()

    def boot() -> BootMs:
        nonlocal reads
        reads += 1
        if reads == 10:
            enough.set()
        return BootMs(reads * PAUSED_AFTER_MS)

    monitor = ClockMonitor(ignore, ignore, Clock(wall=lambda: WALL, boot=lambda: BootMs(0)).moment, boot=boot)
    running = asyncio.create_task(monitor.run())
    await enough.wait()
    monitor.stop()
    await running
