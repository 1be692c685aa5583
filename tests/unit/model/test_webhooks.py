"""Webhooks: event types, subscriptions and defaults."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest
from msgspec.structs import replace

from jobd.model import webhooks
from jobd.model.events import HEARTBEATS, Event, EventType
from jobd.model.job import DAY_MS
from tests.support.factories import NOW

KEYS = (b"a" * 24, b"b" * 32)
EVENT = Event(
    42, NOW, "completed", 7, "job-7", "video", "processing", "completed", "worker:w-1", None, {"worker": "w-1"}
)


def test_every_event_type_has_its_own_webhook_type() -> None:
    assert {webhooks.webhook_type(each) for each in get_args(EventType)} | set(webhooks.PROBLEMS) == set(webhooks.TYPES)
    assert len(webhooks.TYPES) == len(get_args(EventType)) + len(webhooks.PROBLEMS)
    assert webhooks.webhook_type("late_result") == "job.late_result"
    assert webhooks.webhook_type("queue_paused") == "queue.paused"


def test_patterns_leave_out_progress_and_extensions() -> None:
    signs = {webhooks.webhook_type(each) for each in HEARTBEATS}
    assert webhooks.types_matching("*") == set(webhooks.TYPES) - signs
    patterns = ("job.*", "queue.*", "workers.*", "problem.*")
    assert frozenset().union(*map(webhooks.types_matching, patterns)) == webhooks.types_matching("*")
    assert webhooks.types_matching("queue.*") == {"queue.paused", "queue.resumed"}
    assert webhooks.types_matching("job.progress") == {"job.progress"}
    for wrong in ("", "job", "job.none", "jobs.*", "**", ".*", "completed", webhooks.EVENTS_GONE, webhooks.TEST_TYPE):
        assert webhooks.types_matching(wrong) == frozenset(), wrong


def test_a_webhook_gets_the_events_of_its_types_and_queues() -> None:
    everything = webhooks.WebhookEndpoint("e", "https://x", KEYS)
    assert everything.selects(EVENT)
    assert not everything.selects(replace(EVENT, type="progress"))
    assert everything.reads_events
    assert everything.wants_problems
    some = replace(everything, events=frozenset({"job.failed", "queue.paused"}), queues=frozenset({"mail"}))
    assert not some.selects(EVENT)
    assert not some.selects(replace(EVENT, type="failed"))
    assert some.selects(replace(EVENT, type="failed", queue="mail"))
    assert some.selects(replace(EVENT, type="queue_paused", queue="mail", job_id="", job_seq=0))
    assert some.reads_events
    assert not some.wants_problems
    for alerts in ({"problem.opened"}, webhooks.PROBLEMS):
        watchman = replace(everything, events=frozenset(alerts))
        assert watchman.wants_problems
        assert not watchman.reads_events
        assert not watchman.selects(EVENT)


@pytest.mark.parametrize("name", ["a", "A-1_b.c:d", "x" * 100])
def test_the_name_of_a_webhook_has_no_spaces(name: str) -> None:
    assert msgspec.convert(name, webhooks.WebhookName) == name
    for wrong in ("", "a b", "a/b", "x" * 101, f"{name}\n"):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(wrong, webhooks.WebhookName)


def test_the_types_that_receivers_know() -> None:
    assert webhooks.PROBLEMS == ("problem.opened", "problem.changed", "problem.closed", "problem.many")
    assert (webhooks.EVENTS_GONE, webhooks.TEST_TYPE) == ("events.gone", "webhook.test")
    assert webhooks.GAP_PENDING < 0, "no number of an event"


def test_the_repr_of_a_webhook_has_no_secret_and_no_url() -> None:
    shown = repr(webhooks.WebhookEndpoint("e", "https://x/token", KEYS))
    assert shown == str(webhooks.WebhookEndpoint("e", "https://x/token", KEYS)) == "Endpoint(e)"


def test_the_defaults_of_a_webhook() -> None:
    endpoint = webhooks.WebhookEndpoint("e", "https://x", KEYS)
    assert (endpoint.allow_private, endpoint.timeout_ms, endpoint.dead_letter_after_ms) == (False, 10_000, 3 * DAY_MS)


def test_the_defaults_of_a_cursor() -> None:
    assert webhooks.WebhookCursor("e", 4) == webhooks.WebhookCursor("e", 4, 0, 1, {}, 0)
