"""The clients against a scripted peer: lost answers, refusals, stale connections; and against the daemon's routes."""

from __future__ import annotations

import asyncio
import inspect
import io
import os
import pickle
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

import jobd.client
from jobd.api import admin as admin_api
from jobd.api import worker
from jobd.client import (
    ERRORS,
    AdminClient,
    AlreadyLocked,
    AsyncAdminClient,
    AsyncJobClient,
    BadAnswer,
    Endpoint,
    InvalidRequest,
    JobClient,
    JobdError,
    JobNotFound,
    LockLost,
    Overloaded,
    RetryPolicy,
    Unreachable,
    admin_endpoint,
    admin_requests,
    default_socket,
    parse_endpoint,
    uuid7,
    worker_endpoint,
    worker_requests,
)
from jobd.client.protocol import (
    RETRIED,
    ApiRequest,
    ApiResponse,
    RetryState,
    get,
    job_path,
    json_lines,
    read_result,
)
from jobd.model.errors import ERROR_STATUS
from jobd.model.responses import JobView, LockState
from tests.conftest import tool_missing
from tests.support.scripted_server import ScriptedServer, closing, drop, early, no, ok, raw, serving

JOB: dict[str, Any] = {
    "id": "j1",
    "queue": "default",
    "kind": "",
    "payload": {"a": 1},
    "priority": 0,
    "status": "queued",
    "progress": 0,
    "progress_message": None,
    "attempt": 0,
    "max_attempts": 1,
    "backoff": {"kind": "exponential", "base_ms": 1000, "max_ms": 3600000, "jitter": True},
    "stalls": 0,
    "max_stalls": 3,
    "on_stall": "auto",
    "stuck_after_ms": 600000,
    "max_processing_ms": 1800000,
    "created_at": 1,
    "updated_at": 1,
    "run_at": 1,
    "started_at": None,
    "finished_at": None,
    "expires_at": None,
    "lock": None,
    "download_url": None,
    "file_path": None,
    "storage_key": None,
    "metadata": {"m": [1]},
    "error_message": None,
    "error_code": None,
    "a_field_of_the_future": 1,
}
EMPTY_PAGE = ok({"jobs": [], "next_cursor": None})
FAST = RetryPolicy(total_s=5, base_s=0.001, max_s=0.002, timeout_s=5)


@pytest.fixture
def peer() -> ScriptedServer:
    return ScriptedServer()


@pytest.fixture
def endpoint(peer: ScriptedServer, tmp_path: Path) -> Iterator[str]:
    with serving(peer, tmp_path / "s") as where:
        yield where


class Both:
    """One call, made with the blocking client or with the asyncio one: both must behave alike."""

    def __init__(self, is_async: bool, endpoint: str) -> None:
        self._is_async = is_async
        self._endpoint = endpoint

    def __call__(self, *requests: ApiRequest[Any], policy: RetryPolicy | None = FAST) -> Any:
        if not self._is_async:
            with JobClient(self._endpoint) as client:
                return [client.send(request, policy) for request in requests][-1]
        return asyncio.run(self._async(requests, policy))

    async def _async(self, requests: tuple[ApiRequest[Any], ...], policy: RetryPolicy | None) -> Any:
        async with AsyncJobClient(self._endpoint) as client:
            return [await client.send(request, policy) for request in requests][-1]


@pytest.fixture(params=[False, True], ids=["sync", "asyncio"])
def send(request: pytest.FixtureRequest, endpoint: str) -> Both:
    return Both(request.param, endpoint)


# ---------------------------------------------------------------------------------------------------------------------
# Messages.


def test_every_refusal_has_an_error_of_its_own_with_the_same_status() -> None:
    ours = {code: kind.status for code, kind in ERRORS.items() if code not in ("unreachable", "bad_answer")}
    assert ours == ERROR_STATUS
    assert {kind.__name__ for kind in ERRORS.values()} <= set(jobd.client.__all__)


def test_all_names_of_the_package_can_be_imported_and_others_say_so() -> None:
    assert all(getattr(jobd.client, name) is not None for name in jobd.client.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = jobd.client.Nothing


def test_errors_survive_pickling_and_show_their_code() -> None:
    error = LockLost("Gone.", details={"reason": "cancelled", "cancel_requested": True}, status=409)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.reason, again.cancel_requested, str(again)) == (
        LockLost,
        "cancelled",
        True,
        "Gone. [lock_lost]",
    )


def test_details_of_another_shape_are_none_rather_than_a_surprise() -> None:
    error = AlreadyLocked("Taken.", details={"locked_by": 5, "lock_expires_at": True})
    assert (error.locked_by, error.lock_expires_at) == (None, None)
    assert not LockLost("Gone.").cancel_requested


def _placeholders(method: str, path: str) -> tuple[str, str]:
    return method, path.split("?")[0].replace("/x", "/{}").replace("/q/", "/{}/").replace("/w/", "/{}/")


