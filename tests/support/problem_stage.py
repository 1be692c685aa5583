"""Problems of a virtual engine, evaluated every few seconds while scripted workers and creators act."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from jobd.config import AlertsSection
from jobd.model.commands import About, Claim, Complete, Create, Extend
from jobd.model.job import HOUR_MS
from jobd.model.problems import Problem
from jobd.monitoring.health import Health
from jobd.monitoring.problems.board import EVALUATE_EVERY_S, ProblemBoard
from jobd.monitoring.problems.condition import Scene
from tests.support.virtual_engine import VirtualEngine, seconds


def problems_of(engine: VirtualEngine, thresholds: AlertsSection | None = None, **settings: Any) -> ProblemBoard:
    """Return problems that open and close at once, on a daemon that has been up for long."""
    health = Health(engine.actor, engine.clock, engine.maintainer)
    times = {name: settings.pop(name, 0) for name in ("hold_ms", "clear_ms")}
    scene = Scene(state=engine.state, clock=engine.clock, health=health, cleanup=engine.maintainer, **settings)
    scene.limits = thresholds or scene.limits
    made = ProblemBoard(scene, **times)
    made._first = engine.clock.boot_ms() - HOUR_MS
    engine.actor.on_commit.append(made.committed)
    return made


class Stage:
    """`listed` has every problem that was ever listed, as last seen. `opened` has each condition that ever was open."""

    def __init__(self, engine: VirtualEngine, **settings: Any) -> None:
        self.engine = engine
        self.problems = problems_of(engine, hold_ms=30_000, clear_ms=60_000, **settings)
        self.listed: dict[str, Problem] = {}
        self.opened: dict[str, Problem] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Stage:
        self.engine.run_maintainer()
        self.act(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        failed = [each for each in ended if isinstance(each, Exception)]
        assert not failed, failed

    def act(self, script: Coroutine[Any, Any, None]) -> None:
        """Run a script in the background until the end."""
        self._tasks.append(asyncio.create_task(script))

    async def _watch(self) -> None:
        while True:
            await self.problems.scene.health.view()
            await self.problems.check()
            self.listed |= {each.id: each for each in self.problems.view().problems}
            for problem in self.problems.life.open_problems():
                self.opened[problem.condition] = problem
            await seconds(EVALUATE_EVERY_S)

    async def create(self, queue: str, count: int = 1, **fields: Any) -> None:
        for _ in range(count):
            await self.engine.yes(Create(queue=queue, **fields))

    async def creates(self, queue: str, every_s: float, **fields: Any) -> None:
        while True:
            await self.create(queue, **fields)
            await seconds(every_s)

    async def claim(self, queue: str, worker: str, wait_ms: int = 0, **fields: Any) -> list[Any]:
        about = About(host=fields.pop("host", None), version=fields.pop("version", None))
        claim = Claim(queues=[queue], worker=worker, wait_ms=wait_ms, about=about, lock_ttl_ms=60_000, **fields)
        grants: list[Any] = (await self.engine.yes(claim)).grants
        return grants

    async def works(self, queue: str, worker: str, takes_s: float, **fields: Any) -> None:
        """Be a worker that completes each job after some time, and extends its lock meanwhile."""
        while True:
            for granted in await self.claim(queue, worker, 30_000, stall_after_ms=0, **fields):
                await self.hold(granted, takes_s)
                await self.engine.yes(Complete(id=granted.job.id, lock_id=granted.lock_id))

    async def hold(self, granted: Any, for_s: float) -> None:
        """Extend the lock of a grant, as workers do."""
        while for_s > 0:
            await seconds(min(for_s, 20))
            for_s -= 20
            await self.engine.yes(Extend(id=granted.job.id, lock_id=granted.lock_id))
