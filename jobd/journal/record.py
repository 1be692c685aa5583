"""Encode a batch as the body of a record, and decode it.

The first byte is the format. The rest is a MessagePack array. Events are rows of `event_codec.py`, and other values are
arrays of their fields. A reader that meets an unknown format stops, because later formats may have other meanings.
A record has the lowest format that has what it needs: 1 without `writes`, which readers of format 1 ignore. A record of
format 3 makes a job with an Extra (model/job.py), or changes a schedule or a quiet rule, which earlier readers would
ignore. It has headers and checkpoints in `bodies`.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import Raw, Struct
from msgspec.structs import astuple, replace

from jobd.journal import event_codec
from jobd.journal.event_codec import EventRow
from jobd.model.events import QUIET, SCHEDULING
from jobd.model.job import LateResult, Result
from jobd.model.journal import BadRecord, Record
from jobd.model.storage import (
    EXTRA_FORMAT,
    AuditEntry,
    Batch,
    Numbers,
    QueueRow,
    StoredResponse,
    TableWrite,
    Tombstone,
)

FORMAT: Final = EXTRA_FORMAT
LOWEST_FORMAT: Final = 1  # read by every version
CLOSING: Final = b"\xff"  # the body of the last record of a journal that nodes may not follow any more
_CLOSED: Final = "closes it: `jobd cluster leave` has turned this cluster into the store of a single machine"


class _Body(Struct, array_like=True, gc=False):
    events: list[tuple[Any, ...]]
    created: list[tuple[bytes, str]]  # payload and request hash of the new jobs, in the order of their events
    late: list[tuple[Any, ...]]  # late results, in the order of their events
    numbers: tuple[Any, ...]
    queues: dict[str, tuple[Any, ...]]
    keys: list[tuple[Any, ...]]
    forget_keys: list[str]
    checked: list[int]
    report: bytes | None
    unmark: bool
    tombstones: list[tuple[Any, ...]]
    sweeps: bool
    audit: list[tuple[Any, ...]]
    writes: list[TableWrite] = []


class _ExtraBody(_Body, array_like=True, gc=False):
    bodies: dict[int, dict[int, bytes]] = {}  # seq of an event -> key -> body


Decoded = tuple[Batch, list[EventRow]]  # the batch of a record, and the rows of its events

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_ExtraBody).decode
_json = msgspec.json.Encoder().encode
_parse = msgspec.json.Decoder().decode


def encode(batch: Batch) -> tuple[bytes, list[EventRow]]:
    """Return the body of `batch`, and the rows of its events."""
    events: list[EventRow] = []
    created: list[tuple[bytes, str]] = []
    late: list[tuple[Any, ...]] = []
    bodies: dict[int, dict[int, bytes]] = {}
    is_extended = False  # a job with an Extra is made, or a schedule or a quiet rule changes
    for event in batch.changes:
        events.append(event_codec.encode(event))
        if not event.job_seq:
            is_extended = is_extended or event.type in QUIET or event.type in SCHEDULING
        elif event.from_status is None:  # a new job
            created.append((event.payload or b"null", event.request_hash or ""))
            is_extended = is_extended or (event.after is not None and event.after.extra is not None)
        if event.bodies:
            bodies[event.seq] = event.bodies
        if event.late is not None:
            late.append(_late_row(event.late))
    body = _Body(
        events,
        created,
        late,
        astuple(batch.numbers),
        {name: astuple(row) for name, row in batch.queues.items()} if batch.queues else {},
        [astuple(key) for key in batch.keys] if batch.keys else [],
        batch.forget_keys,
        batch.checked,
        batch.report,
        batch.unmark,
        [astuple(tombstone) for tombstone in batch.tombstones] if batch.tombstones else [],
        batch.sweeps,
        [_audit_row(entry) for entry in batch.audit] if batch.audit else [],
        batch.writes,
    )
    if is_extended or bodies:
        return b"\x03" + _encode((*astuple(body), bodies)), events
    return (b"\x02" if batch.writes else b"\x01") + _encode(body), events


def format_of(record: Record) -> int:
    """Return the format of `record`, 0 for the one that closes a journal."""
    return 0 if record.body == CLOSING else record.body[0]


def decode(record: Record) -> Decoded:
    """Return the batch of `record`, without rows of jobs, and the rows of its events. Raises BadRecord."""
    if not record.body or not 1 <= record.body[0] <= FORMAT:
        if record.body == CLOSING:
            raise BadRecord(record.number, _CLOSED)
        found = record.body[0] if record.body else "none"
        raise BadRecord(record.number, f"has format {found}, but this jobd supports formats up to {FORMAT}")
    try:
        body = _decode(memoryview(record.body)[1:])
        return _batch(body), body.events
    except (msgspec.MsgspecError, RecursionError, TypeError, ValueError, StopIteration) as error:
        raise BadRecord(record.number, f"cannot be decoded: {error}") from error


def _batch(body: _ExtraBody) -> Batch:
    created, late = iter(body.created), iter(body.late)
    changes = []
    for row in body.events:
        event = event_codec.decode(row)
        if event.from_status is None and event.job_seq:
            payload, request_hash = next(created)
            event = replace(event, payload=payload, request_hash=request_hash)
        elif event.type == "late_result":
            event = replace(event, late=_late(next(late)))
        if body.bodies and event.seq in body.bodies:
            event = replace(event, bodies=body.bodies[event.seq])
        changes.append(event)
    return Batch(
        changes,
        Numbers(*body.numbers),
        {name: QueueRow(*row) for name, row in body.queues.items()},
        [_key(row) for row in body.keys],
        body.forget_keys,
        body.checked,
        body.report,
        unmark=body.unmark,
        tombstones=[Tombstone(*row) for row in body.tombstones],
        sweeps=body.sweeps,
        audit=[_audit(row) for row in body.audit],
        writes=body.writes,
    )


def _key(row: tuple[Any, ...]) -> StoredResponse:
    digest, body_hash, at, status, body, grants = row
    pairs = None if grants is None else [(job_id, lock_id) for job_id, lock_id in grants]
    return StoredResponse(digest, body_hash, at, status, body, pairs)


def _late_row(late: LateResult) -> tuple[Any, ...]:
    *about, result = astuple(late)
    url, path, key, metadata = astuple(result)
    return (*about, url, path, key, None if metadata is None else bytes(metadata))


def _late(row: tuple[Any, ...]) -> LateResult:
    seq, at, worker, fencing_token, body_hash, expires_at, url, path, key, metadata = row
    return LateResult(
        seq,
        at,
        worker,
        fencing_token,
        body_hash,
        expires_at,
        Result(url, path, key, None if metadata is None else Raw(metadata)),
    )


def _audit_row(entry: AuditEntry) -> tuple[Any, ...]:
    *about, details, part_of, changed_ids = astuple(entry)
    return (*about, None if details is None else _json(details), part_of, changed_ids)


def _audit(row: tuple[Any, ...]) -> AuditEntry:
    *about, details, part_of, changed_ids = row
    return AuditEntry(*(*about, None if details is None else _parse(details), part_of, changed_ids))
