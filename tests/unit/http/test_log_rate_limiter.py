"""The rate limit of equal log lines."""

from __future__ import annotations

from jobd.http.app import MAX_LINES_PER_SECOND, LogRateLimiter


def test_each_kind_has_its_own_limit_and_suppressed_lines_are_counted() -> None:
    now_s = 5.0
    sparing = LogRateLimiter(lambda: now_s)
    suppressed = [sparing.suppressed("a") for _ in range(MAX_LINES_PER_SECOND + 7)]
    assert suppressed == [0] * MAX_LINES_PER_SECOND + [None] * 7
    assert sparing.suppressed("b") == 0
    now_s = 5.99
    assert sparing.suppressed("a") is None
    now_s = 6.0
    assert [sparing.suppressed("a"), sparing.suppressed("a"), sparing.suppressed("b")] == [8, 0, 0]
    now_s = 60.0
    assert sparing.suppressed("a") == 0
