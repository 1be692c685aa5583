"""Tasks, calls and handles of an inline app, which needs no daemon."""

from __future__ import annotations

import asyncio
import logging
import pickle
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any

import msgspec
import pytest
from pydantic import BaseModel, Field

from jobd import (
    App,
    Backoff,
    Call,
    Discard,
    JobCancelled,
    JobContext,
    JobFailed,
    NewJob,
    Retry,
    Snooze,
    Task,
    current_job,
)
from jobd.client.app.job_context import StoredCheckpoint
from jobd.client.errors import JobNotFound

app = App("tests", inline=True)


class Size(Enum):
    SMALL = 1


class Picture(msgspec.Struct):
    path: str
    taken: datetime | None = None


class Signup(BaseModel):
    email: str
    age: int = Field(ge=18)


@app.task(queue="images", max_attempts=3)
async def resize(picture: Picture, size: Size = Size.SMALL) -> list[Picture]:
    return [picture, Picture(size.name, picture.taken)]


@app.task
def sign_up(signup: Signup, tags: tuple[str, ...] = ()) -> Signup:
    return Signup(email=signup.email.upper(), age=signup.age + len(tags))


@app.task
def wrong_result() -> int:
    return "text"  # type: ignore[return-value]


@app.task
def no_json() -> Any:
    return object()


AT = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)


def test_arguments_and_results_keep_their_types() -> None:
    assert resize.enqueue(Picture("a", AT)).result() == [Picture("a", AT), Picture("SMALL", AT)]
    assert sign_up.enqueue(Signup(email="a@b", age=20), tags=("x",)).result() == Signup(email="A@B", age=21)


async def test_each_call_has_an_asyncio_version() -> None:
    job = await sign_up.aenqueue(Signup(email="a@b", age=20))
    assert (await job.aresult(timeout=1)).age == 20
    assert await job.astatus() == "completed"
    assert not await job.acancel()
    jobs = await app.aenqueue_many([resize.call(Picture(name)) for name in "ab"])
    assert [(await each.aresult())[0].path for each in jobs] == ["a", "b"]
    assert resize.enqueue(Picture("in a loop")).status() == "completed"


async def test_a_task_is_still_its_function() -> None:
    assert await resize(Picture("a"), Size.SMALL) == [Picture("a"), Picture("SMALL")]
    assert sign_up(Signup(email="a", age=18)).email == "A"
    assert (ANY_SIGN_UP.__name__, sign_up.__module__, sign_up.name, resize.queue) == (
        "sign_up",
        __name__,
        "sign_up",
        "images",
    )


# The type checker finds these errors too.
ANY_SIGN_UP: Any = sign_up
ANY_RESIZE: Any = resize
ANY_APP: Any = app
A = Picture("a")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ANY_SIGN_UP.enqueue(), "missing a required argument: 'signup'. Its parameters are (signup"),
        (lambda: ANY_SIGN_UP.enqueue(1), "do not fit its signature: "),
        (lambda: ANY_SIGN_UP.enqueue({"email": "a", "age": 17}), "greater than or equal to 18"),
        (lambda: ANY_RESIZE.enqueue({"path": 5}), "Expected `str`, got `int` - at `$.picture.path`"),
        (lambda: ANY_RESIZE.enqueue(object()), "object cannot be sent as JSON; use dataclasses"),
        (lambda: ANY_RESIZE.using(dellay=1), "task 'resize': using has no option 'dellay'; did you mean 'delay'?"),
        (lambda: ANY_APP.task(colour="red"), "app.task has no option 'colour'; its options are name, queue, priority"),
        (lambda: ANY_RESIZE.using(delay=5).enqueue(A), "delay must be a timedelta such as timedelta(seconds=5), not 5"),
        (lambda: resize.using(run_at=datetime(2026, 1, 1)).enqueue(A), "run_at must be an aware datetime"),
    ],
)  # fmt: skip
def test_a_wrong_call_is_an_error_that_says_what_to_do(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError) as error:
        call()
    assert message in str(error.value)


