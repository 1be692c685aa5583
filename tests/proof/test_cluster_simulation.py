"""Some seeds of the simulation of several nodes. The long run: `make simulation`."""

from __future__ import annotations

from collections import Counter
from typing import Final

import pytest

from tests.proof.simulation import __main__ as program
from tests.proof.simulation.run import simulate

SEEDS: Final = 16  # within which each planted bug is found
STEPS: Final = 150

# CPU-bound, so it takes many times as long on a busy machine.
pytestmark = pytest.mark.timeout(300)


def test_every_invariant_holds_on_several_nodes() -> None:
    fired: Counter[str] = Counter()
    for seed in range(SEEDS):
        outcome = simulate(seed, STEPS, cluster=True)
        again = f"python -m tests.proof.simulation --cluster --seed {seed} --seeds 1 --steps {STEPS}"
        assert outcome.broken is None, f"{outcome.broken[:2]}: {again}"
        fired.update(outcome.fired)
    assert fired["node takes over"] > SEEDS
    assert fired["error not_leader"]
    assert fired["error outcome_unknown"]


def test_the_program_counts_what_happens_to_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--cluster", "--seeds", "3", "--steps", "60"]) == 0
    printed = capsys.readouterr().out
    assert "3 seeds" in printed
    assert "node takes over" in printed
    assert "never happened: " in printed
