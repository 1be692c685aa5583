"""Conditions of a cluster, as its leader evaluates them. Without a cluster none holds."""

from __future__ import annotations

import shlex
from typing import Final

from jobd.model.problems import Cure, Subject
from jobd.model.responses import NodeView
from jobd.model.times import duration
from jobd.monitoring.problems.condition import Finding, Scene

_SHOW: Final = Cure("See the nodes", "jobctl cluster", "/cluster")


def nodes(scene: Scene) -> list[NodeView]:
    return scene.cluster().nodes


def standby_behind(scene: Scene, node: NodeView) -> Finding | None:
    """A standby lacks a record that the leader has had for too long, or was last seen too long ago."""
    lag_ms = max(node.lag_ms, node.seen_ms * node.is_unseen)
    if node.role != "standby" or lag_ms <= scene.limits.standby_behind:
        return None
    title = f"It is {duration(lag_ms)} behind the leader ({node.lag_records} records)."
    cause, cure = "Check its disk, its load and its connection to PostgreSQL.", _SHOW
    if node.is_unseen:
        title, cause = f"It was last seen {duration(lag_ms)} ago.", "Start or restart jobd there."
        cure = Cure("Or remove its entry", f"jobd cluster forget {shlex.quote(node.name)}", changes=True)
    return Finding(Subject(type="node", node=node.name), title, wait_ms=lag_ms, cause=cause, cure=(cure,))


def no_standby(scene: Scene) -> Finding | None:
    view = scene.cluster()
    standbys = [node for node in view.nodes if node.role == "standby"]
    if view.role == "single" or not all(node.is_unseen for node in standbys):
        return None
    seen = [f"{node.name} was last seen {duration(node.seen_ms)} ago" for node in standbys]
    title = f"No standby is running, so no node takes over from this one{': ' if seen else ''}{', '.join(seen)}."
    return _of_cluster(f"{title} Start jobd {'there or ' if seen else ''}on another node.")


def not_synchronous(scene: Scene) -> Finding | None:
    if scene.cluster().synchronous is not False or not scene.cluster().require_sync:
        return None
    title = "PostgreSQL has no synchronous standby: if its disk is lost, acknowledged jobs are lost."
    return _of_cluster(title, "Start its standbys, and check synchronous_standby_names.")


def two_primaries(scene: Scene) -> Finding | None:
    used, *others = scene.cluster().writable or [""]
    if not others:
        return None
    former = " and ".join(others)
    title = f"PostgreSQL accepts writes at {used} and {former}."
    return _of_cluster(title, f"jobd uses {used}. Make {former}, the former primary, a standby.")


def database_horizon(scene: Scene) -> Finding | None:
    """A transaction in the database of the journal has been open for too long."""
    open_ms = scene.cluster().oldest_transaction_ms or 0
    if open_ms <= scene.limits.database_horizon:
        return None
    cause = (
        "Long transactions slow down every commit of jobd. Find it with: SELECT pid, usename, xact_start, state, "
        "query FROM pg_stat_activity ORDER BY xact_start. Use a database for jobd alone."
    )
    return _of_cluster(f"The oldest transaction in the database has been open for {duration(open_ms)}.", cause, open_ms)


def clocks_differ(scene: Scene, node: NodeView) -> Finding | None:
    ahead_ms = abs(node.clock_ahead_ms)
    if node.is_unseen or ahead_ms <= scene.limits.clocks_differ:
        return None
    side = "ahead of" if node.clock_ahead_ms > 0 else "behind"
    title = f"The wall clock of node {node.name} is {duration(ahead_ms)} {side} PostgreSQL's."
    cause = "Correct it, and check NTP on all machines. A takeover would continue with another time."
    return Finding(Subject(type="node", node=node.name), title, value=ahead_ms, cause=cause, cure=(_SHOW,))


def _of_cluster(title: str, cause: str = "", wait_ms: int = 0) -> Finding:
    return Finding(Subject(type="cluster"), title, wait_ms=wait_ms, cause=cause, cure=(_SHOW,))
