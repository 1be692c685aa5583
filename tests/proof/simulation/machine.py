"""A simulated machine: one disk, two clocks, and at most one daemon, which a supervisor restarts.

The daemon is wired as the real one (daemon.py) without the sockets. It can be killed at any await.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import Counter
from collections.abc import Coroutine
from contextlib import AbstractContextManager, nullcontext
from random import Random
from typing import Any, Final

import msgspec
from msgspec import Struct

from jobd.core.state import State
from jobd.daemon import STOP_S
from jobd.engine.actor import Actor, DiskBroken
from jobd.engine.clock import Clock
from jobd.engine.idempotency import IdempotencyStore
from jobd.maintenance.artifact_sweeper import ArtifactSweeper, SweepStats
from jobd.maintenance.clock_monitor import ClockMonitor
from jobd.maintenance.due_jobs import DueJobs
from jobd.maintenance.maintainer import Maintainer, read_stats
from jobd.maintenance.restart_grace import GRACE_MS, extend_held_locks
from jobd.maintenance.schedules import Scheduler
from jobd.model.clocks import BootMs, LockMs
from jobd.model.commands import AnyCommand, ClockTrust, EndGrants, IdempotencyKey, Operator
from jobd.model.errors import ApiError
from jobd.model.job import DAY_MS
from jobd.model.journal import BadRecord, JournalOutcomeUnknown, JournalUnavailable, LeadershipLost
from jobd.model.responses import Response
from jobd.model.storage import DiskFull, OpenedStore
from jobd.monitoring import event_logging
from tests.proof.simulation.artifacts import SimArtifacts
from tests.proof.simulation.disk import SimDisk, Snapshot
from tests.proof.simulation.loop import SimLoop
from tests.proof.simulation.monitor import Monitor
from tests.proof.simulation.scenario import Scenario
from tests.proof.simulation.trace import Trace

WALL: Final = 1_700_000_000_000
EXPECTED: Final = (
    OSError,
    DiskFull,
    LeadershipLost,
    JournalOutcomeUnknown,
    JournalUnavailable,
)  # errors that faults cause
SLICE: Final = 2  # 500 in the real one; fewer here, so that a start has several slices

Backup = tuple[Snapshot, dict[int, tuple[str, int, str]]]

owner: contextvars.ContextVar[list[asyncio.Task[Any]] | None] = contextvars.ContextVar("owner", default=None)


def own_tasks(loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **given: Any) -> asyncio.Task[Any]:
    """Make a task factory that records all tasks of a daemon, so that the daemon can be killed."""
    context = given.get("context")
    tasks = owner.get() if context is None else context.get(owner)
    task: asyncio.Task[Any] = asyncio.Task(coro, loop=loop, **given)
    if tasks is not None:
        tasks.append(task)
    return task


class SimCall(Struct, frozen=True):
    """A request of the client `who`, which disconnects `disconnect_after_s`. `unread`: its response is lost."""

    who: str
    command: AnyCommand
    by: str = "client"
    admin: bool = False
    key: IdempotencyKey | None = None
    disconnect_after_s: float | None = None
    unread: bool = False


class SimConnection:
    """A connection that waits for one response; it receives None if it breaks."""

    __slots__ = ("reply", "who")

    def __init__(self, who: str, loop: asyncio.AbstractEventLoop) -> None:
        self.who = who
        self.reply: asyncio.Future[Response | ApiError | None] = loop.create_future()

    def close(self) -> None:
        if not self.reply.done():
            self.reply.set_result(None)


class Host:
    """What a daemon runs on: two clocks and a disk, which the subclass makes."""

    disk: SimDisk
    monitor: Monitor
    artifacts: SimArtifacts

    def __init__(self, seed: int, plan: Scenario, loop: SimLoop, journal: Trace, fired: Counter[str]) -> None:
        self.seed = seed
        self.scenario = plan
        self.loop = loop
        self.trace = journal
        self.fired = fired
        self.wall_shift_ms = 0.3
        self.boot_shift_ms = 0.0
        self.synchronised = Random(f"{seed}: kernel").random() < 0.3
        self.next_policy = plan.policy
        self.dice = Random(f"{seed}: machine")

    def wall(self) -> int:
        return WALL + int(self.loop.now_s * 1000 + self.wall_shift_ms)

    def boot(self) -> BootMs:
        return BootMs(int(self.loop.now_s * 1000 + self.boot_shift_ms))

    def note(self, what: str, *details: Any) -> None:
        self.trace.note(self.loop.now_s, what, *details)

    def fault(self, name: str, *details: Any) -> None:
        self.fired[f"fault {name}"] += 1
        self.note("fault", name, *details)


class Machine(Host):
    """A simulated machine. `finished` is set when an invariant broke or enough steps were made."""

    holds_commands_s = 0.0  # while they cannot be committed

    def __init__(self, seed: int, plan: Scenario, loop: SimLoop, journal: Trace) -> None:
        super().__init__(seed, plan, loop, journal, Counter())
        self.daemon: SimDaemon | None = None
        self.disk = SimDisk(
            Random(f"{seed}: disk"),
            self.fired,
            self.wall,
            plan.commit,
            loop.freeze,
            plan.slices,
            Random(f"{seed}: slices"),
        )
        self.finished = asyncio.Event()
        self.monitor = self._make_monitor()
        self.artifacts = SimArtifacts(self, Random(f"{seed}: artifacts"))
        self.disk.committed = self.monitor.check_commit
        self.disk.pruning = self.monitor.check_prune
        self.disk.broken = lambda message: self.monitor.fail("S7", message)
        loop.on_error = lambda message: self.monitor.fail("loop", message)
        self.closing = False
        self.enough = 0  # steps
        self.closing_since: LockMs | None = None  # when the faults had stopped
        self.had_read_errors = False
        self.backups: list[Backup] = []
        self.clocks_moved_s = 0.0  # loop time of the latest step of a clock
        self.jump_ms = 0  # error of the wall clock that was not accepted
        self.downtime_s = 0.5
        self.off = False
        loop.set_task_factory(own_tasks)  # type: ignore[arg-type]

    def constants(self) -> AbstractContextManager[object]:
        """Return a context in which constants of modules fit the simulation."""
        return nullcontext()

    def _make_monitor(self) -> Monitor:
        return Monitor(self, self.fired)

    # -- clocks -------------------------------------------------------------------------------------------------------

    def move_clocks(self, *, wall_ms: float = 0, boot_ms: float = 0) -> None:
        """Step either clock against the loop's time."""
        self.wall_shift_ms += wall_ms
        self.boot_shift_ms += boot_ms
        self.clocks_moved_s = self.loop.now_s

    def jump_clock(self, ms: int) -> None:
        """Step the wall clock ahead, to be undone later. Skipped if the store may have seen that time before."""
        self.move_clocks(wall_ms=ms)
        seen_ms = max(self.disk.numbers.wall_ms, self.disk.numbers.expected_ms)
        self.jump_ms = ms if ms > 0 and seen_ms < self.wall() - ms + DAY_MS else 0

    def accept_clock(self, daemon: SimDaemon) -> None:
        self.jump_ms = 0
        daemon.clock.accept()

    @property
    def recovery_ms(self) -> int:
        schedule = self.scenario.schedule
        return schedule.recover_every_ms or max(schedule.interval_ms, schedule.min_interval_ms)

    @property
    def is_slow(self) -> bool:
        """Whether a fault delays writes."""
        return bool(self.disk.full or self.disk.slowness_s or self.disk.slowed)

    def clear_faults(self) -> None:
        """Stop all faults."""
        self.disk.clear_faults()
        self.artifacts.fault = None

    # -- the supervisor -----------------------------------------------------------------------------------------------

    async def keep_running(self) -> None:
        """Restart the daemon whenever it ends, like systemd."""
        while not self.off:
            daemon = self.daemon = SimDaemon(self)
            self.note("machine", "start", self.disk.numbers)
            is_torn = self.disk.is_torn
            try:
                daemon.begin()
            except BadRecord as error:
                self._refuse_start(str(error), is_expected=is_torn)
                await asyncio.sleep(self.downtime_s)
                continue
            if is_torn:
                self.monitor.fail("S6", "the daemon has started without a record that the tables lack")
            await daemon.gone.wait()
            self.daemon = None
            self.note("machine", "ended", daemon.how)
            self.fired[f"daemon ended: {daemon.how}"] += 1
            await asyncio.sleep(self.downtime_s)

    def _refuse_start(self, why: str, *, is_expected: bool) -> None:
        """The start was rejected; an operator mends the journal."""
        self.daemon = None
        self.note("machine", "rejected", why)
        self.fired["start rejected"] += 1
        self.monitor.must(is_expected, "S6", f"the start was rejected: {why}")
        self.disk.mend()

    async def check_delivered(self) -> None:
        """Check that webhooks get every message. A single daemon has none here."""

    async def rest(self) -> None:
        """End what a long wait without faults does not need."""

    async def shut_down(self) -> None:
        """End the daemon, gracefully if nothing broke."""
        self.off = True
        if self.daemon is not None and self.monitor.first is None:
            await self.daemon.stop()
        else:
            self.crash(power_cut=False)

    def crash(self, *, power_cut: bool) -> None:
        """End the daemon between two awaits."""
        daemon, self.daemon = self.daemon, None
        if daemon is not None:
            daemon.kill()
        self.disk.crash(power_cut=power_cut)

    def back_up(self) -> Backup:
        """Copy the disk and the list of acknowledged changes."""
        return self.disk.snapshot(), dict(self.monitor.acknowledged)

    def restore(self, backup: Backup) -> None:
        """Restore an earlier copy of the disk while no daemon runs."""
        snapshot, acknowledged = backup
        self.disk.restore(snapshot)
        self.artifacts.restored()
        self.monitor.note_restore(acknowledged)

    # -- connections --------------------------------------------------------------------------------------------------

    async def call(self, sent: SimCall) -> Response | ApiError | None:
        """Send a command and return its response; None if none came."""
        daemon = self.daemon
        return None if daemon is None or not daemon.is_open else await self._send(daemon, sent)

    async def _send(self, daemon: SimDaemon, sent: SimCall) -> Response | ApiError | None:
        command = msgspec.structs.replace(sent.command)  # a new request, even if it repeats another
        connection = SimConnection(sent.who, self.loop)
        daemon.connections[connection] = None
        self.note("request", sent.who, type(command).__name__, command, sent.key and sent.key.digest)
        handler = daemon.spawn(self._handle(daemon, connection, command, sent))
        if sent.disconnect_after_s is not None:
            self.loop.call_later(sent.disconnect_after_s, self._disconnect, connection, handler)
        try:
            response = await connection.reply
        finally:
            daemon.connections.pop(connection, None)
        if response is None or sent.unread:
            return None
        outcome = response.code if isinstance(response, ApiError) else "yes"
        self.note("response", sent.who, type(command).__name__, getattr(command, "id", None), outcome)
        return response

    async def _handle(self, daemon: SimDaemon, connection: SimConnection, command: AnyCommand, sent: SimCall) -> None:
        """Handle a request like the HTTP layer: ask the actor, then respond or report an undelivered response."""
        size = 100 if self.scenario.bounds.inflight_bytes < 1000 else 0
        operator = Operator("", "simulated") if sent.admin else None
        by, admin, key = sent.by, sent.admin, sent.key
        self.monitor.note_request(command)
        try:
            response = await daemon.actor.ask(command, by=by, admin=admin, key=key, size=size, operator=operator)
            self.monitor.check_response(command, key, response)
        finally:
            self.monitor.forget_request(command)
        if connection.reply.done():  # the connection is closed or the caller has left
            if isinstance(response, Response) and response.grants:
                self.fired["grant undelivered"] += 1
                daemon.actor.undelivered(response)
            return
        if isinstance(response, Response):
            self.monitor.note_delivery(connection.who if key is None else key.digest, response)
        connection.reply.set_result(response)

    def _disconnect(self, connection: SimConnection, handler: asyncio.Task[None]) -> None:
        if connection.reply.done():
            return
        roll = self.dice.random()
        waits_for: asyncio.Future[Any] | None = handler._fut_waiter  # type: ignore[attr-defined]  # its answer
        if roll < 0.25 and waits_for is not None:
            waits_for.add_done_callback(lambda _: self._disconnect_at_response(connection, handler))
            return
        self.fired["mishap client disconnects"] += 1
        connection.close()
        if roll < 0.35:
            handler.cancel()
        elif roll < 0.6:
            self.loop.call_soon(handler.cancel)
        else:
            self.loop.call_later(roll / 100, handler.cancel)  # a writer sees it before the handler does

    def _disconnect_at_response(self, connection: SimConnection, handler: asyncio.Task[None]) -> None:
        """Break the connection when the response is ready and the handler may not have read it yet."""
        if not connection.reply.done():
            self.fired["mishap client disconnects at the response"] += 1
            connection.close()
            handler.cancel()


