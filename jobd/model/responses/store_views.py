"""The store: quarantine, row checks, disk and backups."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Struct

from jobd.model.fields import doc
from jobd.model.responses import shared


class QuarantinedJob(Struct, frozen=True):
    """A damaged job in quarantine."""

    id: shared.JobIdText
    reason: Annotated[str, doc("The damage.")]


class QuarantineList(Struct):
    """The damaged jobs in quarantine."""

    jobs: Annotated[list[QuarantinedJob], doc("The jobs.")]


class DamagedRow(Struct, frozen=True):
    """A row whose checksum is wrong, or that cannot be read."""

    where: Annotated[str, doc("The row.")]
    what: Annotated[str, doc("The damage.")]


class CheckedRows(Struct, frozen=True):
    """Rows whose checksums were checked."""

    table: Annotated[str, doc("The table of the rows.")]
    checked: Annotated[int, doc("How many rows were checked.")]
    damaged: Annotated[list[DamagedRow], doc("The damaged rows.")]
    next_cursor: shared.NextCursor


class StoredKind(Struct, frozen=True):
    """About how much the jobs of a queue and kind take in the database, from a sample. Sizes are in bytes."""

    queue: Annotated[str, doc("Name of the queue.")]
    kind: Annotated[str, doc("The kind of the jobs; empty for jobs without one.")]
    jobs: Annotated[int, doc("About how many jobs there are.")]
    bytes: Annotated[int, doc("What these jobs take: the sum of the four sizes below.")]
    rows: Annotated[int, doc("Their rows without results.")]
    payloads: Annotated[int, doc("Their payloads.")]
    results: Annotated[int, doc("Their results.")]
    events: Annotated[int, doc("Their timelines.")]

    @property
    def name(self) -> str:
        """The queue and the kind, if there is one: `reports / monthly`."""
        return f"{self.queue} / {self.kind}" if self.kind else self.queue

    @property
    def main_part(self) -> tuple[str, int]:
        """The largest of the four sizes: its name, and the size."""
        parts = ("rows", "payloads", "results", "events")
        return max(((part, int(getattr(self, part))) for part in parts), key=lambda part: part[1])


class DiskUse(Struct, frozen=True, kw_only=True):
    """What the disk of the store holds. Sizes are in bytes, and null if the store is in memory."""

    path: Annotated[str, doc("Path of the store.")]
    total_bytes: Annotated[int | None, doc("Size of the disk.")] = None
    free_bytes: Annotated[int | None, doc("Space that is available to the daemon.")] = None
    not_jobd_bytes: Annotated[
        int | None, doc("Used by other files than those of the store. Artifacts and backups are among them.")
    ] = None
    database_bytes: Annotated[int, doc("Pages of the database that are in use.")]
    free_page_bytes: Annotated[int, doc("Pages of the database that are free and used again.")]
    tail_bytes: Annotated[int, doc("Part of `database_bytes`: records that the tables lack.")]
    wal_bytes: Annotated[int, doc("The write-ahead log.")] = 0
    side_bytes: Annotated[int, doc("Other files whose names begin with that of the store, such as its reserve.")] = 0
    kinds: Annotated[list[StoredKind], doc("What the jobs of each queue and kind take, the largest 100.")]
    more_kinds: Annotated[int, doc("How many further queues and kinds the sample contains.")] = 0
    other_bytes: Annotated[
        int, doc("The rest of `database_bytes`: indexes, stored responses, the audit log, events of deleted jobs.")
    ]
    jobs_read: Annotated[int, doc("How many jobs the sample contains.")]
    measured_at: Annotated[int, doc("When it was measured, in Unix ms.")]


BackupState = Literal["waiting", "copying", "checking", "sending", "sent", "failed"]


class BackupView(Struct, frozen=True):
    """An online backup."""

    id: Annotated[str, doc("Id of the backup, as its caller gave it.")]
    state: Annotated[BackupState, doc("State of the backup.")]
    bytes_done: Annotated[int, doc("How many bytes are copied, or sent.")]
    bytes_total: Annotated[int | None, doc("How many bytes there are in total. Null until known.")]
    since_progress_ms: Annotated[int, doc("Time since the last progress, in ms.")]
    started_at: Annotated[int, doc("When the backup began, in Unix ms.")]
    ended_at: Annotated[int | None, doc("When it was sent or failed, in Unix ms, or null.")]
    message: Annotated[str | None, doc("Why it failed, or null.")]


class BackupList(Struct, frozen=True):
    """The online backups in progress and the last ones that ended."""

    backups: Annotated[list[BackupView], doc("The backups, newest first.")]
