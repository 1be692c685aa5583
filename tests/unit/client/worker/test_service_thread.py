"""The service thread of a worker, and its messages."""

from __future__ import annotations

import asyncio
import threading

import pytest

from jobd.client.worker import service_thread
from jobd.client.worker.service_thread import ServiceThread


async def nothing() -> None:
    pass


async def test_messages_are_written_in_order_and_errors_of_the_log_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_thread, "LOG_S", 60)
    written: list[str] = []

    def log(text: str) -> None:
        if text == "1":
            raise OSError("full")
        written.append(text)

    service = ServiceThread("service")
    later = service.background(log)
    for number in range(4):
        later(str(number))
    await service.run(nothing, pytest.fail)
    assert written == ["0", "2", "3"]
    later("too late")


async def test_a_blocked_log_does_not_block_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_thread, "LOG_S", 0.05)
    go = threading.Event()

    def blocks(text: str) -> None:
        go.wait()

    service = ServiceThread("service")
    service.background(blocks)("text")
    running = asyncio.create_task(service.run(nothing, pytest.fail))
    try:
        await asyncio.wait([running], timeout=10)
        assert running.done()
    finally:
        go.set()
    await running
