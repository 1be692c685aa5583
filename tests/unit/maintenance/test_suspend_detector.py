"""Pauses of the daemon: reported once, before anything is decided, and not for an idle daemon."""

from __future__ import annotations

import asyncio

import pytest

from jobd.maintenance import suspend_detector
from jobd.maintenance.suspend_detector import PAUSED_AFTER_MS, SuspendDetector


class ManualBootClock:
    def __init__(self) -> None:
        self.now_ms = 1_000

    def __call__(self) -> int:
        return self.now_ms


def test_a_long_pause_is_reported_once_and_a_short_one_is_not() -> None:
    boot, reported = ManualBootClock(), list[int]()
    detector = SuspendDetector(reported.append, boot=boot)
    for gap_ms in (0, PAUSED_AFTER_MS, 1, PAUSED_AFTER_MS + 1, 0, 40_000):
        boot.now_ms += gap_ms
        detector.check()
    assert reported == [PAUSED_AFTER_MS + 1, 40_000]


async def test_an_idle_daemon_is_not_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspend_detector, "CHECK_EVERY_S", 0)
    reported, reads, enough = list[int](), 0, asyncio.Event()

    def boot() -> int:
        nonlocal reads
        reads += 1
        if reads == 10:
            enough.set()
        return reads * PAUSED_AFTER_MS

    detector = SuspendDetector(reported.append, boot=boot)
    beating = asyncio.create_task(detector.run())
    await enough.wait()
    detector.stop()
    await beating
    assert reported == []
