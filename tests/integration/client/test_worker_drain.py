"""Worker against a real daemon: stop, signals and cancellation."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import re
import signal
import subprocess
import threading
import time
from typing import Any

import pytest

from jobd.client import AsyncHandlerContext, AsyncJobClient, HandlerContext, JobClient, Stopped, Worker
from tests.support.client_harness import event_types, python_program, running_worker, wait_for_job
from tests.support.daemon_process import DaemonProcess


async def test_stop_lets_a_running_handler_end_and_claims_no_more(client: AsyncJobClient, queue: str) -> None:
    worker = Worker(client, queues=[queue])
    started, go = asyncio.Event(), asyncio.Event()

    @worker.handler()
    async def work(context: AsyncHandlerContext) -> None:
        started.set()
        await go.wait()

    first, second = await client.create_jobs([{"queue": queue}, {"queue": queue}])
    async with running_worker(worker) as serving:
        await started.wait()
        worker.stop()
        go.set()
        await serving
    assert (await client.get_job(first.id)).status == "completed"
    assert (await client.get_job(second.id)).attempt == 0


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "plain"])
async def test_after_the_grace_a_handler_is_stopped_and_its_job_released(
    client: AsyncJobClient, queue: str, is_async: bool
) -> None:
    worker = Worker(client, queues=[queue], grace_s=0.05)
    started = threading.Event()
    raised: list[BaseException] = []

    if is_async:

        @worker.handler()
        async def work(context: AsyncHandlerContext) -> None:
            started.set()
            with contextlib.suppress(asyncio.CancelledError):  # its job is not completed either way
                await asyncio.Event().wait()

    else:

        @worker.handler()
        def plain(context: HandlerContext) -> None:
            started.set()
            try:
                while True:
                    context.progress(1)
            except Stopped as error:
                raised.append(error)
                raise

    job = await client.create_job(queue=queue)
    async with running_worker(worker) as serving:
        await asyncio.to_thread(started.wait)
        worker.stop()
        await serving
    back = await client.get_job(job.id)
    assert (back.status, back.attempt, back.progress) == ("queued", 0, 0)
    assert (await event_types(client, job.id))[-1] == "released"
    assert len(raised) == (0 if is_async else 1)


async def test_after_the_grace_the_result_of_a_plain_handler_counts(client: AsyncJobClient, queue: str) -> None:
    worker = Worker(client, queues=[queue], grace_s=0.05)
    started = threading.Event()

    @worker.handler()
    def work(context: HandlerContext) -> dict[str, int]:
        started.set()
        context.cancelled.wait()
        return {"pages": 3}

    job = await client.create_job(queue=queue)
    async with running_worker(worker) as serving:
        await asyncio.to_thread(started.wait)
        worker.stop()
        await serving
    done = await client.get_job(job.id)
    assert (done.status, done.metadata_value) == ("completed", {"pages": 3})


async def test_a_third_stop_does_not_wait_for_a_thread(
    client: AsyncJobClient, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Worker(client, queues=[queue], grace_s=10_000)
    started, go = threading.Event(), threading.Event()

    @worker.handler()
    def work(context: HandlerContext) -> None:
        started.set()
        go.wait()

    job = await client.create_job(queue=queue)
    async with running_worker(worker) as serving:
        await asyncio.to_thread(started.wait)
        for _ in range(3):
            worker.stop()
        await serving
    assert (await client.get_job(job.id)).status == "processing"  # the thread may still run: the lock expires
    assert f"job {job.id}: its work does not stop. Its lock expires within 60 s" in caplog.text
    go.set()


async def test_cancelling_serve_stops_handlers_and_releases_jobs(client: AsyncJobClient, queue: str) -> None:
    worker = Worker(client, queues=[queue])
    started = asyncio.Event()

    @worker.handler()
    async def work(context: AsyncHandlerContext) -> None:
        started.set()
        await asyncio.Event().wait()

    job = await client.create_job(queue=queue)
    serving = asyncio.create_task(worker.serve())
    await started.wait()
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert (await client.get_job(job.id)).status == "queued"


SCRIPT = """
import sys
from jobd.client import Worker
worker = Worker(sys.argv[1], queues=[sys.argv[2]])

