"""The explanation of a job: state, reason, next event and time, and advice."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from jobd.core.explain import ending, explain
from jobd.core.state import RecoverySchedule
from jobd.core.stats import HOURS_NEEDED, DurationBaseline
from jobd.model import commands as cmd
from jobd.model.events import QueuePause
from jobd.model.job import DAY_MS, HOUR_MS, MINUTE_MS
from jobd.model.responses import HistoryRead, NextEvent, WhyView
from tests.support.rule_harness import NOW, RuleHarness

TTL = 15 * MINUTE_MS
FIRST = NextEvent(
    "The first worker that claims its queue and kind gets it, unless another job comes first.", None, "claim"
)
LOOK, START = "List the workers: jobctl workers", "Start a worker: jobctl run --queue q -- CMD"
AGAIN = "it is queued again (attempt 1 of 1)"
SIGNS = "Its lock was renewed {} ago; it has shown no progress."


def recovered(what: str, at: int, rule: str) -> NextEvent:
    """An event of recovery, which runs every 10 s."""
    return NextEvent(what, at, rule, at + 11_000)


def deletion(at: int) -> NextEvent:
    return NextEvent("The first cleanup run from then on deletes it.", at, "retention", at + 5 * MINUTE_MS + 1_000)


def why(rules: RuleHarness, job_id: str = "a") -> WhyView:
    view: WhyView = rules.accept(cmd.Why(id=job_id))
    return view


def at_and_rule(view: WhyView) -> tuple[Any, ...]:
    assert view.next is not None
    assert view.next.what.endswith(".")
    return view.next.at, view.next.rule


def test_waiting_for_a_worker(rules: RuleHarness) -> None:
    rules.create("a", queue="q", kind="k")
    rules.create("b", queue="q", kind="k")
    rules.advance(5_000)
    waited = "It has waited for 5 s: no worker has claimed queue `q` since the start at 2023-11-14 22:13:20 UTC."
    assert why(rules) == WhyView("queued", f"{waited} It is next in line.", FIRST, "no worker", [LOOK, START])
    assert why(rules, "b").because == f"{waited} Other jobs come first."


def test_a_job_does_not_wait_before_it_is_created(rules: RuleHarness) -> None:
    rules.create(run_at=NOW - HOUR_MS)
    assert why(rules).because.startswith("It has waited for 0 ms: ")


def test_a_returned_job_waits_since_its_grant_ended(rules: RuleHarness) -> None:
    lock_id = rules.held("a")
    rules.advance(5_000)
    rules.accept(cmd.Release(id="a", lock_id=lock_id))
    rules.advance(2_000)
    assert why(rules).because.startswith("It has waited for 2 s: ")
    rules.now -= 3_000
    assert why(rules).because.startswith("It has waited for 0 ms: ")


def clause(rules: RuleHarness, job_id: str = "a") -> str:
    """Return what `why` says about the workers that could take a due job."""
    return why(rules, job_id).because.partition(": ")[2].partition(". ")[0]


def claims(rules: RuleHarness, worker: str, kinds: str | None = None, queue: str = "q", *, waits: bool = False) -> None:
    command = cmd.Claim(worker=worker, queues=[queue], kinds=None if kinds is None else kinds.split(","))
    (rules.state.presence.begin_wait if waits else rules.state.presence.note_request)(command)


def test_the_time_since_which_claims_are_remembered_is_shown_if_some_were_forgotten(rules: RuleHarness) -> None:
    rules.create(queue="q")
    rules.state.presence._names_kept = 0
    claims(rules, "w-1", queue="r")
    rules.advance(3 * MINUTE_MS)
    claims(rules, "w-2", queue="s")
    claims(rules, "w-3", queue="t")
    assert clause(rules) == "no worker has claimed queue `q` since 2023-11-14 22:13:20 UTC"
    rules.state.presence._names_kept = 0
    claims(rules, "w-4", queue="u")
    assert clause(rules) == "no worker has claimed queue `q` since 2023-11-14 22:16:20 UTC"


def test_workers_that_take_other_kinds_only(rules: RuleHarness) -> None:
    rules.create(queue="q", kind="crop")
    claims(rules, "claims-1", "scale")
    claims(rules, "idle-1", "resize", waits=True)
    since = "of this queue since the start at 2023-11-14 22:13:20 UTC"
    others = "idle-1 waits on this queue but takes only: resize"
    because = f"{others} (1 more takes other kinds); no worker has claimed kind `crop` {since}"
    assert why(rules) == WhyView(
        "queued",
        f"It has waited for 0 ms: {because}. It is next in line.",
        FIRST,
        "no worker of its kind",
        [LOOK, f"{START} (it takes all kinds)"],
    )
    claims(rules, "claims-2", "scale")
    rules.create("none", queue="q")
    more = "(2 more take other kinds)"
    assert clause(rules, "none") == f"{others} {more}; no worker has claimed jobs without a kind {since}"


@pytest.mark.parametrize(
    ("kinds", "listed"),
    [
        ("", "jobs without a kind"),
        ("a,b,c", "a, b, c"),
        ("a,b,c,d", "a, b, c and 1 more"),
        ("a,b,c,d,", "a, b, c and 2 more"),
    ],
)
def test_at_most_three_other_kinds_are_listed(rules: RuleHarness, kinds: str, listed: str) -> None:
    rules.create(queue="q", kind="z")
    claims(rules, "w", kinds)
    since = "no worker has claimed kind `z` of this queue since the start at 2023-11-14 22:13:20 UTC"
    assert clause(rules) == f"w claims this queue but takes only: {listed}; {since}"


def test_of_the_workers_of_other_kinds_the_one_that_claimed_last_is_named(rules: RuleHarness) -> None:
    rules.create(queue="q", kind="crop")
    for worker in ("w-1", "w-3", "w-2"):
        claims(rules, worker, "scale")
        rules.advance(1_000)
    assert clause(rules).startswith("w-2 claims this queue but takes only: scale (2 more take other kinds); ")
    rules.state.presence.note_lost("w-2", rules.job())
    assert clause(rules).startswith("w-3 claims this queue but takes only: scale (1 more takes other kinds); ")


def test_workers_of_other_kinds_that_are_gone_do_not_count(rules: RuleHarness) -> None:
    rules.create(queue="q", kind="crop")
    claims(rules, "w-1", "resize")
    rules.advance(10 * MINUTE_MS)
    assert clause(rules) == "no worker has claimed kind `crop` of queue `q` since the start at 2023-11-14 22:13:20 UTC"
    assert why(rules).blocked_by == "no worker"


def test_all_workers_are_busy(rules: RuleHarness) -> None:
    rules.create("a", queue="q")
    for number in range(4):
        rules.held(f"job-{number}", worker=f"w-{number}", queue="q")
        claims(rules, f"w-{number}")
        rules.advance(MINUTE_MS)
    view = why(rules)
    assert clause(rules) == "all 4 workers that take such jobs are busy, the longest for 4 min"
    assert (view.state, view.next, view.blocked_by, view.do) == ("queued", FIRST, "no free worker", [LOOK, START])


def test_a_busy_worker_that_is_silent_is_named(rules: RuleHarness) -> None:
    rules.create("a", queue="q")
    rules.held("b", worker="w 1", queue="q", stall_after_ms=HOUR_MS)
    claims(rules, "w 1")
    rules.advance(TTL)
    view = why(rules)
    assert clause(rules) == "no worker takes such jobs now; silent, with an expired lock: w 1"
    assert (view.blocked_by, view.do[1:]) == ("no worker", ["Take back the jobs of w 1: jobctl take-back 'w 1'", START])
    rules.held("c", worker="w-2", queue="q", kind="k")
    claims(rules, "w-2")
    busy = "w-2, the only worker that takes such jobs, has been busy for 0 ms"
    assert clause(rules) == f"{busy}; silent, with an expired lock: w 1"


@pytest.mark.parametrize(("count", "everyone"), [(2, "both"), (3, "all 3")])
def test_every_worker_is_busy(rules: RuleHarness, count: int, everyone: str) -> None:
    rules.create("a", queue="q")
    for number in range(count):
        rules.held(f"job-{number}", worker=f"w-{number}", queue="q", stall_after_ms=HOUR_MS)
        claims(rules, f"w-{number}")
    rules.advance(MINUTE_MS)
    assert clause(rules) == f"{everyone} workers that take such jobs are busy, the longest for 1 min"


def test_at_most_three_silent_workers_are_named(rules: RuleHarness) -> None:
    rules.create("a", queue="q")
    for number in range(5):
        rules.held(f"job-{number}", worker=f"w-{number}", queue="q", stall_after_ms=HOUR_MS)
        claims(rules, f"w-{number}")
    rules.advance(TTL)
    assert clause(rules).endswith("; silent, with an expired lock: w-0, w-1, w-2 and 2 more")
    back = [f"Take back the jobs of {name}: jobctl take-back {name}" for name in ("w-0", "w-1", "w-2")]
    assert why(rules).do == [LOOK, *back, START]


def test_no_worker_waits_but_one_claimed_recently(rules: RuleHarness) -> None:
    rules.create(queue="q")
    claims(rules, "worker-1")
    rules.advance(40_000)
    view = why(rules)
    assert clause(rules) == "no worker is waiting now; worker-1 claimed this queue 40 s ago"
    assert (view.state, view.next, view.blocked_by, view.do) == ("queued", FIRST, "no waiting worker", [LOOK, START])
    claims(rules, "worker-2")
    assert clause(rules) == "no worker is waiting now; worker-2 claimed this queue 0 ms ago; 1 more is idle"
    rules.advance(1_000)
    claims(rules, "worker-0")
    assert clause(rules) == "no worker is waiting now; worker-0 claimed this queue 0 ms ago; 2 more are idle"


def test_a_worker_that_died_is_no_candidate(rules: RuleHarness) -> None:
    rules.create("a", queue="q")
    rules.held("b", worker="w-1", queue="q", stall_after_ms=0)
    claims(rules, "w-1")
    rules.advance(TTL - 4_000)
    claims(rules, "w-1")
    rules.held("c", worker="w-2", queue="q")
    claims(rules, "w-2")
    rules.recover(4_000)
    assert clause(rules) == "w-2, the only worker that takes such jobs, has been busy for 4 s"
    rules.held("d", worker="w-3", queue="q")
    claims(rules, "w-3")
    claims(rules, "w-4")
    last = "w-4 claimed this queue 0 ms ago"
    assert clause(rules) == f"no worker is waiting now: 2 are busy, the longest for 4 s; {last}"
    assert why(rules).blocked_by == "no waiting worker"


def test_one_worker_is_busy_and_one_is_idle(rules: RuleHarness) -> None:
    rules.create("a", queue="q")
    rules.held("b", worker="w-1", queue="q")
    claims(rules, "w-1")
    claims(rules, "w-2")
    last = "w-2 claimed this queue 0 ms ago"
    assert clause(rules) == f"no worker is waiting now: w-1 has been busy for 0 ms; {last}"


def test_a_worker_waits(rules: RuleHarness) -> None:
    """On a full disk a claim can wait although a job is due."""
    rules.create(queue="q")
    claims(rules, "w-1", waits=True)
    because = "It has waited for 0 ms: a worker waits for such jobs. It is next in line."
    assert why(rules) == WhyView(
        "queued",
        because,
        NextEvent("A waiting worker gets it at once.", NOW, "claim", NOW + 1_000),
        None,
        [LOOK],
    )


def test_the_workers_of_the_queue_are_gone_or_claim_another(rules: RuleHarness) -> None:
    rules.create(queue="q")
    claims(rules, "w-1")
    claims(rules, "w-2")
    rules.advance(12 * MINUTE_MS)
    view = why(rules)
    assert clause(rules) == "no worker claims such jobs now; the last claim was 12 min ago, by w-1, which is gone"
    assert (view.next, view.blocked_by, view.do) == (FIRST, "no worker", [LOOK, START])
    claims(rules, "w-3", queue="q")
    claims(rules, "w-3", queue="other")
    assert clause(rules) == "no worker claims such jobs now; the last claim was 0 ms ago"  # by w-3, which is not gone
    for worker in ("w-1", "w-2"):
        claims(rules, worker, queue="other")
    rules.advance(12 * MINUTE_MS)
    assert clause(rules) == "no worker claims such jobs now; the last claim was 12 min ago"


@pytest.mark.parametrize(("dies", "how"), [(True, "died with b"), (False, "said goodbye")])
def test_the_end_of_the_last_worker_is_explained(rules: RuleHarness, dies: bool, how: str) -> None:
    rules.create(queue="q")
    claims(rules, "w-1")
    if dies:
        rules.held("b", worker="w-1", queue="r")
        rules.advance(HOUR_MS)
        rules.accept(cmd.Recover(limit=1))
    else:
        rules.accept(cmd.Goodbye("w-1"))
    assert clause(rules).endswith(f" ago, by w-1, which {how}")


def test_of_the_workers_that_are_gone_the_last_one_is_named(rules: RuleHarness) -> None:
    rules.create(queue="q")
    for worker, kinds in (("w-3", "k"), ("w-1", None), ("w-2", "")):
        rules.advance(MINUTE_MS)
        claims(rules, worker, kinds)
    rules.advance(12 * MINUTE_MS)
    assert clause(rules) == "no worker claims such jobs now; the last claim was 12 min ago, by w-2, which is gone"


@pytest.mark.parametrize("paused", [False, True])
def test_an_overdue_job_only_waits_to_fail(rules: RuleHarness, paused: bool) -> None:
    rules.create("a", queue="q", expires_at=NOW + 10)
    if paused:
        rules.accept(cmd.Pause(name="q"), admin=True)
    rules.advance(5_010)
    because = "Its expires_at passed 5 s ago, so no worker can claim it."
    soon = recovered("Recovery fails it as expired.", NOW + 5_010, "expires_at")
    do = ["If it is still needed, once it has failed: jobctl retry a"]
    assert why(rules) == WhyView("queued", because, soon, "expires_at", do)


def test_a_suspect_clock_fails_no_job_by_age(rules: RuleHarness) -> None:
    rules.create(expires_at=NOW + MINUTE_MS)
    suspect = explain(rules.job(), rules.state, replace(rules.moment, trusted=NOW - 1), rules.policy).next
    what = "It fails as expired if no worker has taken it by then once the clock is no longer suspect."
    assert suspect == NextEvent(what, NOW + MINUTE_MS, "expires_at")
    rules.advance(HOUR_MS)
    because = "Its expires_at passed 59 min ago, so no worker can claim it. "
    because += "The wall clock is suspect, so recovery does not fail it."
    do = ["Check the clock of the daemon's machine. If it is correct: jobctl clock accept"]
    view = explain(rules.job(), rules.state, replace(rules.moment, trusted=NOW), rules.policy)
    assert view == WhyView("queued", because, None, "clock", do)


def test_not_due(rules: RuleHarness) -> None:
    rules.create(delay_ms=3 * MINUTE_MS, queue="q")
    due = NextEvent("It becomes due and is offered to workers.", NOW + 3 * MINUTE_MS, "run_at", NOW + 181_000)
    nobody = " At present, no worker has claimed queue `q` since the start at 2023-11-14 22:13:20 UTC."
    because, now = "It is not due for another 3 min.", "Run it now: jobctl run-now a"
    assert why(rules) == WhyView("queued", because + nobody, due, "run_at", [now, LOOK, START])
    claims(rules, "w-1")
    assert why(rules) == WhyView("queued", because, due, "run_at", [now])


@pytest.mark.parametrize(("attempt", "times"), [(1, "once"), (2, "2 times")])
def test_a_retry_is_announced_with_its_attempt(rules: RuleHarness, attempt: int, times: str) -> None:
    rules.create(max_attempts=3)
    claims(rules, "w-1", queue="default")
    for _ in range(attempt):
        rules.advance(MINUTE_MS)
        rules.accept(cmd.Fail(id="a", lock_id=rules.start(), error_message="boom", retry_after_ms=MINUTE_MS))
    retry = f"It failed {times} and is retried in 1 min, attempt {attempt + 1} of 3."
    assert why(rules).because.startswith(retry)
    assert why(rules).because.endswith(" Its last error: boom")


def test_paused(rules: RuleHarness) -> None:
    rules.create()
    rules.accept(cmd.Pause(name="default"), by="admin:ana")
    view = why(rules)
    assert (view.state, view.blocked_by, view.next) == ("queued", "queue_paused", None)
    paused = "Queue default was paused by operator ana at 2023-11-14 22:13:20 UTC, until resumed: no reason given."
    assert view.because == f"{paused} None of its jobs is granted."
    assert view.do == [
        "If operator ana no longer needs the pause: jobctl resume default. "
        "No reason was given for the pause; ask first."
    ]
    rules.create("b", expires_at=NOW + 9)
    assert at_and_rule(why(rules, "b")) == (NOW + 9, "expires_at")


def test_the_end_of_a_pause_is_the_next_event(rules: RuleHarness) -> None:
    rules.create()
    rules.accept(cmd.Pause(name="default", reason="deploy", until=NOW + HOUR_MS), by="admin")
    view = why(rules)
    assert view.next == recovered("The daemon resumes the queue.", NOW + HOUR_MS, "pause")
    paused = "by an operator at 2023-11-14 22:13:20 UTC, until 2023-11-14 23:13:20 UTC: deploy."
    assert view.because == f"Queue default was paused {paused} None of its jobs is granted."
    assert view.do == ["If an operator no longer needs the pause: jobctl resume default. Reason for the pause: deploy"]


@pytest.mark.parametrize(("expires_at", "rule"), [(-1, "expires_at"), (0, "expires_at"), (1, "pause")])
def test_a_job_that_expires_during_or_at_the_end_of_a_pause_is_not_offered(
    rules: RuleHarness, expires_at: int, rule: str
) -> None:
    rules.create(expires_at=NOW + HOUR_MS + expires_at)
    rules.accept(cmd.Pause(name="default", until=NOW + HOUR_MS))
    assert at_and_rule(why(rules)) == (NOW + HOUR_MS + min(expires_at, 0), rule)


def test_a_pause_of_an_older_store_says_that_its_origin_is_unknown(rules: RuleHarness) -> None:
    rules.create()
    rules.state.set_paused("default", QueuePause())
    view = why(rules)
    paused = "Queue default was paused at an unknown time, until resumed: no reason given."
    assert view.because == f"{paused} None of its jobs is granted."
    assert view.do == [
        "If the operator who paused it no longer needs the pause: jobctl resume default. "
        "No reason was given for the pause; ask first."
    ]


def test_the_previous_attempt_is_explained(rules: RuleHarness) -> None:
    lock_id = rules.held(max_attempts=2)
    rules.accept(cmd.Release(id="a", lock_id=lock_id))
    waited = "It has waited for 0 ms: no worker has claimed queue `default` since the start at 2023-11-14 22:13:20 UTC."
    first = f"{waited} It is next in line."
    assert why(rules).because == f"{first} Its last grant, to worker w-1, was ended by release."
    rules.accept(cmd.Fail(id="a", lock_id=rules.start(), error_message="out of memory", retry_after_ms=0))
    assert why(rules).because == f"{first} Its last error: out of memory"
    rules.accept(cmd.Import(id="b", error_code="E"))  # an error without a message
    rules.accept(cmd.Release(id="a", lock_id=rules.start()))
    ended = "Its last grant, to worker w-1, was ended by release. Its last error: out of memory"
    assert why(rules).because == f"{first} {ended}"
    assert why(rules, "b").because == f"{waited} Other jobs come first."


@pytest.mark.parametrize("state", ["overdue", "paused", "delayed"])
def test_the_previous_attempt_is_explained_in_every_state_of_a_queued_job(rules: RuleHarness, state: str) -> None:
    lock_id = rules.held(max_attempts=2, expires_at=NOW + 10)
    rules.accept(cmd.Fail(id="a", lock_id=lock_id, error_message="no disk", retry_after_ms=5))
    if state == "paused":
        rules.accept(cmd.Pause(name="default"))
    elif state == "overdue":
        rules.advance(10)
    assert why(rules).because.endswith(". Its last error: no disk")


def test_a_processing_job_names_its_worker(rules: RuleHarness) -> None:
    lock_id = rules.held(worker="w-7")
    rules.progress(lock_id, 45)
    rules.advance(MINUTE_MS)
    because = (
        "Worker w-7 has held it for 1 min, at 45 %. Its lock was renewed 1 min ago; its last progress was 1 min ago."
    )
    because += " Its lock expires in 14 min."
    because += " Its progress timeout ends in 29 min (progress_timeout_ms 1800000)."
    fails = "it fails: progress 45 %, no attempts left (1 of 1)"
    stalled = f"If nothing is heard of worker w-7 by 2023-11-14 22:28:20 UTC, {fails}."
    end = "jobctl force-fail a, and to run it again: jobctl retry a"
    assert why(rules) == WhyView(
        "processing",
        because,
        recovered(stalled, NOW + TTL, "stall_after"),  # stalled exactly when the lock expires
        None,
        [
            "Check whether worker w-7 is alive, and what the job printed: jobctl output a",
            f"If it is dead and you cannot wait: {end}",
            "If it is not needed: jobctl cancel a (this ends it at once, and its work stops at the next report, "
            "at most 5 min later)",
        ],
    )


def test_the_signs_of_life_of_a_job(rules: RuleHarness) -> None:
    rules.held(kind="k")
    rules.row(replace(rules.job(), progress=7))
    baseline = rules.state.counters.baselines.kinds["k"] = DurationBaseline()
    assert " ago; it showed no progress since the start. Its lock" in why(rules).because
    baseline.hours = [60_000] * HOURS_NEEDED
    assert " since the start. 95 % of its kind take up to 1 min. Its lock" in why(rules).because


def test_a_lock_that_expires_before_the_job_is_stalled(rules: RuleHarness) -> None:
    rules.held(stall_after_ms=20 * MINUTE_MS)
    what = f"If nothing is heard of worker w-1 by 2023-11-14 22:33:20 UTC, {AGAIN}."
    stalled = recovered(what, NOW + 20 * MINUTE_MS, "stall_after")
    assert why(rules).next == stalled
    rules.advance(TTL)
    for _ in range(2):
        view = why(rules)
        assert view.because == (
            f"Worker w-1 has held it for 15 min, at 0 %. {SIGNS.format('15 min')} Its lock has expired: the worker is "
            "silent. It may still end the job or report. "
            "Its progress timeout ends in 15 min (progress_timeout_ms 1800000)."
        )
        assert view.next == stalled
        rules.accept(cmd.Recover(limit=1))
    rules.advance(5 * MINUTE_MS)
    assert why(rules).next == recovered(f"Recovery ends its grant: {AGAIN}.", rules.now, "recovery")


def test_the_next_cleanup_run_is_named_if_recovery_is_left_to_it(rules: RuleHarness) -> None:
    rules.held(stall_after_ms=20 * MINUTE_MS)
    rules.create("late", queue="q", expires_at=NOW + MINUTE_MS)
    rules.state.recovery = RecoverySchedule(0, 5 * MINUTE_MS, NOW + 45 * MINUTE_MS)
    stalled = why(rules).next
    assert stalled is not None
    assert (stalled.at, stalled.latest_at) == (NOW + 45 * MINUTE_MS, NOW + 50 * MINUTE_MS + 1_000)
    cleanup = "The next cleanup run (recover_every is 0)"
    rules.advance(HOUR_MS)
    first, last = rules.now, rules.now + 5 * MINUTE_MS + 1_000
    assert why(rules).next == NextEvent(f"{cleanup} ends its grant: {AGAIN}.", first, "cleanup", last)
    assert why(rules, "late").next == NextEvent(f"{cleanup} fails it as expired.", first, "expires_at", last)


def test_the_worker_of_an_expired_lock_is_silent(rules: RuleHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    rules.held(stall_after_ms=20 * MINUTE_MS, worker="w 7")
    check, *others = why(rules).do
    rules.held("b", stall_after_ms=20 * MINUTE_MS, worker="w 7", on_stall="fail")
    rules.advance(TTL)
    take_back = "Take back its jobs with expired locks: jobctl take-back 'w 7' (1 is queued again"
    for _ in range(2):
        assert why(rules).do == [check, f"{take_back}, 1 fails (on_stall))", *others]
        rules.accept(cmd.Recover(limit=1))
    for most, end in ((2, ", 1 fails (on_stall))"), (1, "; 1 more)")):
        monkeypatch.setattr("jobd.core.explain.MAX_OUTCOMES", most)
        assert why(rules).do[1] == take_back + end


def test_after_the_progress_timeout_no_report_is_suggested(rules: RuleHarness) -> None:
    rules.held(progress_timeout_ms=TTL)
    rules.advance(TTL)
    assert why(rules).because == (
        f"Worker w-1 has held it for 15 min, at 0 %. {SIGNS.format('15 min')} "
        "Its lock has expired: the worker is silent. It can no longer report progress, but may still end the job."
    )


def test_the_progress_timeout_is_named(rules: RuleHarness) -> None:
    rules.held(stall_after_ms=HOUR_MS, progress_timeout_ms=TTL + 1)
    rules.advance(TTL)
    assert why(rules).because.endswith(" Its progress timeout ends in 1 ms (progress_timeout_ms 900001).")
    what = f"If worker w-1 reports no progress by 2023-11-14 22:28:21 UTC, {AGAIN}."
    stalled = recovered(what, NOW + TTL + 1, "progress_timeout")
    assert why(rules).next == stalled, "more time for the lock is no help"


def test_the_progress_timeout_of_the_grant_is_shown(rules: RuleHarness) -> None:
    rules.create("a")
    lock_id = rules.start("a", progress_timeout_ms=0)
    assert why(rules).because.endswith(" This grant has no progress timeout (progress_timeout_ms 0).")
    rules.accept(cmd.Release(id="a", lock_id=lock_id))
    rules.start("a", progress_timeout_ms=40 * MINUTE_MS)
    rules.advance(MINUTE_MS)
    assert why(rules).because.endswith(" Its progress timeout ends in 39 min (progress_timeout_ms 2400000).")
    rules.advance(39 * MINUTE_MS)
    assert "progress timeout" not in why(rules).because


def test_repeated_releases_are_explained(rules: RuleHarness) -> None:
    rules.create()
    claims(rules, "w-7", queue="default")

    def release(**fields: Any) -> str:
        lock_id = rules.start(worker="w-7")
        rules.accept(cmd.Release(id="a", lock_id=lock_id, **fields))
        return why(rules).because

    for _ in range(4):
        assert release().endswith("Its last grant, to worker w-7, was ended by release.")
    assert release() == (
        "It is not due for another 1 s. It was released 5 times in a row without progress. "
        "Its last grant, to worker w-7, was ended by release."
    )
    view = why(rules)
    due = ("It becomes due and is offered to workers.", rules.now + 1_000, "release delay", rules.now + 2_000)
    assert view.next == NextEvent(*due)
    assert view.do == ["Find out why its workers release it; w-7 was the last.", "Run it now: jobctl run-now a"]
    rules.advance(1_000)
    assert " It was released 6 times in a row without progress. Its last grant" in release(delay_ms=0)
    assert why(rules).do[0] == "Find out why its workers release it; w-7 was the last."
    rules.row(replace(rules.job(), ended=None))  # a row that was edited by hand
    assert why(rules).because.endswith("It was released 6 times in a row without progress.")
    assert why(rules).do == [LOOK, "Start a worker: jobctl run --queue default -- CMD"]
    lock_id = rules.start()
    assert why(rules).because.endswith(". It was released 6 times in a row without progress before this grant.")
    rules.row(replace(rules.job(), progress=1))
    assert why(rules).because.endswith(". It was released 6 times in a row without progress.")
    rules.progress(lock_id, 1)
    assert "released" not in why(rules).because


def test_the_oldest_due_job_of_each_kind_of_a_queue_is_explained(rules: RuleHarness, monkeypatch: Any) -> None:
    def explained(queue: str = "q") -> tuple[str, list[tuple[str, int, str]]]:
        view = rules.accept(cmd.WhyQueue(name=queue))
        assert all(each.why == why(rules, each.job_id) for each in view.kinds)
        return view.because, [(each.kind, each.due, each.job_id) for each in view.kinds]

    unknown = "There is no queue q: it has no jobs and is not paused. List the queues: jobctl queues"
    assert explained() == (unknown, [])
    rules.accept(cmd.Pause(name="r", reason="deploy"))
    paused = "Queue r was paused by a client at 2023-11-14 22:13:20 UTC, until resumed: deploy. "
    assert explained("r") == (f"{paused}No job of queue r is due: 0 queued, 0 processing.", [])
    rules.create("later", queue="q", delay_ms=MINUTE_MS)
    rules.held("held", queue="q")
    assert explained() == ("No job of queue q is due: 1 queued, 1 processing.", [])
    rules.advance(1)
    rules.create("b-1", queue="q", kind="b", priority=9)
    rules.advance(1)
    rules.create("a-1", queue="q", kind="a")
    rules.create("b-2", queue="q", kind="b")
    due = "Jobs of 2 of 3 queued kinds are due."
    assert explained() == (due, [("b", 2, "b-1"), ("a", 1, "a-1")])
    monkeypatch.setattr("jobd.core.explain.MAX_KINDS", 1)
    assert explained()[1] == [("b", 2, "b-1")]


def test_a_processing_row_without_a_holder(rules: RuleHarness) -> None:
    rules.held()
    whole = rules.job()
    rules.row(replace(whole, grant=None, deadlines=None))
    because = "Its status is processing, but no worker holds it. Such rows come from imports or manual edits."
    what = f"The next cleanup run treats it as stalled: {AGAIN}."
    soon = NextEvent(what, NOW, "validation", NOW + 5 * MINUTE_MS + 1_000)
    view = why(rules)
    assert view == WhyView("processing", because, soon, None, ["Start a cleanup run: jobctl cleanup"])
    for half in ({"grant": None}, {"deadlines": None}):
        rules.row(replace(whole, **half))
        assert why(rules) == view


def test_finished(rules: RuleHarness) -> None:
    rules.completed()
    deleted = deletion(NOW + 7 * DAY_MS)
    assert why(rules) == WhyView("completed", "It was completed; that is final.", deleted, None, [])
    rules.advance(8 * DAY_MS)
    assert why(rules).next == deletion(rules.now)
    suspect = explain(rules.job(), rules.state, replace(rules.moment, trusted=NOW), rules.policy)
    later = "The first cleanup run from then on deletes it once the clock is no longer suspect."
    assert suspect.next == NextEvent(later, rules.now, "retention")
    rules.accept(cmd.Fail(id="b", lock_id=rules.held("b"), error_message="boom"))
    deleted = deletion(rules.now + 30 * DAY_MS)
    do = ["Fix the cause, then run it again: jobctl retry b"]
    assert why(rules, "b") == WhyView("failed", "It failed, with no attempts left (1 of 1): boom", deleted, None, do)
    rules.create("c")
    rules.accept(cmd.Cancel(id="c"))
    deleted = deletion(rules.now + 7 * DAY_MS)
    do = ["If it is needed after all: jobctl retry c"]
    assert why(rules, "c") == WhyView("cancelled", "It was cancelled.", deleted, None, do)


@pytest.mark.parametrize(
    ("command", "by", "expected"),
    [
        (cmd.Cancel(id="a", reason="Not wanted."), "admin:ana", "It was cancelled by operator ana: Not wanted."),
        (cmd.Cancel(id="a"), "client", "It was cancelled by a client."),
        (cmd.Cancel(id="a", reason="left"), "client:shop (uid 998, pid 4410)",
         "It was cancelled by client shop (uid 998, pid 4410): left."),
        (cmd.Cancel(id="a"), "client:::1", "It was cancelled by client ::1."),
        (cmd.Cancel(id="a"), "admin", "It was cancelled by an operator."),
        (cmd.ForceFail(id="a", reason="hangs"), "admin:ana", "It was failed by operator ana: hangs."),
        (cmd.ForceFail(id="a"), "admin:ana", "It was failed by operator ana."),
        (cmd.Cancel(id="a", reason=""), "admin:ana", "It was cancelled by operator ana."),
        (cmd.Cancel(id="a"), "importer", "It was cancelled by importer."),
        (cmd.Transition(id="a", from_="queued", to="failed"), "admin", "It was failed by an operator."),
        (cmd.Transition(id="a", from_="queued", to="failed", updates=cmd.Updates(error_message="full"), reason="swap"),
         "admin:ana", "It was failed by operator ana: swap. Its error: full"),
        (cmd.Transition(id="a", from_="queued", to="cancelled", reason="twice"),
         "admin:ana", "It was cancelled by operator ana: twice."),
        (cmd.Import(id="b", status="failed", error_message="m"), "admin:x",
         "It was imported as failed by operator x. Its error: m"),
        (cmd.Import(id="b", status="completed"), "admin:x",
         "It was imported as completed by operator x; that is final."),
    ],
)  # fmt: skip
def test_the_operator_who_ended_a_job_is_named_with_the_reason(
    rules: RuleHarness, command: Any, by: str, expected: str
) -> None:
    rules.create()
    rules.accept(command, by=by)
    answer = rules.respond(cmd.Why(id=command.id))
    assert answer.read == HistoryRead(ended=rules.job(command.id))
    assert ending(rules.job(command.id), rules.events) == expected


def test_the_worker_that_ended_a_job_is_named(rules: RuleHarness) -> None:
    rules.completed()
    assert ending(rules.job(), rules.events) == "It was completed by worker w-1; that is final."
    rules.accept(cmd.Fail(id="b", lock_id=rules.held("b"), error_message="boom"), by="worker:w-1")
    assert ending(rules.job("b"), rules.events) == ("It failed on worker w-1, with no attempts left (1 of 1): boom")
    no_retry = cmd.Fail(id="c", lock_id=rules.held("c", max_attempts=3), error_message="boom", retry=False)
    rules.accept(no_retry, by="worker:w-1")
    once = "It failed on worker w-1, and its worker asked for no retry (1 of 3 attempts used): boom"
    assert ending(rules.job("c"), rules.events) == once


def test_events_after_the_end_are_ignored(rules: RuleHarness) -> None:
    """A late result and the operator who adopted it."""
    lock_id = rules.held()
    rules.accept(cmd.Cancel(id="a", reason="stop"), by="admin:ana")
    rules.reject(cmd.Complete(id="a", lock_id=lock_id, file_path="/out"), "lock_lost", by="worker:w-1")
    assert rules.events[-1].type == "late_result"
    assert ending(rules.job(), rules.events) == "It was cancelled by operator ana: stop."
    assert ending(rules.job(), rules.events[-1:]) == "It was cancelled."
    rules.accept(cmd.Adopt(id="a", reason="It is good."), by="admin:bob")
    adopted = "It was completed with a late result of worker w-1 by operator bob: It is good; that is final."
    assert ending(rules.job(), rules.events) == adopted


def test_the_message_of_a_stall_is_enough(rules: RuleHarness) -> None:
    rules.held(on_stall="fail", stall_after_ms=0)
    rules.advance(HOUR_MS)
    rules.accept(cmd.Recover(limit=9), by="recovery")
    assert ending(rules.job(), rules.events) == why(rules).because
    assert why(rules).because.startswith("It failed: Worker w-1 reported no progress for 30 min")


def test_the_timeline_is_read_only_for_finished_jobs(rules: RuleHarness) -> None:
    rules.create()
    answer = rules.respond(cmd.Why(id="a"))
    assert answer.read is None


def test_imported_and_invalid_rows_are_explained(rules: RuleHarness) -> None:
    rules.accept(cmd.Import(id="a", status="failed"))
    assert why(rules).because == "It failed: no error message was recorded."
    rules.row(replace(rules.job(), expires_at=None))
    assert why(rules).next is None
    rules.row(replace(rules.job(), status="paused"))
    because = "Status paused is unknown, so no rule applies to it."
    do = ["Correct the row with the daemon stopped, then: jobd doctor --accept ID"]
    assert why(rules) == WhyView("paused", because, None, None, do)
