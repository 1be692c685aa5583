"""The command line without a daemon: usage errors, exit codes and output."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from jobd import config, config_loader
from jobd.cli import confirm, connection, exit_codes, files, tables_admin, terminal
from jobd.cli.ctl import main
from jobd.cli.params import duration_ms, moment_ms, past_ms
from jobd.client.endpoint import default_socket
from jobd.dashboard import filters, rendering
from jobd.model.errors import ERROR_STATUS
from jobd.model.responses import AuditView
from jobd.storage.files import FileLock
from tests import ROOT

NOW = 1_772_366_400_000


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ignore the settings and the daemon of this machine, and do not retry."""
    for name in list(os.environ):
        if name.startswith(("JOBD_", "ADMIN_TOKEN")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("JOBD_SOCKET", str(tmp_path / "missing.sock"))
    monkeypatch.setenv("JOBD_ADMIN_URL", f"unix:{tmp_path}/missing.sock")
    monkeypatch.setattr(connection, "RETRY_FOR_S", 0.0)


def run(*argv: str) -> int:
    return main.main(list(argv))


# ---------------------------------------------------------------------------------------------------------------------
# Showing


@pytest.mark.parametrize(
    ("details", "expected"),
    [
        ({}, "done"),
        ({"from": "failed", "to": "queued"}, "failed → queued"),
        ({"from": "failed", "to": None}, "failed → deleted"),
        ({"times": 3}, "done, 3 times"),
        ({"planned": 9, "changed_meanwhile": 0, "refused": 0}, "done"),
        ({"planned": 9, "changed_meanwhile": 2, "refused": 1, "left_undone": ["a", "b", "c"]}, "done, 3 not changed"),
    ],
)
def test_the_audit_log_shows_the_outcome_of_an_action(
    capsys: pytest.CaptureFixture[str], details: dict[str, Any], expected: str
) -> None:
    tables_admin.audit([AuditView(1, NOW, "eve", "127.0.0.1", "x", None, None, None, "done", 0, details)])
    assert expected in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ÄÖ 漢字", "plain ÄÖ 漢字"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x07\x7f\x9b2J", "\\x07\\x7f\\x9b2J"),
        ("abc\u202edcba", "abc\\u202edcba"),
        ("a\u2028b", "a\\u2028b"),
        ("\ud800", "\\ud800"),
    ],
)
def test_clean_escapes_control_characters(text: str, shown: str) -> None:
    assert terminal.clean(text) == shown
    assert terminal.clean(shown) == shown


@given(st.text())
def test_clean_text_is_one_printable_line(text: str) -> None:
    cleaned = terminal.clean(text)
    assert cleaned.splitlines() in ([], [cleaned])
    assert not any(ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 for char in cleaned)


@given(st.recursive(st.text() | st.integers(-(2**53), 2**53) | st.none(), lambda inner: st.lists(inner, max_size=3)))
def test_json_has_the_same_value_without_control_characters(value: Any) -> None:
    if _has_surrogate(value):
        return
    text = terminal.as_json(value)
    assert json.loads(text) == value
    assert terminal.clean(text) == text


def _has_surrogate(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_has_surrogate, value))
    return isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value)


@pytest.mark.parametrize(
    ("ms", "shown"),
    [
        (0, "0 ms"),
        (999, "999 ms"),
        (1_000, "1.0 s"),
        (9_999, "10.0 s"),
        (10_000, "10 s"),
        (59_999, "59 s"),
        (60_000, "1 m"),
        (200_000, "3 m 20 s"),
        (3_600_000, "1 h"),
        (7_500_000, "2 h 5 m"),
        (90_000_000, "1 d 1 h"),
        (-5_000, "-5.0 s"),
    ],
)
def test_span(ms: int, shown: str) -> None:
    assert terminal.span(ms) == shown


