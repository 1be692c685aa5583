"""Messages of webhooks and their signatures, as other libraries read them."""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from cloudevents.core.bindings.http import HTTPMessage, from_http_event
from msgspec.structs import asdict, replace
from standardwebhooks import Webhook, WebhookVerificationError

from jobd.model.events import Changes, Event
from jobd.model.webhooks import EVENTS_GONE, TEST_TYPE, WebhookEndpoint
from jobd.webhooks.message import (
    BadSecret,
    Message,
    decode_secret,
    event_message,
    gap_message,
    headers,
    many_message,
    problem_message,
    rfc3339,
    signature,
)
from jobd.webhooks.message import test_message as message_of_a_test
from tests.support.calls import PROBLEM
from tests.support.factories import NOW, full_job

KEYS = (b"a" * 24, b"b" * 32)
EVENT = Event(
    42, NOW, "completed", 7, "job-7", "video", "processing", "completed", "worker:w-1", None, {"worker": "w-1"}
)


def secret_of(key: bytes) -> str:
    return f"whsec_{base64.b64encode(key).decode()}"


# -- secrets and signatures -------------------------------------------------------------------------------------------


def test_a_secret_is_a_key_in_base64() -> None:
    assert [decode_secret(secret_of(key)) for key in KEYS] == list(KEYS)
    assert decode_secret(secret_of(b"x" * 64)) == b"x" * 64


@pytest.mark.parametrize(
    ("secret", "expected"),
    [
        ("", "starts with"),
        (base64.b64encode(KEYS[0]).decode(), "starts with"),
        ("whsec_", "24 to 64 bytes"),
        ("whsec_no base64!", "must be base64"),
        ("whsec_äöü", "must be base64"),
        (secret_of(b"x" * 23), "24 to 64 bytes in base64, not 23"),
        (secret_of(b"x" * 65), "not 65"),
    ],
)
def test_an_invalid_secret_is_described_without_showing_it(secret: str, expected: str) -> None:
    with pytest.raises(BadSecret, match=expected) as caught:
        decode_secret(secret)
    assert secret.removeprefix("whsec_") not in str(caught.value) or len(secret) < 7


def test_the_reference_library_accepts_the_signature_of_each_key_and_no_other() -> None:
    now_s = int(datetime.now(UTC).timestamp())
    message = event_message(EVENT, "/jobd/host")
    sent = headers(KEYS, message.message_id, now_s, message.body)
    for key in KEYS:
        assert Webhook(secret_of(key)).verify(message.body, sent) == json.loads(message.body)
    with pytest.raises(WebhookVerificationError):
        Webhook(secret_of(b"c" * 24)).verify(message.body, sent)
    with pytest.raises(WebhookVerificationError):
        Webhook(secret_of(KEYS[0])).verify(message.body + b" ", sent)
    with pytest.raises(WebhookVerificationError):
        Webhook(secret_of(KEYS[0])).verify(message.body, {**sent, "webhook-id": "evt_other"})
    with pytest.raises(WebhookVerificationError):
        Webhook(secret_of(KEYS[0])).verify(message.body, {**sent, "webhook-timestamp": str(now_s + 1)})


