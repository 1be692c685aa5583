"""Heaps whose entries go stale: what they find, in which order, and that they do not grow without end."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import islice

import pytest

from jobd.job import Options, Untouched
from jobd.orders import SLACK, DueEntry, DueJobs, LazyHeap, Line, entry_of

Timed = tuple[int, int, str]


def entry(time: int, name: str = "") -> Timed:
    return (time, time, name or f"{time}")


@pytest.fixture
def heap() -> LazyHeap[Timed]:
    return LazyHeap()


def valid(_: Timed) -> bool:
    return True


def test_an_empty_heap_has_nothing(heap: LazyHeap[Timed]) -> None:
    assert heap.first(valid) is None
    assert list(heap.ordered(valid)) == []
    assert list(heap.pop_until(10)) == []
    heap.trim(0, valid)


def test_first_drops_what_is_stale_above_it(heap: LazyHeap[Timed]) -> None:
    for time in (3, 1, 2):
        heap.push(entry(time))
    assert heap.first(lambda found: found[0] != 1) == entry(2)
    assert len(heap.entries) == 2
    assert heap.first(lambda found: False) is None
    assert heap.entries == []


def test_ordered_gives_valid_entries_once_and_takes_nothing_out(heap: LazyHeap[Timed]) -> None:
    numbers = list(range(50)) + list(range(0, 50, 3))  # every third twice: it went and came back
    random.Random(1).shuffle(numbers)
    for time in numbers:
        heap.push(entry(time))
    odd = [entry(time) for time in range(50) if time % 2]
    assert list(heap.ordered(lambda found: found[0] % 2 == 1)) == odd
    assert list(islice(heap.ordered(valid), 3)) == [entry(1), entry(2), entry(3)]  # 0 was stale and on top
    assert list(heap.ordered(lambda found: found[0] % 2 == 1)) == odd


def test_pop_until_takes_out_what_is_due_by_then(heap: LazyHeap[Timed]) -> None:
    for time in (5, 4, 6):
        heap.push(entry(time))
    assert list(heap.pop_until(3)) == []
    assert list(heap.pop_until(5)) == [entry(4), entry(5)]
    assert heap.entries == [entry(6)]


def test_trim_waits_until_the_stale_outnumber_the_live(heap: LazyHeap[Timed]) -> None:
    for time in range(SLACK + 2):
        heap.push(entry(time))
    heap.trim(1, lambda found: found[0] == 7)
    assert len(heap.entries) == SLACK + 2
    heap.push(entry(7))
    heap.trim(1, lambda found: found[0] == 7)
    assert heap.entries == [entry(7)]


def untouched(kind: str, priority: int, created_at: int, seq: int) -> Untouched:
    return Untouched(seq, f"{seq}", Options(kind=kind, priority=priority), created_at)


def test_a_line_too_waits_with_its_trim_until_the_stale_outnumber_the_live() -> None:
    line = Line()
    jobs = [untouched("", 0, number, number) for number in range(2 * 2 + SLACK + 1)]
    line.jobs.extend(jobs[1:])
    line.trim(2, lambda job: job.seq in (7, 9))
    assert len(line.jobs) == 2 * 2 + SLACK
    line.jobs.append(jobs[0])
    line.trim(2, lambda job: job.seq in (7, 9))
    assert list(line.jobs) == [jobs[7], jobs[9]]


class Model:
    """Due jobs as a plain set, beside the real thing."""

    def __init__(self) -> None:
        self.live: set[tuple[str, DueEntry]] = set()
        self.short: dict[DueEntry, Untouched] = {}  # those that joined and have not left
        self.due = DueJobs(lambda kind, found: (kind, found) in self.live, self._waits)

    def _waits(self, job: Untouched) -> bool:
        return self.short.get(entry_of(job)) is job

    def add(self, kind: str, *found: int) -> tuple[str, DueEntry]:
        priority, run_at, seq = found
        item = (kind, (priority, run_at, seq, f"{seq}"))
        self.live.add(item)
        self.due.add(*item)
        return item

    def join(self, kind: str, *found: int) -> tuple[str, DueEntry]:
        job = untouched(kind, *found)
        item = (kind, entry_of(job))
        self.live.add(item)
        self.short[entry_of(job)] = job
        self.due.join(job)
        return item

    def remove(self, item: tuple[str, DueEntry]) -> None:
        self.live.remove(item)
        self.short.pop(item[1], None)
        self.due.remove(item[0], item[1][0])

    def check(self) -> None:
        for kinds in (None, ["a"], ["b", "a", "b"], ["none"], []):
            expected = sorted(found for kind, found in self.live if kinds is None or kind in kinds)
            assert list(self.due.due(kinds)) == expected
            assert list(islice(self.due.due(kinds), 2)) == expected[:2]
        assert self.due.live == len(self.live)
        assert sorted(self.due.entries()) == sorted(self.live)
        oldest = min((found for _, found in self.live), key=lambda found: (found[1], found[2]), default=None)
        assert self.due.oldest() == oldest


def test_due_jobs_come_in_exact_order_over_kinds_and_priorities() -> None:
    model = Model()
    model.check()
    for kind, *found in [("a", 0, 5, 1), ("b", 0, 4, 2), ("a", -1, 9, 3), ("b", 1, 1, 4), ("a", 0, 4, 5)]:
        model.add(kind, *found)
        model.check()
    assert [found[2] for found in model.due.due(None)] == [3, 2, 5, 1, 4]


def test_a_lane_goes_with_its_last_job() -> None:
    model = Model()
    first, second, third = model.add("a", 0, 1, 1), model.add("a", 5, 1, 2), model.add("b", 0, 1, 3)
    model.remove(first)
    assert list(model.due.lanes["a"]) == [5]
    model.remove(second)
    assert list(model.due.lanes) == ["b"]
    model.remove(third)
    assert not model.due.lanes
    model.check()


def test_a_job_that_comes_back_is_given_once() -> None:
    model = Model()
    kept = model.add("a", 0, 1, 1)
    item = model.add("a", 0, 2, 2)
    for _ in range(3):
        model.remove(item)
        model.add("a", 0, 2, 2)
        model.check()
    model.remove(kept)
    model.check()


@pytest.mark.parametrize("seed", range(5))
def test_any_sequence_of_adds_and_removes_matches_a_sort(seed: int) -> None:
    dice = random.Random(seed)
    model = Model()
    gone: list[tuple[str, DueEntry]] = []
    for seq in range(400):
        action = dice.random()
        if action < 0.5 or not model.live:
            enter = dice.choice([model.add, model.join])
            enter(dice.choice("ab"), dice.randint(-1, 1), dice.choice([dice.randint(0, 9), 10 + seq]), seq)
        elif action < 0.9:
            gone.append(dice.choice(sorted(model.live)))
            model.remove(gone[-1])
        elif gone:
            kind, found = gone.pop()
            dice.choice([model.add, model.join])(kind, *found[:3])
        if seq % 10 == 0:
            model.check()
    model.check()


def test_a_job_that_comes_back_in_another_way_is_given_once() -> None:
    model = Model()
    item = model.add("a", 0, 1, 1)
    model.remove(item)
    model.join("a", 0, 1, 1)  # its first entry is right again
    model.check()
    model.join("a", 0, 2, 2)
    model.check()


def test_a_new_job_is_the_first_where_all_before_it_are_gone() -> None:
    model = Model()
    gone = model.join("a", 0, 5, 1)
    model.add("a", 0, 9, 2)
    model.remove(gone)
    model.join("a", 0, 6, 3)
    model.join("b", 0, 7, 4)
    model.check()


def test_a_job_joins_the_line_only_at_its_end() -> None:
    model = Model()
    for found in [(0, 5, 2), (0, 4, 3), (0, 5, 1), (0, 5, 4)]:
        model.join("a", *found)
        model.check()
    (lane,) = model.due.lanes["a"].values()
    assert [job.seq for job in lane.line.jobs] == [2, 4]
    assert len(lane.heap.entries) == 2


def test_the_first_jobs_of_a_lane_come_all_at_once_in_any_order() -> None:
    model = Model()
    jobs = [untouched("a", 3, created_at, seq) for created_at, seq in [(5, 2), (4, 3), (5, 1), (5, 4)]]
    for job in jobs:
        model.live.add(("a", entry_of(job)))
        model.short[entry_of(job)] = job
    model.due.join_all("a", 3, jobs)
    model.join("a", 3, 6, 5)
    model.join("b", 2, 7, 6)
    model.check()


def test_lines_stay_small_while_jobs_come_and_go() -> None:
    model = Model()
    model.join("a", 0, 0, 0)
    for seq in range(1, 2_000):
        model.remove(model.join("a", 0, seq, seq))
    (lane,) = model.due.lanes["a"].values()
    assert len(lane.line.jobs) <= 2 + SLACK + 1
    model.check()


def test_heaps_stay_small_while_jobs_come_and_go() -> None:
    model = Model()
    model.add("a", 0, 0, 0)
    for seq in range(1, 2_000):
        model.remove(model.add("a", 0, seq, seq))
        model.remove(model.add("b", seq % 7, 1, seq))
    (lane,) = model.due.lanes["a"].values()
    assert len(lane.heap.entries) <= 2 + SLACK + 1
    assert len(model.due.heads.entries) <= 2 + SLACK + 1
    model.check()


def test_the_heads_of_a_lane_stay_few_while_jobs_only_come_or_only_go() -> None:
    model = Model()
    model.add("b", 0, 0, 9_999)
    items = [model.add("a", 0, 2_000 - seq, seq) for seq in range(1_000)]  # each comes before all others
    assert len(model.due.heads.entries) <= 2 * 2 + SLACK + 1
    for item in reversed(items[1:]):  # each was the first
        model.remove(item)
        assert len(model.due.heads.entries) <= 2 * 2 + SLACK + 1
    model.check()


@pytest.mark.parametrize("enter", [Model.add, Model.join])
def test_one_lane_alone_has_no_heads_until_a_second_one_comes(enter: Callable[..., tuple[str, DueEntry]]) -> None:
    model = Model()
    first, second = enter(model, "a", 0, 1, 1), enter(model, "a", 0, 2, 2)
    assert not model.due.heads.entries
    others = [enter(model, "b", 0, 0, 3), enter(model, "b", 1, 0, 4), enter(model, "a", 2, 0, 5)]
    assert len(model.due.heads.entries) == 4
    model.check()
    model.remove(first)
    model.check()
    for other in others:
        model.remove(other)
        model.check()
    assert not model.due.heads.entries
    enter(model, "c", 0, 0, 6)
    model.check()
    model.remove(second)
    model.check()


@pytest.mark.parametrize("enter", ["add", "join"])
def test_the_first_of_many_lanes_is_found_without_a_look_at_them_all(enter: str) -> None:
    looked: list[object] = []
    due = DueJobs(lambda kind, found: not looked.append(found), lambda job: not looked.append(job))  # type: ignore[func-returns-value]
    for seq in range(1_000):
        if enter == "add":
            due.add(f"k-{seq}", (0, seq, seq, f"{seq}"))
        else:
            due.join(untouched(f"k-{seq}", 0, seq, seq))
    looked.clear()
    assert [found[2] for found in islice(due.due(None), 3)] == [0, 1, 2]
    assert len(looked) < 60
