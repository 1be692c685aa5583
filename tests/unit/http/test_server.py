"""Sockets and connections: malformed requests, idle clients, stops with pending requests, TLS, Unix sockets."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import random
import re
import socket
import ssl
import stat
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import StreamReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from jobd.api.admin_routes import ROUTES as ADMIN_ROUTES
from jobd.api.worker_routes import ROUTES
from jobd.config import Config, WorkerSection
from jobd.http.auth import Authenticator, accepted_hosts
from jobd.http.decoding import Limits
from jobd.http.parser import PIECE_BYTES, MalformedRequest, RequestParser
from jobd.http.server import is_in_use
from jobd.http.worker_request import WorkerRequest
from jobd.model.responses import EmptyResponse, Response
from jobd.resources import reload_certificates
from tests.support.http_harness import (
    LISTENERS,
    TOKEN,
    HeldResponse,
    HttpHarness,
    RawConnection,
    request_bytes,
    tls_pair,
)
from tests.support.malformed_requests import CHUNKED, GET, HOSTILE, POST
from tests.support.polling import wait_until


@pytest.fixture(params=LISTENERS)
async def harness(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[HttpHarness]:
    async with await HttpHarness.on(request.param, ROUTES, tmp_path, limits=Limits(body=1000)) as opened:
        yield opened


@pytest.fixture
async def unix(tmp_path: Path) -> AsyncIterator[HttpHarness]:
    async with HttpHarness(ROUTES, tmp_path) as opened:
        yield opened


@pytest.mark.parametrize("name", HOSTILE)
async def test_malformed_requests_get_a_4xx_in_json_and_never_reach_the_actor(harness: HttpHarness, name: str) -> None:
    with capture_logs() as logs:
        response = await harness.send_raw(HOSTILE[name])
    assert 400 <= response.status < 500
    assert response.headers["content-type"] == "application/json"
    assert response.json["success"] is False
    assert harness.actor.received == []
    assert [entry["event"] for entry in logs] == ["rejected"]
    assert sum(harness.app.error_counts.values()) == 1
    assert (await harness.request("GET", "/v1/jobs")).status == 200  # the listener still serves other clients


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (HOSTILE["doubled lengths"], 400),
        (POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (HOSTILE["CONNECT"], 404),
    ],
)
async def test_bytes_after_a_malformed_request_or_a_connect_are_not_a_request(
    harness: HttpHarness, data: bytes, status: int
) -> None:
    client = await harness.connect()
    client.send(data + request_bytes("POST", "/v1/jobs", "{}"))
    response = await client.receive()
    assert (response.status, response.headers["connection"]) == (status, "close")
    assert await client.is_closed()
    assert harness.actor.received == []


async def test_an_upgrade_is_handled_like_any_other_request(harness: HttpHarness) -> None:
    for name in ("websocket", "h2c"):
        headers = {"Connection": "Upgrade", "Upgrade": name}
        assert (await harness.request("GET", "/v1/jobs", headers=headers)).status == 200


@pytest.mark.parametrize("size", [1, 10, 10_000])
async def test_the_body_of_an_upgrade_is_not_a_request(tmp_path: Path, size: int) -> None:
    upgrade = POST + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: x\r\n"
    smuggled = request_bytes("POST", "/v1/jobs", '{"id":"smuggled"}')
    requests = [
        upgrade + b"Content-Length: %d\r\n\r\n" % len(smuggled) + smuggled,
        upgrade + b"Content-Length: 14\r\n\r\n" + b'{"queue":"qq"}',
        upgrade + b'Transfer-Encoding: chunked\r\n\r\ne\r\n{"queue":"qq"}\r\n0\r\n\r\n',
        GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        request_bytes("POST", "/v1/jobs", '{"id":"last"}'),
    ]
    async with HttpHarness(ROUTES, tmp_path) as harness:
        client = await harness.connect()
        data = b"".join(requests)
        for at in range(0, len(data), size):
            client.send(data[at : at + size])
            await asyncio.sleep(0)
        assert [(await client.receive()).status for _ in requests] == [400, 200, 200, 200, 200]
        assert [getattr(each.command, "id", "") for each in harness.actor.received] == [None, None, "", "last"]


@pytest.mark.parametrize(
    "rest",
    [
        b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\n{}",
        b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nIdempotency-Key: a\r\n\r\n",
    ],
)
async def test_the_admin_listener_closes_after_a_request_whose_successor_aiohttp_could_misread(
    tmp_path: Path, rest: bytes
) -> None:
    """aiohttp drops input behind an unknown upgrade, and adds a trailer to the next head."""
    async with await HttpHarness.on("admin unix", ROUTES, tmp_path) as harness:
        client = await harness.connect()
        hidden = request_bytes("POST", "/v1/jobs", '{"id":"hidden"}')
        client.send(POST + rest + POST + b"Content-Length: %d\r\n" % len(hidden))
        response = await client.receive()
        assert (response.status, response.headers["connection"]) == (200, "close")
        client.send(b"\r\n" + hidden)
        assert await client.is_closed()
        assert len(harness.actor.received) == 1


async def test_the_error_for_bytes_that_are_not_http_does_not_repeat_them(harness: HttpHarness) -> None:
    with capture_logs() as logs:
        response = await harness.send_raw(GET + f"Authorization: Bearer {TOKEN}\x00\r\n\r\n".encode())
    assert response.status == 400
    assert TOKEN not in str(logs)
    assert TOKEN not in response.body.decode()


@pytest.mark.parametrize("rest", [b"zz\r\n", b"3\r\n{}", b"1\r\n{}\r\n0\r\n\r\n"])
@pytest.mark.parametrize("listener", ["unix", "admin unix"])
async def test_a_body_whose_chunks_break_later_is_a_4xx_too(tmp_path: Path, rest: bytes, listener: str) -> None:
    async with await HttpHarness.on(listener, ROUTES, tmp_path, limits=Limits(body_deadline_s=0.05)) as harness:
        client = await harness.connect()
        client.send(POST + b"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(rest)
        assert (await client.receive()).status in {400, 408}
        assert await client.is_closed()
        assert harness.actor.received == []


@pytest.mark.parametrize("expect", ["200-ok", "100-continue, 200-ok", "100", "nonsense"])
async def test_an_expectation_that_cannot_be_met_is_a_417(harness: HttpHarness, expect: str) -> None:
    for headers in ({"Expect": expect}, {"Expect": expect, "Idempotency-Key": "k"}):
        assert (await harness.request("POST", "/v1/jobs", "{}", headers)).failure == (417, "expectation_failed")
    assert (await harness.request("GET", "/healthz", headers={"Expect": expect})).status == 417
    assert harness.actor.received == []
    client = await harness.connect()
    head, _, body = request_bytes("POST", "/v1/jobs", "{}", {"Expect": "100-Continue"}).partition(b"\r\n\r\n")
    client.send(head + b"\r\n\r\n")
    assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.send(body)
    assert (await client.receive()).status == 200


async def test_a_bug_outside_the_handler_closes_one_connection(
    harness: HttpHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("canary")

    harness.actor.respond = fail
    monkeypatch.setattr(harness.app, "log_internal_error", fail)
    client = await harness.connect()
    with capture_logs() as logs:
        response = await client.request("GET", "/v1/jobs")
    assert (response.status, response.error, response.headers["connection"]) == (500, "internal_error", "close")
    assert [entry["event"] for entry in logs] == ["connection_bug", "rejected"]
    assert "canary" not in str(logs) + response.body.decode()
    assert await client.is_closed()
    assert (await harness.request("GET", "/healthz")).status == 200


@pytest.mark.parametrize("sent", [b"", b"G", b"GET /v1/jobs HTTP/1.1\r\nHo", POST + b"Content-Length: 9\r\n\r\n{"])
async def test_a_client_that_disconnects_during_its_request_leaves_nothing_behind(
    harness: HttpHarness, sent: bytes
) -> None:
    with capture_logs() as logs:
        client = await harness.connect()
        client.send(sent)
        await client.close()
        await harness.wait_until_closed()
    assert harness.actor.received == []
    is_half_closed = bool(harness.port) and harness.tls is None and b"{" in sent  # as far as TCP shows
    assert [entry["event"] for entry in logs] == ["rejected"] * is_half_closed


async def test_a_client_that_resets_the_connection_leaves_nothing_behind(harness: HttpHarness) -> None:
    held = HeldResponse(harness)
    client = await harness.connect()
    client.send(request_bytes("POST", "/v1/jobs", "{}"))
    await harness.actor.arrived.wait()
    client.writer.transport.abort()
    await harness.actor.cancelled.wait()
    held.go.set()
    await harness.wait_until_closed()


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    junk=st.binary(min_size=1, max_size=300),
    start=st.sampled_from(
        [b"", GET, POST, POST + b"Content-Length: 40\r\n\r\n", POST + b"Transfer-Encoding: chunked\r\n\r\n"]
    ),
)
def test_any_bytes_get_a_status_below_500_or_none(junk: bytes, start: bytes, tmp_path: Path) -> None:
    async def run() -> None:
        async with HttpHarness(ROUTES, tmp_path, limits=Limits(body_deadline_s=0.01, idle_s=0.01)) as harness:
            client = await harness.connect()
            client.send(start + junk + b"\r\n\r\n")
            assert b"HTTP/1.1 5" not in (await client.reader.read())
            assert harness.app.error_counts["internal_error"] == 0

    asyncio.run(run())


def mutated_requests(dice: random.Random, name: str) -> bytes:
    """Return three requests, which may contain requests in their bodies and other errors."""
    stream = b""
    hidden = request_bytes("POST", "/v1/jobs", f'{{"id":"{name}-hidden"}}')
    for n in range(3):
        body = dice.choice([hidden, f'{{"id":"{name}-{n}"}}'.encode()])
        more = dice.choice([b"", b"", b"Connection: Upgrade\r\nUpgrade: h2c\r\n", b"Content-Length: 9\r\n"])
        if dice.random() < 0.7:
            stream += POST + more + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        else:
            stream += POST + more + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n" % (len(body), body)
            stream += dice.choice([b"\r\n", b"X-Trailer: a\r\n\r\n"])
    at = dice.randrange(2 * len(stream))
    return (
        stream[:at]
        + dice.choice([b"", b"\n", b"\r\n", b" ", b"\0", b":", b"1"])
        + stream[at + dice.choice([0, 1, 9]) :]
    )


def valid_bodies(stream: bytes) -> bytes:
    """Return the bodies of the requests before the first malformed one, as the worker listener parses them."""
    found: list[WorkerRequest] = []
    parser = RequestParser(found.append)
    with contextlib.suppress(MalformedRequest):
        parser.feed(stream)
    parser.close()
    return b"\n".join(bytes(each.body) for each in found if each.is_complete and not each.body.startswith(b"POST"))


@pytest.mark.slow
async def test_each_request_that_is_run_was_valid_at_its_place_in_the_input(tmp_path: Path) -> None:
    async with await HttpHarness.on(
        "admin unix", ROUTES, tmp_path, limits=Limits(idle_s=0.3, body_deadline_s=0.3)
    ) as harness:

        async def send(seed: int) -> bytes:
            dice = random.Random(seed)
            stream, client = mutated_requests(dice, str(seed)), await harness.connect()
            at = dice.choice([0, *(each.end() for each in re.finditer(b"\r\n\r\n", stream))])
            client.send(stream[:at])
            await asyncio.sleep(0.02 * (seed % 3))
            client.send(stream[at:])
            while not await client.is_closed():
                pass
            return stream

        streams: list[bytes] = []
        for first in range(0, 200, 50):
            streams += await asyncio.gather(*map(send, range(first, first + 50)))
        ids = [each.command.id for each in harness.actor.received if each.command.id is not None]
        assert len(ids) > 40
        for seed, stream in enumerate(streams):
            places = [valid_bodies(stream).find(f'"{each}"'.encode()) for each in ids if each.startswith(f"{seed}-")]
            assert -1 not in places, stream
            assert places == sorted(places), stream


class ParsedPieces:
    """The bytes that are parsed in each turn of the loop, of `size` bytes for each call of a method of a parser."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: type, method: str, size: Callable[..., int]) -> None:
        self._turns: Counter[int] = Counter()
        self._turn = 0
        parse = getattr(owner, method)

        def noted(*args: Any) -> Any:
            self._turns[self._turn] += size(*args)
            return parse(*args)

        monkeypatch.setattr(owner, method, noted)
        self._count()

    def _count(self) -> None:
        self._turn += 1
        asyncio.get_running_loop().call_soon(self._count)

    def assert_small(self) -> None:
        assert 0 < max(self._turns.values()) <= PIECE_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("path", [b"/v1/jobs", b"/v1/unknown"])
