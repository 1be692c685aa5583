"""The blocking and the asyncio client over real connections to a scripted server."""

from __future__ import annotations

import asyncio
import random
import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable
from operator import methodcaller
from pathlib import Path
from typing import Any

import pytest

from jobd import App
from jobd.client import (
    AdminClient,
    AsyncJobClient,
    JobClient,
    JobNotFound,
    RetryOptions,
    Unreachable,
    job_wait,
    requests,
)
from jobd.client.api_request import ApiRequest, request_for
from jobd.client.apis import WorkerApi
from jobd.client.job_wait import JobWait
from jobd.model.responses import LockState
from tests.conftest import tool_missing
from tests.support.client_harness import JOB, either
from tests.support.scripted_server import ScriptedServer, Step, closing, drop, ok, rejected, serving

EMPTY_PAGE = ok({"jobs": [], "next_cursor": None})


FAST = RetryOptions(total_s=5, base_s=0.001, max_s=0.002, timeout_s=5)


Send = Callable[..., Any]


@pytest.fixture(params=["sync", "asyncio"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def send(kind: str, endpoint: str) -> Send:
    """Return a function that sends requests with one of the clients, and returns the last result."""

    def send(*requests: ApiRequest[Any], retry: RetryOptions | None = FAST) -> Any:
        return either(kind, endpoint, *(methodcaller("send", each, retry) for each in requests))

    return send


def test_the_name_of_the_operator_is_sent_as_ascii(server: ScriptedServer) -> None:
    server.script = [ok({"alerts": []}), ok({"alerts": []}), EMPTY_PAGE, ok(JOB)]
    with serving(server) as url:
        for name in ("eve@build-3", "zoë\r\nX: y"):
            with AdminClient(url, token="t" * 24, operator=name) as client:
                client.alerts()
        with JobClient(url, name="shop") as jobs:
            jobs.list_jobs()
        App("web", url=url).task(name="t")(lambda: None).job("a").status()
    assert [received.headers.get("X-Jobd-Operator") for received in server.received[:2]] == ["eve@build-3", "zo???X: y"]
    assert [received.headers["X-Jobd-Client"] for received in server.received[2:]] == ["shop", "web"]


def test_a_call_sends_its_fields_and_returns_a_typed_result(server: ScriptedServer, send: Send) -> None:
    server.script = [ok({"lock_expires_at": 5, "ttl_ms": 6, "progress_due_at": None, "cancel_requested": False})]
    assert send(
        request_for(WorkerApi.update_progress, "j1", lock_id="secret", progress=42, message="half")
    ) == LockState(5, 6, None, False)
    (received,) = server.received
    assert (received.method, received.path) == ("POST", "/v1/jobs/j1/progress")
    assert received.json == {"lock_id": "secret", "progress": 42, "message": "half"}
    assert received.headers["Content-Type"] == "application/json"
    assert received.headers["Host"] == "localhost"
    assert received.headers["Accept-Encoding"] == "identity"


@pytest.mark.parametrize(
    ("name", "given", "write"),
    [
        ("fail_job", ("disk is full", "lock"), r"write fail_job\(id, lock_id=\.\.\., error_message=\.\.\.\)"),
        ("complete_job", ("https://x", "lock"), "takes 1 positional argument"),
        ("update_progress", (50, "half"), r"write update_progress\(id, lock_id=\.\.\., progress=\.\.\.\)"),
    ],
)
async def test_calls_with_a_lock_take_only_the_job_by_position(
    server: ScriptedServer, endpoint: str, name: str, given: tuple[Any, ...], write: str
) -> None:
    with JobClient(endpoint) as client, pytest.raises(TypeError, match=write):
        getattr(client, name)("j1", *given)
    async with AsyncJobClient(endpoint) as jobs:
        with pytest.raises(TypeError, match=write):
            await getattr(jobs, name)("j1", *given)
    assert server.received == []


def test_a_call_is_retried_with_the_same_body_and_key(server: ScriptedServer, send: Send) -> None:
    server.script = [drop, drop, drop, ok({"grants": []})]
    assert send(requests.claim("w")) == []
    assert len(server.received) == 4
    assert len({(received.body, received.headers["Idempotency-Key"]) for received in server.received}) == 1


@pytest.mark.parametrize("code", ["overloaded", "shutting_down", "outcome_unknown"])
def test_a_temporary_error_is_retried(server: ScriptedServer, send: Send, code: str) -> None:
    server.script = [rejected(code, 503), rejected(code, 503), EMPTY_PAGE]
    assert send(request_for(WorkerApi.list_jobs, status="queued", limit=3)).jobs == []
    assert [received.path for received in server.received] == ["/v1/jobs?status=queued&limit=3"] * 3


def test_a_final_error_is_raised_at_once(server: ScriptedServer, send: Send) -> None:
    server.script = [rejected("job_not_found", 404), EMPTY_PAGE]
    with pytest.raises(JobNotFound):
        send(request_for(WorkerApi.get_job, "j1"))
    assert len(server.received) == 1


def test_an_idle_connection_is_reused(server: ScriptedServer, send: Send) -> None:
    server.script = [EMPTY_PAGE, EMPTY_PAGE, rejected("job_not_found", 404), EMPTY_PAGE]
    send(request_for(WorkerApi.list_jobs), request_for(WorkerApi.list_jobs))
    assert {received.connection for received in server.received} == {0}


def test_a_forked_process_does_not_use_the_connections_of_its_parent(
    server: ScriptedServer, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.script = [EMPTY_PAGE, EMPTY_PAGE]
    with JobClient(endpoint, retry_for_s=0) as client:
        client.list_jobs()
        monkeypatch.setattr("os.getpid", lambda: -1)
        client.list_jobs()
        monkeypatch.undo()
    assert [received.connection for received in server.received] == [0, 1]


def test_a_closed_idle_connection_is_replaced(server: ScriptedServer, endpoint: str, kind: str) -> None:
    server.script = [closing(EMPTY_PAGE), EMPTY_PAGE]

    def closed(client: Any) -> Any:
        return server.closed.wait(5) if kind == "sync" else asyncio.to_thread(server.closed.wait, 5)

    either(kind, endpoint, methodcaller("list_jobs"), closed, methodcaller("list_jobs"), retry_for_s=0)
    assert [received.connection for received in server.received] == [0, 1]


def test_an_unreachable_daemon_is_an_error_with_its_address(tmp_path: Path, kind: str) -> None:
    with pytest.raises(Unreachable, match="none cannot be reached"):
        either(kind, f"unix:{tmp_path}/none", methodcaller("queues"), retry_for_s=0)


def test_a_missing_response_means_unreachable(server: ScriptedServer, send: Send) -> None:
    server.script = [server.hang]
    with pytest.raises(Unreachable, match="no response in time"):
        send(request_for(WorkerApi.queues), retry=RetryOptions(total_s=0, timeout_s=0.2))


def test_many_threads_share_a_client(server: ScriptedServer, endpoint: str) -> None:
    server.always = lambda received: ok({**JOB, "id": received.path.split("/")[-1]})
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
    assert len(server.received) == 160
    assert len({received.connection for received in server.received}) <= 8 * 2


def test_a_closed_client_keeps_no_connection(server: ScriptedServer, endpoint: str) -> None:
    server.script = [EMPTY_PAGE, EMPTY_PAGE]
    client = JobClient(endpoint)
    client.list_jobs()
    client.close()
    client.list_jobs()
    assert client._idle == []


def test_iterate_jobs_reads_all_pages(server: ScriptedServer, endpoint: str, kind: str) -> None:
    server.script = [
        ok({"jobs": [{**JOB, "id": "c"}, {**JOB, "id": "b"}], "next_cursor": "7"}),
        ok({"jobs": [], "next_cursor": "3"}),
        ok({"jobs": [{**JOB, "id": "a"}], "next_cursor": None}),
    ]

    def read(client: Any) -> Any:
        async def collect() -> list[str]:
            return [job.id async for job in client.iterate_jobs(queue="q")]

        return collect() if kind == "asyncio" else [job.id for job in client.iterate_jobs(queue="q")]

    assert either(kind, endpoint, read) == ["c", "b", "a"]
    assert [received.path for received in server.received] == [
        "/v1/jobs?queue=q",
        "/v1/jobs?queue=q&cursor=7",
        "/v1/jobs?queue=q&cursor=3",
    ]


def test_over_tcp_the_token_is_sent(server: ScriptedServer) -> None:
    with serving(server) as url, JobClient(url, token="t" * 24) as client:
        server.script = [EMPTY_PAGE]
        client.list_jobs()
        assert server.received[0].headers["Authorization"] == "Bearer " + "t" * 24


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """Create a certificate for 127.0.0.1 and its key."""
    if shutil.which("openssl") is None:
        tool_missing("openssl", "openssl")
    files = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=jobd", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "1"]
    subprocess.run([*command, "-out", files[0], "-keyout", files[1]], check=True, capture_output=True)
    return files


def test_the_certificate_is_verified(server: ScriptedServer, certificate: tuple[Path, Path], kind: str) -> None:
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(*certificate)
    trusting = ssl.create_default_context(cafile=certificate[0])
    server.script = [EMPTY_PAGE]
    options: dict[str, Any] = {"token": "t" * 24, "retry_for_s": 0}
    with serving(server, tls=ours) as url:
        assert url.startswith("https://")
        assert either(kind, url, methodcaller("list_jobs"), tls=trusting, **options).jobs == []
        with pytest.raises(Unreachable, match="certificate"):
            either(kind, url, methodcaller("list_jobs"), **options)
    assert len(server.received) == 1


@pytest.fixture
def wait(kind: str, endpoint: str) -> Send:
    return lambda job_id, **options: either(kind, endpoint, methodcaller("wait_for_job", job_id, **options))


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
def test_a_wait_returns_the_finished_job(server: ScriptedServer, wait: Send, status: str) -> None:
    server.script = [ok(JOB), ok({**JOB, "status": "processing", "progress": 40}), ok({**JOB, "status": status})]
    seen: list[tuple[str, float]] = []
    job = wait("j1", timeout_s=30, on_poll=lambda job: seen.append((job.status, job.progress)))
    assert (job.id, job.status) == ("j1", status)
    assert seen == [("queued", 0), ("processing", 40)]


@pytest.mark.parametrize(("timeout_s", "limit"), [(0, "0 ms"), (0.01, "10 ms")])
def test_a_wait_has_a_limit(server: ScriptedServer, wait: Send, timeout_s: float, limit: str) -> None:
    server.script = [ok(JOB), ok(JOB)]
    with pytest.raises(TimeoutError, match=rf"^Job j1 is not finished after {limit}: it is queued\.$"):
        wait("j1", timeout_s=timeout_s)


def test_a_wait_for_an_unreachable_daemon_keeps_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "random", lambda: 100.0)  # a delay that ends after the limit
    with JobClient(f"unix:{tmp_path}/none", retry_for_s=600) as client, pytest.raises(Unreachable):
        client.wait_for_job("j1", timeout_s=9)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("first", [[], [ok(JOB)]], ids=["first", "second"])
def test_a_wait_for_a_daemon_that_does_not_respond_keeps_its_limit(
    server: ScriptedServer, wait: Send, first: list[Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_wait, "_RESPONSE_S", 0.1)
    server.script, server.always = list(first), lambda received: server.hang
    with pytest.raises(TimeoutError, match=r"^It is unknown whether job j1 is finished after 200 ms: .*no response in"):
        wait("j1", timeout_s=0.2)


def test_a_wait_lets_the_daemon_respond_at_the_end() -> None:
    assert JobWait(None, 0.0).request("a", 0.0).wait_ms == 30_000
    assert JobWait(None, 0.0, polls=True).request("a", 0.0).wait_ms == 1_000
    request = JobWait(0.05, 0.0).request("a", 0.03)
    assert (request.wait_ms, request.path, request.op) == (20, "/v1/jobs/a?wait_ms=20", "")
