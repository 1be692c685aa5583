"""Several simulated nodes on one journal, as clients and invariants see them: one machine with one disk.

The disk has what is durable in the journal. S18: only the present leader appends and responds; an acknowledged change
is in the journal that the next leader reads; local tables are a prefix of the acknowledged journal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest
from msgspec.structs import replace

from jobd.cluster import snapshot_schedule, standby
from jobd.cluster.leadership import Leadership
from jobd.cluster.warm_state import WarmState
from jobd.core.state import State
from jobd.model.errors import ApiError
from jobd.model.journal import Record
from jobd.model.responses import Response
from jobd.model.storage import Batch, Numbers, QueueRow
from tests.proof.simulation.cluster.node import DOWNTIMES_S, LeaderDaemon, SimNode
from tests.proof.simulation.cluster.scenario import ClusterOptions
from tests.proof.simulation.cluster.server import SimServer
from tests.proof.simulation.cluster.webhooks import Receiver
from tests.proof.simulation.loop import InlineExecutor, SimLoop
from tests.proof.simulation.machine import Machine, SimCall, SimDaemon
from tests.proof.simulation.monitor import Monitor
from tests.proof.simulation.scenario import Scenario
from tests.proof.simulation.trace import Trace
from tests.support.memory_storage import MemoryStorage
from tests.support.memory_tables import MemoryTables
from tests.support.rule_harness import snapshot

MIN_RECORDS: Final = 10  # between snapshots
LEADS_S: Final = 3.0  # from a free lease and the start of a node until it serves
HOPS: Final = 4  # between nodes, for one request
HOP_S: Final = 0.01
CLIENT_WAITS_S: Final = 20.0  # beyond the wait of a claim
SETTLES_S: Final = 15.0  # in which a fault may delay responses after its end
NOT_ANSWERED: Final = ("not_leader", "outcome_unknown", "shutting_down", "overloaded", "invalid_request")
OWN: Final = frozenset({"epoch", "next_token", "finished"})  # which differ in a state that is warm
NUMBERS: Final = frozenset({"next_job", "next_event"})


class ClusterMonitor(Monitor):
    """Checks the decisions of the present leader; those of an earlier one are rejected by the journal."""

    machine: Cluster

    def check_start(self, daemon: SimDaemon, grace_ms: int) -> None:
        assert isinstance(daemon, LeaderDaemon)
        if not self.machine.leads(daemon.node):
            return
        self.machine.daemon = daemon
        durable = self._durable
        super().check_start(daemon, grace_ms)
        self._durable = durable  # an earlier leader may still send the responses of its last batch
        lock_ms, kept = daemon.clock.moment().lock_ms, self.machine.disk.numbers.lock_ms
        self.must(lock_ms <= kept + 1, "S11", f"locks have aged by {lock_ms - kept} ms without a leader")

    def decide(self, tx: Any, call: Any) -> Any:
        if self.daemon is None or self.daemon.state is not tx.state:
            return self._decide(tx, call)
        return super().decide(tx, call)


class Cluster(Machine):
    """The nodes, and their clients' way to them. `daemon` is that of the present leader."""

    monitor: ClusterMonitor

    def __init__(self, seed: int, plan: Scenario, options: ClusterOptions, loop: SimLoop, journal: Trace) -> None:
        self.holds_commands_s = 4 * options.lease_s  # several outages, one after the other
        super().__init__(seed, plan, loop, journal)
        self.options = options
        loop.set_default_executor(InlineExecutor())
        self.disk.numbers = self.disk.tables.numbers = Numbers()
        self.disk.epoch_file = 0
        self.disk.slice_events = self.disk.max_behind = 1 << 30
        self.server = SimServer(super().wall)
        self.server.on_durable = self._note_durable
        self.batches: list[Batch] = []  # that are durable, in order
        self._bodies: list[bytes] = []  # of their records
        self.disturbed_s = 0.0  # loop time of the latest fault
        self.disturbances = 0  # that are not over
        self.copies: dict[int, tuple[MemoryTables, int | None]] = {}  # of tables with their last record: snapshots
        self._written: dict[bytes, tuple[Batch, str]] = {}  # with the process, by the body of its record
        self._routes: dict[str, int] = {}
        self.receiver = Receiver(self)
        self.nodes = [SimNode(self, f"n{number}") for number in range(options.nodes)]

    @contextmanager
    def constants(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(standby, "POLL_S", self.options.poll_s)
            patch.setattr(snapshot_schedule, "MIN_RECORDS", MIN_RECORDS)
            yield

    def _make_monitor(self) -> Monitor:
        return ClusterMonitor(self, self.fired)

    def count(self, what: str) -> None:
        self.fired[what] += 1

    # -- the machine

    def wall(self) -> int:
        daemon = self.daemon
        return daemon.node.wall() if isinstance(daemon, LeaderDaemon) else super().wall()

    def move_clocks(self, *, wall_ms: float = 0, boot_ms: float = 0) -> None:
        for node in self.nodes:
            node.wall_shift_ms += wall_ms
        self.clocks_moved_s = self.loop.now_s

    @property
    def is_slow(self) -> bool:
        return self.disturbances > 0 or self.loop.now_s < self.disturbed_s + SETTLES_S

    def clear_faults(self) -> None:
        self.server.is_full = False
        for node in self.nodes:
            node.disk.clear_faults()
            node.is_in_reach = True
            node.is_cut_off = False
            node.resume()
            self.connect(node)

    def connect(self, node: SimNode) -> None:
        """Give the process of a node its network."""
        if node.network is not None:
            node.network.is_reachable = not node.is_cut_off
            node.network.slowness_s, node.network.lost = 0.0, None

    async def keep_running(self) -> None:
        await asyncio.gather(*(node.keep_running() for node in self.nodes))

    async def rest(self) -> None:
        """Wait for a leader, and end the standbys for good."""
        longest_s = self.options.lease_s * (1 + 2 * self.options.drift) + max(DOWNTIMES_S) + LEADS_S
        until_s = self.loop.now_s + longest_s
        while not any(node.is_serving and self.leads(node) for node in self.nodes) and not self.monitor.first:
            self.monitor.must(self.loop.now_s < until_s, "L4", f"no node leads {longest_s:.1f} s after all faults")
            await asyncio.sleep(0.1)
        for node in self.nodes:
            if not self.leads(node):
                node.is_needed = False
                await node.stop()

    async def check_delivered(self) -> None:
        await self.receiver.check_complete()

    async def shut_down(self) -> None:
        self.off = True
        self.loop._default_executor = None  # type: ignore[attr-defined]  # it has no thread to wait for
        self.clear_faults()
        for node in self.nodes:
            if self.monitor.first is None:
                await node.stop()
            else:
                node.crash(power_cut=False)
        for node in self.nodes:
            self.check_tables(node.name, node.disk.tables)

    # -- who leads

    def leads(self, node: SimNode) -> bool:
        """Return whether the process of a node holds leadership, as everyone will know it."""
        return self.server.durable.holder == node.process

    def forget(self, daemon: LeaderDaemon) -> None:
        """Note that a leader has ended."""
        if self.daemon is daemon:
            self.daemon = None

    def refuses_connections(self, by: SimNode, url: str) -> bool:
        node = next(node for node in self.nodes if node.url == url)
        return not (node.is_listening or node.is_lost or by.is_lost)

    # -- what is written

    def note_written(self, made: Record, batch: Batch, process: str) -> None:
        """Note the batch of a record that is about to be appended."""
        self._written[made.body] = (batch, process)

    def _note_durable(self, upto: int) -> None:
        """Add the records that are durable now to the disk."""
        while (number := len(self.batches) + 1) <= upto:
            made = self.server.record(number)
            if made is None or made.number != number or made.body not in self._written:
                self.monitor.fail("S18", f"the journal has {made and made.number} in place of record {number}")
                return
            batch, process = self._written[made.body]
            holder = self.server.holders[self.server.epoch_of(number)]
            self.monitor.must(process == holder, "S18", f"{process} appended record {number} while {holder} led")
            self.batches.append(batch)
            self._bodies.append(made.body)
            self.disk._flush(batch, 0)

    def check_acknowledged(self, name: str, made: Record) -> None:
        """Check a record that a standby applies."""
        same = made.number <= len(self._bodies) and made.body == self._bodies[made.number - 1]
        self.monitor.must(same, "S18", f"{name} applies record {made.number}, which is not acknowledged")

    def check_left_behind(self, node: SimNode, number: int) -> None:
        """Check that a node cannot follow from record `number` because the records after it were trimmed."""
        records, last = self.server.records, self.server.head.number
        first = records[0].number if records else last + 1
        is_behind = number < first and (number < last or number == 0)
        self.monitor.must(is_behind, "S18", f"{node.name} cannot follow from {number}, the journal begins at {first}")
        self.count("node is too far behind")

    def check_not_ahead(self, name: str, tables: MemoryTables) -> None:
        durable = self.server.durable.number
        ahead = f"the tables of {name} have record {tables.projected_to}, the journal has {durable}"
        self.monitor.must(tables.projected_to <= durable, "S18", ahead)

    def check_tables(self, name: str, tables: MemoryTables) -> None:
        """Check that local tables are a prefix of the journal."""
        self.check_not_ahead(name, tables)
        expected = MemoryTables()
        for batch in self.batches[: tables.projected_to]:
            expected.apply(batch)
        for difference in tables.differences(expected):
            self.monitor.fail("S18", f"the tables of {name} are not a prefix of the journal: {difference}")

    def check_takeover(self, node: SimNode, warm: WarmState, leadership: Leadership) -> None:
        """Check that a new leader has every acknowledged change, and the state that a cold start would have."""
        self.count("node takes over")
        self.note("node", "leads", node.process, leadership.epoch, warm.number)
        if not self.leads(node):
            self.count("node takes over, too late")
            return
        must, durable = self.monitor.must, self.server.durable
        must(warm.number == durable.number, "S18", f"{node.name} leads with record {warm.number} of {durable.number}")
        for difference in node.disk.differences(self.disk):
            self.monitor.fail("S18", f"a new leader has other rows: {difference}")
        cold = MemoryStorage()
        cold.become(self.disk.copy_tables())
        opened = cold.opened()
        state, found = State.opened(opened), warm.opened()
        state.unvalidated = dict(opened.unvalidated)
        state.advance(opened.numbers.wall_ms, opened.numbers.lock_ms)
        shown, expected = snapshot(warm.state), snapshot(state)
        for name in expected.keys() - OWN - NUMBERS:
            must(shown[name] == expected[name], "S18", f"warm {name}: {shown[name]}, cold {expected[name]}")
        for name in NUMBERS:  # they jump if records may be lost
            is_next = shown[name] - expected[name] in (0, standby.JUMP)
            must(is_next, "S18", f"warm {name}: {shown[name]}, cold {expected[name]}")
        must(list(warm.state.processing) == list(state.processing), "S18", "the order of the grants differs")
        rows = [{name: row for name, row in each.queues.items() if row != QueueRow()} for each in (found, opened)]
        must(rows[0] == rows[1], "S18", f"warm queues: {rows[0]}, cold {rows[1]}")
        for name in ("stats", "unvalidated"):
            same = getattr(found, name) == getattr(opened, name)
            must(same, "S18", f"warm {name}: {getattr(found, name)}, cold {getattr(opened, name)}")
        keys = [[(row.digest, row.grants) for row in each.keys] for each in (found, opened)]
        must(sorted(keys[0]) == sorted(keys[1]), "S9", "a new leader has other idempotency keys")
        epochs = [epoch for epoch, _ in self.server.epochs]
        last = max(
            epochs[: epochs.index(leadership.epoch)], default=0
        )  # a late statement of this node may take a later one
        must(leadership.epoch > last, "S2", f"epoch {leadership.epoch} after {last}")

    # -- clients

    async def call(self, sent: SimCall) -> Response | ApiError | None:
        """Send a command to the node that a client takes for the leader, and to others while nothing was done."""
        who, command = sent.who, sent.command
        if not any(node.is_serving and node.is_in_reach for node in self.nodes):
            await asyncio.sleep(HOPS * HOP_S)
            return None
        for _ in range(HOPS):
            node = self.nodes[self._routes.setdefault(who, 0) % len(self.nodes)]
            daemon = node.daemon
            if daemon is None or not daemon.is_open or not node.is_in_reach:
                self._routes[who] += 1
                await asyncio.sleep(HOP_S)
                continue
            was_deposed = not self.leads(node)
            waits_s = CLIENT_WAITS_S + getattr(command, "wait_ms", 0) / 1000
            waits_s = waits_s if sent.disconnect_after_s is None else min(sent.disconnect_after_s, waits_s)
            response = await self._send(daemon, replace(sent, disconnect_after_s=waits_s))
            if response is None:
                self._routes[who] += not node.is_serving
                return None
            is_answer = not isinstance(response, ApiError) or response.code not in NOT_ANSWERED
            stale = f"{node.process} responded to {type(command).__name__}, requested after another node had taken over"
            self.monitor.must(not (was_deposed and is_answer), "S18", stale, getattr(command, "id", None))
            if isinstance(response, ApiError) and response.code == "not_leader":
                self._routes[who] += 1
                await asyncio.sleep(0.05)
                continue
            return response
        return None
