"""The start of a daemon in this process: what happens meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from jobd import logging, serving
from jobd.config import LoadedConfig
from jobd.config_loader import load
from jobd.core.state import State
from jobd.daemon import Daemon
from jobd.engine.clock import boot_clock_ms, wall_clock_ms
from jobd.engine.event_feed import EventFeed
from jobd.maintenance.due_jobs import DueJobs
from jobd.maintenance.restart_grace import GRACE_MS
from jobd.model.commands import Ping
from jobd.model.job import SECOND_MS
from jobd.model.journal import LeadershipLost
from jobd.serving import Serving
from jobd.storage.artifacts.base import ArtifactStore
from jobd.storage.store import Store
from tests.support.factories import ChangeFactory
from tests.support.memory_artifacts import MemoryArtifacts

Start = Callable[..., contextlib.AbstractAsyncContextManager[Serving]]


def loaded(tmp_path: Path, **environ: str) -> LoadedConfig:
    path = tmp_path / "config.toml"
    path.write_text(f'[worker]\nsocket = "{tmp_path}/w.sock"\n[admin]\nlisten = "unix:{tmp_path}/a.sock"\n')
    return load({}, {"ADMIN_TOKEN": "t" * 32, "JOBD_STORE_PATH": f"{tmp_path}/jobd.db", **environ}, str(path))


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Start a daemon that calls `meanwhile` before its actor runs."""

    @contextlib.asynccontextmanager
    async def started(
        meanwhile: Callable[[Daemon, Store], None], artifacts: ArtifactStore | None = None
    ) -> AsyncIterator[Serving]:
        async with contextlib.AsyncExitStack() as stack:
            store, opened = await Store.open(f"{tmp_path}/jobd.db")
            await stack.enter_async_context(store)
            daemon = Daemon(loaded(tmp_path), lambda: loaded(tmp_path), stack)

            async def keep_at_start(*_: object) -> None:
                await asyncio.sleep(0)
                meanwhile(daemon, store)

            monkeypatch.setattr(DueJobs, "keep_at_start", keep_at_start)
            daemon._passed_sockets = {}
            daemon._make_authenticators()
            await asyncio.to_thread(daemon._make_dashboard)
            await daemon._lead(store, opened, State.opened(opened), artifacts)
            assert daemon._serving is not None
            yield daemon._serving

    return started


@pytest.mark.parametrize("artifacts", [None, MemoryArtifacts(lambda: 0)])
async def test_tombstones_that_are_left_during_the_start_are_counted(
    start: Start, artifacts: ArtifactStore | None
) -> None:
    async with start(lambda _, store: store.on_tombstones(2), artifacts) as at:
        assert at._sweeps.waiting == 2


async def test_a_reload_during_a_takeover_is_applied(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "set_level", lambda level: None)  # of all tests

    def reload(daemon: Daemon, _: Store) -> None:
        daemon._apply(loaded(tmp_path, JOBD_ALERTS_PROCESSING_JOBS="7"))

    async with start(reload) as at:
        assert at.services.problems.scene.limits.processing_jobs == 7


class LostLeadership:
    def check(self) -> None:
        raise LeadershipLost("the lease is over")


async def test_a_leader_whose_lease_is_over_is_not_ready(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may wait for PostgreSQL for longer, while another node leads. A load balancer must not send it requests."""
    async with start(lambda *_: None) as at:
        monkeypatch.setattr(at, "_leadership", LostLeadership())
        assert at.services.readiness().status == "unavailable"
        monkeypatch.undo()
        assert at.services.readiness().status == "ok"


async def test_a_slow_start_ends_no_lock(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = ChangeFactory()
    created = maker.create("a")
    assert created.after is not None
    granted = maker.grant(created.after)
    assert granted.after is not None
    assert granted.after.deadlines is not None
    ending = maker.update(granted.after, deadlines=replace(granted.after.deadlines, expires=5))
    async with (await Store.open(f"{tmp_path}/jobd.db"))[0] as store:
        batch = maker.batch([created, granted, ending])
        await store.write(replace(batch, numbers=replace(batch.numbers, wall_ms=wall_clock_ms())))

    def slow_feed(*args: Any) -> EventFeed:
        until_ms = boot_clock_ms() + 10
        while boot_clock_ms() < until_ms:
            pass
        return EventFeed(*args)

    monkeypatch.setattr(serving, "EventFeed", slow_feed)
    async with start(lambda *_: None) as at:
        await at.actor.ask(Ping())
        deadlines = at.actor.state.jobs["a"].deadlines
        assert deadlines is not None
        assert deadlines.is_live(at.clock.moment().lock_ms + GRACE_MS - SECOND_MS)
