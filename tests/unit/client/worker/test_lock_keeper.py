"""Workers against a scripted daemon: errors that a healthy daemon does not return."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

import jobd
from jobd.client import (
    AsyncHandlerContext,
    AsyncJobClient,
    Forbidden,
    InvalidRequest,
    JobdError,
    NotFound,
    Retry,
    Unauthorized,
    Unreachable,
    Worker,
)
from jobd.client.worker import lock_keeper
from jobd.client.worker.lock_keeper import LockKeeper, describe_failure
from jobd.model.responses import GrantView, JobView, LockState
from tests.support.client_harness import GRANT, JOB, TTL_MS, ScriptedDaemon, nothing, running_worker, working
from tests.support.polling import wait_until
from tests.support.scripted_server import ScriptedServer, drop, ok, rejected, serving
from tests.support.virtual_engine import in_virtual_time, seconds


@pytest.fixture(autouse=True)
def fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_keeper, "WAIT_S", 2 * TTL_MS / 1000)


async def test_there_is_no_progress_timeout_by_default(tmp_path: Path) -> None:
    limits: list[tuple[dict[str, Any], int]] = [({}, 0), ({"progress_timeout_ms": 5000}, 5000)]
    for limit, sent in limits:
        async with working(tmp_path, nothing, **limit) as daemon:
            await daemon.receive("complete")
        assert daemon.bodies("claim")[0]["progress_timeout_ms"] == sent


@pytest.mark.parametrize("code", ["overloaded", "shutting_down", "outcome_unknown", "storage_full"])
async def test_complete_is_retried_and_the_lock_extended_meanwhile(tmp_path: Path, code: str) -> None:
    async def work(context: AsyncHandlerContext) -> str:
        return "result"

    async with working(tmp_path, work, responses={"complete": [*[rejected(code, 503)] * 4, ok(JOB)]}) as daemon:
        await daemon.receive("complete", 5)
    assert daemon.bodies("complete") == [{"lock_id": "secret", "metadata": "result"}] * 5
    assert daemon.bodies("extend")
    assert daemon.bodies("fail") == daemon.bodies("release") == []


async def test_a_job_fails_after_repeated_internal_errors_to_its_complete(tmp_path: Path) -> None:
    bug = [rejected("internal_error", 500, "A bug.")]
    async with working(tmp_path, nothing, responses={"complete": bug}) as daemon:
        await daemon.receive("fail")
    assert len(daemon.bodies("complete")) == 5
    (fail,) = daemon.bodies("fail")
    assert fail["error_code"] == "complete:internal_error"
    assert "A bug." in fail["error_message"]


async def test_a_rejected_failure_is_sent_again_without_its_options(tmp_path: Path) -> None:
    async def work(context: AsyncHandlerContext) -> None:
        raise Retry(after=1)

    too_much = rejected("invalid_request", 400, "`retry_after_ms` is too much.")
    async with working(tmp_path, work, responses={"fail": [too_much, ok(JOB)]}) as daemon:
        await daemon.receive("fail", 2)
    assert daemon.bodies("fail")[1]["error_code"] == "fail:invalid_request"
    assert "retry_after_ms" not in daemon.bodies("fail")[1]


@pytest.mark.parametrize("code", ["lock_lost", "invalid_transition", "job_not_found", "job_quarantined"])
async def test_complete_after_the_end_of_the_grant_is_not_retried(
    tmp_path: Path, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with working(tmp_path, nothing, responses={"complete": [rejected(code, 409, "Too late.")]}) as daemon:
        await daemon.receive("claim", 2)
    assert len(daemon.bodies("complete")) == 1
    assert daemon.bodies("fail") == []
    assert "Too late." in caplog.text


@pytest.mark.parametrize(("message", "error"), [(Path("/x"), "TypeError"), ("file-\udcff", "InvalidRequest")])
async def test_progress_that_json_cannot_express_is_an_error_of_the_handler(
    tmp_path: Path, message: Any, error: str
) -> None:
    async def work(context: AsyncHandlerContext) -> None:
        await context.progress(10, message)

    async with working(tmp_path, work) as daemon:
        await daemon.receive("fail")
    assert daemon.bodies("fail")[0]["error_code"] == error


async def test_rejected_progress_extends_the_lock(tmp_path: Path) -> None:
    """Otherwise a handler that often reports progress over 100 would lose its lock."""

    async def work(context: AsyncHandlerContext) -> None:
        for _ in range(20):
            with pytest.raises(InvalidRequest):
                await context.progress(101)

    async with working(tmp_path, work, responses={"progress": [rejected("invalid_request", 400)]}) as daemon:
        await daemon.receive("complete")
    assert len(daemon.bodies("progress")) == 20
    assert len(daemon.bodies("extend")) >= 19


async def test_a_single_error_stops_the_work_only_if_it_is_about_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_keeper, "EXTENSIONS_PER_TTL", 1_000)
    stopped = asyncio.Event()

    async def work(context: AsyncHandlerContext) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    responses = {
        "claim": [ok({"grants": [GRANT | {"ttl_ms": 30_000}]}), ok({"grants": []})],
        "extend": [rejected("unauthorized", 401), rejected("internal_error", 500), rejected("lock_lost", 409)],
    }
    async with working(tmp_path, work, responses=responses) as daemon:
        await stopped.wait()
    assert len(daemon.bodies("extend")) == 3
    assert daemon.bodies("complete") == daemon.bodies("fail") == daemon.bodies("release") == []


@pytest.mark.parametrize("code", ["unauthorized", "forbidden", "not_found"])
async def test_rejections_for_a_ttl_stop_the_work_and_the_worker(
    tmp_path: Path, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(context: AsyncHandlerContext) -> None:
        while True:
            with contextlib.suppress(Unauthorized, Forbidden, NotFound):
                await context.progress(1)
            await asyncio.sleep(0.001)

    rejection = [rejected(code, 401, "Wrong token.")]
    responses = {"claim": [ok({"grants": [GRANT]}), *rejection], "extend": rejection, "progress": rejection}
    with pytest.raises(JobdError) as caught:
        async with working(tmp_path, work, responses=responses) as daemon:
            await daemon.receive("claim", 2)
    assert caught.value.code == code
    assert "All calls were rejected until the lock had expired: Wrong token." in caplog.text
    assert daemon.bodies("complete") == daemon.bodies("fail") == daemon.bodies("release") == []


async def test_an_ending_is_not_retried_after_rejections_for_a_ttl(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rejection = [rejected("unauthorized", 401, "Wrong token.")]
    responses = {"claim": [ok({"grants": [GRANT]}), *rejection], "complete": rejection, "extend": rejection}
    with pytest.raises(Unauthorized):
        async with working(tmp_path, nothing, responses=responses) as daemon:
            await daemon.receive("claim", 2)
    assert "could not complete the job: Wrong token." in caplog.text


async def test_the_time_without_a_daemon_is_no_time_of_rejections(tmp_path: Path) -> None:
    async def work(context: AsyncHandlerContext) -> None:
        await asyncio.Event().wait()

    extend = [drop, drop, rejected("unauthorized", 401), rejected("lock_lost", 409, "Held.")]
    async with working(tmp_path, work, responses={"extend": extend}) as daemon:
        await daemon.receive("claim", 2)
    assert len(daemon.bodies("extend")) == 4


@pytest.mark.parametrize("code", ["storage_full", "internal_error", "overloaded"])
async def test_claims_are_retried_after_temporary_errors(tmp_path: Path, code: str) -> None:
    go = asyncio.Event()

    async def work(context: AsyncHandlerContext) -> None:
        await go.wait()

    claim = [rejected(code, 500), ok({"grants": [GRANT]}), ok({"grants": []})]
    async with working(tmp_path, work, responses={"claim": claim}) as daemon:
        await daemon.receive("extend")  # at once, because the grant may be old
        go.set()
        await daemon.receive("complete")
        await daemon.receive("claim", 3)
    keys = [received.headers["Idempotency-Key"] for received in daemon.server.received if received.path == "/v1/claim"]
    assert keys[0] == keys[1] != keys[2]


async def test_a_third_stop_ends_the_retries_of_complete(tmp_path: Path) -> None:
    daemon = ScriptedDaemon(complete=[drop], extend=[drop])
    with serving(daemon.server, tmp_path / "p") as endpoint:
        worker = Worker(endpoint)
        worker.handler()(lambda context: None)
        async with running_worker(worker) as serving_:
            await daemon.receive("complete", 2)
            for _ in range(3):
                worker.stop()
            await serving_


async def test_a_worker_describes_itself(tmp_path: Path) -> None:
    daemon = ScriptedDaemon()
    with serving(daemon.server, tmp_path / "p") as endpoint:
        worker = Worker(endpoint, concurrency=3)
        worker.handler(lambda context: None)
        async with running_worker(worker):
            await daemon.receive("claim", 2)
        before = len(daemon.bodies("claim"))
        async with running_worker(worker):
            await daemon.receive("claim", before + 1)
    claim = daemon.bodies("claim")[0]
    assert (claim["stall_after_ms"], claim["lock_ttl_ms"]) == (0, 60_000)
    first, second, other = (daemon.bodies("claim")[each]["about"] for each in (0, 1, before))
    assert first == second
    assert first["instance"] != other["instance"], "of the same name, but another run"
    assert {**first, "instance": None} == {
        "instance": None,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "version": jobd.__version__,
        "concurrency": 3,
    }


async def test_a_stop_before_the_start_ends_a_worker_before_its_first_claim(tmp_path: Path) -> None:
    daemon = ScriptedDaemon()
    with serving(daemon.server, tmp_path / "p") as endpoint:
        worker = Worker(endpoint)
        worker.handler()(print)
        worker.stop()
        await worker.serve()
        assert daemon.server.received == []
        async with running_worker(worker):  # it can be started again
            await daemon.receive("claim")


async def test_the_end_of_a_lease_ends_all_waits_for_progress(tmp_path: Path) -> None:
    server = ScriptedServer()
    server.always = lambda received: server.hang if received.path.endswith("/progress") else ok(JOB)
    with serving(server, tmp_path / "p") as endpoint:
        async with AsyncJobClient(endpoint) as client:
            keeper = LockKeeper(client, msgspec.json.decode(msgspec.json.encode(GRANT), type=GrantView), print)
            keeper.start()
            sent = keeper.report(1)
            await wait_until(lambda: bool(server.received))
            pending = keeper.report(2)
            await keeper.stop()
            assert sent.done()
            assert pending.done()


class LateClient:
    """A client that records the bodies of requests. Each call ends when the test lets it."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.goes_on = asyncio.Event()

    async def send(self, request: Any, *_: object) -> LockState:
        self.bodies.append(msgspec.json.decode(request.body))
        await self.goes_on.wait()
        return LockState(lock_expires_at=1, ttl_ms=15_000, progress_due_at=None)


