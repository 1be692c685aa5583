"""Tasks against a real daemon: enqueue, run in a worker, wait for the result."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from datetime import date, timedelta
from typing import Any

import pytest

from jobd import App, Discard, JobCancelled, JobFailed, NewJob, Retry, Stopped, current_job
from jobd.client import AsyncAdminClient, AsyncJobClient, InvalidRequest, ScheduleOwned
from jobd.client.app import daemon_jobs
from jobd.client.worker import payload_mismatch
from tests.support.client_harness import event_types, wait_for_job, wait_until_finished
from tests.support.daemon_process import TOKEN, DaemonProcess
from tests.support.polling import wait_until


@pytest.fixture
async def app(daemon: DaemonProcess) -> AsyncIterator[App]:
    app = App("tests", url=f"unix:{daemon.socket}")
    yield app
    await app.aclose()


async def test_tasks_of_both_kinds_run_in_a_worker(app: App, queue: str, client: AsyncJobClient) -> None:
    threads: list[threading.Thread] = []

    @app.task(queue=queue, keep=timedelta(hours=1))
    async def add(numbers: list[int]) -> int:
        current_job().set_result(file_path="/f")
        return sum(numbers)

    @app.task(queue=queue)
    def name(first: str, last: str = "B") -> dict[str, str]:
        threads.append(threading.current_thread())
        assert asyncio.run(asyncio.to_thread(current_job)) is current_job()
        return {"file_path": first, "last": last}

    async with app.running(concurrency=2):
        sums = await app.aenqueue_many([add.call([n, 1]) for n in range(20)])
        assert [await job.aresult(timeout=30) for job in sums] == [n + 1 for n in range(20)]
        blocking = await asyncio.to_thread(name.enqueue, "A")
        assert await asyncio.to_thread(blocking.result, 30) == {"file_path": "A", "last": "B"}
    assert threads[0] is not threading.main_thread()
    done = await client.get_job(sums[0].id)
    assert (done.kind, done.file_path, done.metadata_value) == ("add", "/f", 1)
    assert done.expires_at is not None
    assert done.finished_at is not None
    assert abs(done.expires_at - done.finished_at - 3_600_000) < 60_000


async def test_a_failure_has_the_message_of_its_error(app: App, queue: str) -> None:
    @app.task(queue=queue, max_attempts=2)
    async def divide(by: int) -> float:
        if by < 0:
            raise Discard("by must be positive")
        if current_job().attempt == 1:
            raise Retry("not yet", after=0)
        return 1 / by

    async with app.running(concurrency=2):
        assert await (await divide.aenqueue(1)).aresult(timeout=30) == 1.0
        with pytest.raises(JobFailed) as failed:
            await (await divide.aenqueue(0)).aresult(timeout=30)
        first, heading, frame, *_ = failed.value.error_message.splitlines()
        assert (first, heading) == ("ZeroDivisionError: division by zero", "Traceback (most recent call last):")
        assert "in divide" in frame
        assert "jobd/client" not in failed.value.error_message
        assert failed.value.error_code == "ZeroDivisionError"
        with pytest.raises(JobFailed, match="by must be positive"):
            await (await divide.aenqueue(-1)).aresult(timeout=30)


async def test_progress_does_not_wait_and_the_latest_is_sent(app: App, queue: str, client: AsyncJobClient) -> None:
    end = threading.Event()

    @app.task(queue=queue)
    def count() -> None:
        for percent in range(100):
            current_job().progress(percent, f"at {percent}")
        end.wait()

    job = await count.aenqueue()
    async with app.running(concurrency=1):
        await wait_for_job(client, job.id, lambda seen: seen.progress == 99)
        end.set()
        await job.aresult(timeout=30)
    assert (await event_types(client, job.id)).count("progress") < 50


async def test_a_cancelled_job_stops_its_task(app: App, queue: str) -> None:
    seen: list[bool] = []
    began = threading.Event()

    @app.task(queue=queue)
    def work() -> None:
        job = current_job()
        began.set()
        while not job.cancelled:
            job.progress(1)
            time.sleep(0.01)
        with pytest.raises(Stopped):
            job.progress(2)
        seen.append(job.cancelled)

    job = await work.aenqueue()
    async with app.running(concurrency=1):
        await asyncio.to_thread(began.wait)
        assert await job.astatus() == "processing"
        assert await job.acancel("no longer needed")
        with pytest.raises(JobCancelled):
            await job.aresult(timeout=30)
        await wait_until(lambda: bool(seen))
    assert not await job.acancel()


async def test_a_second_attempt_creates_nothing_twice(app: App, queue: str, client: AsyncJobClient) -> None:
    @app.task(queue=f"{queue}-children")
    def child(n: int) -> None: ...

    @app.task(queue=queue, max_attempts=2)
    def parent() -> list[str]:
        job = current_job()
        later = child.using(delay=timedelta(minutes=job.attempt))  # another request in each attempt
        ids = [
            later.enqueue(1).id,
            later.enqueue(1).id,
            *(each.id for each in app.enqueue_many([later.call(2), later.call(3)])),
        ]
        if not job.is_last_attempt:
            raise Retry(after=0)
        return ids

    async with app.running(queues=[queue], concurrency=1):
        ids = await (await parent.aenqueue()).aresult(timeout=30)
    children = [job async for job in client.iterate_jobs(queue=child.queue)]
    assert sorted(job.id for job in children) == sorted(ids)
    assert len(set(ids)) == 4


async def test_headers_checkpoint_and_changed_arguments_reach_the_next_attempt(app: App, queue: str) -> None:
    @app.on_enqueue
    def trace(job: NewJob) -> None:
        job.headers["trace"] = "t-1"

    @app.task(queue=queue, max_attempts=3)
    async def fetch(force: str, days: list[date]) -> list[Any]:
        job = current_job()
        if job.attempt == 1:
            job.progress(10, checkpoint={"rows": 7})
            raise Retry("one day failed", after=0, days=days[1:])
        return [force, days, job.headers, job.checkpoint]

    async with app.running(concurrency=1):
        enqueued = await fetch.using(headers={"tenant": "a"}).aenqueue("kent", [date(2026, 1, 1), date(2026, 1, 2)])
        result = await enqueued.aresult(timeout=30)
    assert result == ["kent", ["2026-01-02"], {"tenant": "a", "trace": "t-1"}, {"rows": 7}]


async def test_a_payload_that_does_not_fit_is_given_back_and_then_fails(
    app: App, queue: str, client: AsyncJobClient, admin: AsyncAdminClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(payload_mismatch, "TIMES", 3)

    @app.task(queue=queue)
    def work(path: str) -> str:
        return path

    job = work.job((await client.create_job({"path": "a", "dry_run": True}, queue=queue, kind="work")).id)
    async with app.running(concurrency=1):
        for count in range(1, 4):
            given_back = await wait_for_job(client, job.id, lambda seen: seen.run_at > seen.updated_at)
            assert (given_back.status, given_back.attempt) == ("queued", 0)
            assert given_back.run_at - given_back.updated_at == 30_000
            events = await event_types(client, job.id)
            assert (events.count("released"), events.count("failed")) == (count, 0)
            await admin.run_now(job.id)
        with pytest.raises(
            JobFailed, match="does not fit task 'work': Object contains unknown field `dry_run`"
        ) as failed:
            await job.aresult(timeout=30)
        assert failed.value.error_code == "payload_mismatch"
    reports = [event for event in await client.timeline(job.id) if event.type == "progress"]
    assert all(event.details["message"].startswith("payload_mismatch: The payload") for event in reports)


async def test_a_payload_of_null_has_no_arguments(app: App, queue: str, client: AsyncJobClient) -> None:
    @app.task(queue=queue)
    def work(n: int = 3) -> int:
        return n

    job = await client.create_job(queue=queue, kind="work")
    async with app.running(concurrency=1):
        assert (await wait_until_finished(client, job.id)).metadata_value == 3


def test_a_worker_needs_tasks_that_it_can_run(daemon: DaemonProcess) -> None:
    with pytest.raises(ValueError, match="the app has no tasks"):
        App("empty", url=f"unix:{daemon.socket}").run()
    inline = App("inline", inline=True)
    inline.task(name="work")(lambda: 1)
    with pytest.raises(ValueError, match="inline=True runs its jobs itself"):
        inline.run()
    undefined: Any = App("undefined")

    def work(n: Missing) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    undefined.task(work)
    with pytest.raises(TypeError, match="name 'Missing' is not defined"):
        undefined.run()
    with pytest.raises(ImportError, match="no_such_module"):
        App("include", include=["no_such_module"]).run()


def test_a_daemon_that_is_not_there_is_named(
    tmp_path: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon_jobs, "RETRY_FOR_S", 0.5)
    app = App("tests", url=f"unix:{tmp_path}/none")
    task = app.task(name="work")(lambda: 1)
    with pytest.raises(Exception, match=r"No such file or directory\. Start a daemon with `jobd dev`"):
        task.enqueue()
    assert caplog.text.count("Retrying for 0.5 s") == 1


async def test_a_worker_puts_the_schedules_of_its_app(app: App, queue: str, daemon: DaemonProcess) -> None:
    ran = asyncio.Event()

    @app.schedule(timedelta(seconds=1), id=f"tick-{queue}")
    @app.task(queue=queue)
    async def tick() -> None:
        assert current_job().scheduled_at is not None
        ran.set()

    async with app.running():
        await asyncio.wait_for(ran.wait(), 30)
    async with AsyncAdminClient(f"unix:{daemon.admin_socket}", token=TOKEN) as admin:
        assert (await admin.get_schedule(id=f"tick-{queue}")).source == "app:tests"
        await admin.put_schedule(id=f"tick-{queue}", every_ms=3_600_000, job={"queue": queue})
    with pytest.raises(ScheduleOwned, match="belongs to an operator"):
        await app._worker().serve()


async def test_a_worker_names_the_schedule_with_an_unknown_zone(app: App, queue: str) -> None:
    app.schedule("@daily", id="late", timezone="Europe/Berln")(app.task(name="work", queue=queue)(lambda: 1))
    with pytest.raises(InvalidRequest, match=r'schedule \'late\': .*"Europe/Berln" is unknown: use an IANA name'):
        await app._worker().serve()
