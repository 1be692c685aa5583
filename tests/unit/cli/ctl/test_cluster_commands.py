"""`jobctl cluster`, against nodes that respond by a script."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from jobd.cli.ctl import cluster_commands, main
from tests.support.scripted_server import ReceivedRequest, ScriptedServer, Step, drop, ok, rejected, serving

URLS = ("http://a.example:8771", "http://b.example:8771")


class Cluster:
    """Two nodes. The leader gives up its leadership when it is told to, and the other node takes over."""

    def __init__(self, directory: Path) -> None:
        self.leader: int | None = 0
        self.epoch = 7
        self.loses_response = False
        self.has_standby = True
        self.ends = False  # a node that has stepped down
        self.seen_ms = [1_200, 1_300]
        self.steps_down = 0
        self.servers = [ScriptedServer(), ScriptedServer()]
        self.urls = [f"unix:{directory}/{number}" for number in range(2)]
        self.servers[0].always = lambda received: self._respond(0, received)
        self.servers[1].always = lambda received: self._respond(1, received)

    def _respond(self, node: int, received: ReceivedRequest) -> Step:
        if received.path == "/v1/cluster":
            if self.ends and self.steps_down:
                return drop
            return ok(self._view(node))
        if node != self.leader:
            url = None if self.leader is None else self.urls[self.leader]
            return rejected("not_leader", 503, "This node does not lead its cluster.", leader=url)
        self.steps_down += 1
        before = self._view(node)
        self.leader = 1 - node if self.has_standby else None
        self.epoch += self.has_standby
        return drop if self.loses_response else ok(before)

    def _view(self, node: int) -> dict[str, Any]:
        def described(number: int) -> dict[str, Any]:
            role = "leader" if number == self.leader else "standby"
            state = {
                "seen_ms": self.seen_ms[number],
                "record": 40,
                "lag_records": number,
                "format": 1,
                "schema_version": 12,
                "config_differs": number == 1,
            }
            return {"name": "ab"[number], "url": URLS[number], "role": role, **state}

        return {
            "role": "leader" if node == self.leader else "standby",
            "node": "ab"[node],
            "journal": "main",
            "leader": None if self.leader is None else URLS[self.leader],
            "epoch": self.epoch,
            "record": 40,
            "lag_events": 3 if node else 0,
            "lease_ms": 3000,
            "synchronous": True,
            "warnings": ["The clock of node b is 2 s ahead."],
            "nodes": [described(0), described(1)],
        }


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("ADMIN_TOKEN", "canary-token-0123456789")
    monkeypatch.setattr(cluster_commands, "_POLL_S", 0.01)
    found = Cluster(tmp_path)
    monkeypatch.setenv("JOBD_ADMIN_URL", ",".join(found.urls))
    with ExitStack() as stack:
        for number, server in enumerate(found.servers):
            stack.enter_context(serving(server, tmp_path / str(number)))
        yield found


def jobctl(*argv: str) -> int:
    return main.main(["cluster", *argv])


def test_the_nodes_and_the_leader_are_shown(nodes: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    nodes.seen_ms[1] = 17_000
    assert jobctl() == 0
    text = capsys.readouterr().out
    fields, _, table = text.partition("\n\n")
    assert [" ".join(line.split()) for line in fields.splitlines()] == [
        "journal main",
        "leader http://a.example:8771",
        "epoch 7",
        "record 40",
        "lease 3 s",
        "synchronous yes",
        "as seen by a (leader)",
        "warning The clock of node b is 2 s ahead.",
    ]
    rows = [" ".join(line.split()) for line in table.splitlines()]
    assert rows[0] == "NODE ROLE URL LAG SEEN FORMAT SCHEMA NOTE"
    assert rows[1] == "a leader http://a.example:8771 - 1.2 s ago 1 12 -"
    assert (
        rows[2]
        == "b standby http://b.example:8771 0 ms 17 s ago 1 12 not seen, configuration differs from the leader's"
    )


def test_without_a_leader_the_exit_code_is_1(nodes: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    nodes.leader = None
    assert jobctl("--json") == 1
    assert json.loads(capsys.readouterr().out)["leader"] is None
    nodes.leader = 0
    assert jobctl("--admin-url", nodes.urls[1]) == 0
    assert "b (standby, 3 events behind)" in capsys.readouterr().out


def test_a_daemon_with_a_journal_of_its_own(nodes: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    nodes.servers[0].script = [ok({"role": "single"})]
    assert jobctl() == 0
    assert "it is not part of a cluster" in capsys.readouterr().out
    nodes.servers[0].script = [ok({"role": "single"}), rejected("not_found", 404, "There is no cluster.")]
    assert jobctl("step-down") == 4


@pytest.mark.parametrize("loses_response", [False, True])
def test_step_down_waits_for_the_next_leader_and_is_not_repeated(
    nodes: Cluster, capsys: pytest.CaptureFixture[str], loses_response: bool
) -> None:
    nodes.loses_response = loses_response
    assert jobctl("step-down", "--yes", "--reason", "upgrade") == 0
    assert capsys.readouterr().out == "http://b.example:8771 leads, epoch 8\n"
    assert nodes.steps_down == 1
    [body] = [each.json for each in nodes.servers[0].received if each.path.endswith("/step-down")]
    assert body == {"reason": "upgrade"}


def test_step_down_with_the_url_of_the_leader_alone_says_that_it_worked(
    nodes: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobd.cli.connection.RETRY_FOR_S", 0.05)
    nodes.ends = True
    assert jobctl("step-down", "--yes", "--admin-url", nodes.urls[0]) == 0
    assert capsys.readouterr().out.startswith("http://a.example:8771 has stepped down. To see which node leads, name")
    nodes.leader, nodes.steps_down, nodes.loses_response = 0, 0, True
    assert jobctl("step-down", "--yes", "--admin-url", nodes.urls[0]) == 3
    assert "The leader did not respond" in capsys.readouterr().err


def test_step_down_reaches_the_leader_through_a_standby(nodes: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    nodes.leader = 1
    assert jobctl("step-down", "--yes", "--json") == 0
    assert json.loads(capsys.readouterr().out)["epoch"] == 8
    assert nodes.leader == 0


def test_step_down_asks_first(
    nodes: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert jobctl("step-down") == 2
    questions: list[str] = []
    monkeypatch.setattr("jobd.cli.confirm.confirm", questions.append)
    assert jobctl("step-down") == 0
    assert questions == ["make http://a.example:8771 step down; standbys that are ready: 1"]
    assert jobctl("--yes") == 2
    assert "need `step-down`" in capsys.readouterr().err


def test_step_down_without_a_standby_says_so(
    nodes: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_commands, "TAKEOVER_S", 0.05)
    nodes.has_standby = False
    no_standby = rejected("no_standby", 409, "No standby is ready to take over.")
    nodes.servers[0].script = [ok(nodes._view(0)), no_standby]
    assert jobctl("step-down", "--yes") == 4
    assert "No standby is ready to take over [no_standby]" in capsys.readouterr().err
    assert jobctl("step-down", "--yes", "--force") == 75
    assert "no node took over within 0.05 s" in capsys.readouterr().err
    assert any(each.body == b'{"force":true}' for each in nodes.servers[0].received)
