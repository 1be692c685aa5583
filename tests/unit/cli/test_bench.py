"""jobd bench: every scenario measures something, what goes wrong is told, and the arithmetic of the figures."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jobd.bench import beside, load, stage, work
from jobd.bench.scenarios import SCENARIOS, Scenario, Size, measured
from jobd.bench.spread import over_runs, percentiles
from jobd.bench.stage import BenchFailed, Stage
from jobd.bench.wire import Wire
from jobd.cli.daemon import bench
from jobd.cli.daemon.main import jobd

TINY = Size(seconds=0.2, connections=4, rate=50, live=1_000, backlogs=((1_000, 0), (1_500, 500)))
TIMES = {"p50_ms", "p90_ms", "p99_ms", "p99_9_ms", "max_ms"}


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=list(SCENARIOS))
def test_a_scenario_gives_figures(scenario: Any, tmp_path: Path) -> None:
    found = measured(scenario, TINY, tmp_path)
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


async def stats_of(staged: Stage) -> Any:
    """The daemon's own count of its jobs."""
    wire = await Wire.open(staged._socket("admin"), staged._token)
    found = await wire.get("/admin/job-management/stats")
    wire.close()
    return found


async def until_its_first_events_are_gone(staged: Stage) -> None:
    """Make passes until the journal has lost its beginning."""
    head = f"Host: x\r\nAuthorization: Bearer {staged._token}\r\nConnection: close\r\n\r\n"
    wire = await Wire.open(staged._socket("admin"), staged._token)
    status = b""
    while b" 410 " not in status:
        await wire.post("/admin/job-management/cleanup", b"{}")
        reader, writer = await asyncio.open_unix_connection(staged._socket("admin"))
        writer.write(f"GET /admin/job-management/events?last_event_id=1&follow=false HTTP/1.1\r\n{head}".encode())
        status = await reader.readline()
        writer.close()
        await asyncio.sleep(0.05)
    wire.close()


def test_lifecycles_are_counted_as_the_daemon_counts_them(tmp_path: Path) -> None:
    with Stage(tmp_path) as staged:
        for kind in ("lifecycle", "batch", "stream", "rate"):
            staged.load(kind, seconds=0.2, connections=4, rate=50.0)
        figures = staged.load("fill", count=2_500)
        assert figures["created_per_s"] > 0
        staged.load("finish", count=1_200)
        counted = asyncio.run(stats_of(staged))
    assert counted["byStatus"]["queued"] == 2_500
    assert counted["byStatus"]["completed"] > 1_200
    assert counted["byStatus"]["processing"] == counted["byStatus"]["failed"] == 0


