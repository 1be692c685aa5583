"""The entries of nodes, and two processes with one name."""

from __future__ import annotations

import asyncio

import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from jobd.cluster.node_registry import EVERY_S, NodeRegistry
from jobd.cluster.view import Position, cluster_view
from jobd.journal.record import FORMAT, LOWEST_FORMAT
from jobd.model.clocks import BootS
from jobd.model.journal import Head, NodeEntry, NodeTooOld
from jobd.model.responses import ClusterView
from tests.support.memory_journal import MemoryServer, MemorySharedJournal
from tests.support.virtual_engine import in_virtual_time, seconds

FOLLOWS = Position(is_leader=False, holder="p-a", leader="http://a", epoch=7, record=12, lag_events=3, problem=None)


def loop_ms() -> int:
    return round(asyncio.get_running_loop().time() * 1000)


def entry(name: str, process: str, projected_to: int = 10, config: str = "c") -> NodeEntry:
    return NodeEntry(name, process, f"http://{name}", FORMAT, config, projected_to)


class Process:
    """A process with a registry."""

    def __init__(self, server: MemoryServer, mine: NodeEntry) -> None:
        self.duplicates: list[str] = []
        self.ahead_ms = 0
        self.journal = MemorySharedJournal(server)
        loop_time = asyncio.get_running_loop().time
        self.registry = NodeRegistry(
            self.journal,
            lambda: mine,
            on_refused=self.duplicates.append,
            now_s=lambda: BootS(loop_time()),
            wall_ms=lambda: loop_ms() + self.ahead_ms,
        )
        self.task = asyncio.create_task(self.registry.run())

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])


async def replaced(server: MemoryServer, alive_s: float = 0.1, pause_s: float = 0) -> Process:
    """Return the second process of a node whose first one has ended."""
    old = Process(server, entry("a", "p-1"))
    await seconds(alive_s)
    await old.stop()
    await seconds(pause_s)
    return Process(server, entry("a", "p-2"))


def view(process: Process, at: Position = FOLLOWS, *, require_sync: bool = True) -> ClusterView:
    return cluster_view(process.registry, at, node="b", journal="main", lease_ms=3_000, require_sync=require_sync)


@in_virtual_time
async def test_nodes_see_each_other(server: MemoryServer) -> None:
    a, b = (Process(server, entry(name, f"p-{name}", config=name)) for name in ("a", "b"))
    await seconds(EVERY_S + 0.1)
    shown = view(b)
    assert (shown.role, shown.node, shown.leader, shown.epoch, shown.record) == ("standby", "b", "http://a", 7, 12)
    assert [(node.name, node.role, node.lag_records) for node in shown.nodes] == [
        ("a", "leader", 0),
        ("b", "standby", 2),
    ]
    assert [node.config_differs for node in shown.nodes] == [False, True]
    assert shown.warnings == ["The configuration differs from the leader's: b."]
    assert (shown.synchronous, shown.lag_events, shown.lease_ms) == (True, 3, 3_000)
    assert view(b, replace(FOLLOWS, is_leader=True, holder=None, leader="", record=None)).leader is None
    alike = replace(server.nodes["b"][0], config_hash="a")
    server.nodes["b"] = alike, server.nodes["b"][1]
    b.registry.nodes = await b.journal.nodes()
    assert view(b).warnings == []
    (problem,) = view(b, replace(FOLLOWS, leader=None)).warnings
    assert problem == "No node leads: PostgreSQL has not confirmed a leader yet."
    (problem,) = view(b, replace(FOLLOWS, leader=None, unheard_ms=4_100)).warnings
    assert problem == "This node has not heard from PostgreSQL for 4.1 s, so it does not know which node leads."
    assert view(b, replace(FOLLOWS, unheard_ms=1_100)).warnings == [
        "This node has not heard from PostgreSQL for 1.1 s."
    ]
    later = replace(entry("b", "p-b"), projected_to=9)
    assert [b.registry.lag_ms(each) for each in (later, entry("b", "p-b"))] == [2_100, 0]
    await b.stop()
    await seconds(10)
    assert [node.seen_ms > 8_000 for node in view(a).nodes] == [False, True]
    a.journal.is_reachable = False
    await seconds(10)
    assert [node.is_unseen for node in view(a).nodes] == [True, True]


