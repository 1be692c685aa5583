"""Conditions of schedules."""

from __future__ import annotations

from typing import Final

from jobd.model.job import HOUR_MS
from jobd.model.problems import Cure, Subject
from jobd.model.schedules import Schedule
from jobd.model.times import clock_time
from jobd.monitoring.problems.condition import Finding, Scene, plural

SKIPS: Final = 3  # in a row


def firing(scene: Scene) -> list[Schedule]:
    """Return the schedules that are not paused."""
    return [each for each in scene.state.schedules.values() if each.pause is None]


def skipping(scene: Scene, schedule: Schedule) -> Finding | None:
    count, skip = schedule.skips_in_a_row, schedule.last_skip
    if skip is None or count < SKIPS:
        return None
    title = f"{count:,} times in a row were skipped. Last {clock_time(skip.scheduled_at)}: {skip.reason}"
    return Finding(_subject(schedule), title, value=count, cure=(_see(schedule),))


def missed(scene: Scene, schedule: Schedule) -> Finding | None:
    if (at := schedule.last_missed_at) is None or scene.at.now - at >= HOUR_MS:
        return None
    title = (
        f"Nothing could fire until {clock_time(at)}. "
        f"Since its creation, {plural(schedule.missed, 'time')} created no job."
    )
    cause = "The daemon was down, no node led, the clock was suspect, or new jobs were rejected."
    cure = _see(schedule), Cure("Make up a time", f"jobctl schedule run {schedule.id} --at TIME", changes=True)
    return Finding(_subject(schedule), title, value=schedule.missed, cause=cause, cure=cure)


def _subject(schedule: Schedule) -> Subject:
    return Subject(type="schedule", schedule=schedule.id)


def _see(schedule: Schedule) -> Cure:
    return Cure("See its times", f"jobctl schedule {schedule.id}", f"/schedules/{schedule.id}")
