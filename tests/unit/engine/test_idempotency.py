"""Idempotency keys: retention, the limit, and rollbacks."""

from __future__ import annotations

from jobd.engine.idempotency import KEPT_MS, SAFE_MS, IdempotencyStore
from jobd.model.storage import StoredResponse
from tests.support.rule_harness import NOW


def answer(name: str, at: int = NOW) -> StoredResponse:
    return StoredResponse(name, f"body of {name}", at, 201, b"{}")


def grants(name: str, *locks: str, at: int = NOW) -> StoredResponse:
    return StoredResponse(name, f"body of {name}", at, grants=[(f"job of {lock}", lock) for lock in locks])


def empty(limit: int = 100) -> IdempotencyStore:
    return IdempotencyStore([], limit)


def test_a_response_is_found_for_a_day() -> None:
    keys = empty()
    keys.add(answer("a"))
    assert keys.find("a", NOW) == answer("a")
    assert keys.find("b", NOW) is None
    assert keys.find("a", NOW + KEPT_MS - 1) is not None
    assert keys.find("a", NOW + KEPT_MS) is None
    assert len(keys) == 0
    assert keys.changed() == ([], [])  # it was never on disk


def test_after_the_commit_the_response_is_only_on_disk() -> None:
    keys = empty()
    keys.add(answer("a"))
    keys.add(grants("g", "l1"))
    assert keys.changed() == ([answer("a"), grants("g", "l1")], [])
    keys.commit()
    assert keys.changed() == ([], [])
    row = keys.find("a", NOW)
    assert row is not None
    assert (row.status, row.body) == (201, None)
    assert keys.is_stored("a")
    assert not keys.is_stored("g")
    assert not keys.is_stored("b")


def test_an_old_response_is_also_deleted_from_disk() -> None:
    keys = IdempotencyStore([answer("a")], 100)
    assert keys.find("a", NOW + KEPT_MS) is None
    assert keys.changed() == ([], ["a"])
    keys.commit()
    assert keys.changed() == ([], [])


def test_a_reused_key_replaces_its_old_row() -> None:
    keys = IdempotencyStore([answer("a")], 100)
    later = NOW + KEPT_MS
    assert keys.find("a", later) is None
    keys.add(answer("a", later))
    assert keys.changed() == ([answer("a", later)], [])


def test_a_key_is_kept_while_one_of_its_grants_is_current() -> None:
    keys = empty()
    keys.add(grants("g", "l1", "l2"))
    keys.commit()
    assert keys.find("g", NOW + 10 * KEPT_MS) is not None  # age does not matter
    keys.ended("l1")
    keys.ended("another")
    assert keys.find("g", NOW) is not None
    assert keys.changed() == ([], [])
    keys.ended("l2")
    assert keys.find("g", NOW) is None
    assert keys.changed() == ([], ["g"])
    keys.ended("l2")  # repeating it does no harm


def test_at_the_start_keys_without_a_current_grant_are_deleted_from_disk() -> None:
    rows = [grants("g", "l1", "l2"), grants("h", "l3"), answer("r", NOW)]
    keys = IdempotencyStore(rows, 100, lambda job_id, lock_id: lock_id == "l2")
    assert keys.lock_ids() == ["l2"]
    assert keys.find("h", NOW) is None
    assert keys.find("r", NOW) is not None
    assert keys.changed() == ([], ["h"])


def test_a_grant_made_and_ended_in_one_batch_leaves_no_key() -> None:
    keys = empty()
    keys.add(grants("g", "l1"))
    keys.ended("l1")
    assert keys.changed() == ([], [])
    assert len(keys) == 0


def test_a_row_replaced_and_ended_in_one_batch_is_deleted() -> None:
    keys = IdempotencyStore([grants("g", "l1")], 100)
    keys.ended("l1")
    keys.add(grants("g", "l2"))
    assert keys.changed() == ([grants("g", "l2")], [])
    keys.ended("l2")
    assert keys.changed() == ([], ["g"])


def test_loaded_rows_are_sorted_by_age() -> None:
    keys = IdempotencyStore([answer("young", NOW + 1), answer("old", NOW)], 2)
    assert keys.has_room(NOW + SAFE_MS)
    assert keys.find("old", NOW) is None
    assert keys.find("young", NOW) is not None


def test_at_the_limit_the_oldest_response_is_dropped_if_old_enough() -> None:
    keys = IdempotencyStore([answer("a"), answer("b", NOW + 1), grants("g", "l", at=NOW - KEPT_MS)], 3)
    assert not keys.has_room(NOW + SAFE_MS - 1)
    assert keys.has_room(NOW + SAFE_MS)
    assert keys.changed() == ([], ["a"])
    assert keys.has_room(NOW)


