"""Real daemons on a real PostgreSQL that loses acknowledged records, and `jobd cluster accept-loss`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from jobd.cli.ctl.main import main as jobctl
from jobd.cli.daemon.main import main
from tests.conftest import tool_missing
from tests.support import postgres
from tests.support.daemon_process import TOKEN
from tests.support.forked_process import ForkedNode
from tests.support.node_process import Cluster, NodeProcess
from tests.support.polling import poll_until
from tests.support.postgres import PostgresMissing

pytestmark = [pytest.mark.slow, pytest.mark.long]

WAIT_S = 60.0


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    try:
        postgres.programs()
    except PostgresMissing:
        tool_missing("postgres", "postgresql")
    monkeypatch.setenv("ADMIN_TOKEN", TOKEN)
    with ExitStack() as stack:
        yield stack


def flags(node: NodeProcess, url: str) -> list[str]:
    given = {"journal.url": url, "journal.require_sync": "false", "journal.lease": "1s", "store.path": str(node.store)}
    return [word for each in given.items() for word in ("--set", "=".join(each))]


def write_kept(first: NodeProcess) -> dict[str, Any]:
    """Create two jobs and start one, which no node will lose. Return the grant."""
    for name in ("held", "waiting"):
        assert first.post("/v1/jobs", {"id": name, "on_stall": "requeue"}).status == 201
    granted: dict[str, Any] = first.post("/v1/jobs/held/start", {"worker": "w"}).data
    return granted


def write_lost(first: NodeProcess, second: NodeProcess) -> None:
    assert first.post("/v1/jobs", {"id": "new", "payload": {"file": "1.mov"}}).status == 201
    assert first.post("/v1/jobs/waiting/cancel", {}).status == 200
    poll_until(lambda: second.has_records_of(first))


def last_record_of(node: NodeProcess) -> str:
    """Start a node that has lost records, and return the last one of the journal that it names."""
    node.launch()
    assert node.process.wait(WAIT_S) == 78
    node.wait_for_log(b"cannot_start")
    found = re.findall(rb"--upto ([0-9]+)", node.log)
    return str(int(found[-1]))


def accept_and_check(
    first: NodeProcess, second: NodeProcess, url: str, granted: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    upto = last_record_of(first)
    command = ["cluster", "accept-loss", "--upto", upto, *flags(first, url)]
    owner = 12345 if os.geteuid() == 0 else os.geteuid()
    os.chown(first.store, owner, -1)
    capsys.readouterr()
    assert main([*command, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "new: it is queued here, and the journal does not have it" in shown
    assert "would begin a new epoch" in shown
    assert main(["cluster", "accept-loss", "--upto", str(int(upto) + 1), *flags(first, url), "--yes"]) == 78
    assert f"use --upto {upto}" in capsys.readouterr().err
    assert main([*command, "--yes"]) == 0
    assert "1 grants have ended" in capsys.readouterr().out
    assert main([*command, "--yes"]) == 0
    assert "nothing else needs to be done" in capsys.readouterr().out
    file = Path(f"{first.store}.lost-after-{upto}.jsonl")
    assert "new" in [json.loads(line)["id"] for line in file.read_text().splitlines()]
    assert {each.stat().st_uid for each in (file, Path(f"{first.store}.lock"))} == {owner}
    second.start()
    second.wait_leads()
    first.start()
    assert second.get("/v1/jobs/new").status == 404
    assert second.get("/v1/jobs/held").data["status"] == "queued"
    assert second.post("/v1/jobs/held/progress", {"lock_id": granted["lock_id"], "progress": 5}).error == "lock_lost"
    again = second.post("/v1/jobs/held/start", {"worker": "w"}).data
    assert again["fencing_token"] > granted["fencing_token"]
    assert jobctl(["import", str(file), "--admin-url", f"unix:{second.admin_socket}"]) == 0
    assert second.get("/v1/jobs/new").data["payload"] == {"file": "1.mov"}
    poll_until(lambda: first.cluster()["lag_events"] == 0)
    assert second.stop() == 0
    first.wait_leads()
    assert first.get("/v1/jobs/new").data["status"] == "queued"


def test_an_asynchronous_failover(tmp_path: Path, stack: ExitStack, capsys: pytest.CaptureFixture[str]) -> None:
    primary, standby = stack.enter_context(postgres.postgres_cluster())
    primary.sql("ALTER SYSTEM RESET synchronous_standby_names")
    primary.sql("SELECT pg_reload_conf()")
    url = primary.url().replace(f":{primary.port}/", f":{primary.port},127.0.0.1:{standby.port}/")
    assert main(["cluster", "init", "--set", f"journal.url={url}", "--set", "journal.require_sync=false"]) == 0
    cluster = Cluster(tmp_path, url, stack, ForkedNode)
    first = cluster.add_leader("a")
    second = cluster.add("b")
    granted = write_kept(first)
    postgres.wait_for(primary, "SELECT replay_lsn >= pg_current_wal_insert_lsn() FROM pg_stat_replication")
    standby.stop()
    write_lost(first, second)
    primary.kill()
    standby.start()
    standby.promote()
    process = first.process
    assert process is not None
    poll_until(lambda: first.post("/v1/jobs", {"id": "unknown"}).status == 503 or process.poll() is not None)
    assert process.wait(WAIT_S) == 75
    poll_until(lambda: "lost acknowledged records" in " ".join(second.cluster()["warnings"]))
    assert second.stop() == 0
    accept_and_check(first, second, url, granted, capsys)
