"""The fixture `jobd`: a daemon with an empty store for each test, and a clock that tests move."""

from __future__ import annotations

import subprocess
import sys
import unittest
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from jobd import App, Discard, JobFailed, Retry, Snooze, current_job
from jobd.client import JobClient
from jobd.client.errors import JobNotFound
from jobd.testing import TestDaemon, daemon

DAY = timedelta(days=1)
app = App("t", url="http://127.0.0.1:9")  # the fixture replaces the address
calls: list[int] = []


@pytest.fixture(autouse=True)
def no_calls() -> None:
    calls.clear()


@app.task(max_attempts=3, backoff=timedelta(hours=1))
def flaky(n: int) -> int:
    calls.append(n)
    if len(calls) < 3:
        raise Retry("not yet")
    return n * 2


@app.task(queue="numbers")
async def double(n: int) -> int:
    return n * 2


@app.task
def divide(n: int) -> float:
    return 1 / n


@app.task(max_attempts=9)
def resumed(left: int) -> str:
    calls.append(left)
    current_job().progress(10, checkpoint=len(calls))
    if left == 2:
        raise Snooze(DAY)
    if len(calls) < 3:
        raise Retry("one less", left=left - 1)
    return f"{left} {current_job().checkpoint}"


@app.task
def stopped(n: int) -> None:
    divide.enqueue(n)
    stopped.job(current_job().id).cancel()


def test_retries_without_waiting(jobd: TestDaemon) -> None:
    job = flaky.enqueue(21)
    ran = jobd.run_until_empty(app)
    assert job.result(timeout=0) == 42
    assert [each.id for each in ran] == [job.id] * 3


@pytest.mark.parametrize("id", ["a", "b"])
def test_each_test_has_an_empty_store(jobd: TestDaemon, id: str) -> None:
    assert jobd.jobs() == []
    job = double.using(id="same").enqueue(1)
    with JobClient() as client:  # it finds the daemon too
        assert client.get_job(job.id).queue == "numbers"
    with pytest.raises(JobNotFound):
        double.job(id).status()


def test_delays_are_skipped_in_their_order(jobd: TestDaemon) -> None:
    late = double.using(delay=3 * DAY, queue="elsewhere").enqueue(3)
    first, soon = flaky.using(max_attempts=1).enqueue(1), double.using(delay=DAY).enqueue(2)
    assert jobd.run_until_empty(app, raises=False) == [first, soon, late]
    assert late.result(timeout=0) == 6
    assert [job.result(timeout=0) for job in jobd.jobs("double")] == [6, 4]


def test_run_next_leaves_the_clock(jobd: TestDaemon) -> None:
    job = double.using(delay=DAY).enqueue(2)
    assert jobd.run_next(app) is None
    jobd.advance(DAY)
    assert jobd.run_next(app) == job
    assert jobd.run_next(app) is None


def test_the_error_of_a_failed_job_is_raised(jobd: TestDaemon) -> None:
    job = divide.enqueue(0)
    with pytest.raises(ZeroDivisionError):
        jobd.run_until_empty(app)
    with pytest.raises(JobFailed, match="ZeroDivisionError: division by zero"):
        job.result(timeout=0)
    assert divide.enqueue(0) in jobd.run_until_empty(app, raises=False)


def test_a_checkpoint_and_changed_arguments_reach_the_next_run(jobd: TestDaemon) -> None:
    job = resumed.enqueue(2)
    with pytest.raises(RuntimeError, match="left after 3 runs"):
        jobd.run_until_empty(app, limit=3)
    assert job.cancel()
    calls.clear()
    job = resumed.enqueue(5)
    jobd.run_until_empty(app)
    assert (calls, job.result(timeout=0)) == ([5, 4, 3], "3 3")


def test_a_job_that_is_cancelled_while_it_runs(jobd: TestDaemon) -> None:
    job = stopped.enqueue(1)
    assert len(jobd.run_until_empty(app)) == 2
    assert job.status() == "cancelled"


