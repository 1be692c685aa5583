"""PostgreSQL servers that are lost, nodes that are cut off from them or from clients, and answers that are lost."""

from __future__ import annotations

import re
import shutil
import time
from typing import Final

from tests.proof.faults import nodes
from tests.proof.faults.harness import Counts, Trial, check
from tests.proof.faults.lost_leaders import kill_leader, suspend_leader
from tests.proof.faults.network import NETWORKS, Link, networks
from tests.support.polling import poll_until
from tests.support.postgres import PostgresServer, wait_for
from tests.support.tcp_proxy import ProxyThread

CHANGES: Final = 60  # between two faults
RECEIVED: Final = "SELECT pg_last_wal_receive_lsn() - '0/0'::pg_lsn"
HAS_ALL: Final = "SELECT NOT EXISTS (SELECT FROM pg_stat_wal_receiver WHERE status = 'streaming')"


@check(rounds=10, few=0, needs=(nodes.POSTGRES,))
def cluster_primary_killed(trial: Trial) -> Counts:
    """kill -9 of the PostgreSQL primary, a standby is promoted by hand: nothing that was acknowledged is lost."""
    return _kill_primaries(trial, "on")


@check(rounds=3, few=0, needs=(nodes.POSTGRES,))
def cluster_asynchronous_role(trial: Trial) -> Counts:
    """The same if the default of the role is `synchronous_commit = off`."""
    return _kill_primaries(trial, "off")


def _kill_primaries(trial: Trial, default: str) -> Counts:
    """Kill one primary after the other. `default` is that of the role for `synchronous_commit`."""
    restarts = 0
    with nodes.nodes_under_load(trial) as cluster:
        cluster.servers[0].sql(f"ALTER ROLE {nodes.ROLE} SET synchronous_commit = {default}")
        with nodes.started(cluster):
            for number in range(trial.rounds):
                cluster.wait_for_changes(CHANGES + 17 * (number % 7))
                restarts += lose_primary(cluster)
                replace_lost(cluster.servers)
    return {"primaries killed": trial.rounds, "leaders that had exited with 75": restarts, **cluster.counts}


def lose_primary(cluster: nodes.NodesUnderLoad) -> int:
    """Kill the primary and promote a standby by hand. Return how many leaders had exited."""
    with cluster.outage("the loss of the primary"):
        cluster.servers[0].kill()
        _promote(cluster.servers)
        return revive_until_led(cluster)


def _promote(servers: list[PostgresServer]) -> None:
    """Promote the standby that is the most advanced. It comes first, and the lost server is last."""
    lost, *standbys = servers
    for each in standbys:
        wait_for(each, HAS_ALL)  # it still reads what it has received
    ahead, behind = sorted(standbys, key=lambda each: int(each.sql(RECEIVED)), reverse=True)
    servers[:] = [ahead, behind, lost]
    _set(ahead, "synchronous_standby_names", f"ANY 1 ({', '.join(_name(each) for each in (behind, lost))})")
    _set(behind, "primary_conninfo", _source(ahead, behind))
    ahead.promote()


def replace_lost(servers: list[PostgresServer]) -> None:
    """Make the lost server, the last one, a standby of the primary."""
    primary, _, lost = servers
    shutil.rmtree(lost.directory / "data")
    lost.copy_of(primary, _name(lost))
    lost.start()
    wait_for(primary, "SELECT count(*) = 2 FROM pg_stat_replication WHERE sync_state = 'quorum'")


def _name(server: PostgresServer) -> str:
    return f"s{server.port}"


def _source(primary: PostgresServer, standby: PostgresServer) -> str:
    return f"host={primary.directory} port={primary.port} user=postgres application_name={_name(standby)}"


def _set(server: PostgresServer, name: str, value: str) -> None:
    server.sql(f"ALTER SYSTEM SET {name} = '{value}'")
    server.sql("SELECT pg_reload_conf()")


def revive_until_led(cluster: nodes.NodesUnderLoad) -> int:
    """Start leaders that have exited, until one leads."""
    restarts = 0

    def is_led() -> bool:
        nonlocal restarts
        restarts += cluster.revive()
        return any(nodes.leads(node) for node in cluster.nodes)

    poll_until(is_led)
    return restarts


