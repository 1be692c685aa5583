"""Encode and decode rows of jobs, keys, queues, tombstones, audit entries and late results, and compute checksums.

A row is a tuple in the order of its columns, with its checksum last.
"""

from __future__ import annotations

import contextlib
import zlib
from typing import Any, Final

import msgspec
from msgspec import Raw
from msgspec.structs import astuple

from jobd.model.flat_job import FIELDS, NO_ERROR, NO_RESULT, PARTS, maker
from jobd.model.job import HOUR_MS, BackoffOptions, Failure, Job, LateResult, Options, PackedJob, Result, packed
from jobd.model.storage import AuditEntry, Numbers, QueueRow, StoredResponse, Tombstone
from jobd.model.webhooks import Delivery, WebhookCursor

Row = tuple[Any, ...]

# The columns of jobs that SQL searches, in the order of the table, and the body with all other fields.
JOB_COLUMNS: Final = (
    "seq",
    "id",
    "status",
    "expires_at",
    "finished_at",
    "worker",
    "storage_key",
    "error_message",
    "error_code",
    "created_at",
    "queue",
    "kind",
    "body",
)
_BODY: Final = JOB_COLUMNS.index("body")
_QUEUE: Final = JOB_COLUMNS.index("queue")
_CREATED: Final = JOB_COLUMNS.index("created_at")
_AS_NEW: Final = ("queued", *(None,) * 6)  # status to error_code of a job that has not changed since its creation
_RESULT_COLUMNS: Final = Result.__struct_fields__

KEY_COLUMNS: Final = ("digest", "body_hash", "at", "status", "grants", "response_crc")
LATE_COLUMNS: Final = (
    "seq",
    "job_seq",
    "at",
    "worker",
    "fencing_token",
    "body_hash",
    "expires_at",
    *_RESULT_COLUMNS,
)
AUDIT_COLUMNS: Final = ("seq", *AuditEntry.__struct_fields__[:-1])  # audit_jobs has `changed_ids`
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

# The columns of each table with rows that are written as a whole.
COLUMNS: Final[dict[str, tuple[str, ...]]] = {
    "audit": (*AUDIT_COLUMNS, "crc"),
    "audit_jobs": ("seq", "audit_seq", "job_id", "crc"),
    "bad_rows": ("place", "what", "at", "row"),
    "checkpoints": ("job_seq", "body", "crc"),
    "deleted_jobs": ("job_seq", "id", "at"),
    "deliveries": (*Delivery.__struct_fields__, "crc"),
    "events": ("seq", "last", "job_seq", "at", "body", "crc"),
    "figures": ("id", "body", "crc"),
    "headers": ("job_seq", "body", "crc"),
    "jobs": (*JOB_COLUMNS, "crc"),
    "keys": (*KEY_COLUMNS, "crc", "response"),
    "late_results": (*LATE_COLUMNS, "crc"),
    "payloads": ("job_seq", "body", "request_hash", "crc"),
    "quarantined_jobs": ("seq", "id", "reason", "at", "row", "payload", "request_hash"),
    "quiet_rules": ("id", "host", "version", "queue", "reason", "author", "at", "until", "crc"),
    "queues": ("name", *QueueRow.__struct_fields__, "crc"),
    "reports": ("seq", "body", "crc"),
    "schedules": ("id", "body", "crc"),
    "tombstones": (*Tombstone.__struct_fields__, "crc"),
    "webhooks": (*WebhookCursor.__struct_fields__, "crc"),
}
SQL: Final = {table: ", ".join(columns) for table, columns in COLUMNS.items()}

_NO_METADATA: Final = Raw(b"null")
_BACKOFF: Final = BackoffOptions("exponential", 10_000, HOUR_MS, True)
_KEPT: Final = 10_000  # options that JobReader shares

_pack = msgspec.msgpack.Encoder().encode
_json = msgspec.json.Encoder().encode


