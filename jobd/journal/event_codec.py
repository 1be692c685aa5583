"""Encode events as rows, decode them, and shorten the timeline of a job.

A row is a tuple in the order of EVENT_COLUMNS. The details and changes of an event are JSON text.
"""

from __future__ import annotations

from typing import Any, Final, TypedDict, cast

import msgspec
from msgspec import Raw
from msgspec.structs import replace

from jobd.model.events import GIVEN_BACK, HEARTBEATS, KEEP_HEARTBEATS, ROUTINE, Changes, Event
from jobd.model.job import Job

EVENT_COLUMNS: Final = Event.__struct_fields__
EventRow = tuple[Any, ...]
_NULL: Final = Raw(b"null")
_json = msgspec.json.Encoder().encode


_TYPES: Final = {field.name: field.type for field in msgspec.structs.fields(Job)}
_decode_changes = msgspec.json.Decoder(cast("Any", TypedDict)("_Changes", _TYPES, total=False)).decode
_decode_json = msgspec.json.Decoder().decode


def encode(event: Event) -> EventRow:
    """Return the columns of `event` in the order of EVENT_COLUMNS."""
    return (
        event.seq,
        event.at,
        event.type,
        event.job_seq,
        event.job_id,
        event.queue,
        event.before,
        event.after,
        event.by,
        event.reason,
        None if event.details is None else _json(event.details),
        None if event.changes is None else _json(event.changes),
    )


def decode(row: EventRow) -> Event:
    """Return the event of an undamaged row."""
    seq, at, type_, job_seq, job_id, queue_, before, after, by, reason, details, changes = row[:12]
    details = None if details is None else _decode_json(details)
    changes = None if changes is None else _changes(changes)
    return Event(seq, at, type_, job_seq, job_id, queue_, before, after, by, reason, details, changes)


def _changes(body: bytes) -> Changes:
    changes: Changes = _decode_changes(body)
    if (result := changes.get("result")) is not None:  # `metadata` is part of `body`, and null is not None
        metadata = result.metadata
        metadata = None if metadata is None or metadata == _NULL else metadata.copy()
        changes["result"] = replace(result, metadata=metadata)
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
    carried: Changes = {}
    for event in events:
        both = {**carried, **(event.changes or {})}
        if event.seq in gone:
            carried = both
        else:
            kept.append(replace(event, changes=both) if carried else event)
            carried = {}
    return kept