@pytest.mark.parametrize("listener", ["unix", "admin unix"])
async def test_many_chunks_are_parsed_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listener: str, path: bytes
) -> None:
    chunk = b"1\r\n \r\n"
    async with await HttpHarness.on(listener, ROUTES, tmp_path, limits=Limits(body=1000)) as harness:
        client = await harness.connect()
        if listener == "unix":
            parsed = ParsedPieces(monkeypatch, RequestParser, "feed", lambda _, data: len(data))
        else:
            parsed = ParsedPieces(monkeypatch, StreamReader, "begin_http_chunk_receiving", lambda _: len(chunk))
        client.send(CHUNKED.replace(b"/v1/jobs", path) + chunk * 100_000 + b"2\r\n{}\r\n0\r\n\r\n")
        assert (await client.receive()).error == ("not_found" if b"unknown" in path else "too_large")
        if listener == "unix" and b"unknown" in path:
            assert (await client.request("GET", "/healthz")).status == 200
        else:
            assert await client.is_closed()
        parsed.assert_small()
        assert harness.actor.received == []


async def test_many_chunks_within_the_limit_are_accepted(tmp_path: Path) -> None:
    async with HttpHarness(ROUTES, tmp_path) as harness:
        client = await harness.connect()
        body = b'{"queue":"mail"}'.rjust(30_000)
        chunks = b"".join(b"1\r\n%b\r\n" % body[at : at + 1] for at in range(len(body)))
        client.send((CHUNKED + chunks + b"0\r\n\r\n") * 2 + request_bytes("POST", "/v1/jobs", '{"queue":"next"}'))
        assert [(await client.receive()).status for _ in range(3)] == [200] * 3
        assert [envelope.command.queue for envelope in harness.actor.received] == ["mail", "mail", "next"]
        client.send(CHUNKED + chunks)
        await asyncio.sleep(0)
        client.writer.transport.abort()
        await harness.wait_until_closed()
        assert len(harness.actor.received) == 3


