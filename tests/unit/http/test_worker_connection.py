"""Connections of workers, with requests that arrive in one piece or in several."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from jobd.api.worker_routes import ROUTES
from jobd.http.auth import Authenticator
from jobd.http.decoding import Limits
from jobd.http.parser import AHEAD_BYTES, PIECE_BYTES, PIECE_LINES
from jobd.http.worker_connection import WorkerConnection
from jobd.http.worker_request import WorkerRequest
from jobd.model.errors import ApiError
from jobd.model.responses import EmptyResponse, Response
from tests.support.http_harness import (
    TOKEN,
    TRANSPORTS,
    HeldResponse,
    HttpHarness,
    RawConnection,
    request_bytes,
)
from tests.support.malformed_requests import CHUNKED, HOSTILE
from tests.support.polling import wait_until

PIPELINED = 32  # requests
GRANTED = Response(EmptyResponse(), grants=[("a", "lock")])
CLAIM = request_bytes("POST", "/v1/claim", '{"worker":"w","wait_ms":60000}')


@pytest.fixture(params=TRANSPORTS)
async def harness(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[HttpHarness]:
    async with await HttpHarness.on(request.param, ROUTES, tmp_path, limits=Limits(body=1000)) as opened:
        yield opened


@pytest.fixture
async def unix(tmp_path: Path) -> AsyncIterator[HttpHarness]:
    async with HttpHarness(ROUTES, tmp_path, limits=Limits(body=1000)) as opened:
        yield opened


async def wait_for_commands(harness: HttpHarness, count: int) -> None:
    """Wait until the actor has received this many commands."""
    while len(harness.actor.received) < count:
        harness.actor.arrived.clear()
        await harness.actor.arrived.wait()


async def in_one_write(client: RawConnection, request: bytes) -> None:
    client.send(request)


async def in_two_writes(client: RawConnection, request: bytes) -> None:
    """Send the body after its head has been parsed."""
    head, _, body = request.partition(b"\r\n\r\n")
    client.send(head + b"\r\nExpect: 100-continue\r\n\r\n")
    assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.send(body)


WRITES = pytest.mark.parametrize("send", [in_one_write, in_two_writes])


def current(harness: HttpHarness) -> WorkerRequest:
    """Return the current request of the only connection."""
    [connection] = harness.connections
    assert connection._current is not None
    return connection._current


async def waiting(harness: HttpHarness, send: Any = in_one_write, request: bytes = CLAIM) -> RawConnection:
    """Send a request on a new connection, and wait until the actor has received it."""
    client = await harness.connect()
    await send(client, request)
    await wait_for_commands(harness, 1)
    return client


async def undelivered(harness: HttpHarness) -> list[Response]:
    """Return the responses that were not delivered, after the last connection has closed."""
    await harness.wait_until_closed()
    await harness.app.wait_idle()
    return harness.actor.undelivered_responses  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (request_bytes("POST", "/v1/jobs", "{}"), 200),
        (request_bytes("POST", "/v1/jobs", "{}", {"Idempotency-Key": "k"}), 200),
        (request_bytes("POST", "/v1/jobs", "{}", {"Connection": "close"}), 200),
        (request_bytes("POST", "/v1/jobs/a/cancel"), 200),
        (request_bytes("GET", "/v1/jobs?queue=a"), 200),
        (request_bytes("GET", "/v1/jobs", "{}"), 400),
        (request_bytes("GET", "/nowhere"), 404),
        (request_bytes("PUT", "/v1/jobs", "{}"), 405),
        (request_bytes("POST", "/v1/jobs", "{}".ljust(1001)), 413),
        (request_bytes("POST", "/v1/jobs", "{}", {"Content-Type": "text/plain"}), 415),
    ],
)
async def test_a_complete_request_needs_no_task(
    harness: HttpHarness, monkeypatch: pytest.MonkeyPatch, request_: bytes, status: int
) -> None:
    handled: list[Any] = []
    monkeypatch.setattr(WorkerConnection, "_run", handled.append)
    assert (await harness.send_raw(request_)).status == status
    assert handled == []


@WRITES
async def test_requests_that_arrive_during_another_are_answered_after_it(harness: HttpHarness, send: Any) -> None:
    held = HeldResponse(harness)
    client = await waiting(harness, send, request_bytes("POST", "/v1/jobs", '{"queue":"first"}'))
    harness.actor.respond = lambda command: Response(command.queue)
    client.send(request_bytes("POST", "/v1/jobs", '{"queue":"second"}'))
    await asyncio.sleep(0)
    client.send(b"".join(request_bytes("POST", "/v1/jobs", f'{{"queue":"{n}"}}') for n in range(PIPELINED * 2)))
    assert (await harness.request("POST", "/v1/jobs", '{"queue":"other"}')).data == "other"
    assert len(harness.actor.received) == 2
    held.go.set()
    response = [(await client.receive()).data for _ in range(2 + PIPELINED * 2)]
    assert response[1:] == ["second", *(str(n) for n in range(PIPELINED * 2))]
    assert (await client.request("POST", "/v1/jobs", '{"queue":"last"}')).data == "last"


@WRITES
async def test_bodies_that_arrive_during_a_request_stay_in_the_socket(tmp_path: Path, send: Any) -> None:
    async with HttpHarness(ROUTES, tmp_path) as harness:
        held = HeldResponse(harness)
        client = await waiting(harness, send)
        harness.actor.respond = lambda command: Response(command.queue)
        [connection] = harness.connections
        sizes = [200_000] * 3 + [10] * 3
        for size in sizes * 4:
            client.send(request_bytes("POST", "/v1/jobs", f'{{"queue":"q-{size}","payload":"{"x" * size}"}}'))
        await wait_until(lambda: bool(connection._is_reading_paused))
        for _ in range(5):
            assert (await harness.request("POST", "/v1/jobs", '{"queue":"other"}')).data == "other"
        assert AHEAD_BYTES < len(connection._held) < 3 * AHEAD_BYTES
        held.go.set()
        assert (await client.receive()).status == 200
        assert [(await client.receive()).data for _ in sizes * 4] == [f"q-{size}" for size in sizes] * 4
        assert (await client.request("POST", "/v1/jobs", '{"queue":"last"}')).data == "last"


async def test_requests_with_late_bodies_release_their_slots(harness: HttpHarness) -> None:
    client = await harness.connect()
    for _ in range(PIPELINED):
        await in_two_writes(client, request_bytes("POST", "/v1/jobs", "{}"))
        assert (await client.receive()).status == 200
    client.send(request_bytes("GET", "/v1/jobs") * 3 + request_bytes("POST", "/v1/jobs", "{}") * 3)
    assert [(await client.receive()).status for _ in range(6)] == [200] * 6


@pytest.mark.parametrize("path", ["fast", "slow"])
async def test_a_response_to_a_disconnected_client_is_undelivered(unix: HttpHarness, path: str) -> None:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.setblocking(False)

    async def close_client(_: Any) -> Response:
        client.close()  # the write fails at once, without an iteration of the loop in between
        return GRANTED

    unix.actor.respond = close_client
    client.connect(unix.path)
    await wait_until(lambda: bool(unix.listener.connections))
    loop = asyncio.get_running_loop()
    if path == "slow":
        head, _, body = CLAIM.partition(b"\r\n\r\n")
        await loop.sock_sendall(client, head + b"\r\nExpect: 100-continue\r\n\r\n")
        assert await loop.sock_recv(client, 100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        await loop.sock_sendall(client, body)
    else:
        await loop.sock_sendall(client, CLAIM)
    assert await undelivered(unix) == [GRANTED]


@WRITES
async def test_only_the_transport_keeps_a_response_that_is_not_read(unix: HttpHarness, send: Any) -> None:
    unix.actor.respond = lambda _: Response("x" * 3_000_000, grants=[("a", "lock")])
    client = await unix.connect()
    await send(client, CLAIM)
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await wait_for_commands(unix, 1)
    await asyncio.sleep(0)
    request = current(unix)
    assert request.response is not None
    assert (request.body, request.response.body) == (b"", b"")
    assert (request.response.on_lost, request.prepared, request.envelope) == (None, None, None)
    client.writer.transport.abort()
    await unix.wait_until_closed()


@WRITES
@pytest.mark.parametrize("end", ["patience", "client", "stop"])
async def test_a_client_that_reads_too_slowly_is_cut_off(
    unix: HttpHarness, monkeypatch: pytest.MonkeyPatch, send: Any, end: str
) -> None:
    if end == "patience":
        monkeypatch.setattr("jobd.http.read_deadline.WRITE_TIMEOUT_S", 0.05)
    response = Response("x" * 3_000_000, grants=[("a", "lock")])
    unix.actor.respond = lambda _: response
    client = await unix.connect()
    client.writer.transport.set_write_buffer_limits(0)
    await send(client, CLAIM)
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    with capture_logs() as logs:
        await wait_for_commands(unix, 1)
        await asyncio.sleep(0)
        if end == "client":
            client.writer.transport.abort()
        elif end == "stop":
            await unix.stop(0.01)
        await unix.wait_until_closed()
        await unix.app.wait_idle()
    cut_off = [(entry["event"], entry["grants"]) for entry in logs if "grants" in entry]
    assert cut_off == {"patience": [("response_cut_off", 1)], "client": [], "stop": [("requests_cut_off", 1)]}[end]
    assert unix.actor.undelivered_responses == []  # its first byte has been written


@pytest.mark.parametrize("read_bytes", [0, 300_000])
async def test_a_tls_client_that_stops_reading_a_response_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int
) -> None:
    """A TLS transport would keep the rest without a sign, below its limit and after it has resumed writing."""
    monkeypatch.setattr("jobd.http.read_deadline.CHECKS", 1_000)
    async with await HttpHarness.on("tls", ROUTES, tmp_path) as harness:
        harness.actor.respond = lambda _: Response("x" * 800_000, grants=[("a", "lock")])
        client = await harness.connect()
        reader, writer = client.reader, client.writer
        await wait_until(lambda: bool(harness.listener.connections))
        [connection] = harness.connections
        assert connection.transport is not None
        for transport, option in ((connection.transport, socket.SO_SNDBUF), (writer.transport, socket.SO_RCVBUF)):
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, option, 16 << 10)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        with capture_logs() as logs:
            writer.write(CLAIM)
            if read_bytes:
                writer.transport.resume_reading()  # type: ignore[attr-defined]
                await reader.readexactly(read_bytes)
                writer.transport.pause_reading()  # type: ignore[attr-defined]
            monkeypatch.setattr("jobd.http.read_deadline.WRITE_TIMEOUT_S", 0.05)
            async with asyncio.timeout(10):
                await harness.wait_until_closed()
        assert [(entry["event"], entry["grants"]) for entry in logs if "grants" in entry] == [("response_cut_off", 1)]


@pytest.mark.parametrize("end", ["client", "reads"])
async def test_a_response_of_which_no_byte_was_sent_is_undelivered(unix: HttpHarness, end: str) -> None:
    """A client that pipelines and does not read has a full socket, so its next response waits in the transport.

    A Unix socket takes a response of this size whole or not at all.
    """
    responses: list[Response] = []

    def respond(_: Any) -> Response:
        responses.append(Response("x" * 8_000, grants=[("a", f"lock-{len(responses)}")]))
        return responses[-1]

    unix.actor.respond = respond
    client = await unix.connect()
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    client.send(CLAIM * 100)
    [connection] = unix.connections
    await wait_until(lambda: bool(connection._is_flushing))
    assert connection.transport is not None
    assert connection.transport.get_write_buffer_size() > 8_000
    last = responses[-1]
    if end == "client":
        client.writer.transport.abort()
    else:
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        for _ in range(100):
            assert (await client.receive()).status == 200
        await client.close()
    assert await undelivered(unix) == ([last] if end == "client" else [])


async def test_the_body_of_a_rejected_request_is_dropped_while_its_response_waits(unix: HttpHarness) -> None:
    wrong = b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n"
    probe = await unix.connect()
    probe.writer.transport.pause_reading()  # type: ignore[attr-defined]
    probe.send(wrong * 2_000)
    [connection] = unix.connections
    await wait_until(lambda: bool(connection._is_flushing))
    fit = sum(unix.app.error_counts.values())  # responses until the socket is full
    probe.writer.transport.abort()
    await unix.wait_until_closed()
    client = await unix.connect()
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    client.send(wrong * (fit - 1) + b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
    [connection] = unix.connections
    await wait_until(lambda: bool(connection._is_flushing))
    for _ in range(100):
        client.send(b"x" * 65_536)
        await asyncio.sleep(0)
    await client.writer.drain()
    assert current(unix).body == b""


@WRITES
@pytest.mark.parametrize("close", [{}, {"Connection": "close"}])
async def test_a_few_unread_bytes_do_not_keep_a_connection_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, send: Any, close: dict[str, str]
) -> None:
    """A transport that is closed before everything is written waits for the client, even for an idle one."""
    monkeypatch.setattr("jobd.http.read_deadline.WRITE_TIMEOUT_S", 0.05)
    async with HttpHarness(ROUTES, tmp_path, limits=Limits(idle_s=0.02)) as harness:
        client = await harness.connect()
        await send(client, CLAIM)
        assert (await client.receive()).status == 200
        [connection] = harness.connections
        assert connection.transport is not None
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        while not connection.transport.get_write_buffer_size():
            connection.transport.write(b"x" * 1000)
        assert connection.transport.get_write_buffer_size() < 60_000
        client.send(request_bytes("POST", "/v1/claim", '{"worker":"w"}', close))
        await harness.wait_until_closed()


@WRITES
async def test_a_connection_that_becomes_idle_during_a_stop_does_not_hold_it_up(
    harness: HttpHarness, send: Any
) -> None:
    held = HeldResponse(harness)
    busy = await waiting(harness)
    harness.actor.respond = lambda _: Response("x" * 3_000_000)
    slow = await harness.connect()
    await send(slow, CLAIM)
    slow.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await wait_for_commands(harness, 2)
    for _ in range(5):  # its response has been written as far as possible
        await asyncio.sleep(0)
    with capture_logs() as logs:
        stopping = asyncio.ensure_future(harness.stop(30))
        while not harness.app.closing:  # noqa: ASYNC110 - it is in the first step of the stop
            await asyncio.sleep(0)
        slow.writer.transport.resume_reading()  # type: ignore[attr-defined]
        assert "connection" not in (await slow.receive()).headers
        held.go.set()
        assert (await busy.receive()).status == 200
        await stopping
    assert logs == []  # nothing was cut off


async def test_a_response_after_the_deadline_of_a_stop_does_no_harm(harness: HttpHarness) -> None:
    """The actor calls it directly, so an exception here would end the actor."""
    HeldResponse(harness)
    client = await waiting(harness)
    [connection] = harness.connections
    request = current(harness)
    connection.abort()
    request.set_result(GRANTED)
    assert await client.is_closed()
    await harness.app.wait_idle()
    assert len(harness.actor.undelivered_responses) == 1


@WRITES
async def test_a_bug_while_responding_costs_one_connection(
    harness: HttpHarness, monkeypatch: pytest.MonkeyPatch, send: Any
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("canary")

    harness.actor.respond = lambda _: Response(object())  # cannot be encoded as JSON
    monkeypatch.setattr(harness.app, "log_internal_error", fail)
    client = await harness.connect()
    with capture_logs() as logs:
        await send(client, CLAIM)
        response = await client.receive()
    assert (response.status, response.headers["connection"]) == (500, "close")
    assert "canary" not in str(logs) + response.body.decode()
    assert await client.is_closed()
    await harness.app.wait_idle()


@WRITES
async def test_the_grants_of_a_response_that_cannot_be_encoded_are_released(harness: HttpHarness, send: Any) -> None:
    response = Response(object(), grants=[("a", "lock")])
    harness.actor.respond = lambda _: response
    client = await harness.connect()
    await send(client, CLAIM)
    assert (await client.receive()).status == 500
    assert harness.actor.undelivered_responses == [response]
    harness.actor.respond = lambda _: Response(EmptyResponse())
    assert (await client.request("GET", "/v1/jobs")).status == 200


async def test_a_bug_while_responding_never_reaches_the_actor(
    harness: HttpHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("canary")

    failed: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failed.append(context))
    HeldResponse(harness)
    monkeypatch.setattr(harness.app, "respond", fail)
    monkeypatch.setattr(harness.app, "error_response", fail)
    lines = [await harness.connect(), await harness.connect()]
    for line in lines:
        line.send(CLAIM)
    await wait_for_commands(harness, 2)
    for envelope in harness.actor.sent:
        envelope.reply(Response(EmptyResponse()))  # raises nothing
    lines[1].writer.transport.abort()
    await harness.wait_until_closed(1)
    assert [type(context["exception"]) for context in failed] == [ValueError, ValueError]
    monkeypatch.undo()
    await lines[0].close()
    await harness.wait_until_closed()
    await harness.app.wait_idle()


async def test_a_prepared_response_is_sent_unchanged(harness: HttpHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    HeldResponse(harness)
    client = await waiting(harness)
    [envelope] = harness.actor.sent
    made = count_calls(monkeypatch, harness.app, "_ok_response")
    response = Response(EmptyResponse())
    envelope.prepare(response)
    hearing = asyncio.ensure_future(client.receive())
    await asyncio.sleep(0.01)
    assert (made, hearing.done()) == ([response], False), "no response is sent yet"
    envelope.reply(response)
    assert ((await hearing).status, made) == (200, [response])


@pytest.mark.parametrize("why", ["another response", "an error", "a stop", "a bug"])
async def test_a_prepared_response_that_no_longer_fits_is_encoded_again(
    harness: HttpHarness, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """Its commit failed, or the response has changed."""
    HeldResponse(harness)
    client = await waiting(harness)
    [envelope] = harness.actor.sent
    answer: Response | ApiError = Response(object() if why == "a bug" else EmptyResponse())
    assert isinstance(answer, Response)
    envelope.prepare(answer)
    if why == "another response":
        answer = Response(EmptyResponse(), status=202)
    elif why == "an error":
        answer = ApiError("storage_full", "The disk is full.")
    elif why == "a stop":
        monkeypatch.setattr(harness.app, "closing", True)
    envelope.reply(answer)
    response = await client.receive()
    wanted = {"another response": 202, "an error": 507, "a stop": 200, "a bug": 500}
    assert (response.status, response.headers.get("connection")) == (wanted[why], "close" if why == "a stop" else None)


def count_calls(monkeypatch: pytest.MonkeyPatch, app: Any, name: str) -> list[Any]:
    """Record the last argument of each call from now on."""
    calls, method = [], getattr(app, name)

    def counted(*args: Any) -> Any:
        calls.append(args[-1])
        return method(*args)

    monkeypatch.setattr(app, name, counted)
    return calls


async def test_a_connection_whose_idle_time_is_checked_between_two_requests_still_becomes_idle(tmp_path: Path) -> None:
    async with HttpHarness(ROUTES, tmp_path, limits=Limits(idle_s=0.01)) as harness:
        client = await harness.connect()
        client.send(request_bytes("POST", "/v1/jobs", "{}") * 500)
        async with asyncio.timeout(30):
            assert (await client.reader.read()).count(b"HTTP/1.1 200") == 500


async def test_chunks_that_arrive_together_are_a_complete_request(
    harness: HttpHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    handled: list[Any] = []
    monkeypatch.setattr(WorkerConnection, "_run", handled.append)
    response = await harness.send_raw(CHUNKED + b'8\r\n{"queue"\r\n8\r\n:"mail"}\r\n0\r\n\r\n')
    assert (response.status, harness.actor.received[0].command.queue) == (200, "mail")
    assert handled == []


async def test_a_token_counts_only_for_its_own_request(tmp_path: Path) -> None:
    async with HttpHarness(ROUTES, tmp_path, authenticator=Authenticator("worker", tokens=[TOKEN])) as harness:
        client = await harness.connect()
        for _ in range(3):
            assert (await client.request("GET", "/v1/jobs")).status == 401
            assert (await client.request("GET", "/v1/jobs", headers={"Authorization": f"Bearer {TOKEN}"})).status == 200
        harness.app.authenticator.replace_tokens(["another-token-0123456789abcdef"])
        assert (await client.request("GET", "/v1/jobs", headers={"Authorization": f"Bearer {TOKEN}"})).status == 401


@pytest.mark.parametrize("seed", range(10))
async def test_requests_split_anywhere_are_answered_in_order(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    async with await HttpHarness.on(TRANSPORTS[seed % 3], ROUTES, tmp_path) as harness:
        harness.actor.respond = lambda command: Response(command.id)
        client = await harness.connect()
        for turn in range(30):
            ids = [f"{turn}-{number}" for number in range(dice.choice([1, 1, 1, 2, 50]))]
            stream = b"".join(dice.choice(SHAPES)(job_id) for job_id in ids)
            cuts = sorted(dice.randrange(len(stream)) for _ in range(dice.choice([0, 0, 1, 3])))
            for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
                client.send(stream[start:end])
                for _ in range(dice.choice([0, 3])):
                    await asyncio.sleep(0)
            assert [(await client.receive()).data for _ in ids] == ids
        await harness.app.wait_idle()


# -- half-closed connections -------------------------------------------------------------------------------------------


@pytest.fixture(params=["unix", "tcp"])
async def either(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[HttpHarness]:
    """A listener on a Unix socket, and one on TCP, which differ in how they see a half-closed client."""
    async with await HttpHarness.on(request.param, ROUTES, tmp_path, limits=Limits(body=1000)) as opened:
        yield opened


@pytest.fixture
async def tcp(tmp_path: Path) -> AsyncIterator[HttpHarness]:
    async with await HttpHarness.on("tcp", ROUTES, tmp_path, limits=Limits(body=1000)) as opened:
        yield opened


async def half_closed(harness: HttpHarness) -> WorkerConnection:
    """Return the connection whose client has stopped sending, once the listener knows it."""
    while True:
        for connection in harness.connections:
            if connection._is_half_closed:
                return connection
        await asyncio.sleep(0.001)


@WRITES
async def test_a_half_closed_client_gets_its_responses_and_then_the_end(either: HttpHarness, send: Any) -> None:
    held = HeldResponse(either)
    client = await waiting(either, send, request_bytes("POST", "/v1/jobs", '{"queue":"first"}'))
    either.actor.respond = lambda command: Response(command.queue)
    client.send(b"".join(request_bytes("POST", "/v1/jobs", f'{{"queue":"{n}"}}') for n in range(PIPELINED * 2)))
    client.writer.write_eof()
    held.go.set()
    response = [(await client.receive()).data for _ in range(1 + PIPELINED * 2)]
    assert response[1:] == [str(n) for n in range(PIPELINED * 2)]
    assert await client.is_closed()
    await either.wait_until_closed()


async def test_a_half_closed_client_gets_all_responses_after_a_rejected_body(tmp_path: Path) -> None:
    """The body ends at the end of a piece of input, and the requests after it are not parsed yet."""
    async with HttpHarness(ROUTES, tmp_path) as harness:
        lines = "\r\n" * PIECE_LINES
        rejected = request_bytes("POST", "/nowhere", lines.ljust(8 * PIECE_BYTES))
        rejected = request_bytes("POST", "/nowhere", lines.ljust(16 * PIECE_BYTES - len(rejected)))
        assert len(rejected) == 8 * PIECE_BYTES
        client = await harness.connect()
        client.send(rejected + request_bytes("POST", "/v1/jobs", "{}") * 500)  # of more than PIECE_LINES lines
        client.writer.write_eof()
        assert (await client.reader.read()).count(b"HTTP/1.1 200") == 500


@WRITES
async def test_a_half_closed_client_may_wait(either: HttpHarness, send: Any) -> None:
    held = HeldResponse(either, GRANTED)
    client = await waiting(either, send)
    client.writer.write_eof()
    connection = await half_closed(either)
    assert connection._hangup_check is not None
    connection._hangup_check._check(0)  # the client is still connected
    held.go.set()
    assert (await client.receive()).status == 200
    assert await client.is_closed()
    assert (either.actor.undelivered_responses, either.actor.cancelled.is_set()) == ([], False)


@pytest.mark.parametrize("sent", [b"", b"GET /v1/jobs HTT", request_bytes("GET", "/v1/jobs") + b"GET"])
async def test_the_end_of_input_closes_a_connection_without_pending_requests(either: HttpHarness, sent: bytes) -> None:
    client = await either.connect()
    client.send(sent)
    if sent.startswith(request_bytes("GET", "/v1/jobs")):
        assert (await client.receive()).status == 200
    client.writer.write_eof()
    assert await client.is_closed()


async def test_a_request_right_before_the_end_of_input_is_answered(either: HttpHarness) -> None:
    """Data and end arrive in one turn of the loop."""
    for request in (
        request_bytes("GET", "/v1/jobs"),
        request_bytes("GET", "/healthz"),
        request_bytes("GET", "/v1/jobs") * 2,
    ):
        client = await either.connect()
        client.send(request)
        client.writer.write_eof()
        assert [(await client.receive()).status for _ in range(request.count(b"GET"))] == [200] * request.count(b"GET")
        assert await client.is_closed()


@pytest.mark.parametrize("before", [b"", request_bytes("GET", "/v1/jobs")])
async def test_a_body_that_breaks_off_is_a_400(either: HttpHarness, before: bytes) -> None:
    for request in (request_bytes("POST", "/v1/jobs", '{"queue":"a"}')[:-1], CHUNKED + b"2\r\n{}\r\n"):
        client = await either.connect()
        client.send(before + request)
        client.writer.write_eof()
        if before:
            assert (await client.receive()).status == 200
        response = await client.receive()
        assert (response.status, response.error) == (400, "invalid_request")
        assert "ended too early" in response.json["message"]
        assert await client.is_closed()
    assert len(either.actor.received) == (2 if before else 0)


@WRITES
async def test_a_client_that_closes_while_it_waits_abandons_its_claim(either: HttpHarness, send: Any) -> None:
    """Over TCP this looks like a half-closed connection, until the first bytes of the response are sent."""
    held = HeldResponse(either, GRANTED)
    client = await waiting(either, send)
    await client.close()
    await either.actor.cancelled.wait()
    await either.wait_until_closed()
    await either.app.wait_idle()
    assert not held.go.is_set()
    assert either.app.error_counts == {}


@WRITES
async def test_a_client_that_half_closes_and_then_closes_abandons_its_claim(unix: HttpHarness, send: Any) -> None:
    HeldResponse(unix)
    client = await waiting(unix, send)
    client.writer.write_eof()
    await half_closed(unix)
    await client.close()
    await unix.actor.cancelled.wait()
    await unix.wait_until_closed()
    await unix.app.wait_idle()


@WRITES
async def test_the_probe_is_a_part_of_the_response(
    either: HttpHarness, monkeypatch: pytest.MonkeyPatch, send: Any
) -> None:
    """A closed client resets the connection at the probe, before the check: the rest of the response finds it gone."""
    monkeypatch.setattr("jobd.http.hangup.FIRST_CHECK_S", 3600)
    held = HeldResponse(either, GRANTED)
    client = await waiting(either, send)
    if either.port:
        await client.close()
        await half_closed(either)
    else:
        client.writer.write_eof()
        await half_closed(either)
        await client.close()
    held.go.set()
    assert await undelivered(either) == [GRANTED]


@pytest.mark.slow
@WRITES
@pytest.mark.parametrize("is_there", [True, False], ids=["half-closed", "closed"])
async def test_a_response_with_grants_waits_for_the_probe(
    tcp: HttpHarness, monkeypatch: pytest.MonkeyPatch, send: Any, is_there: bool
) -> None:
    """The reset of a closed client takes its time on a network: until then it looks like a half-closed one."""
    checks: list[bool] = []

    def is_probing(transport: asyncio.Transport) -> bool:
        checks.append(transport.is_closing())
        return not transport.is_closing() and (len(checks) < 3 or not is_there)

    monkeypatch.setattr("jobd.http.worker_connection.is_probing", is_probing)
    monkeypatch.setattr("jobd.http.hangup.FIRST_CHECK_S", 3600)
    monkeypatch.setattr("jobd.http.worker_connection.PROBE_S", 3600 if is_there else 0.01)
    held = HeldResponse(tcp, GRANTED)
    client = await waiting(tcp, send)
    client.writer.write_eof()
    await half_closed(tcp)
    held.go.set()
    if is_there:
        assert (await client.receive()).status == 200
    assert await undelivered(tcp) == ([] if is_there else [GRANTED])
    assert len(checks) >= 3


async def test_every_request_of_a_half_closed_connection_has_a_probe(
    tcp: HttpHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_probing(transport: asyncio.Transport) -> bool:
        transport.abort()  # the client has reset the connection
        return False

    monkeypatch.setattr("jobd.http.worker_connection.is_probing", is_probing)
    held = HeldResponse(tcp)
    client = await waiting(tcp, request=CLAIM + CLAIM)
    client.writer.write_eof()
    await half_closed(tcp)
    tcp.actor.respond = lambda _: GRANTED
    held.go.set()
    assert await undelivered(tcp) == [GRANTED]


@WRITES
async def test_a_connection_that_closes_during_the_probe_releases_its_grants(
    tcp: HttpHarness, monkeypatch: pytest.MonkeyPatch, send: Any
) -> None:
    checked = asyncio.Event()

    def is_probing(transport: asyncio.Transport) -> bool:
        checked.set()
        return not transport.is_closing()

    monkeypatch.setattr("jobd.http.worker_connection.is_probing", is_probing)
    held = HeldResponse(tcp, GRANTED)
    client = await waiting(tcp, send)
    client.writer.write_eof()
    connection = await half_closed(tcp)
    held.go.set()
    await checked.wait()
    assert connection.transport is not None
    connection.transport.abort()
    assert await undelivered(tcp) == [GRANTED]


async def test_tls_has_no_half_closed_connections(tmp_path: Path) -> None:
    async with await HttpHarness.on("tls", ROUTES, tmp_path) as harness:
        HeldResponse(harness)
        client = await waiting(harness)
        await client.close()
        await harness.actor.cancelled.wait()
        await harness.wait_until_closed()


# -- malformed requests ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["NUL in a header", "bad chunk size", "coding in disguise", "coding that is none", "both lengths", "no HTTP"],
)
async def test_requests_before_a_malformed_one_are_answered_first(either: HttpHarness, name: str) -> None:
    """They arrive in one segment, and each is executed once. Bytes after the malformed request are not read."""
    client = await either.connect()
    valid = [request_bytes("POST", "/v1/jobs", f'{{"id":"a-{n}"}}') for n in range(3)] + [
        request_bytes("GET", "/v1/jobs")
    ]
    client.send(b"".join(valid) + HOSTILE[name] + request_bytes("GET", "/v1/jobs"))
    assert [(await client.receive()).status for _ in valid] == [200] * len(valid)
    response = await client.receive()
    assert (response.status, response.error, response.headers["connection"]) == (400, "invalid_request", "close")
    client.send(request_bytes("GET", "/v1/jobs"))
    assert await client.is_closed()
    assert [getattr(envelope.command, "id", None) for envelope in either.actor.received] == ["a-0", "a-1", "a-2", None]


async def test_a_malformed_request_after_a_waiting_one_is_answered_after_it(harness: HttpHarness) -> None:
    held = HeldResponse(harness)
    client = await waiting(harness)
    client.send(request_bytes("GET", "/v1/jobs") + HOSTILE["NUL in a header"])
    await asyncio.sleep(0.01)
    client.send(HOSTILE["NUL in a header"])
    assert (await harness.request("GET", "/healthz")).status == 200
    held.go.set()
    assert [(await client.receive()).status for _ in range(3)] == [200, 200, 400]
    assert await client.is_closed()
    assert len(harness.actor.received) == 2


def in_chunks(job_id: str) -> bytes:
    body = b'{"id":"%b"}' % job_id.encode()
    return CHUNKED + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"


SHAPES: list[Callable[[str], bytes]] = [
    lambda job_id: request_bytes("POST", "/v1/jobs", f'{{"id":"{job_id}"}}'),
    lambda job_id: request_bytes("POST", "/v1/jobs", f'{{"id":"{job_id}","payload":"{"x" * 100_000}"}}'),
    lambda job_id: request_bytes("POST", "/v1/jobs", f'{{"id":"{job_id}"}}', {"Idempotency-Key": job_id}),
    lambda job_id: request_bytes("POST", f"/v1/jobs/{job_id}/cancel"),
    lambda job_id: request_bytes("GET", f"/v1/jobs/{job_id}"),
    in_chunks,
]
