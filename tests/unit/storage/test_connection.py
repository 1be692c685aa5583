"""The connection of a store: one owner at a time, in its own thread or in the event loop."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from jobd.storage import connection as connections
from jobd.storage import startup
from jobd.storage.connection import FunctionConnection, StoreConnection
from jobd.storage.store import MEMORY


@pytest.fixture
async def connection() -> AsyncIterator[StoreConnection]:
    connection = await StoreConnection.open(lambda: startup.connect(MEMORY, "FULL"))
    yield connection
    await connection.close()


async def test_functions_run_in_one_other_thread_in_the_order_of_the_calls(connection: StoreConnection) -> None:
    order: list[int] = []

    def note(number: int) -> int:
        order.append(number)
        return threading.get_ident()

    threads = await asyncio.gather(*(connection.run(note, number) for number in range(20)))
    assert order == list(range(20))
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()


async def test_results_and_errors_reach_their_callers(connection: StoreConnection) -> None:
    def divide(by: int) -> float:
        return 6 / by

    found = await asyncio.gather(*(connection.run(divide, by) for by in (0, 1, 0, 3)), return_exceptions=True)
    assert [each if isinstance(each, float) else type(each) for each in found] == [
        ZeroDivisionError, 6.0, ZeroDivisionError, 2.0,
    ]  # fmt: skip
    assert connection.is_idle


async def test_a_function_in_the_event_loop_uses_the_same_connection(connection: StoreConnection) -> None:
    await connection.run(connection.raw.execute, "CREATE TABLE t (a)")
    assert connection.run_inline(threading.get_ident) == threading.get_ident()
    connection.run_inline(connection.raw.execute, "INSERT INTO t VALUES (1)")
    rows = await connection.run(lambda: connection.raw.execute("SELECT a FROM t").fetchall())
    assert rows == [(1,)]


async def test_the_connection_is_not_idle_while_a_function_waits_or_runs(connection: StoreConnection) -> None:
    busy = threading.Event()
    running = asyncio.create_task(connection.run(busy.wait))
    waiting = asyncio.create_task(connection.run(busy.wait))
    await asyncio.sleep(0)
    assert not connection.is_idle
    with pytest.raises(AssertionError, match="another thread"):
        connection.run_inline(threading.get_ident)
    busy.set()
    await asyncio.gather(running, waiting)
    assert connection.is_idle


async def test_a_function_of_a_cancelled_caller_keeps_the_connection(connection: StoreConnection) -> None:
    busy = threading.Event()
    running = asyncio.create_task(connection.run(busy.wait))
    waiting = asyncio.create_task(connection.run(threading.get_ident))
    await asyncio.sleep(0)
    for task in (running, waiting):
        task.cancel()
    await asyncio.wait([running, waiting])
    assert running.cancelled()
    assert not connection.is_idle, "its function still runs"
    busy.set()
    await connection.run(threading.get_ident)
    assert connection.is_idle


async def test_a_lent_connection_is_not_idle(connection: StoreConnection) -> None:
    with connection.lend() as raw:
        assert raw is connection.raw
        assert not connection.is_idle
        await connection.run(threading.get_ident)
        assert not connection.is_idle
    assert connection.is_idle


async def test_an_error_while_connecting_is_raised() -> None:
    def fail() -> FunctionConnection:
        raise sqlite3.OperationalError("no such disk")

    with pytest.raises(sqlite3.OperationalError, match="no such disk"):
        await StoreConnection.open(fail)


def test_an_error_while_connecting_is_raised_after_the_last_use_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    call_soon = asyncio.BaseEventLoop.call_soon_threadsafe
    late: list[BaseException | None] = []
    before = set(threading.enumerate())

    def fail() -> FunctionConnection:
        raise sqlite3.OperationalError("no such disk")

    def slow(self: asyncio.BaseEventLoop, *args: Any, **kwargs: Any) -> asyncio.Handle:
        time.sleep(0.01)
        return call_soon(self, *args, **kwargs)

    monkeypatch.setattr(asyncio.BaseEventLoop, "call_soon_threadsafe", slow)
    monkeypatch.setattr(threading, "excepthook", lambda hook: late.append(hook.exc_value))
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner, pytest.raises(sqlite3.OperationalError):
        runner.run(StoreConnection.open(fail))
    for thread in set(threading.enumerate()) - before:
        thread.join()
    assert late == []


async def test_a_closed_connection_runs_nothing(connection: StoreConnection) -> None:
    await connection.close()
    with pytest.raises(ValueError, match="no active connection"):
        await connection.run(threading.get_ident)
    assert not connection.is_idle


async def test_the_event_loop_blocks_until_the_function_says_so(
    connection: StoreConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other tasks run only after that."""
    monkeypatch.setattr(connections, "MAX_BLOCK_S", 60)
    order, until = list[str](), threading.Event()

    def write() -> str:
        order.append("rows")
        until.set()
        return "written"

    asyncio.get_running_loop().call_soon(order.append, "another task")
    assert await connection.run(write, until=until) == "written"
    assert order == ["rows", "another task"]


async def test_a_function_that_never_says_so_does_not_block_the_event_loop(connection: StoreConnection) -> None:
    busy = threading.Event()
    running = asyncio.create_task(connection.run(busy.wait, until=threading.Event()))
    await asyncio.sleep(0)
    assert not running.done()
    busy.set()
    assert await running


async def test_errors_and_cancellations_reach_the_caller_of_a_blocking_call(connection: StoreConnection) -> None:
    with pytest.raises(ZeroDivisionError):
        await connection.run(lambda: 1 // 0, until=threading.Event())
    busy = threading.Event()
    running = asyncio.create_task(connection.run(busy.wait, until=threading.Event()))
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not connection.is_idle, "its function still runs"
    busy.set()
    await connection.run(threading.get_ident)
    assert connection.is_idle
