"""`jobctl events` and `jobctl top` with a daemon: output, filters, and how they end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from jobd.cli.ctl.top import HeldJob, Sampler, TopFrame, rows_of
from jobd.client import AdminClient
from jobd.model.events import StreamedEvent
from jobd.model.responses import QueueView
from tests.support.cli_harness import Jobctl, TerminalRun
from tests.support.daemon_process import TOKEN, DaemonProcess, die_with_us
from tests.unit.cli.ctl.test_top import drawn


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path) as running:
        yield running


def environ(daemon: DaemonProcess) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JOBD_", "ADMIN_"))}
    return {**inherited, "JOBD_ADMIN_URL": f"unix:{daemon.admin_socket}", "ADMIN_TOKEN": TOKEN}


@pytest.fixture
def jobctl(daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Jobctl:
    for name, value in environ(daemon).items():
        monkeypatch.setenv(name, value)
    return Jobctl(capsys)


def some_work(daemon: DaemonProcess) -> None:
    """Cause events 1 to 6."""
    for job_id, queue in (("a", "video"), ("b", "mail")):
        daemon.post("/v1/jobs", {"id": job_id, "queue": queue})
    lock = daemon.post("/v1/jobs/a/start", {"worker": "w-1"}).data["lock_id"]
    daemon.post("/v1/jobs/a/progress", {"lock_id": lock, "progress": 42})
    lock = daemon.post("/v1/jobs/b/start", {"worker": "w-2"}).data["lock_id"]
    daemon.post("/v1/jobs/b/fail", {"lock_id": lock, "error_message": "no \x1b[31mroom"})


# -- events


def test_without_follow_past_events_are_printed(daemon: DaemonProcess, jobctl: Jobctl) -> None:
    some_work(daemon)
    code, out, err = jobctl.run("events")
    lines = [line.split("  ") for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert [(line[1], line[2]) for line in lines] == [
        ("1", "created"), ("2", "created"), ("3", "granted"), ("4", "progress"), ("5", "granted"), ("6", "failed"),
    ]  # fmt: skip
    assert lines[5][3:] == ["b (mail)", "processing → failed", "worker:w-2", "no \\x1b[31mroom"]
    assert "\x1b" not in out


def test_events_can_be_filtered(daemon: DaemonProcess, jobctl: Jobctl) -> None:
    some_work(daemon)

    def seqs(*argv: str) -> list[int]:
        code, out, err = jobctl.run("events", "--json", *argv)
        assert (code, err) == (0, "")
        return [json.loads(line)["seq"] for line in out.splitlines()]

    assert seqs("--last", "2") == [5, 6]
    assert seqs("--after", "4") == [5, 6]
    assert seqs("--after", "6") == []
    assert seqs("--job", "a") == [1, 3, 4]
    assert seqs("--queue", "video", "--queue", "mail", "--type", "created", "--type", "failed") == [1, 2, 6]
    out = jobctl.ok("events", "--json", "--last", "1")
    assert set(json.loads(out)) == set(StreamedEvent.__struct_encode_fields__)
    assert "\x1b" not in out


@pytest.mark.slow
def test_impossible_options_are_explained(daemon: DaemonProcess, jobctl: Jobctl) -> None:
    some_work(daemon)
    jobctl.rejects(4, "[events_gone]", "events", "--after", "7")
    assert jobctl.run("events", "--type", "nothing")[0] == 4
    assert jobctl.run("events", "--after", "1", "--last", "1")[0] == 2
    assert jobctl.run("events", *["--job", "a"] * 101)[0] == 2
    daemon.kill()
    assert jobctl.run("events")[0] == 3


@pytest.mark.slow
def test_follow_survives_a_restart_until_ctrl_c(daemon: DaemonProcess) -> None:
    command = [sys.executable, "-m", "jobd.cli.ctl.main", "events", "-f", "--after", "0", "--json"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with (
        subprocess.Popen(command, env=environ(daemon), preexec_fn=die_with_us, **pipes) as process,
        ExitStack() as last,
    ):
        last.callback(process.kill)
        assert process.stdout is not None
        assert process.stderr is not None
        some_work(daemon)
        assert [json.loads(process.stdout.readline())["seq"] for _ in range(6)] == [1, 2, 3, 4, 5, 6]
        daemon.kill()
        assert "Reconnecting after event 6." in process.stderr.readline()
        daemon.start()
        daemon.post("/v1/jobs", {"id": "c"})
        assert json.loads(process.stdout.readline())["job_id"] == "c"
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
        assert process.stderr.read().splitlines()[-1] == "jobctl: interrupted"


# -- top


def test_only_the_queues_that_fit_are_requested(daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    for number in range(9):
        daemon.post("/v1/jobs/bulk", {"jobs": [{"queue": f"busy-{number}"}] * (number + 1)})
    with AdminClient(f"unix:{daemon.admin_socket}", token=TOKEN) as client:
        queues = client.queues

        def recorded(**query: Any) -> list[QueueView]:
            asked.append(query)
            return queues(**query)

        monkeypatch.setattr(client, "queues", recorded)
        frame = Sampler().take(client, 4)
        assert asked == [{"limit": 5, "busiest": True}]
        assert [queue.name for queue in frame.queues] == ["busy-8", "busy-7", "busy-6", "busy-5"]
        assert "and more" in drawn(frame, width=80, height=rows_of_height(4))
        whole = Sampler().take(client)
        assert (len(whole.queues), whole.more_queues) == (9, False)
        assert whole.queues[:4] == frame.queues
        assert "and more" not in drawn(whole, width=80, height=rows_of_height(4))


def rows_of_height(rows: int) -> int:
    height = next(height for height in range(100) if rows_of(height) == rows)
    assert rows_of(height - 1) == rows - 1
    return height


@pytest.mark.slow
def test_once_prints_a_table_and_json(daemon: DaemonProcess, jobctl: Jobctl) -> None:
    some_work(daemon)
    daemon.admin("POST", "queues/mail/pause", {})
    code, out, err = jobctl.run("top", "--once", "--interval", "100ms")
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert rows["video"][1:4] == ["open", "0", "1"]
    assert rows["mail"][1:4] == ["paused", "0", "0"]
    assert rows["w-1"][1:3] == ["busy", "1"]
    assert rows["w-1"][-3:] == ["a", "42", "%"]
    assert re.search(r"  disk \S+ \S+ free of \S+ \S+ \(/.*/jobd\.db\)$", out, re.MULTILINE)
    code, out, _ = jobctl.run("top", "--json", "--interval", "100ms")
    frame = msgspec.json.decode(out, type=TopFrame)
    assert (code, frame.stats.total_jobs, frame.workers[0].jobs) == (0, 2, [HeldJob("a", 42)])
    assert len(out.splitlines()) == 1


def test_without_a_terminal_top_names_its_options(jobctl: Jobctl) -> None:
    jobctl.rejects(2, "--once", "top")
    assert jobctl.run("top", "--once", "--interval", "1ms")[0] == 2


def top(daemon: DaemonProcess, **more: str) -> TerminalRun:
    """Start jobctl top on its own terminal."""
    env = {**environ(daemon), "TERM": "xterm", "COLUMNS": "80", "LINES": "24", **more}
    if not more:
        env.pop("NO_COLOR", None)
    return TerminalRun(env, "jobd.cli.ctl.main", "top", "--interval", "100ms")


def test_q_ends_top_and_restores_the_screen(daemon: DaemonProcess) -> None:
    with top(daemon) as terminal:
        terminal.until(b"queued 0")
        daemon.post("/v1/jobs", {"id": "a", "queue": "video"})
        terminal.until(b"queued 1")
        terminal.press(b"x")
        terminal.until(b"video")
        terminal.press(b"q")
        assert terminal.ended() == 0
        assert terminal.said.index(b"\x1b[?1049h") < terminal.said.rindex(b"\x1b[?1049l")


@pytest.mark.slow
def test_top_waits_for_an_unreachable_daemon_and_ctrl_c_ends_it(daemon: DaemonProcess) -> None:
    with top(daemon) as terminal:
        terminal.until(b"queued 0")
        daemon.kill()
        terminal.until(b"retrying")
        daemon.start()
        daemon.post("/v1/jobs", {"id": "a"})
        terminal.until(b"queued 1")
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.ended() == 130
        assert b"\x1b[?1049l" in terminal.said


@pytest.mark.slow
def test_without_escape_sequences_frames_are_appended(daemon: DaemonProcess) -> None:
    with top(daemon, NO_COLOR="1") as terminal:
        terminal.until(b"queued 0")
        terminal.until(b"queued 0")
        terminal.press(b"q")
        assert terminal.ended() == 0
        assert b"\x1b" not in terminal.said
