"""The options of tasks and jobs, and the fields of requests that they become."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Final, Self, TypedDict

_HOUR: Final = timedelta(hours=1)


class Backoff:
    """How long a failed job waits: `first`, then twice as long each time, up to `longest`.

    With `jitter`, each wait is shortened at random, at most by half.
    """

    def __init__(self, first: timedelta, *, longest: timedelta | None = None, jitter: bool = True) -> None:
        self.fields: dict[str, Any] = {  # as the API has them
            "kind": "exponential",
            "base_ms": milliseconds("first", first),
            "max_ms": milliseconds("longest", longest or max(first, _HOUR)),
            "jitter": jitter,
        }

    @classmethod
    def fixed(cls, wait: timedelta) -> Self:
        """Return the same wait before each attempt."""
        backoff = cls(wait, longest=wait, jitter=False)
        backoff.fields["kind"] = "fixed"
        return backoff


class TaskOptions(TypedDict, total=False):
    """The options of `App.task`."""

    name: str | None
    queue: str
    priority: int
    max_attempts: int
    backoff: timedelta | Backoff
    timeout: timedelta | None
    retry_on: tuple[type[Exception], ...]
    discard_on: tuple[type[Exception], ...]
    expires: timedelta | None
    keep: timedelta | None


class JobOptions(TypedDict, total=False):
    """The options of `using`. None is the option of the task."""

    id: str | None
    queue: str | None
    priority: int | None
    delay: timedelta | None
    run_at: datetime | None
    expires: timedelta | datetime | None
    max_attempts: int | None
    headers: Mapping[str, str] | None


def check_options(given: Mapping[str, Any], known: type, where: str) -> None:
    """Raise TypeError if `given` has an option that is not in the TypedDict `known`."""
    names = list(known.__annotations__)
    for name in given:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"its options are {', '.join(names)}"
            raise TypeError(f"{where} has no option {name!r}; {hint}")


def milliseconds(name: str, value: Any) -> int:
    """Return a duration in ms. Raises TypeError if it is no timedelta."""
    if not isinstance(value, timedelta):
        raise TypeError(f"{name} must be a timedelta such as timedelta(seconds=5), not {value!r}")
    return round(value.total_seconds() * 1000)


def request_fields(task: TaskOptions, job: JobOptions) -> dict[str, Any]:
    """Return the fields of the request that creates a job. Options that neither of both has are the daemon's."""
    both: dict[str, Any] = {**task, **{name: value for name, value in job.items() if value is not None}}
    given = {name: value for name, value in both.items() if value is not None}
    fields: dict[str, Any] = {name: given[name] for name in ("queue", "priority", "max_attempts") if name in given}
    if (backoff := given.get("backoff")) is not None:
        fields["backoff"] = (backoff if isinstance(backoff, Backoff) else Backoff(backoff)).fields
    if (delay := given.get("delay")) is not None:
        fields["delay_ms"] = milliseconds("delay", delay)
    if (run_at := given.get("run_at")) is not None:
        fields["run_at"] = unix_ms("run_at", run_at)
    if isinstance(expires := given.get("expires"), datetime):
        fields["expires_at"] = unix_ms("expires", expires)
    elif expires is not None:
        fields["expires_in_ms"] = milliseconds("expires", expires)
    return fields


def unix_ms(name: str, value: Any) -> int:
    """Return a time in Unix ms. Raises TypeError if it is no aware datetime."""
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise TypeError(f"{name} must be an aware datetime such as datetime.now(timezone.utc), not {value!r}")
    return round(value.timestamp() * 1000)
