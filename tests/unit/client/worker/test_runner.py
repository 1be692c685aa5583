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
from jobd.client.worker.lock_keeper import LockKeeper
from jobd.client.worker.runner import Execution, WorkerRunner, describe_drain, on_signals
from jobd.model.commands import About
from tests.support.client_harness import GRANT, JOB
from tests.support.polling import wait_until
from tests.support.scripted_server import ScriptedServer, ok, rejected


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


async def _begin(keeper: LockKeeper) -> Execution:
    raise AssertionError("began after the stop")


async def stopped_during_its_claim(server: ScriptedServer, endpoint: str) -> None:
    """Run a worker, and stop it when the server has received its claim."""
    async with AsyncJobClient(endpoint) as client:
        runner = WorkerRunner(client, ClaimOptions(worker="w"), _begin, print)
        running = asyncio.create_task(runner.run())
        await wait_until(lambda: bool(server.received))
        runner.stop()
        await running


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

    server.early = [grant_later]
    server.always = lambda received: ok(JOB)
    async with AsyncJobClient(endpoint) as client:
        runner = WorkerRunner(client, ClaimOptions(worker="w"), _begin, print)
        running = asyncio.create_task(runner.run())
        await asyncio.to_thread(claimed.wait)
        stop(runner)
        for _ in range(10):  # a claim that is cancelled at once ends here
            await asyncio.sleep(0)
        go.set()
        await running
    assert [received.path for received in server.received] == ["/v1/jobs/j1/release"]


async def test_a_grant_that_was_missed_is_released(
    server: ScriptedServer, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon rejects the key of the claim with another body, so it has granted a job or the claim still waits."""
    monkeypatch.setattr(claimer, "ARRIVAL_S", 0)
    monkeypatch.setattr(claimer, "PROBE_S", 60)
    reused = rejected("idempotency_key_reused", 422)
    server.script = [server.hang, reused, ok({"grants": [GRANT]}), ok(JOB)]
    await stopped_during_its_claim(server, endpoint)
    first, probe, repeat, release = server.received
    assert len({received.headers["Idempotency-Key"] for received in (first, probe, repeat)}) == 1
    assert first.body == repeat.body
    assert first.json == {**probe.json, "wait_ms": claimer.POLL_MS}
    assert release.path == "/v1/jobs/j1/release"


async def test_a_grant_of_a_repeated_claim_is_renewed_at_once(server: ScriptedServer, endpoint: str) -> None:
    """The daemon may have granted it when the first request arrived."""
    state = {"lock_expires_at": 1, "ttl_ms": 3_600_000, "progress_due_at": None}
    server.script = [rejected("outcome_unknown", 503), ok({"grants": [GRANT | state]}), ok(state), ok(JOB)]

    async def begin(keeper: LockKeeper) -> Execution:
        await wait_until(lambda: len(server.received) == 3)
        raise OSError("the program cannot be started")

    async with AsyncJobClient(endpoint) as client:
        await WorkerRunner(client, ClaimOptions(worker="w"), begin, print).run()
    assert [each.path for each in server.received[2:]] == ["/v1/jobs/j1/extend", "/v1/jobs/j1/release"]


async def test_a_stopped_claim_without_grants_is_probed_once(
    server: ScriptedServer, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claimer, "ARRIVAL_S", 0)
    monkeypatch.setattr(claimer, "PROBE_S", 60)
    server.script = [server.hang, ok({"grants": []})]
    await stopped_during_its_claim(server, endpoint)
    assert len(server.received) == 2


def test_the_message_at_a_stop_names_three_jobs() -> None:
    again = "a second Ctrl-C or SIGTERM asks them to stop"
    assert describe_drain(list("abcde"), 0.5) == f"stopping: waiting up to 500 ms for a, b, c and 2 more; {again}"


async def test_a_worker_obeys_directives_and_keeps_them(server: ScriptedServer, endpoint: str) -> None:
    given = [("quiet", "bad", {}), ("quiet", None, {"rule": "q7"}), ("resume", None, {}), ("stop", "x", {})]
    told = [{"action": action, "by": "admin:ana", "reason": reason, **rule} for action, reason, rule in given]
    server.script = [ok({"grants": [], "directive": each}) for each in told]
    server.always = lambda received: ok({"worker": "w", "state": "gone"})
    lines: list[str] = []
    async with AsyncJobClient(endpoint) as client:
        options = ClaimOptions(worker="w", about=About(instance="i"), concurrency=4)
        runner = WorkerRunner(client, options, _begin, lines.append)
        await runner.run()
    assert runner.was_stopped
    *claims, goodbye = server.received
    limits = [(each.json["limit"], each.json["about"].get("quiet", False)) for each in claims]
    assert limits == [(4, False), (0, True), (0, True), (4, False)]
    assert goodbye.path == "/v1/workers/w/goodbye"
    assert lines == [
        "worker w was told by operator ana to take no new jobs: bad",
        "worker w gets no jobs while quiet rule q7 of operator ana lasts",
        "worker w was told by operator ana to take jobs again",
        "worker w was stopped by operator ana: x",
    ]
