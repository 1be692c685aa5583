"""Wall clocks of nodes and of PostgreSQL that are an hour off, while leaders and servers are lost."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Final

from tests.proof.faults.clocks import FAKETIME, faked_clock, set_offset
from tests.proof.faults.harness import Counts, Trial, check
from tests.proof.faults.lost_leaders import kill_leader, suspend_leader
from tests.proof.faults.lost_servers import lose_primary, replace_lost, revive_until_led
from tests.proof.faults.nodes import NODES, POSTGRES, NodesUnderLoad, nodes_under_load, under_load
from tests.support.node_process import NodeProcess
from tests.support.polling import poll_until
from tests.support.postgres import PostgresServer, wait_for

CHANGES: Final = 60  # between two faults
HOUR_S: Final = 3_600
SHORT_LOCKS: Final = {"JOBD_LOCKS_TTL": "50m", "JOBD_LOCKS_PROGRESS_TIMEOUT": "50m"}
CACHE_S: Final = 1  # after which a node notices a step. To read the offset at each call slows a takeover
CACHED: Final = {"FAKETIME_NO_CACHE": "0", "FAKETIME_CACHE_DURATION": f"{CACHE_S}"}
ALERT_S: Final = 45.0  # in which an alert fires


@check(rounds=8, few=0, needs=(POSTGRES, FAKETIME))
def cluster_node_clocks(trial: Trial) -> Counts:
    """Wall clocks of nodes step an hour ahead or back in turn, and the leader is lost: no lock ends early."""
    with nodes_under_load(trial) as cluster:
        files = {name: trial.directory / f"{name}.offset" for name in NODES}
        for name, file in files.items():
            set_offset(file, 0)
            cluster.add(name, environ=SHORT_LOCKS | faked_clock(file) | CACHED)
        with under_load(cluster):
            for number in range(trial.rounds):
                leader = cluster.leader()
                for node in [leader, *cluster.others(leader)]:
                    cluster.wait_for_changes(CHANGES)
                    set_offset(files[node.name], (1, 0, -1, 0)[number % 4] * HOUR_S)
                time.sleep(CACHE_S)
                kill_leader(cluster)
    return {"steps of each clock": trial.rounds, **cluster.counts}


@check(rounds=4, few=0, needs=(POSTGRES, FAKETIME))
def cluster_server_clock(trial: Trial) -> Counts:
    """The wall clock of PostgreSQL is an hour off, and changes at a restart and a failover, while leaders are lost: one
    node leads, no lock ends early, and an alert fires.
    """
    with nodes_under_load(trial) as cluster:
        for server in cluster.servers:
            server.stop()
            server.environ = faked_clock(_step(server, 0))
            server.start()
        _wait_for_quorum(cluster)
        for name in NODES:
            cluster.add(name, environ=SHORT_LOCKS)
        with under_load(cluster):
            for number in range(trial.rounds):
                _lose_leaders(cluster, HOUR_S if number % 2 else -HOUR_S, trial)
    return {"changes of the clock": 3 * trial.rounds, **cluster.counts}


def _lose_leaders(cluster: NodesUnderLoad, seconds: int, trial: Trial) -> None:
    primary = cluster.servers[0]
    _step(primary, seconds)
    _wait_until_shown(cluster, trial)
    kill_leader(cluster)
    cluster.wait_for_changes(CHANGES)
    suspend_leader(cluster)
    cluster.wait_for_changes(CHANGES)
    primary.stop(signal.SIGQUIT)
    _step(primary, -seconds)
    primary.start()
    revive_until_led(cluster)
    _wait_for_quorum(cluster)
    cluster.wait_until_followed()
    kill_leader(cluster)
    cluster.wait_for_changes(CHANGES)
    lose_primary(cluster)
    cluster.wait_until_followed()
    kill_leader(cluster)
    _step(primary, 0)
    replace_lost(cluster.servers)
    suspend_leader(cluster)


def _step(server: PostgresServer, seconds: int) -> Path:
    """Set how far the clock of a server is ahead. Return the file that says so, which its user can read."""
    file = server.directory / "offset"
    set_offset(file, seconds)
    return file


def _wait_for_quorum(cluster: NodesUnderLoad) -> None:
    wait_for(cluster.servers[0], "SELECT count(*) = 2 FROM pg_stat_replication WHERE sync_state = 'quorum'")


def _wait_until_shown(cluster: NodesUnderLoad, trial: Trial) -> None:
    """Wait until the leader shows the difference, and its alert fires."""
    leader = cluster.leader()
    poll_until(lambda: any(" PostgreSQL's." in text for text in leader.cluster()["warnings"]), every_s=0.1)
    poll_until(lambda: _fires(leader), *([ALERT_S] if trial.timed else []), every_s=0.1)


def _fires(leader: NodeProcess) -> bool:
    alerts = leader.admin("GET", "alerts").data["alerts"]
    return any(alert["name"] == "clocks_differ" and alert["firing"] for alert in alerts)
