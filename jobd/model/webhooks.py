"""Webhooks as values: where they go, what they tell, and what is kept of each delivery.

Nothing here sends, signs or decides.
"""

from __future__ import annotations

from typing import Annotated, Final, get_args

from msgspec import Meta, Struct

from jobd.model.events import HEARTBEATS, Event, EventType
from jobd.model.job import DAY_MS, SECOND_MS
from jobd.model.responses import DeliveryState

WebhookName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._:-]{1,100}$(?!\n)")]
DELIVERY_STATES: Final[tuple[DeliveryState, ...]] = get_args(DeliveryState)

FIRING: Final = "alert.firing"
RESOLVED: Final = "alert.resolved"
ALERTS: Final = (FIRING, RESOLVED)
EVENTS_GONE: Final = "events.gone"  # goes to everybody who reads the journal: what he has missed cannot be told
GAP_PENDING: Final = -1
MAX_BACKLOG: Final = 10_000  # deliveries of one endpoint that may wait, and as many that were given up are kept
TEST_TYPE: Final = "webhook.test"  # an operator asks for it


def webhook_type(event_type: str) -> str:
    """The type of an event as webhooks say it: `job.completed`, `queue.paused`."""
    kind, _, rest = event_type.partition("_")
    return f"queue.{rest}" if kind == "queue" else f"job.{event_type}"


_TYPES: Final = {each: webhook_type(each) for each in get_args(EventType)}
TYPES: Final = (*_TYPES.values(), *ALERTS)  # all that an endpoint may ask for
# Signs of life come many to a job, and the journal forgets most of them: who wants them names them.
_QUIET: Final = frozenset(TYPES) - {webhook_type(each) for each in HEARTBEATS}


def types_matching(pattern: str) -> frozenset[str]:
    """The types that `pattern` means: one by its name, `job.*`, `queue.*`, `alert.*`, or `*`; none where it is wrong.

    A pattern leaves out the signs of life, `job.progress` and `job.extended`.
    """
    if pattern in TYPES:
        return frozenset({pattern})
    if pattern == "*":
        return _QUIET
    if not pattern.endswith(".*"):
        return frozenset()
    return frozenset(each for each in _QUIET if each.startswith(pattern[:-1]))


class WebhookEndpoint(Struct, frozen=True):
    """Somebody who is told. `events` are types; `queues` none means all; `secrets` are keys, the newest first."""

    name: str
    url: str
    secrets: tuple[bytes, ...]
    events: frozenset[str] = _QUIET
    queues: frozenset[str] = frozenset()
    allow_private: bool = False
    timeout_ms: int = 10 * SECOND_MS  # for one try, from the look-up of the name to the end of the answer
    give_up_after_ms: int = 3 * DAY_MS

    def __repr__(self) -> str:
        """Without its secrets, and its URL, which may hold one."""
        return f"Endpoint({self.name})"

    def wants(self, event: Event) -> bool:
        """Whether it is told of `event`."""
        return _TYPES[event.type] in self.events and (not self.queues or event.queue in self.queues)

    @property
    def subject(self) -> str:
        """Of messages that are about the webhook itself."""
        return f"webhooks/{self.name}"

    @property
    def reads_journal(self) -> bool:
        """Whether it is told of more than alerts."""
        return not self.events <= set(ALERTS)

    @property
    def wants_alerts(self) -> bool:
        return not self.events.isdisjoint(ALERTS)


class Delivery(Struct, frozen=True, gc=False):
    """One message to one endpoint: a row of the outbox. Its fields are the columns. Times are wall time, Unix ms.

    Of one `subject` a delivery waits for those before it. `body` is what is sent, byte for byte the same at each try.
    """

    id: int  # unique in the store, rising, never used again
    endpoint: str
    state: DeliveryState
    subject: str
    type: str
    event_id: str  # the same at each try, so that who gets a message twice may know it
    seq: int  # of the event in the journal, 0 where it is none
    at: int  # when it was put into the outbox
    due_at: int  # when it is tried next
    tries: int
    ended_at: int | None  # when it was delivered, or given up
    status: int | None  # HTTP status of the last answer
    error: str | None  # what was wrong with the last try
    body: bytes


class WebhookCursor(Struct, frozen=True, gc=False):
    """How far an endpoint is. Every event up to `position` was put into its outbox, if it wanted it."""

    name: str
    position: int
    gone_to: int = 0  # it was told of all gaps up to this event; GAP_PENDING: it has to be told of one
    next_delivery: int = 1  # deliveries above this have not been numbered yet, or at another endpoint
    alerts: dict[str, int] = {}  # those of which it was told that they fire, and since when (Unix ms)
    updated_at: int = 0


class Outbox(Struct, frozen=True):
    """What the store has of the endpoints: their cursors, and of each delivery that waits what its order needs.

    `last`: the newest event of the journal. `next_delivery`: the next number to give.
    """

    cursors: dict[str, WebhookCursor]
    waiting: dict[str, list[Delivery]]  # by endpoint, in order, without their bodies
    last: int
    next_delivery: int


class DeliveryOutcome(Struct, frozen=True):
    """What came of one try. `error` is a sentence, None where it was delivered."""

    status: int | None
    error: str | None = None
    retry_after_ms: int | None = None  # as the receiver has asked
    gone: bool = False  # it says that nobody lives there any more
