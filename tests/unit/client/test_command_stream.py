"""AsyncJobClient.stream: the same calls with the same results, over breaks and cancelled calls."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from jobd.client import (
    AlreadyLocked,
    AsyncHandlerContext,
    AsyncJobClient,
    InvalidRequest,
    JobNotFound,
    LockLost,
    TooLarge,
    Unauthorized,
    Unreachable,
    Worker,
    command_stream,
    requests,
)
from jobd.client.api_request import ApiRequest, request_for
from jobd.client.apis import WorkerApi
from jobd.client.command_stream import command_line
from jobd.client.retries import RetryOptions
from jobd.http.auth import Authenticator
from tests.support.http_harness import TOKEN
from tests.support.virtual_engine import until
from tests.support.worker_api_server import WorkerApiServer, worker_api_server


@pytest.fixture(name="server")
async def _server(tmp_path: Path) -> AsyncIterator[WorkerApiServer]:
    async with worker_api_server(tmp_path) as opened:
        yield opened


@pytest.fixture
async def client(server: WorkerApiServer) -> AsyncIterator[AsyncJobClient]:
    async with AsyncJobClient(f"unix:{server.harness.path}", retry_for_s=5, timeout_s=5) as opened:
        yield opened


def streams_of(server: WorkerApiServer) -> int:
    return len(server.harness.app.on_close)


# ---------------------------------------------------------------------------------------------------------------------
# Requests as lines.


@pytest.mark.parametrize(
    ("request_", "line"),
    [
        (requests.create_job(5, id="j"), {"op": "create", "id": "j", "payload": 5}),
        (requests.create_jobs([{"id": "j"}]), {"op": "bulk", "jobs": [{"id": "j"}]}),
        (request_for(WorkerApi.get_job, "a:b"), {"op": "get", "id": "a:b"}),
        (request_for(WorkerApi.get_job, ".."), {"op": "get", "id": ".."}),
        (request_for(WorkerApi.start_processing, "j", worker="w"), {"op": "start", "id": "j", "worker": "w"}),
        (requests.claim("w", idempotency_key="k"), {"op": "claim", "worker": "w", "idempotency_key": "k"}),
        (
            request_for(WorkerApi.update_progress, "j", lock_id="l", progress=5),
            {"op": "progress", "id": "j", "lock_id": "l", "progress": 5},
        ),
        (request_for(WorkerApi.extend_job_lock, "j", lock_id="l"), {"op": "extend", "id": "j", "lock_id": "l"}),
        (
            requests.complete_job("j", lock_id="l", metadata=[1]),
            {"op": "complete", "id": "j", "lock_id": "l", "metadata": [1]},
        ),
        (
            request_for(WorkerApi.fail_job, "j", lock_id="l", error_message="m"),
            {"op": "fail", "id": "j", "lock_id": "l", "error_message": "m"},
        ),
        (request_for(WorkerApi.release_job, "j", lock_id="l"), {"op": "release", "id": "j", "lock_id": "l"}),
        (request_for(WorkerApi.cancel_job, "j"), {"op": "cancel", "id": "j"}),
    ],
    ids=lambda given: given["op"] if isinstance(given, dict) else "",
)  # fmt: skip
def test_a_request_as_a_line(request_: ApiRequest[Any], line: dict[str, Any]) -> None:
    text = command_line(request_)
    assert text is not None
    assert text.endswith(b"\n")
    fields = msgspec.json.decode(text)
    if "idempotency_key" not in line:
        fields.pop("idempotency_key", None)  # one that the client made
    assert fields == line


def test_a_payload_of_several_lines_becomes_one_line() -> None:
    text = command_line(requests.create_job(msgspec.Raw(b'{\n"a":\r\n"b\\n"}')))
    assert text is not None
    assert text.count(b"\n") == 1
    assert msgspec.json.decode(text)["payload"] == {"a": "b\n"}


@pytest.mark.parametrize(
    "request_",
    [
        requests.claim("w", wait_ms=5),
        request_for(WorkerApi.list_jobs),
        request_for(WorkerApi.timeline, "j"),
        request_for(WorkerApi.why, "j"),
        request_for(WorkerApi.queues),
        request_for(WorkerApi.validate_job_state, "j"),
        request_for(WorkerApi.workers),
    ],
)
def test_calls_that_wait_or_list_are_not_lines(request_: ApiRequest[Any]) -> None:
    assert command_line(request_) is None


# ---------------------------------------------------------------------------------------------------------------------
# Calls.


async def test_every_call_returns_the_same_as_over_http(server: WorkerApiServer, client: AsyncJobClient) -> None:
    seen: list[list[type]] = []
    for jobs in (client, client.stream()):
        made = await jobs.create_job({"a": [1]}, id=f"a-{len(seen)}", max_attempts=5)
        [bulk] = await jobs.create_jobs([{"id": f"b-{len(seen)}", "queue": f"q-{len(seen)}"}])
        grant = await jobs.start_processing(made.id, worker="w")
        state = await jobs.update_progress(made.id, lock_id=grant.lock_id, progress=5, message="m")
        extended = await jobs.extend_job_lock(made.id, lock_id=grant.lock_id, additional_ms=60_000)
        failed = await jobs.fail_job(made.id, lock_id=grant.lock_id, error_message="no", retry_after_ms=0)
        repeated = await jobs.start_processing(made.id, worker="w")
        done = await jobs.complete_job(made.id, lock_id=repeated.lock_id, metadata={"n": 1})
        [claimed] = await jobs.claim("w", queues=[f"q-{len(seen)}"])
        released = await jobs.release_job(bulk.id, lock_id=claimed.lock_id)
        cancelled = await jobs.cancel_job(bulk.id, reason="r")
        got = await jobs.get_job(made.id)
        page = await jobs.list_jobs(limit=1)
        waited = await jobs.claim("w", queues=["none"], wait_ms=1)
        seen.append([type(each) for each in (made, bulk, grant, state, extended, failed, done, released, got, page)])
        states = [each.status for each in (made, failed, done, released, cancelled, got)]
        assert states == ["queued", "queued", "completed", "queued", "cancelled", "completed"]
        assert (got.metadata_value, got.payload_value, waited) == ({"n": 1}, {"a": [1]}, [])
        if jobs is not client:
            assert streams_of(server) == 1
            await jobs.close()
            assert streams_of(server) == 0
    assert seen[0] == seen[1]


async def test_errors_are_the_same_as_over_http(client: AsyncJobClient) -> None:
    async with client.stream() as jobs:
        with pytest.raises(JobNotFound):
            await jobs.get_job("none")
        await jobs.create_job(id="j")
        await jobs.start_processing("j", worker="w")
        with pytest.raises(AlreadyLocked) as locked:
            await jobs.start_processing("j", worker="v")
        assert locked.value.locked_by == "w"
        with pytest.raises(LockLost):
            await jobs.complete_job("j", lock_id="no")
        with pytest.raises(InvalidRequest):
            await jobs.update_progress("j", lock_id="no", progress=101)
        with pytest.raises(TooLarge):
            await jobs.create_job("x" * 300_000)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_large_body_waits_for_the_consent_of_the_daemon(tmp_path: Path, is_stream: bool) -> None:
    """Otherwise a body over the limit that takes longer than the timeout would be sent again and again."""

    async def reject(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert b"\r\nexpect: 100-continue\r\n" in (await reader.readuntil(b"\r\n\r\n")).lower()
        body = b'{"success":false,"error":"too_large","message":"Too large."}'
        writer.write(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        await reader.read()
        writer.close()

    path = str(tmp_path / "s")
    client = AsyncJobClient(f"unix:{path}", retry_for_s=0, timeout_s=1)
    request = requests.complete_job("j", lock_id="l", metadata="x" * 4 * command_stream.LARGE_BYTES)
    async with await asyncio.start_unix_server(reject, path), client.stream() if is_stream else client as jobs:
        tracemalloc.start()
        with pytest.raises(TooLarge):
            await jobs.send(request)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak_bytes < 2 * command_stream.LARGE_BYTES, "each attempt copies the body"


async def test_a_large_body_arrives_complete(client: AsyncJobClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_stream, "LARGE_BYTES", 100_000)
    payload = "0123456789" * 20_000
    assert (await client.create_job(payload)).payload_value == payload


async def test_concurrent_calls_share_one_stream(server: WorkerApiServer, client: AsyncJobClient) -> None:
    async with client.stream() as jobs:
        made = await asyncio.gather(*(jobs.create_job(number, id=f"j-{number}") for number in range(1_000)))
        assert [job.id for job in made] == [f"j-{number}" for number in range(1_000)]
        assert streams_of(server) == 1
        assert server.harness.listener.connections == 1
    assert len(server.disk.jobs) == 1_000
    assert len(server.disk.batches) < 100


@pytest.mark.parametrize(("concurrency", "streams"), [(7, 0), (8, 1)])
async def test_a_worker_with_high_concurrency_uses_a_stream(
    server: WorkerApiServer, client: AsyncJobClient, concurrency: int, streams: int
) -> None:
    await client.create_jobs([{"id": f"j-{number}"} for number in range(20)])
    worker = Worker(f"unix:{server.harness.path}", concurrency=concurrency)
    seen: list[int] = []

    @worker.handler()
    async def work(context: AsyncHandlerContext) -> None:
        await context.progress(50)
        seen.append(streams_of(server))
        if len(seen) == 20:
            worker.stop()

    await worker.serve()
    assert set(seen) == {streams}
    assert {job.status for job in server.disk.jobs.values()} == {"completed"}
    assert streams_of(server) == 0


async def test_a_wrong_token_is_unauthorized(tmp_path: Path) -> None:
    authenticator = Authenticator("worker", tokens=[TOKEN], hosts=["localhost", "127.0.0.1"])
    async with worker_api_server(tmp_path, authenticator=authenticator) as guarded:
        url = f"http://127.0.0.1:{guarded.harness.port}"
        async with AsyncJobClient(url, token="x" * 30) as client, client.stream() as jobs:
            with pytest.raises(Unauthorized):
                await jobs.create_job()
        async with AsyncJobClient(url, token=TOKEN) as client, client.stream() as jobs:
            assert (await jobs.create_job()).status == "queued"


# ---------------------------------------------------------------------------------------------------------------------
# Failures.


async def test_calls_are_retried_over_a_new_stream(server: WorkerApiServer, client: AsyncJobClient) -> None:
    async with client.stream() as jobs:
        await jobs.create_job(id="a")
        server.disk.gate.clear()
        second = asyncio.ensure_future(jobs.create_job(id="b"))
        await server.disk.at_gate.wait()
        for connection in server.harness.connections:
            assert connection.transport is not None
            connection.transport.abort()
        server.disk.gate.set()
        assert (await second).id == "b"
        assert (await jobs.create_job(id="c")).id == "c"
    assert sorted(job.id for job in server.disk.jobs.values()) == ["a", "b", "c"]


async def test_an_unreachable_daemon_is_an_error(tmp_path: Path) -> None:
    async with AsyncJobClient(f"unix:{tmp_path}/none", retry_for_s=0) as client, client.stream() as jobs:
        for _ in range(2):
            with pytest.raises(Unreachable):
                await jobs.create_job()


async def test_a_response_that_is_late_means_unreachable(server: WorkerApiServer, client: AsyncJobClient) -> None:
    async with client.stream() as jobs:
        await jobs.create_job(id="a")
        server.disk.gate.clear()
        with pytest.raises(Unreachable, match="no response in time"):
            await jobs.send(requests.create_job(id="b"), RetryOptions(total_s=0, timeout_s=0.05))
        server.disk.gate.set()
        assert (await jobs.create_job(id="b")).id == "b"


@pytest.mark.slow
async def test_grants_of_a_cancelled_call_are_released(server: WorkerApiServer, client: AsyncJobClient) -> None:
    async with client.stream() as jobs:
        for job_id in ("a", "b", "c"):
            await jobs.create_job(id=job_id)
        server.disk.gate.clear()
        first = asyncio.ensure_future(jobs.cancel_job("c"))
        await server.disk.at_gate.wait()
        cancelled = [
            asyncio.ensure_future(each)
            for each in (
                jobs.claim("w"),
                jobs.start_processing("b", worker="w"),
                jobs.start_processing("c", worker="w"),
            )
        ]
        await until(lambda: server.actor.waiting == 3)
        for each in cancelled:
            each.cancel()
        await asyncio.wait(cancelled)
        server.disk.gate.set()
        await first
        for job_id in ("a", "b"):
            while (job := await jobs.get_job(job_id)).status != "queued":
                pass
            assert job.attempt == 0


@pytest.mark.parametrize("is_claim", [True, False])
async def test_a_closing_stream_releases_the_grant_of_a_cancelled_call(
    server: WorkerApiServer, client: AsyncJobClient, is_claim: bool
) -> None:
    jobs = client.stream()
    await jobs.create_job(id="a")
    await jobs.create_job(id="b")
    server.disk.gate.clear()
    first = asyncio.ensure_future(jobs.cancel_job("b"))
    await server.disk.at_gate.wait()
    cancelled = asyncio.ensure_future(jobs.claim("w") if is_claim else jobs.start_processing("a", worker="w"))
    await until(lambda: server.actor.waiting == 1)
    cancelled.cancel()
    await asyncio.wait([cancelled])
    closing = asyncio.ensure_future(jobs.close())
    await asyncio.sleep(0)
    server.disk.gate.set()
    await asyncio.gather(first, closing)
    job = await client.get_job("a")
    assert (job.status, job.attempt) == ("queued", 0)
    assert [event.type for event in await client.timeline("a")] == ["created", "granted", "released"]


async def test_closing_waits_for_pending_responses(server: WorkerApiServer, client: AsyncJobClient) -> None:
    jobs = client.stream()
    await jobs.create_job(id="a")
    server.disk.gate.clear()
    last = asyncio.ensure_future(jobs.create_job(id="b"))
    await server.disk.at_gate.wait()
    closing = asyncio.ensure_future(jobs.close())
    await asyncio.sleep(0.01)
    assert not closing.done()
    server.disk.gate.set()
    await closing
    assert (await last).id == "b"


async def test_closing_does_not_wait_for_a_server_that_does_not_respond(
    server: WorkerApiServer, client: AsyncJobClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_stream, "CLOSE_S", 0.05)
    jobs = client.stream()
    await jobs.create_job(id="a")
    server.disk.gate.clear()
    last = asyncio.ensure_future(jobs.send(requests.create_job(id="b"), RetryOptions(total_s=0)))
    await server.disk.at_gate.wait()
    await jobs.close()
    with pytest.raises(Unreachable):
        await last
    server.disk.gate.set()
