"""The journal interface: one record for each committed batch, in order."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from typing import Final, Protocol

from msgspec import Struct

SNAPSHOT_PART_BYTES: Final = 1 << 20


class Record(Struct, frozen=True, gc=False):
    """A committed batch. Numbers count from 1 without gaps.

    `first_event` and `last_event` are the seqs of its events, and `last_event` is `first_event` - 1 if it has none.
    `epoch` is that of the fencing tokens. `at` is wall time, Unix ms. `body` is the batch (journal/record.py).
    """

    number: int
    first_event: int
    last_event: int
    epoch: int
    at: int
    body: bytes


class BadRecord(Exception):
    """A record cannot be used: it is damaged, missing, or in a format that this version does not know."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"record {number} of the journal {reason}")
        self.number = number
        self.reason = reason


class Head(Struct, frozen=True, gc=False):
    """The state of a shared journal: its last record, and the node that leads.

    `epoch` is that of the fencing tokens; it rises with each takeover. `holder` is the random id of the leading
    process, and `url` its address for clients. Every record up to `acked` is acknowledged. `renewed` changes with each
    append, renewal and takeover: a standby that sees no change for one lease may take over. `is_connected` is False
    while the leader has no session on the server. `at` is the wall time of the server, Unix ms.
    """

    number: int
    epoch: int
    holder: str | None
    url: str | None
    acked: int
    renewed: str
    is_connected: bool = True
    at: int = 0


class NodeEntry(Struct, frozen=True):
    """A node of a shared journal. `process` is the random id of its process, as in `Head.holder`.

    `format` is the highest format of a record that it reads, `projected_to` the last record that its tables have.
    `seen_ms` is the time since it was written, by the clock of the server. `ahead_ms` says by how much the wall clock
    of the node is ahead of that of the server. `version` changes with each write. `schema_version` is that of its
    tables, `lease_ms` the length of its lease when it leads; 0: it did not say.
    """

    name: str
    process: str
    url: str
    format: int
    config_hash: str
    projected_to: int
    seen_ms: int = 0
    ahead_ms: int = 0
    version: str = ""
    schema_version: int = 0
    lease_ms: int = 0


class SnapshotInfo(Struct, frozen=True):
    """A complete snapshot of the tables as of record `number`. `at` is wall time, Unix ms."""

    number: int
    parts: int
    bytes: int
    at: int


class JournalHealth(Struct, frozen=True):
    """The state of the server.

    Without `is_synchronous`, an acknowledged record is on one machine only. `is_waiting` says that a statement has
    been waiting for a synchronous standby for a second. `oldest_transaction_ms` is the age of the oldest transaction in
    the database. `timeline` changes with each failover of the server; 0 if it does not tell. `writable` are the servers
    that accept writes: more than one after a failover, if the former primary runs again.
    """

    is_synchronous: bool
    is_waiting: bool
    oldest_transaction_ms: int
    timeline: int = 0
    writable: tuple[str, ...] = ()


class LeadershipLost(Exception):
    """This node no longer leads its journal. The text says why."""


class Fenced(LeadershipLost):
    """Another node leads this journal. Nothing was written."""

    def __init__(self) -> None:
        super().__init__("another node leads the journal")


class JournalOutcomeUnknown(Exception):
    """The server did not respond, so a record may be in the journal or not. See `SharedJournal.resolve`."""


class JournalUnavailable(Exception):
    """The journal cannot be used now. The text says what to do."""

    exit_code = 75


class JournalMisconfigured(JournalUnavailable):
    """The journal cannot be used until an operator changes something. The text says what."""

    exit_code = 78


class NodeTooOld(Exception):
    """The journal has records of a format that a node does not read. Its entry was not written."""

    def __init__(self, node: NodeEntry) -> None:
        super().__init__(
            f"the journal has records that node {node.name} does not read: its version of jobd reads formats up to "
            f"{node.format}. Install the version of the other nodes."
        )


class BadSnapshot(Exception):
    """A snapshot cannot be used: it is damaged, incomplete, or was dropped while it was read."""


class SharedJournal(Protocol):
    """A journal on a server. Several nodes read it, and one of them, the leader, appends.

    A cancelled caller never cancels `append`, `renew`, `take_over` or `resolve`: they run to their end, because a
    cancelled statement can commit on one machine alone. Every call raises JournalUnavailable if the server cannot be
    used; nothing was written then.
    """

    cluster_id: str  # of this journal; a local store belongs to one journal

    async def head(self) -> Head:
        """Return the present state."""

    async def append(self, record: Record, acked: int) -> None:
        """Write `record` and renew the lease. It is durable on a quorum when this returns.

        Raises DiskFull or Fenced if nothing was written. After JournalOutcomeUnknown, call `resolve` and nothing else.
        """

    async def renew(self, acked: int) -> int:
        """Renew the lease of the leader. Return the wall time of the server. Raises Fenced or JournalOutcomeUnknown."""

    async def take_over(self, seen: Head, *, holder: str, url: str, epoch: int) -> Head | None:
        """Become the leader, with an epoch of at least `epoch` and above that of `seen`. Raises JournalOutcomeUnknown.

        Return None if the journal is no longer as `seen`. When this returns a head, all of its records are
        acknowledged, although `Head.acked` does not say so until the next append or renewal.
        """

    async def resolve(self, epoch: int) -> Head:
        """Keep leadership after JournalOutcomeUnknown, with an epoch of at least `epoch` and above the present one.

        The record whose outcome was unknown is in the journal if `Head.number` is its number, and will never be in it
        otherwise. Raises Fenced if another node leads, and JournalOutcomeUnknown: call this again then.
        """

    async def release(self) -> None:
        """Release leadership, so that another node can lead at once: `Head.holder` becomes None.

        Raises JournalOutcomeUnknown.
        """

    async def read(self, after: int, limit: int) -> list[Record]:
        """Return up to `limit` records, and about 16 MiB, with a number above `after`, in order. Raises BadRecord.

        A record is visible before it is acknowledged. It is acknowledged if its number is at most `Head.acked`, or if
        there is a later record. A trimmed record counts as missing.
        """

    async def epochs(self) -> list[tuple[int, int]]:
        """Return each epoch with the number of its first record, in order."""

    async def trim(self, upto: int) -> None:
        """Delete the records with a number up to `upto`, except for those that share a partition with later ones."""

    async def register(self, node: NodeEntry) -> str | None:
        """Write the entry of a node. Return the id of the process that wrote it last, if it was another one.

        Raises NodeTooOld after the first record of format EXTRA_FORMAT or later that the node does not read.
        """

    async def nodes(self) -> list[NodeEntry]:
        """Return the nodes by name. A node that ended stays until `forget`."""

    async def forget(self, name: str) -> None:
        """Delete the entry of a node."""

    async def write_snapshot(self, number: int, parts: AsyncIterable[bytes], pause_s: float = 0.05) -> bool:
        """Write a snapshot of the tables as of record `number`, in parts of at most SNAPSHOT_PART_BYTES.

        Pauses between parts. Return False if another node is writing a snapshot, or there is one of this record.
        """

    async def snapshots(self) -> list[SnapshotInfo]:
        """Return the complete snapshots, oldest first."""

    def read_snapshot(self, number: int) -> AsyncIterator[bytes]:
        """Yield the parts of a snapshot in order. Raises BadSnapshot."""

    async def drop_snapshot(self, number: int) -> None:
        """Delete a snapshot."""

    async def health(self) -> JournalHealth:
        """Return the state of the server."""

    async def close(self) -> None:
        """Close the connections. A statement of the leader that still runs gets a moment to end."""