# -- time --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", b"GET /v1/jobs HT", GET + b"X-A: a"])
@pytest.mark.parametrize("transport", LISTENERS)
async def test_an_idle_or_half_sent_request_is_closed(tmp_path: Path, sent: bytes, transport: str) -> None:
    async with await HttpHarness.on(transport, ROUTES, tmp_path, limits=Limits(idle_s=0.05)) as harness:
        fresh = await harness.connect()
        fresh.send(sent)
        used = await _used(harness)
        used.send(sent)
        assert await fresh.is_closed()
        assert await used.is_closed()


async def _used(harness: HttpHarness) -> RawConnection:
    """Return a connection that has had a response, even if some were idle for too long before their request."""
    while True:
        client = await harness.connect()
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            assert (await client.request("GET", "/v1/jobs")).status == 200
            return client


async def test_a_waiting_call_is_not_idle(tmp_path: Path) -> None:
    async with HttpHarness(ROUTES, tmp_path, limits=Limits(idle_s=0.05)) as harness:
        held = HeldResponse(harness)
        parked = await harness.connect()
        parked.send(request_bytes("POST", "/v1/claim", '{"worker":"w","wait_ms":60000}'))
        while not harness.actor.received:
            await asyncio.sleep(0.001)
            if parked.reader.at_eof() or parked.reader.exception():  # it was idle for too long
                parked = await harness.connect()
                parked.send(request_bytes("POST", "/v1/claim", '{"worker":"w","wait_ms":60000}'))
        for _ in range(2):  # two later connections have been closed as idle
            assert await (await harness.connect()).is_closed()
        held.go.set()
        assert (await parked.receive()).status == 200
        assert await parked.is_closed()


