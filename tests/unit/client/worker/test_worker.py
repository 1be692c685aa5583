"""Registration of handlers, merging of results, options of a worker."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from jobd import __version__
from jobd.client import AsyncHandlerContext, AsyncJobClient, Worker
from jobd.client.worker.claimer import ClaimOptions, describe_claims, describe_process
from jobd.client.worker.handlers import merged_result
from tests.support.client_harness import GRANT, working
from tests.support.scripted_server import ScriptedServer, Step, ok, rejected


def test_wrong_use_of_the_decorator_is_a_type_error() -> None:
    worker = Worker("unix:/nowhere")

    def generator(context: AsyncHandlerContext) -> Iterator[int]:
        yield 1

    async def async_generator(context: AsyncHandlerContext) -> AsyncIterator[int]:
        yield 1

    def without_a_task() -> None: ...

    def with_more(context: AsyncHandlerContext, more: int) -> None: ...

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


@pytest.mark.parametrize(
    ("given", "version"), [("", __version__), ("2.4.1", "2.4.1"), ("v" * 101, "v" * 100), ("größer", None)]
)
def test_a_worker_has_the_version_of_its_program(
    given: str, version: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOBD_WORKER_VERSION", given)
    assert describe_process(1).version == version


def test_a_rejected_token_ends_a_program_with_one_line(
    server: ScriptedServer, endpoint: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JOBD_WORKER_TOKEN_FILE", "/srv/token")
    server.always = lambda received: rejected("unauthorized", 401)
    worker = Worker(endpoint, name="w")
    worker.handler(print)
    with pytest.raises(SystemExit) as caught:
        worker.run()
    assert caught.value.code == 5
    *_, line = capfd.readouterr().err.splitlines()
    assert line.startswith("worker w: the daemon rejected the token.")
    assert line.endswith("JOBD_WORKER_TOKEN_FILE names (/srv/token) [unauthorized]")


@pytest.mark.parametrize(
    ("address", "environ", "shown"),
    [
        ("unix:/a/w.sock", {"JOBD_SOCKET": "/b/w.sock", "JOBD_URL": "http://c:1"}, "unix:/a/w.sock"),
        (None, {"JOBD_SOCKET": "/b/w.sock", "JOBD_URL": "http://c:1"}, "unix:/b/w.sock"),
        (None, {"JOBD_URL": "http://c:1,http://d:1"}, "http://c:1, http://d:1"),
    ],
)
def test_a_worker_names_the_address_that_it_uses(
    address: str | None, environ: dict[str, str], shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("JOBD_SOCKET", "JOBD_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    line = describe_claims(ClaimOptions(worker="w"), AsyncJobClient(address))
    assert line == f"worker w claims jobs of queue default, 1 at a time, at {shown}"


async def test_a_worker_without_a_free_place_is_stopped(tmp_path: Path) -> None:
    async def endless(context: AsyncHandlerContext) -> None:
        await asyncio.Event().wait()

    stop = {"grants": [], "directive": {"action": "stop", "by": "admin:ana", "reason": "bad"}}
    claims: list[Step] = [ok({"grants": [GRANT]}), ok(stop)]
    async with working(tmp_path, endless, responses={"claim": claims}, grace_s=0) as daemon:
        await daemon.receive("release")
    assert [(each.get("limit", 1), each.get("busy", False)) for each in daemon.bodies("claim")[:2]] == [
        (1, False),
        (0, True),
    ]
