"""The alerts of a cluster: what counts, what does not, and what their hints say."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from jobd.model.responses import UNSEEN_MS, ClusterView, NodeView
from jobd.monitoring.alerts import CLUSTER_NAMES, Alerts
from jobd.monitoring.cluster_conditions import cluster_conditions
from jobd.monitoring.condition import Condition
from jobd.monitoring.health import Health
from tests.support.virtual_engine import VirtualEngine, in_engine, seconds

A = NodeView("a", "", "leader", 100, 1_000, 0, 1, False)
B = NodeView("b", "", "standby", 100, 1_000, 0, 1, False)
VIEW = ClusterView(
    role="leader", record=1_000, synchronous=True, require_sync=True, oldest_transaction_ms=10, nodes=[A, B]
)


def conditions(view: ClusterView) -> dict[str, Condition]:
    listed = list(cluster_conditions(view, behind_ms=30_000, horizon_ms=60_000, clocks_ms=1_000))
    return {each.name: each for each in listed}


def test_a_daemon_without_a_cluster_has_none() -> None:
    assert conditions(ClusterView(role="single")) == {}


def test_a_cluster_in_order_is_quiet() -> None:
    found = conditions(VIEW)
    assert tuple(found) == CLUSTER_NAMES
    assert all(each.value <= each.threshold for each in found.values())
    assert found["no_standby"].quiet == "Standbys that can take over: b."
    assert all(each.quiet for each in found.values())


def test_a_standby_is_behind_since_the_leader_had_a_record_that_it_lacks() -> None:
    view = replace(VIEW, nodes=[A, replace(B, record=605, lag_records=395, behind_ms=39_900)])
    behind = conditions(view)["standby_behind"]
    assert (behind.value, behind.threshold) == (39, 30)
    assert behind.hint.startswith("Node b is 39 s behind the leader (395 records). Check its disk")


def test_an_unseen_node_counts_as_behind_and_not_as_a_standby() -> None:
    unseen = replace(B, seen_ms=45_000)
    found = conditions(replace(VIEW, nodes=[A, unseen]))
    assert (found["standby_behind"].value, found["no_standby"].value) == (45, 1)
    assert found["standby_behind"].hint.startswith("Node b was last seen 45 s ago. Start or restart jobd there")
    just_heard = replace(B, seen_ms=UNSEEN_MS - 1)
    found = conditions(replace(VIEW, nodes=[A, just_heard]))
    assert (found["standby_behind"].value, found["no_standby"].value) == (0, 0)


@pytest.mark.parametrize(
    ("changes", "name", "value", "said"),
    [
        ({"nodes": [A]}, "no_standby", 1, "No standby is running"),
        ({"synchronous": False}, "journal_not_synchronous", 1, "acknowledged jobs are lost"),
        ({"synchronous": False, "require_sync": False}, "journal_not_synchronous", 0, "require_sync allows that"),
        ({"synchronous": None}, "journal_not_synchronous", 0, "does not respond"),
        ({"writable": ["a:5432", "b:5432"]}, "two_primaries", 1, "at a:5432 and b:5432. jobd uses"),
        ({"writable": ["a:5432"]}, "two_primaries", 0, "writes at a:5432."),
        ({}, "two_primaries", 0, "no host, as far as known"),
        ({"oldest_transaction_ms": 61_000}, "database_horizon", 61, "open for 1 min 1 s. Long transactions"),
        ({"oldest_transaction_ms": None}, "database_horizon", 0, "does not respond"),
        ({"nodes": [A, replace(B, ahead_ms=-1_500)]}, "clocks_differ", 1.5, "node b is 1.5 s behind that"),
        ({"nodes": [replace(A, ahead_ms=2_000), B]}, "clocks_differ", 2, "node a is 2 s ahead of that"),
        ({"nodes": [A, replace(B, ahead_ms=99)]}, "clocks_differ", 0, "agree"),
        ({"nodes": [A, replace(B, ahead_ms=9_000, seen_ms=19_000)]}, "clocks_differ", 0, "agree"),
    ],
)
def test_each_condition_says_what_holds(changes: dict[str, Any], name: str, value: float, said: str) -> None:
    found = conditions(replace(VIEW, **changes))[name]
    assert found.value == value
    assert said in (found.hint if value > found.threshold else found.quiet or "")


@in_engine()
async def test_the_alerts_of_a_cluster_fire_and_resolve(engine: VirtualEngine) -> None:
    alerts = Alerts(
        engine.state, engine.clock, Health(engine.actor, engine.clock, engine.maintainer), engine.maintainer
    )
    view = replace(VIEW, nodes=[A])
    alerts.cluster = lambda: view
    with capture_logs() as logs:
        alerts.evaluate()
        await seconds(31)
        assert [alert.name for alert in alerts.evaluate() if alert.firing] == ["no_standby"]
        view = VIEW
        alerts.evaluate()
        await seconds(61)
        assert not any(alert.firing for alert in alerts.evaluate())
    assert [(each["event"], each["alert"]) for each in logs] == [
        ("alert_firing", "no_standby"),
        ("alert_resolved", "no_standby"),
    ]
