"""Record histories of a real daemon and check each job's.

`python -m tests.proof.linearizability --histories N [--seed K]`

Each history is also mutated so that no order explains it; the checker must reject every mutant. Exit code 0 if every
history was explained and every mutant rejected. Otherwise it is 1, and the history is printed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from random import Random

from msgspec import Struct, field

from tests.proof.linearizability.history import overlapping
from tests.proof.linearizability.model import HistoryConditions
from tests.proof.linearizability.mutate import KINDS, mutants
from tests.proof.linearizability.record import Recording, record_history, shared_daemon
from tests.proof.linearizability.report import describe, line
from tests.proof.linearizability.search import judge

WANTED_SHARE = 0.30
WANTED_CLIENTS = 4
ENOUGH = 20  # histories within which every kind of mutant must occur


class CheckResults(Struct):
    """The results of a run. `broken` describes the first unexplained history or accepted mutant."""

    histories: int = 0
    jobs: int = 0
    operations: int = 0
    overlapping: int = 0
    least_share: float = 1.0  # the lowest of one history
    unknown: int = 0
    clients: Counter[int] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    responses: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Return the share of operations that overlap in time with another one on the same job."""
        return self.overlapping / max(self.operations, 1)

    def shortcomings(self) -> list[str]:
        """Return why the run proves too little."""
        found = []
        if self.share < WANTED_SHARE:
            found.append(f"Only {self.share:.1%} of the operations overlap: the clients did not contend.")
        if min(self.clients, default=0) < WANTED_CLIENTS:
            found.append(f"A history had fewer than {WANTED_CLIENTS} clients.")
        if self.histories >= ENOUGH and (never := [kind for kind in KINDS if not self.rejected[kind]]):
            found.append(f"No mutant of these kinds occurred: {', '.join(never)}.")
        return found

    def add(self, gathered: Recording) -> None:
        """Check one history and its mutants."""
        history = gathered.history
        self.histories += 1
        self.operations += len(history.operations)
        together = overlapping(history.operations)
        self.overlapping += together
        self.least_share = min(self.least_share, together / max(len(history.operations), 1))
        self.unknown += sum(each.response is None for each in history.operations)
        self.clients[len({each.client for each in history.operations})] += 1
        self.faults.update(gathered.faults)
        for each in history.operations:
            self.responses[each.response.code if each.response else "(lost)"] += 1
            self.responses["(after a stall)"] += bool(each.response and each.response.seen.get("stalls"))
        for job in history.terms:
            self._judge(gathered, job)

    def _judge(self, gathered: Recording, job: str) -> None:
        history = gathered.history
        world = HistoryConditions(history.terms[job], tuple(history.outages))
        mine = history.of(job)
        self.jobs += 1
        verdict = judge(mine, world)
        if not verdict.is_explained:
            self.broken = [f"No order explains history {gathered.number}, job {job}:", *describe(mine, world, verdict)]
            return
        for kind, mutant in mutants(mine, world, Random(f"{gathered.number}-{job}")):
            verdict = judge(mutant, world)
            if verdict.is_explained:
                first_ns = min(each.call_ns for each in mutant)
                order = [line(each, first_ns) for each in verdict.order]
                self.broken = [f"The mutant {kind} of history {gathered.number}, job {job}, was accepted:", *order]
                return
            self.rejected[kind] += 1


def lines(figures: CheckResults, took_s: float) -> Iterator[str]:
    """Format the results."""
    clients = f"{min(figures.clients)} to {max(figures.clients)} clients"
    yield f"{figures.histories} histories of {clients}, {figures.jobs} jobs"
    overlap = f"{figures.share:.1%} of them overlapping (at least {figures.least_share:.1%} in each history)"
    yield f"{figures.operations:,} operations, {overlap}, {figures.unknown:,} unknown outcomes"
    for title, counts in (("faults", figures.faults), ("responses", figures.responses)):
        yield f"{title}: " + ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
    yield "mutants rejected: " + ", ".join(f"{kind} {figures.rejected[kind]:,}" for kind in KINDS)
    yield f"{figures.jobs} jobs explained, {figures.rejected.total():,} mutants rejected, in {took_s:.1f} s"


def run(histories: int, seed: int) -> CheckResults:
    """Check this many histories, or stop at the first broken one."""
    figures = CheckResults()
    with shared_daemon() as daemon:
        for number in range(histories):
            figures.add(record_history(daemon, seed, number))
            if figures.broken:
                break
    return figures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proof.linearizability", description=__doc__)
    parser.add_argument("--histories", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="for what the clients send; their timing is not seeded")
    given = parser.parse_args(arguments)
    began_s = time.perf_counter()
    figures = run(given.histories, given.seed)
    print("\n".join(lines(figures, time.perf_counter() - began_s)))
    figures.broken += figures.shortcomings()
    print("\n".join(figures.broken), end="\n" if figures.broken else "")
    return 1 if figures.broken else 0


if __name__ == "__main__":
    sys.exit(main())
