"""Command streams: lines, order of responses, limits, disconnected clients, stops."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from jobd.api import admin_routes, command_stream
from jobd.api.worker_routes import ROUTES
from jobd.engine.actor import Bounds
from jobd.http.auth import Authenticator
from jobd.http.decoding import Limits
from jobd.model.commands import STREAMED_COMMANDS
from jobd.model.errors import ApiError
from jobd.model.responses import EmptyResponse, Grants, Response
from tests.support.http_harness import TOKEN, FakeActor, HeldResponse, HttpHarness, RawConnection, request_bytes
from tests.support.virtual_engine import settle, until
from tests.support.worker_api_server import WorkerApiServer, worker_api_server

KIND = {"Content-Type": "application/x-ndjson", "Transfer-Encoding": "chunked"}


class RawCommandStream:
    """A raw command stream: head, sent chunks, received chunks."""

    def __init__(self, client: RawConnection) -> None:
        self.connection = client
        self._received = b""

    @classmethod
    async def open(cls, harness: HttpHarness, **headers: str) -> RawCommandStream:
        client = await harness.connect()
        client.send(request_bytes("POST", "/v1/commands", None, {**KIND, **headers}))
        head = await client.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        assert b"application/x-ndjson" in head
        return cls(client)

    def raw(self, data: bytes) -> None:
        """Send one chunk."""
        self.connection.send(b"%x\r\n%b\r\n" % (len(data), data))

    def send(self, *commands: dict[str, Any]) -> None:
        self.raw(b"".join(json.dumps(command).encode() + b"\n" for command in commands))

    def end(self) -> None:
        self.connection.send(b"0\r\n\r\n")

    async def receive(self) -> Any:
        """Receive the next response. None at the regular end."""
        while b"\n" not in self._received:
            size = int(await self.connection.reader.readuntil(b"\r\n"), 16)
            self._received += await self.connection.reader.readexactly(size)
            await self.connection.reader.readexactly(2)
            if not size:
                assert not self._received
                return None
        response, _, self._received = self._received.partition(b"\n")
        return json.loads(response)

    async def ask(self, **command: Any) -> Any:
        self.send(command)
        return await self.receive()


@pytest.fixture(name="server")
async def _server(tmp_path: Path) -> AsyncIterator[WorkerApiServer]:
    async with worker_api_server(tmp_path) as opened:
        yield opened


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[HttpHarness]:
    async with HttpHarness(ROUTES, tmp_path) as opened:
        yield opened


async def test_a_stream_may_begin_with_more_than_the_limit_of_a_body(tmp_path: Path) -> None:
    async with HttpHarness(ROUTES, tmp_path, limits=Limits(body=200)) as harness:
        client = await harness.connect()
        lines = [b'{"op":"create","id":"a-%d"}\n' % number for number in range(200)]
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(line), line) for line in lines)
        client.send(request_bytes("POST", "/v1/commands", None, KIND) + chunks + b"0\r\n\r\n")
        assert len((await client.receive()).body.splitlines()) == 200
        assert [envelope.command.id for envelope in harness.actor.received] == [f"a-{number}" for number in range(200)]


# ---------------------------------------------------------------------------------------------------------------------
# Half-closed connections.


async def test_all_lines_before_the_end_of_input_get_their_responses(either: HttpHarness) -> None:
    """There are so many chunks that they are parsed in pieces."""
    client = await either.connect()
    lines = b"".join(b'{"op":"create","id":"a-%d"}\n' % number for number in range(300))
    chunks = b"".join(b"1\r\n%b\r\n" % lines[at : at + 1] for at in range(len(lines)))
    client.send(request_bytes("POST", "/v1/commands", None, KIND) + chunks)
    client.writer.write_eof()
    response = await client.receive()
    assert [json.loads(line)["status"] for line in response.body.splitlines()] == [200] * 300 + [400]
    assert len(either.actor.received) == 300


@pytest.fixture(params=["unix", "tcp"])
async def either(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[HttpHarness]:
    """A listener on a Unix socket, and one on TCP, which differ in how they see a half-closed client."""
    gate = Authenticator("worker", hosts=None if request.param == "unix" else ["localhost"])
    async with HttpHarness(ROUTES, tmp_path, authenticator=gate) as opened:
        yield opened


async def half_closed(harness: HttpHarness) -> None:
    """Wait until the listener knows that a client has stopped sending."""
    while not any(connection._is_half_closed for connection in harness.connections):  # noqa: ASYNC110
        await asyncio.sleep(0.001)


async def test_a_half_closed_client_receives_all_responses(either: HttpHarness) -> None:
    held = HeldResponse(either)
    stream = await RawCommandStream.open(either)
    stream.send({"op": "create", "id": "a"}, {"op": "create", "id": "b"})
    stream.end()
    stream.connection.writer.write_eof()
    await half_closed(either)
    held.go.set()
    assert [(await stream.receive())["status"] for _ in range(2)] == [200, 200]
    assert await stream.receive() is None
    assert await stream.connection.is_closed()


async def test_the_lines_of_an_aborted_stream_get_their_responses(either: HttpHarness) -> None:
    stream = await RawCommandStream.open(either)
    stream.raw(b'{"op":"create","id":"a"}\n{"op":"create","id":"b"}\n{"op":"cre')
    stream.connection.writer.write_eof()
    assert [(await stream.receive())["status"] for _ in range(2)] == [200, 200]
    last = await stream.receive()
    assert (last["status"], last["error"], "ended too early" in last["message"]) == (400, "invalid_request", True)
    assert await stream.receive() is None
    assert await stream.connection.is_closed()
    assert [envelope.command.id for envelope in either.actor.received] == ["a", "b"]


async def test_grants_of_a_stream_whose_client_has_closed_are_released(either: HttpHarness) -> None:
    response = Response(EmptyResponse(), grants=[("a", "lock")])
    held = HeldResponse(either, response)
    stream = await RawCommandStream.open(either)
    stream.send({"op": "claim", "worker": "w"})
    while not either.actor.received:  # noqa: ASYNC110 - there is nothing to wait for, and this is soon
        await asyncio.sleep(0.001)
    await stream.connection.close()
    while either.listener.connections:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    held.go.set()
    await either.app.wait_idle()
    assert either.actor.cancelled.is_set() or either.actor.undelivered_responses == [response]


# ---------------------------------------------------------------------------------------------------------------------
# Lines.


async def test_a_line_gives_the_command_of_its_call(harness: HttpHarness) -> None:
    stream = await RawCommandStream.open(harness)
    cancelled_by = f"client:uid {os.getuid()}, pid {os.getpid()}"
    lines: list[tuple[dict[str, Any], str, str]] = [
        ({"op": "create", "id": "j", "payload": {"a": 1}, "queue": "q"}, "/v1/jobs", "client"),
        ({"op": "bulk", "jobs": [{"id": "a"}, {"payload": 2}]}, "/v1/jobs/bulk", "client"),
        ({"op": "start", "id": "j", "worker": "w-1"}, "/v1/jobs/{id}/start", "worker:w-1"),
        ({"op": "claim", "worker": "w-2", "queues": ["q"], "limit": 3}, "/v1/claim", "worker:w-2"),
        ({"op": "progress", "id": "j", "lock_id": "l", "progress": 5.5}, "/v1/jobs/{id}/progress", "client"),
        ({"op": "extend", "id": "j", "lock_id": "l", "additional_ms": 9}, "/v1/jobs/{id}/extend", "client"),
        ({"op": "complete", "id": "j", "lock_id": "l", "metadata": [1]}, "/v1/jobs/{id}/complete", "client"),
        ({"op": "fail", "id": "j", "lock_id": "l", "error_message": "m"}, "/v1/jobs/{id}/fail", "client"),
        ({"op": "release", "id": "j", "lock_id": "l"}, "/v1/jobs/{id}/release", "client"),
        ({"op": "cancel", "id": "j", "reason": "r"}, "/v1/jobs/{id}/cancel", cancelled_by),
        ({"op": "get", "id": "j"}, "/v1/jobs/{id}", "client"),
    ]
    assert {line["op"] for line, _, _ in lines} == STREAMED_COMMANDS.keys()
    for line, path, by in lines:
        response = await stream.ask(**line)
        assert (response["success"], response["status"]) == (True, 200), response
        streamed = harness.actor.received[-1]
        body = {name: value for name, value in line.items() if name != "op" and (name != "id" or "{id}" not in path)}
        if line["op"] == "get":
            await harness.request("GET", "/v1/jobs/j")
        else:
            await harness.request("POST", path.replace("{id}", "j"), json.dumps(body))
        posted = harness.actor.received[-1]
        assert type(streamed.command) is type(posted.command)
        shown = [json.dumps(each.command, default=_plain, sort_keys=True) for each in (streamed, posted)]
        assert shown[0] == shown[1]
        assert (streamed.by, streamed.admin) == (by, False) == (posted.by, posted.admin)
    stream.end()
    assert await stream.receive() is None


def _plain(value: Any) -> Any:
    if hasattr(value, "__struct_fields__"):
        return {name: getattr(value, name) for name in value.__struct_fields__}
    return json.loads(bytes(value)) if type(value).__name__ == "Raw" else repr(value)


@pytest.mark.parametrize(
    ("line", "code", "field"),
    [
        (b"nonsense", "invalid_request", "$"),
        (b"[]", "invalid_request", "$"),
        (b'{"op":"create","payload":\xff}', "invalid_request", "$"),
        (b'{"id":"j"}', "invalid_request", "$.op"),
        (b'{"op":"adopt","id":"j"}', "invalid_request", "$.op"),
        (b'{"op":7}', "invalid_request", "$.op"),
        (b'{"op":"start","worker":"w"}', "invalid_request", "$.id"),
        (b'{"op":"start","id":"../x","worker":"w"}', "invalid_request", "$.id"),
        (b'{"op":"claim","worker":"w","id":"j"}', "invalid_request", "$.id"),
        (b'{"op":"claim","worker":"w","wait_ms":1}', "invalid_request", "$.wait_ms"),
        (b'{"op":"create","colour":"red"}', "invalid_request", "$.colour"),
        (b'{"op":"create","idempotency_key":"\\u00fc"}', "invalid_request", "Idempotency-Key"),
        (b'{"op":"create","idempotency_key":5}', "invalid_request", "$.idempotency_key"),
        (b'{"op":"complete","id":"j","lock_id":"l","storage_key":"/etc"}', "invalid_request", "$.storage_key"),
        (b'{"op":"create","payload":"' + b"x" * 300 + b'"}', "too_large", "$.payload"),
        (b'{"op":"bulk","jobs":[{},{},{}]}', "too_large", "$.jobs"),
        (b"x" * 2_000, "too_large", None),
    ],
)
async def test_a_malformed_line_gets_an_error_and_the_stream_continues(
    tmp_path: Path, line: bytes, code: str, field: str | None
) -> None:
    async with HttpHarness(ROUTES, tmp_path, limits=Limits(body=1_000, payload=200, bulk=2)) as harness:
        stream = await RawCommandStream.open(harness)
        stream.raw(b'{"op":"get","id":"a"}\n' + line + b'\n\n  \n{"op":"get","id":"b"}\n')
        first, wrong, last = [await stream.receive() for _ in range(3)]
        assert first["success"] is last["success"] is True
        assert (wrong["success"], wrong["error"], wrong["details"].get("field")) == (False, code, field), wrong
        assert wrong["status"] == (413 if code == "too_large" else 400)
        assert [envelope.command.id for envelope in harness.actor.received] == ["a", "b"]
        assert harness.app.error_counts[code] == 1


async def test_an_error_is_the_usual_object_with_its_status(tmp_path: Path) -> None:
    actor = FakeActor(lambda command: ApiError("overloaded", "Full."))
    async with HttpHarness(ROUTES, tmp_path, actor=actor) as harness:
        stream = await RawCommandStream.open(harness)
        with capture_logs() as logs:
            response = await stream.ask(op="get", id="job-7")
        wanted = {"success": False, "error": "overloaded", "message": "Full.", "details": {"retry_after_ms": 1000}}
        assert response == {**wanted, "status": 503}
        [line] = [line for line in logs if line["event"] == "rejected"]
        assert (line["path"], line["code"], line["job_id"]) == ("/v1/commands", "overloaded", "job-7")


async def test_responses_with_line_breaks_stay_one_line(server: WorkerApiServer) -> None:
    """Line breaks in a payload are replaced."""
    created = await server.harness.request("POST", "/v1/jobs", '{"id":"j","payload":{\n\r\n"a": "b\\nc"\n}}')
    assert created.status == 201
    stream = await RawCommandStream.open(server.harness)
    assert (await stream.ask(op="get", id="j"))["data"]["payload"] == {"a": "b\nc"}


# ---------------------------------------------------------------------------------------------------------------------
# With the actor.


async def test_a_job_lifecycle_over_a_stream(server: WorkerApiServer) -> None:
    stream = await RawCommandStream.open(server.harness)
    stream.send({"op": "create", "id": "j"}, {"op": "create", "id": "j"}, {"op": "get", "id": "j"})
    assert [(await stream.receive())["status"] for _ in range(3)] == [201, 200, 200]
    grant = (await stream.ask(op="start", id="j", worker="w", progress_timeout_ms=0))["data"]
    assert (grant["progress_due_at"], grant["job"]["progress_timeout_ms"]) == (None, 0)
    response = await stream.ask(op="progress", id="j", lock_id=grant["lock_id"], progress=5)
    assert response["data"]["cancel_requested"] is False
    response = await stream.ask(op="complete", id="j", lock_id="another")
    assert (response["status"], response["error"]) == (409, "lock_lost")
    response = await stream.ask(op="complete", id="j", lock_id=grant["lock_id"], metadata={"n": 1})
    assert (response["data"]["status"], response["data"]["metadata"]) == ("completed", {"n": 1})
    stream.end()
    assert await stream.receive() is None
    repeated = await stream.connection.request("GET", "/v1/jobs/j")  # the connection stays open
    assert repeated.data["status"] == "completed"


async def test_responses_come_in_the_order_of_the_lines(server: WorkerApiServer) -> None:
    """Even if one takes longer, or fails at once."""
    stream = await RawCommandStream.open(server.harness)
    for number in range(300):
        stream.send({"op": "create", "id": f"j-{number}"})
        stream.raw(b"no\n" if number % 7 == 0 else b"\n")
    stream.end()
    responses = [await stream.receive() for _ in range(300 + 43)]
    made = [response["data"]["id"] for response in responses if response["success"]]
    assert made == [f"j-{number}" for number in range(300)]
    assert [at for at, response in enumerate(responses) if not response["success"]] == [
        8 * each + 1 for each in range(43)
    ]
    assert await stream.receive() is None


async def test_no_response_is_sent_before_its_commit(server: WorkerApiServer) -> None:
    stream = await RawCommandStream.open(server.harness)
    server.disk.gate.clear()
    stream.send({"op": "create", "id": "j"}, {"op": "get", "id": "j"})
    await server.disk.at_gate.wait()
    hearing = asyncio.ensure_future(stream.receive())
    await settle()
    assert not hearing.done()
    server.disk.gate.set()
    assert (await hearing)["status"] == 201


async def test_a_repeated_key_gets_the_same_response(server: WorkerApiServer) -> None:
    await server.harness.request("POST", "/v1/jobs/bulk", '{"jobs":[{"id":"a"},{"id":"b"}]}')
    stream = await RawCommandStream.open(server.harness)
    line = {"op": "claim", "worker": "w", "idempotency_key": "k"}
    first, second = await stream.ask(**line), await stream.ask(**line)
    assert "replayed" not in first
    assert second == {**first, "replayed": True}
    other = await stream.ask(op="claim", worker="v", idempotency_key="k")
    assert (other["status"], other["error"]) == (422, "idempotency_key_reused")
    assert (await stream.ask(op="get", id="b", idempotency_key="k"))["data"]["status"] == "queued"


async def test_a_key_is_scoped_to_its_call_and_job(server: WorkerApiServer) -> None:
    stream = await RawCommandStream.open(server.harness)
    for job_id in ("a", "b"):
        assert (await stream.ask(op="create", id=job_id))["status"] == 201
    for job_id in ("a", "b"):
        response = await stream.ask(op="start", id=job_id, worker="w", idempotency_key="k")
        assert (response["data"]["job"]["id"], response.get("replayed")) == (job_id, None)


async def test_the_limit_of_the_mailbox_applies_to_streams(tmp_path: Path) -> None:
    async with worker_api_server(tmp_path, bounds=Bounds(mailbox=10)) as small:
        stream = await RawCommandStream.open(small.harness)
        small.disk.gate.clear()
        stream.send({"op": "create"})
        await small.disk.at_gate.wait()
        stream.send(*({"op": "create"} for _ in range(20)))
        stream.end()
        await until(lambda: small.actor.waiting == 7)
        small.disk.gate.set()
        statuses = [(await stream.receive())["status"] for _ in range(21)]
        assert (statuses.count(201), statuses.count(503)) == (8, 13)


# ---------------------------------------------------------------------------------------------------------------------
# Limits.


async def test_the_number_of_pending_commands_is_limited(harness: HttpHarness) -> None:
    held, received = HeldResponse(harness), harness.actor.received
    stream = await RawCommandStream.open(harness)
    stream.send(*({"op": "get", "id": f"j-{number}"} for number in range(1_000)))
    stream.end()
    await until(lambda: len(received) == command_stream.AHEAD_WEIGHT)
    await settle()
    await settle()
    assert len(received) == command_stream.AHEAD_WEIGHT
    held.go.set()
    for _ in range(1_000):
        assert (await stream.receive())["success"]
    assert await stream.receive() is None
    assert [envelope.command.id for envelope in received] == [f"j-{number}" for number in range(1_000)]


async def test_bulks_and_claims_count_by_their_jobs_and_lines_by_their_bytes(harness: HttpHarness) -> None:
    held, received = HeldResponse(harness, Response(Grants([]))), harness.actor.received
    claims = await RawCommandStream.open(harness)
    claims.send(*({"op": "claim", "worker": "w", "limit": 100} for _ in range(9)))
    await until(lambda: len(received) == 3)
    large = await RawCommandStream.open(harness)
    for _ in range(9):
        large.send({"op": "create", "payload": "x" * 200_000})
    await until(lambda: len(received) == 3 + 6)
    await settle()
    await settle()
    assert len(received) == 9
    held.go.set()
    assert all([(await stream.receive())["success"] for stream in (claims, large) for _ in range(9)])


async def test_a_client_that_stops_reading_is_not_read_and_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobd.http.read_deadline.WRITE_TIMEOUT_S", 0.2)
    actor = FakeActor(lambda command: Response({"much": "x" * 20_000}, large_bytes=20_000))
    async with HttpHarness(ROUTES, tmp_path, actor=actor) as harness:
        stream = await RawCommandStream.open(harness)
        with capture_logs() as logs:
            stream.send(*({"op": "get", "id": "j"} for _ in range(5_000)))
            # Most responses wait in memory, and a piece in the transport.
            await until(lambda: actor.unread.bytes > 200 * 20_000 + command_stream.PIECE_BYTES)
            await until(lambda: harness.listener.connections == 0)
        await until(lambda: actor.unread.bytes == 0)
        assert len(actor.received) < 1_000
        assert [line["event"] for line in logs if "cut_off" in line["event"]] == ["command_stream_cut_off"]


@pytest.mark.slow
async def test_an_incomplete_line_times_out_and_an_idle_stream_does_not(tmp_path: Path) -> None:
    async with HttpHarness(ROUTES, tmp_path, limits=Limits(body_deadline_s=0.1, idle_s=0.1)) as harness:
        stream = await RawCommandStream.open(harness)
        await asyncio.sleep(0.3)
        assert (await stream.ask(op="get", id="j"))["success"]
        stream.raw(b'{"op":"ge')
        response = await stream.receive()
        assert (response["error"], response["status"]) == ("request_timeout", 408)
        assert await stream.receive() is None
        assert await stream.connection.is_closed()


async def test_malformed_framing_ends_the_stream_after_the_responses_to_its_lines(harness: HttpHarness) -> None:
    stream = await RawCommandStream.open(harness)
    assert (await stream.ask(op="get", id="j"))["success"]
    with capture_logs() as logs:
        stream.connection.send(b"zz\r\nno chunk\r\n")
        response = await stream.receive()
        assert (response["error"], response["status"]) == ("invalid_request", 400)
        assert await stream.receive() is None
        assert await stream.connection.is_closed()
    assert [line["event"] for line in logs] == ["rejected"]


# ---------------------------------------------------------------------------------------------------------------------
# Listeners.


async def test_a_stream_requires_its_content_type_and_a_token(tmp_path: Path, harness: HttpHarness) -> None:
    response = await harness.request("POST", "/v1/commands", '{"op":"get","id":"j"}')
    assert (response.status, response.error) == (415, "unsupported_media_type")
    gate = Authenticator("worker", tokens=[TOKEN], hosts=["localhost"])
    (tmp_path / "tcp").mkdir()
    async with HttpHarness(ROUTES, tmp_path / "tcp", authenticator=gate) as guarded:
        response = await guarded.request(
            "POST", "/v1/commands", '{"op":"get","id":"j"}', {"Content-Type": KIND["Content-Type"]}
        )
        assert (response.status, response.error) == (401, "unauthorized")
        stream = await RawCommandStream.open(guarded, Authorization=f"Bearer {TOKEN}")
        assert (await stream.ask(op="get", id="j"))["success"]


async def test_streams_and_waiting_claims_end_with_their_token(tmp_path: Path) -> None:
    both = f"Bearer {TOKEN}", "Bearer another-token-0123456789abcdef"
    gate = Authenticator("worker", tokens=[each.split()[1] for each in both], hosts=["localhost"])
    async with HttpHarness(ROUTES, tmp_path, authenticator=gate) as guarded:
        old, new = [await RawCommandStream.open(guarded, Authorization=each) for each in both]
        held = HeldResponse(guarded)
        claims = [await guarded.connect() for _ in both]
        for claim, each in zip(claims, both, strict=True):
            claim.send(request_bytes("POST", "/v1/claim", '{"worker":"w","wait_ms":1000}', {"Authorization": each}))
        await until(lambda: len(guarded.actor.received) == 2)
        gate.replace_tokens([both[1].split()[1]])
        guarded.app.cut_off_revoked()
        assert await old.connection.is_closed()
        assert await claims[0].is_closed()
        held.go.set()
        assert (await claims[1].receive()).status == 200
        assert (await new.ask(op="get", id="j"))["success"]


async def test_a_stream_sends_100_continue(harness: HttpHarness) -> None:
    client = await harness.connect()
    client.send(request_bytes("POST", "/v1/commands", None, {**KIND, "Expect": "100-continue"}))
    assert (await client.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
    assert (await client.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")


def test_the_admin_api_has_no_command_stream() -> None:
    assert "/v1/commands" not in {route.path for route in admin_routes.ROUTES}


# ---------------------------------------------------------------------------------------------------------------------
# Disconnected clients.


async def test_grants_of_a_disconnected_client_are_released(server: WorkerApiServer) -> None:
    await server.harness.request("POST", "/v1/jobs/bulk", '{"jobs":[{"id":"a"},{"id":"b"}]}')
    stream = await RawCommandStream.open(server.harness)
    server.disk.gate.clear()
    stream.send({"op": "claim", "worker": "gone"}, {"op": "start", "id": "b", "worker": "gone"})
    await server.disk.at_gate.wait()
    stream.connection.writer.transport.abort()
    await until(lambda: server.harness.listener.connections == 1)  # that of the bulk
    server.disk.gate.set()
    for job_id in ("a", "b"):
        while (job := await server.job(job_id))["status"] != "queued":
            pass
        assert job["attempt"] == 0


async def test_grants_behind_unread_responses_are_released(
    server: WorkerApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are committed and encoded, and no byte of them was sent."""
    monkeypatch.setattr("jobd.http.read_deadline.WRITE_TIMEOUT_S", 0.2)
    payload = json.dumps("x" * 200_000)
    await server.harness.request("POST", "/v1/jobs", f'{{"id":"big","priority":9,"payload":{payload}}}')
    await server.harness.request("POST", "/v1/jobs", '{"id":"late"}')
    stream = await RawCommandStream.open(server.harness)
    own = stream.connection.writer.get_extra_info("socket")
    assert own.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) < 2_000_000
    stream.send(*({"op": "get", "id": "big"} for _ in range(40)), {"op": "claim", "worker": "deaf"})
    await until(lambda: server.harness.listener.connections == 2)  # those of the two creates
    while (job := await server.job("late"))["status"] != "queued":
        pass
    assert job["attempt"] == 0
    events = (await server.harness.request("GET", "/v1/jobs/late/timeline")).data["events"]
    assert [event["type"] for event in events] == ["created", "granted", "undelivered"]


