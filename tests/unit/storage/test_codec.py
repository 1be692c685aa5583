"""Rows and values: encoding loses nothing, and checksums detect every flipped bit."""

from __future__ import annotations

import contextlib
import random
import re
import sqlite3
from typing import Any

import msgspec
import pytest
from msgspec import Raw
from msgspec.structs import asdict, replace

from jobd.journal import event_codec
from jobd.model import commands as cmd
from jobd.model.clocks import LockMs
from jobd.model.events import GIVEN_BACK, KEEP_HEARTBEATS, ROUTINE, Changes, Event, fold
from jobd.model.job import BackoffOptions, Failure, Job, Options, Result, packed
from jobd.model.storage import AuditEntry, Numbers, QueueRow, StoredResponse
from jobd.storage import codec
from jobd.storage.schema import migrations
from tests.support.factories import NOW, OPTIONS, ChangeFactory, as_stored, full_job
from tests.support.rule_harness import RuleHarness


def columns_of(table: str) -> tuple[str, ...]:
    conn = sqlite3.connect(":memory:", isolation_level=None)
    migrations.create(conn)
    names = tuple(row[1] for row in conn.execute(f"PRAGMA table_info({table})"))
    conn.close()
    return names


def test_each_table_has_the_columns_of_its_rows() -> None:
    assert columns_of("meta") == ("id", *codec.META_COLUMNS, "crc")
    for table, columns in codec.COLUMNS.items():
        assert columns_of(table) == (*["seq"][: table == "bad_rows"], *columns)


def test_the_meta_row_holds_every_number() -> None:
    row = migrations.meta_row(Numbers(2, 3, 4, 5, LockMs(6), 7, True, 20, 21, 22), (8, 9, 10, 11), 1, 13, 14, 12)
    assert row[:-1] == (12, 2, 3, 4, 5, 6, 7, 1, 20, 21, 22, 8, 9, 10, 11, 1, 13, 14)
    assert codec.fault(row) is None


def test_a_full_job_has_no_default() -> None:
    """So the tests below notice a field that is not stored."""
    names = Job.__struct_fields__[-len(Job.__struct_defaults__) :]
    unset = [
        name for name, value in zip(names, Job.__struct_defaults__, strict=True) if getattr(full_job(), name) == value
    ]
    assert not unset, f"set {unset} in factories.full_job"


@pytest.mark.parametrize("part", ["", "grant", "deadlines", "ended", "result", "error"])
def test_a_job_is_the_same_after_encoding_and_decoding(part: str) -> None:
    job = replace(full_job(), **{part: None}) if part else full_job()
    row = codec.job_row(job)
    assert len(row) == len(codec.JOB_COLUMNS)
    assert codec.JobReader().job(codec.with_checksum(row)) == job
    assert all(type(value) in (int, float, str, bytes, type(None)) for value in row)


def test_progress_has_one_form_on_disk_and_is_an_integer_if_possible() -> None:
    original, real, negative = (codec.job_row(replace(full_job(), progress=p)) for p in (45, 45.0, -0.0))
    assert codec.checksum(original) == codec.checksum(real)
    assert type(codec.JobReader().job((*original, 0)).progress) is int
    assert codec.checksum(negative) == codec.checksum(codec.job_row(replace(full_job(), progress=0)))
    assert codec.JobReader().job((*codec.job_row(full_job()), 0)).progress == 12.5


def test_empty_parts_are_decoded_as_none() -> None:
    job = replace(full_job(), result=Result(metadata=Raw(b"null")), error=Failure(None))
    back = codec.JobReader().job(codec.with_checksum(codec.job_row(job)))
    assert back.result is None
    assert back.error is None
    assert codec.job_row(back) == codec.job_row(job)


