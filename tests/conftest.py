"""Fixtures for all tests: the daemon's event loop, detection of blocking calls in jobd, no skipped tests in CI."""

from __future__ import annotations

import asyncio
import gc
import inspect
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import uvloop
from blockbuster import BlockBuster
from hypothesis import settings
from jinja2 import BytecodeCache, Environment
from jinja2.bccache import Bucket

import jobd
from jobd.dashboard import rendering
from jobd.storage import startup
from jobd.storage.offline import dry_run
from tests import ROOT
from tests.support import postgres
from tests.support.postgres import PostgresMissing, PostgresServer

OURS = str(Path(jobd.__file__).parent) + os.sep
TESTS = str(Path(__file__).parent) + os.sep
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell ignores SIGINT in a background process, which the programs that tests interrupt would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("untimed", deadline=None)  # a machine may be busy
settings.load_profile("untimed")

_journals = itertools.count(1)
ALWAYS_SLOW = (ROOT / "tests/proof", ROOT / "tests/browser")
EPOCH_1_MS = 1_577_836_801_000  # wall time that yields epoch 1

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
    """Make a store take its epoch in the first second of 2020: 1 if it is new, and the next number each time."""
    monkeypatch.setattr(startup, "now_ms", lambda: EPOCH_1_MS)
    monkeypatch.setattr(dry_run, "now_ms", lambda: EPOCH_1_MS)


class CompiledTemplates(BytecodeCache):
    """Templates that were compiled in this process."""

    def __init__(self) -> None:
        self._compiled: dict[str, bytes] = {}

    def load_bytecode(self, bucket: Bucket) -> None:
        if bucket.key in self._compiled:
            bucket.bytecode_from_string(self._compiled[bucket.key])

    def dump_bytecode(self, bucket: Bucket) -> None:
        self._compiled[bucket.key] = bucket.bytecode_to_string()


@pytest.fixture(autouse=True, scope="session")
def compiled_templates() -> Iterator[None]:
    """Compile each template once, and not for each dashboard."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rendering, "Environment", partial(Environment, bytecode_cache=CompiledTemplates()))
        yield


@pytest.fixture(autouse=True)
def no_blocking(request: pytest.FixtureRequest) -> Iterator[None]:
    """In an async test, raise BlockingError for a blocking call in the package, unless the test itself called it."""
    renamed = "MUTANT_UNDER_TEST" in os.environ  # mutmut renames the functions that may block
    if renamed or request.node.get_closest_marker("asyncio") is None:
        yield
        return
    alarm = BlockBuster("jobd")
    for guarded in alarm.functions.values():
        guarded.can_block_predicate = _or_asked_for(guarded.can_block_predicate)
        guarded.can_block_in("jobd/storage/connection.py", "run_inline")  # intended, and fast: see there
        guarded.can_block_in("jobd/journal/postgres/session.py", "_open")  # asyncpg reads small files of the user
    lock = alarm.functions["threading.Lock.acquire"]
    lock.can_block_in("jobd/storage/connection.py", "_block_until_set")
    lock.can_block_in("coverage/collector.py", "lock_data")
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
    """Whether a test called a synchronous function of ours directly, not through the loop or a coroutine."""
    frame, outermost = sys._getframe(), None
    while (back := frame.f_back) is not None:
        frame = back
        place = frame.f_code.co_filename
        if place.startswith(OURS):
            outermost = frame
        elif place.startswith(TESTS) and place != __file__:
            return outermost is None or not outermost.f_code.co_flags & inspect.CO_COROUTINE
    return False


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import no module without slow tests if only slow tests are selected. Each process of xdist collects all tests."""
    if config.option.markexpr not in {"slow", "slow and not long", "long"} or not collection_path.match("test_*.py"):
        return None
    if any(collection_path.is_relative_to(place) for place in ALWAYS_SLOW):
        return None
    return "mark.slow" not in collection_path.read_text() or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the browser and of the proofs as slow. Begin with the proofs, which have the longest tests."""
    for item in items:
        if any(item.path.is_relative_to(place) for place in ALWAYS_SLOW):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: not item.path.is_relative_to(ROOT / "tests/proof"))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Keep the garbage collector from going through thousands of collected tests again and again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI, fail a skipped test: a program that it needs is missing."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("CI"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{reason} (CI is set: nothing may be skipped)"
    return report


def tool_missing(name: str, package: str) -> NoReturn:
    """Skip a test that needs a missing program."""
    pytest.skip(f"{name} is missing: install the package {package}")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """Run a PostgreSQL server for the tests of this process. A test that changes the server itself starts its own."""
    try:
        postgres.programs()
    except PostgresMissing:
        tool_missing("postgres", "postgresql")
    with postgres.postgres() as server:
        yield server


@pytest.fixture
def journal_name() -> str:
    """Return a name for a journal that no other test of this process uses."""
    return f"test-{next(_journals)}"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 20 MiB. This needs root."""
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
        subprocess.run(["umount", "--lazy", str(place)], check=True)  # a test that failed may have left a file open
