"""The check for blocking calls: what it must detect and what it must allow."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from blockbuster import BlockingError

import jobd
from jobd.storage.store import Store
from tests.support.factories import ChangeFactory

SOURCE = """
async def asked(): time.sleep(0)
def plain(): time.sleep(0)
async def through_plain(): plain()
"""


@pytest.fixture
def ours() -> dict[str, Any]:
    """Define blocking functions as if they were in a module of the package."""
    made: dict[str, Any] = {"time": time}
    exec(compile(SOURCE, str(Path(jobd.__file__).with_name("imagined.py")), "exec"), made)
    return made


@pytest.mark.parametrize("name", ["asked", "through_plain"])
async def test_a_blocking_coroutine_is_caught(ours: dict[str, Any], name: str) -> None:
    with pytest.raises(BlockingError):
        await ours[name]()
    with pytest.raises(BlockingError):
        await asyncio.create_task(ours[name]())


async def test_a_blocking_callback_is_caught(ours: dict[str, Any]) -> None:
    loop, caught = asyncio.get_running_loop(), asyncio.Event()
    failures: list[dict[str, Any]] = []

    def note(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        failures.append(context)
        caught.set()

    loop.set_exception_handler(note)
    loop.call_soon(ours["plain"])
    await caught.wait()
    assert isinstance(failures[0]["exception"], BlockingError)


async def test_tests_and_threads_may_block(ours: dict[str, Any]) -> None:
    ours["plain"]()
    time.sleep(0)
    await asyncio.to_thread(ours["plain"])


def test_code_outside_a_loop_may_block(ours: dict[str, Any]) -> None:
    ours["plain"]()


async def test_of_the_storage_only_an_inline_commit_may_block(tmp_path: Path) -> None:
    async with (await Store.open(str(tmp_path / "jobd.db"), commit="inline"))[0] as store:
        reading: dict[str, Any] = {"store": store}
        source = "async def read(): return store._database.rows('SELECT 1')"
        exec(compile(source, str(Path(jobd.__file__).with_name("imagined.py")), "exec"), reading)
        with pytest.raises(BlockingError):
            await reading["read"]()
        await store.write(ChangeFactory().any_batch(3))
