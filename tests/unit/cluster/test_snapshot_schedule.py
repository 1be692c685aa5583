"""When a snapshot is written, by which node, and what is trimmed behind it."""

from __future__ import annotations

import asyncio
import errno
import tempfile
from typing import Any, cast

import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from jobd.cluster import snapshot_schedule
from jobd.cluster.node_registry import NodeRegistry
from jobd.cluster.snapshot_schedule import SnapshotSchedule
from jobd.model.journal import NodeEntry, Record, SharedJournal
from jobd.model.storage import DiskFull
from jobd.storage.backup import StoreCopy
from tests.support.memory_journal import MemoryServer, MemorySharedJournal
from tests.support.virtual_engine import in_virtual_time, seconds

EVERY_MS = 60_000
KEEP_MS = 600_000


def loop_ms() -> int:
    return round(asyncio.get_running_loop().time() * 1000)


@pytest.fixture(autouse=True)
def _few_records(monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_once(call: object, *args: object) -> object:
        return call(*args)  # type: ignore[operator]

    monkeypatch.setattr(snapshot_schedule, "MIN_RECORDS", 10)
    monkeypatch.setattr(asyncio, "to_thread", at_once)


class Node:
    """A node whose store is a file with a few bytes. `a` leads."""

    def __init__(self, server: MemoryServer, name: str, *others: str) -> None:
        self.server = server
        self.journal = MemorySharedJournal(server)
        self.registry = NodeRegistry(self.journal, lambda: entry(name))
        self.registry.nodes = [entry(each) for each in sorted({name, *others})]
        self.copies = 0
        self.lag_records = 0  # of the tables
        self.error: Exception | None = None
        self.is_current = True
        self.fails_over = False  # after the next copy
        self.schedule = SnapshotSchedule(
            self.journal,
            cast(Any, self),
            self.registry,
            process=f"p-{name}",
            leader=lambda: "p-a",
            every_ms=EVERY_MS,
            keep_ms=KEEP_MS,
            wall_ms=loop_ms,
        )
        self.task = asyncio.create_task(self.schedule.run())

    async def is_on_branch(self, journal: SharedJournal) -> bool:
        return self.is_current

    async def snapshot(self) -> StoreCopy:
        if self.error is not None:
            raise self.error
        self.copies += 1
        if self.fails_over:
            self.is_current = False
        file = tempfile.TemporaryFile()  # noqa: SIM115 - the schedule closes it
        file.write(b"tables")
        file.seek(0)
        return StoreCopy(file, self.server.head.number - self.lag_records)

    def append(self, count: int) -> None:
        """Let the leader append records."""
        for _ in range(count):
            number = self.server.head.number + 1
            self.server.records.append(Record(number, 1, 1, 1, loop_ms(), b""))
            self.server.change(replace(self.server.head, number=number))

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])


def entry(name: str, seen_ms: int = 0) -> NodeEntry:
    return NodeEntry(name, f"p-{name}", "", 2, "", 0, seen_ms)


@in_virtual_time
async def test_the_first_standby_writes_after_enough_records_and_time(server: MemoryServer) -> None:
    node = Node(server, "b", "a", "c")
    node.append(9)
    await seconds(100)
    assert node.copies == 0
    node.append(1)
    await seconds(11)
    assert list(server.snapshots) == [10]
    node.append(20)
    await seconds(40)
    assert list(server.snapshots) == [10]
    await seconds(20)
    assert list(server.snapshots) == [10, 30]
    node.lag_records = 3
    node.append(10)
    await seconds(70)
    assert list(server.snapshots) == [30, 37], "of the records that the tables have"


@pytest.mark.parametrize(
    ("name", "others", "writes"), [("a", "bc", False), ("a", "", True), ("c", "ab", False), ("d", "a", True)]
)
@in_virtual_time
async def test_one_node_writes(server: MemoryServer, name: str, others: str, writes: bool) -> None:
    node = Node(server, name, *others)
    node.append(10)
    await seconds(60)
    assert bool(node.copies) == writes


@pytest.mark.parametrize(
    ("name", "old", "writes"), [("b", "c", False), ("c", "c", True), ("b", "a", False), ("a", "a", True)]
)
@in_virtual_time
async def test_a_node_with_the_oldest_tables_writes(server: MemoryServer, name: str, old: str, writes: bool) -> None:
    node = Node(server, name, *({"a", "b", "c"} - {name}))
    node.registry.nodes[:] = [
        replace(each, schema_version=11 if each.name == old else 12)
        for each in sorted(node.registry.nodes, key=lambda each: each.name)
    ]
    node.append(10)
    await seconds(20)
    assert bool(node.copies) == writes


@in_virtual_time
async def test_the_leader_writes_if_no_standby_runs(server: MemoryServer) -> None:
    node = Node(server, "a")
    node.registry.nodes.append(entry("b", seen_ms=10_000))
    node.append(10)
    await seconds(20)
    assert node.copies == 1


