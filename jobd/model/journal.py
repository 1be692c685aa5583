"""The journal interface: one record for each committed batch, in order."""

from __future__ import annotations

from typing import Protocol

from msgspec import Struct


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


class Journal(Protocol):
    """An append-only log of records. All calls block."""

    def append(self, record: Record) -> None:
        """Write `record`. It is durable when this returns.

        Raises DiskFull if nothing was written. After any other exception the outcome is unknown.
        """

    def read(self, after: int, limit: int) -> list[Record]:
        """Return up to `limit` records with a number above `after`, in order. Raises BadRecord."""

    def trim(self, upto: int) -> None:
        """Delete the records with a number up to `upto`, which the tables have."""


class Head(Struct, frozen=True, gc=False):
    """The state of a shared journal: its last record, and the node that leads.

    `epoch` is that of the fencing tokens; it rises with each takeover. `holder` is the random id of the leading
    process, and `url` its address for clients. Every record up to `acked` is acknowledged. `renewed` changes with each
    append and renewal: a standby that sees no change for one lease may take over.
    """

    number: int
    epoch: int
    holder: str | None
    url: str | None
    acked: int
    renewed: str


class Fenced(Exception):
    """Another node leads this journal. Nothing was written."""


class OutcomeUnknown(Exception):
    """The server did not respond, so a record may be in the journal or not. The connection is closed."""


class JournalUnavailable(Exception):
    """The journal cannot be used. The text is a sentence that says what to do."""


class SharedJournal(Protocol):
    """A journal on a server. Several nodes read it, and one of them, the leader, appends.

    A cancelled caller never cancels `append`, `renew` or `take_over`: they run to their end, because a cancelled
    statement can commit on one machine alone. Every call raises JournalUnavailable if the server cannot be used.
    """

    cluster_id: str  # of this journal; a local store belongs to one journal

    async def head(self) -> Head:
        """Return the present state."""

    async def append(self, record: Record, acked: int) -> None:
        """Write `record` and renew the lease. It is durable on a quorum when this returns.

        Raises DiskFull or Fenced if nothing was written, and OutcomeUnknown.
        """

    async def renew(self, acked: int) -> None:
        """Renew the lease of the leader. Raises Fenced or OutcomeUnknown."""

    async def take_over(self, seen: Head, *, holder: str, url: str, epoch: int) -> Head | None:
        """Become the leader, with an epoch of at least `epoch` and above that of `seen`. Raises OutcomeUnknown.

        Returns None if the journal is no longer as `seen`.
        """

    async def read(self, after: int, limit: int) -> list[Record]:
        """Return up to `limit` records with a number above `after`, in order. Raises BadRecord.

        Records are visible before they are acknowledged: see `Head.acked`.
        """

    async def epochs(self) -> list[tuple[int, int]]:
        """Return each epoch with the number of its first record, in order."""

    async def trim(self, upto: int) -> None:
        """Delete the records with a number up to `upto`."""

    async def close(self) -> None:
        """Close the connections."""
