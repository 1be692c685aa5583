"""Encode and decode rows of jobs, events, keys and queues, and compute their checksums.

A row is a tuple in the order of its columns, with its checksum last.
"""

from __future__ import annotations

import zlib
from typing import Any, Final

import msgspec
from msgspec import Raw
from msgspec.structs import astuple

from jobd.model.job import Backoff, CompactJob, Failure, Grant, Job, LateResult, Lease, Options, PreviousGrant, Result
from jobd.model.storage import AuditEntry, Numbers, QueueRow, StoredResponse, Tombstone

Row = tuple[Any, ...]

# The columns of each field of Job, in the order of the table.
JOB_FIELDS: Final[dict[str, tuple[str, ...]]] = {
    "seq": ("seq",),
    "id": ("id",),
    "status": ("status",),
    "expires_at": ("expires_at",),
    "options": (
        "queue",
        "kind",
        "priority",
        "max_attempts",
        "backoff_kind",
        "backoff_base_ms",
        "backoff_max_ms",
        "backoff_jitter",
        "max_stalls",
        "on_stall",
        "stuck_after_ms",
        "max_processing_ms",
    ),
    "created_at": ("created_at",),
    "updated_at": ("updated_at",),
    "run_at": ("run_at",),
    "progress": ("progress",),
    "progress_message": ("progress_message",),
    "attempt": ("attempt",),
    "stalls": ("stalls",),
    "started_at": ("started_at",),
    "finished_at": ("finished_at",),
    "grant": (
        "lock_id",
        "fencing_token",
        "worker",
        "acquired_at",
        "lock_ttl_ms",
        "lock_stuck_after_ms",
        "lock_max_processing_ms",
    ),
    "lease": ("lock_expires_lease_ms", "silent_lease_ms", "ceiling_lease_ms", "lock_cleared"),
    "ended": (
        "ended_lock_id",
        "ended_fencing_token",
        "ended_worker",
        "ended_at",
        "ended_rule",
        "ended_reason",
        "ended_verb",
        "ended_body_hash",
    ),
    "result": ("download_url", "file_path", "storage_key", "metadata"),
    "error": ("error_message", "error_code"),
    "releases": ("releases",),
}
JOB_COLUMNS: Final = tuple(column for columns in JOB_FIELDS.values() for column in columns)
# Columns that must not be null if their part of the job exists.
_NEEDED: Final = {
    "grant": JOB_FIELDS["grant"],
    "lease": ("lock_expires_lease_ms", "silent_lease_ms", "lock_cleared"),
    "ended": JOB_FIELDS["ended"][:6],
}

# The columns that describe a new job, to which nothing has happened since its creation. Its `updated_at` equals
# `created_at`, and its other columns have the values in AS_CREATED.
NEW_COLUMNS: Final = ("seq", "id", "expires_at", *JOB_FIELDS["options"], "created_at", "run_at")
AS_CREATED: Final[dict[str, Any]] = {
    column: {"status": "queued", "progress": 0.0, "attempt": 0, "stalls": 0, "releases": 0}.get(column)
    for column in JOB_COLUMNS
    if column not in (*NEW_COLUMNS, "updated_at")
}
_NEW_END: Final = tuple(AS_CREATED[column] for column in JOB_COLUMNS[JOB_COLUMNS.index("progress") :])

KEY_COLUMNS: Final = ("digest", "body_hash", "at", "status", "grants", "answer_crc")
LATE_COLUMNS: Final = (
    "seq",
    "job_seq",
    "at",
    "worker",
    "fencing_token",
    "body_hash",
    "expires_at",
    *JOB_FIELDS["result"],
)
QUEUE_COLUMNS: Final = ("name", *QueueRow.__struct_fields__)
TOMBSTONE_COLUMNS: Final = Tombstone.__struct_fields__
AUDIT_COLUMNS: Final = ("seq", *AuditEntry.__struct_fields__)
META_COLUMNS: Final = (
    "schema_version",
    *Numbers.__struct_fields__,
    "live_count",
    "live_xor",
    "finished_count",
    "finished_xor",
    "marked",
    "events_gone_to",
    "projected_to",
)

