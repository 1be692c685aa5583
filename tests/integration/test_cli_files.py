"""The files of a daemon on the command line: backup, restore, doctor and the configuration."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from jobd.api import admin_routes as admin_api
from jobd.cli import exit_codes as exits
from jobd.cli.ctl import main as ctl
from jobd.cli.daemon import main as jobd_cli
from jobd.cli.files import check_target
from jobd.model import responses
from jobd.model.storage import RESERVE_BYTES
from tests.support.cli_harness import TOKEN, CliDaemon, Jobctl
from tests.support.daemon_process import TOKEN as DAEMON_TOKEN
from tests.support.daemon_process import DaemonProcess
from tests.support.http_harness import FakeActor, HttpHarness


@pytest.mark.slow
def test_a_disk_that_rejects_new_jobs_is_unhealthy_and_exit_1(
    tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = small_disk / "jobd.db"
    monkeypatch.setenv("ADMIN_TOKEN", DAEMON_TOKEN)
    with DaemonProcess(tmp_path, JOBD_STORE_PATH=str(store)) as daemon:
        monkeypatch.setenv("JOBD_ADMIN_URL", f"unix:{daemon.admin_socket}")
        filler = small_disk / "filler"
        with suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        while (no := daemon.post("/v1/jobs", {"payload": "x" * 50_000})).status == 201:
            pass
        assert (no.status, no.error) == (507, "storage_full")
        assert f"bytes free at {store})" in no.body["message"]
        health = daemon.admin("GET", "health")
        assert (health.status, health.data["status"], health.data["database"]["path"]) == (503, "unhealthy", str(store))
        assert health.data["database"]["freeBytes"] < RESERVE_BYTES + (1 << 20)  # a released reserve counts as free
        assert daemon.get("/readyz").status == 200
        code = ctl.main(["health"])
        out = capsys.readouterr().out
        assert (code, "free at" in out, f"of 20.0 MiB ({store})" in out) == (1, True, True)
        os.truncate(filler, filler.stat().st_size - (3 << 20))
        daemon.wait_for_log(b"event=disk_has_room")
        while ctl.main(["health"]) != 0:  # it may be slow for a moment
            time.sleep(0.1)
        assert daemon.post("/v1/jobs", {}).status == 201
        assert daemon.stop() == 0
        with filler.open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        daemon.start()
        assert f"rejected=creates reserve=true path={store} free_bytes=0".encode() in daemon.log
        while (no := daemon.post("/v1/jobs", {"payload": "x" * 50_000})).status == 201:  # the start freed its log
            pass
        assert no.error == "storage_full"


@pytest.fixture
def jobd(capsys: pytest.CaptureFixture[str]) -> Jobctl:
    return Jobctl(capsys, jobd_cli.main)


@pytest.mark.slow
def test_backup_restore_and_doctor(jobctl: Jobctl, running: CliDaemon, tmp_path: Path, jobd: Jobctl) -> None:
    jobctl.ok("submit", "--id", "b1", "--queue", "b1")
    copy, restored = tmp_path / "copy.db", tmp_path / "restored.db"
    jobd.ok("backup", str(copy))
    assert jobd.run("backup", str(copy))[0] == 2
    jobd.ok("backup", str(copy), "--yes")
    assert copy.stat().st_mode & 0o777 == 0o600
    assert "the checksums of all rows are correct" in jobd.ok(
        "restore", str(copy), "--store", str(restored), "--dry-run"
    )
    assert not restored.exists()
    for wrong in ("/dev/null", __file__):
        assert jobd.run("restore", wrong, "--store", str(restored), "--dry-run")[0] == 78
    message = f"jobd: {__file__} is not a jobd database\n"
    assert jobd.run("restore", __file__, "--store", str(restored), "--yes") == (78, "", message)
    assert jobd.run("doctor", "--store", __file__) == (78, "", message)
    jobd.ok("restore", str(copy), "--store", str(restored))
    with sqlite3.connect(restored) as db:
        assert db.execute("SELECT count(*) FROM jobs WHERE id = 'b1'").fetchone() == (1,)
    db.close()
    assert jobd.run("restore", str(copy), "--store", str(restored))[0] == 2
    moved, log = tmp_path / "moved.db", tmp_path / "moved.db-wal"
    log.write_bytes(b"of a killed store that was renamed")
    for how in ("--yes", "--dry-run"):
        left = f"{log} is left over from another database, and SQLite would read it into {moved}"
        jobd.says(2, left, "restore", str(copy), "--store", str(moved), how)
        assert not moved.exists()
    jobd.says(0, "kept as", "restore", str(copy), "--store", str(restored), "--yes")
    assert jobd.run("doctor", "--store", str(restored)) == (0, "nothing is wrong\n", "")
    jobd.says(75, "--running", "doctor", "--store", str(running.store))
    for how in ("--yes", "--dry-run"):
        assert jobd.says(75, str(running.process.pid), "restore", str(copy), "--store", str(running.store), how) == ""


_OUT: Final = {
    "backup": ("jobd", "backup", "--yes"),
    "export": ("jobd.cli.ctl.main", "export", "--yes"),
    "artifact": ("jobd.cli.ctl.main", "artifact", "no-such-job", "--yes", "-o"),
}


@pytest.mark.parametrize("verb", list(_OUT))
def test_the_store_of_a_running_daemon_is_not_overwritten(running: CliDaemon, tmp_path: Path, verb: str) -> None:
    """Under its name, that of another of its files, and through a symlink."""
    (tmp_path / "link.db").symlink_to(running.store)
    before = {path.name: path.stat().st_ino for path in running.directory.iterdir()}
    for file in (running.store, running.store.with_name(f"{running.store.name}-wal"), tmp_path / "link.db"):
        done = running.run(*_OUT[verb], str(file), timeout=150)
        assert (done.returncode, done.stdout) == (75, "")
        assert f"the store of a running daemon (process {running.process.pid}): name another file" in done.stderr
    assert {path.name: path.stat().st_ino for path in running.directory.iterdir()} == before
    assert running.process.poll() is None


@pytest.mark.slow
def test_a_store_that_its_daemon_opened_by_a_symlink_is_not_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (tmp_path / "jobd.db").symlink_to(folder / "real.db")
    (folder / "real.db").touch()
    with DaemonProcess(tmp_path):
        for name in ("real.db", "real.db-wal"):
            with pytest.raises(exits.CliError, match="that another program uses: name another file") as caught:
                check_target(folder / name, yes=True)
            assert caught.value.code == 75
        with pytest.raises(exits.CliError, match="name another file"):
            check_target(tmp_path / "jobd.db", yes=True)


def test_a_damaged_row_is_named_with_its_fix(
    jobctl: Jobctl, tmp_path: Path, jobd: Jobctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobctl.ok("submit", "--id", "b2")
    jobctl.ok("submit", "--id", "b3")
    copy = tmp_path / "copy.db"
    doctor = ("doctor", "--store", str(copy))
    jobd.ok("backup", str(copy))
    with sqlite3.connect(copy) as db:
        db.execute("UPDATE jobs SET created_at = created_at + 1 WHERE id = 'b2'")
    db.close()
    code, out, _ = jobd.run(*doctor)
    assert code == 1
    assert "job b2: " in out
    assert "fix: " in out
    _, out, _ = jobd.run(*doctor, "--json")
    assert {"where", "what", "fix"} == set(json.loads(out)["defects"][0])
    for how in ("--yes", "--dry-run"):
        assert jobd.run(*doctor, "--accept", "nobody", how)[0] == 4
    before = copy.read_bytes()
    assert "job b2: the row would be accepted" in jobd.ok(*doctor, "--accept", "b2", "--dry-run")
    assert "all indexes would be rebuilt" in jobd.ok(*doctor, "--recount", "--dry-run")
    for verb in (["--accept", "b2"], ["--recount"]):  # there is no terminal
        assert jobd.says(2, "add --yes to skip it, or --dry-run to preview the effect", *doctor, *verb) == ""
    assert jobd.run(*doctor, "--dry-run")[0] == 2
    assert copy.read_bytes() == before
    prompts: list[str] = []

    def no(what: str) -> None:
        prompts.append(what)
        raise exits.CliError("nothing has changed")

    with monkeypatch.context() as patched:
        patched.setattr("jobd.cli.daemon.store_commands.need_terminal", lambda: None)
        patched.setattr("jobd.cli.daemon.store_commands.confirm", no)
        assert jobd.says(1, "job b2: the row would be accepted", *doctor, "--accept", "b2") == ""
        assert prompts == ["write these changes"]
        assert copy.read_bytes() == before
    assert "job b2: the row was accepted" in jobd.ok(*doctor, "--accept", "b2", "--yes")
    assert "Counted:" in jobd.run(*doctor, "--recount", "--yes")[1]
    assert jobd.run(*doctor, "--refold")[0] == 1
    for wrong in (["b2"], ["--all"], ["--accept"], ["--accept", "b2", "--all"], ["--refold"]):
        assert jobd.run(*doctor, *wrong, "--dry-run")[0] == 2, wrong
    for several in (["--accept", "b2", "b3"], ["--accept", "b2", "--accept", "b3"]):
        assert jobd.ok(*doctor, *several, "--dry-run").count("would be accepted with a new checksum") == 2
    assert jobd.ok(*doctor, "--accept", "--all", "--yes") == "no job is in quarantine, and no row is damaged\n"


def test_the_doctor_checks_the_running_daemon(jobctl: Jobctl, jobd: Jobctl) -> None:
    jobctl.ok("cleanup")
    code, out, err = jobd.run("doctor", "--running", "--json")
    defects = json.loads(out)["defects"]
    assert code == (1 if defects else 0), err
    assert jobd.run("doctor", "--running", "--accept", "x")[0] == 2
    assert jobd.run("doctor", "--rows")[0] == 2
    code, out, err = jobd.run("doctor", "--running", "--rows", "--json")
    assert (code, err) == (1 if defects else 0, "")
    assert not [each for each in json.loads(out)["defects"] if each["where"].startswith("job ")]


async def test_damaged_rows_of_a_running_daemon_are_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADMIN_TOKEN", "canary-token-0123456789")
    stats = responses.StatsView(9, {}, 0, 0, 0.0, None, 0, 1_772_366_400_000)
    async with HttpHarness(
        admin_api.ROUTES, tmp_path, admin=True, actor=FakeActor(lambda _: responses.Response(stats))
    ) as harness:
        argv = ["doctor", "--running", "--rows", "--json", "--admin-url", f"unix:{harness.path}"]
        assert await asyncio.to_thread(jobd_cli.main, argv) == 1
    found = [each for each in json.loads(capsys.readouterr().out)["defects"] if each["where"].startswith("job ")]
    assert [each["where"] for each in found] == ["job bad-1", "job bad-2", "job bad-2"]
    assert "jobd doctor --accept bad-2" in found[1]["fix"]


def test_a_second_daemon_on_a_store_exits_with_75(running: CliDaemon) -> None:
    second = running.run("jobd", *running.argv[:3], "--socket", f"{running.directory}/other.sock")
    assert second.returncode == 75
    assert str(running.process.pid) in second.stderr + second.stdout


def test_check_config_shows_each_value_with_its_source(
    jobctl: Jobctl, tmp_path: Path, jobd: Jobctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.toml").write_text('[locks]\nttl = "5m"\n')
    monkeypatch.delenv("JOBD_SOCKET")
    out = jobd.ok("check-config", "--config", str(tmp_path / "config.toml"))
    assert f'ttl = "5m"  # file {tmp_path}/config.toml' in out
    assert TOKEN not in out
    values = jobd.json("check-config", "--config", str(tmp_path / "config.toml"))["values"]
    assert values["locks.ttl"] == {"value": "5m", "source": f"file {tmp_path}/config.toml"}
    assert values["limits.bulk"] == {"value": 1000, "source": "default"}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["check-config", "--config", "/nowhere.toml"], "/nowhere.toml"),
        (["serve", "--set", "locks.tl=5m"], "locks.tl"),
        (["serve", "--set", "locks.ttl=5"], "15m"),
        (["serve", "--log-level", "loud"], "warning"),
        (["serve", "--listen", "127.0.0.1:0"], "token_file"),
        (["check-config", "--set", "locks.tl=5m"], "locks.tl"),
        (["check-config", "--listen", "127.0.0.1:0"], "token_file"),
    ],
)
def test_an_invalid_configuration_exits_with_78_and_one_line(
    argv: list[str], expected: str, jobctl: Jobctl, jobd: Jobctl
) -> None:
    jobd.rejects(78, expected, *argv)


def test_check_config_takes_the_flags_of_serve(jobctl: Jobctl, jobd: Jobctl) -> None:
    flags = ("--set", "locks.ttl=7m", "--set", "log.level=error", "--log-level", "debug", "--store", "/srv/jobd.db")
    values = jobd.json("check-config", *flags)["values"]
    shown = {key: value["value"] for key, value in values.items() if value["source"] == "flag"}
    assert shown == {"locks.ttl": "7m", "log.level": "debug", "store.path": "/srv/jobd.db"}


@pytest.mark.parametrize("verb", ["serve", "check-config"])
def test_set_without_a_value_is_a_usage_error(verb: str, jobd: Jobctl) -> None:
    assert jobd.run(verb, "--set", "locks.ttl")[0] == 2
