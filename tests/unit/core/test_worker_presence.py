"""Presence of workers: their state, latest claims and jobs, and the bounds of memory."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, get_args

import msgspec
import pytest
from msgspec.structs import replace

from jobd.core import audit, worker_presence
from jobd.core.rules import maintenance_rules
from jobd.core.state import State
from jobd.core.views import workers
from jobd.core.worker_presence import IDLE_AT_LEAST_MS, IDLE_AT_MOST_MS, LEFT_AFTER_MS, ClaimSet, WorkerPresence
from jobd.model import commands as cmd
from jobd.model.clocks import LockMs
from jobd.model.errors import ApiError
from jobd.model.job import DAY_MS, HOUR_MS, MINUTE_MS, Grant, Job, Options
from jobd.model.responses import LostJobView, Response, TakeBackView, WorkerGroup, WorkerList, WorkerView
from jobd.model.storage import DiskFull, Numbers, OpenedStore
from tests.support import virtual_engine
from tests.support.factories import deadlines_at
from tests.support.rule_harness import NOW, RuleHarness

TTL = 15 * MINUTE_MS
LARGEST = cmd.About(instance="~" * 200, host="~" * 253, pid=2**32 - 1, version="~" * 100, concurrency=100_000)


def unclaimed_ms(presence: WorkerPresence, queue: str, kind: str, lock_ms: LockMs) -> int:
    """Return for how long no worker has claimed this queue and kind, 0 while a claim waits."""
    fitting = [claims for claims in presence.claim_sets(queue) if claims.takes(kind)]
    if any(claims.waiting for claims in fitting):
        return 0
    return max(lock_ms - max((claims.claimed for claims in fitting), default=presence.since), 0)


@pytest.fixture
def rules() -> RuleHarness:
    made = RuleHarness()
    made.advance(0)
    return made


@pytest.fixture
def presence() -> WorkerPresence:
    made = WorkerPresence()
    made.set_time(NOW, LockMs(1_000))
    return made


def advance(presence: WorkerPresence, ms: int) -> None:
    presence.set_time(presence.now + ms, presence.lock_ms + ms)


def claim(worker: str = "w-1", queues: str = "default", kinds: str | None = None, **fields: Any) -> cmd.Claim:
    return cmd.Claim(worker=worker, queues=queues.split(), kinds=None if kinds is None else kinds.split(), **fields)


def held(seq: int, worker: str, expires: int = 500) -> Job:
    grant = Grant(f"lock-{seq}", seq, worker, NOW, 1, 1, 0)
    job = Job(seq, f"job-{seq}", Options(), "processing", NOW, NOW, NOW, started_at=NOW)
    return replace(job, grant=grant, deadlines=deadlines_at(expires, expires))


def listed(rules: RuleHarness, **command: Any) -> list[tuple[str, str]]:
    page: WorkerList = rules.accept(cmd.Workers(**command))
    return [(each.worker, each.state) for each in page.workers]


def one(rules: RuleHarness) -> WorkerView:
    page: WorkerList = rules.accept(cmd.Workers())
    (worker,) = page.workers
    return worker


# -- states -----------------------------------------------------------------------------------------------------------


def test_a_worker_is_busy_silent_idle_and_gone(rules: RuleHarness) -> None:
    lock_id = rules.held(worker="w-1", stall_after_ms=HOUR_MS, progress_timeout_ms=0)
    assert listed(rules) == [("w-1", "busy")]
    rules.advance(TTL - 1)
    assert listed(rules) == [("w-1", "busy")]
    rules.advance(1)
    assert listed(rules) == [("w-1", "silent")]
    rules.accept(cmd.Recover(limit=1))
    assert (one(rules).state, one(rules).expired, one(rules).held) == ("silent", 1, 1), (
        "the lock is cleared, not the grant"
    )
    rules.accept(cmd.Extend(id="a", lock_id=lock_id))
    assert (one(rules).state, one(rules).expired) == ("busy", 0)
    rules.advance(HOUR_MS)
    assert (one(rules).state, one(rules).expired) == ("silent", 1)
    rules.accept(cmd.Complete(id="a", lock_id=lock_id))
    assert (one(rules).state, one(rules).expired, one(rules).held) == ("idle", 0, 0)
    rules.advance(IDLE_AT_MOST_MS - 1)
    assert listed(rules) == [("w-1", "idle")]
    rules.advance(1)
    assert listed(rules) == []
    assert listed(rules, state="gone") == [("w-1", "gone")]
    assert rules.accept(cmd.Workers()).by_state["gone"] == 1


def test_a_worker_is_silent_while_it_holds_an_expired_lock(rules: RuleHarness) -> None:
    rules.held("a", worker="w", stall_after_ms=0)
    rules.advance(1_000)
    rules.held("b", worker="w")
    rules.advance(TTL - 1_000)
    assert (one(rules).state, one(rules).held, one(rules).expired) == ("silent", 2, 1)
    rules.accept(cmd.Recover(limit=9))
    assert (one(rules).state, one(rules).jobs, one(rules).expired) == ("busy", ["b"], 0)


@pytest.mark.parametrize("is_taken_back", [False, True])
def test_a_worker_whose_last_job_is_taken_back_died_until_it_is_heard(rules: RuleHarness, is_taken_back: bool) -> None:
    lock_id = rules.held(worker="w", max_stalls=1)
    rules.progress(lock_id, 40)
    rules.advance(HOUR_MS)
    rules.accept(cmd.TakeBack("w", dry_run=True))
    assert listed(rules) == [("w", "silent")]
    rules.accept(cmd.TakeBack("w") if is_taken_back else cmd.Recover(limit=9))
    assert listed(rules) == []
    page: WorkerList = rules.accept(cmd.Workers(state="died"))
    assert page.workers[0].lost == LostJobView("a", 40, rules.now)
    rules.reject(cmd.Extend(id="a", lock_id=lock_id), "lock_lost")
    assert listed(rules) == [("w", "idle")], "it is late, but lives"
    assert one(rules).lost is None


def test_the_end_of_a_grant_by_an_operator_is_no_death(rules: RuleHarness) -> None:
    rules.held(worker="w")
    rules.accept_admin(cmd.ForceFail(id="a"))
    assert listed(rules) == [("w", "idle")]


@pytest.mark.parametrize(
    ("between_ms", "idle_ms"), [(1, IDLE_AT_LEAST_MS), (20_000, 40_000), (HOUR_MS, IDLE_AT_MOST_MS)]
)
def test_a_worker_is_idle_for_twice_the_time_between_its_claims(
    presence: WorkerPresence, between_ms: int, idle_ms: int
) -> None:
    presence.note_request(claim())
    advance(presence, between_ms)
    worker = presence.note_request(claim())
    advance(presence, idle_ms - 1)
    assert presence.state(worker) == "idle"
    advance(presence, 1)
    assert presence.state(worker) == "gone"


@pytest.mark.parametrize("is_undelivered", [False, True])
def test_a_worker_whose_connection_closes_is_waiting_then_gone(rules: RuleHarness, is_undelivered: bool) -> None:
    if is_undelivered:
        rules.accept(cmd.Undelivered(id="a", lock_id=rules.held(worker="w")))
    else:
        presence = rules.state.presence
        presence.end_wait("w", presence.begin_wait(claim("w", wait_ms=60_000)), has_left=True)
    rules.advance(LEFT_AFTER_MS - 1)
    assert listed(rules) == [("w", "waiting")]
    rules.advance(1)
    assert (listed(rules), listed(rules, state="gone")) == ([], [("w", "gone")])
    rules.state.presence.note_request(claim("w"))
    assert listed(rules) == [("w", "idle")]


def test_a_worker_that_says_goodbye_is_gone_until_it_is_heard(rules: RuleHarness) -> None:
    presence = rules.state.presence
    presence.note_request(claim("w", about=cmd.About(instance="new")))
    assert rules.accept(cmd.Goodbye("w", "old", "stopped")).state == "idle"
    assert rules.accept(cmd.Goodbye("w", "new", "drained")).state == "gone"
    assert rules.accept(cmd.Workers(state="gone")).workers[0].goodbye == "drained"
    presence.note_request(claim("w"))
    assert (one(rules).state, one(rules).goodbye) == ("idle", None)
    rules.held(worker="w")
    assert rules.accept(cmd.Goodbye("w", "new")).state == "busy"
    assert rules.reject(cmd.Goodbye("unknown"), "worker_not_found").details == {"worker": "unknown"}


def test_a_quiet_worker_is_in_no_claim_set(presence: WorkerPresence) -> None:
    for queues, names in ((["q"], ["w"]), ([], []), (["q"], ["w"])):
        presence.note_request(claim("w", "q"), queues)
        assert [name for each in presence.claim_sets("q") for name in each.workers] == names


def test_a_repeated_ending_shows_that_the_worker_is_there(rules: RuleHarness) -> None:
    ending = cmd.Complete(id="a", lock_id=rules.held(worker="w"))
    for _ in range(2):
        rules.advance(5_000)
        rules.accept(ending)
        assert one(rules).last_seen_at == rules.now


def test_workers_are_counted_by_host_and_version(rules: RuleHarness) -> None:
    for name, about in (("a", cmd.About(host="h", version="1")), ("b", cmd.About(host="h", version="1")), ("c", None)):
        rules.state.presence.note_request(claim(name, about=about))
    rules.accept(cmd.Goodbye("b"))
    none = dict.fromkeys(get_args(cmd.WorkerState), 0)
    assert rules.accept(cmd.Workers(limit=1)).groups == [
        WorkerGroup("h", "1", none | {"idle": 1, "gone": 1}),
        WorkerGroup(None, None, none | {"idle": 1}),
    ]


def test_workers_are_forgotten_after_a_day(rules: RuleHarness) -> None:
    rules.accept(cmd.Release(id="a", lock_id=rules.held(worker="w-1")))
    rules.advance(DAY_MS - 1)
    assert listed(rules, state="gone") == [("w-1", "gone")]
    rules.advance(1)
    assert (listed(rules, state="gone"), rules.accept(cmd.Workers()).by_state["gone"]) == ([], 0)
    assert list(rules.state.presence.workers) == ["w-1"]
    rules.start(worker="w-2")
    assert list(rules.state.presence.workers) == ["w-2"]


def test_a_step_of_the_clock_does_not_change_the_state_of_workers(rules: RuleHarness) -> None:
    rules.state.presence.note_request(claim("before"))
    rules.now += 40 * DAY_MS
    rules.state.advance(rules.now, rules.lock_ms)
    assert listed(rules) == [("before", "idle")]
    rules.state.presence.note_request(claim("meanwhile"))
    rules.now -= 40 * DAY_MS
    rules.state.advance(rules.now, rules.lock_ms)
    assert [each.last_seen_at for each in rules.accept(cmd.Workers()).workers] == [NOW, NOW], (
        "none was heard in the future"
    )
    rules.advance(IDLE_AT_MOST_MS)
    assert listed(rules) == []
    assert unclaimed_ms(rules.state.presence, "default", "", rules.lock_ms) == IDLE_AT_MOST_MS


def test_a_worker_is_known_by_its_jobs_and_last_request(rules: RuleHarness) -> None:
    lock_id = rules.held(worker="w-1")
    rules.advance(7)
    rules.progress(lock_id)
    seen = rules.state.presence.workers["w-1"]
    assert (list(seen.jobs), seen.last_seen_at) == (["a"], NOW + 7)
    rules.now -= 5
    rules.accept(cmd.Release(id="a", lock_id=lock_id))
    assert (list(seen.jobs), seen.last_seen_at) == ([], NOW + 2)


def test_after_a_start_workers_were_last_seen_when_their_jobs_changed() -> None:
    jobs = [replace(held(seq, f"w-{seq}"), updated_at=NOW + at) for seq, at in ((1, -50), (2, -10), (3, -90))]
    state = State.opened(OpenedStore(Numbers(wall_ms=NOW, lock_ms=LockMs(400)), jobs))
    rules = RuleHarness()
    rules.state, rules.now, rules.lock_ms = (
        state,
        NOW + HOUR_MS,
        LockMs(450),
    )  # an hour later; downtime does not age locks
    page = workers(state, rules.moment, cmd.Workers())
    assert [(each.worker, each.jobs, each.last_seen_at) for each in page.workers] == [
        ("w-2", ["job-2"], NOW - 10),
        ("w-1", ["job-1"], NOW - 50),
        ("w-3", ["job-3"], NOW - 90),
    ]
    assert [(each.queues, each.kinds, each.about) for each in page.workers] == [(None, None, None)] * 3
    assert page.since == NOW + HOUR_MS
    state.advance(rules.now, rules.lock_ms)
    rules.advance(5)
    assert workers(state, rules.moment, cmd.Workers()).since == NOW + HOUR_MS
    assert state.presence.workers["w-3"].heard == 400 - 90


# -- claims -----------------------------------------------------------------------------------------------------------


def test_a_worker_is_shown_with_its_latest_claim(presence: WorkerPresence) -> None:
    presence.note_request(claim(queues="q", kinds="k l"))
    presence.note_request(claim(queues="r q"))
    worker = presence.workers["w-1"].claims
    assert worker is not None
    assert (worker.queues, worker.kinds, list(worker.workers)) == (["r", "q"], None, ["w-1"])
    (first,) = (claims for claims in presence.claim_sets("q") if claims is not worker)
    assert (first.queues, first.kinds, first.workers) == (["q"], ["k", "l"], {})


def test_the_view_of_a_worker_has_every_field(rules: RuleHarness) -> None:
    rules.held("b", worker="w-1", stall_after_ms=HOUR_MS)
    rules.advance(TTL)
    rules.held("a", worker="w-1")
    about = cmd.About(host="box")
    rules.state.presence.begin_wait(claim(queues="r q", kinds="k l", about=about))
    rules.advance(1)
    assert one(rules) == WorkerView("w-1", "silent", ["b", "a"], 2, 1, ["r", "q"], ["k", "l"], True, about, rules.now)


def test_a_start_does_not_set_the_latest_claim(presence: WorkerPresence) -> None:
    presence.note_request(cmd.Start(id="a", worker="w-1"))
    assert presence.workers["w-1"].claims is None
    assert list(presence.claim_sets("default")) == []


@pytest.mark.parametrize("then", [claim(queues="b", kinds="k"), claim(queues="a", kinds="l"), claim(queues="a")])
def test_a_claim_of_other_queues_or_kinds_replaces_the_latest_one(presence: WorkerPresence, then: cmd.Claim) -> None:
    first = presence.note_request(claim(queues="a", kinds="k")).claims
    worker = presence.note_request(then)
    assert first is not None
    assert worker.claims is not None
    assert (worker.claims.queues, worker.claims.kinds) == (then.queues, then.kinds)
    assert (list(first.workers), list(worker.claims.workers)) == ([], ["w-1"])


def test_equal_sets_are_stored_once(presence: WorkerPresence) -> None:
    """In any order; duplicate names count once."""
    for number, (queues, kinds) in enumerate([("q r", "k l"), ("r q", "l k"), ("q r q", "k l l"), ("r q", "k l")]):
        presence.note_request(claim(f"w-{number}", queues, kinds))
        presence.note_request(claim(f"w-{number}", queues, kinds))
    (only,) = presence.claim_sets("q")
    assert list(presence.claim_sets("r")) == [only]
    assert list(only.workers) == ["w-0", "w-1", "w-2", "w-3"]
    presence.note_request(claim("w-1", "q r"))
    assert len(list(presence.claim_sets("q"))) == 2, "no kinds: all of them"


def test_a_kind_is_found_without_comparing_all_kinds() -> None:
    """A queue can have a thousand sets of a hundred kinds, and each of its kinds is looked up in all of them."""
    compared: list[str] = []

    class Kind(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            compared.append(self)
            return str.__eq__(self, other)

    claims = ClaimSet(["q"], [Kind(f"k-{number}") for number in range(100)])
    compared.clear()
    assert claims.takes("k-50")
    assert not claims.takes("other")
    assert len(compared) < 10


def test_the_time_of_the_latest_claim_of_a_queue_and_kind(presence: WorkerPresence) -> None:
    presence.note_request(claim("resize", "q", "resize"))
    advance(presence, 100)
    presence.note_request(claim("both", "q r", "resize crop"))
    advance(presence, 100)
    presence.note_request(claim("any", "r"))
    advance(presence, 1_000)
    start = 0  # of the presence
    for queue, latest in (("q", (1_100, 1_100, start)), ("r", (1_200, 1_200, 1_200)), ("s", (start, start, start))):
        found = [2_300 - unclaimed_ms(presence, queue, kind, LockMs(2_300)) for kind in ("resize", "crop", "other")]
        assert found == [*latest]
    assert unclaimed_ms(presence, "q", "resize", LockMs(900)) == 0


def test_a_waiting_claim_counts_all_the_time(presence: WorkerPresence) -> None:
    claims = presence.begin_wait(claim(queues="q", kinds="k", wait_ms=60_000))
    other = presence.begin_wait(claim(queues="q", kinds="k", wait_ms=60_000))
    presence.end_wait("w-1", other, has_left=False)
    advance(presence, HOUR_MS)
    worker = presence.workers["w-1"]
    assert (presence.state(worker), presence.heard_at(worker)) == ("waiting", NOW + HOUR_MS)
    assert unclaimed_ms(presence, "q", "k", presence.lock_ms + 9) == 0
    advance(presence, DAY_MS)
    assert [name for name, _ in presence.remembered()] == ["w-1"]
    presence.end_wait("w-1", claims, has_left=False)
    assert unclaimed_ms(presence, "q", "k", presence.lock_ms + 9) == 9
    advance(presence, IDLE_AT_MOST_MS)
    assert presence.state(worker) == "gone"


@virtual_engine.in_checked_engine()
async def test_a_worker_is_seen_as_long_as_its_claim_waits(engine: virtual_engine.VirtualEngine) -> None:
    for is_cut in (False, True):
        waiting = await virtual_engine.waiting_claim(engine, "w", queues=["q"], wait_ms=60_000)
        await virtual_engine.seconds(50)
        assert await state_of(engine) == ("waiting", True, engine.now)
        if is_cut:
            waiting.cancel()
        await virtual_engine.until(lambda: len(engine.actor.waiting_claims) == 0)
        state, waits, ended_at = await state_of(engine)
        there = "waiting" if is_cut else "idle"
        assert (state, waits, engine.now - ended_at <= 1) == (there, False, True)
        await virtual_engine.seconds((LEFT_AFTER_MS if is_cut else IDLE_AT_MOST_MS) / 1000 - 1)
        assert await state_of(engine) == (there, False, ended_at)
        await virtual_engine.seconds(1)
        assert (await engine.yes(cmd.Workers())).workers == []


@virtual_engine.in_checked_engine()
async def test_a_served_claim_stops_waiting_and_a_rolled_back_one_continues(
    engine: virtual_engine.VirtualEngine,
) -> None:
    waiting = await virtual_engine.waiting_claim(engine, "w", wait_ms=60_000)
    engine.disk.write_errors.append(DiskFull())
    assert (await engine.no(cmd.Create(id="a"))).code == "storage_full"
    assert await state_of(engine) == ("waiting", True, engine.now)
    await virtual_engine.seconds(2)
    await engine.yes(cmd.Create(id="b"))
    answer = await waiting
    assert isinstance(answer, Response)
    assert [granted.job.id for granted in answer.data.grants] == ["b"]
    seen = engine.state.presence.workers["w"]
    assert (seen.waiting, list(seen.jobs)) == (0, ["b"])
    assert [claims.waiting for claims in engine.state.presence.claim_sets("default")] == [0]


async def state_of(engine: virtual_engine.VirtualEngine) -> tuple[str, bool, int]:
    (worker,) = (await engine.yes(cmd.Workers())).workers
    return worker.state, worker.waiting, worker.last_seen_at


# -- take-back --------------------------------------------------------------------------------------------------------


def silent(rules: RuleHarness, count: int) -> list[str]:
    """Create a worker with `count` jobs with an expired lock and one with a live lock."""
    locks = [rules.held(f"job-{n}", worker="w", stall_after_ms=HOUR_MS, progress_timeout_ms=0) for n in range(count)]
    rules.advance(TTL)
    return [*locks, rules.held("live", worker="w")]


def test_the_expired_jobs_of_a_silent_worker_are_taken_back(rules: RuleHarness) -> None:
    locks = silent(rules, 3)
    rules.accept(cmd.Extend(id="job-2", lock_id=locks[2]))
    rules.progress(locks[1], job_id="job-1")
    rules.advance(TTL - 1)
    rules.accept(cmd.Extend(id="job-2", lock_id=locks[2]))
    rules.accept(cmd.Extend(id="live", lock_id=locks[3]))
    rules.advance(1)
    done = rules.accept(cmd.TakeBack(name="w"), admin=True, by="admin:ana")
    assert (done.worker, done.recovered_jobs, done.reset_jobs, done.failed_jobs, done.more) == ("w", 2, 1, 1, False)
    assert [(each.job_id, each.action) for each in done.details] == [("job-0", "reset"), ("job-1", "failed")]
    assert done.details[0].reason == (
        "No update from worker w for 30 min at 0 % (attempt 1 of 1). The lock had expired. "
        "An operator took the job back."
    )
    first, second = rules.job("job-0"), rules.job("job-1")
    assert (first.status, first.stalls, first.attempt, first.grant) == ("queued", 1, 0, None)
    assert second.error is not None
    assert (second.status, second.stalls, second.error.code) == ("failed", 1, "stalled")
    assert [rules.job(job_id).status for job_id in ("job-2", "live")] == ["processing", "processing"]
    assert (rules.last().type, rules.last().by) == ("stalled", "admin:ana")
    lost = rules.reject(cmd.Complete(id="job-0", lock_id=locks[0]), "lock_lost")
    assert (lost.details["reason"], lost.details["rule"]) == ("taken_back", "take-back")
    assert one(rules).state == "busy"


def test_a_take_back_is_applied_in_slices(rules: RuleHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance_rules, "TAKEN_BACK", 2)
    silent(rules, 5)
    rules.accept(cmd.Recover(limit=9))
    done = [rules.accept(cmd.TakeBack(name="w"), admin=True) for _ in range(3)]
    assert [(len(each.details), each.more) for each in done] == [(2, True), (2, True), (1, False)]
    assert [(each.reset_jobs, each.failed_jobs, each.timestamp) for each in done[:2]] == [(2, 0, rules.now)] * 2


def test_a_take_back_of_as_many_jobs_as_a_slice_has_leaves_none(
    rules: RuleHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintenance_rules, "TAKEN_BACK", 2)
    silent(rules, 2)
    rules.accept(cmd.Recover(limit=9))
    done = rules.accept(cmd.TakeBack(name="w"), admin=True)
    assert (len(done.details), done.more) == (2, False)


def test_a_dry_run_of_a_take_back_changes_nothing(rules: RuleHarness) -> None:
    silent(rules, 2)
    events = len(rules.events)
    done = rules.accept(cmd.TakeBack(name="w", dry_run=True), admin=True)
    assert [each.job_id for each in done.details] == ["job-0", "job-1"]
    assert len(rules.events) == events
    assert one(rules).state == "silent"


def test_only_the_jobs_of_a_silent_worker_are_taken_back(rules: RuleHarness) -> None:
    unknown = rules.reject(cmd.TakeBack(name="nobody"), "worker_not_found", admin=True)
    assert unknown.message == "Worker nobody has not been seen since the start. List the workers: jobctl workers"
    assert unknown.details == {"worker": "nobody"}
    rules.held("a", worker="w")
    error = rules.reject(cmd.TakeBack(name="w"), "worker_not_silent", admin=True)
    assert error.message == (
        "Worker w is not silent, but busy: the lock of its job has not expired. "
        "To take a job from it: jobctl force-fail ID"
    )
    rules.held("b", worker="w")
    error = rules.reject(cmd.TakeBack(name="w", dry_run=True), "worker_not_silent", admin=True)
    assert "the locks of its 2 jobs have not expired" in error.message
    other = rules.held("d", worker="v")
    rules.accept(cmd.Complete(id="d", lock_id=other))
    error = rules.reject(cmd.TakeBack(name="v"), "worker_not_silent", admin=True)
    assert (error.details, "not silent, but idle: it holds no job. To" in error.message) == (
        {"worker": "v", "state": "idle"},
        True,
    )


def test_a_take_back_is_in_the_audit_log(rules: RuleHarness) -> None:
    silent(rules, 2)
    command = cmd.TakeBack(name="w", reason="w-7 lost its power")
    decision = rules.decide(command, admin=True)
    row = audit.entry(
        cmd.IssuedCommand(command, operator=cmd.Operator("ana", "127.0.0.1")), decision.answer, decision.changes, NOW
    )
    assert row is not None
    assert (row.what, row.details, row.jobs, row.reason) == ("take-back", {"worker": "w"}, 2, "w-7 lost its power")
    repeated = rules.decide(command, admin=True)
    row = audit.entry(
        cmd.IssuedCommand(command, operator=cmd.Operator("ana", "127.0.0.1")), repeated.answer, repeated.changes, NOW
    )
    assert row is not None
    assert (row.outcome, row.jobs) == ("worker_not_silent", 0)


@asynccontextmanager
async def slices_of_two() -> AsyncIterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maintenance_rules, "TAKEN_BACK", 2)
        yield


@virtual_engine.in_virtual_time
async def test_a_take_back_of_many_jobs_has_one_response() -> None:
    async with slices_of_two(), virtual_engine.checked_engine() as engine:
        for number in range(5):
            await engine.held(f"job-{number}", stall_after_ms=HOUR_MS)
        command, operator = cmd.TakeBack(name="w-1"), cmd.Operator("ana", "here", "part")
        rejected = await engine.maintainer.take_back(command, operator)
        assert isinstance(rejected, ApiError)
        assert rejected.code == "worker_not_silent"
        await virtual_engine.seconds(60)
        seen = await engine.maintainer.take_back(replace(command, dry_run=True), operator)
        assert isinstance(seen, TakeBackView)
        assert (len(seen.details), seen.more) == (2, True)
        done = await engine.maintainer.take_back(command, operator)
        assert isinstance(done, TakeBackView)
        assert (done.recovered_jobs, done.reset_jobs, len(done.details), done.more) == (5, 5, 5, False)


@virtual_engine.in_virtual_time
async def test_an_interrupted_take_back_reports_its_progress() -> None:
    """Because the worker came back, or because the daemon stops."""
    async with slices_of_two(), virtual_engine.checked_engine() as engine:
        locks = {}
        for number in range(6):
            locks[f"job-{number}"] = await engine.held(f"job-{number}", stall_after_ms=HOUR_MS)
        await virtual_engine.seconds(60)
        taking = asyncio.create_task(engine.maintainer.take_back(cmd.TakeBack(name="w-1"), None))
        await virtual_engine.until(lambda: engine.state.totals["queued"] == 2)
        for job_id in ("job-2", "job-3", "job-4", "job-5"):
            await engine.yes(cmd.Extend(id=job_id, lock_id=locks[job_id]))
        done = await taking
        assert isinstance(done, TakeBackView)
        assert (done.recovered_jobs, done.more) == (2, False)
        await virtual_engine.seconds(60)
        taking = asyncio.create_task(engine.maintainer.take_back(cmd.TakeBack(name="w-1"), None))
        await virtual_engine.until(lambda: engine.state.totals["queued"] == 4)
        engine.maintainer.stop()
        done = await taking
        assert isinstance(done, TakeBackView)
        assert (done.recovered_jobs, done.more) == (2, True)


# -- the description of a worker --------------------------------------------------------------------------------------


def test_the_description_of_a_worker_is_shown(rules: RuleHarness) -> None:
    about = cmd.About(instance="i-1", host="box", pid=42, version="1.0", concurrency=4)
    rules.state.presence.note_request(claim(about=about))
    assert one(rules).about == about
    rules.state.presence.note_request(claim())
    assert one(rules).about == about, "what it does not say again stays"
    newer = cmd.About(host="other")
    rules.state.presence.note_request(cmd.Start(id="a", worker="w-1", about=newer))
    assert one(rules).about == newer


def test_the_description_of_a_worker_is_at_most_a_kilobyte() -> None:
    body = msgspec.json.encode(LARGEST)
    assert 600 < len(body) <= 1024
    assert msgspec.json.decode(body, type=cmd.About) == LARGEST
    assert msgspec.json.encode(cmd.About()) == b"{}"


# -- bounds -----------------------------------------------------------------------------------------------------------


def test_idle_workers_are_forgotten_least_recently_seen_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_presence, "WORKERS_KEPT", 2)
    state = State()
    state.presence.note_seen("resting", NOW)
    state.reindex(None, held(1, "busy"))
    assert list(state.presence.workers) == ["resting", "busy"]
    state.presence.note_seen("resting", NOW + 1)
    state.presence.note_seen("new", NOW)
    assert list(state.presence.workers) == ["new", "busy"], "the busy one was passed over once"


def test_the_most_recently_seen_worker_is_forgotten_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_presence, "WORKERS_KEPT", 2)
    state = State()
    for worker in ("first", "second", "first", "third"):
        state.presence.note_seen(worker, NOW)
    assert list(state.presence.workers) == ["first", "third"]


def test_a_worker_with_a_job_or_a_waiting_claim_is_never_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one that is about to get its first job while all others hold one."""
    monkeypatch.setattr(worker_presence, "WORKERS_KEPT", 2)
    state = State()
    state.presence.begin_wait(claim("waiting"))
    for number in range(1, 5):
        state.reindex(None, held(number, f"w-{number}"))
    holders = {name: list(seen.jobs) for name, seen in state.presence.workers.items()}
    assert holders == {"waiting": []} | {f"w-{number}": [f"job-{number}"] for number in range(1, 5)}


