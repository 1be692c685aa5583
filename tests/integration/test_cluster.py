"""Real daemons on a real PostgreSQL: one leads, the others follow, and one of them takes over."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from aiohttp import web

from jobd.cli.daemon.main import main
from tests.support import postgres
from tests.support.daemon_process import TOKEN, DaemonResponse, UnixConnection, call
from tests.support.node_process import Cluster, NodeProcess, leads
from tests.support.polling import poll_until
from tests.support.postgres import PASSWORD, PostgresServer
from tests.support.tcp_proxy import ProxyThread
from tests.support.webhook_receiver import Receiver

WAIT_S = 60.0

pytestmark = pytest.mark.slow


def knows(leader: NodeProcess, standby: NodeProcess) -> bool:
    """Return whether the leader has read the entry of a standby, without which it does not step down."""
    return standby.name in [each["name"] for each in leader.cluster()["nodes"]]


def create(node: NodeProcess, job_id: str) -> DaemonResponse:
    return node.post("/v1/jobs", {"id": job_id})


def test_a_standby_with_a_shorter_lease_waits_for_that_of_the_leader(cluster: Cluster) -> None:
    first = cluster.add("a", JOBD_JOURNAL_LEASE="6s")
    first.wait_leads()
    second = cluster.add("b", JOBD_JOURNAL_LEASE="1s")
    poll_until(lambda: [node["config_differs"] for node in second.cluster()["nodes"]] == [False, True])
    ends = time.monotonic() + 4.0  # an idle leader renews its lease every 2 s
    while time.monotonic() < ends:
        assert second.get("/readyz").status == 503
        time.sleep(0.05)
    assert first.process is not None
    first.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    poll_until(lambda: second.get("/readyz").status == 200)
    assert time.monotonic() - began > 3.0, "the rest of the lease of the former leader"
    first.process.send_signal(signal.SIGCONT)
    assert first.process.wait(10) == 75


def test_a_standby_follows_and_takes_over(cluster: Cluster) -> None:
    first = cluster.add("a")
    first.wait_leads()
    assert create(first, "one").status == 201
    granted = first.post("/v1/jobs/one/start", {"worker": "w"}).data
    second = cluster.add("b")
    rejected = create(second, "two")
    assert (rejected.status, rejected.error) == (503, "not_leader")
    assert rejected.body["details"] == {"leader": first.url}
    ready = second.get("/readyz")
    assert (ready.status, ready.body["data"]) == (503, {"status": "standby", "leader": first.url})
    assert second.get("/healthz").status == 200
    assert second.admin("GET", "stats").error == "not_leader"
    assert second.admin("GET", "/sign-in").status == 200
    assert "jobd_leader 0.0" in second.admin("GET", "/metrics").body.decode()
    poll_until(lambda: second.has_records_of(first))
    poll_until(lambda: [node["role"] for node in second.cluster()["nodes"]] == ["leader", "standby"])
    with closing(http.client.HTTPConnection("127.0.0.1", second.port, timeout=30)) as client:
        assert call(client, "GET", "/v1/jobs/one", Authorization=f"Bearer {TOKEN}").error == "not_leader"
        first.kill()
        began = time.monotonic()
        poll_until(lambda: second.get("/readyz").status == 200)
        assert time.monotonic() - began < 2.0, "the lease need not end"
        assert call(client, "GET", "/v1/jobs/one", Authorization=f"Bearer {TOKEN}").status == 200
    done = second.post("/v1/jobs/one/complete", {"lock_id": granted["lock_id"], "file_path": "/f"})
    assert done.data["status"] == "completed"
    assert create(second, "two").status == 201
    later = second.post("/v1/jobs/two/start", {"worker": "w"}).data
    assert later["fencing_token"] > granted["fencing_token"]
    view = second.cluster()
    assert (view["role"], view["leader"]) == ("leader", second.url)
    assert "jobd_leader 1.0" in second.admin("GET", "/metrics").body.decode()
    first.start()
    poll_until(lambda: first.cluster()["leader"] == second.url and first.cluster()["lag_events"] == 0)
    assert second.stop() == 0
    first.wait_leads()
    assert first.get("/v1/jobs/one").data["status"] == "completed"


def test_a_leader_steps_down_and_follows_again(cluster: Cluster) -> None:
    first = cluster.add("a")
    first.wait_leads()
    create(first, "one")
    second = cluster.add("b")
    poll_until(lambda: knows(first, second))
    # Rejected while the standby has not reported for a moment, as on a busy machine.
    poll_until(lambda: first.admin("POST", "cluster/step-down", {"reason": "maintenance"}).status == 200)
    second.wait_leads()
    assert first.process is not None
    assert first.process.wait(WAIT_S) == 75
    entries = second.admin("GET", "audit?what=step-down").data["entries"]
    assert [entry["reason"] for entry in entries] == ["maintenance"]
    assert second.post("/v1/jobs/one/start", {"worker": "w"}).status == 200


FULL_DISK = (
    "CREATE FUNCTION no_space() RETURNS trigger LANGUAGE plpgsql AS "
    "$$BEGIN RAISE EXCEPTION 'No space left on device' USING ERRCODE = 'disk_full'; END$$",
    "CREATE TRIGGER full_disk BEFORE INSERT ON jobd_journal FOR EACH ROW EXECUTE FUNCTION no_space()",
)


def test_a_full_disk_of_the_server_rejects_creates_and_is_shown(
    cluster: Cluster, database: str, postgres_server: PostgresServer
) -> None:
    name = urlsplit(database).path.removeprefix("/")
    first = cluster.add("a")
    first.wait_leads()
    postgres_server.sql(*FULL_DISK, database=name)
    rejected = create(first, "one")
    assert (rejected.status, rejected.error) == (507, "storage_full")
    described = "The disk of the journal's server is full."
    assert first.cluster()["problems"] == [described]
    poll_until(lambda: first.admin("GET", "health").body["data"]["journal"]["status"] == "unhealthy")
    assert b"disk=journal" in first.log
    postgres_server.sql("DROP TRIGGER full_disk ON jobd_journal", database=name)
    poll_until(lambda: create(first, "one").status == 201)
    assert first.cluster()["problems"] == []


def send(client: socket.socket, path: str, body: bytes, length: int) -> None:
    """Send a request with the first bytes of its body."""
    head = f"POST {path} HTTP/1.1\r\nHost: jobd\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    client.sendall(head.encode() + body)


def receive(client: socket.socket) -> DaemonResponse:
    response = http.client.HTTPResponse(client)
    response.begin()
    return DaemonResponse(response)


STOPS = {
    "SIGTERM": lambda node: node.process.send_signal(signal.SIGTERM),
    "step-down": lambda node: node.admin("POST", "cluster/step-down"),
}


@pytest.mark.long
@pytest.mark.parametrize("how", STOPS)
def test_slow_clients_do_not_delay_a_takeover(cluster: Cluster, how: str) -> None:
    first = cluster.add("a", variant="patient_stop")
    first.wait_leads()
    for number in range(30):
        first.post("/v1/jobs", {"id": f"large-{number}", "payload": "x" * 200_000})
    with closing(UnixConnection(first.socket)) as reading, closing(UnixConnection(first.socket)) as writing:
        for each in (reading, writing):
            each.connect()
        claim = json.dumps({"worker": "w", "limit": 30}).encode()
        send(reading.sock, "/v1/claim", claim, len(claim))
        send(writing.sock, "/v1/jobs", b'{"id": "ha', 14)
        second = cluster.add("b")
        poll_until(lambda: first.get("/v1/jobs/large-0").data["status"] == "processing")
        poll_until(lambda: second.has_records_of(first) and knows(first, second))
        STOPS[how](first)
        second.wait_leads()
        assert first.process is not None
        assert first.process.poll() is None, "it has a response to send"
        rejected = receive(writing.sock)
        assert (rejected.status, rejected.error) == (503, "shutting_down")
        for grant in receive(reading.sock).data["grants"]:
            done = second.post(f"/v1/jobs/{grant['job']['id']}/complete", {"lock_id": grant["lock_id"]})
            assert done.data["status"] == "completed"
    assert first.process.wait(WAIT_S) == (0 if how == "SIGTERM" else 75)
    assert second.get("/v1/jobs/half").error == "job_not_found"


@pytest.mark.long
def test_the_next_leader_deletes_the_artifacts_that_the_former_one_left(cluster: Cluster, tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    settings = {"JOBD_ARTIFACTS_URL": results.as_uri()}
    first = cluster.add("a", variant="idle_sweeper", **settings)
    first.wait_leads()
    second = cluster.add("b", variant="eager_sweeper", **settings)
    for job_id in ("deleted", "kept"):
        (results / job_id).write_text("result")
        assert create(first, job_id).status == 201
        lock_id = first.post(f"/v1/jobs/{job_id}/start", {"worker": "w"}).data["lock_id"]
        assert first.post(f"/v1/jobs/{job_id}/complete", {"lock_id": lock_id, "storage_key": job_id}).status == 200
    assert first.admin("DELETE", "jobs/deleted").status == 200
    poll_until(lambda: second.has_records_of(first))
    first.kill()
    swept = b'jobd_artifacts_swept_total{outcome="deleted"} 1.0'
    poll_until(lambda: second.get("/readyz").status == 200 and swept in second.admin("GET", "/metrics").body)
    assert [path.name for path in results.iterdir() if path.is_file()] == ["kept"]


@pytest.mark.long
def test_a_hanging_webhook_does_not_delay_a_takeover(cluster: Cluster) -> None:
    hanging = threading.Event()

    async def hang(_: web.Request) -> web.StreamResponse:
        while not hanging.is_set():  # noqa: ASYNC110 - another thread sets it
            await asyncio.sleep(0.05)
        return web.Response(status=204)

    with Receiver(hang) as receiver:
        config = f"""
            [[webhooks]]
            name = "hanging"
            url = "{receiver.url}"
            allow_private = true
            secret = "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="
            timeout = "1m"
        """
        first = cluster.add("a", config=config, variant="patient_stop")
        first.wait_leads()
        second = cluster.add("b", config=config)
        create(first, "one")
        receiver.wait_for(lambda messages: len(messages) == 1)
        poll_until(lambda: second.has_records_of(first))
        assert first.process is not None
        first.process.send_signal(signal.SIGTERM)
        second.wait_leads()
        assert first.process.poll() is None, "its delivery is running"
        receiver.wait_for(lambda messages: len(messages) == 2)
        hanging.set()
        assert first.process.wait(WAIT_S) == 0
        poll_until(lambda: second.admin("GET", "webhooks").data["webhooks"][0]["delivered"] == 1)
        assert len({each.headers["webhook-id"] for each in receiver.received}) == 1


@pytest.mark.long
def test_a_leader_with_a_full_disk_hands_over_to_a_standby_that_is_ready(cluster: Cluster) -> None:
    first = cluster.add("a", variant="full_tables")
    first.wait_leads()
    assert first.process is not None
    first.process.send_signal(signal.SIGUSR2)
    assert create(first, "one").status == 201
    time.sleep(3)
    assert create(first, "two").status == 201, "without a standby, it goes on"
    second = cluster.add("b")
    second.wait_leads()
    assert first.process.wait(WAIT_S) == 75
    assert b"event=hands_over" in first.log
    assert second.get("/v1/jobs/two").data["status"] == "queued"


@pytest.mark.long
def test_a_stopped_leader_that_resumes_serves_no_request(cluster: Cluster) -> None:
    first = cluster.add("a")
    first.wait_leads()
    create(first, "one")
    second = cluster.add("b")
    assert first.process is not None
    first.process.send_signal(signal.SIGSTOP)
    second.wait_leads()
    assert second.post("/v1/jobs/one/start", {"worker": "w"}).status == 200
    errors: list[str] = []

    def ask() -> None:
        try:
            errors.append(first.get("/v1/jobs/one").error)
        except OSError as error:
            errors.append(type(error).__name__)

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.2)
    first.process.send_signal(signal.SIGCONT)
    asking.join()
    assert first.process.wait(WAIT_S) == 75
    assert errors[0] in {"not_leader", "outcome_unknown", "ConnectionResetError", "RemoteDisconnected"}
    assert b"event=leadership_lost" in first.log


@pytest.mark.long
def test_a_node_warns_of_an_address_that_leads_elsewhere(cluster: Cluster) -> None:
    first = cluster.add("a")
    first.wait_leads()
    cluster.add("b", JOBD_NODE_ADVERTISE=first.url).wait_for_log(b"another process responds at " + first.url.encode())
    cluster.add("c", JOBD_NODE_ADVERTISE="http://127.0.0.1:9").wait_for_log(b"http://127.0.0.1:9 does not respond")
    assert b"node.advertise" not in first.log


@pytest.mark.long
def test_a_name_is_used_once(cluster: Cluster) -> None:
    cluster.add("a").wait_leads()
    other = NodeProcess(cluster.directory / "other", cluster.url, "a")
    with ExitStack() as stack:
        stack.push(other)
        other.launch()
        assert other.process is not None
        assert other.process.wait(WAIT_S) == 78
    assert b'runs as node \\"a\\" on this journal' in other.log


@pytest.mark.long
def test_a_node_without_its_journal_says_why_and_ends(cluster: Cluster, database: str) -> None:
    node = NodeProcess(cluster.directory / "x", database.replace("127.0.0.1", "127.0.0.1:1,127.0.0.1"), "x")
    node.environ["JOBD_JOURNAL_URL"] = "postgresql://nobody:secret@127.0.0.1:1/jobd"
    with ExitStack() as stack:
        stack.push(node)
        node.launch()
        assert node.process is not None
        assert node.process.wait(WAIT_S) == 75
    assert b"cannot_start" in node.log
    assert b"secret" not in node.log


@pytest.mark.long
def test_a_node_that_has_worked_waits_while_its_password_is_rejected(
    cluster: Cluster, database: str, postgres_server: PostgresServer
) -> None:
    role = database.rpartition("/")[2]
    node = cluster.add("a")
    node.wait_leads()
    assert create(node, "one").status == 201
    assert node.stop() == 0
    postgres_server.sql(f"ALTER ROLE {role} PASSWORD 'another'")
    node.start()
    poll_until(lambda: "rejects the password of role" in " ".join(node.cluster()["problems"]))
    assert (node.get("/healthz").status, node.get("/readyz").status) == (200, 503)
    postgres_server.sql(f"ALTER ROLE {role} PASSWORD '{PASSWORD}'")
    node.wait_leads()
    assert node.log.count(b"event=standby_waits") == 1


@pytest.mark.long
def test_a_standby_stops_at_a_signal_and_reloads(cluster: Cluster) -> None:
    cluster.add("a").wait_leads()
    standby = cluster.add("b")
    assert standby.process is not None
    poll_until(lambda: len(standby.cluster()["nodes"]) == 2)
    standby.config.write_text("[retention]\ncompleted = '1d'\n")
    standby.process.send_signal(signal.SIGHUP)
    standby.wait_for_log(b"event=reloaded")
    poll_until(lambda: "differs from that of the leader: b" in str(standby.cluster()["problems"]))
    standby.process.send_signal(signal.SIGUSR1)
    standby.wait_for_log(b"event=dump_task")
    assert standby.stop() == 0


@pytest.mark.slow
def test_nothing_acknowledged_is_lost_when_the_leader_is_killed_under_load(cluster: Cluster) -> None:
    nodes = [cluster.add(name) for name in ("a", "b", "c")]
    created: set[str] = set()
    completed: dict[str, int] = {}
    stop = threading.Event()

    def work(worker: int) -> None:
        """Create and complete jobs on the node that leads."""
        number, node = 0, nodes[worker % 3]
        while not stop.is_set():
            number += 1
            job_id = f"{worker}-{number}"
            try:
                if create(node, job_id).status not in (200, 201):
                    raise OSError
                created.add(job_id)
                granted = node.post(f"/v1/jobs/{job_id}/start", {"worker": f"w-{worker}"})
                if granted.status != 200:
                    raise OSError
                body = {"lock_id": granted.data["lock_id"], "file_path": "/f"}
                if node.post(f"/v1/jobs/{job_id}/complete", body).status == 200:
                    completed[job_id] = granted.data["fencing_token"]
            except (OSError, http.client.HTTPException):
                node = nodes[(nodes.index(node) + 1) % 3]
                time.sleep(0.02)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for each in workers:
        each.start()
    for _ in range(2):
        before = len(completed)
        poll_until(lambda: len(completed) > before + 50)  # noqa: B023
        leader = next(node for node in nodes if leads(node))
        leader.kill()
        poll_until(lambda: any(leads(node) for node in nodes if node is not leader))  # noqa: B023
        leader.start()
    stop.set()
    for each in workers:
        each.join()
    leader = next(node for node in nodes if leads(node))
    for job_id in created:
        assert leader.get(f"/v1/jobs/{job_id}").status == 200, job_id
    for job_id in completed:
        assert leader.get(f"/v1/jobs/{job_id}").data["status"] == "completed", job_id
    assert len(set(completed.values())) == len(completed), "each token was given once"
    poll_until(lambda: all(node.cluster()["lag_events"] == 0 for node in nodes))


@pytest.mark.long
@pytest.mark.slow
def test_a_node_with_an_empty_disk_starts_from_a_snapshot(cluster: Cluster, postgres_server: PostgresServer) -> None:
    first = cluster.add("a", JOBD_JOURNAL_SNAPSHOT_EVERY="1s")
    first.wait_leads()
    with closing(first.worker()) as client:
        for number in range(1_100):
            assert call(client, "POST", "/v1/jobs", {"id": f"job-{number}"}).status == 201
    first.wait_for_log(b"event=snapshot_written")
    second = cluster.add("b")
    assert b"event=store_made_from_snapshot" in second.log
    poll_until(lambda: second.has_records_of(first))
    first.kill()
    second.wait_leads()
    assert second.admin("GET", "stats").data["totalJobs"] == 1_100


@pytest.fixture
def proxy(postgres_server: PostgresServer) -> Iterator[ProxyThread]:
    with ProxyThread(postgres_server.port) as running:
        yield running


def proxied(cluster: Cluster, proxy: ProxyThread) -> dict[str, str]:
    """Return the environment of a node that reaches PostgreSQL through the proxy."""
    return {"JOBD_JOURNAL_URL": re.sub(r"127\.0\.0\.1:\d+", f"127.0.0.1:{proxy.proxy.port}", cluster.url)}


@pytest.mark.long
def test_a_leader_without_its_journal_serves_nothing_before_anotherleads(cluster: Cluster, proxy: ProxyThread) -> None:
    first = cluster.add("a", **proxied(cluster, proxy))
    first.wait_leads()
    create(first, "one")
    second = cluster.add("b")
    served: dict[str, list[float]] = {"a": [], "b": []}
    stop = threading.Event()

    def ask(node: NodeProcess) -> None:
        while not stop.is_set():
            with suppress(OSError, http.client.HTTPException):
                sent = time.monotonic()
                if node.get("/v1/jobs/one").status == 200:
                    served[node.name].append(sent)
            time.sleep(0.005)

    askers = [threading.Thread(target=ask, args=(node,)) for node in (first, second)]
    for each in askers:
        each.start()
    time.sleep(0.5)
    proxy.lose(requests=True, responses=True)
    second.wait_leads()
    assert first.process is not None
    first.wait_for_log(b"event=leadership_lost")
    assert first.process.wait(4) == 75, "it waits for no response of the server"
    poll_until(lambda: served["b"])
    stop.set()
    for each in askers:
        each.join()
    assert served["a"][-1] < served["b"][0]
    assert b"the lease is over" in first.log


@pytest.mark.long
def test_a_standby_stops_at_once_while_postgresql_hangs(cluster: Cluster, proxy: ProxyThread) -> None:
    cluster.add("a").wait_leads()
    standby = cluster.add("b", JOBD_JOURNAL_LEASE="30s", **proxied(cluster, proxy))
    poll_until(lambda: len(standby.cluster()["nodes"]) == 2)
    proxy.lose(requests=True, responses=True)
    poll_until(proxy.proxy.lost.is_set)  # the standby waits for the head of the journal
    assert standby.stop() == 0


@pytest.mark.long
@pytest.mark.parametrize("direction", ["requests", "responses"])
def test_a_client_does_not_notice_a_lost_connection_to_the_journal(
    cluster: Cluster, proxy: ProxyThread, direction: str
) -> None:
    node = cluster.add("a", JOBD_JOURNAL_LEASE="10s", **proxied(cluster, proxy))
    node.wait_leads()
    epoch = node.cluster()["epoch"]
    proxy.lose(requests=direction == "requests", responses=direction == "responses")
    results: list[int] = []
    asking = threading.Thread(target=lambda: results.append(create(node, "one").status))
    asking.start()
    poll_until(proxy.proxy.lost.is_set)
    time.sleep(0.1)
    proxy.cut()
    asking.join()
    assert results == [201]
    assert node.cluster()["epoch"] > epoch
    granted = node.post("/v1/jobs/one/start", {"worker": "w"}).data
    assert granted["fencing_token"] >> 24 == node.cluster()["epoch"]
    assert len(node.get("/v1/jobs/one/timeline").data["events"]) == 2


@pytest.mark.long
@pytest.mark.slow
def test_a_restart_of_postgres_ends_no_leadership_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADMIN_TOKEN", TOKEN)
    with postgres.postgres() as server, ExitStack() as stack:
        flags = ["--set", f"journal.url={server.url()}", "--set", "journal.require_sync=false"]
        assert main(["cluster", "init", *flags]) == 0
        node = Cluster(tmp_path, server.url(), stack).add("a", JOBD_JOURNAL_LEASE="20s")
        node.wait_leads()
        assert create(node, "before").status == 201
        server.kill()
        results: list[int] = []
        asking = threading.Thread(target=lambda: results.append(create(node, "during").status))
        asking.start()
        time.sleep(0.5)
        server.start()
        asking.join()
        assert results == [201]
        assert [job["id"] for job in node.get("/v1/jobs").data["jobs"]] == ["during", "before"]
        assert node.stop() == 0


@pytest.mark.long
@pytest.mark.slow
def test_nodes_without_a_synchronous_standby_use_few_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADMIN_TOKEN", TOKEN)
    with postgres.postgres_cluster() as (server, standby), ExitStack() as stack:
        assert main(["cluster", "init", "--set", f"journal.url={server.url()}"]) == 0
        cluster = Cluster(tmp_path, server.url(), stack, JOBD_JOURNAL_LEASE="1s")
        first = cluster.add("a", variant="short_takeovers")
        first.wait_leads()
        second = cluster.add("b", variant="short_takeovers")
        assert create(first, "before").status == 201
        standby.stop()
        assert first.process is not None
        assert first.process.wait(WAIT_S) == 75
        first.start()
        sessions = "SELECT pid, wait_event_type FROM pg_stat_activity WHERE application_name = 'jobd main'"
        attempts: set[str] = set()
        while len(attempts) < 30:
            found = server.sql(sessions).splitlines()
            assert len(found) <= 20, "two of each node, one of the former leader, and those that are ending"
            attempts |= {each for each in found if each.endswith("|Lock")}
        standby.start()
        poll_until(lambda: leads(first) or leads(second))
        leader = first if leads(first) else second
        assert leader.get("/v1/jobs/before").data["status"] == "queued"
        assert create(leader, "after").status == 201
