"""`jobd bench`: both scenarios measure something."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from jobd.cli.daemon.main import jobd


@pytest.mark.slow
def test_a_scenario_reports_the_median_of_its_runs(tmp_path: Path) -> None:
    argv = ["bench", "claim", "--seconds", "0.1", "--runs", "2", "--dir", str(tmp_path)]
    shown = CliRunner().invoke(jobd, argv, standalone_mode=False)
    assert shown.exception is None, shown.output
    assert "claim: claim a job" in shown.output
    assert "OF 2" in shown.output
    assert re.search("^commit mode: (inline|thread), (inline|thread)$", shown.output, re.MULTILINE), shown.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_json_names_the_machine_and_each_figure() -> None:
    argv = ["bench", "lifecycle", "claim", "lifecycle", "--seconds", "0.1", "--runs", "1", "--json"]
    found = json.loads(CliRunner().invoke(jobd, argv, standalone_mode=False).output)
    assert found["machine"]["CPUs"] >= 1
    assert list(found["scenarios"]) == ["lifecycle", "claim"]
    assert found["scenarios"]["lifecycle"]["lifecycles_per_s"]["median"] > 0
    assert found["scenarios"]["lifecycle"]["commit_modes"][0] in ("inline", "thread")
    assert found["scenarios"]["claim"]["claim"]["p50_ms"]["median"] > 0
