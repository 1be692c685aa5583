"""The state: live jobs in every order and counter, over time, backward steps of the clock and damaged rows."""

from __future__ import annotations

import random
from typing import Any

import pytest
from msgspec import Raw
from msgspec.structs import replace

from jobd.core.jobs_by_id import FINISHED_KEPT, LiveJobs
from jobd.core.orders import SLACK
from jobd.core.ready_queue import PriorityBucket
from jobd.core.state import State, remember
from jobd.model import commands as cmd
from jobd.model.clocks import LockMs
from jobd.model.events import QueuePause
from jobd.model.job import HOUR_MS, MINUTE_MS, Grant, Job, LockDeadlines, Options, PackedJob, Result
from jobd.model.storage import Numbers, OpenedStore, QueueRow
from tests.support.factories import deadlines_at
from tests.support.rule_harness import NOW, RuleHarness, compare, due_order, snapshot

TTL = 15 * MINUTE_MS


def queued(seq: int, **fields: Any) -> Job:
    return replace(Job(seq, f"job-{seq}", Options(), "queued", NOW, NOW, NOW), **fields)


def held(seq: int, worker: str, expires: LockMs = LockMs(500)) -> Job:
    grant = Grant(f"lock-{seq}", seq, worker, NOW, 1, 1, 0)
    return replace(
        queued(seq), status="processing", started_at=NOW, grant=grant, deadlines=LockDeadlines(expires, expires, None)
    )


def test_an_empty_book() -> None:
    state, processing = State(), State().processing
    assert (state.total(), processing.live_locks(), state.get("a"), state.oldest_due_at("q")) == (0, 0, None, None)
    assert (state.next_run_at(), processing.next_deadline(), state.next_expiry()) == (None, None, None)
    assert list(state.due(["q"], None)) == []
    assert state.queue_row("q") == QueueRow()
    assert state.numbers(LockMs(7), 9, cmd.ClockTrust()) == Numbers(lock_ms=LockMs(7), wall_ms=9)


def test_a_start_loads_live_jobs_and_the_counts_of_finished_ones() -> None:
    numbers = Numbers(3, 11, 12, 13, LockMs(400), NOW, True, NOW - 5, NOW - 6, 7)
    jobs = [queued(1), queued(2, run_at=NOW + 1), held(3, "w-1"), held(4, "w-2", expires=LockMs(400))]
    queues = {"default": QueueRow(completed=5, failed=2), "idle": QueueRow(paused=True, failed=3, cancelled=1)}
    state = State.opened(OpenedStore(numbers, jobs, queues=queues))
    assert state.numbers(LockMs(400), NOW, state.clock) == numbers
    assert state.clock == cmd.ClockTrust(True, NOW - 5, NOW - 6, 7)
    assert state.total() == 15
    assert state.counts["default"] == {"queued": 2, "processing": 2, "completed": 5, "failed": 2, "cancelled": 0}
    assert (state.totals["failed"], state.totals["cancelled"]) == (5, 1)
    assert state.paused == {"idle": QueuePause()}
    assert [job.seq for job in state.due(["default"], None)] == [1]
    assert (state.processing.live_locks(), list(state.processing.stalled)) == (1, ["job-4"])
    assert (state.next_run_at(), state.processing.next_deadline()) == (NOW + 1, LockMs(500))
    assert {name: row for name in queues for row in [state.queue_row(name)]} == queues