def _all_requests() -> list[ApiRequest[Any]]:
    """One request of every call of both APIs."""
    given = {
        "job_id": "x",
        "queue": "q",
        "worker": "w",
        "lock_id": "l",
        "progress": 1,
        "error_message": "e",
        "from_status": "failed",
        "to_status": "queued",
        "jobs": [],
        "webhook": "q",
        "delivery": 1,
        "action": "retry",
        "plan_id": "x",
    }
    found = []
    for module in (worker_requests, admin_requests):
        for name, build in inspect.getmembers(module, inspect.isfunction):
            if build.__module__ != module.__name__ or name.startswith(("_", "read_")):
                continue
            needed = [
                parameter.name
                for parameter in inspect.signature(build).parameters.values()
                if parameter.default is inspect.Parameter.empty
            ]
            found.append(build(**{name: given[name] for name in needed}))
    return found


def test_every_route_of_the_daemon_has_a_call_and_every_call_a_route() -> None:
    streams = {"/v1/commands", "/v1/events", "/admin/job-management/events"}
    unasked = {"/healthz", "/readyz"} | streams
    routes = {
        (route.method, "/".join("{}" if part.startswith("{") else part for part in route.path.split("/")))
        for route in (*worker.ROUTES, *admin_api.ROUTES)
        if route.path not in unasked and route.path.startswith(("/v1", "/admin", "/metrics"))
    }
    asked = {_placeholders(request.method, request.path) for request in _all_requests()}
    assert asked - routes == set(), "calls without a route"
    assert routes - asked - {("GET", "/openapi.json")} == set(), "routes without a call"


def test_calls_with_a_key_are_those_whose_routes_take_one() -> None:
    keyed = {
        (route.method, "/".join("{}" if part.startswith("{") else part for part in route.path.split("/")))
        for route in (*worker.ROUTES, *admin_api.ROUTES)
        if route.key
    }
    sent = {
        _placeholders(request.method, request.path)
        for request in _all_requests()
        if "Idempotency-Key" in request.headers
    }
    assert sent == keyed - {("POST", "/v1/jobs")}  # the job's own id makes a create safe to repeat


def test_both_clients_have_every_call() -> None:
    for module, blocking, coroutines in (
        (worker_requests, JobClient, AsyncJobClient),
        (admin_requests, AdminClient, AsyncAdminClient),
    ):
        names = {
            name
            for name, build in inspect.getmembers(module, inspect.isfunction)
            if build.__module__ == module.__name__ and not name.startswith("_")
        }
        assert names <= {*dir(blocking), "queue_page"}
        only_blocking = {"import_jobs", "preview_import", "backup", "download_artifact"}
        assert names | {"iterate_jobs", "iterate_queues", "events"} <= {*dir(coroutines), "queue_page"} | only_blocking


def test_methods_show_the_arguments_and_the_text_of_their_calls() -> None:
    assert list(inspect.signature(JobClient.claim).parameters)[:3] == ["self", "worker", "queues"]
    assert next(iter(inspect.signature(JobClient("unix:/x").claim).parameters)) == "worker"
    assert AsyncJobClient.claim.__doc__ == worker_requests.claim.__doc__
    assert inspect.iscoroutinefunction(AsyncJobClient.claim)


def test_create_makes_an_id_that_stays_the_same_when_the_request_is_sent_again() -> None:
    request = worker_requests.create_job({"n": 1}, queue="video", delay_ms=5)
    said = msgspec.json.decode(request.body or b"")
    assert said == {"id": said["id"], "payload": {"n": 1}, "queue": "video", "delay_ms": 5}
    assert len(said["id"]) == 36
    assert said["id"][14] == "7"
    assert request.repeatable
    assert msgspec.json.decode(worker_requests.create_job(id="mine").body or b"") == {"id": "mine"}


def test_bulk_gives_an_id_to_each_job_that_has_none() -> None:
    said = msgspec.json.decode(worker_requests.create_jobs([{"payload": 1}, {"id": "b", "payload": None}]).body or b"")
    assert [set(job) for job in said["jobs"]] == [{"id", "payload"}, {"id", "payload"}]
    assert said["jobs"][1]["id"] == "b"


def test_uuid7_sorts_by_time_and_has_version_and_variant() -> None:
    made = [uuid7() for _ in range(50)]
    assert len(set(made)) == 50
    assert [name[:13] for name in made] == sorted(name[:13] for name in made)
    assert all(name[14] == "7" and name[19] in "89ab" for name in made)


@pytest.mark.parametrize(
    ("job_id", "path"),
    [
        ("a:b-c.d_e", "/v1/jobs/a:b-c.d_e"),
        ("a/b", "/v1/jobs/a%2Fb"),
        ("..", "/v1/jobs/%2E%2E"),
        (".", "/v1/jobs/%2E"),
        ("é", "/v1/jobs/%C3%A9"),
    ],
)
def test_an_id_is_one_part_of_the_path(job_id: str, path: str) -> None:
    assert job_path("/v1/jobs", job_id) == path
    assert job_path("/v1/jobs", job_id, "start") == f"{path}/start"


def test_an_empty_id_is_refused_before_it_names_another_path() -> None:
    with pytest.raises(InvalidRequest):
        worker_requests.get_job("")


