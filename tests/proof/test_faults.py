"""Real faults on the real daemon, each a few times. `make faults` makes them as often as the report wants."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.proof.faults.__main__ import main
from tests.proof.faults.harness import MODULES, checks
from tests.support.daemon_process import die_with_us
from tests.support.forked_process import PROCESSES, preload

preload([f"tests.proof.faults.{module}" for module in MODULES])


def _run(name: str, directory: Path) -> None:
    die_with_us()
    for number, stream in ((1, "stdout"), (2, "stderr")):
        with (directory / stream).open("wb") as output:
            os.dup2(output.fileno(), number)
    main([name, "--few", "--json"])


@pytest.mark.timeout(240)  # seconds on an idle machine
@pytest.mark.parametrize("name", [name for name, check in checks().items() if check.few])
def test_the_promise_is_kept_under_a_fault(name: str, tmp_path: Path) -> None:
    # In its own process, so that its mounts end with it.
    process = PROCESSES.Process(target=_run, args=(name, tmp_path))
    process.start()
    process.join()
    output = (tmp_path / "stdout").read_text()
    assert output, (tmp_path / "stderr").read_text()
    (outcome,) = json.loads(output)
    if outcome["verdict"] == "skipped":
        pytest.skip(f"{name}: {outcome['story']}")
    assert outcome["verdict"] == "passed", outcome["story"]