@in_virtual_time
async def test_nothing_is_trimmed_behind_a_single_snapshot(server: MemoryServer) -> None:
    node = Node(server, "b")
    node.append(5)
    await seconds(2_000)
    node.append(5)
    await seconds(70)
    assert (list(server.snapshots), len(server.records)) == ([10], 10)


@in_virtual_time
async def test_two_snapshots_are_kept_and_old_records_behind_them_are_trimmed(server: MemoryServer) -> None:
    node = Node(server, "b")
    for _ in range(5):
        node.append(10)
        await seconds(70)
    assert list(server.snapshots) == [40, 50]
    assert len(server.records) == 50, "none is old enough"
    await seconds(400)
    node.append(10)
    await seconds(70)
    assert list(server.snapshots) == [50, 60]
    first = server.records[0]
    assert 10 < first.number <= 50
    assert loop_ms() - KEEP_MS - 70_000 < first.at
    await seconds(2_000)
    for count in (10, 10, 0):
        node.append(count)
        await seconds(70)
    assert server.records[0].number == 61, "later ones are too young"
    await node.stop()
    again = Node(server, "b")  # it does not know which records are gone
    await seconds(2_000)
    again.append(10)
    await seconds(70)
    assert list(server.snapshots) == [80, 90]
    assert server.records[0].number == 81, "the older snapshot has those before"
    for _ in range(2):
        again.append(5)
        await seconds(2_000)
    assert list(server.snapshots) == [90, 100]
    assert server.records[0].number == 91, "later ones are only in the newer snapshot, whatever their age"


@in_virtual_time
async def test_another_node_that_is_writing_is_not_disturbed(server: MemoryServer) -> None:
    node = Node(server, "b")
    server.snapshot_writer = MemorySharedJournal(server)
    node.append(10)
    await seconds(20)
    assert (node.copies > 0, server.snapshots) == (True, {})


@pytest.mark.parametrize(
    ("error", "level"),
    [(DiskFull("the disk is full"), "warning"), (OSError(errno.EMFILE, "Too many open files"), "error")],
)
@in_virtual_time
async def test_a_failure_is_logged_and_tried_again(server: MemoryServer, error: Exception, level: str) -> None:
    node = Node(server, "b")
    node.append(10)
    with capture_logs() as logs:
        node.error = error
        await seconds(11)
        node.error = None
        await seconds(11)
    found = [(line["event"], line["log_level"]) for line in logs]
    assert found == [("snapshot_failed", level), ("snapshot_written", "info")]


@in_virtual_time
async def test_another_node_writes_if_the_first_one_cannot(server: MemoryServer) -> None:
    b, c, a = Node(server, "b", "a", "c"), Node(server, "c", "a", "b"), Node(server, "a", "b", "c")
    b.error = DiskFull("the disk is full")
    b.append(10)
    await seconds(EVERY_MS / 1000)
    assert (c.copies, server.snapshots) == (0, {})
    await seconds(30)
    assert list(server.snapshots) == [10]
    b.append(10)
    await seconds(1.5 * EVERY_MS / 1000)
    assert list(server.snapshots) == [10]
    await seconds(EVERY_MS / 1000)
    assert (list(server.snapshots), c.copies, a.copies) == ([10, 20], 2, 0)
    c.error = b.error
    b.append(10)
    await seconds(3.5 * EVERY_MS / 1000)
    assert (list(server.snapshots), a.copies) == ([20, 30], 1)


@in_virtual_time
async def test_a_snapshot_of_the_future_does_not_delay_the_next_one() -> None:
    ahead_ms = 1 << 40
    server = MemoryServer(lambda: loop_ms() + ahead_ms)
    node = Node(server, "b")
    node.append(10)
    await seconds(20)
    ahead_ms = 0
    node.append(10)
    await seconds(20)
    assert list(server.snapshots) == [10, 20]
    node.append(10)
    await seconds(40)
    assert list(server.snapshots) == [10, 20]


@in_virtual_time
async def test_a_node_with_records_that_the_journal_lacks_writes_none(server: MemoryServer) -> None:
    node = Node(server, "b", "a")
    node.append(10)
    node.is_current = False
    with capture_logs() as logs:
        await seconds(11)
        assert (node.copies, node.server.snapshots) == (0, {})
        node.is_current = node.fails_over = True
        await seconds(11)
    assert (node.copies, node.server.snapshots) == (1, {})
    assert [line["reason"] for line in logs] == ["the journal lacks the last record of this node"] * 2


@in_virtual_time
async def test_a_cancellation_ends_a_snapshot_in_progress(server: MemoryServer) -> None:
    node = Node(server, "b")
    node.append(10)

    async def hang(call: str) -> None:
        if call == "write_part":
            await asyncio.sleep(3_600)

    node.journal.after = hang
    await seconds(15)
    began_s = loop_ms()
    await node.stop()
    assert loop_ms() == began_s
    assert (server.snapshots, server.snapshot_writer) == ({}, None)