_NO_GRANT: Final = (None,) * 7
_NO_LEASE: Final = (None,) * 4
_NO_ENDED: Final = (None,) * 8
_NO_RESULT: Final = (None,) * 4
_NO_ERROR: Final = (None, None)
_NULL: Final = b"null"

_pack = msgspec.msgpack.Encoder().encode
_json = msgspec.json.Encoder().encode


class Unreadable(Exception):
    """A row cannot be decoded. The message names the column and the problem."""


def checksum(row: Row) -> int:
    """Return the CRC-32 of columns without a checksum. It depends on their types: 1, 1.0, "1" and b"1" differ."""
    return zlib.crc32(_pack(row))


def sealed(row: Row) -> Row:
    """Return `row` with its checksum appended."""
    return (*row, zlib.crc32(_pack(row)))


def fault(row: Row) -> str | None:
    """Return the problem of a row whose last column is its checksum, or None if it is undamaged."""
    try:
        found = zlib.crc32(_pack(row[:-1]))
    except (UnicodeEncodeError, OverflowError):
        return "its text is not readable"
    return None if found == row[-1] else "its checksum is wrong"


def first_checksum(row: Row) -> int:
    """Return the checksum that a damaged row most likely had when it was written.

    If one bit of the checksum itself was flipped, it differs in one bit from the computed one. If one bit of another
    column was flipped, it never does.
    """
    stored = row[-1] if isinstance(row[-1], int) else 0
    try:
        found = zlib.crc32(_pack(row[:-1]))
    except (UnicodeEncodeError, OverflowError):
        return stored
    return found if (found ^ stored).bit_count() == 1 else stored


# ---------------------------------------------------------------------------------------------------------------------
# Jobs


def job_row(job: Job) -> Row:
    """Return the columns of `job` in the order of JOB_COLUMNS, without the checksum.

    All values are integers, floats, text, bytes or None, because the checksum distinguishes True from 1. `progress` is
    always a float, as SQLite returns it.
    """
    options, grant, lease = job.options, job.grant, job.lease
    ended, result, error = job.ended, job.result, job.error
    return (
        job.seq,
        job.id,
        job.status,
        job.expires_at,
        options.queue,
        options.kind,
        options.priority,
        options.max_attempts,
        options.backoff.kind,
        options.backoff.base_ms,
        options.backoff.max_ms,
        1 if options.backoff.jitter else 0,
        options.max_stalls,
        options.on_stall,
        options.stuck_after_ms,
        options.max_processing_ms,
        job.created_at,
        job.updated_at,
        job.run_at,
        job.progress + 0.0,
        job.progress_message,
        job.attempt,
        job.stalls,
        job.started_at,
        job.finished_at,
        *(_NO_GRANT if grant is None else _grant_columns(grant)),
        *(_NO_LEASE if lease is None else (lease.expires, lease.silent, lease.ceiling, 1 if lease.cleared else 0)),
        *(_NO_ENDED if ended is None else _ended_columns(ended)),
        *(_NO_RESULT if result is None else _result_columns(result)),
        *(_NO_ERROR if error is None else (error.message, error.code)),
        job.releases,
    )


def _grant_columns(grant: Grant) -> Row:
    return (
        grant.lock_id,
        grant.fencing_token,
        grant.worker,
        grant.acquired_at,
        grant.ttl_ms,
        grant.stuck_after_ms,
        grant.max_processing_ms,
    )


def _ended_columns(ended: PreviousGrant) -> Row:
    return (
        ended.lock_id,
        ended.fencing_token,
        ended.worker,
        ended.at,
        ended.rule,
        ended.reason,
        ended.verb,
        ended.body_hash,
    )


def _result_columns(result: Result) -> Row:
    metadata = None if result.metadata is None else bytes(result.metadata)
    return (result.download_url, result.file_path, result.storage_key, None if metadata == _NULL else metadata)