@pytest.mark.parametrize(
    ("gap_ms", "shown"),
    [(0, "0 s ago"), (119_000, "119 s ago"), (720_000, "12 m ago"), (-30_000, "in 30 s"), (-172_800_000, "in 2 d")],
)
def test_age(gap_ms: int, shown: str) -> None:
    assert terminal.age(NOW - gap_ms, NOW) == shown


@pytest.fixture(params=["UTC", "America/New_York", "Asia/Tokyo"])
def zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Set the time zone of the host."""
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield request.param
    monkeypatch.undo()
    time.tzset()


def test_a_time_is_shown_as_in_the_dashboard_with_its_age(zone: str) -> None:
    assert terminal.instant(1_772_366_400_000) == "2026-03-01 12:00:00 UTC" == rendering.utc_time(1_772_366_400_000)
    assert terminal.when(1_772_366_400_000, 1_772_367_120_000) == "2026-03-01 12:00:00 UTC (12 m ago)"
    assert terminal.when(None) == "-"
    assert terminal.instant(10**18) == f"{10**18} ms"


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (1 << 40, "1.0 TiB")]
)
def test_size(count: int, shown: str) -> None:
    assert terminal.size(count) == shown


def test_a_table_in_a_pipe_is_not_wrapped_or_cut_and_its_cells_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 500
    terminal.table(["ID", ">N"], [("\x1b]0;evil\x07", 1), (long, 22)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "\\x1b]0;evil\\x07" in lines[1]
    assert lines[2].split() == [long, "22"]


def test_in_a_pipe_a_long_cell_moves_only_its_own_line(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.table(
        ["ID", "STATUS", ">N"], [("x" * 200, "queued", 1), ("short", "failed", 22), ("other", "queued", 333)]
    )
    head, long, *others = capsys.readouterr().out.splitlines()
    assert long == "x" * 200 + "  queued    1"
    assert [head, *others] == ["ID     STATUS    N", "short  failed   22", "other  queued  333"]


class TerminalOutput(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(monkeypatch: pytest.MonkeyPatch, width: int, columns: list[str], rows: list[tuple[object, ...]]) -> list[str]:
    """Return the lines of a table on a terminal of this width, without styles."""
    for name, value in {"COLUMNS": str(width), "LINES": "50", "NO_COLOR": "1", "TERM": "dumb"}.items():
        monkeypatch.setenv(name, value)
    out = TerminalOutput()
    monkeypatch.setattr(sys, "stdout", out)
    terminal.table(columns, rows)
    return out.getvalue().splitlines()


def test_on_a_terminal_words_are_folded_and_figures_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = drawn(
        monkeypatch, 40, ["ID", "STATUS", ">QUEUED"], [("x" * 60, "processing", 1_234_567), ("y", "queued", 8)]
    )
    assert max(map(len, lines)) <= 40
    assert sum(line.count("x") for line in lines) == 60, "nothing is left out"
    assert [line.count("1234567") for line in lines] == [0, 1, *[0] * (len(lines) - 2)]
    assert sum("processing" in line for line in lines) == 1


def test_a_table_without_room_becomes_a_block_per_row(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = ["ID", "QUEUE", "KIND", ">TRIES", ">TOKEN"]
    rows: list[tuple[object, ...]] = [(f"{name}" * 9, "videos-of-all", "transcoding", 3, 10**12) for name in "ab"]
    lines = drawn(monkeypatch, 30, columns, rows)
    assert lines.count("") == 1
    assert [line.split() for line in lines[:5]] == [
        ["ID", "a" * 9],
        ["QUEUE", "videos-of-all"],
        ["KIND", "transcoding"],
        ["TRIES", "3"],
        ["TOKEN", str(10**12)],
    ]


def test_an_empty_table_says_so_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.table(["ID"], [], empty="No jobs.")
    assert capsys.readouterr() == ("", "No jobs.\n")


# ---------------------------------------------------------------------------------------------------------------------
# Values on the command line


@pytest.mark.parametrize(
    ("text", "ms"),
    [("0", 0), ("500ms", 500), ("10s", 10_000), ("1.5h", 5_400_000), ("1h30m", 5_400_000), ("7d", 604_800_000)],
)
def test_durations(text: str, ms: int) -> None:
    assert duration_ms(text) == ms


@pytest.mark.parametrize("text", ["", "10", "s", "10 s", "-1s", "1w", "10sx", "x10s", "99999999999d"])
def test_invalid_durations(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        duration_ms(text)


def test_points_in_the_past() -> None:
    assert past_ms("2h", NOW) == NOW - 7_200_000
    assert past_ms("0", NOW) == NOW
    assert past_ms(str(NOW - 5), NOW) == NOW - 5
    with pytest.raises(ValueError, match="an age such as 2h"):
        past_ms("yesterday", NOW)


def test_an_operator_is_the_user_behind_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    host = socket.gethostname()
    monkeypatch.delenv("SUDO_USER", raising=False)
    monkeypatch.setenv("LOGNAME", "eve")
    assert connection.this_operator() == f"eve@{host}"
    monkeypatch.setenv("SUDO_USER", "bob")
    assert connection.this_operator() == f"bob@{host}"
    monkeypatch.delenv("SUDO_USER")

    def nameless() -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr("getpass.getuser", nameless)
    assert connection.this_operator() == f"uid-{os.getuid()}@{host}"


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("2026-03-01T12:00", 1_772_366_400_000),
        ("2026-03-01 12:00", 1_772_366_400_000),
        ("2026-03-01 12:00:00 UTC", 1_772_366_400_000),  # as printed
        ("2026-03-01T12:00Z", 1_772_366_400_000),
        ("2026-03-01T13:00+01:00", 1_772_366_400_000),
        ("2026-03-01", 1_772_323_200_000),
        ("2h", NOW - 7_200_000),
    ],
)
def test_jobctl_and_the_dashboard_parse_times_alike(text: str, at: int, zone: str) -> None:
    assert (past_ms(text, NOW), filters.parse_time(text, NOW)) == (at, at)


def test_points_in_time() -> None:
    assert moment_ms("1772366400000", 5) == 1_772_366_400_000
    assert moment_ms("2h", NOW) == NOW + 7_200_000
    assert moment_ms("2026-03-01T12:00:00+00:00", 5) == 1_772_366_400_000
    assert moment_ms("2026-03-01T12:00", 5) == 1_772_366_400_000
    with pytest.raises(ValueError, match="Unix milliseconds"):
        moment_ms("1772366400", 5)  # seconds
    with pytest.raises(ValueError, match="Unix milliseconds"):
        moment_ms("tomorrow", 5)


# ---------------------------------------------------------------------------------------------------------------------
# Exit codes and messages


def test_every_error_code_has_an_exit_code() -> None:
    again = {"overloaded", "shutting_down", "outcome_unknown", "storage_full", "too_many_jobs", "request_timeout"}
    again |= {"storage_unavailable", "too_many_queues"}
    special = {"unauthorized": 5, "forbidden": 5, "internal_error": 1, **dict.fromkeys(again, 75)}
    assert {code: exit_codes.exit_code_of(code) for code in ERROR_STATUS} == {
        code: special.get(code, 4) for code in ERROR_STATUS
    }
    assert exit_codes.exit_code_of("unreachable") == 3


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["nonsense"], "nonsense"),
        (["submit", "--delay", "soon"], "10s or 1h30m"),
        (["submit", "{size: 3}"], "quote it for the shell"),
        (["submit", "--url", "http://127.0.0.1:1", "--socket", "/x"], "give one"),
        (["submit", "--url", "ftp://127.0.0.1"], "expected unix:/path"),
        (["jobs", "--status", "lost"], "queued"),
        (["jobs", "--limit", "0"], "0"),
        (["transition", "j", "queued"], "TO"),
        (["cancel"], "ID"),
        (["run"], "CMD"),
        (["run", "--timeout", "0", "true"], "--timeout must be above 0"),
    ],
)
def test_a_usage_error_exits_with_2_and_one_line(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("jobctl: ")
    assert expected in err
    assert "--help" in err


@pytest.mark.parametrize(
    "line",
    [
        "submit --id",
        "submit --queue",
        "submit --idempotency-key",
        "jobs --queue",
        "jobs --worker",
        "export --queue",
        "events --queue",
        "events --job",
        "events --type",
        "audit --who",
        "audit --action",
        "audit --what",
        "audit --job",
        "run --queue",
        "run --name",
    ],
)
def test_an_empty_name_is_a_usage_error(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Otherwise a job would get a random id, a worker a default name, and a list would be unfiltered."""
    verb, option = line.split()
    rest = ["true"] if verb == "run" else []
    assert run(verb, option, "", *rest) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"Invalid value for '{option}': it is empty. Is a shell variable unset?" in err


