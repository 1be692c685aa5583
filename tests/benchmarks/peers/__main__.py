"""Compare jobd with other queues on the same disk.

`python -m tests.benchmarks.peers [PEER ...] [--runs 3] [--seconds 5] [--json]`

Each run measures all queues in turn, so that a busy minute affects them equally. Shown are medians, and their ratio to
the best other durable queue.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from msgspec import Struct

from tests.benchmarks.peers import beanstalkd, huey, postgres, redis
from tests.benchmarks.peers.server import Missing
from tests.benchmarks.stage import BenchDaemon

Measure = Callable[[Path, int, float], float]


class Peer(Struct, frozen=True):
    """A queue to measure. `is_durable`: a response means that the change is on disk."""

    label: str
    measure: Measure
    is_durable: bool = True
    is_ours: bool = False


def _ours(kind: str) -> Measure:
    def measure(directory: Path, connections: int, seconds: float) -> float:
        with BenchDaemon(directory) as stage:
            return float(stage.load(kind, connections=connections, seconds=seconds)["lifecycles_per_s"])

    return measure


PEERS: Final = {
    "jobd": Peer("jobd, one command a request", _ours("lifecycle"), is_ours=True),
    "jobd-stream": Peer("jobd, streams of commands", _ours("stream"), is_ours=True),
    "beanstalkd": Peer("beanstalkd -f0", beanstalkd.durable),
    "postgres": Peer("PostgreSQL SKIP LOCKED, asyncpg", postgres.measure),
    "bullmq": Peer("BullMQ, Redis appendfsync always", redis.measure),
    "huey": Peer("Huey on SQLite, fsync", huey.measure),
    "beanstalkd-memory": Peer("beanstalkd without binlog", beanstalkd.in_memory, is_durable=False),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.peers", description=__doc__)
    parser.add_argument("peers", nargs="*", metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--dir", default=None, help="directory on the disk to measure (default: temporary files)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.peers) - PEERS.keys():
        parser.error(f"unknown peers: {', '.join(sorted(unknown))}")
    chosen = {name: PEERS[name] for name in options.peers or PEERS}
    rates: dict[str, list[float]] = {name: [] for name in chosen}
    missing: dict[str, str] = {}
    for number in range(options.runs):
        for name, peer in chosen.items():
            if name in missing:
                continue
            print(f"{name} ({number + 1} of {options.runs})", file=sys.stderr)
            with tempfile.TemporaryDirectory(prefix="jobd-peer-", dir=options.dir) as place:
                try:
                    rates[name].append(peer.measure(Path(place), options.connections, options.seconds))
                except Missing as what:
                    missing[name] = str(what)
    return report(chosen, rates, missing, as_json=options.json)


def report(chosen: dict[str, Peer], rates: dict[str, list[float]], missing: dict[str, str], *, as_json: bool) -> int:
    """Print the table. Return 1 if a queue could not be measured."""
    medians = {name: statistics.median(found) for name, found in rates.items() if found}
    others = [medians[name] for name in medians if chosen[name].is_durable and not chosen[name].is_ours]
    best = max(others, default=None)
    shown = {
        name: {
            "lifecycles_per_s": round(median),
            "min": round(min(rates[name])),
            "max": round(max(rates[name])),
            "is_durable": chosen[name].is_durable,
            "to_best_durable_other": None if best is None else round(median / best, 2),
        }
        for name, median in medians.items()
    }
    if as_json:
        print(json.dumps({"peers": shown, "missing": missing}, indent=1))
    else:
        print("| queue | lifecycles/s | min to max | to the best durable other |\n| --- | --- | --- | --- |")
        for name, each in shown.items():
            durable = "" if each["is_durable"] else " (not durable)"
            spread = f"{each['min']:,} to {each['max']:,}"
            ratio = each["to_best_durable_other"]
            print(f"| {chosen[name].label}{durable} | {each['lifecycles_per_s']:,} | {spread} | {ratio} |")
        for what in missing.values():
            print(what, file=sys.stderr)
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