class SimDaemon:
    """One run of the daemon. It accepts requests while `is_open`."""

    def __init__(self, machine: Host) -> None:
        self.machine = machine
        self.connections: dict[SimConnection, None] = {}
        self.is_open = False
        self.how = "killed"
        self.gone = asyncio.Event()
        self.stopped = asyncio.Event()
        self.began_s = self.opened_s = machine.loop.now_s
        self.sweeper: ArtifactSweeper | None = None
        self._tasks: list[asyncio.Task[Any]] = []
        self._context = contextvars.copy_context()
        self._context.run(owner.set, self._tasks)

    def begin(self) -> None:
        self._build(self.machine.disk.opened())
        self.spawn(self._live())

    def spawn(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        if len(self._tasks) > 500:
            self._tasks[:] = [task for task in self._tasks if not task.done()]
        return self.machine.loop.create_task(coro, context=self._context)

    def kill(self) -> None:
        """End all tasks at once, without responses or cleanup."""
        self.is_open = False
        if hasattr(self, "scheduler"):  # wait_for of Python 3.11 loses a cancellation that comes with a wake-up
            self.scheduler.stop()
        self._close_connections()
        for task in self._tasks:
            if not task.done():
                task.cancel()
            elif not task.cancelled():
                task.exception()
        self.gone.set()

    async def stop(self) -> None:
        self.stopped.set()
        await self.gone.wait()

    # -- as in daemon.py ----------------------------------------------------------------------------------------------

    def _build(self, opened: OpenedStore) -> None:
        machine = self.machine
        self.opened = opened
        self.clock = Clock(
            opened.numbers,
            keep_ms=machine.next_policy.shortest_keep_ms,
            wall=machine.wall,
            boot=machine.boot,
            synchronised=lambda: machine.synchronised,
        )
        self.state = self._open_state(opened)
        self.state.counters = read_stats(opened.stats)
        self.actor = Actor(
            machine.disk,
            self.state,
            IdempotencyStore(opened.keys, machine.scenario.keys, self.state.holds),
            self.clock,
            machine.next_policy,
            random=machine.dice.randbytes,
            bounds=machine.scenario.bounds,
            is_full=opened.full,
            has_reserve=opened.has_reserve,
        )
        self.scheduler = Scheduler(self.actor, self.clock.moment)
        self.due_jobs = DueJobs(self.actor, self.clock.moment, slice_jobs=SLICE)
        self.clock_monitor = ClockMonitor(
            lambda pause_ms, since: None,
            lambda back_ms, until: self.due_jobs.keep(until),
            self.clock.moment,
            boot=machine.boot,
        )
        self.actor.before_batch = self.check_clocks
        self.actor.slow_commit_s = machine.scenario.slow_commit_s
        self.actor.on_commit.append(event_logging.write_lines)
        machine.monitor.check_start(self, GRACE_MS)

    def _open_state(self, opened: OpenedStore) -> State:
        state = State.opened(opened)
        state.quarantined = dict(opened.quarantined)
        state.unvalidated = dict(opened.unvalidated)
        return state

    async def _live(self) -> None:
        machine = self.machine
        machine.disk.on_broken = self.actor.lose_disk
        self._settle()
        await self.due_jobs.keep_at_start(self.opened.numbers.wall_ms)
        running = self.spawn(self.actor.run())
        running.add_done_callback(lambda _: self.stopped.set())
        self.maintainer = Maintainer(self.actor, self.clock, machine.scenario.schedule)
        self.maintaining = self.spawn(self.maintainer.run())
        self.scheduling = self.spawn(self.scheduler.run())
        sweeping = self._sweep()
        self.is_open, self.opened_s = True, machine.loop.now_s
        machine.note("machine", "open", self.state.numbers(LockMs(0), 0, ClockTrust()), self.clock.suspect)
        await self.stopped.wait()
        self.is_open = False
        self.how = "disk broken" if running.done() else "stopped"
        self.actor.end_claim_waits()
        await self._answer_pending()
        if sweeping is not None and self.sweeper is not None:
            self.sweeper.stop()
            await sweeping
        self.maintainer.stop()
        self.scheduler.stop()
        await self.maintaining
        await self.scheduling
        self.actor.stop()
        try:
            await running
        except DiskBroken as broken:
            self.how = "disk broken"
            if not isinstance(broken.__cause__, EXPECTED):
                machine.monitor.fail("S8", f"the daemon ended by a bug of its own: {broken.__cause__!r}")
        machine.disk.close()
        self._close_connections()
        await self._end()
        self.gone.set()

    async def _end(self) -> None:
        """Release what the daemon holds beside its disk."""

    def _sweep(self) -> asyncio.Task[None] | None:
        machine = self.machine
        if not machine.scenario.policy.artifacts:
            return None
        sweeps = SweepStats(waiting=self.opened.tombstones)
        self.sweeper = ArtifactSweeper(machine.disk, machine.artifacts, self.clock, sweeps, machine.scenario.margins)
        machine.disk.on_tombstones = self.sweeper.expect
        self.actor.on_commit.append(self.sweeper.committed)
        return self.spawn(self.sweeper.run())

    def _settle(self) -> None:
        if not self.opened.marked:
            now = self.clock.moment().lock_ms
            extend_held_locks(self.actor, now, since=now, slice_jobs=SLICE)
            return
        held = list(self.state.processing)
        slices = [held[first : first + SLICE] for first in range(0, len(held), SLICE)]
        for index, ids in enumerate(slices or [[]]):
            self.actor.enqueue_internal(EndGrants(ids=ids, last=index + 1 >= len(slices)))

    def check_clocks(self) -> None:
        self.clock_checked_s = self.machine.loop.now_s
        self.clock_monitor.check()

    async def _answer_pending(self) -> None:
        """L1: answer requests in flight before stopping the rest."""
        for _ in range(int(STOP_S / 0.02)):
            if all(connection.reply.done() for connection in self.connections):
                return
            await asyncio.sleep(0.02)
        self.machine.monitor.fail("L1", f"{len(self.connections)} requests in flight were not answered before the end")

    def _close_connections(self) -> None:
        for connection in self.connections:
            connection.close()
