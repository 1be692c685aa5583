"""Profile the daemon under load with a sampling profiler: `python -m tests.benchmarks.profile` prints JSON.

Requires py-spy (`pip install py-spy`; it may need root) on the PATH. Samples are taken of the thread that holds the
GIL, because the GIL is the bottleneck; the work of SQLite and the disk outside of it is not sampled. A sample counts
for the step whose package contains jobd's innermost function, together with the library code that it calls. `held` is
the share of time in which some thread holds the GIL, `cores` the CPU time of the event loop and of the storage thread.
`--sources DIR` profiles the jobd of another tree, such as an older version.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from tests import ROOT
from tests.benchmarks.stage import BenchDaemon

RATE: Final = 200  # per second
TOP: Final = 25
# A frame belongs to the step of its package, or of its module if that is listed.
STEPS: Final = {
    "parse and send": "http/protocol http/parser http/worker_request http/server http/admin_listener",
    "route, authenticate, decode": "http api",
    "mailbox and batches": "engine",
    "write and commit": "storage model/storage",
    "encode responses": "http/response core/views model/responses",
    "log, events, figures": "monitoring logging engine/event_feed engine/change_watchers core/stats",
    "decide": "core model",
}
STEP_OF: Final = {place: step for step, places in STEPS.items() for place in places.split()}
LOOP: Final = "the event loop itself"
_FRAME: Final = re.compile(r"^(?P<name>.+) \((?P<file>[^:()]+)(:\d+)?\)$")


def profile(kind: str, seconds: float, sources: Path) -> tuple[list[str], dict[str, Any]]:
    """Return stacks with their counts as py-spy writes them, and figures of a run without the profiler."""
    with tempfile.TemporaryDirectory() as directory:
        stage = BenchDaemon(None)
        with contextlib.chdir(sources), stage:
            os.chdir(ROOT)  # the daemon runs from the other tree, the load from this one
            stage.load(kind, seconds=1.0)  # warm up
            output = Path(directory) / "stacks"
            words = ["py-spy", "record", "--pid", str(stage.pid), "--duration", f"{seconds:.0f}"]
            words += ["--rate", str(RATE), "--gil", "--format", "raw", "--output", str(output)]
            with ThreadPoolExecutor(1) as beside:
                load = beside.submit(stage.load, kind, seconds=seconds + 3.0)
                time.sleep(1.0)  # the load starts before the first sample and ends after the last one
                subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
                load.result()
            # In a separate run, because the profiler stops the daemon for each sample.
            before = _cpu_s(stage.pid)
            figures = stage.load(kind, seconds=seconds)
            cores = _shares(stage.pid, before, _cpu_s(stage.pid), seconds)
            return output.read_text().splitlines(), {"per_s": round(figures["lifecycles_per_s"]), "cores": cores}


def _cpu_s(pid: int) -> dict[int, float]:
    """Return the CPU seconds of each thread of a process."""
    tasks = Path(f"/proc/{pid}/task")
    return {int(task.name): int((task / "schedstat").read_text().split()[0]) / 1e9 for task in tasks.iterdir()}


def _shares(pid: int, before: dict[int, float], after: dict[int, float], passed_s: float) -> dict[str, float]:
    """Return the cores used by the event loop, by the busiest other thread (storage), and by all others."""
    took = {task: (cpu_s - before.get(task, 0.0)) / passed_s for task, cpu_s in after.items()}
    loop = took.pop(pid)
    store, *others = sorted(took.values(), reverse=True)
    return {"loop": round(loop, 3), "store": round(store, 3), "others": round(sum(others), 3)}


def frames(stack: str) -> Iterator[tuple[str, str]]:
    """Yield name and file of each function, innermost first."""
    for frame in reversed(stack.split(";")):
        if (match := _FRAME.match(frame)) is not None:
            yield match["name"], match["file"]


def place_of(stack: str) -> tuple[str, str]:
    """Return the step, and jobd's innermost function with the library function below it."""
    inner = ""
    for name, file in frames(stack):
        path = Path(file)
        if "jobd" in path.parts[:-1] and "site-packages" not in path.parts:
            package = path.parts[path.parts.index("jobd") + 1 : -1]
            place = "/".join([*package[:1], path.stem])
            step = STEP_OF.get(place) or STEP_OF.get(place.partition("/")[0], "the rest")
            return step, f"{place}.{name}" + (f" > {inner}" if inner else "")
        inner = f"{path.stem}.{name}"
    return LOOP, inner


def summed(lines: list[str]) -> dict[str, Any]:
    steps: Counter[str] = Counter()
    modules: Counter[str] = Counter()
    functions: Counter[str] = Counter()
    for line in lines:
        stack, _, count = line.rpartition(" ")
        step, function = place_of(stack)
        steps[step] += int(count)
        modules[function.partition(".")[0]] += int(count)
        functions[function] += int(count)
    whole = steps.total()
    return {
        "samples": whole,
        "percent": {step: round(100 * count / whole, 1) for step, count in steps.most_common()},
        "modules": {name: round(100 * count / whole, 1) for name, count in modules.most_common(TOP)},
        "functions": {name: round(100 * count / whole, 1) for name, count in functions.most_common(TOP)},
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--kind", default="lifecycle", help="the load, as in load.py")
    options.add_argument("--seconds", type=float, default=10.0)
    options.add_argument("--sources", type=Path, default=ROOT)
    chosen = options.parse_args()
    if shutil.which("py-spy") is None:
        sys.exit("py-spy is not installed: pip install py-spy")
    stacks, figures = profile(chosen.kind, chosen.seconds, chosen.sources)
    found = summed(stacks)
    held = {"held": round(found["samples"] / RATE / chosen.seconds, 3)}
    print(json.dumps({**figures, **held, **found}, indent=1))


if __name__ == "__main__":
    main()
