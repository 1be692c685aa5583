"""Give a job back whose payload does not fit its task: while a deployment is under way, another worker can run it."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from jobd.client.errors import JobdError
from jobd.client.worker.lock_keeper import LockKeeper
from jobd.model.events import EventView

DELAY_MS: Final = 30_000
TIMES: Final = 10  # in a row; then the attempt fails
_MARK: Final = "payload_mismatch: "
_EVENTS: Final = 6 * TIMES  # a round has three events: granted, progress, released
logger = logging.getLogger("jobd.client")


async def give_back(keeper: LockKeeper, give_up: asyncio.Event, text: str) -> bool:
    """Release the job for DELAY_MS, unless that was done TIMES times in a row. Return whether it was released.

    The timeline keeps the count and the text: before each release, the text is reported as the message of progress 0.
    """
    try:
        earlier = _count(await keeper.timeline(_EVENTS))
        if earlier >= TIMES:
            return False
        await keeper.report(0, f"{_MARK}{text}"[:4096])
    except JobdError as error:  # it is released all the same, and not counted
        logger.warning("job %s: %s", keeper.id, error)
        earlier = 0
    logger.warning(
        "job %s: %s. It is given back for %d s (%d of %d). Does this worker run the code of its creator?",
        keeper.id,
        text,
        DELAY_MS // 1000,
        earlier + 1,
        TIMES,
    )
    return await keeper.release(give_up, DELAY_MS)


def _count(events: list[EventView]) -> int:
    """Return how often the job was given back since a task last ran on it."""
    count = 0
    for event in reversed(events):
        if event.type == "progress" and str(event.details.get("message", "")).startswith(_MARK):
            count += 1
        elif event.type in ("progress", "retried", "retried_by_operator", "stalled"):
            break
    return count
