"""Read the rows of jobs that an operator edited, in their table or in quarantine, and check them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from jobd.model.job import LATEST_MS, TOKEN_COUNTER_BITS, Job, is_job_id
from jobd.storage import codec
from jobd.storage.codec import SQL, Row
from jobd.storage.database import Database, readable
from jobd.storage.files import StoreError

_SIGNED: Final = frozenset({"priority", "progress"})  # validation reports or mends those below their bounds


class RepairRejected(StoreError):
    """The edited row is not accepted. The message says why."""

    exit_code = 4


class Edited(msgspec.Struct, frozen=True):
    """The job of an edited row. `quarantine_seq` is its seq in quarantined_jobs, None if it is in jobs."""

    quarantine_seq: int | None
    job: Job
    body: bytes
    request_hash: str

    @property
    def where(self) -> str:
        return "the row" if self.quarantine_seq is None else "the row in quarantine"


def edited(db: Database, id_: str) -> Edited:
    """Return the edited row of job `id_`. Raises RepairRejected if there is none or it is not a valid job."""
    sql = "SELECT seq, row, payload, request_hash FROM quarantined_jobs WHERE id = ?"
    quarantined = next(iter(db.rows(sql, (id_,))), None)
    seq = None if quarantined is None else quarantined[0]
    found = _in_place(db, id_) if quarantined is None else _quarantined_row(id_, quarantined)
    row, body, request_hash = found
    return Edited(seq, _checked(db, id_, row), _json_text(id_, body), readable(request_hash or ""))


def _in_place(db: Database, id_: str) -> tuple[Row, Any, Any]:
    rows = db.rows(f"SELECT {SQL['jobs']} FROM jobs NOT INDEXED WHERE id = ?", (id_,))
    if not rows:
        raise RepairRejected(f"there is no job {id_}, neither in jobs nor in quarantined_jobs")
    payload = db.rows("SELECT body, request_hash FROM payloads WHERE job_seq = ?", (rows[0][0],))
    return (rows[0][:-1], *(payload[0] if payload else (b"null", "")))


def _quarantined_row(id_: str, quarantined: Row) -> tuple[Row, Any, Any]:
    try:
        row = codec.job_from_text(quarantined[1])
    except codec.Unreadable as error:
        raise RepairRejected(f"job {id_}: correct `row` in quarantined_jobs: {error}") from error
    return row, b"null" if quarantined[2] is None else quarantined[2], quarantined[3]


def _checked(db: Database, id_: str, row: Row) -> Job:
    """Return the job of `row`. Raises RepairRejected if it is not a valid job."""
    try:
        job = db.reader.job(row)
        codec.checksum(codec.job_row(job))
    except (codec.Unreadable, AttributeError, TypeError, UnicodeEncodeError, OverflowError) as error:
        raise RepairRejected(f"job {id_}: the row is not a valid job: {error}") from error
    if not isinstance(job.id, str) or not is_job_id(job.id):
        raise RepairRejected(f"{readable(job.id)!r} is not a valid job id")
    next_token = (db.numbers.epoch << TOKEN_COUNTER_BITS) + db.numbers.next_token
    tokens = [part.fencing_token for part in (job.grant, job.ended) if part is not None]
    if not 0 < job.seq < db.numbers.next_job or max(tokens, default=0) >= next_token:
        raise RepairRejected(f"job {job.id}: its seq or a fencing_token was never assigned")
    for name, number in _numbers(job):
        lowest = -LATEST_MS if name in _SIGNED else 0
        if name != "fencing_token" and not lowest <= number <= LATEST_MS:
            raise RepairRejected(f"job {job.id}: its {name} {number} is not from {lowest} to {LATEST_MS}")
    if others := db.rows("SELECT id FROM jobs NOT INDEXED WHERE seq = ? AND id <> ?", (job.seq, job.id)):
        raise RepairRejected(f"job {job.id}: its seq {job.seq} is that of job {readable(others[0][0])}")
    return job


def _numbers(part: msgspec.Struct) -> Iterator[tuple[str, int]]:
    """Yield the name and value of every integer in a job."""
    for name in part.__struct_fields__:
        value = getattr(part, name)
        if isinstance(value, msgspec.Struct):
            yield from _numbers(value)
        elif type(value) is int:
            yield name, value


def _json_text(id_: str, body: Any) -> bytes:
    text = body.encode() if isinstance(body, str) else body
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, TypeError) as error:
        raise RepairRejected(f"job {id_}: the payload is not JSON ({error}): repair it first") from error
    return bytes(text)
