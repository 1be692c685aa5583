"""`jobd cluster init`, and `jobd check-config` with a journal in PostgreSQL."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path

import pytest

from jobd.cli.daemon.main import main
from jobd.journal.postgres import session
from jobd.journal.postgres.journal import PostgresJournal
from jobd.model import responses
from jobd.model.journal import NodeEntry
from jobd.storage.cluster.membership import WrongCluster
from jobd.storage.store import Store
from tests.support.cli_harness import Jobctl
from tests.support.postgres import PASSWORD, PostgresServer
from tests.support.store_files import edit_store, make_store

pytestmark = pytest.mark.slow

TOKEN = "canary-admin-0123456789abcdef"
NOBODY = 65534
SYNC_OFF = ("--set", "journal.require_sync=false")


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADMIN_TOKEN", TOKEN)


@pytest.fixture
def database(postgres_server: PostgresServer, journal_name: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of an empty database, whose owner is a role of its own. jobd uses it."""
    name = journal_name.replace("-", "_")
    postgres_server.sql(f"CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}'", f"CREATE DATABASE {name} OWNER {name}")
    monkeypatch.setenv("JOBD_JOURNAL_URL", url := postgres_server.url(name, role=name))
    return url


class Jobd(Jobctl):
    """jobd, which shows no password."""

    def run(self, *argv: str) -> tuple[int, str, str]:
        code, out, err = super().run(*argv)
        assert PASSWORD not in out + err
        assert PASSWORD.replace(" ", "%20") not in out + err
        return code, out, err


@pytest.fixture
def jobd(capsys: pytest.CaptureFixture[str]) -> Jobd:
    return Jobd(capsys, main)


def test_init_creates_the_journal_once(database: str, jobd: Jobd) -> None:
    out = jobd.says(0, "PostgreSQL has no synchronous standby", "cluster", "init")
    assert out.startswith("main: created (id ")
    again = jobd.run("cluster", "init", *SYNC_OFF)
    assert again == (0, out.replace("created", "exists already"), "")
    assert jobd.ok("cluster", "init", *SYNC_OFF, "--set", "journal.name=other").startswith("other: created")


def test_a_store_becomes_a_cluster_and_returns(database: str, tmp_path: Path, jobd: Jobd) -> None:
    path, other = str(tmp_path / "jobd.db"), str(tmp_path / "other.db")
    asyncio.run(make_store(path))
    code, out, err = jobd.run("cluster", "init", "--from-store", path, *SYNC_OFF)
    assert (code, err) == (0, "")
    assert out.endswith(f"{path}: belongs to the cluster\n")
    with pytest.raises(WrongCluster, match="belongs to cluster"):
        asyncio.run(Store.open(path))
    asyncio.run(make_store(other))
    at_other = ("--set", f"store.path={other}", "--set", "journal.lease=1s", *SYNC_OFF, "--yes")
    jobd.says(78, f"{other} is the store of a single machine", "cluster", "leave", *at_other)
    out = jobd.ok("join", *at_other)
    kept = re.fullmatch(rf"{other}: kept as ({other}\.\w+Z); the next start rebuilds it from the journal\n", out)
    assert kept is not None
    assert Path(kept[1]).exists()
    out = jobd.ok("cluster", "leave", *at_other)
    assert out.startswith(f"{other}: the store of a single machine, with epoch ")
    rows = []
    for each in (path, other):
        with edit_store(each) as conn:
            rows.append(conn.execute("SELECT * FROM jobs").fetchall())
    assert rows[0] == rows[1] != []
    jobd.says(78, "the journal is in use", "cluster", "init", "--from-store", path, *SYNC_OFF)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can write files of another user")
def test_root_leaves_a_store_to_its_owner(database: str, tmp_path: Path, jobd: Jobd) -> None:
    path = tmp_path / "jobd.db"
    asyncio.run(make_store(str(path)))
    for file in (tmp_path, path):
        os.chown(file, NOBODY, NOBODY)
    for file in (path.with_suffix(".db.lock"), path.with_suffix(".db.epoch")):
        file.unlink(missing_ok=True)

    def owners() -> set[int]:
        return {path.with_name(f"jobd.db{suffix}").stat().st_uid for suffix in ("", ".lock", ".epoch")}

    jobd.ok("cluster", "init", "--from-store", str(path), *SYNC_OFF)
    assert owners() == {NOBODY}
    at_new = ("--set", f"store.path={path}", "--set", "journal.lease=500ms", *SYNC_OFF, "--yes")
    jobd.ok("join", *at_new)
    jobd.ok("cluster", "leave", *at_new)
    assert owners() == {NOBODY}


def test_init_needs_a_url(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", "init"]) == 78
    assert "journal.url is empty" in capsys.readouterr().err


def test_check_config_checks_the_journal(database: str, jobd: Jobd) -> None:
    jobd.says(78, "has no tables of jobd: run `jobd cluster init`", "check-config")
    jobd.run("cluster", "init")
    assert jobd.json("check-config", *SYNC_OFF)["values"]["journal.url"]["value"].count("***") == 1
    jobd.says(78, "require_sync = false", "check-config")


def test_an_unreachable_server_exits_with_75(jobd: Jobd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOBD_JOURNAL_URL", "postgresql://jobd@127.0.0.1:1/jobd")
    jobd.says(75, "start it, or correct [journal] url", "check-config")


def test_tables_of_a_newer_version_exit_with_78(database: str, monkeypatch: pytest.MonkeyPatch, jobd: Jobd) -> None:
    jobd.run("cluster", "init")
    monkeypatch.setattr(session, "VERSION", 0)
    for verb in (("check-config",), ("cluster", "init")):
        jobd.says(78, "has tables of version 1, and this jobd supports version 0. Upgrade jobd", *verb)


def test_a_node_that_does_not_come_back_is_forgotten(
    database: str, monkeypatch: pytest.MonkeyPatch, jobd: Jobd
) -> None:
    jobd.run("cluster", "init")

    async def register() -> None:
        journal = await PostgresJournal.open(database, "main", 3_000)
        await journal.register(NodeEntry("b", "p1", "", 1, "", 0))
        await journal.close()

    asyncio.run(register())
    jobd.says(4, 'node "b" is running', "cluster", "forget", "b")
    monkeypatch.setattr(responses, "UNSEEN_MS", 0)
    assert jobd.run("cluster", "forget", "b")[:2] == (0, "b: removed from journal main\n")
    jobd.says(4, 'has no node "b"; its nodes: none', "cluster", "forget", "b")
