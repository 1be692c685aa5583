"""Inject the faults of several nodes, their journal and the networks between them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

from tests.proof.simulation.cluster.cluster import Cluster
from tests.proof.simulation.cluster.node import DOWNTIMES_S, SimNode
from tests.proof.simulation.cluster.scenario import LEADER_FAULTS
from tests.proof.simulation.injector import STEPS_MS


class ClusterFaultInjector:
    """Injects the faults of a scenario at random times. Faults that last overlap with others."""

    def __init__(self, cluster: Cluster) -> None:
        self.machine = cluster
        self.dice = Random(f"{cluster.seed}: chaos")
        self._lasting: dict[asyncio.Task[None], None] = {}  # in order, unlike a set

    async def live(self) -> None:
        plan = self.machine.scenario
        while not self.machine.closing and plan.faults:
            await asyncio.sleep(self.dice.expovariate(1 / plan.pace_s))
            if not self.machine.closing:
                task = asyncio.create_task(self._inject(self.dice.choice(plan.faults)))
                self._lasting[task] = None
                task.add_done_callback(self._lasting.pop)
        for task in list(self._lasting):
            await task

    def _node(self, name: str) -> SimNode:
        cluster = self.machine
        leader = next((node for node in cluster.nodes if cluster.leads(node)), None)
        if leader is not None and self.dice.random() < (0.7 if name in LEADER_FAULTS else 0.5):
            return leader
        return self.dice.choice(cluster.nodes)

    @asynccontextmanager
    async def _disturbed(self) -> AsyncIterator[None]:
        cluster = self.machine
        cluster.disturbances += 1
        try:
            yield
        finally:
            cluster.disturbances -= 1
            cluster.disturbed_s = cluster.loop.now_s

    async def _inject(self, name: str) -> None:
        """Inject one fault and wait until it is over."""
        node = self._node(name)
        self.machine.fault(name, node.name)
        async with self._disturbed():
            await self._inject_into(node, name)

    async def _inject_into(self, node: SimNode, name: str) -> None:
        cluster, dice, lease_s = self.machine, self.dice, self.machine.options.lease_s
        network = node.network
        match name:
            case "kill" | "power cut" | "empty store":
                node.downtime_s = dice.choice(DOWNTIMES_S)
                node.crash(power_cut=name != "kill")
                if name == "empty store":
                    node.disk.empty()
            case "machine lost":
                node.is_lost, node.downtime_s = True, dice.choice(DOWNTIMES_S)
                node.crash(power_cut=True)
                await asyncio.sleep(node.downtime_s)
                node.is_lost = False
            case "stop":
                node.downtime_s = dice.choice(DOWNTIMES_S)
                await node.stop()
            case "process stopped":
                await self._suspend(node)
            case "partition from the journal":
                node.is_cut_off = True
                cluster.connect(node)
                await asyncio.sleep(lease_s * dice.choice((0.1, 0.5, 1.0, 3.0)))
                node.is_cut_off = False
                cluster.connect(node)
            case "partition from clients":
                node.is_in_reach = False
                await asyncio.sleep(dice.choice((0.3, 5.0)))
                node.is_in_reach = True
            case "journal unreachable":
                await self._cut_off_all(dice.choice((0.1, 0.5, 1.0, 3.0)) * lease_s)
            case "journal slow":
                await self._slow_down()
            case "journal full":
                cluster.server.is_full = True
                await asyncio.sleep(dice.choice((0.3, 5.0)))
                cluster.server.is_full = False
            case "failover":
                cluster.server.fail_over()
            case "full disk":
                node.disk.full = 3
                await asyncio.sleep(dice.choice((0.3, 8.0)))
                node.disk.full = 0
            case "slow disk":
                node.disk.slowness_s = dice.choice((0.02, 0.5))
                await asyncio.sleep(dice.choice((0.3, 8.0)))
                node.disk.slowness_s = 0.0
            case "wall step":
                node.wall_shift_ms += dice.choice(STEPS_MS) * dice.choice((1, -1)) + dice.random()
                node.clock_stepped_s = cluster.clocks_moved_s = cluster.loop.now_s
            case _:
                if network is not None:
                    network.lost = name.removeprefix("lost ")

    async def _suspend(self, node: SimNode) -> None:
        """Stop a process, now or with a statement on its way, and let it go on, perhaps after its lease."""
        cluster, dice, which, network = self.machine, self.dice, node.process, node.network
        if network is not None and dice.random() < 0.6:
            network.on_sent = node.suspend
            await asyncio.sleep(cluster.options.lease_s / 2)
            network.on_sent = None
        elif node.process == which:
            node.suspend()
        suspended_s = cluster.options.lease_s * dice.choice((0.2, 0.8, 1.1, 2.0, 8.0))
        cluster.monitor.note_freeze(suspended_s)
        await asyncio.sleep(suspended_s)
        if node.process == which:
            node.resume()

    async def _cut_off_all(self, for_s: float) -> None:
        cluster = self.machine
        for node in cluster.nodes:
            node.is_cut_off = True
            cluster.connect(node)
        await asyncio.sleep(for_s)
        for node in cluster.nodes:
            node.is_cut_off = False
            cluster.connect(node)

    async def _slow_down(self) -> None:
        cluster, slowness_s = self.machine, self.dice.choice((0.05, 0.3, 1.0))
        until_s = cluster.loop.now_s + self.dice.choice((1.0, 8.0))
        while cluster.loop.now_s < until_s and not cluster.closing:
            for node in cluster.nodes:
                if node.network is not None:
                    node.network.slowness_s = slowness_s
            await asyncio.sleep(0.5)
        for node in cluster.nodes:
            if node.network is not None:
                node.network.slowness_s = 0.0
