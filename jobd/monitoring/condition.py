"""The condition of an alert."""

from __future__ import annotations

from msgspec import Struct


class Condition(Struct, frozen=True):
    """The current state of one condition.

    `value` and `threshold` are jobs, issues, seconds, a ratio, or 1 for unhealthy. `hint` says what to do while the
    condition holds. `quiet` describes the state while it does not (None: as `hint`). If `resolve_at` is set, a firing
    alert resolves only when `value` is at or below it. An `inclusive` condition also holds at its threshold.
    """

    name: str
    value: float
    threshold: float
    hint: str
    quiet: str | None = None
    resolve_at: float | None = None
    inclusive: bool = False
