"""`jobd bench`: measure the throughput and latency of jobd on this machine."""

from __future__ import annotations

import os
import platform
import sqlite3
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

import click

from jobd import __version__
from jobd.cli import exit_codes, terminal
from jobd.cli.params import json_option, number_option
from jobd.cli.progress import busy

SCENARIOS: Final = {
    "lifecycle": "create, claim and complete jobs, one request each",
    "claim": "claim a job on one connection",
}


@click.command()
@click.argument("names", nargs=-1, metavar="[SCENARIO...]", type=click.Choice(list(SCENARIOS)))
@number_option("--seconds", "Duration of one run.", 5.0, kind=click.FloatRange(0.05))
@number_option("--runs", "Number of runs of each scenario.", 3)
@number_option("--connections", "Number of connections of lifecycle.", 16)
@click.option(
    "--dir",
    "directory",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Create the database in this directory, to measure its disk.",
)
@json_option
def bench(
    names: tuple[str, ...], seconds: float, runs: int, connections: int, directory: Path | None, as_json: bool
) -> int:
    """Measure the throughput and latency of jobd on this machine.

    \b
    lifecycle   create, claim and complete jobs, one request each
    claim       claim a job on one connection

    Without SCENARIO, runs both. Each run starts its own daemon with the default configuration and a new
    database, which is removed afterwards. A separate process generates the load. Every response waits for an fsync, so
    the results depend on the disk: choose it with --dir. The commit mode is where commits ran at the end of each run:
    inline in the event loop, or in the storage thread of a slower disk.
    """
    found = {}
    for name in dict.fromkeys(names or SCENARIOS):
        measured: list[dict[str, Any]] = []
        modes: list[str] = []
        for number in range(1, runs + 1):
            with busy(f"{name}: {SCENARIOS[name]} ({number} of {runs})"):
                figures, mode = _measure(name, seconds, connections, directory)
            measured.append(figures)
            modes.append(mode)
        found[name] = {"runs": runs, "commit_modes": modes, **over_runs(measured)}
        if not as_json:
            terminal.emit(f"{name}: {SCENARIOS[name]}")
            terminal.emit(f"commit mode: {', '.join(modes)}")
            show(found[name])
    if as_json:
        terminal.emit_json({"version": __version__, "machine": machine(), "scenarios": found})
    else:
        terminal.emit(", ".join(f"{name} {value}" for name, value in machine().items()))
    return exit_codes.DONE


def _measure(name: str, seconds: float, connections: int, directory: Path | None) -> tuple[dict[str, Any], str]:
    """Return the figures of a run, and the commit mode at its end."""
    from msgspec import json

    from jobd.cli.demo.processes import Sandbox
    from jobd.client import AdminClient

    with Sandbox('[log]\nlevel = "warning"\n', store_in=directory) as sandbox:
        sandbox.start_daemon()
        arguments = [name, f"{sandbox.folder}/worker.sock", str(seconds), str(connections)]
        load = subprocess.run(
            [sys.executable, "-m", "jobd.cli.daemon.bench_load", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        if load.returncode != 0:
            raise exit_codes.CliError(f"{name}: the load failed: {(load.stderr.splitlines() or ['no output'])[-1]}")
        with AdminClient(f"unix:{sandbox.folder}/admin.sock", token=sandbox.token) as admin:
            is_inline = 'jobd_commit_mode{mode="inline"} 1' in admin.metrics()
    return json.decode(load.stdout), "inline" if is_inline else "thread"


def over_runs(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the median, minimum and maximum of each number. Lists are taken from the first run."""
    found: dict[str, Any] = {}
    for name, first in runs[0].items():
        values = [run[name] for run in runs]
        if isinstance(first, dict):
            found[name] = over_runs(values)
        elif isinstance(first, list):
            found[name] = first
        else:
            found[name] = {"median": _rounded(statistics.median(values)), "min": min(values), "max": max(values)}
    return found


def _rounded(value: float) -> float:
    return round(value) if value >= 1000 else round(value, 3)


def show(figures: dict[str, Any]) -> None:
    numbers = {f">{name.upper()}": lambda row, name=name: _number(row[1][name]) for name in ("median", "min", "max")}
    terminal.table({f"OF {figures['runs']}": itemgetter(0), **numbers}, _flat(figures))


def _flat(figures: dict[str, Any], above: str = "") -> Iterator[tuple[str, dict[str, float]]]:
    for name, each in figures.items():
        if isinstance(each, dict):
            if "median" in each:
                yield f"{above}{name}", each
            else:
                yield from _flat(each, f"{above}{name} ")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def machine() -> dict[str, Any]:
    return {"Python": platform.python_version(), "SQLite": sqlite3.sqlite_version, "CPUs": os.cpu_count()}
