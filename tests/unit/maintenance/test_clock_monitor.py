"""Pauses of the daemon and steps back of the wall clock: reported once, before anything is decided."""

from __future__ import annotations

import asyncio

import pytest

from jobd.maintenance import clock_monitor
from jobd.maintenance.clock_monitor import PAUSED_AFTER_MS, SET_BACK_MS, ClockMonitor


def ignore(ms: int) -> None:
    raise AssertionError(f"{ms} ms were reported")


class ManualClock:
    def __init__(self) -> None:
        self.now_ms = 1_000

    def __call__(self) -> int:
        return self.now_ms


def test_a_long_pause_is_reported_once_and_a_short_one_is_not() -> None:
    boot, reported = ManualClock(), list[int]()
    monitor = ClockMonitor(reported.append, ignore, boot=boot)
    for gap_ms in (0, PAUSED_AFTER_MS, 1, PAUSED_AFTER_MS + 1, 0, 40_000):
        boot.now_ms += gap_ms
        monitor.check()
    assert reported == [PAUSED_AFTER_MS + 1, 40_000]


def test_a_step_back_of_the_wall_clock_is_reported_once_and_a_small_one_or_one_ahead_is_not() -> None:
    wall, reported = ManualClock(), list[int]()
    monitor = ClockMonitor(ignore, reported.append, boot=lambda: 0, wall=wall)
    for step_ms in (0, 1, 1 - SET_BACK_MS, 3_600_000, -SET_BACK_MS, 0, -3_600_000):
        wall.now_ms += step_ms
        monitor.check()
    assert reported == [SET_BACK_MS, 3_600_000]


async def test_an_idle_daemon_is_not_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock_monitor, "CHECK_EVERY_S", 0)
    reported, reads, enough = list[int](), 0, asyncio.Event()

    def boot() -> int:
        nonlocal reads
        reads += 1
        if reads == 10:
            enough.set()
        return reads * PAUSED_AFTER_MS

    monitor = ClockMonitor(reported.append, ignore, boot=boot)
    beating = asyncio.create_task(monitor.run())
    await enough.wait()
    monitor.stop()
    await beating
    assert reported == []
