"""Benchmarks of jobd on this machine: `python -m tests.benchmarks --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click

from jobd import __version__
from jobd.cli import exit_codes, terminal
from jobd.cli.daemon.bench import machine, over_runs, show
from jobd.cli.params import json_option
from jobd.cli.progress import busy
from tests.benchmarks.scenarios import SCENARIOS, BenchmarkScenario, Size, measure
from tests.benchmarks.stage import BenchFailed

_BARS: Final = "▁▂▃▄▅▆▇█"
LARGE: Final = ((1_000, 0), (100_000, 0), (1_000_000, 0), (1_000_000, 1_000_000))


@click.command()
@click.argument("names", nargs=-1, metavar="[SCENARIO]...", type=click.Choice(list(SCENARIOS)))
@click.option("--seconds", type=click.FloatRange(0.05), default=5.0, show_default=True, help="Duration of one load.")
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Number of runs of each scenario.")
@click.option("--connections", type=click.IntRange(1), default=16, show_default=True, help="Concurrent connections.")
@click.option("--rate", type=click.FloatRange(1), default=500.0, show_default=True, help="Lifecycles per second.")
@click.option("--live", type=click.IntRange(1_000), default=100_000, show_default=True, help="Live jobs.")
@click.option("--large", is_flag=True, help="Up to a million live and a million finished jobs; takes minutes.")
@click.option(
    "--dir", "place", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Where to create databases."
)
@json_option
def benchmarks(
    names: tuple[str, ...],
    seconds: float,
    runs: int,
    connections: int,
    rate: float,
    live: int,
    large: bool,
    place: Path | None,
    as_json: bool,
) -> int:
    """Measure the throughput, latency, memory and startup of jobd on this machine.

    \b
    lifecycle   create, claim and complete jobs, one request each
    batch       bulk creates and claims of a hundred
    stream      lifecycles over command streams
    contention  many starts of one job
    progress    progress reports
    mixed       lifecycles during reads, a polling dashboard and cleanup runs
    latency     a lifecycle on one connection, and at a fixed rate
    backlog     a claim among many jobs
    lag         the latency of a request during cleanup, deletion, backup and reads of history
    startup     a start with many live jobs
    memory      memory of a live job
    soak        create, complete, delete: does the database grow? (--seconds 600)

    Runs all of them unless some are named. Each run starts its own daemon with a new database, which is removed
    afterwards. The load comes from another process.
    """
    size = Size(seconds, connections, rate, live)
    if large:
        size = Size(seconds, connections, rate, live, LARGE)
    found = {}
    for scenario in [SCENARIOS[name] for name in dict.fromkeys(names or SCENARIOS)]:
        found[scenario.name] = _figures(scenario, size, runs, place)
        if not as_json:
            _show(scenario, found[scenario.name])
    if as_json:
        terminal.emit_json({"version": __version__, "machine": machine(), "scenarios": found})
    else:
        terminal.emit(", ".join(f"{name} {value}" for name, value in machine().items()))
    return exit_codes.DONE


def _figures(scenario: BenchmarkScenario, size: Size, runs: int, place: Path | None) -> dict[str, Any]:
    """Return the median, minimum and maximum of each figure."""
    runs = 1 if scenario.once else runs
    found = []
    for number in range(1, runs + 1):
        with busy(f"{scenario.name}: {scenario.description} ({number} of {runs})"):
            try:
                found.append(measure(scenario, size, place))
            except BenchFailed as why:
                raise exit_codes.CliError(f"{scenario.name}: {why}") from None
    return {"runs": runs, **over_runs(found)}


def _show(scenario: BenchmarkScenario, figures: dict[str, Any]) -> None:
    terminal.emit(f"{scenario.name}: {scenario.description}")
    show(figures)
    for name, values in figures.get("series", {}).items():
        terminal.emit(f"{name}  {_bars(values)}")


def _bars(values: Sequence[float]) -> str:
    """Draw a series as a line of bars, from zero to its largest value."""
    most = max(*values, 1e-9)
    return "".join(_BARS[min(int(value / most * len(_BARS)), len(_BARS) - 1)] for value in values)


if __name__ == "__main__":
    sys.exit(exit_codes.run(benchmarks, "python -m tests.benchmarks"))
