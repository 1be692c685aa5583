"""A journal that has lost acknowledged records goes on: what a node still has, and what all nodes then have."""

from __future__ import annotations

import asyncio
from io import BytesIO
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from jobd.cluster import loss
from jobd.cluster.conversion import CannotConvert
from jobd.cluster.loss import Accepted, CannotAccept
from jobd.cluster.standby import JUMP
from jobd.journal.record import FORMAT
from jobd.model.commands import Import
from jobd.model.job import Policy
from jobd.model.journal import JournalUnavailable, NodeEntry
from jobd.model.storage import AuditQuery, JobQuery
from jobd.storage.cluster import joining, snapshots
from jobd.storage.cluster.lost_records import LostChange, LostChanges
from jobd.storage.cluster.membership import StoreAhead, WrongCluster
from jobd.storage.files import StoreBusy
from tests.support.factories import ChangeFactory
from tests.support.memory_journal import MemoryServer
from tests.support.store_files import edit_store, job_of, make_store, read_file
from tests.unit.storage.cluster.test_cluster_store import Node, following, leading, rows_of

KEPT = 3


@pytest.fixture
def server() -> MemoryServer:
    return MemoryServer()


def lose(server: MemoryServer, upto: int) -> None:
    """Lose the records after `upto`, although they are acknowledged."""
    epochs = [each for each in server.epochs if each[1] <= upto]
    server.durable = replace(server.head, number=upto, acked=upto, epoch=epochs[-1][0] if epochs else 0)
    server.fail_over()


async def lost_tail(path: str, server: MemoryServer, *others: str) -> None:
    """Write KEPT records and four later ones, which the server loses. `others` follow the first ones."""
    maker = ChangeFactory()
    async with leading(path, server) as leader:
        made = [maker.create(name) for name in ("a", "held", "gone", "same")]
        await leader.store.write(maker.batch(made))
        held, done = maker.grant(job_of(made[1])), maker.grant(job_of(made[0]))
        await leader.store.write(maker.batch([held, done]))
        await leader.store.save_stats(b"1")
        for other in others:
            async with following(other, server) as node:
                await node.catch_up()
        assert server.head.number == KEPT
        await leader.store.write(maker.batch([maker.finish(job_of(done)), maker.create("new")]))
        await leader.store.write(maker.batch([maker.delete(job_of(made[2])), maker.grant(job_of(made[3]))]))
        await leader.store.write(maker.batch([maker.queue_event("video", paused=True)]))
        short = maker.create("short")
        await leader.store.write(maker.batch([short, maker.delete(job_of(short))]))
    lose(server, KEPT)


async def accept(path: str, server: MemoryServer, upto: int = KEPT) -> Accepted:
    journal = Node(path, server).journal
    return await loss.accept(journal, await loss.find(journal, path, upto), Policy(), 0)


async def test_a_node_says_what_is_lost_and_keeps_it(path: str, server: MemoryServer) -> None:
    await lost_tail(path, server)
    before = rows_of(path)
    found = await loss.find(Node(path, server).journal, path, KEPT)
    assert found.describe() == [
        "the journal has lost records 4 to 7, and perhaps later ones",
        "    jobs changed by them: 4",
        "    a: it is completed here, and processing in the journal",
        "    gone: it was deleted here, and is queued in the journal",
        "    same: it is processing here, and queued in the journal",
        "    new: it is queued here, and the journal does not have it",
        "    queues paused or resumed by them: video",
    ]
    assert rows_of(path) == before
    for _ in range(2):
        assert await asyncio.to_thread(loss.write_file, found) == 3
    file = Path(f"{path}.lost-after-3.jsonl")
    lines = [msgspec.json.decode(line, type=Import) for line in file.read_bytes().splitlines()]
    assert [(each.id, each.status) for each in lines] == [("a", "completed"), ("same", "processing"), ("new", "queued")]
    assert file.stat().st_mode & 0o777 == 0o600


async def test_a_loss_is_not_accepted_while_a_server_has_the_records(path: str, server: MemoryServer) -> None:
    await lost_tail(path, server)
    journal = Node(path, server).journal
    with pytest.raises(
        CannotAccept, match="PostgreSQL at b has record 7, but the last record of the journal in use is 3"
    ):
        await loss.find(journal, path, KEPT, {"a": KEPT, "b": 7})
    found = await loss.find(journal, path, KEPT, {"a": KEPT, "b": None})
    assert found.describe()[0] == "PostgreSQL at b could not be asked, and may have these records"
    await accept(path, server)
    assert (await loss.find(journal, path, KEPT, {"a": KEPT + 1, "b": 7})).is_accepted


