"""`python -m tests.proof.planted [NAME ...] [--jobs N] [--json]`: plant bugs in copies of the sources; who finds them?

Each is looked for level by level until one finds it. `--promises` asks the simulation alone, about the bugs that break
an invariant. Exit code 0 where each was found at its level or before, 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from tests import ROOT
from tests.proof.planted.bugs import Bug, Level, Rotten, bugs, plant
from tests.proof.planted.levels import LEVELS, TESTS, Found, fitting, run

SHOWN: Final = 110  # characters of what failed
# Besides what git would not take.
LEFT_OUT: Final = shutil.ignore_patterns(
    ".git", ".venv*", ".*_cache", ".hypothesis", ".coverage*", "__pycache__", "*.egg-info", "node_modules", "tmp"
)


class Verdict(Struct, frozen=True):
    """What came of one bug. `complaint` is why that is not good enough, empty where it is."""

    name: str
    breaks: str
    wanted: str
    found: str | None  # the level
    seconds: float
    failed: str
    complaint: str = ""


def main(arguments: list[str] | None = None) -> int:
    known = bugs()
    asked = _parser().parse_args(arguments)
    if unknown := [name for name in asked.names if name not in known]:
        print(f"unknown: {', '.join(unknown)}; there are\n" + "\n".join(f"  {name}" for name in known), file=sys.stderr)
        return 2
    chosen = [known[name] for name in asked.names] or list(known.values())
    look = look_for
    if asked.promises:
        chosen, look = [bug for bug in chosen if bug.promise], ask_the_simulation
    began_s = time.monotonic()
    with ThreadPoolExecutor(asked.jobs) as pool:
        control = pool.submit(control_run) if not asked.names else None
        found = []
        for verdict in pool.map(_telling(look), chosen):
            found.append(verdict)
        if control is not None:
            found.insert(0, control.result())
    took_s = time.monotonic() - began_s
    print(json.dumps(msgspec.to_builtins(found), indent=1) if asked.json else table(found, took_s))
    return int(any(verdict.complaint for verdict in found))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.proof.planted", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="bugs; all where none is named, and a run without any")
    parser.add_argument("--jobs", type=int, default=1, help="bugs looked for side by side")
    parser.add_argument(
        "--promises", action="store_true", help="the simulation alone, about bugs that break invariants"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    return parser


def _telling(look: Callable[[Bug], Verdict]) -> Callable[[Bug], Verdict]:
    def looked(bug: Bug) -> Verdict:
        verdict = look(bug)
        print(f"{bug.name}: {verdict.complaint or verdict.found}", file=sys.stderr, flush=True)
        return verdict

    return looked


# -- one bug ----------------------------------------------------------------------------------------------------------


def look_for(bug: Bug) -> Verdict:
    """Level by level, until one finds it."""
    return _look(bug, fitting(bug), bug.level)


def ask_the_simulation(bug: Bug) -> Verdict:
    """Whether the simulation alone finds it, as the promise that it breaks."""
    return _look(bug, ["simulation"], "simulation", bug.promise)


def control_run() -> Verdict:
    """Nothing is planted: where a level fails all the same, what it finds elsewhere says nothing."""
    with tempfile.TemporaryDirectory(prefix="jobd-planted-") as directory:
        tree = copied(Path(directory))
        looks = [run(level, tree) for level in LEVELS]
    seconds = round(sum(look.seconds for look in looks), 1)
    failed = next((look for look in looks if look.failed is not None), None)
    if failed is None:
        return Verdict("(none)", "nothing: all levels pass", "-", None, seconds, "")
    return Verdict(
        "(none)", "nothing", "-", failed.level, seconds, failed.failed or "", "a level fails without any bug"
    )


def _look(bug: Bug, levels: list[Level], wanted: Level, promise: str | None = None) -> Verdict:
    seconds = 0.0
    with tempfile.TemporaryDirectory(prefix="jobd-planted-") as directory:
        tree = copied(Path(directory))
        try:
            plant(bug, tree)
        except Rotten as rotten:
            return Verdict(bug.name, bug.breaks, wanted, None, 0.0, "", str(rotten))
        for level in levels:
            look = run(level, tree)
            seconds = round(seconds + look.seconds, 1)
            if look.failed is not None:
                complaint = _complaint(look, wanted, promise)
                return Verdict(bug.name, bug.breaks, wanted, level, seconds, look.failed, complaint)
    return Verdict(bug.name, bug.breaks, wanted, None, seconds, "", "no level finds it: a test is missing")


def _complaint(look: Found, wanted: Level, promise: str | None) -> str:
    if LEVELS.index(look.level) > LEVELS.index(wanted):
        return f"found at {look.level} only, not at {wanted}"
    if promise is not None and look.promise != promise:
        return f"found as {look.promise}, not as {promise}"
    return ""


def copied(directory: Path) -> Path:
    """A copy of the sources and tests, with nothing compiled in it."""
    return Path(shutil.copytree(ROOT, directory / "jobd", ignore=LEFT_OUT))


# -- all of them ------------------------------------------------------------------------------------------------------


def table(found: list[Verdict], took_s: float) -> str:
    name_width = max(len(verdict.name) for verdict in found)
    level_width = max(map(len, TESTS))
    lines = []
    for verdict in found:
        failed = " ".join(verdict.failed.split())
        failed = failed if len(failed) <= SHOWN else f"{failed[: SHOWN - 1]}…"
        level = verdict.found or "-"
        lines.append(f"{verdict.name:{name_width}}  {level:{level_width}} {verdict.seconds:>6.1f} s  {failed}")
        if verdict.complaint:
            lines.append(f"{'':{name_width}}  ^ {verdict.complaint}")
    planted = [verdict for verdict in found if verdict.wanted != "-"]
    counts = Counter(verdict.found for verdict in planted if verdict.found is not None)
    by_level = ", ".join(f"{counts[level]} {level}" for level in LEVELS if counts[level])
    wrong = sum(bool(verdict.complaint) for verdict in found)
    lines.append(
        f"{sum(counts.values())} of {len(planted)} bugs found ({by_level}) in {took_s:.0f} s; {wrong} complaints"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
