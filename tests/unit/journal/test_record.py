"""The body of a record: a batch survives encoding and decoding."""

from __future__ import annotations

import msgspec
import pytest
from msgspec import Raw

from jobd.journal import record
from jobd.model import storage
from jobd.model.fields import MAX_NESTING
from jobd.model.job import Extra, Result
from jobd.model.journal import BadRecord, Record
from jobd.model.webhooks import Delivery, WebhookCursor
from tests.support.factories import NOW, ChangeFactory, as_recorded
from tests.support.store_files import job_of


def recorded(body: bytes) -> Record:
    return Record(7, 1, 1, 1, NOW, body)


def back(batch: storage.Batch) -> storage.Batch:
    """Return `batch` after encoding and decoding."""
    body, events = record.encode(batch)
    decoded, rows = record.decode(recorded(body))
    assert [tuple(row) for row in rows] == events
    return decoded


def written(batch: storage.Batch) -> storage.Batch:
    """Return `batch` without what a record does not keep: rows of jobs, and the payloads that responses need."""
    return msgspec.structs.replace(batch, changes=list(map(as_recorded, batch.changes)), payloads=[])


@pytest.mark.parametrize("seed", range(20))
def test_any_batch_survives(seed: int) -> None:
    maker = ChangeFactory(seed)
    for _ in range(10):
        batch = maker.any_batch(15)
        assert back(batch) == written(batch)


def test_every_part_of_a_batch_survives() -> None:
    maker = ChangeFactory()
    created = maker.create("é", type_="imported")
    late = maker.late(job_of(created), 3, Result("https://x", "/y", "z", Raw(b'{"a": [1, null]}')))
    batch = maker.batch(
        [created, late, maker.late(job_of(created), 4), maker.queue_event("video", paused=True)],
        keys=[
            storage.StoredResponse("d1", "b1", NOW, 201, b'{"x":1}'),
            storage.StoredResponse("d2", "b2", NOW, grants=[("a", "lock-1"), ("b", "lock-2")]),
        ],
        forget_keys=["d3"],
        checked=[4, 5],
        report=b'{"r":1}',
        unmark=True,
        tombstones=[storage.Tombstone(9, "x", "key", NOW, NOW + 1, 2)],
        sweeps=True,
        audit=[
            storage.AuditEntry(
                NOW, "eve", "::1", "cancel", "a", "video", "why", "done", 1, {"big": 2**70, "n": None}, "p1"
            ),
            storage.AuditEntry(NOW, "eve", "::1", "plan-retry", jobs=2, part_of="p2", changed_ids=["a", "b"]),
        ],
    )
    assert back(batch) == written(batch)


def test_every_write_of_a_table_survives_in_a_record_of_a_later_format() -> None:
    delivery = Delivery(3, "e", "waiting", "jobs/a", "job.failed", "evt_3", 3, NOW, NOW, 0, None, 500, "é", b"\xff")
    writes: list[storage.TableWrite] = [
        storage.OutboxWrite([WebhookCursor("e", 3, 2, 4, {"stuck_jobs": NOW}, NOW)], [delivery], [1, 2], ["f"]),
        storage.TombstoneWrite([4], [storage.Tombstone(-5, "x", "key", NOW, NOW + 1, 2)]),
        storage.EventPruning([1, 2], [7], 9),
        storage.AuditTrimming([1, 2]),
        storage.FiguresWrite(b"{}"),
    ]
    batch = ChangeFactory().batch([], writes=writes)
    assert back(batch) == batch
    assert (record.encode(batch)[0][0], record.encode(ChangeFactory().batch([]))[0][0]) == (2, 1)


def test_the_fields_of_table_writes_keep_their_names() -> None:
    """Records that were written before have these names."""
    write = msgspec.to_builtins(storage.OutboxWrite([WebhookCursor("e", 3)], [], [1], []))
    assert write == {
        "type": "outbox",
        "cursors": [{"name": "e", "position": 3, "gone_to": 0, "next_delivery": 1, "alerts": {}, "updated_at": 0}],
        "deliveries": [],
        "dropped": [1],
        "forgotten": [],
    }
    assert [*Delivery.__struct_fields__, *storage.Tombstone.__struct_fields__] == [
        *("id", "endpoint", "state", "subject", "type", "message_id", "seq", "at", "due_at", "tries", "ended_at"),
        *("status", "error", "body", "job_seq", "job_id", "key", "at", "due_at", "tries"),
    ]


