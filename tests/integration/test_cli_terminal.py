"""The command line on a terminal: questions, dry runs, colours."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobd.cli.ctl import change_commands
from jobd.client import LockLost
from tests import ROOT
from tests.support.cli_harness import (
    READ_ONLY_TOKEN,
    TOKEN,
    CliDaemon,
    Jobctl,
    TerminalRun,
    on_a_terminal,
    plan_in,
    rejected_on_a_terminal,
)
from tests.support.daemon_process import DaemonProcess


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "before", "output"),
    [
        ("force-fail", "queued", "queued → failed"),
        ("force-reset", "failed", "failed → queued"),
        ("delete", "failed", "deleted"),
        ("cancel", "queued", "cancelled"),
    ],
)
def test_a_confirmed_action_applies_to_the_job_as_shown(
    verb: str, before: str, output: str, running: CliDaemon, jobctl: Jobctl
) -> None:
    job_id = f"seen-{verb}"

    def come_back() -> None:
        """Change the job and return it to the status that the operator saw."""
        if before == "queued":
            jobctl.ok("force-fail", job_id, "-y")
        jobctl.ok("force-reset", job_id, "-y")
        if before == "failed":
            jobctl.ok("force-fail", job_id, "-y", "--reason", "nobody has read this")

    running.client.create_job(id=job_id, queue=job_id)
    if before == "failed":
        jobctl.ok("force-fail", job_id, "-y")
    code, out, shown = on_a_terminal(running, b"y\n", verb, job_id, meanwhile=come_back)
    assert (code, out) == (4, "")
    assert f"{verb} job {job_id}, which is {before}?" in shown
    assert f"The job has changed since you read it: it is {before} now. Nothing was done" in shown
    job = running.client.get_job(job_id)
    assert (job.status, job.error_message) == (before, "nobody has read this" if before == "failed" else None)
    assert on_a_terminal(running, b"y\n", verb, job_id)[:2] == (0, f"{job_id}: {output}\n")
    entry = jobctl.json("audit", "--job", job_id, "--limit", "1")["entries"][0]
    assert (entry["action"], entry["job_id"], entry["changed"]) == (verb, job_id, 1)


@pytest.mark.slow
def test_json_is_the_same_after_a_question(running: CliDaemon, jobctl: Jobctl) -> None:
    ids = ("json-1", "json-2")
    for job_id in ids:
        running.client.create_job(id=job_id, queue="json")
    for verb, *reason in (["force-fail", "--reason", "wrong"], ["force-reset"], ["force-fail"], ["force-reset"]):
        response = json.loads(on_a_terminal(running, b"y\n", verb, ids[0], "--json", *reason)[1])
        unasked = jobctl.json(verb, ids[1], "-y", *reason)
        assert response.pop("timestamp") <= unasked.pop("timestamp")
        assert (response.pop("jobId"), unasked.pop("jobId")) == ids
        assert response == unasked
    code, shown = rejected_on_a_terminal(running, "delete", ids[0])
    assert (code, f"{ids[0]}: delete is rejected: it is queued. Only finished" in shown) == (4, True)
    response = json.loads(on_a_terminal(running, b"y\n", "cancel", ids[0], "--json")[1])
    seen = jobctl.json("job", ids[0])
    assert (response, response["status"]) == (seen, "cancelled")
    assert json.loads(on_a_terminal(running, b"y\n", "delete", ids[0], "--json")[1]) == seen
    code, shown = rejected_on_a_terminal(running, "delete", ids[0])
    assert (code, "[job_not_found]" in shown) == (4, True)


def test_the_plan_of_a_dry_run_of_one_job_can_be_applied(running: CliDaemon, jobctl: Jobctl) -> None:
    running.client.create_job(id="dry-1", queue="dry")
    code, out, err = jobctl.run("force-fail", "dry-1", "--dry-run")
    assert (code, out) == (0, "dry-1: would force-fail: it is queued\n")
    jobctl.ok("update", "dry-1", "--priority", "3")
    jobctl.says(4, "dry-1: changed since the plan", "apply", plan_in(err), "-y")
    assert running.client.get_job("dry-1").status == "queued"


@pytest.mark.parametrize("token", [TOKEN, READ_ONLY_TOKEN], ids=["admin", "reader"])
def test_a_dry_run_shows_old_and_new_values(
    token: str, jobctl: Jobctl, running: CliDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"dry-{'r' if token == READ_ONLY_TOKEN else 'a'}"
    jobctl.ok("submit", "--id", name, "--queue", name, "--delay", "2h", "--priority", "4")
    monkeypatch.setenv("ADMIN_TOKEN", token)
    before, at = running.client.get_job(name), r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"
    output = jobctl.ok("run-now", name, "--dry-run")
    assert re.fullmatch(rf"{name}: would run-now \(due {at} \(in .*\) → {at} \(\d+ m?s ago\)\): it is queued\n", output)
    output = jobctl.ok("update", name, "--priority", "5", "--max-attempts", "1", "--dry-run", "--reason", "r")
    assert output == f"{name}: would update (priority 4 → 5): it is queued\n"
    output = jobctl.ok("update", name, "--priority", "5", "--max-attempts", "3", "--run-at", "1h", "--dry-run")
    changes = rf"priority 4 → 5, due {at} \(in .*\) → {at} \(in .*\), max_attempts 1 → 3"
    assert re.fullmatch(rf"{name}: would update \({changes}\): it is queued\n", output)
    nothing = f"{name}: would update (no change): it is queued\n"
    assert jobctl.ok("update", name, "--priority", "4", "--dry-run") == nothing
    assert running.client.get_job(name) == before
    monkeypatch.setenv("ADMIN_TOKEN", TOKEN)
    would_be = jobctl.json("update", name, "--priority", "5", "--dry-run")
    assert (would_be["id"], would_be["priority"]) == (name, 5)
    assert running.client.get_job(name) == before
    jobctl.ok("run-now", name)
    monkeypatch.setenv("ADMIN_TOKEN", token)
    assert jobctl.ok("run-now", name, "--dry-run") == f"{name}: would run-now (no change): it is queued\n"
    assert jobctl.rejected("run-now", "never-was", "--dry-run")[0] == 4


def test_a_dry_run_uses_the_clock_of_the_daemon(
    jobctl: Jobctl, running: CliDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobctl.ok("submit", "--id", "dry-4", "--delay", "2h")
    fast = time.time() + 10 * 3600
    monkeypatch.setattr(change_commands, "time", SimpleNamespace(time=lambda: fast))
    assert "would run-now (due" in jobctl.ok("run-now", "dry-4", "--dry-run")


def test_a_dry_run_fails_like_the_action(jobctl: Jobctl, running: CliDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    jobctl.ok("submit", "--id", "dry-3", "--queue", "dry-3")
    grant = running.client.claim("w", queues=["dry-3"])[0]
    assert "would update (priority 0 → 1): it is processing" in jobctl.ok(
        "update", "dry-3", "--priority", "1", "--dry-run"
    )
    running.client.complete_job("dry-3", lock_id=grant.lock_id, file_path="/f")
    for argv in (["run-now", "dry-3"], ["update", "dry-3", "--priority", "1"]):
        code, err = jobctl.rejected(*argv)
        rejected = f"dry-3: {argv[0]} would be rejected: "
        assert jobctl.rejected(*argv, "--dry-run") == (code, err.replace("jobctl: ", rejected).replace(" [", ". ["))
        assert (code, err.endswith("[invalid_transition]\n")) == (4, True)
    wrong = ["update", "dry-3", "--run-at", "999999999999999", "--dry-run"]
    assert (jobctl.rejected(*wrong)[0], "[invalid_request]" in jobctl.rejected(*wrong)[1]) == (4, True)
    assert jobctl.rejected("update", "dry-3", "--dry-run")[0] == 2
    monkeypatch.setenv("ADMIN_TOKEN", READ_ONLY_TOKEN)
    for argv in (["run-now", "dry-3"], ["update", "dry-3", "--priority", "1"]):
        rejected = f"dry-3: {argv[0]} would be rejected: it is completed\n"
        assert jobctl.rejected(*argv, "--dry-run") == (4, rejected)
        assert jobctl.rejected(*argv)[0] == 5


def test_a_read_only_token_allows_a_dry_run(jobctl: Jobctl, monkeypatch: pytest.MonkeyPatch) -> None:
    jobctl.ok("submit", "--id", "dry-2")
    monkeypatch.setenv("ADMIN_TOKEN", READ_ONLY_TOKEN)
    assert jobctl.run("force-fail", "dry-2", "--dry-run") == (0, "dry-2: would force-fail: it is queued\n", "")
    assert jobctl.rejected("force-fail", "dry-2", "-y")[0] == 5


def test_the_adopted_result_is_the_one_that_was_shown(running: CliDaemon, jobctl: Jobctl) -> None:
    running.client.create_job(id="late-1", queue="late-1")

    def move_to(path: str) -> None:
        """Make a worker lose the job and complete it anyway."""
        grant = running.client.start_processing("late-1", f"w-{path}")
        jobctl.ok("force-reset", "late-1", "-y")
        with pytest.raises(LockLost):
            running.client.complete_job("late-1", lock_id=grant.lock_id, file_path=path)

    move_to("/first")
    assert "/second" not in jobctl.ok("late", "late-1")
    done = on_a_terminal(running, b"y\n", "adopt", "late-1", meanwhile=lambda: move_to("/second"))
    assert done[:2] == (0, "late-1: completed\n")
    assert "/second" in jobctl.ok("late", "late-1")
    assert running.client.get_job("late-1").file_path == "/first"


def test_the_effect_on_several_jobs_is_shown_before_the_question(running: CliDaemon) -> None:
    running.client.create_job(id="t3", queue="t3")
    running.client.create_job(id="t4", queue="t3")
    running.client.cancel_job("t4")
    over_there = ["--socket", running.client_environ["JOBD_SOCKET"]]
    code, out, shown = on_a_terminal(running, b"y\n", "cancel", "t3", "t4", *over_there)
    assert (code, out) == (4, "t3: cancelled\n")
    assert "t3: would cancel: it is queued" in shown
    assert "t4: cancel would be rejected: it is cancelled" in shown
    code, out, shown = on_a_terminal(running, b"n\n", "delete", "t3", "t4")
    assert (code, "cancelled → deleted" in out) == (1, True)
    assert "delete 2 jobs?" in shown
    code, out, _ = on_a_terminal(running, b"y\n", "retry", "--where", "queue=t3")
    assert (code, out.splitlines()[-1]) == (0, "retry: 2 jobs done")


def _drawn(running: CliDaemon, module: str, *argv: str, no_color: str) -> str:
    """Return the output of a program on a terminal."""
    env = {**running.env, **running.client_environ, "NO_COLOR": no_color, "TERM": "xterm-256color"}
    with TerminalRun(env, module, *argv) as run:
        assert run.ended() == 0, run.said
    return run.said.decode()


@pytest.mark.parametrize(
    ("module", "argv"),
    [
        ("jobd.cli.ctl.main", ("jobs", "--queue", "t2")),
        ("jobd.cli.ctl.main", ("job", "t2")),
        ("jobd.cli.ctl.main", ("health",)),
        ("jobd.cli.ctl.main", ("--help",)),
        ("jobd", ("backup", "--yes", "COPY")),
        ("jobd", ("check-config",)),
    ],
)
def test_no_color_prevents_every_escape_sequence(
    running: CliDaemon, tmp_path: Path, module: str, argv: tuple[str, ...]
) -> None:
    if "t2" in argv and not [job for job in running.client.list_jobs(queue="t2").jobs if job.id == "t2"]:
        running.client.create_job(id="t2", queue="t2")
    argv = tuple(str(tmp_path / "copy.db") if word == "COPY" else word for word in argv)
    plain = _drawn(running, module, *argv, no_color="1")
    assert "\x1b" not in plain
    assert plain.strip()
    if argv[0] in ("jobs", "job", "health", "backup"):
        assert "\x1b[" in _drawn(running, module, *argv, no_color="")  # an empty NO_COLOR has no effect


@pytest.mark.slow
def test_jobctl_and_backup_find_a_daemon_by_its_own_settings(tmp_path: Path) -> None:
    with DaemonProcess(tmp_path) as daemon:
        for command in (
            "jobd.cli.ctl.main submit --id a",
            "jobd.cli.ctl.main stats",
            f"jobd backup {tmp_path / 'copy.db'}",
        ):
            argv = [sys.executable, "-m", *command.split()]
            done = subprocess.run(argv, env=daemon.environ, cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
    settings = f'[worker]\nsocket = "{daemon.socket}"\n[admin]\nlisten = "unix:{daemon.admin_socket}"\n'
    with DaemonProcess(tmp_path, settings) as daemon:
        shown = {"ADMIN_TOKEN": daemon.environ["ADMIN_TOKEN"], "JOBD_CONFIG": str(daemon.config)}
        env = {name: value for name, value in daemon.environ.items() if not name.startswith("JOBD_")} | shown
        for command in ("jobd.cli.ctl.main job a", "jobd.cli.ctl.main stats"):
            argv = [sys.executable, "-m", *command.split()]
            done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr


def test_a_daemon_starts_without_rich() -> None:
    program = """
import sys
from jobd.cli.daemon import main
main._leave_out_rich()
assert "structlog" in sys.modules
assert "rich" not in sys.modules
import rich.table  # still importable
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=150)


@pytest.mark.parametrize(("answer", "reason"), [(b"bad CSV\n", "bad CSV"), (b"\n", None)])
def test_a_pause_asks_for_its_reason(answer: bytes, reason: str | None, running: CliDaemon, jobctl: Jobctl) -> None:
    env = {**running.env, **running.client_environ}
    with TerminalRun(env, "jobd.cli.ctl.main", "pause", "asked") as run:
        run.until(b"Reason: ")
        run.press(answer)
        assert run.ended() == 0
    [queue] = [each for each in jobctl.json("queues")["queues"] if each["name"] == "asked"]
    jobctl.ok("resume", "asked")
    assert (queue["paused"], queue["pause_reason"]) == (True, reason)
