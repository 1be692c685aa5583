"""Conditions of a cluster, as its leader evaluates them. Without a cluster none holds."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Final

from jobd.model.problems import Cure, Subject
from jobd.model.responses import NodeView
from jobd.model.times import duration
from jobd.monitoring.problems.condition import Finding, Scene

_CLUSTER: Final = Subject(type="cluster")
_SHOW: Final = Cure("See the nodes", "jobctl cluster", "/cluster")


def standby_behind(scene: Scene) -> Iterator[Finding]:
    """A standby lacks a record that the leader has had for too long, or was last seen too long ago."""
    for node in _nodes(scene):
        behind_ms = max(node.behind_ms, node.seen_ms * node.is_unseen)
        if node.role != "standby" or behind_ms <= scene.limits.standby_behind_ms:
            continue
        title = f"It is {duration(behind_ms)} behind the leader ({node.lag_records} records)."
        cause, cure = "Check its disk, its load and its connection to PostgreSQL.", _SHOW
        if node.is_unseen:
            title, cause = f"It was last seen {duration(behind_ms)} ago.", "Start or restart jobd there."
            cure = Cure("Or remove its entry", f"jobd cluster forget {shlex.quote(node.name)}", changes=True)
        yield Finding(subject=_node(node), title=title, value=behind_ms, wait_ms=behind_ms, cause=cause, cure=(cure,))


def no_standby(scene: Scene) -> Iterator[Finding]:
    standbys = [node for node in _nodes(scene) if node.role == "standby"]
    if scene.cluster.role != "single" and all(node.is_unseen for node in standbys):
        seen = [f"{node.name} was last seen {duration(node.seen_ms)} ago" for node in standbys]
        title = f"No standby is running, so no node takes over from this one{': ' if seen else ''}{', '.join(seen)}."
        title += f" Start jobd {'there or ' if seen else ''}on another node."
        yield Finding(subject=_CLUSTER, title=title, cure=(_SHOW,))


def not_synchronous(scene: Scene) -> Iterator[Finding]:
    if scene.cluster.synchronous is False and scene.cluster.require_sync:
        title = "PostgreSQL has no synchronous standby: if its disk is lost, acknowledged jobs are lost."
        cause = "Start its standbys, and check synchronous_standby_names."
        yield Finding(subject=_CLUSTER, title=title, cause=cause, cure=(_SHOW,))


def two_primaries(scene: Scene) -> Iterator[Finding]:
    if len(scene.cluster.writable) > 1:
        used, *former = scene.cluster.writable
        title = f"PostgreSQL accepts writes at {used} and {' and '.join(former)}."
        cause = f"jobd uses {used}. Make {' and '.join(former)}, the former primary, a standby."
        yield Finding(subject=_CLUSTER, title=title, cause=cause, cure=(_SHOW,))


def database_horizon(scene: Scene) -> Iterator[Finding]:
    """A transaction in the database of the journal has been open for too long."""
    open_ms = scene.cluster.oldest_transaction_ms or 0
    if open_ms > scene.limits.database_horizon_ms:
        cause = (
            "Long transactions slow down every commit of jobd. Find it with: SELECT pid, usename, xact_start, state, "
            "query FROM pg_stat_activity ORDER BY xact_start. Use a database for jobd alone."
        )
        title = f"The oldest transaction in the database has been open for {duration(open_ms)}."
        yield Finding(subject=_CLUSTER, title=title, value=open_ms, wait_ms=open_ms, cause=cause, cure=(_SHOW,))


def clocks_differ(scene: Scene) -> Iterator[Finding]:
    for node in _nodes(scene):
        if node.is_unseen or abs(node.ahead_ms) <= scene.limits.clocks_differ_ms:
            continue
        side = "ahead of" if node.ahead_ms > 0 else "behind"
        yield Finding(
            subject=_node(node),
            title=f"The wall clock of node {node.name} is {duration(abs(node.ahead_ms))} {side} PostgreSQL's.",
            value=abs(node.ahead_ms),
            cause="Correct it, and check NTP on all machines. A takeover would continue with another time.",
            cure=(_SHOW,),
        )


def _nodes(scene: Scene) -> list[NodeView]:
    return [] if scene.cluster.role == "single" else scene.cluster.nodes


def _node(node: NodeView) -> Subject:
    return Subject(type="node", node=node.name)