def test_a_result_that_is_wrong_fails_the_job() -> None:
    with pytest.raises(
        JobFailed, match="the result of task 'wrong_result' does not fit its annotation: Expected `int`"
    ):
        wrong_result.enqueue().result()
    with pytest.raises(
        JobFailed, match="the result of task 'no_json' cannot be encoded as JSON: object cannot be sent"
    ):
        no_json.enqueue().result()


class Service:
    def __init__(self) -> None:
        self.task = App("service", inline=True).task(name="charge")(self.charge)

    def charge(self, cents: int) -> int:
        return cents + 1


def generator() -> Iterator[int]:
    yield 1


def with_star(*paths: str) -> None: ...


def with_stars(**options: str) -> None: ...


def positional(path: str, /) -> None: ...


def local_type() -> Any:
    class Local: ...

    def function(value: Local) -> None: ...

    return function


def test_a_bound_method_can_be_a_task() -> None:
    assert Service().task.enqueue(5).result() == 6


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (Service.charge, 'Make the task of the bound method: app.task(name="charge")(instance.charge)'),
        (generator, "task 'generator' is a generator; a task returns its result"),
        (with_star, "task 'with_star' has the parameter *paths. Each parameter of a task has its own name"),
        (with_stars, "the parameter **options"),
        (positional, "the parameter path."),
        (print, "<built-in function print> cannot be a task; a task is a function or a bound method"),
        (lambda: 1, "task '<lambda>' needs a name that does not change"),
        (sign_up, "cannot be a task"),
    ],
)  # fmt: skip
def test_a_function_that_cannot_be_a_task_is_an_error_at_decoration(function: Any, message: str) -> None:
    with pytest.raises(TypeError) as error:
        App("other").task(function)
    assert message in str(error.value)


def test_two_tasks_of_one_name_are_an_error() -> None:
    with pytest.raises(
        TypeError, match=r"two tasks have the name 'resize': .*test_app\.resize and .*test_app\.Service\.charge"
    ):
        app.task(name="resize")(Service().charge)


def test_an_annotation_that_is_not_defined_is_an_error_of_the_first_call() -> None:
    task = App("other", inline=True).task(local_type())
    with pytest.raises(TypeError, match=r"task 'function': name 'Local' is not defined\. Annotations have to be names"):
        task.enqueue(1)


def outcomes(**options: Any) -> tuple[list[int], Task[[str], int]]:
    """Return the attempts of a task with these options, and the task, which raises its argument."""
    attempts: list[int] = []

    def fail(kind: str) -> int:
        attempts.append(current_job().attempt)
        raise {"value": ValueError, "key": KeyError, "retry": Retry, "discard": Discard}[kind](kind)

    decorate: Any = App("t", inline=True).task(max_attempts=3, **options)
    return attempts, decorate(fail)


@pytest.mark.parametrize(
    ("options", "kind", "count"),
    [
        ({}, "value", 3),
        ({}, "discard", 1),
        ({"retry_on": (KeyError,)}, "value", 1),
        ({"retry_on": (KeyError,)}, "key", 3),
        ({"retry_on": (KeyError,)}, "retry", 3),
        ({"discard_on": (LookupError,)}, "key", 1),
        ({"discard_on": (LookupError,)}, "value", 3),
    ],
)
def test_errors_decide_about_another_attempt(options: dict[str, Any], kind: str, count: int) -> None:
    attempts, task = outcomes(**options)
    with pytest.raises(JobFailed) as failed:
        task.enqueue(kind).result()
    assert attempts == list(range(1, count + 1))
    assert failed.value.error_code in ("ValueError", "KeyError", "Retry", "Discard")


def test_a_snoozed_job_stays_queued() -> None:
    def later() -> None:
        raise Snooze(60)

    task = App("t", inline=True).task(later)
    job = task.enqueue()
    with pytest.raises(TimeoutError, match="is queued"):
        job.result()
    assert job.cancel("no longer needed")
    with pytest.raises(JobCancelled, match="was cancelled"):
        job.result()
    with pytest.raises(JobNotFound):
        task.job("other").status()