def test_one_queue_may_be_given_as_text() -> None:
    assert msgspec.json.decode(worker_requests.claim("w", queues="video").body or b"")["queues"] == ["video"]
    for request in (
        worker_requests.start_processing("a", "w", max_processing_ms=0),
        worker_requests.claim("w", max_processing_ms=0),
    ):
        assert msgspec.json.decode(request.body or b"") == {"worker": "w", "max_processing_ms": 0}


def test_a_payload_that_python_cannot_hold_does_not_spoil_the_job() -> None:
    body = msgspec.json.encode({"success": True, "data": JOB}).replace(b'{"a":1}', b"1e999")
    job = worker_requests.get_job("j1").read(body)
    assert bytes(job.payload) == b"1e999"  # type: ignore[arg-type]
    assert job.metadata_value == {"m": [1]}
    with pytest.raises(msgspec.DecodeError):
        _ = job.payload_value


def test_a_job_is_the_view_of_the_daemon_and_unknown_fields_are_skipped() -> None:
    job = worker_requests.get_job("j1").read(msgspec.json.encode({"success": True, "data": JOB, "more": 1}))
    assert isinstance(job, JobView)
    assert (job.id, job.payload_value, job.repeated) == ("j1", {"a": 1}, msgspec.UNSET)


# ---------------------------------------------------------------------------------------------------------------------
# Answers.


def test_an_operator_s_name_goes_with_every_call_as_plain_text(peer: ScriptedServer) -> None:
    peer.script = [ok({"alerts": []}), ok({"alerts": []})]
    with serving(peer) as url:
        for name in ("eve@build-3", "zoë\r\nX: y"):
            with AdminClient(url, token="t" * 24, operator=name) as client:
                client.alerts()
    assert [asked.headers["X-Jobd-Operator"] for asked in peer.asked] == ["eve@build-3", "zo???X: y"]


def _reply(body: Any, status: int, **headers: str) -> ApiResponse:
    text = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return ApiResponse(status, {name.replace("_", "-"): value for name, value in headers.items()}, text)


READ = get("/x", dict[str, int])


@pytest.mark.parametrize("code", sorted(ERROR_STATUS))
def test_each_refusal_is_raised_as_its_error(code: str) -> None:
    reply = _reply({"success": False, "error": code, "message": "No.", "details": {"d": 1}}, ERROR_STATUS[code])
    with pytest.raises(ERRORS[code]) as caught:
        read_result(READ, reply)
    error = caught.value
    assert isinstance(error, JobdError)
    assert (error.code, error.message, error.details, error.status) == (code, "No.", {"d": 1}, ERROR_STATUS[code])


def test_a_code_of_the_future_is_a_plain_error_that_keeps_it() -> None:
    with pytest.raises(JobdError) as caught:
        read_result(READ, _reply({"success": False, "error": "new_code", "message": "?"}, 409))
    assert (type(caught.value), caught.value.code, caught.value.details) == (JobdError, "new_code", {})


@pytest.mark.parametrize("status", [502, 503, 504])
def test_an_error_of_a_proxy_counts_as_unreachable(status: int) -> None:
    with pytest.raises(Unreachable):
        read_result(READ, _reply(b"<html>bad gateway", status))


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"<html>", 200),
        (b"", 200),
        ({"success": True}, 200),
        ({"success": True, "data": {"n": "text"}}, 200),
        (b"\xff", 200),
        (b"not json", 404),
        ({"error": 5}, 400),
        ({"success": False}, 400),
        (b'{"success":true,"data":' + b"[" * 3000 + b"]" * 3000 + b"}", 200),
    ],
)
def test_what_is_no_answer_of_ours_is_a_bad_answer(body: Any, status: int) -> None:
    with pytest.raises(BadAnswer):
        read_result(READ, _reply(body, status))


def test_a_success_with_status_503_is_a_result() -> None:
    assert read_result(READ, _reply({"success": True, "data": {"n": 1}}, 503)) == {"n": 1}


@pytest.mark.parametrize(
    ("headers", "details", "wait_ms"),
    [
        ({"retry_after": "2"}, {}, 2000),
        ({}, {"retry_after_ms": 150}, 150),
        ({"retry_after": "2"}, {"retry_after_ms": 150}, 150),
        ({"retry_after": "Wed, 21 Oct 2015 07:28:00 GMT"}, {}, None),
        ({"retry_after": "-1"}, {"retry_after_ms": -5}, None),
        ({}, {}, None),
    ],
)
def test_retry_after_comes_from_details_or_header(
    headers: dict[str, str], details: dict[str, Any], wait_ms: int | None
) -> None:
    body = {"success": False, "error": "overloaded", "message": "Full.", "details": details}
    with pytest.raises(Overloaded) as caught:
        read_result(READ, _reply(body, 503, **headers))
    assert caught.value.retry_after_ms == wait_ms


# ---------------------------------------------------------------------------------------------------------------------
# When to try again.


def test_the_wait_doubles_up_to_its_cap_and_is_random_below_it() -> None:
    tries = RetryState(RetryPolicy(total_s=None, base_s=1, max_s=5), READ, 0)
    assert [tries.wait_s(Unreachable("x"), 0, chance) for chance in (1, 1, 1, 1, 0.5, 0)] == [1, 2, 4, 5, 2.5, 0]


