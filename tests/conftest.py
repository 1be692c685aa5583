"""What every test has: the event loop of the daemon, an alarm for code of ours that blocks it, no skipping in CI."""

from __future__ import annotations

import asyncio
import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import pytest
import uvloop
from blockbuster import BlockBuster

import jobd
from jobd.storage import dry_run, startup

OURS = str(Path(jobd.__file__).parent) + os.sep
TESTS = str(Path(__file__).parent) + os.sep
EPOCH_1_MS = 1_577_836_801_000  # the wall time at which epoch 1 is taken

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
def first_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store takes its epoch in the first second of 2020: 1 if it is new, and one more for each that follows."""
    monkeypatch.setattr(startup, "now_ms", lambda: EPOCH_1_MS)
    monkeypatch.setattr(dry_run, "now_ms", lambda: EPOCH_1_MS)


@pytest.fixture(autouse=True)
def no_blocking(request: pytest.FixtureRequest) -> Iterator[None]:
    """In an async test a blocking call from the package raises BlockingError, unless the test itself made it."""
    if request.node.get_closest_marker("asyncio") is None:
        yield
        return
    alarm = BlockBuster("jobd")
    for guarded in alarm.functions.values():
        guarded.can_block_predicate = _or_asked_for(guarded.can_block_predicate)
    # On purpose, and never for long: see there.
    alarm.functions["threading.Lock.acquire"].can_block_in("jobd/storage/store.py", "run_yielding_gil")
    alarm.activate()
    try:
        yield
    finally:
        alarm.deactivate()


def _or_asked_for(harmless: Callable[..., bool]) -> Callable[..., bool]:
    def may_block(*args: Any, **settings: Any) -> bool:
        return harmless(*args, **settings) or _called_by_the_test()

    return may_block


def _called_by_the_test() -> bool:
    """Whether a test called a plain function of ours, which then blocks: not the loop, and not through a coroutine."""
    frame, outermost = sys._getframe(), None
    while (back := frame.f_back) is not None:
        frame = back
        place = frame.f_code.co_filename
        if place.startswith(OURS):
            outermost = frame
        elif place.startswith(TESTS) and place != __file__:
            return outermost is None or not outermost.f_code.co_flags & inspect.CO_COROUTINE
    return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where all tests must run (CI) a skipped one has failed: something that it needs is missing."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("CI"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{reason} (CI is set: nothing may be skipped)"
    return report


def tool_missing(name: str, package: str) -> NoReturn:
    """Skip a test that needs a program that is not here."""
    pytest.skip(f"{name} is missing: install the package {package}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with 20 MiB; mounting it needs root."""
    place = tmp_path / "small"
    place.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", "size=20m,mode=0700", "jobd-test", str(place)]
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"test of a full disk: mounting a tmpfs is not permitted here ({error})")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)
