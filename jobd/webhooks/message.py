"""Make webhook messages: CloudEvents, signed according to the Standard Webhooks specification."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

import msgspec

from jobd.model.events import Event, streamed_event
from jobd.model.problems import Problem
from jobd.model.webhooks import EVENTS_GONE, MANY, TEST_TYPE, webhook_type

CONTENT_TYPE: Final = "application/cloudevents+json; charset=utf-8"
PREFIX: Final = "whsec_"
MIN_KEY_BYTES: Final = 24  # both limits are from the specification
MAX_KEY_BYTES: Final = 64
EPOCH: Final = datetime(1970, 1, 1)

_encode: Final = msgspec.json.Encoder().encode


class BadSecret(ValueError):
    """A signing secret is invalid. The message does not contain it."""


def decode_secret(secret: str) -> bytes:
    """Return the key of a secret `whsec_…`. Raises BadSecret."""
    if not secret.startswith(PREFIX):
        raise BadSecret(f"a secret starts with {PREFIX}")
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError):
        raise BadSecret(f"the part after {PREFIX} must be base64") from None
    if not MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
        raise BadSecret(f"a secret has {MIN_KEY_BYTES} to {MAX_KEY_BYTES} bytes in base64, not {len(key)}")
    return key


def signature(keys: Sequence[bytes], message_id: str, timestamp_s: int, body: bytes) -> str:
    """Return the header `webhook-signature`: one signature per key, so that keys can be rotated."""
    signed = b"%b.%d.%b" % (message_id.encode(), timestamp_s, body)
    digests = (hmac.digest(key, signed, hashlib.sha256) for key in keys)
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)


def headers(keys: Sequence[bytes], message_id: str, timestamp_s: int, body: bytes) -> dict[str, str]:
    return {
        "Content-Type": CONTENT_TYPE,
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp_s),
        "webhook-signature": signature(keys, message_id, timestamp_s, body),
    }


class Message(msgspec.Struct, frozen=True):
    """The content of a delivery, before it has a number."""

    subject: str
    type: str
    message_id: str
    body: bytes
    seq: int = 0


def event_message(event: Event, source: str) -> Message:
    """Return the message of an event. Its id contains the time, because a new store counts from 1 again."""
    subject = f"jobs/{event.job_id}" if event.job_id else f"queues/{event.queue}" if event.queue else "workers"
    kind, message_id = webhook_type(event.type), f"evt_{event.at}_{event.seq}"
    more = {"sequence": str(event.seq)}
    body = _body(source, subject, kind, message_id, event.at, streamed_event(event), more)
    return Message(subject, kind, message_id, body, event.seq)


def problem_message(problem: Problem, kind: str, at: int, now: int, source: str) -> Message:
    """Return the message of a problem that opens, becomes worse or closes. `at` is when it did, or when it opened."""
    subject = f"problems/{problem.id}"
    digest = hashlib.sha256(problem.id.encode()).hexdigest()[:16]
    message_id = f"problem_{digest}_{at}_{kind.partition('.')[2]}"
    return Message(subject, kind, message_id, _body(source, subject, kind, message_id, now, problem))


def many_message(condition: str, counts: Mapping[str, int], names: Sequence[str], at: int, source: str) -> Message:
    """Return the message that stands for many: how many problems opened, changed and closed, and the first names."""
    subject, message_id = f"problems/{condition}", f"problem_{condition}_{at}_many"
    data = {"condition": condition, **counts, "names": names}
    return Message(subject, MANY, message_id, _body(source, subject, MANY, message_id, at, data))


def gap_message(name: str, after: int, upto: int, at: int, source: str) -> Message:
    """Return a message about undelivered events that are no longer in the event log or the outbox."""
    subject, message_id = f"webhooks/{name}", f"gone_{after}_{upto}_{at}"
    message = (
        f"Some events after {after}, up to {upto}, were not delivered and are no longer kept. Read the state again."
    )
    data = {"after": after, "upto": upto, "message": message}
    return Message(subject, EVENTS_GONE, message_id, _body(source, subject, EVENTS_GONE, message_id, at, data))


def test_message(name: str, number: int, at: int, source: str) -> Message:
    subject, message_id = f"webhooks/{name}", f"test_{at}_{number}"
    data = {"message": "This is a test. Nothing has happened."}
    return Message(subject, TEST_TYPE, message_id, _body(source, subject, TEST_TYPE, message_id, at, data))


def _body(
    source: str, subject: str, kind: str, message_id: str, at: int, data: Any, more: dict[str, str] | None = None
) -> bytes:
    return _encode(
        {
            "specversion": "1.0",
            "id": message_id,
            "source": source,
            "type": kind,
            "subject": subject,
            "time": rfc3339(at),
            **(more or {}),
            "datacontenttype": "application/json",
            "data": data,
        }
    )


def rfc3339(at: int) -> str:
    """Format Unix ms as RFC 3339 in UTC."""
    return f"{(EPOCH + timedelta(milliseconds=at)).isoformat(timespec='milliseconds')}Z"