def insert(table: str, verb: str = "INSERT") -> str:
    """Return the statement that writes a row of COLUMNS."""
    return f"{verb} INTO {table} ({SQL[table]}) VALUES ({', '.join('?' * len(COLUMNS[table]))})"


def body_table(key: int) -> str:
    """Return the table of the body with this key (model/job.py)."""
    return "payloads" if key >= 0 else "checkpoints" if key % 2 else "headers"


class Unreadable(Exception):
    """A row cannot be decoded. The message names the column and the problem."""


def checksum(row: Row) -> int:
    """Return the CRC-32 of columns without a checksum. It depends on their types: 1, 1.0, "1" and b"1" differ."""
    return zlib.crc32(_pack(row))


def with_checksum(row: Row) -> Row:
    """Return `row` with its checksum appended."""
    return row + (zlib.crc32(_pack(row)),)  # noqa: RUF005  # half the instructions of `(*row, ...)`


def fault(row: Row) -> str | None:
    """Return the problem of a row whose last column is its checksum, or None if it is undamaged."""
    try:
        found = zlib.crc32(_pack(row[:-1]))
    except (UnicodeEncodeError, OverflowError):
        return "its text is not readable"
    return None if found == row[-1] else "its checksum is wrong"


def original_checksum(row: Row) -> int:
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


# The body of a job is a JSON object with the fields that SQL does not search. A field with its default is omitted, so
# the defaults of Job and Options never change. Only None, booleans and integers up to 255 can be defaults, because
# msgspec compares with `is`, and equal jobs must have equal bodies.
_IN_BODY: Final = tuple(name for name in FIELDS if name not in JOB_COLUMNS)
_OPTIONS: Final = len(set(Options.__struct_fields__).intersection(_IN_BODY))  # fields of options, which come first
_FORMS: Final[dict[str, tuple[Any, Any]]] = {  # type and default of the fields that have another form in the body
    "backoff": (tuple[str, int, int, bool] | None, None),  # None: _BACKOFF
    "on_stall": (str | None, None),  # None: auto
    "updated_at": (int | None, None),  # None: created_at, as for run_at
    "run_at": (int | None, None),
    "metadata": (Raw, _NO_METADATA),
}
JobBody: Any = msgspec.defstruct(
    "JobBody",
    [(name, *_FORMS.get(name, (FIELDS[name].type, FIELDS[name].default))) for name in _IN_BODY],
    omit_defaults=True,
    forbid_unknown_fields=True,
    gc=False,
)
_FROM_BODY: Final = {name: f"body.{name}" for name in _IN_BODY}
_body = maker(JobBody, f"{PARTS}, backoff, on_stall, updated_at, run_at, progress, metadata")
_job = maker(
    Job,
    "body, seq, id, options, status, created_at, updated_at, run_at, progress, finished_at, expires_at, result, error",
    _FROM_BODY,
)
_result = maker(Result, "body, storage_key, metadata", _FROM_BODY)
_decode_body = msgspec.json.Decoder(JobBody).decode
_decode_fields = msgspec.json.Decoder(dict[str, Raw]).decode


def job_row(job: Job) -> Row:
    """Return the columns of `job` in the order of JOB_COLUMNS, without the checksum. Equal jobs have equal rows."""
    options, created_at, progress = job.options, job.created_at, job.progress
    backoff, result, error = options.backoff, job.result or NO_RESULT, job.error or NO_ERROR
    latest = job.ended if job.grant is None else job.grant
    metadata = result.metadata
    body = _body(
        job,
        options,
        result,
        error,
        None if backoff == _BACKOFF else astuple(backoff),
        None if options.on_stall == "auto" else options.on_stall,
        None if job.updated_at == created_at else job.updated_at,
        None if job.run_at == created_at else job.run_at,
        int(progress) if type(progress) is float and progress.is_integer() else progress,
        _NO_METADATA if metadata is None or metadata == _NO_METADATA else metadata,
    )
    return (
        job.seq,
        job.id,
        job.status,
        job.expires_at,
        job.finished_at,
        None if latest is None else latest.worker,
        result.storage_key,
        error.message,
        error.code,
        created_at,
        options.queue,
        options.kind,
        str(_json(body), "utf-8", "replace"),
    )