async def test_what_begins_early_counts_from_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what begins late from when it was due."""

    async def no_sleep(seconds: float) -> None: ...

    monkeypatch.setattr(asyncio, "sleep", no_sleep)
    before = work.clock()
    assert before <= await work.turn(before + 100) <= work.clock()
    assert await work.turn(before) == before


def test_a_scenario_has_settings_of_its_own(tmp_path: Path) -> None:
    narrow = Scenario("narrow", "", lambda stage, size: stage.load("fill", count=6), settings={"JOBD_LIMITS_BULK": "5"})
    with pytest.raises(BenchFailed, match="Over 5 jobs in one bulk"):
        measured(narrow, TINY, tmp_path)


def test_a_load_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Stage(tmp_path) as staged:
        with pytest.raises(BenchFailed, match="KeyError: 'none'"):
            staged.load("none")
        staged.stop()
        with pytest.raises(BenchFailed, match="the daemon ended with 0"):
            staged.load("latency", seconds=0.1)
    monkeypatch.setattr(stage, "READY_S", 0.0)
    with pytest.raises(BenchFailed, match="did not come up"):
        Stage(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_two_grants_for_one_job_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        @classmethod
        async def open(cls, path: str) -> Wrong:
            return cls()

        async def post(self, path: str, body: bytes, *, may_fail: bool = False) -> Any:
            return {"id": "j", "lock_id": "l"}

    monkeypatch.setattr(work, "Wire", Wrong)
    with pytest.raises(SystemExit, match="16 workers got job j"):
        asyncio.run(load.contention(work.Asked("contention", "", seconds=1)))


async def test_a_wire_takes_answers_in_whatever_pieces_and_tells_of_their_end(tmp_path: Path) -> None:
    whole = b'HTTP/1.1 200 OK\r\nA: b\r\nContent-Length: 32\r\n\r\n{"success":true,"data":[1,2,3]}\n'

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in (whole, whole, whole, whole[:-1]):
            await reader.readuntil(b"\r\n\r\n")
            for at in range(len(answer)):
                writer.write(answer[at : at + 1])
                await asyncio.sleep(0)
        writer.close()

    async with await asyncio.start_unix_server(serve, tmp_path / "socket"):
        wire = await Wire.open(str(tmp_path / "socket"))
        assert await wire.get("/a") == [1, 2, 3]
        await wire.drop("/b")
        assert await wire.get("/c") == [1, 2, 3]
        for _ in range(2):
            with pytest.raises(ConnectionError):
                await wire.get("/d")


def test_percentiles() -> None:
    one_to_thousand = [number / 1000 for number in range(1000, 0, -1)]
    assert list(percentiles(one_to_thousand).values()) == [500, 900, 990, 999, 1000]
    assert set(percentiles([0.25]).values()) == {250.0}
    assert percentiles([0.001, 0.002, 0.003])["p50_ms"] == 2


def test_medians_over_runs() -> None:
    runs = [{"per_s": each, "times": {"p50_ms": 1 / each}} for each in (5.0, 2.0, 4.0)]
    found = over_runs(runs)
    assert found["per_s"] == {"median": 4.0, "min": 2.0, "max": 5.0}
    assert found["times"]["p50_ms"] == {"median": 0.25, "min": 0.2, "max": 0.5}
    assert over_runs([{"per_s": 12_345.678}])["per_s"]["median"] == 12_346
    assert over_runs([{"sizes": [1.0, 2.0]}, {"sizes": [3.0]}])["sizes"] == [1.0, 2.0]


def test_what_goes_wrong_beside_the_work_ends_the_load() -> None:
    async def breaks() -> None:
        await asyncio.sleep(0)
        raise ValueError("lost")

    async def goes_on() -> None:
        await asyncio.Event().wait()

    async def run(*works: Any) -> None:
        async with beside.others(*works):
            await asyncio.sleep(0.01)

    asyncio.run(run(goes_on()))
    with pytest.raises(ValueError, match="lost"):
        asyncio.run(run(goes_on(), breaks()))


def test_jobs_and_journal_of_a_soak_are_gone_and_the_series_is_drawn(tmp_path: Path) -> None:
    with Stage(tmp_path, SCENARIOS["soak"].settings) as staged:
        figures = staged.load("soak", seconds=2.5, connections=2)
        wire_stats = asyncio.run(stats_of(staged))
        asyncio.run(asyncio.wait_for(until_its_first_events_are_gone(staged), 30))
    assert len(figures["series"]["database_mb"]) == len(figures["series"]["log_mb"]) >= 4
    assert wire_stats["byStatus"]["completed"] < 2.5 * figures["lifecycles_per_s"]
    assert bench._drawn([0.0, 1.0, 8.0]) == "▁▂█"
    assert bench._drawn([0.0, 0.0]) == "▁▁"


def test_finished_jobs_that_have_expired_go_with_the_next_pass(tmp_path: Path) -> None:
    with Stage(tmp_path) as staged:
        staged.load("finish", count=300, expired=True)
        staged.load("finish", count=200)
        staged.load("lag", beside="passes", seconds=0.3)
        assert asyncio.run(stats_of(staged))["byStatus"]["completed"] == 200


def test_the_command() -> None:
    asked = ["bench", "latency", "latency", "--seconds", "0.1", "--runs", "2"]
    shown = CliRunner().invoke(jobd, asked, standalone_mode=False)
    assert shown.exception is None, shown.output
    assert shown.output.count("latency: a lifecycle on one connection") == 1
    assert "of 2" in shown.output
    told = json.loads(CliRunner().invoke(jobd, [*asked, "--json"], standalone_mode=False).output)
    assert told["scenarios"]["latency"]["runs"] == 2
    assert told["scenarios"]["latency"]["one_connection"]["lifecycle"]["p50_ms"]["median"] > 0
    assert told["machine"]["CPUs"] >= 1


def test_a_scenario_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    found = CliRunner().invoke(jobd, ["bench", "speed"])
    assert found.exit_code == 2
    assert "no scenario is called 'speed'. There are: lifecycle, batch" in found.output


def test_every_scenario_is_in_the_help() -> None:
    text = CliRunner().invoke(jobd, ["bench", "--help"]).output
    for scenario in SCENARIOS.values():
        assert f"  {scenario.name}" in text
    assert max(live for live, _ in bench.LARGE) == 1_000_000
