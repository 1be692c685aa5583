"""A loop that runs beside the requests, pauses between its rounds, and ends when it is told to."""

from __future__ import annotations

import asyncio


class StoppableLoop:
    """A part whose `run` loops until `_stopping`, and calls `_pause` after each round. Setting `_wake` ends a pause."""

    def __init__(self) -> None:
        self._wake = asyncio.Event()
        self._stopping = False

    def stop(self) -> None:
        """Let `run` end after its current round."""
        self._stopping = True
        self._wake.set()

    async def _pause(self, seconds: float | None) -> None:
        await wait_for_wake(self._wake, seconds)


async def wait_for_wake(wake: asyncio.Event, seconds: float | None) -> None:
    """Wait until `wake` is set, and for at most `seconds` if given. Clear it."""
    timer = None if seconds is None else asyncio.get_running_loop().call_later(max(seconds, 0), wake.set)
    await wake.wait()
    wake.clear()
    if timer is not None:
        timer.cancel()