def test_the_signature_matches_the_example_of_the_specification() -> None:
    """The example of https://github.com/standard-webhooks, which all libraries test."""
    key = decode_secret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    signed = signature([key], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert signed == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


# -- messages --------------------------------------------------------------------------------------------------------


def read_by_others(body: bytes) -> dict[str, object]:
    """Return the attributes and the data of a CloudEvent, as its SDK reads them."""
    event = from_http_event(HTTPMessage({"content-type": headers((), "", 0, b"")["Content-Type"]}, body))
    return {**event.get_attributes(), "data": event.get_data()}


def test_the_cloudevents_sdk_reads_an_event() -> None:
    message = event_message(EVENT, "/jobd/host")
    read = read_by_others(message.body)
    assert (read["specversion"], read["datacontenttype"]) == ("1.0", "application/json")
    assert {"specversion", "datacontenttype"} <= json.loads(message.body).keys(), "the SDK fills in what is missing"
    assert (read["id"], read["source"], read["type"]) == (f"evt_{NOW}_42", "/jobd/host", "job.completed")
    assert (read["subject"], read["sequence"]) == ("jobs/job-7", "42")
    assert read["time"] == datetime.fromtimestamp(NOW / 1000, UTC)
    assert read["data"] == {
        "seq": 42,
        "at": NOW,
        "type": "completed",
        "from": "processing",
        "to": "completed",
        "by": "worker:w-1",
        "reason": None,
        "details": {"worker": "w-1"},
        "job_id": "job-7",
        "queue": "video",
    }
    assert (message.subject, message.type, message.message_id, message.seq) == (
        "jobs/job-7",
        "job.completed",
        f"evt_{NOW}_42",
        42,
    )


def test_a_message_never_contains_a_lock_id() -> None:
    job = full_job()
    assert job.grant is not None
    message = event_message(replace(EVENT, type="granted", changes=Changes(**asdict(job))), "/jobd/host")
    assert job.grant.lock_id.encode() not in message.body


def test_the_subject_of_a_queue_event_is_the_queue() -> None:
    event = replace(EVENT, type="queue_paused", job_id="", job_seq=0, before=None, after=None)
    read = read_by_others(event_message(event, "/jobd/host").body)
    assert (read["subject"], read["type"]) == ("queues/video", "queue.paused")


def test_the_messages_of_a_problem_share_the_subject_but_not_the_id() -> None:
    opened, closed = (
        problem_message(PROBLEM, kind, NOW - 5, NOW, "/j") for kind in ("problem.opened", "problem.closed")
    )
    assert opened.subject == closed.subject == "problems/no_workers/mail/receipt"
    digest = hashlib.sha256(b"no_workers/mail/receipt").hexdigest()[:16]
    assert (opened.message_id, closed.message_id) == (
        f"problem_{digest}_{NOW - 5}_opened",
        f"problem_{digest}_{NOW - 5}_closed",
    )
    data: Any = read_by_others(opened.body)["data"]
    assert data["subject"] == {"type": "pair", "queue": "mail", "kind": "receipt"}
    assert (data["severity"], data["jobs"], data["title"]) == ("critical", 962, PROBLEM.title)
    many = many_message("no_workers", {"opened": 9}, ["mail", "sms"], NOW, "/j")
    assert read_by_others(many.body)["data"] == {"condition": "no_workers", "opened": 9, "names": ["mail", "sms"]}
    for message in (opened, closed, many):
        assert_is_self_describing(message, "/j")


def assert_is_self_describing(message: Message, source: str) -> None:
    """Check that the fields of the message match its body."""
    read = read_by_others(message.body)
    assert (read["source"], read["subject"], read["type"], read["id"]) == (
        source,
        message.subject,
        message.type,
        message.message_id,
    )


def test_a_gap_and_a_test_are_cloud_events_too() -> None:
    gap, test = gap_message("e", 3, 9, NOW, "/j"), message_of_a_test("e", 12, NOW, "/j")
    data = read_by_others(gap.body)["data"]
    assert isinstance(data, dict)
    assert "no longer kept" in data.pop("message")
    assert data == {"after": 3, "upto": 9}
    test_data = read_by_others(test.body)["data"]
    assert isinstance(test_data, dict)
    assert list(test_data) == ["message"]
    assert gap.subject == test.subject == WebhookEndpoint("e", "https://x", KEYS).subject
    for message, kind, message_id in ((gap, EVENTS_GONE, f"gone_3_9_{NOW}"), (test, TEST_TYPE, f"test_{NOW}_12")):
        assert (message.subject, message.type, message.message_id, message.seq) == ("webhooks/e", kind, message_id, 0)
        assert_is_self_describing(message, "/j")


def test_times_are_written_as_rfc_3339() -> None:
    assert rfc3339(0) == "1970-01-01T00:00:00.000Z"
    assert rfc3339(1_709_210_096_789) == "2024-02-29T12:34:56.789Z"
