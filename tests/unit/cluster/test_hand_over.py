"""A leader with a full disk hands over when a standby is ready."""

from __future__ import annotations

import asyncio

from jobd.cluster.hand_over import FULL_S, SETTLED_S, hand_over_if_full
from jobd.model.responses import READY_MS, UNSEEN_MS, ClusterView, NodeView
from tests.support.virtual_engine import in_virtual_time, seconds

READY = NodeView("b", "http://b", "standby", 0, 1, 0, 2, False)
BEHIND = NodeView("b", "http://b", "standby", 0, 1, 0, 2, False, lag_ms=READY_MS)


@in_virtual_time
async def test_the_disk_has_to_be_full_for_some_time_and_a_standby_ready() -> None:
    is_full, node, steps = True, BEHIND, []
    task = asyncio.create_task(
        hand_over_if_full(
            lambda: is_full, lambda: ClusterView(role="leader", nodes=[node]), lambda: steps.append("down")
        )
    )
    await seconds(60)
    assert steps == [], "no standby is ready"
    is_full, node = False, READY
    await seconds(60)
    assert steps == [], "the disk has space"
    is_full = True
    await seconds(FULL_S - 1)
    is_full = False
    await seconds(1)
    is_full = True
    await seconds(FULL_S - 1)
    assert steps == [], "it was full for a moment only"
    await seconds(2)
    assert steps == ["down"]
    await task


@in_virtual_time
async def test_a_new_leader_waits_until_the_entry_of_the_former_one_is_unseen() -> None:
    assert SETTLED_S * 1000 > UNSEEN_MS
    steps: list[str] = []
    view = ClusterView(role="leader", nodes=[READY])
    task = asyncio.create_task(hand_over_if_full(lambda: True, lambda: view, lambda: steps.append("down")))
    await seconds(SETTLED_S)
    assert steps == []
    await task
    assert steps == ["down"]
