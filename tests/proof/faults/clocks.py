"""Clock faults: the wall clock steps while the daemon runs and while it is down, and the daemon is suspended.

libfaketime changes only the daemon's wall clock. It reads its offset from a file.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from jobd.model.clocks import LockMs
from jobd.model.events import fold
from jobd.model.job import Grant, Job, LockDeadlines
from tests.proof.faults.daemons import sigstopped
from tests.proof.faults.harness import Counts, Tool, Trial, check
from tests.proof.faults.store_check import StoreContents, checked_contents
from tests.proof.faults.workers import LATE_MS, RealWorker, next_state
from tests.support.daemon_process import DaemonProcess

RECOVER_EVERY_MS: Final = 1_000
SHORT_TTL_MS: Final = 1_000
LONG_TTL_MS: Final = 60_000
GRACE_MS: Final = 30_000  # after downtime no lock ends sooner
DAY_S: Final = 86_400
# The last one leaves the clock more than a day ahead of the time before the first one.
STEPS_S: Final = (-3 * DAY_S, -3_600, -90, 90, 3_600, 9 * DAY_S)
CLAIM_WAIT_MS: Final = 60_000
PLACES: Final = ("lib/*", "lib", "lib64", "local/lib")  # of the library, below /usr


def _library() -> Path | None:
    found = itertools.chain(*(Path("/usr").glob(f"{place}/faketime/libfaketimeMT.so.1") for place in PLACES))
    return next(found, None)


FAKETIME: Final = Tool("libfaketime", "faketime", lambda: _library() is not None)


def faked_clock(file: Path) -> dict[str, str]:
    """Return the environment of a process whose wall clock is off by the seconds in `file`."""
    return {
        "LD_PRELOAD": str(_library()),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_NO_CACHE": "1",
        "NO_FAKE_STAT": "1",  # otherwise Python finds its compiled modules outdated at every start
    }


def set_offset(file: Path, seconds: float) -> None:
    """Set the offset of a wall clock. Its process sees it at its next read."""
    new = file.with_suffix(".new")
    new.write_text(f"{seconds:+}\n", encoding="utf-8")
    new.rename(file)


class SteppedClockDaemon(DaemonProcess):
    """A daemon whose wall clock `step` moves."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "offset"
        self._offset_s = 0.0
        self.step(0)
        super().__init__(
            directory,
            f"[cleanup]\nrecover_every = '{RECOVER_EVERY_MS}ms'\ninterval = '1h'\n",
            **faked_clock(self._file),
        )

    def step(self, seconds: float) -> None:
        """Step the wall clock. The daemon sees it at its next read."""
        self._offset_s += seconds
        set_offset(self._file, self._offset_s)

    def now_ms(self) -> int:
        return int((time.time() + self._offset_s) * 1000)

    def create_job(self, job_id: str, **options: Any) -> str:
        assert self.post("/v1/jobs", {"id": job_id, "max_attempts": 3, **options}).status == 201
        return job_id

    def start_job(self, job_id: str, ttl_ms: int) -> dict[str, str]:
        """Start a job; return the fields that its holder sends."""
        body = {"worker": "w", "lock_ttl_ms": ttl_ms, "stall_after_ms": 0}
        return {"lock_id": self.post(f"/v1/jobs/{job_id}/start", body).data["lock_id"]}

    def left_ms(self, job_id: str) -> int:
        """Return the time that a live lock has left, by the daemon's wall clock."""
        lock = self.get(f"/v1/jobs/{job_id}").data["lock"]
        assert lock is not None, f"{job_id} has lost its lock"
        left: int = lock["expires_at"] - self.now_ms()
        return left

    def claim(self, queue: str, wait_ms: int = 0) -> list[str]:
        body = {"worker": "w", "queues": [queue], "limit": 10, "wait_ms": wait_ms}
        return [grant["job"]["id"] for grant in self.post("/v1/claim", body).data["grants"]]


