"""Export and import: another daemon gets the same jobs, byte for byte and in the same order."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
import pytest

from jobd.cli.ctl import main
from tests import ROOT
from tests.support.cli_harness import CliDaemon, TerminalRun
from tests.support.store_files import edit_store

# Payloads as callers write them. A conversion to Python values and back would change them.
ODD: Final = [
    '{"b":1,"a":2,"b":3}',
    "[1e999, 1.0, 1.10, 12345678901234567890123456789, -0]",
    '"\\u00e4\\/ä"',
    '{\n  "broken": [\n    "over", "lines"\n  ]\r\n}',
    "null",
    '""',
]
MANY: Final = 450  # pages of 200


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CliDaemon]:
    daemon = CliDaemon(tmp_path_factory.mktemp("here"))
    fill(daemon)
    yield daemon
    assert daemon.stop() == 0


@pytest.fixture
def target(tmp_path: Path) -> Iterator[CliDaemon]:
    """An empty daemon."""
    daemon = CliDaemon(tmp_path)
    yield daemon
    assert daemon.stop() == 0


def fill(daemon: CliDaemon) -> None:
    """Jobs of every status, with every field that a job may have."""
    client = daemon.client
    for number, payload in enumerate(ODD):
        client.create_job(msgspec.Raw(payload.encode()), id=f"odd-{number}")
    jobs = [{"id": f"many-{number}", "queue": "many", "priority": number % 3} for number in range(MANY)]
    client.create_jobs(jobs)
    client.create_job(
        id="whole", queue="films", kind="film", priority=-7, max_attempts=3, delay_ms=3_600_000, max_stalls=1,
        on_stall="requeue", stall_after_ms=5_000, progress_timeout_ms=0, backoff={"kind": "fixed", "base_ms": 1},
    )  # fmt: skip
    for name in ("done", "wrong", "again", "gone", "half", "begun"):
        client.create_job(id=name, queue="films", kind="film", max_attempts=2)
    locks = {name: client.start_processing(name, "w-1").lock_id for name in ("done", "wrong", "again", "half", "begun")}
    client.complete_job(
        "done",
        lock_id=locks["done"],
        download_url="https://example.org/1",
        file_path="/f",
        storage_key="k",
        metadata={"n": [1]},
    )
    client.fail_job("wrong", lock_id=locks["wrong"], error_message="it broke\n»so«", error_code="E1", retry=False)
    client.fail_job("again", lock_id=locks["again"], error_message="not yet", retry_after_ms=3_600_000)
    client.cancel_job("gone", "nobody wants it")
    client.update_progress("half", lock_id=locks["half"], progress=41.5, message="nearly")


def exported(daemon: CliDaemon, *argv: str) -> list[bytes]:
    done = subprocess.run(
        [sys.executable, "-m", "jobd.cli.ctl.main", "export", *argv],
        env={**daemon.env, **daemon.client_environ}, cwd=ROOT, capture_output=True, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.stdout == b"".join(line + b"\n" for line in lines)
    assert f"{len(lines)} jobs exported\n".encode() == done.stderr or len(lines) == 1
    return lines


def ids(lines: list[bytes]) -> list[str]:
    return [json.loads(line)["id"] for line in lines]


@pytest.mark.slow
def test_export_and_import_preserve_every_job(source: CliDaemon, target: CliDaemon, tmp_path: Path) -> None:
    file = tmp_path / "jobs.ndjson"
    assert source.run("jobd.cli.ctl.main", "export", str(file)).returncode == 0
    assert file.stat().st_mode & 0o777 == 0o600
    lines = file.read_bytes().splitlines()
    assert len(lines) == len(ODD) + MANY + 7
    assert source.run("jobd.cli.ctl.main", "export", str(file)).returncode == 2, "it is there already"
    assert source.run("jobd.cli.ctl.main", "export", str(file), "--yes").returncode == 0
    assert file.read_bytes().splitlines() == lines, "an export changes nothing"
    preview = target.run("jobd.cli.ctl.main", "import", "--dry-run", str(file))
    assert preview.returncode == 0
    assert len(preview.stdout.splitlines()) == len(lines)
    assert preview.stderr == f"{len(lines)} would be imported, 0 skipped, 0 rejected\n"
    assert "(many-7): would be created as queued" in preview.stdout
    assert target.client.list_jobs().jobs == []  # nothing was written
    moved = target.run("jobd.cli.ctl.main", "import", str(file))
    assert moved.stdout == f"{len(lines)} imported, 0 skipped, 0 rejected\n"
    exported_lines = exported(target)
    assert ids(exported_lines) == ids(lines), "the order of creation is the order of the queue"
    ended = {"half": "queued", "begun": "queued"}  # attempts are left, or the job had no progress
    for before, after in zip(lines, exported_lines, strict=True):
        name = json.loads(before)["id"]
        if name in ended:
            assert json.loads(before)["status"] == "processing"
            assert json.loads(before)["worker"] == "w-1"
            assert json.loads(after)["status"] == ended[name]
            assert json.loads(after)["stalls"] == 1
        else:
            assert after == before, name
    for number, payload in enumerate(ODD):
        stored = bytes(target.client.get_job(f"odd-{number}").payload)  # type: ignore[arg-type]
        assert stored == payload.replace("\n", " ").replace("\r", " ").encode(), (
            "line breaks between the parts are spaces now"
        )
    assert target.run("jobd.cli.ctl.main", "import", str(file)).stdout.startswith(f"0 imported, {len(lines)} skipped")


def test_an_export_without_the_jobs_in_quarantine_says_so(tmp_path: Path) -> None:
    daemon = CliDaemon(tmp_path)
    for job_id in ("good", "bad"):
        daemon.client.create_job(id=job_id)
    assert daemon.stop() == 0
    with edit_store(str(daemon.store)) as conn:
        conn.execute("UPDATE jobs SET created_at = created_at + 1 WHERE id = 'bad'")
    (tmp_path / "artifacts").rmdir()
    daemon = CliDaemon(tmp_path)
    done = daemon.run("jobd.cli.ctl.main", "export")
    assert (done.returncode, done.stderr) == (
        1,
        "1 job exported\n1 damaged job is in quarantine and missing from the export. "
        "Show them: jobd doctor --running\n",
    )
    assert ids(done.stdout.encode().splitlines()) == ["good"]
    assert daemon.stop() == 0


def test_defaults_of_the_daemon_are_not_exported(source: CliDaemon) -> None:
    lines = {json.loads(line)["id"]: json.loads(line) for line in exported(source)}
    assert (lines["gone"]["stall_after_ms"], lines["gone"]["progress_timeout_ms"]) == (None, None)
    assert (lines["whole"]["stall_after_ms"], lines["whole"]["progress_timeout_ms"]) == (5_000, 0)
    assert "lock" not in json.dumps(lines["begun"])


@pytest.mark.slow
def test_an_export_can_be_filtered(source: CliDaemon) -> None:
    assert ids(exported(source, "--status", "cancelled")) == ["gone"]
    assert ids(exported(source, "--queue", "films", "--status", "processing")) == ["half", "begun"]
    assert ids(exported(source, "--kind", "film")) == ["whole", "done", "wrong", "again", "gone", "half", "begun"]
    assert ids(exported(source, "--queue", "many")) == [f"many-{number}" for number in range(MANY)]
    assert exported(source, "--queue", "nowhere") == []


def test_a_terminal_shows_progress(source: CliDaemon) -> None:
    with TerminalRun(
        {**source.env, **source.client_environ}, "jobd.cli.ctl.main", "export", stdout=subprocess.DEVNULL
    ) as run:
        assert run.ended() == 0
    assert b"export" in run.said
    assert f"{len(ODD) + MANY + 7} jobs".encode() in run.said


def test_a_file_that_cannot_be_written_says_so(
    source: CliDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in source.client_environ.items():
        monkeypatch.setenv(name, value)
    assert main.main(["export", str(tmp_path / "nowhere" / "jobs")]) == 74
    assert "No such file" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_of_an_import_gives_reasons(target: CliDaemon, tmp_path: Path) -> None:
    target.client.create_job(id="old")
    file = tmp_path / "jobs.ndjson"
    file.write_text('{"id":"a"}\n{"id":"old"}\n{"id":"a"}\n{"id":"b","priority":7000}\n', encoding="utf-8")
    preview = target.run("jobd.cli.ctl.main", "import", str(file), "--dry-run")
    assert preview.returncode == 1  # as in the import itself
    lines = preview.stdout.splitlines()
    assert lines[:3] == [
        "line 1 (a): would be created as queued",
        "line 2 (old): would be skipped: A job with this id exists: it is queued.",
        "line 3 (a): would be skipped: Line 1 has the same id.",
    ]
    assert lines[3].startswith("line 4 (b): would be rejected: ")
    assert "priority" in lines[3]
    shown = target.run("jobd.cli.ctl.main", "import", str(file), "--dry-run", "--json")
    assert json.loads(shown.stdout)["wouldReject"] == 1