async def test_only_the_grants_that_were_sent_are_kept(
    server: WorkerApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobd.http.read_deadline.WRITE_TIMEOUT_S", 0.3)
    payload = "x" * 3_000
    jobs = [{"id": f"j-{number}", "payload": payload} for number in range(300)]
    await server.harness.request("POST", "/v1/jobs/bulk", json.dumps({"jobs": jobs}))
    stream = await RawCommandStream.open(server.harness)
    transport = cast("asyncio.ReadTransport", stream.connection.writer.transport)
    transport.pause_reading()
    stream.send(*({"op": "start", "id": job["id"], "worker": "deaf"} for job in jobs))
    await until(lambda: server.harness.listener.connections == 1)  # that of the bulk
    transport.resume_reading()
    response = await stream.connection.reader.read(-1)
    whole = response.count(b'"status":200}')  # lines; there may be a part of one more
    assert 10 < whole < 290
    states = [(await server.job(job["id"]))["status"] for job in jobs]
    assert states[:whole] == ["processing"] * whole
    assert states[whole + 1 :] == ["queued"] * (299 - whole)


async def test_a_response_that_cannot_be_encoded_releases_its_grants(tmp_path: Path) -> None:
    grant = Response({"no": object()}, grants=[("j", "lock")])
    actor = FakeActor(lambda command: grant)
    async with HttpHarness(ROUTES, tmp_path, actor=actor) as harness:
        stream = await RawCommandStream.open(harness)
        with capture_logs() as logs:
            response = await stream.ask(op="claim", worker="w")
        assert (response["error"], response["status"]) == ("internal_error", 500)
        assert actor.undelivered_responses == [grant]
        assert [line["event"] for line in logs if line["log_level"] == "error"] == ["request_bug"]


@pytest.mark.parametrize("where", ["_handle_line", "_next_piece"])
async def test_a_bug_ends_one_stream(harness: HttpHarness, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def fail(*_: object) -> None:
        raise LookupError(TOKEN)

    stream = await RawCommandStream.open(harness)
    monkeypatch.setattr(command_stream._StreamSession, where, fail)
    with capture_logs() as logs:
        stream.send({"op": "get", "id": "j"})
        assert await stream.connection.is_closed()
        await until(lambda: harness.listener.connections == 0)
    assert [(line["event"], line["error"]) for line in logs] == [("request_bug", "LookupError")]
    assert TOKEN not in str(logs)
    monkeypatch.undo()
    assert (await (await RawCommandStream.open(harness)).ask(op="get", id="j"))["success"]


# ---------------------------------------------------------------------------------------------------------------------
# Stops.


async def test_a_stop_answers_the_lines_that_were_read_and_ends_the_stream(server: WorkerApiServer) -> None:
    stream = await RawCommandStream.open(server.harness)
    server.disk.gate.clear()
    stream.send({"op": "create", "id": "j"})
    await server.disk.at_gate.wait()
    stopping = asyncio.ensure_future(server.harness.stop(30))
    await asyncio.sleep(0.01)
    assert not stopping.done()
    server.disk.gate.set()
    assert (await stream.receive())["status"] == 201
    assert await stream.receive() is None
    stream.end()
    await stopping
    assert await stream.connection.is_closed()


async def test_a_stream_that_begins_during_a_stop_ends_at_once(harness: HttpHarness) -> None:
    harness.app.close()
    stream = await RawCommandStream.open(harness)
    assert await stream.receive() is None
    assert harness.actor.received == []
