"""Which objects of deleted jobs may be deleted, by the time at which they were written."""

from __future__ import annotations

import pytest

from jobd.model.job import DAY_MS
from jobd.model.storage import Tombstone
from jobd.storage.artifacts.base import MARGINS, Verdict, judge

DELETED: int = 1_700_000_000_000
YOUNG_MS, SKEW_MS = MARGINS.young_ms, MARGINS.skew_ms
TOMBSTONE = Tombstone(1, "a", "k", DELETED, DELETED)


@pytest.mark.parametrize(
    ("modified_at", "now", "verdict"),
    [
        (DELETED - 7 * DAY_MS, DELETED, "delete"),
        (DELETED - YOUNG_MS, DELETED, "delete"),
        (DELETED - YOUNG_MS + 1, DELETED, "wait"),
        (DELETED, DELETED, "wait"),
        (DELETED, DELETED + YOUNG_MS - 1, "wait"),
        (DELETED, DELETED + YOUNG_MS, "delete"),
        (DELETED + SKEW_MS, DELETED + DAY_MS, "delete"),  # the clock of the artifact store is ahead
        (DELETED + SKEW_MS + 1, DELETED + DAY_MS, "leave"),
        (DELETED + DAY_MS, DELETED, "leave"),
    ],
)
def test_an_object_is_deleted_with_its_job_unless_it_may_belong_to_another(
    modified_at: int, now: int, verdict: Verdict
) -> None:
    assert judge(TOMBSTONE, MARGINS, now, modified_at) == verdict
