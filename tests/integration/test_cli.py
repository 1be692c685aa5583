"""The command lines against a real daemon: what they print, in which shape, with which exit code."""

from __future__ import annotations

import asyncio
import json
import math
import os
import pty
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import msgspec
import pytest
from msgspec.structs import replace

import jobd
from jobd.api import admin as admin_api
from jobd.cli import exit_codes as exits
from jobd.cli import tables_admin
from jobd.cli.ctl import change as ctl_change
from jobd.cli.ctl import main as ctl
from jobd.cli.ctl import plans as ctl_plan
from jobd.cli.daemon import checkup
from jobd.cli.daemon import main as jobd_cli
from jobd.cli.daemon.checkup import examine
from jobd.client import AdminClient, JobClient, JobdError, LockLost
from jobd.model import responses as answers
from tests import ROOT
from tests.support.daemon_process import TOKEN as DAEMON_TOKEN
from tests.support.daemon_process import Daemon, die_with_us
from tests.support.http_harness import DELIVERY, WEBHOOK, FakeActor, HttpHarness

TOKEN = "canary-token-0123456789abcdef"
READER_TOKEN = "canary-reader-0123456789abcdef"
READY_S = 20.0


class Running:
    """A daemon of `python -m jobd serve` with its places."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = folder / "jobs.db"
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("JOBD_", "ADMIN_"))}
        self.places = {
            "JOBD_SOCKET": str(folder / "worker.sock"),
            "JOBD_ADMIN_URL": f"unix:{folder}/admin.sock",
            "ADMIN_TOKEN": TOKEN,
            "JOBD_ARTIFACTS_URL": (folder / "artifacts").as_uri(),
            "JOBD_ADMIN_READONLY_TOKEN_FILE": str(folder / "readonly"),
        }
        (folder / "readonly").write_text(READER_TOKEN)
        (folder / "readonly").chmod(0o600)
        (folder / "artifacts").mkdir()
        self.argv = ["serve", "--store", str(self.store), "--socket", str(folder / "worker.sock")]
        self.argv += ["--admin-listen", f"unix:{folder}/admin.sock", "--config", str(folder / "config.toml")]
        (folder / "config.toml").touch()
        with (folder / "log").open("wb") as log:
            self.process = self.start("jobd", *self.argv, stdout=log, stderr=log)
        self.client = JobClient(f"unix:{folder}/worker.sock", retry_for_s=0)
        self._until_ready()

    def start(self, module: str, *argv: str, **options: Any) -> subprocess.Popen[str]:
        command, env = [sys.executable, "-m", module, *argv], {**self.env, **self.places}
        return subprocess.Popen(command, env=env, cwd=ROOT, text=True, preexec_fn=die_with_us, **options)

    def done(self, module: str, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
        env = {**self.env, **self.places}
        return subprocess.run(
            [sys.executable, "-m", module, *argv], env=env, cwd=ROOT, text=True, capture_output=True, **options
        )

    def _until_ready(self) -> None:
        until = time.monotonic() + READY_S
        while True:
            try:
                self.client.list_jobs(limit=1)
                return
            except JobdError:
                assert self.process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < until, (self.folder / "log").read_text()
            time.sleep(0.05)

    @contextmanager
    def configured(self, text: str) -> Iterator[None]:
        """The daemon with this configuration, as SIGHUP makes it read it; the one before afterwards."""
        self._reload(text)
        try:
            yield
        finally:
            self._reload("")

    def _reload(self, text: str) -> None:
        log = self.folder / "log"
        before = log.read_text().count("event=reloaded")
        (self.folder / "config.toml").write_text(text)
        self.process.send_signal(signal.SIGHUP)
        until = time.monotonic() + READY_S
        while log.read_text().count("event=reloaded") == before:
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.02)

    def stop(self) -> int:
        self.client.close()
        self.process.terminate()
        return self.process.wait()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    daemon = Running(tmp_path_factory.mktemp("d"))
    yield daemon
    assert daemon.stop() == 0, (daemon.folder / "log").read_text()
    assert TOKEN not in (daemon.folder / "log").read_text()


@pytest.fixture
def jobctl(running: Running, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ctl:
    for name in list(os.environ):
        if name.startswith(("JOBD_", "ADMIN_")):
            monkeypatch.delenv(name)
    for name, value in running.places.items():
        monkeypatch.setenv(name, value)
    return Ctl(capsys)


class Ctl:
    """jobctl in this process: `ok` expects exit 0 and gives stdout, `json` its value, `no` gives (code, stderr)."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def run(self, *argv: str) -> tuple[int, str, str]:
        self._capsys.readouterr()
        code = ctl.main(list(argv))
        return code, *self._capsys.readouterr()

    def ok(self, *argv: str) -> str:
        code, out, err = self.run(*argv)
        assert code == 0, err
        return out

    def json(self, *argv: str) -> Any:
        return json.loads(self.ok(*argv, "--json"))

    def no(self, *argv: str) -> tuple[int, str]:
        code, out, err = self.run(*argv)
        assert out == ""
        assert len(err.splitlines()) == 1
        return code, err


def _fields(shape: type[msgspec.Struct]) -> set[str]:
    return set(shape.__struct_encode_fields__)


JOB_FIELDS = _fields(answers.JobView) - {"repeated", "worker"}


# ---------------------------------------------------------------------------------------------------------------------
# submit, and looking


def test_submit_prints_the_id_and_nothing_else(jobctl: Ctl, running: Running) -> None:
    job_id = jobctl.ok("submit", "--queue", "s1", "--kind", "k", '{"a": [1, 2.50, "ü"]}').strip()
    job = running.client.get_job(job_id)
    assert (job.queue, job.kind, job.payload_value) == ("s1", "k", {"a": [1, 2.5, "ü"]})


def test_submit_takes_every_option(jobctl: Ctl) -> None:
    options = "--id s2 --priority -5 --delay 1h --expires 2h --max-attempts 4 --max-stalls 1 --on-stall fail "
    options += "--stuck-after 90s --max-processing 0 --backoff fixed --backoff-base 5s --backoff-max 1m --no-jitter"
    job = jobctl.json("submit", *options.split())
    assert set(job) == JOB_FIELDS
    named = (
        "id",
        "priority",
        "max_attempts",
        "max_stalls",
        "on_stall",
        "stuck_after_ms",
        "max_processing_ms",
        "payload",
    )
    assert [job[name] for name in named] == ["s2", -5, 4, 1, "fail", 90_000, 0, None]
    assert job["backoff"] == {"kind": "fixed", "base_ms": 5_000, "max_ms": 60_000, "jitter": False}
    assert abs(job["run_at"] - job["created_at"] - 3_600_000) < 60_000
    assert abs(job["expires_at"] - job["run_at"] - 3_600_000) < 60_000


def test_submit_reads_the_payload_from_stdin(running: Running) -> None:
    done = running.done("jobd.cli.ctl.main", "submit", "--json", "-", input='["from stdin"]')
    assert done.returncode == 0
    assert json.loads(done.stdout)["payload"] == ["from stdin"]
    assert running.done("jobd.cli.ctl.main", "submit", "-", input="not json").returncode == 2


def test_submitting_a_job_twice_returns_it_and_another_with_its_id_is_rejected(jobctl: Ctl) -> None:
    assert jobctl.ok("submit", "--id", "s3", "1") == jobctl.ok("submit", "--id", "s3", "1") == "s3\n"
    code, err = jobctl.no("submit", "--id", "s3", "2")
    assert code == 4
    assert "job_exists" in err


def test_an_error_of_the_daemon_exits_with_4_and_names_the_field(jobctl: Ctl) -> None:
    code, err = jobctl.no("submit", "--priority", "5000")
    assert code == 4
    assert "priority" in err
    assert jobctl.no("job", "never-was")[0] == 4


def test_jobs_are_paged_and_the_cursor_continues(jobctl: Ctl) -> None:
    for number in range(7):
        jobctl.ok("submit", "--queue", "s4", "--id", f"s4-{number}")
    first = jobctl.json("jobs", "--queue", "s4", "--limit", "3")
    assert [job["id"] for job in first["jobs"]] == ["s4-6", "s4-5", "s4-4"]
    rest = jobctl.json("jobs", "--queue", "s4", "--cursor", first["next_cursor"])
    assert [job["id"] for job in rest["jobs"]] == ["s4-3", "s4-2", "s4-1", "s4-0"]
    assert rest["next_cursor"] is None
    assert jobctl.ok("jobs", "--queue", "s4", "--all", "-q").split() == [f"s4-{number}" for number in range(6, -1, -1)]
    code, out, err = jobctl.run("jobs", "--queue", "s4", "--limit", "3")
    assert code == 0
    assert len(out.splitlines()) == 4
    assert first["next_cursor"] in err


def test_a_job_its_explanation_and_its_timeline_are_shown(jobctl: Ctl) -> None:
    jobctl.ok("submit", "--id", "s5", "--delay", "1h", '{"x": 1}')
    assert set(jobctl.json("job", "s5")) == JOB_FIELDS
    assert re.search(
        r"^due +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC \(in (59|60) m|^due .*\(in 1 h", jobctl.ok("job", "s5"), re.M
    )
    assert set(jobctl.json("why", "s5")) == {"state", "because", "next", "blocked_by", "do"}
    assert jobctl.ok("why", "s5").startswith("queued: ")
    events = jobctl.json("timeline", "s5")["events"]
    assert [set(event) for event in events] == [{"seq", "at", "type", "from", "to", "by", "reason", "details"}]
    assert "created" in jobctl.ok("timeline", "s5")
    assert set(jobctl.json("validate", "s5")) == {"isValid", "issues", "canProceed"}


def test_control_characters_of_a_job_are_escaped(jobctl: Ctl, running: Running) -> None:
    evil = "\x1b]0;owned\x07 \x9b31m line\nbreak \u202eback"
    jobctl.ok("submit", "--id", "s6", "--queue", "s6", json.dumps({"evil": evil}, ensure_ascii=False))
    grant = running.client.claim("evil-worker", queues=["s6"])[0]
    running.client.update_progress("s6", lock_id=grant.lock_id, progress=1, message=evil)
    running.client.fail_job("s6", lock_id=grant.lock_id, error_message=evil, error_code="e")
    for argv in (["job", "s6"], ["jobs", "--queue", "s6"], ["timeline", "s6"], ["why", "s6"]):
        for text in (jobctl.ok(*argv), jobctl.ok(*argv, "--json")):
            assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text), argv
    assert jobctl.json("job", "s6")["error_message"] == evil