@in_virtual_time
async def test_a_leader_that_was_restarted_is_shown_before_its_entry_is_written_again(server: MemoryServer) -> None:
    for name in ("a", "b"):
        await MemorySharedJournal(server).register(entry(name, f"old-{name}"))
    b = Process(server, entry("b", "new-b"))
    await seconds(0.1)
    leads = replace(FOLLOWS, is_leader=True, holder="new-b", leader="http://b")
    assert [(node.name, node.role) for node in view(b, leads).nodes] == [("a", "standby"), ("b", "leader")]


@in_virtual_time
async def test_warnings_are_described(server: MemoryServer) -> None:
    process = Process(server, entry("b", "p-b"))
    server.health = replace(server.health, is_synchronous=False, is_waiting=True, writable=("pg1", "pg2"))
    await seconds(0.1)
    two = "PostgreSQL accepts writes at pg1 and pg2: stop the former primary, pg2."
    sync = "PostgreSQL has no synchronous standby: a lost disk loses acknowledged jobs."
    waits = "A write waits for a synchronous standby of PostgreSQL."
    assert view(process).warnings == [sync, two, waits]
    assert view(process, require_sync=False).warnings == [two, waits]
    for ahead_ms, text in ((3_210, "3.2 s ahead of"), (-1_500, "1.5 s behind")):
        process.registry.nodes = [replace(entry("b", "p-b"), ahead_ms=ahead_ms)]
        shown = view(process, replace(FOLLOWS, problem="The disk is full."), require_sync=False)
        clock = f"The wall clock of node b is {text} PostgreSQL's."
        assert shown.warnings == ["The disk is full.", clock, two, waits]
    unseen = replace(process.registry.nodes[0], seen_ms=60_000)
    process.registry.nodes = [unseen]
    process.journal.is_reachable = False
    await seconds(EVERY_S)
    assert (view(process).synchronous, view(process).warnings) == (None, ["The journal cannot be reached: try again"])
    shown = view(process, replace(FOLLOWS, problem="PostgreSQL cannot be reached."))
    assert shown.warnings == ["PostgreSQL cannot be reached."]


@in_virtual_time
async def test_the_format_is_the_lowest_of_all_nodes_also_of_those_that_are_down(server: MemoryServer) -> None:
    new = Process(server, entry("a", "p-a"))
    assert new.registry.too_old_for(LOWEST_FORMAT) is None
    assert new.registry.too_old_for(FORMAT) == "(not known yet)"
    await seconds(0.1)
    assert new.registry.too_old_for(FORMAT) is None
    old = Process(server, replace(entry("b", "p-b"), format=1))
    await seconds(EVERY_S + 0.1)
    assert new.registry.too_old_for(FORMAT) == "b"
    (problem,) = view(new).warnings
    assert problem.startswith("Nodes of an older version do not read records of format 3: b (up to 1).")
    await old.stop()
    await seconds(100)
    assert new.registry.too_old_for(FORMAT) == "b"
    await new.journal.forget("b")
    await seconds(EVERY_S)
    assert (new.registry.too_old_for(FORMAT), view(new).warnings) == (None, [])


@in_virtual_time
async def test_a_new_leader_reads_the_nodes_again(server: MemoryServer) -> None:
    new = Process(server, entry("a", "p-a"))
    await seconds(0.1)
    await MemorySharedJournal(server).register(replace(entry("b", "p-b"), format=1))
    assert new.registry.too_old_for(FORMAT) is None
    await new.registry.begin_leadership()
    assert new.registry.too_old_for(FORMAT) == "b"
    await new.journal.forget("b")
    new.journal.is_reachable = False
    await new.registry.begin_leadership()
    assert new.registry.too_old_for(FORMAT) == "(not known yet)"
    new.journal.is_reachable = True
    await seconds(EVERY_S)
    assert new.registry.too_old_for(FORMAT) is None


@in_virtual_time
async def test_a_new_leader_replaces_the_entry_of_its_previous_process_at_once(server: MemoryServer) -> None:
    """Else the next leader could write records that this node does not read."""
    await MemorySharedJournal(server).register(entry("a", "old-a"))
    older = Process(server, replace(entry("a", "new-a"), format=LOWEST_FORMAT))
    await seconds(0.1)
    await older.registry.begin_leadership()
    await older.stop()
    assert [(node.process, node.format) for node in await older.journal.nodes()] == [("new-a", LOWEST_FORMAT)]


@in_virtual_time
async def test_a_node_is_refused_that_does_not_read_the_records(server: MemoryServer) -> None:
    server.head = replace(server.head, format=FORMAT)
    old = Process(server, replace(entry("a", "p-1"), format=FORMAT - 1))
    await seconds(0.1)
    assert [old.registry.problem] == old.duplicates
    assert "node a does not read" in old.duplicates[0]
    with pytest.raises(NodeTooOld):
        await old.registry.begin_leadership()
    assert server.nodes == {}


