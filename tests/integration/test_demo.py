"""`jobd demo` and `jobd demo --ui` as processes that leave nothing behind."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from jobd.client import JobClient
from tests import ROOT
from tests.support.daemon_process import die_with_us


@pytest.fixture
def temporary() -> Iterator[dict[str, str]]:
    """An environment with its own temporary directory, with a path short enough for sockets in it."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("JOBD_", "ADMIN_TOKEN"))}
    with tempfile.TemporaryDirectory(prefix="d", dir="/tmp") as folder:
        yield {**plain, "TMPDIR": folder, "PYTHONUNBUFFERED": "1"}


PICTURES = 4  # with one film; `make demo` draws all
FEWER = f"""\
import sys
from jobd.cli.daemon.main import main
from jobd.cli.demo import recovery
recovery.PICTURES, recovery.FILMS = {PICTURES}, 1
sys.exit(main())"""


def _start(env: dict[str, str], *argv: str, program: Sequence[str] = ("-m", "jobd")) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *program, "demo", *argv],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=die_with_us,
    )


def _pids(text: str) -> list[int]:
    return [int(pid) for pid in re.findall(r"\(pid (\d+)\)", text)]


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_demo_kills_a_worker_and_confirms_the_recovery(temporary: dict[str, str], tmp_path: Path) -> None:
    process = _start(temporary, "--keep", str(tmp_path / "kept"), program=("-c", FEWER))
    text, _ = process.communicate()
    assert process.returncode == 0, text
    assert "KILL -9" in text
    assert "NOT SEEN" not in text
    assert len(re.findall(r"^ok  ", text, re.MULTILINE)) == 7
    assert "stalled" in text
    assert len(_pids(text)) == 4
    assert not any(map(_is_alive, _pids(text)))
    assert os.listdir(temporary["TMPDIR"]) == []
    suffixes = [path.suffix for path in (tmp_path / "kept").iterdir()]
    assert suffixes == [".png"] * (PICTURES + 1)


def _until_working(process: subprocess.Popen[str]) -> str:
    """Read the output until a job is completed."""
    assert process.stdout is not None
    seen = ""
    while "completed" not in seen:
        line = process.stdout.readline()
        assert line, seen
        seen += line
    return seen


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_demo_and_its_processes(temporary: dict[str, str], number: signal.Signals) -> None:
    process = _start(temporary)
    seen = _until_working(process)
    assert os.listdir(temporary["TMPDIR"]) != []
    process.send_signal(number)
    rest, _ = process.communicate()
    assert process.returncode in (128 + number, 130), seen + rest
    assert len(_pids(seen)) == 4
    assert not any(map(_is_alive, _pids(seen)))
    assert os.listdir(temporary["TMPDIR"]) == []


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_killed_demo_leaves_no_process(temporary: dict[str, str]) -> None:
    process = _start(temporary)
    seen = _until_working(process)
    process.kill()
    process.communicate()
    assert len(_pids(seen)) == 4
    while any(map(_is_alive, _pids(seen))):  # not our children; the test's timeout is the limit
        time.sleep(0.05)


def _get(url: str, cookie: str = "") -> tuple[http.client.HTTPResponse, str]:
    place = urlsplit(url)
    with closing(http.client.HTTPConnection(str(place.hostname), place.port, timeout=30)) as connection:
        connection.request("GET", place.path, headers={"Cookie": cookie} if cookie else {})
        response = connection.getresponse()
        return response, response.read().decode()


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_live_demo_signs_one_browser_in_to_a_scene_with_every_status(temporary: dict[str, str]) -> None:
    process = _start(temporary, "--ui")
    try:
        assert process.stdout is not None
        link = process.stdout.readline().strip()
        assert link.startswith("http://127.0.0.1:"), link + process.stdout.read()
        assert _get(f"{link}x")[0].status == 404
        response, page = _get(link)
        assert response.status == 200
        cookie = response.headers["Set-Cookie"]
        assert "HttpOnly; SameSite=Strict" in cookie
        assert _get(link)[0].status == 410
        dashboard = re.search(r"url=(http://[^\"]+)", page)
        assert dashboard is not None
        assert _get(dashboard[1])[0].status == 303, "without a session the dashboard asks for the token"
        for path in ("", "jobs", "failures", "queues", "workers", "webhooks"):
            assert _get(dashboard[1] + path, cookie.partition(";")[0])[0].status == 200, path
        client = JobClient(f"unix:{next(Path(temporary['TMPDIR']).glob('*/worker.sock'))}")
        with client:
            wanted = {"queued", "processing", "completed", "failed", "cancelled"}
            while {job.status for job in client.iterate_jobs()} != wanted:
                time.sleep(0.1)
            while client.get_job("full-disk").status != "failed":
                time.sleep(0.1)
            while (
                coming := client.why("archive-2019").next
            ) is None or coming.rule != "cleanup":  # until it is stalled
                time.sleep(0.1)
            assert client.get_job("odd-camera").error_message
    finally:
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate()
    assert process.returncode == 0, rest
    assert os.listdir(temporary["TMPDIR"]) == []
