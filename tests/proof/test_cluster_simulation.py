"""Some seeds of the simulation of several nodes. The long run: `make simulation`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from typing import Final

import pytest

from tests import ROOT
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


def test_the_same_seed_gives_the_same_trace() -> None:
    """In processes with different hash seeds, too."""
    code = "from tests.proof.simulation.run import simulate\n"
    code += "print(*(simulate(seed, 80, with_digest=True, cluster=True).digest for seed in (3, 3, 4)))"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for hash_seed in ("1", "2")
    }
    assert len(printed) == 1
    first, second, other = printed.pop().split()
    assert first == second != other


def test_the_program_counts_what_happens_to_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--cluster", "--seeds", "3", "--steps", "60"]) == 0
    printed = capsys.readouterr().out
    assert "3 seeds" in printed
    assert "node takes over" in printed
    assert "never happened: " in printed
