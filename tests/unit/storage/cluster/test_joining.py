"""A store becomes the first one of a cluster, and the store of a node becomes that of a single machine."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from random import Random

import pytest
from msgspec.structs import replace

from jobd.storage.cluster import joining, snapshots
from jobd.storage.cluster.membership import WrongCluster
from jobd.storage.files import read_epoch
from jobd.storage.offline import doctor, journal_cut
from jobd.storage.store import Store, StoreBusy, StoreUnreadable
from tests.support import store_files
from tests.support.factories import ChangeFactory
from tests.support.memory_journal import MemoryServer
from tests.support.projection_harness import Writer
from tests.unit.storage.cluster import test_cluster_store


async def founded(path: str, server: MemoryServer) -> ChangeFactory:
    """Make a store at `path` that belongs to the cluster of `server`, with its snapshot."""
    maker = await store_files.make_store(path)
    await store_files.leave_tail(path, maker.any_batch(9))
    await convert(path, server)
    return maker


async def convert(path: str, server: MemoryServer) -> None:
    assert joining.convert_to_cluster(path, server.cluster_id) > 0
    server.head = replace(server.head, number=joining.FIRST_RECORD)
    with BytesIO(store_files.read_file(path)) as file:
        await test_cluster_store.Node(path, server).journal.write_snapshot(
            joining.FIRST_RECORD, snapshots.compressed(file), 0
        )


async def test_a_store_becomes_the_first_snapshot_of_a_cluster(path: str) -> None:
    server = MemoryServer()
    maker = await founded(path, server)
    before = test_cluster_store.rows_of(path)
    assert joining.convert_to_cluster(path, server.cluster_id) > 0, "a second call changes nothing"
    assert test_cluster_store.rows_of(path) == before
    with pytest.raises(WrongCluster, match="belongs to cluster memory"):
        await Store.open(path)
    async with test_cluster_store.leading(path, server) as leader:
        assert leader.opened.last_record == joining.FIRST_RECORD
        await store_files.assert_holds(leader.store, leader.opened, maker)
        await leader.store.write(maker.any_batch(9))
    async with test_cluster_store.following(f"{path}.new", server) as node:
        assert node.opened.last_record == joining.FIRST_RECORD
        await node.catch_up()
    assert test_cluster_store.rows_of(path) == test_cluster_store.rows_of(f"{path}.new")


async def test_a_cluster_and_the_store_that_leaves_it_have_every_row(path: str) -> None:
    server, writer, single = MemoryServer(), Writer(5), f"{path}.single"
    async with store_files.open_store(single) as (store, _):
        node = test_cluster_store.Node(single, server)
        node.store = store  # type: ignore[assignment]
        await test_cluster_store.write_much(node, Random(5), writer, 150)
        await store.finish_upkeep()
        await store.write(writer.batch())
    before = test_cluster_store.rows_of(single)
    await convert(single, server)
    async with test_cluster_store.following(path, server):
        pass
    joining.leave(path, is_complete=True)
    after = test_cluster_store.rows_of(path)
    empty = {table for table, rows in before.items() if not rows}
    assert empty <= {"journal", "cluster", "bad_rows", "quarantined_jobs", "reports"}, "the test has rows of all kinds"
    for table in before.keys() - {"meta", "journal"}:
        assert after[table] == before[table], table


async def test_a_damaged_row_is_in_quarantine_on_every_node(path: str) -> None:
    """Otherwise each node that reads it would rebuild its tables, with the same row."""
    server = MemoryServer()
    async with store_files.open_store(path) as (store, _):
        node = test_cluster_store.Node(path, server)
        node.store = store  # type: ignore[assignment]
        seq = await test_cluster_store.finished_job(node, ChangeFactory())
    store_files.flip(path, "jobs", "created_at", "seq", seq)
    await convert(path, server)
    async with test_cluster_store.following(f"{path}.new", server) as node:
        assert list(node.opened.quarantined) == ["done"]
        (await node.store.snapshot()).file.close()


async def test_a_store_joins_one_cluster_only(path: str) -> None:
    await founded(path, MemoryServer())
    with pytest.raises(WrongCluster, match="belongs to cluster memory, not to other"):
        joining.convert_to_cluster(path, "other")
    with pytest.raises(StoreUnreadable, match="does not exist"):
        joining.convert_to_cluster(f"{path}.missing", "other")
    async with store_files.open_store(f"{path}.used"):
        with pytest.raises(StoreBusy):
            joining.convert_to_cluster(f"{path}.used", "other")


async def test_a_backup_does_not_join_before_its_grants_have_ended(path: str) -> None:
    await store_files.make_store(path)
    Path(f"{path}.epoch").unlink()
    async with store_files.open_store(path) as (store, _):
        copy = await store.backup()
    Path(path).write_bytes(copy.read())
    copy.close()
    with pytest.raises(StoreUnreadable, match="start jobd on it once"):
        joining.convert_to_cluster(path, "memory")


@pytest.mark.parametrize("is_complete", [True, False])
async def test_the_store_of_a_node_becomes_that_of_a_single_machine(path: str, is_complete: bool) -> None:
    server = MemoryServer()
    maker = await founded(path, server)
    async with test_cluster_store.leading(path, server) as leader:
        await leader.store.write(maker.any_batch(9))
    later = 1 << 30
    epoch = joining.leave(path, epoch=later, is_complete=is_complete)
    assert epoch == later + 1 == read_epoch(path)
    async with store_files.open_store(path) as (store, opened):
        assert opened.marked == (not is_complete)
        assert (opened.numbers.epoch, opened.numbers.next_token) == (epoch + (not is_complete), 1)
        assert {job.seq: job for job in opened.live()}.keys() <= maker.jobs.keys()
        await store.save_stats(b"1")
    with pytest.raises(WrongCluster, match="is already the store of a single machine"):
        joining.leave(path, is_complete=True)
    with pytest.raises(WrongCluster, match="is the store of a single machine: make"):
        await test_cluster_store.rejected(path, server)


async def test_a_store_is_replaced_by_that_of_a_cluster(path: str) -> None:
    server = MemoryServer()
    await founded(path, server)
    maker = await store_files.make_store(f"{path}.single")
    async with store_files.open_store(f"{path}.single"):
        with pytest.raises(StoreBusy):
            joining.discard(f"{path}.single")
    async with store_files.killed_store(f"{path}.single") as (store, _):
        await store.write(maker.any_batch(20))
    old = joining.discard(f"{path}.single")
    async with store_files.open_store(old) as (store, opened):
        maker.numbers = replace(maker.numbers, epoch=opened.numbers.epoch, next_token=1)
        await store_files.assert_holds(store, opened, maker)
    with pytest.raises(StoreUnreadable, match="does not exist"):
        joining.discard(f"{path}.single")
    async with test_cluster_store.following(f"{path}.single", server), test_cluster_store.following(path, server):
        pass
    assert test_cluster_store.rows_of(path) == test_cluster_store.rows_of(f"{path}.single")
    assert joining.discard(f"{path}.single") != old
    async with store_files.open_store(old):
        pass  # it is not the store of a node


async def test_a_node_is_not_repaired_by_itself(path: str) -> None:
    await founded(path, MemoryServer())
    assert doctor.check(path) == []
    with pytest.raises(WrongCluster, match="stop its daemon and remove it"):
        doctor.recount(path)
    with pytest.raises(WrongCluster, match="stop its daemon and remove it"):
        journal_cut.cut(path, 1)
    with store_files.edit_store(path) as conn:
        assert conn.execute("SELECT count(*) FROM cluster").fetchone() == (1,)