def test_a_broken_pipe_inside_a_command_is_no_error() -> None:
    words = (
        "import click, errno, sys; from jobd.cli import exit_codes\n"
        "@click.command()\n"
        "def broken(): raise BrokenPipeError(errno.EPIPE, 'gone')\n"
        "sys.exit(exit_codes.run(broken, 'jobctl', []))"
    )
    ended = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_closed_pipe_is_no_error(running: Running) -> None:
    for number in range(300):
        running.client.create_job("x" * 400, queue="s7", id=f"s7-{number}")
    with running.start(
        "jobd.cli.ctl.main", "jobs", "--queue", "s7", "--all", "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


# ---------------------------------------------------------------------------------------------------------------------
# What changes jobs


@pytest.mark.parametrize("has_token", [True, False])
def test_a_dry_run_changes_nothing_and_yes_does_it(
    has_token: bool, jobctl: Ctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = f"c1-{has_token}"
    if not has_token:
        monkeypatch.delenv("ADMIN_TOKEN")
    jobctl.ok("submit", "--id", job_id)
    assert "would cancel" in jobctl.ok("cancel", job_id, "--dry-run")
    assert jobctl.json("job", job_id)["status"] == "queued"
    assert jobctl.ok("cancel", job_id, "--yes") == f"{job_id}: cancelled\n"
    assert jobctl.no("cancel", job_id, "--yes")[0] == 4
    assert jobctl.no("cancel", job_id, "--dry-run")[0] == 4


def test_errors_of_some_jobs_are_named_and_the_others_are_done(jobctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ADMIN_TOKEN")  # the worker API knows no plans
    jobctl.ok("submit", "--id", "c2")
    jobctl.ok("submit", "--id", "c3")
    code, out, err = jobctl.run("cancel", "c2", "no-such-job", "c3", "--yes")
    assert code == 4
    assert out == "c2: cancelled\nc3: cancelled\n"
    assert err.startswith("no-such-job: ")


def test_cancel_with_an_admin_token_is_audited_and_without_one_uses_the_worker_api(
    jobctl: Ctl, running: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    socket_ = running.places["JOBD_SOCKET"]
    (tmp_path / "token").write_text(TOKEN)
    running.client.create_jobs([{"id": f"cw{n}", "queue": "cw"} for n in range(4)])
    jobctl.ok("cancel", "cw0", "-y", "--reason", "not wanted", "--operator", "eve@desk")
    jobctl.ok("cancel", "cw1", "-y", "--reason", "not wanted", "--operator", "eve@desk", "--socket", socket_)
    monkeypatch.delenv("ADMIN_TOKEN")
    jobctl.ok("cancel", "cw2", "-y", "--operator", "eve@desk")
    jobctl.ok("cancel", "cw3", "-y", "--operator", "eve@desk", "--token-file", str(tmp_path / "token"))
    by = [running.client.timeline(f"cw{n}")[-1].by for n in range(4)]
    assert by == ["admin:eve@desk", "client", "client", "admin:eve@desk"]
    monkeypatch.setenv("ADMIN_TOKEN", TOKEN)
    kept = [jobctl.json("audit", "--job", f"cw{n}")["entries"] for n in range(4)]
    assert [len(entries) for entries in kept] == [1, 0, 0, 1]
    assert [kept[0][0][name] for name in ("who", "what", "reason")] == ["eve@desk", "cancel", "not wanted"]


def test_cancelling_several_jobs_makes_a_plan(jobctl: Ctl, running: Running) -> None:
    running.client.create_jobs([{"id": f"cp{n}", "queue": "cp"} for n in range(3)])
    code, out, err = jobctl.run("cancel", "cp0", "cp1", "--dry-run", "--reason", "too many")
    named = re.search(r"jobctl apply ([0-9a-f]{16})\n", err)
    assert named is not None
    assert (code, out.count("queued → cancelled")) == (0, 2)
    running.client.start_processing("cp0", "w")  # it is not what was seen any more
    code, out, err = jobctl.run("apply", named[1], "-y")
    assert (code, out) == (4, "cancel: 1 job done\n")
    assert "cp0: changed meanwhile: queued → processing" in err
    code, out, err = jobctl.run("cancel", "cp0", "cp2", "no-such-job", "-y")
    assert (code, out) == (4, "cancel: 2 jobs done\n")
    assert "There is no such job." in err
    kept = jobctl.json("audit", "--since", "1h", "--limit", "2")["entries"]
    assert [(each["what"], each["reason"], each["changed"]) for each in kept] == [
        ("plan-cancel", None, 2),
        ("plan-cancel", "too many", 1),
    ]


def test_an_operator_changes_a_job_from_status_to_status(jobctl: Ctl, running: Running) -> None:
    jobctl.ok("submit", "--id", "c4", "--queue", "c4", "--delay", "1h")
    assert set(jobctl.json("run-now", "c4")) == JOB_FIELDS
    grant = running.client.claim("w", queues=["c4"])[0]
    assert "held by w" in jobctl.ok("force-fail", "c4", "--dry-run")
    forced = jobctl.json("force-fail", "c4", "--yes", "--reason", "hung")
    assert set(forced) == _fields(answers.TransitionView)
    assert (forced["previousStatus"], forced["reason"]) == ("processing", "hung")
    with pytest.raises(JobdError, match="lock_lost"):
        running.client.complete_job("c4", lock_id=grant.lock_id)
    assert jobctl.ok("force-reset", "c4", "-y") == "c4: failed → queued\n"
    assert jobctl.json("update", "c4", "--priority", "7", "--max-attempts", "2", "--reason", "late")["priority"] == 7
    assert jobctl.json("audit", "--what", "update")["entries"][0]["reason"] == "late"
    set_ = ["--set", "file_path=/srv/out", "--set", 'metadata={"a": [1]}']
    assert jobctl.no("transition", "c4", "failed", "completed", "-y")[0] == 4
    said = 'c4: would transition queued → completed and set file_path "/srv/out", metadata {"a":[1]}: it is queued\n'
    assert jobctl.ok("transition", "c4", "queued", "completed", "--dry-run", *set_) == said
    rejected = "c4: transition queued → processing would be rejected: Job c4 is queued. Only a grant"
    assert rejected in jobctl.no("transition", "c4", "queued", "processing", "--dry-run")[1]
    for wrong, why in (("foo=1", "foo"), ("priority=99999", "priority"), ("storage_key=/etc", "must be relative")):
        for how in ("--dry-run", "-y"):
            code, err = jobctl.no("transition", "c4", "queued", "completed", how, "--set", wrong)
            assert (code, why in err) == (2, True), err
    jobctl.ok("transition", "c4", "queued", "completed", "-y", *set_)
    job = jobctl.json("job", "c4")
    assert (job["status"], job["file_path"], job["metadata"]) == ("completed", "/srv/out", {"a": [1]})
    assert jobctl.ok("delete", "c4", "--dry-run").startswith("c4: would delete")
    assert jobctl.ok("delete", "c4", "-y") == "c4: deleted\n"
    assert jobctl.no("job", "c4")[0] == 4


def test_jobs_are_found_by_text_and_by_time(jobctl: Ctl) -> None:
    jobctl.ok("submit", "--id", "se1", "--queue", "se", '{"file": "Holiday.mov"}')
    jobctl.ok("submit", "--id", "se2", "--queue", "se", '{"file": "other.mov"}')
    assert jobctl.ok("jobs", "-q", "--text", "holiday", "--queue", "se") == "se1\n"
    assert jobctl.ok("jobs", "-q", "--since", "1h", "--queue", "se") == "se2\nse1\n"
    assert jobctl.ok("jobs", "-q", "--until", "1h", "--queue", "se") == ""
    assert jobctl.ok("jobs", "-q", "--text", "se2", "--since", "1h", "--all") == "se2\n"
    jobctl.ok("cancel", "se1", "--yes")
    assert jobctl.ok("jobs", "-q", "--finished-since", "1h", "--queue", "se") == "se1\n"
    assert jobctl.ok("jobs", "-q", "--finished-until", "1h", "--queue", "se") == ""
    where = ["--where", "queue=se", "--where", "finished_since=1h"]
    assert jobctl.json("retry", *where, "--dry-run")["jobs"] == [
        {"id": "se1", "from": "cancelled", "to": "queued", "late_results": 0}
    ]
    assert jobctl.json("retry", *where, "--where", "finished_until=1h", "--dry-run")["jobs"] == []


def test_a_plan_of_many_jobs_is_shown_and_applied(jobctl: Ctl) -> None:
    for n in range(3):
        jobctl.ok("submit", "--id", f"pl{n}", "--queue", "pl")
    jobctl.ok("submit", "--id", "pl-other", "--queue", "pl-other")
    where = ["--where", "queue=pl", "--where", "since=1h"]
    out = jobctl.ok("force-fail", *where, "--dry-run")
    assert re.fullmatch(r"force-fail: 3 jobs \(plan [0-9a-f]{16}\)", out.splitlines()[0])
    assert "pl2  queued → failed" in out
    assert jobctl.json("job", "pl0")["status"] == "queued"
    assert jobctl.ok("force-fail", *where, "--yes", "--reason", "wrong input") == "force-fail: 3 jobs done\n"
    assert jobctl.json("job", "pl0")["error_message"] == "wrong input"
    assert jobctl.json("job", "pl-other")["status"] == "queued"
    plan = jobctl.json("retry", "--where", "text=PL1", "--where", "status=failed", "--dry-run")
    assert set(plan) == _fields(answers.PlanView)
    assert plan["jobs"] == [{"id": "pl1", "from": "failed", "to": "queued", "late_results": 0}]
    result = jobctl.json("retry", "pl1", "pl2", "--yes")
    assert set(result) == _fields(answers.PlanResult)
    assert (result["applied"], result["changed"]) == (2, [])
    code, out, err = jobctl.run("retry", "pl0", "pl1", "none", "-y")
    assert (code, out) == (4, "retry: 1 job done\n")
    assert err == ("2 jobs skipped: Only failed and cancelled jobs can be retried. There is no such job.\n")
    assert jobctl.run("retry", "none", "-y") == (
        4,
        "",
        "No job can be changed: 1 job skipped: There is no such job.\n",
    )
    assert jobctl.run("retry", "--where", "queue=nothing", "-y") == (0, "", "No job fits.\n")
    assert jobctl.ok("cancel", *where, "-y") == "cancel: 3 jobs done\n"
    assert jobctl.ok("delete", *where, "-y") == "delete: 3 jobs done\n"
    what = [each["what"] for each in jobctl.json("audit", "--since", "1h", "--limit", "5")["entries"]]
    assert what == ["plan-delete", "plan-cancel", "plan-retry", "plan-retry", "plan-force-fail"]


def test_apply_does_what_the_plan_showed(jobctl: Ctl, running: Running) -> None:
    for n in range(3):
        jobctl.ok("submit", "--id", f"ap{n}", "--queue", "ap")
    code, out, err = jobctl.run("cancel", "--where", "queue=ap", "--dry-run")
    named = re.search(r"jobctl apply ([0-9a-f]{16})\n", err)
    assert (code, out.count("queued → cancelled")) == (0, 3)
    assert named
    assert named[1] in out.splitlines()[0]
    jobctl.ok("submit", "--id", "ap3", "--queue", "ap")
    jobctl.ok("update", "ap1", "--priority", "3")
    assert jobctl.ok("apply", named[1], "--dry-run").count("queued → cancelled") == 3
    code, out, err = jobctl.run("apply", named[1], "--yes")
    assert (code, out) == (4, "cancel: 2 jobs done\n")
    assert err == "ap1: changed meanwhile: queued → queued. It has changed since the plan was made.\n"
    assert [running.client.get_job(f"ap{n}").status for n in range(4)] == ["cancelled", "queued", "cancelled", "queued"]
    code, out, err = jobctl.run("apply", named[1], "-y", "--json")
    again = json.loads(out)
    assert (code, again["applied"], again["repeated"], "was applied" in err) == (4, 2, True, True)
    assert jobctl.json("apply", named[1], "--dry-run")["result"]["applied"] == 2
    assert jobctl.run("apply", named[1], "--dry-run")[:2] == (0, "")
    assert jobctl.run("apply", named[1], "--yes")[:2] == (4, "cancel: 2 jobs done before, none now\n")
    code, err = jobctl.no("apply", "none", "-y")
    assert (code, "There is no plan none" in err) == (4, True)
    assert jobctl.no("apply", named[1])[0] == 2


def test_more_jobs_than_one_plan_holds_are_done_at_once(
    jobctl: Ctl, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(0, 10_002, 834):
        running.client.create_jobs([{"id": f"big{m}", "queue": "big"} for m in range(n, min(n + 834, 10_002))])
    out = jobctl.ok("cancel", "--where", "queue=big", "--dry-run")
    assert out.splitlines()[0] == "cancel: 10002 jobs (2 plans)"
    assert jobctl.ok("cancel", "--where", "queue=big", "-y") == "cancel: 10002 jobs done\n"
    monkeypatch.setattr(ctl_plan, "_AT_ONCE", 1)
    _, out, err = jobctl.run("delete", "--where", "queue=big", "--dry-run")
    assert "10000 jobs" in out.splitlines()[0]
    assert "and more after these" in out.splitlines()[0]
    assert "There are more" in err
    assert jobctl.ok("delete", "--where", "queue=big", "-y") == "delete: 10000 jobs done\ndelete: 2 jobs done\n"


def test_several_named_jobs_make_a_plan(jobctl: Ctl, running: Running) -> None:
    for n in range(4):
        jobctl.ok("submit", "--id", f"nj{n}", "--queue", "nj")
    running.client.start_processing("nj3", "w")
    out = jobctl.ok("force-fail", "nj0", "nj3", "--dry-run")
    assert "nj0  queued → failed" in out
    assert "nj3  processing → failed" in out
    assert jobctl.ok("force-fail", "nj0", "nj1", "-y", "--reason", "wrong") == "force-fail: 2 jobs done\n"
    code, out, err = jobctl.run("force-reset", "nj0", "nj2", "nj3", "-y", "--reason", "hung")
    assert (code, out) == (4, "force-reset: 2 jobs done\n")
    assert err == "1 job skipped: Only processing, failed and cancelled jobs can be reset.\n"
    assert jobctl.run("delete", "nj1", "none", "-y")[:2] == (4, "delete: 1 job done\n")
    running.client.start_processing("nj3", "w-hung")
    assert jobctl.ok("force-reset", "--where", "worker=w-hung", "-y") == "force-reset: 1 job done\n"
    assert running.client.get_job("nj3").status == "queued"
    what = [each["what"] for each in jobctl.json("audit", "--since", "1h", "--limit", "4")["entries"]]
    assert what == ["plan-force-reset", "plan-delete", "plan-force-reset", "plan-force-fail"]


def test_every_action_takes_a_reason(jobctl: Ctl) -> None:
    jobctl.ok("submit", "--id", "re1", "--delay", "1h")
    jobctl.ok("run-now", "re1", "--reason", "why 1")
    assert jobctl.json("timeline", "re1")["events"][-1]["reason"] == "why 1"
    for number, argv in enumerate(
        (
            ["cancel", "re1", "-y"],
            ["delete", "re1", "-y"],
            ["pause", "re"],
            ["resume", "re"],
            ["cleanup"],
            ["clock", "accept"],
        )
    ):
        jobctl.ok(*argv, "--reason", f"why {number + 2}")
    found = jobctl.json("audit", "--since", "1h", "--limit", "7")["entries"]
    assert [(each["what"], each["reason"]) for each in found[::-1]] == [
        ("run-now", "why 1"), ("cancel", "why 2"), ("delete", "why 3"), ("pause", "why 4"), ("resume", "why 5"),
        ("cleanup", "why 6"), ("accept-clock", "why 7"),
    ]  # fmt: skip
    events = [json.loads(line) for line in jobctl.ok("events", "--last", "100", "--json").splitlines()]
    assert [each["reason"] for each in events if each["type"] in ("deleted", "queue_paused", "queue_resumed")][-3:] == [
        "why 3", "why 4", "why 5",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["retry", "-y"], "one of the two"),
        (["apply", "-y"], "PLAN_ID"),
        (["force-reset", "a", "b"], "--dry-run"),
        (["cancel", "a", "--where", "queue=q", "-y"], "one of the two"),
        (["retry", "--where", "colour=red", "-y"], "NAME one of status"),
        (["retry", "--where", "queue=a", "--where", "queue=b", "-y"], "given twice"),
        (["retry", "--where", "since=once", "-y"], "how long ago"),
        (["delete", "--where", "queue=q"], "--dry-run"),
    ],
)
def test_an_invalid_selection_is_a_usage_error(argv: list[str], said: str, jobctl: Ctl) -> None:
    code, err = jobctl.no(*argv)
    assert code == 2
    assert said in err


def test_jobs_that_wait_for_a_retry_are_grouped_and_can_be_run_now(running: Running, jobctl: Ctl) -> None:
    for n in range(2):
        jobctl.ok("submit", "--id", f"ag{n}", "--queue", "ag", "--max-attempts", "3")
        grant = running.client.start_processing(f"ag{n}", "w")
        running.client.fail_job(
            f"ag{n}", lock_id=grant.lock_id, error_message=f"no road to {n}", retry_after_ms=600_000
        )
    found = [each for each in jobctl.json("failures")["groups"] if each["message"] == "no road to 1"]
    assert (found[0]["count"], found[0]["retrying"]) == (0, 2)
    name = found[0]["fingerprint"]
    assert any(line.split()[:3] == ["0", "2", name] for line in jobctl.ok("failures").splitlines())
    waiting = jobctl.ok("jobs", "-q", "--status", "queued", "--error", name, "--all").split()
    assert waiting == ["ag1", "ag0"]
    for job_id in waiting:
        jobctl.ok("run-now", job_id)
    assert {grant.job.id for grant in running.client.claim("w", queues=["ag"], limit=2)} == {"ag0", "ag1"}
    assert name not in jobctl.ok("failures", "--json")


def test_jobs_with_the_same_error_form_one_group(jobctl: Ctl) -> None:
    for n in range(3):
        jobctl.ok("submit", "--id", f"fa{n}", "--queue", "fa")
        jobctl.ok("force-fail", f"fa{n}", "-y", "--reason", f"no picture after {n} s")
    found = [each for each in jobctl.json("failures")["groups"] if each["message"] == "no picture after 2 s"]
    assert set(found[0]) == _fields(answers.FailureGroup)
    assert (found[0]["count"], found[0]["queues"], found[0]["error_code"]) == (3, ["fa"], "force_failed")
    name = found[0]["fingerprint"]
    assert found[0]["retrying"] == 0
    assert "RETRYING" in jobctl.ok("failures")
    assert name in jobctl.ok("failures")
    assert jobctl.ok("jobs", "-q", "--error", name) == "fa2\nfa1\nfa0\n"
    assert jobctl.ok("retry", "--where", f"error={name}", "-y") == "retry: 3 jobs done\n"
    assert name not in jobctl.ok("failures", "--json")
    assert jobctl.no("jobs", "--error", "nonsense")[0] == 4


def test_a_dry_run_of_maintenance_shows_its_effect(jobctl: Ctl) -> None:
    assert set(jobctl.json("cleanup", "--dry-run")) == _fields(answers.PreviewView) | {"plan_id"}
    assert "finished jobs to delete" in jobctl.ok("cleanup", "--dry-run")
    assert jobctl.json("recover-stuck", "--dry-run") == {"recover": [], "more": False, "plan_id": None}
    assert jobctl.run("recover-stuck", "--dry-run") == (0, "0 would be recovered\n", "")


def _stuck(running: Running, *ids: str, worker: str = "w-silent") -> list[str]:
    """The locks of jobs that count as stuck now, and that nobody recovers."""
    locks = []
    for job_id in ids:
        running.client.create_job(id=job_id, queue="time", stuck_after_ms=0)
        locks.append(running.client.start_processing(job_id, worker, lock_ttl_ms=1_000).lock_id)
    time.sleep(1.1)
    return locks


_NEVER: Final = '[cleanup]\nrecover_every = "0s"\n'


def test_the_plan_of_a_recovery_can_be_applied(running: Running, jobctl: Ctl) -> None:
    with running.configured(_NEVER):
        _, lock_id = _stuck(running, "time-1", "time-2")
        code, out, err = jobctl.run("recover-stuck", "--dry-run", "--reason", "they are dead")
        assert (code, out.splitlines()[0]) == (0, "2 would be recovered")
        named = re.fullmatch(r"To do exactly this, until [^:]+:\d\d:\d\d UTC.*: jobctl apply ([0-9a-f]{16})\n", err)
        assert named is not None, err
        running.client.update_progress("time-2", lock_id=lock_id, progress=40)
        shown = jobctl.ok("apply", named[1], "--dry-run")
        assert "recover-stuck: 2 jobs" in shown
        assert shown.count("processing → queued") == 2
        code, out, err = jobctl.run("apply", named[1], "-y")
        assert (code, out) == (4, "recover-stuck: 1 job done\n")
        assert "time-2: changed meanwhile: processing → processing." in err
        assert [running.client.get_job(each).status for each in ("time-1", "time-2")] == ["queued", "processing"]
        [deed] = jobctl.json("audit", "--what", "plan-recover-stuck", "--limit", "1")["entries"]
        assert (deed["reason"], deed["changed"]) == ("they are dead", 1)
        assert jobctl.run("apply", named[1], "-y")[0] == 4, "the same answer again"
        jobctl.ok("cancel", "time-1", "time-2", "-y")


def test_take_back_ends_the_grants_of_a_silent_worker(running: Running, jobctl: Ctl) -> None:
    with running.configured(_NEVER):
        _stuck(running, "back-3", worker="w ä/silent")
        assert "took back 1 job of w ä/silent" in jobctl.ok("take-back", "w ä/silent", "--yes")
        _stuck(running, "back-1", "back-2")
        assert jobctl.json("workers", "--state", "silent")["workers"][0]["worker"] == "w-silent"
        assert "w-silent (silent)" in jobctl.ok("locks")
        assert "Take its expired jobs back now: jobctl take-back w-silent" in jobctl.ok("why", "back-1")
        code, _, err = jobctl.run("take-back", "w-silent")
        assert (code, "--dry-run to see the effect" in err) == (2, True)
        seen = jobctl.ok("take-back", "w-silent", "--dry-run")
        assert "back-1: would be requeued: No update from worker w-silent" in seen
        assert "would take back 2 jobs of w-silent: 2 requeued, 0 failed" in seen
        assert running.client.get_job("back-1").status == "processing"
        done = jobctl.ok("take-back", "w-silent", "--yes", "--reason", "lost its power")
        assert "took back 2 jobs of w-silent: 2 requeued, 0 failed" in done
        assert [running.client.get_job(each).status for each in ("back-1", "back-2")] == ["queued", "queued"]
        code, _, err = jobctl.run("take-back", "w-silent", "-y")
        assert (code, "[worker_not_silent]" in err) == (4, True)
        code, _, err = jobctl.run("take-back", "w-unknown", "-y")
        assert (code, "[worker_not_found]" in err) == (4, True)
        [deed] = jobctl.json("audit", "--what", "take-back", "--limit", "3")["entries"][2:]
        assert (deed["reason"], deed["changed"], deed["details"]) == ("lost its power", 2, {"worker": "w-silent"})
    jobctl.ok("cancel", "back-1", "back-2", "back-3", "-y")


def test_the_plan_of_a_cleanup_run_can_be_applied_except_for_its_fixes(running: Running, jobctl: Ctl) -> None:
    with running.configured(_NEVER):
        soon = round(time.time() * 1000) + 500
        running.client.create_job(id="time-late", queue="time-late", expires_at=soon)
        grant = running.client.start_processing(running.client.create_job(queue="time-old").id, "w")
        old = running.client.complete_job(grant.job.id, lock_id=grant.lock_id, file_path="/f", expires_at=soon).id
        _stuck(running, "time-3")
        code, _, err = jobctl.run("cleanup", "--dry-run")
        assert code == 0
        assert re.fullmatch(r"To do exactly this, except for the fixes, until .*: jobctl apply .*\n", err), err
        plan_id = jobctl.json("cleanup", "--dry-run")["plan_id"]
        _, shown, asked = _on_a_terminal(running, b"n\n", "apply", plan_id)
        for line in ("time-3 +processing → queued", "time-late +queued → failed", f"{old} +completed → deleted"):
            assert re.search(line, shown), shown
        assert "Their history and their stored results are deleted" in shown
        assert "clean up 3 jobs?" in asked
        assert jobctl.ok("apply", plan_id, "-y") == "cleanup: 3 jobs done\n"
        assert jobctl.no("job", old)[0] == 4
        assert jobctl.json("cleanup", "--dry-run")["plan_id"] is None
    jobctl.ok("cancel", "time-3", "-y")


def test_a_read_only_token_gets_no_plan_of_maintenance(
    running: Running, jobctl: Ctl, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running.configured(_NEVER):
        _stuck(running, "time-4")
        monkeypatch.setenv("ADMIN_TOKEN", READER_TOKEN)
        for verb in ("recover-stuck", "cleanup"):
            code, out, err = jobctl.run(verb, "--dry-run")
            assert (code, err, out.splitlines()[0]) == (0, "", "1 would be recovered")
            assert jobctl.json(verb, "--dry-run")["plan_id"] is None
    monkeypatch.setenv("ADMIN_TOKEN", TOKEN)
    jobctl.ok("cancel", "time-4", "-y")


def test_a_maintenance_plan_that_is_not_complete_says_so(jobctl: Ctl, capsys: pytest.CaptureFixture[str]) -> None:
    view = msgspec.convert(jobctl.json("retry", "--where", "queue=none", "--dry-run"), answers.PlanView)
    ctl_plan.show_apply_command(replace(view, action="recover-stuck", more=True))
    assert "after applying it, --dry-run names the next one" in capsys.readouterr().err


def test_actions_are_in_the_audit_log(jobctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    jobctl.ok("submit", "--id", "au1")
    jobctl.ok("force-fail", "au1", "-y", "--reason", "wrong input", "--operator", "eve@desk")
    monkeypatch.setenv("SUDO_USER", "bob")
    assert jobctl.no("force-fail", "au1", "-y")[0] == 4
    jobctl.ok("pause", "au-q")
    jobctl.ok("resume", "au-q")
    found = jobctl.json("audit", "--job", "au1")["entries"]
    assert set(found[0]) == _fields(answers.AuditView)
    host = socket.gethostname()
    assert [(each["who"], each["what"], each["outcome"], each["changed"]) for each in found] == [
        (f"bob@{host}", "force-fail", "invalid_transition", 0),
        ("eve@desk", "force-fail", "done", 1),
    ]
    assert found[1]["reason"] == "wrong input"
    assert found[1]["address"] == f"unix uid={os.getuid()}"
    assert (found[1]["details"]["from"], found[1]["details"]["to"]) == ("queued", "failed")
    event = jobctl.json("timeline", "au1")["events"][-1]
    assert (event["by"], event["seq"]) == ("admin:eve@desk", found[1]["details"]["event"])
    lines = jobctl.ok("audit", "--who", "eve@desk", "--since", "1h", "--limit", "1").splitlines()
    assert lines[0].split() == ["TIME", "WHO", "FROM", "ACTION", "TARGET", "OUTCOME", "REASON"]
    assert "queued → failed" in lines[1]
    queued = jobctl.json("audit", "--who", f"bob@{host}", "--what", "pause")["entries"]
    assert [(each["queue"], each["job_id"]) for each in queued] == [("au-q", None)]
    assert jobctl.json("audit", "--since", "2020-01-01T00:00", "--what", "nothing") == {
        "entries": [],
        "next_cursor": None,
    }
    assert len(jobctl.json("audit", "--limit", "2")["entries"]) == 2


def test_an_import_is_one_audit_entry(jobctl: Ctl, tmp_path: Path) -> None:
    lines = tmp_path / "jobs"
    lines.write_text("".join(f'{{"id":"aui-{n}","status":"cancelled"}}\n' for n in range(30)) + "{}\n")
    jobctl.run("import", str(lines))
    jobctl.run("import", str(lines))
    again, first = jobctl.json("audit", "--what", "import", "--since", "1h", "--limit", "2")["entries"]
    assert (first["changed"], first["details"]) == (30, {"imported": 30, "skipped": 0, "refused": 1})
    assert (again["changed"], again["details"]) == (0, {"imported": 0, "skipped": 30, "refused": 1})
    jobctl.ok("delete", *(f"aui-{n}" for n in range(30)), "-y")


def test_a_stored_result_is_downloaded(jobctl: Ctl, running: Running, tmp_path: Path) -> None:
    jobctl.ok("submit", "--id", "c7", "--queue", "c7")
    target, content = tmp_path / "report.pdf", os.urandom(300_000)
    code, err = jobctl.no("artifact", "c7", "-o", str(target))
    assert (code, "no storage_key" in err) == (4, True)
    assert jobctl.no("artifact", "none")[0] == 4
    grant = running.client.claim("w", queues=["c7"])[0]
    running.client.complete_job("c7", lock_id=grant.lock_id, storage_key="c7/report.pdf")
    assert "any more" in jobctl.no("artifact", "c7", "-o", str(target))[1]
    assert not list(tmp_path.iterdir())
    (running.folder / "artifacts" / "c7").mkdir()
    (running.folder / "artifacts" / "c7" / "report.pdf").write_bytes(content)
    assert jobctl.ok("artifact", "c7", "-o", str(target)) == f"{target}: 293.0 KiB\n"
    assert target.read_bytes() == content
    target.write_text("mine")
    assert "--yes" in jobctl.no("artifact", "c7", "-o", str(target))[1]
    assert target.read_text() == "mine"
    jobctl.ok("artifact", "c7", "-o", str(target), "-y")
    assert target.read_bytes() == content
    done = subprocess.run(
        [sys.executable, "-m", "jobd.cli.ctl.main", "artifact", "c7"],
        env={**running.env, **running.places},
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == (content, b"")
    assert "would delete with its stored result c7/report.pdf" in jobctl.ok("delete", "c7", "--dry-run")
    (running.folder / "artifacts" / "c7" / "report.pdf").unlink()


def test_a_late_result_can_be_downloaded_before_it_is_adopted(jobctl: Ctl, running: Running, tmp_path: Path) -> None:
    jobctl.ok("submit", "--id", "c8", "--queue", "c8")
    grant = running.client.claim("w-late", queues=["c8"])[0]
    jobctl.ok("force-reset", "c8", "-y")
    (running.folder / "artifacts" / "c8").mkdir()
    (running.folder / "artifacts" / "c8" / "late.bin").write_bytes(b"late")
    with pytest.raises(LockLost) as lost:
        running.client.complete_job("c8", lock_id=grant.lock_id, storage_key="c8/late.bin")
    target = tmp_path / "late.bin"
    assert jobctl.no("artifact", "c8", "-o", str(target))[0] == 4
    assert jobctl.no("artifact", "c8", "--late-result", "1", "-o", str(target))[0] == 4
    assert not target.exists()
    jobctl.ok("artifact", "c8", "--late-result", str(lost.value.late_result), "-o", str(target))
    assert target.read_bytes() == b"late"


def test_an_operator_adopts_a_late_result(jobctl: Ctl, running: Running) -> None:
    jobctl.ok("submit", "--id", "c6", "--queue", "c6")
    assert jobctl.run("late", "c6") == (0, "", "No late results.\n")
    assert jobctl.no("adopt", "c6", "--dry-run")[0] == 4
    grant = running.client.claim("w-late", queues=["c6"])[0]
    jobctl.ok("force-reset", "c6", "-y")
    with pytest.raises(LockLost) as lost:
        running.client.complete_job("c6", lock_id=grant.lock_id, file_path="/srv/6", metadata={"a": 1})
    (late,) = jobctl.json("late", "c6")["late_results"]
    assert set(late) == _fields(answers.LateResultView)
    assert late["seq"] == lost.value.late_result
    code, out, _ = jobctl.run("late", "c6")
    assert code == 0
    assert "w-late" in out
    assert "/srv/6" in out
    assert '{"a":1}' in out
    again = running.client.claim("w", queues=["c6"])[0]
    code, _, err = jobctl.run("adopt", "c6", "--dry-run")
    assert code == 4
    assert "c6: adopt would be rejected: Job c6 is processing. Worker w holds it" in err
    assert "[invalid_transition]" in err
    assert "force-fail c6" in jobctl.no("adopt", "c6", "-y")[1]
    running.client.release_job("c6", lock_id=again.lock_id)
    what = f'late result {late["seq"]} of w-late (file_path /srv/6, metadata {{"a":1}})'
    assert jobctl.ok("adopt", "c6", "--dry-run") == f"c6: would adopt {what}: it is queued\n"
    assert jobctl.no("adopt", "c6", "-y", "--result", "1")[0] == 4
    adopted = jobctl.json("adopt", "c6", "-y", "--result", str(late["seq"]), "--reason", "it is whole")
    assert (adopted["status"], adopted["file_path"], adopted["metadata"]) == ("completed", "/srv/6", {"a": 1})
    assert "it is whole" in jobctl.ok("timeline", "c6")


def test_a_dry_run_respects_a_required_download_url(
    jobctl: Ctl, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    _came_late(running, jobctl, "du1")
    (late,) = jobctl.json("late", "du1")["late_results"]
    move = ("transition", "du1", "failed", "completed")
    assert "would adopt" in jobctl.ok("adopt", "du1", "--dry-run")
    with running.configured("[validation]\nrequire_download_url = true\n"):
        lacks = f"Late result {late['seq']} cannot be adopted: it has no download_url"
        code, out, err = jobctl.run("adopt", "du1", "--dry-run")
        assert (code, out, err.startswith(f"du1: adopt would be rejected: {lacks}")) == (4, "", True)
        assert err.endswith("[invalid_request]\n")
        assert jobctl.no("adopt", "du1", "-y") == (4, err.replace("du1: adopt would be rejected", "jobctl"))
        code, shown = _asked_nothing(running, "adopt", "du1")
        assert (code, lacks in shown) == (4, True)
        assert "but it cannot be adopted" in jobctl.json("why", "du1")["do"][0]
        assert lacks in jobctl.ok("late", "du1").splitlines()[-1]
        missing = "download_url is missing; [validation] require_download_url requires it [invalid_request]\n"
        code, err = jobctl.no(*move, "--dry-run")
        assert (code, err) == (
            4,
            f"du1: transition failed → completed would be rejected: {missing}".replace(" it [", " it. ["),
        )
        assert jobctl.no(*move, "-y") == (4, f"jobctl: {missing}")
        assert "would transition" in jobctl.ok(*move, "--set", "download_url=https://x.test/1", "--dry-run")
        monkeypatch.setenv("ADMIN_TOKEN", READER_TOKEN)
        code, err = jobctl.no("adopt", "du1", "--dry-run")
        assert (code, lacks in err) == (4, True), "who may only look is told, too"
        code, out, err = jobctl.run(*move, "--dry-run")
        assert (code, "would transition" in out) == (0, True)
        assert err == (
            "This token is read-only, so only the status was checked. A dry run on the daemon needs the admin token.\n"
        )
        assert jobctl.no("adopt", "du1", "-y")[0] == 5
    assert "would adopt" in jobctl.ok("adopt", "du1", "--dry-run")
    assert "it is failed" in jobctl.ok(*move, "--dry-run")
    assert running.client.get_job("du1").status == "failed"
    monkeypatch.setenv("ADMIN_TOKEN", TOKEN)
    done = [each["what"] for each in jobctl.json("audit", "--job", "du1", "--limit", "9")["entries"]]
    assert done == ["transition", "adopt", "force-fail"], "a dry run is no deed"


def _came_late(running: Running, jobctl: Ctl, *ids: str) -> None:
    """Failed jobs in a queue of this name, to each of which a result came late."""
    for job_id in ids:
        running.client.create_job(id=job_id, queue=ids[0])
        grant = running.client.claim("w-late", queues=[ids[0]])[0]
        jobctl.ok("force-fail", job_id, "-y")
        with pytest.raises(LockLost):
            running.client.complete_job(job_id, lock_id=grant.lock_id, file_path=f"/srv/{job_id}")


_GOES: Final = "1 late result that was not adopted. It is deleted with the job."
_INSTEAD: Final = "1 late result that was not adopted. Check whether it can be adopted instead."


def test_late_results_are_mentioned_before_they_are_deleted(
    jobctl: Ctl, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    _came_late(running, jobctl, "lt1")
    running.client.create_job(id="lt2", queue="lt2")
    running.client.cancel_job("lt2")
    told = f"It has {_GOES} See: jobctl late lt1\n"
    assert jobctl.ok("delete", "lt1", "--dry-run") == f"lt1: would delete: it is failed\n{told}"
    assert jobctl.ok("delete", "lt2", "--dry-run") == "lt2: would delete: it is cancelled\n"
    assert f"It has {_INSTEAD}" in jobctl.ok("force-reset", "lt1", "--dry-run")
    assert f"It has {_INSTEAD}" in jobctl.ok("retry", "lt1", "--dry-run")
    assert f"1 of these jobs has {_GOES} See jobctl late ID: lt1\n" in jobctl.ok("delete", "lt1", "lt2", "--dry-run")
    plan = jobctl.json("delete", "--where", "queue=lt1", "--dry-run")
    assert (plan["with_late_results"], [job["late_results"] for job in plan["jobs"]]) == (1, [1])
    shown = jobctl.ok("apply", plan["plan_id"], "--dry-run")
    assert _GOES in shown
    code, _, asked = _on_a_terminal(running, b"n\n", "delete", "lt1")
    assert (code, asked.index(_GOES) < asked.index("delete job lt1")) == (1, True)
    monkeypatch.setenv("ADMIN_TOKEN", READER_TOKEN)
    assert f"It has {_GOES}" in jobctl.ok("delete", "lt1", "--dry-run"), "who may look is told, too"


def test_a_queue_is_paused_and_resumed(jobctl: Ctl) -> None:
    jobctl.ok("submit", "--queue", "c5")
    assert "jobctl resume c-5" in jobctl.run("pause", "c-5")[2], "a slip of the finger"
    jobctl.ok("resume", "c-5")
    paused = jobctl.json("pause", "c5", "--reason", "deploy", "--until", "2h")
    listed = {queue["name"]: queue for queue in jobctl.json("queues")["queues"]}
    assert {name: listed["c5"][name] for name in paused if name != "queue"} == {
        "paused": True,
        "paused_at": paused["paused_at"],
        "paused_by": paused["paused_by"],
        "pause_reason": "deploy",
        "paused_until": paused["paused_until"],
    }
    assert paused["paused_by"].startswith("admin")
    assert 7_190_000 < paused["paused_until"] - paused["paused_at"] <= 7_200_000
    assert "by operator" in jobctl.ok("queues")
    assert "UTC: deploy" in jobctl.ok("queues")
    assert set(listed["c5"]) == _fields(answers.QueueView)
    assert jobctl.ok("resume", "c5") == "c5 is open\n"


def test_resume_of_an_unknown_queue_says_so(jobctl: Ctl) -> None:
    """Its name may be mistyped."""
    code, out, err = jobctl.run("resume", "c-typo")
    assert (code, out) == (0, "c-typo is open\n")
    assert "Queue c-typo has no jobs and was not paused" in err
    for prepare in (["pause", "c-typo"], ["submit", "--queue", "c-typo"]):
        jobctl.ok(*prepare)
        assert jobctl.run("resume", "c-typo") == (0, "c-typo is open\n", "")


def test_an_old_job_table_can_be_imported(jobctl: Ctl, running: Running, tmp_path: Path) -> None:
    (tmp_path / "old.csv").write_text("id,status,progress\ni1,running,40\ni2,done,100\ni3,pending,0\n")
    example = [sys.executable, str(ROOT / "docs/examples/import_old_jobs.py"), str(tmp_path / "old.csv")]
    lines = subprocess.run(example, capture_output=True, text=True, check=True).stdout
    (tmp_path / "jobs.jsonl").write_text(lines)
    assert jobctl.ok("import", str(tmp_path / "jobs.jsonl")) == "3 imported, 0 skipped, 0 rejected\n"
    assert [running.client.get_job(name).status for name in ("i1", "i2", "i3")] == ["failed", "completed", "queued"]
    (tmp_path / "jobs.jsonl").write_text(lines + '{"id": "not valid"}\nno json\n')
    code, out, _ = jobctl.run("import", str(tmp_path / "jobs.jsonl"), "--json")
    assert code == 1
    result = json.loads(out)
    assert (result["imported"], result["skipped"], [line["line"] for line in result["refused"]]) == (0, 3, [4, 5])


# ---------------------------------------------------------------------------------------------------------------------
# The daemon itself


def test_figures_and_lists_have_the_shapes_of_the_api(jobctl: Ctl) -> None:
    assert set(jobctl.json("stats")) == _fields(answers.StatsView)
    assert set(jobctl.json("health")) == _fields(answers.HealthView)
    assert set(jobctl.json("cleanup")) == _fields(answers.CleanupReport)
    assert set(jobctl.json("cleanup", "--last")) == _fields(answers.CleanupState)
    assert set(jobctl.json("recover-stuck")) == _fields(answers.RecoverStuckView)
    assert set(jobctl.json("clock")) == _fields(answers.ClockView)
    assert set(jobctl.json("reports")["reports"][0]) == _fields(answers.CleanupReport)
    assert set(jobctl.json("alerts")["alerts"][0]) == _fields(answers.AlertView)
    assert jobctl.json("workers")["workers"]
    assert "locks" in jobctl.json("locks")


def test_a_disk_that_rejects_new_jobs_is_unhealthy_and_exit_1(
    tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = small_disk / "jobd.db"
    monkeypatch.setenv("ADMIN_TOKEN", DAEMON_TOKEN)
    with Daemon(tmp_path, JOBD_STORE_PATH=str(store)) as daemon:
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
        assert health.data["database"]["freeBytes"] < 1 << 20
        assert daemon.get("/readyz").status == 200
        code = ctl.main(["health"])
        out = capsys.readouterr().out
        assert (code, "free at" in out, f"of 20.0 MiB ({store})" in out) == (1, True, True)
        os.truncate(filler, filler.stat().st_size - (3 << 20))
        daemon.until_said(b"event=disk_has_room")
        assert ctl.main(["health"]) == 0
        assert daemon.post("/v1/jobs", {}).status == 201
        assert daemon.stop() == 0
        with filler.open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        daemon.start()
        assert f"refused=creates reserve=true path={store} free_bytes=0".encode() in daemon.log
        assert daemon.post("/v1/jobs", {}).error == "storage_full"


@pytest.mark.parametrize(
    "verb",
    [
        "stats",
        "health",
        "cleanup",
        "recover-stuck",
        "locks",
        "queues",
        "workers",
        "alerts",
        "clock",
        "reports",
        "audit",
    ],
)
def test_every_list_is_printed_as_a_table(verb: str, jobctl: Ctl) -> None:
    code, out, err = jobctl.run(verb)
    assert code == 0, err
    assert out or err


def test_a_wrong_token_exits_with_5_and_is_not_printed(jobctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADMIN_TOKEN", "wrong-wrong-wrong-wrong-wrong")
    code, err = jobctl.no("stats")
    assert code == 5
    assert "wrong" not in err


def _jobd(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = jobd_cli.main(list(argv))
    return code, *capsys.readouterr()


def test_backup_restore_and_doctor(
    jobctl: Ctl, running: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobctl.ok("submit", "--id", "b1", "--queue", "b1")
    copy, restored = tmp_path / "copy.db", tmp_path / "restored.db"
    assert _jobd(capsys, "backup", str(copy))[0] == 0
    assert _jobd(capsys, "backup", str(copy))[0] == 2
    assert _jobd(capsys, "backup", str(copy), "--yes")[0] == 0
    assert copy.stat().st_mode & 0o777 == 0o600
    code, out, _ = _jobd(capsys, "restore", str(copy), "--store", str(restored), "--dry-run")
    assert code == 0
    assert "the checksums of all rows are correct" in out
    assert not restored.exists()
    for wrong in ("/dev/null", __file__):
        assert _jobd(capsys, "restore", wrong, "--store", str(restored), "--dry-run")[0] == 78
    assert _jobd(capsys, "restore", str(copy), "--store", str(restored))[0] == 0
    with sqlite3.connect(restored) as db:
        assert db.execute("SELECT count(*) FROM jobs WHERE id = 'b1'").fetchone() == (1,)
    db.close()
    assert _jobd(capsys, "restore", str(copy), "--store", str(restored))[0] == 2
    code, _, err = _jobd(capsys, "restore", str(copy), "--store", str(restored), "--yes")
    assert code == 0
    assert "kept as" in err
    assert _jobd(capsys, "doctor", "--store", str(restored)) == (0, "nothing is wrong\n", "")
    code, _, err = _jobd(capsys, "doctor", "--store", str(running.store))
    assert code == 75
    assert "--running" in err
    for how in ("--yes", "--dry-run"):
        code, out, err = _jobd(capsys, "restore", str(copy), "--store", str(running.store), how)
        assert (code, out) == (75, "")
        assert str(running.process.pid) in err


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["retry", "--where", "queue=nothing-here"], 0),
        (["delete", "--where", "queue=nothing-here"], 0),
        (["cancel", "no-such-job", "nor-this-one"], 4),
    ],
)
def test_json_prints_a_result_even_if_there_was_nothing_to_do(jobctl: Ctl, argv: list[str], code: int) -> None:
    ended, out, err = jobctl.run(*argv, "--yes", "--json")
    assert ended == code
    assert err.startswith("No job")
    found = msgspec.json.decode(out, type=answers.PlanResult)
    assert (found.action, found.applied, found.changed, found.refused) == (argv[0], 0, [], [])
    assert set(json.loads(out)) == _fields(answers.PlanResult)
    applied, out, _ = jobctl.run("apply", found.plan_id, "--yes", "--json")
    assert applied == 0
    assert msgspec.json.decode(out, type=answers.PlanResult) == found


_OUT: Final = {
    "backup": ("jobd", "backup", "--yes"),
    "export": ("jobd.cli.ctl.main", "export", "--yes"),
    "artifact": ("jobd.cli.ctl.main", "artifact", "no-such-job", "--yes", "-o"),
}


def _written(running: Running, verb: str, file: Path) -> subprocess.CompletedProcess[str]:
    return running.done(*_OUT[verb], str(file), timeout=60)


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-journal", ".lock", ".epoch", ".ballast"])
@pytest.mark.parametrize("verb", list(_OUT))
def test_the_store_of_a_running_daemon_is_not_overwritten(
    jobctl: Ctl, running: Running, verb: str, suffix: str
) -> None:
    file = running.store.with_name(running.store.name + suffix)
    before = {path.name: path.stat().st_ino for path in running.folder.iterdir()}
    done = _written(running, verb, file)
    assert (done.returncode, done.stdout) == (75, "")
    of = "belongs to" if suffix else "is"
    told = f"{file} {of} the store of a running daemon (process {running.process.pid}): name another file"
    assert told in done.stderr
    assert {path.name: path.stat().st_ino for path in running.folder.iterdir()} == before
    assert running.process.poll() is None


def test_a_store_is_not_overwritten_through_another_name(running: Running, tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to(running.store)
    (tmp_path / "folder").symlink_to(running.folder)
    for file in (tmp_path / "link.db", tmp_path / "folder" / running.store.name):
        before = running.store.stat().st_ino
        done = _written(running, "backup", file)
        assert done.returncode == 75
        assert f"(process {running.process.pid})" in done.stderr
        assert running.store.stat().st_ino == before


def test_a_store_that_its_daemon_opened_by_a_symlink_is_not_overwritten(running: Running, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (tmp_path / "jobd.db").symlink_to(folder / "real.db")
    (folder / "real.db").touch()
    with Daemon(tmp_path):
        for name in ("real.db", "real.db-wal"):
            before = (folder / name).stat().st_ino
            done = _written(running, "backup", folder / name)
            assert done.returncode == 75
            assert "that another program uses: name another file" in done.stderr
            assert (folder / name).stat().st_ino == before
        assert _written(running, "backup", tmp_path / "jobd.db").returncode == 75


@pytest.mark.parametrize("verb", list(_OUT))
def test_only_a_regular_file_is_replaced(running: Running, tmp_path: Path, verb: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")  # as /dev/stdout, which is a pipe here
    files = [tmp_path / name for name in ("pipe", "socket", "stdout")]
    for file in (*files, running.folder / "worker.sock"):
        before = file.lstat()
        done = _written(running, verb, file)
        assert done.returncode == 2
        assert f"{file} is not a regular file: name a new one, or one to overwrite" in done.stderr
        assert (file.lstat().st_ino, file.lstat().st_mode) == (before.st_ino, before.st_mode)


def test_a_backup_follows_a_symlink(running: Running, tmp_path: Path) -> None:
    """Also to what is not there yet."""
    link, target = tmp_path / "latest.db", tmp_path / "disk" / "today.db"
    target.parent.mkdir()
    link.symlink_to(target)
    for _ in range(2):
        assert _written(running, "backup", link).returncode == 0
        assert link.is_symlink()
        assert target.read_bytes().startswith(b"SQLite format 3")
    assert [path.name for path in target.parent.iterdir()] == ["today.db"]


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("suffix", ["-wal", "-journal"])
def test_a_backup_is_not_written_beside_the_log_of_another_database(
    running: Running, tmp_path: Path, suffix: str, is_there: bool
) -> None:
    """SQLite would read it into the copy."""
    target = tmp_path / "killed.db"
    if is_there:
        target.write_bytes(b"old")
    (tmp_path / f"killed.db{suffix}").write_bytes(b"log")
    done = _written(running, "backup", target)
    assert done.returncode == 2
    assert f"killed.db{suffix} is left over from another database" in done.stderr
    assert (target.read_bytes() if target.exists() else None) == (b"old" if is_there else None)


def test_a_damaged_row_is_named_with_its_fix(
    jobctl: Ctl, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobctl.ok("submit", "--id", "b2")
    jobctl.ok("submit", "--id", "b3")
    copy = tmp_path / "copy.db"
    assert _jobd(capsys, "backup", str(copy))[0] == 0
    with sqlite3.connect(copy) as db:
        db.execute("UPDATE jobs SET priority = priority + 1 WHERE id = 'b2'")
    db.close()
    code, out, _ = _jobd(capsys, "doctor", "--store", str(copy))
    assert code == 1
    assert "job b2: " in out
    assert "fix: " in out
    code, out, _ = _jobd(capsys, "doctor", "--store", str(copy), "--json")
    assert {"where", "what", "mend"} == set(json.loads(out)["problems"][0])
    for how in ("--yes", "--dry-run"):
        assert _jobd(capsys, "doctor", "--store", str(copy), "--accept", "nobody", how)[0] == 4
    before = copy.read_bytes()
    code, out, _ = _jobd(capsys, "doctor", "--store", str(copy), "--accept", "b2", "--dry-run")
    assert code == 0
    assert "job b2: the row would be accepted" in out
    code, out, _ = _jobd(capsys, "doctor", "--store", str(copy), "--recount", "--dry-run")
    assert code == 0
    assert "all indexes would be rebuilt" in out
    for verb in (["--accept", "b2"], ["--recount"]):  # nobody can be asked here
        code, out, err = _jobd(capsys, "doctor", "--store", str(copy), *verb)
        assert (code, out) == (2, "")
        assert "add --yes to do it, --dry-run to see the effect" in err
    assert _jobd(capsys, "doctor", "--store", str(copy), "--dry-run")[0] == 2
    assert copy.read_bytes() == before
    asked: list[str] = []

    def no(what: str) -> None:
        asked.append(what)
        raise exits.CliError("nothing was done")

    with monkeypatch.context() as patched:
        patched.setattr("jobd.cli.daemon.store.need_terminal", lambda: None)
        patched.setattr("jobd.cli.daemon.store.confirm", no)
        code, out, err = _jobd(capsys, "doctor", "--store", str(copy), "--accept", "b2")
        assert (code, out, asked) == (1, "", ["write that"])
        assert "job b2: the row would be accepted" in err
        assert copy.read_bytes() == before
    code, out, _ = _jobd(capsys, "doctor", "--store", str(copy), "--accept", "b2", "--yes")
    assert code == 0
    assert "job b2: the row was accepted" in out
    assert "Counted:" in _jobd(capsys, "doctor", "--store", str(copy), "--recount", "--yes")[1]
    for wrong in (["b2"], ["--all"], ["--accept"], ["--accept", "b2", "--all"]):
        assert _jobd(capsys, "doctor", "--store", str(copy), *wrong, "--dry-run")[0] == 2, wrong
    for several in (["--accept", "b2", "b3"], ["--accept", "b2", "--accept", "b3"]):
        code, out, _ = _jobd(capsys, "doctor", "--store", str(copy), *several, "--dry-run")
        assert (code, out.count("would be accepted with a new checksum")) == (0, 2)
    assert _jobd(capsys, "doctor", "--store", str(copy), "--accept", "--all", "--yes")[:2] == (
        0,
        "no job is in quarantine, and no row is damaged\n",
    )


def test_the_doctor_checks_the_running_daemon(jobctl: Ctl, capsys: pytest.CaptureFixture[str]) -> None:
    jobctl.ok("cleanup")
    code, out, err = _jobd(capsys, "doctor", "--running", "--json")
    problems = json.loads(out)["problems"]
    assert code == (1 if problems else 0), err
    assert _jobd(capsys, "doctor", "--running", "--accept", "x")[0] == 2
    assert _jobd(capsys, "doctor", "--rows")[0] == 2
    code, out, err = _jobd(capsys, "doctor", "--running", "--rows", "--json")
    assert (code, err) == (1 if problems else 0, "")
    assert not [each for each in json.loads(out)["problems"] if each["where"].startswith("job ")]


async def test_damaged_rows_of_a_running_daemon_are_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADMIN_TOKEN", "canary-token-0123456789")
    stats = answers.StatsView(9, {}, 0, 0, 0.0, None, 0, 1_772_366_400_000)
    async with HttpHarness(
        admin_api.ROUTES, tmp_path, admin=True, actor=FakeActor(lambda _: answers.Response(stats))
    ) as house:
        argv = ["doctor", "--running", "--rows", "--json", "--admin-url", f"unix:{house.path}"]
        assert await asyncio.to_thread(jobd_cli.main, argv) == 1
    found = [each for each in json.loads(capsys.readouterr().out)["problems"] if each["where"].startswith("job ")]
    assert [each["where"] for each in found] == ["job bad-1", "job bad-2", "job bad-2"]
    assert "jobd doctor --accept bad-2" in found[1]["mend"]


def test_a_second_daemon_on_a_store_exits_with_75(running: Running) -> None:
    second = running.done("jobd", *running.argv[:3], "--socket", f"{running.folder}/other.sock")
    assert second.returncode == 75
    assert str(running.process.pid) in second.stderr + second.stdout


def test_check_config_shows_each_value_with_its_source(
    jobctl: Ctl, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.toml").write_text('[locks]\nttl = "5m"\n')
    monkeypatch.delenv("JOBD_SOCKET")
    code, out, err = _jobd(capsys, "check-config", "--config", str(tmp_path / "config.toml"))
    assert code == 0, err
    assert f'ttl = "5m"  # file {tmp_path}/config.toml' in out
    assert TOKEN not in out
    code, out, err = _jobd(capsys, "check-config", "--config", str(tmp_path / "config.toml"), "--json")
    values = json.loads(out)["values"]
    assert values["locks.ttl"] == {"value": "5m", "source": f"file {tmp_path}/config.toml"}
    assert values["limits.bulk"] == {"value": 1000, "source": "default"}


@pytest.mark.parametrize(
    ("argv", "said"),
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
    argv: list[str], said: str, jobctl: Ctl, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = _jobd(capsys, *argv)
    assert (code, out) == (78, "")
    assert len(err.splitlines()) == 1
    assert said in err


def test_check_config_takes_the_flags_of_serve(jobctl: Ctl, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--set", "locks.ttl=7m", "--set", "log.level=error", "--log-level", "debug", "--store", "/srv/jobd.db")
    code, out, err = _jobd(capsys, "check-config", *flags, "--json")
    assert code == 0, err
    values = json.loads(out)["values"]
    told = {key: value["value"] for key, value in values.items() if value["source"] == "flag"}
    assert told == {"locks.ttl": "7m", "log.level": "debug", "store.path": "/srv/jobd.db"}


@pytest.mark.parametrize("verb", ["serve", "check-config"])
def test_set_without_a_value_is_a_usage_error(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _jobd(capsys, verb, "--set", "locks.ttl")[0] == 2


# ---------------------------------------------------------------------------------------------------------------------
# run, --wait and the example workers


def test_run_drains_a_queue_and_its_exit_code_reports_failures(running: Running) -> None:
    for number in (1, 2, 0):
        running.client.create_job(number, queue="r1", id=f"r1-{number}")
    script = 'read n; echo "::result file_path=/srv/$n"; echo "::meta n=$n"; test "$n" != 0'
    done = running.done("jobd.cli.ctl.main", "run", "--queue", "r1", "--drain", "--", "sh", "-c", script)
    assert done.returncode == 1, done.stderr
    jobs = {job.id: job for job in running.client.list_jobs(queue="r1").jobs}
    assert {name: job.status for name, job in jobs.items()} == {
        "r1-1": "completed",
        "r1-2": "completed",
        "r1-0": "failed",
    }
    assert (jobs["r1-2"].file_path, jobs["r1-2"].metadata_value) == ("/srv/2", {"n": 2})
    assert jobs["r1-0"].error_code == "exit:1"
    done = running.done("jobd.cli.ctl.main", "run", "--queue", "r1", "--drain", "true")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    running.client.create_job(queue="r1", id="r1-later", delay_ms=3_600_000)
    done = running.done("jobd.cli.ctl.main", "run", "--queue", "r1", "--drain", "true")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "jobctl run: drained; 1 job is left: 1 is not due yet.\n"


def test_a_run_that_exceeds_its_timeout_fails_with_timeout(running: Running) -> None:
    running.client.create_job(queue="r-timeout", id="r-timeout")
    limits = ("--timeout", "200ms", "--max-processing", "1h")
    done = running.done("jobd.cli.ctl.main", "run", "--queue", "r-timeout", *limits, "--once", "sleep", "1000")
    assert done.returncode == 1, done.stderr
    assert "it took longer than 0.2 s" in done.stderr
    job = running.client.get_job("r-timeout")
    assert (job.status, job.error_code) == ("failed", "timeout")
    assert job.error_message == "The run took longer than its timeout of 0.2 s."


def test_options_after_the_command_belong_to_it(running: Running) -> None:
    running.client.create_job(None, queue="r2", id="r2")
    done = running.done("jobd.cli.ctl.main", "run", "--queue", "r2", "--once", "echo", "--drain", "--json")
    assert done.returncode == 0, done.stderr
    assert "--drain --json" in done.stdout


@pytest.mark.parametrize(("command", "code"), [("true", 0), ("false", 1)])
def test_submit_waits_for_the_end(command: str, code: int, running: Running) -> None:
    queue = f"r3-{command}"
    waiting = running.start(
        "jobd.cli.ctl.main",
        "submit",
        "--queue",
        queue,
        "--wait",
        "--json",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert running.done("jobd.cli.ctl.main", "run", "--queue", queue, "--once", command).returncode == code
    out, err = waiting.communicate()
    assert waiting.returncode == code, err
    assert json.loads(out)["status"] == ("completed" if code == 0 else "failed")


def test_interrupting_a_wait_does_not_change_the_job(running: Running) -> None:
    waiting = running.start(
        "jobd.cli.ctl.main",
        "submit",
        "--id",
        "r4",
        "--queue",
        "r4",
        "--wait",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == "r4\n"
    waiting.send_signal(signal.SIGINT)
    waiting.communicate()
    assert waiting.returncode == 130
    assert running.client.get_job("r4").status == "queued"


@pytest.mark.skipif(shutil.which("jq") is None, reason="the shell example uses jq")
def test_the_shell_worker_of_the_docs(running: Running, tmp_path: Path) -> None:
    (tmp_path / "cat.txt").write_text("miaow\n" * 1000)
    payload = {"source": str(tmp_path / "cat.txt"), "target": str(tmp_path / "cat.txt.gz")}
    running.client.create_job(payload, queue="r5", id="r5")
    example = str(ROOT / "docs/examples/worker.sh")
    done = running.done("jobd.cli.ctl.main", "run", "--queue", "r5", "--once", "--", example)
    assert done.returncode == 0, done.stderr
    job = running.client.get_job("r5")
    assert job.file_path == str(tmp_path / "cat.txt.gz")
    assert job.metadata_value == {"bytes": (tmp_path / "cat.txt.gz").stat().st_size}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat.txt", "cat.txt.gz"]


def _node_runs_typescript() -> bool:
    """node 22.18 and later run TypeScript as it is."""
    node = shutil.which("node")
    if node is None:
        return False
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
    numbers = re.match(r"v(\d+)\.(\d+)", version)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) >= (22, 18)


@pytest.mark.skipif(not _node_runs_typescript(), reason="the TypeScript example runs on node 22.18 and later")
def test_the_typescript_worker_of_the_docs(running: Running) -> None:
    running.client.create_job([1, 2, 3.5], id="r6", priority=-1000)  # before what other tests have left there
    env = {**running.env, **running.places, "ONCE": "1"}
    subprocess.run(["node", str(ROOT / "docs/examples/worker.mts")], env=env, check=True, capture_output=True)
    job = running.client.get_job("r6")
    assert (job.status, job.metadata_value) == ("completed", {"sum": 6.5, "count": 3})


# ---------------------------------------------------------------------------------------------------------------------
# The doctor of a running daemon: each figure that is wrong is a problem with its mend


async def _findings(place: Path, prepare: Callable[[HttpHarness], None]) -> dict[str, str]:
    """What `jobd doctor --running` finds at a real door behind which the figures are ours."""
    stats = answers.StatsView(9, {}, 2, 0, 0.0, None, 0, 1_772_366_400_000)
    async with HttpHarness(
        admin_api.ROUTES, place, admin=True, actor=FakeActor(lambda _: answers.Response(stats))
    ) as house:
        house.fakes.deliveries_page = answers.DeliveryPage([], None)
        prepare(house)
        with AdminClient(f"unix:{house.path}", token="canary-token-0123456789", retry_for_s=0) as client:
            found = await asyncio.to_thread(examine, client)
    assert all(finding.what and finding.mend for finding in found)
    return {finding.where: finding.what for finding in found}


async def test_the_doctor_names_every_problem(tmp_path: Path) -> None:
    def prepare(house: HttpHarness) -> None:
        house.fakes.status = "degraded"

    found = await _findings(tmp_path, prepare)
    assert set(found) == {"database", "cache", "storage", "clock", "job bad-1", "validation", "jobs"}
    assert found["database"].startswith("degraded: ")
    assert found["jobs"] == "2 stalled now"


async def test_the_doctor_finds_nothing_in_a_healthy_daemon(tmp_path: Path) -> None:
    def prepare(house: HttpHarness) -> None:
        house.fakes.accepted = True

    assert set(await _findings(tmp_path, prepare)) == {"job bad-1", "validation", "jobs"}


async def _clock(place: Path, held: list[str], *argv: str) -> tuple[int, bool]:
    """The exit code of `jobctl clock …` against a daemon whose clock is suspect, and whether it is accepted."""
    async with HttpHarness(admin_api.ROUTES, place, admin=True) as house:
        house.fakes.past_jobs = held
        where = ["--admin-url", f"unix:{house.path}"]
        code = await asyncio.to_thread(ctl.main, ["clock", *argv, *where])
        return code, house.fakes.accepted


async def test_clock_accept_lists_the_jobs_to_delete_and_asks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADMIN_TOKEN", "canary-token-0123456789")
    held = ["old-1", "old-2"]
    assert await _clock(tmp_path, held, "accept") == (2, False)
    assert "add --yes to do it, --dry-run to see the effect" in capsys.readouterr().err
    assert await _clock(tmp_path, held, "accept", "--dry-run") == (0, False)
    assert "2: old-1 old-2 finished jobs would be deleted by age" in capsys.readouterr().out
    assert await _clock(tmp_path, held, "accept", "--dry-run", "--json") == (0, False)
    assert json.loads(capsys.readouterr().out) == {"heldJobs": held, "moreHeld": False}
    assert await _clock(tmp_path, held, "--yes") == (2, False)
    assert await _clock(tmp_path, held, "accept", "--yes") == (0, True)
    asked: list[str] = []
    monkeypatch.setattr("jobd.cli.ctl.admin.need_terminal", lambda: None)
    monkeypatch.setattr("jobd.cli.ctl.admin.confirm", asked.append)
    assert await _clock(tmp_path, held, "accept") == (0, True)
    assert asked == ["accept the clock"]
    assert "2: old-1 old-2 finished jobs would be deleted by age" in capsys.readouterr().err


def test_webhooks_are_listed_with_their_state(capsys: pytest.CaptureFixture[str]) -> None:
    soon = round(time.time() * 1000) + 5 * 60_000 + 12_000
    states = [
        replace(WEBHOOK, name=name, state=state, failing_since=since, next_try_at=next_)
        for name, state, since, next_ in (
            ("a", "starting", None, None),
            ("b", "closed", None, None),
            ("c", "closed", 1, soon),
            ("d", "open", 1, soon),
            ("e", "half_open", 1, None),
        )
    ]
    tables_admin.webhooks(states)
    rows = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0][2:4] == ["STATE", "NEXT TRY"]
    assert {row[0]: row[2:4] for row in rows[1:]} == {
        "a": ["starting", "-"],
        "b": ["in order", "-"],
        "c": ["failing", "in 5 m"],
        "d": ["on a break", "in 5 m"],
        "e": ["one message is tried", "-"],
    }


async def test_the_doctor_names_failing_webhooks_and_dead_lettered_messages(tmp_path: Path) -> None:
    now = 1_700_000_000_000

    def failing(house: HttpHarness) -> None:
        house.fakes.hooks = [replace(WEBHOOK, failing_since=now - 60_000, waiting=3, last_error="500: no")]

    def lost(house: HttpHarness, ended_at: int) -> None:
        given_up = replace(DELIVERY, state="given_up", ended_at=ended_at, error="401")
        house.fakes.deliveries_page = answers.DeliveryPage([given_up], None)

    said = (await _findings(tmp_path, failing))["webhook q"]
    assert "3 wait" in said
    assert said.endswith("500: no")
    said = (await _findings(tmp_path, lambda house: lost(house, now)))["webhook q"]
    assert "messages were dead-lettered" in said
    assert said.endswith("401")
    assert "webhook q" not in await _findings(tmp_path, lambda house: lost(house, now - 86_400_000))


MIB = 1 << 20
PASSED = {
    "disk": ("jobd_disk_free_bytes {}", 256 * MIB - 1, 256 * MIB, "256.0 MiB are left"),
    "write-ahead log": ("jobd_wal_bytes {}", 256 * MIB + 1, 256 * MIB, "grown to 256.0 MiB"),
    "event loop": ("jobd_loop_lag_seconds {}", 0.51, 0.5, "blocked for 0.5 s"),
    "mailbox": ("jobd_mailbox_limit_commands 100.0\njobd_mailbox_commands {}", 51, 50, "51% full"),
    "artifacts": ("jobd_artifact_sweep_behind_seconds {}", 901, 900, "15 m 1 s behind"),
    "queue film": ('jobd_queue_oldest_due_seconds{{queue="film"}} {}', 3601, 3600, "1 h"),
}


@pytest.mark.parametrize("where", PASSED)
def test_the_doctor_compares_figures_with_the_thresholds_of_the_rules(where: str) -> None:
    line, wrong, right, said = PASSED[where]
    (found,) = checkup._figures(f"{line.format(wrong)}\n")
    assert (found.where, said in found.what) == (where, True), found
    assert list(checkup._figures(f"{line.format(right)}\n")) == []
    assert list(checkup._figures("jobd_stuck_jobs 0\n")) == []


def test_the_doctor_names_some_of_many_queues_and_none_that_is_paused() -> None:
    lines = [f'jobd_queue_oldest_due_seconds{{queue="q-{number}"}} {4_000 + number}' for number in range(13)]
    lines.append('jobd_queue_paused{queue="q-12"} 1')
    found = list(checkup._figures("\n".join(lines) + "\n"))
    assert [each.where for each in found] == [*(f"queue q-{number}" for number in range(11, 1, -1)), "queues"]
    assert "of 2 more queues" in found[-1].what


def test_the_thresholds_of_the_doctor_are_those_of_the_rules() -> None:
    text = (Path(jobd.__file__).parent / "monitoring" / "jobd.rules.yml").read_text("utf-8")
    rules = {rule["alert"]: rule["expr"] for group in msgspec.yaml.decode(text)["groups"] for rule in group["rules"]}
    for each in checkup.THRESHOLDS:
        assert each.metric in rules[each.rule]
        sign, bound = rules[each.rule].rpartition("<" if each.is_least else ">")[1:]
        assert sign
        assert math.prod(float(factor) for factor in bound.split("*")) == each.bound, each.rule


# ---------------------------------------------------------------------------------------------------------------------
# On a terminal


def _on_a_terminal(
    running: Running, answer: bytes, *argv: str, meanwhile: Callable[[], object] | None = None
) -> tuple[int, str, str]:
    """jobctl with a terminal as stdin and stderr that answers `answer`: exit code, stdout, what the terminal showed.

    `meanwhile` happens between the question and the answer.
    """
    ours, theirs = pty.openpty()
    try:
        process = running.start("jobd.cli.ctl.main", *argv, stdin=theirs, stderr=theirs, stdout=subprocess.PIPE)
        os.close(theirs)
        shown = b""
        while b"[y/N]" not in shown:
            shown += os.read(ours, 1024)
        if meanwhile is not None:
            meanwhile()
        os.write(ours, answer)
        out, _ = process.communicate()
        with suppress(OSError):  # Linux's word for a terminal that all others have closed
            while piece := os.read(ours, 1024):
                shown += piece
        return process.returncode, out, shown.decode()
    finally:
        os.close(ours)


def test_a_question_is_asked_and_answered(running: Running) -> None:
    running.client.create_job(id="t1", queue="t1")
    code, out, shown = _on_a_terminal(running, b"n\n", "cancel", "t1")
    assert (code, out) == (1, "")
    assert "cancel job t1, which is queued?" in shown
    assert running.client.get_job("t1").status == "queued"
    assert _on_a_terminal(running, b"y\n", "cancel", "t1")[:2] == (0, "t1: cancelled\n")
    assert running.client.get_job("t1").status == "cancelled"


@pytest.mark.parametrize(
    ("verb", "before", "said"),
    [
        ("force-fail", "queued", "queued → failed"),
        ("force-reset", "failed", "failed → queued"),
        ("delete", "failed", "deleted"),
        ("cancel", "queued", "cancelled"),
    ],
)
def test_a_confirmed_action_applies_to_the_job_as_shown(
    verb: str, before: str, said: str, running: Running, jobctl: Ctl
) -> None:
    job_id = f"seen-{verb}"

    def come_back() -> None:
        """The job goes away and comes back to the status that was seen."""
        if before == "queued":
            jobctl.ok("force-fail", job_id, "-y")
        jobctl.ok("force-reset", job_id, "-y")
        if before == "failed":
            jobctl.ok("force-fail", job_id, "-y", "--reason", "nobody has read this")

    running.client.create_job(id=job_id, queue=job_id)
    if before == "failed":
        jobctl.ok("force-fail", job_id, "-y")
    code, out, shown = _on_a_terminal(running, b"y\n", verb, job_id, meanwhile=come_back)
    assert (code, out) == (4, "")
    assert f"{verb} job {job_id}, which is {before}?" in shown
    assert f"{job_id}: changed meanwhile: {before} → {before}" in shown
    job = running.client.get_job(job_id)
    assert (job.status, job.error_message) == (before, "nobody has read this" if before == "failed" else None)
    assert _on_a_terminal(running, b"y\n", verb, job_id)[:2] == (0, f"{job_id}: {said}\n")
    kept = jobctl.json("audit", "--job", job_id, "--limit", "1")["entries"][0]
    assert (kept["what"], kept["job_id"], kept["changed"]) == (f"plan-{verb}", job_id, 1)


def test_json_is_the_same_after_a_question(running: Running, jobctl: Ctl) -> None:
    ids = ("told-1", "told-2")
    for job_id in ids:
        running.client.create_job(id=job_id, queue="told")
    for verb, *reason in (["force-fail", "--reason", "wrong"], ["force-reset"], ["force-fail"], ["force-reset"]):
        asked = json.loads(_on_a_terminal(running, b"y\n", verb, ids[0], "--json", *reason)[1])
        unasked = jobctl.json(verb, ids[1], "-y", *reason)
        assert asked.pop("timestamp") <= unasked.pop("timestamp")
        assert (asked.pop("jobId"), unasked.pop("jobId")) == ids
        assert asked == unasked
    code, shown = _asked_nothing(running, "delete", ids[0])
    assert (code, f"{ids[0]}: delete is rejected: it is queued. Only finished" in shown) == (4, True)
    asked = json.loads(_on_a_terminal(running, b"y\n", "cancel", ids[0], "--json")[1])
    seen = jobctl.json("job", ids[0])
    assert (asked, asked["status"]) == (seen, "cancelled")
    assert json.loads(_on_a_terminal(running, b"y\n", "delete", ids[0], "--json")[1]) == seen
    code, shown = _asked_nothing(running, "delete", ids[0])
    assert (code, "[job_not_found]" in shown) == (4, True)


def test_the_plan_of_a_dry_run_of_one_job_can_be_applied(running: Running, jobctl: Ctl) -> None:
    running.client.create_job(id="dry-1", queue="dry")
    code, out, err = jobctl.run("force-fail", "dry-1", "--dry-run")
    assert (code, out) == (0, "dry-1: would force-fail: it is queued\n")
    named = re.search(r"jobctl apply ([0-9a-f]{16})\n", err)
    assert named is not None
    jobctl.ok("update", "dry-1", "--priority", "3")
    code, out, err = jobctl.run("apply", named[1], "-y")
    assert (code, "dry-1: changed meanwhile" in err) == (4, True)
    assert running.client.get_job("dry-1").status == "queued"


@pytest.mark.parametrize("token", [TOKEN, READER_TOKEN], ids=["admin", "reader"])
def test_a_dry_run_shows_old_and_new_values(
    token: str, jobctl: Ctl, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"dry-{'r' if token == READER_TOKEN else 'a'}"
    jobctl.ok("submit", "--id", name, "--queue", name, "--delay", "2h", "--priority", "4")
    monkeypatch.setenv("ADMIN_TOKEN", token)
    before, at = running.client.get_job(name), r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"
    said = jobctl.ok("run-now", name, "--dry-run")
    assert re.fullmatch(rf"{name}: would run-now \(due {at} \(in .*\) → {at} \(\d s ago\)\): it is queued\n", said)
    said = jobctl.ok("update", name, "--priority", "5", "--max-attempts", "1", "--dry-run", "--reason", "r")
    assert said == f"{name}: would update (priority 4 → 5): it is queued\n"
    said = jobctl.ok("update", name, "--priority", "5", "--max-attempts", "3", "--run-at", "1h", "--dry-run")
    changes = rf"priority 4 → 5, due {at} \(in .*\) → {at} \(in .*\), max_attempts 1 → 3"
    assert re.fullmatch(rf"{name}: would update \({changes}\): it is queued\n", said)
    nothing = f"{name}: would update (which changes nothing): it is queued\n"
    assert jobctl.ok("update", name, "--priority", "4", "--dry-run") == nothing
    assert running.client.get_job(name) == before
    monkeypatch.setenv("ADMIN_TOKEN", TOKEN)
    would_be = jobctl.json("update", name, "--priority", "5", "--dry-run")
    assert (would_be["id"], would_be["priority"]) == (name, 5)
    assert running.client.get_job(name) == before
    jobctl.ok("run-now", name)
    monkeypatch.setenv("ADMIN_TOKEN", token)
    assert jobctl.ok("run-now", name, "--dry-run") == f"{name}: would run-now (which changes nothing): it is queued\n"
    assert jobctl.no("run-now", "never-was", "--dry-run")[0] == 4


def test_a_dry_run_uses_the_clock_of_the_daemon(jobctl: Ctl, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    jobctl.ok("submit", "--id", "dry-4", "--delay", "2h")
    fast = time.time() + 10 * 3600
    monkeypatch.setattr(ctl_change, "time", SimpleNamespace(time=lambda: fast))
    assert "would run-now (due" in jobctl.ok("run-now", "dry-4", "--dry-run")


def test_a_dry_run_fails_like_the_action(jobctl: Ctl, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    jobctl.ok("submit", "--id", "dry-3", "--queue", "dry-3")
    grant = running.client.claim("w", queues=["dry-3"])[0]
    assert "would update (priority 0 → 1): it is processing" in jobctl.ok(
        "update", "dry-3", "--priority", "1", "--dry-run"
    )
    running.client.complete_job("dry-3", lock_id=grant.lock_id, file_path="/f")
    for argv in (["run-now", "dry-3"], ["update", "dry-3", "--priority", "1"]):
        code, err = jobctl.no(*argv)
        rejected = f"dry-3: {argv[0]} would be rejected: "
        assert jobctl.no(*argv, "--dry-run") == (code, err.replace("jobctl: ", rejected).replace(" [", ". ["))
        assert (code, err.endswith("[invalid_transition]\n")) == (4, True)
    wrong = ["update", "dry-3", "--priority", "9999", "--dry-run"]
    assert (jobctl.no(*wrong)[0], "[invalid_request]" in jobctl.no(*wrong)[1]) == (4, True)
    assert jobctl.no("update", "dry-3", "--dry-run")[0] == 2
    monkeypatch.setenv("ADMIN_TOKEN", READER_TOKEN)
    for argv in (["run-now", "dry-3"], ["update", "dry-3", "--priority", "1"]):
        rejected = f"dry-3: {argv[0]} would be rejected: it is completed\n"
        assert jobctl.no(*argv, "--dry-run") == (4, rejected)
        assert jobctl.no(*argv)[0] == 5


def test_a_read_only_token_allows_a_dry_run(jobctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> None:
    jobctl.ok("submit", "--id", "dry-2")
    monkeypatch.setenv("ADMIN_TOKEN", READER_TOKEN)
    assert jobctl.run("force-fail", "dry-2", "--dry-run") == (0, "dry-2: would force-fail: it is queued\n", "")
    assert jobctl.no("force-fail", "dry-2", "-y")[0] == 5


def test_the_adopted_result_is_the_one_that_was_shown(running: Running, jobctl: Ctl) -> None:
    running.client.create_job(id="late-1", queue="late-1")

    def bring(path: str) -> None:
        """A worker loses the job and completes it all the same."""
        grant = running.client.start_processing("late-1", f"w-{path}")
        jobctl.ok("force-reset", "late-1", "-y")
        with pytest.raises(LockLost):
            running.client.complete_job("late-1", lock_id=grant.lock_id, file_path=path)

    bring("/first")
    assert "/second" not in jobctl.ok("late", "late-1")
    done = _on_a_terminal(running, b"y\n", "adopt", "late-1", meanwhile=lambda: bring("/second"))
    assert done[:2] == (0, "late-1: completed\n")
    assert "/second" in jobctl.ok("late", "late-1")
    assert running.client.get_job("late-1").file_path == "/first"


def _asked_nothing(running: Running, *argv: str) -> tuple[int, str]:
    """As `_on_a_terminal`, of what is refused before anybody is asked: exit code, what the terminal showed."""
    ours, theirs = pty.openpty()
    try:
        process = running.start("jobd.cli.ctl.main", *argv, stdin=theirs, stderr=theirs, stdout=subprocess.PIPE)
        assert process.communicate()[0] == ""
        shown = os.read(ours, 4096).decode()
        os.close(theirs)
        return process.returncode, shown
    finally:
        os.close(ours)


def test_the_effect_on_several_jobs_is_shown_before_the_question(running: Running) -> None:
    running.client.create_job(id="t3", queue="t3")
    running.client.create_job(id="t4", queue="t3")
    running.client.cancel_job("t4")
    over_there = ["--socket", running.places["JOBD_SOCKET"]]
    code, out, shown = _on_a_terminal(running, b"y\n", "cancel", "t3", "t4", *over_there)
    assert (code, out) == (4, "t3: cancelled\n")
    assert "t3: would cancel: it is queued" in shown
    assert "t4: cancel would be rejected: it is cancelled" in shown
    code, out, shown = _on_a_terminal(running, b"n\n", "delete", "t3", "t4")
    assert (code, "cancelled → deleted" in out) == (1, True)
    assert "delete 2 jobs?" in shown
    code, out, _ = _on_a_terminal(running, b"y\n", "retry", "--where", "queue=t3")
    assert (code, out.splitlines()[-1]) == (0, "retry: 2 jobs done")


def _drawn(running: Running, module: str, *argv: str, no_color: str) -> str:
    """What a terminal as stdout and stderr is sent."""
    ours, theirs = pty.openpty()
    env = {**running.env, **running.places, "NO_COLOR": no_color, "TERM": "xterm-256color"}
    command = [sys.executable, "-m", module, *argv]
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=theirs, stderr=theirs, preexec_fn=die_with_us)
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # Linux's word for a terminal that all others have closed
            while piece := terminal.read(4096):
                shown += piece
        assert process.wait() == 0, shown
    return shown.decode()


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
    running: Running, tmp_path: Path, module: str, argv: tuple[str, ...]
) -> None:
    if "t2" in argv and not [job for job in running.client.list_jobs(queue="t2").jobs if job.id == "t2"]:
        running.client.create_job(id="t2", queue="t2")
    argv = tuple(str(tmp_path / "copy.db") if word == "COPY" else word for word in argv)
    plain = _drawn(running, module, *argv, no_color="1")
    assert "\x1b" not in plain
    assert plain.strip()
    if argv[0] in ("jobs", "job", "health", "backup"):
        assert "\x1b[" in _drawn(running, module, *argv, no_color="")  # an empty one means nothing


def test_jobctl_and_backup_find_a_daemon_by_its_own_settings(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon:
        for command in (
            "jobd.cli.ctl.main submit --id a",
            "jobd.cli.ctl.main stats",
            f"jobd backup {tmp_path / 'copy.db'}",
        ):
            argv = [sys.executable, "-m", *command.split()]
            done = subprocess.run(argv, env=daemon.environ, cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
    settings = f'[worker]\nsocket = "{daemon.socket}"\n[admin]\nlisten = "unix:{daemon.admin_socket}"\n'
    with Daemon(tmp_path, settings) as daemon:
        told = {"ADMIN_TOKEN": daemon.environ["ADMIN_TOKEN"], "JOBD_CONFIG": str(daemon.config)}
        env = {name: value for name, value in daemon.environ.items() if not name.startswith("JOBD_")} | told
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
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