def test_jobs_of_another_app_stay_as_they_are(jobd: TestDaemon) -> None:
    other = App("other")
    job = other.task(name="unknown")(divide.definition.function).using(delay=DAY).enqueue(1)
    assert jobd.run_until_empty(app) == []
    assert job.status() == "queued"
    assert jobd.jobs() == [job]
    jobd.run_until_empty(other)
    assert jobd.jobs("unknown")[0].result() == 1


def test_schedules_fire(jobd: TestDaemon) -> None:
    nightly, days = App("nightly"), list[str]()

    def tidy() -> None:
        at = current_job().scheduled_at
        assert at is not None
        days.append(f"{at:%d.%m. %H:%M}")

    nightly.schedule("0 3 * * *", timezone="Europe/Berlin")(nightly.task(tidy))
    with jobd.at(datetime(2026, 3, 28, 12, tzinfo=UTC)):
        assert jobd.run_until_empty(nightly) == []  # puts the schedule
        for _ in range(2):
            jobd.advance(DAY)
            assert len(jobd.run_until_empty(nightly)) == 1
    assert days == ["29.03. 01:00", "30.03. 01:00"]


def test_time_passes_for_expiry_and_locks(jobd: TestDaemon) -> None:
    expired, lost = double.using(expires=DAY, delay=timedelta(hours=1)).enqueue(1), divide.enqueue(1)
    with JobClient() as client:
        assert client.claim("dies")[0].job.id == lost.id
        jobd.advance(2 * DAY)
        assert (expired.status(), lost.status()) == ("failed", "queued")
        assert client.get_job(lost.id).stalls == 1


def test_the_clock_is_set_with_a_time_zone(jobd: TestDaemon) -> None:
    with pytest.raises(TypeError, match="aware datetime"), jobd.at(datetime(2026, 1, 1)):
        pass
    with pytest.raises(ValueError, match="use `at`"):
        jobd.advance(-DAY)


async def test_on_a_running_event_loop(jobd: TestDaemon) -> None:
    job = await double.aenqueue(4)
    assert jobd.run_until_empty(app) == [job]
    assert await job.aresult(timeout=0) == 8


async def test_a_worker_that_waits_gets_a_job_when_the_clock_moves(jobd: TestDaemon) -> None:
    job = await double.using(delay=DAY).aenqueue(4)
    async with app.running():
        jobd.advance(DAY)
        assert await job.aresult(timeout=60) == 8


def test_an_error_that_is_no_exception_is_always_raised(jobd: TestDaemon) -> None:
    failing = App("failing")

    def fail() -> None:
        pytest.fail("found a bug")

    job = failing.task(max_attempts=5)(fail).enqueue()
    with pytest.raises(pytest.fail.Exception):
        jobd.run_until_empty(failing, raises=False)
    assert job.status() == "failed"


def test_an_inline_app_has_no_jobs_in_the_daemon(jobd: TestDaemon) -> None:
    with pytest.raises(ValueError, match="inline=True"):
        jobd.run_until_empty(App("inline", inline=True))


def test_discard(jobd: TestDaemon) -> None:
    def give_up() -> None:
        raise Discard("never")

    gone = App("gone")
    gone.task(max_attempts=5)(give_up).enqueue()
    with pytest.raises(Discard, match="never"):
        jobd.run_until_empty(gone)


class WithoutPytest(unittest.TestCase):
    def test_daemon(self) -> None:
        with daemon() as running:
            job = double.enqueue(1)
            assert running.run_until_empty(app) == [job]


STARTS = """
import sys

def test_start():
    assert not [name for name in sys.modules if name.partition(".")[0] in {"aiohttp", "msgspec", "uvloop"}]

def test_use(jobd):
    assert jobd.jobs() == []
"""


@pytest.mark.parametrize("options", [[], ["-n2"]])
def test_the_plugin_imports_nothing_before_it_is_used(tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "test_it.py").write_text(STARTS)
    plugins = "no:asyncio", "no:hypothesispytest", "no:schemathesis", "no:playwright"
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", *(f"-p{each}" for each in plugins), *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "2 passed" in done.stdout, done.stdout + done.stderr