@pytest.mark.parametrize("seed", range(5))
def test_compact_jobs_can_be_added_at_once_or_one_by_one(seed: int) -> None:
    dice = random.Random(seed)
    shared = [
        Options(queue=queue, kind=kind, priority=priority) for queue in "qr" for kind in "kl" for priority in (0, 1)
    ]
    jobs = []
    for seq in dice.sample(range(1, 1_000), 300):
        options = dice.choice(shared)
        jobs.append(PackedJob(seq, f"job-{seq}", replace(options), NOW + dice.randint(-30, 5)))  # equal, not identical
        if dice.random() < 0.9:
            jobs[-1] = replace(jobs[-1], options=options)
    touched = [held(seq, f"w-{seq % 3}") for seq in range(2_000, 2_020)]
    queues = {"q": QueueRow(paused=True, failed=2)}
    numbers = Numbers(wall_ms=NOW)
    at_once = State.opened(OpenedStore(numbers, touched, jobs, queues))
    one_by_one = State.opened(OpenedStore(numbers, [*(job.expand() for job in jobs), *touched], queues=queues))
    rows = {job.id: job for job in [*(job.expand() for job in jobs), *touched]}
    for step_ms in (0, 3, -20, 30):
        for state in (at_once, one_by_one):
            state.set_paused("q", None)
            state.advance(state._now + step_ms, LockMs(0))
        assert snapshot(at_once) == snapshot(one_by_one)
        assert at_once.next_run_at() == one_by_one.next_run_at()
        assert {bucket.name: bucket.live for bucket in at_once._buckets} == {
            bucket.name: bucket.live for bucket in one_by_one._buckets
        }
    for state in (at_once, one_by_one):
        for job in rows.values():
            state.reindex(job, None)
        compare_nothing_left(state)


def compare_nothing_left(state: State) -> None:
    assert (len(state.jobs), state._queued, state._buckets) == (0, {}, {})
    assert {status: count for status, count in state.totals.items() if count} == {"failed": 2}


def test_only_new_jobs_are_compact(rules: RuleHarness) -> None:
    rules.create("a")
    rules.create("b", delay_ms=5)
    lock_id = rules.held("c")
    assert set(rules.state.jobs.touched()) == {"b", "c"}
    rules.accept(cmd.Release(id="c", lock_id=lock_id))
    rules.accept(cmd.Update(id="a", priority=1))
    assert set(rules.state.jobs.touched()) == {"a", "b", "c"}
    assert rules.claim(limit=9) == ["c", "a"]


def test_the_due_jobs_of_a_kind_are_counted_over_its_priorities(rules: RuleHarness) -> None:
    for job_id, priority, delay_ms in (("a", 3, 0), ("b", 1, 0), ("c", 1, 5), ("d", 0, 5)):
        rules.create(job_id, kind="k", priority=priority, delay_ms=delay_ms)
    rules.create("e", kind="other")
    assert rules.state.due_of_kind("default", "k", rules.now) == (2, 1)
    rules.advance(5)
    assert rules.state.due_of_kind("default", "k", rules.now) == (4, 0)


def test_equal_options_share_one_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobd.core.state.OPTIONS_KEPT", 2)
    state = State()
    first = state.shared(Options(queue="a"))
    assert state.shared(Options(queue="a")) is first
    state.shared(Options(queue="b"))
    assert state.shared(Options(queue="c")) == Options(queue="c")  # starts from the defaults
    assert len(state._options) == 1
    assert state.shared(Options(queue="a")) is not first


def test_finished_jobs_are_kept_for_a_while(rules: RuleHarness) -> None:
    for number in range(FINISHED_KEPT + 2):
        rules.state.finished.keep(replace(queued(number + 1), status="cancelled"))
    rules.state.finished.keep(replace(queued(1), status="cancelled"))  # named again, so it is evicted last
    rules.state.finished.trim()
    assert len(rules.state.finished) == FINISHED_KEPT
    assert rules.state.get("job-1") is not None
    assert rules.state.get("job-2") is None
    assert rules.state.total() == 0  # the store counts jobs on disk


def test_the_size_of_finished_jobs_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobd.core.jobs_by_id.FINISHED_BYTES", 3_000)
    state = State()
    for seq in range(1, 6):
        result = Result(metadata=Raw(b'"%s"' % (b"y" * 998)))
        state.finished.keep(replace(queued(seq), status="completed", result=result))
        state.finished.keep(replace(queued(seq), status="completed", result=result))  # the same again adds nothing
    state.finished.trim()
    assert list(state.finished) == ["job-3", "job-4", "job-5"]
    state.reindex(state.finished["job-4"], None)
    state.finished.keep(replace(queued(6), status="completed", result=Result(file_path="/x")))
    state.finished.trim()
    assert (list(state.finished), state.finished._bytes) == (["job-3", "job-5", "job-6"], 2_000)
    state.finished.keep(replace(queued(8), status="cancelled"))
    assert state.finished._bytes == 2_000, "a job without a result counts no bytes"
    state.reindex(state.finished["job-8"], None)
    state.finished.keep(replace(queued(7), status="completed", result=Result(metadata=Raw(b'"%s"' % (b"y" * 3_000)))))
    state.finished.trim()
    assert (list(state.finished), state.finished._bytes) == ([], 0)


