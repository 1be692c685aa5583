"""The values of the storage interface: their defaults and methods."""

from __future__ import annotations

from msgspec.structs import replace

from jobd.model import storage
from jobd.model.job import Job, Options, PackedJob, Result
from tests.support.factories import ChangeFactory

SHORT = PackedJob(1, "a", Options(), 1_000)
WHOLE = Job(2, "b", Options(), "processing", 1_000, 1_000, 1_000)


def test_an_opened_store_has_all_live_jobs_in_either_form() -> None:
    assert storage.OpenedStore(storage.Numbers(), jobs=[WHOLE], packed_jobs=[SHORT]).live() == [SHORT.expand(), WHOLE]
    assert storage.OpenedStore(storage.Numbers()).live() == []


def test_a_page_of_no_rows_knows_no_event_and_a_tombstone_is_postponed_for_two_hours_at_most() -> None:
    assert (storage.JobRows([], None).last_event, storage.MAX_POSTPONE_MS) == (0, 2 * 60 * 60 * 1_000)


def test_a_query_has_payloads_and_is_slow_only_with_a_text_or_error() -> None:
    assert storage.JobQuery().payloads
    assert [storage.JobQuery().is_slow, storage.JobQuery(text="").is_slow, storage.JobQuery(text="t").is_slow] == [
        False,
        True,
        True,
    ]
    assert storage.JobQuery(error="0123456789ab").is_slow, "or an error"


def test_the_count_of_finished_jobs_does_not_fall_below_zero() -> None:
    assert storage.QueueRow(failed=2).without("failed") == storage.QueueRow(failed=1)
    assert storage.QueueRow(True, 9, paused_at=1).with_counts(1, 2, 3) == storage.QueueRow(True, 1, 2, 3, paused_at=1)
    assert storage.QueueRow(failed=1).without("failed").without("failed") == storage.QueueRow()


def test_only_the_deletion_of_a_job_with_a_stored_object_leaves_a_tombstone() -> None:
    maker = ChangeFactory()
    named = maker.create("named", status="completed", result=Result(storage_key="k/1"))
    others = [
        maker.create("plain", status="completed", result=Result(file_path="/f")),
        maker.create("failed", status="failed"),
    ]
    assert named.after is not None
    deleted = [maker.delete(change.after) for change in (named, *others) if change.after is not None]
    assert storage.tombstones([named, *others, maker.queue_event("video", True)]) == []
    assert storage.tombstones(deleted) == [storage.Tombstone(named.after.seq, "named", "k/1", maker.now, maker.now)]
    assert storage.tombstones(deleted)[0].tries == 0
    again = replace(named, before=replace(named.after, result=Result(storage_key="")))
    assert storage.tombstones([replace(again, after=None)])[0].key == ""


def test_the_end_of_a_journal_page() -> None:
    maker = ChangeFactory()
    events = [maker.create(name) for name in ("a", "b")]
    whole, early, damaged = (
        storage.EventPage(events, 9, 0),
        storage.EventPage(events, 9, 0, more=True),
        storage.EventPage([], 9, 5, more=True),
    )
    assert (whole.end, early.end, damaged.end) == (9, events[1].seq, 5)
