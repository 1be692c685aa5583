"""The Worker against a real daemon: handlers, locks that are kept and lost, drains; and a daemon that is away."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

import jobd
from jobd.client import (
    AsyncAdminClient,
    AsyncJobClient,
    Discard,
    InvalidRequest,
    JobClient,
    JobInfo,
    LockLost,
    Retry,
    Stopped,
    SyncTask,
    Task,
    Unauthorized,
    Worker,
    uuid7,
)
from jobd.client.protocol import job_path
from jobd.client.worker import worker as client_worker
from jobd.client.worker.claimer import describe_process
from jobd.client.worker.lease import LeaseKeeper
from jobd.client.worker.worker import _failure_options, _message, _result
from tests import ROOT
from tests.support.daemon_process import TOKEN, Daemon, die_with_us
from tests.support.scripted_server import Asked, ScriptedServer, Step, drop, no, ok, serving, until
from tests.unit.client.test_client import JOB


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("d")) as running:
        yield running


@pytest.fixture
async def client(daemon: Daemon) -> AsyncIterator[AsyncJobClient]:
    async with AsyncJobClient(f"unix:{daemon.socket}") as client:
        yield client


@pytest.fixture
async def admin(daemon: Daemon) -> AsyncIterator[AsyncAdminClient]:
    async with AsyncAdminClient(f"unix:{daemon.admin_socket}", token=TOKEN) as client:
        yield client


@pytest.fixture
def queue() -> str:
    """A queue that no other test uses."""
    return uuid7()


@contextlib.asynccontextmanager
async def at_work(worker: Worker) -> AsyncIterator[asyncio.Task[None]]:
    """The worker serves meanwhile, and is drained at the end."""
    serving = asyncio.create_task(worker.serve())
    try:
        yield serving
        worker.stop()
        await serving
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


async def when(client: AsyncJobClient, job_id: str, is_so: Callable[[JobInfo], bool]) -> JobInfo:
    """The job, once it is so."""
    seen: list[JobInfo] = []

    async def look() -> bool:
        seen.append(await client.get_job(job_id))
        return is_so(seen[-1])

    await until(look)
    return seen[-1]


async def finished(client: AsyncJobClient, job_id: str) -> JobInfo:
    return await when(client, job_id, lambda job: job.finished_at is not None)


async def types(client: AsyncJobClient, job_id: str) -> list[str]:
    return [event.type for event in await client.timeline(job_id)]


# ---------------------------------------------------------------------------------------------------------------------
# Handlers and their results.


async def test_an_async_handler_completes_its_job_with_what_it_returns(client: AsyncJobClient, queue: str) -> None:
    worker = Worker(client, queues=[queue], name="w-async")
    tokens: list[int] = []

    @worker.handler("add")
    async def add(task: Task) -> dict[str, Any]:
        await task.progress(50, "half way")
        task.set_result(download_url="https://files/1", metadata={"from": "set"})
        tokens.append(task.fencing_token)
        return {"sum": sum(task.payload), "file_path": "/f"}

    job = await client.create_job([1, 2, 3], queue=queue, kind="add")
    async with at_work(worker):
        done = await finished(client, job.id)
    assert (done.status, done.progress, done.download_url, done.file_path) == (
        "completed",
        100,
        "https://files/1",
        "/f",
    )
    assert done.metadata_value == {"from": "set", "sum": 6}
    events = await client.timeline(job.id)
    assert [event.type for event in events] == ["created", "granted", "progress", "completed"]
    assert events[1].by == "worker:w-async"
    assert tokens[0] == events[1].details["fencing_token"]


async def test_a_plain_handler_runs_in_a_thread(client: AsyncJobClient, queue: str) -> None:
    worker = Worker(client, queues=[queue])
    threads: list[threading.Thread] = []

    @worker.handler()
    def work(task: SyncTask) -> list[Any]:
        threads.append(threading.current_thread())
        task.progress(10)
        task.raise_if_lost()
        return [task.job.id, task.payload]

    job = await client.create_job("p", queue=queue)
    async with at_work(worker):
        done = await finished(client, job.id)
    assert done.metadata_value == [job.id, "p"]
    assert threads[0] is not threading.main_thread()
    assert await types(client, job.id) == ["created", "granted", "progress", "completed"]


async def test_callable_objects_may_be_handlers(client: AsyncJobClient, queue: str) -> None:
    class Adder:
        async def __call__(self, task: Task) -> int:
            return int(task.payload) + 1

    worker = Worker(client, queues=[queue])
    worker.handler()(Adder())
    job = await client.create_job(1, queue=queue)
    async with at_work(worker):
        assert (await finished(client, job.id)).metadata_value == 2


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "plain"])
async def test_a_handler_is_registered_without_parentheses(client: AsyncJobClient, queue: str, is_async: bool) -> None:
    worker = Worker(client, queues=[queue])
    if is_async:

        @worker.handler
        async def work(task: Task) -> str:
            return "async"

        assert asyncio.iscoroutinefunction(work), "the decorator returns the function itself"
    else:

        @worker.handler
        def plain(task: SyncTask) -> str:
            return "plain"

        assert plain(None) == "plain"  # type: ignore[arg-type]

    job = await client.create_job(queue=queue, kind="any")
    async with at_work(worker):
        assert (await finished(client, job.id)).metadata_value == ("async" if is_async else "plain")


def test_a_wrong_use_of_the_decorator_is_a_type_error_at_once() -> None:
    worker = Worker("unix:/nowhere")

    def generator(task: Task) -> Iterator[int]:
        yield 1

    async def async_generator(task: Task) -> AsyncIterator[int]:
        yield 1

    def without_a_task() -> None: ...

    def with_more(task: Task, more: int) -> None: ...

    for wrong in (generator, async_generator, without_a_task, with_more):
        with pytest.raises(TypeError):
            worker.handler(wrong)
        with pytest.raises(TypeError):
            worker.handler("a")(wrong)
    with pytest.raises(TypeError, match="cannot be a handler"):
        worker.handler("a")("b")  # type: ignore[type-var]
    for kinds in ((5,), (print, "a"), ("a", print), (None,)):
        with pytest.raises(TypeError, match=r"is not a kind; write @worker\.handler"):
            worker.handler(*kinds)
    with pytest.raises(ValueError, match="needs a handler"):
        asyncio.run(worker.serve())


@pytest.mark.parametrize(
    ("given", "returned", "result"),
    [
        ({}, None, {}),
        ({"file_path": "/a"}, None, {"file_path": "/a"}),
        ({}, {}, {}),
        ({"file_path": "/a"}, {"file_path": "/b"}, {"file_path": "/b"}),
        ({}, {"n": 1}, {"metadata": {"n": 1}}),
        ({}, {"metadata": [1]}, {"metadata": [1]}),
        ({}, {"metadata": {"a": 1}, "b": 2}, {"metadata": {"a": 1, "b": 2}}),
        ({"metadata": {"a": 1}}, {"a": 2}, {"metadata": {"a": 2}}),
        ({}, "text", {"metadata": "text"}),
        ({}, 0, {"metadata": 0}),
    ],
)
def test_what_a_handler_returns_is_the_result(given: dict[str, Any], returned: Any, result: dict[str, Any]) -> None:
    assert _result(given, returned) == result


def test_keys_cannot_be_added_to_metadata_that_is_no_dict() -> None:
    with pytest.raises(TypeError, match="needs a dict"):
        _result({}, {"metadata": [1], "other": 2})


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "plain"])
async def test_an_exception_fails_the_job_with_its_class_and_traceback(
    client: AsyncJobClient, queue: str, is_async: bool
) -> None:
    worker = Worker(client, queues=[queue])

    def burst() -> None:
        raise ZeroDivisionError("no more numbers")

    if is_async:

        @worker.handler()
        async def work(task: Task) -> None:
            burst()
    else:

        @worker.handler()
        def plain(task: SyncTask) -> None:
            burst()

    job = await client.create_job(queue=queue)
    async with at_work(worker):
        failed = await finished(client, job.id)
    assert (failed.status, failed.error_code) == ("failed", "ZeroDivisionError")
    assert failed.error_message is not None
    first, heading, *frames = failed.error_message.splitlines()
    assert (first, heading) == ("ZeroDivisionError: no more numbers", "Traceback (most recent call last):")
    assert "in work" in frames[0] or "in plain" in frames[0]
    assert "in burst" in failed.error_message
    assert "jobd/client" not in failed.error_message


async def test_a_failed_attempt_is_followed_by_the_next(client: AsyncJobClient, queue: str) -> None:
    worker = Worker(client, queues=[queue])

    @worker.handler()
    async def work(task: Task) -> int:
        if task.job.attempt < 3:
            raise Retry("not yet", after_ms=0)
        return task.job.attempt

    job = await client.create_job(queue=queue, max_attempts=3)
    async with at_work(worker):
        done = await finished(client, job.id)
    assert (done.status, done.metadata_value) == ("completed", 3)
    assert (await types(client, job.id)).count("retried") == 2


async def test_retry_says_when(client: AsyncJobClient, queue: str) -> None:
    worker = Worker(client, queues=[queue])

    @worker.handler()
    async def work(task: Task) -> None:
        raise Retry(after_ms=3_600_000)

    job = await client.create_job(queue=queue, max_attempts=2)
    async with at_work(worker):
        waiting = await when(client, job.id, lambda job: job.error_code is not None)
    assert (waiting.status, waiting.error_code) == ("queued", "Retry")
    assert waiting.run_at - waiting.updated_at == 3_600_000


async def test_discard_fails_for_good(client: AsyncJobClient, queue: str) -> None:
    worker = Worker(client, queues=[queue])

    @worker.handler()
    def work(task: SyncTask) -> None:
        raise Discard("nobody needs it")

    job = await client.create_job(queue=queue, max_attempts=5)
    async with at_work(worker):
        failed = await finished(client, job.id)
    assert (failed.status, failed.error_message, failed.error_code) == ("failed", "nobody needs it", "Discard")


def raised(error: Callable[[], Any]) -> str:
    """The description of what this raises."""
    try:
        error()
    except BaseException as caught:
        return _message(caught)
    raise AssertionError("nothing was raised")


def test_the_message_of_an_error_is_bounded_and_its_first_line_and_its_end_are_kept() -> None:
    def deep(left: int) -> None:
        if left == 0:
            raise ValueError("the first line " + "x" * 500 + "\nthe second line\n" + "y\n" * 2000)
        [deep][left % 1](left - 1)

    message = raised(lambda: deep(3))
    assert len(message) == 4096
    assert message.startswith("ValueError: the first line " + "x" * 500 + "\nthe second line\n")
    assert "\n[...]\n" in message
    assert "raise ValueError" in "".join(message.splitlines()[-2:])

    def long() -> None:
        raise ValueError("x" * 10_000)

    assert raised(long) == "ValueError: " + "x" * (4096 - 13) + "…"
    assert _message(Discard("")) == "Discard"
    assert _failure_options(Retry(after_ms=5)) == {"error_code": "Retry", "retry_after_ms": 5}


def test_an_error_is_described_with_its_chain_its_notes_and_its_group() -> None:
    def chained() -> None:
        try:
            dict[str, int]()["a"]
        except KeyError as missing:
            error = LookupError("no customer\nof this name")
            error.add_note("a note")
            raise error from missing

    told = raised(chained)
    assert told.startswith("LookupError: no customer\nof this name\na note\nTraceback (most recent call last):\n")
    assert "KeyError: 'a'\n\nThe above exception was the direct cause of the following exception:\n" in told
    assert told.count("no customer") == 1

    def grouped() -> None:
        raise ExceptionGroup("two of three", [ValueError("one"), KeyError("two")])

    told = raised(grouped)
    assert told.startswith("ExceptionGroup: two of three (2 sub-exceptions)\n")
    assert "| ValueError: one" in told
    assert "| KeyError: 'two'" in told


def test_an_error_without_frames_of_the_handler_is_one_line() -> None:
    assert _message(asyncio.CancelledError()) == "CancelledError"
    assert _message(TypeError("no result")) == "TypeError: no result"
    assert "client" + "/protocol.py" not in raised(lambda: job_path("/v1/jobs", ""))


def test_an_error_whose_str_raises_is_message() -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise ValueError("no text")

    assert _message(Broken()) == "Broken: <exception str() failed>"
    assert _message(OSError("no such file: \udcff\x00")) == "OSError: no such file: \\udcff\\x00"
    assert _message(Retry("line one\nline two")) == "line one\nline two"


async def test_an_error_of_any_class_fails_its_job_not_the_worker(
    client: AsyncJobClient, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "jobd.client")

    class NoText(Discard):
        def __str__(self) -> str:
            raise SystemExit

    class NoNotes(Exception):
        __notes__ = None  # type: ignore[assignment]

    worker = Worker(client, queues=[queue])
    errors: dict[str, Callable[[], BaseException]] = {
        "NoText": NoText,
        "NoNotes": lambda: NoNotes("with a text"),
        "TypeError": lambda: Retry(after_ms=object()),  # type: ignore[arg-type]
    }

    @worker.handler
    async def work(task: Task) -> None:
        raise errors[task.job.kind]()

    jobs = [await client.create_job(queue=queue, kind=kind) for kind in errors]
    async with at_work(worker):
        failed = [await finished(client, job.id) for job in jobs]
    assert [(job.error_code, (job.error_message or "").split("\n")[0]) for job in failed] == [
        ("NoText", "<exception str() failed>"),
        ("NoNotes", "NoNotes: with a text"),
        ("TypeError", "TypeError: after_ms is a whole number of milliseconds, got object"),
    ]


async def test_a_message_that_json_cannot_carry_fails_its_job_alone(
    client: AsyncJobClient, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_worker.logger, "disabled", True)  # pytest-xdist cannot carry such a message either
    worker = Worker(client, queues=[queue])

    @worker.handler
    def work(task: SyncTask) -> None:
        raise FileNotFoundError(os.fsdecode(b"/srv/\xff") + "\x00")

    jobs = [await client.create_job(queue=queue) for _ in range(2)]
    async with at_work(worker):
        for job in jobs:
            failed = await finished(client, job.id)
            assert (failed.error_message or "").startswith("FileNotFoundError: /srv/\\udcff\\x00\n")
            assert failed.error_code == "FileNotFoundError"


async def test_sys_exit_in_a_handler_fails_the_job_not_the_worker(client: AsyncJobClient, queue: str) -> None:
    worker = Worker(client, queues=[queue])

    @worker.handler("plain")
    def plain(task: SyncTask) -> None:
        sys.exit(3)

    @worker.handler()
    async def work(task: Task) -> None:
        sys.exit(3)

    jobs = [await client.create_job(queue=queue, kind=kind) for kind in ("plain", "other")]
    async with at_work(worker):
        for job in jobs:
            assert (await finished(client, job.id)).error_code == "SystemExit"


async def test_a_result_that_is_no_json_fails_the_job(client: AsyncJobClient, queue: str) -> None:
    worker = Worker(client, queues=[queue])

    @worker.handler()
    async def work(task: Task) -> Any:
        return {"it": object()}

    job = await client.create_job(queue=queue)
    async with at_work(worker):
        failed = await finished(client, job.id)
    assert (failed.status, failed.error_code) == ("failed", "TypeError")


async def test_a_result_that_the_daemon_refuses_fails_the_job_and_says_why(client: AsyncJobClient, queue: str) -> None:
    worker = Worker(client, queues=[queue])

    @worker.handler()
    async def work(task: Task) -> Any:
        return {"storage_key": "../outside"}

    job = await client.create_job(queue=queue)
    async with at_work(worker):
        failed = await finished(client, job.id)
    assert (failed.status, failed.error_code) == ("failed", "complete:invalid_request")
    assert "rejected its `complete`" in (failed.error_message or "")


async def test_a_payload_that_python_cannot_hold_fails_its_job_alone(client: AsyncJobClient, queue: str) -> None:
    worker = Worker(client, queues=[queue], concurrency=2)

    @worker.handler()
    async def work(task: Task) -> Any:
        return task.payload

    bad = await client.create_job(msgspec.Raw(b"[1e999]"), queue=queue)
    good = await client.create_job(1, queue=queue)
    async with at_work(worker):
        assert (await finished(client, bad.id)).error_code == "ValidationError"
        assert (await finished(client, good.id)).metadata_value == 1


async def test_progress_out_of_bounds_is_raised_in_the_handler(client: AsyncJobClient, queue: str) -> None:
    worker = Worker(client, queues=[queue])
    caught: list[Exception] = []

    @worker.handler()
    async def work(task: Task) -> None:
        try:
            await task.progress(101)
        except InvalidRequest as error:
            caught.append(error)
        await task.progress(5)

    job = await client.create_job(queue=queue)
    async with at_work(worker):
        done = await finished(client, job.id)
    assert (done.status, len(caught)) == ("completed", 1)


async def test_only_jobs_that_have_a_handler_are_claimed(client: AsyncJobClient, queue: str) -> None:
    worker = Worker(client, queues=[queue], concurrency=3)

    @worker.handler("a", "b")
    async def work(task: Task) -> str:
        return task.job.kind

    jobs = [await client.create_job(queue=queue, kind=kind) for kind in ("c", "a", "b")]
    async with at_work(worker):
        assert [(await finished(client, job.id)).metadata_value for job in jobs[1:]] == ["a", "b"]
    assert (await client.get_job(jobs[0].id)).status == "queued"


async def test_jobs_run_side_by_side_up_to_the_concurrency(client: AsyncJobClient, queue: str) -> None:
    worker = Worker(client, queues=queue, concurrency=2)
    running, most = 0, 0
    together = asyncio.Event()

    @worker.handler()
    async def work(task: Task) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        if running == 2:
            together.set()
        await together.wait()
        running -= 1

    jobs = await client.create_jobs({"queue": queue} for _ in range(6))
    async with at_work(worker):
        for job in jobs:
            assert (await finished(client, job.id)).status == "completed"
    assert most == 2


def test_a_worker_wants_handlers_one_for_each_kind_and_room() -> None:
    worker = Worker("unix:/nowhere")
    with pytest.raises(ValueError, match="needs a handler"):
        asyncio.run(worker.serve())
    worker.handler("a")(print)
    with pytest.raises(ValueError, match="a already has a handler"):
        worker.handler("b", "a")(print)
    worker.handler()(print)
    with pytest.raises(ValueError, match="every other kind"):
        worker.handler()(print)
    with pytest.raises(ValueError, match="concurrency"):
        Worker(concurrency=0)
    assert Worker().name.endswith(f"-{os.getpid()}")


# ---------------------------------------------------------------------------------------------------------------------
# Locks that are kept, and lost.


async def test_the_lock_is_kept_as_long_as_the_handler_runs(client: AsyncJobClient, queue: str) -> None:
    worker = Worker(client, queues=[queue], lock_ttl_ms=1000)
    go = asyncio.Event()

    @worker.handler()
    async def work(task: Task) -> None:
        await go.wait()

    job = await client.create_job(queue=queue)
    async with at_work(worker):

        async def is_older_than_one_ttl() -> bool:
            return (await types(client, job.id)).count("extended") >= 4

        await until(is_older_than_one_ttl)
        held = await client.get_job(job.id)
        assert held.lock is not None
        assert held.stalls == 0
        go.set()
        assert (await finished(client, job.id)).attempt == 1


async def test_a_handler_that_blocks_its_loop_keeps_its_lock(
    client: AsyncJobClient,
    queue: str,
    daemon: Daemon,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A client in another thread reads the job, because this loop is blocked."""
    monkeypatch.setattr(client_worker, "LAG_S", 0.2)
    monkeypatch.setattr(client_worker, "MEASURE_S", 0.1)
    worker = Worker(client, queues=[queue], lock_ttl_ms=1000)

    @worker.handler
    async def work(task: Task) -> int:
        with JobClient(f"unix:{daemon.socket}") as jobs:
            while [event.type for event in jobs.timeline(task.job.id)].count("extended") < 6:  # two TTL
                time.sleep(0.05)
        return task.job.attempt

    job = await client.create_job(queue=queue)
    async with at_work(worker):
        done = await finished(client, job.id)
        await until(lambda: "runs again" in caplog.text)
    assert (done.status, done.metadata_value, done.stalls) == ("completed", 1, 0)
    assert f"job {job.id}: the event loop of the handlers is blocked for 0." in caplog.text