def test_retry_after_is_added_to_the_wait() -> None:
    tries = RetryState(RetryPolicy(total_s=None, base_s=1), READ, 0)
    assert tries.wait_s(Overloaded("x", retry_after_ms=2000), 0, 0.5) == 2.5


def test_a_wait_beyond_the_deadline_is_not_begun() -> None:
    tries = RetryState(RetryPolicy(total_s=10, base_s=4, max_s=4), READ, 100)
    assert tries.wait_s(Unreachable("x"), 105, 1) == 4
    with pytest.raises(Unreachable):
        tries.wait_s(Unreachable("x"), 106, 1)


def test_no_retries_means_one_try() -> None:
    with pytest.raises(Unreachable):
        RetryState(RetryPolicy(total_s=0), READ, 0).wait_s(Unreachable("x"), 0, 0)


@pytest.mark.parametrize("code", sorted(set(ERRORS) - RETRIED))
def test_a_definite_answer_is_not_asked_for_again(code: str) -> None:
    with pytest.raises(ERRORS[code]):
        RetryState(RetryPolicy(total_s=None), READ, 0).wait_s(ERRORS[code]("No."), 0, 0)


def test_a_call_that_is_not_safe_to_repeat_is_not_repeated() -> None:
    with pytest.raises(Unreachable):
        RetryState(RetryPolicy(total_s=None), admin_requests.import_jobs(), 0).wait_s(Unreachable("x"), 0, 0)


def test_an_answer_may_take_its_time_and_what_the_daemon_holds_it_back() -> None:
    request = worker_requests.claim("w", wait_ms=60_000)
    tries = RetryState(RetryPolicy(total_s=30, timeout_s=10), request, 0)
    assert tries.timeout_s(0) == 70
    tries.wait_s(Unreachable("x"), 20, 0)
    assert tries.timeout_s(25) == 5
    assert tries.timeout_s(31) == 0.1


# ---------------------------------------------------------------------------------------------------------------------
# Over a real connection.


def test_a_call_sends_its_fields_and_gives_a_typed_result(peer: ScriptedServer, send: Both) -> None:
    peer.script = [ok({"lock_expires_at": 5, "ttl_ms": 6, "ceiling_at": None, "cancel_requested": False})]
    assert send(worker_requests.update_progress("j1", lock_id="secret", progress=42, message="half")) == LockState(
        5, 6, None, False
    )
    (asked,) = peer.asked
    assert (asked.method, asked.path) == ("POST", "/v1/jobs/j1/progress")
    assert asked.json == {"lock_id": "secret", "progress": 42, "message": "half"}
    assert asked.headers["Content-Type"] == "application/json"
    assert asked.headers["Host"] == "localhost"
    assert asked.headers["Accept-Encoding"] == "identity"


@pytest.mark.parametrize(
    ("name", "given", "write"),
    [
        ("fail_job", ("disk is full", "lock"), "fail_job(job_id, lock_id=..., error_message=...)"),
        ("complete_job", ("https://x", "lock"), "complete_job(job_id, lock_id=...)"),
        ("update_progress", (50, "half"), "update_progress(job_id, lock_id=..., progress=...)"),
        ("extend_job_lock", ("lock", 5), "extend_job_lock(job_id, lock_id=...)"),
        ("release_job", ("lock",), "release_job(job_id, lock_id=...)"),
    ],
)
async def test_a_holders_call_takes_only_the_job_by_position(
    peer: ScriptedServer, endpoint: str, name: str, given: tuple[Any, ...], write: str
) -> None:
    with JobClient(endpoint) as client, pytest.raises(TypeError) as caught:
        getattr(client, name)("j1", *given)
    assert str(caught.value) == f"only job_id may be positional; write {write}"
    async with AsyncJobClient(endpoint) as jobs:
        with pytest.raises(TypeError, match="only job_id may be positional"):
            await getattr(jobs, name)("j1", *given)
    assert peer.asked == []
    assert str(inspect.signature(getattr(JobClient, name))).startswith("(self, /, job_id: 'str', *, lock_id: 'str'")


def test_a_lost_answer_is_asked_for_again_with_the_same_bytes_and_key(peer: ScriptedServer, send: Both) -> None:
    peer.script = [drop, drop, drop, ok({"grants": []})]
    assert send(worker_requests.claim("w")) == []
    assert len(peer.asked) == 4
    assert len({(asked.body, asked.headers["Idempotency-Key"]) for asked in peer.asked}) == 1


@pytest.mark.parametrize("code", ["overloaded", "shutting_down", "outcome_unknown"])
def test_a_passing_refusal_is_tried_again(peer: ScriptedServer, send: Both, code: str) -> None:
    peer.script = [no(code, 503), no(code, 503), EMPTY_PAGE]
    assert send(worker_requests.list_jobs(status="queued", limit=3)).jobs == []
    assert [asked.path for asked in peer.asked] == ["/v1/jobs?status=queued&limit=3"] * 3


