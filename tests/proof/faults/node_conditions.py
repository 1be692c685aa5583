"""Nodes with a full or lost disk, and a long transaction in their database."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Final

from jobd.cluster.hand_over import SETTLED_S
from tests.proof.faults import nodes
from tests.proof.faults.full_disk import FREE_BYTES
from tests.proof.faults.harness import Counts, Trial, check
from tests.proof.faults.lost_leaders import step_down
from tests.proof.faults.mounts import MOUNTS, tmpfs
from tests.support.node_process import NodeProcess
from tests.support.store_files import fill

CHANGES: Final = 60  # between two faults
FULL_CHANGES: Final = 1_000  # while a disk is full
TRANSACTION_S: Final = 600
SHORT_TRANSACTION_S: Final = 15


@check(rounds=5, few=0, needs=(nodes.POSTGRES, MOUNTS))
def cluster_standby_disk(trial: Trial) -> Counts:
    """The disk of a standby is full, then lost: the leader goes on, and the standby follows again."""
    small = trial.directory / "small"
    with tmpfs(small, 2 * FREE_BYTES), nodes.nodes_under_load(trial) as cluster:
        for name in nodes.NODES[:2]:
            cluster.add(name)
        standby = cluster.add(nodes.NODES[2], small)
        with nodes.under_load(cluster):
            for _ in range(trial.rounds):
                _let_follow(cluster, standby)
                _fill(cluster, small)
                cluster.wait_until_followed()
                _lose_disk(standby)
                cluster.wait_until_followed()
                cluster.wait_for_changes(CHANGES)
    return {"full disks": trial.rounds, "lost disks": trial.rounds, **cluster.counts}


@check(rounds=3, few=0, needs=(nodes.POSTGRES, MOUNTS))
def cluster_leader_disk(trial: Trial) -> Counts:
    """The disk of the leader is full: it hands over to a standby, and follows when there is space."""
    with contextlib.ExitStack() as stack:
        disks = {name: stack.enter_context(tmpfs(trial.directory / name, 4 * FREE_BYTES)) for name in nodes.NODES}
        cluster = stack.enter_context(nodes.nodes_under_load(trial))
        for name, disk in disks.items():
            cluster.add(name, disk)
        with nodes.under_load(cluster):
            for _ in range(trial.rounds):
                time.sleep(SETTLED_S)  # a new leader does not hand over
                leader = cluster.leader()
                with cluster.outage("a full disk", cluster.others(leader)):
                    filler = fill(disks[leader.name])
                    assert nodes.exit_code(leader) == nodes.STEPPED_DOWN, leader.log[-2000:]
                assert b"event=hands_over" in leader.log
                filler.unlink()
                cluster.revive()
                cluster.wait_until_followed()
    return {"full disks": trial.rounds, **cluster.counts}


def _let_follow(cluster: nodes.NodesUnderLoad, node: NodeProcess) -> None:
    while cluster.leader() is node:
        step_down(cluster)


def _fill(cluster: nodes.NodesUnderLoad, disk: Path) -> None:
    """Fill the disk for a while. The standby keeps what it follows in memory."""
    filler = fill(disk)
    cluster.wait_for_changes(FULL_CHANGES)
    filler.unlink()


def _lose_disk(standby: NodeProcess) -> None:
    standby.kill()
    nodes.remove_store(standby)
    standby.start()


@check(rounds=1, few=0, needs=(nodes.POSTGRES,))
def cluster_open_transaction(trial: Trial) -> Counts:
    """A long transaction is open in the database: nothing is lost, and the nodes show its age.

    It keeps every old version of the row that appends change.
    """
    seconds = TRANSACTION_S if trial.timed else SHORT_TRANSACTION_S
    statements = ("BEGIN", "SELECT txid_current()", f"SELECT pg_sleep({seconds})", "COMMIT")
    with nodes.running(trial) as cluster:
        before = _changes_per_s(cluster, 3)
        transaction = threading.Thread(target=lambda: cluster.servers[0].sql(*statements, database=nodes.DATABASE))
        transaction.start()
        time.sleep(seconds - 8)
        shown_ms = cluster.leader().cluster()["oldest_transaction_ms"]
        assert shown_ms > (seconds - 8) * 500, f"the node shows a transaction of {shown_ms} ms"
        late = _changes_per_s(cluster, 3)
        transaction.join()
    return {
        "s of a transaction": seconds,
        "changes per second before": before,
        "at its end": late,
        **cluster.counts,
    }


def _changes_per_s(cluster: nodes.NodesUnderLoad, seconds: float) -> int:
    acknowledged = cluster.ledger.acknowledged
    time.sleep(seconds)
    return round((cluster.ledger.acknowledged - acknowledged) / seconds)
