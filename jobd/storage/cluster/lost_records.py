"""Read, from the tables of a stopped node, the changes in records that the journal has lost. Writes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from msgspec import Struct

from jobd.journal import event_codec
from jobd.model.job import Job
from jobd.storage import startup
from jobd.storage.cluster import membership
from jobd.storage.cluster.membership import Followed, Membership
from jobd.storage.codec import SQL
from jobd.storage.database import BY_SEQ, Database
from jobd.storage.events import event_rows
from jobd.storage.files import FileLock, StoreError, StoreUnreadable
from jobd.storage.queries import read_job
from jobd.storage.schema import migrations

_EVENTS: Final = f"SELECT {SQL['events']} FROM events WHERE seq > ? ORDER BY seq"


class LostChange(Struct):
    """A job that lost records have changed. `job` is the row in the tables; None if it was deleted, or is damaged.

    `before` is its status in the journal, None if it was created later. `after` is the one in the tables, None if it
    was deleted.
    """

    id: str
    before: str | None
    after: str | None
    job: Job | None = None
    payload: bytes = b"null"
    bodies: dict[int, bytes] = {}  # headers and checkpoint


class LostChanges(Struct):
    """What lost records have changed: jobs in the order of their creation, and names of queues.

    `damaged` counts rows of events with unknown changes.
    """

    jobs: list[LostChange] = []
    queues: list[str] = []
    damaged: int = 0


def last_record(path: str, cluster_id: str) -> Followed | None:
    """Return the last record that the store at `path` has followed; None if there is none.

    Raises WrongCluster, StoreBusy, StoreTooNew or StoreUnreadable.
    """
    if not os.path.exists(path) or not os.path.getsize(path):
        return None
    with _opened(path) as db:
        found = membership.read(db.conn)
        membership.check(path, found, cluster_id, is_new=db.numbers.epoch == 0)
        if found is None or not db.projected_to:
            return None
        return Followed(db.projected_to, found.record_crc, db.numbers.epoch)


def membership_of(path: str) -> Membership | None:
    """Return the membership of a store that has followed its journal, None if it cannot be read."""
    if not os.path.exists(path) or not os.path.getsize(path):
        return None
    try:
        with _opened(path) as db:
            return membership.read(db.conn) if db.numbers.epoch else None
    except StoreError:
        return None


def last_event(path: str) -> int:
    """Return the seq of the last event in the store at `path`."""
    with _opened(path) as db:
        return db.numbers.next_event - 1


def changes(path: str, after_event: int) -> LostChanges:
    """Return what the events with a seq above `after_event` have changed."""
    lost = LostChanges()
    with _opened(path) as db:
        by_seq: dict[int, LostChange] = {}
        for row in db.conn.execute(_EVENTS, (after_event - event_rows.SPAN,)):
            if event_rows.fault(row) is not None:  # the changes are unknown, so list the job with its current status
                lost.damaged += 1
                for number in event_rows.job_numbers(row):
                    for job_seq, id_, status, *_ in db.rows(BY_SEQ, (number,)):
                        by_seq.setdefault(job_seq, LostChange(id_, status, status))
                continue
            for event in map(event_codec.decode, event_rows.unpack(row)):
                if event.seq <= after_event:
                    continue
                if not event.job_seq:
                    lost.queues.append(event.queue)
                elif (known := by_seq.get(event.job_seq)) is None:
                    by_seq[event.job_seq] = LostChange(event.job_id, event.from_status, event.to_status)
                else:
                    known.after = event.to_status
        for seq, each in sorted(by_seq.items()):
            if each.before is None and each.after is None:
                continue  # the journal never had it, and it was deleted again
            for row in db.rows(BY_SEQ, (seq,)):
                each.job, _ = read_job(row, db.reader.job)
            if each.job is not None and (payload := db.payload(seq)[0]) is not None:
                each.payload, each.bodies = payload.body, db.extra_bodies(each.job)[0]
            lost.jobs.append(each)
    lost.queues = list(dict.fromkeys(lost.queues))
    return lost


@contextmanager
def _opened(path: str) -> Iterator[Database]:
    with FileLock(path), startup.opened_read_only(path) as (conn, version):
        if version < migrations.VERSION:
            raise StoreUnreadable(f"{path} has schema version {version}: use the version of jobd that wrote it")
        yield startup.read_meta(conn, path)
