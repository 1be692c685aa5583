"""What a check of a fault is: its promise, the tools it needs, how it is run, and what came of it.

Makes no fault itself and knows no check but by the list of modules.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Final, Literal

# Each has a tuple of its checks, CHECKS.
MODULES: Final = (
    "kills",
    "sweeps",
    "power",
    "replay",
    "full",
    "slow_disk",
    "flips",
    "migrating",
    "fuzz",
    "hostile_http",
    "crowds",
    "daemons",
    "workers",
    "lost_answers",
    "times",
    "units",
)

Counts = dict[str, int]
Verdict = Literal["passed", "FAILED", "skipped"]


@dataclass(frozen=True)
class Tool:
    """What a check needs of the machine. `package` is Debian's."""

    name: str
    package: str
    is_here: Callable[[], bool]


def program(name: str, package: str | None = None) -> Tool:
    """A program on the path."""
    return Tool(name, package or name, lambda: shutil.which(name) is not None)


@dataclass(frozen=True)
class Trial:
    """One run of a check: a directory of its own, how many rounds, and whether its deadlines count.

    Deadlines do not count where a test suite shares the machine (`timed` is False); all else does.
    """

    directory: Path
    rounds: int
    timed: bool = True


@dataclass(frozen=True)
class Check:
    """A fault and what is promised under it.

    `run` gives counts of what was done and seen. It raises AssertionError, with a story, where the promise is broken.
    `rounds` is how often the fault is made for the report, `few` how often in the test suite (some seconds).
    """

    name: str
    promise: str
    run: Callable[[Trial], Counts]
    rounds: int
    few: int = 1
    needs: tuple[Tool, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What came of a check; `story` says what broke, or which tools are missing."""

    name: str
    promise: str
    verdict: Verdict
    seconds: float
    counts: Counts = field(default_factory=dict)
    story: str = ""


def checks() -> dict[str, Check]:
    """All checks, by name, in the order of MODULES."""
    modules = [import_module(f"tests.faults.{name}") for name in MODULES]
    return {check.name: check for module in modules for check in module.CHECKS}


def play(check: Check, rounds: int, *, timed: bool) -> Outcome:
    """Run one check. Whatever it raises is its failure; where a tool is missing it is not run."""
    missing = [f"{tool.name} (Debian: {tool.package})" for tool in check.needs if not tool.is_here()]
    if missing:
        return Outcome(check.name, check.promise, "skipped", 0.0, story=f"missing: {', '.join(missing)}")
    began_s = time.monotonic()
    counts: Counts = {}
    story = ""
    with tempfile.TemporaryDirectory(prefix="jobd-fault-") as directory:
        try:
            counts = check.run(Trial(Path(directory), rounds, timed))
        except Exception:
            story = traceback.format_exc()
    seconds = round(time.monotonic() - began_s, 1)
    return Outcome(check.name, check.promise, "FAILED" if story else "passed", seconds, counts, story)
