"""Fixtures of the command-line tests (a daemon for each module, and jobctl) and of the cluster tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from jobd.cli.daemon.main import main
from tests.support.cli_harness import TOKEN, CliDaemon, Jobctl
from tests.support.forked_process import ForkedNode
from tests.support.node_process import Cluster
from tests.support.postgres import PASSWORD, PostgresServer


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


@pytest.fixture
def url(postgres_server: PostgresServer, journal_name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of an empty database."""
    name = journal_name.replace("-", "_")
    postgres_server.sql(f"CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}'", f"CREATE DATABASE {name} OWNER {name}")
    monkeypatch.setenv("ADMIN_TOKEN", TOKEN)
    return postgres_server.url(name, role=name)


@pytest.fixture
def database(url: str) -> str:
    """Return the URL of a database with a journal."""
    flags = ["--set", f"journal.url={url}", "--set", "journal.require_sync=false"]
    assert main(["cluster", "init", *flags]) == 0
    return url


@pytest.fixture
def cluster(tmp_path: Path, database: str) -> Iterator[Cluster]:
    with ExitStack() as stack:
        made = Cluster(tmp_path, database, stack, ForkedNode)
        yield made
    for node in made.nodes:
        print(f"--- {node.name}\n{node.log.decode()}")  # shown if the test fails
