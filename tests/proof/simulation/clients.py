"""The clients of a simulated daemon: creators, workers and operators.

They lose responses, repeat requests, pause for longer than their locks last, end without a message, and ignore
`lock_lost`. They know only the responses that they received.
"""

from __future__ import annotations

import asyncio
from random import Random
from typing import Any

from msgspec.structs import replace

from jobd.core import guards
from jobd.model import commands
from jobd.model.commands import (
    AnyCommand,
    AppendOutput,
    Claim,
    Complete,
    Create,
    Extend,
    Fail,
    IdempotencyKey,
    Progress,
    Release,
    Start,
    TakeBack,
)
from jobd.model.errors import ApiError
from jobd.model.job import SECOND_MS
from jobd.model.responses import GrantView, Response
from tests.proof.simulation.machine import Machine, SimCall
from tests.proof.simulation.requests import RequestGenerator
from tests.support.calls import CALLS

KEYED = tuple({call.command for call in CALLS.values() if call.options.get("key")})
IN_DOUBT = ("outcome_unknown", "shutting_down", "overloaded")
OLD_LOCKS = 6


class SimClient:
    """A client that sends requests until the machine closes."""

    def __init__(self, machine: Machine, name: str, *, admin: bool = False) -> None:
        self.machine = machine
        self.name = name
        self.admin = admin
        self.dice = Random(f"{machine.seed}: {name}")
        self.requests = RequestGenerator(self.dice, machine.scenario, machine.disk)
        self._keys = 0

    async def live(self) -> None:
        while not self.machine.closing:
            await self.think()
            await self.act()

    async def act(self) -> None:
        raise NotImplementedError

    async def think(self, mean_s: float | None = None) -> None:
        await asyncio.sleep(self.dice.expovariate(1 / (mean_s or self.machine.scenario.think_s)))

    def has(self, mishap: str, chance: float) -> bool:
        """Draw whether this mishap happens now."""
        if self.dice.random() >= chance or mishap not in self.machine.scenario.mishaps:
            return False
        if mishap != "client disconnects":  # counted if it had an effect
            self.machine.fired[f"mishap {mishap}"] += 1
        return True

    async def ask(self, command: AnyCommand, *, tries: int = 4) -> Response | ApiError | None:
        """Repeat a request with the same key until its outcome is known. Return None if the client gives up."""
        key = self._key(command)
        response: Response | ApiError | None = None
        for _ in range(tries):
            if key is not None and self.has("concurrent repeat", 0.1):
                first, second = await asyncio.gather(self._once(command, key), self._once(command, key))
                response = first or second
            else:
                response = await self._once(command, key)
            if response is not None and not (isinstance(response, ApiError) and response.code in IN_DOUBT):
                return response
            if self.machine.closing or self.dice.random() < 0.15:
                return response
            await self.think()
        return response

    async def _once(self, command: AnyCommand, key: IdempotencyKey | None) -> Response | ApiError | None:
        by = f"worker:{command.worker}" if isinstance(command, (Start, Claim)) else "admin" if self.admin else "client"
        hang_up_s = None
        if self.has("client disconnects", 0.25 if isinstance(command, (Start, Claim)) else 0.05):
            hang_up_s = self.dice.expovariate(
                self.dice.choice((800, 800, 100, 1))
            )  # ideally while the batch is written
        unread = self.has("response not read", 0.08)
        return await self.machine.call(SimCall(self.name, command, by, self.admin, key, hang_up_s, unread))

    def _key(self, command: AnyCommand) -> IdempotencyKey | None:
        """Return a new key, or by mistake one that another client used for the same path."""
        if not isinstance(command, KEYED) or self.dice.random() < 0.4:
            return None
        path = f"{type(command).__name__} {getattr(command, 'id', '') if not isinstance(command, Create) else ''}"
        if self.has("reused key", 0.2):
            return IdempotencyKey(f"{path} shared {self.dice.randrange(3)}", guards.digest(command))
        self._keys += 1
        return IdempotencyKey(f"{path} {self.name} {self._keys}", guards.digest(command))


class SimCreator(SimClient):
    async def act(self) -> None:
        now = self.machine.wall()
        if self.requests.time_dice.random() < 0.05:
            await self.ask(self.requests.schedule())
        roll = self.dice.random()
        if roll < 0.6:
            await self.ask(self.requests.create(now))
        elif roll < 0.75:
            await self.ask(self.requests.bulk(now))
        elif roll < 0.82:
            await self.ask(self.requests.cancel())
        else:
            await self.ask(self.requests.read())


class SimOperator(SimClient):
    """An operator that makes a dry run first in some seeds."""

    def __init__(self, machine: Machine, name: str) -> None:
        super().__init__(machine, name, admin=True)
        dice = Random(f"{machine.seed}: dry runs")  # its own dice, so that the other draws stay the same
        self._careful = dice if dice.random() < 0.3 else None

    async def act(self) -> None:
        roll = self.dice.random()
        if roll < 0.7:
            command = self.requests.operation(self.machine.wall())
            # `dry_run` of a TakeBack is drawn with the command, and an ImportCheck always is one.
            may_be_dry = "dry_run" in command.__struct_fields__ and not isinstance(command, TakeBack)
            if may_be_dry and self._careful is not None and self._careful.random() < 0.4:
                await self.machine.call(SimCall(self.name, replace(command, dry_run=True), "admin", admin=True))
            await self.ask(command)
        elif roll < 0.85:
            await self.ask(self.requests.read())
        elif roll < 0.9:
            await self.machine.call(SimCall("cleanup", self.requests.maintenance(self.machine.wall()), "cleanup"))
        else:
            await self._run_maintenance(roll)

    async def _run_maintenance(self, roll: float) -> None:
        """Call the maintainer outside the mailbox. If the daemon dies meanwhile, there is no response."""
        daemon = self.machine.daemon
        if daemon is None or not daemon.is_open:
            return
        if roll < 0.93:
            self.machine.fired["operator recover-stuck"] += 1
            work: Any = daemon.maintainer.recover_stuck(commands.Operator("", "simulated", "recovery"))
        elif roll < 0.97:
            self.machine.fired["operator cleanup"] += 1
            work = daemon.maintainer.run_cleanup(forced=self.dice.random() < 0.5)
        else:
            self.machine.accept_clock(daemon)
            return
        await asyncio.wait([daemon.spawn(work)])


