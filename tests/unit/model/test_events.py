"""Events carry every change, fold into rows and show no secret."""

from __future__ import annotations

import msgspec
import pytest
from msgspec import Raw
from msgspec.structs import asdict

from jobd.journal import event_codec
from jobd.model.commands import Complete, Delete, Extend, Fail, Pause
from jobd.model.events import Changes, Event, EventFilter, EventType, event_view, fold, streamed_event
from jobd.model.job import Grant, Job, Options, Result
from jobd.storage import codec
from tests.support.factories import as_stored
from tests.support.rule_harness import NOW, RuleHarness

GRANT = Grant("secret", 1, "w", NOW, 1, 2, 3)
JOB = Job(1, "a", Options(), "queued", NOW, NOW, NOW)


def event(changes: Changes | None, event_type: EventType = "updated") -> Event:
    return Event(5, NOW, event_type, 1, "a", "q", "queued", "processing", "client", None, None, changes)


def test_fold_sets_only_the_fields_that_the_event_changes() -> None:
    changed = fold(JOB, event(Changes(status="processing", grant=GRANT)))
    assert changed == msgspec.structs.replace(JOB, status="processing", grant=GRANT)
    assert fold(changed, event(Changes(grant=None, status="queued"))) == JOB


def test_the_grant_of_a_stored_event_is_the_one_that_it_set() -> None:
    assert [event(changes).grant for changes in (Changes(grant=GRANT), Changes(grant=None), Changes(), None)] == [
        GRANT, None, None, None,
    ]  # fmt: skip


def test_fold_begins_with_a_row_and_ends_with_none() -> None:
    assert fold(None, event(Changes(**asdict(JOB)), "created")) == JOB
    assert fold(JOB, event(None)) == JOB
    assert fold(JOB, event(None, "deleted")) is None


def test_the_first_event_of_a_job_has_every_field_without_a_default() -> None:
    with pytest.raises(ValueError, match="is not the first of a job"):
        fold(None, event(Changes(status="queued"), "created"))


def test_the_first_event_of_a_job_leaves_out_the_defaults() -> None:
    own = {"options": Options(), "status": "queued", "created_at": NOW, "updated_at": NOW, "run_at": NOW}
    first = msgspec.structs.replace(event(None, "imported"), after=JOB)
    for kind in ("created", "imported"):
        changes = as_stored(msgspec.structs.replace(first, type=kind)).changes
        assert changes == Changes(**own)
    for name in ("expires_at", "payload_bytes"):
        changed = msgspec.structs.replace(first, type="created", after=msgspec.structs.replace(JOB, **{name: 7}))
        assert as_stored(changed).changes == Changes(**own, **{name: 7})


def test_an_event_is_unchanged_after_encoding_and_decoding() -> None:
    result = Result("u", metadata=Raw(b'{"a":1}'))
    happened = event(Changes(status="completed", progress=100, error=None, result=result, finished_at=NOW))
    assert event_codec.decode(codec.with_checksum(event_codec.encode(happened))) == happened


def test_the_view_of_an_event_has_no_changes() -> None:
    shown = event_view(event(Changes(grant=GRANT)))
    assert "secret" not in msgspec.json.encode(shown).decode()
    assert msgspec.to_builtins(shown) == {
        "seq": 5, "at": NOW, "type": "updated", "from": "queued", "to": "processing", "by": "client", "reason": None,
        "details": {},
    }  # fmt: skip
    assert event_view(msgspec.structs.replace(event(None), details={"a": 1})).details == {"a": 1}


def test_the_events_of_a_job_fold_into_its_row_and_show_no_secret() -> None:
    rules = RuleHarness()
    first = rules.held(max_attempts=2)
    rules.progress(first, 30)
    rules.accept(Extend(id="a", lock_id=first, additional_ms=5))
    rules.accept(Fail(id="a", lock_id=first, error_message="e", retry_after_ms=0))
    second = rules.start()
    rules.accept(Complete(id="a", lock_id=second, metadata=Raw(b"[1]")))
    rules.accept(Pause(name="q"))
    row: Job | None = None
    for happened in rules.events:
        if happened.job_seq:
            row = fold(row, happened)
        shown = msgspec.json.encode(event_view(happened)).decode()
        assert first not in shown
        assert second not in shown
    assert row == rules.job()
    rules.accept(Delete(id="a"))
    assert fold(row, rules.last()) is None


def test_a_streamed_event_is_its_view_with_job_and_queue() -> None:
    happened = event(Changes(grant=GRANT))
    streamed = msgspec.json.decode(msgspec.json.encode(streamed_event(happened)))
    assert streamed == {**msgspec.json.decode(msgspec.json.encode(event_view(happened))), "job_id": "a", "queue": "q"}
    assert "secret" not in str(streamed)
    assert streamed_event(msgspec.structs.replace(happened, job_seq=0, job_id="", details={"a": 1})).job_id is None


@pytest.mark.parametrize(
    ("wanted", "is_one"),
    [
        (EventFilter(), True),
        (EventFilter(queues=frozenset({"q", "other"})), True),
        (EventFilter(queues=frozenset({"other"})), False),
        (EventFilter(job_ids=frozenset({"a"})), True),
        (EventFilter(job_ids=frozenset({"b"})), False),
        (EventFilter(types=frozenset({"updated"})), True),
        (EventFilter(types=frozenset({"created"})), False),
        (EventFilter(frozenset({"q"}), frozenset({"a"}), frozenset({"updated"})), True),
        (EventFilter(frozenset({"q"}), frozenset({"a"}), frozenset({"created"})), False),
    ],
)
def test_an_event_must_match_all_filters(wanted: EventFilter, is_one: bool) -> None:
    assert wanted.matches(event(None)) == wanted.matches(streamed_event(event(None))) == is_one
    assert wanted.matches_everything == (wanted == EventFilter())