@pytest.mark.parametrize("argv", [["jobs"], ["submit", "1"], ["why", "j"], ["job", "j"]])
def test_an_unreachable_worker_api_exits_with_3(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*argv) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "missing.sock" in err
    assert "--socket" in err


def test_an_unreachable_admin_api_exits_with_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ADMIN_TOKEN", "canary-canary-canary-canary")
    assert run("stats") == 3
    assert "canary" not in "".join(capsys.readouterr())


def test_a_missing_token_names_its_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("stats") == 5
    assert "ADMIN_TOKEN_FILE" in capsys.readouterr().err


def test_an_unusable_token_file_exits_with_78(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("stats", "--token-file", str(tmp_path / "none")) == 78
    (tmp_path / "empty").write_text("\n")
    assert run("stats", "--token-file", str(tmp_path / "empty")) == 78
    assert "empty" in capsys.readouterr().err


def test_no_option_takes_a_token_as_its_value() -> None:
    verbs = [main.jobctl, *main.jobctl.commands.values()]
    assert not [option for verb in verbs for param in verb.params for option in param.opts if option == "--token"]


def test_the_admin_token_never_goes_to_the_worker_api(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADMIN_TOKEN", "canary-canary-canary-canary")
    assert connection.worker_token(connection.ConnectionOptions()) is None


def test_the_first_of_several_tokens_is_used(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("first-first-first-first\nsecond-second-second-s\n")
    assert connection.read_token(str(tmp_path / "token")) == "first-first-first-first"


@pytest.fixture
def no_connection_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Remove every setting that names the daemon; return the path of its configuration file, which does not exist."""
    for name in ("JOBD_SOCKET", "JOBD_ADMIN_URL"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("ADMIN_TOKEN", "canary-canary-canary-canary")
    monkeypatch.setattr(connection, "CONFIG_PATH", str(tmp_path / "config.toml"))
    return tmp_path / "config.toml"


def found(**given: str) -> tuple[str, str]:
    """Return the addresses of the worker API and the admin API."""
    shown = connection.ConnectionOptions()
    for name, value in given.items():
        setattr(shown, name, value)
    return str(connection.worker_api_endpoint(shown)), str(connection.admin_api_endpoint(shown))


def test_options_override_variables_and_variables_the_configuration(
    no_connection_settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = (f"unix:{default_socket()}", "http://127.0.0.1:8770")
    assert found() == defaults
    no_connection_settings.write_text('[worker]\nsocket = "/file/w"\n[admin]\nlisten = "unix:/file/a"\n')
    assert found() == ("unix:/file/w", "unix:/file/a")
    other = no_connection_settings.with_name("other.toml")
    other.write_text('[worker]\nsocket = "/other/w"\n')
    monkeypatch.setenv("JOBD_CONFIG", str(other))
    assert found() == ("unix:/other/w", defaults[1])
    monkeypatch.setenv("JOBD_WORKER_SOCKET", "/env/w")
    monkeypatch.setenv("JOBD_ADMIN_LISTEN", "127.0.0.1:9999")
    assert found() == ("unix:/env/w", "http://127.0.0.1:9999")
    monkeypatch.setenv("JOBD_URL", "http://there:1")
    monkeypatch.setenv("JOBD_ADMIN_URL", "http://there:2")
    assert found() == ("http://there:1", "http://there:2")
    monkeypatch.setenv("JOBD_SOCKET", "/env/w")
    assert found()[0] == "unix:/env/w"
    assert found(socket="/flag/w", admin_url="unix:/flag/a") == ("unix:/flag/w", "unix:/flag/a")


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        ('listen = "0.0.0.0:8771"', "http://127.0.0.1:8771"),
        ('listen = "[::]:8771"', "http://[::1]:8771"),
        ('listen = "::1:8771"', "http://[::1]:8771"),
        ('listen = "jobs.example:443"\ntls_cert = "/c"\ntls_key = "/k"', "https://jobs.example:443"),
        ('tls_cert = "/c"', "https://127.0.0.1:8770"),
        ('listen = "8771"', "http://127.0.0.1:8770"),
        ("listen = 8771", "http://127.0.0.1:8770"),
        ("listen = ", "http://127.0.0.1:8770"),
        ('listen = "\\ud800"', "http://127.0.0.1:8770"),
    ],
)
def test_the_admin_api_is_found_by_the_configuration(no_connection_settings: Path, settings: str, url: str) -> None:
    no_connection_settings.write_text(f"[admin]\n{settings}\n")
    assert found()[1] == url


@pytest.mark.parametrize("content", [b"\xff\xfe", b"admin = 1\nworker = []\n", None])
def test_an_unreadable_configuration_is_ignored(no_connection_settings: Path, content: bytes | None) -> None:
    no_connection_settings.write_bytes(content) if content is not None else no_connection_settings.mkdir()
    assert found() == (f"unix:{default_socket()}", "http://127.0.0.1:8770")


def test_the_daemon_is_found_at_its_defaults() -> None:
    assert connection.CONFIG_PATH == config_loader.DEFAULT_PATH
    assert config.Config().admin.listen == connection.DEFAULT_LISTEN


def test_options_may_precede_or_follow_the_verb_and_the_last_one_wins(capsys: pytest.CaptureFixture[str]) -> None:
    run("--socket", "/before.sock", "jobs")
    run("jobs", "--socket", "/after.sock")
    run("--socket", "/before.sock", "jobs", "--socket", "/nearer.sock")
    assert [
        name for line in capsys.readouterr().err.splitlines() for name in ("before", "after", "nearer") if name in line
    ] == [
        "before",
        "after",
        "nearer",
    ]


@pytest.mark.parametrize(
    "argv",
    [
        ["cancel", "j"],
        ["force-fail", "j"],
        ["force-reset", "j"],
        ["delete", "j"],
        ["transition", "j", "queued", "failed"],
    ],
)
def test_a_destructive_verb_asks_first(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ADMIN_TOKEN", "canary-canary-canary-canary")
    assert run(*argv) == 2
    assert "--yes" in capsys.readouterr().err


def test_help_names_every_verb_and_needs_neither_rich_nor_the_client() -> None:
    code = (
        "import sys; from jobd.cli.ctl import main; code = main.main(['--help'])\n"
        "heavy = {'rich', 'msgspec', 'http.client', 'asyncio', 'aiohttp', 'jobd.client'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy)); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "HEAVY []" in done.stdout
    verbs = (
        "submit run jobs job why timeline validate cancel stats health cleanup recover-stuck force-fail force-reset "
        "transition import locks queues workers pause resume alerts clock reports run-now update delete"
    )
    assert set(verbs.split()) <= {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")}


@pytest.mark.parametrize(
    ("verb", "variables"),
    [
        ("run", "[env: JOBD_WORKER_TOKEN_FILE]"),
        ("health", "[env: ADMIN_TOKEN_FILE]"),
        ("jobs", "[env: ADMIN_TOKEN_FILE, or JOBD_WORKER_TOKEN_FILE for the worker API]"),
    ],
)
def test_help_names_the_variable_behind_the_token_file(
    verb: str, variables: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(verb, "--help") == 0
    assert variables in " ".join(capsys.readouterr().out.split())


def test_without_a_verb_the_help_is_printed_and_the_exit_code_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "submit" in err


def test_the_table_of_transitions_decides_what_is_allowed() -> None:
    def confirmation(to: str | None, only_from: tuple[str, ...] = ()) -> confirm.Confirmation:
        return confirm.Confirmation("x", lambda _: None, to, lambda _: None, lambda _: "", only_from)  # type: ignore[arg-type, return-value]

    assert confirm._allowed("processing", confirmation("failed"))
    assert not confirm._allowed("completed", confirmation("queued"))
    assert not confirm._allowed("queued", confirmation(None))
    assert confirm._allowed("cancelled", confirmation(None))
    assert not confirm._allowed("queued", confirmation("failed", only_from=("processing",)))


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_a_file_is_written_completely_and_only_for_its_owner(tmp_path: Path) -> None:
    shown: list[int] = []
    with files.whole_file(tmp_path / "copy.db", shown.append) as file:
        file.write(b"12345")
        file.write(b"678")
        assert not (tmp_path / "copy.db").exists()
    assert (tmp_path / "copy.db").read_bytes() == b"12345678"
    assert (tmp_path / "copy.db").stat().st_mode & 0o777 == 0o600
    assert shown == [5, 8]
    assert [path.name for path in tmp_path.iterdir()] == ["copy.db"]


def test_an_incomplete_file_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "copy.db").write_bytes(b"old")
    (tmp_path / "copy.db.part").write_bytes(b"left over from a crash, longer than what comes now")
    with pytest.raises(OSError, match="broke"):
        _break_off(tmp_path / "copy.db")
    assert (tmp_path / "copy.db").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["copy.db"]


def _break_off(path: Path) -> None:
    with files.whole_file(path, lambda _: None) as file:
        file.write(b"new")
        raise OSError("the stream broke")


def test_two_programs_do_not_write_one_file(tmp_path: Path) -> None:
    with files.whole_file(tmp_path / "copy.db", lambda _: None) as file:
        file.write(b"first")
        with pytest.raises(exit_codes.CliError) as caught, files.whole_file(tmp_path / "copy.db", lambda _: None):
            pass
        assert caught.value.code == 75
    assert (tmp_path / "copy.db").read_bytes() == b"first"


def test_a_store_that_a_daemon_opened_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "copy.db").write_bytes(b"old")
    with pytest.raises(exit_codes.CliError) as caught:
        _write_while_taken(tmp_path / "copy.db")
    assert caught.value.code == 75
    assert (tmp_path / "copy.db").read_bytes() == b"old"
    assert not (tmp_path / "copy.db.part").exists()


def _write_while_taken(path: Path) -> None:
    with contextlib.ExitStack() as stack, files.whole_file(path, lambda _: None) as file:
        file.write(b"new")
        stack.enter_context(FileLock(str(path)))


def test_the_partial_file_is_not_a_store_or_a_symlink(tmp_path: Path) -> None:
    """The .part name of one file may be another file."""
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / "copy.db.part").symlink_to(tmp_path / "theirs")
    with pytest.raises(OSError, match="symbolic"), files.whole_file(tmp_path / "copy.db", lambda _: None):
        pass
    with FileLock(str(tmp_path / "store.part")), pytest.raises(exit_codes.CliError) as caught:
        _break_off(tmp_path / "store")
    assert caught.value.code == 75
    assert (tmp_path / "theirs").read_bytes() == b"theirs"


# ---------------------------------------------------------------------------------------------------------------------
# The example that reads an old job table


@pytest.fixture(scope="module")
def old_jobs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("import_old_jobs", ROOT / "docs/examples/import_old_jobs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_old_table_becomes_lines_of_an_import(
    old_jobs: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with sqlite3.connect(tmp_path / "old.db") as db:
        db.execute("CREATE TABLE jobs (id TEXT, type TEXT, status TEXT, progress INT, created_at TEXT, data TEXT)")
        db.execute("INSERT INTO jobs VALUES ('a', 'video', 'running', 40, '2025-01-01 10:00:00', '{\"x\": 1}')")
        db.execute("INSERT INTO jobs VALUES ('b', 'video', 'weird', 0, NULL, NULL)")
        db.execute("INSERT INTO jobs VALUES ('c', NULL, 'done', 100, 1735725600, 'plain text')")
    db.close()
    assert old_jobs.main([str(tmp_path / "old.db")]) == 1
    out, err = capsys.readouterr()
    assert [json.loads(line) for line in out.splitlines()] == [
        {
            "id": "a",
            "kind": "video",
            "status": "processing",
            "progress": 40.0,
            "created_at": 1_735_725_600_000,
            "payload": {"x": 1},
        },
        {"id": "c", "status": "completed", "progress": 100.0, "created_at": 1_735_725_600_000, "payload": "plain text"},
    ]
    assert err.startswith("row 2 (id b) is left out: unknown status 'weird': add --status weird=")


def test_a_csv_with_other_names_is_mapped(
    old_jobs: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.csv").write_text("nr,what,state\n7,mail,parked\n")
    argv = [str(tmp_path / "old.csv"), "--map", "id=nr", "--map", "kind=what", "--status", "parked=queued"]
    assert old_jobs.main(argv) == 0
    assert json.loads(capsys.readouterr().out) == {"id": "7", "kind": "mail", "status": "queued"}


def test_several_columns_go_into_the_payload(
    old_jobs: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.csv").write_text(
        'id,name,width,data,owner\n7,cat.mov,320,"{""hd"": true}",\n8,dog.mov,,5,eve\n9,,,,\n'
    )
    mapped = ["--map", "payload.file=name", "--map", "payload.width=width", "--map", "metadata.owner=owner"]
    assert old_jobs.main([str(tmp_path / "old.csv"), *mapped]) == 1
    out, err = capsys.readouterr()
    assert [json.loads(line) for line in out.splitlines()] == [
        {"id": "7", "status": "queued", "payload": {"hd": True, "file": "cat.mov", "width": 320}},
        {"id": "9", "status": "queued"},
    ]
    assert err == "row 2 (id 8) is left out: payload.file: the payload column of this row is not a JSON object\n"
    (tmp_path / "old.csv").write_text("id,name,owner\n7,cat.mov,eve\n")
    assert old_jobs.main([str(tmp_path / "old.csv"), "--map", "payload.file=name", *mapped[4:]]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line == {"id": "7", "status": "queued", "payload": {"file": "cat.mov"}, "metadata": {"owner": "eve"}}


@pytest.mark.parametrize("name", ["nope", "kind.x", "payload.", "nope.x"])
def test_an_unknown_field_is_rejected(old_jobs: ModuleType, tmp_path: Path, name: str) -> None:
    (tmp_path / "old.csv").write_text("id,what\n7,mail\n")
    with pytest.raises(SystemExit, match=f"jobd has no field {name}; it has id, .*, payload.KEY$"):
        old_jobs.main([str(tmp_path / "old.csv"), "--map", f"{name}=what"])


def test_a_whole_payload_comes_before_its_keys_however_they_are_given(
    old_jobs: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.csv").write_text('id,extra,file\n7,"{""x"": 1}",cat.mov\n')
    argv = [str(tmp_path / "old.csv"), "--map", "payload.file=file", "--map", "payload=extra"]
    assert old_jobs.main(argv) == 0
    assert json.loads(capsys.readouterr().out)["payload"] == {"x": 1, "file": "cat.mov"}


def test_a_missing_column_is_rejected_with_a_list_of_columns(
    old_jobs: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.csv").write_text("id,what\n7,mail\n")
    with pytest.raises(SystemExit, match="there is no column nope; there are: id, what"):
        old_jobs.main([str(tmp_path / "old.csv"), "--map", "kind=nope"])
    (tmp_path / "old.csv").write_text("nr,what\n7,mail\n")
    with pytest.raises(SystemExit, match="add --map id=COLUMN; there are: nr, what"):
        old_jobs.main([str(tmp_path / "old.csv")])
    assert capsys.readouterr().out == ""


def test_unused_columns_are_named_once(
    old_jobs: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.csv").write_text("id,r2Key,lockId,colour,tries\na,out/a.zip,l1,red,3.0\nb,,l2,blue,2.5\nc,,,,,\n")
    assert old_jobs.main([str(tmp_path / "old.csv")]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {"id": "a", "attempt": 3, "storage_key": "out/a.zip", "status": "queued"}
    assert err.splitlines() == [
        "columns ignored: lockId, colour",
        "row 2 (id b) is left out: attempt: '2.5' cannot be read (not an integer)",
        "row 3 (id c) is left out: more values than columns",
    ]


def test_bytes_become_text_or_base64_or_skip_their_row(
    old_jobs: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with sqlite3.connect(tmp_path / "old.db") as db:
        db.execute("CREATE TABLE jobs (id TEXT, payload BLOB, message)")
        rows = [("a", b'{"x": 1}', None), ("b", b"\xff\x00", None), ("c", None, b"\xff"), (b"\xfe", None, None)]
        db.executemany("INSERT INTO jobs VALUES (?, ?, ?)", [*rows, ("d", "NaN", "fine")])
        db.execute("INSERT INTO jobs VALUES ('e', NULL, CAST(x'ff' AS TEXT))")
    db.close()
    assert old_jobs.main([str(tmp_path / "old.db")]) == 1
    out, err = capsys.readouterr()
    assert [json.loads(line) for line in out.splitlines()] == [
        {"id": "a", "payload": {"x": 1}, "status": "queued"},
        {"id": "b", "payload": "/wA=", "status": "queued"},
        {"id": "d", "payload": "NaN", "progress_message": "fine", "status": "queued"},
    ]
    assert [line.partition(" is left out: ")[0] for line in err.splitlines()] == [
        "row 3 (id c)",
        "row 4 (id fe)",
        "row 6 (id e)",
    ]


def test_a_closed_pipe_ends_the_example_silently(tmp_path: Path) -> None:
    (tmp_path / "old.csv").write_text("id\n" + "".join(f"job-{number}\n" for number in range(20_000)))
    example = [sys.executable, str(ROOT / "docs/examples/import_old_jobs.py"), str(tmp_path / "old.csv")]
    with subprocess.Popen(example, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        assert reader.stderr is not None
        assert json.loads(reader.stdout.readline())["id"] == "job-0"
        reader.stdout.close()
        assert reader.stderr.read() == b""
        assert reader.wait(30) == -signal.SIGPIPE


def test_an_unreadable_source_is_named(old_jobs: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "old.csv").write_bytes(b"id\n\xff\n")
    for source, what in (("old.csv", "utf-8"), ("none.db", "unable to open"), ("none.csv", "No such file")):
        with pytest.raises(SystemExit, match=f"cannot read .*{source}: .*{what}"):
            old_jobs.main([str(tmp_path / source)])


def test_the_example_only_names_fields_that_an_import_has(old_jobs: ModuleType) -> None:
    from jobd.model.commands import Import

    assert set(old_jobs.COLUMNS) <= set(Import.__struct_encode_fields__)


def test_the_old_spelling_artefact_names_the_new_one() -> None:
    result = CliRunner().invoke(main.jobctl, ["artefact", "a"])
    assert result.exit_code == 2
    assert "spelled artifact" in result.stderr
