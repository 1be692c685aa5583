"""Leaders that are killed, suspended, stopped and told to step down, on real PostgreSQL servers with quorum commit."""

from __future__ import annotations

import http.client
from collections.abc import Callable
from contextlib import closing
from typing import Final

from tests.proof.faults.harness import Counts, Trial, check
from tests.proof.faults.nodes import POSTGRES, STEPPED_DOWN, NodesUnderLoad, exit_code, freeze, running, thaw
from tests.support.node_process import NodeProcess

CHANGES: Final = 60  # between two faults
READS: Final = 3  # that a suspended leader finds when it goes on


def kill_leader(cluster: NodesUnderLoad) -> None:
    leader = cluster.leader()
    with cluster.outage("a kill", cluster.others(leader)):
        leader.kill()
    cluster.revive()


def suspend_leader(cluster: NodesUnderLoad) -> None:
    """Suspend the leader until another node has led for a while, and resume it."""
    leader = cluster.leader()
    with cluster.outage("a suspension", cluster.others(leader)):
        freeze(leader)
    cluster.wait_for_changes(CHANGES)
    _read_late(leader)
    assert exit_code(leader) == STEPPED_DOWN, leader.log[-2000:]
    cluster.revive()


def _read_late(leader: NodeProcess) -> None:
    """Send reads to a suspended leader, and resume it. None may get data."""
    connections = [leader.worker() for _ in range(READS)]
    for connection in connections:
        connection.request("GET", "/v1/jobs?limit=1")
    thaw(leader)
    for connection in connections:
        with closing(connection):
            try:
                status = connection.getresponse().status
            except (OSError, http.client.HTTPException):
                continue
            assert status == 503, f"a leader whose lease was over responded with {status}"


def step_down(cluster: NodesUnderLoad) -> None:
    leader = cluster.leader()
    with cluster.outage("a step-down", cluster.others(leader)):
        assert leader.admin("POST", "cluster/step-down", {"reason": "test"}).status == 200
    assert exit_code(leader) == STEPPED_DOWN, leader.log[-2000:]
    cluster.revive()


def restart_each(cluster: NodesUnderLoad) -> None:
    """Restart the standbys, then the leader, as in an upgrade."""
    leader = cluster.leader()
    for node in cluster.others(leader):
        assert node.stop() == 0, node.log[-2000:]
        cluster.wait_for_changes(CHANGES)
        cluster.revive()
        cluster.wait_until_followed()
    with cluster.outage("a stop", cluster.others(leader)):
        assert leader.stop() == 0, leader.log[-2000:]
    cluster.revive()


def _repeat(trial: Trial, fault: Callable[[NodesUnderLoad], None], what: str) -> Counts:
    """Make a fault `rounds` times, with some changes between."""
    with running(trial) as cluster:
        for number in range(trial.rounds):
            cluster.wait_for_changes(CHANGES + 17 * (number % 7))
            fault(cluster)
    return {what: trial.rounds, **cluster.counts}


@check(rounds=100, few=0, needs=(POSTGRES,))
def cluster_leader_killed(trial: Trial) -> Counts:
    """kill -9 of the leader: a standby leads with everything that was acknowledged, and no token is granted twice."""
    return _repeat(trial, kill_leader, "kills")


@check(rounds=20, few=0, needs=(POSTGRES,))
def cluster_leader_suspended(trial: Trial) -> Counts:
    """The leader is suspended beyond its lease and resumed: it serves no read, changes nothing, and exits with 75."""
    return _repeat(trial, suspend_leader, "suspensions")


@check(rounds=1_000, few=0, needs=(POSTGRES,))
def cluster_step_downs(trial: Trial) -> Counts:
    """A leader that steps down loses nothing, and clients only notice a delay."""
    return _repeat(trial, step_down, "step-downs")


@check(rounds=10, few=0, needs=(POSTGRES,))
def cluster_rolling_restart(trial: Trial) -> Counts:
    """Nodes are restarted one after the other under load: nothing is lost, and each follows again."""
    return _repeat(trial, restart_each, "restarts of all nodes")
