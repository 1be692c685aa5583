"""Worker against a real daemon: handlers and their results."""

from __future__ import annotations

import asyncio
import datetime
import logging
import os
import sys
import threading
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any

import msgspec
import pytest

from jobd.client import AsyncHandlerContext, AsyncJobClient, Discard, HandlerContext, Retry, Snooze, Worker
from jobd.client.worker import handlers
from tests.support.client_harness import event_types, finished, running_worker, wait_for_job, wait_until_finished


async def test_an_async_handler_completes_its_job_with_its_return_value(client: AsyncJobClient, queue: str) -> None:
    worker = Worker(client, queues=[queue], name="w-async")
    tokens: list[int] = []

    @worker.handler("add")
    async def add(context: AsyncHandlerContext) -> dict[str, Any]:
        await context.progress(50, "half way")
        context.set_result(download_url="https://files/1", metadata={"from": "set"})
        tokens.append(context.fencing_token)
        return {"sum": sum(context.payload), "file_path": "/f"}

    job = await client.create_job([1, 2, 3], queue=queue, kind="add")
    async with running_worker(worker):
        done = await wait_until_finished(client, job.id)
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
    threads: list[threading.Thread] = []

    def work(context: HandlerContext) -> list[Any]:
        threads.append(threading.current_thread())
        context.progress(10)
        context.raise_if_lost()
        return [context.job.id, context.payload]

    done = await finished(client, queue, work, payload="p")
    assert done.metadata_value == [done.id, "p"]
    assert threads[0] is not threading.main_thread()
    assert await event_types(client, done.id) == ["created", "granted", "progress", "completed"]


async def test_functions_and_callable_objects_can_be_handlers(client: AsyncJobClient, queue: str) -> None:
    class Adder:
        async def __call__(self, context: AsyncHandlerContext) -> int:
            return int(context.payload) + 1

    async_worker, worker = Worker(client, queues=[f"{queue}-async"]), Worker(client, queues=[queue])

    @async_worker.handler
    async def work(context: AsyncHandlerContext) -> str:
        return "async"

    @worker.handler
    def plain(context: HandlerContext) -> str:
        return "plain"

    assert asyncio.iscoroutinefunction(work), "the decorator returns the function itself"
    assert plain(None) == "plain"  # type: ignore[arg-type]
    worker.handler("adder")(Adder())
    jobs = [
        await client.create_job(1, queue=name, kind=kind)
        for name, kind in ((f"{queue}-async", "any"), (queue, "any"), (queue, "adder"))
    ]
    async with running_worker(async_worker), running_worker(worker):
        results = [(await wait_until_finished(client, job.id)).metadata_value for job in jobs]
    assert results == ["async", "plain", 2]


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "plain"])
async def test_an_exception_fails_the_job_with_its_class_and_traceback(
    client: AsyncJobClient, queue: str, is_async: bool
) -> None:
    def burst() -> None:
        raise ZeroDivisionError("no more numbers")

    async def work(context: AsyncHandlerContext) -> None:
        burst()

    def plain(context: HandlerContext) -> None:
        burst()

    failed = await finished(client, queue, work if is_async else plain)
    assert (failed.status, failed.error_code) == ("failed", "ZeroDivisionError")
    assert failed.error_message is not None
    first, heading, *frames = failed.error_message.splitlines()
    assert (first, heading) == ("ZeroDivisionError: no more numbers", "Traceback (most recent call last):")
    assert "in work" in frames[0] or "in plain" in frames[0]
    assert "in burst" in failed.error_message
    assert "jobd/client" not in failed.error_message


async def test_a_failed_attempt_is_retried(client: AsyncJobClient, queue: str) -> None:
    async def work(context: AsyncHandlerContext) -> int:
        if context.job.attempt < 3:
            raise Retry("not yet", after=0)
        return context.job.attempt

    done = await finished(client, queue, work, max_attempts=3)
    assert (done.status, done.metadata_value) == ("completed", 3)
    assert (await event_types(client, done.id)).count("retried") == 2


