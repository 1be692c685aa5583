"""Real faults on the real daemon, each a few times. `make faults` makes them as often as the report wants."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.proof.faults.harness import checks
from tests.support.daemon_process import die_with_us


@pytest.mark.timeout(240)  # seconds on an idle machine
@pytest.mark.parametrize("name", [name for name, check in checks().items() if check.few])
def test_the_promise_is_kept_under_a_fault(name: str) -> None:
    # In its own process, so that its mounts end with it.
    run = subprocess.run(
        [sys.executable, "-m", "tests.proof.faults", name, "--few", "--json"],
        capture_output=True,
        text=True,
        preexec_fn=die_with_us,
        check=False,
    )
    assert run.stdout, run.stderr
    (outcome,) = json.loads(run.stdout)
    if outcome["verdict"] == "skipped":
        pytest.skip(f"{name}: {outcome['story']}")
    assert outcome["verdict"] == "passed", outcome["story"]
