"""Nodes that go back to an older version one after the other, and are upgraded again, under load."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from jobd.model.storage import EXTRA_FORMAT
from tests.proof.faults import nodes
from tests.proof.faults.harness import Counts, Trial, check
from tests.support.node_process import NodeProcess
from tests.support.polling import poll_until
from tests.support.webhook_receiver import Receiver

NEW: Final = ""  # variants of the daemon
OLD: Final = "older_format"
NEWEST: Final = EXTRA_FORMAT - 1  # of the records under this load; after one of EXTRA_FORMAT there is no way back
CHANGES: Final = 60  # between two steps
SETTINGS: Final = {
    "JOBD_CLEANUP_INTERVAL": "500ms",  # its statistics need a record of format NEWEST
    "JOBD_CLEANUP_MIN_INTERVAL": "0s",
    "JOBD_JOURNAL_SNAPSHOT_EVERY": "1s",
}


_WEBHOOK: Final = f"""
[[webhooks]]
name = "all"
url = "{{url}}"
secret = "whsec_{base64.b64encode(bytes(32)).decode()}"
allow_private = true
events = ["job.created"]
"""


@check(rounds=3, few=0, needs=(nodes.POSTGRES,))
def cluster_versions(trial: Trial) -> Counts:
    """Nodes go back to a version that reads fewer records, and are upgraded again: no command fails, none is lost."""
    with Receiver() as receiver, _running(trial, receiver) as cluster:
        for _ in range(trial.rounds):
            _go_back(cluster)
            _upgrade(cluster)
        _wait_for_messages(cluster, receiver)
    return {
        "times back and upgraded again": trial.rounds,
        "messages of webhooks": len(receiver.received),
        **cluster.counts,
    }


@contextmanager
def _running(trial: Trial, receiver: Receiver) -> Iterator[nodes.NodesUnderLoad]:
    with nodes.nodes_under_load(trial) as cluster:
        for name in nodes.NODES:
            node = cluster.add(name, environ=SETTINGS)
            node.config.write_text(_WEBHOOK.format(url=receiver.url))
        with nodes.under_load(cluster):
            yield cluster


def _go_back(cluster: nodes.NodesUnderLoad) -> None:
    """Install the older version: the leader last. The first node needs a snapshot that is new enough."""
    _wait_for_newest(cluster, after=_last_record(cluster))
    leader = cluster.leader()
    first, second = cluster.others(leader)
    assert first.stop() == 0, first.log[-2000:]
    _wait_for_newest(cluster, after=_last_record(cluster))
    first.variant = OLD
    first.launch()
    assert nodes.exit_code(first) == 78, first.log[-2000:]
    assert f"has format {NEWEST}" in first.wait_for_log(b"cannot_start")
    poll_until(lambda: _is_reported(leader, first))
    unread = _last_newest(cluster)
    poll_until(lambda: _last_snapshot(cluster) > unread)
    nodes.remove_store(first)
    first.start()
    cluster.wait_until_followed()
    _install(cluster, OLD, second)
    _install_on_leader(cluster, OLD, leader)
    assert _last_newest(cluster) == unread, "a record was written that an older node does not read"


def _upgrade(cluster: nodes.NodesUnderLoad) -> None:
    """Install the newer version: the leader last. It takes effect when all nodes have it."""
    before = _last_newest(cluster)
    leader = cluster.leader()
    for node in cluster.others(leader):
        _install(cluster, NEW, node)
    with cluster.outage("a stop", cluster.others(leader)):
        assert leader.stop() == 0, leader.log[-2000:]
    cluster.wait_for_changes(CHANGES)
    poll_until(lambda: _is_reported(cluster.leader(), leader))
    response = cluster.leader().post("/v1/jobs", {"id": "with-headers", "headers": {"trace": "t"}})
    assert response.error == "upgrade_incomplete", response.body
    assert _last_newest(cluster) == before, "a record was written that an older node does not read"
    leader.variant = NEW
    cluster.revive()
    _wait_for_newest(cluster, after=before)


def _install(cluster: nodes.NodesUnderLoad, version: str, node: NodeProcess) -> None:
    """Install a version on a standby."""
    assert node.stop() == 0, node.log[-2000:]
    node.variant = version
    cluster.wait_for_changes(CHANGES)
    cluster.revive()
    cluster.wait_until_followed()


def _install_on_leader(cluster: nodes.NodesUnderLoad, version: str, leader: NodeProcess) -> None:
    with cluster.outage("a stop", cluster.others(leader)):
        assert leader.stop() == 0, leader.log[-2000:]
    leader.variant = version
    cluster.wait_for_changes(CHANGES)
    cluster.revive()


def _is_reported(node: NodeProcess, older: NodeProcess) -> bool:
    """Return whether a node says that another one is older."""
    return any(f" {older.name} (up to {NEWEST - 1})" in text for text in node.cluster()["warnings"])


def _wait_for_newest(cluster: nodes.NodesUnderLoad, *, after: int) -> None:
    """Wait for a record of format NEWEST."""
    poll_until(lambda: _last_newest(cluster) > after)


def _last_newest(cluster: nodes.NodesUnderLoad) -> int:
    return _number(cluster, f"SELECT max(number) FROM jobd_journal WHERE get_byte(body, 0) >= {NEWEST}")


def _last_record(cluster: nodes.NodesUnderLoad) -> int:
    return _number(cluster, "SELECT max(number) FROM jobd_journal")


def _last_snapshot(cluster: nodes.NodesUnderLoad) -> int:
    return _number(cluster, "SELECT max(number) FROM jobd_snapshots WHERE complete")


def _number(cluster: nodes.NodesUnderLoad, statement: str) -> int:
    return int(cluster.servers[0].sql(statement, database=nodes.DATABASE) or 0)


def _wait_for_messages(cluster: nodes.NodesUnderLoad, receiver: Receiver) -> None:
    """Wait until a message has come for every job whose creation was acknowledged."""
    created = {f"jobs/{name}" for name, job in list(cluster.ledger.jobs.items()) if job.events}
    poll_until(lambda: created <= {each.event["subject"] for each in list(receiver.received)}, every_s=0.5)
