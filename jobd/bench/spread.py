"""What many measurements come to: percentiles of times, medians of runs. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Final

SHOWN: Final = {"p50_ms": 50.0, "p90_ms": 90.0, "p99_ms": 99.0, "p99_9_ms": 99.9}


def percentiles(times_s: Sequence[float]) -> dict[str, float]:
    """The times (in s) that so many of a hundred do not exceed, in ms, and the longest. Needs at least one."""
    ordered = sorted(times_s)
    found = {name: _at(ordered, percent) for name, percent in SHOWN.items()} | {"max_ms": ordered[-1]}
    return {name: round(seconds * 1000, 3) for name, seconds in found.items()}


def _at(ordered: Sequence[float], percent: float) -> float:
    """The smallest of `ordered` that at least `percent` of them do not exceed."""
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(int(rank), 1) - 1]


def over_runs(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For each figure that all runs have: median, smallest and largest. Figures of figures are kept apart, of series
    that of the first run."""
    found: dict[str, Any] = {}
    for name, first in runs[0].items():
        values = [run[name] for run in runs]
        if isinstance(first, dict):
            found[name] = over_runs(values)
        elif isinstance(first, list):
            found[name] = first  # a series is that of one run
        else:
            found[name] = {"median": _rounded(statistics.median(values)), "min": min(values), "max": max(values)}
    return found


def _rounded(value: float) -> float:
    """As exact as it is worth."""
    return round(value) if value >= 1000 else round(value, 3)
