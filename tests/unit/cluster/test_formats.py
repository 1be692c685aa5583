"""Nodes of different versions: one that cannot read the records of the leader does not lead."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from jobd.journal.memory import MemoryServer
from jobd.journal.record import CLOSING, FORMAT
from jobd.model.commands import Create
from jobd.model.journal import BadRecord
from tests.support.cluster_harness import cluster, leader_of
from tests.support.virtual_engine import in_virtual_time, seconds


@pytest.mark.parametrize(
    ("body", "message"),
    [(b"%c" % (FORMAT + 1), "but this jobd supports formats up to"), (CLOSING, "`jobd cluster leave` has made")],
)
@pytest.mark.parametrize("is_last", [True, False])
def test_a_node_that_cannot_read_a_record_takes_no_lease(body: bytes, message: str, is_last: bool) -> None:
    @in_virtual_time
    async def lead() -> None:
        server = MemoryServer()
        leader, standby = nodes = cluster(server, "a", "b")
        assert await leader_of(nodes) is leader
        await leader.ask(Create())
        await seconds(1.2)
        standby.journal.is_reachable = False
        await leader.ask(Create())
        server.records[-1] = replace(server.records[-1], body=body)
        if not is_last:
            await leader.ask(Create())
        await leader.kill()
        before = server.lead
        standby.journal.is_reachable = True
        with pytest.raises(BadRecord, match=message):
            await standby.ended_by_itself()
        assert server.lead == before

    lead()