class JobReader:
    """Decodes rows of jobs. Equal options and names of different jobs share one object, to save memory."""

    def __init__(self) -> None:
        self._options: dict[Row, Options] = {}
        self._last: tuple[Row, Options] = (), Options()
        self._words: Any = {}  # interned text; untyped, because some words are literals

    def job(self, row: Row) -> Job:
        """Return the job of an undamaged row. Raises Unreadable if a required column is null."""
        (seq, id_, status, expires_at) = row[:4]
        (created_at, updated_at, run_at, progress, message, attempt, stalls, started_at, finished_at) = row[16:25]
        grant, lease, ended = row[25:32], row[32:36], row[36:44]
        result, error = row[44:48], row[48:50]
        options = self._options.get(row[4:16])
        return Job(
            seq,
            id_,
            self._new_options(row[4:16]) if options is None else options,
            self._words.setdefault(status, status),
            created_at,
            created_at if updated_at == created_at else updated_at,
            created_at if run_at == created_at else run_at,
            int(progress) if progress.is_integer() else progress,
            message,
            attempt,
            stalls,
            started_at,
            finished_at,
            expires_at,
            None if grant[0] is None else self._grant(grant),
            None if lease[0] is None else self._lease(lease),
            None if ended[0] is None else self._ended(ended),
            None if result == _NO_RESULT else _result(result),
            None if error == _NO_ERROR else Failure(*error),
            row[50],
        )

    def new(self, row: Row) -> Job | CompactJob | None:
        """Return the new job of a row of NEW_COLUMNS and the checksum, or None if the checksum is wrong.

        The checksum covers all columns, so this checks AS_CREATED as well.
        """
        seq, id_, expires_at = row[:3]
        columns = row[3:15]
        created_at, run_at, crc = row[15:18]
        whole = (seq, id_, "queued", expires_at, *columns, created_at, created_at, run_at, *_NEW_END)
        try:
            if zlib.crc32(_pack(whole)) != crc:
                return None
        except (UnicodeEncodeError, OverflowError):
            return None
        if columns != self._last[0]:  # adjacent jobs often have equal options, and comparing is faster than a lookup
            self._last = columns, self._options.get(columns) or self._new_options(columns)
        options = self._last[1]
        if run_at == created_at and expires_at is None and id_ and options.queue:
            return CompactJob(seq, id_, options, created_at)
        return Job(seq, id_, options, "queued", created_at, created_at, run_at, expires_at=expires_at)

    def _new_options(self, columns: Row) -> Options:
        (queue, kind, priority, max_attempts, shape, base_ms, max_ms, jitter, *rest) = columns
        words = self._words
        backoff = Backoff(words.setdefault(shape, shape), base_ms, max_ms, bool(jitter))
        queue, kind = words.setdefault(queue, queue), words.setdefault(kind, kind)
        max_stalls, on_stall, stuck_after_ms, max_processing_ms = rest
        options = Options(
            queue,
            kind,
            priority,
            max_attempts,
            backoff,
            max_stalls,
            words.setdefault(on_stall, on_stall),
            stuck_after_ms,
            max_processing_ms,
        )
        if len(self._options) >= 10_000:  # sharing is useless if most options differ
            self._options.clear()
            self._words.clear()
        self._options[columns] = options
        return options

    def _grant(self, columns: Row) -> Grant:
        if None in columns:
            raise Unreadable(_missing("grant", columns))
        lock_id, token, worker, *rest = columns
        if len(self._words) < 10_000:
            worker = self._words.setdefault(worker, worker)
        return Grant(lock_id, token, worker, *rest)

    def _lease(self, columns: Row) -> Lease:
        expires, silent, ceiling, cleared = columns
        if silent is None or cleared is None:
            raise Unreadable(_missing("lease", columns))
        return Lease(expires, silent, ceiling, bool(cleared))

    def _ended(self, columns: Row) -> PreviousGrant:
        if None in columns[:6]:
            raise Unreadable(_missing("ended", columns))
        return PreviousGrant(*columns)


def _result(columns: Row) -> Result:
    url, path, key, metadata = columns
    return Result(url, path, key, None if metadata is None else Raw(metadata))


def _missing(part: str, columns: Row) -> str:
    names = [n for n, v in zip(JOB_FIELDS[part], columns, strict=True) if v is None and n in _NEEDED[part]]
    return f"{', '.join(names)} must not be null while {JOB_FIELDS[part][0]} is set"


# ---------------------------------------------------------------------------------------------------------------------
# Events