@pytest.mark.parametrize("fields", [{}, {"run_at": NOW + 5}, {"expires_at": NOW + 9}, {"id": ""}, {"attempt": 1}])
def test_a_live_job_is_decoded_in_the_compact_form_if_possible(fields: dict[str, Any]) -> None:
    reader = codec.JobReader()
    for options in (*OPTIONS, OPTIONS[0], replace(OPTIONS[0], queue=""), replace(OPTIONS[0], kind="other")):
        job = replace(Job(3, "a", options, "queued", NOW, NOW, NOW), **fields)
        row = codec.with_checksum(codec.job_row(job))
        back = reader.job_or_packed(row)
        assert back == (packed(job) or job)
        original = reader.job(row)
        assert original == job
        assert original.options is back.options


def test_a_job_with_default_options_has_an_empty_body() -> None:
    assert codec.job_row(Job(3, "a", Options(), "queued", NOW, NOW, NOW))[-1] == "{}"


def test_rows_written_by_this_version_stay_the_same() -> None:
    """A row that is lost is written again from memory, and its checksum must be the recorded one."""
    assert codec.job_row(full_job())[-1] == (
        '{"priority":-5,"max_attempts":3,"stall_after_ms":60000,"progress_timeout_ms":90000,"updated_at":1700000000001,'
        '"run_at":1700000000002,"progress":12.5,"progress_message":"scène 3\\u0000","attempt":2,"stalls":1,'
        '"started_at":1700000000003,"grant":["lock",16777225,"w-1",1700000000003,60000,0,90000],'
        '"deadlines":[1000,2000,3000,true],"ended":["old",16777219,"w-0",1700000000000,"stall","silent","fail","abc"],'
        '"download_url":"https://x/y","file_path":"/a","metadata":{"a": [1, null]},"releases":6,"payload_bytes":9000,'
        '"extra":["nightly",1700000000006,2,3,"old"]}'
    )
    backoff = BackoffOptions("fixed", 5, 6, jitter=False)
    options = Options(backoff=backoff, max_stalls=0, on_stall="fail")
    job = Job(3, "a", options, "queued", NOW, NOW, NOW)
    assert codec.job_row(job)[-1] == '{"backoff":["fixed",5,6,false],"max_stalls":0,"on_stall":"fail"}'


def test_equal_jobs_have_equal_rows() -> None:
    job = full_job()
    kind, on_stall = (
        msgspec.json.decode(f'"{word}"') for word in ("exponential", "auto")
    )  # other objects than in the code
    options = replace(job.options, on_stall=on_stall, backoff=BackoffOptions(kind))
    other = replace(job, options=options)
    assert other == job
    assert codec.job_row(other) == codec.job_row(job)
    none = replace(job, result=Result(metadata=Raw(bytearray(b"null"))))
    assert codec.job_row(none) == codec.job_row(replace(job, result=None))


def test_equal_options_of_jobs_are_shared() -> None:
    reader = codec.JobReader()
    maker = ChangeFactory()
    made = [maker.create(options=OPTIONS[1]).after for _ in range(2)]
    back = [reader.job(codec.with_checksum(codec.job_row(job))) for job in made if job is not None]
    assert back[0].options is back[1].options
    assert back[0].created_at is back[0].updated_at is back[0].run_at


def test_the_cache_of_options_is_limited() -> None:
    reader = codec.JobReader()
    for priority in range(10_050):
        job = Job(3, "a", replace(OPTIONS[0], priority=priority, kind=f"k{priority}"), "queued", NOW, NOW, NOW)
        assert reader.job_or_packed((*codec.job_row(job), 0)) == packed(job)
    assert len(reader._options) < 100
    assert len(reader._new) < 100


@pytest.mark.parametrize("place", ["$.grant[1]", "$.grant[6]", "$.deadlines[1]", "$.ended[5]", "$.attempt"])
def test_an_incomplete_part_is_an_error_that_names_it(place: str) -> None:
    *columns, body = codec.job_row(full_job())
    with contextlib.closing(sqlite3.connect(":memory:")) as conn:
        (edited,) = conn.execute("SELECT json_set(?, ?, NULL)", (body, place)).fetchone()
    with pytest.raises(codec.Unreadable, match=f"its body cannot be decoded: .*{re.escape(place)}"):
        codec.JobReader().job((*columns, edited, 0))