def test_many_busy_workers_do_not_slow_down_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each new worker checks a few others, so that several new ones find the idle ones."""
    monkeypatch.setattr(worker_presence, "WORKERS_KEPT", 100)
    state = State()
    for number in range(1, 101):
        state.reindex(None, held(number, f"busy-{number}"))
    for number in range(20):
        state.presence.note_seen(f"resting-{number}", NOW)
    resting = [name for name, seen in state.presence.workers.items() if seen.is_resting]
    assert len(state.presence.workers) <= 100 + 100 // worker_presence.EVICTION_SCAN + 1
    assert resting[-1] == "resting-19"


def test_a_removed_job_has_no_expired_lock(presence: WorkerPresence) -> None:
    for job_id in ("a", "b"):
        presence.add_job("w", job_id, NOW)
        presence.set_expired("w", job_id, True)
    presence.remove_job("w", "a")
    assert (list(presence.workers["w"].jobs), list(presence.workers["w"].expired)) == (["b"], ["b"])


def test_a_job_of_an_unknown_worker_can_be_removed() -> None:
    """An invalid row: a grant without lock deadlines."""
    state = State()
    row = replace(held(1, "w"), deadlines=None)
    state.reindex(None, row)
    state.presence.set_expired("w", "job-1", True)
    state.presence.note_left("w")
    state.reindex(row, None)
    assert state.presence.workers == {}


def test_claim_sets_are_bounded_and_forgetting_one_moves_since(
    presence: WorkerPresence, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_presence, "NAMES_KEPT", 40)
    presence._names_kept = 40
    waiting = presence.begin_wait(claim("waiting", "waiting", "k"))
    for number in range(200):
        advance(presence, 10)
        presence.note_request(claim(f"w-{number % 7}", f"q-{number}", "k l m"))
        check_sets(presence)
        assert presence._names <= 40 + 4
    assert presence.since > LockMs(1_000)
    assert unclaimed_ms(presence, "q-199", "k", presence.lock_ms + 9) == 9
    assert unclaimed_ms(presence, "q-0", "k", presence.lock_ms) == presence.lock_ms - presence.since < 2_000
    assert list(presence.claim_sets("waiting")) == [waiting]


def test_the_quarter_of_the_sets_that_was_claimed_longest_ago_is_forgotten(presence: WorkerPresence) -> None:
    presence._names_kept = 11
    for number in range(13):
        advance(presence, 10)
        presence.note_request(claim(f"w-{number}", f"q-{number}"))
    assert [number for number in range(13) if not list(presence.claim_sets(f"q-{number}"))] == [0, 1, 2, 3]
    assert (presence.since, presence.has_forgotten) == (LockMs(1_040), True)


def test_waiting_claim_sets_are_not_recounted_for_each_new_one(
    presence: WorkerPresence, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sets of waiting claims are never forgotten. The limit grows with them; otherwise each new set would sort all."""
    monkeypatch.setattr(worker_presence, "NAMES_KEPT", 10)
    presence._names_kept = 10
    forgotten: list[int] = []
    original = presence._forget_sets

    def counted() -> None:
        forgotten.append(presence._names)
        original()

    monkeypatch.setattr(presence, "_forget_sets", counted)
    for number in range(100):
        presence.begin_wait(claim(f"w-{number}", f"q-{number}"))
    check_sets(presence)
    assert presence._names == 100
    assert forgotten == [11, 14, 18, 23, 29, 37, 47, 59, 74, 93], "each time the limit grows by a quarter"


