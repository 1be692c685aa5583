"""Why a job is where it is: the state, the reason, what happens next and when, what to do."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from jobd.core.explain import ending, explain
from jobd.model.commands import (
    Adopt,
    Cancel,
    Claim,
    Complete,
    Fail,
    ForceFail,
    Import,
    Pause,
    Recover,
    Release,
    Transition,
    Updates,
    Why,
)
from jobd.model.events import QueuePause
from jobd.model.job import DAY_MS, HOUR_MS, MINUTE_MS
from jobd.model.responses import HistoryRead, NextEvent, Response, WhyView
from tests.support.rule_harness import NOW, RuleHarness

TTL = 15 * MINUTE_MS


@pytest.fixture
def desk() -> RuleHarness:
    return RuleHarness()


def why(desk: RuleHarness, job_id: str = "a") -> WhyView:
    view: WhyView = desk.accept(Why(id=job_id))
    return view


def at_and_rule(view: WhyView) -> tuple[Any, ...]:
    assert view.next is not None
    assert view.next.what.endswith(".")
    return view.next.at, view.next.rule


def test_waiting_for_a_worker(desk: RuleHarness) -> None:
    desk.create("a", queue="q", kind="k")
    desk.create("b", queue="q", kind="k")
    desk.advance(5_000)
    view = why(desk)
    assert (view.state, view.blocked_by) == ("queued", "no worker")
    since = "no worker has claimed queue `q` since the start at 22:13 UTC"
    assert view.because == f"It has been due for 5 s: {since}. It is the next of its kind."
    assert at_and_rule(view) == (None, "claim")
    assert view.do == ["List the workers: jobctl workers", "Start a worker: jobctl run --queue q -- CMD"]
    assert "Other jobs come first." in why(desk, "b").because


def clause(desk: RuleHarness, job_id: str = "a") -> str:
    """Return what `why` says about the workers that could take a due job."""
    return why(desk, job_id).because.partition(": ")[2].partition(". ")[0]


def claims(desk: RuleHarness, worker: str, kinds: str | None = None, queue: str = "q", *, waits: bool = False) -> None:
    command = Claim(worker=worker, queues=[queue], kinds=None if kinds is None else kinds.split(","))
    (desk.book.presence.waits if waits else desk.book.presence.asks)(command)


def test_a_start_long_ago_has_its_date(desk: RuleHarness) -> None:
    desk.create(queue="q")
    desk.advance(12 * HOUR_MS)
    assert clause(desk) == "no worker has claimed queue `q` since the start at 2023-11-14 22:13 UTC"


def test_since_when_claims_are_remembered_if_some_were_forgotten(desk: RuleHarness) -> None:
    desk.create(queue="q")
    desk.book.presence._names_kept = 0
    claims(desk, "w-1", queue="r")
    desk.advance(3 * MINUTE_MS)
    claims(desk, "w-2", queue="s")
    claims(desk, "w-3", queue="t")
    assert clause(desk) == "no worker has claimed queue `q` since 22:13 UTC"
    desk.book.presence._names_kept = 0
    claims(desk, "w-4", queue="u")
    assert clause(desk) == "no worker has claimed queue `q` since 22:16 UTC"


def test_workers_that_take_other_kinds_only(desk: RuleHarness) -> None:
    desk.create(queue="q", kind="crop")
    claims(desk, "claims-1", "scale")
    claims(desk, "idle-1", "resize", waits=True)
    view = why(desk)
    since = "no worker has claimed kind `crop` of this queue since the start at 22:13 UTC"
    others = "idle-1 waits on this queue but takes only: resize (1 more takes other kinds)"
    assert clause(desk) == f"{others}; {since}"
    assert (view.blocked_by, at_and_rule(view)) == ("no worker of its kind", (None, "claim"))
    desk.create("none", queue="q")
    assert "no worker has claimed jobs without a kind of this queue" in clause(desk, "none")
    claims(desk, "w", "a,b,c,d,", "r")
    desk.create("r", queue="r", kind="z")
    assert clause(desk, "r").startswith("w claims this queue but takes only: a, b, c and 2 more; ")
    claims(desk, "v", "", "s")
    desk.create("s", queue="s", kind="z")
    assert clause(desk, "s").startswith("v claims this queue but takes only: jobs without a kind; ")


def test_workers_of_other_kinds_that_are_gone_do_not_count(desk: RuleHarness) -> None:
    desk.create(queue="q", kind="crop")
    claims(desk, "w-1", "resize")
    desk.advance(5 * MINUTE_MS)
    assert clause(desk) == "no worker has claimed kind `crop` of queue `q` since the start at 22:13 UTC"
    assert why(desk).blocked_by == "no worker"


def test_all_workers_are_busy(desk: RuleHarness) -> None:
    desk.create("a", queue="q")
    for number in range(4):
        desk.held(f"job-{number}", worker=f"w-{number}", queue="q")
        claims(desk, f"w-{number}")
        desk.advance(MINUTE_MS)
    view = why(desk)
    assert clause(desk) == "all 4 workers of this queue are busy, the longest for 4 min"
    assert (view.blocked_by, at_and_rule(view)) == ("no free worker", (None, "claim"))
    assert view.do == ["List the workers: jobctl workers", "Start a worker: jobctl run --queue q -- CMD"]


def test_a_busy_worker_that_is_silent_is_named(desk: RuleHarness) -> None:
    desk.create("a", queue="q")
    desk.held("b", worker="w 1", queue="q", stuck_after_ms=HOUR_MS)
    claims(desk, "w 1")
    desk.advance(TTL)
    view = why(desk)
    assert clause(desk) == (
        "w 1, the only worker of this queue, has been busy for 15 min; silent, with an expired lock: w 1"
    )
    assert view.do[1] == "Take the jobs of w 1 back: jobctl take-back 'w 1'"


def test_no_worker_waits_but_one_claimed_lately(desk: RuleHarness) -> None:
    desk.create(queue="q")
    claims(desk, "worker-1")
    desk.advance(40_000)
    view = why(desk)
    assert clause(desk) == "no worker is waiting now; worker-1 claimed this queue 40 s ago"
    assert (view.blocked_by, at_and_rule(view)) == ("no waiting worker", (None, "claim"))
    claims(desk, "worker-2")
    assert clause(desk) == ("no worker is waiting now; worker-2 claimed this queue 0 ms ago; 1 more is idle")


def test_a_worker_waits(desk: RuleHarness) -> None:
    """While the disk is full a claim may wait although a job is due."""
    desk.create(queue="q")
    claims(desk, "w-1", waits=True)
    view = why(desk)
    assert (clause(desk), view.blocked_by) == ("a worker waits for such jobs", None)
    assert at_and_rule(view) == (NOW, "claim")


def test_the_workers_of_the_queue_are_gone_or_claim_another(desk: RuleHarness) -> None:
    desk.create(queue="q")
    claims(desk, "w-1")
    claims(desk, "w-2")
    desk.advance(12 * MINUTE_MS)
    view = why(desk)
    assert clause(desk) == "no worker claims this queue any more; the last claim was 12 min ago, by w-1, which is gone"
    assert view.blocked_by == "no worker"
    for worker in ("w-1", "w-2"):
        claims(desk, worker, queue="other")
    assert clause(desk) == "no worker claims this queue any more; the last claim was 12 min ago"


def test_an_expiry_comes_before_the_claim_that_may_never_come(desk: RuleHarness) -> None:
    desk.create(expires_at=NOW + 7)
    assert at_and_rule(why(desk)) == (NOW + 7, "expires_at")


@pytest.mark.parametrize("paused", [False, True])
def test_one_that_nobody_wants_any_more_waits_for_nothing_but_its_end(desk: RuleHarness, paused: bool) -> None:
    desk.create("a", queue="q", expires_at=NOW + 10)
    if paused:
        desk.accept(Pause(name="q"), admin=True)
    desk.advance(5_010)
    view = why(desk)
    assert view.because == "Its expires_at passed 5 s ago, so no worker gets it any more."
    assert (at_and_rule(view), view.blocked_by) == ((NOW + 5_010, "expires_at"), "expires_at")
    assert view.state == "queued"
    assert view.do == ["If it is still needed: jobctl force-reset a"]


def test_a_suspect_clock_fails_no_job_by_age(desk: RuleHarness) -> None:
    desk.create(expires_at=NOW + MINUTE_MS)
    desk.advance(HOUR_MS)
    view = explain(desk.job(), desk.book, replace(desk.moment, trusted=NOW), desk.policy)
    assert view.because.endswith("The wall clock is suspect, so recovery does not fail it.")
    assert (view.next, view.blocked_by) == (None, "clock")


def test_not_due(desk: RuleHarness) -> None:
    desk.create(delay_ms=3 * MINUTE_MS)
    view = why(desk)
    assert (view.state, view.blocked_by) == ("queued", "run_at")
    assert at_and_rule(view) == (NOW + 3 * MINUTE_MS, "run_at")
    assert "3 min" in view.because
    assert view.do == ["Run it now: jobctl run-now a"]


def test_paused(desk: RuleHarness) -> None:
    desk.create()
    desk.accept(Pause(name="default"), by="admin:ana")
    view = why(desk)
    assert (view.state, view.blocked_by, view.next) == ("queued", "queue_paused", None)
    paused = "Queue default is paused by operator ana at 2023-11-14 22:13 UTC, until resumed: no reason given."
    assert view.because == f"{paused} None of its jobs is granted."
    assert view.do == [
        "If operator ana no longer needs the pause: jobctl resume default. The pause has no reason; ask first."
    ]
    desk.create("b", expires_at=NOW + 9)
    assert at_and_rule(why(desk, "b")) == (NOW + 9, "expires_at")


def test_a_pause_that_ends_by_itself_is_what_happens_next(desk: RuleHarness) -> None:
    desk.create()
    desk.create("b", expires_at=NOW + MINUTE_MS)
    desk.accept(Pause(name="default", reason="deploy", until=NOW + HOUR_MS), by="admin")
    view = why(desk)
    assert at_and_rule(view) == (NOW + HOUR_MS, "pause")
    assert "paused by an operator at 2023-11-14 22:13 UTC, until 2023-11-14 23:13 UTC: deploy." in view.because
    assert view.do == ["If an operator no longer needs the pause: jobctl resume default. Reason of the pause: deploy"]
    assert at_and_rule(why(desk, "b")) == (NOW + MINUTE_MS, "expires_at")


def test_a_pause_of_an_older_store_says_that_its_origin_is_unknown(desk: RuleHarness) -> None:
    desk.create()
    desk.book.set_paused("default", QueuePause())
    view = why(desk)
    assert "paused since an unknown time, until resumed: no reason given." in view.because
    assert view.do[0].startswith("If the operator who paused it no longer needs the pause:")


def test_what_brought_it_back(desk: RuleHarness) -> None:
    lock_id = desk.held(max_attempts=2)
    desk.accept(Release(id="a", lock_id=lock_id))
    assert why(desk).because.endswith("Its last grant, to worker w-1, ended by release.")
    desk.accept(Fail(id="a", lock_id=desk.start(), error_message="out of memory", retry_after_ms=0))
    assert why(desk).because.endswith("Its last attempt failed: out of memory")
    desk.accept(Import(id="b", error_code="E"))  # an error without a word
    assert why(desk, "b").because.endswith("Other jobs come first.")


def test_in_the_hands_of_a_worker(desk: RuleHarness) -> None:
    lock_id = desk.held(worker="w-7")
    desk.progress(lock_id, 45)
    desk.advance(MINUTE_MS)
    view = why(desk)
    assert (view.state, view.blocked_by) == ("processing", None)
    assert view.because.startswith("Worker w-7 has held it for 60 s, at 45 %. Its lock is live for another 14 min")
    assert at_and_rule(view) == (NOW + TTL, "stuck_after")  # stuck at the very moment of the expiry
    assert "jobctl force-reset a" in view.do[1]


def test_a_lock_that_expires_before_the_job_is_stuck(desk: RuleHarness) -> None:
    desk.held(stuck_after_ms=20 * MINUTE_MS)
    assert at_and_rule(why(desk)) == (NOW + TTL, "lock expiry")
    desk.advance(TTL)
    view = why(desk)
    assert view.because.startswith("Worker w-1 has held it for 15 min, at 0 %. Its lock has expired")
    assert at_and_rule(view) == (NOW + 20 * MINUTE_MS, "stuck_after")
    desk.accept(Recover(limit=1))
    assert at_and_rule(why(desk)) == (NOW + 20 * MINUTE_MS, "stuck_after")
    desk.advance(5 * MINUTE_MS)
    assert at_and_rule(why(desk)) == (desk.now, "recovery")


def test_the_next_cleanup_run_is_named_if_recovery_is_left_to_it(desk: RuleHarness) -> None:
    desk.held(stuck_after_ms=20 * MINUTE_MS)
    desk.create("late", queue="q", expires_at=NOW + MINUTE_MS)
    desk.book.next_cleanup_at = NOW + 45 * MINUTE_MS
    view = why(desk)
    assert at_and_rule(view) == (NOW + TTL, "lock expiry")
    desk.advance(TTL)
    view = why(desk)
    assert view.next is not None
    assert view.next.what.startswith("It counts as stuck and is recovered by the next cleanup run after that, unless")
    assert at_and_rule(why(desk, "late")) == (NOW + 45 * MINUTE_MS, "expires_at")
    desk.advance(5 * MINUTE_MS)
    view = why(desk)
    assert view.next is not None
    assert view.next.what == (
        "The next cleanup run (recover_every is 0) ends its grant: on_stall puts it back into its queue or fails it."
    )
    assert at_and_rule(view) == (NOW + 45 * MINUTE_MS, "cleanup")
    desk.advance(HOUR_MS)
    assert at_and_rule(why(desk)) == (desk.now, "cleanup"), "it is due now"


def test_the_worker_of_an_expired_lock_is_silent(desk: RuleHarness) -> None:
    desk.held(stuck_after_ms=20 * MINUTE_MS, worker="w 7")
    assert not any("take-back" in each for each in why(desk).do)
    desk.advance(TTL)
    for _ in range(2):
        view = why(desk)
        assert "Its lock has expired: the worker is silent. It may still end the job or report." in view.because
        assert view.do[1] == "Take its expired jobs back now: jobctl take-back 'w 7'"
        desk.accept(Recover(limit=1))


def test_past_the_ceiling_nobody_is_told_to_report(desk: RuleHarness) -> None:
    desk.held(max_processing_ms=TTL)
    desk.advance(TTL)
    because = why(desk).because
    assert because.startswith("Worker w-1 has held it for ")
    assert "can no longer report progress" in because


def test_the_ceiling_is_named(desk: RuleHarness) -> None:
    desk.held(stuck_after_ms=HOUR_MS, max_processing_ms=TTL + 1)
    desk.advance(TTL)
    view = why(desk)
    assert at_and_rule(view) == (NOW + TTL + 1, "max_processing")
    assert view.next is not None
    assert view.next.what.endswith("unless worker w-1 reports progress or ends it."), (
        "more time for the lock is no help"
    )


def test_the_ceiling_that_holds_is_that_of_the_grant(desk: RuleHarness) -> None:
    desk.create("a")
    lock_id = desk.start("a", max_processing_ms=0)
    assert why(desk).because.endswith(" This grant has no ceiling (max_processing_ms 0).")
    desk.accept(Release(id="a", lock_id=lock_id))
    desk.start("a", max_processing_ms=40 * MINUTE_MS)
    desk.advance(MINUTE_MS)
    assert why(desk).because.endswith(" Its ceiling is in 39 min (max_processing_ms 2400000); progress moves it.")
    desk.advance(39 * MINUTE_MS)
    assert "ceiling" not in why(desk).because


def test_a_job_that_is_released_again_and_again(desk: RuleHarness) -> None:
    desk.create()

    def release(**fields: Any) -> str:
        lock_id = desk.start(worker="w-7")
        desk.accept(Release(id="a", lock_id=lock_id, **fields))
        return why(desk).because

    for _ in range(4):
        assert release().endswith("Its last grant, to worker w-7, ended by release.")
    assert release() == (
        "It is not due for another 1 s. It was released 5 times in a row without progress. "
        "Its last grant, to worker w-7, ended by release."
    )
    view = why(desk)
    assert view.next == NextEvent("The next worker gets it.", desk.now + 1_000, "release delay")
    assert view.do[0] == "Find out why its workers release it; w-7 was the last."
    desk.advance(1_000)
    assert " It was released 6 times in a row without progress. Its last grant" in release(delay_ms=0)
    assert why(desk).do[0] == "Find out why its workers release it; w-7 was the last."
    desk.row(replace(desk.job(), ended=None))  # a row that was edited
    assert why(desk).because.endswith("It was released 6 times in a row without progress.")
    assert "release" not in why(desk).do[0]
    lock_id = desk.start()
    assert why(desk).because.endswith("It was released 6 times in a row without progress before this grant.")
    desk.progress(lock_id, 1)
    assert "released" not in why(desk).because


def test_a_row_of_releases_does_not_hide_an_expiry(desk: RuleHarness) -> None:
    desk.create(expires_at=NOW + 500)
    for _ in range(5):
        desk.accept(Release(id="a", lock_id=desk.start()))
    assert at_and_rule(why(desk)) == (NOW + 500, "expires_at")


def test_a_processing_row_that_nobody_holds(desk: RuleHarness) -> None:
    desk.held()
    whole = desk.job()
    desk.row(replace(whole, grant=None, lease=None))
    view = why(desk)
    assert (view.state, view.blocked_by, at_and_rule(view)) == ("processing", None, (NOW, "validation"))
    assert view.because.startswith("The row says processing, but no worker holds the job.")
    assert view.do == ["Start a cleanup run: jobctl cleanup"]
    for half in ({"grant": None}, {"lease": None}):
        desk.row(replace(whole, **half))
        assert why(desk) == view


def test_finished(desk: RuleHarness) -> None:
    desk.completed()
    view = why(desk)
    assert (view.state, view.because, view.do) == ("completed", "It was completed; that is final.", [])
    assert at_and_rule(view) == (NOW + 7 * DAY_MS, "retention")
    desk.advance(8 * DAY_MS)
    assert at_and_rule(why(desk)) == (desk.now, "retention")
    desk.accept(Fail(id="b", lock_id=desk.held("b"), error_message="boom"))
    view = why(desk, "b")
    assert (view.state, view.because, view.blocked_by) == ("failed", "It failed: boom", None)
    assert view.do == ["Fix the cause, then run it again: jobctl force-reset b"]
    assert at_and_rule(view) == (desk.now + 30 * DAY_MS, "retention")
    desk.create("c")
    desk.accept(Cancel(id="c"))
    view = why(desk, "c")
    assert (view.state, view.because, view.blocked_by) == ("cancelled", "It was cancelled.", None)
    assert view.do == ["If it is needed after all: jobctl force-reset c"]
    assert at_and_rule(view) == (desk.now + 7 * DAY_MS, "retention")


@pytest.mark.parametrize(
    ("command", "by", "said"),
    [
        (Cancel(id="a", reason="Not wanted."), "admin:ana", "It was cancelled by operator ana: Not wanted."),
        (Cancel(id="a"), "client", "It was cancelled by a client."),
        (Cancel(id="a"), "admin", "It was cancelled by an operator."),
        (ForceFail(id="a", reason="hangs"), "admin:ana", "It was failed by operator ana: hangs."),
        (ForceFail(id="a"), "admin:ana", "It was failed by operator ana."),
        (Cancel(id="a", reason=""), "admin:ana", "It was cancelled by operator ana."),
        (Cancel(id="a"), "importer", "It was cancelled by importer."),
        (Transition(id="a", from_="queued", to="failed"), "admin", "It was failed by an operator."),
        (Transition(id="a", from_="queued", to="failed", updates=Updates(error_message="no disk"), reason="swap"),
         "admin:ana", "It was failed by operator ana: swap. Its error: no disk"),
        (Transition(id="a", from_="queued", to="cancelled", reason="twice"),
         "admin:ana", "It was cancelled by operator ana: twice."),
        (Import(id="b", status="failed", error_message="m"), "admin:x",
         "It was imported as failed by operator x. Its error: m"),
        (Import(id="b", status="completed"), "admin", "It was imported as completed by an operator; that is final."),
    ],
)  # fmt: skip
def test_by_whom_it_was_ended_and_why(desk: RuleHarness, command: Any, by: str, said: str) -> None:
    desk.create()
    desk.accept(command, by=by)
    answer = desk.ask(Why(id=command.id))
    assert isinstance(answer, Response)
    assert answer.read == HistoryRead(ended=desk.job(command.id))
    assert ending(desk.job(command.id), desk.events) == said


def test_by_which_worker_it_was_ended(desk: RuleHarness) -> None:
    desk.completed()
    assert ending(desk.job(), desk.events) == "It was completed by worker w-1; that is final."
    desk.accept(Fail(id="b", lock_id=desk.held("b"), error_message="boom"), by="worker:w-1")
    assert ending(desk.job("b"), desk.events) == "It failed at worker w-1: boom"


def test_what_comes_after_the_end_ended_nothing(desk: RuleHarness) -> None:
    """A late result, and who adopted it."""
    lock_id = desk.held()
    desk.accept(Cancel(id="a", reason="stop"), by="admin:ana")
    desk.reject(Complete(id="a", lock_id=lock_id, file_path="/out"), "lock_lost", by="worker:w-1")
    assert desk.events[-1].type == "late_result"
    assert ending(desk.job(), desk.events) == "It was cancelled by operator ana: stop."
    assert ending(desk.job(), desk.events[-1:]) == "It was cancelled."
    desk.accept(Adopt(id="a", reason="It is good."), by="admin:bob")
    adopted = "It was completed with a late result of worker w-1 by operator bob: It is good; that is final."
    assert ending(desk.job(), desk.events) == adopted


def test_of_a_stall_the_message_says_all(desk: RuleHarness) -> None:
    desk.held(on_stall="fail", stuck_after_ms=0)
    desk.advance(HOUR_MS)
    desk.accept(Recover(limit=9), by="recovery")
    assert ending(desk.job(), desk.events) == why(desk).because
    assert why(desk).because.startswith("It failed: Worker w-1 reported no progress for 30 min")


def test_only_of_finished_jobs_the_timeline_is_asked(desk: RuleHarness) -> None:
    desk.create()
    answer = desk.ask(Why(id="a"))
    assert isinstance(answer, Response)
    assert answer.read is None


def test_rows_from_elsewhere(desk: RuleHarness) -> None:
    desk.accept(Import(id="a", status="failed"))
    assert why(desk).because == "It failed: no error message was recorded."
    desk.row(replace(desk.job(), expires_at=None))
    assert why(desk).next is None
    desk.row(replace(desk.job(), status="paused"))
    view = why(desk)
    assert (view.state, view.next) == ("paused", None)
    assert "doctor --accept" in view.do[0]


def test_every_unfinished_job_has_a_next_thing(desk: RuleHarness) -> None:
    """Nothing is stuck for ever: at a known time, by a named rule; an operator's pause is the one exception."""
    desk.create("waiting")
    desk.create("delayed", delay_ms=5)
    desk.held("held")
    desk.held("silent", stuck_after_ms=HOUR_MS, max_processing_ms=0)
    for _ in range(8):
        for job_id in ("waiting", "delayed", "held", "silent"):
            assert isinstance(why(desk, job_id).next, NextEvent)
        desk.advance(10 * MINUTE_MS)


def test_a_delayed_job_that_expires_before_it_is_due(desk: RuleHarness) -> None:
    desk.create("a", run_at=NOW + 3 * MINUTE_MS, expires_at=NOW + MINUTE_MS)
    assert at_and_rule(why(desk)) == (NOW + MINUTE_MS, "expires_at")
    desk.create("b", run_at=NOW + MINUTE_MS, expires_at=NOW + 3 * MINUTE_MS)
    assert at_and_rule(why(desk, "b")) == (NOW + MINUTE_MS, "run_at")
    desk.create("c", run_at=NOW + MINUTE_MS, expires_at=NOW + MINUTE_MS)  # when it is due it is unwanted already
    assert at_and_rule(why(desk, "c")) == (NOW + MINUTE_MS, "expires_at")
