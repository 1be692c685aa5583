"""Hand over leadership when the disk of the leader is full and a standby is ready."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from jobd.model.responses import UNSEEN_MS, ClusterView

FULL_S: Final = 2.0
# The wait after a takeover. By then the entry of the former leader is unseen, or shows how far its tables are behind.
# Otherwise two nodes with full disks would hand leadership back and forth.
SETTLED_S: Final = 1.5 * UNSEEN_MS / 1000
CHECK_S: Final = 0.5

log = structlog.get_logger("jobd.cluster")


async def hand_over_if_full(
    is_full: Callable[[], bool], view: Callable[[], ClusterView], step_down: Callable[[], None]
) -> None:
    """Call `step_down` when `is_full` was true for FULL_S and a standby is ready. Without one, the leader goes on.

    Call this when leadership begins.
    """
    await asyncio.sleep(SETTLED_S)
    full_s = 0.0
    while True:
        await asyncio.sleep(CHECK_S)
        full_s = full_s + CHECK_S if is_full() else 0.0
        if full_s < FULL_S:
            continue
        if ready := [node.name for node in view().nodes if node.is_ready]:
            log.warning("hands_over", reason="the disk of the store is full", ready=ready)
            step_down()
            return
