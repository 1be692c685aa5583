"""What `why` says of a job against what happens to it in the next minute, in 60 conditions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import pytest
from msgspec.structs import replace

from jobd.maintenance.cleanup_run import CleanupSchedule
from jobd.maintenance.restart_grace import extend_held_locks
from jobd.model import commands as cmd
from jobd.model.errors import ApiError
from jobd.model.events import Event
from jobd.model.job import DAY_MS, BackoffOptions
from jobd.model.responses import NextEvent, WhyView
from tests.support.memory_storage import MemoryStorage
from tests.support.virtual_engine import WALL, VirtualEngine, in_virtual_time, row, seconds

WINDOW_S: Final = 60
LOCK: Final = "current lock of the job"
ASK: Final = "ask why"
RECOVERY: Final = CleanupSchedule(interval_ms=30_000, min_interval_ms=5_000)
BY_CLEANUP: Final = replace(RECOVERY, recover_every_ms=0)
RARE: Final = replace(BY_CLEANUP, interval_ms=5_000, min_interval_ms=40_000)
AGAIN: Final = BackoffOptions(kind="fixed", base_ms=20_000, jitter=False)
Step = Any  # a command, seconds to wait, or a function of the engine that returns a command or does something


# What an event of the job or its queue does, and what `why` announces by each rule.
HAPPENED: Final = {
    "granted": "granted",
    "expired": "expires",
    "deleted": "deleted",
    "queue_resumed": "resumed",
    "cancelled": "ends it at once",
}
ANNOUNCED: Final = {
    "claim": "granted",
    "disk": "granted",
    "run_at": "granted",
    "release delay": "granted",
    "expires_at": "expires",
    "retention": "deleted",
    "pause": "resumed",
}


def job(**fields: Any) -> cmd.Create:
    return cmd.Create(id="a", **fields)


def start(**fields: Any) -> cmd.Start:
    times = {"lock_ttl_ms": 10_000, "stall_after_ms": 0, "progress_timeout_ms": 0} | fields
    return cmd.Start(id="a", worker="w-1", **times)


def at(percent: int) -> cmd.Progress:
    return cmd.Progress(id="a", lock_id=LOCK, progress=percent)


def fail(**fields: Any) -> cmd.Fail:
    return cmd.Fail(id="a", lock_id=LOCK, error_message="boom", **fields)


def release(**fields: Any) -> cmd.Release:
    return cmd.Release(id="a", lock_id=LOCK, **fields)


def expiring(in_ms: int, **fields: Any) -> Callable[[VirtualEngine], cmd.Create]:
    return lambda engine: job(expires_at=engine.now + in_ms, **fields)


def pause(in_ms: int) -> Callable[[VirtualEngine], cmd.Pause]:
    return lambda engine: cmd.Pause(name="default", until=engine.now + in_ms)


def step_clock(engine: VirtualEngine) -> None:
    engine.step_ms += 4 * DAY_MS  # more than half of the shortest retention


def waiting(worker: str = "w-2", kinds: list[str] | None = None, queue: str = "default") -> Step:
    """A worker that waits for a job in one claim after another, until it gets one."""
    return lambda engine: _works(engine, cmd.Claim(worker=worker, queues=[queue], kinds=kinds, wait_ms=25_000), 0)


def quiet_worker(until_ms: int | None = None) -> list[Step]:
    def rule(engine: VirtualEngine) -> cmd.AddQuietRule:
        return cmd.AddQuietRule(queue="default", reason="bad", until=until_ms and engine.now + until_ms)

    return [rule, waiting(), job()]


async def _works(engine: VirtualEngine, claim: cmd.Claim, pause_s: float) -> None:
    while isinstance(response := await engine.actor.ask(claim), ApiError) or not response.data.grants:
        await seconds(pause_s or isinstance(response, ApiError))


def complete(in_ms: int | None = None) -> Step:
    return lambda engine: cmd.Complete(id="a", lock_id=LOCK, file_path="/f", expires_at=in_ms and engine.now + in_ms)


def fill(engine: VirtualEngine) -> None:
    """Fill the disk for good, and let a claim find it."""
    engine.disk.fill()
    engine.disk.has_spare = False


def restart(engine: VirtualEngine) -> None:
    lock_ms = engine.clock.moment().lock_ms
    extend_held_locks(engine.actor, lock_ms, lock_ms)


def without_holder(**fields: Any) -> MemoryStorage:
    disk = MemoryStorage()
    disk.put(row(1, "a", "processing", started_at=WALL, attempt=1, **fields))
    return disk


def damaged() -> MemoryStorage:
    disk = MemoryStorage()
    disk.put(row(1, "a"))
    disk.bad_jobs["a"] = "checksum"
    return disk


NOTHING, GRANTED, EXPIRES, DELETED, RESUMED = "nothing", "granted", "expires", "deleted", "resumed"
QUEUED, FAILS = "it is queued again", "it fails"
LONG: Final = {"stall_after_ms": 25_000, "lock_ttl_ms": 40_000}  # the lock outlives the stall time

# What happens to the job within a minute, and the steps that make the condition, up to ASK; those after it happen
# meanwhile. A text in the steps is in `because`. Options of the engine are in a dict.
CONDITIONS: Final[dict[str, tuple[str, list[Step]]]] = {
    # due
    "nobody": (NOTHING, [job(), "no worker has claimed queue `default`"]),
    "other kind": (NOTHING, [job(kind="k"), waiting(kinds=["other"]), "takes only: other"]),
    "idle worker returns": (GRANTED, [cmd.Claim(worker="w-2"), 5, job(), ASK, 5, waiting()]),
    "busy worker": (
        NOTHING,
        [cmd.Create(id="b"), cmd.Start(id="b", worker="w-2"), cmd.Claim(worker="w-2"), job(), "w-2, the only"],
    ),
    "worker said goodbye": (NOTHING, [cmd.Claim(worker="w-2"), cmd.Goodbye(name="w-2"), job(), "which said goodbye"]),
    "quiet worker": (NOTHING, [*quiet_worker(), "one worker that takes such jobs is quiet: w-2"]),
    "quiet until soon": (GRANTED, [*quiet_worker(20_000), "one worker that takes such jobs is quiet: w-2"]),
    "next in line": (GRANTED, [job(), 1, cmd.Create(id="b"), "It is next in line.", ASK, 5, cmd.Claim(worker="w-2")]),
    "behind another": (
        NOTHING,
        [job(), cmd.Create(id="b", priority=-1), "Other jobs come first.", ASK, 5, cmd.Claim(worker="w-2")],
    ),
    "first of its kind": (
        NOTHING,
        [job(kind="k"), cmd.Create(id="b", priority=-1), "next in line for its kind.", ASK, 5, cmd.Claim(worker="w-2")],
    ),
    "expires soon": (EXPIRES, [expiring(20_000)]),
    "expires soon, taken": (GRANTED, [expiring(20_000), ASK, 5, cmd.Claim(worker="w-2")]),
    "expires soon, by cleanup": (EXPIRES, [expiring(12_000), {"schedule": BY_CLEANUP}]),
    "expires soon, by rare cleanup": (EXPIRES, [35, expiring(8_000), {"schedule": RARE}]),
    "overdue": (EXPIRES, [expiring(3_000), 4]),
    "overdue, suspect clock": (NOTHING, [expiring(DAY_MS), step_clock]),
    "expires soon, suspect clock": (NOTHING, [expiring(4 * DAY_MS + 20_000), step_clock]),
    "full disk, worker waits": (NOTHING, [job(delay_ms=3_000), waiting(), fill, 5]),
    "full disk, expires soon": (EXPIRES, [expiring(20_000, delay_ms=3_000), waiting(), fill, 5]),
    # paused
    "paused": (NOTHING, [job(), waiting(), cmd.Pause(name="default"), waiting()]),
    "paused until soon": (RESUMED, [cmd.Pause(name="default"), job(), pause(20_000), waiting()]),
    "paused until now": (RESUMED, [1, pause(2_000), job(), waiting()]),
    "expires while paused": (EXPIRES, [pause(40_000), expiring(20_000), waiting()]),
    "due after the pause": (RESUMED, [pause(20_000), job(delay_ms=40_000), waiting()]),
    "paused until soon, suspect clock": (RESUMED, [pause(20_000), job(), waiting(), step_clock]),
    # not due
    "due soon": (GRANTED, [job(delay_ms=20_000), waiting()]),
    "due soon, suspect clock": (GRANTED, [job(delay_ms=4 * DAY_MS + 20_000), waiting(), step_clock]),
    "due before it expires": (GRANTED, [expiring(30_000, delay_ms=20_000), waiting()]),
    "expires before it is due": (EXPIRES, [expiring(20_000, delay_ms=30_000), waiting()]),
    "retried soon": (GRANTED, [job(max_attempts=3, backoff=AGAIN), start(), fail(), waiting(), "attempt 2 of 3."]),
    "retried after a stall": (
        GRANTED,
        [job(max_attempts=3, backoff=AGAIN), start(), at(9), 25, start(), fail(), waiting(), "failed in attempt 2 "],
    ),
    "released in a loop": (GRANTED, [job(), *[start(), release()] * 5, waiting(), "released 5 times in a row"]),
    # running
    "dies": (QUEUED, [job(), start(**LONG), "(attempt 1 of 1)."]),
    "dies with progress": (
        FAILS,
        [job(), start(**LONG), at(40), "it fails: progress 40 %, no attempts left (1 of 1)."],
    ),
    "dies, on_stall fail": (FAILS, [job(on_stall="fail"), start(**LONG), "it fails, by its on_stall."]),
    "dies with progress, on_stall requeue": (
        QUEUED,
        [job(on_stall="requeue"), start(**LONG), at(40), "(attempt 2 of 2)."],
    ),
    "dies, max_stalls reached": (FAILS, [job(max_stalls=1), start(), 25, start(), at(1), "as stall 2 (max_stalls 1)."]),
    "stalled": (QUEUED, [job(), start(), 10.1]),
    "stalled, suspect clock": (QUEUED, [job(), start(), 10.1, step_clock]),
    "stalled, by cleanup": (QUEUED, [job(), start(), 15, {"schedule": BY_CLEANUP}]),
    "shows no progress": (
        QUEUED,
        [job(), start(**LONG | {"progress_timeout_ms": 20_000}), ASK, 9, cmd.Extend(id="a", lock_id=LOCK)],
    ),
    "heard meanwhile": (NOTHING, [job(), start(stall_after_ms=45_000), ASK, 20, cmd.Extend(id="a", lock_id=LOCK)]),
    "running": (NOTHING, [job(), start(stall_after_ms=100_000), at(3), 20, "its last progress was 20 s ago"]),
    "daemon restarted": (QUEUED, [job(), start(lock_ttl_ms=12_000), 5, restart, 1, "The daemon has extended its lock"]),
    "full disk, running": (NOTHING, [job(), start(), waiting(), cmd.Create(id="b", delay_ms=2_000), fill, 4]),
    "no holder": (QUEUED, [{"disk": without_holder}]),
    "no holder, progress": (FAILS, [{"disk": lambda: without_holder(progress=7)}]),
    "cancelled while it runs": ("ends it at once", [job(), start(), ASK, 5, cmd.Cancel(id="a")]),
    "taken back": (QUEUED, [job(), start(stall_after_ms=100_000), 15, ASK, 5, cmd.TakeBack(name="w-1")]),
    # finished
    "completed, deleted soon": (DELETED, [job(), start(), complete(in_ms=20_000)]),
    "completed, suspect clock": (NOTHING, [job(), start(), complete(in_ms=20_000), step_clock]),
    "failed, no attempts left": (NOTHING, [job(), start(), fail(), "no attempts left (1 of 1)"]),
    "failed, no retry": (NOTHING, [job(max_attempts=3), start(), fail(retry=False), "asked for no retry (1 of 3"]),
    "failed, expired": (NOTHING, [expiring(2_000), 15, "Its expires_at passed before a worker took the job."]),
    "failed, by operator": (NOTHING, [job(), cmd.ForceFail(id="a", reason="hangs"), "It was failed by"]),
    "failed, stalled": (NOTHING, [job(), start(), at(40), 25, "No attempts are left (1 of 1)."]),
    "failed, max_stalls": (NOTHING, [job(max_stalls=0), start(), 25, "It stalled once (max_stalls 0)"]),
    "failed, on_stall": (NOTHING, [job(on_stall="fail"), start(), 25, "Its on_stall is fail"]),
    "cancelled": (NOTHING, [job(), cmd.Cancel(id="a", reason="customer left"), "cancelled by a client: customer left"]),
    "quarantined": (NOTHING, [{"disk": damaged}]),
}


def announced(soon: NextEvent | None, until: int, *, may_differ: bool) -> set[str]:
    """Return what may happen until then according to `why`. `may_differ`: a worker does something meanwhile."""
    if soon is None or (soon.at is not None and soon.at > until):
        return {NOTHING}
    what = ANNOUNCED.get(soon.rule) or next(each for each in (QUEUED, FAILS) if each in soon.what)
    is_sure = soon.at is not None and soon.latest_at is not None and soon.latest_at <= until
    return {what} if is_sure and not may_differ else {what, GRANTED, NOTHING}


async def take_steps(engine: VirtualEngine, steps: list[Step], workers: list[asyncio.Task[None]]) -> None:
    for step in steps:
        command = step(engine) if callable(step) else step
        if isinstance(command, int | float):
            await seconds(command)
        elif asyncio.iscoroutine(command):
            workers.append(asyncio.create_task(command))
            await seconds(0)
        elif command is not None and not isinstance(command, str | dict):
            if getattr(command, "lock_id", "") == LOCK and (grant := engine.state.jobs["a"].grant) is not None:
                command = replace(command, lock_id=grant.lock_id)
            await engine.yes(command)


def first_change(events: list[Event]) -> tuple[str, int]:
    """Return the first thing that happened to the job or its queue, and when."""
    for event in events:
        if event.job_id in ("a", "") and event.type == "stalled":
            return (QUEUED if event.to_status == "queued" else FAILS), event.at
        if event.job_id in ("a", "") and event.type in HAPPENED:
            return HAPPENED[event.type], event.at
    return NOTHING, 0


@pytest.mark.parametrize("name", CONDITIONS)
@pytest.mark.parametrize("phase_s", [0, 3.3])  # of the runs of recovery
@in_virtual_time
async def test_why_is_true(name: str, phase_s: float) -> None:
    expected, steps = CONDITIONS[name]
    options = next((step for step in steps if isinstance(step, dict)), {})
    before, later = steps, list[Step]()
    if ASK in steps:
        before, later = steps[: steps.index(ASK)], steps[steps.index(ASK) + 1 :]
    disk = options["disk"]() if "disk" in options else None
    workers: list[asyncio.Task[None]] = []
    async with VirtualEngine(disk, schedule=options.get("schedule", RECOVERY)) as engine:
        if disk is None:
            engine.run_maintainer()
            await seconds(1 + phase_s)
        await take_steps(engine, before, workers)
        since, seen = engine.now, len(engine.disk.events)
        response = await engine.actor.ask(cmd.Why(id="a"))
        if disk is not None:
            engine.run_maintainer()
        await take_steps(engine, later, workers)
        await seconds(WINDOW_S - (engine.now - since) / 1000)
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        events = engine.disk.events[seen:]
    what, at = first_change(events)
    assert what == expected
    if isinstance(response, ApiError):
        assert response.code == "job_quarantined"
        return
    view: WhyView = response.data
    soon, words = view.next, f"{view.because} {view.do} {view.next}"
    assert all(step in words for step in before if isinstance(step, str)), view
    took = next((event.job_id for event in events if event.type == "granted"), "a")
    assert took == "a" or "It is next in line." not in words
    if later and isinstance(later[-1], cmd.TakeBack | cmd.Cancel):
        assert what.removeprefix("it ") in words
        return
    assert what in announced(soon, since + WINDOW_S * 1000, may_differ=bool(later)), view
    if soon is not None and soon.at is not None:
        assert soon.latest_at is not None or "suspect" in name or name == "full disk, expires soon"
        if what == ANNOUNCED.get(soon.rule, what) != NOTHING:
            assert soon.at <= at <= (soon.latest_at or at), view
