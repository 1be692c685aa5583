"""The tables of nodes behind a shared journal: a leader that writes, and stores that follow it."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from jobd.journal import event_codec
from jobd.journal.record import FORMAT, LOWEST_FORMAT, decode
from jobd.model.job import Result
from jobd.model.journal import BadRecord, Fenced, JournalOutcomeUnknown, JournalUnavailable, LeadershipLost, Record
from jobd.model.storage import AuditQuery, DiskFull, FormatNotRead, JobQuery, OpenedStore
from jobd.model.webhooks import Delivery, WebhookCursor
from jobd.storage import files
from jobd.storage.cluster import snapshots
from jobd.storage.cluster.cluster_store import ClusterStore
from jobd.storage.cluster.lost_records import membership_of
from jobd.storage.cluster.membership import StoreAhead, StoreDamaged, WrongCluster
from jobd.storage.store import Store, StoreBroken, StoreBusy, StoreUnreadable
from jobd.storage.tables.projection import MAX_BEHIND_FULL
from tests.support.factories import NOW, ChangeFactory
from tests.support.memory_journal import MemoryServer, MemorySharedJournal
from tests.support.projection_harness import Writer, fail_commits
from tests.support.store_files import edit_store, flip, job_of, make_empty_store, make_store, open_store, stored_events

NOT_COMPARED = {"probes", "sqlite_sequence"}


class Node:
    """A store of a node, and its access to the server."""

    def __init__(self, path: str, server: MemoryServer) -> None:
        self.path = path
        self.journal = MemorySharedJournal(server)
        self.store: ClusterStore
        self.opened: OpenedStore
        self.broken: list[Exception] = []
        self.format = FORMAT  # that all nodes read

    async def open(self) -> None:
        self.store, self.opened = await ClusterStore.open_for(self.path, self.journal)
        self.store.on_broken = self.broken.append

    async def lead(self) -> None:
        head = await self.journal.head()
        assert await self.journal.take_over(head, holder=self.path, url=self.path, epoch=head.epoch + 1) is not None
        self.store.lead(self.journal.append, lambda format: "old" if self.format < format else None)

    async def write(self, maker: ChangeFactory, count: int = 1, jobs: int = 1) -> None:
        """Write batches that create jobs."""
        for _ in range(count):
            await self.store.write(maker.batch([maker.create() for _ in range(jobs)]))

    async def catch_up(self, limit: int = 7) -> None:
        while records := await self.journal.read(self.store._projection.last, limit):
            await self.store.follow(records)

    @property
    def projected_to(self) -> int:
        return self.store._database.projected_to


@pytest.fixture
def server() -> MemoryServer:
    return MemoryServer()


@pytest.fixture
async def leader(path: str, server: MemoryServer) -> AsyncIterator[Node]:
    async with leading(path, server) as node:
        yield node


@contextlib.asynccontextmanager
async def leading(path: str, server: MemoryServer) -> AsyncIterator[Node]:
    async with following(path, server) as node:
        await node.lead()
        yield node


@contextlib.asynccontextmanager
async def following(path: str, server: MemoryServer) -> AsyncIterator[Node]:
    node = Node(path, server)
    await node.open()
    try:
        yield node
    finally:
        await node.store.close()


async def rejected(path: str, server: MemoryServer) -> None:
    """Open a store that cannot be opened."""
    async with following(path, server):
        pass


def rows_of(path: str) -> dict[str, list[tuple[object, ...]]]:
    """Return all rows of a closed store by table. Events may be divided into rows differently."""
    with edit_store(path) as conn:
        tables = [name for (name,) in conn.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        return {
            table: conn.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall()
            for table in tables
            if table not in NOT_COMPARED
        } | {"events": list(map(event_codec.encode, stored_events(conn)))}


async def write_much(node: Node, dice: Random, writer: Writer, batches: int) -> None:
    """Write random batches and other writes, with reads that force slices between them."""
    store, number = node.store, 0
    await store.open_outbox(["e"], NOW)
    for _ in range(batches):
        batch = writer.batch()
        writer.tables.apply(batch)
        await store.write(batch)
        match dice.randrange(12):
            case 0:
                number += 1
                cursor = WebhookCursor("e", batch.numbers.next_event - 1, 0, number + 1, {}, NOW)
                new = Delivery(number, "e", "waiting", "s", "t", "i", number, NOW, NOW, 0, None, None, None, b"{}")
                await store.plan_deliveries(cursor, [new])
                await store.store_outcomes([replace(new, state="delivered", ended_at=NOW)], NOW)
            case 1:
                await store.save_stats(b"%d" % dice.randrange(100))
            case 2:
                due = await store.due_tombstones(1 << 60, 3)
                found = [tombstone for tombstone, _ in due.found]
                later = [replace(each, tries=1) for each in found[1:]]
                await store.update_tombstones([each.job_seq for each in found[:1]], later)
            case 3:
                await store.prune(writer.maker.now - 5, 4)
            case 4:
                await store.trim_audit(writer.maker.now - 5, 3)
            case 5:
                await store.find_jobs(JobQuery())
            case 6:
                await store.finish_upkeep()
            case _:
                pass


# -- one leader, and stores that follow


@pytest.mark.parametrize("seed", range(12))
async def test_a_store_that_followed_has_the_rows_of_its_leader(path: str, server: MemoryServer, seed: int) -> None:
    dice, writer = Random(seed), Writer(seed)
    other = f"{path}.other"
    async with following(other, server) as node:
        async with leading(path, server) as leader:
            for _ in range(3):
                await write_much(leader, dice, writer, 20)
                for _ in range(dice.randrange(3)):
                    await node.catch_up(dice.randrange(1, 30))
                if dice.random() < 0.5:  # a restart
                    await node.store.close()
                    await node.open()
            opened = await leader.store.read_audit(AuditQuery())
        await node.catch_up()
        assert await node.store.read_audit(AuditQuery()) == opened
    ours, theirs = rows_of(path), rows_of(other)
    assert ours.keys() == theirs.keys()
    for table, rows in ours.items():
        assert theirs[table] == rows, table


async def test_a_leader_opened_again_has_what_its_journal_has(path: str, server: MemoryServer) -> None:
    writer = Writer(3)
    async with leading(path, server) as leader:
        await write_much(leader, Random(3), writer, 30)
    async with following(path, server) as node:
        assert node.opened.last_record == server.head.number
        assert {job.seq: job for job in node.opened.live()}.keys() <= writer.tables.jobs.keys()
        assert node.opened.numbers == writer.tables.numbers
    async with following(f"{path}.other", server) as other:
        await other.catch_up()
        await other.store.close()
        await other.open()
        assert replace(other.opened, jobs=[], packed_jobs=[]) == replace(node.opened, jobs=[], packed_jobs=[])
        assert sorted(other.opened.live(), key=lambda job: job.seq) == sorted(
            node.opened.live(), key=lambda job: job.seq
        )


async def test_tables_are_never_ahead_of_the_journal(maker: ChangeFactory, leader: Node) -> None:
    await leader.store.write(maker.batch([maker.create("a")]))
    gate = leader.journal.hold("after")  # the record is visible and not durable
    writing = asyncio.create_task(leader.store.write(maker.batch([maker.create("b")])))
    for _ in range(5):
        await asyncio.sleep(0)
    assert [job.id for job, _ in (await leader.store.find_jobs(JobQuery())).jobs] == ["a"]
    assert leader.projected_to == 1
    gate.set()
    await writing
    assert [job.id for job, _ in (await leader.store.find_jobs(JobQuery())).jobs] == ["b", "a"]


async def test_a_record_does_not_acknowledge_itself(maker: ChangeFactory, leader: Node, server: MemoryServer) -> None:
    """A standby would apply it although it may not be durable."""
    for number in range(3):
        await leader.store.write(maker.batch([maker.create()]))
        assert (server.head.number, server.head.acked) == (number + 1, number)


async def test_writes_have_one_order(maker: ChangeFactory, leader: Node, server: MemoryServer) -> None:
    async def slow(call: str) -> None:
        await asyncio.sleep(0)

    leader.journal.before = leader.journal.after = slow
    batches = [maker.batch([maker.create()]) for _ in range(3)]
    saves = [leader.store.save_stats(b"%d" % n) for n in range(3)]
    await asyncio.gather(*(leader.store.write(each) for each in batches), *saves)
    assert [record.number for record in server.records] == [1, 2, 3, 4, 5, 6]
    assert len((await leader.store.find_jobs(JobQuery())).jobs) == 3


async def test_a_write_waits_until_all_nodes_read_its_format(leader: Node, server: MemoryServer) -> None:
    maker = ChangeFactory(has_extra=False)
    await leader.store.write(maker.any_batch(30))
    leader.format = LOWEST_FORMAT
    await leader.store.write(maker.any_batch(30))
    known = len(server.records)
    store, cursor = leader.store, WebhookCursor("e", 1, 0)
    for write in (
        store.save_stats(b"1"),
        store.update_tombstones([1], []),
        store.plan_deliveries(cursor, []),
        store.prune(maker.now, 10),
    ):
        with pytest.raises(FormatNotRead, match="format 2, which node old does not read"):
            await write
    assert (len(server.records), leader.broken) == (known, [])
    assert {record.body[0] for record in server.records} == {LOWEST_FORMAT}
    leader.format = FORMAT
    await store.save_stats(b"1")
    await store.write(maker.any_batch(3))
    assert [record.body[0] for record in server.records[known:]] == [2, LOWEST_FORMAT]


async def test_a_cancelled_caller_does_not_stop_its_write(leader: Node, server: MemoryServer) -> None:
    gate = leader.journal.hold()
    saving = asyncio.create_task(leader.store.save_stats(b"1"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    saving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await saving
    gate.set()
    await leader.store.save_stats(b"2")
    assert [record.number for record in server.records] == [1, 2]


async def test_a_cancelled_batch_ends_the_leadership(leader: Node) -> None:
    gate = leader.journal.hold()
    maker = ChangeFactory()
    writing = asyncio.create_task(leader.store.write(maker.batch([maker.create()])))
    await asyncio.sleep(0)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    gate.set()
    with pytest.raises(LeadershipLost, match="interrupted"):
        await leader.store.save_stats(b"1")


async def test_many_events_are_written_before_the_next_batch(maker: ChangeFactory, leader: Node) -> None:
    leader.store._plan_slice = lambda: None  # type: ignore[method-assign]
    for _ in range(12):
        await leader.store.write(maker.batch([maker.create() for _ in range(100)]))
        assert leader.store._projection.behind < 2 * leader.store._projection.slice_events + 100
    assert leader.projected_to > 0


async def test_a_standby_does_not_write(path: str, server: MemoryServer) -> None:
    async with following(path, server) as node:
        with pytest.raises(LeadershipLost, match="does not lead"):
            await node.store.write(ChangeFactory().batch([]))
    assert server.records == []


async def test_a_gap_and_a_damaged_record_are_rejected(path: str, server: MemoryServer) -> None:
    async with leading(path, server) as leader:
        await leader.write(ChangeFactory(), 4)
    async with following(f"{path}.other", server) as node:
        with pytest.raises(BadRecord, match="record 2 of the journal is missing"):
            await node.store.follow([server.records[0], server.records[2]])
        with pytest.raises(BadRecord, match="record 2 of the journal has format 9"):
            await node.store.follow([replace(server.records[1], body=b"\x09")])
        await node.store.follow(server.records[1:])
        assert len((await node.store.find_jobs(JobQuery())).jobs) == 4


# -- failures of an append


async def test_a_kill_between_append_and_slice_loses_nothing(path: str, server: MemoryServer) -> None:
    maker = ChangeFactory()
    async with leading(path, server) as leader:
        await leader.store.write(maker.batch([maker.create("a")]))
        await leader.store.finish_upkeep()
        leader.store._plan_slice = lambda: None  # type: ignore[method-assign]
        await leader.store.write(maker.batch([maker.create("b")]))
        left = {name: Path(name).read_bytes() for name in (path, f"{path}-wal")}
    for name, content in left.items():
        Path(name).write_bytes(content)
    async with following(path, server) as node:
        assert node.opened.last_record == 1
        await node.catch_up()
        assert sorted(job.id for job, _ in (await node.store.find_jobs(JobQuery())).jobs) == ["a", "b"]


async def test_a_power_failure_that_tears_a_slice_loses_nothing(path: str, server: MemoryServer) -> None:
    """Slices are not synced, so later ones can be on the disk without a page of an earlier one."""
    maker, other, log = ChangeFactory(), f"{path}.other", f"{path}.other-wal"
    async with leading(path, server) as leader, following(other, server) as node:
        for number in range(4):
            await leader.write(maker, jobs=200)
            await node.catch_up()
            await node.store.finish_upkeep()
            if number == 0:
                written = len(Path(log).read_bytes().rstrip(b"\0"))  # zeros follow the last frame
                size = 32 + -(-(written - 32) // 4_120) * 4_120
        left = {name: bytearray(Path(name).read_bytes()) for name in (other, log)}
        assert len(left[log].rstrip(b"\0")) > size + 8_192
        await leader.store.finish_upkeep()
    left[log][size + 24 : size + 4_120] = bytes(4_096)  # the page of the first frame of the second slice
    for name, content in left.items():
        Path(name).write_bytes(content)
    async with following(other, server) as node:
        assert node.opened.last_record < 4
        await node.catch_up()
    assert rows_of(other)["jobs"] == rows_of(path)["jobs"]


@pytest.mark.parametrize("is_in", [False, True])
async def test_an_unknown_outcome_ends_the_leadership_and_the_journal_says_what_is_true(
    path: str, server: MemoryServer, is_in: bool
) -> None:
    maker = ChangeFactory()
    async with leading(path, server) as leader:
        await leader.store.write(maker.batch([maker.create("a")]))
        leader.journal.fail("after" if is_in else "before", "append")
        with pytest.raises(JournalOutcomeUnknown):
            await leader.store.write(maker.batch([maker.create("b")]))
        assert [type(error) for error in leader.broken] == [JournalOutcomeUnknown]
        with pytest.raises(JournalOutcomeUnknown):
            await leader.store.save_stats(b"1")
        assert [job.id for job, _ in (await leader.store.find_jobs(JobQuery())).jobs] == ["a"], "reads go on"
    async with following(path, server) as node:
        await node.catch_up()
        found = [job.id for job, _ in (await node.store.find_jobs(JobQuery())).jobs]
        assert found == (["b", "a"] if is_in else ["a"])


async def test_a_fenced_leader_writes_nothing(maker: ChangeFactory, path: str, server: MemoryServer) -> None:
    async with leading(path, server) as leader, following(f"{path}.other", server) as other:
        await leader.store.write(maker.batch([maker.create("a")]))
        await other.catch_up()
        await other.lead()
        with pytest.raises(Fenced):
            await leader.store.save_stats(b"1")
        with pytest.raises(Fenced):
            await leader.store.write(maker.batch([maker.create("b")]))
        assert [type(error) for error in leader.broken] == [Fenced]
        await other.store.write(maker.batch([maker.create("c")]))
    assert server.head.number == 2


async def test_a_full_server_writes_nothing_and_is_tried_again(leader: Node, server: MemoryServer) -> None:
    maker = ChangeFactory()
    leader.journal.fail("before", "append", error=DiskFull("the server's disk is full"))
    batch = maker.batch([maker.create("a")])
    with pytest.raises(DiskFull):
        await leader.store.write(batch)
    await leader.store.write(batch)
    assert (server.head.number, leader.broken) == (1, [])


async def test_a_probe_during_an_append_does_not_set_the_numbers_back(leader: Node) -> None:
    goes_on = asyncio.Event()

    async def append(record: Record, acked: int) -> None:
        await goes_on.wait()
        await leader.journal.append(record, acked)

    leader.store.lead(append, lambda format: None)
    last, batch = leader.store._projection.last, Writer(1).batch()
    async with asyncio.TaskGroup() as group:
        group.create_task(leader.store.write(batch))
        group.create_task(leader.store.probe())
        await asyncio.sleep(0.05)  # the probe of the local disk ends before the append
        goes_on.set()
    written, probe = [decode(each)[0] for each in await leader.journal.read(last, 10)]
    assert written.numbers == probe.numbers == batch.numbers


async def test_a_probe_finds_the_full_disk_of_the_server(leader: Node, server: MemoryServer) -> None:
    leader.journal.fail("before", "append", error=DiskFull("the server's disk is full"))
    with pytest.raises(DiskFull):
        await leader.store.probe(1 << 20)
    await leader.store.probe(1 << 20)
    assert server.head.number == 1


async def test_a_full_local_disk_rejects_batches_before_the_append(leader: Node, server: MemoryServer) -> None:
    maker = ChangeFactory()
    await leader.store.write(maker.batch([maker.create("a")]))
    await leader.store.finish_upkeep()
    commits = leader.store._database.before_commit
    fail_commits(leader.store._projection, sqlite3.SQLITE_FULL)
    while leader.store._projection.behind < MAX_BEHIND_FULL:
        await leader.store.write(maker.batch([maker.create() for _ in range(100)]))
    with pytest.raises(DiskFull):
        await leader.store.write(maker.batch([]))
    assert server.head.number == leader.store._projection.last
    assert len((await leader.store.find_jobs(JobQuery(limit=10_000, scan=10_000))).jobs) > MAX_BEHIND_FULL
    leader.store._database.before_commit = commits
    await leader.store.write(maker.batch([maker.create()]))
    await leader.store.finish_upkeep()
    assert leader.projected_to == server.head.number


async def test_a_standby_with_a_full_disk_keeps_records_up_to_its_bound(path: str, server: MemoryServer) -> None:
    async with leading(path, server) as leader:
        await leader.write(ChangeFactory(), 40, jobs=100)
    async with following(f"{path}.other", server) as node:
        fail_commits(node.store._projection, sqlite3.SQLITE_FULL)
        with pytest.raises(DiskFull):
            await node.catch_up(1)
        last = node.store._projection.last
        assert MAX_BEHIND_FULL <= node.store._projection.behind < MAX_BEHIND_FULL + 100
        assert (node.store.is_full, node.store.projected_to) == (True, 0)
        with pytest.raises(DiskFull):
            await node.store.snapshot()
        node.store._database.before_commit = lambda: None
        await node.catch_up()
        assert node.store._projection.last == 40 > last
        assert not node.store.is_full


# -- damage


async def snapshot_of(node: Node, dropped: bool = False) -> int:
    await node.store.finish_upkeep()
    copy = await node.store.snapshot()
    with contextlib.closing(copy.file):
        assert await node.journal.write_snapshot(copy.last_record, snapshots.compressed(copy.file), 0)
    return copy.last_record


async def finished_job(node: Node, maker: ChangeFactory) -> int:
    """Create a job that ends, and return its seq."""
    created = maker.create("done")
    granted = maker.grant(job_of(created))
    await node.store.write(maker.batch([created, granted, maker.finish(job_of(granted))]))
    return job_of(created).seq


async def test_a_damaged_row_ends_the_node_which_makes_its_tables_again(path: str, server: MemoryServer) -> None:
    maker = ChangeFactory()
    async with leading(path, server) as leader:
        seq = await finished_job(leader, maker)
        await snapshot_of(leader)
        await leader.store.write(maker.batch([maker.create("later")]))
    expected = rows_of(path)
    flip(path, "jobs", "created_at", "seq", seq)
    async with following(path, server) as node:
        with pytest.raises(StoreDamaged, match="job done"):
            await node.store.load(["done"], [], [])
        assert [type(error) for error in node.broken] == [StoreDamaged]
        with pytest.raises(StoreDamaged):
            await node.store.timeline(seq)
    assert not Path(path).exists()
    assert Path(f"{path}.old").exists()
    async with following(path, server) as node:
        assert node.opened.last_record == 1
        await node.catch_up()
        assert list((await node.store.load(["done"], [], [])).jobs) == ["done"]
    assert rows_of(path) == expected


@pytest.mark.parametrize(("table", "column", "key"), [("jobs", "created_at", "seq"), ("events", "at", "job_seq")])
async def test_a_damaged_row_is_not_written_to_a_snapshot(
    path: str, server: MemoryServer, table: str, column: str, key: str
) -> None:
    async with leading(path, server) as leader:
        seq = await finished_job(leader, ChangeFactory())
    flip(path, table, column, key, seq)
    async with following(path, server) as node:
        with pytest.raises(StoreDamaged, match="job done" if table == "jobs" else table):
            await node.store.snapshot()
        assert [type(error) for error in node.broken] == [StoreDamaged]


@pytest.mark.parametrize(
    ("table", "column", "key"),
    [("jobs", "created_at", "id = 'live'"), ("queues", "completed", "1"), ("keys", "at", "1"), ("cluster", "crc", "1")],
)
async def test_damage_at_the_start_makes_the_tables_again(
    path: str, server: MemoryServer, table: str, column: str, key: str
) -> None:
    maker = ChangeFactory()
    async with leading(path, server) as leader:
        batch = maker.batch([maker.create("live"), maker.queue_event("video", paused=True)])
        batch.keys = maker.any_batch(0).keys
        await leader.store.write(batch)
    with edit_store(path) as conn:
        changed = conn.execute(f"UPDATE {table} SET {column} = {column} + 1 WHERE {key}").rowcount
    async with following(path, server) as node:
        assert node.opened.last_record == (0 if changed else 1)
        await node.catch_up()
        assert [job.id for job, _ in (await node.store.find_jobs(JobQuery())).jobs] == ["live"]
        assert node.opened.faults == []


async def test_a_record_about_a_missing_row_ends_the_node(path: str, server: MemoryServer) -> None:
    maker, other = ChangeFactory(), f"{path}.other"
    async with leading(path, server) as leader, following(other, server) as node:
        created = maker.create("a")
        await leader.store.write(maker.batch([created]))
        await node.catch_up()
        await node.store.close()
        with edit_store(other) as conn:
            conn.execute("DELETE FROM jobs")
        with contextlib.suppress(StoreUnreadable):
            await node.open()
        await node.catch_up()
        assert [job.id for job in node.opened.live()] == [], "it was made again, from the first record"
        assert len((await node.store.find_jobs(JobQuery())).jobs) == 1


async def test_a_record_about_a_row_that_is_damaged_ends_the_node(path: str, server: MemoryServer) -> None:
    maker, other = ChangeFactory(), f"{path}.other"
    async with leading(path, server) as leader:
        created = [maker.create(), maker.create()]
        await leader.store.write(maker.batch(created))
        async with following(other, server) as node:
            await node.catch_up()
            await node.store.finish_upkeep()
            node.store._projection._jobs.forget_rows()
            node.store._connection.raw.execute("UPDATE jobs SET created_at = 7 WHERE seq = 1")
            node.store._connection.raw.execute("DELETE FROM jobs WHERE seq = 2")
            for job in map(job_of, created):
                await leader.store.write(maker.batch([maker.grant(job)]))
            await node.catch_up()
            with pytest.raises(StoreDamaged, match="job "):
                await node.store.timeline(1)
        assert not Path(other).exists()


@pytest.mark.parametrize("table", ["late_results", "schedules"])
async def test_a_record_that_reads_a_damaged_row_ends_the_node(path: str, server: MemoryServer, table: str) -> None:
    maker, other = ChangeFactory(), f"{path}.other"
    async with leading(path, server) as leader:
        created = maker.create("a", status="failed")
        late = maker.late(job_of(created), 1, Result(storage_key="late/1"))
        await leader.store.write(maker.batch([created, late, maker.schedule_event("s", "put")]))
        async with following(other, server) as node:
            await node.catch_up()
            await node.store.finish_upkeep()
            node.store._connection.raw.execute(f"UPDATE {table} SET crc = crc + 1")
            if table == "schedules":
                await leader.store.write(maker.batch([maker.schedule_event("s", "skipped")]))
            else:
                await leader.store.write(maker.batch([maker.delete(job_of(created))], sweeps=True))
            await node.catch_up()
            with pytest.raises(StoreDamaged, match=table):
                await node.store.timeline(1)
        assert not Path(other).exists()


async def test_a_snapshot_of_a_closed_store_is_refused(path: str, server: MemoryServer) -> None:
    async with following(path, server) as node:
        pass
    with pytest.raises(StoreBroken, match="closed"):
        await node.store.snapshot()


async def test_appends_wait_for_a_call_in_the_thread(maker: ChangeFactory, leader: Node) -> None:
    reading = asyncio.create_task(leader.store.find_jobs(JobQuery()))
    await asyncio.sleep(0)
    await leader.store.write(maker.batch([maker.create("a")]))
    await reading
    assert [job.id for job, _ in (await leader.store.find_jobs(JobQuery())).jobs] == ["a"]


# -- membership


async def test_a_store_of_another_cluster_or_of_one_machine_is_refused(path: str, server: MemoryServer) -> None:
    async with leading(path, server):
        pass
    with pytest.raises(WrongCluster, match=r"belongs to cluster memory: set journal\.url"):
        await Store.open(path)
    with pytest.raises(WrongCluster, match="but the journal is that of cluster other"):
        await rejected(path, MemoryServer(cluster_id="other"))
    await make_store(f"{path}.single")
    with pytest.raises(WrongCluster, match="is the store of a single machine"):
        await rejected(f"{path}.single", server)
    await make_empty_store(f"{path}.single")
    assert WrongCluster("x").exit_code == 78


async def test_a_store_that_is_in_use_is_refused(path: str, server: MemoryServer) -> None:
    async with following(path, server):
        with pytest.raises(StoreBusy):
            await rejected(path, server)


async def test_a_store_ahead_of_its_journal_is_refused(maker: ChangeFactory, path: str, server: MemoryServer) -> None:
    async with leading(path, server) as leader:
        await leader.write(maker, 3)
    server.records.pop()
    server.head = replace(server.head, number=2)
    with pytest.raises(StoreAhead, match="has record 3, but the last record of the journal is 2") as error:
        await rejected(path, server)
    assert error.value.exit_code == 78


async def test_a_store_that_has_followed_is_opened_without_its_journal(path: str, server: MemoryServer) -> None:
    assert membership_of(path) is None
    node = Node(path, server)
    node.journal.is_reachable = False
    with pytest.raises(JournalUnavailable):
        await node.open()
    assert membership_of(path) is None, "it has not followed"
    maker = ChangeFactory()
    async with leading(path, server) as leader:
        await leader.store.write(maker.batch([maker.create()]))
        await leader.store.keep_timeline(3)
        await leader.store.keep_timeline(2)
        await leader.store.write(maker.batch([maker.create()]))
        assert membership_of(path) is None, "it is in use"
    known = membership_of(path)
    assert known is not None
    assert (known.cluster_id, known.timeline) == ("memory", 3)
    await node.open()
    assert node.projected_to == 2
    await node.store.close()


async def test_a_store_on_another_branch_is_made_again(path: str, server: MemoryServer) -> None:
    maker, other = ChangeFactory(), f"{path}.other"
    async with leading(path, server) as leader, following(other, server) as node:
        await leader.store.write(maker.batch([maker.create("a")]))
        await node.catch_up()
        await leader.store.write(maker.batch([maker.create("lost")]))
        server.records.pop()  # the server loses it in a failover
        server.head = replace(server.head, number=1)
        await node.lead()
        await node.store.write(maker.batch([maker.create("b")]))
        await node.store.write(maker.batch([maker.create("c")]))
    async with following(path, server) as again:
        assert again.opened.last_record == 0
        await again.catch_up()
    assert rows_of(path) == rows_of(other)


async def test_a_store_ahead_of_another_branch_is_made_again(path: str, server: MemoryServer) -> None:
    maker, other = ChangeFactory(), f"{path}.other"
    async with leading(path, server) as leader, following(other, server) as node:
        await leader.store.write(maker.batch([maker.create("a")]))
        await node.catch_up()
        await leader.write(maker, 3)
        assert await leader.store.is_on_branch(leader.journal)
        del server.records[1:]
        server.head = replace(server.head, number=1)
        with pytest.raises(StoreAhead):
            await leader.store.is_on_branch(leader.journal)
        await node.lead()
        with pytest.raises(StoreAhead):  # the new leader may have written nothing
            await leader.store.is_on_branch(leader.journal)
        assert await node.store.is_on_branch(node.journal)
        await node.store.write(maker.batch([maker.create("b")]))
        assert not await leader.store.is_on_branch(leader.journal)
    with capture_logs() as logs:
        async with following(path, server) as again:
            await again.catch_up()
    assert [(line["event"], line["record"]) for line in logs] == [("store_set_aside", 4)]
    assert rows_of(path) == rows_of(other)


async def test_a_store_too_far_behind_starts_from_a_snapshot(path: str, server: MemoryServer) -> None:
    maker, other = ChangeFactory(), f"{path}.other"
    async with leading(path, server) as leader:
        await leader.store.write(maker.batch([maker.create()]))
        async with following(other, server) as node:
            await node.catch_up()
        await leader.write(maker, 5)
        number = await snapshot_of(leader)
        await leader.store.write(maker.batch([maker.create()]))
        await leader.journal.trim(3)
        async with following(other, server) as node:
            assert (node.opened.last_record, number) == (6, 6)
            await node.catch_up()
        async with following(f"{path}.new", server) as node:
            assert node.opened.last_record == 6
            await node.catch_up()
    assert rows_of(path) == rows_of(other) == rows_of(f"{path}.new")


async def test_without_a_usable_snapshot_a_trimmed_journal_is_an_error(path: str, server: MemoryServer) -> None:
    async with leading(path, server) as leader:
        await leader.write(ChangeFactory(), 3)
        await leader.journal.trim(2)
        server.snapshots[3] = ([b"no snapshot"], 0)
    with pytest.raises(StoreUnreadable, match="no usable snapshot and no first record"):
        await rejected(f"{path}.new", server)
    async with following(path, server):
        pass  # it needs neither


async def test_the_newest_usable_snapshot_is_taken(maker: ChangeFactory, path: str, server: MemoryServer) -> None:
    async with leading(path, server) as leader:
        await leader.store.write(maker.batch([maker.create()]))
        await snapshot_of(leader)
        whole = b"".join(server.snapshots[1][0])
        await leader.store.write(maker.batch([maker.create()]))
        server.snapshots[2] = ([whole[:-9]], 0)
        async with following(f"{path}.new", server) as node:
            assert node.opened.last_record == 1
            await node.catch_up()


async def test_a_snapshot_with_records_that_the_journal_has_lost_is_not_taken(path: str, server: MemoryServer) -> None:
    maker, other, new = ChangeFactory(), f"{path}.other", f"{path}.new"
    async with leading(path, server) as leader, following(other, server) as node:
        await leader.store.write(maker.batch([maker.create("a")]))
        await snapshot_of(leader)
        await node.catch_up()
        await leader.write(maker, 2)
        await snapshot_of(leader)
        del server.records[1:]
        server.head = replace(server.head, number=1)
        async with following(new, server) as ahead:
            assert ahead.opened.last_record == 1
        await node.lead()
        await node.write(maker, 3)
    assert list(server.snapshots) == [1, 3]
    with capture_logs() as logs:
        async with following(path, server) as again:
            assert again.opened.last_record == 1
            await again.catch_up()
    events = [(line["event"], line["record"]) for line in logs]
    assert events == [("store_set_aside", 3), ("snapshot_unusable", 3), ("store_made_from_snapshot", 1)]
    assert rows_of(path) == rows_of(other)
    with edit_store(f"{path}.old") as conn:
        assert conn.execute("SELECT count(*) FROM jobs").fetchone() == (3,), "the store of the node is kept"
    server.snapshots.pop(1)
    async with following(f"{path}.first", server) as node:
        assert node.opened.last_record == 0


async def test_a_store_that_was_set_aside_is_not_replaced_by_a_new_one(path: str, server: MemoryServer) -> None:
    maker = ChangeFactory()
    async with leading(path, server) as leader:
        await leader.store.write(maker.batch([maker.create("a")]))
        await snapshot_of(leader)
    before = rows_of(path)
    await asyncio.to_thread(files.set_aside, path)
    async with following(path, server) as node:
        assert node.opened.last_record == 1
    assert rows_of(f"{path}.old") == before


async def test_a_snapshot_has_every_row(path: str, server: MemoryServer) -> None:
    async with leading(path, server) as leader:
        await write_much(leader, Random(3), Writer(3), 60)
        assert await snapshot_of(leader) == server.head.number
        async with following(f"{path}.new", server) as node:
            assert node.opened.last_record == server.head.number
    assert rows_of(path) == rows_of(f"{path}.new")


async def test_a_snapshot_of_an_unused_cluster_can_be_taken(path: str, server: MemoryServer) -> None:
    async with following(path, server) as node:
        assert await snapshot_of(node) == 0
    async with following(f"{path}.new", server) as node:
        assert node.opened.last_record == 0


async def test_a_backup_of_a_node_is_the_store_of_a_single_machine(path: str, server: MemoryServer) -> None:
    maker, copied = ChangeFactory(), f"{path}.copy"
    async with leading(path, server) as leader:
        await leader.store.write(maker.batch([maker.create("a")]))
        with contextlib.closing(await leader.store.backup()) as file:
            Path(copied).write_bytes(file.read())
    async with open_store(copied) as (_, opened):
        assert opened.marked
        assert [job.id for job in opened.live()] == ["a"]


async def test_an_interrupted_opening_leaves_no_lock(path: str, server: MemoryServer) -> None:
    node, gate = Node(path, server), asyncio.Event()

    async def wait(call: str) -> None:
        await gate.wait()

    node.journal.before = wait
    opening = asyncio.create_task(node.open())
    await asyncio.sleep(0.05)
    opening.cancel()
    await asyncio.sleep(0)
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await opening
    async with following(path, server):
        pass
