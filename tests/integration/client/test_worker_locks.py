"""Worker against a real daemon: locks that are extended and lost, timeouts, an unreachable daemon."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from jobd.client import (
    AsyncAdminClient,
    AsyncHandlerContext,
    AsyncJobClient,
    HandlerContext,
    JobClient,
    LockLost,
    Stopped,
    Worker,
)
from jobd.client.worker import handlers, lock_keeper
from tests.support.client_harness import running_worker, wait_for_job, wait_until_finished
from tests.support.daemon_process import DaemonProcess
from tests.support.polling import wait_until


@pytest.mark.slow
async def test_a_handler_that_blocks_its_loop_keeps_its_lock(
    client: AsyncJobClient,
    queue: str,
    daemon: DaemonProcess,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A client in another thread reads the job, because this loop is blocked."""
    monkeypatch.setattr(handlers, "LAG_S", 0.2)
    monkeypatch.setattr(handlers, "MEASURE_S", 0.1)
    worker = Worker(client, queues=[queue], lock_ttl_ms=30_000)

    @worker.handler
    async def work(context: AsyncHandlerContext) -> int:
        with JobClient(f"unix:{daemon.socket}") as jobs:
            while [event.type for event in jobs.timeline(context.job.id)].count("extended") < 3:
                time.sleep(0.05)
        return context.job.attempt

    job = await client.create_job(queue=queue)
    async with running_worker(worker):
        done = await wait_until_finished(client, job.id)
        await wait_until(lambda: "runs again" in caplog.text)
    assert (done.status, done.metadata_value, done.stalls) == ("completed", 1, 0)
    assert f"job {job.id}: the event loop of the handlers has been blocked for " in caplog.text


@pytest.mark.slow
async def test_a_grant_received_while_the_loop_is_blocked_keeps_its_lock(
    client: AsyncJobClient, queue: str, daemon: DaemonProcess
) -> None:
    worker = Worker(client, queues=[queue], lock_ttl_ms=30_000, concurrency=2)

    @worker.handler("blocks")
    async def block(context: AsyncHandlerContext) -> None:
        with JobClient(f"unix:{daemon.socket}") as jobs:
            other = jobs.create_job(queue=queue, kind="other")
            while [event.type for event in jobs.timeline(other.id)].count("extended") < 3:
                time.sleep(0.05)
        context.set_result(metadata=other.id)

    @worker.handler
    async def work(context: AsyncHandlerContext) -> str:
        return "later"

    job = await client.create_job(queue=queue, kind="blocks")
    async with running_worker(worker):
        other = await wait_until_finished(client, (await wait_until_finished(client, job.id)).metadata_value)
    assert (other.status, other.attempt, other.stalls) == ("completed", 1, 0)