def test_a_definite_refusal_is_raised_at_once(peer: ScriptedServer, send: Both) -> None:
    peer.script = [no("job_not_found", 404), EMPTY_PAGE]
    with pytest.raises(JobNotFound):
        send(worker_requests.get_job("j1"))
    assert len(peer.asked) == 1


def test_an_idle_connection_is_used_again(peer: ScriptedServer, send: Both) -> None:
    peer.script = [EMPTY_PAGE, EMPTY_PAGE, no("job_not_found", 404), EMPTY_PAGE]
    send(worker_requests.list_jobs(), worker_requests.list_jobs())
    assert {asked.connection for asked in peer.asked} == {0}


def test_an_idle_connection_that_the_daemon_closed_is_replaced_in_silence(peer: ScriptedServer, endpoint: str) -> None:
    peer.script = [closing(EMPTY_PAGE), EMPTY_PAGE]
    with JobClient(endpoint, retry_for_s=0) as client:
        client.list_jobs()
        assert peer.closed.wait(5)
        client.list_jobs()
    assert [asked.connection for asked in peer.asked] == [0, 1]


async def test_the_same_on_asyncio(peer: ScriptedServer, endpoint: str) -> None:
    peer.script = [closing(EMPTY_PAGE), EMPTY_PAGE]
    async with AsyncJobClient(endpoint, retry_for_s=0) as client:
        await client.list_jobs()
        await asyncio.to_thread(peer.closed.wait, 5)
        await client.list_jobs()
    assert [asked.connection for asked in peer.asked] == [0, 1]


def test_nobody_there_is_unreachable_and_says_where(tmp_path: Path) -> None:
    send = Both(False, f"unix:{tmp_path}/none")
    for both in (send, Both(True, f"unix:{tmp_path}/none")):
        with pytest.raises(Unreachable, match="none cannot be reached"):
            both(worker_requests.queues(), policy=RetryPolicy(total_s=0))


def test_an_answer_that_does_not_come_is_unreachable(peer: ScriptedServer, send: Both) -> None:
    peer.script = [peer.hang]
    with pytest.raises(Unreachable, match="no response in time"):
        send(worker_requests.queues(), policy=RetryPolicy(total_s=0, timeout_s=0.2))


def test_many_threads_share_a_client(peer: ScriptedServer, endpoint: str) -> None:
    peer.always = lambda asked: ok({**JOB, "id": asked.path.split("/")[-1]})
    wrong: list[str] = []
    with JobClient(endpoint) as client:

        def work(number: int) -> None:
            for turn in range(20):
                name = f"j{number}-{turn}"
                if client.get_job(name).id != name:
                    wrong.append(name)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert len(peer.asked) == 160
    assert len({asked.connection for asked in peer.asked}) <= 8 * 2


def test_a_closed_client_keeps_no_connection(peer: ScriptedServer, endpoint: str) -> None:
    peer.script = [EMPTY_PAGE, EMPTY_PAGE]
    client = JobClient(endpoint)
    client.list_jobs()
    client.close()
    client.list_jobs()
    assert client._idle == []


def test_pages_are_walked_to_their_end(peer: ScriptedServer, endpoint: str) -> None:
    def pages() -> list[Any]:
        return [
            ok({"jobs": [{**JOB, "id": "c"}, {**JOB, "id": "b"}], "next_cursor": "7"}),
            ok({"jobs": [], "next_cursor": "3"}),
            ok({"jobs": [{**JOB, "id": "a"}], "next_cursor": None}),
        ]

    peer.script = pages()
    with JobClient(endpoint) as client:
        assert [job.id for job in client.iterate_jobs(queue="q")] == ["c", "b", "a"]
    assert [asked.path for asked in peer.asked] == [
        "/v1/jobs?queue=q",
        "/v1/jobs?queue=q&cursor=7",
        "/v1/jobs?queue=q&cursor=3",
    ]

    async def walk() -> list[str]:
        async with AsyncJobClient(endpoint) as client:
            return [job.id async for job in client.iterate_jobs(queue="q")]

    peer.script = pages()
    assert asyncio.run(walk()) == ["c", "b", "a"]


@pytest.mark.parametrize("blocking", [True, False])
def test_queues_are_walked_through_page_by_page(peer: ScriptedServer, endpoint: str, blocking: bool) -> None:
    counts = dict.fromkeys(("queued", "processing", "completed", "failed", "cancelled"), 1)
    names = [f"q-{number:03}" for number in range(201)]
    views = [{"name": name, "paused": False, "oldest_due_at": None, **counts} for name in names]
    peer.script = [
        ok({"queues": views[:200], "next_cursor": "q-199"}),
        ok({"queues": views[200:], "next_cursor": None}),
    ]

    async def walk() -> list[str]:
        async with AsyncJobClient(endpoint) as client:
            return [queue.name async for queue in client.iterate_queues()]

    if blocking:
        with JobClient(endpoint) as client:
            assert [queue.name for queue in client.iterate_queues()] == names
    else:
        assert asyncio.run(walk()) == names
    assert [asked.path for asked in peer.asked] == ["/v1/queues", "/v1/queues?cursor=q-199"]


