"""Run the proofs and write their output into the document.

`python -m tests.proof.run [PART ...] [--out DIR] [--write]`

Each part is a separate program (see PARTS). Its output for this commit is stored in DIR and reused, so that an
interrupted run continues. `--write` fills docs/reliability.md from DIR. Every figure has its commit, command and
interpreter. `--rows FILE` replaces single faults with the output of `python -m tests.proof.faults NAME ... --json`.
Exit code 1 if a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tests import ROOT
from tests.proof.faults.harness import commit

DOCUMENT: Final = ROOT / "docs/reliability.md"
OUT: Final = ROOT / "build/proof"

# The module and arguments of each part, as `make NAME` runs it.
PARTS: Final[dict[str, list[str]]] = {
    "world": ["tests.proof.small_world"],
    "simulation": ["tests.proof.simulation", "--seeds", "20000", "--jobs", "2"],
    "cluster": ["tests.proof.simulation", "--cluster", "--seeds", "5000", "--steps", "300", "--jobs", "2"],
    "cluster-tests": ["pytest", "-m", "long", "--numprocesses", "3", "--dist", "worksteal", "--quiet"],
    "linearizability": ["tests.proof.linearizability", "--histories", "500"],
    "faults": ["tests.proof.faults", "--report", "--json"],
    "planted": ["tests.proof.planted", "--jobs", "2"],
}


# How the kinds that the simulation counts are shown.
KINDS: Final = {
    "fault": "fault",
    "mishap": "client mishap",
    "event": "event",
    "command": "command",
    "error": "error",
    "journal": "journal",
    "node": "node",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proof.run", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=OUT, help="where the output of the parts is kept, by commit")
    parser.add_argument("--write", action="store_true", help="write the kept output into docs/reliability.md")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="write these faults into docs/reliability.md")
    given = parser.parse_args(arguments)
    if given.rows:
        outcomes = json.loads(given.rows.read_text("utf-8"))
        broken = [each["name"] for each in outcomes if each["verdict"] != "passed"]
        DOCUMENT.write_text(with_rows(DOCUMENT.read_text("utf-8"), outcomes), "utf-8")
        print(f"not written: {', '.join(broken)}" if broken else "all faults are written", file=sys.stderr)
        return int(bool(broken))
    if unknown := [name for name in given.parts if name not in PARTS]:
        parser.error(f"unknown parts: {', '.join(unknown)}")
    out: Path = given.out / commit()
    out.mkdir(parents=True, exist_ok=True)
    failed = [] if given.write and not given.parts else [name for name in given.parts or PARTS if not prove(name, out)]
    if given.write:
        text = DOCUMENT.read_text("utf-8")
        for name in PARTS:
            if (out / f"{name}.txt").exists():
                text = filled(text, name, (out / f"{name}.txt").read_text("utf-8"))
        DOCUMENT.write_text(text, "utf-8")
    print(f"failed: {', '.join(failed)}" if failed else f"all parts passed; their output is in {out}", file=sys.stderr)
    return int(bool(failed))


def prove(name: str, out: Path) -> bool:
    """Run one part unless its output is stored. Return whether it passed. A skipped check counts as failed."""
    kept = out / f"{name}.txt"
    if kept.exists():
        return True
    print(f"{name} ...", file=sys.stderr, flush=True)
    began_s = time.monotonic()
    unfinished = out / f"{name}.unfinished"
    with unfinished.open("w") as file:
        run = subprocess.run(
            [sys.executable, "-m", *PARTS[name]], cwd=ROOT, stdout=file, env=os.environ | {"CI": "true"}, check=False
        )
    print(f"{name}: {run.returncode} after {time.monotonic() - began_s:.0f} s", file=sys.stderr, flush=True)
    if run.returncode == 0:
        heading = f"{time.strftime('%Y-%m-%d')}, commit `{commit()}`, {command(name)}, {machine()}\n"
        kept.write_text(heading + unfinished.read_text("utf-8"), "utf-8")
        unfinished.unlink()
    return run.returncode == 0


def command(name: str) -> str:
    """Return the command that repeats a part."""
    return f"`python -m {' '.join(PARTS[name])}`"


def machine() -> str:
    """Describe the machine and the interpreter in one line."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text("utf-8"), re.M)
    name = model[1].strip() if model else platform.machine()
    return f"{os.cpu_count()} CPUs ({name}), Linux {platform.release()}, Python {platform.python_version()}"