@pytest.mark.parametrize("after", [60, timedelta(minutes=1)], ids=["seconds", "timedelta"])
async def test_snooze_puts_the_job_back_without_an_attempt(client: AsyncJobClient, queue: str, after: Any) -> None:
    worker = Worker(client, queues=[queue])

    @worker.handler
    async def work(context: AsyncHandlerContext) -> None:
        await context.progress(10)
        raise Snooze(after)

    job = await client.create_job(queue=queue)
    async with running_worker(worker):
        back = await wait_for_job(client, job.id, lambda job: job.run_at > job.created_at)
    assert (back.status, back.attempt, back.error_code) == ("queued", 0, None)
    assert back.run_at == back.updated_at + 60_000
    assert await event_types(client, job.id) == ["created", "granted", "progress", "released"]


def test_a_snooze_is_from_a_second_to_a_year() -> None:
    assert [Snooze(after).after_ms for after in (0, 0.9994, timedelta(milliseconds=1001))] == [1000, 1000, 1001]
    for after in (-1, timedelta(days=366), float("nan")):
        with pytest.raises(ValueError, match="after must be from 0 to 365 days"):
            Snooze(after)


class NoText(Discard):
    def __str__(self) -> str:
        raise SystemExit


class NoNotes(Exception):
    __notes__ = None  # type: ignore[assignment]


class ZoneError(Exception):
    pass


class Zone(datetime.tzinfo):
    def utcoffset(self, when: datetime.datetime | None, /) -> datetime.timedelta:
        raise ZoneError("no such zone")

    dst = tzname = utcoffset  # type: ignore[assignment]


def raises(make: Callable[[], BaseException]) -> Callable[[AsyncHandlerContext], Coroutine[Any, Any, None]]:
    async def work(context: AsyncHandlerContext) -> None:
        raise make()

    return work


def returns(value: Any) -> Callable[[AsyncHandlerContext], Coroutine[Any, Any, Any]]:
    async def work(context: AsyncHandlerContext) -> Any:
        return value

    return work


def sets(field: Any) -> Callable[[AsyncHandlerContext], Coroutine[Any, Any, None]]:
    async def work(context: AsyncHandlerContext) -> None:
        context.result[field] = 5

    return work


def exits(context: HandlerContext) -> None:
    sys.exit(3)


# By kind: the handler, and the error code and a part of the message of its job.
FAILURES: dict[str, tuple[Callable[..., Any], str, str]] = {
    "discard": (raises(lambda: Discard("not needed")), "Discard", "not needed"),
    "no text": (raises(NoText), "NoText", "<exception str() failed>"),
    "no notes": (raises(lambda: NoNotes("with a text")), "NoNotes", "NoNotes: with a text"),
    "retry": (raises(lambda: Retry(after=object())), "TypeError",  # type: ignore[arg-type]
              "after must be a timedelta or a number of seconds, not object"),
    "changes": (raises(lambda: Retry(days=1)), "TypeError", "Retry changes days, but only a task"),
    "exit": (raises(SystemExit), "SystemExit", ""),
    "exit in a thread": (exits, "SystemExit", ""),
    "no JSON": (returns({"it": object()}), "TypeError", "TypeError: the result of handler 'work' cannot be encoded as "
                "JSON: Encoding objects of type object is unsupported"),
    "encoding": (returns({"at": datetime.datetime(2026, 1, 1, tzinfo=Zone())}), "ZoneError", "in utcoffset"),
    **{
        f"field {field!r}": (sets(field), "TypeError", f"the result has unknown fields ({field!r})")
        for field in ("rows", "lock_id", 5)
    },
    "rejected": (returns({"storage_key": "../outside"}), "complete:invalid_request", "rejected its `complete`"),
}  # fmt: skip


async def test_an_error_fails_its_job_and_not_the_worker(
    client: AsyncJobClient, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "jobd.client")
    worker = Worker(client, queues=[queue])
    for kind, (handler, _, _) in FAILURES.items():
        worker.handler(kind)(handler)
    jobs = [await client.create_job(queue=queue, kind=kind) for kind in FAILURES]
    async with running_worker(worker):
        for job in jobs:
            failed = await wait_until_finished(client, job.id)
            _, code, message = FAILURES[job.kind]
            assert (failed.status, failed.error_code) == ("failed", code), job.kind
            assert message in (failed.error_message or ""), job.kind
    kinds = f"(only {', '.join(FAILURES)})"
    claims = f"worker {worker.name} claims jobs of queue {queue} {kinds}, 1 at a time, at {client.endpoints[0]}"
    assert claims in caplog.messages


