"""The orders of jobs: their results, the number of entries that they read, and their size."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import pytest

from jobd.core.orders import BLOCK, SLACK, LazyHeap, Sorted
from jobd.core.ready_queue import (
    _GONE_AT_ONCE,
    NEVER,
    BucketEntries,
    DueEntry,
    Fifo,
    PriorityBucket,
    QueuedJobs,
    packed_entry,
)
from jobd.model.job import Options, PackedJob

Timed = tuple[int, int, str]


def entry(time: int, name: str = "") -> Timed:
    return (time, time, name or f"{time}")


@pytest.fixture
def heap() -> LazyHeap[Timed]:
    return LazyHeap()


def valid(_: Timed) -> bool:
    return True


def test_an_empty_heap_has_no_entries(heap: LazyHeap[Timed]) -> None:
    assert heap.first(valid) is None
    assert list(heap.ordered(valid)) == []
    assert list(heap.pop_until(10)) == []
    heap.trim(0, valid)


def test_first_drops_stale_entries_before_it(heap: LazyHeap[Timed]) -> None:
    for time in (3, 1, 2):
        heap.push(entry(time))
    assert heap.first(lambda found: found[0] != 1) == entry(2)
    assert len(heap.entries) == 2
    assert heap.first(lambda found: False) is None
    assert heap.entries == []


def test_ordered_returns_valid_entries_once_and_removes_none(heap: LazyHeap[Timed]) -> None:
    numbers = list(range(50)) + list(range(0, 50, 3))  # every third twice: removed and added again
    random.Random(1).shuffle(numbers)
    for time in numbers:
        heap.push(entry(time))
    odd = [entry(time) for time in range(50) if time % 2]
    assert list(heap.ordered(lambda found: found[0] % 2 == 1)) == odd
    assert list(islice(heap.ordered(valid), 3)) == [entry(1), entry(2), entry(3)]  # 0 was stale and on top of the heap
    assert list(heap.ordered(lambda found: found[0] % 2 == 1)) == odd


def test_pop_until_removes_due_entries(heap: LazyHeap[Timed]) -> None:
    for time in (5, 4, 6):
        heap.push(entry(time))
    assert list(heap.pop_until(3)) == []
    assert list(heap.pop_until(5)) == [entry(4), entry(5)]
    assert heap.entries == [entry(6)]


def test_trim_acts_only_if_stale_entries_outnumber_live_ones(heap: LazyHeap[Timed]) -> None:
    for time in range(SLACK + 2):
        heap.push(entry(time))
    heap.trim(1, lambda found: found[0] == 7)
    assert len(heap.entries) == SLACK + 2
    heap.push(entry(7))
    heap.trim(1, lambda found: found[0] == 7)
    assert heap.entries == [entry(7)]


def untouched(kind: str, priority: int, created_at: int, seq: int) -> PackedJob:
    return PackedJob(seq, f"{seq}", Options(kind=kind, priority=priority), created_at)


def test_a_fifo_is_trimmed_only_if_removed_jobs_outnumber_live_ones() -> None:
    line = Fifo()
    jobs = [untouched("", 0, number, number) for number in range(2 * 2 + SLACK + 1)]
    line.extend(jobs[:-1])
    line.trim(2, lambda job: job.seq in (7, 9))
    assert len(line) == 2 * 2 + SLACK
    line.append(jobs[-1])
    line.trim(2, lambda job: job.seq in (7, 9))
    assert list(line) == [jobs[7], jobs[9]]


def _is_from(seq: int, job: PackedJob) -> bool:
    return job.seq >= seq


def test_a_fifo_drops_the_places_of_removed_jobs_at_its_front() -> None:
    jobs = [untouched("", 0, number, number) for number in range(3 * _GONE_AT_ONCE)]
    line = Fifo()
    line.extend(jobs)
    for removed, kept in [
        (10, 0),
        (_GONE_AT_ONCE - 1, 0),
        (_GONE_AT_ONCE, 1),
        (_GONE_AT_ONCE + 100, 1),
        (len(jobs), 3),
    ]:
        first = line.first(partial(_is_from, removed))
        assert (list(line), len(line)) == (jobs[removed:], len(jobs) - removed)
        assert first is next(iter(line), None)
        assert len(line._jobs) == len(jobs) - kept * _GONE_AT_ONCE
    assert line.append(jobs[0])


def test_the_next_job_of_a_fifo_is_found_without_scanning() -> None:
    line = Fifo()
    line.extend([untouched("", 0, number, number) for number in range(100_000)])
    looked_at: list[int] = []

    class Counted(list[PackedJob]):
        def __getitem__(self, place: Any) -> Any:
            looked_at.append(place)
            return super().__getitem__(place)

        def __iter__(self) -> Any:
            raise AssertionError("the line is walked from its front")

    line._jobs = Counted(line._jobs)
    assert next(line.not_due(50_000, lambda job: job.seq != 50_001)).created_at == 50_002
    assert len(looked_at) < 50


def test_sorted_entries_match_a_list() -> None:
    dice = random.Random(3)
    found: Sorted[Timed] = Sorted()
    model: list[Timed] = []
    for time in [dice.randint(0, 5_000) for _ in range(3 * BLOCK)]:
        if dice.random() < 0.7 or not model:
            if entry(time) not in model:
                model.append(entry(time))
                found.add(entry(time))
        else:
            removed = dice.choice(model)
            model.remove(removed)
            assert found.remove(removed)
        assert found.first() == min(model, default=None)
    assert list(found) == sorted(model)
    for time in (-1, 0, 1_000, 4_990, 5_001):
        assert list(found.after(entry(time))) == sorted(each for each in model if each > entry(time))
    assert not found.remove(entry(5_001))
    assert not found.remove((7, 7, "another"))
    for removed in sorted(model, reverse=True):
        assert found.remove(removed)
    assert not found
    assert found.first() is None
    assert not found.remove(entry(1))


def test_a_full_block_is_split_unless_entries_are_appended() -> None:
    growing: Sorted[Timed] = Sorted()
    for time in range(2 * BLOCK):
        growing.add(entry(2 * time))
    assert [len(block) for block in growing.blocks] == [BLOCK, BLOCK]
    growing.add(entry(1))
    growing.add(entry(3 * BLOCK - 1))
    assert [len(block) for block in growing.blocks] == [BLOCK // 2 + 1, BLOCK // 2, BLOCK // 2, BLOCK // 2 + 1]
    assert list(growing) == sorted(growing)


@pytest.mark.parametrize("time", [BLOCK - 3, BLOCK - 1])
def test_a_split_block_gets_an_entry_into_the_half_where_it_belongs(time: int) -> None:
    full: Sorted[Timed] = Sorted()
    for number in range(BLOCK):
        full.add(entry(2 * number))
    full.add(entry(time))  # next to the last entry of the lower half, which is BLOCK - 2
    assert list(full) == sorted(full)
    assert full._last == [block[-1] for block in full.blocks]
    assert [entry(2 * number) for number in range(BLOCK) if not full.remove(entry(2 * number))] == []


class NaiveReadyQueue:
    """Queued jobs as a plain set, to compare with."""

    def __init__(self) -> None:
        self.live: set[tuple[str, DueEntry]] = set()
        self.short: dict[DueEntry, PackedJob] = {}  # added and not yet removed
        self.due = QueuedJobs("q", self._waits)
        self.now = 100_000

    def _waits(self, job: PackedJob) -> bool:
        return self.short.get(packed_entry(job)) is job

    def add(self, kind: str, *found: int, expires_at: int = NEVER) -> tuple[str, DueEntry]:
        priority, run_at, seq = found
        item = (kind, (priority, run_at, seq, f"{seq}", expires_at))
        self.live.add(item)
        self.due.add(*item, self.now)
        return item

    def join(self, kind: str, *found: int) -> tuple[str, DueEntry]:
        job = untouched(kind, *found)
        item = (kind, packed_entry(job))
        self.live.add(item)
        self.short[packed_entry(job)] = job
        self.due.join(job, self.now)
        return item

    def remove(self, item: tuple[str, DueEntry]) -> None:
        self.live.remove(item)
        short = self.short.pop(item[1], None)
        if short is None:
            self.due.remove(*item, self.now)
        else:
            self.due.remove_packed(short, self.now)

    def at(self, now: int) -> None:
        """Advance to `now` and offer buckets whose first job becomes due, like the state."""
        self.now = now
        for buckets in self.due.buckets.values():
            for bucket in buckets.values():
                self.due.offer(bucket, now)

    def check(self) -> None:
        now = self.now
        eligible = {(kind, found) for kind, found in self.live if found[1] <= now < found[4]}
        for kinds in (None, ["a"], ["b", "a", "b"], ["none"], []):
            expected = sorted(found for kind, found in eligible if kinds is None or kind in kinds)
            assert list(self.due.eligible(kinds, now)) == expected
            assert list(islice(self.due.eligible(kinds, now), 2)) == expected[:2]
            if kinds is None and (line := self.due.due_in_fifo(now)) is not None:
                assert list(map(packed_entry, line)) == expected
            if kinds is None and (first := self.due.first_in_fifo(now)) is not None:
                assert packed_entry(first) == expected[0]
        counts = Counter((kind, found[0]) for kind, found in self.live)
        buckets = [(kind, priority, bucket) for kind, of in self.due.buckets.items() for priority, bucket in of.items()]
        assert {(kind, priority): bucket.live for kind, priority, bucket in buckets} == counts
        for kind, priority, bucket in buckets:
            later = [found[1] for each, found in self.live if (each, found[0]) == (kind, priority) and found[1] > now]
            assert bucket.next_run_at(now) == min(later, default=None)
            assert [entry[1] for entry in bucket.not_due(now)] == sorted(later)
        assert sorted(self.due.not_due(now)) == sorted(found for _, found in self.live if found[1] > now)
        oldest = min((found for _, found in eligible), key=lambda found: (found[1], found[2]), default=None)
        assert self.due.oldest(now) == oldest


def test_a_claim_of_all_kinds_of_a_queue_sorts_no_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a bucket for each of 2,001 priorities, sorting them takes ten milliseconds."""
    model = NaiveReadyQueue()
    for kind, priority, seq in (("a", 1, 1), ("a", 0, 2), ("b", -1, 3)):
        model.add(kind, priority, 5, seq)
    monkeypatch.setattr(QueuedJobs, "_heads_of", None)
    assert [found[2] for found in model.due.eligible(["c", "b", "a"], model.now)] == [3, 2, 1]