class JobReader:
    """Decodes rows of jobs. Equal options and names of different jobs share one object, to save memory."""

    def __init__(self) -> None:
        self._options: dict[Row, Options] = {}
        self._new: dict[Row, Options] = {}  # of new jobs, by queue, kind and body
        self._words: Any = {}  # interned text; untyped, because some words are literals

    def job(self, row: Row) -> Job:
        """Return the job of an undamaged row. Raises Unreadable if its body is not that of a job."""
        (seq, id_, status, expires_at, finished_at, _, key, message, code, created_at, queue, kind) = row[:_BODY]
        try:
            body = _decode_body(row[_BODY])
        except (msgspec.MsgspecError, UnicodeError, TypeError) as error:
            raise Unreadable(f"its body cannot be decoded: {error}") from error
        progress, metadata = body.progress, body.metadata
        result = _result(body, key, None if metadata == _NO_METADATA else metadata.copy())
        return _job(
            body,
            seq,
            id_,
            self._options_of(queue, kind, body),
            self._words.setdefault(status, status),
            created_at,
            created_at if body.updated_at is None else body.updated_at,
            created_at if body.run_at is None else body.run_at,
            int(progress) if isinstance(progress, float) and progress.is_integer() else progress,
            finished_at,
            expires_at,
            None if result == NO_RESULT else result,
            None if message is None and code is None else Failure(message, code),
        )

    def job_or_packed(self, row: Row) -> Job | PackedJob:
        """Return the job of an undamaged row, packed if possible. Raises Unreadable.

        The body of new jobs with equal options is decoded once.
        """
        if row[2:_CREATED] != _AS_NEW or not row[1]:
            return self.job(row)
        options = self._new.get(row[_QUEUE : _BODY + 1])
        if options is not None:
            return PackedJob(row[0], row[1], options, row[_CREATED])
        job = self.job(row)
        short = packed(job)
        if short is None:
            return job
        if len(self._new) >= _KEPT:
            self._new.clear()
        self._new[row[_QUEUE : _BODY + 1]] = short.options
        return short

    def _options_of(self, queue: str, kind: str, body: Any) -> Options:
        fields = (queue, kind, *astuple(body)[:_OPTIONS])
        if (options := self._options.get(fields)) is not None:
            return options
        if len(self._options) >= _KEPT:  # sharing is useless if most options differ
            self._options.clear()
            self._words.clear()
        word = self._words.setdefault
        shared = [word(value, value) if type(value) is str else value for value in fields]
        given = dict(zip(Options.__struct_fields__, shared, strict=True))
        backoff = given["backoff"]
        given["backoff"] = _BACKOFF if backoff is None else BackoffOptions(word(backoff[0], backoff[0]), *backoff[1:])
        given["on_stall"] = "auto" if given["on_stall"] is None else given["on_stall"]
        options = self._options[fields] = Options(**given)
        return options


# ---------------------------------------------------------------------------------------------------------------------
# Keys, queues, and rows that are a struct

_decode_grants = msgspec.json.Decoder(list[tuple[str, str]]).decode


def key_row(key: StoredResponse) -> Row:
    """Return the columns of `key`: KEY_COLUMNS, their checksum, and the body of the response."""
    response_crc = None if key.body is None else zlib.crc32(key.body)
    grants = None if key.grants is None else _json(key.grants)
    return (*with_checksum((key.digest, key.body_hash, key.at, key.status, grants, response_crc)), key.body)


def key(row: Row, response: bytes | None = None) -> StoredResponse:
    """Return the stored response of an undamaged row of KEY_COLUMNS. `response` is its body."""
    digest, body_hash, at, status, grants = row[:5]
    return StoredResponse(digest, body_hash, at, status, response, None if grants is None else _decode_grants(grants))


