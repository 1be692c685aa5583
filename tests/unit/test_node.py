"""A node of a cluster that stops following."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from pathlib import Path

import pytest

from jobd import config_loader, node
from jobd.config_loader import load
from jobd.node import ClusterNode
from jobd.resources import CannotStart
from jobd.storage.cluster.store import ClusterStore
from tests.support.factories import ChangeFactory
from tests.support.memory_journal import MemoryServer, MemorySharedJournal
from tests.unit.storage.cluster.test_store import leading


@pytest.mark.parametrize("is_broken", [True, False])
async def test_a_standby_whose_disk_fails_ends_with_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_broken: bool
) -> None:
    server, maker, path = MemoryServer(), ChangeFactory(), f"{tmp_path}/b.db"

    async def opened(_: object) -> MemorySharedJournal:
        return MemorySharedJournal(server)

    monkeypatch.setattr(node, "_open_journal", opened)
    monkeypatch.setattr(node, "open_cluster_store", lambda _, journal, __: ClusterStore.open_for(path, journal))
    monkeypatch.setattr(config_loader, "DEFAULT_PATH", f"{tmp_path}/etc.toml")
    flags = {"store.path": path, "journal.url": "postgresql://db/jobd"}
    loaded = await asyncio.to_thread(load, flags, {"ADMIN_TOKEN": "canary-admin-0123456789abcdef"}, None)
    standby = ClusterNode(loaded)

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