def test_the_context_of_a_job() -> None:
    seen: list[Any] = []

    def work(n: int) -> None:
        job = current_job()
        seen.append((job.id, job.queue, job.kind, job.name, job.attempt, job.is_last_attempt, job.cancelled))
        job.progress(100 * n, "x")
        job.set_result(file_path="/f")

    task = App("t", inline=True).task(queue="q")(work)
    task.using(id="w-1").enqueue(1)
    assert seen == [("w-1", "q", "work", "work", 1, True, False)]
    with pytest.raises(JobFailed, match="percent must be from 0 to 100, not 200"):
        task.enqueue(2).result()
    with pytest.raises(RuntimeError, match="outside of a task"):
        current_job()


def test_a_log_line_names_the_job(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "jobd.client")

    def work() -> None:
        current_job().log("a line")

    App("t", inline=True).task(work).using(id="w-1").enqueue()
    assert "job w-1: a line" in caplog.text


async def test_middleware_surrounds_each_run() -> None:
    app, steps = App("t", inline=True), []

    @app.middleware
    def outer(job: JobContext) -> Iterator[None]:
        steps.append(f"begin {job.name}")
        try:
            yield
        finally:
            steps.append(f"end {current_job().name}")

    @app.middleware
    async def inner(job: JobContext) -> AsyncIterator[None]:
        steps.append("async")
        yield

    @app.task
    async def first() -> None:
        steps.append("first")

    @app.task
    def second() -> None:
        raise ValueError

    await first.aenqueue()
    await second.aenqueue()
    assert steps == ["begin first", "async", "first", "end first", "begin second", "end second"]
    with pytest.raises(TypeError, match=r"middleware .*<lambda> is no generator"):
        app.middleware(lambda job: None)  # type: ignore[type-var]


def test_jobs_of_a_job_have_the_same_ids_in_each_attempt() -> None:
    app, seen = App("t", inline=True), []

    @app.on_enqueue
    def record(job: NewJob) -> None:
        seen.append(job.id)

    @app.task
    def child(n: int) -> None: ...

    @app.task(max_attempts=2)
    def parent() -> None:
        for n in (1, 1, 2):
            child.enqueue(n)
        child.using(id=f"own-{current_job().attempt}").enqueue(3)
        raise ValueError

    parent.using(id="p").enqueue()
    _, *ids = seen
    assert ids[:3] == ids[4:7]
    assert len(set(ids)) == 5
    assert ids[3::4] == ["own-1", "own-2"]


def test_a_job_that_waits_for_another_job_is_an_error() -> None:
    app = App("t", inline=True)

    @app.task
    def child() -> int:
        return 1

    @app.task
    def parent() -> int:
        return child.enqueue().result()

    with pytest.raises(JobFailed, match=r"RuntimeError: job p waits for job .* none is left"):
        parent.using(id="p").enqueue().result()


def fields(call: Call[Any]) -> dict[str, Any]:
    """Return the options of the request."""
    new = call.new_job()
    return {"queue": new.queue, "payload": msgspec.json.decode(new.payload), **new.options}


def test_options_become_the_fields_of_the_request() -> None:
    def work(n: int = 1) -> None: ...

    other, minute = App("t"), timedelta(minutes=1)
    task = other.task(queue="q", priority=5, max_attempts=4, backoff=minute, expires=2 * minute)(work)
    backoff = {"kind": "exponential", "base_ms": 60_000, "max_ms": 3_600_000, "jitter": True}
    common = {
        "queue": "q",
        "payload": {},
        "priority": 5,
        "max_attempts": 4,
        "backoff": backoff,
        "expires_in_ms": 120_000,
    }
    assert fields(task.call()) == common
    assert fields(task.using(priority=0, delay=minute, queue=None).call()) == common | {
        "priority": 0,
        "delay_ms": 60_000,
    }
    at = int(AT.timestamp() * 1000)
    changed = fields(task.using(queue="r", max_attempts=1).using(run_at=AT, expires=AT).call(n=1))
    assert changed.items() >= {"queue": "r", "max_attempts": 1, "run_at": at, "expires_at": at}.items()
    assert changed["payload"] == {"n": 1}
    fixed = other.task(name="fixed", backoff=Backoff.fixed(minute))(work)
    assert fields(fixed.call()) == {
        "queue": "default",
        "payload": {},
        "backoff": {"kind": "fixed", "base_ms": 60_000, "max_ms": 60_000, "jitter": False},
    }