@in_virtual_time
async def test_a_report_that_replaces_another_keeps_its_checkpoint() -> None:
    client, grant = LateClient(), msgspec.json.decode(msgspec.json.encode(GRANT), type=GrantView)
    keeper = LockKeeper(cast(AsyncJobClient, client), grant, print)
    keeper.start()
    keeper.report(1, checkpoint={"page": 1})
    await seconds(0.1)
    keeper.report(2, checkpoint=None)
    keeper.report(3, "three")
    keeper.report(4)
    client.goes_on.set()
    await seconds(0.1)
    keeper.report(5, checkpoint=[6])
    await keeper.release(asyncio.Event())
    sent = [{name: value for name, value in body.items() if name != "lock_id"} for body in client.bodies]
    assert sent == [
        {"progress": 1, "checkpoint": {"page": 1}},
        {"progress": 4, "checkpoint": None},
        {"progress": 5, "checkpoint": [6]},
        {},
    ]


class SlowClient:
    """A client whose calls take a second. The first ones fail. The daemon sets another TTL than that of the grant."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.sent_s: list[float] = []

    async def send(self, *_: object) -> LockState:
        loop_time = asyncio.get_running_loop().time
        self.sent_s.append(loop_time())
        await asyncio.sleep(1)
        if len(self.sent_s) <= self.failures:
            raise Unreachable("The daemon does not respond.")
        return LockState(lock_expires_at=1, ttl_ms=15_000, progress_due_at=None)


@pytest.mark.parametrize("failures", [0, 2])
@pytest.mark.parametrize(("at_once", "first_s"), [(False, 10.0), (True, 0.0)])
def test_the_lock_is_extended_first_and_then_at_a_third_of_its_ttl(
    at_once: bool, first_s: float, failures: int
) -> None:
    """Measured from the call before, not from its response. After a failure, it is extended soon."""

    @in_virtual_time
    async def run() -> None:
        client = SlowClient(failures)
        grant = msgspec.json.decode(msgspec.json.encode(GRANT | {"ttl_ms": 30_000}), type=GrantView)
        keeper = LockKeeper(cast("AsyncJobClient", client), grant, lambda _: None)
        began_s = asyncio.get_running_loop().time()
        keeper.start(at_once=at_once)
        await seconds(first_s + 15)
        assert client.sent_s[0] - began_s == pytest.approx(first_s)
        assert client.sent_s[failures] - client.sent_s[0] <= 2 * failures
        later = [sent_s - client.sent_s[failures] for sent_s in client.sent_s[failures:]]
        assert later[:3] == pytest.approx([0, 5, 10])
        assert keeper._extended_s == client.sent_s[failures + 2]
        await keeper.stop()

    run()


@pytest.mark.parametrize(("delay_ms", "retried"), [(0, "at once"), (240, "in 240 ms"), (185_000, "in 3 min 5 s")])
def test_a_failed_attempt_is_reported_with_the_delay_of_its_retry(delay_ms: int, retried: str) -> None:
    fields = JOB | {"status": "queued", "updated_at": 1_000, "run_at": 1_000 + delay_ms}
    job = msgspec.json.decode(msgspec.json.encode(fields), type=JobView)
    assert describe_failure(job, "a reason").endswith(f" failed: a reason; it is retried {retried}.")
