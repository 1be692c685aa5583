"""Nodes of different versions: one that cannot read the records of the leader does not lead."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from jobd.cluster.node_registry import NodeRegistry
from jobd.journal import record
from jobd.journal.record import CLOSING, FORMAT
from jobd.model.commands import Create
from jobd.model.journal import BadRecord, NodeEntry
from jobd.model.storage import FormatNotRead
from tests.support.cluster_harness import in_cluster, led_cluster
from tests.support.factories import ChangeFactory
from tests.support.memory_journal import MemoryServer
from tests.support.virtual_engine import seconds
from tests.unit.storage.cluster.test_cluster_store import leading


@pytest.mark.parametrize(
    ("body", "message"),
    [(b"%c" % (FORMAT + 1), "but this jobd supports formats up to"), (CLOSING, "`jobd cluster leave` has turned")],
)
@pytest.mark.parametrize("is_last", [True, False])
@in_cluster
async def test_a_node_that_cannot_read_a_record_takes_no_lease(
    server: MemoryServer, body: bytes, message: str, is_last: bool
) -> None:
    leader, standby = await led_cluster(server, "a", "b")
    await leader.ask(Create())
    await seconds(1.2)
    standby.journal.is_reachable = False
    await leader.ask(Create())
    server.records[-1] = replace(server.records[-1], body=body)
    if not is_last:
        await leader.ask(Create())
    await leader.kill()
    before = server.head
    standby.journal.is_reachable = True
    with pytest.raises(BadRecord, match=message):
        await standby.ended_by_itself()
    assert server.head == before


async def test_an_older_node_reads_all_records_until_it_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, maker = MemoryServer(), ChangeFactory(has_extra=False)
    older = NodeEntry("older", "p", "", 1, "", 0)
    async with leading(f"{tmp_path}/jobd.db", server) as leader:
        registry = NodeRegistry(leader.journal, lambda: replace(older, name="leader", format=FORMAT))
        leader.store.lead(leader.journal.append, registry.too_old_for)
        await leader.journal.register(older)
        await registry.begin_leadership()
        for _ in range(20):
            await leader.store.write(maker.any_batch(30))
            with pytest.raises(FormatNotRead):
                await leader.store.save_stats(b"1")
        await leader.journal.forget("older")
        await registry.begin_leadership()
        await leader.store.save_stats(b"2")
    monkeypatch.setattr(record, "FORMAT", 1)
    *earlier, last = server.records
    assert sum(len(record.decode(each)[1]) for each in earlier) > 100
    with pytest.raises(BadRecord, match="has format 2"):
        record.decode(last)