async def test_a_lock_lost_while_the_loop_is_blocked_cancels_the_handler(
    client: AsyncJobClient, queue: str, daemon: DaemonProcess, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Worker(client, queues=[queue], lock_ttl_ms=30_000)
    ended: list[BaseException] = []

    @worker.handler
    async def work(context: AsyncHandlerContext) -> None:
        with JobClient(f"unix:{daemon.socket}") as jobs:
            jobs.cancel_job(context.job.id)
        while "stopping its work" not in caplog.text:
            time.sleep(0.01)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as error:
            ended.append(error)
            context.raise_if_lost()

    job = await client.create_job(queue=queue)
    async with running_worker(worker):
        await wait_until(lambda: bool(ended))
    assert (await client.get_job(job.id)).status == "cancelled"


async def test_a_handler_has_the_context_of_serve(client: AsyncJobClient, queue: str) -> None:
    worker = Worker(client, queues=[queue], concurrency=2)
    variable = contextvars.ContextVar[str]("variable")

    @worker.handler("async")
    async def work(context: AsyncHandlerContext) -> str:
        return variable.get()

    @worker.handler
    def plain(context: HandlerContext) -> str:
        return variable.get()

    variable.set("of the caller")
    async with running_worker(worker):
        for kind in ("async", "plain"):
            job = await client.create_job(queue=queue, kind=kind)
            assert (await wait_until_finished(client, job.id)).metadata_value == "of the caller"


@pytest.mark.parametrize("is_own", [True, False], ids=["of the handler", "of the worker"])
@pytest.mark.parametrize("is_async", [True, False], ids=["async", "plain"])
async def test_a_handler_is_stopped_after_its_timeout(
    client: AsyncJobClient, queue: str, is_async: bool, is_own: bool
) -> None:
    limit = timedelta(milliseconds=200)
    worker = Worker(client, queues=[queue], timeout=1000 if is_own else limit)
    seen: list[BaseException] = []

    async def work(context: AsyncHandlerContext) -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as error:
            seen.append(error)
        return "too late"

    def plain(context: HandlerContext) -> str:
        context.cancelled.wait()
        try:
            context.progress(5)
        except Stopped as error:
            seen.append(error)
            raise
        return "too late"

    worker.handler("k", timeout=limit if is_own else None)(work if is_async else plain)
    later = {"kind": "fixed", "base_ms": 3_600_000}  # prevents a second attempt
    job = await client.create_job(queue=queue, kind="k", max_attempts=2, backoff=later)
    async with running_worker(worker):
        waiting = await wait_for_job(client, job.id, lambda job: job.error_code is not None)
    assert (waiting.status, waiting.error_code, waiting.attempt) == ("queued", "timeout", 1)
    assert waiting.error_message == "The run took longer than its timeout of 200 ms."
    assert len(seen) == 1


async def test_a_thread_that_outlives_its_timeout_keeps_its_lock_and_its_result(
    client: AsyncJobClient, queue: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It counts against the concurrency until it returns."""
    monkeypatch.setattr(handlers, "STOP_S", 0.05)
    worker = Worker(client, queues=[queue], timeout=0.1, lock_ttl_ms=30_000)
    go, runs = threading.Event(), []

    @worker.handler("long")
    def long(context: HandlerContext) -> str:
        runs.append(context.job.attempt)
        go.wait()
        return "finished"

    @worker.handler
    def short(context: HandlerContext) -> None: ...

    job = await client.create_job(queue=queue, kind="long", max_attempts=3, backoff={"kind": "fixed", "base_ms": 0})
    after = await client.create_job(queue=queue)
    async with running_worker(worker):
        await wait_until(lambda: "took longer than 100 ms" in caplog.text)
        late = await client.get_job(job.id)
        await wait_for_job(client, job.id, lambda job: job.updated_at > late.updated_at)  # its lock is extended
        assert (await client.get_job(after.id)).status == "queued"
        go.set()
        done = await wait_until_finished(client, job.id)
        assert (await wait_until_finished(client, after.id)).status == "completed"
    assert (done.status, done.metadata_value, runs) == ("completed", "finished", [1])


async def test_progress_after_the_end_of_a_run_is_an_error(
    client: AsyncJobClient, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers, "STOP_S", 0.05)
    worker = Worker(client, queues=[queue], timeout=0.1)
    errors: list[Exception] = []
    go = asyncio.Event()

    async def report(context: AsyncHandlerContext) -> None:
        try:
            await context.progress(50)
        except (LockLost, Stopped) as error:
            errors.append(error)

    tasks: list[AsyncHandlerContext] = []

    @worker.handler
    async def work(context: AsyncHandlerContext) -> None:
        tasks.append(context)
        with contextlib.suppress(asyncio.CancelledError):
            await go.wait()
        await go.wait()
        await report(context)

    job = await client.create_job(queue=queue)
    async with running_worker(worker):
        await wait_until_finished(client, job.id)
        go.set()
        await wait_until(lambda: bool(errors))
    await report(tasks[0])
    assert [type(error) for error in errors] == [LockLost, Stopped]


async def test_cancelling_a_job_cancels_its_async_handler(client: AsyncJobClient, queue: str) -> None:
    worker = Worker(client, queues=[queue], lock_ttl_ms=30_000)
    started, stopped = asyncio.Event(), asyncio.Event()
    tasks: list[AsyncHandlerContext] = []

    @worker.handler("long")
    async def long(context: AsyncHandlerContext) -> None:
        tasks.append(context)
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    @worker.handler()
    async def short(context: AsyncHandlerContext) -> None:
        pass

    job = await client.create_job(queue=queue, kind="long")
    after = await client.create_job(queue=queue)
    async with running_worker(worker):
        await started.wait()
        await client.cancel_job(job.id, "not needed")
        await stopped.wait()
        assert (await wait_until_finished(client, after.id)).status == "completed"
    assert tasks[0].cancelled.is_set()
    with pytest.raises(LockLost) as caught:
        tasks[0].raise_if_lost()
    assert caught.value.cancel_requested
    assert (await client.get_job(job.id)).status == "cancelled"


async def test_a_plain_handler_that_lost_its_lock_reports_nothing(
    client: AsyncJobClient, admin: AsyncAdminClient, queue: str
) -> None:
    worker = Worker(client, queues=[queue], lock_ttl_ms=30_000)
    started = threading.Event()
    outcome: list[Any] = []

    @worker.handler()
    def work(context: HandlerContext) -> str:
        if started.is_set():
            return "second"
        started.set()
        context.cancelled.wait()
        try:
            context.raise_if_lost()
        except LockLost as error:
            outcome.append(error)
        return "first"

    job = await client.create_job(queue=queue)
    async with running_worker(worker):
        await asyncio.to_thread(started.wait)
        await admin.force_reset(job.id)
        done = await wait_until_finished(client, job.id)
    assert done.metadata_value == "second"
    assert len(outcome) == 1


async def test_a_handler_that_received_lock_lost_is_not_interrupted_while_it_ends(
    client: AsyncJobClient, queue: str
) -> None:
    worker = Worker(client, queues=[queue], lock_ttl_ms=30_000)
    started, go, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @worker.handler()
    async def work(context: AsyncHandlerContext) -> None:
        started.set()
        await go.wait()
        try:
            await context.progress(50)
        finally:
            await context.cancelled.wait()
            await asyncio.to_thread(ended.is_set)  # longer than the cancellation would take
            ended.set()

    job = await client.create_job(queue=queue)
    async with running_worker(worker):
        await started.wait()
        await client.cancel_job(job.id)
        go.set()
        await ended.wait()


async def test_a_handler_that_ignores_a_lost_lock_is_cancelled(
    client: AsyncJobClient, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers, "STOP_S", 0.05)
    worker = Worker(client, queues=[queue], lock_ttl_ms=30_000)
    started, go, cancelled = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @worker.handler()
    async def work(context: AsyncHandlerContext) -> None:
        started.set()
        await go.wait()
        try:
            while True:
                with contextlib.suppress(LockLost):
                    await context.progress(50)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    job = await client.create_job(queue=queue)
    async with running_worker(worker):
        await started.wait()
        await client.cancel_job(job.id)
        go.set()
        await cancelled.wait()


@pytest.mark.slow
async def test_work_continues_while_the_daemon_is_unreachable(
    tmp_path: Path, queue: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock_keeper, "WAIT_S", 0.05)
    caplog.set_level(logging.WARNING, "jobd.client")
    started, go = asyncio.Event(), asyncio.Event()
    with DaemonProcess(tmp_path) as daemon:
        async with AsyncJobClient(f"unix:{daemon.socket}") as client:
            worker = Worker(client, queues=[queue], lock_ttl_ms=30_000)

            @worker.handler()
            async def work(context: AsyncHandlerContext) -> str:
                started.set()
                await go.wait()
                await context.progress(50, "on my own")
                await context.progress(60, "still on my own")
                return "done without you"

            job = await client.create_job(queue=queue)
            async with running_worker(worker) as serving:
                await started.wait()
                await asyncio.to_thread(daemon.kill)
                await wait_until(lambda: "The work continues" in caplog.text)
                go.set()
                await wait_until(lambda: "cannot complete the job" in caplog.text)
                assert not serving.done()
                await asyncio.to_thread(daemon.start)
                done = await wait_until_finished(client, job.id)
                assert (done.metadata_value, done.attempt, done.stalls) == ("done without you", 1, 0)
                after = await client.create_job(queue=queue)
                assert (await wait_until_finished(client, after.id)).status == "completed"  # the worker claims again
