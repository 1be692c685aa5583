"""Responses: the literals that programs compare, and the defaults."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import msgspec
import pytest
from msgspec.structs import FieldInfo, fields, replace

from jobd.model import responses
from tests.support.client_harness import JOB

# Type or field -> its literals, which are part of the contract.
WORDS: dict[str, str] = {
    "DeliveryState": "waiting delivered dead-lettered",
    "BackupState": "waiting copying checking sending sent failed",
    "HealthStatus": "healthy degraded unhealthy",
    "Issue.type": "warning error critical",
    "Recovery.action": "reset failed",
    "WebhookView.state": "starting closed open half_open",
}


@pytest.mark.parametrize("place", WORDS)
def test_literals_that_programs_compare(place: str) -> None:
    name, _, field = place.partition(".")
    found: Any = getattr(responses, name)
    if field:
        found = get_type_hints(found)[field]
    assert get_args(found) == tuple(WORDS[place].split())


def test_the_defaults_of_responses_say_that_nothing_happened() -> None:
    """No count above zero, no flag, status 200."""
    defaults: dict[str, Any] = {}
    for name, kind in vars(responses).items():
        if (
            isinstance(kind, type)
            and kind.__module__.startswith(responses.__name__)
            and hasattr(kind, "__struct_fields__")
        ):
            defaults |= {f"{name}.{field.name}": field.default for field in fields(kind) if _is_plain(field)}
    assert defaults.pop("Response.status") == 200
    assert defaults.pop("AlertView.severity") == "warning", "of a daemon that does not say it"
    assert {place: value for place, value in defaults.items() if value} == {}
    assert len(defaults) > 10


def _is_plain(field: FieldInfo) -> bool:
    return isinstance(field.default, bool | int | str)


def test_a_node_that_has_not_described_itself_for_ten_seconds_is_unseen() -> None:
    def node(seen_ms: int) -> responses.NodeView:
        return responses.NodeView("a", "http://a", "standby", seen_ms, 1, 0, 2, config_differs=False)

    assert (node(9_999).is_unseen, node(9_999).is_ready) == (False, True)
    assert (node(10_000).is_unseen, node(10_000).is_ready) == (True, False)


def test_a_job_shows_its_payload_and_metadata_as_values() -> None:
    text = msgspec.json.encode(JOB)
    job = msgspec.json.decode(text, type=responses.JobView)
    assert (job.payload_value, job.metadata_value) == ({"a": 1}, {"m": [1]})
    assert "payload={'a': 1}" in repr(job)
    unreadable = msgspec.json.decode(text.replace(b'{"a":1}', b"1e999"), type=responses.JobView)
    assert "payload=b'1e999'" in repr(unreadable), "Python cannot hold it"
    unread = msgspec.structs.replace(job, payload=msgspec.UNSET, metadata=None)
    assert (unread.payload_value, unread.metadata_value) == (None, None)


def test_a_kind_names_its_largest_part() -> None:
    kind = responses.StoredKind(queue="q", kind="k", jobs=2, bytes=10, rows=1, payloads=2, results=4, events=3)
    assert (kind.name, kind.main_part) == ("q / k", ("results", 4))
    assert replace(kind, kind="").name == "q"


@pytest.mark.parametrize(
    ("given", "target"),
    [
        ({"details": {"schedule": "nightly"}, "job_id": "j"}, "schedule nightly"),
        ({"details": {"rule": "r1", "host": "h", "queue": "q"}, "queue": "q"}, "host h, queue q"),
        ({"details": {"rule": "r1"}}, "rule r1"),
        ({"job_id": "j"}, "j"),
        ({"queue": "q"}, "queue q"),
        ({"details": {"webhook": "hook"}}, "webhook hook"),
        ({"details": {"webhook": "hook", "delivery": 7}}, "webhook hook, delivery 7"),
        ({"changed": 1}, "1 job"),
        ({"changed": 2}, "2 jobs"),
        ({"details": {"worker": "w"}}, "worker w"),
        ({}, None),
    ],
)
def test_the_target_of_an_audit_entry(given: dict[str, Any], target: str | None) -> None:
    entry = responses.AuditView(1, 0, "eve", "127.0.0.1", "x", None, None, None, "done", 0, {})
    assert replace(entry, **given).target == target