async def test_a_slow_client_keeps_its_response_and_delays_no_other(harness: HttpHarness) -> None:
    harness.actor.respond = lambda _: Response("x" * 3_000_000)
    slow = await harness.connect()
    slow.writer.transport.pause_reading()  # type: ignore[attr-defined]
    slow.send(request_bytes("GET", "/v1/jobs") * 3)
    await harness.actor.arrived.wait()
    harness.actor.respond = lambda _: Response(EmptyResponse())
    assert (await harness.request("GET", "/v1/jobs")).status == 200
    slow.writer.transport.resume_reading()  # type: ignore[attr-defined]
    assert len((await slow.receive()).data) == 3_000_000
    assert [(await slow.receive()).status for _ in range(2)] == [200, 200]


async def test_a_client_that_never_reads_is_cut_off(harness: HttpHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobd.http.read_deadline.WRITE_TIMEOUT_S", 0.05)
    harness.actor.respond = lambda _: Response("x" * 30_000_000)
    slow = await harness.connect()
    slow.writer.transport.pause_reading()  # type: ignore[attr-defined]
    slow.send(request_bytes("GET", "/v1/jobs") * 2)  # a TLS transport takes one response, however long
    await harness.actor.arrived.wait()
    await harness.wait_until_closed()


async def test_a_response_is_counted_until_the_client_has_read_it(harness: HttpHarness) -> None:
    unread = harness.actor.unread
    harness.actor.respond = lambda _: Response("x" * 30_000_000)
    slow = await harness.connect()
    slow.writer.transport.pause_reading()  # type: ignore[attr-defined]
    slow.send(request_bytes("GET", "/v1/jobs"))
    await harness.actor.arrived.wait()
    await wait_until(lambda: unread.bytes >= 30_000_000)
    slow.writer.transport.resume_reading()  # type: ignore[attr-defined]
    assert len((await slow.receive()).data) == 30_000_000
    await wait_until(lambda: unread.bytes == 0)
    slow.writer.transport.pause_reading()  # type: ignore[attr-defined]
    slow.send(request_bytes("GET", "/v1/jobs"))
    await wait_until(lambda: unread.bytes >= 30_000_000)
    slow.writer.transport.abort()
    await wait_until(lambda: unread.bytes == 0)


# -- stop --------------------------------------------------------------------------------------------------------------


async def test_a_stop_answers_pending_requests_and_accepts_no_more(harness: HttpHarness) -> None:
    held = HeldResponse(harness)
    busy, idle, half = await harness.connect(), await harness.connect(), await harness.connect()
    assert (await idle.request("GET", "/healthz")).status == 200
    half.send(b"GET /v1/jobs HTTP/1.1\r\nHost: x\r\n")
    busy.send(request_bytes("POST", "/v1/jobs", "{}") + request_bytes("POST", "/v1/jobs", '{"queue":"second"}'))
    await harness.actor.arrived.wait()
    stopping = asyncio.ensure_future(harness.stop(30))
    assert await idle.is_closed()
    assert await half.is_closed()
    with pytest.raises(OSError, match=r".*"):
        await harness.connect()
    assert not stopping.done()
    held.go.set()
    response = await busy.receive()
    assert (response.status, response.headers["connection"]) == (200, "close")
    assert await busy.is_closed()
    await stopping
    assert len(harness.actor.received) == 1  # a request that was not started is not run
    assert harness.listener.connections == 0


async def test_a_request_that_has_just_arrived_is_answered(harness: HttpHarness) -> None:
    client = await harness.connect()
    assert (await client.request("GET", "/healthz")).status == 200
    client.send(request_bytes("POST", "/v1/jobs", "{}"))
    await asyncio.sleep(0)  # written, perhaps not yet read
    stopping = asyncio.ensure_future(harness.stop(30))
    try:
        response = await client.receive()
    except asyncio.IncompleteReadError:
        assert harness.actor.received == []  # never begun
    else:
        assert response.status == 200
    await stopping


async def test_a_stop_waits_for_a_body_that_is_arriving(harness: HttpHarness) -> None:
    client = await harness.connect()
    request = request_bytes("POST", "/v1/jobs", '{"queue":"mail"}', {"Expect": "100-continue"})
    client.send(request[:-3])
    assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    stopping = asyncio.ensure_future(harness.stop(30))
    await asyncio.sleep(0)
    client.send(request[-3:])
    response = await client.receive()
    assert (response.status, response.headers["connection"]) == (200, "close")
    await stopping


async def test_clients_that_reset_their_connections_are_not_errors_of_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    authenticator = Authenticator("admin", tokens=[TOKEN], hosts=["localhost"])
    async with HttpHarness(ADMIN_ROUTES, tmp_path, authenticator=authenticator, admin=True) as harness:
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", harness.port)) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close by a reset
                client.sendall(request_bytes("GET", "/healthz"))
        last = await harness.connect()
        assert (await last.request("GET", "/healthz")).status == 200
        await last.close()
        await harness.wait_until_closed()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_stop_can_reject_requests_whose_body_is_arriving(harness: HttpHarness) -> None:
    client, busy = await harness.connect(), await harness.connect()
    held = HeldResponse(harness)
    busy.send(request_bytes("POST", "/v1/jobs", '{"id":"a"}'))
    await harness.actor.arrived.wait()
    client.send(request_bytes("POST", "/v1/jobs", '{"id":"b"}', {"Expect": "100-continue"})[:-3])
    assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    await harness.listener.stop_accepting()
    harness.listener.reject_incomplete()
    response = await client.receive()
    assert (response.status, response.error) == (503, "shutting_down")
    assert response.headers["connection"] == "close"
    held.go.set()
    assert (await busy.receive()).status == 200
    await harness.stop(30)
    assert len(harness.actor.received) == 1


async def test_after_the_deadline_the_rest_is_cut_off(harness: HttpHarness) -> None:
    HeldResponse(harness)
    client = await harness.connect()
    client.send(request_bytes("POST", "/v1/jobs", "{}"))
    await harness.actor.arrived.wait()
    with capture_logs() as logs:
        await harness.stop(0.05)
    assert harness.actor.cancelled.is_set()
    assert await client.is_closed()
    assert [entry["event"] for entry in logs] == ["requests_cut_off"]


# -- sockets -----------------------------------------------------------------------------------------------------------


async def test_a_unix_socket_has_its_permissions_and_is_removed_by_the_stop(unix: HttpHarness) -> None:
    directory = os.path.dirname(unix.path)
    assert stat.S_IMODE(os.stat(unix.path).st_mode) == 0o660
    assert os.listdir(directory) == ["api.sock"]
    await unix.stop(1)
    assert os.listdir(directory) == []


async def test_stale_sockets_are_replaced(tmp_path: Path) -> None:
    for name in ("api.sock", f"api.sock.{os.getpid()}"):  # a kill between bind and rename leaves the second one
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(tmp_path / name))
    async with HttpHarness(ROUTES, tmp_path) as harness:
        assert (await harness.request("GET", "/v1/jobs")).status == 200


