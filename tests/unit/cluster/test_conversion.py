"""A cluster made from a store, and a store made from a cluster."""

from __future__ import annotations

import asyncio
import inspect
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from jobd.cluster import conversion
from jobd.cluster.conversion import CannotConvert
from jobd.journal.record import CLOSING, FORMAT
from jobd.model.journal import BadRecord, JournalUnavailable, NodeEntry
from jobd.model.storage import DiskFull
from jobd.storage import files
from jobd.storage.cluster import joining
from jobd.storage.cluster.cluster_store import ClusterStore
from jobd.storage.cluster.joining import FIRST_RECORD
from jobd.storage.cluster.membership import WrongCluster
from jobd.storage.files import StoreUnreadable, read_epoch
from tests.support.factories import ChangeFactory
from tests.support.memory_journal import MemoryServer, MemorySharedJournal
from tests.support.store_files import assert_store_holds, fill, make_empty_store, make_store
from tests.support.virtual_engine import in_virtual_time


@pytest.fixture
def server() -> MemoryServer:
    server = MemoryServer()
    server.head = replace(server.head, number=FIRST_RECORD)
    return server


async def write(path: str, server: MemoryServer, maker: ChangeFactory) -> None:
    """Lead for a moment."""
    journal = MemorySharedJournal(server)
    store, _ = await ClusterStore.open_for(path, journal)
    async with store:
        head = await journal.head()
        assert await journal.take_over(head, holder="a", url="http://a", epoch=1) is not None
        store.lead(journal.append, lambda format: None)
        await store.write(maker.any_batch(9))


async def test_a_cluster_has_what_the_store_had_and_the_store_what_the_cluster_had(
    path: str, server: MemoryServer
) -> None:
    maker, journal = await make_store(path), MemorySharedJournal(server)
    await conversion.init_from_store(journal, path)
    await conversion.init_from_store(journal, path)  # a second call changes nothing
    await write(path, server, maker)
    other = f"{path}.other"
    epoch = await conversion.leave(journal, other, 0)
    await assert_store_holds(other, maker, epoch=epoch)
    with pytest.raises(WrongCluster):
        await make_empty_store(path)
    with pytest.raises(CannotConvert, match="is in use"):
        await conversion.init_from_store(journal, path)


async def test_no_node_follows_a_journal_that_was_closed(path: str, server: MemoryServer) -> None:
    await make_store(path)
    journal = MemorySharedJournal(server)
    await conversion.init_from_store(journal, path)
    await conversion.leave(journal, f"{path}.other", 0)
    store, opened = await ClusterStore.open_for(path, journal)
    async with store:
        with pytest.raises(BadRecord, match="`jobd cluster leave` has turned"):
            await store.follow(await journal.read(opened.last_record, 10))


@in_virtual_time
async def test_the_lease_of_a_leader_that_is_longer_is_respected() -> None:
    server = MemoryServer()
    leader, other = MemorySharedJournal(server), MemorySharedJournal(server)
    assert await leader.take_over(await leader.head(), holder="a", url="http://a", epoch=1) is not None
    await leader.register(NodeEntry("a", "a", "http://a", FORMAT, "", 0, lease_ms=30_000))
    renewing = asyncio.get_running_loop().call_later(10, lambda: server.change(server.head))
    with pytest.raises(CannotConvert, match="a node at http://a leads"):
        await conversion.take_free_leadership(other, 0, 3)
    assert renewing.when() < asyncio.get_running_loop().time()
    assert (await conversion.take_free_leadership(other, 0, 3)).epoch > 1


class Killed(BaseException):
    """Ends a call like a kill, as far as a test can."""


@pytest.mark.parametrize(
    ("owner", "name", "is_after"),
    [
        (conversion, "take_free_leadership", True),
        (ClusterStore, "project", False),
        (ClusterStore, "project", True),
        (MemorySharedJournal, "append", True),
        (joining, "leave", False),
        (files, "write_epoch", False),
        (files, "write_epoch", True),
        (joining, "leave", True),
    ],
)
async def test_leaving_is_completed_after_a_kill(
    path: str, server: MemoryServer, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, is_after: bool
) -> None:
    maker, journal = await make_store(path), MemorySharedJournal(server)
    await conversion.init_from_store(journal, path)
    shutil.copy(path, f"{path}.behind")
    await write(path, server, maker)
    call = getattr(owner, name)

    def kill_sync(*args: object, **named: object) -> None:
        if is_after:
            call(*args, **named)
        raise Killed

    async def kill(*args: object, **named: object) -> None:
        if is_after:
            await call(*args, **named)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, kill if inspect.iscoroutinefunction(call) else kill_sync)
        with pytest.raises(Killed):
            await conversion.leave(journal, f"{path}.behind", 0)
    epoch = await conversion.leave(journal, f"{path}.behind", 0)
    assert await conversion.leave(journal, f"{path}.behind", 0) == epoch
    assert [each.number for each in server.records if each.body == CLOSING] == [server.head.number]
    await assert_store_holds(f"{path}.behind", maker, epoch=epoch)
    assert read_epoch(f"{path}.behind") == epoch


