"""`jobctl events` and `jobctl top`: lines, frames, and what ends them."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from msgspec.structs import replace
from rich.console import Console

from jobd.api import events as event_stream
from jobd.cli import tables
from jobd.cli import terminal as show
from jobd.cli.ctl import events as ctl_live
from jobd.cli.ctl import main as ctl
from jobd.cli.ctl.top import WINDOW_S, HeldJob, Sampler, TopFrame, WorkerRow, render, rows_of
from jobd.client import AdminClient
from jobd.model import commands
from jobd.model.events import StreamedEvent
from jobd.model.responses import AlertView, QueueView, StatsView
from tests.support.daemon_process import TOKEN, Daemon, die_with_us

STATS = StatsView(
    total_jobs=3,
    by_status={"queued": 1, "processing": 1, "completed": 0, "failed": 1, "cancelled": 0},
    stuck_jobs=0,
    locked_jobs=1,
    average_processing_time=1.5,
    oldest_processing_job=None,
    stuck_jobs_recovered=0,
    timestamp=1_772_366_400_000,
    cleanup_running=False,
    time_since_last_cleanup=None,
)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path) as running:
        yield running


def environ(daemon: Daemon) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("JOBD_", "ADMIN_"))}
    return {**inherited, "JOBD_ADMIN_URL": f"unix:{daemon.admin_socket}", "ADMIN_TOKEN": TOKEN}


@pytest.fixture
def jobctl(daemon: Daemon, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    for name, value in environ(daemon).items():
        monkeypatch.setenv(name, value)

    def run(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = ctl.main(list(argv))
        return code, *capsys.readouterr()

    return run


def some_work(daemon: Daemon) -> None:
    """Events 1 to 6."""
    for job_id, queue in (("a", "video"), ("b", "mail")):
        daemon.post("/v1/jobs", {"id": job_id, "queue": queue})
    lock = daemon.post("/v1/jobs/a/start", {"worker": "w-1"}).data["lock_id"]
    daemon.post("/v1/jobs/a/progress", {"lock_id": lock, "progress": 42})
    lock = daemon.post("/v1/jobs/b/start", {"worker": "w-2"}).data["lock_id"]
    daemon.post("/v1/jobs/b/fail", {"lock_id": lock, "error_message": "no \x1b[31mroom"})


# -- events


def test_the_bounds_are_those_of_the_daemon() -> None:
    assert (ctl_live.MAX_SHOWN, ctl_live.MAX_NAMES) == (event_stream.MAX_BACK, commands.MAX_NAMES)


def test_an_event_is_a_line() -> None:
    event = StreamedEvent(7, 1_000, "granted", "queued", "processing", "worker:w", None, {"ttl_ms": 60_000}, "a", "q")
    time, *rest = tables.event_line(event).split("  ")
    assert time.startswith("1970-01-01 ")
    assert rest == ["7", "granted", "a (q)", "queued → processing", "worker:w", "ttl_ms=1 m"]
    paused = StreamedEvent(8, 1_000, "queue_paused", None, None, "admin", "why", {}, None, "q")
    assert tables.event_line(paused).split("  ")[1:] == ["8", "queue_paused", "queue q", "admin", "why"]


def test_without_follow_past_events_are_printed(daemon: Daemon, jobctl: Any) -> None:
    some_work(daemon)
    code, out, err = jobctl("events")
    lines = [line.split("  ") for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert [(line[1], line[2]) for line in lines] == [
        ("1", "created"), ("2", "created"), ("3", "granted"), ("4", "progress"), ("5", "granted"), ("6", "failed"),
    ]  # fmt: skip
    assert lines[5][3:] == ["b (mail)", "processing → failed", "worker:w-2", "no \\x1b[31mroom"]
    assert "\x1b" not in out


def test_events_can_be_filtered(daemon: Daemon, jobctl: Any) -> None:
    some_work(daemon)

    def seqs(*argv: str) -> list[int]:
        code, out, err = jobctl("events", "--json", *argv)
        assert (code, err) == (0, "")
        return [json.loads(line)["seq"] for line in out.splitlines()]

    assert seqs("--last", "2") == [5, 6]
    assert seqs("--after", "4") == [5, 6]
    assert seqs("--after", "6") == []
    assert seqs("--job", "a") == [1, 3, 4]
    assert seqs("--queue", "video", "--queue", "mail", "--type", "created", "--type", "failed") == [1, 2, 6]
    code, out, _ = jobctl("events", "--json", "--last", "1")
    assert code == 0
    assert set(json.loads(out)) == set(StreamedEvent.__struct_encode_fields__)
    assert "\x1b" not in out


@pytest.mark.slow
def test_impossible_options_are_explained(daemon: Daemon, jobctl: Any) -> None:
    some_work(daemon)
    code, out, err = jobctl("events", "--after", "7")
    assert (code, out) == (4, "")
    assert "[events_gone]" in err
    assert jobctl("events", "--type", "nothing")[0] == 4
    assert jobctl("events", "--after", "1", "--last", "1")[0] == 2
    assert jobctl("events", *["--job", "a"] * 101)[0] == 2
    daemon.kill()
    assert jobctl("events")[0] == 3


@pytest.mark.slow
def test_follow_survives_a_restart_until_ctrl_c(daemon: Daemon) -> None:
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


def test_rates_cover_a_window() -> None:
    now = [100.0]
    samples = Sampler(lambda: now[0])

    def rates(granted: int) -> tuple[float, float]:
        per_second, over_s = samples.rates(f'x 1\njobd_events_total{{type="granted"}} {granted}.0\n')
        assert set(per_second) == {"created", "granted", "completed", "failed", "retried", "stalled"}
        return per_second["granted"], over_s

    assert rates(100) == (0.0, 0.0)
    now[0] += 2
    assert rates(104) == (2.0, 2.0)
    now[0] += WINDOW_S - 2
    assert rates(120) == (2.0, 10.0)
    now[0] += 5
    assert rates(120) == (1.2, 13.0)  # the window starts at the last sample before it
    now[0] += 20
    assert rates(10) == (0.0, 20.0)  # the daemon was killed and continues from an earlier count


def drawn(frame: TopFrame, *, width: int, height: int, note: str = "") -> list[str]:
    out = Console(file=io.StringIO(), width=width, force_terminal=False)
    with out.capture() as held:
        out.print(render(frame, note, height, width))
    return [line.rstrip() for line in held.get().splitlines()]


def a_frame(queues: int = 3, **fields: Any) -> TopFrame:
    made: dict[str, Any] = {
        "stats": STATS,
        "per_second": {"created": 1.5, "granted": 0.0},
        "over_s": 10.0,
        "queues": [QueueView(f"queue-{n}", n == 0, n, 1, 0, 0, 0, None) for n in range(queues)],
        "workers": [
            WorkerRow("w\x1b[2J", "busy", 1, "mail (kinds: \x1b)", None, 2, [HeldJob("a", 42.5), HeldJob("b", 0)])
        ],
        "alerts": [],
    }
    return TopFrame(**{**made, **fields})


def test_a_frame_shows_jobs_queues_and_workers() -> None:
    alert = AlertView("stuck_jobs", True, 1, 7.0, 5.0, "look at the workers")
    text = "\n".join(drawn(a_frame(alerts=[alert]), width=100, height=40, note="The daemon is away."))
    for part in (
        "queued 1  processing 1  completed 0  failed 1  cancelled 0", "stalled 0  locked 1  average 1.5 s",
        "per second (over 10 s): created 1.5  granted 0", "The daemon is away.", "WARNING stuck_jobs", "7 / 5",
        "look at the workers", "paused", "CANCELLED", "a 42.5 %  b 0 %", "w\\x1b[2J",
    ):  # fmt: skip
        assert part in text
    assert "\x1b" not in text


@pytest.mark.parametrize(("width", "height"), [(40, 10), (60, 20), (80, 24), (200, 60)])
def test_a_frame_fits_its_terminal(width: int, height: int) -> None:
    held = [HeldJob("x" * 200, 1.0)]
    workers = [
        WorkerRow(f"worker-with-a-long-name-{n}", "silent", 1, "q" * 200, "host " + "h" * 200, 1, held)
        for n in range(100)
    ]
    alerts = [AlertView(f"alert_{n}", True, 1, 7.0, 5.0, "a hint that is long " * 10) for n in range(2)]
    lines = drawn(a_frame(100, workers=workers, alerts=alerts), width=width, height=height)
    assert max(map(len, lines)) <= width
    assert len(lines) <= max(height, 18)
    assert any(line.startswith("and ") for line in lines)
    assert "QUEUE" in "".join(lines)


@pytest.mark.parametrize(("width", "columns"), [(40, 2), (60, 2), (80, 4), (200, 5)])
def test_figures_are_not_cut_beside_long_names(width: int, columns: int) -> None:
    long = "a-queue-with-quite-a-long-name-" + "x" * 20
    queues = [QueueView(name, False, 12_345, 67_890, 24_680, 13_579, 11_111, None) for name in ("q", f"{long}-high")]
    queues.append(replace(queues[0], name=f"{long}-low"))
    workers = [WorkerRow("worker-" + "y" * 60 + "-7", "busy", 1, None, None, 54_321, [HeldJob("z" * 200, 1.0)])]
    alerts = [AlertView("processing_jobs", True, 1, 1_234.0, 1_000.0, "More jobs than expected are processing.")]
    rates = {"created": 1234.5, "granted": 1000.1, "completed": 999.9, "failed": 0.5, "retried": 12.3, "stalled": 0.0}
    frame = replace(a_frame(workers=workers, alerts=alerts, per_second=rates), queues=queues)
    lines = drawn(frame, width=width, height=40)
    text = "\n".join([*lines, ""])
    assert max(map(len, lines)) <= width
    for count in ["12345", "67890", "13579", "24680", "11111"][:columns]:
        assert text.count(f" {count}") == 3, count
    for part in (
        "1234 / 1000",
        "54321",
        "cancelled 0",
        "average 1.5 s",
        *(f"{n} {rate:g}" for n, rate in rates.items()),
    ):
        assert part in text, part
    assert (text.count("-high "), text.count("-low ")) == (1, 1), "both ends of a name are seen"
    assert "WARNING processing_jobs " in text or width <= 60


def test_a_frame_in_a_pipe_is_complete_and_a_long_name_moves_only_its_line() -> None:
    queues = [QueueView(name, False, 1, 2, 3, 4, 5, None) for name in ("q" * 200, "short")]
    lines = drawn(replace(a_frame(), queues=queues), width=show.UNBOUNDED, height=100)
    (long,) = [line for line in lines if line.startswith("qq")]
    (short,) = [line for line in lines if line.startswith("short")]
    assert long.split()[0] == "q" * 200
    assert len(short) < 100


class RecordingAdminClient:
    """An admin client that records its queries for queues."""

    def __init__(self, client: AdminClient) -> None:
        self._client = client
        self.asked: list[dict[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def queues(self, **asked: Any) -> list[QueueView]:
        self.asked.append(asked)
        return self._client.queues(**asked)


def test_only_the_queues_that_fit_are_requested(daemon: Daemon) -> None:
    for number in range(9):
        daemon.post("/v1/jobs/bulk", {"jobs": [{"queue": f"busy-{number}"}] * (number + 1)})
    with AdminClient(f"unix:{daemon.admin_socket}", token=TOKEN) as client:
        counted = RecordingAdminClient(client)
        frame = Sampler().take(cast("AdminClient", counted), 4)
        assert counted.asked == [{"limit": 5, "busiest": True}]
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
def test_an_empty_daemon_has_a_frame(daemon: Daemon, jobctl: Any) -> None:
    code, out, err = jobctl("top", "--once", "--interval", "100ms")
    assert (code, err) == (0, "")
    assert "queued 0  processing 0" in out
    assert "QUEUE" in out


@pytest.mark.slow
def test_once_prints_a_table_and_json(daemon: Daemon, jobctl: Any) -> None:
    some_work(daemon)
    daemon.admin("POST", "queues/mail/pause", {})
    code, out, err = jobctl("top", "--once", "--interval", "100ms")
    assert (code, err) == (0, "")
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert rows["video"][1:4] == ["open", "0", "1"]
    assert rows["mail"][1:4] == ["paused", "0", "0"]
    assert rows["w-1"][1:3] == ["busy", "1"]
    assert rows["w-1"][-3:] == ["a", "42", "%"]
    assert re.search(r"  disk \S+ \S+ free of \S+ \S+ \(/.*/jobd\.db\)$", out, re.MULTILINE)
    code, out, _ = jobctl("top", "--json", "--interval", "100ms")
    frame = msgspec.json.decode(out, type=TopFrame)
    assert (code, frame.stats.total_jobs, frame.workers[0].jobs) == (0, 2, [HeldJob("a", 42)])
    assert len(out.splitlines()) == 1


def test_without_a_terminal_top_names_its_options(jobctl: Any) -> None:
    code, out, err = jobctl("top")
    assert (code, out) == (2, "")
    assert "--once" in err
    assert jobctl("top", "--once", "--interval", "1ms")[0] == 2


class TopTerminal:
    """jobctl top on its own terminal."""

    def __init__(self, daemon: Daemon, **more: str) -> None:
        self.said = b""
        env = {**environ(daemon), "TERM": "xterm", "COLUMNS": "80", "LINES": "24", **more}
        if not more:
            env.pop("NO_COLOR", None)
        self._ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "jobd.cli.ctl.main", "top", "--interval", "100ms"]
        self.process = subprocess.Popen(
            command, env=env, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=die_with_us, start_new_session=True
        )
        os.close(theirs)

    def until(self, text: bytes) -> None:
        """Read until `text` has appeared since the last call."""
        output = b""
        while text not in output:
            output += self._read()
        self.said += output

    def _read(self) -> bytes:
        piece = os.read(self._ours, 65_536)
        assert piece
        return piece

    def __enter__(self) -> TopTerminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def press(self, key: bytes) -> None:
        os.write(self._ours, key)

    def ended(self) -> int:
        try:
            while True:
                self.said += self._read()
        except OSError:  # EIO: no process has the terminal open
            os.close(self._ours)
        return self.process.wait()


def test_q_ends_top_and_restores_the_screen(daemon: Daemon) -> None:
    with TopTerminal(daemon) as terminal:
        terminal.until(b"queued 0")
        daemon.post("/v1/jobs", {"id": "a", "queue": "video"})
        terminal.until(b"queued 1")
        terminal.press(b"x")
        terminal.until(b"video")
        terminal.press(b"q")
        assert terminal.ended() == 0
        assert terminal.said.index(b"\x1b[?1049h") < terminal.said.rindex(b"\x1b[?1049l")


@pytest.mark.slow
def test_top_waits_for_an_unreachable_daemon_and_ctrl_c_ends_it(daemon: Daemon) -> None:
    with TopTerminal(daemon) as terminal:
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
def test_without_escape_sequences_frames_are_appended(daemon: Daemon) -> None:
    with TopTerminal(daemon, NO_COLOR="1") as terminal:
        terminal.until(b"queued 0")
        terminal.until(b"queued 0")
        terminal.press(b"q")
        assert terminal.ended() == 0
        assert b"\x1b" not in terminal.said
