"""Listener and actor together over real sockets: the life of a job, repeated keys, disconnected clients."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from jobd.api import admin_routes as admin_api
from jobd.api import worker_routes as worker_api
from jobd.core.state import State
from jobd.engine.actor import Actor
from jobd.engine.clock import Clock
from jobd.engine.idempotency import IdempotencyStore
from jobd.http.auth import Authenticator
from jobd.model.job import Policy
from tests.support.http_harness import TOKEN, HttpHarness, request_bytes
from tests.support.memory_storage import MemoryStorage
from tests.support.polling import wait_until

AUTH = {"Authorization": f"Bearer {TOKEN}"}
ADMIN = "/admin/job-management"


class BothApis:
    """One actor behind a worker listener and an admin listener."""

    def __init__(self, worker: HttpHarness, admin: HttpHarness, actor: Actor, disk: MemoryStorage) -> None:
        self.worker = worker
        self.admin = admin
        self.actor = actor
        self.disk = disk

    async def post(self, target: str, body: str = "", **headers: str) -> Any:
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        response = await self.worker.request("POST", target, body, fields)
        assert response.status < 300, response.json
        return response.data

    async def job(self, job_id: str) -> Any:
        return (await self.worker.request("GET", f"/v1/jobs/{job_id}")).data


@pytest.fixture
async def apis(tmp_path: Path) -> AsyncIterator[BothApis]:
    disk = MemoryStorage()
    opened = disk.opened()
    state = State.opened(opened)
    actor = Actor(disk, state, IdempotencyStore([], 100), Clock(), Policy(), random=os.urandom)
    running = asyncio.create_task(actor.run())
    (tmp_path / "admin").mkdir()
    async with contextlib.AsyncExitStack() as stack:
        worker = await stack.enter_async_context(HttpHarness(worker_api.ROUTES, tmp_path, actor=actor))
        authenticator = Authenticator("admin", tokens=[TOKEN])
        admin = HttpHarness(admin_api.ROUTES, tmp_path / "admin", authenticator=authenticator, admin=True, actor=actor)
        await stack.enter_async_context(admin)
        yield BothApis(worker, admin, actor, disk)
        actor.end_claim_waits()
    actor.stop()
    await running


async def test_a_job_lifecycle_over_a_stream(apis: BothApis) -> None:
    response = await apis.worker.request("POST", "/v1/jobs", '{"id":"job-1","payload":{"n":[1,2.50]}}')
    assert (response.status, response.data["status"], response.data["payload"]) == (201, "queued", {"n": [1, 2.5]})
    assert (await apis.worker.request("POST", "/v1/jobs", '{"id":"job-1","payload":{"n":[1,2.50]}}')).status == 200
    assert (await apis.worker.request("POST", "/v1/jobs", '{"id":"job-1"}')).error == "job_exists"

    [grant] = (await apis.post("/v1/claim", '{"worker":"w-1"}'))["grants"]
    assert (grant["job"]["id"], grant["job"]["lock"]["worker"]) == ("job-1", "w-1")
    lock_id = grant["lock_id"]
    state = await apis.post("/v1/jobs/job-1/progress", f'{{"lock_id":"{lock_id}","progress":40,"message":"m"}}')
    assert state["cancel_requested"] is False
    response = await apis.worker.request("POST", "/v1/jobs/job-1/start", '{"worker":"w-2"}')
    assert (response.status, response.error, response.json["details"]["locked_by"]) == (409, "already_locked", "w-1")

    assert "lock_id" not in (await apis.job("job-1"))["lock"]
    seen = (await apis.admin.request("GET", f"{ADMIN}/jobs/job-1", headers=AUTH)).data
    assert seen["lock"]["lock_id"] == lock_id

    done = await apis.post("/v1/jobs/job-1/complete", f'{{"lock_id":"{lock_id}","metadata":{{"size":1}}}}')
    assert (done["status"], done["progress"], done["metadata"]) == ("completed", 100, {"size": 1})
    repeated = await apis.post("/v1/jobs/job-1/complete", f'{{"lock_id":"{lock_id}","metadata":{{"size":1}}}}')
    assert repeated["repeated"] is True
    assert (await apis.worker.request("POST", "/v1/jobs/nobody/cancel")).failure == (404, "job_not_found")
    await apis.post("/v1/jobs", '{"id":"job-2"}', X_Jobd_Client="shop")
    await apis.post("/v1/jobs/job-2/cancel", '{"reason":"left"}', X_Jobd_Client=" sh\top ")
    created, cancelled = (await apis.worker.request("GET", "/v1/jobs/job-2/timeline")).data["events"]
    assert (created["by"], cancelled["by"]) == ("client", f"client:sh op (uid {os.getuid()}, pid {os.getpid()})")
    events = (await apis.worker.request("GET", "/v1/jobs/job-1/timeline")).data["events"]
    assert [event["type"] for event in events] == ["created", "granted", "progress", "completed"]
    assert events[1]["by"] == "worker:w-1"
    assert lock_id not in str(events)


async def test_a_waiting_claim_whose_client_disconnects_takes_no_job(apis: BothApis) -> None:
    closed = await apis.worker.connect()
    closed.send(request_bytes("POST", "/v1/claim", '{"worker":"gone","wait_ms":60000}'))
    await wait_until(lambda: bool(apis.actor.waiting_claims))
    await closed.close()
    await wait_until(lambda: not apis.actor.waiting_claims)
    await apis.post("/v1/jobs", '{"id":"job-1"}')
    [grant] = (await apis.post("/v1/claim", '{"worker":"here"}'))["grants"]
    assert grant["job"]["attempt"] == 1


async def test_over_tcp_a_waiting_client_that_closes_takes_no_job_and_a_half_closed_one_gets_it(
    apis: BothApis, tmp_path: Path
) -> None:
    (tmp_path / "tcp").mkdir()
    claim = request_bytes("POST", "/v1/claim", '{"worker":"w","wait_ms":60000}')
    authenticator = Authenticator("worker", hosts=["localhost"])
    async with HttpHarness(worker_api.ROUTES, tmp_path / "tcp", authenticator=authenticator, actor=apis.actor) as tcp:
        closed, half = await tcp.connect(), await tcp.connect()
        closed.send(claim)
        await wait_until(lambda: bool(apis.actor.waiting_claims))
        await closed.close()
        await wait_until(lambda: not apis.actor.waiting_claims)
        half.send(claim)
        half.writer.write_eof()
        await wait_until(lambda: bool(apis.actor.waiting_claims))
        await apis.post("/v1/jobs", '{"id":"job-1"}')
        [grant] = (await half.receive()).data["grants"]
        assert grant["job"]["attempt"] == 1
        assert await half.is_closed()


async def test_a_grant_whose_client_disconnected_before_the_response_is_released(apis: BothApis) -> None:
    await apis.post("/v1/jobs", '{"id":"job-1"}')
    apis.disk.gate.clear()
    closed = await apis.worker.connect()
    closed.send(request_bytes("POST", "/v1/jobs/job-1/start", '{"worker":"gone"}'))
    await apis.disk.at_gate.wait()
    closed.writer.transport.abort()
    await apis.worker.wait_until_closed(1)  # the other connection is that of `post`
    apis.disk.gate.set()
    while (job := await apis.job("job-1"))["status"] != "queued":
        pass
    assert job["attempt"] == 0
    [grant] = (await apis.post("/v1/claim", '{"worker":"here"}'))["grants"]
    assert grant["job"]["attempt"] == 1


async def test_a_waiting_claim_gets_a_response_when_the_listeners_close(apis: BothApis) -> None:
    client = await apis.worker.connect()
    client.send(request_bytes("POST", "/v1/claim", '{"worker":"w","wait_ms":60000}'))
    await wait_until(lambda: bool(apis.actor.waiting_claims))
    apis.actor.end_claim_waits()
    await apis.worker.stop(30)
    response = await client.receive()
    assert (response.data, response.headers["connection"]) == ({"grants": []}, "close")


async def test_a_stop_ends_an_import_that_is_arriving(apis: BothApis) -> None:
    client = await apis.admin.connect()
    headers = {**AUTH, "Content-Type": "application/x-ndjson", "Content-Length": "1000"}
    client.send(request_bytes("POST", f"{ADMIN}/import", headers=headers) + b'{"id":"a"}\n')
    await wait_until(lambda: "a" in apis.actor.state.jobs)
    await apis.admin.listener.stop_accepting()
    client.send(b'{"id":"b"}\n')
    response = await client.receive()
    assert (response.status, response.error, response.json["details"]) == (503, "shutting_down", {"line": 2})
    await apis.admin.stop(30)
    assert "b" not in apis.actor.state.jobs


async def test_an_action_of_an_operator_can_require_the_version_of_its_job(apis: BothApis) -> None:
    await apis.post("/v1/jobs", '{"id":"v"}')
    version = (await apis.admin.request("GET", f"{ADMIN}/jobs/v", headers=AUTH)).data["version"]

    async def update(if_match: str) -> Any:
        headers = {**AUTH, "If-Match": if_match}
        return await apis.admin.request("POST", f"{ADMIN}/jobs/v/update", '{"priority":1}', headers)

    assert (await update(f'"{version}"')).status == 200
    changed = await update(f'"{version}"')
    assert (changed.status, changed.error) == (409, "invalid_transition")
    assert "has changed since you read it: it is queued now" in changed.json["message"]
    for wrong in (version, f'W/"{version}"', f'"{version}", "0"', "*"):
        assert (await update(wrong)).json["details"] == {"field": "If-Match"}
    pause, headers = f"{ADMIN}/queues/q/pause", {**AUTH, "If-Match": f'"{version}"'}
    rejected = [await apis.admin.request("POST", pause, "{}", headers)]
    rejected += [await apis.worker.request("POST", "/v1/jobs/v/cancel", "{}", {"If-Match": f'"{version}"'})]
    assert [(each.status, each.json["details"]) for each in rejected] == [(400, {"field": "If-Match"})] * 2