def test_every_flipped_bit_and_emptied_column_is_detected() -> None:
    row = codec.with_checksum(codec.job_row(full_job()))
    assert codec.fault(row) is None
    for place, value in enumerate(row):
        for other in (*_flipped(value), *((None, "") if value and place < len(row) - 1 else ())):
            changed = (*row[:place], other, *row[place + 1 :])
            assert codec.fault(changed) is not None, codec.JOB_COLUMNS[place]
            # The original checksum can be recovered, whichever column was damaged.
            assert codec.original_checksum(changed) == row[-1]


def _flipped(value: Any) -> list[Any]:
    """Yield `value` with single flipped bits, as SQLite would return it."""
    if isinstance(value, int):
        return [value ^ (1 << bit) for bit in (0, 7, 31)]
    if isinstance(value, float):
        return [value + 1, None]
    if isinstance(value, str | bytes):
        raw = value.encode() if isinstance(value, str) else value
        hit = [bytes((*raw[:i], raw[i] ^ bit, *raw[i + 1 :])) for i in range(len(raw)) for bit in (1, 64, 128)]
        return [item.decode(errors="surrogateescape") for item in hit] if isinstance(value, str) else hit
    return [0, "", b""]


def test_none_zero_and_empty_are_not_the_same_to_a_checksum() -> None:
    forms: list[Any] = [None, 0, 0.0, "", b"", "0", b"0", -1]
    assert len({codec.checksum((form,)) for form in forms}) == len(forms)


def test_an_event_is_the_same_after_encoding_and_decoding() -> None:
    job = full_job()
    event = Event(
        9, NOW, "fixed", 7, job.id, "q", "queued", "queued", "admin", "why", {"a": [1, None]}, Changes(**asdict(job))
    )
    row = codec.with_checksum(event_codec.encode(event))
    assert codec.fault(row) is None
    assert event_codec.decode(row) == event
    assert fold(None, event_codec.decode(row)) == job


def test_parts_are_stored_in_the_journal_as_arrays_in_a_fixed_order() -> None:
    """Rows written by this version must stay readable."""
    job = full_job()
    event = Event(9, NOW, "fixed", 7, job.id, "q", "queued", "queued", "admin", None, None, Changes(**asdict(job)))
    decoded = msgspec.json.decode(event_codec.encode(event)[-1])
    token = 1 << 24
    backoff = {"kind": "exponential", "base_ms": 10000, "max_ms": 3600000, "jitter": True}
    assert {name: value for name, value in decoded.items() if isinstance(value, list)} == {
        "options": ["video", "convert", -5, 3, backoff, 3, "auto", 60_000, 90_000],
        "grant": ["lock", token | 9, "w-1", NOW + 3, 60_000, 0, 90_000],
        "deadlines": [1_000, 2_000, 3_000, True],
        "ended": ["old", token | 3, "w-0", NOW, "stall", "silent", "fail", "abc"],
        "result": ["https://x/y", "/a", "k/e/y", {"a": [1, None]}],
        "error": ["it broke", "E1"],
        "extra": ["nightly", NOW + 6, 2, 3, "old"],
    }


def test_clearing_a_field_differs_from_not_changing_it() -> None:
    changes = Changes(grant=None, result=None, error=None, expires_at=None)
    event = Event(1, NOW, "force_reset", 7, "a", "q", None, None, "admin", None, None, changes)
    back = event_codec.decode(codec.with_checksum(event_codec.encode(event)))
    assert back.changes == changes


@pytest.mark.parametrize("metadata", [b'{"x":1}', b'"text"', b"[]", b"0", b"[" * 900 + b"]" * 900, None])
def test_the_journal_keeps_any_json_metadata(metadata: bytes | None) -> None:
    result = Result(file_path="/f", metadata=None if metadata is None else Raw(metadata))
    event = Event(1, NOW, "completed", 7, "a", "q", None, None, "w", None, None, Changes(result=result))
    back = event_codec.decode(codec.with_checksum(event_codec.encode(event)))
    assert back.changes == Changes(result=result)


