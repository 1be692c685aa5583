"""`jobd doctor` on a database with a tail: a note, the fold, and the cut with its dry run and its question."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path

import pytest

from jobd.cli.daemon import main as jobd_cli
from tests.support.store_files import edit_store, fill, leave_tail, make_store

PENDING = "the tables lack 1 committed batch (4 events) of the journal: the daemon writes them at its next start\n"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "jobd.db"


def make_tail(store: Path) -> int:
    """Make a store whose tables lack one record, and return its number."""

    async def make() -> int:
        maker = await make_store(str(store))
        [number] = await leave_tail(str(store), maker.any_batch(4))
        return number

    return asyncio.run(make())


def doctor(capsys: pytest.CaptureFixture[str], store: Path, *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = jobd_cli.main(["doctor", "--store", str(store), *argv])
    return code, *capsys.readouterr()


def test_a_tail_is_a_note(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tail(store)
    for option in ([], ["--refold"]):
        assert doctor(capsys, store, *option) == (0, f"{PENDING}nothing is wrong\n", "")
    code, out, _ = doctor(capsys, store, "--json")
    assert (code, json.loads(out)) == (0, {"defects": [], "notes": [PENDING.strip()]})


@pytest.mark.parametrize("option", [[], ["--recount", "--dry-run"]])
def test_a_full_disk_is_named(small_disk: Path, capsys: pytest.CaptureFixture[str], option: list[str]) -> None:
    """To read the log of a killed daemon, SQLite makes a file next to it."""
    store = small_disk / "jobd.db"
    make_tail(store)
    fill(small_disk)
    code, _, err = doctor(capsys, store, *option)
    assert code == 74
    assert err.startswith(f"jobd: The disk is full: {store}: ")


def test_a_damaged_record_is_cut(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    number = make_tail(store)
    with edit_store(str(store)) as conn:
        conn.execute("UPDATE journal SET at = 0")
    before = store.read_bytes()
    code, out, _ = doctor(capsys, store)
    assert code == 1
    assert f"fix: run `jobd doctor --cut-journal {number}`" in out
    code, out, _ = doctor(capsys, store, "--cut-journal", str(number), "--dry-run")
    assert code == 0
    assert out.startswith(f"would delete 1 record of the journal, from {number} on")
    assert doctor(capsys, store, "--cut-journal", str(number))[:2] == (2, ""), "there is no terminal"
    assert store.read_bytes() == before
    code, out, _ = doctor(capsys, store, "--cut-journal", str(number), "--yes")
    assert code == 0
    assert out.startswith(f"deleted 1 record of the journal, from {number} on")
    assert doctor(capsys, store) == (0, "nothing is wrong\n", "")
    code, _, err = doctor(capsys, store, "--cut-journal", str(number), "--yes")
    assert code == 4
    assert f"the journal has no record {number} or later" in err


def test_a_row_that_differs_from_its_events_is_named(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tail(store)
    with sqlite3.connect(store) as conn:
        edit = "json_set(body, '$.attempt', 7)"
        conn.execute(f"UPDATE jobs SET body = {edit} WHERE seq = (SELECT min(seq) FROM jobs)")
    conn.close()
    assert doctor(capsys, store, "--accept", "--all", "--yes")[0] == 0
    assert doctor(capsys, store) == (0, "nothing is wrong\n", "")
    code, out, _ = doctor(capsys, store, "--refold")
    assert code == 1
    assert "attempt is " in out


@pytest.mark.parametrize(
    "options",
    [
        ["--refold", "--recount"],
        ["--refold", "--running"],
        ["--cut-journal", "1", "--recount"],
        ["--cut-journal", str(1 << 63), "--dry-run"],
        ["--cut-journal", "1", "--accept", "a"],
        ["--cut-journal", "0"],
        ["--refold", "--yes"],
        ["--refold", "--dry-run"],
    ],
)
def test_options_that_do_not_go_together_are_rejected(
    store: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert doctor(capsys, store, *options)[0] == 2
