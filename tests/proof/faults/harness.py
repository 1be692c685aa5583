"""The fault checks: their promises, required tools, runs and outcomes."""

from __future__ import annotations

import inspect
import platform
import shutil
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Final, Literal

from tests import ROOT

# Modules with checks.
MODULES: Final = (
    "kills",
    "syscall_faults",
    "power_cut",
    "crash_replay",
    "full_disk",
    "slow_disk",
    "flips",
    "migrations",
    "fuzz",
    "malformed_http",
    "crowds",
    "daemons",
    "workers",
    "lost_responses",
    "clocks",
    "systemd_units",
    "lost_leaders",
    "lost_servers",
    "cluster_clocks",
    "node_conditions",
    "upgrades",
)

Counts = dict[str, int]
Verdict = Literal["passed", "FAILED", "skipped"]


@dataclass(frozen=True)
class Tool:
    """A requirement of a check. `package` is the Debian package."""

    name: str
    package: str
    is_available: Callable[[], bool]


def program(name: str, package: str | None = None) -> Tool:
    """Require a program on the path."""
    return Tool(name, package or name, lambda: shutil.which(name) is not None)


@dataclass(frozen=True)
class Trial:
    """One run of a check: its own directory, the number of rounds, and whether deadlines apply.

    Deadlines do not apply in a test suite that shares the machine (`timed` is False).
    """

    directory: Path
    rounds: int
    timed: bool = True


@dataclass(frozen=True)
class Check:
    """A fault and what is promised under it.

    `run` returns counts of what was done and seen. It raises AssertionError, with details, if the promise is broken.
    `rounds` is the number of faults in the report, `few` the number in the test suite (a few seconds; 0: none).
    """

    name: str
    promise: str
    run: Callable[[Trial], Counts]
    rounds: int
    few: int = 1
    needs: tuple[Tool, ...] = ()


def check(*, rounds: int, few: int = 1, needs: tuple[Tool, ...] = ()) -> Callable[[Callable[[Trial], Counts]], Check]:
    """Make a check of a function, with the first paragraph of its docstring as the promise."""

    def made(run: Callable[[Trial], Counts]) -> Check:
        promise, *_ = inspect.cleandoc(run.__doc__ or "").removesuffix(".").split(".\n\n")
        return Check(run.__name__.replace("_", "-"), " ".join(promise.split()), run, rounds, few, needs)

    return made


@dataclass(frozen=True)
class CheckOutcome:
    """The outcome of a check. `story` says what broke, or which tools are missing.

    `command` repeats the check. `commit` is that of the code, with `-dirty` if files have changed since.
    `needs` names the tools without which the check is skipped.
    """

    name: str
    promise: str
    verdict: Verdict
    seconds: float
    counts: Counts = field(default_factory=dict)
    story: str = ""
    command: str = ""
    commit: str = ""
    python: str = ""
    needs: list[str] = field(default_factory=list)


def checks(names: Collection[str] = ()) -> dict[str, Check]:
    """Return all checks by name, in the order of MODULES. With `names`, the first of them until these are included.

    `fuzz` is then imported last, because it takes most of the time.
    """
    found: dict[str, Check] = {}
    for module in sorted(MODULES, key="fuzz".__eq__) if names else MODULES:
        members = vars(import_module(f"tests.proof.faults.{module}")).values()
        found |= {each.name: each for each in members if isinstance(each, Check)}
        if names and found.keys() >= set(names):
            break
    return found


def commit() -> str:
    """Return the commit of the code, with `-dirty` if files have changed since."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def run_check(check: Check, rounds: int, *, timed: bool) -> CheckOutcome:
    """Run one check. Any exception is its failure: its files are kept. If a tool is missing, the check is skipped."""
    command = f"python -m tests.proof.faults {check.name}"
    command += f" --rounds {rounds}" if rounds != check.rounds else ""
    command += "" if timed else " --few"
    begun = CheckOutcome(
        check.name,
        check.promise,
        "skipped",
        0.0,
        command=command,
        commit=commit(),
        python=platform.python_version(),
        needs=[tool.name for tool in check.needs],
    )
    missing = [f"{tool.name} (Debian: {tool.package})" for tool in check.needs if not tool.is_available()]
    if missing:
        return replace(begun, story=f"missing: {', '.join(missing)}")
    began_s = time.monotonic()
    counts: Counts = {}
    story = ""
    directory = Path(tempfile.mkdtemp(prefix="jobd-fault-"))
    try:
        counts = check.run(Trial(directory, rounds, timed))
    except Exception:
        story = f"{traceback.format_exc()}Its files are in {directory}"
    else:
        shutil.rmtree(directory)
    seconds = round(time.monotonic() - began_s, 1)
    return replace(begun, verdict="FAILED" if story else "passed", seconds=seconds, counts=counts, story=story)
