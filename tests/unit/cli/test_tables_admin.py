"""Tables about the daemon."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from msgspec.structs import replace

from jobd.cli import tables_admin, terminal
from jobd.model.responses import AuditView
from tests.support.calls import WEBHOOK

NOW = 1_772_366_400_000


@pytest.mark.parametrize(
    ("details", "expected"),
    [
        ({}, "done"),
        ({"from": "failed", "to": "queued"}, "failed → queued"),
        ({"from": "failed", "to": None}, "failed → deleted"),
        ({"times": 3}, "done, 3 times"),
        ({"planned": 9, "changed_meanwhile": 0, "rejected": 0}, "done"),
        ({"planned": 9, "changed_meanwhile": 2, "rejected": 1, "not_changed": ["a", "b", "c"]}, "done, 3 not changed"),
    ],
)
def test_the_audit_log_shows_the_outcome_of_an_action(
    capsys: pytest.CaptureFixture[str], details: dict[str, Any], expected: str
) -> None:
    entry = AuditView(1, NOW, "eve", "127.0.0.1", "x", None, None, None, "done", 0, details)
    terminal.table(tables_admin.AUDIT, [entry])
    assert expected in capsys.readouterr().out.splitlines()[-1]


def test_webhooks_are_listed_with_their_state(capsys: pytest.CaptureFixture[str]) -> None:
    soon = round(time.time() * 1000) + 5 * 60_000 + 12_000
    states = [
        replace(WEBHOOK, name=name, state=state, failing_since=since, next_attempt_at=next_)
        for name, state, since, next_ in (
            ("a", "starting", None, None),
            ("b", "closed", None, None),
            ("c", "closed", 1, soon),
            ("d", "open", 1, soon),
            ("e", "half_open", 1, None),
        )
    ]
    terminal.show_list(tables_admin.WEBHOOKS, states, as_json=False)
    rows = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0][2:4] == ["STATE", "NEXT ATTEMPT"]
    assert {row[0]: row[2:4] for row in rows[1:]} == {
        "a": ["starting", "-"],
        "b": ["healthy", "-"],
        "c": ["failing", "in 5 min 12 s"],
        "d": ["paused after errors", "in 5 min 12 s"],
        "e": ["retrying one message", "-"],
    }
