"""Conditions of schedules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from jobd.model.job import HOUR_MS
from jobd.model.problems import Cure, Subject
from jobd.model.schedules import Schedule
from jobd.model.times import clock_time
from jobd.monitoring.problems.condition import Finding, Scene, plural

SKIPS: Final = 3  # in a row


def skipping(scene: Scene) -> Iterator[Finding | None]:
    for schedule in _firing(scene):
        yield None
        skip = schedule.last_skip
        if skip is not None and schedule.skips_in_a_row >= SKIPS:
            yield Finding(
                subject=Subject(type="schedule", schedule=schedule.id),
                title=f"{schedule.skips_in_a_row:,} times in a row were skipped. Last {clock_time(skip.scheduled_at)}: "
                f"{skip.reason}",
                value=schedule.skips_in_a_row,
                cure=(_see(schedule),),
            )


def missed(scene: Scene) -> Iterator[Finding | None]:
    for schedule in _firing(scene):
        yield None
        at = schedule.last_missed_at
        if at is not None and scene.at.now - at < HOUR_MS:
            yield Finding(
                subject=Subject(type="schedule", schedule=schedule.id),
                title=f"Nothing could fire until {clock_time(at)}. "
                f"Since its creation, {plural(schedule.missed, 'time')} created no job.",
                value=schedule.missed,
                cause="The daemon was down, no node led, the clock was suspect, or new jobs were rejected.",
                cure=(
                    _see(schedule),
                    Cure("Make up a time", f"jobctl schedule run {schedule.id} --at TIME", changes=True),
                ),
            )


def _firing(scene: Scene) -> Iterator[Schedule]:
    """Return the schedules that are not paused."""
    return (each for each in list(scene.state.schedules.values()) if each.pause is None)


def _see(schedule: Schedule) -> Cure:
    return Cure("See its times", f"jobctl schedule {schedule.id}", f"/schedules/{schedule.id}")