# -- the document -----------------------------------------------------------------------------------------------------


def filled(document: str, name: str, printed: str) -> str:
    """Return `document` with the output of part `name` between its two marks."""
    heading, _, rest = printed.partition("\n")
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->\n)", re.S)
    assert pattern.search(document), f"the document has no marks for {name}"
    block = f"{SHOWN[name](rest).strip()}\n\n{heading}.\n"
    return pattern.sub(lambda found: f"{found[1]}\n{block}\n{found[2]}", document)


def _fenced(lines: list[str]) -> str:
    return "\n".join(["```text", *lines, "```"])


def _whole(printed: str) -> str:
    return _fenced(textwrap.dedent(printed).strip("\n").splitlines())


def _last(printed: str) -> str:
    return _fenced(printed.strip().splitlines()[-1:])


def _simulation(printed: str) -> str:
    """Return the closing line and a table with the counts by kind."""
    *counted, never, closing = printed.strip().splitlines()
    by_kind: dict[str, list[str]] = {}
    for line in counted:
        name, _, count = line.rpartition(" ")
        kind, _, what = name.strip().partition(" ")
        by_kind.setdefault(kind, []).append(f"{what} {count.strip()}")
    rows = [f"| {shown} | {', '.join(by_kind[kind])} |" for kind, shown in KINDS.items() if kind in by_kind]
    return "\n".join([_fenced([closing, never]), "", "| kind | counts |", "| --- | --- |", *rows])


def _faults(printed: str) -> str:
    outcomes: list[dict[str, Any]] = json.loads(printed)
    verdicts = [each["verdict"] for each in outcomes]
    skipped = ", ".join(each["name"] for each in outcomes if each["verdict"] == "skipped")
    head = [
        "| fault | promise | counts | duration | commit, Python, arguments | requires |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    again = "`python -m tests.proof.faults NAME`, with the arguments of its row, repeats one."
    total = f"{verdicts.count('passed')} of {len(outcomes)} passed, skipped: {skipped or 'none'}. {again}"
    return "\n".join([*head, *map(_row, outcomes), "", total])


def _row(each: dict[str, Any]) -> str:
    arguments = each["command"].partition(f" {each['name']} ")[2]
    cells = [
        f"`{each['name']}`",
        each["promise"],
        _counts(each["counts"]) or each["verdict"],
        f"{each['seconds']:.0f} s",
        f"`{each['commit']}`, {each['python']}" + (f", `{arguments}`" if arguments else ""),
        ", ".join(each["needs"]) or "nothing",
    ]
    return f"| {' | '.join(cells)} |"


def with_rows(document: str, outcomes: list[dict[str, Any]]) -> str:
    """Return `document` with the rows of these faults replaced. Faults that did not pass are left out."""
    for each in outcomes:
        if each["verdict"] == "passed":
            row = re.compile(rf"^\| `{re.escape(each['name'])}` \|.*$", re.M)
            assert len(row.findall(document)) == 1, f"there is no row for {each['name']}"
            document = row.sub(_row(each).replace("\\", r"\\"), document)
    return document


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in counts.items())


SHOWN: Final[dict[str, Callable[[str], str]]] = {
    "world": _whole,
    "simulation": _simulation,
    "cluster": _simulation,
    "cluster-tests": _last,
    "linearizability": _whole,
    "faults": _faults,
    "planted": _last,
}


if __name__ == "__main__":
    sys.exit(main())
