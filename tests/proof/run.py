"""Run the proofs and write their output into the documents.

`python -m tests.proof.run [PART ...] [--out DIR] [--write]`

Each part is a program of its own (see PARTS). What one has printed for this version is kept in DIR and not run again:
an interrupted run goes on. `--write` fills docs/RELIABILITY.md with what is there; every figure comes with its commit,
command and interpreter. `--rows FILE` puts single faults there, as printed by
`python -m tests.proof.faults NAME ... --json`. Exit code 1 if one failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tests import ROOT
from tests.proof.faults.frame import commit

DOCUMENT: Final = ROOT / "docs/RELIABILITY.md"
OUT: Final = ROOT / "build/proof"

# What each part runs, as `make NAME` does.
PARTS: Final[dict[str, list[str]]] = {
    "world": ["tests.proof.small_world"],
    "simulation": ["tests.proof.simulation", "--seeds", "20000", "--jobs", "2"],
    "linearizability": ["tests.proof.linearizability", "--histories", "500"],
    "faults": ["tests.proof.faults", "--report", "--json"],
    "planted": ["tests.proof.planted", "--jobs", "2"],
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proof.run", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=OUT, help="what the parts have printed, by version")
    parser.add_argument("--write", action="store_true", help="put what is there into docs/RELIABILITY.md")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="put these faults into docs/RELIABILITY.md")
    given = parser.parse_args(arguments)
    if given.rows:
        outcomes = json.loads(given.rows.read_text("utf-8"))
        broken = [each["name"] for each in outcomes if each["verdict"] != "passed"]
        DOCUMENT.write_text(with_rows(DOCUMENT.read_text("utf-8"), outcomes), "utf-8")
        print(f"not put there: {', '.join(broken)}" if broken else "all of them are there", file=sys.stderr)
        return int(bool(broken))
    if unknown := [name for name in given.parts if name not in PARTS]:
        parser.error(f"no parts: {', '.join(unknown)}")
    out: Path = given.out / commit()
    out.mkdir(parents=True, exist_ok=True)
    failed = [] if given.write and not given.parts else [name for name in given.parts or PARTS if not prove(name, out)]
    if given.write:
        text = DOCUMENT.read_text("utf-8")
        for name in PARTS:
            if (out / f"{name}.txt").exists():
                text = filled(text, name, (out / f"{name}.txt").read_text("utf-8"))
        DOCUMENT.write_text(text, "utf-8")
    print(f"failed: {', '.join(failed)}" if failed else f"all that was asked for is in {out}", file=sys.stderr)
    return int(bool(failed))


def prove(name: str, out: Path) -> bool:
    """Run one part, unless its output is there; whether all that it shows holds. A check that is skipped does not."""
    kept = out / f"{name}.txt"
    if kept.exists():
        return True
    print(f"{name} ...", file=sys.stderr, flush=True)
    began_s = time.monotonic()
    unfinished = out / f"{name}.unfinished"
    with unfinished.open("w") as told:
        run = subprocess.run(
            [sys.executable, "-m", *PARTS[name]], cwd=ROOT, stdout=told, env=os.environ | {"CI": "true"}, check=False
        )
    print(f"{name}: {run.returncode} after {time.monotonic() - began_s:.0f} s", file=sys.stderr, flush=True)
    if run.returncode == 0:
        heading = f"{time.strftime('%Y-%m-%d')}, commit `{commit()}`, {command(name)}, {machine()}\n"
        kept.write_text(heading + unfinished.read_text("utf-8"), "utf-8")
        unfinished.unlink()
    return run.returncode == 0


def command(name: str) -> str:
    """What runs a part again."""
    return f"`python -m {' '.join(PARTS[name])}`"


def machine() -> str:
    """The machine and the interpreter, in one line."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text("utf-8"), re.M)
    name = model[1].strip() if model else platform.machine()
    return f"{os.cpu_count()} CPUs ({name}), Linux {platform.release()}, Python {platform.python_version()}"


# -- the document -----------------------------------------------------------------------------------------------------


def filled(document: str, name: str, printed: str) -> str:
    """`document` with what `name` has printed between its two marks."""
    heading, _, rest = printed.partition("\n")
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->\n)", re.S)
    assert pattern.search(document), f"there is no place for {name}"
    block = f"{SHOWN[name](rest).strip()}\n\n{heading}.\n"
    return pattern.sub(lambda found: f"{found[1]}\n{block}\n{found[2]}", document)


def _fenced(lines: list[str]) -> str:
    return "\n".join(["```text", *lines, "```"])


def _whole(printed: str) -> str:
    return _fenced(printed.strip().splitlines())


def _last(printed: str) -> str:
    return _fenced(printed.strip().splitlines()[-1:])


def _simulation(printed: str) -> str:
    """The closing line, then how often each fault and mishap came, each command, event and refusal."""
    *counted, never, closing = printed.strip().splitlines()
    by_kind: dict[str, list[str]] = {}
    for line in counted:
        name, _, count = line.rpartition(" ")
        kind, _, what = name.strip().partition(" ")
        by_kind.setdefault(kind, []).append(f"{what} {count.strip()}")
    rows = [f"| {kind} | {', '.join(by_kind[kind])} |" for kind in ("fault", "mishap", "event", "command", "refusal")]
    return "\n".join([_fenced([closing, never]), "", "| what | how often |", "| --- | --- |", *rows])


def _faults(printed: str) -> str:
    outcomes: list[dict[str, Any]] = json.loads(printed)
    verdicts = [each["verdict"] for each in outcomes]
    skipped = ", ".join(each["name"] for each in outcomes if each["verdict"] == "skipped")
    head = [
        "| fault | what is promised | what was counted | took | commit, Python | skipped without |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    again = "`python -m tests.proof.faults NAME` makes one again."
    total = f"{verdicts.count('passed')} of {len(outcomes)} passed, skipped: {skipped or 'none'}. {again}"
    return "\n".join([*head, *map(_row, outcomes), "", total])


def _row(each: dict[str, Any]) -> str:
    cells = [
        f"`{each['name']}`",
        each["promise"],
        _counts(each["counts"]) or each["verdict"],
        f"{each['seconds']:.0f} s",
        f"`{each['commit']}`, {each['python']}",
        ", ".join(each["needs"]) or "nothing",
    ]
    return f"| {' | '.join(cells)} |"


def with_rows(document: str, outcomes: list[dict[str, Any]]) -> str:
    """`document` with the rows of these faults in place of those that it has. Only what passed is put there."""
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
    "linearizability": _whole,
    "faults": _faults,
    "planted": _last,
}


if __name__ == "__main__":
    sys.exit(main())