def queue_row(name: str, queue: QueueRow) -> Row:
    """Return the columns of a queue with the checksum."""
    paused, *others = astuple(queue)
    return with_checksum((name, int(paused), *others))


def queue(row: Row) -> QueueRow:
    """Return the queue of an undamaged row."""
    return QueueRow(bool(row[1]), *row[2:-1])


def struct_row(fields: msgspec.Struct) -> Row:
    """Return the columns of a table whose columns are the fields of a struct, with the checksum."""
    return with_checksum(astuple(fields))


# ---------------------------------------------------------------------------------------------------------------------
# Audit


def audit_row(seq: int, audited: AuditEntry) -> Row:
    """Return the columns of an audit entry with the checksum."""
    *about, details, part_of, _ = astuple(audited)
    return with_checksum((seq, *about, None if details is None else _json(details), part_of))


def audited(row: Row) -> AuditEntry:
    """Return the audit entry of an undamaged row."""
    *about, details, part_of = row[1:-1]
    return AuditEntry(*(*about, None if details is None else msgspec.json.decode(details), part_of))


# ---------------------------------------------------------------------------------------------------------------------
# Late results


def late_row(job_seq: int, late: LateResult) -> Row:
    """Return the columns of a late result with the checksum."""
    about = (late.seq, job_seq, late.at, late.worker, late.fencing_token, late.body_hash, late.expires_at)
    *places, metadata = astuple(late.result)
    return with_checksum((*about, *places, None if metadata is None or metadata == _NO_METADATA else bytes(metadata)))


def late(row: Row, *, whole: bool) -> LateResult:
    """Return the late result of an undamaged row. Unless `whole`, its result has only the `download_url`.

    The URL is enough to decide whether the late result can be adopted.
    """
    seq, _, at, worker, fencing_token, body_hash, expires_at, url, path, key, metadata = row[:11]
    result = Result(url, path, key, None if metadata is None else Raw(metadata)) if whole else Result(url)
    return LateResult(seq, at, worker, fencing_token, body_hash, expires_at, result)


# ---------------------------------------------------------------------------------------------------------------------
# Rows in quarantine


def as_text(table: str, row: Row) -> str:
    """Return a row as readable JSON, column to value. Bytes, and text that is not UTF-8, become {"hex": ...}."""
    return _json(dict(zip(COLUMNS[table], map(json_value, row), strict=False))).decode()


def job_as_text(row: Row) -> str:
    """Return a row of jobs with its checksum as readable JSON. The fields of its body are next to its columns."""
    values = dict(zip(COLUMNS["jobs"], map(json_value, row), strict=True))
    with contextlib.suppress(msgspec.DecodeError, UnicodeError):
        fields = _decode_fields(row[_BODY])
        del values["body"]
        values = {**fields, **values}
    return _json(values).decode()


def json_value(value: Any) -> Any:
    """Return a value of a row in a form that JSON can encode: {"hex": ...} for bytes and for text that is not UTF-8."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return {"hex": value.encode(errors="surrogateescape").hex()}
    return {"hex": value.hex()} if isinstance(value, bytes) else value


def job_from_text(text: str) -> Row:
    """Return the row of a result of `job_as_text`, without checksum. Raises Unreadable if it is not one."""
    try:
        fields = _decode_fields(text)
        fields.pop("crc", None)
        columns = [_row_value(fields.pop(column)) for column in JOB_COLUMNS[:_BODY]]
        return (*columns, _row_value(fields["body"]) if "body" in fields else _json(fields).decode())
    except (msgspec.DecodeError, ValueError, TypeError) as error:
        raise Unreadable(f"it is not a row in JSON: {error}") from error
    except KeyError as error:
        raise Unreadable(f"column {error.args[0]} is missing") from error


def _row_value(text: Raw) -> Any:
    value = msgspec.json.decode(text)
    return bytes.fromhex(value["hex"]) if isinstance(value, dict) else value
