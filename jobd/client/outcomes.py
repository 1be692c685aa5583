"""The exceptions by which a handler or a task says how its run ends."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import Any

from msgspec import UNSET, Raw, UnsetType

from jobd.model.job import SECOND_MS, YEAR_MS


class Retry(Exception):
    """Raised by a handler to fail this attempt. `after` (a timedelta, or seconds) replaces the job's backoff.

    `changed` are the arguments of a task that differ in the next attempt. Raises ValueError unless `after` is from 0 to
    365 days.
    """

    # Of a subclass that does not call `__init__`.
    after_ms: int | None = None
    changed: Mapping[str, Any] = MappingProxyType({})
    checkpoint: Raw | UnsetType = UNSET  # what keeps them, set when the task has ended

    def __init__(
        self,
        message: str = "The handler asked for a retry.",
        /,
        *,
        after: timedelta | float | None = None,
        **changed: Any,
    ) -> None:
        super().__init__(message)
        self.after_ms = None if after is None else _wait_ms(after)
        self.changed = changed


class Discard(Exception):
    """Raised by a handler to fail the job without further attempts."""

    def __init__(self, message: str = "The handler discarded the job.") -> None:
        super().__init__(message)


class Snooze(Exception):
    """Raised by a handler to put its job back for `after` (a timedelta, or seconds), at least 1 s. It is no failure.

    The attempt does not count. Raises ValueError unless `after` is from 0 to 365 days.
    """

    after_ms: int | None = None  # of a subclass that does not call `__init__`

    def __init__(self, after: timedelta | float, message: str = "The handler snoozed the job.") -> None:
        super().__init__(message)
        self.after_ms = max(_wait_ms(after), SECOND_MS)  # otherwise, a job could be claimed again at once for ever


class Stopped(Exception):
    """Raised in a plain handler that has to return, because the worker stops or the timeout has passed."""


class PayloadMismatch(Exception):
    """The payload of a job does not fit its task in this worker. A worker of another version may have sent it."""


def _wait_ms(after: Any) -> int:
    if not isinstance(after, timedelta | int | float):
        raise TypeError(f"after must be a timedelta or a number of seconds, not {type(after).__name__}")
    after_s = after.total_seconds() if isinstance(after, timedelta) else after
    if not 0 <= after_s * 1000 <= YEAR_MS:
        raise ValueError(f"after must be from 0 to 365 days, not {after_s} s")
    return round(after_s * 1000)
