"""Daemons that are nodes of a cluster."""

from __future__ import annotations

import http.client
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from tests.support.daemon_process import TOKEN, DaemonProcess, free_port


class NodeProcess(DaemonProcess):
    """A node of a cluster, whose worker API is also on TCP, at the address `host`."""

    def __init__(self, directory: Path, url: str, name: str, *, host: str = "127.0.0.1", **environ: str) -> None:
        directory.mkdir(exist_ok=True)
        self.name = name
        self.host = host
        self.port = free_port()
        settings = {
            "JOBD_JOURNAL_URL": url,
            "JOBD_JOURNAL_LEASE": "2s",
            "JOBD_JOURNAL_REQUIRE_SYNC": "false",
            "JOBD_NODE_NAME": name,
            "JOBD_WORKER_LISTEN": f"{self.host}:{self.port}",
            "JOBD_WORKER_TOKEN_FILE": str(directory / "token"),
        }
        (directory / "token").write_text(TOKEN)
        (directory / "token").chmod(0o600)
        super().__init__(directory, **settings | environ)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def start(self) -> None:
        """Start the process and wait until it is a standby, at least."""
        self.launch()
        self.wait_for_log(b"event=standby")

    def cluster(self) -> Any:
        return self.get("/v1/cluster").data

    def has_records_of(self, leader: NodeProcess) -> bool:
        """Return whether this standby has every record of the leader. One that has just started knows of none."""
        record, seen = leader.cluster()["record"], self.cluster()
        return bool(seen["record"] >= record and seen["lag_events"] == 0)

    def wait_leads(self) -> None:
        self.wait_for_log(b"event=ready")


def leads(node: NodeProcess) -> bool:
    with suppress(OSError, http.client.HTTPException):
        return node.get("/readyz").status == 200
    return False


class Cluster:
    """The nodes of one journal, whose processes are made by `kind`."""

    def __init__(
        self, directory: Path, url: str, stack: ExitStack, kind: type[NodeProcess] = NodeProcess, **environ: str
    ) -> None:
        self.directory = directory
        self._kind = kind
        self.environ = environ  # of every node
        self.url = url
        self._stack = stack
        self.nodes: list[NodeProcess] = []

    def add(self, name: str, *, config: str = "", variant: str = "", **environ: str) -> NodeProcess:
        """Start a node. `variant` is one of tests.support.daemon_variants."""
        node = self._kind(self.directory / name, self.url, name, **self.environ | environ)
        node.config.write_text(config)
        node.variant = variant
        self._stack.enter_context(node)
        self.nodes.append(node)
        return node

    def add_leader(self, name: str, **options: str) -> NodeProcess:
        """Start a node, as `add` does, and wait until it leads."""
        node = self.add(name, **options)
        node.wait_leads()
        return node
