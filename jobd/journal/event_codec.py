"""Encode events as rows, decode them, and shorten the timeline of a job.

A row is a tuple in the order of EVENT_COLUMNS. The details and changes of an event are JSON text.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import UNSET, Raw
from msgspec.structs import astuple, replace

from jobd.model.events import GIVEN_BACK, HEARTBEATS, KEEP_HEARTBEATS, ROUTINE, Changes, Event, stored_changes

EVENT_COLUMNS: Final = Event.__struct_fields__[:12]
EventRow = tuple[Any, ...]
_NULL: Final = Raw(b"null")
_json = msgspec.json.Encoder().encode
_decode_changes = msgspec.json.Decoder(Changes).decode
_decode_json = msgspec.json.Decoder().decode


def encode(event: Event) -> EventRow:
    """Return the columns of `event` in the order of EVENT_COLUMNS."""
    changes = stored_changes(event)
    return (
        event.seq,
        event.at,
        event.type,
        event.job_seq,
        event.job_id,
        event.queue,
        event.from_status,
        event.to_status,
        event.by,
        event.reason,
        None if event.details is None else _json(event.details),
        None if changes is None else _json(changes),
    )


def decode(row: EventRow) -> Event:
    """Return the event of an undamaged row."""
    seq, at, type_, job_seq, job_id, queue_, before, after, by, reason, details, changes = row[:12]
    details = None if details is None else _decode_json(details)
    changes = None if changes is None else _changes(changes)
    return Event(seq, at, type_, job_seq, job_id, queue_, before, after, by, reason, details, changes)


def _changes(body: bytes) -> Changes:
    changes = _decode_changes(body)
    if result := changes.result:  # `metadata` is part of `body`, and null is not None
        metadata = result.metadata
        metadata = None if metadata is None or metadata == _NULL else metadata.copy()
        changes = replace(changes, result=replace(result, metadata=metadata))
    return changes


def thin(events: list[Event]) -> list[Event]:
    """Return the timeline of a job without the heartbeats that can be deleted.

    The last KEEP_HEARTBEATS of each type and grant are kept. The values that a deleted event set are merged into the
    next event, so that folding gives the same row as before. `events` are in order and begin at a grant or earlier.
    """
    seen = dict.fromkeys(HEARTBEATS, 0)
    gone: set[int] = set()
    for event in reversed(events):
        if event.type in HEARTBEATS:
            seen[event.type] += 1
            if seen[event.type] > KEEP_HEARTBEATS:
                gone.add(event.seq)
        elif event.type == "granted":
            seen = dict.fromkeys(HEARTBEATS, 0)
    return _without(events, gone)


def shorten(events: list[Event]) -> list[Event]:
    """Return a part of the timeline of a job without events of grants that were given back.

    Events before the first grant and the last grant are kept. Folding gives the same row as before, as in `thin`.
    """
    gone: set[int] = set()
    routine: list[int] = []  # events of the current grant; none before the first grant
    is_given_back = False
    for event in events:
        if event.type == "granted":
            if is_given_back:
                gone.update(routine)
            routine, is_given_back = [event.seq], False
        elif routine and event.type in ROUTINE:
            routine.append(event.seq)
            is_given_back = is_given_back or event.type in GIVEN_BACK
    return _without(events, gone)


def _without(events: list[Event], gone: set[int]) -> list[Event]:
    """Return the events that are not `gone`, with the values that `gone` events before them set."""
    kept: list[Event] = []
    carried: Changes | None = None
    for event in events:
        both = _merged(carried, event.changes)
        if event.seq in gone:
            carried = both
        else:
            kept.append(event if carried is None else replace(event, changes=both))
            carried = None
    return kept


def _merged(first: Changes | None, then: Changes | None) -> Changes | None:
    if first is None or then is None:
        return then if first is None else first
    pairs = zip(astuple(first), astuple(then), strict=True)
    return Changes(*[old if new is UNSET else new for old, new in pairs])
