"""Logging: one line per event, without control characters and secrets."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobd import logging as log
from jobd.model.commands import Release
from tests.support.daemon_process import TOKEN
from tests.support.forked_process import ForkedDaemon

SECRET = "canary-0123456789-0123456789"
NASTY = 'a\x1b[2Jb\nlevel=error event=forged\r\x00\x7f\x9b\u2028\u202e\ud800 \\ " é'
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e\ud800]")
FORMATS = ["console", "logfmt", "json"]


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    assert log.flush(10)
    structlog.reset_defaults()
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("jobd").setLevel(logging.NOTSET)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert log.flush(10)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "" or printed.err.endswith("\n")
    assert not CONTROL.search(printed.err)
    return printed.err.split("\n")[:-1]


@pytest.mark.parametrize("format", FORMATS)
def test_every_event_is_one_clean_line(format: str, capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("info", format)
    structlog.get_logger("jobd.x").info(NASTY, nasty=NASTY, deep={NASTY: [NASTY]}, path=Path("/a\nb"))
    structlog.get_logger().info("by key", **{"a b\n=": 1})
    assert len(lines(capsys)) == 2


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(), format=st.sampled_from(FORMATS))
def test_any_text_is_one_clean_line(text: str, format: str, capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("info", format)
    structlog.get_logger(text).info(text, text=text)
    (line,) = lines(capsys)
    if format == "json":
        assert json.loads(line)["text"] == text
        assert json.loads(line)["event"] == text


def test_json_keeps_every_value(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("info", "json")
    structlog.get_logger("jobd.x").warning("said", a=NASTY, b=None, c=[1, 2.5, True], d={"k": {"x"}}, e=Path("/p"))
    (line,) = lines(capsys)
    logged = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", logged.pop("timestamp"))
    plain = {"a": NASTY, "b": None, "c": [1, 2.5, True], "d": {"k": ["x"]}, "e": "/p"}
    assert logged == {"level": "warning", "event": "said", "logger": "jobd.x", **plain}


def test_logfmt_is_words_and_json_strings(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("info", "logfmt")
    structlog.get_logger().info("two words", word="a/b.c-1", empty="", none=None, yes=True, text='a "b"\n', list=[1, 2])
    (line,) = lines(capsys)
    assert line.partition(" ")[2] == (
        'level=info event="two words" word=a/b.c-1 empty="" none= yes=true text="a \\"b\\"\\n" list=[1,2]'
    )


@pytest.mark.parametrize("format", FORMATS)
def test_secrets_are_redacted_at_every_depth(format: str, capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("info", format)
    command = Release(id="j", lock_id=SECRET)
    flat: dict[str, Any] = {"lock_id": SECRET, "token": SECRET, "Authorization": SECRET, "admin_token": SECRET}
    structlog.get_logger().info("flat", **flat, fencing_token=42)
    structlog.get_logger().info("deep", command=command, body={"lockId": SECRET, "list": [{"Admin-Token": SECRET}]})
    structlog.get_logger().info(f"header Bearer {SECRET}", text=f"bearer {SECRET}")
    try:
        raise ValueError(f"Authorization: Bearer {SECRET}")
    except ValueError:
        structlog.get_logger().exception("failed")
    printed = lines(capsys)
    assert len(printed) == 4
    assert SECRET not in "".join(printed)
    assert "42" in printed[0]
    assert all(log.REDACTED in line for line in printed)


def test_a_value_that_contains_itself_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("info", "json")
    around: dict[str, Any] = {}
    around["again"] = around
    structlog.get_logger().info("round", around=around)
    assert '"..."' in lines(capsys)[0]


def fail() -> None:
    raise LookupError("first\nsecond")


@pytest.mark.parametrize("format", ["json", "console"])
def test_a_traceback_is_escaped_text(format: str, capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("info", format)
    try:
        fail()
    except LookupError as error:
        structlog.get_logger().exception("failed")
        structlog.get_logger().error("failed", exc_info=error)
    first, second = lines(capsys)
    for line in (first, second):
        assert r"Traceback (most recent call last):\n" in line
        assert r"LookupError: first\nsecond" in line


def test_logfmt_shows_what_failed_and_where(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("info", "logfmt")
    try:
        fail()
    except LookupError:
        structlog.get_logger().exception("failed")
    (line,) = lines(capsys)
    assert r'exception="LookupError: first\nsecond"' in line
    assert re.search(r'at="test_logging\.py:\d+ fail < test_logging\.py:\d+ test_logfmt_shows', line)
    assert "Traceback" not in line


def test_lines_of_the_standard_library_are_logged_the_same_way(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("info", "json")
    other = logging.getLogger("aiohttp.server")
    other.error("bad %s\n", "request", exc_info=LookupError("x"))
    other.warning("%d", "no number")
    other.log(35, "between the levels")
    other.debug("not shown")
    other.info("not shown")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.warn("old habits", stacklevel=1)
    logged = [json.loads(line) for line in lines(capsys)]
    assert [line["event"].partition(":")[0] for line in logged[:3]] == ["bad request\n", "%d", "between the levels"]
    assert [line["level"] for line in logged] == ["error", "warning", "warning", "warning"]
    assert {line["logger"] for line in logged[:3]} == {"aiohttp.server"}
    assert "LookupError: x" in logged[0]["traceback"]
    assert logged[3]["logger"] == "py.warnings"


def test_a_new_level_applies_to_loggers_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("warning", "logfmt")
    ours, other = structlog.get_logger(), logging.getLogger("asyncio")

    def count_lines() -> int:
        for say in (ours.debug, ours.info, ours.warning, other.debug, other.info, other.warning):
            say("x")
        return len(lines(capsys))

    assert count_lines() == 2
    log.set_level("debug")
    assert count_lines() == 4  # of other packages nothing below a warning
    log.set_level("error")
    assert count_lines() == 0


def test_configuring_again_logs_nothing_twice(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("info", "json")
    log.configure("info", "logfmt")
    structlog.get_logger().info("ours")
    logging.getLogger("asyncio").warning("theirs")
    assert len(lines(capsys)) == 2


def test_other_packages_log_warnings_and_above_only(capsys: pytest.CaptureFixture[str]) -> None:
    talkative = logging.getLogger("aiosqlite")
    talkative.setLevel("DEBUG")
    try:
        log.configure("debug", "logfmt")
        talkative.debug("executing %s", SECRET)
        talkative.info("executing %s", SECRET)
        assert lines(capsys) == []
    finally:
        talkative.setLevel(logging.NOTSET)


def test_at_level_debug_the_daemon_writes_no_payload_and_no_lock_id(tmp_path: Path) -> None:
    with ForkedDaemon(tmp_path, "[log]\nlevel = 'debug'\n") as daemon:
        daemon.post("/v1/jobs", {"id": "j", "payload": {"secret": SECRET}, "max_attempts": 2})
        grant = daemon.post("/v1/jobs/j/start", {"worker": "w"}).data
        daemon.post("/v1/jobs/j/progress", {"lock_id": grant["lock_id"], "progress": 5, "message": SECRET})
        assert daemon.get("/v1/jobs/j").data["payload"] == {"secret": SECRET}
        assert daemon.admin("GET", "jobs/j").data["lock"]["lock_id"] == grant["lock_id"]
        assert daemon.post("/v1/jobs/j/release", {"lock_id": "none"}).error == "lock_lost"
        daemon.post("/v1/jobs/j/fail", {"lock_id": grant["lock_id"], "error_message": "no"})
        assert daemon.stop() == 0
    logged = daemon.log.decode()
    assert "event=granted" in logged, logged  # the level applies
    assert SECRET not in logged
    assert grant["lock_id"] not in logged
    assert TOKEN not in logged


def test_unknown_names_are_rejected() -> None:
    with pytest.raises(ValueError, match="log level 'loud': expected debug, info"):
        log.set_level("loud")
    with pytest.raises(ValueError, match="log format 'xml': expected auto, console"):
        log.configure("info", "xml")


def test_a_closed_stderr_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log.configure("info", "logfmt")
    with (tmp_path / "err").open("w") as file:
        pass
    monkeypatch.setattr(sys, "stderr", file)
    structlog.get_logger().info("into the void")
    assert log.flush(10)
    monkeypatch.setattr(sys, "stderr", None)
    log.configure("info", "auto")
    structlog.get_logger().info("into the void")
    assert log.flush(10)


SAY = (
    "import structlog; from jobd import logging; logging.configure('info', 'auto'); "
    "structlog.get_logger().error('said', a=1)"
)


def test_auto_is_logfmt_into_a_pipe() -> None:
    done = subprocess.run([sys.executable, "-c", SAY], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert re.fullmatch(r"timestamp=\S+ level=error event=said a=1\n", done.stderr)


@pytest.mark.parametrize("no_color", ["", "1"])
def test_auto_is_console_on_a_terminal(no_color: str) -> None:
    ours, theirs = pty.openpty()
    environ = {**os.environ, "NO_COLOR": no_color}
    subprocess.run([sys.executable, "-c", SAY], stderr=theirs, check=True, env=environ)
    os.close(theirs)
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        shown = terminal.read(10_000).decode()
    assert re.fullmatch(r"\d\S+Z (\x1b\[31m)?error   (\x1b\[0m)? said a=1\r\n", shown)
    assert ("\x1b" in shown) is (no_color == "")
