"""Plant each bug in a test process and report which test finds it.

`python -m tests.proof.planted [NAME ...] [--jobs N]`. Exit code 1 if a bug is not found.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from msgspec import Struct

from tests import ROOT
from tests.proof.planted.bugs import BUGS
from tests.proof.planted.registry import Bug

TIMEOUT_S: Final = 600
SHOWN: Final = 120  # characters of a failure
_FAILED: Final = re.compile(r"^FAILED (.*)$", re.M)
_TESTS_FAILED: Final = 1  # pytest's exit code


class BugResult(Struct, frozen=True):
    """The result of one bug. `failed` is the test that found it, or empty; then `output` says more."""

    bug: Bug
    seconds: float
    failed: str
    output: str = ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proof.planted", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"bugs; all by default: {', '.join(BUGS)}")
    parser.add_argument("--jobs", type=int, default=1, help="bugs to run in parallel")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.names if name not in BUGS]:
        parser.error(f"unknown bugs: {', '.join(unknown)}; known: {', '.join(BUGS)}")
    chosen = [BUGS[name] for name in given.names or BUGS]
    began_s = time.monotonic()
    found: Counter[str] = Counter()
    with ThreadPoolExecutor(given.jobs) as pool:
        for verdict in pool.map(run, chosen):
            print(_line(verdict), flush=True)
            if verdict.failed:
                found[verdict.bug.level] += 1
            elif verdict.output:
                print(verdict.output, file=sys.stderr)
    by_level = ", ".join(f"{count} {level}" for level, count in found.most_common())
    print(f"{found.total()} of {len(chosen)} bugs found in {time.monotonic() - began_s:.0f} s ({by_level})")
    return int(found.total() < len(chosen))


def run(planted: Bug) -> BugResult:
    """Run the tests that must find `planted`, with the bug in their process."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.proof.planted.plugin", "--bug", planted.name]
    command += ["-q", "-x", "--tb=line", "-p", "no:cacheprovider", planted.found_by]
    began_s = time.monotonic()
    try:
        process = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return BugResult(planted, TIMEOUT_S, "", f"no result after {TIMEOUT_S} s")
    seconds = time.monotonic() - began_s
    if process.returncode != _TESTS_FAILED:
        tail = "\n".join(f"{process.stdout}\n{process.stderr}".splitlines()[-20:])
        return BugResult(planted, seconds, "", f"pytest exited with {process.returncode}:\n{tail}")
    failed = _FAILED.search(process.stdout)
    return BugResult(planted, seconds, failed[1] if failed else "a test that ended its process")


def _line(verdict: BugResult) -> str:
    found = verdict.failed.removeprefix("tests/") or "NOT FOUND"
    shown = found if len(found) <= SHOWN else f"{found[: SHOWN - 1]}…"
    return f"{verdict.bug.name:<44} {verdict.bug.level:<12} {verdict.seconds:>6.1f} s  {shown}"


if __name__ == "__main__":
    sys.exit(main())
