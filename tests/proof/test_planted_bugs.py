"""The planted bugs fit the sources, and a few are planted and found. All of them: `make planted`."""

from __future__ import annotations

import re
from typing import Final

import pytest

from tests import ROOT
from tests.proof.planted import __main__ as program
from tests.proof.planted.bugs import BUGS
from tests.proof.planted.registry import CLUSTER_SIMULATION, LEVELS, SIMULATION, Bug, plant
from tests.proof.simulation.run import simulate

# Found within a few short runs.
QUICK: Final = ("answer-before-commit", "rollback-forgotten", "undelivered-grant-kept")


@pytest.mark.parametrize("planted", BUGS.values(), ids=BUGS)
def test_a_bug_names_its_tests_and_can_be_planted(planted: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(planted, monkeypatch)
    assert planted.level in LEVELS.values()
    assert (ROOT / planted.found_by.partition("::")[0]).exists()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", QUICK)
def test_the_simulation_finds_a_bug(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert BUGS[name].found_by == SIMULATION
    plant(BUGS[name], monkeypatch)
    assert any(simulate(seed, 100).broken for seed in range(30))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["fence-left-out", "unacknowledged-records-applied"])
def test_the_simulation_of_several_nodes_finds_a_bug(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert BUGS[name].found_by == CLUSTER_SIMULATION
    plant(BUGS[name], monkeypatch)
    assert any(simulate(seed, 100, cluster=True).broken for seed in range(30))


@pytest.mark.timeout(300)  # runs a test file in another process
def test_the_program_reports_which_test_finds_a_bug(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["stream-error-overtakes"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^stream-error-overtakes +http +[0-9.]+ s  integration/test_command_stream\.py::", printed)
    assert "1 of 1 bugs found" in printed