async def test_a_directory_that_another_user_has_locked_does_not_delay_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobd.http.server.LOCK_S", 0.01)
    opened = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(opened, fcntl.LOCK_EX)
    async with HttpHarness(ROUTES, tmp_path) as harness:
        assert (await harness.request("GET", "/v1/jobs")).status == 200
    os.close(opened)


async def test_a_path_that_is_not_a_socket_is_kept(tmp_path: Path) -> None:
    (tmp_path / "api.sock").write_text("precious")
    with pytest.raises(OSError, match="is not a socket"):
        async with HttpHarness(ROUTES, tmp_path):
            pass
    assert (tmp_path / "api.sock").read_text() == "precious"


async def test_a_socket_in_use_is_kept(unix: HttpHarness, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="another process listens there") as rejected:
        async with HttpHarness(ROUTES, tmp_path):
            pass
    assert rejected.value.errno == errno.EADDRINUSE
    assert os.listdir(tmp_path) == ["api.sock"]
    assert (await unix.request("GET", "/v1/jobs")).status == 200


def test_an_address_is_in_use_while_a_process_listens_on_it(tmp_path: Path) -> None:
    path = str(tmp_path / "api.sock")
    assert not is_in_use(path)
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(path)
        assert not is_in_use(path)
        unix.listen(0)
        assert is_in_use(path)
        assert is_in_use(path)  # its backlog is full
    assert not is_in_use(path)
    with socket.create_server(("127.0.0.1", 0)) as tcp:
        port = tcp.getsockname()[1]
        assert is_in_use(("127.0.0.1", port))
    assert not is_in_use(("127.0.0.1", port))
    assert not is_in_use("x" * 200)