@check(rounds=24, needs=(FAKETIME,))
def clock_steps(trial: Trial) -> Counts:
    """The wall clock jumps by days: no lock is freed or prolonged; a suspect clock deletes and fails nothing."""
    counts: Counter[str] = Counter()
    dice = random.Random(trial.rounds)
    daemon = SteppedClockDaemon(trial.directory)
    with daemon:
        for number in range(trial.rounds):
            step_s = STEPS_S[number % len(STEPS_S)] * dice.uniform(0.5, 1)
            counts["steps forward" if step_s > 0 else "steps back"] += 1
            _step_clock(daemon, f"{number}", step_s, trial, counts)
        report = daemon.admin("POST", "cleanup", {}).data
        assert report["validationIssuesFound"] == 0, report
        _check_short_jump(daemon)
        _check_late_clock(daemon)
        assert daemon.stop() == 0
    counts["events in order"] = _check_times(checked_contents(daemon.store))
    return {**counts}


def _check_short_jump(daemon: SteppedClockDaemon) -> None:
    """Check that a forced cleanup run during six seconds with the clock 40 days ahead deletes nothing."""
    ids = [daemon.create_job(f"done-{number}") for number in range(3)]
    for job_id in ids:
        daemon.post(f"/v1/jobs/{job_id}/complete", {**daemon.start_job(job_id, LONG_TTL_MS), "metadata": 1})
    daemon.step(40 * DAY_S)
    assert daemon.admin("POST", "cleanup", {}).data["expiredJobsDeleted"] == 0
    daemon.wait_for_log(b"level=warning event=clock_suspect")
    daemon.step(-40 * DAY_S)
    assert daemon.admin("POST", "cleanup", {}).data["expiredJobsDeleted"] == 0
    assert [daemon.get(f"/v1/jobs/{job_id}").status for job_id in ids] == [200] * 3
    assert not daemon.admin("GET", "clock").data["suspect"]


def _check_late_clock(daemon: SteppedClockDaemon) -> None:
    """Check that a clock that was 40 days behind and is put right is trusted, and deletes nothing."""
    daemon.step(-40 * DAY_S)
    done = daemon.create_job("done-behind")
    daemon.post(f"/v1/jobs/{done}/complete", {**daemon.start_job(done, LONG_TTL_MS), "metadata": 1})
    daemon.step(40 * DAY_S)
    assert not daemon.admin("GET", "clock").data["suspect"]
    assert daemon.admin("POST", "cleanup", {}).data["expiredJobsDeleted"] == 0
    assert daemon.get(f"/v1/jobs/{done}").status == 200


