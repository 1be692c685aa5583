"""Many lines that say the same: some of each second are written, the others counted."""

from __future__ import annotations

from jobd.http.app import MOST_A_SECOND, Sparing


def test_each_kind_has_its_lines_and_the_next_second_tells_what_was_left_out() -> None:
    now_s = 5.0
    sparing = Sparing(lambda: now_s)
    said = [sparing.left_out("a") for _ in range(MOST_A_SECOND + 7)]
    assert said == [0] * MOST_A_SECOND + [None] * 7
    assert sparing.left_out("b") == 0
    now_s = 5.99
    assert sparing.left_out("a") is None
    now_s = 6.0
    assert [sparing.left_out("a"), sparing.left_out("a"), sparing.left_out("b")] == [8, 0, 0]
    now_s = 60.0
    assert sparing.left_out("a") == 0
