"""The planted bugs still fit the sources; whether they are found is test_planted.py's part."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from msgspec.structs import replace

from tests import ROOT
from tests.proof.planted.bugs import Bug, Edit, Rotten, bugs, plant, spoiled
from tests.proof.planted.levels import LEVELS, TESTS, fitting

BUGS: Final = bugs()


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_bug_fits_the_sources(bug: Bug) -> None:
    """Whoever changes the place of a bug plants it anew in its record: the bug stays, its text moves."""
    assert spoiled(bug, ROOT)
    assert bug.level in fitting(bug), "a level that cannot see it"
    assert bug.promise is None or "simulation" in fitting(bug)
    assert bug.promise is None or re.fullmatch(r"S([1-9]|1[0-5])|L[1-5]", bug.promise)


def test_a_bug_is_a_program_that_could_have_been_written(tmp_path: Path) -> None:
    """No name in it is unknown: what is found has to be the bug, not a slip in its record."""
    for bug in BUGS.values():
        for file, text in spoiled(bug, ROOT).items():
            (tmp_path / f"{bug.name}-{Path(file).name}").write_text(text, "utf-8")
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821,F823,F811", "."]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout


def test_a_bug_that_does_not_fit_any_more_is_told(tmp_path: Path) -> None:
    place = tmp_path / "jobd" / "model" / "job.py"
    place.parent.mkdir(parents=True)
    bug = Bug("b", "something", "rules", (Edit("jobd/model/job.py", "x = 1\n", "x = 2\n"),))
    for text in ("", "x = 1\nx = 1\n"):
        place.write_text(text)
        with pytest.raises(Rotten, match=r"b: this text is [02] times in jobd/model/job.py"):
            plant(bug, tmp_path)
    place.write_text("x = 1\ny = 1\n")
    plant(replace(bug, edits=(*bug.edits, Edit("jobd/model/job.py", "y = 1\n", "y = x\n"))), tmp_path)
    assert place.read_text() == "x = 2\ny = x\n"


def test_the_tests_of_every_level_are_there() -> None:
    assert tuple(TESTS) == LEVELS
    named = [test.partition("::")[0] for tests in TESTS.values() for test in tests]
    assert len(set(named)) == len(named)
    assert all((ROOT / name).exists() for name in named)
