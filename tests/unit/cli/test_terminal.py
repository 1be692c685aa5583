"""Formatting of text, times, sizes and tables."""

from __future__ import annotations

import io
import json
import sys
from operator import itemgetter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobd.cli import terminal

NOW = 1_772_366_400_000


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ÄÖ 漢字", "plain ÄÖ 漢字"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x07\x7f\x9b2J", "\\x07\\x7f\\x9b2J"),
        ("abc\u202edcba", "abc\\u202edcba"),
        ("a\u2028b", "a\\u2028b"),
        ("\ud800", "\\ud800"),
    ],
)
def test_clean_escapes_control_characters(text: str, shown: str) -> None:
    assert terminal.clean(text) == shown
    assert terminal.clean(shown) == shown


@given(st.text())
def test_clean_text_is_one_printable_line(text: str) -> None:
    cleaned = terminal.clean(text)
    assert cleaned.splitlines() in ([], [cleaned])
    assert not any(ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 for char in cleaned)


@given(st.recursive(st.text() | st.integers(-(2**53), 2**53) | st.none(), lambda inner: st.lists(inner, max_size=3)))
def test_json_has_the_same_value_without_control_characters(value: Any) -> None:
    if _has_surrogate(value):
        return
    text = terminal.as_json(value)
    assert json.loads(text) == value
    assert terminal.clean(text) == text


def _has_surrogate(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_has_surrogate, value))
    return isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value)


def test_a_time_is_shown_with_its_age(zone: str) -> None:
    at = 1_772_366_400_000
    assert terminal.when(at, at + 724_000) == "2026-03-01 12:00:00 UTC (12 min 4 s ago)"
    assert terminal.when(at + 1, at - 2_000) == "2026-03-01 12:00:01 UTC (in 2.1 s)"
    assert terminal.when(None) == "-"


def numbered(*titles: str) -> terminal.Columns:
    """Return columns that show the fields of tuples."""
    return {title: itemgetter(number) for number, title in enumerate(titles)}


def test_a_table_in_a_pipe_is_not_wrapped_or_cut_and_its_cells_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 500
    terminal.table(numbered("ID", ">N"), [("\x1b]0;evil\x07", 1), (long, 22)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "\\x1b]0;evil\\x07" in lines[1]
    assert lines[2].split() == [long, "22"]


def test_text_of_several_lines_is_one_line_in_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.table(numbered("ID", "NOTE"), [("a", "\nfirst\tline\nsecond"), ("b", "only line\n")])
    assert capsys.readouterr().out.splitlines() == ["ID  NOTE", "a   first\\tline …", "b   only line"]


def test_text_of_several_lines_is_aligned_with_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.pairs([("id", "a"), ("error", "ValueError: x\n  in \x1b[2J\nid  b\n")])
    assert capsys.readouterr().out.splitlines() == [
        "id     a",
        "error  ValueError: x",
        "         in \\x1b[2J",
        "       id  b",
    ]


def test_in_a_pipe_a_long_cell_moves_only_its_own_line(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.table(
        numbered("ID", "STATUS", ">N"), [("x" * 200, "queued", 1), ("short", "failed", 22), ("other", "queued", 333)]
    )
    head, long, *others = capsys.readouterr().out.splitlines()
    assert long == "x" * 200 + "  queued    1"
    assert [head, *others] == ["ID     STATUS    N", "short  failed   22", "other  queued  333"]


class TerminalOutput(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(monkeypatch: pytest.MonkeyPatch, width: int, columns: list[str], rows: list[tuple[object, ...]]) -> list[str]:
    """Return the lines of a table on a terminal of this width, without styles."""
    for name, value in {"COLUMNS": str(width), "LINES": "50", "NO_COLOR": "1", "TERM": "dumb"}.items():
        monkeypatch.setenv(name, value)
    out = TerminalOutput()
    monkeypatch.setattr(sys, "stdout", out)
    terminal.table(numbered(*columns), rows)
    return out.getvalue().splitlines()


def test_on_a_terminal_words_are_folded_and_figures_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = drawn(
        monkeypatch, 40, ["ID", "STATUS", ">QUEUED"], [("x" * 60, "processing", 1_234_567), ("y", "queued", 8)]
    )
    assert max(map(len, lines)) <= 40
    assert sum(line.count("x") for line in lines) == 60, "nothing is left out"
    assert [line.count("1234567") for line in lines] == [0, 1, *[0] * (len(lines) - 2)]
    assert sum("processing" in line for line in lines) == 1


def test_a_table_that_is_too_wide_becomes_a_block_per_row(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = ["ID", "QUEUE", "KIND", ">TRIES", ">TOKEN"]
    rows: list[tuple[object, ...]] = [(f"{name}" * 9, "videos-of-all", "transcoding", 3, 10**12) for name in "ab"]
    lines = drawn(monkeypatch, 30, columns, rows)
    assert lines.count("") == 1
    assert [line.split() for line in lines[:5]] == [
        ["ID", "a" * 9],
        ["QUEUE", "videos-of-all"],
        ["KIND", "transcoding"],
        ["TRIES", "3"],
        ["TOKEN", str(10**12)],
    ]


def test_an_empty_table_says_so_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.table({"ID": "id"}, [], empty="No jobs.")
    assert capsys.readouterr() == ("", "No jobs.\n")
