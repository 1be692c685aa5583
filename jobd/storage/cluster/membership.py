"""The membership of a store in a cluster: the journal that it belongs to, and the last record that it has followed.

The record is compared with the journal before a node may lead: a store that has followed records which the journal does
not have is on another branch.
"""

from __future__ import annotations

import sqlite3
from typing import Final

from msgspec import Struct

from jobd.journal.checksum import checksum
from jobd.model.journal import BadRecord, SharedJournal
from jobd.storage.codec import fault, with_checksum
from jobd.storage.files import StoreError

_READ: Final = "SELECT cluster_id, record_crc, timeline, crc FROM cluster WHERE id = 1"
_WRITE: Final = "REPLACE INTO cluster (id, cluster_id, record_crc, timeline, crc) VALUES (1, ?, ?, ?, ?)"


class WrongCluster(StoreError):
    """A store belongs to another journal than the configured one, or to none."""


class StoreAhead(StoreError):
    """A store has records that its journal has lost."""


class StoreDamaged(StoreError):
    """A row of a store that belongs to a cluster is damaged. The store is rebuilt from the journal."""

    exit_code = 75


class Membership(Struct, frozen=True):
    """The journal of a store, and the checksum of the last record that its tables have; None before the first one.

    `timeline` is the highest one of PostgreSQL that the node has seen; 0: none.
    """

    cluster_id: str
    record_crc: int | None = None
    timeline: int = 0


def read(conn: sqlite3.Connection) -> Membership | None:
    """Return the membership; None for the store of a single machine. Raises StoreDamaged."""
    row = conn.execute(_READ).fetchone()
    if row is None:
        return None
    if (error := fault(row)) is not None:
        raise StoreDamaged(f"the row in table cluster is damaged ({error})")
    return Membership(*row[:-1])


def write(conn: sqlite3.Connection, membership: Membership) -> None:
    conn.execute(_WRITE, with_checksum((membership.cluster_id, membership.record_crc, membership.timeline)))


def check_single(conn: sqlite3.Connection, path: str) -> None:
    """Raise WrongCluster if the store belongs to a cluster: it must not differ from the stores of other nodes."""
    if read(conn) is not None:
        raise WrongCluster(
            f"{path} belongs to a cluster and must not be edited: to repair it, stop its daemon and remove it. "
            "The next start rebuilds it from the journal"
        )


def check(path: str, found: Membership | None, cluster_id: str | None, *, is_new: bool) -> None:
    """Raise WrongCluster if the store cannot be used with this cluster, or without one (None)."""
    if cluster_id is None and found is not None:
        raise WrongCluster(
            f"{path} belongs to cluster {found.cluster_id}: set journal.url, or run `jobd cluster leave` to make it "
            "the store of a single machine"
        )
    if cluster_id is not None and found is None and not is_new:
        raise WrongCluster(
            f"{path} is the store of a single machine: make a cluster of it with `jobd cluster init --from-store`, or "
            "replace it with `jobd join`"
        )
    if cluster_id is not None and found is not None and found.cluster_id != cluster_id:
        raise WrongCluster(
            f"{path} belongs to cluster {found.cluster_id}, but the journal is that of cluster {cluster_id}: check "
            "journal.url and journal.name, or replace the store with `jobd join`"
        )


class Followed(Struct, frozen=True):
    """The last record that a store has followed: its number, its checksum, and the epoch of its fencing tokens.

    `crc` is None if the store has no record of the journal yet.
    """

    number: int
    crc: int | None
    epoch: int


async def is_on_branch(path: str, journal: SharedJournal, last: Followed) -> bool:
    """Return whether the store at `path`, with the records up to `last`, can follow `journal` from there.

    It cannot if record `last` is another one in the journal, or if later records have been trimmed. Raises StoreAhead
    if the journal has lost the record, and no leader has continued without it.
    """
    head = await journal.head()
    if last.number > head.number:
        if any(epoch > last.epoch and first <= head.number for epoch, first in await journal.epochs()):
            return False
        raise StoreAhead(
            f"{path} has record {last.number}, but the last record of the journal is {head.number}: the server has "
            "lost acknowledged records. If they do not come back, stop all nodes and run `jobd cluster accept-loss "
            f"--upto {head.number}`, which lists the affected jobs and continues without these records"
        )
    try:
        found = await journal.read(last.number if last.crc is None else last.number - 1, 1)
    except BadRecord:
        return False
    if last.crc is None:
        return True
    return bool(found) and checksum(found[0]) == last.crc
