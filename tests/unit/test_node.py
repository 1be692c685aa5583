"""A node of a cluster: that it cannot start or follow, and how its configuration is compared."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from jobd import config_loader, node
from jobd.config import KEYS, Config, LoadedConfig
from jobd.config_loader import load
from jobd.daemon import Daemon
from jobd.journal.record import FORMAT
from jobd.model.journal import Fenced, Record, SharedJournal
from jobd.node import ClusterNode, config_hash
from jobd.resources import CannotStart
from jobd.storage.cluster.cluster_store import ClusterStore
from tests.support.factories import ChangeFactory
from tests.support.memory_journal import MemoryServer, MemorySharedJournal
from tests.unit.storage.cluster.test_cluster_store import leading


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryServer:
    """Return the server of the journal that nodes open."""
    server = MemoryServer()

    async def opened(_: object) -> MemorySharedJournal:
        return MemorySharedJournal(server)

    def open_store(settings: Config, journal: SharedJournal, _: object) -> Any:
        return ClusterStore.open_for(settings.store.path, journal)

    monkeypatch.setattr(node, "_open_journal", opened)
    monkeypatch.setattr(node, "open_cluster_store", open_store)
    monkeypatch.setattr(config_loader, "DEFAULT_PATH", f"{tmp_path}/etc.toml")
    return server


def configured(path: str, **flags: str) -> LoadedConfig:
    """Return the configuration of a node with its store at `path`."""
    given = {"store.path": path, "journal.url": "postgresql://db/jobd"}
    more = {name.replace("_", ".", 1): value for name, value in flags.items()}
    return load(given | more, {"ADMIN_TOKEN": "canary-admin-0123456789abcdef"}, None)


@pytest.mark.parametrize("is_broken", [True, False])
async def test_a_standby_whose_disk_fails_ends_with_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: MemoryServer, is_broken: bool
) -> None:
    maker, path = ChangeFactory(), f"{tmp_path}/b.db"
    standby = ClusterNode(await asyncio.to_thread(configured, path))

    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    async with leading(f"{tmp_path}/a.db", server) as leader, contextlib.AsyncExitStack() as stack:
        await standby.open(stack, lambda: None)
        for _ in range(2):
            await leader.store.write(maker.batch([maker.create() for _ in range(200)]))
        await leader.journal.renew(2)
        if is_broken:
            standby.store._database.before_commit = fail
            with pytest.raises(CannotStart, match=f"^{path}: disk I/O error$") as ended:
                await standby.follow(asyncio.Event())
            assert ended.value.code == 74
        else:
            monkeypatch.setattr(standby.warm, "apply", fail)
            with pytest.raises(sqlite3.OperationalError):
                await standby.follow(asyncio.Event())


async def test_a_node_that_does_not_read_the_records_does_not_lead(tmp_path: Path, server: MemoryServer) -> None:
    server.head = replace(server.head, format=FORMAT + 1)
    newer = ClusterNode(await asyncio.to_thread(configured, f"{tmp_path}/b.db"))
    async with contextlib.AsyncExitStack() as stack:
        await newer.open(stack, lambda: None)
        with pytest.raises(CannotStart, match=r"has records that node .* does not read") as ended:
            await newer.follow(asyncio.Event())
    assert (ended.value.code, server.nodes) == (78, {})


async def test_a_node_whose_artifact_store_cannot_be_used_does_not_become_a_standby(
    tmp_path: Path, server: MemoryServer
) -> None:
    """It would be shown as ready, and end when it takes over."""
    (tmp_path / "results").symlink_to(tmp_path)
    loaded = await asyncio.to_thread(configured, f"{tmp_path}/b.db", artifacts_url=f"file://{tmp_path}/results")
    async with contextlib.AsyncExitStack() as stack:
        daemon = Daemon(loaded, lambda: loaded, stack)
        daemon._passed_sockets = {}
        with pytest.raises(CannotStart, match=r"artifacts\.url") as ended:
            await daemon._follow()
    assert ended.value.code == 78


def test_a_setting_that_another_version_lacks_is_not_a_difference(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(config_loader, "DEFAULT_PATH", f"{tmp_path}/etc.toml")
    loaded, changed = configured("a.db"), configured("a.db", alerts_standby_behind="1m")
    known = config_hash(loaded)
    monkeypatch.setattr(node, "KEYS", {key: kind for key, kind in KEYS.items() if key != "alerts.standby_behind"})
    assert config_hash(loaded) == known
    monkeypatch.undo()
    assert config_hash(changed) != known


@pytest.mark.usefixtures("server")
async def test_a_reload_sets_how_long_records_are_kept(tmp_path: Path) -> None:
    standby = ClusterNode(await asyncio.to_thread(configured, f"{tmp_path}/b.db"))
    async with contextlib.AsyncExitStack() as stack:
        await standby.open(stack, lambda: None)
        standby.reload(await asyncio.to_thread(configured, f"{tmp_path}/b.db", retention_journal="1s"))
        assert standby.snapshots.keep_ms == 1_000


async def test_a_leader_that_was_fenced_does_not_show_itself_as_the_leader(
    tmp_path: Path, server: MemoryServer
) -> None:
    fenced = ClusterNode(await asyncio.to_thread(configured, f"{tmp_path}/a.db"))
    async with contextlib.AsyncExitStack() as stack:
        await fenced.open(stack, lambda: None)
        leadership = await fenced.follow(asyncio.Event())
        assert leadership is not None
        view = fenced.view()
        assert (view.role, view.epoch, view.warnings) == ("leader", leadership.epoch, [])
        other = MemorySharedJournal(server)
        await other.take_over(await other.head(), holder="b", url="http://b", epoch=leadership.epoch + 1)
        with pytest.raises(Fenced):
            await leadership.append(Record(1, 1, 1, leadership.epoch, 0, b""), 0)
        view = fenced.view()
        assert (view.role, view.leader) == ("standby", None)
        assert view.warnings == ["This node does not lead any more: another node leads the journal."]
