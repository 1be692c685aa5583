"""Runs of a worker from its first claim to the end of its drain."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable
from types import FrameType

import pytest
from aiohttp import web

from jobd.client import AsyncJobClient
from jobd.client.worker import claimer
from jobd.client.worker.claimer import ClaimOptions
from jobd.client.worker.lease import LeaseKeeper
from jobd.client.worker.runner import Execution, WorkerRunner, on_signals
from tests.support.client_harness import GRANT, JOB
from tests.support.scripted_server import ScriptedServer, ok


@pytest.mark.parametrize("first", [None, print], ids=["alone", "with a first call"])
async def test_the_signal_handlers_of_the_program_are_restored(first: Callable[[], None] | None) -> None:
    of_the_test = signal.signal(signal.SIGTERM, _own_handler), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with on_signals(print, first):
            assert signal.getsignal(signal.SIGTERM) is not _own_handler
        assert signal.getsignal(signal.SIGTERM) is _own_handler
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, of_the_test[0])
        signal.signal(signal.SIGINT, of_the_test[1])


def _own_handler(number: int, frame: FrameType | None) -> None:
    raise AssertionError("no signal was sent")


@pytest.mark.parametrize("stop", [WorkerRunner.stop, WorkerRunner.stop_claiming], ids=["stop", "stop claiming"])
async def test_a_grant_that_arrives_after_the_stop_is_released(
    server: ScriptedServer, endpoint: str, stop: Callable[[WorkerRunner], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claimer, "ARRIVAL_S", 60)
    claimed, go = threading.Event(), threading.Event()

    async def grant_later(request: web.BaseRequest) -> web.StreamResponse:
        claimed.set()
        await asyncio.to_thread(go.wait)
        response = ok({"grants": [GRANT]})(request)
        assert response is not None
        return response

    async def begin(keeper: LeaseKeeper) -> Execution:
        raise AssertionError("began after the stop")

    server.early = [grant_later]
    server.always = lambda received: ok(JOB)
    async with AsyncJobClient(endpoint) as client:
        runner = WorkerRunner(client, ClaimOptions(worker="w"), begin, print)
        running = asyncio.create_task(runner.run())
        await asyncio.to_thread(claimed.wait)
        stop(runner)
        for _ in range(10):  # a claim that is cancelled at once ends here
            await asyncio.sleep(0)
        go.set()
        await running
    assert [received.path for received in server.received] == ["/v1/jobs/j1/release"]
