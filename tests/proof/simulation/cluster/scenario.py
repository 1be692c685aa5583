"""What a seed draws for several nodes, beside the clients and limits of one."""

from __future__ import annotations

from random import Random
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from tests.proof.simulation.scenario import MISHAPS, Scenario, draw

LOST: Final = ("request", "late request", "response", "quorum")
CLUSTER_FAULTS: Final = (
    "kill",
    "power cut",
    "machine lost",
    "stop",
    "process stopped",
    "empty store",
    "partition from the journal",
    "partition from clients",
    "journal unreachable",
    "journal slow",
    "journal full",
    "failover",
    *(f"lost {what}" for what in LOST),
    "full disk",
    "slow disk",
    "wall step",
)
LEADER_FAULTS: Final = frozenset({"kill", "process stopped", "stop"})  # often of the leader


class ClusterOptions(Struct, frozen=True):
    """`drift` is by how much the clocks of a node may be too fast or slow, `offset_ms` the error of its wall clock."""

    nodes: int
    lease_s: float
    poll_s: float
    drift: float
    offset_ms: float
    is_direct: bool
    snapshot_every_ms: int


def draw_cluster(seed: int, without: frozenset[str] = frozenset()) -> tuple[Scenario, ClusterOptions]:
    """Draw the scenario of `seed` for several nodes."""
    dice = Random(f"{seed}: cluster")
    faults = [name for name in CLUSTER_FAULTS if dice.random() < 0.4]
    drawn = draw(seed, without | (frozenset(MISHAPS) & without))
    plan = replace(
        drawn,
        faults=tuple(name for name in faults if name not in without),
        think_s=dice.choice((0.05, 0.3, 1.0)),
        pace_s=dice.choice((0.5, 1.0, 4.0)),
        policy=replace(drawn.policy, artifacts=False),
        commit="thread",
    )
    lease_s = dice.choice((1.0, 3.0, 3.0))
    options = ClusterOptions(
        nodes=dice.choice((2, 2, 3)),
        lease_s=lease_s,
        poll_s=dice.choice((0.05, 0.2)),
        drift=dice.choice((0.0, 0.02)),
        offset_ms=dice.choice((0, 5_000, 400_000)),
        is_direct=dice.random() < 0.8,
        snapshot_every_ms=dice.choice((1_000, 10_000)),
    )
    return plan, options