def test_a_record_without_its_empty_list_of_writes_is_readable() -> None:
    """As earlier versions wrote it."""
    maker = ChangeFactory()
    batch = maker.batch([maker.create()])
    body, _ = record.encode(batch)
    parts = msgspec.msgpack.decode(body[1:])
    assert parts.pop() == []
    assert record.decode(recorded(body[:1] + msgspec.msgpack.encode(parts)))[0] == written(batch)


@pytest.mark.parametrize(
    "change", ["put", "paused", "resumed", "skipped", "missed", "deleted", "quiet", "resume", "job"]
)
def test_a_record_that_earlier_readers_would_ignore_has_the_third_format(change: str) -> None:
    maker = ChangeFactory(has_extra=False)
    match change:
        case "quiet" | "resume":
            event = maker.quiet_event("q1", change == "resume")
        case "job":
            event = maker.create(extra=Extra("nightly", NOW))
        case _:
            event = maker.schedule_event("nightly", change)
    body, _ = record.encode(maker.batch([event]))
    assert body[0] == 3
    assert record.decode(recorded(body))[0].changes == [as_recorded(event)]


def test_only_a_record_with_headers_or_a_checkpoint_has_the_third_format() -> None:
    maker = ChangeFactory()
    formats = []
    for _ in range(200):
        batch = maker.any_batch(1)
        body, _ = record.encode(batch)
        (change,) = batch.changes
        formats.append((body[0], change.bodies is not None))
        assert record.decode(recorded(body))[0].changes == [as_recorded(change)]
    assert set(formats) == {(1, False), (3, True)}


def test_an_empty_batch_survives() -> None:
    batch = ChangeFactory().batch([])
    assert back(batch) == batch


def test_an_unknown_format_is_rejected_with_its_number() -> None:
    body, _ = record.encode(ChangeFactory().batch([]))
    with pytest.raises(BadRecord, match="record 7 of the journal has format 4, but this jobd supports formats up to 3"):
        record.decode(recorded(b"\x04" + body[1:]))
    with pytest.raises(BadRecord, match="has format none"):
        record.decode(recorded(b""))


def test_the_last_record_of_a_closed_journal_says_so() -> None:
    with pytest.raises(BadRecord, match="record 7 of the journal closes it: `jobd cluster leave`"):
        record.decode(recorded(record.CLOSING))


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_body_that_cannot_be_decoded_is_rejected(cut: int) -> None:
    maker = ChangeFactory()
    body, _ = record.encode(maker.batch([maker.create()]))
    with pytest.raises(BadRecord, match="cannot be decoded"):
        record.decode(recorded(body[:cut]))


@pytest.mark.parametrize("depth", [MAX_NESTING, 900])
def test_nested_values_survive(depth: int) -> None:
    """Also deeper ones, which older versions accepted."""
    maker = ChangeFactory()
    created = maker.create()
    changes = [created, maker.finish(job_of(maker.grant(job_of(created))), metadata=nested(depth))]
    assert back(maker.batch(changes)) == written(maker.batch(changes))


def test_a_body_with_values_that_are_nested_too_deeply_is_rejected() -> None:
    maker = ChangeFactory()
    finished = maker.finish(job_of(maker.create()), metadata=nested(100_000))
    body, _ = record.encode(maker.batch([finished]))
    with pytest.raises(BadRecord, match="record 7 of the journal cannot be decoded: maximum recursion depth"):
        record.decode(recorded(body))


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def test_an_event_without_its_payload_is_rejected() -> None:
    maker = ChangeFactory()
    body, _ = record.encode(maker.batch([maker.create()]))
    parts = msgspec.msgpack.decode(body[1:])
    parts[1] = []
    with pytest.raises(BadRecord, match="cannot be decoded"):
        record.decode(recorded(body[:1] + msgspec.msgpack.encode(parts)))
