"""The choice between commits in the event loop and in the storage thread."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobd.storage import commit_mode

FAST_S = commit_mode.MEDIAN_S / 2


def after(mode: commit_mode.CommitMode, took_s: float, times: int, now_s: float = 0.0) -> bool:
    for _ in range(times):
        mode.add(took_s, now_s)
    return mode.is_inline


def slowed_down(now_s: float = 0.0) -> commit_mode.CommitMode:
    mode = commit_mode.CommitMode("auto")
    assert after(mode, FAST_S, 50)
    assert not after(mode, commit_mode.LONG_STALL_S, 1, now_s)
    return mode


@pytest.mark.parametrize(("setting", "is_inline"), [("inline", True), ("thread", False)])
def test_a_fixed_mode_does_not_change(setting: commit_mode.CommitSetting, is_inline: bool) -> None:
    mode = commit_mode.CommitMode(setting)
    assert after(mode, 1.0, 20) == is_inline
    assert after(mode, FAST_S, 2 * commit_mode.TRIAL, 100.0) == is_inline


def test_fast_commits_stay_inline() -> None:
    assert commit_mode.CommitMode("auto").is_inline
    assert after(commit_mode.CommitMode("auto"), FAST_S, 1000)


def test_single_short_stalls_do_not_end_the_inline_mode() -> None:
    mode = commit_mode.CommitMode("auto")
    for _ in range(20):
        assert after(mode, commit_mode.LONG_STALL_S - 0.001, 1)
        assert after(mode, FAST_S, commit_mode.RECENT - 1)


def test_a_long_stall_ends_the_inline_mode() -> None:
    slowed_down()
    assert not after(commit_mode.CommitMode("auto"), commit_mode.LONG_STALL_S, 1), "also the first commit"


def test_two_recent_stalls_end_the_inline_mode() -> None:
    mode = commit_mode.CommitMode("auto")
    assert after(mode, commit_mode.STALL_S, 1)
    assert after(mode, FAST_S, commit_mode.RECENT - 2)
    assert not after(mode, commit_mode.STALL_S, 1)


def test_commits_that_are_a_little_slow_end_the_inline_mode_together() -> None:
    mode = commit_mode.CommitMode("auto")
    assert after(mode, commit_mode.MEDIAN_S, commit_mode.RECENT - 1), "too few for a median"
    assert not after(mode, commit_mode.MEDIAN_S, 1)
    mode = commit_mode.CommitMode("auto")
    after(mode, FAST_S, commit_mode.RECENT)
    assert after(mode, commit_mode.MEDIAN_S, commit_mode.RECENT // 2 - 1)
    assert not after(mode, commit_mode.MEDIAN_S, 1)


def test_commits_are_inline_again_after_enough_fast_ones() -> None:
    mode = slowed_down()
    assert not after(mode, FAST_S, commit_mode.TRIAL - 1, commit_mode.PAUSE_S)
    assert after(mode, FAST_S, 1, commit_mode.PAUSE_S)


def test_a_few_stalls_do_not_keep_commits_in_the_thread() -> None:
    mode = slowed_down()
    assert not after(mode, commit_mode.STALL_S, commit_mode.TRIAL_STALLS, commit_mode.PAUSE_S)
    assert not after(mode, FAST_S, commit_mode.TRIAL - commit_mode.TRIAL_STALLS - 1, commit_mode.PAUSE_S)
    assert after(mode, FAST_S, 1, commit_mode.PAUSE_S)


def test_more_stalls_keep_commits_in_the_thread() -> None:
    mode = slowed_down()
    assert not after(mode, commit_mode.STALL_S, commit_mode.TRIAL_STALLS + 1, commit_mode.PAUSE_S)
    assert not after(mode, FAST_S, commit_mode.TRIAL - commit_mode.TRIAL_STALLS - 1, commit_mode.PAUSE_S)
    assert after(mode, FAST_S, 1, commit_mode.PAUSE_S), "the first stall is no longer among the latest commits"


def test_commits_with_a_slow_median_stay_in_the_thread() -> None:
    mode = slowed_down()
    assert not after(mode, commit_mode.MEDIAN_S, 3 * commit_mode.TRIAL, commit_mode.PAUSE_S)


def test_commits_do_not_become_inline_with_a_stall() -> None:
    mode = slowed_down()
    assert not after(mode, FAST_S, commit_mode.TRIAL - 1, commit_mode.PAUSE_S)
    assert not after(mode, commit_mode.STALL_S, 1, commit_mode.PAUSE_S)
    assert after(mode, FAST_S, 1, commit_mode.PAUSE_S)


def test_commits_are_not_inline_again_before_the_pause_is_over() -> None:
    mode = slowed_down(5.0)
    assert not after(mode, FAST_S, 10 * commit_mode.TRIAL, 5.0 + commit_mode.PAUSE_S - 0.001)
    assert after(mode, FAST_S, 1, 5.0 + commit_mode.PAUSE_S)


def test_the_pause_begins_with_the_latest_change_to_the_thread() -> None:
    mode = slowed_down(0.0)
    assert after(mode, FAST_S, 2 * commit_mode.TRIAL, 20.0)
    assert not after(mode, commit_mode.LONG_STALL_S, 1, 21.0), "a slow disk ends the inline mode at once"
    assert not after(mode, FAST_S, 2 * commit_mode.TRIAL, 21.0 + commit_mode.PAUSE_S - 0.001)
    assert after(mode, FAST_S, 1, 21.0 + commit_mode.PAUSE_S)


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
            recent = [*recent, took_s][-commit_mode.RECENT :] if was_inline else []
            if mode.is_inline and not was_inline:
                returns.append(now_s)
            elif mode.is_inline:
                assert max(recent) < commit_mode.LONG_STALL_S
                assert sum(each >= commit_mode.STALL_S for each in recent) < 2
                assert (
                    len(recent) < commit_mode.RECENT or sorted(recent)[commit_mode.RECENT // 2] < commit_mode.MEDIAN_S
                )
    assert all(second - first >= commit_mode.PAUSE_S for first, second in pairwise(returns))