def _step_clock(daemon: SteppedClockDaemon, name: str, step_s: float, trial: Trial, counts: Counter[str]) -> None:
    """Step the clock once, with held, delayed and expiring jobs, and end them all afterwards."""
    step_ms = int(step_s * 1000)
    held = daemon.create_job(f"held-{name}")
    holder = daemon.start_job(held, LONG_TTL_MS)
    now = daemon.now_ms()
    between = now + (step_ms // 2 if step_ms > 0 else 300_000)  # in the past after a step forward
    beyond = now + abs(step_ms) + 600_000
    for job_id, run_at in ((f"delayed-{name}", between), (f"later-{name}", beyond)):
        daemon.create_job(job_id, queue=f"delayed-{name}", run_at=run_at)
    for job_id, expires_at in ((f"expiring-{name}", between), (f"lasting-{name}", beyond)):
        daemon.create_job(job_id, queue=f"expiring-{name}", expires_at=expires_at)
    forgotten = daemon.create_job(f"forgotten-{name}", queue=f"forgotten-{name}")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(daemon.claim, f"delayed-{name}", CLAIM_WAIT_MS) if step_ms > 0 else None
        began_s = time.monotonic()
        daemon.start_job(forgotten, SHORT_TTL_MS)
        daemon.step(step_s)
        assert next_state(daemon, forgotten)["status"] == "queued"
        held_ms = round((time.monotonic() - began_s) * 1000)
        assert held_ms >= SHORT_TTL_MS, f"a step of {step_s:.0f} s has freed a lock after {held_ms} ms"
        assert held_ms <= SHORT_TTL_MS + RECOVER_EVERY_MS + LATE_MS or not trial.timed, (
            f"a step of {step_s:.0f} s has kept a lock for {held_ms} ms"
        )
        counts["ms until a lock of 1 s was recovered, at most"] = max(
            counts["ms until a lock of 1 s was recovered, at most"], held_ms
        )
        _check_lock(daemon, held, holder)
        granted = daemon.claim(f"delayed-{name}") if waiting is None else waiting.result()
    if step_s > DAY_S:
        _check_suspect_clock(daemon, f"expiring-{name}")
        counts["steps that made the clock suspect"] += 1
    _check_wall_times(daemon, name, granted, step_ms > 0)
    assert daemon.post(f"/v1/jobs/{held}/complete", {**holder, "metadata": 1}).status == 200
    for job_id in (f"delayed-{name}", f"later-{name}", f"expiring-{name}", f"lasting-{name}", forgotten):
        daemon.post(f"/v1/jobs/{job_id}/cancel")


def _check_lock(daemon: SteppedClockDaemon, job_id: str, holder: dict[str, str]) -> None:
    other = daemon.post(f"/v1/jobs/{job_id}/start", {"worker": "other"})
    assert (other.status, other.error) == (409, "already_locked"), other.body
    assert 0 < other.body["details"]["retry_after_ms"] <= LONG_TTL_MS
    assert 0 < daemon.left_ms(job_id) <= LONG_TTL_MS
    assert daemon.post(f"/v1/jobs/{job_id}/progress", {**holder, "progress": 5}).status == 200
    assert LONG_TTL_MS / 2 < daemon.left_ms(job_id) <= LONG_TTL_MS


def _check_suspect_clock(daemon: SteppedClockDaemon, overdue: str) -> None:
    """Check that nothing fails by age after a step of more than a day until an operator accepts the clock."""
    assert daemon.admin("GET", "clock").data["suspect"]
    assert daemon.admin("GET", "health").data["status"] == "degraded"
    daemon.admin("POST", "cleanup", {})
    start = daemon.post(f"/v1/jobs/{overdue}/start", {"worker": "w"})
    assert (start.status, start.error) == (409, "invalid_transition"), start.body
    assert daemon.get(f"/v1/jobs/{overdue}").data["status"] == "queued"
    assert not daemon.admin("POST", "clock/accept", {}).data["suspect"]


def _check_wall_times(daemon: SteppedClockDaemon, name: str, granted: list[str], forward: bool) -> None:
    """Check that run_at and expires_at follow the wall clock as it is now."""
    assert granted == ([f"delayed-{name}"] if forward else []), granted
    later = daemon.post(f"/v1/jobs/later-{name}/start", {"worker": "w"})
    assert (later.status, later.error) == (409, "not_due"), later.body
    # After a step back, the jobs that were due at once are still due.
    due = [f"lasting-{name}"] if forward else [f"expiring-{name}", f"lasting-{name}"]
    assert daemon.claim(f"expiring-{name}") == due
    # The claim skips an overdue job, and the next recovery fails it.
    overdue = f"expiring-{name}"
    expiring = next_state(daemon, overdue, after="queued") if forward else daemon.get(f"/v1/jobs/{overdue}").data
    expected = ("failed", "expired") if forward else ("processing", None)
    assert (expiring["status"], expiring["error_code"]) == expected, expiring


def _check_times(store: StoreContents) -> int:
    """Check that lock time never goes back in the journal and that times are in order; return the number of events."""
    rows: dict[str, Job | None] = {}
    lock_ms = LockMs(0)
    for event in sorted(itertools.chain(*store.events.values()), key=lambda event: event.seq):
        job = rows[event.job_id] = fold(rows.get(event.job_id), event)
        if job is None:  # deleted
            continue
        times = [time for time in (job.created_at, job.started_at, job.finished_at, job.updated_at) if time is not None]
        assert times == sorted(times), f"{event.job_id} at {event.type}: {times}"
        if event.type == "granted":  # reports keep a later deadline, so they do not show the time
            assert isinstance(job.deadlines, LockDeadlines)
            assert isinstance(job.grant, Grant)
            at = job.deadlines.stall_due - job.grant.stall_after_ms
            assert at >= lock_ms, f"lock time went back from {lock_ms} to {at}"
            lock_ms = at
    return sum(map(len, store.events.values()))


# -- while the daemon is down ------------------------------------------------------------------------------------------


@check(rounds=12, few=0, needs=(FAKETIME,))
def clock_steps_while_down(trial: Trial) -> Counts:
    """The same over restarts: locks keep the time they had left; 40 days ahead deletes nothing until accepted."""
    counts: Counter[str] = Counter()
    daemon = SteppedClockDaemon(trial.directory)
    with daemon:
        daemon.create_job("done")
        daemon.post("/v1/jobs/done/complete", {**daemon.start_job("done", LONG_TTL_MS), "metadata": 1})
        for number in range(trial.rounds):
            job_id = daemon.create_job(f"held-{number}")
            holder = daemon.start_job(job_id, 2 * LONG_TTL_MS)
            before_ms = daemon.left_ms(job_id)
            daemon.kill() if number % 2 else daemon.stop()
            step_s = STEPS_S[number % len(STEPS_S)] / 3
            daemon.step(step_s)
            daemon.start()
            after_ms = daemon.left_ms(job_id)
            assert before_ms - 10_000 - LATE_MS <= after_ms <= before_ms + 10_000, f"{before_ms} ms, then {after_ms} ms"
            assert daemon.post(f"/v1/jobs/{job_id}/complete", {**holder, "metadata": 1}).status == 200
            daemon.step(-step_s)
            counts["restarts with another clock"] += 1
        _start_40_days_ahead(daemon, again=trial.timed)
        assert daemon.stop() == 0
    _check_times(checked_contents(daemon.store))
    return {**counts, "jumps of 40 days": 1}


def _start_40_days_ahead(daemon: SteppedClockDaemon, *, again: bool) -> None:
    """Start with the clock 40 days ahead: old jobs stay until an operator accepts the clock."""
    daemon.stop()
    daemon.step(40 * DAY_S)
    daemon.start()
    assert daemon.admin("POST", "cleanup", {}).data["expiredJobsDeleted"] == 0
    assert daemon.get("/v1/jobs/done").status == 200
    health = daemon.admin("GET", "health").data
    assert health["status"] == "degraded", health
    assert "jobctl clock accept" in health["cleanupStatus"]["message"], health
    if again:
        daemon.stop()
        daemon.start()  # the next start does not trust the step
        assert daemon.admin("POST", "cleanup", {}).data["expiredJobsDeleted"] == 0
    assert daemon.admin("POST", "clock/accept", {}).status == 200
    assert daemon.admin("POST", "cleanup", {}).data["expiredJobsDeleted"] >= 1
    assert daemon.get("/v1/jobs/done").status == 404


# -- suspended ---------------------------------------------------------------------------------------------------------


@check(rounds=5)
def suspended_daemon(trial: Trial) -> Counts:
    """A daemon is suspended for longer than the TTL of its locks: live workers keep their jobs, dead ones lose them."""
    counts: Counter[str] = Counter()
    with DaemonProcess(trial.directory, f"[cleanup]\nrecover_every = '{RECOVER_EVERY_MS}ms'\n") as daemon:
        with RealWorker(daemon, "q", 4_000) as worker:
            for number in range(trial.rounds):
                alive, dead = f"alive-{number}", f"dead-{number}"
                for job_id, queue in ((alive, "q"), (dead, "none")):
                    assert daemon.post("/v1/jobs", {"id": job_id, "queue": queue}).status == 201
                assert worker.next_report()["job"] == alive
                body = {"worker": "dead", "lock_ttl_ms": 4_000, "stall_after_ms": 0}
                assert daemon.post(f"/v1/jobs/{dead}/start", body).status == 200
                with sigstopped(daemon.process):
                    time.sleep(6)  # the fault: longer than the TTL of a lock
                other = daemon.post(f"/v1/jobs/{dead}/start", {"worker": "other"})
                assert other.error == "already_locked", other.body
                assert other.body["details"]["retry_after_ms"] <= GRACE_MS
                worker.finish_job()
                assert worker.next_report()["said"] == "done"
                assert next_state(daemon, alive)["status"] == "completed"
                counts["jobs kept over a suspend"] += 1
            dead_job = next_state(daemon, "dead-0") if trial.timed else None
        assert daemon.stop() == 0
    assert dead_job is None or (dead_job["status"], dead_job["stalls"]) == ("queued", 1)
    checked_contents(daemon.store)
    return {**counts}
