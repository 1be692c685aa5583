"""The output of the proofs is stored by commit and written into the document, only between its marks."""

from __future__ import annotations

import json
import platform
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from tests import ROOT
from tests.integration.test_docs import rows, ticked
from tests.proof import run as proof
from tests.proof.faults import __main__ as faults
from tests.proof.faults import harness
from tests.proof.faults.harness import Check, CheckOutcome, Tool, checks

DOCUMENT = "before\n<!-- world -->\nold\n<!-- end -->\nbetween\n<!-- planted -->\n<!-- end -->\nafter\n"


def test_only_the_text_between_the_marks_is_replaced() -> None:
    text = proof.filled(DOCUMENT, "world", "today, here\n 7 states\n")
    assert text == DOCUMENT.replace("\nold\n", "\n\n```text\n7 states\n```\n\ntoday, here.\n\n")
    assert proof.filled(text, "world", "today, here\n 7 states\n") == text
    assert "```text\n8 of 8 found\n```" in proof.filled(DOCUMENT, "planted", "today\nname  rules\n8 of 8 found\n")


def test_each_part_has_its_place_in_the_document() -> None:
    document = proof.DOCUMENT.read_text("utf-8")
    for name in proof.PARTS:
        assert document.count(f"<!-- {name} -->\n") == 1
        assert name in proof.SHOWN


def test_the_counts_of_the_simulation_become_a_table_by_kind() -> None:
    counted = (
        "command Create   1,200\nevent created  9\nfault kill   3\nmishap client disconnects 1\nerror lock_lost 2\n"
    )
    shown = proof.SHOWN["simulation"](f"{counted}never happened: nothing\n2 seeds: every promise held\n")
    assert "| fault | kill 3 |" in shown
    assert "| command | Create 1,200 |" in shown
    assert shown.startswith("```text\n2 seeds: every promise held\nnever happened: nothing\n```\n")


def test_the_counts_of_the_faults_become_a_table() -> None:
    outcome = {
        "name": "kill",
        "promise": "nothing is lost",
        "verdict": "passed",
        "seconds": 1.6,
        "counts": {"kills": 1200},
        "command": "python -m tests.proof.faults kill",
        "commit": "0123456789ab",
        "python": "3.11.7",
        "needs": ["strace"],
    }
    skipped = outcome | {"name": "cut", "verdict": "skipped", "counts": {}, "needs": []}
    more = outcome | {"name": "stop", "command": "python -m tests.proof.faults stop --rounds 1000", "needs": []}
    shown = proof.SHOWN["faults"](json.dumps([outcome, skipped, more]))
    row = "| `kill` | nothing is lost | 1,200 kills | 2 s | `0123456789ab`, 3.11.7 | strace |"
    assert row in shown
    assert "| `cut` | nothing is lost | skipped | 2 s | `0123456789ab`, 3.11.7 | nothing |" in shown
    assert (
        "| `stop` | nothing is lost | 1,200 kills | 2 s | `0123456789ab`, 3.11.7, `--rounds 1000` | nothing |" in shown
    )
    assert "2 of 3 passed, skipped: cut. `python -m tests.proof.faults NAME`" in shown


def test_single_faults_replace_their_rows_if_they_passed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document, rows_file = tmp_path / "document.md", tmp_path / "rows.json"
    document.write_text("| `kill` | old |\n| `kill-more` | old |\n| `cut` | old |\n")
    monkeypatch.setattr(proof, "DOCUMENT", document)
    kill = CheckOutcome("kill", "nothing is \\1 lost", "passed", 1, {"kills": 2}, commit="abc", python="3.11.7")
    rows_file.write_text(json.dumps([asdict(kill), asdict(CheckOutcome("cut", "", "FAILED", 1))]))
    assert proof.main(["--rows", str(rows_file)]) == 1
    new = "| `kill` | nothing is \\1 lost | 2 kills | 1 s | `abc`, 3.11.7 | nothing |\n"
    assert document.read_text() == f"{new}| `kill-more` | old |\n| `cut` | old |\n"
    assert "not written: cut" in capsys.readouterr().err
    rows_file.write_text(json.dumps([asdict(kill)]))
    assert proof.main(["--rows", str(rows_file)]) == 0
    rows_file.write_text(json.dumps([asdict(CheckOutcome("new", "", "passed", 1))]))
    with pytest.raises(AssertionError, match="no row for new"):
        proof.main(["--rows", str(rows_file)])


