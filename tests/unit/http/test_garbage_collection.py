"""Requests create no reference cycles, which would be left to the slow garbage collector."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jobd.engine.envelope import Envelope
from tests.integration.test_command_stream import RawCommandStream
from tests.support.http_harness import request_bytes
from tests.support.virtual_engine import until
from tests.support.worker_api_server import WorkerApiServer, worker_api_server


@pytest.fixture(name="server")
async def _server(tmp_path: Path) -> AsyncIterator[WorkerApiServer]:
    async with worker_api_server(tmp_path) as opened:
        yield opened


@contextmanager
def left_over() -> Iterator[list[Envelope]]:
    """Collect the commands that are kept alive only by reference cycles."""
    left: list[Envelope] = []
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield left
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left += [each for each in gc.garbage if isinstance(each, Envelope)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        if was_on:
            gc.enable()


async def test_requests_leave_no_garbage(server: WorkerApiServer) -> None:
    client = await server.harness.connect()
    with left_over() as left:
        assert (await client.request("POST", "/v1/jobs", '{"id":"a"}')).status == 201
        assert (await client.request("POST", "/v1/jobs", '{"id":"b"}', {"Idempotency-Key": "k"})).status == 201
        assert (await client.request("POST", "/v1/jobs/nobody/start", '{"worker":"w"}')).status == 404
        assert (await client.request("POST", "/v1/claim", '{"worker":"w","queues":["x"],"wait_ms":1}')).status == 200
        grant = (await client.request("POST", "/v1/claim", '{"worker":"w"}')).data["grants"][0]
        body = f'{{"lock_id":"{grant["lock_id"]}"}}'
        assert (await client.request("POST", f"/v1/jobs/{grant['job']['id']}/complete", body)).status == 200
        assert (await client.request("GET", "/v1/jobs/a")).status == 200
    assert left == []


async def test_clients_that_disconnect_leave_no_garbage(server: WorkerApiServer) -> None:
    client = await server.harness.connect()
    with left_over() as left:
        client.send(request_bytes("POST", "/v1/claim", '{"worker":"w","wait_ms":60000}'))
        await until(lambda: len(server.actor.waiting_claims) > 0)
        client.writer.close()
        await until(lambda: not server.actor.waiting_claims)
    assert left == []


def both_wait(server: WorkerApiServer) -> bool:
    waiting = server.actor.waiting_claims.first("default", "")
    return waiting is not None and len(waiting.futures) == 2


async def test_a_key_repeated_while_its_claim_waits_leaves_no_garbage(server: WorkerApiServer) -> None:
    lines = [await server.harness.connect() for _ in range(2)]
    with left_over() as left:
        for line in lines:
            line.send(request_bytes("POST", "/v1/claim", '{"worker":"w","wait_ms":60000}', {"Idempotency-Key": "k"}))
        await until(lambda: both_wait(server))
        assert (await server.harness.request("POST", "/v1/jobs", "{}")).status == 201
        assert [(await line.receive()).status for line in lines] == [200, 200]
    assert left == []


async def test_lines_of_a_stream_leave_no_garbage(server: WorkerApiServer) -> None:
    stream = await RawCommandStream.open(server.harness)
    with left_over() as left:
        assert (await stream.ask(op="create", id="a"))["status"] == 201
        assert (await stream.ask(op="start", id="nobody", worker="w"))["status"] == 404
        grant = (await stream.ask(op="claim", worker="w"))["data"]["grants"][0]
        assert (await stream.ask(op="complete", id="a", lock_id=grant["lock_id"]))["status"] == 200
    assert left == []
    stream.end()
    assert await stream.receive() is None


async def test_an_aborted_stream_leaves_no_garbage(server: WorkerApiServer) -> None:
    stream = await RawCommandStream.open(server.harness)
    with left_over() as left:
        server.disk.gate.clear()
        stream.send({"op": "create", "id": "a"})
        await server.disk.at_gate.wait()
        stream.send({"op": "create", "id": "b"})
        await until(lambda: server.actor.waiting > 0)
        stream.connection.writer.close()
        await until(lambda: not server.harness.listener.connections)
        server.disk.gate.set()
        assert (await server.harness.request("GET", "/v1/jobs")).status == 200
        del stream
    assert left == []