_decode_grants = msgspec.json.Decoder(list[tuple[str, str]]).decode


# ---------------------------------------------------------------------------------------------------------------------
# Keys, queues, tombstones


def key_row(key: StoredResponse) -> Row:
    """Return the columns of `key`: KEY_COLUMNS, their checksum, and the body of the response."""
    answer_crc = None if key.body is None else zlib.crc32(key.body)
    grants = None if key.grants is None else _json(key.grants)
    return (*sealed((key.digest, key.body_hash, key.at, key.status, grants, answer_crc)), key.body)


def key(row: Row, answer: bytes | None = None) -> StoredResponse:
    """Return the stored response of an undamaged row of KEY_COLUMNS. `answer` is its body."""
    digest, body_hash, at, status, grants = row[:5]
    return StoredResponse(digest, body_hash, at, status, answer, None if grants is None else _decode_grants(grants))


def queue_row(name: str, queue: QueueRow) -> Row:
    """Return the columns of a queue in the order of QUEUE_COLUMNS, with the checksum."""
    paused, *others = astuple(queue)
    return sealed((name, int(paused), *others))


def queue(row: Row) -> QueueRow:
    """Return the queue of an undamaged row."""
    return QueueRow(bool(row[1]), *row[2:-1])


def tombstone_row(tombstone: Tombstone) -> Row:
    """Return the columns of a tombstone in the order of TOMBSTONE_COLUMNS, with the checksum."""
    return sealed(astuple(tombstone))


def tombstone(row: Row) -> Tombstone:
    """Return the tombstone of an undamaged row."""
    return Tombstone(*row[:-1])


# ---------------------------------------------------------------------------------------------------------------------
# Audit


def audit_row(seq: int, audited: AuditEntry) -> Row:
    """Return the columns of an audit entry in the order of AUDIT_COLUMNS, with the checksum."""
    *about, details, part_of = astuple(audited)
    return sealed((seq, *about, None if details is None else _json(details), part_of))


def audited(row: Row) -> AuditEntry:
    """Return the audit entry of an undamaged row."""
    *about, details, part_of = row[1:-1]
    return AuditEntry(*(*about, None if details is None else msgspec.json.decode(details), part_of))


# ---------------------------------------------------------------------------------------------------------------------
# Late results


def late_row(job_seq: int, late: LateResult) -> Row:
    """Return the columns of a late result in the order of LATE_COLUMNS, with the checksum."""
    about = (late.seq, job_seq, late.at, late.worker, late.fencing_token, late.body_hash, late.expires_at)
    return sealed((*about, *_result_columns(late.result)))


def late(row: Row, *, whole: bool) -> LateResult:
    """Return the late result of an undamaged row. Unless `whole`, its result has only the `download_url`.

    The URL is enough to decide whether the late result can be adopted.
    """
    seq, _, at, worker, fencing_token, body_hash, expires_at = row[:7]
    result = _result(row[7:11]) if whole else Result(row[7])
    return LateResult(seq, at, worker, fencing_token, body_hash, expires_at, result)


# ---------------------------------------------------------------------------------------------------------------------
# Rows in quarantine


def as_text(columns: tuple[str, ...], row: Row) -> str:
    """Return a row as readable JSON, column to value. Bytes, and text that is not UTF-8, become {"hex": ...}."""
    return msgspec.json.encode(dict(zip(columns, map(_plain, row), strict=True))).decode()


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return {"hex": value.encode(errors="surrogateescape").hex()}
    return {"hex": value.hex()} if isinstance(value, bytes) else value


def from_text(columns: tuple[str, ...], text: str) -> Row:
    """Return the row of a result of `as_text`. Raises Unreadable if it is not such JSON or lacks a column."""
    try:
        values = msgspec.json.decode(text, type=dict[str, Any])
        return tuple(_unplain(values[column]) for column in columns)
    except (msgspec.DecodeError, ValueError, TypeError) as error:
        raise Unreadable(f"the row is not the JSON of a row: {error}") from error
    except KeyError as error:
        raise Unreadable(f"column {error.args[0]} is missing") from error


def _unplain(value: Any) -> Any:
    return bytes.fromhex(value["hex"]) if isinstance(value, dict) else value