async def test_a_missing_directory_and_a_long_path_are_errors(tmp_path: Path) -> None:
    for place in (tmp_path / "missing", tmp_path / ("x" * 120)):
        with pytest.raises(OSError, match=r"."):
            async with HttpHarness(ROUTES, place):
                pass
    assert os.listdir(tmp_path) == []


async def test_a_stop_leaves_the_socket_of_another_daemon(tmp_path: Path) -> None:
    first, second = HttpHarness(ROUTES, tmp_path), HttpHarness(ROUTES, tmp_path)
    async with first:
        os.unlink(first.path)
        async with second:
            await first.stop(1.0)
            assert (await second.request("GET", "/v1/jobs")).status == 200
    assert os.listdir(tmp_path) == []


async def test_a_socket_from_systemd_is_used(unix: HttpHarness, tmp_path: Path) -> None:
    given = socket.socket(socket.AF_UNIX)
    given.bind(str(tmp_path / "given.sock"))
    tcp = socket.socket()
    tcp.bind(("127.0.0.1", 0))
    with_tls = socket.socket()
    with_tls.bind(("127.0.0.1", 0))
    server, trusting = await tls_pair(tmp_path)
    await unix.listener.open_socket(given)
    await unix.listener.open_socket(tcp)
    await unix.listener.open_socket(with_tls, tls=server)
    for pair in (
        await asyncio.open_unix_connection(str(tmp_path / "given.sock")),
        await asyncio.open_connection("127.0.0.1", tcp.getsockname()[1]),
        await asyncio.open_connection("localhost", with_tls.getsockname()[1], ssl=trusting),
    ):
        client = RawConnection(*pair)
        assert (await client.request("GET", "/v1/jobs")).status == 200
        await client.close()