def test_finished_jobs_in_memory_are_bounded_in_bytes() -> None:
    state = State()
    for seq in (1, 2):
        result = Result(metadata=Raw(b'"%s"' % (b"y" * (4 << 20))))
        state.finished.keep(replace(queued(seq), status="completed", result=result))
    state.finished.trim()
    assert list(state.finished) == ["job-1", "job-2"]


def test_the_late_results_added_last_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobd.core.state.LATE_KEPT", 2)
    state = State()
    for seq, job_seq in enumerate((1, 2, 1, 3)):
        remember(state.late_results, job_seq, seq)
    assert state.late_results == {1: 2, 3: 3}


@pytest.mark.parametrize("status", ["queued", "processing", "completed"])
def test_a_quarantined_job_leaves_every_order(rules: RuleHarness, status: str) -> None:
    rules.create()
    if status != "queued":
        lock_id = rules.start()
        if status == "completed":
            rules.row(replace(rules.job(), status="completed", grant=None, deadlines=None))
        assert lock_id
    rules.state.unvalidated[1] = "a"
    rules.state.quarantine("a", "bad")
    del rules.rows["a"]
    assert rules.state.quarantined == {"a": "bad"}
    assert rules.state.unvalidated == {}
    rules.advance(HOUR_MS)
    compare(rules.state, {}, rules.moment)
    rules.state.quarantine("never", "bad")


def test_a_live_job_whose_damaged_row_cannot_be_moved_leaves_every_order_too(rules: RuleHarness) -> None:
    rules.create("a")
    rules.state.quarantine("a", "bad", is_moved=False)
    assert rules.state.unmoved == {"a": None}
    del rules.rows["a"]
    compare(rules.state, {}, rules.moment)
    rules.state.quarantine("unknown", "bad", is_moved=False)
    assert rules.state.unmoved == {"a": None, "unknown": None}


def test_a_finished_job_whose_row_is_not_moved_is_counted_as_it_was_before_a_batch(rules: RuleHarness) -> None:
    state = rules.state
    rules.completed("a")
    state.quarantine("a", "bad", is_moved=False)
    assert (state.get("a"), state.unmoved, state.totals["completed"]) == (None, {"a": ("default", "completed")}, 1)
    state.recount_unmoved("a", replace(queued(1, status="failed"), options=Options(queue="q")))
    assert (state.counts["q"]["failed"], state.totals["failed"], state.totals["completed"]) == (1, 1, 0)
    state.recount_unmoved("other", queued(2, status="failed"))
    assert (state.totals["failed"], state.unmoved) == (1, {"a": ("q", "failed")}), "it is not among them"
    for before in (queued(1), None):
        state.recount_unmoved("a", queued(1, status="failed"))
        state.recount_unmoved("a", before)
        assert (state.totals["failed"], state.totals["queued"], state.unmoved) == (0, 0, {"a": None})


def test_a_finished_job_whose_row_is_moved_later_is_no_longer_counted(rules: RuleHarness) -> None:
    rules.completed("a")
    rules.state.quarantine("a", "bad", is_moved=False)
    rules.state.quarantine("a", "bad", ("default", "failed"))
    assert (rules.state.totals["completed"], rules.state.totals["failed"], rules.state.unmoved) == (0, 0, {})


# -- time -------------------------------------------------------------------------------------------------------------


def test_delayed_jobs_become_due_and_are_announced(rules: RuleHarness) -> None:
    announced: list[tuple[str, str]] = []
    rules.state.on_due = lambda queue, kind: announced.append((queue, kind))
    rules.create("a", delay_ms=5, kind="k")
    rules.create("b", delay_ms=5, kind="k")
    rules.create("c", queue="q")
    assert set(announced) == {("q", "")}
    announced.clear()
    rules.advance(4)
    assert announced == []
    rules.advance(1)
    assert announced == [("default", "k")]
    assert rules.claim(limit=9) == ["a", "b"]