@pytest.mark.parametrize("is_here", [True, False])
def test_a_fault_reports_its_commit_command_interpreter_and_tools(
    is_here: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = Check(
        "kill",
        "nothing is lost",
        lambda trial: {"kills": trial.rounds},
        9,
        needs=(Tool("saw", "tools", lambda: is_here),),
    )
    monkeypatch.setattr(faults, "checks", lambda _: {"kill": check})
    monkeypatch.setattr(harness, "commit", lambda: "0123456789ab")
    monkeypatch.delenv("CI", raising=False)
    assert faults.main(["--report"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"commit 0123456789ab, Python {platform.python_version()}"
    assert lines[2].strip() == "python -m tests.proof.faults kill; needs: saw"
    expected = ("9 kills", "1 passed, 0 FAILED, 0 skipped")
    if not is_here:
        expected = ("missing: saw (Debian: tools)", "0 passed, 0 FAILED, 1 skipped: kill")
    assert (lines[3].strip(), lines[4]) == expected
    assert faults.main(["kill", "--few", "--rounds", "3", "--json"]) == 0
    (outcome,) = json.loads(capsys.readouterr().out)
    assert outcome["command"] == "python -m tests.proof.faults kill --rounds 3 --few"
    assert (outcome["commit"], outcome["needs"]) == ("0123456789ab", ["saw"])


def test_every_figure_in_the_document_has_commit_command_and_interpreter() -> None:
    document = proof.DOCUMENT.read_text("utf-8")
    for name in proof.PARTS:
        block = document.partition(f"<!-- {name} -->\n")[2].partition("<!-- end -->")[0]
        assert re.search(rf"commit `[0-9a-f]{{12}}`, `python -m {proof.PARTS[name][0]}\b.*Python 3\.\d+", block), name
    for fault, _, _, _, measured, needs in rows(proof.DOCUMENT, "fault", "promise"):
        assert re.search(r"`[0-9a-f]{12}`, 3\.\d+\.\d+(, `--rounds \d+`)?$", measured), fault
        tools = [tool.name for tool in checks()[ticked(fault)[0]].needs]
        assert needs == (", ".join(tools) or "nothing"), fault


def test_the_table_of_skipped_checks_names_every_program_that_tests_need() -> None:
    skips = {row[0]: row[1] for row in rows(proof.DOCUMENT, "missing", "skipped")}
    required = {
        name
        for file in (ROOT / "tests").rglob("*.py")
        for name in re.findall(r'tool_missing\("([^"]+)"', file.read_text("utf-8"))
    }
    assert len(required) > 5
    for name in required:
        assert any(f"`{name}`" in missing for missing in skips), name
    for check in checks().values():
        named = [cell for cell in skips.values() if f"`{check.name}`" in cell]
        by_strace = all(tool.name == "strace" for tool in check.needs)
        assert bool(named) == (not by_strace), check.name


def test_the_table_of_faults_is_that_of_the_checks() -> None:
    promises = {
        ticked(name)[0]: promise for name, promise, *_ in rows(ROOT / "docs/reliability.md", "fault", "promise")
    }
    assert promises == {check.name: check.promise for check in checks().values()}


def test_the_document_names_tests_that_exist() -> None:
    sources = "".join(file.read_text("utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", proof.DOCUMENT.read_text("utf-8"))
    assert named
    assert [name for name in named if f"def {name}(" not in sources] == []


def test_the_table_of_invariants_names_those_that_are_checked() -> None:
    promises = [name for name, _ in rows(ROOT / "docs/reliability.md", "name", "what holds")]
    assert promises == [
        *(f"S{number}" for number in (*range(1, 17), 18, 19)),
        *(f"L{number}" for number in range(1, 7)),
    ]