def check_sets(presence: WorkerPresence) -> None:
    """Compare the index and the counts with a recount."""
    sets: list[ClaimSet] = list(presence._sets.values())
    assert presence._names == sum(claims.names for claims in sets)
    found: dict[str, set[ClaimSet]] = {}
    for claims in sets:
        for queue in claims.queues:
            found.setdefault(queue, set()).add(claims)
    assert {queue: set(claims) for queue, claims in presence._of_queue.items()} == found
    for name, worker in presence.workers.items():
        assert worker.claims is None or (worker.claims in sets and name in worker.claims.workers)
    assert all(presence.workers[name].claims is claims for claims in sets for name in claims.workers)


@pytest.mark.parametrize("seed", range(3))
def test_any_claims_in_any_order_match_a_recount(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_presence, "NAMES_KEPT", 30)
    monkeypatch.setattr(worker_presence, "WORKERS_KEPT", 6)
    dice, presence = random.Random(seed), WorkerPresence()
    presence._names_kept = 30
    waits: list[tuple[str, ClaimSet]] = []
    claims: list[tuple[LockMs, cmd.Claim]] = []
    for _ in range(400):
        advance(presence, dice.randint(0, 50))
        worker = f"w-{dice.randint(1, 12)}"
        queues = " ".join(dice.choices("qrstuv", k=dice.randint(1, 3)))
        kinds = dice.choice([None, "k", "k l", "l m n"])
        command = claim(worker, queues, kinds)
        if dice.random() < 0.2:
            waits.append((worker, presence.begin_wait(command)))
        elif waits and dice.random() < 0.3:
            worker, waited = waits.pop(dice.randrange(len(waits)))
            presence.end_wait(worker, waited, has_left=False)
            command = cmd.Claim(worker=worker, queues=waited.queues, kinds=waited.kinds)
        else:
            presence.note_request(command)
        claims.append((presence.lock_ms, command))
        check_sets(presence)
        for queue, kind in (("q", "k"), ("u", "m"), ("x", "k")):
            fitting = [at for at, each in claims if queue in each.queues and (not each.kinds or kind in each.kinds)]
            is_waiting = any(queue in each.queues and each.takes(kind) for _, each in waits)
            latest = presence.lock_ms if is_waiting else max(fitting, default=LockMs(0))
            if latest > presence.since:
                assert unclaimed_ms(presence, queue, kind, presence.lock_ms) == presence.lock_ms - latest
            unclaimed = unclaimed_ms(presence, queue, kind, presence.lock_ms)
            assert unclaimed == 0 if is_waiting else unclaimed <= presence.lock_ms - latest


def test_the_cost_of_a_page_of_workers_depends_on_its_size(rules: RuleHarness) -> None:
    for number in range(500):
        rules.state.presence.note_request(claim(f"w-{number:03}"))
    page = workers(rules.state, rules.moment, cmd.Workers())
    assert (len(page.workers), page.next_cursor, page.by_state["idle"]) == (200, f"{NOW} w-199", 500)
    rules.advance(IDLE_AT_MOST_MS)
    folded = workers(rules.state, rules.moment, cmd.Workers())
    assert (folded.workers, folded.next_cursor, folded.by_state["gone"]) == ([], None, 500)
    last = workers(rules.state, rules.moment, cmd.Workers(state="gone", cursor=f"{NOW} w-399"))
    assert (len(last.workers), last.next_cursor, last.by_state["gone"]) == (100, None, 500)
