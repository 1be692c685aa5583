"""The arguments and the arithmetic of `jobd bench`."""

from __future__ import annotations

from click.testing import CliRunner

from jobd.cli.daemon.bench import over_runs
from jobd.cli.daemon.main import jobd


def test_an_unknown_scenario_is_a_usage_error() -> None:
    found = CliRunner().invoke(jobd, ["bench", "speed"])
    assert found.exit_code == 2
    assert "'speed' is not one of 'lifecycle', 'claim'" in found.output


def test_medians_over_runs() -> None:
    runs = [{"per_s": each, "times": {"p50_ms": 1 / each}} for each in (5.0, 2.0, 4.0)]
    found = over_runs(runs)
    assert found["per_s"] == {"median": 4.0, "min": 2.0, "max": 5.0}
    assert found["times"]["p50_ms"] == {"median": 0.25, "min": 0.2, "max": 0.5}
    assert over_runs([{"per_s": 12_345.678}])["per_s"]["median"] == 12_346
    assert over_runs([{"sizes": [1.0, 2.0]}, {"sizes": [3.0]}])["sizes"] == [1.0, 2.0]
