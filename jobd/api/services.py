"""The parts of a running daemon, as used by the handlers of both APIs and the dashboard."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from msgspec import Struct

from jobd.api.probes import Probe
from jobd.engine.actor import Actor
from jobd.engine.clock import Clock
from jobd.engine.event_feed import EventFeed
from jobd.maintenance.backups import Backups
from jobd.maintenance.disk_sampler import DiskSampler
from jobd.maintenance.maintainer import Maintainer
from jobd.maintenance.outputs import Outputs
from jobd.maintenance.plan_runner import Planner
from jobd.maintenance.scrubber import Scrubber
from jobd.model import responses
from jobd.model.commands import MakePlan, Tick
from jobd.model.errors import ApiError
from jobd.monitoring.failure_groups import FailureGroups
from jobd.monitoring.health import Health
from jobd.monitoring.metrics import Metrics
from jobd.monitoring.problems.board import ProblemBoard
from jobd.monitoring.timeseries import Timeseries
from jobd.storage.artifacts.downloads import Downloads
from jobd.webhooks.manager import WebhookManager

AGREES: Final = "The wall clock agrees with the last stored time."

log = structlog.get_logger("jobd.daemon")


class Services(Struct, kw_only=True):
    """The parts of a running daemon, and the operations that need several of them.

    `is_open` is true while the listeners are open.
    """

    actor: Actor
    maintainer: Maintainer
    clock: Clock
    backups: Backups
    downloads: Downloads
    failures: FailureGroups
    feed: EventFeed
    health: Health
    metrics: Metrics
    outputs: Outputs
    planner: Planner
    problems: ProblemBoard
    scrubber: Scrubber
    disk_sampler: DiskSampler
    timeseries: Timeseries
    webhooks: WebhookManager
    is_alive: Callable[[], bool]
    store: str = ""  # its path, or IN_MEMORY
    may_serve: Callable[[], bool] = lambda: True  # false when the lease of a leader is over
    is_open: bool = False
    cluster_view: Callable[[], responses.ClusterView] = lambda: responses.ClusterView(role="single")
    step_down: Callable[[], None] | None = None  # None: there is no cluster
    refresh_nodes: Callable[[], Awaitable[None]] | None = None  # of `cluster_view`

    def readiness(self) -> Probe:
        return Probe("ok" if self.is_open and self.is_alive() and self.may_serve() else "unavailable")

    async def make_plan(self, command: MakePlan) -> responses.PlanView | ApiError:
        return await self.planner.make(command, secrets.token_hex(8))

    async def disk_space(self) -> responses.DiskView | None:
        space = await self.health.space()
        return None if space is None else responses.DiskView(space.path, space.free_bytes, space.total_bytes)

    async def metrics_text(self) -> bytes:
        await self.health.space()
        return await self.metrics.render()

    def clock_view(self) -> responses.ClockView:
        at, reason = self.clock.moment(), self.clock.suspect_reason()
        return responses.ClockView(at.now, reason is not None, reason or self.clock.behind_reason() or AGREES)

    async def accept_clock(self) -> responses.ClockView | ApiError:
        """Accept the wall clock, and commit that before the response, so that the next start trusts the clock too."""
        if (error := self.actor.full_disk.reject(Tick())) is not None:
            return error
        waiter: asyncio.Future[responses.Response | ApiError] = asyncio.get_running_loop().create_future()
        if isinstance(envelope := self.actor.send(Tick(), waiter, by="daemon"), ApiError):
            return envelope
        self.clock.accept()  # the actor has not yet looked at the clock for this command
        committed = await waiter
        return committed if isinstance(committed, ApiError) else self.clock_view()

    def quarantine(self) -> list[responses.QuarantinedJob]:
        return [
            responses.QuarantinedJob(job_id, reason) for job_id, reason in sorted(self.actor.state.quarantined.items())
        ]

    async def deliveries(
        self, webhook: str, state: responses.DeliveryState | None, before: int | None, limit: int
    ) -> responses.DeliveryPage | ApiError:
        if not self.webhooks.has(webhook):
            return unknown_webhook(webhook)
        return await self.webhooks.page(webhook, state, before, limit)


def unknown_webhook(name: str) -> ApiError:
    return ApiError("not_found", f"There is no webhook {name}. The [[webhooks]] of the configuration name them.")
