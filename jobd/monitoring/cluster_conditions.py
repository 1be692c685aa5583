"""The conditions of the alerts of a cluster, as its leader evaluates them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Final

from jobd.model.job import SECOND_MS
from jobd.model.responses import ClusterView, NodeView
from jobd.model.times import duration
from jobd.monitoring.condition import Condition

NOTICEABLE_MS: Final = 100  # a smaller difference of clocks counts as none
_SHOW: Final = "See: jobctl cluster"


def cluster_conditions(view: ClusterView, *, behind_ms: int, horizon_ms: int, clocks_ms: int) -> Iterator[Condition]:
    """Yield the conditions, or none without a cluster. The other arguments are thresholds."""
    if view.role == "single":
        return
    standbys = [node for node in view.nodes if node.role == "standby"]
    yield _behind(standbys, behind_ms / SECOND_MS)
    yield _no_standby(standbys)
    yield _not_synchronous(view)
    yield _two_primaries(view)
    yield _horizon(view, horizon_ms / SECOND_MS)
    yield _clocks(view, clocks_ms / SECOND_MS)


def _behind(standbys: list[NodeView], threshold: float) -> Condition:
    """Report the seconds since the leader had a record that the last standby lacks."""
    value, quiet, hint = 0, "Every standby has followed the leader.", ""
    found = [(max(node.behind_ms, node.seen_ms * node.is_unseen), node) for node in standbys]
    behind_ms, last = max(found, key=lambda each: each[0], default=(0, None))
    if last is not None and behind_ms >= SECOND_MS:
        value = behind_ms // SECOND_MS
        quiet = f"Node {last.name} is {duration(behind_ms)} behind the leader ({last.lag_records} records)."
        advice = "Check its disk, its load and its connection to PostgreSQL"
        if last.is_unseen:
            quiet = f"Node {last.name} was last seen {duration(behind_ms)} ago."
            advice = f"Start or restart jobd there, or remove its entry: jobd cluster forget {shlex.quote(last.name)}"
        hint = f"{quiet} {advice}. {_SHOW}"
    return Condition("standby_behind", value, threshold, hint, quiet)


def _no_standby(standbys: list[NodeView]) -> Condition:
    running = [node.name for node in standbys if not node.is_unseen]
    hint = f"No standby is running, so no node takes over from this one. Start jobd on another node. {_SHOW}"
    quiet = f"Standbys that can take over: {', '.join(running)}."
    return Condition("no_standby", int(not running), 0, hint, quiet)


def _not_synchronous(view: ClusterView) -> Condition:
    hint = (
        "PostgreSQL has no synchronous standby: if its disk is lost, acknowledged jobs are lost. Start its standbys, "
        "and check synchronous_standby_names"
    )
    quiet = "A change is on two PostgreSQL servers before it is acknowledged."
    if view.synchronous is None:
        quiet = "PostgreSQL does not respond, so its settings are not known."
    elif not view.synchronous:
        quiet = "A change is on one PostgreSQL server when it is acknowledged. [journal] require_sync allows that."
    value = int(view.synchronous is False and view.require_sync)
    return Condition("journal_not_synchronous", value, 0, hint, quiet)


def _two_primaries(view: ClusterView) -> Condition:
    hosts = " and ".join(view.writable)
    hint = (
        f"PostgreSQL accepts writes at {hosts}. jobd uses the one with the highest timeline. Stop the other one, the "
        "former primary, and make it a standby"
    )
    quiet = f"PostgreSQL accepts writes at {hosts or 'no host, as far as known'}."
    return Condition("two_primaries", int(len(view.writable) > 1), 0, hint, quiet)


def _horizon(view: ClusterView, threshold: float) -> Condition:
    value = (view.oldest_transaction_ms or 0) // SECOND_MS
    quiet = f"The oldest transaction in the database has been open for {duration(view.oldest_transaction_ms or 0)}."
    hint = (
        f"{quiet} Long transactions slow down every commit of jobd. Find it with: SELECT pid, usename, xact_start, "
        "state, query FROM pg_stat_activity ORDER BY xact_start. Use a database for jobd alone"
    )
    if view.oldest_transaction_ms is None:
        quiet = "PostgreSQL does not respond, so its transactions are not known."
    return Condition("database_horizon", value, threshold, hint, quiet)


def _clocks(view: ClusterView, threshold: float) -> Condition:
    """Report the wall clock that differs most from that of PostgreSQL, in seconds."""
    value, quiet, hint = 0.0, "The wall clocks of the nodes agree with that of PostgreSQL.", ""
    running = [node for node in view.nodes if not node.is_unseen]
    worst = max(running, key=lambda node: abs(node.ahead_ms), default=None)
    if worst is not None and abs(worst.ahead_ms) >= NOTICEABLE_MS:
        value = abs(worst.ahead_ms) / SECOND_MS
        side = "ahead of" if worst.ahead_ms > 0 else "behind"
        quiet = f"The wall clock of node {worst.name} is {duration(abs(worst.ahead_ms))} {side} that of PostgreSQL."
        hint = f"{quiet} Correct it, and check NTP on all machines. A takeover would continue with another time"
    return Condition("clocks_differ", value, threshold, hint, quiet)
