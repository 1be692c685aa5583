"""A simulated node: a process that follows the journal and takes leadership, with its own clocks and disk."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable
from random import Random
from typing import TYPE_CHECKING, Any, Final, cast

from jobd.cluster.leadership import Leadership
from jobd.cluster.node_registry import NodeRegistry
from jobd.cluster.snapshot_schedule import SnapshotSchedule
from jobd.cluster.standby import NodeSettings, Standby
from jobd.cluster.warm_state import WarmState
from jobd.core.state import State
from jobd.journal.record import FORMAT
from jobd.model.clocks import BootMs, BootS
from jobd.model.job import new_epoch
from jobd.model.journal import BadSnapshot, JournalUnavailable, NodeEntry
from jobd.model.storage import OpenedStore
from jobd.storage.cluster.membership import StoreDamaged
from tests.proof.simulation.cluster.disk import NodeDisk
from tests.proof.simulation.cluster.server import Network
from tests.proof.simulation.cluster.webhooks import make_webhooks
from tests.proof.simulation.loop import process
from tests.proof.simulation.machine import WALL, Host, SimDaemon, owner

if TYPE_CHECKING:
    from tests.proof.simulation.cluster.cluster import Cluster

DOWNTIMES_S: Final = (0.0, 0.3, 20.0)
OPEN_AGAIN_S: Final = 0.3


class SimNode(Host):
    """A node. A supervisor starts its process again whenever it ends.

    `process` is the random id of the present process. Clients reach it while `is_in_reach`.
    """

    disk: NodeDisk

    def __init__(self, cluster: Cluster, name: str) -> None:
        super().__init__(cluster.seed, cluster.scenario, cluster.loop, cluster.trace, cluster.fired)
        options = cluster.options
        self.cluster = cluster
        self.name = name
        self.monitor, self.artifacts = cluster.monitor, cluster.artifacts
        self.dice = Random(f"{cluster.seed}: {name}")
        self.drift = self.dice.uniform(-options.drift, options.drift)
        self.wall_shift_ms = self.dice.uniform(-options.offset_ms, options.offset_ms)
        self.boot_shift_ms = self.dice.uniform(0, 1e9)
        self.clock_stepped_s = -1e9  # loop time
        self.disk = NodeDisk(self)
        self.disk.pruning = self._check_prune
        self.disk.broken = lambda message: self.monitor.fail("S7", f"{name}: {message}")
        self.url = f"http://{name}"
        self.process = ""
        self.starts = 0
        self.downtime_s = 0.3
        self.is_in_reach = True
        self.is_suspended = False
        self.is_lost = False
        self.is_needed = True
        self.is_cut_off = False
        self.daemon: LeaderDaemon | None = None
        self.standby: Standby | None = None
        self.network: Network | None = None
        self._gone = asyncio.Event()
        self._is_stopping = False
        self._tasks: list[asyncio.Task[Any]] = []
        self._main: asyncio.Task[None] | None = None

    # -- clocks

    def wall(self) -> int:
        return WALL + int(self.loop.now_s * 1000 * (1 + self.drift) + self.wall_shift_ms)

    def boot(self) -> BootMs:
        return BootMs(int(float(self.boot_s()) * 1000))

    def boot_s(self) -> BootS:
        return BootS(self.loop.now_s * (1 + self.drift) + self.boot_shift_ms / 1000)

    def _check_prune(self, before: int) -> None:
        """S13, unless this clock stepped back while the process was stopped."""
        kept_ms, keep_ms = self.wall() - before, self.scenario.schedule.journal_ms
        is_kept = kept_ms >= keep_ms or self.clock_stepped_s > self.loop.now_s - 60
        self.monitor.must(is_kept, "S13", f"journals are deleted after {kept_ms} ms")

    # -- the process

    async def keep_running(self) -> None:
        while self.is_needed and not self.cluster.off:
            self.starts += 1
            self.process = f"{self.name} {self.starts}"
            self.note("node", "start", self.process, self.disk.tables.projected_to)
            self._gone, self._is_stopping = asyncio.Event(), False
            self._tasks = []
            context = contextvars.copy_context()
            context.run(process.set, self.process)
            context.run(owner.set, self._tasks)
            self._main = self.loop.create_task(self._run(), context=context)
            await self._gone.wait()
            for task in self._tasks:
                task.cancel()
            self.note("node", "ended", self.process)
            if self.network is not None:
                await self.network.close()
            self.standby = self.daemon = self.network = None
            await asyncio.sleep(self.downtime_s)

    async def _run(self) -> None:
        """Follow, lead, and end."""
        try:
            self.network = Network(self.cluster.server, self.dice, self.cluster.count)
            self.cluster.connect(self)
            await self._open_store()
            leadership, warm = await self._follow()
            if leadership is not None:
                self.cluster.check_takeover(self, warm, leadership)
                self.daemon = LeaderDaemon(self, warm, leadership)
                self.daemon.begin()
                if self._is_stopping:
                    self.daemon.stopped.set()
                await self.daemon.gone.wait()
                self.cluster.count(f"node stops leading: {self.daemon.how}")
        except StoreDamaged:
            self.cluster.check_left_behind(self, self.disk.projected_to)
        except Exception as error:
            self.monitor.fail("S8", f"{self.process} ended by {error!r}")
        self._gone.set()

    async def _open_store(self) -> None:
        """Make tables that cannot follow the journal again from a snapshot, as ClusterStore does."""
        network, disk = self.network, self.disk
        assert network is not None
        while True:
            try:
                known = await network.snapshots()
                number = disk.tables.projected_to
                is_new = number == 0 and bool(known)
                if not is_new and await disk.is_on_branch(network):
                    return
                self.cluster.check_left_behind(self, number)
                await disk.install(network.read_snapshot(known[-1].number))
                self.cluster.count("node starts from a snapshot")
                return
            except (JournalUnavailable, BadSnapshot):
                await asyncio.sleep(OPEN_AGAIN_S)

    def _share(self) -> None:
        """Begin to register this node, and to write snapshots."""
        cluster, network = self.cluster, self.network
        assert network is not None
        registry = NodeRegistry(
            network, self._describe, on_refused=self._on_duplicate, now_s=self.boot_s, wall_ms=self.wall
        )
        schedule = SnapshotSchedule(
            network,
            cast(Any, self.disk.copies),
            registry,
            process=self.process,
            leader=self._leader,
            every_ms=cluster.options.snapshot_every_ms,
            keep_ms=1_000,
            wall_ms=self.wall,
        )
        for part in (registry, schedule):
            self.loop.create_task(part.run())

    def _leader(self) -> str | None:
        head = None if self.standby is None else self.standby.head
        return None if head is None else head.holder

    def _describe(self) -> NodeEntry:
        return NodeEntry(self.name, self.process, self.url, FORMAT, "", self.disk.tables.projected_to)

    def _on_duplicate(self, problem: str) -> None:
        """Fail, unless the clock may have drifted too far for the registry while the journal was unreachable."""
        self.monitor.must(self.drift, "S8", f"{self.process}: {problem}")
        self.cluster.count("node takes itself for a duplicate")

    async def _follow(self) -> tuple[Leadership | None, WarmState]:
        assert self.network is not None
        options = self.cluster.options
        opened = self.disk.opened()
        warm = WarmState(cast(Any, self.disk), opened, self.disk.projected_to)
        self.standby = Standby(
            self.network,
            warm,
            NodeSettings(holder=self.process, url=self.url, lease_s=options.lease_s, is_direct=options.is_direct),
            next_epoch=lambda highest: new_epoch(highest, self.wall()),
            now_s=self.boot_s,
            wall_s=lambda: self.wall() / 1000,
            refuses_connections=self._refuses_connections,
        )
        self.disk.on_quarantined = warm.quarantine
        if self._is_stopping:
            self.standby.stop()
        self._share()
        return await self.standby.run(), warm

    async def _refuses_connections(self, url: str) -> bool:
        """Return whether no process listens at an address that can be reached."""
        await asyncio.sleep(0.001)
        return self.cluster.refuses_connections(self, url)

    @property
    def is_listening(self) -> bool:
        return (
            self._main is not None
            and not self._gone.is_set()
            and (self.daemon is None or not self.daemon.stopped.is_set())
        )

    @property
    def is_serving(self) -> bool:
        return self.daemon is not None and self.daemon.is_open

    def kill(self) -> None:
        """End the process between two awaits."""
        self.resume()
        if self._gone.is_set():
            return
        if self.daemon is not None:
            self.daemon.kill()
            self.cluster.forget(self.daemon)
        for task in self._tasks:
            task.cancel()
        self._gone.set()

    def crash(self, *, power_cut: bool) -> None:
        self.kill()
        self.disk.crash(power_cut=power_cut)

    async def stop(self) -> None:
        """End as after SIGTERM."""
        self.resume()
        self._is_stopping = True
        if self.daemon is not None:
            self.daemon.stopped.set()
        elif self.standby is not None:
            self.standby.stop()
        await self._gone.wait()

    def suspend(self) -> None:
        """Stop the process as SIGSTOP does."""
        if not self.is_suspended and not self._gone.is_set():
            self.is_suspended = True
            self.loop.suspend(self.process)

    def resume(self) -> None:
        if self.is_suspended:
            self.is_suspended = False
            self.loop.resume(self.process)


class LeaderDaemon(SimDaemon):
    """The daemon of a node that leads, with the state that it has folded as a standby."""

    def __init__(self, node: SimNode, warm: WarmState, leadership: Leadership) -> None:
        super().__init__(node)
        self.node = node
        self.leadership = leadership
        self._warm = warm
        node.disk.appender.lead(leadership.append, lambda format: None)

    def begin(self) -> None:
        self._build(self._warm.opened())
        self.actor.before_batch = self._confirm_leadership
        self.leadership.on_epoch, self.leadership.on_lost = self._begin_epoch, self.actor.lose_disk
        self._renewing = self.spawn(self.leadership.run())
        self.webhooks = make_webhooks(self.node.cluster.receiver, self)
        self._delivering = self.spawn(self.webhooks.run())
        self.spawn(self._live())

    def _confirm_leadership(self) -> Awaitable[None] | None:
        """S18: a leader that the journal has replaced takes no command, reads included. One that stops may."""
        if (confirming := self.leadership.confirm()) is not None:
            self.node.cluster.count("node confirms its lease after a jump of its clocks")
            return self._check_after(confirming)
        self._check_leadership()
        return None

    async def _check_after(self, confirming: Awaitable[None]) -> None:
        await confirming
        self._check_leadership()

    def _check_leadership(self) -> None:
        is_leader = self.node.cluster.leads(self.node) or self.stopped.is_set()
        self.node.monitor.must(is_leader, "S18", f"{self.node.process} takes commands after its leadership has ended")
        self.check_clocks()

    async def _end(self) -> None:
        self.node.cluster.forget(self)
        self.webhooks.stop()
        await self._delivering
        self.leadership.stop()
        await self._renewing

    def _open_state(self, opened: OpenedStore) -> State:
        return self._warm.state

    def _begin_epoch(self, epoch: int) -> None:
        self.state.epoch, self.state.next_token = epoch, 1