@in_virtual_time
async def test_a_node_that_cannot_follow_announces_its_format(server: MemoryServer) -> None:
    new = Process(server, entry("a", "p-1"))
    await seconds(0.1)
    await new.stop()
    old = Process(server, replace(entry("a", "p-2"), format=1))
    await old.registry.announce()
    assert server.nodes["a"][0].format == 1
    old.journal.is_reachable = False
    await old.registry.announce()


@in_virtual_time
async def test_a_process_that_was_restarted_gets_its_name_back(server: MemoryServer) -> None:
    new = await replaced(server, pause_s=1)
    await seconds(2 * EVERY_S)
    assert [node.process for node in new.registry.nodes] == ["p-1"]
    await seconds(3 * EVERY_S)
    assert [node.process for node in new.registry.nodes] == ["p-2"]
    assert (new.duplicates, new.registry.problem) == ([], None)


@in_virtual_time
async def test_a_restarted_process_is_not_a_duplicate_if_the_clock_of_the_server_steps_back(
    server: MemoryServer,
) -> None:
    new = await replaced(server, alive_s=3)
    server.now_ms = lambda: loop_ms() - 3_600_000
    await seconds(5 * EVERY_S)
    assert (new.duplicates, new.registry.problem) == ([], None)
    assert [node.process for node in new.registry.nodes] == ["p-2"]


@in_virtual_time
async def test_the_last_write_of_a_killed_process_makes_no_duplicate(server: MemoryServer) -> None:
    new = await replaced(server)
    await seconds(0.1)
    await MemorySharedJournal(server).register(entry("a", "p-1"))
    await seconds(5 * EVERY_S)
    assert new.duplicates == []
    assert [node.process for node in new.registry.nodes] == ["p-2"]


@in_virtual_time
async def test_a_restarted_process_is_not_a_duplicate_while_the_journal_is_slow(server: MemoryServer) -> None:
    new = await replaced(server)
    waits_s = [0.0, 0.0, 0.0, 0.0, 0.4, 0.4, 0.4, 0.4]  # before and after the calls

    async def be_slow(call: str) -> None:
        if call in ("nodes", "health") and waits_s:
            await seconds(waits_s.pop(0))

    new.journal.before = be_slow
    new.journal.after = be_slow
    await seconds(6 * EVERY_S)
    assert (new.duplicates, new.registry.problem) == ([], None)
    assert [node.process for node in new.registry.nodes] == ["p-2"]


@in_virtual_time
async def test_a_name_that_another_process_uses_is_not_taken(server: MemoryServer) -> None:
    first = Process(server, entry("a", "p-1"))
    await seconds(0.1)
    with capture_logs() as logs:
        second = Process(server, entry("a", "p-2"))
        await seconds(2 * EVERY_S + 0.1)
    problem = 'Another process already runs as node "a" on this journal: give each node its own node.name.'
    assert second.duplicates == [problem]
    assert [line["event"] for line in logs] == ["duplicate_node"]
    assert view(second).warnings[0] == problem
    assert server.nodes["a"][0].process == "p-1"
    assert first.registry.problem is None


@in_virtual_time
async def test_a_name_that_another_process_begins_to_use_is_a_problem(server: MemoryServer) -> None:
    first = Process(server, entry("a", "p-1"))
    await seconds(0.1)
    await MemorySharedJournal(server).register(entry("a", "p-2"))
    await seconds(EVERY_S)
    assert first.registry.problem is not None
    assert first.duplicates == []
    await seconds(EVERY_S)
    assert first.registry.problem is None


@in_virtual_time
async def test_a_slow_response_is_not_a_clock_difference(server: MemoryServer) -> None:
    process = Process(server, entry("a", "p-a"))
    process.ahead_ms = 2_000
    await seconds(EVERY_S + 0.1)
    assert process.registry.ahead_ms == 2_000
    assert [node.ahead_ms for node in process.registry.nodes] == [2_000]
    process.ahead_ms = -2_000
    await seconds(EVERY_S)
    assert process.registry.ahead_ms == -2_000
    head, process.ahead_ms = process.journal.head, 0

    async def slow() -> Head:
        await seconds(1)
        found = await head()
        await seconds(3)
        return found

    process.journal.head = slow  # type: ignore[method-assign]
    await seconds(EVERY_S + 4)
    assert process.registry.ahead_ms == 0
