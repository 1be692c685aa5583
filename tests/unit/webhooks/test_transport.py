"""Delivery attempts over real HTTP: success and failure, limits, blocked addresses, signatures."""

from __future__ import annotations

import asyncio
import base64
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from msgspec.structs import replace
from standardwebhooks import Webhook

from jobd.model.webhooks import Delivery, DeliveryOutcome, WebhookEndpoint
from jobd.webhooks import transport
from jobd.webhooks.transport import HttpTransport, Resolver
from tests.support.http_harness import tls_pair
from tests.support.webhook_receiver import Receiver, echoing, raw_server, responding

KEY = b"k" * 24
DELIVERY = Delivery(
    1, "e", "waiting", "jobs/a", "job.failed", "evt_1_1", 1, 0, 0, 0, None, None, None, '{"a":"ü"}'.encode()
)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as opened:
        yield opened


@pytest.fixture
async def sender() -> AsyncIterator[HttpTransport]:
    made = HttpTransport(allow_private=True, connections=4, wall=lambda: time.time_ns() // 1_000_000)
    yield made
    await made.close()


@pytest.fixture
async def restricted() -> AsyncIterator[HttpTransport]:
    """A transport that allows no private addresses."""
    made = HttpTransport(allow_private=False, connections=4, wall=lambda: time.time_ns() // 1_000_000)
    yield made
    await made.close()


def to(url: str, **fields: Any) -> WebhookEndpoint:
    return WebhookEndpoint("e", url, (KEY,), **fields)


async def test_a_signed_message_is_verified_by_another_implementation(
    sender: HttpTransport, receiver: Receiver
) -> None:
    assert await sender.post(to(receiver.url), DELIVERY) == DeliveryOutcome(204)
    (received,) = receiver.received
    assert received.body == DELIVERY.body
    assert received.headers["Content-Type"] == "application/cloudevents+json; charset=utf-8"
    assert received.headers["webhook-id"] == "evt_1_1"
    assert received.headers["User-Agent"].startswith("jobd/")
    secret = f"whsec_{base64.b64encode(KEY).decode()}"
    headers = {name.lower(): value for name, value in received.headers.items()}
    assert Webhook(secret).verify(received.body, headers) == {"a": "ü"}


async def test_a_connection_is_reused(sender: HttpTransport, receiver: Receiver) -> None:
    ports = set()

    async def response(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        ports.add(request.transport.get_extra_info("peername")[1])
        return web.Response(text="thanks")

    receiver.respond = response
    for _ in range(3):
        assert (await sender.post(to(receiver.url), DELIVERY)).error is None
    assert len(ports) == 1


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
async def test_every_2xx_is_a_success(sender: HttpTransport, receiver: Receiver, status: int) -> None:
    receiver.respond = responding(status)
    assert await sender.post(to(receiver.url), DELIVERY) == DeliveryOutcome(status)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_no_redirect_is_followed(sender: HttpTransport, receiver: Receiver, status: int) -> None:
    receiver.respond = responding(status, Location=f"http://127.0.0.1:{receiver.port}/elsewhere")
    outcome = await sender.post(to(receiver.url), DELIVERY)
    assert outcome.status == status
    assert "redirects are not followed" in (outcome.error or "")
    assert [received.path for received in receiver.received] == ["/hook"]


async def test_an_error_response_is_shown_in_one_short_line(sender: HttpTransport, receiver: Receiver) -> None:
    receiver.respond = responding(500, "böse\n\x1b[31mrot " + "x" * 5_000)
    error = (await sender.post(to(receiver.url), DELIVERY)).error or ""
    assert error.startswith("500: böse [31mrot xxx")
    assert len(error) < 250
    assert error.isprintable()
    receiver.respond = responding(401)
    assert await sender.post(to(receiver.url), DELIVERY) == DeliveryOutcome(401, "401")


@pytest.mark.parametrize(
    ("header", "wait_ms"),
    [("7", 7_000), ("99999", 3_600_000), ("", None), ("soon", None), ("-1", None), ("9" * 40, None), ("²", None)],
)
async def test_retry_after_is_respected(
    sender: HttpTransport, receiver: Receiver, header: str, wait_ms: int | None
) -> None:
    receiver.respond = responding(503, **{"Retry-After": header})
    assert (await sender.post(to(receiver.url), DELIVERY)).retry_after_ms == wait_ms


async def test_410_is_reported_as_gone(sender: HttpTransport, receiver: Receiver) -> None:
    receiver.respond = responding(410)
    assert (await sender.post(to(receiver.url), DELIVERY)).gone


async def endless(status: int, request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(status=status)
    await response.prepare(request)
    while True:
        await response.write(b"x" * 65_536)


@pytest.mark.parametrize("status", [200, 500])
async def test_only_the_start_of_an_endless_response_is_read(
    sender: HttpTransport, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(transport, "DRAIN_S", 3_600)
    receiver.respond = lambda request: endless(status, request)
    outcome = await sender.post(to(receiver.url, timeout_ms=3_600_000), DELIVERY)
    assert outcome.status == status
    assert (outcome.error is None) == (status == 200)
    receiver.respond = responding(204)
    assert (await sender.post(to(receiver.url), DELIVERY)).error is None  # over another connection


async def slow(status: int, request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(status=status, headers={"Retry-After": "7"})
    await response.prepare(request)
    await response.write(b"x")
    await asyncio.sleep(20)
    return response


@pytest.mark.parametrize(
    "outcome",
    [DeliveryOutcome(200), DeliveryOutcome(503, "503", 7_000), DeliveryOutcome(410, "410", 7_000, gone=True)],
)
async def test_the_status_decides_despite_a_slow_body(
    sender: HttpTransport, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, outcome: DeliveryOutcome
) -> None:
    monkeypatch.setattr(transport, "DRAIN_S", 0.1)
    receiver.respond = lambda request: slow(outcome.status or 0, request)
    assert await sender.post(to(receiver.url), DELIVERY) == outcome


async def test_a_slow_response_times_out(sender: HttpTransport, receiver: Receiver) -> None:
    async def silent(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(20)
        raise AssertionError

    receiver.respond = silent
    outcome = await sender.post(to(receiver.url, timeout_ms=300), DELIVERY)
    assert outcome == DeliveryOutcome(None, "There was no response within 0.3 s.")


@pytest.mark.parametrize("response", [b"", b"HTTP/1.1 200\x00 OK\r\n" + b"x" * 100_000, b"SSH-2.0-x\r\n"])
async def test_a_closed_connection_or_invalid_http_is_a_failure(sender: HttpTransport, response: bytes) -> None:
    with raw_server(lambda _: response) as port:
        outcome = await sender.post(to(f"http://127.0.0.1:{port}/"), DELIVERY)
    assert outcome.status is None
    assert outcome.error
    assert outcome.error.isprintable()
    assert len(outcome.error) < 250


HUSH = ("HUSH-path-1", "HUSH query 2", "HUSH%20query%202", "HUSH+query+2", "hush%2fpath", "hush/path")
PLACE = "/HUSH-path-1/HUSH%2fpath?token=HUSH%20query%202&b=HUSH-path-1"
NO, END = b"HTTP/1.1 500 No\r\n", b"\r\n\r\n"
FAILURES: dict[str, tuple[bytes, int, str]] = {
    "no http": (b"SSH-2.0-", 0, "does not speak valid HTTP"),
    "no http, at length": (b"SSH-2.0-", 100_000, "does not speak valid HTTP"),
    "bad status": (b"HTTP/1.1 2\x000 ", 0, "does not speak valid HTTP"),
    "bad header": (NO + b"A: b\r\n ", 100_000, "does not speak valid HTTP"),
    "bad chunk": (NO + b"Transfer-Encoding: chunked" + END, 0, "does not speak valid HTTP"),
    "less than it said": (NO + b"Content-Length: 9999" + END, 0, "500"),
    "a rejection": (b"HTTP/1.1 404 No" + END, 0, "404: Cannot POST …"),
    "too large": (b"HTTP/1.1 413 No" + END, 100_000, "413: Cannot POST … xxx"),
    "bad redirect": (b"HTTP/1.1 302 No\r\nLocation: http://[", 0, "closed before a response arrived"),
    "worse redirect": (b"HTTP/1.1 308 No\r\nLocation: http://[/" + END, 0, "redirects are not followed"),
    "long redirect": (b"HTTP/1.1 308 No\r\nLocation: ", 100_000, "does not speak valid HTTP"),
}


def assert_hushed(outcome: DeliveryOutcome) -> str:
    """Check that there is an error without a secret part of the URL, and return it."""
    assert outcome.error is not None
    assert [secret for secret in HUSH if secret.lower() in outcome.error.lower()] == []
    return outcome.error


@pytest.mark.parametrize("why", FAILURES)
async def test_errors_show_only_the_host_of_the_url(sender: HttpTransport, why: str) -> None:
    head, more, expected = FAILURES[why]
    with raw_server(echoing(head, more)) as port:
        outcome = await sender.post(to(f"http://127.0.0.1:{port}{PLACE}", timeout_ms=5_000), DELIVERY)
    error = assert_hushed(outcome)
    assert expected in error
    assert len(error) < 250


async def test_a_refused_connection_shows_only_the_host_of_the_url(sender: HttpTransport) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    outcome = await sender.post(to(f"http://127.0.0.1:{port}{PLACE}"), DELIVERY)
    assert outcome.error == f"127.0.0.1:{port} cannot be reached: Connection refused."


@pytest.mark.parametrize("host", ["127.1", "300.300.300.300", "x\\y", "nobody.invalid", "a..b", "[::1%25]"])
async def test_an_invalid_url_shows_only_its_host(sender: HttpTransport, host: str) -> None:
    assert_hushed(await sender.post(to(f"http://{host}{PLACE}", timeout_ms=5_000), DELIVERY))


@pytest.mark.slow
async def test_a_wrong_certificate_shows_only_the_host_of_the_url(
    sender: HttpTransport, restricted: HttpTransport, tmp_path: Path
) -> None:
    with raw_server(lambda _: b"", (await tls_pair(tmp_path))[0]) as port:
        for each, place in (
            (sender, f"localhost:{port}"),
            (sender, f"127.0.0.1:{port}"),
            (restricted, f"127.0.0.1:{port}"),
        ):
            assert_hushed(await each.post(to(f"https://{place}{PLACE}"), DELIVERY))
    with raw_server(lambda _: b"this is no TLS") as port:
        assert_hushed(await sender.post(to(f"https://127.0.0.1:{port}{PLACE}"), DELIVERY))


async def test_an_untrusted_certificate_is_rejected(sender: HttpTransport, tmp_path: Path) -> None:
    with raw_server(lambda _: b"HTTP/1.1 200 OK\r\n\r\n", (await tls_pair(tmp_path))[0]) as port:
        outcome = await sender.post(to(f"https://localhost:{port}/"), DELIVERY)
    assert "certificate" in (outcome.error or "")
    assert outcome.status is None


async def test_a_trusted_certificate_is_accepted(tmp_path: Path) -> None:
    ours, theirs = await tls_pair(tmp_path)
    received = []

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        received.append(await request.read())
        return web.Response()

    runner = web.ServerRunner(web.Server(handle))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=ours).start()
    trusting = HttpTransport(allow_private=True, connections=1, wall=lambda: 0, tls=theirs)
    port = runner.addresses[0][1]
    assert (await trusting.post(to(f"https://localhost:{port}/"), DELIVERY)).error is None
    other_name = await trusting.post(to(f"https://127.0.0.1:{port}/"), DELIVERY)
    assert "certificate" in (other_name.error or "")
    await trusting.close()
    await runner.cleanup()
    assert received == [DELIVERY.body]


# -- blocked addresses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "127.1", "2130706433", "0x7f.1", "0.0.0.0", "10.0.0.1"],
)
async def test_private_addresses_are_blocked(restricted: HttpTransport, receiver: Receiver, host: str) -> None:
    outcome = await restricted.post(to(f"http://{host}:{receiver.port}/hook", timeout_ms=2_000), DELIVERY)
    assert re.search("webhooks may not connect to it|canonical", outcome.error or "")
    assert receiver.received == []


async def test_the_connected_address_is_checked_not_an_earlier_lookup(
    restricted: HttpTransport, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name server that returns another address each time: the connected address is the one that is checked."""
    lookups = []

    def rebinding(host: str, port: int, *args: Any, **more: Any) -> list[Any]:
        lookups.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    for _ in range(2):
        outcome = await restricted.post(to(f"http://rebinding.test:{receiver.port}/"), DELIVERY)
        assert "127.0.0.1 is loopback" in (outcome.error or "")
        assert "set allow_private" in (outcome.error or "")
    assert lookups == ["rebinding.test"] * 2
    assert receiver.received == []


async def test_proxies_of_the_environment_are_ignored(
    sender: HttpTransport, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9/")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9/")
    assert (await sender.post(to(receiver.url), DELIVERY)).error is None


async def test_cookies_are_not_stored(sender: HttpTransport, receiver: Receiver) -> None:
    receiver.respond = responding(200, **{"Set-Cookie": "session=1; Path=/"})
    for _ in range(2):
        await sender.post(to(receiver.url), DELIVERY)
    assert all("Cookie" not in received.headers for received in receiver.received)


# -- host names --------------------------------------------------------------------------------------------------------


async def test_an_unknown_host_name_is_reported(sender: HttpTransport) -> None:
    outcome = await sender.post(to("http://nobody.invalid/"), DELIVERY)
    assert "The host name nobody.invalid cannot be resolved" in (outcome.error or "")


async def test_a_hanging_name_server_costs_one_attempt_and_limited_lookups(
    sender: HttpTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    def hanging(*_: Any, **__: Any) -> list[Any]:
        gate.wait(20)
        raise OSError("at last")

    monkeypatch.setattr(socket, "getaddrinfo", hanging)
    monkeypatch.setattr(transport, "MAX_LOOKUPS", 2)
    try:
        for _ in range(2):
            outcome = await sender.post(to("http://hanging.test/", timeout_ms=100), DELIVERY)
            assert outcome == DeliveryOutcome(None, "There was no response within 0.1 s.")
        outcome = await sender.post(to("http://hanging.test/", timeout_ms=100), DELIVERY)
        assert "too many name lookups" in (outcome.error or "")
    finally:
        gate.set()


async def test_host_names_are_resolved() -> None:
    found = await Resolver().resolve("localhost", 80, socket.AF_INET)
    assert [(each["host"], each["port"], each["family"]) for each in found] == [("127.0.0.1", 80, socket.AF_INET)]
    with pytest.raises(OSError, match="not a valid host name"):
        await Resolver().resolve("a" * 70 + ".test", 80, socket.AF_INET)


async def test_names_are_looked_up_again_once_threads_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    resolver = Resolver()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        for _ in range(transport.MAX_LOOKUPS):
            with pytest.raises(OSError, match="no thread can be started"):
                await resolver.resolve("localhost")
    assert await resolver.resolve("localhost")


async def test_changed_settings_apply_to_the_next_attempt(sender: HttpTransport, receiver: Receiver) -> None:
    await sender.post(to(receiver.url), DELIVERY)
    await sender.post(replace(to(receiver.url), secrets=(b"n" * 24, KEY)), DELIVERY)
    assert [len(received.headers["webhook-signature"].split()) for received in receiver.received] == [1, 2]