def test_keys_of_current_grants_are_never_dropped() -> None:
    keys = IdempotencyStore([grants("g", "l")], 1)
    assert not keys.has_room(NOW + 10 * KEPT_MS)
    keys.ended("l")
    assert keys.has_room(NOW)


def test_two_excess_keys_are_dropped_for_each_new_one() -> None:
    keys = IdempotencyStore([answer(name) for name in "abc"], 100)
    assert keys.has_room(NOW + KEPT_MS)
    assert keys.changed() == ([], ["a", "b"])
    assert keys.has_room(NOW + KEPT_MS)
    assert len(keys) == 0


def test_rollback_undoes_all_changes() -> None:
    rows = [answer("a"), answer("b", NOW + 1), grants("g", "l1", "l2")]
    keys = IdempotencyStore(rows, 3)
    assert keys.has_room(NOW + SAFE_MS)  # drops a
    keys.add(answer("c", NOW + 2))
    keys.ended("l1")
    keys.ended("l2")
    keys.add(grants("h", "l3"))
    keys.ended("l3")
    keys.rollback()
    assert keys.changed() == ([], [])
    assert len(keys) == 3
    assert [keys.find(name, NOW) for name in "abgch"] == [*rows, None, None]
    assert keys.has_room(NOW + SAFE_MS)
    assert keys.changed() == ([], ["a"])  # still the oldest
    keys.ended("l1")
    assert keys.find("g", NOW) is not None
    keys.ended("l2")
    assert keys.find("g", NOW) is None


def test_rollback_restores_only_grants_ended_since_the_commit() -> None:
    """A grant that ended long ago must not keep its key alive after a rollback."""
    keys = IdempotencyStore([grants("g", "l1", "l2")], 100)
    keys.ended("l1")
    keys.commit()
    keys.ended("l2")
    keys.rollback()
    assert keys.find("g", NOW) is not None
    keys.ended("l2")
    assert keys.find("g", NOW) is None


def test_rollback_of_one_end_among_several_grants() -> None:
    keys = IdempotencyStore([grants("g", "l1", "l2")], 100)
    keys.ended("l1")
    keys.rollback()
    keys.ended("l2")
    assert keys.find("g", NOW) is not None
    keys.ended("l1")
    assert keys.find("g", NOW) is None


def test_rollback_of_a_replaced_row_restores_the_first() -> None:
    keys = IdempotencyStore([grants("g", "l1")], 100)
    keys.ended("l1")
    keys.add(grants("g", "l2"))
    keys.ended("l2")
    keys.rollback()
    assert keys.find("g", NOW) == grants("g", "l1")
    keys.ended("l2")
    assert keys.find("g", NOW) is not None
    keys.ended("l1")
    assert keys.changed() == ([], ["g"])


def test_rollback_restores_responses_in_order_of_age() -> None:
    keys = IdempotencyStore([answer("z", NOW), answer("y", NOW + 1), answer("x", NOW + 2)], 3)
    assert keys.has_room(NOW + SAFE_MS)  # drops z
    keys.rollback()
    assert keys.has_room(NOW + SAFE_MS)
    assert keys.changed() == ([], ["z"])


def test_dropped_keys_leave_nothing_in_memory() -> None:
    keys = IdempotencyStore([answer("a"), grants("g", "l1", "l2")], 9)
    keys.add(grants("h", "l3"))
    for lock_id in ("l1", "l2", "l3"):
        keys.ended(lock_id)
    assert keys.find("a", NOW + KEPT_MS) is None
    keys.commit()
    assert [name for name, held in vars(keys).items() if held and name != "limit"] == []


def test_keys_are_kept_for_a_day() -> None:
    assert (KEPT_MS, SAFE_MS) == (24 * 3_600_000, 600_000)


def test_commit_keeps_no_response_of_a_dropped_key() -> None:
    keys = empty(1)
    keys.add(answer("a"))
    assert keys.has_room(NOW + SAFE_MS)
    keys.add(answer("b"))
    assert keys.changed() == ([answer("b")], [])
    keys.commit()
    assert keys.find("a", NOW) is None


def test_a_step_back_of_the_clock_does_not_fill_the_keys_permanently() -> None:
    keys = IdempotencyStore([answer("a"), answer("b", NOW + 1)], 2)
    stepped_back = NOW - 60 * SAFE_MS
    assert keys.has_room(stepped_back)
    assert keys.find("a", stepped_back) is None
    keys.rollback()
    keys.add(answer("x", stepped_back))
    assert keys.has_room(stepped_back)
    keys.rollback()
    assert keys.find("b", stepped_back) is not None
    assert keys.has_room(stepped_back)
    assert keys.find("a", stepped_back) is None
    keys.add(answer("c", stepped_back))
    assert keys.has_room(stepped_back)
    keys.add(answer("d", stepped_back))
    assert not keys.has_room(stepped_back), "the oldest one may still be repeated"
