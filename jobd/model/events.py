"""Events: the facts that are journaled, streamed and displayed, and how they fold into rows.

An event has the new value of every field that it changed, so folding the events of a job in order gives its row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType
from msgspec.structs import asdict, replace

from jobd.model.fields import doc
from jobd.model.flat_job import maker
from jobd.model.job import Grant, Job, LateResult
from jobd.model.times import utc

EventType = Literal[
    "created",
    "imported",
    "granted",
    "progress",
    "extended",
    "lock_expired",
    "completed",
    "failed",
    "retried",
    "released",
    "undelivered",
    "cancelled",
    "stalled",
    "expired",
    "late_result",
    "late_call",
    "adopted",
    "force_failed",
    "force_reset",
    "retried_by_operator",
    "transitioned",
    "updated",
    "fixed",
    "resumed",
    "deleted",
    "queue_paused",
    "queue_resumed",
    "workers_quieted",
    "workers_resumed",
    "schedule_put",
    "schedule_paused",
    "schedule_resumed",
    "schedule_deleted",
    "schedule_skipped",
    "schedule_missed",
]

QUIET: Final = frozenset({"workers_quieted", "workers_resumed"})  # they begin, change or end a quiet rule
# They change a schedule. A firing is the `created` event of its job.
SCHEDULING: Final = frozenset(
    f"schedule_{change}" for change in ("put", "paused", "resumed", "deleted", "skipped", "missed")
)
# They change no row of a job.
NOTES: Final = frozenset({"late_result", "late_call", "queue_paused", "queue_resumed", *QUIET, *SCHEDULING})

# A grant can have many of these events: the event log keeps the last KEEP_HEARTBEATS of each type per grant.
HEARTBEATS: Final = frozenset({"progress", "extended"})
KEEP_HEARTBEATS: Final = 100

# A job that is granted and returned many times would fill the event log. Its first KEEP_FIRST_GRANTS and last
# KEEP_GRANTS grants are kept. A grant between them that ended with one of GIVEN_BACK loses its ROUTINE events.
GIVEN_BACK: Final = frozenset({"released", "undelivered"})
ROUTINE: Final = frozenset({"granted", "lock_expired", "resumed", "late_call", *HEARTBEATS, *GIVEN_BACK})
KEEP_FIRST_GRANTS: Final = 10
KEEP_GRANTS: Final = 100


# The fields of a job that an event set, with their new values; UNSET: not set. The first event of a job may leave out
# those with the default of Job, and `seq` and `id`, which are fields of the event.
_FIELDS: Final = msgspec.structs.fields(Job)
_OWN: Final = Job.__struct_fields__[2:]
Changes: Any = msgspec.defstruct(
    "Changes",
    [(each.name, each.type | UnsetType, UNSET) for each in (*_FIELDS[2:], *_FIELDS[:2])],
    frozen=True,
    omit_defaults=True,
    gc=False,
)


class Event(Struct, frozen=True, gc=False):
    """One fact. `seq` orders the events of the whole store: it is unique and never reused; gaps are allowed.

    `at` is wall time in Unix ms. `by` is the author: `worker:NAME`, `client` (of a cancel `client:WHO`), `admin`,
    `admin:NAME`, `recovery`, `cleanup` or `daemon`. Events of a queue have `job_seq` 0 and an empty `job_id`.
    `details` is public.

    The columns up to `changes` are stored. `changes` can contain a lock_id and is never sent to a client. An event of
    this process has the rows `before` and `after` instead, from which `stored_changes` makes them: `before` is None for
    a new job, `after` for a deleted one, and both are the same value if the row does not change. `payload` (JSON text)
    and `request_hash` of a new job, a late result, and `bodies` (new headers and checkpoints, by key: model/job.py) are
    stored beside their event.
    """

    seq: int
    at: int
    type: EventType
    job_seq: int
    job_id: str
    queue: str
    from_status: str | None  # None for a new job
    to_status: str | None  # None for a deleted job
    by: str
    reason: str | None = None
    details: dict[str, Any] | None = None
    changes: Changes | None = None
    before: Job | None = None
    after: Job | None = None
    payload: bytes | None = None
    request_hash: str | None = None
    late: LateResult | None = None
    bodies: dict[int, bytes] | None = None

    @property
    def grant(self) -> Grant | None:
        """The grant that a stored event set."""
        return None if self.changes is None else self.changes.grant or None


class QueuePause(Struct, frozen=True, gc=False):
    """The pause of a queue: its start, operator, reason and end.

    Times are wall time, Unix ms. `by` has the form of `Event.by`. All fields are None if the pause is older than schema
    version 10; `until` is None if only an operator ends it.
    """

    at: int | None = None
    by: str | None = None
    reason: str | None = None
    until: int | None = None

    def describe(self) -> str:
        """Return the words after "paused": `by operator ana at 2026-03-01 12:03:00 UTC, until resumed: deploy`."""
        by = "" if self.by is None else f"by {describe_author(self.by)} "
        since = "at an unknown time" if self.at is None else f"at {utc(self.at)}"
        until = "until resumed" if self.until is None else f"until {utc(self.until, self.at)}"
        return f"{by}{since}, {until}: {self.reason or 'no reason given'}"


class QuietRule(Struct, frozen=True, gc=False):
    """A quiet rule: workers that match `host`, `version` and `queue` (None: any) get no jobs, until its end.

    Times are wall time, Unix ms. `by` has the form of `Event.by`.
    """

    id: str
    host: str | None
    version: str | None
    queue: str | None
    reason: str
    by: str
    at: int
    until: int | None

    @property
    def selects(self) -> tuple[str | None, str | None, str | None]:
        return self.host, self.version, self.queue

    def describe(self) -> str:
        """Return the words after "quiet", as those of QueuePause."""
        return QueuePause(self.at, self.by, self.reason, self.until).describe()


def fold_quiet(rules: Mapping[str, QuietRule], event: Event) -> dict[str, QuietRule]:
    """Return the quiet rules after an event of QUIET."""
    details = event.details or {}
    number = details["rule"]
    if event.type == "workers_resumed":
        return {each: rule for each, rule in rules.items() if each != number}
    host, version, queue = (details.get(name) for name in ("host", "version", "queue"))
    rule = QuietRule(number, host, version, queue, event.reason or "", event.by, details["since"], details["until"])
    return {**rules, number: rule}


def describe_author(by: str) -> str:
    """Put `Event.by` into words."""
    kind, _, name = by.partition(":")
    if not name:
        return {"admin": "an operator", "client": "a client"}.get(kind, kind)
    return f"{'operator' if kind == 'admin' else kind} {name}"


class EventView(Struct, frozen=True, rename={"from_": "from"}):
    """An event of a job."""

    seq: Annotated[int, doc("Position in the event log.")]
    at: Annotated[int, doc("When, in Unix ms.")]
    type: Annotated[str, doc("Type of the event.")]
    from_: Annotated[str | None, doc("The status before, or null.")]
    to: Annotated[str | None, doc("The status after, or null.")]
    by: Annotated[
        str,
        doc(
            "The author: `worker:NAME`, `client`, `admin:NAME` (`admin` if no name was given), "
            "`recovery`, `cleanup` or `daemon`. Of a cancel, `client:NAME (uid N, pid N)`, or `client:uid N, pid N` "
            "without a name; over TCP with the address instead."
        ),
    ]
    reason: Annotated[str | None, doc("Why, in words, or null.")]
    details: Annotated[dict[str, Any], doc("Machine-readable details.")]


class StreamedEvent(EventView, frozen=True, rename={"from_": "from"}):
    """An event of a stream, with its job and queue."""

    job_id: Annotated[str | None, doc("The job. Null if the event is about a queue.")]
    queue: Annotated[str, doc("Name of the queue.")]


class EventFilter(Struct, frozen=True):
    """Selects events. An empty set matches everything."""

    queues: frozenset[str] = frozenset()
    job_ids: frozenset[str] = frozenset()
    types: frozenset[str] = frozenset()

    @property
    def matches_everything(self) -> bool:
        return not (self.queues or self.job_ids or self.types)

    def matches(self, event: Event | StreamedEvent) -> bool:
        """Return whether `event` is selected."""
        return (
            (not self.queues or event.queue in self.queues)
            and (not self.job_ids or event.job_id in self.job_ids)
            and (not self.types or event.type in self.types)
        )


def fold(job: Job | None, event: Event) -> Job | None:
    """Return the row after `event`, given the row before it. Folding the events of a job from None gives its row.

    Raises ValueError if the first event lacks a field that has no default.
    """
    if event.after is not None or event.type == "deleted":
        return event.after
    if event.changes is None:
        return job
    new = {name: value for name, value in asdict(event.changes).items() if value is not UNSET}
    if job is not None:
        return replace(job, **new)
    try:
        return Job(**{"seq": event.job_seq, "id": event.job_id, **new})
    except TypeError as error:
        raise ValueError(f"event {event.seq} ({event.type}) is not the first of a job: {error}") from error


# Identical values are omitted, and perhaps not equal ones: comparing values takes longer than storing them.
_difference = maker(
    Changes,
    "before, after, unset",
    {name: f"after.{name} if after.{name} is not before.{name} else unset" for name in _OWN},
)


def _recorder(names: str, *, is_first: bool = False) -> Callable[[Job | None, Job], Struct]:
    """Return a function that takes these fields of a row. The first event of a job leaves out defaults."""
    target = msgspec.defstruct(
        "Recorded",
        [(each.name, each.type, each.default) for each in _FIELDS if each.name in names.split()],
        omit_defaults=is_first,
        gc=False,
    )
    return maker(target, "before, after", {name: f"after.{name}" for name in _OWN})


# All fields that the most frequent events can change. They are not compared.
_FREQUENT: Final = {
    "created": _recorder("options status created_at updated_at run_at expires_at payload_bytes extra", is_first=True),
    "granted": _recorder("status updated_at progress progress_message attempt started_at grant deadlines"),
    "progress": _recorder("updated_at progress progress_message deadlines releases"),
    "completed": _recorder(
        "status updated_at progress finished_at expires_at grant deadlines ended result error releases"
    ),
}
_NO_JOB: Final = Job(*[UNSET] * 7)  # type: ignore[arg-type]  # the optional fields have their defaults


def stored_changes(event: Event) -> Struct | None:
    """Return the fields that `event` set, None if it changed no row or deleted the job."""
    before, after = event.before, event.after
    if after is None or after is before:
        return event.changes
    has_new_extra = before is not None and after.extra is not before.extra
    recorder = None if has_new_extra else _FREQUENT.get(event.type)
    return _difference(before or _NO_JOB, after, UNSET) if recorder is None else recorder(before, after)


_Public = tuple[int, int, str, str | None, str | None, str, str | None, dict[str, Any]]  # the fields of EventView


def event_view(event: Event) -> EventView:
    """Return the public form of `event`: everything but its changes, which can contain a lock_id."""
    return EventView(*_public(event))


def streamed_event(event: Event) -> StreamedEvent:
    """Return the public form of `event` with its job and queue, for streams."""
    return StreamedEvent(*_public(event), event.job_id or None, event.queue)


def _public(event: Event) -> _Public:
    """Return the fields of EventView."""
    return (
        event.seq,
        event.at,
        event.type,
        event.from_status,
        event.to_status,
        event.by,
        event.reason,
        event.details or {},
    )
