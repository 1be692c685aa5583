"""Nodes of a cluster in one process: the real actor and standby on in-memory storage, in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Coroutine, Sequence
from random import Random
from typing import Any, ClassVar, Final, cast

from msgspec import Struct

from jobd.cluster.leadership import Leadership
from jobd.cluster.standby import NodeSettings, Standby
from jobd.cluster.warm_state import WarmState
from jobd.engine.actor import Actor, DiskBroken
from jobd.engine.clock import Clock
from jobd.engine.idempotency import IdempotencyStore
from jobd.journal import record
from jobd.journal.checksum import checksum
from jobd.maintenance.due_jobs import DueJobs
from jobd.maintenance.restart_grace import extend_held_locks
from jobd.model.clocks import BootMs, BootS
from jobd.model.commands import AnyCommand, Create
from jobd.model.errors import ApiError
from jobd.model.job import Policy, new_epoch
from jobd.model.journal import Record, SharedJournal
from jobd.model.responses import Response
from jobd.model.storage import Batch, DiskFull, TableWrite
from jobd.storage.cluster import membership
from jobd.storage.cluster.appender import Appender
from jobd.storage.cluster.membership import Followed
from tests.support.memory_journal import MemoryServer, MemorySharedJournal
from tests.support.memory_storage import MemoryStorage
from tests.support.virtual_engine import WALL, in_virtual_time

LEASE_S: Final = 3.0


class Made(Struct):
    """A record to append, and then the payloads that its batch asks for."""

    record: Record
    payloads: dict[int, bytes] = {}


class SharedStorage(MemoryStorage):
    """Local tables behind a shared journal."""

    def __init__(self) -> None:
        super().__init__()
        self.appender: Any = Appender(lambda lost: None)
        self._last_crc: int | None = None
        self.is_full = False  # the local disk of a standby

    async def write_tables(self, write: TableWrite) -> None:
        await self._append(Batch([], self.numbers, writes=[write]), continues=True)

    async def write(self, batch: Batch) -> dict[int, bytes]:
        return await self._append(batch)

    async def _append(self, batch: Batch, *, continues: bool = False) -> dict[int, bytes]:
        reported = self._reported

        async def prepare() -> Made:
            if continues:
                batch.numbers = self.numbers
            return Made(self.next_record(batch))

        async def accept(made: Made) -> None:
            self._last_crc = checksum(made.record)
            made.payloads = self.append(batch, reported)
            self.project()

        appended: Made = await self.appender.append(prepare, accept)
        return appended.payloads

    async def follow(self, records: Sequence[Record], decoded: object = ()) -> None:
        await asyncio.sleep(0)
        if self.is_full and records:
            raise DiskFull("the disk is full")
        for made in records:
            assert made.number == self._last_record + 1
            self.log.append(made)
            self._last_record, self._last_crc = made.number, checksum(made)
            self._add(made.number, record.decode(made)[0])
        self.project()

    async def is_on_branch(self, journal: SharedJournal) -> bool:
        last = Followed(self._last_record, self._last_crc, self.numbers.epoch)
        return await membership.is_on_branch("this node", journal, last)


class ClusterNode:
    """One node. Its wall clock is `ahead_ms` ahead, and its other clocks begin at `boot_ms`.

    While it `is_frozen`, nothing of it runs: see `freeze`.
    """

    started: ClassVar[list[ClusterNode]] = []

    def __init__(
        self, server: MemoryServer, name: str, disk: SharedStorage | None = None, *, ahead_ms: int = 0, boot_ms: int = 0
    ) -> None:
        self.name = name
        self.disk = disk or SharedStorage()
        self.journal = MemorySharedJournal(server)
        self.ahead_ms = ahead_ms
        self.boot_ms = boot_ms
        self.is_listening = True
        self.leadership: Leadership | None = None
        self.ended: BaseException | None = None
        opened = self.disk.opened()
        self.warm = WarmState(cast(Any, self.disk), opened, self.disk.projected_to)
        self.standby = Standby(
            self.journal,
            self.warm,
            NodeSettings(holder=f"{name} {id(self)}", url=f"http://{name}", lease_s=LEASE_S),
            next_epoch=lambda highest: new_epoch(highest, self.wall_ms()),
            now_s=lambda: BootS(int(self.boot()) / 1000),
            wall_s=lambda: self.wall_ms() / 1000,
            refuses_connections=self.refuses_connections,
        )
        self.nodes: dict[str, ClusterNode] = {f"http://{name}": self}
        self._task = asyncio.create_task(self._run(), name=name)
        self.started.append(self)

    async def refuses_connections(self, url: str) -> bool:
        await asyncio.sleep(0)
        return not self.nodes[url].is_listening

    def wall_ms(self) -> int:
        return WALL + self.ahead_ms + round(asyncio.get_running_loop().time() * 1000)

    def boot(self) -> BootMs:
        return BootMs(self.boot_ms + round(asyncio.get_running_loop().time() * 1000))

    async def _run(self) -> None:
        leadership = await self.standby.run()
        if leadership is None:
            return
        opened, state = self.warm.opened(), self.warm.state
        self.disk.appender.lead(leadership.append, lambda format: None)
        clock = Clock(opened.numbers, wall=self.wall_ms, boot=self.boot)
        self.clock, self.state = clock, state
        keys = IdempotencyStore(opened.keys, 1000)
        self.actor = Actor(self.disk, state, keys, clock, Policy(), random=Random(self.name).randbytes)
        self.actor.before_batch = leadership.confirm
        leadership.on_epoch, leadership.on_lost = self._on_epoch, self.actor.lose_disk
        now = clock.moment().lock_ms
        extend_held_locks(self.actor, now, since=now)
        await DueJobs(self.actor, clock.moment).keep_at_start(opened.numbers.wall_ms)
        renewing = asyncio.create_task(leadership.run(), name=f"{self.name} renews")
        self.leadership = leadership
        try:
            await self.actor.run()
        except DiskBroken as error:
            self.ended = error.__cause__
        finally:
            self.is_listening = False
            leadership.stop()
            await renewing
            await self.journal.close()

    def _on_epoch(self, epoch: int) -> None:
        self.state.epoch, self.state.next_token = epoch, 1

    @property
    def leads(self) -> bool:
        return self.leadership is not None and not self._task.done()

    async def ask(self, command: AnyCommand, **options: Any) -> Any:
        """Return the data of the response, or the code of the error."""
        response = await self.actor.ask(command, **options)
        if isinstance(response, ApiError):
            return response.code
        assert isinstance(response, Response)
        return response.data

    async def create(self, *ids: str) -> None:
        for job_id in ids:
            await self.ask(Create(id=job_id))

    async def ended_by_itself(self) -> None:
        await self._task

    async def kill(self) -> None:
        """End the process at once."""
        self.is_listening = False
        for task in asyncio.all_tasks():
            if task.get_name().startswith(self.name) and task is not asyncio.current_task():
                task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await self.journal.close()

    async def stop(self) -> None:
        """End as after SIGTERM, if it runs."""
        if self._task.done():
            return
        self.standby.stop()
        if self.leadership is not None:
            self.is_listening = False
            self.actor.stop()
        await self._task


def in_cluster(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test in virtual time, and stop the nodes that it leaves running."""

    @in_virtual_time
    @functools.wraps(test)
    async def run(**fixtures: Any) -> None:
        ClusterNode.started.clear()
        await test(**fixtures)
        for node in ClusterNode.started:
            await node.stop()

    return run


def cluster(server: MemoryServer, *names: str) -> list[ClusterNode]:
    """Start nodes that know each other."""
    made = [ClusterNode(server, name) for name in names]
    join(made)
    return made


async def led_cluster(server: MemoryServer, *names: str) -> list[ClusterNode]:
    """Start nodes that know each other. The first one leads."""
    nodes = cluster(server, *names)
    assert await leader_of(nodes) is nodes[0]
    return nodes


def join(nodes: list[ClusterNode]) -> None:
    known = {f"http://{node.name}": node for node in nodes}
    for node in nodes:
        node.nodes = known


async def leader_of(nodes: list[ClusterNode], *, within_s: float = 10.0) -> ClusterNode:
    """Wait until one of the nodes leads."""
    async with asyncio.timeout(within_s):
        while True:
            leading = [node for node in nodes if node.leads]
            if leading:
                assert len(leading) == 1 or leading[0].leadership is not None
                return leading[-1]
            await asyncio.sleep(0.01)
