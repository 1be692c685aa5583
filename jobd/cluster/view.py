"""Describe a cluster for operators."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from jobd.cluster.node_registry import NodeRegistry
from jobd.model.journal import NodeEntry
from jobd.model.responses import UNSEEN_MS, ClusterView, NodeView
from jobd.model.times import duration

UNHEARD_MS: Final = 1_000  # since the last response of PostgreSQL
AHEAD_MS: Final = 1_000  # at most, by which the wall clock of a node may differ from that of the server


class Position(Struct, frozen=True, kw_only=True):
    """What a node knows about the journal: the leader, the last record, and its own lag."""

    is_leader: bool
    holder: str | None
    leader: str | None  # URL
    epoch: int | None
    record: int | None  # the last one of the journal
    lag_events: int
    problem: str | None
    unheard_ms: int = 0  # since the last response of the journal


def cluster_view(
    registry: NodeRegistry, at: Position, *, node: str, journal: str, lease_ms: int, require_sync: bool
) -> ClusterView:
    """Return the state of the cluster as the node named `node` sees it."""
    nodes = [replace(each, seen_ms=each.seen_ms + registry.age_ms) for each in registry.nodes]
    health = registry.health
    holder = None if at.leader is None else at.holder  # the lease of the latest holder may be over
    leading = next((each for each in nodes if each.process == holder), None)
    if leading is None and at.leader is not None:  # a process that has just started, whose entry is not written yet
        leading = next((each for each in nodes if each.url == at.leader), None)
    warnings = [text for text in (at.problem, registry.problem) if text is not None]
    warnings += _warnings(nodes, leading)
    if registry.failure is not None and at.problem is None:
        warnings.append(registry.failure)
    if health is not None and require_sync and not health.is_synchronous:
        warnings.append("PostgreSQL has no synchronous standby: a lost disk loses acknowledged jobs.")
    if health is not None and len(health.writable) > 1:
        used, *former = health.writable
        names = " and ".join(former)
        warnings.append(f"PostgreSQL accepts writes at {used} and {names}: stop the former primary, {names}.")
    if health is not None and health.is_waiting:
        warnings.append("A write waits for a synchronous standby of PostgreSQL.")
    if at.unheard_ms >= UNHEARD_MS:
        effect = ", so it does not know which node leads" if at.leader is None else ""
        warnings.append(f"This node has not heard from PostgreSQL for {duration(at.unheard_ms)}{effect}.")
    if at.leader is None and not warnings:
        warnings.append("No node leads: PostgreSQL has not confirmed a leader yet.")
    return ClusterView(
        role="leader" if at.is_leader else "standby",
        node=node,
        journal=journal,
        leader=at.leader or None,
        epoch=at.epoch,
        record=at.record,
        lag_events=at.lag_events,
        lease_ms=lease_ms,
        synchronous=None if health is None else health.is_synchronous,
        require_sync=require_sync,
        waits_for_sync=health is not None and health.is_waiting,
        oldest_transaction_ms=None if health is None else health.oldest_transaction_ms,
        writable=[] if health is None else list(health.writable),
        warnings=warnings,
        nodes=[_node(each, leading, at.record or 0, registry.lag_ms(each)) for each in nodes],
    )


def _node(node: NodeEntry, leading: NodeEntry | None, record: int, lag_ms: int) -> NodeView:
    return NodeView(
        name=node.name,
        url=node.url,
        role="leader" if node is leading else "standby",
        seen_ms=node.seen_ms,
        record=node.projected_to,
        lag_records=0 if node is leading else max(record - node.projected_to, 0),
        format=node.format,
        config_differs=leading is not None and node.config_hash != leading.config_hash,
        clock_ahead_ms=node.ahead_ms,
        lag_ms=0 if node is leading else lag_ms,
        schema_version=node.schema_version,
    )


def _warnings(nodes: Sequence[NodeEntry], leading: NodeEntry | None) -> Iterable[str]:
    if leading is not None:
        others = [node.name for node in nodes if node.config_hash != leading.config_hash]
        if others:
            yield f"The configuration differs from the leader's: {', '.join(others)}."
    highest = max((node.format for node in nodes), default=0)
    if older := [f"{node.name} (up to {node.format})" for node in nodes if node.format < highest]:
        yield (
            f"Nodes of an older version do not read records of format {highest}: {', '.join(older)}. Webhooks, "
            "statistics and the deletion of old data wait until these nodes are upgraded or their entries are removed: "
            "jobd cluster forget NAME"
        )
    for node in nodes:
        if abs(node.ahead_ms) > AHEAD_MS and node.seen_ms < UNSEEN_MS:
            side = "ahead of" if node.ahead_ms > 0 else "behind"
            yield f"The wall clock of node {node.name} is {duration(abs(node.ahead_ms))} {side} PostgreSQL's."
