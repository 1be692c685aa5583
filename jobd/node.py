"""This process as a node of a cluster: its journal, its tables, and what it serves until it leads."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

import structlog

from jobd.api.standby import StandbyServices, standby_app
from jobd.cluster.leadership import Leadership
from jobd.cluster.node_registry import NodeRegistry
from jobd.cluster.snapshot_schedule import SnapshotSchedule
from jobd.cluster.standby import NodeSettings, Standby
from jobd.cluster.view import Position, cluster_view
from jobd.cluster.warm_state import WarmState
from jobd.config import KEYS, Config, LoadedConfig, value_of
from jobd.engine.clock import wall_clock_ms
from jobd.http.auth import Authenticator
from jobd.http.decoding import Limits
from jobd.http.http_app import BrowserPages, HttpApp
from jobd.http.routing import Route
from jobd.journal import record
from jobd.model.job import new_epoch
from jobd.model.journal import (
    BadRecord,
    JournalOutcomeUnknown,
    JournalUnavailable,
    LeadershipLost,
    NodeEntry,
    NodeTooOld,
)
from jobd.model.responses import ClusterView
from jobd.resources import EXIT_BUSY, EXIT_CONFIG, EXIT_IO, CannotStart, open_cluster_store
from jobd.storage.cluster.lost_records import membership_of
from jobd.storage.files import StoreError
from jobd.storage.schema import migrations

if TYPE_CHECKING:  # asyncpg is optional
    from jobd.journal.postgres.journal import PostgresJournal

# Sections and keys in which the nodes of a cluster may differ.
OWN_SETTINGS: Final = frozenset({"worker", "admin", "store", "node", "log", "journal.url"})
STOP_S: Final = 1.0  # for a read of the journal, before a standby stops

log = structlog.get_logger("jobd.daemon")


class ClusterNode:
    """One node. `open` it, serve its apps, and let it `follow` until it leads."""

    def __init__(self, loaded: LoadedConfig) -> None:
        self._loaded = loaded
        self._settings = loaded.config
        self._holder = secrets.token_hex(16)
        self._failure: CannotStart | None = None
        self.leadership: Leadership | None = None

    async def open(self, stack: contextlib.AsyncExitStack, on_locked: Callable[[], None]) -> None:
        """Open the journal and the store. `stack` closes them. Raises CannotStart."""
        settings = self._settings
        async with contextlib.AsyncExitStack() as opened:
            self._journal = await _open_journal(settings)
            opened.push_async_callback(self._journal.close)
            self.store, found = await open_cluster_store(settings, self._journal, on_locked)
            self._journal.on_timeline = self.store.keep_timeline
            stack.push_async_callback(self.store.close)
            stack.push_async_exit(opened.pop_all())  # first the journal, so that another node can lead at once
        self.warm = WarmState(self.store, found, found.last_record)
        self.store.on_quarantined = self.warm.quarantine
        self.store.on_tombstones = self.warm.expect_tombstones
        self.store.on_broken = self._fail
        node = settings.node
        self._standby = Standby(
            self._journal,
            self.warm,
            NodeSettings(
                holder=self._holder,
                url=node.advertise,
                lease_s=int(settings.journal.lease) / 1000,
                is_direct=node.direct,
                is_synchronous=settings.journal.require_sync,
            ),
            next_epoch=lambda highest: new_epoch(highest, wall_clock_ms()),
        )
        with contextlib.suppress(JournalUnavailable):
            await self._standby.read_head()  # so that the first responses name the leader
        self.registry = NodeRegistry(self._journal, self._describe, on_refused=self._on_refused)

        self.snapshots = SnapshotSchedule(
            self._journal,
            self.store,
            self.registry,
            process=self._holder,
            leader=lambda: None if self._standby.head is None else self._standby.head.holder,
            every_ms=int(settings.journal.snapshot_every),
            keep_ms=int(settings.retention.journal),
        )

    def app(
        self, authenticator: Authenticator, routes: tuple[Route, ...], limits: Limits, pages: BrowserPages | None
    ) -> HttpApp[object]:
        """Return the app of a listener, which serves what a standby does. The admin listener has pages."""
        services = StandbyServices(self.view)
        return standby_app(authenticator, routes, services, limits, admin=pages is not None, pages=pages)

    async def follow(self, stop: asyncio.Event) -> Leadership | None:
        """Follow until this node leads. Return None when `stop` is set. Raises CannotStart."""
        following = asyncio.create_task(self._standby.run(), name="standby")
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([following, stopping], return_when=asyncio.FIRST_COMPLETED)
        self._standby.stop()
        stopping.cancel()
        if not (await asyncio.wait([following], timeout=STOP_S))[0]:  # PostgreSQL does not respond
            following.cancel()
            await asyncio.wait([following])
            return None
        try:
            self.leadership = await following
        except BadRecord as error:
            with contextlib.suppress(NodeTooOld):
                await self.registry.announce()
            raise CannotStart(f"this node cannot follow the journal: {error}", EXIT_CONFIG) from error
        except StoreError as error:
            raise CannotStart(str(error), error.exit_code) from error
        except Exception as error:
            if self._failure is None:
                raise
            raise self._failure from error
        if self._failure is not None:
            raise self._failure
        if self.leadership is not None:
            try:
                await self.registry.begin_leadership()
            except NodeTooOld as error:
                raise CannotStart(str(error), EXIT_CONFIG) from error
            self.store.lead(self.leadership.append, self.registry.too_old_for)
        return self.leadership

    def reload(self, loaded: LoadedConfig) -> None:
        """Apply settings that need no restart, and compare all with those of other nodes."""
        self._loaded = loaded
        self.snapshots.keep_ms = int(loaded.config.retention.journal)

    def view(self) -> ClusterView:
        """Return the state of the cluster as this node sees it."""
        settings = self._settings
        journal = settings.journal
        return cluster_view(
            self.registry,
            self._position(),
            node=settings.node.name,
            journal=journal.name,
            lease_ms=int(journal.lease),
            require_sync=journal.require_sync,
        )

    def _position(self) -> Position:
        standby, leadership, head = self._standby, self.leadership, self._standby.head
        if leadership is None:
            return Position(
                is_leader=False,
                holder=None if head is None else head.holder,
                leader=standby.leader,
                epoch=None if head is None else head.epoch,
                record=None if head is None else head.number,
                lag_events=standby.lag_events,
                problem=standby.problem,
                unheard_ms=int(standby.unheard_s * 1000),
            )
        loss = leadership.loss
        return Position(
            is_leader=loss is None,
            holder=self._holder if loss is None else None,
            leader=self._settings.node.advertise if loss is None else None,
            epoch=leadership.epoch,
            record=leadership.acked,
            lag_events=0,
            problem=None if loss is None else f"This node does not lead any more: {loss}.",
        )

    def _describe(self) -> NodeEntry:
        node = self._settings.node
        leadership = self.leadership
        return NodeEntry(
            name=node.name,
            process=self._holder,
            url=node.advertise,
            format=record.FORMAT,
            config_hash=config_hash(self._loaded),
            projected_to=self.store.projected_to if leadership is None else leadership.acked,
            schema_version=migrations.VERSION,
            lease_ms=int(self._settings.journal.lease),
        )

    def _on_refused(self, problem: str) -> None:
        if self.leadership is None:
            self._failure = CannotStart(problem, EXIT_CONFIG)
            self._standby.stop()

    def _fail(self, error: Exception) -> None:
        """End a standby whose tables cannot be written."""
        if self._failure is None:
            code = error.exit_code if isinstance(error, StoreError) else EXIT_IO
            self._failure = CannotStart(f"{self._settings.store.path}: {error}", code)
        self._standby.stop()


async def _open_journal(settings: Config) -> PostgresJournal:
    """Open the journal. A node that has worked before follows it later if it cannot be used now."""
    from jobd.journal.postgres.journal import PostgresJournal

    section, lease_ms = settings.journal, int(settings.journal.lease)
    known = await asyncio.to_thread(membership_of, settings.store.path)
    timeline = 0 if known is None else known.timeline
    try:
        return await PostgresJournal.open(section.url, section.name, lease_ms, timeline)
    except JournalUnavailable as error:
        if known is None:
            raise CannotStart(f"[journal] {error}", error.exit_code) from None
        return PostgresJournal.later(section.url, section.name, lease_ms, known.cluster_id, timeline)


def config_hash(loaded: LoadedConfig) -> str:
    """Return a hash of the settings that the nodes of a cluster should share. It has no secrets.

    It omits defaults, so that a later version with more settings has the same hash.
    """
    keys = [key for key in KEYS if not {key, key.partition(".")[0]} & OWN_SETTINGS]
    values, defaults = ({key: value_of(each, key) for key in keys} for each in (loaded.config, Config()))
    shared = [(key, value) for key, value in values.items() if value != defaults[key]]
    webhooks = [(each.endpoint.name, each.endpoint.url, sorted(each.endpoint.events)) for each in loaded.webhooks]
    return blake2b(repr((sorted(shared), sorted(webhooks))).encode(), digest_size=8).hexdigest()


def exit_code(error: BaseException | None) -> int:
    """Return the exit code of a leader that ended because of `error`."""
    if isinstance(error, LeadershipLost | JournalOutcomeUnknown):
        return EXIT_BUSY
    return error.exit_code if isinstance(error, StoreError) else EXIT_IO
