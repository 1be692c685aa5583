"""The scenarios of the benchmarks. Each one starts its own daemon and returns figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from tests.benchmarks.beside import WORKS
from tests.benchmarks.stage import BenchDaemon


class Size(Struct, frozen=True):
    """The extent of a run: seconds of one load, live jobs for memory and startup, backlogs as (live, finished)."""

    seconds: float = 5.0
    connections: int = 16
    rate: float = 500.0
    live: int = 100_000
    backlogs: tuple[tuple[int, int], ...] = ((1_000, 0), (100_000, 0))


Measure = Callable[[BenchDaemon, Size], dict[str, Any]]


class BenchmarkScenario(Struct, frozen=True):
    """A measurement. It runs only `once` if it takes too long to repeat. `settings` are environment variables."""

    name: str
    description: str
    measure: Measure
    once: bool = False
    settings: dict[str, str] = {}


def _load(kind: str) -> Measure:
    def measure(stage: BenchDaemon, size: Size) -> dict[str, Any]:
        return stage.load(kind, seconds=size.seconds, connections=size.connections)

    return measure


def _latency(stage: BenchDaemon, size: Size) -> dict[str, Any]:
    alone = stage.load("latency", seconds=size.seconds)
    paced = stage.load("rate", seconds=size.seconds, connections=size.connections, rate=size.rate)
    return {"one_connection": alone, "fixed_rate": paced}


def _backlog(stage: BenchDaemon, size: Size) -> dict[str, Any]:
    found: dict[str, Any] = {}
    live = finished = 0
    for wanted_live, wanted_finished in size.backlogs:
        stage.load("fill", count=wanted_live - live)
        if wanted_finished > finished:
            stage.load("finish", count=wanted_finished - finished)
        live, finished = wanted_live, wanted_finished
        name = f"{live}_live" + (f"_{finished}_finished" if finished else "")
        found[name] = stage.load("claim", seconds=size.seconds)
    return found


def _lag(stage: BenchDaemon, size: Size) -> dict[str, Any]:
    """Measure beside each kind of maintenance, last beside the deletion of as many jobs as there are live ones."""
    stage.load("fill", count=size.live)
    stage.load("finish", count=size.live)
    found: dict[str, Any] = {
        kind: stage.load("lag", beside=kind, seconds=size.seconds)["wait"] for kind in WORKS if kind != "deletion"
    }
    stage.load("finish", count=size.live, expired=True)
    found["deletion"] = stage.load("lag", beside="deletion", seconds=size.seconds)["wait"]
    return found


def _startup(stage: BenchDaemon, size: Size) -> dict[str, Any]:
    stage.stop()
    empty_s = stage.start()
    stage.load("fill", count=size.live)
    stage.stop()
    return {"live_jobs": size.live, "start_s": stage.start(), "start_empty_s": empty_s}


def _memory(stage: BenchDaemon, size: Size) -> dict[str, Any]:
    empty, _ = stage.memory()
    stage.load("fill", count=size.live)
    stage.stop()
    stage.start()
    filled, resident = stage.memory()
    return {"live_jobs": size.live, "bytes_per_live_job": (filled - empty) / size.live, "resident_mb": resident / 1e6}


SCENARIOS: Final = {
    each.name: each
    for each in (
        BenchmarkScenario("lifecycle", "create, claim, complete, one request each", _load("lifecycle")),
        BenchmarkScenario("batch", "bulk creates and claims of a hundred, completes one by one", _load("batch")),
        BenchmarkScenario("stream", "lifecycles over command streams", _load("stream")),
        BenchmarkScenario("contention", "many starts on one job", _load("contention")),
        BenchmarkScenario("progress", "progress reports", _load("progress")),
        BenchmarkScenario("mixed", "lifecycles during reads, a polling dashboard and cleanup runs", _load("mixed")),
        BenchmarkScenario("latency", "a lifecycle on one connection, and at a fixed rate", _latency),
        BenchmarkScenario("backlog", "a claim among many jobs", _backlog, once=True),
        BenchmarkScenario("lag", "the latency of a request during maintenance and reads", _lag, once=True),
        BenchmarkScenario("startup", "a start with many live jobs", _startup),
        BenchmarkScenario("memory", "memory of a live job", _memory),
        BenchmarkScenario(
            "soak",
            "create, complete, delete at full speed: does the database grow?",
            _load("soak"),
            once=True,
            # With the default of a day, the journal would only grow during the run.
            settings={"JOBD_RETENTION_JOURNAL": "1s"},
        ),
    )
}


def measure(scenario: BenchmarkScenario, size: Size, directory: Path | None) -> dict[str, Any]:
    """Return the figures of one run."""
    with BenchDaemon(directory, scenario.settings) as stage:
        return scenario.measure(stage, size)
