"""Webhooks: endpoints, event types, deliveries and cursors."""

from __future__ import annotations

from typing import Annotated, Final, get_args

from msgspec import Meta, Struct

from jobd.model.events import HEARTBEATS, Event, EventType
from jobd.model.job import DAY_MS, SECOND_MS
from jobd.model.problems import Problem
from jobd.model.responses import DeliveryState

WebhookName = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9._:-]{1,100}$(?!\n)",
        extra={"expected": "1 to 100 characters of A-Z a-z 0-9 . _ : -"},
    ),
]
DELIVERY_STATES: Final[tuple[DeliveryState, ...]] = get_args(DeliveryState)

OPENED: Final = "problem.opened"
CHANGED: Final = "problem.changed"  # it became much worse
CLOSED: Final = "problem.closed"
MANY: Final = "problem.many"  # instead of a message for each, if very many problems open or close at once
PROBLEMS: Final = (OPENED, CHANGED, CLOSED, MANY)
EVENTS_GONE: Final = "events.gone"  # sent to a webhook that missed events
GAP_PENDING: Final = -1  # WebhookCursor.gone_to if a gap has not been reported yet
MAX_BACKLOG: Final = 10_000  # per webhook: waiting deliveries, and dead-lettered ones that are kept
TEST_TYPE: Final = "webhook.test"  # sent on request of an operator


def webhook_type(event_type: str) -> str:
    """Return the webhook type of an event: `job.completed`, `queue.paused`, `workers.quieted`."""
    kind, _, rest = event_type.partition("_")
    return f"{kind}.{rest}" if kind in ("queue", "workers") else f"job.{event_type}"


_TYPES: Final = {each: webhook_type(each) for each in get_args(EventType)}
TYPES: Final = (*_TYPES.values(), *PROBLEMS)  # that a webhook can subscribe to
# What patterns match: all but progress and extensions, which are frequent.
_QUIET: Final = frozenset(TYPES) - {webhook_type(each) for each in HEARTBEATS}


def types_matching(pattern: str) -> frozenset[str]:
    """Return the types that `pattern` matches: a type, or `job.*` and the like; empty if it is invalid.

    No pattern matches `job.progress` and `job.extended`.
    """
    if pattern in TYPES:
        return frozenset({pattern})
    if pattern == "*":
        return _QUIET
    if not pattern.endswith(".*"):
        return frozenset()
    return frozenset(each for each in _QUIET if each.startswith(pattern[:-1]))


class WebhookEndpoint(Struct, frozen=True):
    """A webhook. `events` are types. Empty `queues` means all. `secrets` are keys, newest first."""

    name: str
    url: str
    secrets: tuple[bytes, ...]
    events: frozenset[str] = _QUIET
    queues: frozenset[str] = frozenset()
    allow_private: bool = False
    timeout_ms: int = 10 * SECOND_MS  # for one attempt, from name resolution to the status of the response
    dead_letter_after_ms: int = 3 * DAY_MS

    def __repr__(self) -> str:
        """Omit the secrets, and the URL, which can contain one."""
        return f"Endpoint({self.name})"

    def selects(self, event: Event) -> bool:
        """Return whether `event` is sent to it."""
        return _TYPES[event.type] in self.events and (not self.queues or event.queue in self.queues)

    @property
    def subject(self) -> str:
        """The subject of messages about the webhook itself."""
        return f"webhooks/{self.name}"

    @property
    def reads_events(self) -> bool:
        """Whether it subscribes to more than problems."""
        return not self.events <= set(PROBLEMS)

    @property
    def wants_problems(self) -> bool:
        return not self.events.isdisjoint(PROBLEMS)


class Delivery(Struct, frozen=True, gc=False):
    """One message to one webhook: a row of the outbox. Its fields are the columns. Times are wall time, Unix ms.

    A delivery waits for earlier ones of the same `subject`. Each attempt sends the same `body`, byte for byte.
    """

    id: int  # unique in the store, rising, never reused
    endpoint: str
    state: DeliveryState
    subject: str
    type: str
    message_id: str  # the same for each attempt, so that receivers can detect duplicates
    seq: int  # of the event in the event log; 0 if the message is not an event
    at: int  # when it was created
    due_at: int  # when the next attempt is due
    tries: int
    ended_at: int | None  # when it was delivered or dead-lettered
    status: int | None  # HTTP status of the last response
    error: str | None  # of the last attempt
    body: bytes


class WebhookCursor(Struct, frozen=True, gc=False):
    """The position of a webhook in the event log: all its events up to `position` have deliveries."""

    name: str
    position: int
    gone_to: int = 0  # gaps up to this event were reported; GAP_PENDING: one was not
    next_delivery: int = 1  # higher numbers are unused or belong to other webhooks
    alerts: dict[str, int] = {}  # ids of problems reported as open, and when the latest message about each was made
    updated_at: int = 0


class Outbox(Struct, frozen=True):
    """The stored state of the webhooks: their cursors and waiting deliveries.

    `last` is the newest event of the event log, `next_delivery` the next delivery number.
    """

    cursors: dict[str, WebhookCursor]
    waiting: dict[str, list[Delivery]]  # by webhook, in order, without bodies
    last: int
    next_delivery: int


class DeliveryOutcome(Struct, frozen=True):
    """The result of one attempt. `error` is a sentence; None if the message was delivered."""

    status: int | None
    error: str | None = None
    retry_after_ms: int | None = None  # as requested by the receiver
    gone: bool = False  # the receiver no longer exists (410)


class FailingWebhook(Struct, frozen=True):
    """A webhook that has been failing for `for_ms`. `error` is the latest, `waiting` counts its messages."""

    name: str
    for_ms: int
    error: str
    waiting: int = 0
    wants_problems: bool = False


class OpenProblems(Struct, frozen=True):
    """The open problems. `changed_at` is when each became much worse (Unix ms), or 0.

    Unless `is_settled`, a problem that is not among them may still be open.
    """

    problems: list[Problem]
    changed_at: dict[str, int]
    is_settled: bool = True


class WebhookMetrics(Struct, frozen=True):
    """The counters of one webhook."""

    delivered: int
    failed: int
    dead_lettered: int
    gaps: int
    waiting: int
    lag: int
    paused: bool
