"""Real daemons on a real PostgreSQL: one leads, the others follow, and one of them takes over."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from jobd.cli.daemon.main import main
from tests.support import postgres
from tests.support.daemon_process import TOKEN, DaemonResponse, UnixConnection, call
from tests.support.forked_process import ForkedNode
from tests.support.node_process import Cluster, NodeProcess
from tests.support.polling import poll_until
from tests.support.postgres import PASSWORD, PostgresServer
from tests.support.tcp_proxy import ProxyThread

WAIT_S = 60.0

pytestmark = pytest.mark.slow


def knows(leader: NodeProcess, standby: NodeProcess) -> bool:
    """Return whether the leader has read the entry of a standby, without which it does not step down."""
    return standby.name in [each["name"] for each in leader.cluster()["nodes"]]


def create(node: NodeProcess, job_id: str) -> DaemonResponse:
    return node.post("/v1/jobs", {"id": job_id})


def test_a_standby_follows_and_takes_over(cluster: Cluster) -> None:
    first = cluster.add_leader("a")
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
    first = cluster.add_leader("a")
    create(first, "one")
    second = cluster.add("b")
    poll_until(lambda: knows(first, second))
    # Rejected while the standby has not reported for a moment, as on a busy machine.
    poll_until(lambda: first.admin("POST", "cluster/step-down", {"reason": "maintenance"}).status == 200)
    second.wait_leads()
    assert first.process.wait(WAIT_S) == 75
    entries = second.admin("GET", "audit?action=step-down").data["entries"]
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
    first = cluster.add_leader("a")
    postgres_server.sql(*FULL_DISK, database=name)
    rejected = create(first, "one")
    assert (rejected.status, rejected.error) == (507, "storage_full")
    described = "The disk of the journal's server is full."
    assert first.cluster()["warnings"] == [described]
    poll_until(lambda: first.admin("GET", "health").body["data"]["journal"]["status"] == "unhealthy")
    assert b"disk=journal" in first.log
    postgres_server.sql("DROP TRIGGER full_disk ON jobd_journal", database=name)
    poll_until(lambda: create(first, "one").status == 201)
    assert first.cluster()["warnings"] == []


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
    first = cluster.add_leader("a", variant="patient_stop")
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
        assert first.process.poll() is None, "it has a response to send"
        rejected = receive(writing.sock)
        assert (rejected.status, rejected.error) == (503, "shutting_down")
        for grant in receive(reading.sock).data["grants"]:
            done = second.post(f"/v1/jobs/{grant['job']['id']}/complete", {"lock_id": grant["lock_id"]})
            assert done.data["status"] == "completed"
    assert first.process.wait(WAIT_S) == (0 if how == "SIGTERM" else 75)
    assert second.get("/v1/jobs/half").error == "job_not_found"


@pytest.mark.long
def test_a_name_is_used_once(cluster: Cluster) -> None:
    cluster.add_leader("a")
    code, log = ForkedNode(cluster.directory / "other", cluster.url, "a").failed_start()
    assert (code, 'runs as node \\"a\\" on this journal' in log) == (78, True)


@pytest.mark.long
def test_a_node_without_its_journal_says_why_and_ends(tmp_path: Path) -> None:
    node = ForkedNode(tmp_path / "x", "postgresql://nobody:secret@127.0.0.1:1/jobd", "x")
    code, log = node.failed_start()
    assert (code, "cannot_start" in log, "secret" in log) == (75, True, False)


@pytest.mark.long
def test_a_node_that_has_worked_waits_while_its_password_is_rejected(
    cluster: Cluster, database: str, postgres_server: PostgresServer
) -> None:
    role = database.rpartition("/")[2]
    node = cluster.add_leader("a")
    assert create(node, "one").status == 201
    assert node.stop() == 0
    postgres_server.sql(f"ALTER ROLE {role} PASSWORD 'another'")
    node.start()
    poll_until(lambda: "rejects the password of role" in " ".join(node.cluster()["warnings"]))
    assert (node.get("/healthz").status, node.get("/readyz").status) == (200, 503)
    postgres_server.sql(f"ALTER ROLE {role} PASSWORD '{PASSWORD}'")
    node.wait_leads()
    assert node.log.count(b"event=standby_waits") == 1


@pytest.mark.long
def test_a_standby_stops_at_a_signal_and_reloads(cluster: Cluster) -> None:
    cluster.add_leader("a")
    standby = cluster.add("b")
    poll_until(lambda: len(standby.cluster()["nodes"]) == 2)
    standby.config.write_text("[retention]\ncompleted = '1d'\n")
    standby.process.send_signal(signal.SIGHUP)
    standby.wait_for_log(b"event=reloaded")
    poll_until(lambda: "differs from the leader's: b" in str(standby.cluster()["warnings"]))
    standby.process.send_signal(signal.SIGUSR1)
    standby.wait_for_log(b"event=dump_task")
    assert standby.stop() == 0


@pytest.fixture
def proxy(postgres_server: PostgresServer) -> Iterator[ProxyThread]:
    with ProxyThread(postgres_server.port) as running:
        yield running


def proxied(cluster: Cluster, proxy: ProxyThread) -> dict[str, str]:
    """Return the environment of a node that reaches PostgreSQL through the proxy."""
    return {"JOBD_JOURNAL_URL": re.sub(r"127\.0\.0\.1:\d+", f"127.0.0.1:{proxy.proxy.port}", cluster.url)}


@pytest.mark.long
def test_a_standby_stops_at_once_while_postgresql_hangs(cluster: Cluster, proxy: ProxyThread) -> None:
    cluster.add_leader("a")
    standby = cluster.add("b", JOBD_JOURNAL_LEASE="30s", **proxied(cluster, proxy))
    poll_until(lambda: len(standby.cluster()["nodes"]) == 2)
    proxy.lose(requests=True, responses=True)
    poll_until(proxy.proxy.lost.is_set)  # the standby waits for the head of the journal
    assert standby.stop() == 0


@pytest.mark.long
@pytest.mark.slow
def test_a_restart_of_postgres_ends_no_leadership_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADMIN_TOKEN", TOKEN)
    with postgres.postgres() as server, ExitStack() as stack:
        flags = ["--set", f"journal.url={server.url()}", "--set", "journal.require_sync=false"]
        assert main(["cluster", "init", *flags]) == 0
        node = Cluster(tmp_path, server.url(), stack, ForkedNode).add_leader("a", JOBD_JOURNAL_LEASE="20s")
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
