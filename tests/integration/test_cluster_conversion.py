"""Real daemons: a store becomes a cluster, two clusters share a database, and versions are mixed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobd.cli.daemon.main import main
from tests.support.forked_process import ForkedDaemon, ForkedNode
from tests.support.node_process import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.long]

WAIT_S = 60.0


def flags(url: str, **given: object) -> list[str]:
    settings = {"journal.url": url, "journal.require_sync": "false", "journal.lease": "1s"}
    settings |= {name.replace("__", "."): str(value) for name, value in given.items()}
    return [word for each in settings.items() for word in ("--set", "=".join(each))]


def repeat_until_done(words: list[str], delay_s: float) -> int:
    """Repeat a command with a kill after a longer time each, until it succeeds. Return the number of kills."""
    kills = 0
    while True:
        process = subprocess.Popen([sys.executable, "-m", "jobd", *words], stdout=subprocess.DEVNULL)
        try:
            assert process.wait(delay_s) == 0
            return kills
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills, delay_s = kills + 1, delay_s + 0.1


def kill_before_snapshot(words: list[str]) -> None:
    """Run a command that ends with a kill before it writes a snapshot."""
    code = """
import os, signal
from jobd.cli.daemon.main import main
from jobd.storage.cluster import snapshots
snapshots.compressed = lambda file: os.kill(os.getpid(), signal.SIGKILL)
main()
"""
    assert subprocess.run([sys.executable, "-c", code, *words]).returncode == -signal.SIGKILL


def test_a_cluster_is_left_and_made_again(url: str, cluster: Cluster) -> None:
    first = cluster.add_leader("a")
    second = cluster.add("b")
    for number in range(4):
        assert first.post("/v1/jobs", {"id": f"job-{number}"}).status == 201
    grants = {"job-0": first.post("/v1/jobs/job-0/start", {"worker": "w", "lock_ttl_ms": 600_000}).data}
    assert (second.stop(), first.stop()) == (0, 0)
    assert main(["cluster", "leave", *flags(url, store__path=first.store), "--yes"]) == 0
    second.launch()
    assert second.process.wait(WAIT_S) == 78
    assert "`jobd cluster leave`" in second.wait_for_log(b"cannot_start")
    with ForkedDaemon.not_started(first.directory) as single:
        single.start()
        grants["job-1"] = single.post("/v1/jobs/job-1/start", {"worker": "w", "lock_ttl_ms": 600_000}).data
        assert (
            single.post("/v1/jobs/job-0/progress", {"lock_id": grants["job-0"]["lock_id"], "progress": 5}).status == 200
        )
        assert single.stop() == 0
    again = flags(url, journal__name="again")
    assert main(["cluster", "init", "--from-store", str(first.store), *again]) == 0
    for node in (first, second):
        node.environ["JOBD_JOURNAL_NAME"] = "again"
    first.start()
    first.wait_leads()
    second.launch()
    assert second.process.wait(WAIT_S) == 78
    assert "`jobd join`" in second.wait_for_log(b"cannot_start")
    assert main(["join", *flags(url, journal__name="again", store__path=second.store), "--yes"]) == 0
    second.start()
    grants["job-2"] = first.post("/v1/jobs/job-2/start", {"worker": "w"}).data
    assert first.stop() == 0
    second.wait_leads()
    grants["job-3"] = second.post("/v1/jobs/job-3/start", {"worker": "w"}).data
    tokens = [grant["fencing_token"] for grant in grants.values()]
    assert tokens == sorted(set(tokens))
    for job_id, grant in grants.items():
        done = second.post(f"/v1/jobs/{job_id}/complete", {"lock_id": grant["lock_id"], "file_path": "/f"})
        assert done.data["status"] == "completed", job_id


def test_a_killed_conversion_is_completed(tmp_path: Path, url: str) -> None:
    directory = tmp_path / "single"
    directory.mkdir()
    with ForkedDaemon(directory) as single:
        for number in range(300):
            payload = {"random": os.urandom(3000).hex()}
            assert single.post("/v1/jobs", {"id": f"job-{number:03}", "payload": payload}).status == 201
        granted = single.post("/v1/jobs/job-000/start", {"worker": "w", "lock_ttl_ms": 600_000}).data
        assert single.stop() == 0
    kill_before_snapshot(["cluster", "init", "--from-store", str(single.store), *flags(url)])
    for node in (ForkedNode(directory, url, "a"), ForkedNode(tmp_path / "b", url, "b")):
        code, log = node.failed_start()
        assert (code, "repeat `jobd cluster init --from-store PATH`" in log) == (78, True)
    assert repeat_until_done(["cluster", "init", "--from-store", str(single.store), *flags(url)], 0.3) > 0
    with ForkedNode(tmp_path / "a", url, "a") as node:
        node.wait_leads()
        [queue] = node.admin("GET", "queues").data["queues"]
        assert (queue["queued"], queue["processing"]) == (299, 1)
        done = node.post("/v1/jobs/job-000/complete", {"lock_id": granted["lock_id"], "file_path": "/f"})
        assert done.data["status"] == "completed"