def test_the_handle_of_a_global_task_can_be_pickled() -> None:
    job = resize.using(id="pickled").enqueue(Picture("a"))
    assert pickle.loads(pickle.dumps(job)) == job
    assert pickle.loads(pickle.dumps(job)).result()[0] == Picture("a")
    _, task = outcomes()
    with pytest.raises(pickle.PicklingError, match="keep the id of the job"):
        pickle.dumps(task.job("j"))


def test_an_app_imports_aiohttp_with_its_first_asynchronous_call() -> None:
    code = """
import sys, jobd, jobd.client
app = jobd.App("t")
@app.task
def work(n: int) -> int: return n
work.call(1)
assert not {"aiohttp", "click"} & set(sys.modules), "aiohttp"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


async def test_the_end_of_a_lifespan_closes_the_connections() -> None:
    async with App("t").lifespan(object()):
        await asyncio.sleep(0)


def test_a_task_that_is_called_has_a_job_of_its_own() -> None:
    app, ids = App("t", inline=True), []

    @app.task
    def child() -> int:
        ids.append(current_job().id)
        return 1

    @app.task
    def parent() -> int:
        current_job().progress(50)
        ids.append(current_job().id)
        return child() + child.enqueue().result()

    assert parent() + parent() == 4
    first, called, enqueued, second, *_ = ids
    assert first == called
    assert len({first, enqueued, second}) == 3


def test_a_checkpoint_is_given_to_the_next_attempt() -> None:
    app, seen = App("t", inline=True), []

    @app.task(max_attempts=4)
    def copy(rows: list[int], at: datetime = AT) -> str:
        job = current_job()
        seen.append((rows, job.checkpoint))
        if job.attempt == 1:
            job.progress(10, checkpoint={"row": 5})
            raise ValueError
        if job.attempt == 2:
            raise Retry("some are left", rows=[7])
        if job.attempt == 3:
            job.progress(20, checkpoint={"row": 6})
            job.progress(30)
            raise Retry(at=AT.replace(year=2027))
        return f"{rows} {at.year}"

    assert copy.enqueue([1, 2]).result() == "[7] 2027"
    assert seen == [([1, 2], None), ([1, 2], {"row": 5}), ([7], {"row": 5}), ([7], {"row": 6})]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rowz": 1}, "TypeError: Retry changes rowz, but the parameters of task 'work' are (rows: 'int')"),
        ({"rows": "x"}, "TypeError: Retry changes arguments of task 'work' that do not fit: "),
        ({"rows": object()}, "that do not fit: object cannot be sent as JSON"),
    ],
)
def test_arguments_that_retry_cannot_change(changed: dict[str, Any], message: str) -> None:
    def work(rows: int) -> None:
        raise Retry(**changed)

    with pytest.raises(JobFailed) as failed:
        App("t", inline=True).task(work).enqueue(1).result()
    assert message in str(failed.value)


def test_headers_are_given_with_the_job() -> None:
    app = App("t", inline=True)

    @app.on_enqueue
    def trace(job: NewJob) -> None:
        job.headers["traceparent"] = f"00-{job.name}-{job.queue}"

    @app.task
    def work() -> dict[str, str]:
        return dict(current_job().headers)

    job = work.using(headers={"tenant": "acme"}).enqueue()
    assert job.result() == {"tenant": "acme", "traceparent": "00-work-default"}
    assert work.enqueue().result() == {"traceparent": "00-work-default"}


@pytest.mark.parametrize("value", [None, 5, {"$checkpoint": 1}, {"$arguments": {}, "$checkpoint": [1]}, [1]])
def test_a_stored_checkpoint_is_read_as_it_was_written(value: Any) -> None:
    stored = StoredCheckpoint(msgspec.json.encode(value), {"n": msgspec.Raw(b"1")})
    assert msgspec.json.decode(stored.body) == {"$arguments": {"n": 1}, "$checkpoint": value}, (
        "as other programs see it"
    )
    assert StoredCheckpoint.read(stored.body) == stored
    alone = StoredCheckpoint(msgspec.json.encode(value))
    assert StoredCheckpoint.read(alone.body).own == alone.own
