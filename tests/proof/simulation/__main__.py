"""Run simulation seeds and report those that fail.

`python -m tests.proof.simulation --seeds N [--seed K] [--steps M] [--jobs J] [--failing F] [--cluster]`

Stops at the first (or the F-th) failing seed. Exit code 0 if every invariant held in every seed, 1 otherwise.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Final

from tests.proof.simulation.cluster.scenario import draw_cluster
from tests.proof.simulation.expected import never
from tests.proof.simulation.run import SeedOutcome, reduce_failure, simulate
from tests.proof.simulation.scenario import draw

ENOUGH: Final = 1_000  # seeds within which everything must happen
CHUNK: Final = 10
REPORT_EVERY_S: Final = 5.0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proof.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many seeds, from --seed on")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--steps", type=int, default=1_000, help="commands decided in each, before its closing act")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--failing", type=int, default=1, help="go on until so many have failed")
    parser.add_argument("--cluster", action="store_true", help="several nodes on one journal")
    given = parser.parse_args(arguments)
    began_s = time.perf_counter()
    fired: Counter[str] = Counter()
    failed: list[SeedOutcome] = []
    seeds = steps = 0
    fewest = given.steps
    reported_s = began_s
    for outcome in _outcomes(given.seed, given.seeds, given.steps, given.jobs, given.cluster):
        seeds, steps = seeds + 1, steps + outcome.steps
        fired.update(outcome.fired)
        fewest = min(fewest, outcome.steps)
        if outcome.broken is not None:
            failed.append(outcome)
            print(f"seed {outcome.seed} failed: {outcome.broken}", file=sys.stderr)
            if len(failed) == given.failing:
                break
        if (now_s := time.perf_counter()) - reported_s > REPORT_EVERY_S:
            reported_s = now_s
            print(f"{seeds} of {given.seeds} seeds, {steps / (now_s - began_s):,.0f} steps/s", file=sys.stderr)
    if failed:
        print(f"{seeds - len(failed)} seeds held, {len(failed)} failed.")
        for outcome in failed:
            print(f"Seed {outcome.seed}: ", end="")
            print_failure(outcome, given.steps, cluster=given.cluster)
        return 1
    took_s = time.perf_counter() - began_s
    print_counts(fired, cluster=given.cluster)
    missing = never(fired, cluster=given.cluster) if seeds >= ENOUGH else []
    print(f"{seeds} seeds of {fewest:,} steps at least, {steps:,} steps in {took_s:.1f} s, ", end="")
    print(f"{steps / took_s:,.0f} steps/s: every invariant held" + (", but not everything happened" if missing else ""))
    return int(bool(missing) or fewest < given.steps)


def _outcomes(first: int, count: int, steps: int, jobs: int, cluster: bool) -> Iterator[SeedOutcome]:
    play = partial(simulate, steps=steps, cluster=cluster)
    seeds = range(first, first + count)
    if jobs <= 1:
        yield from map(play, seeds)
        return
    with ProcessPoolExecutor(jobs) as pool:
        try:
            yield from pool.map(play, seeds, chunksize=CHUNK)
        except GeneratorExit:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def print_failure(outcome: SeedOutcome, steps: int, *, cluster: bool = False) -> None:
    """Print a failing seed with a minimal set of faults, and the last events of its job."""
    assert outcome.broken is not None
    print(f"{outcome.broken[0]} broke: {outcome.broken[1]}")
    print("Reducing the faults ...", flush=True)
    least = reduce_failure(outcome.seed, steps, outcome.broken, cluster=cluster)
    without = frozenset(least.without)
    plan = draw_cluster(outcome.seed, without)[0] if cluster else draw(outcome.seed, without)
    assert least.broken is not None
    rule, what, job_id = least.broken
    print(f"With only the faults {list(plan.faults)} and the client mishaps {list(plan.mishaps)}:")
    print(f"after {least.steps} steps {rule} broke: {what}" + (f" (job {job_id})" if job_id else ""))
    for line in least.story:
        print(f"  {line}")
    options = f", without=frozenset({least.without})" if least.without else ""
    options += ", cluster=True" if cluster else ""
    print(f"Repeat: simulate({outcome.seed}, {steps}{options}) in tests/proof/simulation/run.py")


def print_counts(fired: Counter[str], *, cluster: bool = False) -> None:
    """Print how often each thing happened, and what never did."""
    width = max(map(len, fired), default=0)
    for name, count in sorted(fired.items()):
        print(f"{name:{width}} {count:>10,}")
    missing = never(fired, cluster=cluster)
    print(f"expected but never happened: {', '.join(missing) or 'nothing'}")


if __name__ == "__main__":
    sys.exit(main())
