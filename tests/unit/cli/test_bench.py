"""`jobd bench`: both scenarios measure something, and the arithmetic of the figures."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from jobd.cli.daemon.bench import over_runs
from jobd.cli.daemon.bench_load import LoadConnection, percentiles
from jobd.cli.daemon.main import jobd


@pytest.mark.slow
def test_a_scenario_reports_the_median_of_its_runs(tmp_path: Path) -> None:
    argv = ["bench", "claim", "--seconds", "0.1", "--runs", "2", "--dir", str(tmp_path)]
    shown = CliRunner().invoke(jobd, argv, standalone_mode=False)
    assert shown.exception is None, shown.output
    assert "claim: claim a job" in shown.output
    assert "OF 2" in shown.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_json_names_the_machine_and_each_figure() -> None:
    argv = ["bench", "lifecycle", "claim", "lifecycle", "--seconds", "0.1", "--runs", "1", "--json"]
    found = json.loads(CliRunner().invoke(jobd, argv, standalone_mode=False).output)
    assert found["machine"]["CPUs"] >= 1
    assert list(found["scenarios"]) == ["lifecycle", "claim"]
    assert found["scenarios"]["lifecycle"]["lifecycles_per_s"]["median"] > 0
    assert found["scenarios"]["claim"]["claim"]["p50_ms"]["median"] > 0


def test_an_unknown_scenario_is_a_usage_error() -> None:
    found = CliRunner().invoke(jobd, ["bench", "speed"])
    assert found.exit_code == 2
    assert "'speed' is not one of 'lifecycle', 'claim'" in found.output


async def test_a_connection_reads_responses_in_any_pieces_and_notices_its_end(tmp_path: Path) -> None:
    whole = b'HTTP/1.1 200 OK\r\nA: b\r\nContent-Length: 32\r\n\r\n{"success":true,"data":[1,2,3]}\n'

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in (whole, whole, whole, whole[:-1]):
            await reader.readuntil(b"\r\n\r\n")
            for at in range(len(answer)):
                writer.write(answer[at : at + 1])
                await asyncio.sleep(0)
        writer.close()

    async with await asyncio.start_unix_server(serve, tmp_path / "socket"):
        connection = await LoadConnection.open(str(tmp_path / "socket"))
        assert await connection.get("/a") == [1, 2, 3]
        await connection.drop("/b")
        assert await connection.get("/c") == [1, 2, 3]
        for _ in range(2):
            with pytest.raises(ConnectionError):
                await connection.get("/d")


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
