"""Fixtures for the tests of the dashboard."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobd.api import admin_routes as admin_api
from jobd.api import worker_routes as worker_api
from jobd.core.state import State
from jobd.dashboard.routes import Dashboard
from jobd.engine.actor import Actor
from jobd.engine.clock import Clock, boot_clock_ms, wall_clock_ms
from jobd.engine.idempotency import IdempotencyStore
from jobd.http.auth import Authenticator, accepted_hosts
from jobd.maintenance.cleanup_run import CleanupSchedule, MaintenanceContext
from jobd.maintenance.maintainer import Maintainer
from jobd.maintenance.plan_runner import Planner
from jobd.model.job import Policy
from jobd.monitoring.failure_groups import FailureGroups
from jobd.monitoring.timeseries import Timeseries
from tests.support.dashboard_harness import READ_ONLY_TOKEN, DashboardHarness
from tests.support.http_harness import TOKEN, FakeClock, HttpHarness
from tests.support.memory_storage import MemoryStorage


@pytest.fixture
async def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[DashboardHarness]:
    disk = MemoryStorage()
    made: list[DashboardHarness] = []

    def ahead_ms() -> int:
        return made[0].ahead_ms if made else 0

    clock = Clock(wall=lambda: wall_clock_ms() + ahead_ms(), boot=lambda: boot_clock_ms() + ahead_ms())
    actor = Actor(disk, State.opened(disk.opened()), IdempotencyStore([], 100), clock, Policy(), random=os.urandom)
    timeseries = Timeseries(clock.moment().now)
    actor.on_commit.append(timeseries.record)
    planner, failure_groups = Planner(actor, clock), FailureGroups(disk, clock.moment, 1)
    actor.on_commit.append(failure_groups.committed)
    await failure_groups.run()
    running = asyncio.create_task(actor.run())
    authenticator = Authenticator(
        "admin", tokens=[TOKEN], read_only_tokens=[READ_ONLY_TOKEN], hosts=accepted_hosts("127.0.0.1")
    )
    dashboard = await asyncio.to_thread(Dashboard, authenticator, clock_s=lambda: made[0].now_s)
    async with contextlib.AsyncExitStack() as stack:
        worker = await stack.enter_async_context(HttpHarness(worker_api.ROUTES, tmp_path, actor=actor))
        routes = (*admin_api.ROUTES, *dashboard.routes(), worker_api.DOCUMENT)
        admin = await stack.enter_async_context(
            HttpHarness(routes, tmp_path, authenticator=authenticator, admin=True, actor=actor, pages=dashboard)
        )
        actor.on_commit.append(admin.services.feed.publish)
        numbers = itertools.count(1)
        numbering_planner: Any = SimpleNamespace(
            make=lambda command, _: planner.make(command, f"plan-{next(numbers)}"),
            find=planner.find,
            apply=planner.apply,
        )
        admin.services.planner = numbering_planner
        admin.services.failures = failure_groups
        admin.services.timeseries = timeseries
        fake_clock: Any = FakeClock(admin.fakes, lambda: clock.moment().now)
        admin.services.clock = fake_clock
        actor.state.quarantined["bad-1"] = "checksum"
        context: Any = SimpleNamespace(_context=MaintenanceContext(actor, clock, CleanupSchedule(), int))
        monkeypatch.setattr(admin.services.maintainer, "take_back", partial(Maintainer.take_back, context))
        made.append(DashboardHarness(worker, admin, dashboard, disk))
        yield made[0]
        actor.end_claim_waits()
    actor.stop()
    await running
