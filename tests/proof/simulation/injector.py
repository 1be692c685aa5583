"""Inject the faults of a scenario at random times: crashes, disk and clock faults, configuration changes.

Each fault is counted by name.
"""

from __future__ import annotations

import asyncio
from random import Random
from typing import Final

from msgspec.structs import replace

from jobd.model.job import DAY_MS
from tests.proof.simulation.machine import Machine
from tests.proof.simulation.scenario import policy

BACKUPS: Final = 3
STEPS_MS: Final = (1, 40, 2_000, 30_000, 700_000)
UPKEEP: Final = (
    "find",
    "timeline",
    "expired",
    "reports",
    "prune",
    "save_figures",
    "due_tombstones",
    "update_tombstones",
    "trim_audit",
)
LEAP_MS: Final = 40 * DAY_MS
LONG_STEPS_MS: Final = (25 * 3_600_000, 8 * 86_400_000, 45 * 86_400_000)


class FaultInjector:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.dice = Random(f"{machine.seed}: chaos")

    async def live(self) -> None:
        plan = self.machine.scenario
        while not self.machine.closing and plan.faults:
            await asyncio.sleep(self.dice.expovariate(1 / plan.pace_s))
            if not self.machine.closing:
                await self._inject(self.dice.choice(plan.faults))

    async def _inject(self, name: str) -> None:
        """Inject one fault and wait until it is over."""
        machine, disk, dice = self.machine, self.machine.disk, self.dice
        match name:
            case "kill" | "power cut":
                self._crash(name)
            case "stop":
                await self._stop()
            case "restore":
                self._restore()
            case "reboot":
                machine.crash(power_cut=True)
                machine.boot_shift_ms = dice.uniform(0, 5_000) - machine.loop.now_s * 1000
                machine.fault("reboot")
            case "slow disk":
                await self._slow()
            case "full disk":
                await self._full()
            case "write error":
                disk.write_fault = "unknown"
            case "lost fsync result":
                disk.write_fault = "lost_answer"
            case "crash at a slice":
                self._crash_at_slice()
            case "slice error":
                disk.slice_fault = "unknown"
            case "lost slice result":
                disk.slice_fault = "lost_answer"
            case "torn record":
                self._tear()
            case "read error":
                await self._failing(frozenset({"load"}), 0.5)
            case "upkeep error":
                await self._fail_maintenance()
            case "rot":
                self._corrupt_row()
            case "wall step" | "long wall step":
                steps = STEPS_MS if name == "wall step" else LONG_STEPS_MS
                step_ms = dice.choice(steps) * dice.choice((1, -1)) + dice.random()
                machine.move_clocks(wall_ms=step_ms)
                machine.fault(name, step_ms)
            case "leap":
                await self._jump_clock()
            case "suspend":
                asleep_ms = dice.choice((500, 20_000, 4_000_000))
                machine.move_clocks(wall_ms=asleep_ms, boot_ms=asleep_ms)
                machine.fault(name, asleep_ms)
            case "boot step back":
                step_ms = dice.choice((1, 400, 90_000)) + dice.random()
                machine.move_clocks(boot_ms=-step_ms)
                machine.fault(name, step_ms)
            case "freeze":
                frozen_s = dice.choice((0.1, 3, 40))
                machine.fault(name, frozen_s)
                machine.loop.freeze(frozen_s)
                machine.monitor.note_freeze(frozen_s)
            case "artifacts unreachable" | "artifacts flaky" | "artifacts slow":
                await self._artifacts(name)
            case "reload":
                self._reload()
            case _:
                self._backup()

    def _crash(self, name: str) -> None:
        """Crash at once, or at a stage of the next write."""
        machine = self.machine
        downtime_s = self.dice.choice((0.0, 0.3, 20.0))

        def strike() -> None:
            machine.downtime_s = downtime_s
            machine.fault(name, downtime_s)
            machine.crash(power_cut=name == "power cut")

        if self.dice.random() < 0.6:
            stage = self.dice.choice(("entered", "written", "written", "flushed"))
            machine.disk.armed = (f"write {stage}", strike)
        else:
            strike()

    def _crash_at_slice(self) -> None:
        """Crash before the next slice, or after it."""
        machine, power_cut = self.machine, self.dice.random() < 0.5

        def strike() -> None:
            machine.fault("crash at a slice", power_cut)
            machine.crash(power_cut=power_cut)

        machine.disk.armed = (self.dice.choice(("slice begun", "slice written")), strike)

    def _tear(self) -> None:
        """Kill the daemon after the next write, and damage a record that the tables lack."""
        machine = self.machine

        def strike() -> None:
            machine.crash(power_cut=False)
            if machine.disk.tear():
                machine.fault("torn record")

        machine.disk.armed = ("write flushed", strike)

    async def _stop(self) -> None:
        machine, daemon = self.machine, self.machine.daemon
        if daemon is None:
            return
        machine.downtime_s = self.dice.choice((0.0, 0.3, 20.0))
        machine.fault("stop")
        began_s = machine.loop.now_s
        await daemon.stop()
        took_s = machine.loop.now_s - began_s
        if took_s > 60 and "freeze" not in machine.scenario.faults:
            machine.monitor.fail("L1", f"a stop took {took_s:.0f} s")

    def _backup(self) -> None:
        machine = self.machine
        if machine.disk.is_torn:  # no daemon runs that could make a backup
            return
        machine.fault("backup")
        machine.backups = [*machine.backups[1 - BACKUPS :], machine.back_up()]

    def _restore(self) -> None:
        machine = self.machine
        if not machine.backups:
            self._backup()
            return
        backup = self.dice.choice(machine.backups)
        machine.downtime_s = 0.3
        machine.fault("restore", backup[0].tables.numbers)
        machine.crash(power_cut=False)
        machine.restore(backup)

    async def _slow(self) -> None:
        machine = self.machine
        machine.disk.slowness_s = self.dice.choice((0.02, 0.5, 2.0))
        machine.fault("slow disk", machine.disk.slowness_s)
        await asyncio.sleep(self.dice.uniform(0.5, 6))
        machine.disk.slowness_s = 0.0

    async def _full(self) -> None:
        """Fill the disk in steps, then free it."""
        machine, dice = self.machine, self.dice
        for _ in range(dice.randint(1, 2)):
            machine.disk.full = dice.randint(1, 3)
            machine.fault(f"full disk {machine.disk.full}")
            if dice.random() < 0.15:
                self._crash("kill")
            await asyncio.sleep(dice.uniform(0.2, 8))
        machine.disk.full = 0
        machine.note("fault", "the disk has space")

    async def _failing(self, methods: frozenset[str], longest_s: float) -> None:
        machine = self.machine
        machine.disk.failing = methods
        machine.had_read_errors = True
        machine.note("fault", "failing", sorted(methods))
        for method in sorted(methods):
            machine.fired[f"fault failing {method}"] += 1
        await asyncio.sleep(self.dice.uniform(0.05, longest_s))
        machine.disk.failing = frozenset()

    async def _fail_maintenance(self) -> None:
        """Fail one or more of the calls that cleanup and queries make outside batches."""
        methods = frozenset(self.dice.sample(UPKEEP, self.dice.randint(1, len(UPKEEP))))
        # Tombstones are updated only while some are due, which takes a while.
        longest_s = (8, 60, 200, 200) if "update_tombstones" in methods else (8, 8, 8, 200)
        await self._failing(methods, self.dice.choice(longest_s))

    async def _jump_clock(self) -> None:
        """Set the wall clock far ahead for a while, then correct it. No job may age by it unless it is accepted."""
        machine = self.machine
        machine.jump_clock(LEAP_MS)
        machine.fault("leap")
        await asyncio.sleep(self.dice.uniform(0.2, 30))
        machine.jump_clock(-LEAP_MS)

    def _corrupt_row(self) -> None:
        machine = self.machine
        seqs = list(machine.disk.jobs)
        if seqs:
            seq, payload = self.dice.choice(seqs), self.dice.random() < 0.5
            machine.fault("rot payload" if payload else "rot row", machine.disk.jobs[seq].id)
            machine.disk.corrupt(seq, payload=payload, stays=self.dice.choice((0, 0, 1, 3)))

    async def _artifacts(self, name: str) -> None:
        machine = self.machine
        machine.artifacts.fault = name.partition(" ")[2]
        machine.fault(name)
        await asyncio.sleep(self.dice.choice((2, 20, 400)))
        machine.artifacts.fault = None

    def _reload(self) -> None:
        machine = self.machine
        machine.next_policy = replace(policy(self.dice), artifacts=machine.scenario.policy.artifacts)
        machine.fault("reload", machine.next_policy)
        if machine.daemon is not None:
            machine.daemon.actor.policy = machine.next_policy
            machine.daemon.clock.keep_ms = machine.next_policy.shortest_keep_ms
