"""The demo: its files and their checks, its judgement, and the whole of it as a process that leaves nothing behind."""

from __future__ import annotations

import gzip
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobd.cli.demo import checks, demo_checks, files, main
from jobd.model.events import EventView
from tests import ROOT
from tests.support.daemon_process import die_with_us

# ---------------------------------------------------------------------------------------------------------------------
# The files


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    """One source of each kind, by kind."""
    (tmp_path / "in").mkdir()
    made = files.make_sources(tmp_path / "in", 7, pictures=1, films=1, sales=1, logs=1)
    assert made[0][0] == "film"
    return {kind: tmp_path / "in" / name for kind, name in made}


def _convert(kind: str, source: Path, tmp_path: Path) -> tuple[Path, dict[str, object], list[float]]:
    reported: list[float] = []
    target = tmp_path / files.target_name(kind, source.name)
    figures = files.convert(kind, source, target, lambda percent, _: reported.append(percent))
    return target, figures, reported


@pytest.mark.parametrize("kind", ["picture", "film", "sales", "log"])
def test_each_conversion_is_right_and_leaves_no_part(kind: str, sources: dict[str, Path], tmp_path: Path) -> None:
    target, figures, reported = _convert(kind, sources[kind], tmp_path)
    demo_checks.check(kind, sources[kind], target, figures)
    assert reported == sorted(reported)
    assert all(0 < percent < 100 for percent in reported)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in", target.name])
    assert figures["bytes"] == target.stat().st_size


def test_a_film_reports_each_frame_and_is_an_animated_png(sources: dict[str, Path], tmp_path: Path) -> None:
    target, figures, reported = _convert("film", sources["film"], tmp_path)
    assert len(reported) == figures["frames"] == files.FILM_FRAMES
    kinds = [kind for kind, _ in demo_checks.chunks(target)]
    assert kinds[:3] == [b"IHDR", b"acTL", b"fcTL"]
    assert kinds.count(b"fdAT") == files.FILM_FRAMES - 1
    assert kinds[-1] == b"IEND"


@pytest.mark.parametrize("kind", ["picture", "film", "sales", "log"])
def test_a_result_of_another_source_is_found_out(kind: str, sources: dict[str, Path], tmp_path: Path) -> None:
    target, figures, _ = _convert(kind, sources[kind], tmp_path)
    (tmp_path / "other").mkdir()
    files.make_sources(tmp_path / "other", 8, pictures=1, films=1, sales=1, logs=1)
    with pytest.raises(files.Broken):
        demo_checks.check(kind, tmp_path / "other" / sources[kind].name, target, figures)


@pytest.mark.parametrize("kind", ["picture", "sales", "log"])
def test_a_flipped_bit_or_a_missing_file_is_found_out(kind: str, sources: dict[str, Path], tmp_path: Path) -> None:
    target, figures, _ = _convert(kind, sources[kind], tmp_path)
    data = bytearray(target.read_bytes())
    data[len(data) // 2] ^= 1
    target.write_bytes(data)
    with pytest.raises(files.Broken, match="checksum"):
        demo_checks.check(kind, sources[kind], target, figures)
    with pytest.raises((files.Broken, gzip.BadGzipFile, EOFError, OSError, ValueError)):
        demo_checks.check(kind, sources[kind], target, {"sha256": files.sha256(target)})
    target.unlink()
    with pytest.raises(files.Broken, match="not there"):
        demo_checks.check(kind, sources[kind], target, figures)


def test_a_source_that_is_no_picture_fails_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "bad.ppm").write_bytes(b"P6\n3 3\n255\nabc")
    with pytest.raises(files.Broken, match="no PPM"):
        files.convert("picture", tmp_path / "bad.ppm", tmp_path / "bad.png", lambda *_: None)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.ppm"]


# ---------------------------------------------------------------------------------------------------------------------
# The judgement


def _event(event_type: str, to: str, by: str, **details: object) -> EventView:
    return EventView(1, 1_772_366_400_000, event_type, None, to, by, None, dict(details))


