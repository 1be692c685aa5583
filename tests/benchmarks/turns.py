"""Measure the steps of one turn of the actor under load: `python -m tests.benchmarks.turns` prints JSON.

Shown are the mean microseconds of each step without the first turns, the part of it in which the loop was on a
processor, and how many turns had each number of commands. The daemon is the real one, with two of its functions
wrapped at the start. `--commit` is its commit mode.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Final, get_args

from jobd.storage.commit_mode import CommitSetting
from tests.benchmarks.stage import BenchDaemon

SKIPPED: Final = 4  # the first quarter of the turns, while the daemon warms up
STEPS: Final = ("decide", "gather", "write", "rest")  # in the order of a turn
OUTPUT: Final = "TURNS_OUTPUT"  # environment variable with the path of the output
AROUND: Final = """
import atexit, json, os, sys
from time import perf_counter as wall, thread_time as busy

def around():
    from jobd.engine.batch import Decider
    from jobd.storage.store import Store

    decide, write = Decider.decide, Store.write
    turns, marks = [], []

    def mark():
        marks.append((wall(), busy()))

    def decided(self, *args, **kw):
        if len(marks) == 4:
            turns.append([*marks, (wall(), busy()), commands[0]])
        marks.clear()
        mark()
        plan = decide(self, *args, **kw)
        commands[0] = len(plan.replies)
        mark()
        return plan

    async def written(self, batch):
        mark()
        try:
            return await write(self, batch)
        finally:
            mark()

    commands = [0]
    Decider.decide, Store.write = decided, written
    atexit.register(lambda: open(os.environ["TURNS_OUTPUT"], "w").write(json.dumps(turns)))

if "serve" in sys.orig_argv:
    around()
"""


def measure(kind: str, seconds: float, connections: int, commit: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "sitecustomize.py").write_text(AROUND)
        output = Path(directory) / "turns"
        os.environ |= {"PYTHONPATH": directory, OUTPUT: str(output)}
        with BenchDaemon(None, {"JOBD_STORE_COMMIT": commit}) as stage:
            stage.load(kind, seconds=1.0, connections=connections)
            figures = stage.load(kind, seconds=seconds, connections=connections)
            stage.stop()
        turns = json.loads(output.read_text())
        turns = turns[len(turns) // SKIPPED :]
    return {"lifecycles_per_s": round(figures["lifecycles_per_s"]), **means(turns)}


def means(turns: list[Any]) -> dict[str, Any]:
    """Return the mean duration of each step, and the part of it in which the loop was on a processor."""
    passed, busy = ([0.0] * len(STEPS) for _ in range(2))
    for *marks, _ in turns:
        for step in range(len(STEPS)):
            passed[step] += marks[step + 1][0] - marks[step][0]
            busy[step] += marks[step + 1][1] - marks[step][1]
    count = len(turns)
    return {
        "turns": count,
        "commands_per_turn": round(sum(turn[-1] for turn in turns) / count, 1),
        "percent_of_turns": {
            str(size): round(100 * turns_of / count, 1)
            for size, turns_of in sorted(Counter(turn[-1] for turn in turns).items())
        },
        "us": {step: round(1e6 * each / count) for step, each in zip(STEPS, passed, strict=True)},
        "loop_busy_us": {step: round(1e6 * each / count) for step, each in zip(STEPS, busy, strict=True)},
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kind", default="lifecycle", help="the load, as in load.py")
    options.add_argument("--seconds", type=float, default=5.0)
    options.add_argument("--connections", type=int, default=16)
    options.add_argument("--commit", default="auto", choices=get_args(CommitSetting))
    chosen = options.parse_args()
    print(json.dumps(measure(chosen.kind, chosen.seconds, chosen.connections, chosen.commit), indent=1))


if __name__ == "__main__":
    main()
