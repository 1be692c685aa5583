"""The example that reads an old job table (docs/examples/import_old_jobs.py)."""

from __future__ import annotations

import importlib.util
import json
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests import ROOT


@pytest.fixture(scope="module")
def old_jobs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("import_old_jobs", ROOT / "docs/examples/import_old_jobs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_old_table_becomes_lines_of_an_import(
    old_jobs: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with sqlite3.connect(tmp_path / "old.db") as db:
        db.execute("CREATE TABLE jobs (id TEXT, type TEXT, status TEXT, progress INT, created_at TEXT, data TEXT)")
        db.execute("INSERT INTO jobs VALUES ('a', 'video', 'running', 40, '2025-01-01 10:00:00', '{\"x\": 1}')")
        db.execute("INSERT INTO jobs VALUES ('b', 'video', 'weird', 0, NULL, NULL)")
        db.execute("INSERT INTO jobs VALUES ('c', NULL, 'done', 100, 1735725600, 'plain text')")
        db.execute("INSERT INTO jobs VALUES ('d', NULL, 'done', 100, 'yesterday', NULL)")
    db.close()
    assert old_jobs.main([str(tmp_path / "old.db")]) == 1
    out, err = capsys.readouterr()
    assert [json.loads(line) for line in out.splitlines()] == [
        {
            "id": "a",
            "kind": "video",
            "status": "processing",
            "progress": 40.0,
            "created_at": 1_735_725_600_000,
            "payload": {"x": 1},
        },
        {"id": "c", "status": "completed", "progress": 100.0, "created_at": 1_735_725_600_000, "payload": "plain text"},
    ]
    assert err.startswith("row 2 (id b) is left out: unknown status 'weird': add --status weird=")
    assert "row 4 (id d) is left out: created_at: 'yesterday' cannot be read" in err


def test_a_csv_with_other_names_is_mapped(
    old_jobs: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.csv").write_text("nr,what,state\n7,mail,parked\n")
    argv = [str(tmp_path / "old.csv"), "--map", "id=nr", "--map", "kind=what", "--status", "parked=queued"]
    assert old_jobs.main(argv) == 0
    assert json.loads(capsys.readouterr().out) == {"id": "7", "kind": "mail", "status": "queued"}


def test_several_columns_go_into_the_payload(
    old_jobs: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.csv").write_text(
        'id,name,width,data,owner\n7,cat.mov,320,"{""hd"": true}",\n8,dog.mov,,5,eve\n9,,,,\n'
    )
    mapped = ["--map", "payload.file=name", "--map", "payload.width=width", "--map", "metadata.owner=owner"]
    assert old_jobs.main([str(tmp_path / "old.csv"), *mapped]) == 1
    out, err = capsys.readouterr()
    assert [json.loads(line) for line in out.splitlines()] == [
        {"id": "7", "status": "queued", "payload": {"hd": True, "file": "cat.mov", "width": 320}},
        {"id": "9", "status": "queued"},
    ]
    assert err == "row 2 (id 8) is left out: payload.file: the payload column of this row is not a JSON object\n"
    (tmp_path / "old.csv").write_text("id,name,owner\n7,cat.mov,eve\n")
    assert old_jobs.main([str(tmp_path / "old.csv"), "--map", "payload.file=name", *mapped[4:]]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line == {"id": "7", "status": "queued", "payload": {"file": "cat.mov"}, "metadata": {"owner": "eve"}}


@pytest.mark.parametrize("name", ["nope", "kind.x", "payload.", "nope.x"])
def test_an_unknown_field_is_rejected(old_jobs: ModuleType, tmp_path: Path, name: str) -> None:
    (tmp_path / "old.csv").write_text("id,what\n7,mail\n")
    with pytest.raises(SystemExit, match=f"jobd has no field {name}; it has id, .*, payload.KEY$"):
        old_jobs.main([str(tmp_path / "old.csv"), "--map", f"{name}=what"])


def test_a_whole_payload_comes_before_its_keys_however_they_are_given(
    old_jobs: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.csv").write_text('id,extra,file\n7,"{""x"": 1}",cat.mov\n')
    argv = [str(tmp_path / "old.csv"), "--map", "payload.file=file", "--map", "payload=extra"]
    assert old_jobs.main(argv) == 0
    assert json.loads(capsys.readouterr().out)["payload"] == {"x": 1, "file": "cat.mov"}


def test_a_missing_column_is_rejected_with_a_list_of_columns(
    old_jobs: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.csv").write_text("id,what\n7,mail\n")
    with pytest.raises(SystemExit, match="there is no column nope; there are: id, what"):
        old_jobs.main([str(tmp_path / "old.csv"), "--map", "kind=nope"])
    (tmp_path / "old.csv").write_text("nr,what\n7,mail\n")
    with pytest.raises(SystemExit, match="add --map id=COLUMN; there are: nr, what"):
        old_jobs.main([str(tmp_path / "old.csv")])
    assert capsys.readouterr().out == ""


def test_unused_columns_are_named_once(
    old_jobs: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.csv").write_text("id,r2Key,lockId,colour,tries\na,out/a.zip,l1,red,3.0\nb,,l2,blue,2.5\nc,,,,,\n")
    assert old_jobs.main([str(tmp_path / "old.csv")]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {"id": "a", "attempt": 3, "storage_key": "out/a.zip", "status": "queued"}
    assert err.splitlines() == [
        "columns ignored: lockId, colour",
        "row 2 (id b) is left out: attempt: '2.5' cannot be read (not an integer)",
        "row 3 (id c) is left out: more values than columns",
    ]


def test_bytes_become_text_or_base64_or_skip_their_row(
    old_jobs: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with sqlite3.connect(tmp_path / "old.db") as db:
        db.execute("CREATE TABLE jobs (id TEXT, payload BLOB, message)")
        rows = [("a", b'{"x": 1}', None), ("b", b"\xff\x00", None), ("c", None, b"\xff"), (b"\xfe", None, None)]
        db.executemany("INSERT INTO jobs VALUES (?, ?, ?)", [*rows, ("d", "NaN", "fine")])
        db.execute("INSERT INTO jobs VALUES ('e', NULL, CAST(x'ff' AS TEXT))")
    db.close()
    assert old_jobs.main([str(tmp_path / "old.db")]) == 1
    out, err = capsys.readouterr()
    assert [json.loads(line) for line in out.splitlines()] == [
        {"id": "a", "payload": {"x": 1}, "status": "queued"},
        {"id": "b", "payload": "/wA=", "status": "queued"},
        {"id": "d", "payload": "NaN", "progress_message": "fine", "status": "queued"},
    ]
    assert [line.partition(" is left out: ")[0] for line in err.splitlines()] == [
        "row 3 (id c)",
        "row 4 (id fe)",
        "row 6 (id e)",
    ]


def test_a_closed_pipe_ends_the_example_silently(tmp_path: Path) -> None:
    (tmp_path / "old.csv").write_text("id\n" + "".join(f"job-{number}\n" for number in range(20_000)))
    example = [sys.executable, str(ROOT / "docs/examples/import_old_jobs.py"), str(tmp_path / "old.csv")]
    with subprocess.Popen(example, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        assert reader.stderr is not None
        assert json.loads(reader.stdout.readline())["id"] == "job-0"
        reader.stdout.close()
        assert reader.stderr.read() == b""
        assert reader.wait(150) == -signal.SIGPIPE


def test_an_unreadable_source_is_named(old_jobs: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "old.csv").write_bytes(b"id\n\xff\n")
    for source, what in (("old.csv", "utf-8"), ("none.db", "unable to open"), ("none.csv", "No such file")):
        with pytest.raises(SystemExit, match=f"cannot read .*{source}: .*{what}"):
            old_jobs.main([str(tmp_path / source)])


def test_the_example_only_names_fields_that_an_import_has(old_jobs: ModuleType) -> None:
    from jobd.model.commands import Import

    assert set(old_jobs.COLUMNS) <= set(Import.__struct_encode_fields__)
