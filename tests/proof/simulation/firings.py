"""S19: a schedule fires each time once, none before it has come, and counts each time that creates no job.

The checks share no code with the timer and the rule. Times of cron expressions other than "* * * * *" are not counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

from jobd.maintenance.cron import next_times
from jobd.model.events import Event
from jobd.model.job import DAY_MS, MINUTE_MS
from jobd.model.schedules import Schedule, Timing, schedule_id

if TYPE_CHECKING:
    from tests.proof.simulation.monitor import Monitor

LATE_MS: Final = 7_000  # the timer sends a rejected firing again after 5 s
MOST_COUNTED: Final = 999  # missed times of a cron expression


class Passed(Struct):
    """The times of a schedule that are over, with the event of each. It fires later than `since` and `last`."""

    timing: Timing
    since: int
    last: int = 0
    times: dict[int, int] = {}


class Firings:
    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._known: dict[str, Passed] = {}

    def restored(self, schedules: dict[str, Schedule], next_event: int) -> None:
        """Forget the events that a restored copy lacks."""
        known, self._known = self._known, {}
        for name, row in schedules.items():
            times = {at: seq for at, seq in known[name].times.items() if seq < next_event} if name in known else {}
            self._known[name] = Passed(row.timing, row.timed_from, row.last_at or 0, times)

    def committed(self, event: Event, latest_wall: int) -> None:
        """Check an event. `latest_wall` is the latest wall time that this daemon has seen."""
        if (name := schedule_id(event)) is None:
            return
        details: Any = event.details
        if event.type == "schedule_deleted":
            del self._known[name]
        elif event.type == "schedule_put":
            row = details["row"]
            timing = Timing(**row["timing"])
            times = self._known[name].times if name in self._known else {}
            self._known[name] = Passed(timing, row["timed_from"], row.get("last_at", 0), times)
        elif event.type == "schedule_resumed":
            self._known[name].since = event.at
        elif "missed" in details:
            self._check(event, name, self._known[name], latest_wall)

    def _check(self, event: Event, name: str, known: Passed, latest_wall: int) -> None:
        details: Any = event.details
        at, missed = details["scheduled_at"], details["missed"] - (event.type == "schedule_missed")
        must, what = self._monitor.must, f"{event.type}: time {at} of {name}"
        if known.last > event.at + DAY_MS:  # a wrong clock wrote it: the times ahead of this clock fire again
            known.times = {time: seq for time, seq in known.times.items() if time <= event.at}
        must(at not in known.times, "S19", f"{what} has fired or passed before", event.job_id)
        must(at <= latest_wall, "S19", f"{what} has not come, the clock was at most {latest_wall}", event.job_id)
        after = max(known.since, known.last)
        every_ms = known.timing.every_ms or (MINUTE_MS if known.timing.cron == "* * * * *" else None)
        if after <= event.at + DAY_MS:
            must(at > after, "S19", f"{what} is not later than {after}", event.job_id)
            if every_ms is not None:
                offset_ms = known.timing.offset_ms
                between = (at - offset_ms - 1) // every_ms - (after - offset_ms) // every_ms
                between = between if known.timing.cron is None else min(between, MOST_COUNTED)
                must(missed == between, "S19", f"{what} counts {missed} missed times of {between}", event.job_id)
                must((at - offset_ms) % every_ms == 0, "S19", f"{what} is none of its times", event.job_id)
        known.since, known.last = min(known.since, at), at
        known.times[at] = event.seq

    def check_none_overdue(self, schedules: dict[str, Schedule], now: int) -> None:
        """Check that no schedule has a time that should have fired, some seconds after all faults."""
        for row in schedules.values():
            if row.pause is None:
                at = next(iter(next_times(row.timing, row.fires_after(now), 1)), now)
                self._monitor.must(at >= now - LATE_MS, "S19", f"{row.id} has not fired for {now - at} ms")
