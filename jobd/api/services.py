"""What a request may ask of the daemon beside the actor: cleanup, health, alerts, metrics, the clock, a backup, events,
stored results.

Wires; decides nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from itertools import islice

import structlog
from msgspec import Struct

from jobd.engine.actor import Actor
from jobd.engine.change_watchers import Watcher
from jobd.engine.clock import Clock
from jobd.engine.event_feed import EventFeed, Subscriber
from jobd.maintenance.backups import Backup, Backups
from jobd.maintenance.maintainer import Maintainer
from jobd.maintenance.plans import Planner
from jobd.maintenance.preview import SCAN_S
from jobd.maintenance.scrubber import Scrubber
from jobd.model.commands import MakePlan, Operator, TakeBack, Tick
from jobd.model.errors import ApiError
from jobd.model.events import EventFilter
from jobd.model.responses import (
    AlertView,
    BackupView,
    CheckedRows,
    CleanupReport,
    CleanupState,
    ClockView,
    DeliveryPage,
    DeliveryState,
    DeliveryView,
    DiskView,
    FailuresView,
    HealthView,
    PlanResult,
    PlanView,
    PreviewView,
    ProcessStats,
    QuarantinedJob,
    RecoverStuckView,
    Resent,
    TakeBackView,
    WebhookView,
)
from jobd.model.storage import DiskFull
from jobd.monitoring.alerts import Alerts
from jobd.monitoring.failure_groups import FailureGroups
from jobd.monitoring.health import Health
from jobd.monitoring.metrics import Metrics
from jobd.storage.artifacts.downloads import Download, Downloads
from jobd.webhooks.manager import WebhookManager

log = structlog.get_logger("jobd.daemon")


class Services(Struct):
    """The parts of a running daemon. `is_open` is false before the doors are open and once they close."""

    actor: Actor
    copies: Backups
    row_walk: Scrubber
    clock_: Clock
    cleaner: Maintainer
    health_: Health
    alerts_: Alerts
    metrics_: Metrics
    feed: EventFeed
    downloads: Downloads
    planner: Planner
    failures_: FailureGroups
    webhooks_: WebhookManager
    runs: Callable[[], bool]
    is_open: bool = False

    async def run_cleanup(self, *, forced: bool) -> CleanupReport:
        return await self.cleaner.run_cleanup(forced=forced)

    def cleanup_state(self) -> CleanupState:
        return self.cleaner.state()

    async def recover_stuck(self, operator: Operator | None, reason: str | None) -> RecoverStuckView | ApiError:
        return await self.cleaner.recover_stuck(operator, reason)

    async def take_back(self, command: TakeBack, operator: Operator | None) -> TakeBackView | ApiError:
        return await self.cleaner.take_back(command, operator)

    def failures(self, limit: int) -> FailuresView:
        return self.failures_.view(limit)

    async def preview(self, look_s: float = SCAN_S) -> PreviewView | ApiError:
        return await self.cleaner.preview(look_s)

    async def make_plan(self, asked: MakePlan) -> PlanView | ApiError:
        return await self.planner.make(asked, secrets.token_hex(8))

    def plan(self, plan_id: str) -> PlanView | ApiError:
        return self.planner.find(plan_id)

    async def apply_plan(self, plan_id: str, operator: Operator) -> PlanResult | ApiError:
        return await self.planner.apply(plan_id, operator)

    async def health(self) -> HealthView:
        return await self.health_.view()

    def alerts(self) -> list[AlertView]:
        return self.alerts_.evaluate()

    async def disk_space(self) -> DiskView | None:
        space = await self.health_.space()
        return None if space is None else DiskView(space.path, space.free_bytes, space.total_bytes)

    async def metrics(self) -> bytes:
        await self.health_.space()
        return await self.metrics_.render()

    async def vitals(self) -> ProcessStats:
        return await self.metrics_.vitals()

    async def reports(self, limit: int) -> list[CleanupReport]:
        return await self.cleaner.reports(limit)

    def clock(self) -> ClockView:
        at, doubt = self.clock_.moment(), self.clock_.doubt()
        return ClockView(at.now, doubt is not None, doubt or "The wall clock is in step with the store.")

    async def accept_clock(self) -> ClockView | ApiError:
        """Accept the clock. The response follows the commit, so that the next start trusts the clock too."""
        refusal = self.actor.full_disk.refuse(Tick())
        if refusal is not None:
            return refusal
        self.clock_.accept()
        kept = await self.actor.ask(Tick(), by="daemon")
        return kept if isinstance(kept, ApiError) else self.clock()

    def quarantine(self) -> list[QuarantinedJob]:
        return [QuarantinedJob(job_id, reason) for job_id, reason in sorted(self.actor.book.quarantined.items())]

    def queue_names(self, most: int) -> list[str]:
        """The first names of queues, for who is about to write one: without their counts it is no view of jobs."""
        return list(islice(self.actor.book.queue_names, most))

    async def backup(self, id_: str) -> Backup | ApiError:
        log.info("backup_started", by="admin")
        return await self.copies.begin(id_)

    async def check_rows(self, cursor: str | None) -> CheckedRows | ApiError:
        return await self.row_walk.scan(cursor)

    def backups(self) -> list[BackupView]:
        return self.copies.views()

    def listen(self, wanted: EventFilter, *, follow: bool, cut: Callable[[], None]) -> Subscriber:
        return self.feed.listen(wanted, follow=follow, cut=cut)

    def watch(self, *, queue: str | None, job_id: str | None, cut: Callable[[], None]) -> Watcher:
        return self.feed.watch(queue=queue, job_id=job_id, cut=cut)

    def has_artifacts(self) -> bool:
        return self.downloads.has_store

    async def download(self, key: str, cut: Callable[[], None]) -> Download:
        return await self.downloads.begin(key, cut)

    def webhooks(self) -> list[WebhookView]:
        return self.webhooks_.views()

    async def deliveries(
        self, webhook: str, state: DeliveryState | None, before: int | None, limit: int
    ) -> DeliveryPage | ApiError:
        if not self.webhooks_.has(webhook):
            return _no_webhook(webhook)
        return await self.webhooks_.page(webhook, state, before, limit)

    async def given_up(self, webhook: str) -> tuple[int, int]:
        return await self.webhooks_.given_up(webhook)

    async def deliver_again(self, webhook: str, delivery: int) -> DeliveryView | ApiError:
        if not self.webhooks_.has(webhook):
            return _no_webhook(webhook)
        try:
            found = await self.webhooks_.redeliver(webhook, delivery)
        except DiskFull:
            return await self._no_outbox()
        if found is None:
            return ApiError("not_found", f"Webhook {webhook} has no delivery {delivery}, or has it no more.")
        log.info("webhook_sent_again", webhook=webhook, delivery=delivery)
        return found

    async def deliver_all_again(self, webhook: str, upto: int | None) -> Resent | ApiError:
        if not self.webhooks_.has(webhook):
            return _no_webhook(webhook)
        try:
            count = await self.webhooks_.redeliver_all(webhook, upto)
        except DiskFull:
            return await self._no_outbox()
        log.info("webhook_all_sent_again", webhook=webhook, count=count)
        return Resent(count)

    async def test_webhook(self, webhook: str) -> DeliveryView | ApiError:
        if not self.webhooks_.has(webhook):
            return _no_webhook(webhook)
        try:
            sent = await self.webhooks_.test(webhook)
        except DiskFull:
            return await self._no_outbox()
        log.info("webhook_tested", webhook=webhook)
        return sent

    async def _no_outbox(self) -> ApiError:
        await self.health_.space()
        return self.actor.full_disk.refusal(
            "the outbox of the webhook cannot be written. Free some space; jobd tries again every second."
        )

    def is_ready(self) -> bool:
        return self.is_open and self.runs()

    def is_alive(self) -> bool:
        return self.runs()


def _no_webhook(name: str) -> ApiError:
    return ApiError("not_found", f"There is no webhook {name} in the configuration. Its [[webhooks]] name them.")
