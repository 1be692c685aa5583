"""Requests over a real socket: routing, the order of checks, responses, bugs, lost connections."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import Raw
from structlog.testing import capture_logs

from jobd.api.worker_routes import ROUTES
from jobd.http.auth import Authenticator, accepted_hosts
from jobd.http.decoding import Limits
from jobd.http.http_app import MAX_LINES_PER_SECOND, LogRateLimiter
from jobd.http.routing import Route, Router
from jobd.model.commands import Cancel, Get, Progress
from jobd.model.errors import ApiError
from jobd.model.responses import EmptyResponse, LockState, Response
from tests.support.http_harness import TOKEN, TRANSPORTS, HttpHarness, RawConnection, request_bytes
from tests.support.polling import wait_until

PROGRESS = '{"lock_id":"canary-lock","progress":50}'


@pytest.fixture(params=TRANSPORTS)
async def harness(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[HttpHarness]:
    limits = Limits(body=1000, payload=300, bulk=3)
    async with await HttpHarness.on(request.param, ROUTES, tmp_path, limits=limits) as opened:
        yield opened


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[HttpHarness]:
    """A TCP listener with a token and a list of host names."""
    authenticator = Authenticator("tcp", tokens=[TOKEN], hosts=accepted_hosts("127.0.0.1", ["ops.example"]))
    async with HttpHarness(ROUTES, tmp_path, authenticator=authenticator, limits=Limits(body=1000)) as opened:
        yield opened


def bearer(token: str = TOKEN) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture
async def client(harness: HttpHarness) -> RawConnection:
    return await harness.connect()


# -- routes ------------------------------------------------------------------------------------------------------------


async def test_a_request_becomes_a_command_and_its_response_is_sent(harness: HttpHarness) -> None:
    harness.actor.respond = lambda _: Response(LockState(5, 6, None))
    response = await harness.request("POST", "/v1/jobs/job-1/progress", PROGRESS)
    lock = {"lock_expires_at": 5, "ttl_ms": 6, "progress_due_at": None, "cancel_requested": False}
    assert (response.status, response.data) == (200, lock)
    [envelope] = harness.actor.received
    assert envelope.command == Progress(id="job-1", lock_id="canary-lock", progress=50)
    assert (envelope.by, envelope.admin, envelope.key, envelope.size) == ("client", False, None, len(PROGRESS))
    assert response.headers["content-type"] == "application/json"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", response.headers["date"])
    assert "connection" not in response.headers


@pytest.mark.parametrize(
    ("target", "job_id"),
    [("/v1/jobs/a%3Ab", "a:b"), ("/v1/jobs/bulk", "bulk"), ("/v1/jobs/%61", "a"), ("/v1/jobs/..", "..")],
)
async def test_an_id_in_the_path_is_decoded(harness: HttpHarness, target: str, job_id: str) -> None:
    assert (await harness.request("GET", target)).status == 200
    assert harness.actor.received[0].command == Get(id=job_id)


@pytest.mark.parametrize("target", ["/v1/jobs/a%20b", "/v1/jobs/a%2Fb", "/v1/jobs/%0A", "/v1/jobs/%ff", "/v1/jobs/a%"])
async def test_a_malformed_id_is_a_400(harness: HttpHarness, target: str) -> None:
    response = await harness.request("GET", target)
    assert (response.status, response.error, response.json["details"]) == (400, "invalid_request", {"field": "$.id"})


@pytest.mark.parametrize(
    "target",
    ["/", "/v1", "/v1/", "/v1/jobs/", "/v1/jobs/a/", "/v1/jobs/a/b", "/v1/jobs//start", "//v1/jobs", "/V1/jobs",
     "/v1/jobs/a/start/", "/v1/jobs;x", "/v1/jobs#x", "/v1/../v1/jobs", "/%76%31/jobs", "ftp://localhost/v1/jobs"],
)  # fmt: skip
async def test_an_unknown_path_is_a_404(harness: HttpHarness, target: str) -> None:
    assert (await harness.request("GET", target)).failure == (404, "not_found")
    assert harness.actor.received == []


@pytest.mark.parametrize(
    ("method", "target", "allow"),
    [
        ("PUT", "/v1/jobs", "GET, POST"),
        ("DELETE", "/v1/jobs/a", "GET"),
        ("HEAD", "/v1/jobs", "GET, POST"),
        ("OPTIONS", "/v1/jobs", "GET, POST"),
        ("POST", "/healthz", "GET, HEAD"),
        ("GET", "/v1/claim", "POST"),
        ("PATCH", "/v1/jobs/bulk", "GET, POST"),
        ("TRACE", "/v1/jobs/a/start", "POST"),
    ],
)
async def test_an_unknown_method_is_a_405_that_lists_the_allowed_ones(
    method: str, target: str, allow: str, client: RawConnection
) -> None:
    response = await client.request(method, target)
    assert (response.status, response.headers["allow"]) == (405, allow)
    assert not any(name.startswith("access-control") for name in response.headers)
    assert (await client.request("GET", "/v1/jobs")).status == 200  # the connection stays open, also after HEAD


def test_two_routes_for_one_call_fail_an_assertion() -> None:
    route = Route(method="GET", path="/a/{id}/b", request=Get, response=EmptyResponse, auth="worker")
    with pytest.raises(AssertionError):
        Router([route, route], Limits())


# -- the order of checks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [{}, bearer("wrong"), bearer("t\u00f6ken"), {"Authorization": TOKEN}])
@pytest.mark.parametrize("target", ["/v1/jobs", "/nowhere", "/v1/jobs/a%20b/start"])
async def test_the_token_is_checked_first(guarded: HttpHarness, target: str, headers: dict[str, str]) -> None:
    spoiled = {"Host": "evil.example", "Origin": "http://evil.example", "Content-Encoding": "gzip"}
    response = await guarded.request("PUT", target, "x" * 5000, {**spoiled, "Idempotency-Key": "x" * 300, **headers})
    assert (response.status, response.error) == (401, "unauthorized")
    assert response.headers["www-authenticate"] == "Bearer"


async def test_two_authorization_headers_are_rejected(guarded: HttpHarness) -> None:
    twice = f"GET /v1/jobs HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\nAuthorization: x\r\n\r\n"
    assert (await guarded.send_raw(twice.encode())).failure == (401, "unauthorized")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1:1"}, 200),
        ({"Host": "ops.example"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://localhost"}, 200),
        ({"Origin": "https://ops.example"}, 200),
    ],
)
async def test_host_and_origin_are_checked_before_the_path(
    guarded: HttpHarness, headers: dict[str, str], status: int
) -> None:
    assert (await guarded.request("GET", "/v1/jobs", headers={**bearer(), **headers})).status == status
    nowhere = await guarded.request("GET", "/nowhere", headers={**bearer(), **headers})
    assert nowhere.status == (404 if status == 200 else 403)


@pytest.mark.parametrize(("target", "status"), [("/nowhere", 404), ("/v1/jobs", 415)])
async def test_the_path_is_checked_before_the_content_type_and_that_before_the_size(
    harness: HttpHarness, target: str, status: int
) -> None:
    assert (await harness.request("POST", target, "x" * 5000, {"Content-Type": "text/plain"})).status == status


async def test_probes_need_no_token(guarded: HttpHarness) -> None:
    for target in ("/healthz", "/readyz"):
        response = await guarded.request("GET", target)
        assert (response.status, response.data) == (200, {"status": "ok"})
        response = await guarded.request("HEAD", target)
        assert (response.status, response.body, int(response.headers["content-length"]) > 0) == (200, b"", True)
    guarded.fakes.alive = False
    for target in ("/healthz", "/readyz"):
        response = await guarded.request("GET", target)
        assert (response.status, response.json) == (503, {"success": True, "data": {"status": "unavailable"}})


# -- bodies ------------------------------------------------------------------------------------------------------------


async def test_a_request_whose_fields_all_have_defaults_needs_no_body(harness: HttpHarness) -> None:
    assert (await harness.request("POST", "/v1/jobs/a/cancel")).status == 200
    assert harness.actor.received[0].command == Cancel(id="a")
    assert (await harness.request("POST", "/v1/jobs/a/cancel", "", {"Content-Type": "text/plain"})).status == 200


async def test_a_get_has_no_body_and_a_post_no_query(harness: HttpHarness) -> None:
    assert (await harness.request("GET", "/v1/jobs", "{}")).status == 400
    assert (await harness.request("POST", "/v1/jobs?queue=a", "{}")).status == 400
    assert (await harness.request("POST", "/v1/jobs?", "{}")).status == 200


def chunked(pieces: list[bytes], target: str = "/v1/jobs") -> bytes:
    head = f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head.encode() + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


async def test_a_body_at_its_limit_is_accepted_and_one_byte_more_is_not(harness: HttpHarness) -> None:
    body = '{"queue":"mail"}'.ljust(1000)
    assert (await harness.request("POST", "/v1/jobs", body)).status == 200
    assert (await harness.send_raw(chunked([body[:500].encode(), body[500:].encode()]))).status == 200
    for response in (
        await harness.request("POST", "/v1/jobs", body + " "),
        await harness.send_raw(chunked([body.encode(), b" "])),
        await harness.send_raw(chunked([b" " * 100] * 300)),
    ):
        assert (response.status, response.error, response.json["details"]) == (413, "too_large", {"limit": 1000})
        assert response.headers["connection"] == "close"


async def test_a_huge_content_length_is_rejected_before_the_body_arrives(client: RawConnection) -> None:
    client.send(request_bytes("POST", "/v1/jobs", b"", {"Content-Length": "99999999999"}))
    assert (await client.receive()).status == 413


@pytest.mark.parametrize(("length", "status"), [("2", b"100"), ("2 ", b"100"), ("1001", b"413")])
async def test_a_content_length_with_thousands_of_zeros_is_a_number(
    length: str, status: bytes, client: RawConnection
) -> None:
    headers = {"Content-Length": "0" * 5_000 + length, "Expect": "100-continue"}
    client.send(request_bytes("POST", "/v1/jobs", b"", headers))
    assert await client.reader.readexactly(12) == b"HTTP/1.1 " + status


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_body_that_does_not_arrive_is_a_408_and_closes_the_connection(tmp_path: Path, transport: str) -> None:
    async with await HttpHarness.on(transport, ROUTES, tmp_path, limits=Limits(body_deadline_s=0.05)) as harness:
        client = await harness.connect()
        client.send(request_bytes("POST", "/v1/jobs", b'{"queue"', {"Content-Length": "50"}))
        response = await client.receive()
        assert (response.status, response.error, response.headers["connection"]) == (408, "request_timeout", "close")
        assert await client.is_closed()
        assert harness.actor.received == []


async def test_an_http_1_0_client_never_receives_100_continue(harness: HttpHarness, client: RawConnection) -> None:
    request = request_bytes("POST", "/v1/jobs", "{}", {"Expect": "100-continue"}).replace(b"HTTP/1.1", b"HTTP/1.0")
    client.send(request[:-2])
    await wait_until(lambda: bool(harness.app.pending))
    client.send(request[-2:])
    assert (await client.receive()).status == 200


async def test_a_client_that_expects_100_continue_gets_its_error_before_the_body(guarded: HttpHarness) -> None:
    client = await guarded.connect()
    client.send(request_bytes("POST", "/v1/jobs", b"", {"Content-Length": "10", "Expect": "100-continue"}))
    assert (await client.receive()).status == 401


@pytest.mark.parametrize("target", ["http://x/v1/jobs?queue=a%3Ab", "HTTPS://[::1]:8/v1/jobs?queue=a%3Ab"])
async def test_a_target_may_be_a_whole_uri(harness: HttpHarness, target: str) -> None:
    for _ in range(2):
        assert (await harness.request("GET", target)).status == 200
        assert (await harness.request("POST", target.partition("?")[0], "{}", {"Idempotency-Key": "k"})).status == 200
    await harness.request("GET", "/v1/jobs?queue=a%3Ab")
    await harness.request("POST", "/v1/jobs", "{}", {"Idempotency-Key": "k"})
    envelope = [(envelope.command, envelope.key) for envelope in harness.actor.received]
    assert envelope[:2] == envelope[2:4] == envelope[4:]


@pytest.mark.parametrize(
    "target", ["http://x", "http://x/", "http://x?a", "http://u:p@x/v1/jobs", "ftp://x/v1/jobs", "http://x/v1/jobs#f"]
)
async def test_a_uri_with_an_unknown_path_is_not_found(harness: HttpHarness, target: str) -> None:
    assert (await harness.request("GET", target)).error == "not_found"


@pytest.mark.parametrize(
    ("uri", "host", "origin", "status"),
    [
        ("http://ops.example", "evil.example", None, 200),
        ("http://ops.example:8770", "", "http://ops.example:8770", 200),
        ("http://localhost:1", "localhost:2", "http://localhost:2", 403),
        ("http://evil.example", "ops.example", None, 403),
        ("http://evil.example:8770", "ops.example", "http://evil.example:8770", 403),
        ("http://ops.example.evil", "ops.example", None, 403),
        ("http://ops.example\\.evil.example", "ops.example", None, 400),
        ("http://ops.example@evil.example", "evil.example", None, 403),
    ],
)
async def test_the_host_of_a_uri_takes_precedence_over_the_header(
    guarded: HttpHarness, uri: str, host: str, origin: str | None, status: int
) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}", "Host": host} | ({"Origin": origin} if origin else {})
    for method, path, body in (("GET", "/v1/jobs", None), ("POST", "/v1/jobs", "{}"), ("GET", "/readyz", None)):
        assert (await guarded.request(method, f"{uri}{path}", body, headers)).status == status


# -- callers and idempotency keys --------------------------------------------------------------------------------------


async def test_the_key_is_scoped_and_the_body_hashed(harness: HttpHarness) -> None:
    for target, key, body in [
        ("/v1/jobs", "k", '{"queue":"a"}'),
        ("/v1/jobs", "k", '{"queue":"a"}'),
        ("/v1/jobs", "k", '{"queue":"b"}'),
        ("/v1/jobs", "l", '{"queue":"a"}'),
        ("/v1/jobs/x:y/cancel", "k", "{}"),
        ("/v1/jobs/x%3Ay/cancel", "k", "{}"),
    ]:
        assert (await harness.request("POST", target, body, {"Idempotency-Key": key})).status == 200
    uses = [envelope.key for envelope in harness.actor.received if envelope.key is not None]
    assert len(uses) == 6
    assert uses[0] == uses[1]
    assert uses[0].digest == uses[2].digest
    assert uses[0].body_hash != uses[2].body_hash
    assert len({use.digest for use in uses}) == 3
    assert uses[4] == uses[5]  # the same resource, spelled in two ways


@pytest.mark.parametrize(
    "second", ["Idempotency-Key: k", "Idempotency-Key: l", "idempotency-key:k", "IDEMPOTENCY-KEY: "]
)
async def test_two_keys_are_rejected(harness: HttpHarness, second: str) -> None:
    for _ in range(3):  # the head of the first one is cached by then
        assert (await harness.request("POST", "/v1/jobs", "{}", {"Idempotency-Key": "k"})).status == 200
    for keys in (f"k\r\n{second}", f"k\r\nX-A: b\r\n{second}"):
        for _ in range(2):
            response = await harness.request("POST", "/v1/jobs", "{}", {"Idempotency-Key": keys})
            assert (response.status, response.error) == (400, "invalid_request")
            assert response.json["details"] == {"field": "Idempotency-Key"}
            assert "more than once" in response.json["message"]
    assert len(harness.actor.received) == 3


# -- responses ---------------------------------------------------------------------------------------------------------


async def test_a_replayed_response_says_so_and_keeps_its_status(harness: HttpHarness) -> None:
    harness.actor.respond = lambda _: Response(Raw(b'{"id":"a"}'), status=201, replayed=True)
    response = await harness.request("POST", "/v1/jobs", "{}", {"Idempotency-Key": "k"})
    assert (response.status, response.headers["idempotent-replayed"], response.data) == (201, "true", {"id": "a"})


async def test_an_error_has_the_status_of_its_code(harness: HttpHarness) -> None:
    harness.actor.respond = lambda _: ApiError("already_locked", "Another worker has it.", {"locked_by": "w"})
    response = await harness.request("POST", "/v1/jobs/a/start", '{"worker":"v"}')
    assert response.status == 409
    assert response.json == {
        "success": False,
        "error": "already_locked",
        "message": "Another worker has it.",
        "details": {"locked_by": "w"},
    }
    assert "retry-after" not in response.headers


async def test_an_overload_says_when_to_retry(harness: HttpHarness) -> None:
    harness.actor.respond = lambda _: ApiError("overloaded", "Too many commands are waiting.")
    response = await harness.request("POST", "/v1/jobs", "{}")
    assert (response.status, response.headers["retry-after"]) == (503, "1")


@pytest.mark.parametrize(("header", "answered"), [("keep-alive", "keep-alive"), ("close", "close"), (None, "close")])
async def test_responses_to_http_1_0_clients_say_whether_the_connection_stays_open(
    header: str | None, answered: str, client: RawConnection
) -> None:
    connection = f"Connection: {header}\r\n" if header else ""
    request = f"GET /v1/jobs HTTP/1.0\r\nHost: x\r\n{connection}\r\n".encode()
    client.send(request)
    assert (await client.receive()).headers["connection"] == answered
    if answered == "close":
        assert await client.is_closed()
    else:
        client.send(request)
        assert (await client.receive()).status == 200


async def test_a_client_that_asks_to_close_gets_connection_close(client: RawConnection) -> None:
    assert (await client.request("GET", "/v1/jobs", headers={"Connection": "close"})).headers["connection"] == "close"
    assert await client.is_closed()


# -- lost connections --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grants", [[("a", "lock")], []])
async def test_a_response_with_grants_is_undelivered_if_the_connection_closed_before_its_first_byte(
    harness: HttpHarness, grants: list[tuple[str, str]]
) -> None:
    response = Response(EmptyResponse(), grants=grants)

    async def close_then_answer(_: Any) -> Response:
        [connection] = harness.connections
        assert connection.transport is not None
        connection.transport.close()
        return response

    harness.actor.respond = close_then_answer
    client = await harness.connect()
    client.send(request_bytes("POST", "/v1/claim", '{"worker":"w"}'))
    assert await client.is_closed()
    assert harness.actor.undelivered_responses == ([response] if grants else [])


async def test_the_grants_of_a_delivered_response_are_kept(harness: HttpHarness, client: RawConnection) -> None:
    harness.actor.respond = lambda _: Response(EmptyResponse(), grants=[("a", "lock")])
    assert (await client.request("POST", "/v1/claim", '{"worker":"w"}')).status == 200
    await client.close()
    await harness.stop(1)
    assert harness.actor.undelivered_responses == []


# -- bugs, logs, counters ----------------------------------------------------------------------------------------------


async def test_a_bug_costs_one_request_and_one_log_line_without_secrets(harness: HttpHarness) -> None:
    def fail(_: Any) -> Response:
        raise ValueError("canary-lock is broken")

    harness.actor.respond = fail
    client = await harness.connect()
    with capture_logs() as logs:
        response = await client.request("POST", "/v1/jobs/job-1/progress", PROGRESS)
    assert (response.status, response.error) == (500, "internal_error")
    assert "test_http_app.py" in logs[0].pop("where")
    bug = {"event": "request_bug", "log_level": "error", "command": "Progress", "job_id": "job-1"}
    assert logs[0] == bug | {"error": "ValueError"}
    assert "canary" not in str(logs)
    assert "canary" not in response.body.decode()
    harness.actor.respond = lambda _: Response(EmptyResponse())
    assert (await client.request("GET", "/v1/jobs")).status == 200


async def test_a_connection_error_of_a_handler_is_a_bug_unless_the_client_disconnected(harness: HttpHarness) -> None:
    def fail(_: Any) -> Response:
        raise ConnectionRefusedError("the artifact store is down")

    harness.actor.respond = fail
    assert (await harness.request("GET", "/v1/jobs")).status == 500


async def test_errors_are_counted_and_logged_in_one_line_without_secrets(guarded: HttpHarness) -> None:
    guarded.actor.respond = lambda _: ApiError("lock_lost", "The lock canary-lock is lost.", {"reason": "cancelled"})
    with capture_logs() as logs:
        await guarded.request("POST", "/v1/jobs/job-1/progress", PROGRESS, bearer())
        await guarded.request("POST", "/v1/jobs/job-1/progress", PROGRESS)
        await guarded.request("GET", f"/{TOKEN}", headers=bearer())
        await guarded.request("GET", "/v1/jobs/a%20b", headers=bearer())
    assert guarded.app.error_counts == {"lock_lost": 1, "unauthorized": 1, "not_found": 1, "invalid_request": 1}
    assert logs[0] == {
        "event": "rejected",
        "log_level": "info",
        "method": "POST",
        "path": "/v1/jobs/{id}/progress",
        "code": "lock_lost",
        "by": "client",
        "job_id": "job-1",
    }
    assert [entry["path"] for entry in logs[1:]] == ["/v1/jobs/{id}/progress", None, "/v1/jobs/{id}"]
    assert TOKEN not in str(logs)
    assert "canary" not in str(logs)


async def test_the_log_of_a_rejected_create_names_its_job(harness: HttpHarness) -> None:
    harness.actor.respond = lambda _: ApiError("job_exists", "There is such a job.")
    with capture_logs() as logs:
        await harness.request("POST", "/v1/jobs", '{"id": "job-7"}')
        await harness.request("POST", "/v1/jobs", "{}")
    assert [(entry["code"], entry["job_id"]) for entry in logs] == [("job_exists", "job-7"), ("job_exists", None)]


async def test_the_log_of_many_errors_is_rate_limited_but_all_are_counted(
    harness: HttpHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0
    monkeypatch.setattr(harness.app, "_log_limiter", LogRateLimiter(lambda: now_s))
    client = await harness.connect()
    with capture_logs() as logs:
        for _ in range(MAX_LINES_PER_SECOND + 30):
            await client.request("GET", "/v1/nothing")
        await client.request("GET", "/v1/jobs", "{}")
        now_s = 1.0
        await client.request("GET", "/v1/nothing")
    codes = [entry["code"] for entry in logs]
    assert codes == ["not_found"] * MAX_LINES_PER_SECOND + ["invalid_request", "not_found"]
    assert logs[-1]["left_out"] == 30
    assert all("left_out" not in entry for entry in logs[:-1])
    assert harness.app.error_counts == {"not_found": MAX_LINES_PER_SECOND + 31, "invalid_request": 1}


def test_each_kind_of_log_line_has_its_own_limit_and_suppressed_lines_are_counted() -> None:
    now_s = 5.0
    limiter = LogRateLimiter(lambda: now_s)
    suppressed = [limiter.suppressed("a") for _ in range(MAX_LINES_PER_SECOND + 7)]
    assert suppressed == [0] * MAX_LINES_PER_SECOND + [None] * 7
    assert limiter.suppressed("b") == 0
    now_s = 5.99
    assert limiter.suppressed("a") is None
    now_s = 6.0
    assert [limiter.suppressed("a"), limiter.suppressed("a"), limiter.suppressed("b")] == [8, 0, 0]
    now_s = 60.0
    assert limiter.suppressed("a") == 0
