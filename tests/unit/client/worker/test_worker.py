"""Registration of handlers, merging of results, options of a worker."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import Any

import pytest

from jobd.client import (
    Task,
    Worker,
)
from jobd.client.worker.claimer import describe_process
from jobd.client.worker.handlers import merged_result


def test_wrong_use_of_the_decorator_is_a_type_error() -> None:
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
def test_the_return_value_is_the_result(given: dict[str, Any], returned: Any, result: dict[str, Any]) -> None:
    assert merged_result(given, returned) == result


def test_keys_cannot_be_added_to_metadata_that_is_not_a_dict() -> None:
    with pytest.raises(TypeError, match="needs a dict"):
        merged_result({}, {"metadata": [1], "other": 2})


def test_a_worker_needs_one_handler_for_each_kind() -> None:
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


@pytest.mark.parametrize("wrong", [0, -1, timedelta(0)])
def test_a_timeout_is_above_0(wrong: Any) -> None:
    with pytest.raises(ValueError, match="timeout must be above 0"):
        Worker(timeout=wrong)
    with pytest.raises(ValueError, match="timeout must be above 0"):
        Worker().handler("k", timeout=wrong)


def test_a_host_name_that_is_not_ascii_is_omitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "größer")
    assert describe_process(10**6).host is None
    assert describe_process(10**6).concurrency == 100_000