async def test_a_loss_is_not_accepted_on_a_former_primary_alone(path: str, server: MemoryServer) -> None:
    await lost_tail(path, server)
    async with following(f"{path}.other", server) as other:
        await other.catch_up()
        await other.store.keep_timeline(server.failovers + 1)
    journal = other.journal
    with pytest.raises(CannotAccept, match="has seen timeline 2, and b could not be asked: start the present primary"):
        await loss.find(journal, f"{path}.other", KEPT, {"a": KEPT, "b": None})
    assert (await loss.find(journal, f"{path}.other", KEPT, {"a": KEPT})).unknown == []


async def test_a_job_with_damaged_events_counts_as_changed(path: str, server: MemoryServer) -> None:
    await lost_tail(path, server)
    with edit_store(path) as conn:
        conn.execute("UPDATE events SET at = 0 WHERE job_seq = (SELECT seq FROM jobs WHERE id = 'a')")
    found = await loss.find(Node(path, server).journal, path, KEPT)
    assert "    a: it is completed in both, but the lost records changed it" in found.describe()
    unknown = f"    damaged rows of events, whose changes are unknown: {found.changed.damaged}; run `jobd doctor`"
    assert found.changed.damaged
    assert unknown in found.describe()


async def test_all_nodes_go_on_without_the_lost_records(path: str, server: MemoryServer) -> None:
    other, new = f"{path}.other", f"{path}.new"
    await lost_tail(path, server, other)
    epoch = server.head.epoch
    done = await accept(path, server)
    assert (done.grants, server.head.number, server.head.holder) == (2, KEPT + 1, None)
    assert done.epoch > epoch
    for each in (path, other, new):
        async with following(each, server) as node:
            await node.catch_up()
            jobs = {job.id: job for job, _ in (await node.store.find_jobs(JobQuery())).jobs}
            statuses = {name: job.status for name, job in jobs.items()}
            assert statuses == {"a": "failed", "held": "failed", "gone": "queued", "same": "queued"}
            assert jobs["held"].error is not None
            assert loss.CAUSE in str(jobs["held"].error.message), "its stall rule is to fail"
            assert jobs["held"].ended is not None
            assert node.store._database.numbers.epoch == done.epoch
            assert node.store._database.numbers.next_job == JUMP + 5
            page = await node.store.events_after(0, 1000)
            assert page.gone_to == JUMP + 6, "clients may have seen events that do not exist any more"
            assert [event.type for event in page.events[-2:]] == ["stalled", "stalled"]
            [(_, entry)] = (await node.store.read_audit(AuditQuery(what="accept-loss"))).found
            assert (entry.jobs, entry.details) == (2, {"record": KEPT, "lost_jobs": 4})
    assert rows_of(path) == rows_of(other) == rows_of(new)
    assert not Path(f"{path}.accepting").exists()


async def test_an_older_node_has_to_be_upgraded_first(path: str, server: MemoryServer) -> None:
    await lost_tail(path, server)
    journal, before = Node(path, server).journal, server.head
    server.nodes["old"] = NodeEntry("old", "p", "", FORMAT - 1, "", 0), 0  # it registered before the first such record
    with pytest.raises(CannotAccept, match="cannot read the record: old: upgrade jobd there first"):
        await accept(path, server)
    assert server.head == before
    await journal.forget("old")
    await accept(path, server)


async def test_it_can_be_repeated(path: str, server: MemoryServer) -> None:
    await lost_tail(path, server)
    journal = Node(path, server).journal
    first = await loss.find(journal, path, KEPT)
    await loss.accept(journal, first, Policy(), 0)
    again = await loss.find(journal, path, KEPT)
    assert (again.is_accepted, again.changed, first.is_accepted) == (True, first.changed, False)
    async with following(path, server) as node:
        await node.catch_up()
        await node.lead()
        await node.store.save_stats(b"1")
    last = await loss.find(journal, path, KEPT)
    assert (last.is_accepted, last.describe()) == (True, [f"{path} has no record that the journal has lost"])
    with pytest.raises(CannotAccept, match="the last record of the journal is 5: use --upto 5"):
        await loss.find(journal, path, KEPT + 9)


@pytest.mark.parametrize(("hook", "is_in"), [("before", False), ("after", True)])
async def test_an_unknown_outcome_is_repeated(path: str, server: MemoryServer, hook: str, is_in: bool) -> None:
    await lost_tail(path, server)
    node = Node(path, server)
    found = await loss.find(node.journal, path, KEPT)
    node.journal.fail(hook, "append")
    with pytest.raises(JournalUnavailable, match="repeat the command"):
        await loss.accept(node.journal, found, Policy(), 0)
    again = await loss.find(Node(path, server).journal, path, KEPT)
    assert (again.is_accepted, again.changed) == (is_in, found.changed)


