"""Jobs: valid ids and storage keys, the boundaries of lock deadlines, the packed form, epochs."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import asdict, replace

from jobd.core.job_validation import validate
from jobd.model import job
from jobd.model.clocks import LockMs
from jobd.model.commands import Moment
from tests.support.factories import deadlines_at, full_job

NEW = job.Job(3, "a", job.Options(queue="q", kind="k"), "queued", 1_000, 1_000, 1_000)


def test_the_characters_and_the_length_of_ids() -> None:
    assert all(job.is_job_id(text) for text in ("a", "A-z_0.9:", "x" * 200))
    assert not any(job.is_job_id(text) for text in ("", "x" * 201, "a b", "a/b", "é", "a\n", "\na", "a\x00"))


@pytest.mark.parametrize("key", ["a", "a/b.c", "a..b", "...", "a/.../b"])
def test_valid_storage_keys(key: str) -> None:
    assert job.storage_key_error(key) is None


def test_the_allowed_changes_of_status() -> None:
    variants = {
        "queued": "processing failed cancelled completed",
        "processing": "queued completed failed cancelled",
        "failed": "queued completed",
        "cancelled": "queued completed",
        "completed": "",
    }
    assert {(before, after) for before, afters in variants.items() for after in afters.split()} == job.TRANSITIONS


def test_the_default_policy() -> None:
    minute_ms, day_ms = 60_000, 86_400_000
    policy = job.Policy()
    assert (policy.lock_ttl_ms, policy.progress_timeout_ms) == (15 * minute_ms, 30 * minute_ms)
    assert (policy.stall_after_ms, policy.max_stalls, policy.on_stall) == (10 * minute_ms, 3, "auto")
    kept_ms = (policy.keep_completed_ms, policy.keep_failed_ms, policy.keep_cancelled_ms)
    assert kept_ms == (7 * day_ms, 30 * day_ms, 7 * day_ms)
    assert (policy.late_results, policy.late_bytes, policy.artifacts) == ("keep", 256 * 1024, False)
    assert (job.MAX_LATE_RESULTS, get_args(job.LatePolicy)) == (5, ("keep", "adopt_if_unclaimed", "drop"))
    assert (policy.require_download_url, policy.live_jobs, policy.idempotency_keys) == (False, 5_000_000, 200_000)
    options = job.Options()
    assert (options.queue, options.kind, options.priority, options.max_attempts) == ("default", "", 0, 1)
    assert (options.max_stalls, options.on_stall) == (3, "auto")


def test_a_lock_has_expired_at_its_time() -> None:
    deadlines = deadlines_at(10, 20)
    assert (deadlines.is_live(LockMs(9)), deadlines.is_live(LockMs(10))) == (True, False)
    assert not deadlines_at(10, 20, cleared=True).is_live(LockMs(0))


@pytest.mark.parametrize(
    ("deadlines", "stalled"),
    [
        (deadlines_at(10, 20), 20),
        (deadlines_at(30, 20), 30),
        (deadlines_at(10, 20, 15), 15),
        (deadlines_at(10, 20, 25), 20),
    ],
)
def test_a_job_counts_as_stalled_at_its_first_deadline(deadlines: job.LockDeadlines, stalled: int) -> None:
    assert deadlines.stalled_at == stalled


def test_a_lease_is_past_its_progress_timeout_at_the_progress_timeout() -> None:
    deadlines = deadlines_at(10, 20, 15)
    assert (deadlines.is_past_progress_due(LockMs(14)), deadlines.is_past_progress_due(LockMs(15))) == (False, True)
    assert not deadlines_at(10, 20).is_past_progress_due(LockMs(10**15))


def test_the_compact_form_of_a_new_job_expands_to_the_job() -> None:
    short = job.packed(NEW)
    assert short is not None
    assert short.expand() == NEW
    assert validate(short.expand(), Moment(1_000, LockMs(5), 0), job.Policy()).issues == []


OTHER_FIELDS: Final = [("id", ""), ("options", job.Options(queue="")), ("started_at", 0), ("result", job.Result())] + [
    (name, value) for name, value in asdict(full_job()).items() if name not in ("seq", "id", "options", "created_at")
]


@pytest.mark.parametrize(("name", "value"), OTHER_FIELDS)
def test_a_job_with_other_fields_has_no_compact_form(name: str, value: Any) -> None:
    assert job.packed(replace(NEW, **{name: value})) is None


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("short", "short"),
        ("longer than eight", "longer than eight"),
        ("ValueError: no\nTraceback (most recent call last):\n  File", "ValueError: no"),
        ("first\nsecond", "first\nse…"),
        ("longer than eight\nsecond", "longer than eight…"),
        ("", ""),
    ],
)
def test_a_headline_has_the_whole_first_line(message: str, shown: str) -> None:
    assert job.headline(message, 8) == shown


# -- epochs of fencing tokens -----------------------------------------------------------------------------------------

EPOCH_0_MS: Final = 1_577_836_800_000
SECONDS: Final = st.integers(-(1 << 31), 1 << 40)


@given(st.integers(0, job.SAFE_EPOCH), SECONDS)
def test_a_new_epoch_is_above_all_known_ones(seen: int, seconds: int) -> None:
    epoch = job.new_epoch(seen, EPOCH_0_MS + seconds * job.SECOND_MS)
    assert epoch > seen
    assert epoch == seconds if seen < seconds <= job.SAFE_EPOCH else epoch == seen + 1
    if seen < job.SAFE_EPOCH:
        assert (epoch << job.TOKEN_COUNTER_BITS) | job.COUNTER_MASK < 1 << 53


@given(st.lists(st.integers(1, job.SAFE_EPOCH), min_size=2, unique=True), st.integers(0, 1 << 39))
def test_copies_of_one_store_take_different_epochs_in_different_seconds(seconds: list[int], seen: int) -> None:
    """Only if the clock is behind the epoch in the file, they may be the same."""
    ahead = [each for each in seconds if each > seen]
    assert len({job.new_epoch(seen, EPOCH_0_MS + each * job.SECOND_MS) for each in ahead}) == len(ahead)


def test_epochs_begin_in_2020_and_tokens_are_safe_until_2037() -> None:
    assert datetime.fromtimestamp(EPOCH_0_MS / 1000, UTC) == datetime(2020, 1, 1, tzinfo=UTC)
    assert datetime.fromtimestamp(EPOCH_0_MS / 1000 + job.SAFE_EPOCH, UTC).year == 2037
    assert (job.SAFE_EPOCH << job.TOKEN_COUNTER_BITS) | job.COUNTER_MASK == (1 << 53) - 1
    assert (job.LAST_EPOCH << job.TOKEN_COUNTER_BITS) | job.COUNTER_MASK == (1 << 63) - 1
    assert [job.new_epoch(0, EPOCH_0_MS + ms) for ms in (-1, 0, 999, 1_000, 1_999, 2_000)] == [1, 1, 1, 1, 1, 2]
    assert job.epoch_seconds(EPOCH_0_MS - 1) == -1
