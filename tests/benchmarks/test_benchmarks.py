"""Benchmarks: every scenario measures something, and errors end the run."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from jobd.cli.daemon.bench_load import LoadConnection
from tests.benchmarks import cpu, load, work
from tests.benchmarks.scenarios import SCENARIOS, Size, measure
from tests.benchmarks.stage import BenchDaemon

pytestmark = pytest.mark.slow

TINY = Size(seconds=0.2, connections=4, rate=50, live=1_000, backlogs=((1_000, 0), (1_500, 500)))
# So many jobs that their memory is a multiple of the difference between two starts of an empty daemon.
TINY_MEMORY = structs.replace(TINY, live=10_000)
TIMES = {"p50_ms", "p90_ms", "p99_ms", "p99_9_ms", "max_ms"}


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=list(SCENARIOS))
def test_a_scenario_returns_figures(scenario: Any, tmp_path: Path) -> None:
    found = measure(scenario, TINY_MEMORY if scenario.name == "memory" else TINY, tmp_path)
    numbers = list(_numbers(found))
    assert numbers
    assert all(value > 0 for _, value in numbers), found
    for name, times in _times(found):
        assert times.keys() == TIMES
        ordered = [times[each] for each in ("p50_ms", "p90_ms", "p99_ms", "p99_9_ms", "max_ms")]
        assert ordered == sorted(ordered), name
    assert list(tmp_path.iterdir()) == []


def _numbers(found: dict[str, Any]) -> Any:
    for name, value in found.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, list):
            yield from ((name, each) for each in value)
        else:
            yield name, value


def _times(found: dict[str, Any]) -> Any:
    for name, value in found.items():
        if isinstance(value, dict):
            if "p50_ms" in value:
                yield name, value
            yield from _times(value)


async def stats_of(staged: BenchDaemon) -> Any:
    """Return the stats of the daemon."""
    wire = await LoadConnection.open(staged._socket("admin"), staged._token)
    found = await wire.get("/admin/job-management/stats")
    wire.close()
    return found


def test_lifecycles_are_counted_as_the_daemon_counts_them(tmp_path: Path) -> None:
    with BenchDaemon(tmp_path) as staged:
        for kind in ("lifecycle", "batch", "stream", "rate"):
            staged.load(kind, seconds=0.2, connections=4, rate=50.0)
        figures = staged.load("fill", count=2_500)
        assert figures["created_per_s"] > 0
        staged.load("finish", count=1_200)
        counted = asyncio.run(stats_of(staged))
    assert counted["byStatus"]["queued"] == 2_500
    assert counted["byStatus"]["completed"] > 1_200
    assert counted["byStatus"]["processing"] == counted["byStatus"]["failed"] == 0


def test_two_grants_for_one_job_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        @classmethod
        async def connections(cls, asked: work.LoadRequest) -> list[Wrong]:
            return [cls()] * asked.connections

        async def post(self, path: str, body: bytes, *, may_fail: bool = False) -> Any:
            return {"id": "j", "lock_id": "l"}

    monkeypatch.setattr(load, "connections_of", Wrong.connections)
    with pytest.raises(SystemExit, match="16 workers were granted job j"):
        asyncio.run(load.contention(work.LoadRequest("contention", "", seconds=1)))


def test_the_sum_of_instructions_may_grow_by_three_percent_and_a_stage_by_one_percent_of_it() -> None:
    recorded = {"decode": 10.0, "slice": 90.0, "sum": 100.0}
    assert cpu.exceeded({"decode": 11.0, "slice": 92.0, "sum": 103.0}, recorded) == []
    decode, total = cpu.exceeded({"decode": 11.1, "slice": 90.0, "sum": 103.1}, recorded)
    assert decode.startswith("decode: 11.1 thousand instructions")
    assert total.startswith("sum: ")
