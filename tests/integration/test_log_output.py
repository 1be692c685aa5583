"""Lines written to stderr: in order, without blocking the daemon, with a count of dropped ones."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jobd import logging
from jobd.logging import LogWriter
from tests.support.daemon_process import DaemonProcess
from tests.support.polling import poll_until

SAY = """
import os, sys, structlog
from jobd import logging
logging.configure('info', 'logfmt')
for number in range(int(sys.argv[1])):
    structlog.get_logger().info('said', number=number, pad='x' * 100)
"""


class UnreadPipe:
    """A pipe of one page in place of stderr. It is not read until `read` is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ours, theirs = os.pipe()
        fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 4096)
        self.stderr = open(theirs, "w")  # noqa: SIM115 - closed by `read`
        monkeypatch.setattr(sys, "stderr", self.stderr)

    def read(self, out: LogWriter) -> list[str]:
        """Read until everything is written."""
        lines: list[bytes] = []

        def listen() -> None:
            with open(self.ours, "rb") as end:
                lines.append(end.read())

        listener = threading.Thread(target=listen)
        listener.start()
        assert out.flush(30)
        self.stderr.close()
        listener.join()
        return lines[0].decode().splitlines()


def test_logging_never_waits_and_dropped_lines_are_counted_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "MAX_QUEUED_CHARS", 10_000)
    pipe = UnreadPipe(monkeypatch)
    out = LogWriter(lambda count: out.write(f"dropped {count}"))
    for number in range(10_000):
        out.write(f"{number:099}")
    assert not out.flush(0)
    read = pipe.read(out)
    at = next(at for at, line in enumerate(read) if line.startswith("dropped"))
    assert read[:at] == [f"{number:099}" for number in range(at)]  # no line is missing before the gap
    lost = sum(int(line.split()[1]) for line in read if line.startswith("dropped"))
    numbers = [int(line) for line in read if not line.startswith("dropped")]
    assert numbers == sorted(numbers)
    assert len(numbers) + lost == 10_000
    assert lost > 9_000


@pytest.mark.slow
def test_many_lines_at_once_are_all_written_if_stderr_takes_them(tmp_path: Path) -> None:
    """While the loop is busy, the writer thread rarely runs. That must be enough."""
    with (tmp_path / "log").open("wb") as log:
        subprocess.run([sys.executable, "-c", SAY, "50000"], stderr=log, check=True)
    written = (tmp_path / "log").read_text()
    assert "log_lines_dropped" not in written
    assert len(written.splitlines()) == 50_000


def test_a_line_larger_than_the_buffer_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "MAX_QUEUED_CHARS", 10)
    pipe = UnreadPipe(monkeypatch)
    out = LogWriter(lambda count: pytest.fail("nothing was dropped"))
    out.write("x" * 100_000)
    assert pipe.read(out) == ["x" * 100_000]


def test_a_non_blocking_stderr_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = UnreadPipe(monkeypatch)
    os.set_blocking(pipe.stderr.fileno(), False)
    out = LogWriter(lambda count: pytest.fail("nothing was dropped"))
    for number in range(1_000):
        out.write(f"{number:099}")
    assert [int(line) for line in pipe.read(out)] == list(range(1_000))


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise SystemExit", "1 / 0"])
def test_all_lines_are_written_in_order_when_the_process_ends(end: str) -> None:
    done = subprocess.run([sys.executable, "-c", SAY + end, "2000"], capture_output=True, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if "event=said" in line]
    assert [int(number) for number in re.findall(r"number=(\d+)", "".join(lines))] == list(range(2000))


def test_a_critical_line_is_written_before_a_hard_exit() -> None:
    end = "structlog.get_logger().critical('aborted')\nos._exit(1)"
    done = subprocess.run([sys.executable, "-c", SAY + end, "100"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 101
    assert "event=aborted" in done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_a_process_whose_stderr_is_not_read_still_ends(kind: str) -> None:
    ours, theirs = pty.openpty() if kind == "terminal" else os.pipe()
    try:
        end = "structlog.get_logger().critical('aborted')"
        process = subprocess.Popen([sys.executable, "-c", SAY + end, "5000"], stderr=theirs)
        assert process.wait(150) == 0
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.slow
def test_a_daemon_whose_log_is_not_read_continues_and_reports_dropped_lines(tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    with open(ours, "rb") as log, DaemonProcess.not_started(tmp_path, "[log]\nlevel = 'debug'\n") as daemon:
        daemon.launch(theirs)
        os.close(theirs)
        assert any(b"event=ready" in line for line in log)
        for first in range(0, 20_000, 1_000):  # with one line for each job
            jobs = [{"id": f"{first + number}"} for number in range(1_000)]
            assert daemon.post("/v1/jobs/bulk", {"jobs": jobs}).status == 201
        assert daemon.get("/healthz").status == 200
        poll_until(
            lambda: daemon.admin("GET", "health").data["status"] == "healthy"
        )  # it may have been slow for a moment
        daemon.process.terminate()
        rest = log.read().decode().splitlines()
        assert daemon.process.wait(150) == 0
    assert "event=stopped" in rest[-1]
    lost = sum(int(count) for count in re.findall(r"event=log_lines_dropped .*count=(\d+)", "\n".join(rest)))
    assert lost
    assert lost + sum("event=created" in line for line in rest) >= 20_000  # other lines may be dropped too
