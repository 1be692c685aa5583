"""Turn the store of a single machine into a cluster, and a cluster into the store of a single machine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from uuid import uuid4

from jobd.cluster.lease import lease_of
from jobd.engine.clock import wall_clock_ms
from jobd.journal import record
from jobd.model.job import new_epoch
from jobd.model.journal import (
    BadRecord,
    Head,
    JournalOutcomeUnknown,
    JournalUnavailable,
    LeadershipLost,
    Record,
    SharedJournal,
)
from jobd.model.storage import SPARE_BYTES
from jobd.storage.cluster import joining, snapshots
from jobd.storage.cluster.cluster_store import ClusterStore
from jobd.storage.cluster.membership import WrongCluster
from jobd.storage.files import StoreError

_READ_LIMIT = 200  # records of one read


class CannotConvert(StoreError):
    """A cluster cannot be made, or left. The text says why."""


async def init_from_store(journal: SharedJournal, path: str) -> None:
    """Make the store at `path` the first one of the cluster of `journal`, which is new and begins after FIRST_RECORD.

    No node can lead before its snapshot is complete. A second call completes what the first one began.
    """
    head = await journal.head()
    if head.number != joining.FIRST_RECORD or head.holder is not None:
        raise CannotConvert("the journal is in use, or was made without a store: choose another journal.name")
    await asyncio.to_thread(joining.convert_to_cluster, path, journal.cluster_id)
    if not await journal.snapshots():
        file = await asyncio.to_thread(open, path, "rb")
        try:
            written = await journal.write_snapshot(head.number, snapshots.compressed(file), 0)
        finally:
            await asyncio.to_thread(file.close)
        if not written:
            raise JournalUnavailable("another process is writing this snapshot: wait for it, then try again")


async def leave(journal: SharedJournal, path: str, lease_s: float) -> int:
    """Turn the store at `path` into that of a single machine, with all records of `journal`, and close the journal.

    All nodes must be stopped: it fails if a node leads, see `take_free_leadership`. Return the new epoch. The journal
    is closed when the tables have all of its records, so an error before that leaves the cluster as it was. A second
    call completes what the first one began. An `init_from_store` without its snapshot is undone too. Raises
    CannotConvert, DiskFull, JournalUnavailable, and the errors of a store.
    """
    try:
        store, opened = await ClusterStore.open_for(path, journal, needs_snapshot=False)
    except WrongCluster:
        if (epoch := await _epoch_if_left(journal, path)) is None:
            raise
        return epoch
    async with store:
        with repeatable_errors():
            head = await take_free_leadership(journal, opened.numbers.epoch, lease_s)
            last, is_closed = await _catch_up(store, journal, opened.last_record)
            await store.project()
            assert store.projected_to == last == head.number - is_closed, (store.projected_to, last, head)
            if not is_closed:
                await store.probe(SPARE_BYTES)  # the rest needs a few pages
                made = Record(head.number + 1, 1, 0, head.epoch, wall_clock_ms(), record.CLOSING)
                await journal.append(made, head.number)
    return await asyncio.to_thread(joining.leave, path, epoch=head.epoch, is_complete=True)


async def _epoch_if_left(journal: SharedJournal, path: str) -> int | None:
    """Return the epoch of a store that `leave` has already turned into that of a single machine, else None."""
    last = (await journal.head()).number
    with contextlib.suppress(BadRecord):
        if last and (await journal.read(last - 1, 1))[0].body == record.CLOSING:
            return await asyncio.to_thread(joining.epoch_if_left, path, last - 1)
    return None


@contextlib.contextmanager
def repeatable_errors() -> Iterator[None]:
    """Translate the errors of taking and using leadership into those of a command that can be repeated."""
    try:
        yield
    except JournalOutcomeUnknown as error:
        text = "PostgreSQL did not respond, so it is not known whether this was done: repeat the command"
        raise JournalUnavailable(text) from error
    except LeadershipLost as error:
        raise CannotConvert(f"{error}: stop the daemons of all nodes first") from error


async def take_free_leadership(journal: SharedJournal, epoch: int, lease_s: float) -> Head:
    """Take leadership when no node has it, with an epoch above `epoch`, so that no other node appends.

    It waits for `lease_s`, or for the lease of the leader if that is longer. Raises CannotConvert if a node leads, and
    JournalOutcomeUnknown.
    """
    seen = await journal.head()
    await asyncio.sleep(max(lease_s, lease_of(seen.holder, await journal.nodes())))
    now = await journal.head()
    highest = new_epoch(max(seen.epoch, epoch), wall_clock_ms())
    head = None
    if now.renewed == seen.renewed:
        head = await journal.take_over(now, holder=uuid4().hex, url="", epoch=highest)
    if head is None:
        leader = f" at {now.url}" if now.url else ""
        raise CannotConvert(f"a node{leader} leads: stop the daemons of all nodes first")
    return head


async def _catch_up(store: ClusterStore, journal: SharedJournal, last: int) -> tuple[int, bool]:
    """Follow all records after `last`. Return the number of the last one, and whether a closing record follows it."""
    while found := await journal.read(last, _READ_LIMIT):
        if is_closed := found[-1].body == record.CLOSING:
            del found[-1]
        await store.follow(found)
        last += len(found)
        if is_closed:
            return last, True
    return last, False
