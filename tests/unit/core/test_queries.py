"""Reads: one job, lists, queues, workers, locks, stats."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from jobd.core import views
from jobd.model import commands as cmd
from jobd.model.errors import ApiError
from jobd.model.job import MINUTE_MS, STATUSES
from jobd.model.responses import (
    AuditPage,
    EmptyResponse,
    ExportPage,
    HistoryRead,
    JobPage,
    LateResultList,
    OldestDue,
    QueueList,
    Response,
    TimelineView,
    ValidateJobView,
    Validation,
)
from tests.support.rule_harness import NOW, RuleHarness

TTL = 15 * MINUTE_MS
PROGRESS_TIMEOUT = 30 * MINUTE_MS


# -- reads and the daemon's own ---------------------------------------------------------------------------------------


def test_reads_change_nothing(rules: RuleHarness) -> None:
    lock_id = rules.held()
    of_job = (cmd.Get, cmd.GetVersion, cmd.Timeline, cmd.Why, cmd.Validate)
    of_all = (cmd.ListJobs, cmd.Queues, cmd.Workers, cmd.Stats, cmd.Locks, cmd.Export, cmd.Ping, cmd.Tick)
    for command in (*(kind(id="a") for kind in of_job), *(kind() for kind in of_all)):
        decision = rules.decide(command)
        assert not isinstance(decision.answer, ApiError)
        assert not decision.changes
        assert lock_id not in str(decision.answer)


def test_events_of_operators_have_their_reason(rules: RuleHarness) -> None:
    lock_id = rules.held("a")
    rules.create("b", delay_ms=1_000)
    rules.accept(cmd.ExtendLock(id="a", lock_id=lock_id, reason="r1"), admin=True)
    rules.accept(cmd.ReleaseLock(id="a", lock_id=lock_id, reason="r2"), admin=True)
    rules.accept(cmd.RunNow(id="b", reason="r3"), admin=True)
    rules.accept(cmd.Cancel(id="b"), admin=True)
    rules.accept(cmd.Delete(id="b", reason="r4"), admin=True)
    rules.accept(cmd.Pause(name="q", reason="r5"), admin=True)
    rules.accept(cmd.Resume(name="q", reason="r6"), admin=True)
    reasons = [event.reason for event in rules.events if event.reason is not None]
    assert reasons == ["r1", "r2", "r3", "r4", "r5", "r6"]


@pytest.mark.parametrize(
    ("command", "empty", "read"),
    [
        (cmd.Timeline(id="a"), TimelineView([]), HistoryRead(timeline=1)),
        (cmd.Timeline(id="a", limit=7), TimelineView([]), HistoryRead(timeline=1, events=7)),
        (cmd.LateResults(id="a"), LateResultList([]), HistoryRead(late=1)),
        (cmd.ListJobs(status="failed"), JobPage([], None), HistoryRead(page=cmd.ListJobs(status="failed"))),
        (cmd.Export(status="failed"), ExportPage([], None), HistoryRead(export=cmd.Export(status="failed"))),
        (cmd.AuditLog(limit=7), AuditPage([], None), HistoryRead(audit=cmd.AuditLog(limit=7))),
    ],
)
def test_history_is_read_after_the_decision(rules: RuleHarness, command: Any, empty: Any, read: HistoryRead) -> None:
    rules.create()
    assert rules.ask(command, admin=True) == Response(empty, read=read)


def test_validate_shows_the_job_to_admins(rules: RuleHarness) -> None:
    rules.create()
    assert rules.accept(cmd.Validate(id="a")).is_valid
    shown = rules.ask(cmd.Validate(id="a"), admin=True)
    assert not isinstance(shown, ApiError)
    job = views.job_view(rules.job(), rules.moment, rules.policy, admin=True)
    assert shown.data == ValidateJobView("a", job, Validation(is_valid=True, issues=[], can_proceed=True), NOW)
    assert shown.unread_payloads == [(1, shown.data.job)]


def test_the_lists_of_operators(rules: RuleHarness) -> None:
    lock_id = rules.held("a", queue="q")
    rules.create("b", queue="q")
    rules.completed("c")
    rules.accept(cmd.Pause(name="empty"))
    rules.advance(1_500)
    names = [(queue.name, queue.paused, queue.queued, queue.processing, queue.completed, queue.oldest_due_at)
             for queue in rules.accept(cmd.Queues()).queues]  # fmt: skip
    assert names == [
        ("default", False, 0, 0, 1, None),
        ("empty", True, 0, 0, 0, None),
        ("q", False, 1, 1, 0, NOW),
    ]
    assert [(worker.worker, worker.jobs, worker.held) for worker in rules.accept(cmd.Workers()).workers] == [
        ("w-1", ["a"], 1)
    ]
    (lock,) = rules.accept(cmd.Locks(), admin=True).locks
    assert (lock.id, lock.worker, lock.lock_id, lock.live) == ("a", "w-1", lock_id, True)
    assert (lock.expires_at, lock.progress_due_at, lock.stalled_at) == (NOW + TTL, NOW + PROGRESS_TIMEOUT, NOW + TTL)
    stats = rules.accept(cmd.Stats())
    assert (stats.total_jobs, stats.by_status["processing"], stats.by_status["completed"]) == (3, 1, 1)
    assert (stats.stuck_jobs, stats.locked_jobs, stats.average_processing_time) == (0, 1, 1.5)
    assert (stats.oldest_processing_job.id, stats.oldest_processing_job.age) == ("a", 1.5)
    assert views.oldest_due(rules.state) == OldestDue("b", "q", NOW)


def test_the_job_that_has_been_due_longest_is_found_over_all_queues(rules: RuleHarness) -> None:
    rules.create("later", queue="a", delay_ms=5_000, priority=-1)
    rules.create("b-1", queue="b")
    rules.create("c-1", queue="c")
    assert views.oldest_due(rules.state) == OldestDue("b-1", "b", NOW), "of the same moment the first"
    rules.advance(5_000)
    rules.held("b-1", queue="b")
    rules.accept(cmd.Pause(name="c"))
    waits = OldestDue("c-1", "c", NOW, rules.state.paused["c"].describe())
    assert views.oldest_due(rules.state) == waits, "it waits, though its queue is paused"
    rules.accept(cmd.Start(id="later", worker="w"))
    rules.accept(cmd.Cancel(id="c-1"))
    assert views.oldest_due(rules.state) is None


def read_pages(rules: RuleHarness, command: Any) -> list[Any]:
    """Return all pages that begin with that of `command`."""
    pages = [rules.accept(command)]
    while (cursor := pages[-1].next_cursor) is not None:
        pages.append(rules.accept(replace(command, cursor=cursor)))
    return pages


def test_queues_are_listed_in_pages_by_name(rules: RuleHarness) -> None:
    for name in "dbeca":
        rules.create(f"job-{name}", queue=name)
    for name in "bdz":
        rules.accept(cmd.Pause(name=name))
    query = {None: "abcdez", True: "bdz", False: "ace"}
    for paused, names in query.items():
        assert "".join(queue.name for queue in rules.accept(cmd.Queues(paused=paused)).queues) == names
        for limit in (1, 2, 3, 6):
            pages = read_pages(rules, cmd.Queues(paused=paused, limit=limit))
            assert ["".join(queue.name for queue in page.queues) for page in pages] == [
                names[at : at + limit] for at in range(0, len(names), limit)
            ]
    assert [queue.name for queue in rules.accept(cmd.Queues(cursor="d")).queues] == ["e", "z"]
    assert rules.accept(cmd.Queues(cursor="z", limit=1)) == QueueList([])


def test_the_busiest_queues_are_listed_first_on_request(rules: RuleHarness) -> None:
    for name, waiting, done in (("a", 0, 9), ("b", 1, 0), ("c", 3, 0), ("d", 2, 0), ("e", 1, 0)):
        for number in range(waiting):
            rules.create(f"{name}-{number}", queue=name)
        for number in range(done):
            rules.create(f"{name}-done-{number}", queue=name)
            rules.accept(cmd.Cancel(id=f"{name}-done-{number}"))
    rules.accept(cmd.Pause(name="A"))
    rules.accept(cmd.Start(id="d-0", worker="w"))

    def found(**query: Any) -> tuple[str, str | None]:
        page = rules.accept(cmd.Queues(busiest=True, **query))
        return " ".join(queue.name for queue in page.queues), page.next_cursor

    assert found() == ("c d b e A a", None), "nobody waits in either of the last"
    assert found(limit=2) == ("c d", None)
    assert found(limit=6) == ("c d b e A a", None)
    assert found(limit=3, cursor="b") == ("c d e", None)
    assert found(paused=False, limit=4) == ("c d b e", None)


def test_workers_are_listed_in_pages_latest_first(rules: RuleHarness) -> None:
    for number in range(6):
        rules.advance(number % 2)  # some spoke at the same moment
        rules.held(f"job-{number}", worker=f"w {number}")
    everybody = [worker.worker for worker in rules.accept(cmd.Workers()).workers]
    assert everybody == ["w 5", "w 3", "w 4", "w 1", "w 2", "w 0"]
    for limit in (1, 2, 4, 6):
        pages = read_pages(rules, cmd.Workers(limit=limit))
        assert [[worker.worker for worker in page.workers] for page in pages] == [
            everybody[at : at + limit] for at in range(0, 6, limit)
        ]


def test_a_worker_with_many_jobs_lists_the_first_and_counts_all(rules: RuleHarness) -> None:
    rules.accept(cmd.Bulk(jobs=[cmd.Create(id=f"job-{number:03}") for number in range(130)]))
    rules.accept(cmd.Claim(worker="w", limit=100))
    rules.accept(cmd.Claim(worker="w", limit=30))
    [worker] = rules.accept(cmd.Workers()).workers
    assert worker.jobs == [f"job-{number:03}" for number in range(100)]
    assert worker.held == 130


def test_locks_are_listed_in_pages_oldest_first(rules: RuleHarness) -> None:
    for number in range(5):
        rules.held(f"job-{number}")
    pages = read_pages(rules, cmd.Locks(limit=2))
    assert [[lock.id for lock in page.locks] for page in pages] == [["job-0", "job-1"], ["job-2", "job-3"], ["job-4"]]
    last = rules.accept(cmd.Locks(limit=5))
    assert (len(last.locks), last.next_cursor) == (5, None)
    assert rules.accept(cmd.Locks(cursor=str(last.locks[2].fencing_token))).locks == last.locks[3:]
    assert rules.accept(cmd.Locks(limit=3)).next_cursor == str(last.locks[2].fencing_token)
    assert rules.accept(cmd.Locks(limit=1, cursor=str(last.locks[4].fencing_token))).locks == []


def test_stats_of_an_empty_store(rules: RuleHarness) -> None:
    stats = rules.accept(cmd.Stats())
    assert (stats.total_jobs, stats.average_processing_time, stats.oldest_processing_job) == (0, 0.0, None)
    assert stats.by_status == dict.fromkeys(STATUSES, 0)


def test_rows_without_started_at_do_not_affect_the_average(rules: RuleHarness) -> None:
    rules.create()
    rules.advance(2_000)
    rules.row(replace(rules.job(), status="processing"))
    stats = rules.accept(cmd.Stats())
    assert (stats.average_processing_time, stats.oldest_processing_job.age) == (2.0, 2.0)
    assert (stats.locked_jobs, stats.stuck_jobs) == (0, 0)
    assert rules.accept(cmd.Locks()).locks == []


def test_reports_and_ticks_are_accepted(rules: RuleHarness) -> None:
    assert rules.accept(cmd.Report(body=b"{}")) == EmptyResponse()
    assert rules.accept(cmd.Tick()) == rules.accept(cmd.Ping()) == EmptyResponse()
