"""Schedules: what creates jobs by the clock, and how events change them.

A schedule does not store the time at which it fires next: this follows from `timed_from`, `last_at` and its timing.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from jobd.model.commands import CatchUp, Overlap
from jobd.model.events import Event, QueuePause
from jobd.model.job import DAY_MS


class Timing(Struct, frozen=True, omit_defaults=True, gc=False):
    """When a schedule fires: by `cron` in `timezone`, or at the multiples of `every_ms` plus `offset_ms`."""

    cron: str | None = None
    every_ms: int | None = None
    offset_ms: int = 0
    timezone: str = "UTC"


class Skip(Struct, frozen=True, gc=False):
    """A time at which a schedule created no job, and why."""

    scheduled_at: int
    reason: str


class Schedule(Struct, frozen=True, omit_defaults=True, kw_only=True):
    """The row of a schedule. Times are wall time, Unix ms.

    It fires at times later than `timed_from` (when its timing was set, or it was resumed) and `last_at` (the latest
    time that fired, was skipped or was missed). `version` is the number of the event that set `timed_from`: a firing
    that was computed for an earlier one is void.
    """

    id: str
    timing: Timing
    job: dict[str, Any]  # the given fields of the requests that create its jobs
    overlap: Overlap = "skip"
    catch_up: CatchUp = "latest"
    jitter_ms: int = 0
    source: str | None = None
    pause: QueuePause | None = None
    created_at: int
    updated_at: int
    timed_from: int
    version: int
    last_at: int | None = None
    last_fired_at: int | None = None
    last_job_id: str | None = None
    skipped: int = 0
    missed: int = 0
    last_missed_at: int | None = None  # when the latest missed times were noticed
    skips_in_a_row: int = 0
    last_skip: Skip | None = None

    @property
    def queue(self) -> str:
        """The queue of its jobs."""
        return str(self.job.get("queue", "default"))

    def fires_after(self, now: int) -> int:
        """Return the time after which it fires next: `now` if a clock wrote one of its times more than a day ahead."""
        return max(at if at <= now + DAY_MS else now for at in (self.timed_from, self.last_at or self.timed_from))

    def is_over(self, at: int, now: int) -> bool:
        """Return whether a time cannot fire any more. Times that a clock wrote more than a day ahead do not count."""
        return any(at <= known <= now + DAY_MS for known in (self.timed_from, self.last_at or self.timed_from))


def schedule_id(event: Event) -> str | None:
    """Return the schedule that an event of it, or of a job that it created, names in its details."""
    return None if event.details is None else event.details.get("schedule")


def fold_schedule(known: Schedule | None, event: Event) -> Schedule | None:
    """Return the schedule after an event that names it, given the one before; None if it does not exist then."""
    details: Any = event.details
    if event.type == "schedule_put":
        return msgspec.convert(details["row"], Schedule)
    if known is None or event.type == "schedule_deleted":
        return None
    if details.get("missed"):
        known = replace(known, missed=known.missed + details["missed"], last_missed_at=event.at)
    if event.type == "created":
        known = replace(known, last_job_id=event.job_id)
        if "missed" not in details:
            return known  # an operator ran it
        fired_at = details["scheduled_at"]
        return replace(_passed(known, fired_at), last_fired_at=fired_at, skips_in_a_row=0)
    if event.type == "schedule_skipped":
        skip = Skip(details["scheduled_at"], event.reason or "")
        return replace(
            _passed(known, skip.scheduled_at),
            skipped=known.skipped + 1,
            skips_in_a_row=known.skips_in_a_row + 1,
            last_skip=skip,
        )
    if event.type == "schedule_missed":
        return _passed(known, details["scheduled_at"])
    if event.type == "schedule_paused":
        return replace(known, pause=QueuePause(event.at, event.by, event.reason, details["until"]))
    assert event.type == "schedule_resumed"
    return replace(known, pause=None, timed_from=event.at, version=event.seq)


def _passed(known: Schedule, at: int) -> Schedule:
    """Return the schedule after a time of it. A clock that was set back may have written a later `timed_from`."""
    return replace(known, last_at=at, timed_from=min(known.timed_from, at))