async def test_the_address_of_a_connection_is_a_name_of_the_daemon(tmp_path: Path) -> None:
    authenticator = Authenticator("tcp", hosts=["jobs.example"])
    async with HttpHarness(ROUTES, tmp_path, authenticator=authenticator) as harness:
        assert (await harness.request("GET", "/v1/jobs", headers={"Host": f"127.0.0.1:{harness.port}"})).status == 200
        assert (await harness.request("GET", "/v1/jobs", headers={"Host": "127.0.0.2"})).status == 403


async def test_a_certificate_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "next").mkdir()
    server, client = await tls_pair(tmp_path)
    _, next_client = await tls_pair(tmp_path / "next")
    worker = WorkerSection(tls_cert=str(tmp_path / "cert.pem"), tls_key=str(tmp_path / "key.pem"))
    settings = Config(worker=worker)
    authenticator = Authenticator("tcp", hosts=accepted_hosts("127.0.0.1"))
    async with HttpHarness(ROUTES, tmp_path, authenticator=authenticator) as harness:
        harness.listener.tls = server
        [(_, port)] = await harness.listener.open_tcp("127.0.0.1", 0, tls=server)

        async def status(trusting: ssl.SSLContext) -> int:
            pair = await asyncio.open_connection("127.0.0.1", port, ssl=trusting, server_hostname="localhost")
            connection = RawConnection(*pair)
            response = await connection.request("GET", "/v1/jobs")
            await connection.close()
            return response.status

        assert await status(client) == 200
        (tmp_path / "key.pem").write_bytes((tmp_path / "next/key.pem").read_bytes())
        with capture_logs() as logs:
            reload_certificates({"worker-tcp": harness.listener}, settings)  # the key is that of another certificate
        [entry] = logs
        assert (entry["event"], entry["listener"]) == ("reload_failed", "worker-tcp")
        assert (entry["kept"], "key.pem" in entry["reason"]) == ("the old certificate", True)
        assert await status(client) == 200
        (tmp_path / "cert.pem").write_bytes((tmp_path / "next/cert.pem").read_bytes())
        reload_certificates({"worker-tcp": harness.listener}, settings)
        assert await status(next_client) == 200
        with pytest.raises(ssl.SSLCertVerificationError):
            await status(client)
