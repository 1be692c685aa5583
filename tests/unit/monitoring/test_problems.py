"""Problems: which conditions find which subjects, what they say, when problems open and close, and their bounds."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from jobd.config import AlertsSection, Duration
from jobd.core.stats import HOURS_NEEDED, SAMPLES_NEEDED, SLOW_JOBS, STEP_MS
from jobd.engine.clock import loop_time
from jobd.model import commands as cmd
from jobd.model.clocks import BootMs
from jobd.model.events import Event
from jobd.model.job import DAY_MS, HOUR_MS, MINUTE_MS, Job, Options
from jobd.model.problems import Problem, Subject
from jobd.model.responses import UNSEEN_MS, ClusterView, HealthView, NodeView
from jobd.model.storage import DiskSpace
from jobd.model.webhooks import FailingWebhook
from jobd.monitoring.problems import life
from jobd.monitoring.problems.board import ProblemBoard
from jobd.monitoring.problems.catalogue import ALERTS, CONDITIONS
from jobd.monitoring.problems.condition import Condition, Finding
from jobd.monitoring.problems.life import ProblemLife
from jobd.monitoring.problems.queue_kind_counts import MINUTES, PAIRS_KEPT, Counts, QueueKindCounts
from tests.support.calls import DISK_USE
from tests.support.factories import NOW
from tests.support.memory_storage import MemoryStorage
from tests.support.problem_stage import problems_of
from tests.support.virtual_engine import VirtualEngine, in_engine, in_virtual_time, row, seconds


async def found(problems: ProblemBoard) -> dict[str, Problem]:
    """Evaluate a moment later, and return the list by id."""
    await seconds(0.002)
    await problems.check()
    return {each.id: each for each in problems.view().problems}


# -- queues and kinds --------------------------------------------------------------------------------------------------


async def waiting(engine: VirtualEngine, queue: str, kind: str = "") -> None:
    await engine.yes(cmd.Create(queue=queue, kind=kind))


@in_engine()
async def test_two_queues_without_workers_are_two_problems_with_their_own_times(engine: VirtualEngine) -> None:
    problems = problems_of(engine, hold_ms=30_000, clear_ms=60_000)
    about = cmd.About(host="web-1")
    await engine.yes(cmd.Claim(queues=["mail"], worker="mailer-1", about=about))
    await engine.yes(cmd.Goodbye(name="mailer-1", reason="stopped"))
    await waiting(engine, "mail", "receipt")
    await seconds(60)
    await waiting(engine, "billing")
    opened: dict[str, float] = {}
    began = loop_time()
    for _ in range(60):
        await problems.check()
        for each in problems.view().problems:
            opened.setdefault(each.id, loop_time() - began)
        await seconds(5)
    assert opened == {"no_workers/mail/receipt": 95, "no_workers/billing": 155}
    mail, billing = problems.view().problems
    assert (mail.severity, billing.severity) == ("critical", "warning"), "billing never had a worker"
    assert mail.title.startswith(
        "1 job is due, for 5 min 55 s, and no worker takes it. The last, mailer-1@web-1, said goodbye"
    )
    assert mail.hides == ["waits/mail/receipt"]
    assert mail.cure[0].command == "jobctl run --queue mail -- CMD"
    await engine.yes(cmd.Claim(queues=["mail"], worker="mailer-2"))
    await problems.check()
    await seconds(60)
    await problems.check()
    (left,) = problems.view().problems
    assert (left.id, left.since) == ("no_workers/billing", billing.since)
    (alert,) = [each for each in problems.alerts() if each.firing and each.name == "queue_without_workers"]
    assert alert.hint.startswith("billing: 1 job is due")
    assert alert.hint.endswith(f"jobctl why {_job_of(left)}.")
    assert problems.life.opened_total == {("no_workers", "critical"): 1, ("no_workers", "warning"): 1}


def _job_of(problem: Problem) -> str:
    return (problem.cure[1].command or "").rpartition(" ")[2]


@in_engine()
async def test_busy_starting_and_paused_pairs_do_not_lack_workers(engine: VirtualEngine) -> None:
    problems = problems_of(engine)
    for queue in ("busy", "started", "paused", "other"):
        await engine.yes(cmd.Create(id=f"first-{queue}", queue=queue, kind="film"))
        await engine.yes(cmd.Create(id=f"next-{queue}", queue=queue, kind="film"))
    await engine.yes(cmd.Claim(queues=["busy"], worker="w-1", lock_ttl_ms=HOUR_MS))
    await engine.yes(cmd.Start(id="first-started", worker="w-2", lock_ttl_ms=HOUR_MS))
    await engine.yes(cmd.Pause(name="paused"))
    await engine.yes(cmd.Claim(queues=["other"], kinds=["song"], worker="w-3"))
    await seconds(301)
    assert (await found(problems))["waits/busy/film"].cure[1].command == "jobctl run --queue busy -- CMD"
    listed = {each.id: each.title for each in (await found(problems)).values()}
    assert listed == {
        "no_workers/other/film": "2 jobs are due, the oldest for 5 min 1 s, and no worker takes them.",
        "waits/busy/film": "1 job is due, for 5 min 1 s. Its only worker is busy, the longest for 5 min 1 s.",
        "waits/started/film": "1 job is due, for 5 min 1 s. No worker claims this queue and kind.",
    }
    await seconds(600)
    assert "paused_without_reason/paused" in await found(problems)
    await engine.yes(cmd.Pause(name="paused", reason="deploy"))
    assert "paused_without_reason/paused" not in await found(problems)
    (known,) = problems.view().known
    assert (known.jobs, "deploy" in known.title) == (2, True)
    rule = await engine.yes(cmd.AddQuietRule(host="web-1", reason="bad build"), by="admin:ana")
    await problems.check()
    known = problems.view().known[-1]
    assert (known.id, known.since) == ("quiet/web-1", rule.at)
    assert known.cure[0].command == f"jobctl resume-worker --rule {rule.id}"
    assert known.title.startswith("Quiet by operator ana at ")
    assert known.title.endswith("until resumed: bad build. It covers 0 workers.")
    assert [each.id for each in problems.view("critical").problems] == []
    assert [each.id for each in problems.view(queue="busy").problems] == ["waits/busy/film"]


@in_engine()
async def test_a_threshold_below_a_minute_holds(engine: VirtualEngine) -> None:
    problems = problems_of(engine, AlertsSection(queue_without_workers=Duration(5_000)))
    await waiting(engine, "mail")
    await seconds(4)
    assert await found(problems) == {}
    await seconds(2)
    assert list(await found(problems)) == ["no_workers/mail"]


@in_engine()
async def test_a_start_misses_no_worker_for_three_minutes(engine: VirtualEngine) -> None:
    problems = problems_of(engine)
    await waiting(engine, "mail")
    await seconds(150)
    problems._first = engine.clock.boot_ms() - 60_000
    assert await found(problems) == {}
    slow = problems_of(engine, hold_ms=30_000)
    slow._first = engine.clock.boot_ms()
    for _ in range(36):
        assert await found(slow) == {}
        await seconds(4.998)
    assert list(await found(slow)) == ["no_workers/mail"], "three minutes after the start, not half a minute later"
    announced = slow.announced()
    assert announced is not None
    assert not announced.is_settled


@in_engine()
async def test_a_suspect_jump_of_the_clock_makes_no_job_wait(engine: VirtualEngine) -> None:
    problems = problems_of(engine)
    await waiting(engine, "mail")
    engine.step_ms = 400 * DAY_MS
    assert list(await found(problems)) == ["clock/store"]


@in_engine()
async def test_failing_holds_from_half_of_the_attempts_of_a_pair(engine: VirtualEngine) -> None:
    problems = problems_of(engine)
    for number in range(20):
        lock_id = await engine.held(f"a-{number}", queue="a", kind="k")
        assert await found(problems) == {}
        if number < 10:
            await engine.yes(cmd.Complete(id=f"a-{number}", lock_id=lock_id))
        else:
            fail = cmd.Fail(id=f"a-{number}", lock_id=lock_id, error_message="Error: no codec\nat", error_code="Error")
            await engine.yes(fail)
    (failing,) = (await found(problems)).values()
    assert (failing.id, failing.severity, failing.value, failing.jobs) == ("failing/a/k", "warning", 50, 10)
    assert failing.title.startswith("10 of 20 attempts failed since ")
    assert failing.title.endswith("UTC: Error: no codec")
    await seconds(540)
    (failing,) = (await found(problems)).values()
    assert failing.title == "10 of 20 attempts failed in the last 10 minutes: Error: no codec"
    problems.scene.limits = AlertsSection(failure_rate=0.55)
    assert list(await found(problems)) == ["failing/a/k"], "it closes at 0.9 of its threshold"
    problems.scene.limits = AlertsSection(failure_rate=0.56)
    assert await found(problems) == {}
    problems.scene.limits = AlertsSection(failure_rate_attempts=21)
    assert await found(problems) == {}


@in_engine()
async def test_jobs_that_expire_or_are_due_far_ahead_and_silent_workers(engine: VirtualEngine) -> None:
    problems = problems_of(engine)
    for number in range(20):
        if number == 10:
            await seconds(30)
            await engine.cleanup()
            assert list(await found(problems)) == ["expiring/push"]
        await engine.yes(cmd.Create(queue="geo", delay_ms=8 * DAY_MS))
        if number < 10:
            assert await found(problems) == {}
            await engine.yes(cmd.Create(queue="push", expires_in_ms=20_000))
    await engine.held("a", queue="film", lock_ttl_ms=60_000, stall_after_ms=HOUR_MS)
    await seconds(62)
    await engine.yes(cmd.Create(queue="geo"))  # any command advances the time of the state
    listed = await found(problems)
    assert listed["expiring/push"].title.startswith("10 of 10 jobs expired before a worker took them. No worker")
    assert listed["due_far/geo"].title == "20 of 21 jobs created in the last 10 minutes are due in over a week."
    plan = listed["due_far/geo"].cure[1].command
    assert plan == "jobctl cancel --where queue=geo --where status=queued --where since=10m"
    silent = listed["worker_silent/w-1"]
    assert silent.title.startswith("Silent for 1 min 2 s: 1 job with expired locks. By ")
    assert silent.title.endswith(" UTC, 1 is queued again.")
    assert (silent.cure[0].command, silent.cure[0].changes) == ("jobctl take-back w-1", True)


@in_engine()
async def test_jobs_due_far_ahead_are_usual_on_the_second_day(engine: VirtualEngine) -> None:
    problems = problems_of(engine)
    for day in range(2):
        for _ in range(20):
            await engine.yes(cmd.Create(queue="geo", delay_ms=30 * DAY_MS))
        assert ("due_far/geo" in await found(problems)) == (day == 0)
        await seconds(86_400)


@in_engine()
async def test_a_silent_worker_says_what_becomes_of_its_jobs(engine: VirtualEngine) -> None:
    problems = problems_of(engine)
    for options in ({}, {}, {"id": "half"}, {"max_stalls": 0}, {"on_stall": "fail"}):
        await engine.yes(cmd.Create(queue="film", **options))
    claim = cmd.Claim(queues=["film"], worker="w-1", limit=5, lock_ttl_ms=60_000, stall_after_ms=0)
    locks = {each.job.id: each.lock_id for each in (await engine.yes(claim)).grants}
    await engine.yes(cmd.Progress(id="half", lock_id=locks["half"], progress=40))
    await seconds(60)
    await engine.yes(cmd.Create())
    title = (await found(problems))["worker_silent/w-1"].title
    outcomes = "2 are queued again, 1 fails (no attempts left), 1 fails (max_stalls), 1 fails (on_stall)."
    assert title.endswith(f"UTC, {outcomes}")


@in_engine()
async def test_each_slow_kind_is_found_and_does_not_flap(engine: VirtualEngine) -> None:
    problems = problems_of(engine)
    usual = {"film": 1023, "mail": 40, "song": 511}
    for _ in range(HOURS_NEEDED):
        for kind, ms in usual.items():
            _work(engine, kind, ms)
        await seconds(3600)
    for kind, ms in {"film": 3071, "mail": 120, "song": 1023}.items():  # mail is too short to matter
        _work(engine, kind, ms)
    (slow,) = (await found(problems)).values()
    assert (slow.id, slow.title) == ("slow_kind/film", "95 % of its jobs take up to 3 s, usually 1 s.")
    problems.scene.limits = AlertsSection(slower_than_usual=3.1)
    assert list(await found(problems)) == ["slow_kind/film"], "it continues just below the threshold"
    problems.scene.limits = AlertsSection(slower_than_usual=3.4)
    assert await found(problems) == {}
    problems.scene.limits = AlertsSection(slower_than_usual=3.1)
    assert await found(problems) == {}, "but it does not begin there"


@in_engine()
async def test_a_few_long_jobs_do_not_make_a_kind_slow(engine: VirtualEngine) -> None:
    problems = problems_of(engine)
    for _ in range(HOURS_NEEDED):
        _work(engine, "film", 1023)
        await seconds(3600)
    _work(engine, "film", 1023)
    for number in range(SLOW_JOBS):
        assert await found(problems) == {}, number
        engine.state.counters.baselines.add("film", engine.now, 3071)
    assert list(await found(problems)) == ["slow_kind/film"]


def _work(engine: VirtualEngine, kind: str, ms: int) -> None:
    for _ in range(SAMPLES_NEEDED):
        engine.state.counters.baselines.add(kind, engine.now, ms)


@in_engine()
async def test_ten_thousand_sick_pairs_give_a_hundred_subjects_and_the_rest(engine: VirtualEngine) -> None:
    problems = problems_of(engine)
    for number in range(10_000):
        due = engine.now - 400_000 - number  # `waits` holds as well, and is hidden
        options = Options(queue=f"q-{number}")
        engine.state.reindex(None, Job(number + 1, f"job-{number}", options, "queued", due, due, due))
    listed = await found(problems)
    assert len(listed) == life.SUBJECTS
    assert problems.view().rest == 9_900
    assert next(iter(listed)) == "no_workers/q-9999"
    assert listed["no_workers/q-9999"].rest == 9_900
    assert problems._next_scan > loop_time(), "so many are scanned less often"


# -- the daemon, its jobs and its webhooks -----------------------------------------------------------------------------


@in_virtual_time
async def test_conditions_of_the_daemon_say_what_holds() -> None:
    storage = MemoryStorage()
    for number in range(11):
        storage.put(replace(row(number + 1), options=Options(priority=2_000)))
    async with VirtualEngine(storage) as engine:
        failing = [FailingWebhook("b", 300_001, "500: broken", 608, True), FailingWebhook("c", 9, "x")]
        problems = problems_of(engine, AlertsSection(0, 0, Duration(0)), failing_webhooks=lambda: failing)
        assert [each.condition for each in (await found(problems)).values()] == ["webhook", "no_workers"]
        await engine.cleanup()
        lock_id = await engine.held("cat-1")
        await engine.yes(cmd.EndGrants(ids=["cat-1"], last=True), by="daemon")
        await engine.yes(cmd.Start(id="cat-1", worker="w-2", lock_ttl_ms=HOUR_MS))
        await seconds(2)
        engine.state.counters.recovered[engine.now // STEP_MS] = 1
        engine.state.quarantined["bad-1"] = "checksum"
        released = engine.state.jobs["cat-1"]
        engine.state.release_loops["cat-1"] = 20
        part = replace((await problems.scene.health.view()).cache, status="unhealthy", message="It differs.")
        problems.scene.health.last = replace(cast(HealthView, problems.scene.health.last), cache=part)
        listed = {each.condition: each for each in (await found(problems)).values()}
    expected = {
        "cache": "It differs.",
        "damaged": "Quarantined jobs: bad-1. Run: jobd doctor",
        "waits": "11 jobs are due, the oldest for ",
        "granted_twice": "Two workers may have worked on it at once (1 in the last hour): it was taken from w-1 ",
        "webhook": "Has accepted nothing for 5 min: 500: broken. It carries these problems: 608 messages wait.",
        "cleanup_issues": "The latest cleanup run could not fix 11 invalid rows, for example job-1, job-2, job-3.",
        "release_loop": "1 job is released over and over by w-1; cat-1 20 times.",
        "stalled_jobs": "0 jobs have stalled, and 1 was recovered in the last 10 minutes.",
        "processing_jobs": "1 job is processing",
        "average_processing": "Jobs take 2 s on average",
    }
    assert released.ended is not None
    assert lock_id not in repr(listed)
    for condition, text in expected.items():
        assert listed[condition].title.startswith(text), listed[condition].title
    assert listed.keys() == expected.keys()
    assert listed["webhook"].severity == "critical"
    assert listed["release_loop"].cure[1].command == "jobctl quiet w-1 --reason TEXT"


@pytest.mark.parametrize(
    ("free", "total", "severity"),
    [
        (10 << 30, 100 << 30, None),
        ((10 << 30) - 1, 100 << 30, "warning"),
        (1 << 30, 4 << 30, None),
        ((1 << 30) - 1, 4 << 30, "warning"),
        (160 << 20, 640 << 20, None),
        ((160 << 20) - 1, 640 << 20, "warning"),
        (1 << 20, 1 << 29, "critical"),
    ],
)
def test_disk_holds_below_a_tenth_or_one_gibibyte_of_a_large_disk(free: int, total: int, severity: str | None) -> None:
    async def evaluate() -> None:
        async with VirtualEngine() as engine:
            problems = problems_of(engine)
            engine.disk.disk_space = None
            assert await found(problems) == {}
            engine.disk.disk_space = DiskSpace("/srv/jobd.db", free, total)
            await seconds(2)
            listed = await found(problems)
            assert [each.severity for each in listed.values()] == [severity] * bool(severity)
            assert all(each.title.endswith("free on the disk of /srv/jobd.db.") for each in listed.values())
            problems.scene.rejects_creates, problems.scene.disk_use = lambda: True, lambda: DISK_USE
            problem = (await found(problems))["disk/disk"]
            assert problem.title.endswith("New jobs are rejected.")
            assert problem.cause.startswith(
                "357.0 MiB are in files that are not jobd's. reports / monthly holds about 105.0 MiB, of which "
                "90.0 MiB are results. On"
            )

    in_virtual_time(evaluate)()


@in_engine()
async def test_the_problem_of_the_disk_counts_free_pages_and_names_other_files(engine: VirtualEngine) -> None:
    problems, mib = problems_of(engine), 1 << 20
    use = replace(DISK_USE, not_jobd_bytes=300 * mib, free_page_bytes=106 * mib)
    problems.scene.disk_use = lambda: use
    engine.disk.disk_space = DiskSpace("/srv/jobd.db", 53 * mib, 640 * mib)
    problem = (await found(problems))["disk/disk"]
    assert problem.cause.startswith("300.0 MiB are in files that are not jobd's. reports / monthly holds about 105.0 ")
    assert (problem.cure[1].command or "").startswith('du -xh --max-depth=2 "$(df --output=target /srv/jobd.db')
    use = replace(use, free_page_bytes=107 * mib)
    await seconds(2)
    assert await found(problems) == {}


@in_engine()
async def test_a_disk_that_is_full_soon_is_found_by_the_rate_of_the_last_hour(engine: VirtualEngine) -> None:
    problems, gib = problems_of(engine), 1 << 30
    for minute in range(90):
        engine.disk.disk_space = DiskSpace("/srv/jobd.db", (200 - minute) * gib, 400 * gib)
        listed = await found(problems)
        assert ("disk/disk" in listed) == (minute >= 29), minute  # 29 GiB an hour would fill it in 6 h
        await seconds(60)
    assert (
        listed["disk/disk"].title == "111.0 GiB of 400.0 GiB are free on the disk of /srv/jobd.db, full in 1 h 51 min."
    )
    assert listed["disk/disk"].severity == "warning"
    engine.disk.disk_space = DiskSpace("/srv/jobd.db", 50 * gib, 400 * gib)
    assert (await found(problems))["disk/disk"].severity == "critical", "within an hour"
    engine.disk.disk_space = DiskSpace("/srv/jobd.db", 180 * gib, 400 * gib)
    await seconds(2)
    assert await found(problems) == {}


@in_engine()
async def test_a_disk_that_is_full_within_an_hour_is_found_after_ten_minutes(engine: VirtualEngine) -> None:
    problems, gib = problems_of(engine), 1 << 30
    for minute in range(11):
        engine.disk.disk_space = DiskSpace("/srv/jobd.db", (200 - 5 * minute) * gib, 400 * gib)
        listed = await found(problems)
        await seconds(60)
    assert listed["disk/disk"].title.endswith("full in 30 min.")


A = NodeView("a", "", "leader", 100, 1_000, 0, 1, False)
B = NodeView("b", "", "standby", 100, 1_000, 0, 1, False)
VIEW = ClusterView(
    role="leader", record=1_000, synchronous=True, require_sync=True, oldest_transaction_ms=10, nodes=[A, B]
)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"role": "single", "nodes": []}, {}),
        ({"nodes": [A, replace(B, lag_records=395, lag_ms=39_900)]}, {"standby_behind/b": "It is 39 s behind"}),
        ({"nodes": [A, B, replace(B, name="c", seen_ms=45_000)]}, {"standby_behind/c": "It was last seen 45 s ago."}),
        ({"nodes": [A]}, {"no_standby/cluster": "No standby is running, so no node takes over from this one. Start"}),
        (
            {"nodes": [A, replace(B, seen_ms=45_000)]},
            {"no_standby/cluster": "No standby is running, so no node takes over from this one: b was last seen 45 s"},
        ),
        ({"nodes": [A, replace(B, seen_ms=UNSEEN_MS)]}, {"no_standby/cluster": "No standby is running"}),
        ({"synchronous": False}, {"journal_not_synchronous/cluster": "PostgreSQL has no synchronous standby"}),
        ({"synchronous": False, "require_sync": False}, {}),
        ({"synchronous": None, "oldest_transaction_ms": None}, {}),
        (
            {"writable": ["a:5432", "b:5432"]},
            {"two_primaries/cluster": "PostgreSQL accepts writes at a:5432 and b:5432."},
        ),
        ({"oldest_transaction_ms": 61_000}, {"database_horizon/cluster": "The oldest transaction in the database"}),
        (
            {"nodes": [A, replace(B, clock_ahead_ms=-1_500)]},
            {"clocks_differ/b": "The wall clock of node b is 1.5 s behind"},
        ),
        (
            {"nodes": [replace(A, clock_ahead_ms=2_000), B]},
            {"clocks_differ/a": "The wall clock of node a is 2 s ahead of"},
        ),
    ],
)
def test_conditions_of_a_cluster_say_what_holds(changes: dict[str, Any], expected: dict[str, str]) -> None:
    async def evaluate() -> None:
        async with VirtualEngine() as engine:
            view = replace(VIEW, **changes)
            problems = problems_of(engine, cluster=lambda: view)
            listed = await found(problems)
            assert listed.keys() == expected.keys()
            assert all(listed[id_].title.startswith(text) for id_, text in expected.items())
            assert len(problems.alerts()) == len(ALERTS) - (0 if view.role == "leader" else 6)

    in_virtual_time(evaluate)()


# -- life --------------------------------------------------------------------------------------------------------------


@in_engine()
async def test_alerts_are_derived_and_quiet_ones_have_a_hint(engine: VirtualEngine) -> None:
    problems = problems_of(engine, AlertsSection(processing_jobs=0))
    assert all(alert.hint and not alert.firing for alert in problems.alerts())
    thresholds = [5, 0, 600, 10, 0, 2, 0, 0, 0, 300, 120, 300, 0.5, 90, 0]
    assert [alert.threshold for alert in problems.alerts()] == thresholds
    await engine.held("a")
    await found(problems)
    (firing,) = [alert for alert in problems.alerts() if alert.firing]
    assert (firing.name, firing.value, firing.since, firing.severity) == ("processing_jobs", 1, engine.now, "notice")


@in_engine()
async def test_run_evaluates_survives_a_bug_and_knows_nothing_in_the_first_30_s(engine: VirtualEngine) -> None:
    problems = problems_of(engine, AlertsSection(processing_jobs=0), hold_ms=30_000, clear_ms=60_000)
    problems._first = None
    changes: list[list[str]] = []
    problems.on_change = lambda: changes.append([each.id for each in problems.view().problems])
    await engine.held("a", lock_ttl_ms=HOUR_MS)
    running = asyncio.create_task(problems.run())
    with capture_logs() as logs:
        await seconds(29)
        assert (problems.view().evaluated_at, problems.announced()) == (None, None)
        problems.scene.failing_webhooks = cast(Any, lambda: 1 / 0)
        await seconds(5)
        problems.scene.failing_webhooks = list
        await seconds(7)
    assert problems.view().evaluated_at is not None
    assert changes[-1] == ["processing_jobs/daemon"]
    assert [each["event"] for each in logs] == ["problems_failed", "problem_opened"]
    problems.stop()
    await running


@in_engine()
async def test_a_disk_that_does_not_respond_is_one_problem_in_time(engine: VirtualEngine) -> None:
    problems = problems_of(engine, hold_ms=30_000)
    health = problems.scene.health
    view = await health.view()
    database = replace(view.database, status="unhealthy", message="No write.")
    cache = replace(view.cache, status="unhealthy", message="The mailbox waits.")

    async def late() -> HealthView:
        await seconds(2)
        health.last = replace(view, database=database, cache=cache)
        return health.last

    health.view = late  # type: ignore[method-assign]
    running = asyncio.create_task(problems.run())
    await seconds(32.5)  # 2 s of the first measurement, and half a minute
    problems.stop()
    await running
    assert [(each.id, each.severity) for each in problems.view().problems] == [("database/database", "critical")]
    database = replace(database, status="degraded", message="Damage: x. The reserve file is missing.")
    health.damage = "Damage: x."
    await late()
    degraded = (await found(problems))["database/database"]
    assert (degraded.title, degraded.severity) == ("The reserve file is missing.", "warning")


def findings(*names: str, jobs: int = 1, **fields: Any) -> list[Finding]:
    return [Finding(subject=Subject(type="pair", queue=name), title="It is so.", jobs=jobs, **fields) for name in names]


class LifeHarness:
    """A life of three conditions, with a clock that the test moves."""

    def __init__(self) -> None:
        self.conditions = [
            Condition(name, "warning", lambda scene: None, hides=("hidden",) if name == "hider" else ())
            for name in ("hidden", "hider", "other")
        ]
        self.life = ProblemLife()
        self.ms = 0

    def see(self, after_s: int, **found: list[Finding]) -> bool:
        self.ms += after_s * 1000
        now, boot_ms = NOW + self.ms, BootMs(self.ms)
        for condition in self.conditions:
            list(self.life.find(condition, found.get(condition.name, ()), now, boot_ms))
        has_changed = self.life.update(now, boot_ms)
        for _ in self.life.write_log():
            pass
        return has_changed

    @property
    def listed(self) -> list[str]:
        return [each.id for each in self.life.listed]


def test_a_problem_opens_after_30_s_and_closes_after_60_s() -> None:
    at = LifeHarness()
    with capture_logs() as logs:
        assert not at.see(0, other=findings("a"))
        assert not at.see(25, other=findings("a"))
        assert not at.see(5)
        assert not at.see(5, other=findings("a")), "a flicker begins again"
        assert at.see(30, other=findings("a"))
        assert (at.listed, at.life.listed[0].since) == (["other/a"], NOW + 35_000)
        assert not at.see(1)
        assert not at.see(58)
        assert at.life.listed[0].over_since == NOW + 66_000
        assert not at.see(1, other=findings("a"))
        assert at.life.listed[0].over_since is None
        assert not at.see(59)
        assert at.see(1)
        assert (at.listed, at.life.opened) == ([], frozenset())
    assert [each["event"] for each in logs] == ["problem_opened", "problem_closed"]


def test_a_problem_that_is_ten_times_as_bad_or_more_severe_changes_once_in_30_minutes() -> None:
    at = LifeHarness()
    for after_s, jobs, severity, changes in [
        (0, 5, "notice", False),
        (30, 5, "notice", True),
        (5, 49, "notice", False),
        (5, 50, "notice", True),
        (5, 5000, "critical", False),
        (1_795, 50, "critical", True),
    ]:
        assert at.see(after_s, other=findings("a", jobs=jobs, severity=severity)) == changes
    assert at.life.changed_at("other/a") == NOW + at.ms


def test_one_problem_hides_those_that_it_explains() -> None:
    at = LifeHarness()
    at.see(0, hider=findings("a"), hidden=findings("a", "b"))
    at.see(30, hider=findings("a"), hidden=findings("a", "b"))
    assert (at.listed, at.life.listed[0].hides) == (["hider/a", "hidden/b"], ["hidden/a"]) or at.listed == [
        "hidden/b",
        "hider/a",
    ]
    assert [each.id for each in at.life.open_problems()] == ["hidden/a", "hidden/b", "hider/a"]
    assert at.life.opened_total == {("hider", "warning"): 1, ("hidden", "warning"): 1}


def test_a_worse_newcomer_replaces_no_problem() -> None:
    at = LifeHarness()
    first = findings(*(f"a-{number}" for number in range(life.SUBJECTS)))
    at.see(0, other=first)
    at.see(30, other=first)
    worse = findings("worse", jobs=1_000_000)
    at.see(30, other=[*worse, *first])
    assert "other/worse" not in at.listed
    assert at.life.rest["other"] == 1
    at.see(30, other=[*worse, *first[1:]])
    assert len(at.listed) == life.SUBJECTS, "one that flickers keeps its place"
    at.see(30, other=[*worse, *first[1:]])
    at.see(5, other=[*worse, *first[1:]])
    at.see(30, other=[*worse, *first[1:]])
    assert at.listed[0] == "other/worse"


def test_all_conditions_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(life, "MOST", 3)
    at = LifeHarness()
    at.see(0, hidden=findings("a", "b"), other=findings("c", "d"))
    at.see(30, hidden=findings("a", "b"), other=findings("c", "d"))
    assert (len(at.listed), at.life.rest) == (3, {"hidden": 0, "hider": 0, "other": 1})


def test_the_catalogue_is_consistent() -> None:
    names = {each.name for each in CONDITIONS}
    assert len(names) == len(CONDITIONS)
    assert all(set(each.hides) <= names for each in CONDITIONS)


# -- counts ------------------------------------------------------------------------------------------------------------


def ended(queue: str, at: int, kind: str = "failed") -> Event:
    before = Job(1, "a", Options(queue=queue), "processing", at, at, at)
    return Event(1, at, cast(Any, kind), 1, "a", queue, "processing", "failed", "worker:w", before=before, after=before)


def test_counts_cover_ten_minutes_and_a_bounded_number_of_pairs() -> None:
    counts = QueueKindCounts()
    counts.note([ended("q", NOW), ended("q", NOW + MINUTE_MS, "completed"), ended("q", NOW, "granted")])
    pair = counts.pairs["q", ""]
    assert pair.sums(NOW + MINUTE_MS) == Counts(completed=1, failed=1)
    assert pair.first_failed(NOW + MINUTE_MS) == NOW // MINUTE_MS * MINUTE_MS
    assert pair.sums(NOW + MINUTES * MINUTE_MS) == Counts(completed=1)
    assert pair.sums(NOW - HOUR_MS) == Counts(), "a clock that was set back"
    counts.note([ended(f"q-{number}", NOW) for number in range(PAIRS_KEPT)])
    assert len(counts.pairs) == PAIRS_KEPT
    assert ("q", "") not in counts.pairs
