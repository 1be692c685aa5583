"""The clients with the URLs of several nodes, over real connections: finding the leader, and losing it."""

from __future__ import annotations

import asyncio
import io
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from operator import methodcaller
from pathlib import Path
from typing import Any

import msgspec
import pytest

from jobd.cli import connection
from jobd.cli.ctl import main
from jobd.client import (
    AdminClient,
    AsyncHandlerContext,
    AsyncJobClient,
    JobClient,
    RetryOptions,
    Unreachable,
    Worker,
    apis,
    requests,
    retries,
)
from jobd.client.api_request import ApiRequest, request_for
from jobd.client.apis import WorkerApi
from jobd.client.worker.claimer import NODE_POLL_MS
from jobd.model.calls import ADMIN
from tests.support.client_harness import GRANT, JOB, CommandRun, either, listen, running_worker
from tests.support.polling import wait_until
from tests.support.scripted_server import ReceivedRequest, ScriptedServer, Step, drop, ok, raw, rejected, serving

FAST = RetryOptions(total_s=10, base_s=0.001, max_s=0.01, timeout_s=5)
ONE_ROUND = RetryOptions(total_s=0, timeout_s=5)
TOKEN = "t" * 24
EMPTY_PAGE: dict[str, Any] = {"jobs": [], "next_cursor": None}
Send = Callable[..., Any]


def standby(leader: str | None = None) -> Step:
    """Respond like a standby."""
    return rejected("not_leader", 503, "This node is a standby.", leader=leader)


class Nodes:
    """Nodes at Unix sockets, all standbys at first."""

    def __init__(self, directory: Path, count: int) -> None:
        self.servers = [ScriptedServer() for _ in range(count)]
        self.urls = [f"unix:{directory}/{number}" for number in range(count)]
        self.list = ",".join(self.urls)
        self.elect(None)

    def elect(self, leader: int | None, respond: Callable[[ReceivedRequest], Step] = lambda received: ok(JOB)) -> None:
        """Make a node the leader. It responds with `respond`; the others name it."""
        url = None if leader is None else self.urls[leader]
        for number, server in enumerate(self.servers):
            server.always = respond if number == leader else lambda received: standby(url)

    @property
    def counts(self) -> list[int]:
        return [len(server.received) for server in self.servers]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    found = Nodes(tmp_path, 3)
    with ExitStack() as stack:
        for number, server in enumerate(found.servers):
            stack.enter_context(serving(server, tmp_path / str(number)))
        yield found


@pytest.fixture(params=["sync", "asyncio", "stream"])
def send(request: pytest.FixtureRequest) -> Send:
    """Return a function that sends requests to these URLs with one of the clients, and returns the last result."""

    def send(urls: str, *requests: ApiRequest[Any], retry: RetryOptions = FAST) -> Any:
        return either(request.param, urls, *(methodcaller("send", each, retry) for each in requests), token=TOKEN)

    return send


