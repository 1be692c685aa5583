"""The nouns: which ids and storage keys may be, and how a lease is judged at its boundaries."""

from __future__ import annotations

import pytest

from jobd.job import FINISHED, LIVE, STATUSES, TRANSITIONS, Lease, is_job_id, storage_key_fault


@pytest.mark.parametrize("text", ["a", "A-z_0.9:", "x" * 200])
def test_ids(text: str) -> None:
    assert is_job_id(text)


@pytest.mark.parametrize("text", ["", "x" * 201, "a b", "a/b", "é", "a\n", "\na", "a\x00"])
def test_no_ids(text: str) -> None:
    assert not is_job_id(text)


@pytest.mark.parametrize("key", ["a", "a/b.c", "a..b", "...", "a/.../b"])
def test_storage_keys(key: str) -> None:
    assert storage_key_fault(key) is None


@pytest.mark.parametrize("key", ["/a", "\\a", "..", "a/..", "../a", "a\\..\\b", "a\x00"])
def test_storage_keys_with_a_fault(key: str) -> None:
    assert storage_key_fault(key)


def test_the_table_of_transitions() -> None:
    assert {status for pair in TRANSITIONS for status in pair} == set(STATUSES) == LIVE | FINISHED
    assert all(before != after for before, after in TRANSITIONS)
    assert not any(before == "completed" for before, _ in TRANSITIONS)
    assert {before for before, after in TRANSITIONS if after == "processing"} == {"queued"}


def test_a_lock_has_expired_at_its_time() -> None:
    lease = Lease(expires=10, silent=20, ceiling=None)
    assert (lease.is_live(9), lease.is_live(10)) == (True, False)
    assert not Lease(10, 20, None, cleared=True).is_live(0)


@pytest.mark.parametrize(
    ("lease", "stuck"),
    [
        (Lease(10, 20, None), 20),
        (Lease(30, 20, None), 30),
        (Lease(10, 20, 15), 15),
        (Lease(10, 20, 25), 20),
    ],
)
def test_when_a_job_counts_as_stuck(lease: Lease, stuck: int) -> None:
    assert lease.stuck == stuck


def test_at_its_ceiling_a_lease_is_past_it() -> None:
    lease = Lease(10, 20, 15)
    assert (lease.is_past_ceiling(14), lease.is_past_ceiling(15)) == (False, True)
    assert not Lease(10, 20, None).is_past_ceiling(10**15)