@worker.handler()
def work(task):
    task.progress(1)
    sys.stdin.read()
    return "done"

worker.run()
"""


async def test_sigterm_drains_a_worker_process(client: AsyncJobClient, daemon: DaemonProcess, queue: str) -> None:
    job = await client.create_job(queue=queue)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    async with python_program("-c", SCRIPT, f"unix:{daemon.socket}", queue, text=True, **pipes) as process:
        await wait_for_job(client, job.id, lambda job: job.progress == 1)
        process.send_signal(signal.SIGTERM)
        claims, stopping = [await asyncio.to_thread(process.stderr.readline) for _ in range(2)]
        assert " claims jobs of queue " in claims
        again = "a second Ctrl-C or SIGTERM asks it to stop"
        assert stopping == f"stopping: waiting up to 30 s for {job.id}; {again}\n"
        await asyncio.to_thread(process.communicate)
        assert process.returncode == 0
    assert (await client.get_job(job.id)).metadata_value == "done"


TERMINAL = """
import sys
from jobd.client import Discard, Snooze, Worker
worker = Worker(sys.argv[1], queues=[sys.argv[2]], concurrency=2, name="w-tty")

@worker.handler("good", "bad", "discarded", "snoozed")
def work(task):
    if task.job.kind == "bad":
        raise ValueError("no such\\npage")
    if task.job.kind == "discarded":
        raise Discard("never")
    if task.job.kind == "snoozed":
        raise Snooze(3600)

worker.run()
"""


async def test_in_a_terminal_a_worker_prints_what_it_claims_and_each_job(
    client: AsyncJobClient, daemon: DaemonProcess, queue: str
) -> None:
    kinds = ("good", "bad", "discarded", "snoozed")
    ids = {kind: (await client.create_job(queue=queue, kind=kind)).id for kind in kinds}
    ours, theirs = pty.openpty()
    shown = ""
    async with python_program("-c", TERMINAL, f"unix:{daemon.socket}", queue, stderr=theirs):
        os.close(theirs)
        while any(f"job {job_id} (" not in shown for job_id in ids.values()):
            shown += (await asyncio.to_thread(os.read, ours, 4096)).decode().replace("\r\n", "\n")
    os.close(ours)
    assert shown.startswith(
        f"worker w-tty claims jobs of queue {queue} (only {', '.join(kinds)}), 2 at a time, at {client.endpoints[0]}\n"
    )
    shown = re.sub(r"after [\d.]+ m?s", "after N s", shown)
    assert f"\njob {ids['good']} (good) completed after N s." in shown
    assert f"\njob {ids['snoozed']} (snoozed) was put back after N s; it is due again in 1 h." in shown
    assert (
        f"\njob {ids['discarded']} (discarded) failed after N s: never; it is not retried: the handler raised Discard."
        in shown
    )
    failed = f"\njob {ids['bad']} (bad) failed after N s: ValueError: no such; it is not retried: attempt 1 of 1."
    assert failed in shown


async def test_a_signal_ends_claims_even_if_a_handler_blocks_the_loop(client: AsyncJobClient, queue: str) -> None:
    """The handler sends the signal, so the loop does not run before the handler returns."""
    worker = Worker(client, queues=[queue], concurrency=2)

    @worker.handler("blocks")
    async def blocks(context: AsyncHandlerContext) -> None:
        with JobClient(client.endpoint) as blocking:
            os.kill(os.getpid(), signal.SIGTERM)
            while any(seen.waiting for seen in blocking.workers() if seen.worker == worker.name):
                time.sleep(0.02)
            later.append(blocking.create_job(queue=queue, kind="later").id)
            time.sleep(0.2)  # long enough for a claim

    @worker.handler("later")
    def begun(context: HandlerContext) -> None:
        raise AssertionError("claimed after the signal")

    later: list[str] = []
    job = await client.create_job(queue=queue, kind="blocks")
    await worker.serve(signals=True)
    assert (await client.get_job(job.id)).status == "completed"
    assert {(await client.get_job(each)).status for each in later} == {"queued"}