def test_jobs_that_are_all_in_one_fifo_need_no_merge() -> None:
    model = NaiveReadyQueue()

    def in_fifo(now: int) -> tuple[int | None, list[int] | None]:
        first, line = model.due.first_in_fifo(now), model.due.due_in_fifo(now)
        return None if first is None else first.seq, None if line is None else [job.seq for job in line]

    assert in_fifo(5) == (None, None)
    model.join("a", 0, 5, 1)
    model.join("a", 0, 6, 2)
    assert [in_fifo(now) for now in (4, 5, 6)] == [(None, None), (1, None), (1, [1, 2])]
    earlier = model.add("a", 0, 4, 3)
    assert in_fifo(6) == (None, None)
    model.remove(earlier)
    assert in_fifo(6) == (1, [1, 2])
    model.join("b", 0, 6, 4)
    assert in_fifo(6) == (None, None)


@pytest.mark.parametrize("seed", range(5))
def test_any_sequence_of_adds_and_removes_matches_a_sort(seed: int) -> None:
    dice = random.Random(seed)
    model = NaiveReadyQueue()
    removed: list[tuple[str, DueEntry]] = []
    for seq in range(400):
        action = dice.random()
        if action < 0.5 or not model.live:
            found = dice.choice("ab"), dice.randint(-1, 1), dice.choice([dice.randint(0, 9), 10 + seq]), seq
            if dice.random() < 0.3:
                model.add(*found, expires_at=dice.randint(0, 500))
            else:
                dice.choice([model.add, model.join])(*found)
        elif action < 0.9:
            removed.append(dice.choice(sorted(model.live)))
            model.remove(removed[-1])
        elif removed:
            kind, entry_gone = removed.pop()
            dice.choice([model.add, model.join])(kind, *entry_gone[:3])
        if seq % 10 == 0:
            model.at(dice.choice([0, 5, 100, seq, 200, 100_000]))  # the clock may step back
            model.check()
    model.at(100_000)
    model.check()


