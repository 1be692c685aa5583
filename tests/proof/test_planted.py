"""Some of the planted bugs are planted and found. All of them: `python -m tests.proof.planted`."""

from __future__ import annotations

import json
import re
from typing import Final

import pytest
from msgspec.structs import replace

from tests.proof.planted import __main__ as program
from tests.proof.planted.bugs import bugs
from tests.proof.planted.levels import TESTS

BUGS: Final = bugs()


@pytest.mark.timeout(300)  # a part of the test suite, in a process of its own
def test_the_table_of_the_rules_finds_a_bug(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["counter-not-decremented"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"^counter-not-decremented +rules +[0-9.]+ s  test_rules.py::", told, re.M)
    assert "1 of 1 bugs found (1 rules)" in told


@pytest.mark.timeout(300)
def test_the_simulation_finds_a_bug(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["no-fence-on-complete", "--promises", "--json"]) == 0
    (verdict,) = json.loads(capsys.readouterr().out)
    assert (verdict["found"], verdict["complaint"]) == ("simulation", "")
    assert verdict["failed"].startswith("S3: ")


@pytest.mark.timeout(300)
def test_what_is_found_late_or_not_at_all_is_a_complaint(monkeypatch: pytest.MonkeyPatch) -> None:
    bug = replace(BUGS["counter-not-decremented"], name="b", level="rules")
    for levels, found, complaint in (
        (["world"], "world", "found at world only, not at rules"),
        (["doors"], None, "no level finds it: a test is missing"),
    ):
        monkeypatch.setattr(program, "fitting", lambda _, levels=levels: levels)
        monkeypatch.setitem(TESTS, "world", ("tests/unit/core/test_state.py",))
        monkeypatch.setitem(TESTS, "doors", ("tests/unit/http/test_log_rate_limiter.py",))
        verdict = program.look_for(bug)
        assert (verdict.found, verdict.complaint) == (found, complaint)
    assert "^ no level finds it" in program.table([verdict], 1.0)
    assert program.main(["no-such-bug"]) == 2