@pytest.mark.parametrize("limit", [1, 2, 9])
@pytest.mark.parametrize("kinds", [None, ["film"], ["none"]])
@pytest.mark.parametrize("queues", [["default"], ["q"], ["default", "q"], ["none"]])
def test_the_first_due_jobs_are_in_order_and_not_of_paused_queues(
    rules: RuleHarness, queues: list[str], kinds: list[str] | None, limit: int
) -> None:
    for job_id in ("a", "b"):
        rules.create(job_id)
    rules.create("c", queue="q", kind="film", priority=-1)
    for pause in (None, QueuePause()):
        rules.state.set_paused("default", pause)
        expected = due_order(rules.rows.values(), rules.now, queues, kinds, rules.state.paused)
        assert [job.id for job in rules.state.first_due(queues, kinds, limit)] == expected[:limit]


def test_a_reused_id_does_not_inherit_deadlines(rules: RuleHarness) -> None:
    rules.create("a", delay_ms=5, expires_at=NOW + 7)
    rules.accept(cmd.Cancel(id="a"))
    rules.accept(cmd.Delete(id="a"))
    rules.create("a", delay_ms=5, expires_at=NOW + 7)
    rules.advance(7)
    assert list(rules.state.overdue()) == ["a"]
    rules.accept(cmd.Cancel(id="a"))
    rules.accept(cmd.Delete(id="a"))
    rules.held("a")
    rules.recover(TTL)
    assert rules.claim() == ["a"]


def test_the_job_that_has_been_due_longest_over_all_queues(rules: RuleHarness) -> None:
    assert rules.state.oldest_due() is None
    rules.create("gone", queue="b")
    rules.create("z", queue="a")
    rules.create("y", queue="b")
    rules.accept(cmd.Cancel(id="gone"))

    def oldest() -> tuple[str, str]:
        found = rules.state.oldest_due()
        assert found is not None
        return found[0], found[1][3]

    assert oldest() == ("a", "z"), "of the same moment the first"
    rules.accept(cmd.Update(id="y", run_at=NOW - 1))
    assert oldest() == ("b", "y")
    rules.accept(cmd.Update(id="y", run_at=NOW + 1))
    rules.accept(cmd.Update(id="z", priority=5))  # its old position is empty
    assert oldest() == ("a", "z")


def test_a_backward_step_of_the_clock_delays_due_jobs(rules: RuleHarness) -> None:
    rules.create("a", expires_at=NOW + 10)
    rules.create("b", delay_ms=10)
    rules.create("c", delay_ms=10)
    rules.advance(10)
    assert rules.claim() == ["b"]
    assert list(rules.state.overdue()) == ["a"], "a claim leaves it to recovery"
    rules.create("d", expires_at=NOW + 20)
    rules.advance(10)
    assert (list(rules.state.overdue()), rules.state.next_run_at()) == (["a", "d"], None)
    rules.now = NOW + 9
    compare(rules.state, rules.rows, rules.moment)
    assert (list(rules.state.overdue()), rules.state.next_run_at(), rules.state.next_expiry()) == (
        [],
        NOW + 10,
        NOW + 10,
    )
    rules.now = NOW + 20
    compare(rules.state, rules.rows, rules.moment)
    assert list(rules.state.overdue()) == ["a", "d"]
    rules.now = NOW + 9
    assert rules.claim(limit=9) == ["a"]


def test_a_backward_step_reads_only_buckets_with_newly_due_jobs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state, buckets = State(), list[PriorityBucket]()
    next_run_at = PriorityBucket.next_run_at

    def counted(bucket: PriorityBucket, now: int) -> int | None:
        buckets.append(bucket)
        return next_run_at(bucket, now)

    monkeypatch.setattr(PriorityBucket, "next_run_at", counted)
    rows = {}
    for number in range(1, 1_001):
        state.advance(NOW + number, LockMs(0))
        job = rows[f"job-{number}"] = queued(number, run_at=NOW + number, options=Options("q", f"k-{number // 10}"))
        state.reindex(None, job)
    buckets.clear()
    state.advance(NOW + 999, LockMs(0))
    assert [bucket.name for bucket in buckets] == [("q", "k-100", 0)]
    state.reindex(
        None, queued(2_000, run_at=NOW + 5_000, options=Options("q", "later"))
    )  # its queue and kind do not hide the others
    buckets.clear()
    state.advance(NOW + 975, LockMs(0))
    assert {bucket.name[1] for bucket in buckets} == {"k-97", "k-98", "k-99", "k-100"}
    assert len(list(state.due(["q"], None))) == 975
    assert state.next_run_at() == NOW + 976