def test_a_job_joins_the_fifo_only_at_its_end() -> None:
    model = NaiveReadyQueue()
    for found in [(0, 5, 2), (0, 4, 3), (0, 5, 1), (0, 5, 4)]:
        model.join("a", *found)
        model.check()
    (bucket,) = model.due.buckets["a"].values()
    assert [job.seq for job in bucket.fifo] == [2, 4]
    assert len(list(bucket.others)) == 2


def test_the_first_jobs_of_a_bucket_can_be_added_at_once_in_any_order() -> None:
    model = NaiveReadyQueue()
    jobs = [untouched("a", 3, created_at, seq) for created_at, seq in [(5, 2), (4, 3), (5, 1), (5, 4)]]
    for job in jobs:
        model.live.add(("a", packed_entry(job)))
        model.short[packed_entry(job)] = job
    model.due.join_all("a", 3, jobs, model.now)
    model.join("a", 3, 6, 5)
    model.join("b", 2, 7, 6)
    model.check()


def test_fifos_stay_small_while_jobs_come_and_go() -> None:
    model = NaiveReadyQueue()
    model.join("a", 0, 0, 0)
    for seq in range(1, 2_000):
        model.remove(model.join("a", 0, seq, seq))
    (bucket,) = model.due.buckets["a"].values()
    assert len(bucket.fifo) <= 2 + SLACK + 1
    model.check()


