"""The command line of jobctl without a daemon: help, usage errors and exit codes."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from jobd.cli.ctl import main
from jobd.cli.ctl.completion import KIND
from jobd.cli.daemon.main import jobd
from jobd.cli.params import NameParam
from tests import ROOT
from tests.support.cli_harness import commands_of


def run(*argv: str) -> int:
    return main.main(list(argv))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["nonsense"], "nonsense"),
        (["submit", "--delay", "soon"], "10s or 1h30m"),
        (["submit", "{size: 3}"], "or add --text"),
        (["submit", "--full"], "--full needs --lines"),
        (["submit", "--lines", "--full", "--text"], "mutually exclusive"),
        (["submit", "--lines", "--id", "j"], "does not take --id"),
        (["submit", "--url", "http://127.0.0.1:1", "--socket", "/x"], "give one"),
        (["submit", "--url", "ftp://127.0.0.1"], "expected unix:/path"),
        (["jobs", "--status", "lost"], "queued"),
        (["jobs", "--limit", "0"], "0"),
        (["jobs", "--queue"], "See: jobctl jobs --help"),
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


_NAMES = [
    (verb, parameter.opts[0])
    for verb, command in commands_of(main.jobctl).items()
    for parameter in command.params
    if isinstance(parameter, click.Option) and isinstance(parameter.type, NameParam) and parameter.type is not KIND
]


@pytest.mark.parametrize(("verb", "option"), _NAMES)
def test_an_empty_name_is_a_usage_error(verb: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Otherwise a job would get a random id, a worker a default name, and a list would be unfiltered."""
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
    verbs = [main.jobctl, *commands_of(main.jobctl).values()]
    assert not [option for verb in verbs for param in verb.params for option in param.opts if option == "--token"]


def test_options_may_precede_or_follow_the_command_and_the_last_one_wins(capsys: pytest.CaptureFixture[str]) -> None:
    run("--socket", "/before.sock", "jobs")
    run("jobs", "--socket", "/after.sock")
    run("--socket", "/before.sock", "jobs", "--socket", "/nearer.sock")
    used = re.findall(r"/(\w+)\.sock", capsys.readouterr().err)
    assert list(dict.fromkeys(used)) == ["before", "after", "nearer"]


@pytest.mark.parametrize(
    "line", ["cancel j", "force-fail j", "force-reset j", "delete j", "transition j queued failed"]
)
def test_a_destructive_command_asks_first(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ADMIN_TOKEN", "canary-canary-canary-canary")
    assert run(*line.split()) == 2
    assert "--yes" in capsys.readouterr().err


def test_help_lists_every_command_and_needs_neither_rich_nor_the_client() -> None:
    code = (
        "import sys; from jobd.cli.ctl import main; code = main.main(['--help'])\n"
        "heavy = {'rich', 'msgspec', 'http.client', 'asyncio', 'aiohttp', 'jobd.client'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy)); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "HEAVY []" in done.stdout
    verbs = (
        "submit run jobs job why timeline validate cancel stats health cleanup recover-stuck force-fail force-reset "
        "transition import locks queues workers pause resume status clock reports run-now update delete"
    )
    shown = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")}
    assert set(verbs.split()) <= shown
    assert "alerts" not in shown, "an old name works, but is not listed"


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


def test_no_summary_of_a_command_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    _usage, *lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if line.endswith("...")]


def test_without_a_command_the_help_is_printed_and_the_exit_code_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "submit" in err


def test_an_unknown_command_names_a_similar_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("artifcat", "a") == 2
    err = capsys.readouterr().err
    assert "?." not in err
    assert "artifcat" in err


def test_the_old_spelling_artefact_names_the_new_one() -> None:
    result = CliRunner().invoke(main.jobctl, ["artefact", "a"])
    assert result.exit_code == 2
    assert "spelled artifact" in result.stderr


@pytest.mark.parametrize(
    ("shell", "expected"), [("bash", "complete -o"), ("zsh", "#compdef jobctl"), ("fish", "complete ")]
)
def test_completion_prints_a_script(shell: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("completion", shell) == 0
    out = capsys.readouterr().out
    assert expected in out
    assert f"_JOBCTL_COMPLETE={shell}_complete" in out


def test_without_a_daemon_no_names_are_completed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ("jobctl submit --queue ", "jobctl job ", "jobctl --url ftp://x job "):
        for name, value in {"_JOBCTL_COMPLETE": "bash_complete", "COMP_WORDS": words}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
        with pytest.raises(SystemExit, match=r"^0$"):
            run()
    assert capsys.readouterr() == ("\n\n\n", "")


def test_a_command_imports_only_its_own_module() -> None:
    code = "import sys; from jobd.cli.ctl import main; main.main(['submit', '1'])\n"
    code += "print(*(name for name in sys.modules if name.startswith(('jobd.cli.ctl.', 'jobd.client.', 'rich'))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "cannot be reached" in done.stderr
    names = set(done.stdout.split())
    assert {name for name in names if ".ctl." in name} == {
        f"jobd.cli.ctl.{name}" for name in ("main", "submit", "wait", "completion")
    }
    assert not names & {"jobd.client.admin", "jobd.client.aio", "rich"}


def helps(command: click.Command, path: str) -> Iterator[tuple[str, str]]:
    context = click.Context(command, info_name=path)
    yield path, command.get_help(context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            part = command.get_command(context, name)
            assert part is not None
            yield from helps(part, f"{path} {name}")


def test_a_number_is_called_n_in_every_help() -> None:
    """Without a metavar, click shows INTEGER, or INTEGER RANGE."""
    shown = {**dict(helps(main.jobctl, "jobctl")), **dict(helps(jobd, "jobd"))}
    assert len(shown) > 50
    assert [path for path, text in shown.items() if "INTEGER" in text or "FLOAT" in text] == []
