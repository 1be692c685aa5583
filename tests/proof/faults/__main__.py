"""Run faults: `python -m tests.proof.faults NAME ... [--rounds N]` runs some, `--report` runs all.

Exit code 0 if every check passed, 1 otherwise. With CI set, a skipped check counts as failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections import Counter

from tests.proof.faults.harness import CheckOutcome, checks, run_check


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    known = checks(options.names)
    unknown = [name for name in options.names if name not in known]
    if unknown or not (options.names or options.report):
        print(
            f"unknown: {', '.join(unknown)}" if unknown else "name some of these, or ask for --report", file=sys.stderr
        )
        print("\n".join(f"  {check.name:22} {check.promise}" for check in known.values()), file=sys.stderr)
        return 2
    outcomes = []
    for check in [known[name] for name in options.names] or known.values():
        print(f"{check.name} ...", file=sys.stderr, flush=True)
        rounds = options.rounds or (max(check.few, 1) if options.few else check.rounds)
        outcomes.append(run_check(check, rounds, timed=not options.few))
    print(
        json.dumps([dataclasses.asdict(outcome) for outcome in outcomes], indent=1)
        if options.json
        else _summary(outcomes)
    )
    broken = {"FAILED", "skipped"} if os.environ.get("CI") else {"FAILED"}
    return int(any(outcome.verdict in broken for outcome in outcomes))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.proof.faults", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="without one, and without --report: list them")
    parser.add_argument("--report", action="store_true", help="all of them")
    parser.add_argument("--rounds", type=int, default=0, help="how often a fault is made (default: each check's own)")
    parser.add_argument("--few", action="store_true", help="few rounds, and no deadlines: as in the test suite")
    parser.add_argument("--json", action="store_true", help="for programs")
    return parser


def _summary(outcomes: list[CheckOutcome]) -> str:
    lines = [f"commit {outcomes[0].commit}, Python {outcomes[0].python}"]
    for outcome in outcomes:
        lines.append(f"{outcome.verdict:8} {outcome.name:22} {outcome.seconds:7.1f} s  {outcome.promise}")
        lines.append(f"{'':9}{outcome.command}; needs: {', '.join(outcome.needs) or 'nothing'}")
        counts = ", ".join(f"{count:,} {what}" for what, count in outcome.counts.items())
        lines += [f"{'':9}{line}" for line in (counts, *outcome.story.splitlines()) if line]
    verdicts = Counter(outcome.verdict for outcome in outcomes)
    lines.append(", ".join(f"{verdicts[name]} {name}" for name in ("passed", "FAILED", "skipped")))
    if skipped := [outcome.name for outcome in outcomes if outcome.verdict == "skipped"]:
        lines[-1] += f": {', '.join(skipped)}"
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
