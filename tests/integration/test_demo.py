"""The demo: its pictures, what it checks, its sign-in link, and both scenes as processes that leave nothing behind."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest

from jobd.cli.demo import live, recovery
from jobd.cli.demo.processes import render
from jobd.client import JobClient
from jobd.model.events import EventView
from tests import ROOT
from tests.support.daemon_process import die_with_us

# ---------------------------------------------------------------------------------------------------------------------
# The pictures


def _job(results: Path, data: bytes, **changes: Any) -> Any:
    """A completed job with `data` as its result."""
    (results / "picture-01.png").write_bytes(data)
    metadata = {"sha256": hashlib.sha256(data).hexdigest()}
    path = str(results / "picture-01.png")
    values = {"id": "picture-01", "kind": "picture", "status": "completed", "file_path": path}
    return SimpleNamespace(**{**values, "metadata_value": metadata, **changes})


@pytest.mark.slow
def test_a_film_reports_each_frame_and_is_a_whole_animated_png(tmp_path: Path) -> None:
    reported: list[float] = []
    film = render(-0.1, 0.95, recovery.FRAMES, lambda percent, _: reported.append(percent))
    assert len(reported) == recovery.FRAMES
    assert reported == sorted(reported)
    assert reported[-1] == 99
    assert (film.count(b"fcTL"), film.count(b"fdAT")) == (recovery.FRAMES, recovery.FRAMES - 1)
    assert recovery.result_error(_job(tmp_path, film, kind="film"), tmp_path) == ""
    assert "frames" in recovery.result_error(_job(tmp_path, film), tmp_path)


def test_a_damaged_or_missing_result_is_detected(tmp_path: Path) -> None:
    data = render(-0.1, 0.95, 1, lambda *_: None)
    assert recovery.result_error(_job(tmp_path, data), tmp_path) == ""
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    sum_of_good = {"sha256": hashlib.sha256(data).hexdigest()}
    assert "checksum differs" in recovery.result_error(
        _job(tmp_path, bytes(flipped), metadata_value=sum_of_good), tmp_path
    )
    assert "chunk is wrong" in recovery.result_error(_job(tmp_path, bytes(flipped)), tmp_path)
    assert recovery.result_error(_job(tmp_path, data[:100]), tmp_path)
    assert "not a PNG" in recovery.result_error(_job(tmp_path, b"x" * 100), tmp_path)
    assert "failed" in recovery.result_error(_job(tmp_path, data, status="failed"), tmp_path)
    assert recovery.result_error(_job(tmp_path, data, metadata_value=None), tmp_path)
    incomplete_job = _job(tmp_path, data)
    (tmp_path / "picture-01.png").unlink()
    assert "No such file" in recovery.result_error(incomplete_job, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# The claims


def _event(event_type: str, to: str, by: str, **details: object) -> EventView:
    return EventView(1, 1_772_366_400_000, event_type, None, to, by, None, dict(details))


SEEN = (
    _event("created", "queued", "client"),
    _event("granted", "processing", "worker:w-2", worker="w-2", fencing_token=7),
    _event("stalled", "queued", "recovery"),
    _event("granted", "processing", "worker:w-3", worker="w-3", fencing_token=9),
    _event("completed", "completed", "worker:w-3"),
)


def _story() -> recovery.Observations:
    return recovery.Observations(
        killed_worker="w-2", killed_job="film-01", killed_token=7, killed_progress=25, killed_code=-signal.SIGKILL
    )


def _confirmed(story: recovery.Observations, events: list[EventView]) -> list[bool]:
    return [was_seen for _, was_seen in recovery.checks(story, [], {"film-01": events}, {})][:4]


def test_the_claims_are_confirmed_if_everything_was_observed() -> None:
    assert _confirmed(_story(), list(SEEN)) == [True, True, True, True]


@pytest.mark.parametrize(
    ("missing", "expected"),
    [(2, [True, False, True, True]), (3, [True, True, False, False]), (4, [True, True, True, False])],
)
def test_a_claim_is_not_confirmed_if_its_event_is_missing(missing: int, expected: list[bool]) -> None:
    assert _confirmed(_story(), [event for number, event in enumerate(SEEN) if number != missing]) == expected


def test_a_claim_needs_a_higher_token_and_a_killed_worker() -> None:
    same = _event("granted", "processing", "worker:w-3", worker="w-3", fencing_token=7)
    assert _confirmed(_story(), [*SEEN[:3], same, SEEN[4]]) == [True, True, False, True]
    story = _story()
    story.killed_code = 0
    assert _confirmed(story, list(SEEN))[0] is False
    assert _confirmed(recovery.Observations(), []) == [False, False, False, False]


# ---------------------------------------------------------------------------------------------------------------------
# The sign-in link


def test_a_link_signs_in_once() -> None:
    link = live.Link(lambda: "cookie")
    assert link.matches(link.secret)
    assert not link.matches(link.secret[:-1])
    assert not link.matches("")
    assert [link.redeem(), link.redeem()] == ["cookie", None]


def test_a_link_expires() -> None:
    now_s = 0.0
    link = live.Link(lambda: "cookie", lambda: now_s)
    now_s = live.LINK_TTL_S
    assert link.redeem() is None


# ---------------------------------------------------------------------------------------------------------------------
# The processes


@pytest.fixture
def temporary() -> Iterator[dict[str, str]]:
    """An environment with its own temporary directory, with a path short enough for sockets in it."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("JOBD_", "ADMIN_TOKEN"))}
    with tempfile.TemporaryDirectory(prefix="d", dir="/tmp") as folder:
        yield {**plain, "TMPDIR": folder, "PYTHONUNBUFFERED": "1"}


def _start(env: dict[str, str], *argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "jobd", "demo", *argv],
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
    process = _start(temporary, "--keep", str(tmp_path / "kept"))
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
    assert suffixes == [".png"] * (recovery.PICTURES + recovery.FILMS)


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
