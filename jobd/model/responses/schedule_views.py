"""Schedules."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Struct

from jobd.model.commands import CatchUp, Overlap
from jobd.model.events import QueuePause
from jobd.model.fields import doc
from jobd.model.responses import shared


class ScheduleView(Struct, frozen=True, kw_only=True):
    """A schedule: its timing, what its jobs get, and what it did."""

    id: Annotated[str, doc("Id of the schedule.")]
    cron: Annotated[str | None, doc("The cron expression, or null.")]
    every_ms: Annotated[int | None, doc("The interval, in ms, or null.")]
    offset_ms: Annotated[int, doc("Time added to the multiples of `every_ms`, in ms.")]
    timezone: Annotated[str, doc("Time zone of `cron`.")]
    explanation: Annotated[str, doc("The timing in words.")] = ""
    job: Annotated[dict[str, Any], doc("The fields of each job, as given.")]
    overlap: Annotated[Overlap, doc("What happens at a time while the last job of the schedule is unfinished.")]
    catch_up: Annotated[CatchUp, doc("Which of the missed times fire.")]
    jitter_ms: Annotated[int, doc("Up to this time is added to `run_at`.")]
    source: Annotated[str | None, doc("The program or file that maintains the schedule. Null: an operator.")]
    paused: Annotated[bool, doc("Whether the schedule is paused.")]
    paused_at: Annotated[int | None, doc("When it was paused, in Unix ms, or null.")] = None
    paused_by: Annotated[str | None, doc("Its author, as in `by` of events, or null.")] = None
    pause_reason: Annotated[str | None, doc("Why it is paused, or null.")] = None
    paused_until: Annotated[int | None, doc("When the daemon resumes it, in Unix ms, or null.")] = None
    created_at: Annotated[int, doc("When it was created, in Unix ms.")]
    updated_at: Annotated[int, doc("When it was last changed by a request, in Unix ms.")]
    next_at: Annotated[int | None, doc("When it fires next, in Unix ms. Null while it is paused.")] = None
    next_times: Annotated[list[int], doc("The next five times, in Unix ms. Empty while it is paused.")] = []
    last_fired_at: Annotated[int | None, doc("The latest time that fired, in Unix ms, or null.")]
    last_job_id: Annotated[str | None, doc("The latest job, or null.")]
    last_status: Annotated[str | None, doc("Status of the latest job. Null if it was deleted.")]
    skipped: Annotated[int, doc("Number of times that were skipped.")]
    missed: Annotated[int, doc("Number of times that nothing could fire, and that were not made up.")]
    last_skip: Annotated[SkipView | None, doc("The latest time that was skipped, and why, or null.")]

    @property
    def pause(self) -> QueuePause:
        return QueuePause(self.paused_at, self.paused_by, self.pause_reason, self.paused_until)


class SkipView(Struct, frozen=True):
    """A time at which a schedule created no job."""

    scheduled_at: Annotated[int, doc("The time, in Unix ms.")]
    reason: Annotated[str, doc("Why.")]


class ScheduleList(Struct):
    """A page of schedules."""

    schedules: Annotated[list[ScheduleView], doc("The schedules, by id.")]
    next_cursor: shared.NextCursor = None
