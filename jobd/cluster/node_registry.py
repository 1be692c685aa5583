"""The nodes of a journal: each describes itself there, and sees the others."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Final

import structlog
from msgspec.structs import replace

from jobd.cluster.lease import boot_clock_s
from jobd.engine.clock import wall_clock_ms
from jobd.journal import record
from jobd.model.clocks import BootS
from jobd.model.journal import JournalHealth, JournalUnavailable, NodeEntry, NodeTooOld, SharedJournal

EVERY_S: Final = 2.0
GONE_S: Final = 3 * EVERY_S  # if an entry is older, its process has probably ended
SAMPLES: Final = 1_800  # a node that is behind by more than an hour counts as an hour behind

log = structlog.get_logger("jobd.cluster")


class NodeRegistry:
    """Writes the entry of this node while `run` runs, as `describe` returns it.

    `nodes` and `health` are those last read; `health` is None while they cannot be read. `ahead_ms` is by how much the
    wall clock of this node is ahead of that of the server. `problem` is set if another process uses the name of this
    node, or if the journal has records that this node does not read. If the other process used it first, or the records
    are not read, `on_refused` is called with `problem`, and no entry is written.
    """

    def __init__(
        self,
        journal: SharedJournal,
        describe: Callable[[], NodeEntry],
        *,
        on_refused: Callable[[str], None] = lambda problem: None,
        now_s: Callable[[], BootS] = boot_clock_s,
        wall_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self.nodes: list[NodeEntry] = []
        self.health: JournalHealth | None = None
        self.failure: str | None = None  # of the latest attempt to use the journal
        self.problem: str | None = None
        self.ahead_ms = 0
        self._journal = journal
        self._describe = describe
        self._on_refused = on_refused
        self._now_s = now_s
        self._wall_ms = wall_ms
        self._other: NodeEntry | None = None  # of another process with the name, which this one watches
        self._other_since_s = BootS(0.0)  # when it was first seen like this
        self._other_writes = 0  # number of changes seen
        self._read_s = BootS(0.0)  # when `nodes` were read
        self._records: deque[tuple[BootS, int]] = deque(maxlen=SAMPLES)  # a time, and the last record at that time
        self._is_registered = False
        self._has_nodes = False

    async def run(self) -> None:
        """Write and read the entries until cancelled."""
        while True:
            try:
                await self._read_nodes()
                self.health = await self._journal.health()
                await self._compare_clocks()
                await self._register()
                self.failure = None
            except JournalUnavailable as error:
                self.health, self.failure = None, str(error)
            except NodeTooOld as error:
                self.problem = str(error)
                self._on_refused(self.problem)
            await asyncio.sleep(EVERY_S)

    @property
    def age_ms(self) -> int:
        """The time since `nodes` were read."""
        return int((self._now_s() - self._read_s) * 1000)

    def lag_ms(self, node: NodeEntry) -> int:
        """Return the time since this node had a record that `node` lacks, 0 if it lacks none."""
        now_s = self._now_s()
        return next((int((now_s - at_s) * 1000) for at_s, record in self._records if record > node.projected_to), 0)

    async def begin_leadership(self) -> None:
        """Write the entry of this node, which it may not have done yet, and read `nodes` again.

        Another leader may have written for nodes that this one has not seen. Raises NodeTooOld.
        """
        self._has_nodes = False
        await self.announce()
        await self.refresh()

    def too_old_for(self, format: int) -> str | None:
        """Return the name of a node, perhaps one that does not run, that does not read records of this format."""
        if not self._has_nodes and format > record.LOWEST_FORMAT:
            return "(not known yet)"
        return next((node.name for node in self.nodes if node.format < format), None)

    async def refresh(self) -> None:
        """Read `nodes` now, if the journal can be reached."""
        with contextlib.suppress(JournalUnavailable):
            await self._read_nodes()

    async def announce(self) -> None:
        """Write the entry of a node that leads or cannot follow, so leaders write what it reads. Raises NodeTooOld."""
        with contextlib.suppress(JournalUnavailable):
            await self._journal.register(self._describe())

    async def _read_nodes(self) -> None:
        self.nodes, self._has_nodes = await self._journal.nodes(), True
        self._read_s = self._now_s()

    async def _compare_clocks(self) -> None:
        """Measure `ahead_ms`. A slow response does not count as a difference."""
        sent_ms = self._wall_ms()
        server_ms = (await self._journal.head()).at
        self.ahead_ms = max(sent_ms - server_ms, 0) + min(self._wall_ms() - server_ms, 0)

    async def _register(self) -> None:
        mine = replace(self._describe(), ahead_ms=self.ahead_ms)
        self._records.append((self._now_s(), mine.projected_to))
        if not self._is_registered and self._watches_other(mine):
            return
        replaced = await self._journal.register(mine)
        self.problem = None
        if self._is_registered and replaced is not None:
            self._note_duplicate(mine.name)
        self._is_registered = True

    def _watches_other(self, mine: NodeEntry) -> bool:
        """Return whether another process may use the name, so that this one has to keep watching it.

        No clock of the server counts, because it can be set back. The entry of a process that was killed may change
        once more, by a statement that was on its way.
        """
        other = next((node for node in self.nodes if node.name == mine.name and node.process != mine.process), None)
        if other is None:
            return False
        watched = self._other
        if watched is None or watched.version != other.version:
            is_same = watched is not None and watched.process == other.process
            self._other, self._other_since_s = other, self._now_s()
            self._other_writes = self._other_writes + 1 if is_same else 0
            if self._other_writes > 1:
                self._on_refused(self._note_duplicate(mine.name))
        return other.seen_ms < GONE_S * 1000 and self._now_s() < self._other_since_s + GONE_S

    def _note_duplicate(self, name: str) -> str:
        self.problem = (
            f'Another process already runs as node "{name}" on this journal: give each node its own node.name.'
        )
        log.error("duplicate_node", message=self.problem)
        return self.problem