async def test_a_discarded_job_is_not_retried(client: AsyncJobClient, queue: str) -> None:
    work = raises(lambda: Discard("not needed"))
    assert (await finished(client, queue, work, max_attempts=5)).status == "failed"


async def test_a_message_that_json_cannot_express_is_escaped(
    client: AsyncJobClient, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers.logger, "disabled", True)  # pytest-xdist cannot send such a message
    worker = Worker(client, queues=[queue])

    @worker.handler
    def work(context: HandlerContext) -> None:
        raise FileNotFoundError(os.fsdecode(b"/srv/\xff") + "\x00")

    jobs = [await client.create_job(queue=queue) for _ in range(2)]
    async with running_worker(worker):
        for job in jobs:
            failed = await wait_until_finished(client, job.id)
            assert (failed.error_message or "").startswith("FileNotFoundError: /srv/\\udcff\\x00\n")
            assert failed.error_code == "FileNotFoundError"


async def test_a_job_is_released_if_no_thread_can_be_started(
    client: AsyncJobClient, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await client.create_job(queue=queue)
    start = threading.Thread.start

    def reject(thread: threading.Thread) -> None:
        if thread.name == f"job {job.id}":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", reject)
    worker = Worker(client, queues=[queue])
    worker.handler(lambda context: None)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        await worker.serve()
    back = await client.get_job(job.id)
    assert (back.status, back.attempt) == ("queued", 0)


async def test_a_bug_in_jobd_fails_the_job_before_it_ends_the_worker(
    client: AsyncJobClient, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def finish(*args: Any) -> bool:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(handlers.AsyncExecution, "finish", finish)
    worker = Worker(client, queues=[queue])

    @worker.handler
    async def work(context: AsyncHandlerContext) -> None:
        pass

    job = await client.create_job(queue=queue)
    with pytest.raises(ZeroDivisionError):
        await worker.serve()
    failed = await client.get_job(job.id)
    assert (failed.status, failed.error_code) == ("failed", "ZeroDivisionError")
    assert (failed.error_message or "").startswith("ZeroDivisionError: a bug")


async def test_a_payload_that_python_cannot_hold_fails_only_its_job(client: AsyncJobClient, queue: str) -> None:
    worker = Worker(client, queues=[queue], concurrency=2)

    @worker.handler()
    async def work(context: AsyncHandlerContext) -> Any:
        return context.payload

    bad = await client.create_job(msgspec.Raw(b"[1e999]"), queue=queue)
    good = await client.create_job(1, queue=queue)
    async with running_worker(worker):
        assert (await wait_until_finished(client, bad.id)).error_code == "ValidationError"
        assert (await wait_until_finished(client, good.id)).metadata_value == 1


async def test_only_jobs_with_a_handler_are_claimed(client: AsyncJobClient, queue: str) -> None:
    worker = Worker(client, queues=[queue], concurrency=3)

    @worker.handler("a", "b")
    async def work(context: AsyncHandlerContext) -> str:
        return context.job.kind

    jobs = [await client.create_job(queue=queue, kind=kind) for kind in ("c", "a", "b")]
    async with running_worker(worker):
        assert [(await wait_until_finished(client, job.id)).metadata_value for job in jobs[1:]] == ["a", "b"]
    assert (await client.get_job(jobs[0].id)).status == "queued"


async def test_jobs_run_concurrently_up_to_the_limit(client: AsyncJobClient, queue: str) -> None:
    worker = Worker(client, queues=queue, concurrency=2)
    running, max_running = 0, 0
    together = asyncio.Event()

    @worker.handler()
    async def work(context: AsyncHandlerContext) -> None:
        nonlocal running, max_running
        running += 1
        max_running = max(max_running, running)
        if running == 2:
            together.set()
        await together.wait()
        running -= 1

    jobs = await client.create_jobs({"queue": queue} for _ in range(6))
    async with running_worker(worker):
        for job in jobs:
            assert (await wait_until_finished(client, job.id)).status == "completed"
    assert max_running == 2
