"""What every test has: the event loop of the daemon, and an alarm for code of ours that blocks it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Mapping

import pytest
import uvloop
from blockbuster import blockbuster_ctx

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "uvloop": uvloop.new_event_loop,
    "stock": asyncio.new_event_loop,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--loop", choices=[*LOOPS, "both"], default="uvloop", help="the event loop of async tests")


def pytest_asyncio_loop_factories(config: pytest.Config) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    chosen = config.getoption("--loop")
    return LOOPS if chosen == "both" else {chosen: LOOPS[chosen]}


@pytest.fixture(autouse=True)
def no_blocking(request: pytest.FixtureRequest) -> Iterator[None]:
    """In an async test a blocking call from the package raises BlockingError. Tests themselves may block."""
    if request.node.get_closest_marker("asyncio") is None:
        yield
        return
    with blockbuster_ctx("jobd"):
        yield


def tool_missing(name: str, package: str) -> None:
    """Skip a test that needs a program that is not here; where all tests must run (CI) fail instead."""
    message = f"{name} is missing: install the package {package}"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)
