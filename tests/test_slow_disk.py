"""When a disk counts as slow, and how long a commit waits for those who were just answered."""

from __future__ import annotations

import pytest

from jobd.slow_disk import IN_A_ROW, LINGER, LINGER_S, SLOW_EACH_S, SLOW_S, SlowDisk

BIT = 0.000_001


@pytest.mark.parametrize(
    ("took_s", "commands", "is_slow"),
    [
        (SLOW_S, 1, True),
        (SLOW_S - BIT, 1, False),
        (100 * SLOW_EACH_S, 100, True),
        (100 * SLOW_EACH_S - BIT, 100, False),  # it was long for what it had to write
    ],
)
def test_a_commit_is_slow_for_what_it_carries(took_s: float, commands: int, is_slow: bool) -> None:
    disk = SlowDisk()
    assert not disk.is_slow, "nothing is known yet"
    for _ in range(IN_A_ROW - 1):
        disk.note(took_s, commands, 5.0)
    assert not disk.is_slow, "a quick disk has its moments, too"
    disk.note(took_s, commands, 6.0)
    assert disk.is_slow == is_slow
    disk.note(SLOW_S / 2, 1, 7.0)
    disk.note(took_s, commands, 8.0)
    assert not disk.is_slow, "it was quick in between"


def test_who_was_answered_is_waited_for_a_part_of_what_the_commit_took() -> None:
    disk = SlowDisk()
    for _ in range(IN_A_ROW):
        disk.note(0.08, 3, 5.0)
    assert disk.lingers_s(2, 5.0) == pytest.approx(0.08 * LINGER)
    assert disk.lingers_s(0, 5.004) == pytest.approx(0.006)
    assert disk.lingers_s(2, 5.011) <= 0, "they had their time"
    assert disk.lingers_s(2, 9.0) <= 0
    assert disk.lingers_s(3, 5.0) == 0, "all are there"
    disk.note(10.0, 3, 5.0)
    assert disk.lingers_s(0, 5.0) == pytest.approx(LINGER_S), "who is near asks again within that"
    disk.note(SLOW_S / 2, 3, 5.0)
    assert disk.lingers_s(0, 5.0) == 0, "it is quick"
