"""The levels at which a bug can be found, cheapest first: what of the test suite belongs to each, and one run of it.

What a level cannot see is not run: a change of the store is nothing to the table of the rules.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final, get_args

from msgspec import Struct

from tests.proof.planted.bugs import Bug, Level
from tests.support.daemon_process import die_with_us

LEVELS: Final[tuple[Level, ...]] = get_args(Level)
TOO_LONG_S: Final = 600
# A test that fails may leave threads behind, for which an interpreter that ends as usual waits.
_RUN: Final = "import os, pytest, sys; code = pytest.main(sys.argv[1:]); sys.stdout.flush(); os._exit(code)"
TIMED_OUT: Final = -1  # beside the exit codes of pytest


# What pytest runs at each level.
TESTS: Final[dict[Level, tuple[str, ...]]] = {
    "rules": ("tests/unit/core", "tests/unit/model"),
    "world": ("tests/proof/test_small_world.py",),
    "simulation": ("tests/proof/test_simulation.py::test_every_promise_holds",),
    "actor": ("tests/unit/engine", "tests/unit/maintenance", "tests/unit/monitoring"),
    "store": ("tests/unit/storage", "tests/integration/test_outages.py"),
    "doors": ("tests/unit/http", "tests/unit/api", "tests/integration/test_contract.py"),
    "process": ("tests/unit/dashboard", "tests/integration/test_daemon.py", "tests/proof/test_faults.py"),
}

# The first level that can see a package; the process can see all of them.
_SEEN_FROM: Final[dict[str, Level]] = {
    **dict.fromkeys(("model", "core"), "rules"),
    **dict.fromkeys(("engine", "maintenance", "monitoring"), "simulation"),
    "storage": "store",
    **dict.fromkeys(("http", "api"), "doors"),
}
_RULES: Final = {"mailbox.py", "clock.py", "idempotency.py"}  # parts of the engine that are tested by themselves

_FAILED: Final = re.compile(r"^(?:FAILED|ERROR) (.*)$", re.M)
_BROKEN: Final = re.compile(r"""\(\\?'(?P<promise>[SL]\d+|loop|log)\\?', \\?["'](?P<what>.*?)\\?["']\): python -m""")


class Found(Struct, frozen=True):
    """What a level said: `failed` names the test and what was wrong, `promise` what the simulation saw broken."""

    level: Level
    seconds: float
    failed: str | None = None
    promise: str | None = None


def fitting(bug: Bug) -> list[Level]:
    """The levels that can see `bug`, cheapest first."""
    first = min(LEVELS.index(_first(Path(edit.file))) for edit in bug.edits)
    return list(LEVELS[first:])


def _first(file: Path) -> Level:
    if file.name in _RULES or file.match("jobd/*.py"):
        return "rules" if file.name in _RULES else "simulation"
    if file.match("jobd/storage/artifacts/*"):
        return "simulation"
    return _SEEN_FROM.get(file.parts[1], "process")


def run(level: Level, root: Path) -> Found:
    """Run `level` in the copy of the repository at `root`."""
    began_s = time.monotonic()
    code, said = _pytest(TESTS[level], root)
    if code == TIMED_OUT or (code and "Timeout (>" in said):
        code, said = _pytest(TESTS[level], root)  # the machine may have been busy; a bug takes too long twice
    seconds = round(time.monotonic() - began_s, 1)
    if code in (0, TIMED_OUT):  # who never ends finds nothing
        return Found(level, seconds)
    failed = next(iter(_FAILED.findall(said)), None) or f"pytest ended with {code}: {' '.join(said.split())[-300:]}"
    broken = _BROKEN.search(failed)
    if broken is None:
        return Found(level, seconds, failed.removeprefix("tests/"))
    return Found(level, seconds, f"{broken['promise']}: {broken['what']}", broken["promise"])


def _pytest(tests: Iterable[str], root: Path) -> tuple[int, str]:
    """Exit code and output. The copy comes before whatever is installed, also for what the tests start."""
    command = [sys.executable, "-c", _RUN, "-q", "-x", "--tb=line", "-p", "no:cacheprovider", *tests]
    environ = os.environ | {"PYTHONPATH": str(root), "COLUMNS": "1000"}
    run = subprocess.Popen(
        command,
        cwd=root,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=die_with_us,
    )
    try:
        said, _ = run.communicate(timeout=TOO_LONG_S)
        return run.returncode, said
    except subprocess.TimeoutExpired:
        return TIMED_OUT, ""
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)  # a spoiled daemon may have stayed behind
        run.wait()