def test_over_tcp_the_token_is_sent(peer: ScriptedServer) -> None:
    with serving(peer) as url, JobClient(url, token="t" * 24) as client:
        peer.script = [EMPTY_PAGE]
        client.list_jobs()
        assert peer.asked[0].headers["Authorization"] == "Bearer " + "t" * 24


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key."""
    if shutil.which("openssl") is None:
        tool_missing("openssl", "openssl")
    files = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=jobd", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "1"]
    subprocess.run([*command, "-out", files[0], "-keyout", files[1]], check=True, capture_output=True)
    return files


def test_tls_is_spoken_and_the_certificate_checked(peer: ScriptedServer, certificate: tuple[Path, Path]) -> None:
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(*certificate)
    trusting = ssl.create_default_context(cafile=certificate[0])
    peer.script = [EMPTY_PAGE, EMPTY_PAGE]

    async def ask(url: str, tls: ssl.SSLContext | None) -> Any:
        async with AsyncJobClient(url, token="t" * 24, tls=tls, retry_for_s=0) as client:
            return await client.list_jobs()

    with serving(peer, tls=ours) as url:
        assert url.startswith("https://")
        with JobClient(url, token="t" * 24, tls=trusting, retry_for_s=0) as client:
            assert client.list_jobs().jobs == []
        assert asyncio.run(ask(url, trusting)).jobs == []
        with JobClient(url, token="t" * 24, retry_for_s=0) as client, pytest.raises(Unreachable, match="certificate"):
            client.list_jobs()
        with pytest.raises(Unreachable, match="certificate"):
            asyncio.run(ask(url, None))
    assert len(peer.asked) == 2


async def test_an_answer_to_a_dotted_id_reaches_the_peer_as_it_was_meant(peer: ScriptedServer, endpoint: str) -> None:
    peer.script = [ok(JOB)]
    async with AsyncJobClient(endpoint) as client:
        await client.get_job("..")
    assert peer.asked[0].path == "/v1/jobs/%2E%2E"


# ---------------------------------------------------------------------------------------------------------------------
# Streams of the admin API.


@pytest.fixture
def admin(endpoint: str) -> Iterator[AdminClient]:
    with AdminClient(endpoint, token="x") as client:
        yield client


def test_an_import_is_a_stream_of_lines(peer: ScriptedServer, admin: AdminClient) -> None:
    refused = [{"line": 2, "id": None, "reason": "bad"}]
    peer.script = [ok({"imported": 3, "skipped": 1, "refusedCount": 1, "refused": refused})]
    lines: list[Any] = [{"id": "a"}, b'{"id":"b"}\r\n', '{"id":"c"}']
    done = admin.import_jobs(iter(lines))
    assert (done.imported, done.skipped, done.refused_count, done.refused[0].reason) == (3, 1, 1, "bad")
    (asked,) = peer.asked
    assert asked.body == b'{"id":"a"}\n{"id":"b"}\n{"id":"c"}\n'
    assert asked.headers["Content-Type"] == "application/x-ndjson"
    assert asked.headers["Transfer-Encoding"] == "chunked"


def test_an_import_of_nothing_is_a_call_all_the_same(peer: ScriptedServer, admin: AdminClient) -> None:
    peer.script = [ok({"imported": 0, "skipped": 0})]
    assert admin.import_jobs([]).imported == 0
    assert peer.asked[0].body == b""


def test_a_rejected_import_raises_its_error_though_the_stream_was_cut(peer: ScriptedServer, admin: AdminClient) -> None:
    peer.early = [early(no("unauthorized", 401))]
    many = ({"id": f"job-{n}", "payload": "x" * 1000} for n in range(20_000))
    with pytest.raises(ERRORS["unauthorized"]):
        admin.import_jobs(many)


def test_an_import_is_not_sent_twice(peer: ScriptedServer, admin: AdminClient) -> None:
    peer.script = [drop, ok({"imported": 1, "skipped": 0})]
    with pytest.raises(Unreachable):
        admin.import_jobs([{"id": "a"}])
    assert len(peer.asked) == 1


def test_lines_are_sent_in_pieces_of_bounded_size() -> None:
    pieces = list(json_lines(iter([b"x" * 30_000] * 10)))
    assert b"".join(pieces) == (b"x" * 30_000 + b"\n") * 10
    assert all(len(piece) < 64 * 1024 + 30_001 for piece in pieces)
    assert len(pieces) > 3


def test_an_export_is_walked_to_its_end_and_every_job_is_a_line(peer: ScriptedServer, endpoint: str) -> None:
    def pages() -> list[Any]:
        bodies = [
            b'{"success":true,"data":{"jobs":[{"id":"a","payload":[1.10,\r\n 2]},{"id":"b"}],"next_cursor":"7"}}',
            b'{"success":true,"data":{"jobs":[],"next_cursor":"9"}}',
            b'{"success":true,"data":{"jobs":[{"id":"c"}],"next_cursor":null}}',
        ]
        return [raw(body, kind="application/json") for body in bodies]

    lines = [b'{"id":"a","payload":[1.10,   2]}', b'{"id":"b"}', b'{"id":"c"}']
    peer.script = pages()
    with AdminClient(endpoint, token="x") as client:
        assert list(client.export_jobs(queue="q")) == lines
    assert [asked.path for asked in peer.asked] == [
        "/admin/job-management/export?queue=q",
        "/admin/job-management/export?queue=q&cursor=7",
        "/admin/job-management/export?queue=q&cursor=9",
    ]

    async def walk() -> list[bytes]:
        async with AsyncAdminClient(endpoint, token="x") as client:
            return [line async for line in client.export_jobs(status="failed", kind="k")]

    peer.script = pages()
    assert asyncio.run(walk()) == lines
    assert peer.asked[3].path == "/admin/job-management/export?status=failed&kind=k"


def test_a_backup_is_copied_piece_by_piece(peer: ScriptedServer, admin: AdminClient) -> None:
    content = os.urandom(700_000)
    peer.script = [raw(content, kind="application/vnd.sqlite3")]
    file = io.BytesIO()
    assert admin.backup(file) == len(content)
    assert file.getvalue() == content


def test_a_refused_backup_writes_nothing(peer: ScriptedServer, admin: AdminClient) -> None:
    peer.script = [no("unauthorized", 401)]
    file = io.BytesIO()
    with pytest.raises(ERRORS["unauthorized"]):
        admin.backup(file)
    assert file.getvalue() == b""


def test_a_stored_result_is_copied_piece_by_piece(peer: ScriptedServer, admin: AdminClient) -> None:
    content = os.urandom(700_000)
    refusals = [no("late_result_not_found", 404), no("not_found", 404), no("storage_unavailable", 503)]
    peer.script = [raw(content, kind="application/octet-stream"), *refusals]
    file = io.BytesIO()
    assert admin.download_artifact("a.b:c", file) == len(content)
    assert file.getvalue() == content
    assert peer.asked[0].path == "/admin/job-management/jobs/a.b:c/artifact"
    with pytest.raises(ERRORS["late_result_not_found"]):
        admin.download_artifact("a", file, 7)
    assert peer.asked[1].path == "/admin/job-management/jobs/a/artifact?late_result=7"
    for code in ("not_found", "storage_unavailable"):
        with pytest.raises(ERRORS[code]):
            admin.download_artifact("a", file)
    assert file.getvalue() == content
    peer.early = [peer.cut(b"x" * 100_000, chunked=False)]
    with pytest.raises(Unreachable):
        admin.download_artifact("a", io.BytesIO())


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "with length"])
def test_a_backup_that_breaks_off_is_no_backup(peer: ScriptedServer, admin: AdminClient, chunked: bool) -> None:
    peer.early = [peer.cut(b"x" * 100_000, chunked)]
    with pytest.raises(Unreachable):
        admin.backup(io.BytesIO())


class SlowBackup:
    """A daemon whose backup takes `looks` looks before its first byte comes; it is silent for `quiet_ms`."""

    def __init__(self, peer: ScriptedServer, monkeypatch: pytest.MonkeyPatch, *, looks: int, quiet_ms: int = 0) -> None:
        self.left = looks
        self.quiet_ms = quiet_ms
        self.ready = threading.Event()
        self.told: list[Any] = []
        peer.early = [self._give]
        peer.always = self._tell
        monkeypatch.setattr(jobd.client.admin, "POLL_S", 0.01)

    async def _give(self, request: web.BaseRequest) -> web.StreamResponse:
        self.id = request.query["id"]
        await asyncio.to_thread(self.ready.wait, 20)
        return web.Response(body=b"x" * 300_000)

    def _tell(self, asked: Any) -> Any:
        assert asked.path == "/admin/job-management/backups"
        self.left -= 1
        if not self.left:
            self.ready.set()
        other = {"id": "other", "state": "waiting", "bytes_done": 0, "bytes_total": None, "quiet_ms": 0}
        mine = {**other, "id": self.id, "state": "copying", "bytes_done": -self.left, "bytes_total": 9}
        ends = {"started_at": 1, "ended_at": None, "message": None}
        return ok({"backups": [other | ends, mine | ends | {"quiet_ms": self.quiet_ms}]})

    def take(self, endpoint: str, timeout_s: float) -> int:
        with AdminClient(endpoint, token="x", timeout_s=timeout_s) as client:
            return client.backup(io.BytesIO(), on_progress=self.told.append)


def test_a_backup_may_take_as_long_as_it_moves(
    peer: ScriptedServer, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowBackup(peer, monkeypatch, looks=150)
    begun_s = time.monotonic()
    assert slow.take(endpoint, timeout_s=1.0) == 300_000
    assert time.monotonic() - begun_s > 1.0  # the time of an answer is none for the whole
    copying = [seen.bytes_done for seen in slow.told if seen.state == "copying"]
    assert copying == sorted(copying)
    assert len(copying) >= 149
    sending = [(seen.bytes_done, seen.bytes_total) for seen in slow.told if seen.state == "sending"]
    assert sending[-1] == (300_000, 300_000)


def test_a_backup_that_is_silent_for_too_long_is_given_up(
    peer: ScriptedServer, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowBackup(peer, monkeypatch, looks=10**6, quiet_ms=3_000)
    try:
        with pytest.raises(Unreachable, match=r"has not moved for 1 s\. It was copying at -?[0-9]+ bytes"):
            slow.take(endpoint, timeout_s=1.0)
    finally:
        slow.ready.set()


def test_a_daemon_that_tells_nothing_of_its_backups_is_silent(
    peer: ScriptedServer, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowBackup(peer, monkeypatch, looks=1)
    peer.always = None  # 404: an older one
    try:
        with pytest.raises(Unreachable, match=r"has not moved for 0\.1 s"):
            slow.take(endpoint, timeout_s=0.1)
    finally:
        slow.ready.set()


def test_an_error_of_the_file_is_raised_as_it_is(peer: ScriptedServer, admin: AdminClient) -> None:
    peer.script = [raw(b"content")]

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        admin.backup(Full())


def test_metrics_are_text(peer: ScriptedServer, endpoint: str) -> None:
    peer.script = [raw(b"jobd_jobs 1\n", kind="text/plain")]
    with AdminClient(endpoint, token="x") as client:
        assert client.metrics() == "jobd_jobs 1\n"


def test_unhealthy_is_a_result(peer: ScriptedServer, endpoint: str) -> None:
    part = {"status": "healthy", "message": ""}
    health = {
        "status": "unhealthy",
        "database": {"status": "unhealthy", "message": "slow", "totalJobs": 3},
        "cache": part,
        "storage": part,
        "cleanupStatus": {"running": False, "timeSinceLastCleanup": None, "message": ""},
        "timestamp": 1,
    }
    peer.script = [ok(health, 503)]
    with AdminClient(endpoint, token="x") as client:
        assert client.health().database.message == "slow"


# ---------------------------------------------------------------------------------------------------------------------
# Where the daemon is.


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("unix:/run/w.sock", Endpoint(path="/run/w.sock")),
        ("unix:///run/w.sock", Endpoint(path="/run/w.sock")),
        ("/run/w.sock", Endpoint(path="/run/w.sock")),
        ("http://127.0.0.1:8770", Endpoint(host="127.0.0.1", port=8770)),
        ("http://host", Endpoint(host="host", port=80)),
        ("https://host/base/", Endpoint(host="host", port=443, tls=True, prefix="/base")),
        ("http://[::1]:5", Endpoint(host="::1", port=5)),
    ],
)
def test_endpoints_are_read(text: str, found: Endpoint) -> None:
    assert parse_endpoint(text) == found


@pytest.mark.parametrize(
    "text", ["", "host:80", "ftp://host", "unix:relative", "http://", "http://u:p@host", "http://h/?q=1", "http://h:x"]
)
def test_what_is_no_endpoint_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_endpoint(text)


def test_an_origin_of_ipv6_has_brackets_and_a_token_is_never_shown() -> None:
    endpoint = parse_endpoint("http://[::1]:5/p", token="very-secret")
    assert endpoint.origin == "http://[::1]:5/p"
    assert "very-secret" not in repr(endpoint) + str(endpoint)


def test_the_worker_endpoint_comes_from_argument_environment_or_default(tmp_path: Path) -> None:
    environ = {"JOBD_SOCKET": "/s", "JOBD_URL": "http://h:1"}
    assert worker_endpoint("unix:/mine", environ=environ).path == "/mine"
    assert worker_endpoint(environ=environ).path == "/s"
    assert worker_endpoint(environ={"JOBD_URL": "http://h:1"}).port == 1
    assert worker_endpoint(environ={}).path == default_socket({})
    ready = Endpoint(path="/x")
    assert worker_endpoint(ready, environ=environ) is ready


def test_the_worker_token_is_the_first_line_of_its_file_and_for_tcp_only(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("first-token\nsecond-token\n")
    environ = {"JOBD_WORKER_TOKEN_FILE": str(file)}
    assert worker_endpoint("http://h:1", environ=environ).token == "first-token"
    assert worker_endpoint("http://h:1", "given", environ=environ).token == "given"
    assert worker_endpoint("unix:/s", environ=environ).token is None


def test_the_admin_endpoint_and_its_token(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("from-file\n")
    assert admin_endpoint(environ={}) == Endpoint(host="127.0.0.1", port=8770)
    found = admin_endpoint(environ={"JOBD_ADMIN_URL": "unix:/a", "ADMIN_TOKEN": "t"})
    assert (found.path, found.token) == ("/a", "t")
    assert admin_endpoint(environ={"ADMIN_TOKEN_FILE": str(file)}).token == "from-file"
    assert admin_endpoint(token="x", environ={"ADMIN_TOKEN": "t"}).token == "x"


def test_the_default_socket_is_the_daemons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_socket({}) == "/run/jobd/worker.sock"
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    assert default_socket({"XDG_RUNTIME_DIR": "/run/user/1"}) == "/run/user/1/jobd/worker.sock"
    assert default_socket({}) == "/run/user/4711/jobd/worker.sock"
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/run/jobd/worker.sock")
    assert default_socket({}) == "/run/jobd/worker.sock"
