"""Exit codes of errors."""

from __future__ import annotations

import os
import subprocess
import sys

import click
import pytest

from jobd.cli import exit_codes
from jobd.cli.daemon.main import jobd
from jobd.client import Endpoint, JobdError, NotLeader, Unreachable
from jobd.client.apis import unreachable
from jobd.model.errors import ERROR_STATUS
from tests import ROOT


def test_every_error_code_has_an_exit_code() -> None:
    again = {"overloaded", "shutting_down", "outcome_unknown", "storage_full", "too_many_jobs", "request_timeout"}
    again |= {"not_leader", "artifacts_unavailable", "too_many_queues"}
    special = {"unauthorized": 5, "forbidden": 5, "internal_error": 1, **dict.fromkeys(again, 75)}
    assert {code: exit_codes.exit_code_of(code) for code in ERROR_STATUS} == {
        code: special.get(code, 4) for code in ERROR_STATUS
    }
    assert exit_codes.exit_code_of("unreachable") == 3


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        (ConnectionRefusedError(111, "Connection refused"), "Is jobd running there?"),
        (PermissionError(13, "Permission denied"), "Your user may not use this socket"),
        (TimeoutError(), "A requested change may have been made"),
    ],
)
def test_an_unreachable_daemon_has_advice_that_fits_the_reason(
    reason: OSError, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command
    def command() -> None:
        raise unreachable(Endpoint(path="/w.sock"), reason)

    assert exit_codes.run(command, "jobctl", []) == 3
    message = capsys.readouterr().err
    assert message.startswith("jobctl: The daemon at unix:/w.sock cannot be reached: ")
    assert advice in message


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (NotLeader("This node does not lead."), "To see why no node leads: jobctl cluster"),
        (Unreachable("No node served it.", details={"tried": []}), "To see why no node leads: jobctl cluster"),
        (NotLeader("It is b.", details={"leader": "b"}), "Give the addresses of all nodes, separated by commas"),
    ],
)
def test_a_node_that_does_not_lead_has_advice_of_its_own(
    error: JobdError, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command
    def command() -> None:
        raise error

    exit_codes.run(command, "jobctl", [])
    assert capsys.readouterr().err == f"jobctl: {error.message.rstrip('.')}. {advice} [{error.code}]\n"


def test_a_usage_error_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_codes.run(jobd, "jobd", ["monitoring"]) == 2
    expected = (
        "jobd: Missing argument '{rules|dashboard}'. Choose from: rules, dashboard. See: jobd monitoring --help\n"
    )
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("--version >&-", 74, "jobctl: stdout is closed"),
        ("--version >/dev/full", 74, "jobctl: No space left on device"),
        ("--version >&- 2>&- <&-", 74, ""),
        ("--version 2>&-", 0, ""),
        ("nonsense 2>&-", 2, ""),
        ("submit - <&-", 2, "jobctl: PAYLOAD is not valid JSON"),
        ("stats --admin-url http://é..x", 2, "the host name is not valid"),
    ],
)
@pytest.mark.parametrize("is_unbuffered", [True, False])
def test_closed_streams_and_invalid_hosts_have_an_exit_code(
    command: str, code: int, message: str, is_unbuffered: bool
) -> None:
    env = os.environ | {"ADMIN_TOKEN": "token", "PYTHONUNBUFFERED": "1" if is_unbuffered else "", "LC_ALL": "C.UTF-8"}
    shell = ["sh", "-c", f"'{sys.executable}' -m jobd.cli.ctl.main {command}"]
    done = subprocess.run(shell, env=env, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1 if message else 0)
    assert message in done.stderr