class SimWorker(SimClient):
    """A worker. `old` are locks that it has held, for use after their end."""

    def __init__(self, machine: Machine, name: str) -> None:
        super().__init__(machine, name)
        self.old: list[tuple[str, str]] = []
        self.lacks_all = self.dice.random() < 0.3  # releases every job that it is granted

    async def act(self) -> None:
        roll = self.dice.random()
        if roll < 0.08 and self.old:
            await self.ask(self._late_call(*self.dice.choice(self.old)), tries=1)
        elif roll < 0.12:
            await self.ask(self.requests.read())
        elif roll < 0.3:
            response = await self.ask(self.requests.start(self.name))
            if isinstance(response, Response) and response.grants:
                await self.work(response.data)
        else:
            response = await self.ask(self.requests.claim(self.name))
            if isinstance(response, Response):
                for granted in response.data.grants:
                    await self.work(granted)

    async def ask(self, command: AnyCommand, *, tries: int = 4) -> Response | ApiError | None:
        """Store the result before completing the job, which may take a while."""
        if isinstance(command, Complete) and command.storage_key is not None:
            self.machine.artifacts.store(command.storage_key, command.lock_id)
            if self.dice.random() < 0.4:
                await asyncio.sleep(self.dice.choice((0.05, 1.0, 4.0)))
        return await super().ask(command, tries=tries)

    def _late_call(self, job_id: str, lock_id: str) -> AnyCommand:
        return self.dice.choice((self._heartbeat, self._ending))(job_id, lock_id)

    def _heartbeat(self, job_id: str, lock_id: str) -> AnyCommand:
        if self.dice.random() < 0.6:
            progress = self.dice.choice((0, 10, 42.5, 100))
            return Progress(id=job_id, lock_id=lock_id, progress=progress, message=self.requests.maybe(0.3, "so far"))
        return Extend(id=job_id, lock_id=lock_id, additional_ms=self.requests.maybe(0.5, 1, 2_000, 30_000, 600_000))

    def _ending(self, job_id: str, lock_id: str) -> AnyCommand:
        requests, roll = self.requests, self.dice.random()
        if roll < 0.55:
            return Complete(
                id=job_id,
                lock_id=lock_id,
                download_url=requests.maybe(0.5, "https://x/y"),
                storage_key=requests.maybe(0.6, "k/1", "k/1", "../k", "k/2", f"own/{lock_id}", f"own/{lock_id}"),
                expires_at=requests.maybe(0.2, self.machine.wall() + 5_000, self.machine.wall() - 5_000),
            )
        if roll < 0.85:
            return Fail(
                id=job_id,
                lock_id=lock_id,
                error_message="it broke",
                retry=self.dice.random() < 0.8,
                retry_after_ms=requests.maybe(0.3, 0, 900, 20_000),
            )
        return Release(id=job_id, lock_id=lock_id, delay_ms=requests.maybe(0.3, 0, 900))

    async def work(self, granted: GrantView) -> None:
        job_id, lock_id = granted.job.id, granted.lock_id
        self.old = [*self.old[1 - OLD_LOCKS :], (job_id, lock_id)]
        if self.has("worker dies", 0.12):
            return
        if self.lacks_all and self.has("worker releases", 0.95):
            await self.ask(Release(id=job_id, lock_id=lock_id, delay_ms=self.requests.maybe(0.1, 0, 900)))
            return
        for _ in range(self.dice.randrange(4)):
            await self._report_progress(granted)
            if self.requests.time_dice.random() < 0.1:
                await self.ask(AppendOutput(id=job_id, lock_id=lock_id, text="line\n"), tries=1)
            response = await self.ask(self._heartbeat(job_id, lock_id))
            if isinstance(response, ApiError) and not self.has("worker ignores lock_lost", 0.3):
                return
            if self.machine.closing or self.has("worker dies", 0.05):
                return
        await self._report_progress(granted)
        ending = self._ending(job_id, lock_id)
        await self.ask(ending)
        if self.has("repeated ending", 0.2):
            release = Release(id=job_id, lock_id=lock_id)  # as a `finally` block does
            await self.ask(self.dice.choice((ending, ending, release, self._ending(job_id, lock_id))))

    async def _report_progress(self, granted: GrantView) -> None:
        ttl_s = granted.ttl_ms / SECOND_MS
        if self.has("worker sleeps", 0.1):
            await asyncio.sleep(ttl_s * self.dice.choice((1.0, 1.2, 3.0)))
        else:
            await self.think(min(ttl_s / 4, self.machine.scenario.think_s * 2))
