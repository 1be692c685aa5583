"""Fire schedules: compute their times, and send a command for each time that has come.

Of the times that have passed, a schedule fires the latest. The rule (core/rules/schedule_rules.py) decides whether it
fires, so that a time never fires twice, whatever this timer does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Final

import structlog

from jobd.engine.actor import Actor
from jobd.maintenance.cron import InvalidTiming, latest_time, load_zone, next_times
from jobd.maintenance.stoppable_loop import StoppableLoop
from jobd.model.commands import AnyCommand, Fire, Moment, ResumeSchedule
from jobd.model.errors import ApiError
from jobd.model.job import MINUTE_MS, SECOND_MS
from jobd.model.schedules import Schedule

LOOK_S: Final = 1.0  # the clock may step, and pauses end, by wall time
RETRY_MS: Final = 5 * SECOND_MS  # after a rejected command: the disk is full, or a limit is reached
AT_ONCE: Final = 100  # commands that wait for the same commit
SLICE: Final = 20  # schedules whose times are computed before others run
LATE_MS: Final = MINUTE_MS  # a schedule that makes up nothing still fires this late

log = structlog.get_logger("jobd.schedules")


class Scheduler(StoppableLoop):
    """Sends the commands of all schedules until `stop`. `moment` returns the time."""

    def __init__(self, actor: Actor, moment: Callable[[], Moment]) -> None:
        super().__init__()
        self._actor = actor
        self._moment = moment
        self._state = actor.state
        self._changed = dict.fromkeys(self._state.schedules)
        self._next: dict[str, int] = {}  # when each schedule has something to do
        self._heap: list[tuple[int, str]] = []  # the same; entries that differ from `_next` are void
        self._looked_at = 0
        self._callers: list[asyncio.Future[None]] = []  # of `fire_due`
        self._state.on_schedule = self._note_change

    def _note_change(self, name: str) -> None:
        self._changed[name] = None
        self._wake.set()

    async def run(self) -> None:
        while not self._stopping:
            self._check_clock()
            callers, self._callers = self._callers, []
            await self._compute()
            await self._fire()
            for caller in callers:
                caller.set_result(None)
            at, wait_s = self._moment(), None
            if self._heap and not at.suspect:
                wait_s = min(max(self._heap[0][0] - at.now, 1) / SECOND_MS, LOOK_S)
            elif self._heap or self._changed:
                wait_s = LOOK_S
            await self._pause(wait_s)

    async def fire_due(self) -> None:
        """Look at the clock now, and return when the schedules that are due have fired."""
        caller: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._callers.append(caller)
        self._wake.set()
        await caller

    def _check_clock(self) -> None:
        """Compute all times again after the clock was set back: later times may not count any more."""
        now = self._moment().now
        if now < self._looked_at - SECOND_MS:
            self._changed.update(dict.fromkeys(self._state.schedules))
        self._looked_at = now

    async def _compute(self) -> None:
        """Compute the next time of each schedule that has changed."""
        count = 0
        while self._changed and not self._stopping:
            name, _ = self._changed.popitem()
            schedule = self._state.schedules.get(name)
            at = None if schedule is None else await self._next_at(schedule)
            if at is None:
                self._next.pop(name, None)
            elif at != self._next.get(name):
                self._plan(name, at)
            count += 1
            if count % SLICE == 0:
                await asyncio.sleep(0)

    def _plan(self, name: str, at: int) -> None:
        self._next[name] = at
        heappush(self._heap, (at, name))

    async def _next_at(self, schedule: Schedule) -> int | None:
        if schedule.pause is not None:
            return schedule.pause.until
        try:
            await load_zone(schedule.timing.timezone)
            return next(iter(next_times(schedule.timing, schedule.fires_after(self._moment().now), 1)), None)
        except InvalidTiming as error:  # the time zone is unknown here: the package tzdata is older
            log.error("schedule_invalid", schedule=schedule.id, field=error.field, reason=str(error))
            return None

    async def _fire(self) -> None:
        """Send the commands that are due. Those that are rejected are sent again later."""
        at = self._moment()
        while self._heap and self._heap[0][0] <= at.believed and not at.suspect and not self._stopping:
            commands: list[tuple[str, AnyCommand, str]] = []
            while self._heap and self._heap[0][0] <= at.believed and len(commands) < AT_ONCE:
                due_at, name = heappop(self._heap)
                schedule = self._state.schedules.get(name)
                if schedule is not None and self._next.get(name) == due_at:
                    del self._next[name]
                    commands.append((name, *_command(schedule, due_at, at.now)))
            answers = await asyncio.gather(*(self._actor.ask(command, by=by) for _, command, by in commands))
            for (name, _, _), answer in zip(commands, answers, strict=True):
                if isinstance(answer, ApiError):
                    self._plan(name, at.now + RETRY_MS)
                else:
                    self._changed[name] = None


def _command(schedule: Schedule, due_at: int, now: int) -> tuple[AnyCommand, str]:
    """Return the command of a schedule that has been due since `due_at`, and its author."""
    if schedule.pause is not None:
        return ResumeSchedule(id=schedule.id, reason="The pause ended as scheduled."), "daemon"
    if (after := schedule.fires_after(now)) >= now:  # the clock was set back by more than a day
        after = due_at - 1
    at, missed = latest_time(schedule.timing, after, now)
    command = Fire(
        id=schedule.id,
        version=schedule.version,
        scheduled_at=at,
        missed=missed,
        is_missed=schedule.catch_up == "none" and now - at > LATE_MS,
    )
    return command, f"schedule:{schedule.id}"
