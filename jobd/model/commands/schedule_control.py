"""Schedules: change them, list them, and create their jobs."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Literal

from msgspec import UNSET, UnsetType, defstruct, structs

from jobd.model import fields
from jobd.model.commands.command import Command, Read
from jobd.model.commands.job_creation import Create
from jobd.model.fields import doc
from jobd.model.job import HOUR_MS, SECOND_MS, YEAR_MS

Overlap = Literal["skip", "allow"]
CatchUp = Literal["latest", "none"]

# The fields that a schedule gives its jobs. A field without a value is left out.
ScheduledJob: Any = defstruct(
    "ScheduledJob",
    [
        (each.name, each.type | UnsetType, UNSET)
        for each in structs.fields(Create)
        if each.name not in {"id", "run_at", "delay_ms", "expires_at"}
    ],
    frozen=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
    namespace={"__doc__": "The fields of the jobs of a schedule."},
)


def scheduled_job_id(schedule: str, at: int) -> str:
    """Return the id of the job of a schedule for the time `at`, Unix ms."""
    return f"{schedule}:{datetime.fromtimestamp(at // SECOND_MS, UTC):%Y-%m-%dT%H:%M:%SZ}"


class ScheduleCommand(Command, frozen=True, kw_only=True):
    """A change of one schedule. Over HTTP the path gives its id."""

    errors: ClassVar[tuple[str, ...]] = ("schedule_not_found", "upgrade_incomplete")

    id: fields.ScheduleId


class PutSchedule(ScheduleCommand, frozen=True, kw_only=True):
    """Create a schedule, or replace it. The same request again changes nothing, and resumes nothing.

    Give either `cron` or `every_ms`. A changed timing counts from now; anything else leaves the next time as it is.
    """

    admission = "create"
    audit_name = "put-schedule"
    errors = ("schedule_owned", "too_many_schedules", "upgrade_incomplete")

    cron: (
        Annotated[
            str,
            doc(
                "Five fields (minute, hour, day of month, month, day of week), or @hourly, @daily, @weekly, @monthly. "
                "If both days are restricted, a day that matches either fires.",
                min_length=1,
                max_length=200,
            ),
        ]
        | None
    ) = None
    every_ms: (
        Annotated[int, doc("Fire at the multiples of this time since 1970, in ms.", ge=SECOND_MS, le=YEAR_MS)] | None
    ) = None
    offset_ms: Annotated[int, doc("Time added to the multiples of `every_ms`, in ms.", ge=0, le=YEAR_MS)] = 0
    timezone: Annotated[str, doc("IANA name of the time zone of `cron`.", min_length=1, max_length=100)] = "UTC"
    job: Annotated[ScheduledJob, doc("The fields of each job, as in the request that creates a job.")]
    overlap: Annotated[Overlap, doc("What happens at a time while the last job of the schedule is unfinished.")] = (
        "skip"
    )
    catch_up: Annotated[
        CatchUp, doc("After a time in which nothing could fire: fire the latest missed time, or none.")
    ] = "latest"
    jitter_ms: Annotated[
        int, doc("Up to this time is added to `run_at`, the same for each time.", ge=0, le=HOUR_MS)
    ] = 0
    paused: Annotated[bool, doc("A new schedule begins paused. Later, only pause and resume change that.")] = False
    source: fields.ScheduleSource | None = None


class GetSchedule(Read, frozen=True, kw_only=True):
    """Get one schedule, with its next times."""

    errors = ("schedule_not_found",)

    id: fields.ScheduleId


class Schedules(Read, frozen=True, kw_only=True):
    """List the schedules by id."""

    source: Annotated[fields.ScheduleSource, doc("Only schedules of this source.")] | None = None
    limit: fields.PageLimit = 50
    cursor: Annotated[fields.ScheduleId, doc("The `next_cursor` of the previous page.")] | None = None


class RunSchedule(ScheduleCommand, frozen=True, kw_only=True):
    """Create one job of a schedule now, or the job of `scheduled_at`. It works while the schedule is paused.

    The job of a time has a fixed id, so repeating the request creates nothing.
    """

    admission = "create"
    audit_name = "run-schedule"
    errors = (
        "schedule_not_found", "schedule_busy", "job_exists", "too_many_jobs", "too_many_queues", "upgrade_incomplete",
    )  # fmt: skip

    scheduled_at: Annotated[fields.UnixMs | None, doc("A time of the schedule, in Unix ms, in full seconds.")] = None
    force: Annotated[bool, doc("Create it although the last job is unfinished and `overlap` is skip.")] = False
    reason: fields.Reason | None = None

    def job_ids(self) -> list[str]:
        return [] if self.scheduled_at is None else [scheduled_job_id(self.id, self.scheduled_at)]


class PauseSchedule(ScheduleCommand, frozen=True, kw_only=True):
    """Fire at no time until an operator resumes the schedule, or until `until`. These times are not made up."""

    admission = "change"
    audit_name = "pause-schedule"

    reason: fields.Reason | None = None
    until: Annotated[fields.UnixMs | None, doc("When the daemon resumes the schedule, in Unix ms.")] = None


class ResumeSchedule(ScheduleCommand, frozen=True, kw_only=True):
    """Fire again, from now on."""

    admission = "change"
    audit_name = "resume-schedule"

    reason: fields.Reason | None = None


class DeleteSchedule(ScheduleCommand, frozen=True, kw_only=True):
    """Delete a schedule. Its jobs stay."""

    admission = "ending"
    audit_name = "delete-schedule"

    reason: fields.Reason | None = None


class Fire(Command, frozen=True, kw_only=True):
    """Create the job of the time `scheduled_at` of a schedule, or skip it. `missed` earlier times create none.

    With `is_missed` the time itself is missed, too. A firing that was computed for another `version` is void.
    """

    admission = "create"

    id: str
    version: int
    scheduled_at: int
    missed: int = 0
    is_missed: bool = False

    def job_ids(self) -> list[str]:
        return [scheduled_job_id(self.id, self.scheduled_at)]
