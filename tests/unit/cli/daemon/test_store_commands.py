"""`jobd doctor` on a database with a tail: a note, the fold, and the cut with its dry run and its question."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest

from jobd.cli.daemon import main as jobd_cli
from tests.support.cli_harness import Jobctl
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


@pytest.fixture
def doctor(store: Path, capsys: pytest.CaptureFixture[str]) -> Jobctl:
    return Jobctl(capsys, lambda argv: jobd_cli.main(["doctor", "--store", str(store), *argv]))


def test_a_tail_is_a_note(store: Path, doctor: Jobctl) -> None:
    make_tail(store)
    for option in ([], ["--refold"]):
        assert doctor.run(*option) == (0, f"{PENDING}nothing is wrong\n", "")
    assert doctor.json() == {"defects": [], "notes": [PENDING.strip()]}


@pytest.mark.parametrize("option", [[], ["--recount", "--dry-run"]])
def test_a_full_disk_is_named(small_disk: Path, capsys: pytest.CaptureFixture[str], option: list[str]) -> None:
    """To read the log of a killed daemon, SQLite makes a file next to it."""
    store = small_disk / "jobd.db"
    make_tail(store)
    fill(small_disk)
    doctor = Jobctl(capsys, lambda argv: jobd_cli.main(["doctor", "--store", str(store), *argv]))
    doctor.says(74, f"jobd: The disk is full: {store}: ", *option)


def test_a_damaged_record_is_cut(store: Path, doctor: Jobctl) -> None:
    number = make_tail(store)
    with edit_store(str(store)) as conn:
        conn.execute("UPDATE journal SET at = 0")
    before = store.read_bytes()
    code, out, _ = doctor.run()
    assert code == 1
    assert f"fix: run `jobd doctor --cut-journal {number}`" in out
    would = doctor.ok("--cut-journal", str(number), "--dry-run")
    assert would.startswith(f"would delete 1 record of the journal, from {number} on")
    assert doctor.run("--cut-journal", str(number))[:2] == (2, ""), "there is no terminal"
    assert store.read_bytes() == before
    done = doctor.ok("--cut-journal", str(number), "--yes")
    assert done.startswith(f"deleted 1 record of the journal, from {number} on")
    assert doctor.run() == (0, "nothing is wrong\n", "")
    doctor.says(4, f"the journal has no record {number} or later", "--cut-journal", str(number), "--yes")


def test_a_row_that_differs_from_its_events_is_named(store: Path, doctor: Jobctl) -> None:
    make_tail(store)
    with sqlite3.connect(store) as conn:
        edit = "json_set(body, '$.attempt', 7)"
        conn.execute(f"UPDATE jobs SET body = {edit} WHERE seq = (SELECT min(seq) FROM jobs)")
    conn.close()
    doctor.ok("--accept", "--all", "--yes")
    assert doctor.run() == (0, "nothing is wrong\n", "")
    code, out, _ = doctor.run("--refold")
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
def test_options_that_do_not_go_together_are_rejected(doctor: Jobctl, options: list[str]) -> None:
    assert doctor.run(*options)[0] == 2
