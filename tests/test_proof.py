"""What the proofs print is kept by version and put into the document: between its marks, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import proof
from tests.faults.frame import checks
from tests.test_docs import ROOT, rows, ticked

DOCUMENT = "before\n<!-- world -->\nold\n<!-- end -->\nbetween\n<!-- planted -->\n<!-- end -->\nafter\n"


def test_only_the_text_between_the_marks_is_replaced() -> None:
    text = proof.filled(DOCUMENT, "world", "today, here\n 7 states\n")
    assert text == DOCUMENT.replace("\nold\n", "\n\n```text\n7 states\n```\n\ntoday, here.\n\n")
    assert proof.filled(text, "world", "today, here\n 7 states\n") == text
    assert "```text\n8 of 8 found\n```" in proof.filled(DOCUMENT, "planted", "today\nname  rules\n8 of 8 found\n")


def test_a_part_without_its_marks_is_an_error() -> None:
    with pytest.raises(AssertionError, match="no place for mutation"):
        proof.filled(DOCUMENT, "mutation", "today\nx\n")


def test_each_part_has_its_place_in_the_document() -> None:
    document = proof.DOCUMENT.read_text("utf-8")
    for name in proof.PARTS:
        assert document.count(f"<!-- {name} -->\n") == 1
        assert name in proof.SHOWN


def test_what_the_simulation_counted_becomes_a_table_by_kind() -> None:
    counted = "command Create   1,200\nevent created  9\nfault kill   3\nmishap hang up 1\nrefusal lock_lost 2\n"
    shown = proof.SHOWN["simulation"](f"{counted}never happened: nothing\n2 seeds: every promise held\n")
    assert "| fault | kill 3 |" in shown
    assert "| command | Create 1,200 |" in shown
    assert shown.startswith("```text\n2 seeds: every promise held\nnever happened: nothing\n```\n")


def test_what_the_faults_counted_becomes_a_table() -> None:
    outcome = {
        "name": "kill",
        "promise": "nothing is lost",
        "verdict": "passed",
        "seconds": 1.6,
        "counts": {"kills": 1200},
    }
    shown = proof.SHOWN["faults"](json.dumps([outcome]))
    assert "| `kill` | nothing is lost | 1,200 kills | 2 s |" in shown
    assert "1 of 1 passed" in shown


def test_the_table_of_mutants_leaves_out_which_test_noticed() -> None:
    printed = (
        "module  mutants   killed by\nrules        9" + " " * 60 + "test_rules.py 9\n\n9 mutants in 1 s: 9 killed\n"
    )
    shown = proof.SHOWN["mutation"](printed)
    assert "killed by" not in shown
    assert "test_rules" not in shown
    assert "9 mutants in 1 s: 9 killed" in shown


def test_a_part_that_was_run_is_kept_and_one_that_failed_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(proof, "PARTS", {"world": ["calendar", "2026", "11"], "planted": ["calendar", "no year"]})
    assert proof.main(["--out", str(tmp_path)]) == 1
    [version] = tmp_path.iterdir()
    assert sorted(path.name for path in version.iterdir()) == ["planted.unfinished", "world.txt"]
    heading, title, *_ = (version / "world.txt").read_text("utf-8").splitlines()
    assert "CPU" in heading
    assert "November 2026" in title
    (version / "world.txt").write_text("kept\n")
    assert proof.main(["world", "--out", str(tmp_path)]) == 0
    assert (version / "world.txt").read_text("utf-8") == "kept\n"
    assert "failed: planted" in capfd.readouterr().err


def test_the_table_of_faults_is_that_of_the_checks() -> None:
    said = {
        ticked(name)[0]: promise
        for name, promise, *_ in rows(ROOT / "docs/RELIABILITY.md", "fault", "what is promised")
    }
    assert said == {check.name: check.promise for check in checks().values()}


def test_the_table_of_invariants_names_those_that_are_checked() -> None:
    said = [name for name, _ in rows(ROOT / "docs/RELIABILITY.md", "name", "what holds")]
    assert said == [*(f"S{number}" for number in range(1, 16)), *(f"L{number}" for number in range(1, 6))]