def test_overdue_jobs_that_a_clock_step_makes_due_again_wake_waiting_claims(rules: RuleHarness) -> None:
    rules.create("a", expires_at=NOW + 10, kind="k")
    rules.advance(10)
    announced: list[tuple[str, str]] = []
    rules.state.on_due = lambda queue, kind: announced.append((queue, kind))
    rules.advance(1)
    assert (announced, rules.claim()) == ([], [])
    rules.advance(-2)
    assert announced == [("default", "k")]
    assert rules.claim() == ["a"]


def test_advancing_time_does_not_read_every_job(rules: RuleHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(State, "_rewind", None)
    for now in (NOW, NOW, NOW + 1):
        rules.state.advance(now, LockMs(0))


def test_resuming_announces_every_due_kind(rules: RuleHarness) -> None:
    rules.create("a", kind="x")
    rules.create("b", kind="y")
    rules.accept(cmd.Pause(name="default"))
    rules.accept(cmd.Pause(name="empty"))
    announced: list[tuple[str, str]] = []
    rules.state.on_due = lambda queue, kind: announced.append((queue, kind))
    rules.accept(cmd.Resume(name="empty"))
    assert announced == []
    rules.accept(cmd.Resume(name="default"))
    assert set(announced) == {("default", "x"), ("default", "y")}


def test_heaps_do_not_grow_while_jobs_come_and_go(rules: RuleHarness) -> None:
    state = rules.state
    for number in range(1, 500):
        job = queued(number, run_at=NOW + number, expires_at=NOW + 1_000)
        state.reindex(None, job)
        taken = held(number, "w")
        state.reindex(job, taken)
        state.reindex(taken, None)
    for heap in (state._wakes, state.processing._deadlines):
        assert len(heap.entries) <= SLACK + 2
    assert not state._expiries
    compare(state, {}, rules.moment)


# -- workers ----------------------------------------------------------------------------------------------------------


def test_a_start_knows_which_grant_is_the_oldest() -> None:
    state = State.opened(OpenedStore(Numbers(), [held(1, "w-1"), replace(held(2, "w-2"), seq=3), queued(4)]))
    late = replace(held(9, "w-9"), seq=2, id="a job that was granted last")
    state = State.opened(OpenedStore(Numbers(), [late, *state.processing.values()]))
    assert list(state.processing) == ["job-1", "job-2", "a job that was granted last"]


def test_rolling_back_an_extension_restores_the_former_deadline() -> None:
    state = State()
    job = held(1, "w-1", expires=LockMs(500))
    assert job.deadlines is not None
    stays = replace(job, deadlines=replace(job.deadlines, stall_due=900))
    extended = replace(job, deadlines=replace(job.deadlines, expires=LockMs(99_000)))
    state.reindex(None, stays)
    state.advance(NOW, LockMs(600))
    assert list(state.processing.expired_locks) == ["job-1"]
    state.reindex(stays, extended)
    assert state.processing.next_deadline() == 99_000
    state.reindex(extended, stays)  # the disk was full, so nothing has happened
    assert list(state.processing.expired_locks) == ["job-1"]
    state.advance(NOW, LockMs(900))
    assert list(state.processing.stalled) == ["job-1"]


@pytest.mark.parametrize(
    ("before", "for_a_while", "sorted_into"),
    [
        (
            deadlines_at(500, 900),
            deadlines_at(800, 900),
            "expired_locks",
        ),  # its lock ends earlier again
        (
            deadlines_at(9_000, 100, 550),
            deadlines_at(9_000, 100, 9_500),
            "stalled",
        ),  # edited by hand: a lock beyond its progress timeout
    ],
)
def test_a_deadline_that_moves_back_takes_effect_at_once(
    before: LockDeadlines, for_a_while: LockDeadlines, sorted_into: str
) -> None:
    state = State()
    job = held(1, "w-1")
    stays, moved = replace(job, deadlines=before), replace(job, deadlines=for_a_while)
    state.reindex(None, moved)
    state.advance(NOW, LockMs(600))
    assert state.processing.live_locks() == 1
    state.reindex(moved, stays)
    assert list(getattr(state.processing, sorted_into)) == ["job-1"]
    assert state.processing.live_locks() == 0


def test_a_cleared_lock_that_is_revived_is_live_again(rules: RuleHarness) -> None:
    """Also if the job would be stuck before the new lock ends."""
    lock_id = rules.held(stall_after_ms=20 * MINUTE_MS)
    rules.recover(TTL)
    assert list(rules.state.processing.noted_expired) == ["a"]
    rules.progress(lock_id)
    assert (list(rules.state.processing.noted_expired), rules.state.processing.live_locks()) == ([], 1)


def test_a_row_without_a_lease_has_no_holder(rules: RuleHarness) -> None:
    state, job = State(), held(1, "w-1")
    state.reindex(None, job)
    state.advance(NOW, LockMs(500))
    assert list(state.processing.stalled) == ["job-1"]
    state.reindex(job, replace(job, deadlines=None))
    assert (list(state.processing.stalled), list(state.processing.without_deadlines)) == ([], ["job-1"])


def test_the_start_times_of_processing_jobs_are_summed() -> None:
    state = State()
    job = replace(held(1, "w-1"), created_at=NOW - 9)
    state.reindex(None, job)
    assert state.processing.started_sum == NOW
    state.reindex(job, replace(job, started_at=NOW + 2))
    assert state.processing.started_sum == NOW + 2
    state.reindex(replace(job, started_at=NOW + 2), replace(job, started_at=None))
    assert state.processing.started_sum == NOW - 9
    state.reindex(replace(job, started_at=None), None)
    assert state.processing.started_sum == 0


# -- all at once ------------------------------------------------------------------------------------------------------


def test_manually_edited_rows_do_not_break_the_counts(rules: RuleHarness) -> None:
    rules.row(queued(1, status="odd"))
    rules.row(queued(2, status="processing"))
    rules.row(replace(held(3, "w"), deadlines=None))
    compare(rules.state, rules.rows, rules.moment)
    assert (rules.state.processing.live_locks(), rules.state.total()) == (0, 2)
    for job_id in list(rules.rows):
        rules.state.reindex(rules.rows.pop(job_id), None)
    compare(rules.state, {}, rules.moment)


@pytest.mark.parametrize("status", ["odd", "complete", ""])
def test_an_unknown_status_breaks_nothing(rules: RuleHarness, status: str) -> None:
    job = rules.rows["job-1"] = queued(1, status=status, progress=101)
    rules.state.finished.keep(job)  # as read from the disk: no start has counted it
    rules.accept(cmd.RepairJobs(ids=[job.id]))
    assert (rules.job(job.id).status, rules.job(job.id).progress) == (status, 100)
    compare(rules.state, rules.rows, rules.moment)
    rules.accept(cmd.ForceReset(id=job.id))
    assert rules.job(job.id).status == "queued"
    compare(rules.state, rules.rows, rules.moment)


@pytest.mark.parametrize("seed", range(3))
def test_any_rows_in_any_order_match_a_recount(rules: RuleHarness, seed: int) -> None:
    """Rows are added, changed and removed without rules, as in a rollback or a start."""
    dice = random.Random(seed)
    for seq in range(300):
        known = list(rules.rows)
        if known and dice.random() < 0.5:
            job_id = dice.choice(known)
            rules.state.reindex(rules.rows.pop(job_id), None)
        else:
            shift = dice.randint(-20, 20)
            options = Options(queue=dice.choice("qr"), kind=dice.choice("kl"), priority=dice.randint(-1, 1))
            job = replace(
                dice.choice([queued(seq + 1), held(seq + 1, dice.choice("vw"), expires=rules.lock_ms + shift)]),
                options=options,
                run_at=rules.now + shift,
                expires_at=dice.choice([None, rules.now + dice.randint(-5, 20)]),
            )
            rules.row(job)
        if dice.random() < 0.3:
            rules.now += dice.randint(-15, 20)
            rules.lock_ms += dice.randint(0, 10)
        compare(rules.state, rules.rows, rules.moment)


def test_the_oldest_due_job_of_a_kind(rules: RuleHarness) -> None:
    assert rules.state.queued_kinds("film") == []
    assert rules.state.oldest_of_kind("film", "encode", rules.now) == (0, None)
    rules.create("oldest", queue="film", kind="encode", priority=1)
    rules.create("second", queue="film", kind="encode", priority=0)
    rules.advance(10)
    rules.create("first in line", queue="film", kind="encode", priority=-1)
    rules.create("later", queue="film", kind="mail", delay_ms=1_000)
    assert rules.state.queued_kinds("film") == ["encode", "mail"]
    buckets, entry = rules.state.oldest_of_kind("film", "encode", rules.now)
    assert (buckets, entry and entry[3]) == (3, "oldest")
    assert rules.state.oldest_of_kind("film", "mail", rules.now) == (1, None)
    assert rules.state.oldest_of_kind("film", "none", rules.now) == (0, None)


def test_of_jobs_due_at_the_same_time_the_first_one_created_is_the_oldest(rules: RuleHarness) -> None:
    rules.create("later", kind="encode", priority=0, delay_ms=MINUTE_MS)
    rules.create("older", kind="encode", priority=9)
    rules.create("newer", kind="encode", priority=0)
    rules.create("due before", kind="mail", priority=0, delay_ms=5)
    rules.create("due after", kind="mail", priority=9, delay_ms=4)
    rules.advance(5)
    oldest = {kind: rules.state.oldest_of_kind("default", kind, rules.now)[1] for kind in ("encode", "mail")}
    assert [entry and entry[3] for entry in oldest.values()] == ["older", "due after"]


def test_a_job_whose_run_at_is_now_is_due(rules: RuleHarness) -> None:
    rules.held("held")
    rules.create("queued")
    assert list(rules.state.not_due(rules.now)) == []
    assert [job.id for job in rules.state.not_due(rules.now - 1)] == ["queued", "held"]


SHORT = PackedJob(1, "a", Options(), 1_000)
WHOLE = Job(2, "b", Options(), "processing", 1_000, 1_000, 1_000)


@pytest.fixture
def jobs() -> LiveJobs:
    jobs = LiveJobs({})
    jobs.keep_packed(SHORT)
    jobs.keep(WHOLE)
    return jobs


def test_live_jobs_are_a_mapping_of_expanded_jobs(jobs: LiveJobs) -> None:
    assert jobs == {"a": SHORT.expand(), "b": WHOLE}
    assert (len(jobs), list(jobs), "a" in jobs, "b" in jobs, "c" in jobs) == (2, ["a", "b"], True, True, False)
    assert (jobs.find("a"), jobs.find("b"), jobs.find("c")) == (SHORT.expand(), WHOLE, None)
    with pytest.raises(KeyError):
        jobs["c"]
    assert set(jobs.touched()) == {"b"}


def test_a_changed_job_is_no_longer_compact(jobs: LiveJobs) -> None:
    assert jobs.waits(SHORT)
    assert not jobs.waits(replace(SHORT))  # an equal object is another entry
    jobs.keep(replace(SHORT.expand(), attempt=1))
    assert not jobs.waits(SHORT)
    assert (len(jobs), jobs["a"].attempt, set(jobs.touched())) == (2, 1, {"a", "b"})


def test_a_job_that_is_added_again_is_stored_in_one_form(jobs: LiveJobs) -> None:
    again = PackedJob(3, "b", Options(), 2_000)
    jobs.keep_packed(again)
    assert (jobs["b"], jobs.waits(again), len(jobs), set(jobs.touched())) == (again.expand(), True, 2, set())


def test_a_job_is_removed_in_either_form(jobs: LiveJobs) -> None:
    for job_id in ("a", "b", "c"):
        jobs.drop(job_id)
    assert (len(jobs), jobs.waits(SHORT)) == (0, False)
