"""The final phase: faults stop, and the liveness invariants L1 to L6 must hold.

Every command is answered, the daemon is ready at once, stalled jobs are recovered in time, every due job is granted,
and old jobs are deleted until none is left.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from msgspec.structs import replace

from jobd.model.commands import (
    AnyCommand,
    Claim,
    Complete,
    DeleteSchedule,
    EndQuietRule,
    ListJobs,
    Progress,
    Resume,
    RunNow,
    Stats,
)
from jobd.model.errors import ApiError
from jobd.model.fields import MAX_PAGE
from jobd.model.job import DAY_MS, SECOND_MS
from jobd.model.responses import CleanupReport, GrantView, Response
from tests.proof.simulation.invariants import is_overdue
from tests.proof.simulation.machine import Machine, SimCall, SimDaemon

READY_S: Final = 2.0
ALL_TIME_S: Final = 3 * 3_600.0  # longer than any lock, progress timeout or delay of a scenario
WHO: Final = "last"


class FinalPhase:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.watch = machine.monitor

    async def run(self, tasks: list[asyncio.Task[Any]]) -> None:
        await self._check_all_answered(tasks)
        daemon = await self._check_ready()
        if daemon is None or self.watch.first:
            return
        await self._check_schedules(daemon)
        await self._check_nothing_stalled(daemon)
        await self._finish_all_jobs(daemon)
        await self.machine.check_delivered()
        await self._check_cleanup(daemon)
        self.watch.recount(daemon.state)
        self.watch.check_disk()
        self.machine.disk.project()

    async def _check_all_answered(self, tasks: list[asyncio.Task[Any]]) -> None:
        """L1: every command is answered."""
        machine = self.machine
        machine.closing = True
        machine.clear_faults()
        await machine.rest()
        limit_s = ALL_TIME_S
        _, waiting = await asyncio.wait(tasks, timeout=limit_s) if tasks else (None, None)
        machine.clear_faults()  # of a fault that is not over yet
        if waiting:
            self.watch.fail("L1", f"{len(waiting)} callers have no response after {limit_s:.0f} s")

    async def _check_ready(self) -> SimDaemon | None:
        """L4: the daemon is ready within two seconds of its start, without manual repair."""
        machine = self.machine
        for _ in range(4):
            daemon = machine.daemon
            if daemon is not None and daemon.is_open:
                break
            await asyncio.sleep(30 if daemon is None else READY_S)
        else:
            self.watch.fail("L4", "the daemon does not come up")
            return None
        opened_in_s = daemon.opened_s - daemon.began_s
        machine.note("machine", "up", opened_in_s)
        self.watch.must(opened_in_s <= READY_S, "L4", f"the daemon took {opened_in_s:.1f} s to come up")
        await asyncio.sleep(1.5)  # a disk that was full is probed once a second
        machine.closing_since = daemon.clock.moment().lock_ms
        machine.accept_clock(daemon)
        return daemon

    async def _check_schedules(self, daemon: SimDaemon) -> None:
        """S19: once jobs can be created again, no time of a schedule is overdue. Delete the schedules after that."""
        daemon.actor.policy = replace(daemon.actor.policy, live_jobs=1_000_000, queues=10_000)
        await asyncio.sleep(8)
        if daemon.scheduling.done():
            self.watch.fail("S19", "the timer of schedules has ended")
        self.watch.firings.check_none_overdue(daemon.state.schedules, self.machine.wall())
        for name in list(daemon.state.schedules):
            await self._yes(DeleteSchedule(id=name), admin=True)

    async def _check_nothing_stalled(self, daemon: SimDaemon) -> None:
        """L2: all holders are gone, so recovery ends every grant in time (monitor.py checks each)."""
        state = daemon.state
        others = asyncio.create_task(self._keep_asking())  # advances the state before cleanup does
        until = self.machine.loop.now_s + ALL_TIME_S
        while state.processing and self.machine.loop.now_s < until and not self.watch.first:
            now = daemon.clock.moment().lock_ms
            ends = [job.deadlines.stalled_at for job in state.processing.values() if job.deadlines is not None]
            wait_ms = max(min(ends, default=now) - now, 0) + self.machine.recovery_ms + 1_100
            await asyncio.sleep(wait_ms / SECOND_MS)
        others.cancel()
        if state.processing:
            self.watch.fail("L2", f"still processing: {list(state.processing)}", next(iter(state.processing)))

    async def _keep_asking(self) -> None:
        while True:
            await asyncio.sleep(1.3)
            await self.machine.call(SimCall(WHO, Stats()))

    async def _finish_all_jobs(self, daemon: SimDaemon) -> None:
        """L3: every job is granted once a worker claims its queue. Overdue jobs are left to recovery."""
        state = daemon.state
        for queue in sorted(state.paused):
            await self._yes(Resume(name=queue), admin=True)
        for rule in state.quiet:
            await self._yes(EndQuietRule(rule=rule), admin=True)
        for job_id in [job.id for job in state.jobs.values() if job.run_at > self.machine.wall()]:
            await self._yes(RunNow(id=job_id), admin=True)
        queues = sorted(state.counts) or ["default"]
        for _ in range(500):
            if self.watch.first or not state.jobs:
                break
            response = await self._yes(Claim(worker=WHO, queues=queues, limit=5, wait_ms=1_000, lock_ttl_ms=60_000))
            if response is None or not response.grants:
                break
            for granted in response.data.grants:
                await self._finish(granted)
        left = sorted(job.id for job in state.jobs.values() if not is_overdue(job, self.machine.wall()))
        if left and not self.watch.first:
            self.watch.fail("L3", f"never granted: {left}", left[0])

    async def _finish(self, granted: GrantView) -> None:
        job_id, lock_id = granted.job.id, granted.lock_id
        await self._yes(Progress(id=job_id, lock_id=lock_id, progress=50))
        await self._yes(Complete(id=job_id, lock_id=lock_id, download_url="https://x/y"))

    async def _check_cleanup(self, daemon: SimDaemon) -> None:
        """L5: cleanup has survived every fault. A forced run deletes everything that is old enough."""
        machine = self.machine
        if daemon.maintaining.done():
            self.watch.fail("L5", "the maintainer has ended")
            return
        report = await self._pass(daemon)
        if daemon.maintainer.degraded_reason() is not None and not report.errors:
            self.watch.fail("L5", f"degraded after a successful cleanup run: {daemon.maintainer.degraded_reason()}")
        if machine.dice.random() < 0.5:
            return
        await self._read_all_pages()
        await self._advance_time(daemon)
        if machine.disk.jobs:
            left = next(iter(machine.disk.jobs.values()))
            self.watch.fail("S13", f"{len(machine.disk.jobs)} old jobs are left, the first is {left.status}", left.id)
        if any(event.job_id not in machine.disk.quarantined for event in machine.disk.events):
            self.watch.fail("S13", f"{len(machine.disk.events)} events of deleted jobs are left")
        await self._check_artifacts()

    async def _read_all_pages(self) -> None:
        """Read all pages, so that damaged rows that did not fit into quarantine are found again and moved."""
        cursor = None
        while (response := await self._yes(ListJobs(limit=MAX_PAGE, cursor=cursor))) is not None:
            cursor = response.data.next_cursor
            if cursor is None:
                break
        if self.machine.disk.unmoved:
            self.watch.fail("L5", f"damaged rows are not in quarantine: {list(self.machine.disk.unmoved)}")

    async def _check_artifacts(self) -> None:
        """Check that no object of a deleted job is left and no tombstone waits."""
        machine = self.machine
        if not machine.scenario.policy.artifacts:
            return
        for _ in range(int(ALL_TIME_S / 10)):
            if not machine.artifacts.waiting() or self.watch.first:
                break
            await asyncio.sleep(10)
        if waiting := machine.artifacts.waiting():
            first = waiting[0]
            self.watch.fail("S13", f"{len(waiting)} tombstones are left, the first of {first.key}", first.job_id)
        if leaked := machine.artifacts.leaked():
            self.watch.fail("S13", f"objects of deleted jobs are left: {leaked}")

    async def _advance_time(self, daemon: SimDaemon) -> None:
        """Advance time until every job is past its retention, then every journal and every stored object."""
        machine, disk = self.machine, self.machine.disk
        times = [job.expires_at or 0 for job in disk.jobs.values()]
        machine.move_clocks(wall_ms=max([*times, machine.wall()]) + DAY_MS - machine.wall())
        machine.accept_clock(daemon)
        await self._pass(daemon)
        times = [
            *disk.deleted.values(),
            *(event.at for event in disk.events),
            *(its.at for its in disk.tombstones.values()),
        ]
        machine.move_clocks(wall_ms=max([*times, machine.wall()]) + 2 * DAY_MS - machine.wall())
        machine.accept_clock(daemon)
        await self._pass(daemon)

    async def _pass(self, daemon: SimDaemon) -> CleanupReport:
        report = await daemon.maintainer.run_cleanup(forced=True)
        if daemon.maintainer.is_running or report.errors:
            # The first may have begun before the faults stopped.
            report = await daemon.maintainer.run_cleanup(forced=True)
        if report.errors:
            self.watch.fail("L5", f"errors of a cleanup run without faults: {report.errors}")
        return report

    async def _yes(self, command: AnyCommand, *, admin: bool = False) -> Response | None:
        response = await self.machine.call(SimCall(WHO, command, admin=admin))
        if isinstance(response, ApiError) and not self._may_reject(response):
            job_id = getattr(command, "id", None)
            self.watch.fail("L3", f"{type(command).__name__} was rejected without a fault: {response.code}", job_id)
        return response if isinstance(response, Response) else None

    def _may_reject(self, response: ApiError) -> bool:
        """Return whether an error is allowed: a damaged row, an expired job, or its progress timeout."""
        return response.code in ("job_quarantined", "invalid_transition", "job_not_found")
