"""Each condition opens in time with its cause and cure, and nothing opens without a reason. In virtual time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, Final

import pytest
from msgspec.structs import replace

from jobd.config import AlertsSection, Duration
from jobd.core.stats import HOURS_NEEDED, SAMPLES_NEEDED
from jobd.engine.clock import loop_time
from jobd.maintenance.cleanup_run import CleanupSchedule
from jobd.model import commands as cmd
from jobd.model.clocks import MonotonicS
from jobd.model.job import DAY_MS, HOUR_MS, Job, Options
from jobd.model.responses import ClusterView, HealthView, NodeView
from jobd.model.storage import DiskSpace
from jobd.model.webhooks import FailingWebhook
from jobd.monitoring.problems.catalogue import CONDITIONS
from jobd.monitoring.problems.life import CLEAR_MS
from tests.support.memory_storage import MemoryStorage
from tests.support.problem_stage import Stage
from tests.support.virtual_engine import VirtualEngine, in_virtual_time, row, seconds

OPENS_WITHIN_S: Final = 45  # beyond the time of the condition
SCHEDULE: Final = CleanupSchedule(interval_ms=HOUR_MS, min_interval_ms=HOUR_MS, recover_every_ms=10_000)

Script = Callable[[Stage], Awaitable[float]]  # makes the condition true; returns the time of the condition in seconds
CASES: Final[dict[str, tuple[Script, str]]] = {}


def case(condition: str, title: str) -> Callable[[Script], Script]:
    def keep(script: Script) -> Script:
        CASES[condition] = script, title
        return script

    return keep


@pytest.mark.parametrize("condition", [each.name for each in CONDITIONS])
def test_each_condition_opens_in_time_with_its_number_and_cure(condition: str) -> None:
    assert condition in CASES, f"{condition} has no case"
    script, title = CASES[condition]

    async def run() -> None:
        storage = MemoryStorage()
        if condition == "cleanup_issues":
            for number in range(11):
                storage.put(replace(row(number + 1), options=Options(priority=2_000)))
        async with VirtualEngine(storage, schedule=SCHEDULE) as engine, Stage(engine) as stage:
            await seconds(60)
            assert condition == "cleanup_issues" or condition not in stage.opened
            time_s = await script(stage)
            await seconds(time_s + OPENS_WITHIN_S)
            found = stage.opened[condition]
        assert title in found.title, found.title
        assert found.cure

    in_virtual_time(run)()


@case("stalled_jobs", "6 jobs have stalled")
@case("worker_silent", "Silent for ")
async def stall(stage: Stage) -> float:
    stage.engine.maintainer.stop()  # nothing is recovered
    await stage.create("film", 6)
    await stage.engine.yes(cmd.Claim(queues=["film"], worker="w-1", limit=6, lock_ttl_ms=1_000, stall_after_ms=0))
    await seconds(1)
    stage.act(stage.creates("other", 1))  # commands advance the time of the state
    return 0


@case("processing_jobs", "21 jobs are processing")
async def process_many(stage: Stage) -> float:
    await stage.create("film", 21)
    await stage.engine.yes(cmd.Claim(queues=["film"], worker="w-1", limit=21, lock_ttl_ms=HOUR_MS))
    return 0


@case("average_processing", "Jobs take 1 h ")
async def work_long(stage: Stage) -> float:
    lock_id = await stage.engine.held(lock_ttl_ms=2 * HOUR_MS, progress_timeout_ms=0)
    await seconds(3_600)
    await stage.engine.yes(cmd.Complete(id="a", lock_id=lock_id))
    return 0


@case("cleanup_issues", "could not fix 11 invalid rows, for example job-1, job-2, job-3.")
async def read_invalid_rows(stage: Stage) -> float:
    return 0


@case("granted_twice", "Two workers may have worked on it at once (1 in the last hour)")
async def grant_twice(stage: Stage) -> float:
    await stage.engine.held()
    await stage.engine.yes(cmd.EndGrants(ids=["a"], last=True), by="daemon")
    await stage.engine.yes(cmd.Start(id="a", worker="w-2"))
    return 0


@case("slow_kind", "95 % of its jobs take up to 3 s, usually 1 s.")
async def become_slow(stage: Stage) -> float:
    for hour in range(HOURS_NEEDED + 1):
        for _ in range(SAMPLES_NEEDED):
            stage.engine.state.counters.baselines.add("film", stage.engine.now, 3071 if hour == HOURS_NEEDED else 1023)
        await seconds(3_600 * (hour < HOURS_NEEDED))
    return 0


def unhealthy(part: str) -> Script:
    async def break_part(stage: Stage) -> float:
        health = stage.problems.scene.health
        view: HealthView = await health.view()
        sick = replace(view, **{part: replace(getattr(view, part), status="unhealthy", message="It differs.")})

        async def stays() -> HealthView:
            health.last = sick
            return sick

        health.view = stays  # type: ignore[method-assign]
        return 0

    return break_part


for _part in ("database", "cache", "storage"):
    case(_part, "It differs.")(unhealthy(_part))


@case("webhook", "Has accepted nothing for 5 min: 503.")
async def break_webhook(stage: Stage) -> float:
    stage.problems.scene.failing_webhooks = lambda: [FailingWebhook("hook", 300_001, "503", 608, True)]
    return 0


@case("no_workers", "1 job is due, for ")
async def lose_workers(stage: Stage) -> float:
    await stage.claim("mail", "mailer-1")
    await stage.engine.yes(cmd.Goodbye(name="mailer-1", reason="stopped"))
    await stage.create("mail", kind="receipt")
    return 120


@case("waits", "Its only worker is busy, the longest for ")
async def wait_long(stage: Stage) -> float:
    await stage.create("mail", 2)
    stage.act(stage.works("mail", "w-1", 3_600))
    return 300


@case("failing", "20 of 20 attempts failed since ")
async def fail_all(stage: Stage) -> float:
    for number in range(20):
        lock_id = await stage.engine.held(f"bad-{number}")
        await stage.engine.yes(cmd.Fail(id=f"bad-{number}", lock_id=lock_id, error_message="503", error_code="E"))
    return 0


@case("disk", "1.0 MiB of 512.0 MiB are free on the disk of /srv/jobd.db.")
async def fill_disk(stage: Stage) -> float:
    stage.engine.disk.disk_space = DiskSpace("/srv/jobd.db", 1 << 20, 1 << 29)
    return 0


@case("quiet_long", "until resumed: bad build. 1 job that it takes is due.")
async def stay_quiet(stage: Stage) -> float:
    async def claims() -> None:
        while True:
            await stage.claim("film", "w-1", 30_000, limit=0)

    stage.problems.scene.limits = AlertsSection(quiet_long=Duration(HOUR_MS))
    await stage.claim("film", "w-1")
    await stage.engine.yes(cmd.QuietWorker(name="w-1", reason="bad build"), by="admin:ana")
    stage.act(claims())
    await seconds(3_600 - 120)
    await stage.create("film")
    return 120


@case("release_loop", "1 job is released over and over by w-1; a 10 times.")
async def release_over_and_over(stage: Stage) -> float:
    await stage.create("film", id="a")
    for number in range(10):
        await seconds(60 * (number > 4))
        (granted,) = await stage.claim("film", "w-1")
        await stage.engine.yes(cmd.Release(id="a", lock_id=granted.lock_id))
    return 0


@case("backlog_grows", "The backlog grows: ")
async def create_faster_than_done(stage: Stage) -> float:
    stage.act(stage.creates("geo", 5))
    stage.act(stage.works("geo", "w-1", 20))
    return 600


@case("retry_backlog", "wait for a retry, 6 more a minute; 100 % of attempts fail: E: 503")
async def fail_and_retry(stage: Stage) -> float:
    async def fails() -> None:
        while True:
            await stage.create("sync", max_attempts=5)
            for granted in await stage.claim("sync", "w-1"):
                fail = cmd.Fail(id=granted.job.id, lock_id=granted.lock_id, error_message="503", error_code="E")
                await stage.engine.yes(replace(fail, retry_after_ms=HOUR_MS))
            await seconds(10)

    stage.act(fails())
    return 600


@case("rejecting", "412 requests were rejected in 5 minutes (overloaded): too many commands")
async def reject(stage: Stage) -> float:
    stage.problems.scene.error_counts = lambda: [Counter(overloaded=412)]
    return 0


@case("expiring", "10 of 10 jobs expired before a worker took them.")
async def let_expire(stage: Stage) -> float:
    await stage.create("push", 10, expires_in_ms=1_000)
    return 11  # recovery fails them


@case("due_far", "20 of 20 jobs created in the last 10 minutes are due in over a week.")
async def create_far_ahead(stage: Stage) -> float:
    await stage.create("geo", 20, delay_ms=8 * DAY_MS)
    return 0


@case("no_progress", "Has run without progress for 1 h")
async def hang(stage: Stage) -> float:
    await stage.create("etl", progress_timeout_ms=0)
    stage.act(stage.works("etl", "w-1", DAY_MS))
    return 3_600


@case("kills_workers", "It was held by 2 workers that died: w-1, w-2.")
async def kill_two_workers(stage: Stage) -> float:
    await stage.create("pdf", id="pdf-666")
    for name in ("w-1", "w-2"):
        assert await stage.claim("pdf", name, stall_after_ms=0)
        await seconds(70)  # until its lock has expired, and recovery has found it
    return 0


@case("workers_die", "3 of 4 workers of 2.4.1 on k8s-b died, each before its first report, the last at 22:33 UTC.")
async def die_one_by_one(stage: Stage) -> float:
    await stage.create("thumb", 10)
    stage.act(stage.works("thumb", "live", 3_600, host="k8s-b", version="2.4.1"))
    for number in range(3):
        assert await stage.claim("thumb", f"dies-{number}", stall_after_ms=0, host="k8s-b", version="2.4.1")
        await seconds(45)
    return 25  # until the last lock has expired, and recovery has found it


@in_virtual_time
async def test_a_group_that_a_rule_quiets_is_no_problem() -> None:
    async with VirtualEngine(MemoryStorage(), schedule=SCHEDULE) as engine, Stage(engine) as stage:
        await seconds(60 + await die_one_by_one(stage) + OPENS_WITHIN_S)
        assert "workers_die" in {each.condition for each in stage.problems.view().problems}
        await engine.yes(cmd.AddQuietRule(host="k8s-b", version="2.4.1", reason="bad"))
        await seconds(CLEAR_MS / 1_000 + 10)
        assert "workers_die" not in {each.condition for each in stage.problems.view().problems}


@case("paused_without_reason", "Paused ")
async def pause(stage: Stage) -> float:
    await stage.create("film")
    await stage.engine.yes(cmd.Pause(name="film"))
    return 900


async def fire(stage: Stage, **missed: Any) -> None:
    """Fire a schedule at four times ahead. The job of the first is not due yet, so the others are skipped."""
    await stage.engine.yes(cmd.PutSchedule(id="night", every_ms=HOUR_MS, job=cmd.ScheduledJob(), source="app:shop"))
    for number in range(1, 5):
        at = stage.engine.now + number * HOUR_MS
        version = stage.engine.state.schedules["night"].version
        await stage.engine.yes(cmd.Fire(id="night", version=version, scheduled_at=at, **missed), by="schedule:night")


@case("schedule_skipping", ": night:")
async def skip(stage: Stage) -> float:
    await fire(stage)
    return 0


@case("schedule_missed", "Since its creation, 8 times created no job.")
async def miss(stage: Stage) -> float:
    await fire(stage, missed=1, is_missed=True)
    return 0


@case("damaged", "Quarantined jobs: bad-1.")
async def damage(stage: Stage) -> float:
    stage.engine.state.quarantined["bad-1"] = "checksum"
    return 0


@case("clock", "The clock is suspect")
async def jump(stage: Stage) -> float:
    stage.engine.step_ms = 400 * DAY_MS
    return 0


A: Final = NodeView("a", "", "leader", 100, 1_000, 0, 1, False)
B: Final = NodeView("b", "", "standby", 100, 1_000, 0, 1, False)
CLUSTER: Final = ClusterView(
    role="leader", record=1_000, synchronous=True, require_sync=True, oldest_transaction_ms=10, nodes=[A, B]
)


def cluster(**changes: Any) -> Script:
    async def change(stage: Stage) -> float:
        stage.problems.scene.cluster = lambda: replace(CLUSTER, **changes)
        return 0

    return change


for _condition, _title, _changes in (
    ("standby_behind", "It is 39 s behind", {"nodes": [A, replace(B, lag_records=395, lag_ms=39_900)]}),
    ("no_standby", "No standby is running", {"nodes": [A]}),
    ("journal_not_synchronous", "PostgreSQL has no synchronous standby", {"synchronous": False}),
    ("two_primaries", "PostgreSQL accepts writes at a:5432 and b", {"writable": ["a:5432", "b:5432"]}),
    ("database_horizon", "The oldest transaction in the database", {"oldest_transaction_ms": 61_000}),
    ("clocks_differ", "The wall clock of node a is 2 s ahead of", {"nodes": [replace(A, clock_ahead_ms=2_000), B]}),
):
    case(_condition, _title)(cluster(**_changes))


# -- nothing opens without a reason ------------------------------------------------------------------------------------

QUIET: Final[dict[str, Callable[[Stage], Awaitable[None]]]] = {}
ALLOWED: Final = {"work_behind_a_long_job": {"waits/film"}}


def quiet(script: Callable[[Stage], Awaitable[None]]) -> None:
    QUIET[script.__name__] = script


@quiet
async def work_behind_a_long_job(stage: Stage) -> None:
    await stage.create("film", 51)
    stage.act(stage.works("film", "w-1", 600))


@quiet
async def pause_with_a_reason(stage: Stage) -> None:
    await stage.create("film", 50)
    await stage.engine.yes(cmd.Pause(name="film", reason="bad files from a partner"))


@quiet
async def pause_a_schedule(stage: Stage) -> None:
    await fire(stage, missed=1)
    await stage.engine.yes(cmd.PauseSchedule(id="night"))


@quiet
async def start_jobs_by_id(stage: Stage) -> None:
    """Jobs wait for three minutes, and the only worker never claims."""

    async def starts() -> None:
        await seconds(60)
        for number in range(1_000):
            granted = await stage.engine.yes(cmd.Start(id=f"job-{number}", worker="w-1"))
            await stage.hold(granted, 60)
            await stage.engine.yes(cmd.Complete(id=granted.job.id, lock_id=granted.lock_id))

    async def creates() -> None:
        for number in range(1_000):
            await stage.create("film", id=f"job-{number}")
            await seconds(0 if number in (1, 2) else 61)

    stage.act(creates())
    stage.act(starts())


@quiet
async def restart_workers_one_after_another(stage: Stage) -> None:
    async def serves(name: str, from_s: float, until_s: float) -> None:
        await seconds(from_s)
        while (until_s := until_s - 5) > from_s:
            for granted in await stage.claim("mail", name, 5_000, host="web", version="2"):
                await stage.engine.yes(cmd.Complete(id=granted.job.id, lock_id=granted.lock_id))
        await stage.engine.yes(cmd.Goodbye(name=name, reason="stopped"))

    stage.act(stage.creates("mail", 1))
    for number in range(20):
        stage.act(serves(f"old-{number}", 0, 60 + 15 * number))
        stage.act(serves(f"new-{number}", 65 + 15 * number, 5_000))


@quiet
async def create_many_at_once(stage: Stage) -> None:
    for number in range(20):
        stage.act(stage.works("mail", f"w-{number}", 0.9))
    await seconds(300)
    await stage.create("mail", 5_000)


@quiet
async def snooze_every_minute(stage: Stage) -> None:
    async def snoozes() -> None:
        while True:
            for granted in await stage.claim("poll", "w-1", 30_000):
                await stage.engine.yes(cmd.Release(id=granted.job.id, lock_id=granted.lock_id, delay_ms=60_000))

    await stage.create("poll")
    stage.act(snoozes())


@quiet
async def restart_a_machine(stage: Stage) -> None:
    """All workers of a machine die at once, and others begin there later."""
    await stage.create("film", 40)
    for number in range(5):
        await stage.claim("film", f"old-{number}", stall_after_ms=0, host="web", version="2")
    await seconds(120)
    for number in range(5):
        stage.act(stage.works("film", f"new-{number}", 30, host="web", version="2"))


@quiet
async def restart_the_daemon_with_many_workers(stage: Stage) -> None:
    """Workers find the daemon again within half a minute, and extend their locks before they expire."""
    stage.problems._first = stage.engine.clock.boot_ms()

    async def returns(number: int, held: Job) -> None:
        assert held.grant is not None
        await seconds(number % 30)
        await stage.engine.yes(cmd.Extend(id=held.id, lock_id=held.grant.lock_id))
        await seconds(30 + number % 30)
        await stage.engine.yes(cmd.Complete(id=held.id, lock_id=held.grant.lock_id))
        await stage.works("film", held.grant.worker, 5)

    for number, job in enumerate(list(stage.engine.state.processing.values())):
        stage.act(returns(number, job))


async def hold_jobs(storage: MemoryStorage) -> None:
    async with VirtualEngine(storage) as engine, Stage(engine) as stage:
        await stage.create("film", 400)
        for number in range(200):
            await stage.claim("film", f"w-{number}", stall_after_ms=0)


@pytest.mark.parametrize("name", list(QUIET))
def test_nothing_above_a_notice_opens_in_half_an_hour(name: str) -> None:
    async def run() -> None:
        storage = MemoryStorage()
        if name == "restart_the_daemon_with_many_workers":
            await hold_jobs(storage)
        async with VirtualEngine(storage, schedule=SCHEDULE) as engine, Stage(engine) as stage:
            await QUIET[name](stage)
            await seconds(1_800)
            urgent = {each.id for each in stage.listed.values() if each.severity != "notice"}
        assert urgent == ALLOWED.get(name, set()), [each.title for each in stage.listed.values()]

    in_virtual_time(run)()


@pytest.mark.parametrize("is_held", [False, True])
def test_a_pair_that_loses_its_worker_right_after_the_start_is_found_in_three_minutes(is_held: bool) -> None:
    """While a worker from before the start holds a job and has not claimed again, it may take the pair."""

    async def run() -> None:
        storage = MemoryStorage()
        if is_held:
            await hold_jobs(storage)
        async with VirtualEngine(storage, schedule=SCHEDULE) as engine, Stage(engine) as stage:
            stage.problems._first = engine.clock.boot_ms()
            for job in engine.state.processing.values():
                assert job.grant is not None
                stage.act(stage.hold(SimpleNamespace(job=job, lock_id=job.grant.lock_id), 1_000))
            lost_at: dict[str, MonotonicS] = {}
            for queue in ("mail", "billing"):
                await stage.claim(queue, f"{queue}-1")
                await stage.engine.yes(cmd.Goodbye(name=f"{queue}-1", reason="stopped"))
                await stage.create(queue)
                lost_at[queue] = loop_time()
                await seconds(60)
            for queue in ("mail", "billing"):
                await seconds(lost_at[queue] + (170 if is_held else 165) - loop_time())
                assert (f"no_workers/{queue}" in stage.listed) != (is_held and queue == "mail")

    in_virtual_time(run)()
