"""What happened in the last hour, in steps of ten seconds, for the chart. Lost at a restart, and nobody minds.

Counts committed changes and nothing else; no promise depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from jobd.events import Change
from jobd.job import MINUTE_MS, SECOND_MS

STEP_MS: Final = 10 * SECOND_MS
STEPS: Final = 360  # an hour
# Which of the three lines an event counts for. An attempt that failed is a failure, whether or not it is tried again.
LINES: Final = {
    "created": 0,
    "imported": 0,
    "completed": 1,
    "failed": 2,
    "retried": 2,
    "stalled": 2,
    "expired": 2,
    "force_failed": 2,
}


class Lines(Struct, frozen=True):
    """`at` are the beginnings of the steps in Unix seconds, the others how often it happened in each."""

    at: list[int]
    created: list[int]
    completed: list[int]
    failed: list[int]


class Rates(Struct, frozen=True):
    """How often it happened in the last minute, and in the last hour (or since the start)."""

    created: tuple[int, int]
    completed: tuple[int, int]
    failed: tuple[int, int]


class Recorder:
    def __init__(self) -> None:
        self._steps: dict[int, list[int]] = {}  # number of the step since 1970 -> how often, by line

    def note(self, changes: Sequence[Change]) -> None:
        """Count what was committed."""
        for change in changes:
            line = LINES.get(change.event.type)
            if line is not None:
                self._counts(change.event.at // STEP_MS)[line] += 1

    def _counts(self, step: int) -> list[int]:
        counts = self._steps.get(step)
        if counts is None:
            counts = self._steps[step] = [0, 0, 0]
            while len(self._steps) > STEPS + 1:
                del self._steps[min(self._steps)]
        return counts

    def lines(self, now: int) -> Lines:
        """The last hour, the running step left out."""
        first = now // STEP_MS - STEPS
        steps = range(first, first + STEPS)
        counts = [self._steps.get(step, (0, 0, 0)) for step in steps]
        columns = ([count[line] for count in counts] for line in range(3))
        return Lines([step * STEP_MS // SECOND_MS for step in steps], *columns)

    def rates(self, now: int) -> Rates:
        """Sums up to now."""
        minute, hour = (now // STEP_MS - minutes * MINUTE_MS // STEP_MS for minutes in (1, 60))
        sums = [
            (
                sum(count[line] for step, count in self._steps.items() if minute < step <= now // STEP_MS),
                sum(count[line] for step, count in self._steps.items() if hour < step <= now // STEP_MS),
            )
            for line in range(3)
        ]
        return Rates(*sums)