def test_heaps_stay_small_while_jobs_come_and_go() -> None:
    model = NaiveReadyQueue()
    model.add("a", 0, 0, 0)
    for seq in range(1, 2_000):
        model.remove(model.add("a", 0, seq, seq))
        model.remove(model.add("b", seq % 7, 1, seq))
    (bucket,) = model.due.buckets["a"].values()
    assert len(list(bucket.others)) <= 2 + SLACK + 1
    assert len(model.due.heads.entries) <= 2 + SLACK + 1
    model.check()


def test_a_bucket_has_few_heads_while_jobs_are_only_added_or_only_removed() -> None:
    model = NaiveReadyQueue()
    model.add("b", 0, 0, 9_999)
    items = [model.add("a", 0, 2_000 - seq, seq) for seq in range(1_000)]  # each goes before all others
    assert len(model.due.heads.entries) <= 2 * 2 + SLACK + 1
    for item in reversed(items[1:]):  # each was the first one
        model.remove(item)
        assert len(model.due.heads.entries) <= 2 * 2 + SLACK + 1
    model.check()


@pytest.mark.parametrize("enter", [NaiveReadyQueue.add, NaiveReadyQueue.join])
def test_a_single_bucket_has_no_heads(enter: Callable[..., tuple[str, DueEntry]]) -> None:
    model = NaiveReadyQueue()
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


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[PriorityBucket]:
    """The buckets that were read, one entry for each time."""
    found: list[PriorityBucket] = []

    def count(method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(bucket: PriorityBucket, *args: int) -> Any:
            found.append(bucket)
            return method(bucket, *args)

        return counted

    for name in ("head", "eligible"):
        monkeypatch.setattr(PriorityBucket, name, count(getattr(PriorityBucket, name)))
    return found


@pytest.mark.parametrize("enter", ["add", "join"])
def test_the_first_of_many_buckets_is_found_without_reading_all_of_them(
    enter: str, scanned: list[PriorityBucket]
) -> None:
    due = QueuedJobs("q", lambda job: True)
    for seq in range(1_000):
        if enter == "add":
            due.add(f"k-{seq}", (0, seq, seq, f"{seq}", NEVER), 1_000)
        else:
            due.join(untouched(f"k-{seq}", 0, seq, seq), 1_000)
    for seq in range(1_000):
        due.add(f"later-{seq}", (-1, 2_000, seq, f"{seq}", NEVER), 1_000)
    for kinds, first in ((None, 0), ([f"k-{seq}" for seq in range(1, 1_000)], 1)):
        scanned.clear()
        assert [found[2] for found in islice(due.eligible(kinds, 1_000), 3)] == [first, first + 1, first + 2]
        assert len(scanned) < 60
    scanned.clear()
    oldest = due.oldest(1_000)
    assert oldest is not None
    assert oldest[2] == 0
    assert len(scanned) < 60


def test_a_claim_passes_over_few_removed_jobs(scanned: list[PriorityBucket]) -> None:
    """They stay in the heads, behind the first job of a kind that no worker claims."""
    due = QueuedJobs("q", lambda job: True)
    due.add("first", (0, 0, 0, "first", NEVER), 1_000)
    for seq in range(1, 300):
        due.add(f"k-{seq}", (0, seq, seq, f"{seq}", NEVER), 1_000)
        due.add(f"k-{seq}", (0, 300 + seq, 300 + seq, f"{300 + seq}", NEVER), 1_000)
    for seq in range(1, 300):
        due.remove(f"k-{seq}", (0, seq, seq, f"{seq}", NEVER), 1_000)
    assert len(due.heads.entries) > 500
    for kinds, expected in ((["k-7", "k-9"], [307, 309]), (None, [0])):
        scanned.clear()
        assert [found[2] for found in islice(due.eligible(kinds, 1_000), len(expected))] == expected
        assert len(scanned) < 20


class CountingTime(int):
    """A time that counts comparisons."""

    compared = 0

    def __ge__(self, other: int) -> bool:
        self.compared += 1
        return int(self) >= other

    def __lt__(self, other: int) -> bool:
        self.compared += 1
        return int(self) < other


def test_overdue_jobs_are_skipped_in_blocks_and_return_after_a_backward_step() -> None:
    places, jobs = BucketEntries(), 40 * BLOCK
    for seq in range(jobs):
        places.add((0, 1, seq, f"{seq}", 10 + seq % 2))
    places.add((0, 1, jobs, f"{jobs}", NEVER))
    now = CountingTime(11)
    assert [found[2] for found in places.eligible(now)] == [jobs]
    assert now.compared < 50, "a look at each block, and at the entries of the last one"
    assert next(places.eligible(10))[2] == 1, "the clock was set back"
    assert next(places.eligible(9))[2] == 0


def test_a_block_whose_last_job_was_removed_is_read_once() -> None:
    places, jobs = BucketEntries(), 10 * BLOCK
    for seq in range(jobs):
        places.add((0, 1, seq, f"{seq}", 20 if seq % BLOCK == 5 else 10))
    for seq in range(5, jobs, BLOCK):
        places.remove((0, 1, seq, f"{seq}", 20))
    assert list(places.eligible(10)) == []
    now = CountingTime(10)
    assert list(places.eligible(now)) == []
    assert now.compared == 10


def test_the_due_jobs_of_a_bucket_are_counted_by_blocks() -> None:
    bucket = PriorityBucket(("q", "k", 0), lambda job: True)
    for number in range(3 * BLOCK):
        bucket.others.add((0, number, number, f"j-{number}", NEVER))
    for seq in range(5):
        bucket.fifo.append(PackedJob(seq, f"p-{seq}", Options(), 1_000 * seq))
    bucket.live = 3 * BLOCK + 5
    for now in (-1, 0, BLOCK - 1, BLOCK, 2 * BLOCK + 7, 3 * BLOCK, 9_999):
        assert bucket.due(now) == min(now + 1, 3 * BLOCK) + min(now // 1_000 + 1, 5)