async def test_a_grant_that_comes_while_the_loop_is_blocked_is_kept_and_its_handler_runs_later(
    client: AsyncJobClient, queue: str, daemon: Daemon
) -> None:
    worker = Worker(client, queues=[queue], lock_ttl_ms=1000, concurrency=2)

    @worker.handler("blocks")
    async def block(task: Task) -> None:
        with JobClient(f"unix:{daemon.socket}") as jobs:
            other = jobs.create_job(queue=queue, kind="other")
            while [event.type for event in jobs.timeline(other.id)].count("extended") < 4:
                time.sleep(0.05)
        task.set_result(metadata=other.id)

    @worker.handler
    async def work(task: Task) -> str:
        return "later"

    job = await client.create_job(queue=queue, kind="blocks")
    async with at_work(worker):
        other = await finished(client, (await finished(client, job.id)).metadata_value)
    assert (other.status, other.attempt, other.stalls) == ("completed", 1, 0)


async def test_a_loss_that_is_found_while_the_loop_is_blocked_reaches_the_handler(
    client: AsyncJobClient, queue: str, daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Worker(client, queues=[queue], lock_ttl_ms=1000)
    ended: list[BaseException] = []

    @worker.handler
    async def work(task: Task) -> None:
        with JobClient(f"unix:{daemon.socket}") as jobs:
            jobs.cancel_job(task.job.id)
        while "stopping its work" not in caplog.text:
            time.sleep(0.01)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as error:
            ended.append(error)
            task.raise_if_lost()

    job = await client.create_job(queue=queue)
    async with at_work(worker):
        await until(lambda: bool(ended))
    assert (await client.get_job(job.id)).status == "cancelled"


async def test_a_fault_of_the_service_thread_is_raised_by_serve(
    client: AsyncJobClient, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LeaseKeeper, "start", lambda self, *, at_once=False: 1 / 0)
    worker = Worker(client, queues=[queue])
    worker.handler(print)
    await client.create_job(queue=queue)
    with pytest.raises(ZeroDivisionError):
        await worker.serve()


async def test_a_handler_sees_the_context_of_serve(client: AsyncJobClient, queue: str) -> None:
    worker = Worker(client, queues=[queue], concurrency=2)
    variable = contextvars.ContextVar[str]("variable")

    @worker.handler("async")
    async def work(task: Task) -> str:
        return variable.get()

    @worker.handler
    def plain(task: SyncTask) -> str:
        return variable.get()

    variable.set("of the caller")
    async with at_work(worker):
        for kind in ("async", "plain"):
            job = await client.create_job(queue=queue, kind=kind)
            assert (await finished(client, job.id)).metadata_value == "of the caller"


# ---------------------------------------------------------------------------------------------------------------------
# Limits of a run.


async def test_the_locks_of_a_worker_have_no_ceiling_unless_it_sets_one(tmp_path: Path) -> None:
    limits: list[tuple[dict[str, Any], int]] = [({}, 0), ({"max_processing_ms": 5000}, 5000)]
    for limit, sent in limits:
        daemon = Scripted()
        with serving(daemon.peer, tmp_path / "p") as endpoint:
            worker = Worker(endpoint, **limit)
            worker.handler(lambda task: None)
            async with at_work(worker):
                await daemon.hear("complete")
        assert daemon.bodies("claim")[0]["max_processing_ms"] == sent


@pytest.mark.parametrize("is_own", [True, False], ids=["of the handler", "of the worker"])
@pytest.mark.parametrize("is_async", [True, False], ids=["async", "plain"])
async def test_a_run_that_takes_longer_than_its_timeout_fails(
    client: AsyncJobClient, queue: str, is_async: bool, is_own: bool
) -> None:
    limit = timedelta(milliseconds=200)
    worker = Worker(client, queues=[queue], timeout=1000 if is_own else limit)
    seen: list[BaseException] = []

    async def work(task: Task) -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as error:
            seen.append(error)
        return "too late"

    def plain(task: SyncTask) -> str:
        task.cancelled.wait()
        try:
            task.progress(5)
        except Stopped as error:
            seen.append(error)
        return "too late"

    worker.handler("k", timeout=limit if is_own else None)(work if is_async else plain)
    later = {"kind": "fixed", "base_ms": 3_600_000}  # so that no second attempt begins meanwhile
    job = await client.create_job(queue=queue, kind="k", max_attempts=2, backoff=later)
    async with at_work(worker):
        waiting = await when(client, job.id, lambda job: job.error_code is not None)
    assert (waiting.status, waiting.error_code, waiting.attempt) == ("queued", "timeout", 1)
    assert waiting.error_message == "The run took longer than its timeout of 0.2 s."
    assert len(seen) == 1


async def test_a_thread_that_continues_after_its_timeout_counts_against_concurrency(
    client: AsyncJobClient, queue: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(client_worker, "STOP_S", 0.05)
    worker = Worker(client, queues=[queue], timeout=0.1)
    go = threading.Event()

    @worker.handler("long")
    def long(task: SyncTask) -> str:
        go.wait()
        return "too late"

    @worker.handler
    def short(task: SyncTask) -> None: ...

    job = await client.create_job(queue=queue, kind="long")
    after = await client.create_job(queue=queue)
    async with at_work(worker):
        failed = await finished(client, job.id)
        await until(lambda: "its work does not stop" in caplog.text)
        assert (await client.get_job(after.id)).status == "queued"
        go.set()
        await finished(client, after.id)
    assert failed.error_code == "timeout"
    assert failed.error_message == (
        "The run took longer than its timeout of 0.1 s. The handler was told to stop, but it still runs."
    )
    assert (await client.get_job(job.id)).metadata_value is None


async def test_a_run_that_ends_in_time_is_not_limited(client: AsyncJobClient, queue: str) -> None:
    worker = Worker(client, queues=[queue], timeout=1000)
    worker.handler(lambda task: "in time")
    job = await client.create_job(queue=queue)
    async with at_work(worker):
        assert (await finished(client, job.id)).metadata_value == "in time"


@pytest.mark.parametrize("wrong", [0, -1, timedelta(0)])
def test_a_timeout_is_above_0(wrong: Any) -> None:
    with pytest.raises(ValueError, match="timeout must be above 0"):
        Worker(timeout=wrong)
    with pytest.raises(ValueError, match="timeout must be above 0"):
        Worker().handler("k", timeout=wrong)


async def test_progress_after_the_end_of_a_run_is_refused_at_once(
    client: AsyncJobClient, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_worker, "STOP_S", 0.05)
    worker = Worker(client, queues=[queue], timeout=0.1)
    errors: list[Exception] = []
    go = asyncio.Event()

    async def report(task: Task) -> None:
        try:
            await task.progress(50)
        except (LockLost, Stopped) as error:
            errors.append(error)

    tasks: list[Task] = []

    @worker.handler
    async def work(task: Task) -> None:
        tasks.append(task)
        with contextlib.suppress(asyncio.CancelledError):
            await go.wait()
        await go.wait()
        await report(task)

    job = await client.create_job(queue=queue)
    async with at_work(worker):
        await finished(client, job.id)
        go.set()
        await until(lambda: bool(errors))
    await report(tasks[0])
    assert [type(error) for error in errors] == [LockLost, Stopped]


async def test_a_cancelled_job_cancels_its_async_handler_and_the_worker_goes_on(
    client: AsyncJobClient, queue: str
) -> None:
    worker = Worker(client, queues=[queue], lock_ttl_ms=1000)
    started, stopped = asyncio.Event(), asyncio.Event()
    tasks: list[Task] = []

    @worker.handler("long")
    async def long(task: Task) -> None:
        tasks.append(task)
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    @worker.handler()
    async def short(task: Task) -> None:
        pass

    job = await client.create_job(queue=queue, kind="long")
    after = await client.create_job(queue=queue)
    async with at_work(worker):
        await started.wait()
        await client.cancel_job(job.id, "not needed")
        await stopped.wait()
        assert (await finished(client, after.id)).status == "completed"
    assert tasks[0].cancelled.is_set()
    with pytest.raises(LockLost) as caught:
        tasks[0].raise_if_lost()
    assert caught.value.cancel_requested
    assert (await client.get_job(job.id)).status == "cancelled"


async def test_a_lost_job_tells_its_plain_handler_and_reports_nothing(
    client: AsyncJobClient, admin: AsyncAdminClient, queue: str
) -> None:
    worker = Worker(client, queues=[queue], lock_ttl_ms=1000)
    started = threading.Event()
    outcome: list[Any] = []

    @worker.handler()
    def work(task: SyncTask) -> str:
        if started.is_set():
            return "second"
        started.set()
        task.cancelled.wait()
        try:
            task.raise_if_lost()
        except LockLost as error:
            outcome.append(error)
        return "first"

    job = await client.create_job(queue=queue)
    async with at_work(worker):
        await asyncio.to_thread(started.wait)
        await admin.force_reset(job.id)
        done = await finished(client, job.id)
    assert done.metadata_value == "second"
    assert len(outcome) == 1


async def test_a_handler_learns_of_the_loss_when_it_reports_progress(
    client: AsyncJobClient, admin: AsyncAdminClient, queue: str
) -> None:
    worker = Worker(client, queues=[queue])
    started, go = asyncio.Event(), asyncio.Event()
    caught: list[Exception] = []

    @worker.handler()
    async def work(task: Task) -> None:
        started.set()
        try:
            await go.wait()
            await task.progress(50)
        except LockLost as error:
            caught.append(error)
            raise

    job = await client.create_job(queue=queue)
    async with at_work(worker):
        await started.wait()
        await admin.force_fail(job.id, "by hand")
        go.set()
        await until(lambda: bool(caught))
    assert (await client.get_job(job.id)).error_message == "by hand"


async def test_a_handler_past_its_processing_time_is_stopped(client: AsyncJobClient, queue: str) -> None:
    worker = Worker(client, queues=[queue], lock_ttl_ms=1000)
    stopped = asyncio.Event()

    @worker.handler()
    async def work(task: Task) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    job = await client.create_job(queue=queue, max_processing_ms=100, on_stall="fail")
    async with at_work(worker):
        await stopped.wait()
    assert await types(client, job.id)


# ---------------------------------------------------------------------------------------------------------------------
# Draining.


async def test_stop_lets_a_running_handler_end_and_claims_no_more(client: AsyncJobClient, queue: str) -> None:
    worker = Worker(client, queues=[queue])
    started, go = asyncio.Event(), asyncio.Event()

    @worker.handler()
    async def work(task: Task) -> None:
        started.set()
        await go.wait()

    first, second = await client.create_jobs([{"queue": queue}, {"queue": queue}])
    async with at_work(worker) as serving:
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
        async def work(task: Task) -> None:
            started.set()
            with contextlib.suppress(asyncio.CancelledError):  # it has not done its work all the same
                await asyncio.Event().wait()

    else:

        @worker.handler()
        def plain(task: SyncTask) -> None:
            started.set()
            try:
                while True:
                    task.progress(1)
            except Stopped as error:
                raised.append(error)
                raise

    job = await client.create_job(queue=queue)
    async with at_work(worker) as serving:
        await asyncio.to_thread(started.wait)
        worker.stop()
        await serving
    back = await client.get_job(job.id)
    assert (back.status, back.attempt, back.progress) == ("queued", 0, 0)
    assert (await types(client, job.id))[-1] == "released"
    assert len(raised) == (0 if is_async else 1)


async def test_a_second_stop_ends_the_grace(client: AsyncJobClient, queue: str) -> None:
    worker = Worker(client, queues=[queue], grace_s=10_000)
    started = asyncio.Event()

    @worker.handler()
    async def work(task: Task) -> None:
        started.set()
        await asyncio.Event().wait()

    job = await client.create_job(queue=queue)
    async with at_work(worker) as serving:
        await started.wait()
        worker.stop()
        worker.stop()
        await serving
    assert (await client.get_job(job.id)).status == "queued"


async def test_a_third_stop_leaves_a_thread_that_does_not_end(client: AsyncJobClient, queue: str) -> None:
    worker = Worker(client, queues=[queue], grace_s=10_000)
    started, go = threading.Event(), threading.Event()

    @worker.handler()
    def work(task: SyncTask) -> None:
        started.set()
        go.wait()

    job = await client.create_job(queue=queue)
    async with at_work(worker) as serving:
        await asyncio.to_thread(started.wait)
        for _ in range(3):
            worker.stop()
        await serving
    assert (await client.get_job(job.id)).status == "processing"  # the thread may still be at it: its lock runs out
    go.set()


async def test_cancelling_serve_stops_handlers_and_releases(client: AsyncJobClient, queue: str) -> None:
    worker = Worker(client, queues=[queue])
    started = asyncio.Event()

    @worker.handler()
    async def work(task: Task) -> None:
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


async def test_sigterm_drains_a_worker_process(client: AsyncJobClient, daemon: Daemon, queue: str) -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, f"unix:{daemon.socket}", queue]
    job = await client.create_job(queue=queue)
    start = functools.partial(subprocess.Popen, command, env=environ, stdin=subprocess.PIPE, preexec_fn=die_with_us)
    process = await asyncio.to_thread(start)
    try:
        await when(client, job.id, lambda job: job.progress == 1)
        process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(process.communicate)
        assert process.returncode == 0
    finally:
        process.kill()
        await asyncio.to_thread(process.wait)
    assert (await client.get_job(job.id)).metadata_value == "done"


async def test_a_signal_ends_the_claims_at_once_though_a_handler_blocks_the_loop(
    client: AsyncJobClient, queue: str
) -> None:
    """The handler itself sends the signal: the loop does not turn before it returns."""
    worker = Worker(client, queues=[queue], concurrency=2)

    @worker.handler("blocks")
    async def blocks(task: Task) -> None:
        with JobClient(client.endpoint) as blocking:
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(100):
                if not any(seen.waiting for seen in blocking.workers() if seen.worker == worker.name):
                    break
                time.sleep(0.02)
            later.append(blocking.create_job(queue=queue, kind="later").id)
            time.sleep(0.2)  # a claim would take it meanwhile

    @worker.handler("later")
    def begun(task: SyncTask) -> None:
        raise AssertionError("claimed after the signal")

    later: list[str] = []
    job = await client.create_job(queue=queue, kind="blocks")
    await worker.serve(signals=True)
    assert (await client.get_job(job.id)).status == "completed"
    assert {(await client.get_job(each)).status for each in later} == {"queued"}


# ---------------------------------------------------------------------------------------------------------------------
# A daemon that is away, and answers that get lost.


async def test_work_goes_on_while_the_daemon_is_away(
    tmp_path: Path, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "jobd.client")
    started, go = asyncio.Event(), asyncio.Event()
    with Daemon(tmp_path) as daemon:
        async with AsyncJobClient(f"unix:{daemon.socket}") as client:
            worker = Worker(client, queues=[queue], lock_ttl_ms=1000)

            @worker.handler()
            async def work(task: Task) -> str:
                started.set()
                await go.wait()
                await task.progress(50, "on my own")
                await task.progress(60, "still on my own")
                return "done without you"

            job = await client.create_job(queue=queue)
            async with at_work(worker) as serving:
                await started.wait()
                await asyncio.to_thread(daemon.kill)
                await until(lambda: "The work continues" in caplog.text)
                go.set()
                await until(lambda: "cannot complete it yet" in caplog.text)
                assert not serving.done()
                await asyncio.to_thread(daemon.start)
                done = await finished(client, job.id)
                assert (done.metadata_value, done.attempt, done.stalls) == ("done without you", 1, 0)
                after = await client.create_job(queue=queue)
                assert (await finished(client, after.id)).status == "completed"  # claims are made again


@pytest.mark.parametrize("what", ["claim", "progress", "complete", "fail"])
async def test_a_lost_answer_is_asked_for_again_and_the_job_is_worked_on_once(
    daemon: Daemon, client: AsyncJobClient, queue: str, tmp_path: Path, what: str
) -> None:
    peer = ScriptedServer(behind=daemon.socket)
    peer.loses = lambda asked: asked.path.endswith(f"/{what}") and not _seen(peer, asked)
    runs: list[int] = []
    with serving(peer, tmp_path / "p") as endpoint:
        worker = Worker(endpoint, queues=[queue])

        @worker.handler()
        async def work(task: Task) -> str:
            runs.append(task.fencing_token)
            await task.progress(50)
            if what == "fail":
                raise Discard("no")
            return "once"

        job = await client.create_job(queue=queue)
        async with at_work(worker):
            done = await finished(client, job.id)
            await until(lambda: any(asked.path.endswith(("/complete", "/fail")) for asked in peer.asked))
    assert done.status == ("failed" if what == "fail" else "completed")
    assert len(runs) == 1
    assert len(peer.lost) >= 1
    events = await types(client, job.id)
    assert events.count("completed") + events.count("failed") == 1


def _seen(peer: ScriptedServer, asked: Asked) -> bool:
    """Whether the answer to the same request has been lost once already."""
    return any(lost.path == asked.path and lost.body == asked.body for lost in peer.lost)


# ---------------------------------------------------------------------------------------------------------------------
# Answers that a healthy daemon does not give, from a scripted one.


class Scripted:
    """A daemon that grants one job and answers the calls on it as it is told, the last answer again and again."""

    def __init__(self, **answers: list[Step]) -> None:
        self.peer = ScriptedServer()
        self.peer.always = self._answer
        self._answers = {"claim": [ok({"grants": [GRANT]}), ok({"grants": []})]} | answers
        self._state = ok({"lock_expires_at": 1, "ttl_ms": 1000, "ceiling_at": None})

    def _answer(self, asked: Asked) -> Step:
        verb = asked.path.rsplit("/", 1)[-1]
        answers = self._answers.get(verb, [self._state if verb in ("extend", "progress") else ok(JOB)])
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def bodies(self, verb: str) -> list[Any]:
        return [asked.json for asked in self.peer.asked if asked.path.endswith(f"/{verb}")]

    async def hear(self, verb: str, count: int = 1) -> None:
        """Wait until it was asked for this."""
        await until(lambda: len(self.bodies(verb)) >= count)


GRANT = {
    "job": JOB,
    "lock_id": "secret",
    "fencing_token": 1,
    "lock_expires_at": 1,
    "ttl_ms": 1000,
    "ceiling_at": None,
}


@pytest.mark.parametrize("code", ["overloaded", "shutting_down", "outcome_unknown", "storage_full", "unauthorized"])
async def test_an_ending_is_said_until_it_is_taken_and_the_lock_kept_meanwhile(tmp_path: Path, code: str) -> None:
    daemon = Scripted(complete=[*[no(code, 503)] * 4, ok(JOB)])
    with serving(daemon.peer, tmp_path / "p") as endpoint:
        worker = Worker(endpoint, lock_ttl_ms=1000)

        @worker.handler()
        async def work(task: Task) -> str:
            return "result"

        async with at_work(worker):
            await daemon.hear("complete", 5)
    assert daemon.bodies("complete") == [{"lock_id": "secret", "metadata": "result"}] * 5
    assert daemon.bodies("extend")
    assert daemon.bodies("fail") == daemon.bodies("release") == []


async def test_a_daemon_that_fails_at_every_complete_gets_a_plain_failure(tmp_path: Path) -> None:
    daemon = Scripted(complete=[no("internal_error", 500, "A bug.")])
    with serving(daemon.peer, tmp_path / "p") as endpoint:
        worker = Worker(endpoint)
        worker.handler()(lambda task: None)
        async with at_work(worker):
            await daemon.hear("fail")
    assert len(daemon.bodies("complete")) == 5
    (fail,) = daemon.bodies("fail")
    assert fail["error_code"] == "complete:internal_error"
    assert "A bug." in fail["error_message"]


async def test_a_refused_failure_is_said_again_in_plain_words(tmp_path: Path) -> None:
    daemon = Scripted(fail=[no("invalid_request", 400, "`retry_after_ms` is too much."), ok(JOB)])
    with serving(daemon.peer, tmp_path / "p") as endpoint:
        worker = Worker(endpoint)

        @worker.handler()
        async def work(task: Task) -> None:
            raise Retry(after_ms=10**15)

        async with at_work(worker):
            await daemon.hear("fail", 2)
    assert daemon.bodies("fail")[1]["error_code"] == "fail:invalid_request"
    assert "retry_after_ms" not in daemon.bodies("fail")[1]


@pytest.mark.parametrize("code", ["lock_lost", "invalid_transition", "job_not_found", "job_quarantined"])
async def test_an_ending_that_comes_too_late_is_said_once(
    tmp_path: Path, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    daemon = Scripted(complete=[no(code, 409, "Too late.")])
    with serving(daemon.peer, tmp_path / "p") as endpoint:
        worker = Worker(endpoint)
        worker.handler()(lambda task: None)
        async with at_work(worker):
            await daemon.hear("claim", 2)
    assert len(daemon.bodies("complete")) == 1
    assert daemon.bodies("fail") == []
    assert "Too late." in caplog.text


async def test_only_an_answer_about_the_lock_stops_the_work(tmp_path: Path) -> None:
    daemon = Scripted(extend=[no("unauthorized", 401), no("internal_error", 500), no("lock_lost", 409)])
    stopped = asyncio.Event()
    with serving(daemon.peer, tmp_path / "p") as endpoint:
        worker = Worker(endpoint)

        @worker.handler()
        async def work(task: Task) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                stopped.set()

        async with at_work(worker):
            await stopped.wait()
    assert len(daemon.bodies("extend")) == 3
    assert daemon.bodies("complete") == daemon.bodies("fail") == daemon.bodies("release") == []


@pytest.mark.parametrize("code", ["storage_full", "internal_error", "overloaded"])
async def test_claims_outlast_what_the_daemon_gets_over(tmp_path: Path, code: str) -> None:
    daemon = Scripted(claim=[no(code, 500), ok({"grants": [GRANT]}), ok({"grants": []})])
    with serving(daemon.peer, tmp_path / "p") as endpoint:
        worker = Worker(endpoint)
        go = asyncio.Event()

        @worker.handler()
        async def work(task: Task) -> None:
            await go.wait()

        async with at_work(worker):
            await daemon.hear("extend")  # at once: the grant may be an old one
            go.set()
            await daemon.hear("complete")
            await daemon.hear("claim", 3)
    keys = [asked.headers["Idempotency-Key"] for asked in daemon.peer.asked if asked.path == "/v1/claim"]
    assert keys[0] == keys[1] != keys[2]


async def test_a_stopped_worker_does_not_wait_for_ever_to_say_how_its_job_ended(tmp_path: Path) -> None:
    daemon = Scripted(complete=[drop], extend=[drop])
    with serving(daemon.peer, tmp_path / "p") as endpoint:
        worker = Worker(endpoint)
        worker.handler()(lambda task: None)
        async with at_work(worker) as serving_:
            await daemon.hear("complete", 2)
            for _ in range(3):
                worker.stop()
            await serving_


async def test_an_invalid_token_ends_the_worker_after_its_jobs(tmp_path: Path) -> None:
    peer = ScriptedServer()
    peer.always = lambda asked: no("unauthorized", 401) if asked.path == "/v1/claim" else ok({})
    with serving(peer, tmp_path / "p") as endpoint:
        worker = Worker(endpoint)
        worker.handler()(print)
        with pytest.raises(Unauthorized):
            await worker.serve()


async def test_a_worker_describes_itself(tmp_path: Path) -> None:
    daemon = Scripted()
    with serving(daemon.peer, tmp_path / "p") as endpoint:
        worker = Worker(endpoint, concurrency=3)
        worker.handler(lambda task: None)
        async with at_work(worker):
            await daemon.hear("claim", 2)
        before = len(daemon.bodies("claim"))
        async with at_work(worker):
            await daemon.hear("claim", before + 1)
    first, second, other = (daemon.bodies("claim")[each]["about"] for each in (0, 1, before))
    assert first == second
    assert first["instance"] != other["instance"], "of the same name, but another run"
    assert {**first, "instance": None} == {
        "instance": None,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "version": jobd.__version__,
        "concurrency": 3,
    }


def test_a_host_name_that_the_daemon_would_refuse_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "größer")
    assert describe_process(10**6).host is None
    assert describe_process(10**6).concurrency == 100_000


async def test_an_idle_worker_ends_though_its_claim_is_parked(tmp_path: Path) -> None:
    peer = ScriptedServer()
    peer.script = [peer.hang]
    with serving(peer, tmp_path / "p") as endpoint:
        worker = Worker(endpoint, grace_s=10_000)
        worker.handler()(print)
        async with at_work(worker) as serving_:
            await until(lambda: bool(peer.asked))
            worker.stop()
            await serving_
    assert [asked.path for asked in peer.asked] == ["/v1/claim"]
    assert peer.asked[0].json["stuck_after_ms"] == 0
    assert peer.asked[0].json["lock_ttl_ms"] == 60_000