@pytest.mark.parametrize("spare_bytes", [20_000, 400_000])
async def test_a_full_disk_leaves_the_cluster_as_it_was(
    path: str, server: MemoryServer, small_disk: Path, spare_bytes: int
) -> None:
    maker, journal, behind = await make_store(path), MemorySharedJournal(server), f"{small_disk}/jobd.db"
    await conversion.init_from_store(journal, path)
    shutil.copy(path, behind)
    store, _ = await ClusterStore.open_for(behind, journal)
    await store.close()
    for _ in range(20):
        await write(path, server, maker)
    filler = fill(small_disk)
    os.truncate(filler, filler.stat().st_size - spare_bytes)
    for _ in range(2):
        with pytest.raises(DiskFull):
            await conversion.leave(journal, behind, 0)
        assert all(each.body != CLOSING for each in server.records)
        await write(path, server, maker)
    filler.unlink()
    epoch = await conversion.leave(journal, behind, 0)
    await assert_store_holds(behind, maker, epoch=epoch)


async def test_the_store_of_a_single_machine_does_not_leave(path: str, server: MemoryServer) -> None:
    await make_store(path)
    journal = MemorySharedJournal(server)
    await conversion.init_from_store(journal, path)
    await make_store(f"{path}.single")
    with pytest.raises(WrongCluster, match="is the store of a single machine"):
        await conversion.leave(journal, f"{path}.single", 0)
    await conversion.leave(journal, path, 0)
    with pytest.raises(WrongCluster, match="is the store of a single machine"):
        await conversion.leave(journal, f"{path}.single", 0)


async def test_a_cluster_with_a_leader_is_not_left(path: str, server: MemoryServer) -> None:
    maker, journal, leader = await make_store(path), MemorySharedJournal(server), MemorySharedJournal(server)
    await conversion.init_from_store(journal, path)
    await write(path, server, maker)

    async def lead() -> None:
        assert await leader.take_over(await leader.head(), holder="a", url="http://a", epoch=1) is not None
        while True:
            await asyncio.sleep(0.01)
            await leader.renew(server.head.number)

    leading = asyncio.create_task(lead())
    with pytest.raises(CannotConvert, match="a node at http://a leads: stop the daemons"):
        await conversion.leave(journal, path, 0.1)
    leading.cancel()
    await asyncio.wait([leading])

    async def be_first(call: str) -> None:
        if call == "take_over":
            journal.before = MemorySharedJournal(server).before
            await leader.take_over(await leader.head(), holder="b", url="", epoch=1)

    journal.before = be_first
    with pytest.raises(CannotConvert, match="a node at http://a leads"):
        await conversion.leave(journal, path, 0)


async def test_no_node_leads_before_the_snapshot_is_complete(path: str, server: MemoryServer) -> None:
    await make_store(path)
    journal = MemorySharedJournal(server)

    async def lose(number: int, parts: AsyncIterator[bytes], pause_s: float = 0) -> bool:
        return False

    journal.write_snapshot = lose  # type: ignore[method-assign, assignment]
    with pytest.raises(JournalUnavailable, match="another process is writing"):
        await conversion.init_from_store(journal, path)
    for each in (path, f"{path}.other"):
        with pytest.raises(StoreUnreadable, match="repeat `jobd cluster init --from-store PATH`") as rejected:
            await ClusterStore.open_for(each, journal)
        assert rejected.value.exit_code == 78
    await conversion.init_from_store(MemorySharedJournal(server), path)
    store, opened = await ClusterStore.open_for(f"{path}.other", journal)
    async with store:
        assert opened.last_record == FIRST_RECORD


async def test_a_store_leaves_a_cluster_that_never_got_its_snapshot(path: str, server: MemoryServer) -> None:
    maker, journal = await make_store(path), MemorySharedJournal(server)
    await asyncio.to_thread(joining.convert_to_cluster, path, journal.cluster_id)  # killed before the snapshot
    epoch = await conversion.leave(journal, path, 0)
    assert await conversion.leave(journal, path, 0) == epoch
    await assert_store_holds(path, maker, epoch=epoch)
    with pytest.raises(CannotConvert, match="the journal is in use"):
        await conversion.init_from_store(journal, path)


async def test_a_journal_in_use_is_refused(path: str) -> None:
    await make_store(path)
    with pytest.raises(CannotConvert, match=r"choose another journal\.name") as rejected:
        await conversion.init_from_store(MemorySharedJournal(MemoryServer()), path)
    assert rejected.value.exit_code == 78
