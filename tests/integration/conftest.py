"""Fixtures of the command-line tests: a daemon for each module, and jobctl."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.cli_harness import TOKEN, CliDaemon, Jobctl


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CliDaemon]:
    daemon = CliDaemon(tmp_path_factory.mktemp("d"))
    yield daemon
    assert daemon.stop() == 0, (daemon.directory / "log").read_text()
    assert TOKEN not in (daemon.directory / "log").read_text()


@pytest.fixture
def jobctl(running: CliDaemon, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Jobctl:
    for name in list(os.environ):
        if name.startswith(("JOBD_", "ADMIN_")):
            monkeypatch.delenv(name)
    for name, value in running.client_environ.items():
        monkeypatch.setenv(name, value)
    return Jobctl(capsys)
