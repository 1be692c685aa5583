"""Turn the store of a single machine into the first store of a cluster, and the store of a node into a single one.

No daemon may hold the store.
"""

from __future__ import annotations

import os
from typing import Final

from jobd.model.job import new_epoch
from jobd.storage import files, startup
from jobd.storage.cluster import membership
from jobd.storage.cluster.membership import Membership, WrongCluster
from jobd.storage.connection import journal_mode
from jobd.storage.damage import scrub
from jobd.storage.database import Database, now_ms
from jobd.storage.files import FileLock, StoreUnreadable
from jobd.storage.schema import migrations

FIRST_RECORD: Final = 1  # the journal of the new cluster begins after it; only a snapshot has its content
_MARKED: Final = (
    "is a restored backup or an older copy, whose grants have to end first: start jobd on it once without journal.url, "
    "then stop it"
)


def convert_to_cluster(path: str, cluster_id: str) -> int:
    """Make the store at `path` a member of a new cluster, as of FIRST_RECORD. Return its epoch.

    Afterwards the file is complete, and its content is the first snapshot, without which no node can follow the journal
    of this cluster. A second call changes nothing. Raises WrongCluster or StoreUnreadable.
    """
    with startup.opened_alone(path) as conn:
        startup.prepare_schema(conn, path)
        found = membership.read(conn)
        if found is None:
            projection, opened = startup.start(conn, path)
            projection.db.close()
            if opened.marked:
                raise StoreUnreadable(f"{path} {_MARKED}")
            _quarantine_damaged(projection.db)
            projection.db.commit(_mark, projection.db, cluster_id)
        elif found.cluster_id != cluster_id:
            raise WrongCluster(f"{path} belongs to cluster {found.cluster_id}, not to {cluster_id}")
        epoch = startup.read_meta(conn, path).numbers.epoch
        journal_mode(conn, path, "delete")  # writes the log into the file
    files.sync(path)
    return epoch


def _quarantine_damaged(db: Database) -> None:
    """Quarantine the damaged rows, because no other node has undamaged ones for a rebuild."""
    part = scrub.check_slice(db, None)
    while part is not None and part.next_cursor is not None:
        part = scrub.check_slice(db, part.next_cursor)


def _mark(db: Database, cluster_id: str) -> None:
    db.projected_to = FIRST_RECORD
    membership.write(db.conn, Membership(cluster_id))
    db.write_meta()


def leave(path: str, *, epoch: int = 0, is_complete: bool) -> int:
    """Turn the store of a node into that of a single machine, with an epoch above `epoch`. Return the new epoch.

    Unless it `is_complete`, its journal may have later records. Then its grants end by their stall rule.
    """
    with startup.opened_alone(path) as conn:
        startup.prepare_schema(conn, path)
        db = startup.read_meta(conn, path)
        if membership.read(conn) is None:
            raise WrongCluster(f"{path} is already the store of a single machine")
        seen = files.read_epoch(path) or 0
        begun = new_epoch(max(db.numbers.epoch, epoch, seen), now_ms())
        files.write_epoch(path, begun)  # first: a second call is possible as long as the store belongs to the cluster
        db.commit(_leave, db, begun, is_complete)
    return begun


def _leave(db: Database, epoch: int, is_complete: bool) -> None:
    migrations.leave_cluster(db.conn)
    db.begin_epoch(epoch, 0 if is_complete else db.projected_to + 1)


def epoch_if_left(path: str, last: int) -> int | None:
    """Return the epoch of the store at `path` if it has left a cluster as of record `last`, else None."""
    with startup.opened_alone(path) as conn:
        db = startup.read_meta(conn, path)
        has_left = membership.read(conn) is None and db.projected_to == last
        return db.numbers.epoch if has_left else None


def discard(path: str) -> str:
    """Rename the store at `path`, so that the next start of a node makes a new one. Return the new name.

    The store may be the only one with its jobs, so no later rebuild replaces it.
    """
    with FileLock(path):
        if not os.path.exists(path):
            raise StoreUnreadable(f"{path} does not exist")
        return files.set_aside(path, files.dated_name(path))