def test_keys_and_queues_are_the_same_after_encoding_and_decoding() -> None:
    answered = StoredResponse("d", "b", NOW, 201, b'{"x":1}')
    *columns, response = codec.key_row(answered)
    assert codec.fault(tuple(columns)) is None
    assert codec.key(tuple(columns), response) == answered
    granted = StoredResponse("d", "b", NOW, 200, None, [("job", "lock")])
    assert codec.key(codec.key_row(granted)[:-1]) == granted
    for queue in (QueueRow(True, 1, 2, 3), QueueRow(True, 1, 2, 3, NOW, "ann", "deploy", NOW + 1)):
        assert codec.queue(codec.queue_row("q", queue)) == queue


def test_an_audit_entry_is_the_same_after_encoding_and_decoding() -> None:
    short = AuditEntry(NOW, "admin", "unix uid=0", "pause", queue="video")
    original = AuditEntry(NOW, "zoë", "::1", "plan retry", "a", "q", "why\n", "job_not_found", 7, {"from": None}, "p1")
    for each in (short, original):
        row = codec.audit_row(3, each)
        assert len(row) == len(codec.AUDIT_COLUMNS) + 1
        assert codec.fault(row) is None
        assert codec.audited(row) == each


def test_a_quarantined_row_is_readable_and_editable() -> None:
    row = codec.with_checksum(codec.job_row(full_job()))
    text = codec.job_as_text(row)
    assert codec.job_from_text(text) == row[:-1]
    assert {"id", "queue", "attempt", "grant", "metadata", "crc"} <= msgspec.json.decode(text).keys()
    broken = (*row[:1], "j\udcffb", *row[2:])
    assert msgspec.json.decode(codec.job_as_text(broken))["id"] == {"hex": "6aff62"}
    with pytest.raises(codec.Unreadable, match="column seq is missing"):
        codec.job_from_text("{}")
    with pytest.raises(codec.Unreadable, match="not a row in JSON"):
        codec.job_from_text("[1")


@pytest.mark.parametrize(
    ("body", "shown"), [('{"attempt":', '{"attempt":'), ("[]", "[]"), ('"\udcff"', {"hex": "22ff22"})]
)
def test_a_damaged_body_is_shown_as_it_is(body: str, shown: object) -> None:
    row = codec.with_checksum(codec.job_row(full_job()))
    text = codec.job_as_text((*row[:-2], body, row[-1]))
    assert msgspec.json.decode(text)["body"] == shown
    with pytest.raises(codec.Unreadable):
        codec.JobReader().job(codec.job_from_text(text))


# ---------------------------------------------------------------------------------------------------------------------
# Heartbeats


def journal_with(signs: int, seed: int) -> tuple[Job, list[Event]]:
    maker = ChangeFactory(seed)
    change = maker.create(options=OPTIONS[1])
    events = [as_stored(change)]
    pick = random.Random(seed)
    for grant in range(2):
        assert change.after is not None
        change = maker.grant(change.after)
        events.append(as_stored(change))
        for number in range(signs):
            job = change.after
            assert job is not None
            if number == 1 and grant == 0:
                change = maker.progress(job, None, "step 1")
            else:
                change = maker.extend(job) if pick.random() < 0.5 else maker.progress(job)
            events.append(as_stored(change))
        assert change.after is not None
        change = maker.requeue(change.after)
        events.append(as_stored(change))
    assert change.after is not None
    return change.after, events


@pytest.mark.parametrize("seed", range(8))
def test_deleting_heartbeats_does_not_change_the_row(seed: int) -> None:
    job, events = journal_with(350, seed)
    left = event_codec.thin(events)
    row = None
    for event in left:
        row = fold(row, event)
    assert row == job
    assert job.progress_message == "step 1"  # set by a deleted event
    for begin, end in ((0, 1), (1, 2)):
        grants = [place for place, event in enumerate(left) if event.type == "granted"] + [len(left)]
        part = left[grants[begin] : grants[end]]
        assert sum(event.type == "progress" for event in part) == KEEP_HEARTBEATS
        assert sum(event.type == "extended" for event in part) == KEEP_HEARTBEATS
    assert event_codec.thin(left) == left


