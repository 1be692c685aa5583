"""jobctl for workers and creators: submit, run, and reading jobs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobd.client import JobClient, JobView, Unreachable
from tests import ROOT
from tests.support.cli_harness import JOB_FIELDS, TOKEN, CliDaemon, Jobctl


@pytest.mark.slow
def test_submit_prints_the_id_and_nothing_else(jobctl: Jobctl, running: CliDaemon) -> None:
    job_id = jobctl.ok("submit", "--queue", "s1", "--kind", "k", '{"a": [1, 2.50, "ü"]}').strip()
    job = running.client.get_job(job_id)
    assert (job.queue, job.kind, job.payload_value) == ("s1", "k", {"a": [1, 2.5, "ü"]})


def test_submit_takes_every_option(jobctl: Jobctl) -> None:
    options = "--id s2 --priority -5 --delay 1h --expires 2h --max-attempts 4 --max-stalls 1 --on-stall fail "
    options += "--stall-after 90s --progress-timeout 0 --backoff fixed --backoff-base 5s --backoff-max 1m --no-jitter"
    job = jobctl.json("submit", *options.split())
    assert set(job) == JOB_FIELDS
    expected = {"id": "s2", "priority": -5, "max_attempts": 4, "max_stalls": 1, "on_stall": "fail"}
    expected |= {"stall_after_ms": 90_000, "progress_timeout_ms": 0, "payload": None}
    assert {name: job[name] for name in expected} == expected
    assert job["backoff"] == {"kind": "fixed", "base_ms": 5_000, "max_ms": 60_000, "jitter": False}
    assert abs(job["run_at"] - job["created_at"] - 3_600_000) < 60_000
    assert abs(job["expires_at"] - job["run_at"] - 3_600_000) < 60_000


def test_submit_reads_the_payload_from_stdin(running: CliDaemon) -> None:
    done = running.run("jobd.cli.ctl.main", "submit", "--json", "-", input='["from stdin"]')
    assert done.returncode == 0
    assert json.loads(done.stdout)["payload"] == ["from stdin"]
    assert running.run("jobd.cli.ctl.main", "submit", "-", input="not json").returncode == 2


def test_submit_takes_a_text(running: CliDaemon, jobctl: Jobctl) -> None:
    assert jobctl.json("submit", "--text", '{"not": json')["payload"] == '{"not": json'
    done = running.run("jobd.cli.ctl.main", "submit", "--json", "--text", "-", input="two\nlines\n")
    assert json.loads(done.stdout)["payload"] == "two\nlines\n"
    assert jobctl.rejected("submit", "--text")[0] == 2


def test_submit_creates_a_job_for_each_line(running: CliDaemon) -> None:
    def submit(*argv: str, lines: str) -> tuple[int, list[str], str]:
        done = running.run("jobd.cli.ctl.main", "submit", "--lines", *argv, input=lines)
        return done.returncode, done.stdout.splitlines(), done.stderr

    def payloads(queue: str) -> list[Any]:
        return [job.payload_value for job in running.client.iterate_jobs(queue=queue)][::-1]

    code, ids, err = submit("--queue", "l1", "--priority", "5", lines="\n".join(map(str, range(2500))))
    assert (code, len(set(ids)), err) == (0, 2500, "")
    assert payloads("l1") == list(range(2500))
    assert running.client.get_job(ids[0]).priority == 5
    code, out, err = submit("--queue", "l2", "--text", "--json", "-", lines="a b\n{\n")
    assert (code, [json.loads(line)["payload"] for line in out]) == (0, ["a b", "{"])
    full = '{"id": "l-1", "payload": 1, "queue": "l3"}\n{"id": "l-2", "expires_in_ms": 5000}\n'
    for _ in range(2):
        assert submit("--full", "--queue", "l4", "--expires", "1h", lines=full) == (0, ["l-1", "l-2"], "")
    assert [running.client.get_job(job_id).queue for job_id in ("l-1", "l-2")] == ["l3", "l4"]
    code, out, err = submit("--full", lines='{"id": "l-3"}\n{"id": "l-4", "priority": 5000}\n{"id": "l-5"}')
    assert (code, out) == (4, ["l-3"])
    assert "line 2: `$.priority`: expected a whole number <= 1000 [invalid_request]\n" in err
    assert err.endswith("1 job was created. Go on from line 2\n")
    assert submit("--full", lines='{"id": "l-1", "payload": 2}')[2].startswith(
        "jobctl: line 1: Job l-1 exists, created"
    )
    code, out, err = submit("--kind", "k" * 201, lines="1\n2")
    assert (code, out, "Invalid value for '--kind'" in err) == (2, [], True), err


def test_submitting_lines_stops_if_nothing_reads_the_ids(running: CliDaemon) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdin": subprocess.PIPE, "stdout": writer, "stderr": subprocess.PIPE}
    submitting = running.start("jobd.cli.ctl.main", "submit", "--lines", "--queue", "l5", **streams)
    os.close(writer)
    _, err = submitting.communicate("1\n" * 5)
    assert submitting.returncode == 74
    created = len(running.client.list_jobs(queue="l5").jobs)
    assert f"{created} job" in err
    assert err.endswith(f"created. Go on from line {created + 1}\n"), err


def test_wait_ends_when_all_jobs_are_finished(jobctl: Jobctl, running: CliDaemon) -> None:
    ids = [jobctl.ok("submit", "--queue", "w1").strip() for _ in range(3)]
    jobctl.rejects(1, "is not finished after 1 ms:", "wait", *ids, "--timeout", "1ms")
    waiting = running.start("jobd.cli.ctl.main", "wait", "--queue", "w1", "--json", stdout=subprocess.PIPE)
    for grant in running.client.claim("w", queues=["w1"], limit=3):
        running.client.complete_job(grant.job.id, lock_id=grant.lock_id)
    assert json.loads(waiting.communicate()[0]) in ({"completed": 3}, {})
    assert waiting.returncode == 0
    assert jobctl.json("wait", *ids) == {"completed": 3}
    assert jobctl.run("wait", "--queue", "w1") == (0, "", "no unfinished jobs\n")
    failed = jobctl.ok("submit", "--queue", "w1").strip()
    grant = running.client.start_processing(failed, "w")
    running.client.fail_job(failed, lock_id=grant.lock_id, error_message="no disk")
    code, out, err = jobctl.run("wait", ids[0], failed, "never")
    assert (code, out, err.startswith(f"{failed} failed: no disk\nnever does not exist")) == (1, "", True), err
    assert err.endswith("1 completed, 1 failed, 1 not found\n")
    assert jobctl.rejected("wait")[0] == jobctl.rejected("wait", "a", "--queue", "w1")[0] == 2


def test_wait_says_once_that_it_waits_for_the_daemon(running: CliDaemon, tmp_path: Path) -> None:
    later = tmp_path / "later.sock"
    argv = ("wait", "--queue", "w2", "--socket", str(later))
    waiting = running.start("jobd.cli.ctl.main", *argv, stderr=subprocess.PIPE)
    assert waiting.stderr is not None
    cause = f"The daemon at unix:{later} cannot be reached: No such file or directory"
    assert waiting.stderr.readline() == f"{cause}; waiting for the daemon\n"
    later.symlink_to(running.directory / "worker.sock")
    assert waiting.communicate()[1] == "no unfinished jobs\n"
    assert waiting.returncode == 0


def test_wait_for_a_queue_counts_jobs_that_end_while_it_waits_for_others(
    jobctl: Jobctl, running: CliDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = running.client

    def fail(job_id: str, queue: str = "w3") -> None:
        client.create_job(id=job_id, queue=queue)
        client.fail_job(job_id, lock_id=client.start_processing(job_id, "w").lock_id, error_message="no disk")

    wait_for_job = JobClient.wait_for_job

    def end_jobs(self: JobClient, job_id: str, **options: Any) -> JobView:
        client.complete_job(job_id, lock_id=client.start_processing(job_id, "w").lock_id)
        fail("w3:late")
        fail("w3:other", "w4")
        client.create_job(id="w3:cancelled", queue="w3")
        client.cancel_job("w3:cancelled")
        return wait_for_job(self, job_id, **options)

    fail("w3:early")
    jobctl.ok("submit", "--queue", "w3")
    monkeypatch.setattr(JobClient, "wait_for_job", end_jobs)
    outcome = "w3:late failed: no disk\nw3:cancelled cancelled\n1 completed, 1 failed, 1 cancelled\n"
    assert jobctl.run("wait", "--queue", "w3") == (1, "", outcome)
    assert jobctl.run("wait", "--queue", "w3") == (0, "", "no unfinished jobs\n")


def test_wait_for_a_queue_ends_without_a_daemon_after_its_timeout(jobctl: Jobctl, tmp_path: Path) -> None:
    argv = ("wait", "--queue", "w5", "--timeout", "1ms", "--socket", str(tmp_path / "missing"))
    assert jobctl.rejected(*argv)[0] == 3


def test_submit_says_that_it_waits_for_the_daemon(
    jobctl: Jobctl, running: CliDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_once(self: JobClient, job_id: str, **_: Any) -> JobView:
        assert self.on_retry is not None
        self.on_retry(Unreachable("It is away."))
        return running.client.cancel_job(job_id)

    monkeypatch.setattr(JobClient, "wait_for_job", fail_once)
    code, out, err = jobctl.run("submit", "--wait")
    assert (code, err) == (1, f"It is away; waiting for the daemon\n{out.strip()} cancelled\n")


def test_bash_completes_queues_kinds_and_jobs(running: CliDaemon, tmp_path: Path) -> None:
    running.client.create_job(queue="comp", kind="thumb", id="comp:1")
    running.client.create_job(queue="comp", kind="$(touch x)", id="comp-2")
    (tmp_path / "jobctl").write_text(f'#!/bin/sh\nexec {sys.executable} -m jobd.cli.ctl.main "$@"\n')
    (tmp_path / "jobctl").chmod(0o755)
    script = running.run("jobd.cli.ctl.main", "completion", "bash").stdout
    script += (
        'COMP_WORDS=("${@:2}"); COMP_CWORD=$(($# - 2)); _jobctl_completion jobctl; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    path = f"{tmp_path}:{os.environ['PATH']}"
    env = {**running.env, "PATH": path, "JOBD_SOCKET": "/missing", "ADMIN_TOKEN": TOKEN}

    def completed(*words: str, socket: str = running.client_environ["JOBD_SOCKET"]) -> list[str]:
        argv = ["bash", "--norc", "-c", script, "bash", "", "jobctl", "--socket", socket, *words]
        done = subprocess.run(argv, env=env, cwd=ROOT, text=True, capture_output=True, check=True)
        assert done.stderr == ""
        return done.stdout.split()

    assert "comp" in completed("submit", "--queue", "")
    assert completed("pause", "com") == ["comp"]
    assert completed("jobs", "--queue", "comp", "--kind", "") == ["thumb"]
    assert completed("job", "comp") == ["comp-2", "comp:1"]
    assert completed("cancel", "comp-2", "comp:") == ["comp:1"]
    assert completed("job", "", socket="/missing") == []
    assert "--priority" in completed("submit", "--p")


def test_submitting_a_job_twice_returns_it_and_another_with_its_id_is_rejected(jobctl: Jobctl) -> None:
    assert jobctl.ok("submit", "--id", "s3", "1") == jobctl.ok("submit", "--id", "s3", "1") == "s3\n"
    jobctl.rejects(4, "job_exists", "submit", "--id", "s3", "2")


def test_submitting_a_job_with_a_relative_time_twice_returns_it(jobctl: Jobctl) -> None:
    first = jobctl.json("submit", "--id", "s3-in", "--run-at", "1h", "--expires", "2h")
    assert jobctl.json("submit", "--id", "s3-in", "--run-at", "1h", "--expires", "2h") == first
    assert first["run_at"] - first["created_at"] == 3_600_000
    assert first["expires_at"] - first["created_at"] == 7_200_000
    code, err = jobctl.rejected("submit", "--id", "s3-in", "--run-at", "1h", "--expires", "3h")
    assert (code, "differs in expires_in_ms" in err, "--expires sets expires_in_ms" in err) == (4, True, True), err
    jobctl.rejects(2, "mutually exclusive", "submit", "--id", "s3-in", "--run-at", "1h", "--delay", "1h")
    at = jobctl.json("submit", "--run-at", "2096-01-01", "--expires", "2097-01-01")
    assert (at["run_at"], at["expires_at"]) == (3_976_214_400_000, 4_007_836_800_000)


def test_an_error_of_the_daemon_exits_with_4_and_names_the_field(jobctl: Jobctl) -> None:
    jobctl.rejects(4, "`$.payload`", "submit", "[" * 200 + "]" * 200)
    assert jobctl.rejected("job", "never-was")[0] == 4


@pytest.mark.parametrize(
    "argv",
    [
        ("--priority", "5000"),
        ("--max-attempts", "0"),
        ("--max-stalls", "1001"),
        ("--kind", "k" * 201),
        ("--id", "a b"),
        ("--delay", "1000d"),
        ("--run-at", "1000d"),
        ("--expires", "0"),
        ("--backoff-base", "1000d"),
        ("--idempotency-key", "é"),
        ("--idempotency-key", "ключ"),
        ("--idempotency-key", "k" * 201),
    ],
)
def test_a_value_out_of_bounds_is_a_usage_error_that_names_the_flag(argv: tuple[str, str], jobctl: Jobctl) -> None:
    code, err = jobctl.rejected("submit", *argv)
    assert (code, err.startswith(f"jobctl: Invalid value for '{argv[0]}': ")) == (2, True), err
    assert "$" not in err


@pytest.mark.parametrize(
    "argv",
    [
        ("submit", "--kind", "k\udcff", "1"),
        ("submit", "--queue", "k\udcff", "1"),
        ("submit", "--idempotency-key", "k\udcff", "1"),
        ("job", "k\udcff"),
        ("jobs", "--queue", "k\udcff"),
        ("pause", "k\udcff"),
        ("run", "--queue", "k\udcff", "--drain", "--", "true"),
    ],
    ids=lambda argv: argv[0],
)
def test_an_argument_that_is_not_utf8_is_a_usage_error(argv: tuple[str, ...], jobctl: Jobctl) -> None:
    code, out, err = jobctl.run(*argv)
    assert (code, out) == (2, "")
    expected = "Invalid value for '--idempotency-key'" if "--idempotency-key" in argv else r"'k\udcff' is not UTF-8"
    assert expected in err
    assert len(err.splitlines()) == 1  # what jobctl run claims is written to the file descriptor


def test_jobs_are_paged_and_the_cursor_continues(jobctl: Jobctl) -> None:
    for number in range(7):
        jobctl.ok("submit", "--queue", "s4", "--id", f"s4-{number}")
    first = jobctl.json("jobs", "--queue", "s4", "--limit", "3")
    assert [job["id"] for job in first["jobs"]] == ["s4-6", "s4-5", "s4-4"]
    rest = jobctl.json("jobs", "--queue", "s4", "--cursor", first["next_cursor"])
    assert [job["id"] for job in rest["jobs"]] == ["s4-3", "s4-2", "s4-1", "s4-0"]
    assert rest["next_cursor"] is None
    assert jobctl.ok("jobs", "--queue", "s4", "--all", "-q").split() == [f"s4-{number}" for number in range(6, -1, -1)]
    assert len(jobctl.says(0, first["next_cursor"], "jobs", "--queue", "s4", "--limit", "3").splitlines()) == 4


def test_a_job_its_explanation_and_its_timeline_are_shown(jobctl: Jobctl) -> None:
    jobctl.ok("submit", "--id", "s5", "--delay", "1h", '{"x": 1}')
    assert set(jobctl.json("job", "s5")) == JOB_FIELDS
    assert re.search(
        r"^due +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC \(in (59|60) m|^due .*\(in 1 h", jobctl.ok("job", "s5"), re.M
    )
    assert "  due in " in jobctl.ok("jobs", "--status", "queued")
    assert set(jobctl.json("why", "s5")) == {"state", "because", "next", "blocked_by", "do"}
    assert jobctl.ok("why", "s5").startswith("queued: ")
    assert jobctl.ok("why", "--queue", "none-such").startswith("There is no queue none-such: ")
    jobctl.ok("submit", "--id", "s5-due", "--queue", "s5-why")
    assert "\nkind -: 1 due, the oldest is s5-due\nqueued: " in jobctl.ok("why", "--queue", "s5-why")
    assert [each["job_id"] for each in jobctl.json("why", "--queue", "s5-why")["kinds"]] == ["s5-due"]
    assert jobctl.rejected("why")[0] == jobctl.rejected("why", "s5", "--queue", "q")[0] == 2
    events = jobctl.json("timeline", "s5")["events"]
    assert [set(event) for event in events] == [{"seq", "at", "type", "from", "to", "by", "reason", "details"}]
    assert "created" in jobctl.ok("timeline", "s5")
    assert set(jobctl.json("validate", "s5")) == {"isValid", "issues", "canProceed"}


def test_control_characters_of_a_job_are_escaped(jobctl: Jobctl, running: CliDaemon) -> None:
    evil = "\x1b]0;owned\x07 \x9b31m line\nbreak \u202eback"
    jobctl.ok("submit", "--id", "s6", "--queue", "s6", json.dumps({"evil": evil}, ensure_ascii=False))
    grant = running.client.claim("evil-worker", queues=["s6"])[0]
    running.client.update_progress("s6", lock_id=grant.lock_id, progress=1, message=evil)
    running.client.fail_job("s6", lock_id=grant.lock_id, error_message=evil, error_code="e")
    for argv in (["job", "s6"], ["jobs", "--queue", "s6"], ["timeline", "s6"], ["why", "s6"]):
        for text in (jobctl.ok(*argv), jobctl.ok(*argv, "--json")):
            assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text), argv
    assert jobctl.json("job", "s6")["error_message"] == evil


def test_a_broken_pipe_inside_a_command_is_not_an_error() -> None:
    words = (
        "import click, errno, sys; from jobd.cli import exit_codes\n"
        "@click.command()\n"
        "def broken(): raise BrokenPipeError(errno.EPIPE, 'gone')\n"
        "sys.exit(exit_codes.run(broken, 'jobctl', []))"
    )
    ended = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_closed_pipe_is_not_an_error(running: CliDaemon) -> None:
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


def test_an_old_job_table_can_be_imported(jobctl: Jobctl, running: CliDaemon, tmp_path: Path) -> None:
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


@pytest.mark.slow
def test_run_drains_a_queue_and_its_exit_code_reports_failures(running: CliDaemon) -> None:
    for number in (1, 2, 0):
        running.client.create_job(number, queue="r1", id=f"r1-{number}")
    script = 'read n; echo "::result file_path=/srv/$n"; echo "::meta n=$n"; test "$n" != 0'
    done = running.run("jobd.cli.ctl.main", "run", "--queue", "r1", "--drain", "--", "sh", "-c", script)
    assert done.returncode == 1, done.stderr
    jobs = {job.id: job for job in running.client.list_jobs(queue="r1").jobs}
    assert [jobs[f"r1-{number}"].status for number in (0, 1, 2)] == ["failed", "completed", "completed"]
    assert (jobs["r1-2"].file_path, jobs["r1-2"].metadata_value) == ("/srv/2", {"n": 2})
    assert jobs["r1-0"].error_code == "exit:1"
    done = running.run("jobd.cli.ctl.main", "run", "--queue", "r1", "--drain", "true")
    assert (done.returncode, done.stdout) == (0, "")
    assert re.fullmatch(r"jobctl run: worker \S+ claims jobs of queue r1, 1 at a time, at unix:\S+\n", done.stderr)
    running.client.create_job(queue="r1", id="r1-later", delay_ms=3_600_000)
    done = running.run("jobd.cli.ctl.main", "run", "--queue", "r1", "--drain", "true")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.endswith("\njobctl run: drained; 1 job is left: 1 is not due yet.\n")


def test_a_run_that_exceeds_its_timeout_fails_with_timeout(running: CliDaemon) -> None:
    running.client.create_job(queue="r-timeout", id="r-timeout")
    limits = ("--timeout", "200ms", "--progress-timeout", "1h")
    done = running.run("jobd.cli.ctl.main", "run", "--queue", "r-timeout", *limits, "--once", "sleep", "1000")
    assert done.returncode == 1, done.stderr
    assert "it took longer than 200 ms" in done.stderr
    job = running.client.get_job("r-timeout")
    assert (job.status, job.error_code) == ("failed", "timeout")
    assert job.error_message == "The run took longer than its timeout of 200 ms."


def test_options_after_the_command_belong_to_it(running: CliDaemon) -> None:
    running.client.create_job(None, queue="r2", id="r2")
    done = running.run("jobd.cli.ctl.main", "run", "--queue", "r2", "--once", "echo", "--drain", "--json")
    assert done.returncode == 0, done.stderr
    assert "--drain --json" in done.stdout


@pytest.mark.parametrize(("command", "code"), [("true", 0), ("false", 1)])
def test_submit_waits_for_the_end(command: str, code: int, running: CliDaemon) -> None:
    queue = f"r3-{command}"
    argv = ("submit", "--queue", queue, "--wait", "--json")
    waiting = running.start("jobd.cli.ctl.main", *argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.run("jobd.cli.ctl.main", "run", "--queue", queue, "--once", command).returncode == code
    out, err = waiting.communicate()
    assert waiting.returncode == code, err
    assert json.loads(out)["status"] == ("completed" if code == 0 else "failed")


def test_interrupting_a_wait_does_not_change_the_job(running: CliDaemon) -> None:
    argv = ("submit", "--id", "r4", "--queue", "r4", "--wait")
    waiting = running.start("jobd.cli.ctl.main", *argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == "r4\n"
    waiting.send_signal(signal.SIGINT)
    waiting.communicate()
    assert waiting.returncode == 130
    assert running.client.get_job("r4").status == "queued"


@pytest.mark.skipif(shutil.which("jq") is None, reason="the shell example uses jq")
def test_the_shell_worker_of_the_docs(running: CliDaemon, tmp_path: Path) -> None:
    """The third file is not there at first. The second attempt does not need the first two any more."""
    sources = [tmp_path / name for name in ("cat", "dog", "owl")]
    for source in sources[:2]:
        source.write_text("miaow\n" * 1000)
    payload = {"sources": list(map(str, sources)), "target": str(tmp_path)}
    running.client.create_job(
        payload, queue="r5", id="r5", max_attempts=2, backoff={"base_ms": 0}, headers={"trace": "t-5"}
    )
    command = "run", "--queue", "r5", "--once", "--", str(ROOT / "docs/examples/worker.sh")
    first = running.run("jobd.cli.ctl.main", *command)
    assert (first.returncode, first.stdout) == (1, "trace t-5: from file 1 of 3\n"), first.stderr
    sources[2].write_text("hoot")
    for source in sources[:2]:
        source.unlink()
    second = running.run("jobd.cli.ctl.main", *command)
    assert (second.returncode, second.stdout) == (0, "trace t-5: from file 3 of 3\n"), second.stderr
    job = running.client.get_job("r5")
    assert (job.file_path, job.metadata_value) == (str(tmp_path), {"files": 3})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat.gz", "dog.gz", "owl", "owl.gz"]