async def test_a_kill_leaves_it_undone_and_no_node_that_has_lost_records_leads(path: str, server: MemoryServer) -> None:
    await lost_tail(path, server)
    node = Node(path, server)
    node.journal.fail("before", "append", error=ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        await loss.accept(node.journal, await loss.find(node.journal, path, KEPT), Policy(), 0)
    assert server.head.number == KEPT
    with pytest.raises(StoreAhead, match="--upto 3"):
        await Node(path, server).open()
    Path(f"{path}.accepting").mkdir()
    assert (await accept(path, server)).grants == 2
    assert server.head.number == KEPT + 1
    Path(f"{path}.accepting").mkdir()
    async with following(path, server):
        assert not Path(f"{path}.accepting").exists()
        with pytest.raises(StoreBusy):
            await loss.find(node.journal, path, KEPT)


async def test_a_running_leader_and_a_journal_that_went_on_are_noticed(path: str, server: MemoryServer) -> None:
    other = f"{path}.other"
    await lost_tail(path, server, other)
    journal = Node(path, server).journal
    found = await loss.find(journal, path, KEPT)
    async with leading(other, server) as leader:
        await leader.store.save_stats(b"2")

        async def lead(call: str) -> None:
            if call == "take_over":
                await leader.journal.renew(KEPT + 1)

        journal.before = lead
        with pytest.raises(CannotConvert, match="stop the daemons of all nodes"):
            await loss.accept(journal, found, Policy(), 0)
    journal.before = Node(path, server).journal.before
    with pytest.raises(CannotAccept, match="the last record of the journal is 4 now"):
        await loss.accept(journal, found, Policy(), 0)
    with pytest.raises(CannotAccept, match="and the journal share is 3: use --upto 3"):
        await loss.find(journal, path, KEPT + 1)
    assert (await loss.find(journal, path, KEPT)).is_accepted


async def test_a_node_without_a_store_can_accept(path: str, server: MemoryServer) -> None:
    await lost_tail(path, server)
    other = f"{path}.other"
    assert (await loss.find(Node(other, server).journal, other, KEPT)).changed.jobs == []
    assert (await accept(other, server)).grants == 2
    with pytest.raises(WrongCluster):
        await loss.find(Node(path, MemoryServer(cluster_id="other")).journal, path, KEPT)


async def test_everything_after_the_first_snapshot_can_be_lost(path: str, server: MemoryServer) -> None:
    maker = await make_store(path)
    joining.convert_to_cluster(path, server.cluster_id)
    server.head = replace(server.head, number=joining.FIRST_RECORD)
    with BytesIO(read_file(path)) as file:
        parts = snapshots.compressed(file)
        await Node(path, server).journal.write_snapshot(joining.FIRST_RECORD, parts, 0)
    async with leading(path, server) as leader:
        await leader.store.write(maker.batch([maker.create("later")]))
    lose(server, joining.FIRST_RECORD)
    found = await loss.find(Node(path, server).journal, path, joining.FIRST_RECORD)
    assert [each.id for each in found.changed.jobs] == ["later"]
    await accept(path, server, joining.FIRST_RECORD)
    server.snapshots.clear()
    with pytest.raises(CannotAccept, match="neither record 1 nor a snapshot"):
        await loss.find(Node(path, server).journal, path, joining.FIRST_RECORD)


async def test_an_empty_journal_can_be_all_that_is_left(path: str, server: MemoryServer) -> None:
    await lost_tail(path, server)
    lose(server, 0)
    found = await loss.find(Node(path, server).journal, path, 0)
    assert {each.before for each in found.changed.jobs} == {None}
    assert (await accept(path, server, 0)).grants == 0


def test_the_description_of_a_large_loss_is_short() -> None:
    jobs = [LostChange(f"job-{number}", "queued", "queued") for number in range(103)]
    lines = loss.JournalLoss("/jobd.db", 1, 9, False, LostChanges(jobs)).describe()
    assert len(lines) == 103
    assert lines[2] == "    job-0: it is queued in both, but the lost records changed it"
    assert lines[-1] == "    and 3 more"


async def test_a_concurrent_takeover_and_a_damaged_record_are_detected(path: str, server: MemoryServer) -> None:
    await lost_tail(path, server)
    node, other = Node(path, server), Node(path, server).journal

    async def lead(call: str) -> None:
        if call == "append":
            await other.take_over(await other.head(), holder="other", url="", epoch=1)

    node.journal.before = lead
    found = await loss.find(node.journal, path, KEPT)
    with pytest.raises(CannotConvert, match="another node leads the journal: stop the daemons"):
        await loss.accept(node.journal, found, Policy(), 0)
    server.records[1] = replace(server.records[1], body=b"\x01")
    with pytest.raises(CannotAccept, match="cannot be followed: record 2 of the journal cannot be decoded"):
        await loss.accept(other, found, Policy(), 0)
