"""The choice between commits in the event loop and in the storage thread."""

from __future__ import annotations

from itertools import pairwise
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobd.storage import commit_mode
from jobd.storage.commit_mode import LONG_STALL_S, MEDIAN_S, PAUSE_S, RECENT, STALL_S, TRIAL, TRIAL_STALLS

FAST_S: Final = MEDIAN_S / 2


Steps = list[tuple[float, int, float, bool]]  # the duration of commits, how many, when they end, is the next one inline


def check(mode: commit_mode.CommitMode, steps: Steps) -> None:
    for took_s, times, now_s, is_inline in steps:
        for _ in range(times):
            mode.add(took_s, now_s)
        assert mode.is_inline == is_inline


@pytest.mark.parametrize(("setting", "is_inline"), [("inline", True), ("thread", False)])
def test_a_fixed_mode_does_not_change(setting: commit_mode.CommitSetting, is_inline: bool) -> None:
    check(commit_mode.CommitMode(setting), [(1.0, 20, 0, is_inline), (FAST_S, 2 * TRIAL, 100, is_inline)])


INLINE: dict[str, Steps] = {
    "fast commits stay inline": [(FAST_S, 1_000, 0, True)],
    "single short stalls do not end it": [(LONG_STALL_S - 0.001, 1, 0, True), (FAST_S, RECENT - 1, 0, True)] * 20,
    "a long stall ends it": [(FAST_S, 50, 0, True), (LONG_STALL_S, 1, 0, False)],
    "so does the first commit": [(LONG_STALL_S, 1, 0, False)],
    "two recent stalls end it": [(STALL_S, 1, 0, True), (FAST_S, RECENT - 2, 0, True), (STALL_S, 1, 0, False)],
    "a slow median ends it, if there are enough": [(MEDIAN_S, RECENT - 1, 0, True), (MEDIAN_S, 1, 0, False)],
    "half of the commits decide about a median": [
        (FAST_S, RECENT, 0, True),
        (MEDIAN_S, RECENT // 2 - 1, 0, True),
        (MEDIAN_S, 1, 0, False),
    ],
}


@pytest.mark.parametrize("steps", INLINE.values(), ids=INLINE)
def test_commits_are_inline_until_the_disk_is_slow(steps: Steps) -> None:
    check(commit_mode.CommitMode("auto"), steps)


AFTER_FEW: Final = TRIAL - TRIAL_STALLS - 1
THREAD: dict[str, Steps] = {
    "enough fast commits end it": [(FAST_S, TRIAL - 1, PAUSE_S, False), (FAST_S, 1, PAUSE_S, True)],
    "a few stalls do not keep it": [
        (STALL_S, TRIAL_STALLS, PAUSE_S, False),
        (FAST_S, AFTER_FEW, PAUSE_S, False),
        (FAST_S, 1, PAUSE_S, True),
    ],
    "more stalls keep it while they are among the latest commits": [
        (STALL_S, TRIAL_STALLS + 1, PAUSE_S, False),
        (FAST_S, AFTER_FEW, PAUSE_S, False),
        (FAST_S, 1, PAUSE_S, True),
    ],
    "a slow median keeps it": [(MEDIAN_S, 3 * TRIAL, PAUSE_S, False)],
    "it does not end with a stall": [
        (FAST_S, TRIAL - 1, PAUSE_S, False),
        (STALL_S, 1, PAUSE_S, False),
        (FAST_S, 1, PAUSE_S, True),
    ],
    "it does not end in the pause": [(FAST_S, 10 * TRIAL, PAUSE_S - 0.001, False), (FAST_S, 1, PAUSE_S, True)],
    "the pause begins with the latest change": [
        (FAST_S, 2 * TRIAL, 20, True),
        (LONG_STALL_S, 1, 21, False),
        (FAST_S, 2 * TRIAL, 21 + PAUSE_S - 0.001, False),
        (FAST_S, 1, 21 + PAUSE_S, True),
    ],
}


@pytest.mark.parametrize("steps", THREAD.values(), ids=THREAD)
def test_commits_are_in_the_thread_until_the_disk_is_fast(steps: Steps) -> None:
    check(commit_mode.CommitMode("auto"), [(LONG_STALL_S, 1, 0, False), *steps])


@given(
    st.lists(st.tuples(st.sampled_from([0.0001, 0.0009, 0.0011, 0.0019, 0.0021, 0.5]), st.floats(0, 3)), max_size=60)
)
def test_inline_commits_were_fast_and_changes_are_apart(commits: list[tuple[float, float]]) -> None:
    """Each element is repeated, so that rows of fast commits occur."""
    mode, now_s, recent, returns = commit_mode.CommitMode("auto"), 0.0, list[float](), list[float]()
    for took_s, passed_s in commits:
        for _ in range(40):
            now_s += passed_s / 40
            was_inline = mode.is_inline
            mode.add(took_s, now_s)
            recent = [*recent, took_s][-RECENT:] if was_inline else []
            if mode.is_inline and not was_inline:
                returns.append(now_s)
            elif mode.is_inline:
                assert max(recent) < LONG_STALL_S
                assert sum(each >= STALL_S for each in recent) < 2
                assert len(recent) < RECENT or sorted(recent)[RECENT // 2] < MEDIAN_S
    assert all(second - first >= PAUSE_S for first, second in pairwise(returns))
