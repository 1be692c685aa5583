"""jobd bench: how fast jobd is on this machine. Only the command line and how figures look: jobd/bench/ measures."""

from __future__ import annotations

import os
import platform
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from jobd import __version__
from jobd.cli import exit_codes, terminal
from jobd.cli.group import json_option
from jobd.cli.progress import busy

if TYPE_CHECKING:
    from jobd.bench.scenarios import Scenario, Size

_BARS: Final = "▁▂▃▄▅▆▇█"
LARGE: Final = ((1_000, 0), (100_000, 0), (1_000_000, 0), (1_000_000, 1_000_000))


@click.command()
@click.argument("names", nargs=-1, metavar="[SCENARIO]...")
@click.option("--seconds", type=click.FloatRange(0.05), default=5.0, show_default=True, help="Of each load.")
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Of which the median is shown.")
@click.option("--connections", type=click.IntRange(1), default=16, show_default=True)
@click.option("--rate", type=click.FloatRange(1), default=500.0, show_default=True, help="Lifecycles a second, fixed.")
@click.option("--live", type=click.IntRange(1_000), default=100_000, show_default=True, help="Of memory and startup.")
@click.option("--large", is_flag=True, help="A backlog of up to a million live and a million finished jobs: minutes.")
@click.option("--dir", "place", type=click.Path(exists=True, file_okay=False, path_type=Path), help="On which disk.")
@json_option
def bench(
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
    """Measure how fast jobd is here.

    \b
    lifecycle   create, claim, complete, one request each
    batch       bulks and claims of a hundred
    stream      lifecycles over streams of commands
    contention  many starts on one job
    progress    progress reports of jobs that are held
    mixed       lifecycles beside reads, a polling dashboard and cleanup passes
    latency     a lifecycle on one connection, and at a fixed rate
    backlog     a claim among many jobs
    lag         how long a request waits beside passes, deletion, backup, history
    startup     a start with many live jobs
    memory      memory for each live job
    soak        create, complete, delete: does the database grow? (--seconds 600)

    Without names all of them. Each has a daemon of its own in a new directory, which is removed; the load comes from
    another process. Every answer comes after its fsync, so the disk matters: --dir says which.
    """
    from jobd.bench.scenarios import SCENARIOS, Size

    if unknown := [name for name in names if name not in SCENARIOS]:
        raise click.UsageError(f"no scenario is called {unknown[0]!r}. There are: {', '.join(SCENARIOS)}.")
    size = Size(seconds, connections, rate, live)
    if large:
        size = Size(seconds, connections, rate, live, LARGE)
    found = {}
    for scenario in [SCENARIOS[name] for name in dict.fromkeys(names or SCENARIOS)]:
        found[scenario.name] = _figures(scenario, size, runs, place)
        if not as_json:
            _show(scenario, found[scenario.name])
    if as_json:
        terminal.emit_json({"version": __version__, "machine": _machine(), "scenarios": found})
    else:
        terminal.emit(", ".join(f"{name} {value}" for name, value in _machine().items()))
    return exit_codes.DONE


def _figures(scenario: Scenario, size: Size, runs: int, place: Path | None) -> dict[str, Any]:
    """Median, smallest and largest of each figure."""
    from jobd.bench.scenarios import measured
    from jobd.bench.spread import over_runs
    from jobd.bench.stage import BenchFailed

    runs = 1 if scenario.once else runs
    found = []
    for number in range(1, runs + 1):
        with busy(f"{scenario.name}: {scenario.says} ({number} of {runs})"):
            try:
                found.append(measured(scenario, size, place))
            except BenchFailed as why:
                raise exit_codes.Problem(f"{scenario.name}: {why}") from None
    return {"runs": runs, **over_runs(found)}


def _show(scenario: Scenario, figures: dict[str, Any]) -> None:
    terminal.emit(f"{scenario.name}: {scenario.says}")
    rows = [(name, *map(_number, (each["median"], each["min"], each["max"]))) for name, each in _flat(figures)]
    terminal.table((f"of {figures['runs']}", "median", "min", "max"), rows)
    for name, values in figures.get("series", {}).items():
        terminal.emit(f"{name}  {_drawn(values)}")


def _drawn(values: Sequence[float]) -> str:
    """A series as a line of bars, from nothing to its largest value."""
    most = max(*values, 1e-9)
    return "".join(_BARS[min(int(value / most * len(_BARS)), len(_BARS) - 1)] for value in values)


def _flat(figures: dict[str, Any], above: str = "") -> Iterator[tuple[str, dict[str, float]]]:
    for name, each in figures.items():
        if isinstance(each, dict):
            if "median" in each:
                yield f"{above}{name}", each
            else:
                yield from _flat(each, f"{above}{name} ")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _machine() -> dict[str, Any]:
    return {"Python": platform.python_version(), "SQLite": sqlite3.sqlite_version, "CPUs": os.cpu_count()}
