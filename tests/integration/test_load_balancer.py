"""The HAProxy configuration of docs/cluster.md with two nodes: all requests reach the node that leads."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pytest

from tests import ROOT
from tests.conftest import tool_missing
from tests.support.daemon_process import TOKEN, DaemonResponse, call, die_with_us, free_port
from tests.support.node_process import Cluster, NodeProcess
from tests.support.polling import poll_until

WAIT_S: Final = 60.0
AUTHORIZED: Final = {"Authorization": f"Bearer {TOKEN}"}
CLAIM: Final = {"worker": "w", "wait_ms": 60_000}

pytestmark = pytest.mark.slow


def documented_configuration() -> str:
    found = re.search(r"^```text\n(defaults\n.*?)^```", (ROOT / "docs/cluster.md").read_text("utf-8"), re.M | re.S)
    assert found is not None
    return found[1]


class HAProxy:
    """HAProxy with the documented configuration and the addresses of these nodes."""

    def __init__(self, directory: Path, nodes: list[NodeProcess]) -> None:
        self.port = free_port()
        addresses = "".join(f"    server {node.name} {node.host}:{node.port}\n" for node in nodes)
        text, binds = re.subn(r"bind :8771", f"bind 127.0.0.1:{self.port}", documented_configuration())
        text, servers = re.subn(r"(?: +server \w+ \S+:8771\n)+", addresses, text)
        assert (binds, servers) == (1, 1)
        self.config = directory / "haproxy.cfg"
        self.config.write_text(text)

    @contextmanager
    def running(self) -> Iterator[None]:
        with subprocess.Popen(["haproxy", "-db", "-f", str(self.config)], preexec_fn=die_with_us) as process:
            try:
                yield
            finally:
                process.kill()

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> DaemonResponse:
        with closing(self.connection()) as connection:
            return call(connection, method, path, body, **AUTHORIZED, **headers)

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> DaemonResponse:
        """Repeat a request, as a client does, until it has a response other than 503."""
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            with suppress(OSError, http.client.HTTPException):
                response = self.send(method, path, body, **headers)
                if response.status != 503:
                    return response
            time.sleep(0.1)
        raise AssertionError("no response but 503")

    @property
    def has_checked(self) -> bool:
        """Whether it sends requests to the leader alone. Before its first checks it sends them to all nodes in turn."""
        try:
            return all(self.send("GET", "/readyz").status == 200 for _ in range(4))
        except (OSError, http.client.HTTPException):  # a check ends the connections to the standby
            return False


@pytest.fixture
def nodes(cluster: Cluster) -> list[NodeProcess]:
    """Return a leader and its standby."""
    leader = cluster.add_leader("a")
    return [leader, cluster.add("b")]


@pytest.fixture
def balancer(tmp_path: Path, nodes: list[NodeProcess]) -> Iterator[HAProxy]:
    if shutil.which("haproxy") is None:
        tool_missing("haproxy", "haproxy")
    made = HAProxy(tmp_path, nodes)
    with made.running():
        poll_until(lambda: listens(made.port))
        poll_until(lambda: made.has_checked)
        yield made


def listens(port: int) -> bool:
    with closing(socket.socket()) as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def parked_claims(node: NodeProcess) -> float:
    text = node.admin("GET", "/metrics").body.decode()
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith("jobd_parked_claims "))


def test_requests_reach_the_node_that_leads(nodes: list[NodeProcess], balancer: HAProxy) -> None:
    leader, standby = nodes
    assert balancer.request("POST", "/v1/jobs", {"id": "one"}).status == 201
    assert leader.get("/v1/jobs/one").status == 200
    leader.kill()
    assert balancer.request("GET", "/v1/jobs/one").data["status"] == "queued"
    assert balancer.request("POST", "/v1/jobs", {"id": "two"}).status == 201
    assert standby.get("/v1/jobs/two").status == 200


def test_a_claim_that_waits_moves_to_the_next_leader(nodes: list[NodeProcess], balancer: HAProxy) -> None:
    leader, standby = nodes
    with ThreadPoolExecutor() as pool:
        claim = pool.submit(balancer.request, "POST", "/v1/claim", CLAIM, Idempotency_Key="k")
        poll_until(lambda: parked_claims(leader) == 1)
        leader.process.send_signal(signal.SIGSTOP)  # its connections stay open, as those of a lost machine do
        standby.wait_leads()
        poll_until(lambda: parked_claims(standby) == 1)
        assert standby.post("/v1/jobs", {"id": "one"}).status == 201
        assert [grant["job"]["id"] for grant in claim.result(WAIT_S).data["grants"]] == ["one"]


def test_a_claim_of_a_client_that_disconnects_ends(nodes: list[NodeProcess], balancer: HAProxy) -> None:
    leader, _ = nodes
    with closing(balancer.connection()) as connection:
        connection.request("POST", "/v1/claim", json.dumps(CLAIM), AUTHORIZED | {"Content-Type": "application/json"})
        poll_until(lambda: parked_claims(leader) == 1)
    poll_until(lambda: parked_claims(leader) == 0)
    assert balancer.request("POST", "/v1/jobs", {"id": "one"}).status == 201
    assert leader.get("/v1/jobs/one").data["status"] == "queued"