def test_few_heartbeats_are_all_kept() -> None:
    _, events = journal_with(KEEP_HEARTBEATS, 1)
    assert event_codec.thin(events) == events


# ---------------------------------------------------------------------------------------------------------------------
# Grants that were given back


def loop_of_grants(seed: int) -> tuple[RuleHarness, list[Event]]:
    """A job that was granted 80 times and released most of the time."""
    rules, dice = RuleHarness(), random.Random(seed)
    rules.create(max_attempts=1_000, max_stalls=1_000, on_stall="requeue")
    for _ in range(80):
        rules.advance(max(rules.job().run_at - rules.now, 0) + 1)
        lock_id = rules.start(lock_ttl_ms=1_000, stall_after_ms=0)
        for _ in range(dice.choice((0, 0, 1, 3))):
            rules.advance(1)
            percent = dice.randrange(100)
            sign = dice.choice(
                (cmd.Extend(id="a", lock_id=lock_id), cmd.Progress(id="a", lock_id=lock_id, progress=percent))
            )
            rules.accept(sign)
        match dice.randrange(12):
            case 0:
                rules.accept(cmd.Fail(id="a", lock_id=lock_id, error_message="boom", error_code="E"))
            case 1:
                rules.advance(2_000)
                rules.accept(cmd.Recover(limit=1))
                rules.reject(cmd.Complete(id="a", lock_id=lock_id, file_path="/late"), "lock_lost")
            case 2:
                rules.accept(cmd.ForceReset(id="a"), admin=True)
            case 3 | 4:
                rules.accept(cmd.Undelivered(id="a", lock_id=lock_id))
                rules.reject(cmd.Extend(id="a", lock_id=lock_id), "lock_lost")  # a late call
            case 5:
                rules.accept(cmd.ReleaseLock(id="a", lock_id=lock_id), admin=True)
                rules.accept(cmd.Update(id="a", priority=dice.randrange(9)), admin=True)
            case _:
                rules.accept(cmd.Release(id="a", lock_id=lock_id, delay_ms=dice.choice((None, 0, 5))))
    return rules, list(rules.events)


def rows_after(events: list[Event]) -> dict[int, Job | None]:
    """Return the row after each event."""
    row, found = None, {}
    for event in events:
        row = found[event.seq] = fold(row, event)
    return found


def without(events: list[Event], begin: int, end: int) -> list[Event]:
    """Return `events` with those from `begin` to `end` short."""
    return events[:begin] + event_codec.shorten(events[begin:end]) + events[end:]


@pytest.mark.parametrize("seed", range(8))
def test_a_compacted_journal_yields_the_same_row_after_each_remaining_event(seed: int) -> None:
    rules, events = loop_of_grants(seed)
    before = rows_after(events)
    dice = random.Random(seed)
    left = events
    for _ in range(4):  # ranges that touch, overlap, and begin and end anywhere
        begin, end = sorted(dice.sample(range(len(left) + 1), 2))
        left = without(left, begin, end)
        after = rows_after(left)
        assert after == {seq: before[seq] for seq in after}
    left = without(left, 0, len(left))
    assert rows_after(left)[left[-1].seq] == rules.job()
    assert event_codec.shorten(left) == left
    assert len(left) < len(events) / 2


def test_compacting_returned_grants_keeps_unusual_events() -> None:
    _, events = loop_of_grants(1)
    left = without(events, 0, len(events))
    types, seqs = {event.type for event in left}, {event.seq for event in left}
    assert {"created", "retried", "stalled", "force_reset", "late_result", "updated", "granted"} <= types
    assert all(event.seq in seqs for event in events if event.type not in ROUTINE)
    places = [place for place, event in enumerate(events) if event.type == "granted"]
    for place, behind in zip(places, [*places[1:], len(events)], strict=True):
        part = events[place:behind]
        given_back = any(event.type in GIVEN_BACK for event in part)
        stays = not given_back or place == places[-1]
        assert all((event.seq in seqs) == (stays or event.type not in ROUTINE) for event in part), part