# -- partitions -------------------------------------------------------------------------------------------------------


@check(rounds=20, few=0, needs=(nodes.POSTGRES, NETWORKS))
def cluster_leader_cut_off(trial: Trial) -> Counts:
    """The leader is cut off from PostgreSQL: another node leads; or from clients, for 4.5 s: it leads until a
    step-down.
    """
    with networks(len(nodes.NODES)) as each, nodes.running(trial, networks=each) as cluster:
        for number in range(trial.rounds):
            cluster.wait_for_changes(CHANGES)
            cut_off_leader(cluster, "clients" if number % 2 else "database")
            cluster.wait_until_followed()
    return {"partitions": trial.rounds, **cluster.counts}


def cut_off_leader(cluster: nodes.NodesUnderLoad, link: Link) -> None:
    leader = cluster.leader()
    network = cluster.networks[cluster.nodes.index(leader)]
    if link == "database":
        with cluster.outage("a partition from PostgreSQL", cluster.others(leader)):
            network.cut(link)
    else:
        network.cut(link)
        time.sleep(nodes.LEASE_S * 1.5)
        assert not any(nodes.leads(node) for node in cluster.others(leader)), "the leader could renew its lease"
        with cluster.outage("a step-down without clients", cluster.others(leader)):
            assert leader.admin("POST", "cluster/step-down", {"reason": "test"}).status == 200
    network.heal(link)
    assert nodes.exit_code(leader) == nodes.STEPPED_DOWN, leader.log[-2000:]
    cluster.revive()


@check(rounds=10, few=0, needs=(nodes.POSTGRES, NETWORKS))
def cluster_standby_cut_off(trial: Trial) -> Counts:
    """A standby is cut off from PostgreSQL: the leader goes on, and the standby follows again afterwards."""
    with networks(len(nodes.NODES)) as each, nodes.running(trial, networks=each) as cluster:
        for number in range(trial.rounds):
            leader = cluster.leader()
            standby = cluster.others(leader)[number % 2]
            network = each[cluster.nodes.index(standby)]
            network.cut("database")
            time.sleep(nodes.LEASE_S * 1.5)
            cluster.wait_for_changes(CHANGES)
            assert leader.get("/readyz").status == 200, "the leader lost leadership by a partition of a standby"
            network.heal("database")
            cluster.wait_until_followed()
            assert cluster.leader() is leader
    return {"partitions": trial.rounds, **cluster.counts}


@check(rounds=100, few=0, needs=(nodes.POSTGRES,))
def cluster_append_answer_lost(trial: Trial) -> Counts:
    """An append or its response is lost with its connection: the leader finds out which, and no client notices."""
    with nodes.nodes_under_load(trial) as cluster, ProxyThread(cluster.servers[0].port) as proxy:
        with nodes.started(cluster, port=proxy.proxy.port):
            epoch = cluster.leader().cluster()["epoch"]
            for number in range(trial.rounds):
                cluster.wait_for_changes(CHANGES)
                proxy.lose(requests=number % 2 == 1, responses=number % 2 == 0)
                poll_until(proxy.proxy.lost.is_set)
                time.sleep(0.05)
                proxy.cut()
            cluster.wait_for_changes(CHANGES)
            epochs = cluster.leader().cluster()["epoch"] - epoch
        unknown = sum(len(re.findall(rb"event=append_unknown", node.log)) for node in cluster.nodes)
    assert epochs
    return {"cut connections": trial.rounds, "appends with an unknown outcome": unknown, **cluster.counts}


@check(rounds=5, needs=(nodes.POSTGRES, NETWORKS))
def cluster_faults_in_turn(trial: Trial) -> Counts:
    """The leader is killed, suspended, cut off, and the primary killed, one after the other: nothing is lost."""
    with networks(len(nodes.NODES)) as each, nodes.running(trial, networks=each) as cluster:
        for _ in range(trial.rounds):
            for fault in (kill_leader, suspend_leader, lambda _: cut_off_leader(cluster, "database"), lose_primary):
                cluster.wait_for_changes(CHANGES)
                fault(cluster)
            if trial.timed:
                replace_lost(cluster.servers)
    return {"faults": 4 * trial.rounds, **cluster.counts}