@pytest.fixture
def rejecting() -> str:
    """Return a URL that refuses connections."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


# ---------------------------------------------------------------------------------------------------------------------
# Finding the leader.


def test_a_call_goes_to_the_leader_and_the_next_one_goes_there_at_once(nodes: Nodes, send: Send) -> None:
    nodes.elect(2, lambda received: ok(EMPTY_PAGE))
    assert send(nodes.list, *[request_for(WorkerApi.list_jobs)] * 3).jobs == []
    assert nodes.counts == [1, 0, 3]


def test_the_error_of_a_call_names_every_url_with_its_outcome(nodes: Nodes, send: Send, rejecting: str) -> None:
    with pytest.raises(Unreachable) as caught:
        send(
            f"{nodes.urls[0]},{rejecting},http://jobd.invalid:1", request_for(WorkerApi.get_job, "j1"), retry=ONE_ROUND
        )
    message = str(caught.value)
    assert f"No node served the request: {nodes.urls[0]}: This node is a standby; {rejecting}: " in message
    assert "Connection refused; http://jobd.invalid:1: " in message
    assert [each["error"] for each in caught.value.details["tried"]] == ["not_leader", "unreachable", "unreachable"]
    assert TOKEN not in repr(caught.value.details) + message


# ---------------------------------------------------------------------------------------------------------------------
# Losing the leader.


@pytest.mark.parametrize("bad", ["rejecting", "unresolvable", "missing socket", "another program's error"])
def test_an_unreachable_url_does_not_prevent_a_call(
    nodes: Nodes, send: Send, bad: str, rejecting: str, server: ScriptedServer, tmp_path: Path
) -> None:
    nodes.elect(1)
    server.always = lambda received: raw(b"<html>", 503)
    with serving(server, tmp_path / "proxy") as proxy:
        urls = {"rejecting": rejecting, "unresolvable": "http://jobd.invalid:1", "missing socket": "unix:/none"}
        assert send(f"{urls.get(bad, proxy)},{nodes.list}", request_for(WorkerApi.get_job, "j1")).id == "j1"


def test_a_node_that_hangs_does_not_prevent_a_call(nodes: Nodes, send: Send) -> None:
    nodes.servers[0].always = lambda received: nodes.servers[0].hang
    nodes.servers[1].always = lambda received: ok(JOB)
    options = RetryOptions(total_s=5, timeout_s=0.5)
    assert send(nodes.list, *[request_for(WorkerApi.get_job, "j1")] * 2, retry=options).id == "j1"
    assert nodes.counts[0] == 1, "the second call knows the leader"


def test_a_node_that_accepts_no_connection_does_not_prevent_a_call(
    nodes: Nodes, send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apis, "NODE_CONNECT_S", 0.2)
    nodes.elect(0)
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):  # the queue of the listener is full
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        urls = f"http://127.0.0.1:{listener.getsockname()[1]},{nodes.list}"
        assert send(urls, request_for(WorkerApi.get_job, "j1")).id == "j1"
        nodes.elect(None)
        with pytest.raises(Unreachable, match=r"no connection in time|Connection timeout"):
            send(urls, request_for(WorkerApi.get_job, "j1"), retry=ONE_ROUND)


def test_a_slow_leader_is_waited_for_if_the_others_name_it(
    nodes: Nodes, send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "MIN_ATTEMPT_S", 0.1)
    nodes.elect(0)
    nodes.servers[0].script = [nodes.servers[0].hang]
    assert send(nodes.list, request_for(WorkerApi.get_job, "j1"), retry=RetryOptions(total_s=0, timeout_s=3)).id == "j1"


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("kind", ["sync", "asyncio"])
def test_a_leader_that_dies_in_the_middle_of_a_response(nodes: Nodes, chunked: bool, kind: str) -> None:
    nodes.servers[0].early = [ScriptedServer.cut(b'{"success": true, "data": ', chunked)]
    nodes.servers[1].always = lambda received: ok(JOB)
    assert either(kind, nodes.list, methodcaller("send", request_for(WorkerApi.get_job, "j1"), FAST)).id == "j1"
    assert nodes.counts == [0, 1, 0]


@pytest.mark.parametrize(
    "lost", [drop, rejected("outcome_unknown", 503, outcome="unknown"), rejected("shutting_down", 503)]
)
@pytest.mark.parametrize(
    "request_",
    [
        requests.claim("w"),
        requests.claim("w", wait_ms=1000),
        requests.create_jobs([{"payload": 1}]),
        request_for(WorkerApi.start_processing, "j1", worker="w"),
        request_for(WorkerApi.cancel_job, "j1"),
    ],
    ids=["claim", "waiting claim", "bulk", "start", "cancel"],
)
def test_a_change_is_repeated_on_the_next_leader_with_the_same_key(
    nodes: Nodes, lost: Step, request_: ApiRequest[Any]
) -> None:
    data = {**GRANT, **JOB, "grants": [], "jobs": []}
    nodes.elect(1, lambda received: ok(data))
    for kind in ("sync", "asyncio"):
        nodes.servers[0].script = [lost]
        either(kind, nodes.list, methodcaller("send", request_, FAST))
    received = [*nodes.servers[0].received, *nodes.servers[1].received]
    assert nodes.counts[1] == 2
    assert len({each.body for each in received}) == 1
    assert {each.headers["Idempotency-Key"] for each in received} == {request_.headers["Idempotency-Key"]}


def test_an_idle_connection_to_a_node_that_no_longer_leads(nodes: Nodes) -> None:
    with JobClient(nodes.list) as client:
        nodes.elect(0)
        client.get_job("j1")
        nodes.elect(1)
        client.get_job("j1")
        client.get_job("j1")
        assert str(client.endpoint) == nodes.urls[1]
        assert [str(each) for each in client.endpoints] == nodes.urls
    assert nodes.counts == [2, 2, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Streams.


def events(*positions: int) -> Step:
    """Respond with a stream of these events, and end it."""
    event = {"at": 1, "type": "created", "job_id": "j", "queue": "q", "from": None, "to": "queued", "by": ""}
    event |= {"reason": None, "details": {}}
    lines = [f"id: {seq}\ndata: {msgspec.json.encode(event | {'seq': seq}).decode()}\n\n" for seq in positions]
    return raw("".join(lines).encode(), kind="text/event-stream")


@pytest.mark.parametrize("kind", ["sync", "asyncio"])
def test_a_subscription_continues_on_the_next_leader(nodes: Nodes, kind: str) -> None:
    nodes.elect(0)
    nodes.servers[0].script = [events(1, 2)]
    nodes.servers[0].always = lambda received: standby(nodes.urls[2])
    nodes.servers[1].always = lambda received: standby(nodes.urls[2])
    nodes.servers[2].script = [events(3)]
    lost: list[str] = []
    assert listen(kind, nodes.list, 3, on_lost=lambda error: lost.append(error.code)) == ([1, 2, 3], None)
    assert nodes.servers[2].received[-1].path == "/v1/events?last_event_id=2"
    assert lost == ["unreachable"], "a standby that names the leader is no lost stream"


@pytest.mark.parametrize("kind", ["sync", "asyncio"])
def test_a_subscription_does_not_wait_for_a_node_that_hangs(nodes: Nodes, kind: str) -> None:
    nodes.servers[0].always = lambda received: nodes.servers[0].hang
    nodes.servers[1].script = [events(1)]
    assert listen(kind, nodes.list, 1, client={"timeout_s": 0.5, "retry_for_s": 30}) == ([1], None)


async def test_concurrent_calls_of_a_stream_move_to_the_next_leader(nodes: Nodes) -> None:
    nodes.elect(0)
    async with AsyncJobClient(nodes.list, timeout_s=5, retry_for_s=10) as client, client.stream() as jobs:
        await asyncio.gather(*(jobs.get_job(f"j{n}") for n in range(20)))
        nodes.elect(1)
        nodes.servers[0].script = [drop]
        found = await asyncio.gather(*(jobs.get_job(f"j{n}") for n in range(20)))
        assert len(found) == 20
        assert len({each.connection for each in nodes.servers[1].received}) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Workers and operators.


async def test_a_worker_gets_the_grant_whose_response_was_lost_with_the_leader(nodes: Nodes) -> None:
    done: list[str] = []
    worker = Worker(nodes.list)

    @worker.handler
    async def work(context: AsyncHandlerContext) -> None:
        done.append(context.job.id)

    granted: dict[str, ReceivedRequest] = {}

    def respond(received: ReceivedRequest) -> Step:
        if not received.path.endswith("/claim"):
            return ok(JOB)
        key = received.headers["Idempotency-Key"]
        if key in granted:
            return ok({"grants": [GRANT]})
        granted[key] = received
        return drop if len(granted) == 1 else ok({"grants": []})

    nodes.elect(0, respond)
    nodes.servers[0].script = [lambda request: respond(nodes.servers[0].received[-1])(request)]
    nodes.servers[0].always = lambda received: standby(nodes.urls[1])
    nodes.servers[1].always = respond
    async with running_worker(worker):
        await wait_until(lambda: done == ["j1"])
        await wait_until(lambda: len(granted) > 1)
        nodes.elect(1, lambda received: nodes.servers[1].hang)
    first, *_ = granted.values()
    assert first.json["wait_ms"] == NODE_POLL_MS
    assert len(nodes.servers[0].received) <= 2


async def test_the_end_of_a_job_is_reported_to_the_next_leader(nodes: Nodes, tmp_path: Path) -> None:
    claims = [ok({"grants": [GRANT]})]

    def respond(received: ReceivedRequest) -> Step:
        if received.path.endswith("/claim"):
            return claims.pop() if claims else ok({"grants": []})
        return ok({**JOB, "lock_expires_at": 1, "ttl_ms": 30, "progress_due_at": None})

    def extends(node: int) -> bool:
        return any(each.path.endswith("/extend") for each in nodes.servers[node].received)

    nodes.elect(0, respond)
    run = CommandRun(nodes.list, tmp_path, "default", f"until test -e {tmp_path}/go; do sleep 0.01; done", once=True)
    running = asyncio.ensure_future(run.run())
    await wait_until(lambda: extends(0))
    nodes.elect(2, respond)
    await wait_until(lambda: extends(2))
    (tmp_path / "go").touch()
    assert await running == 0
    assert [each.path for each in nodes.servers[2].received[-2:]] == ["/v1/jobs/j1/complete", "/v1/workers/run/goodbye"]
    assert len(run.messages) == 1, "a takeover is nothing to report"


def test_transfers_of_an_operator_go_to_the_leader(nodes: Nodes) -> None:
    def respond(received: ReceivedRequest) -> Step:
        if received.path.endswith("/clock"):
            return ok({"now": 1, "suspect": False, "message": ""})
        if "/import" in received.path:
            return ok({"imported": 1, "skipped": 0, "rejected": []})
        return raw(b"content", kind="application/octet-stream")

    nodes.elect(1, respond)
    with AdminClient(nodes.list, token=TOKEN) as admin:
        assert admin.import_jobs([{"id": "a"}]).imported == 1
        nodes.elect(2, respond)
        file = io.BytesIO()
        assert (admin.backup(file), admin.download_artifact("j1", file)) == (7, 7)
        assert file.getvalue() == b"contentcontent"
    assert [each.path for each in nodes.servers[1].received if "/import" in each.path] == [f"{ADMIN}/import"]
    assert nodes.counts[2] == 4


def test_an_admin_token_is_not_sent_to_a_url_outside_the_list(nodes: Nodes) -> None:
    leader, node = ScriptedServer(), ScriptedServer()
    with serving(leader) as url, serving(node) as node_url:
        node.always = lambda received: standby(url)
        urls = f"{node_url},http://jobd.invalid:1"
        with AdminClient(urls, token=TOKEN, retry_for_s=0) as admin, pytest.raises(Unreachable):
            admin.clock()
    assert leader.received == []


def test_jobctl_takes_several_urls(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JOBD_URL", nodes.list)
    for name in ("JOBD_SOCKET", "ADMIN_TOKEN", "ADMIN_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    nodes.elect(2)
    assert main.main(["job", "j1", "--json"]) == 0
    assert '"id":"j1"' in capsys.readouterr().out.replace(" ", "")
    assert main.main(["job", "j1", "--url", "http://a:1,b:1"]) == 2
    assert "write each URL of a list in full" in capsys.readouterr().err
    monkeypatch.setattr(connection, "TAKEOVER_S", 0.0)
    nodes.elect(None)
    assert main.main(["job", "j1", "--url", nodes.list]) == 75
    message = capsys.readouterr().err
    assert all(f"{url}: This node is a standby" in message for url in nodes.urls)
