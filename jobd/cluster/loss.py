"""Continue with a journal that has lost acknowledged records, as after an asynchronous failover of its server.

The records are lost for all nodes. A node whose tables have them can say which jobs they changed.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Raw, Struct

from jobd.cluster.conversion import repeatable_errors, take_free_leadership
from jobd.cluster.standby import JUMP, READ_LIMIT
from jobd.cluster.warm_state import WarmState
from jobd.core import views
from jobd.engine.batch import Decider
from jobd.engine.clock import Clock, monotonic_s
from jobd.engine.envelope import Envelope
from jobd.engine.idempotency import IdempotencyStore
from jobd.engine.preloading import Preloaded
from jobd.engine.waiting_claims import WaitingClaims
from jobd.journal.record import FORMAT
from jobd.model.commands import EndGrants
from jobd.model.job import Policy
from jobd.model.journal import BadRecord, Head, SharedJournal
from jobd.model.responses import Response
from jobd.model.storage import AuditEntry, Batch, EventPruning, OpenedStore
from jobd.storage import files
from jobd.storage.cluster import lost_records, membership, snapshots
from jobd.storage.cluster.cluster_store import ClusterStore
from jobd.storage.cluster.lost_records import LostChange, LostChanges
from jobd.storage.cluster.membership import Followed, StoreAhead
from jobd.storage.files import FileLock, StoreError

CAUSE: Final = "The journal has lost records, which ends every grant in it."
_MAX_SHOWN: Final = 100  # jobs


class CannotAccept(StoreError):
    """A loss cannot be accepted. The text says why."""


class JournalLoss(Struct):
    """The records after `upto`, which the journal has lost.

    The store at `path` has those up to `last`, and none if `last` is `upto`. `changed` is what these changed. With
    `is_accepted`, a leader has continued without them. The servers `unknown` could not be asked for them.
    """

    path: str
    upto: int
    last: int
    is_accepted: bool
    changed: LostChanges
    unknown: list[str] = []

    @property
    def file(self) -> str:
        """The file for the jobs that the store still has."""
        return f"{self.path}.lost-after-{self.upto}.jsonl"

    def describe(self) -> list[str]:
        """Return lines about what is lost."""
        if self.last == self.upto:
            return [f"{self.path} has no record that the journal has lost"]
        jobs, queues = self.changed.jobs, self.changed.queues
        lines = [f"PostgreSQL at {host} could not be asked, and may have these records" for host in self.unknown]
        lines.append(f"the journal has lost records {self.upto + 1} to {self.last}, and perhaps later ones")
        lines.append(f"    jobs changed by them: {len(jobs)}")
        lines += [f"    {_line(each)}" for each in jobs[:_MAX_SHOWN]]
        if len(jobs) > _MAX_SHOWN:
            lines.append(f"    and {len(jobs) - _MAX_SHOWN} more")
        if queues:
            lines.append(f"    queues paused or resumed by them: {', '.join(queues)}")
        if self.changed.damaged:
            lines.append(
                f"    damaged rows of events, whose changes are unknown: {self.changed.damaged}; run `jobd doctor`"
            )
        return lines


class Accepted(Struct):
    """The outcome: how many grants ended, and the new epoch."""

    grants: int
    epoch: int


def _line(lost: LostChange) -> str:
    if lost.before is None:
        return f"{lost.id}: it is {lost.after} here, and the journal does not have it"
    if lost.after is None:
        return f"{lost.id}: it was deleted here, and is {lost.before} in the journal"
    if lost.before == lost.after:
        return f"{lost.id}: it is {lost.after} in both, but the lost records changed it"
    return f"{lost.id}: it is {lost.after} here, and {lost.before} in the journal"


async def find(
    journal: SharedJournal, path: str, upto: int, servers: Mapping[str, int | None] | None = None
) -> JournalLoss:
    """Return what the journal has lost after record `upto`, as far as the store at `path` has it.

    `servers` has the last record on each server, None if it cannot be asked. Raises CannotAccept if one of them has
    later records or may be the present primary, or if `upto` is not the last record before the loss, and the errors of
    a store.
    """
    head, epochs = await journal.head(), await journal.epochs()
    last = await asyncio.to_thread(lost_records.last_record, path, journal.cluster_id)
    common = head.number if last is None else await _last_common(journal, path, last, head.number)
    has_lost = last is not None and last.number > common
    is_accepted = upto < head.number and any(first == upto + 1 for _, first in epochs)
    unknown = [] if is_accepted else _check_servers(servers or {}, head.number)
    if unknown:
        await _check_timeline(journal, path, unknown)
    if (has_lost or not is_accepted) and upto != common:
        what = f"the last record that {path} and the journal share" if has_lost else "the last record of the journal"
        raise CannotAccept(f"{what} is {common}: use --upto {common}")
    changed = LostChanges()
    if has_lost:
        after = await _last_event(journal, path, upto)
        changed = await asyncio.to_thread(lost_records.changes, path, after)
    return JournalLoss(
        path, upto, last.number if last is not None and has_lost else upto, is_accepted, changed, unknown
    )


def _check_servers(servers: Mapping[str, int | None], number: int) -> list[str]:
    """Return those that cannot be asked for records after `number`. Raises CannotAccept if one has some."""
    for host, last in servers.items():
        if last is not None and last > number:
            raise CannotAccept(
                f"PostgreSQL at {host} has record {last}, but the last record of the journal in use is {number}: make "
                f"{host} the primary, and no record is lost. To continue without its records, stop it first"
            )
    return [host for host, last in servers.items() if last is None]


async def _check_timeline(journal: SharedJournal, path: str, unknown: list[str]) -> None:
    """Raise CannotAccept if the server in use is a former primary, and one of those `unknown` may be the present."""
    used, known = (await journal.health()).timeline, await asyncio.to_thread(lost_records.membership_of, path)
    if known is not None and 0 < used < known.timeline:
        raise CannotAccept(
            f"the server in use has timeline {used}, but {path} has seen timeline {known.timeline}, and "
            f"{', '.join(unknown)} could not be asked: start the present primary. If it is lost, remove it from "
            "journal.url, and repeat this"
        )


async def _last_common(journal: SharedJournal, path: str, last: Followed, head: int) -> int:
    """Return the number of the last record that the store and the journal share, at most `head`."""
    with suppress(StoreAhead):
        if await membership.is_on_branch(path, journal, last):
            return head
    later = [first - 1 for epoch, first in await journal.epochs() if epoch > last.epoch and first <= last.number]
    return min([head, *later])


async def _last_event(journal: SharedJournal, path: str, number: int) -> int:
    """Return the seq of the last event up to record `number`, which is in the journal or a snapshot."""
    if number == 0:
        return 0
    with suppress(BadRecord):
        return (await journal.read(number - 1, 1))[0].last_event
    if all(each.number != number for each in await journal.snapshots()):
        raise CannotAccept(f"the journal has neither record {number} nor a snapshot of it")
    async with _scratch_directory(path) as place:
        copy = f"{place}/jobd.db"
        await snapshots.install(copy, journal.read_snapshot(number), journal.cluster_id)
        return await asyncio.to_thread(lost_records.last_event, copy)


def write_file(loss: JournalLoss) -> int:
    """Write the jobs that the journal lacks or has in another state, as `jobctl export` does. Return their number."""
    new = f"{loss.file}.new"
    Path(new).unlink(missing_ok=True)
    files.create_private(new)
    files.give_to_owner(new, loss.path)
    count = 0
    with files.raising_disk_full(), open(new, "wb") as file:
        for each in loss.changed.jobs:
            if each.job is not None:
                file.write(msgspec.json.encode(views.as_import(each.job, Raw(each.payload), each.bodies)) + b"\n")
                count += 1
    files.put_in_place(new, loss.file)
    return count


async def accept(journal: SharedJournal, loss: JournalLoss, policy: Policy, lease_s: float) -> Accepted:
    """End all grants by their stall rule in one record, and let numbers of jobs and events continue JUMP higher.

    All nodes must be stopped: it fails if a node leads, see `take_free_leadership`. If it is interrupted, the record is
    in the journal or not.
    Raises CannotAccept, CannotConvert, JournalUnavailable or DiskFull.
    """
    if older := [node.name for node in await journal.nodes() if node.format < FORMAT]:
        advice = "upgrade jobd there first, or remove their entries: jobd cluster forget NAME"
        raise CannotAccept(f"nodes of an older version cannot read the record: {', '.join(older)}: {advice}")
    last = await asyncio.to_thread(lost_records.last_record, loss.path, journal.cluster_id)
    try:
        async with _scratch_directory(loss.path) as place:
            store, opened = await ClusterStore.open_for(f"{place}/jobd.db", journal)
            highest = max(opened.numbers.epoch, 0 if last is None else last.epoch)
            async with store:
                with repeatable_errors():
                    head = await take_free_leadership(journal, highest, lease_s)
                    batch = await _write_ending(journal, store, opened, head, loss, policy)
                    await journal.release()
        return Accepted(batch.audit[0].jobs, batch.numbers.epoch)
    except BadRecord as error:
        raise CannotAccept(f"the journal cannot be followed: {error}") from error


@asynccontextmanager
async def _scratch_directory(path: str) -> AsyncIterator[str]:
    """Lock the store, and yield a new directory next to it. One left behind by a kill is removed first."""
    place = f"{path}{files.SCRATCH}"
    lock = await asyncio.to_thread(FileLock, path)
    try:
        await asyncio.to_thread(shutil.rmtree, place, ignore_errors=True)
        await asyncio.to_thread(os.mkdir, place, 0o700)
        await asyncio.to_thread(files.give_to_owner, place, path)
        yield place
    finally:
        await asyncio.to_thread(shutil.rmtree, place, ignore_errors=True)
        lock.release()


async def _write_ending(
    journal: SharedJournal,
    store: ClusterStore,
    opened: OpenedStore,
    head: Head,
    loss: JournalLoss,
    policy: Policy,
) -> Batch:
    """Follow the journal to its end, and append the record that ends all grants. Return its batch."""
    if head.number != loss.upto:
        raise CannotAccept(f"the last record of the journal is {head.number} now: try again")
    warm = WarmState(store, opened, opened.last_record)
    while warm.number < head.number:
        await warm.apply(await journal.read(warm.number, READ_LIMIT))
    batch = _ending(warm, head.epoch, loss, policy)
    store.lead(journal.append, lambda format: None)
    await store.write(batch)
    return batch


def _ending(warm: WarmState, epoch: int, loss: JournalLoss, policy: Policy) -> Batch:
    """Return the batch that ends all grants, with an epoch of at least `epoch`."""
    numbers, state = warm.opened().numbers, warm.state
    state.epoch, state.next_token = max(epoch, state.epoch + 1), 1
    state.next_job += JUMP
    state.next_event += JUMP
    gone_to = state.next_event - 1  # for clients that have seen lost events
    decider = Decider(
        state, IdempotencyStore([], 1), WaitingClaims(state.presence), reject=lambda _: None, loop_time=monotonic_s
    )
    command = EndGrants(ids=list(state.processing), last=False, cause=CAUSE)
    envelope = Envelope(command, by="daemon", seed=os.urandom(16))
    at = Clock(numbers, keep_ms=policy.shortest_keep_ms).moment()
    decided = decider.decide([envelope], at, Preloaded(), policy, serves=False)
    [(_, response)] = decided.replies
    assert isinstance(response, Response), response
    batch = decider.batch(decided, policy)
    details = {"record": loss.upto, "lost_jobs": len(loss.changed.jobs)}
    done = AuditEntry(at.now, "jobd cluster", "", "accept-loss", jobs=len(command.ids), details=details)
    batch.audit, batch.writes = [done], [EventPruning([], [], gone_to)]
    return batch