SEEN = (
    _event("created", "queued", "client"),
    _event("granted", "processing", "worker:w-2", worker="w-2", fencing_token=7),
    _event("stalled", "queued", "recovery"),
    _event("granted", "processing", "worker:w-3", worker="w-3", fencing_token=9),
    _event("completed", "completed", "worker:w-3"),
)


def _story() -> main.Story:
    return main.Story(
        killed_worker="w-2", killed_job="film-1.ppm", killed_token=7, killed_progress=25, killed_code=-signal.SIGKILL
    )


def _told(story: main.Story, events: list[EventView]) -> list[bool]:
    return [is_true for _, is_true in checks.checks(story, [], {"film-1.ppm": events}, {})][:4]


def test_the_judgement_is_yes_where_everything_was_seen() -> None:
    assert _told(_story(), list(SEEN)) == [True, True, True, True]


@pytest.mark.parametrize(
    ("left_out", "expected"),
    [(2, [True, False, True, True]), (3, [True, True, False, False]), (4, [True, True, True, False])],
)
def test_the_judgement_is_no_where_something_was_not_seen(left_out: int, expected: list[bool]) -> None:
    events = [event for number, event in enumerate(SEEN) if number != left_out]
    assert _told(_story(), events) == expected


def test_the_judgement_is_no_where_the_token_did_not_rise_or_nobody_was_killed() -> None:
    same = _event("granted", "processing", "worker:w-3", worker="w-3", fencing_token=7)
    assert _told(_story(), [*SEEN[:3], same, SEEN[4]]) == [True, True, False, True]
    story = _story()
    story.killed_code = 0
    assert _told(story, list(SEEN))[0] is False
    assert _told(main.Story(), []) == [False, False, False, False]


# ---------------------------------------------------------------------------------------------------------------------
# The whole


@pytest.fixture
def temporary() -> Iterator[dict[str, str]]:
    """An environment whose temporary directory is ours, with a path short enough for sockets in it."""
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


def _is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _until_gone(pids: list[int]) -> None:
    """Wait for the end of processes that are not our children; the test's own timeout is the limit."""
    while any(map(_is_there, pids)):
        time.sleep(0.05)


@pytest.mark.timeout(120)
def test_the_demo_kills_a_worker_and_proves_the_recovery(temporary: dict[str, str], tmp_path: Path) -> None:
    process = _start(temporary, "--keep", str(tmp_path / "kept"))
    text, _ = process.communicate()
    assert process.returncode == 0, text
    assert "KILL -9" in text
    assert "NOT SEEN" not in text
    assert len(re.findall(r"^ok  ", text, re.MULTILINE)) == 7
    assert "stalled" in text
    assert len(_pids(text)) == 4
    assert not any(map(_is_there, _pids(text)))
    assert os.listdir(temporary["TMPDIR"]) == []
    assert len(list((tmp_path / "kept").glob("*.png"))) == main.FILES["pictures"] + main.FILES["films"]


def _until_at_work(process: subprocess.Popen[str]) -> str:
    """What the demo has said until its workers are at work."""
    assert process.stdout is not None
    seen = ""
    while "completed" not in seen:
        line = process.stdout.readline()
        assert line, seen
        seen += line
    return seen


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_demo_that_is_stopped_takes_its_processes_along(temporary: dict[str, str], number: signal.Signals) -> None:
    process = _start(temporary)
    seen = _until_at_work(process)
    assert os.listdir(temporary["TMPDIR"]) != []
    process.send_signal(number)
    rest, _ = process.communicate()
    assert process.returncode in (128 + number, 130), seen + rest
    assert len(_pids(seen)) == 4
    assert not any(map(_is_there, _pids(seen)))
    assert os.listdir(temporary["TMPDIR"]) == []


@pytest.mark.timeout(120)
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent is gone")
def test_a_demo_that_is_killed_leaves_no_process(temporary: dict[str, str]) -> None:
    process = _start(temporary)
    seen = _until_at_work(process)
    process.kill()
    process.communicate()
    assert len(_pids(seen)) == 4
    _until_gone(_pids(seen))
