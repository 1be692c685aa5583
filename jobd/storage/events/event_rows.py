"""Encode and decode rows of the table `events`. A row has events of one job, whose numbers are close to each other.

Readers do not depend on how events are divided into rows: other nodes and later versions may divide them differently.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable
from itertools import groupby
from operator import itemgetter
from typing import Any, Final, cast

import msgspec

from jobd.journal.event_codec import EVENT_COLUMNS, EventRow
from jobd.storage import codec
from jobd.storage.codec import COLUMNS, Row, insert, with_checksum

INSERT: Final = insert("events")
FORMAT: Final = 1  # the first byte of a body
SPAN: Final = 1_000  # the numbers of a row are less than this apart, so that readers find the row of an event
# Larger bodies have one event, because readers of all events decode a row again for each page with some of its events,
# and read all rows of SPAN numbers if a number is missing.
ROW_BYTES: Final = 2_048
JOB_SEQ: Final = COLUMNS["events"].index("job_seq")
AT: Final = COLUMNS["events"].index("at")
BODY: Final = COLUMNS["events"].index("body")
_EVENT_SEQ: Final = EVENT_COLUMNS.index("seq")
_EVENT_AT: Final = EVENT_COLUMNS.index("at")
_EVENT_JOB: Final = EVENT_COLUMNS.index("job_seq")
_EVENT_JOB_ID: Final = EVENT_COLUMNS.index("job_id")
_job_seq = itemgetter(_EVENT_JOB)

_encode_into = msgspec.msgpack.Encoder().encode_into
_decode = msgspec.msgpack.Decoder(list[tuple[Any, ...]]).decode


def pack(events: Iterable[EventRow]) -> list[Row]:
    """Return rows for these events, which are in the order of their numbers."""
    rows: list[Row] = []
    for job_seq, group in groupby(sorted(events, key=_job_seq), _job_seq):
        _add_rows(rows, list(group), job_seq)
    return rows


def _add_rows(rows: list[Row], events: list[EventRow], job_seq: int) -> None:
    """Add rows for the events of a job, or of all queues (0)."""
    first, last = events[0], events[-1][_EVENT_SEQ]
    body = bytearray((FORMAT,))
    _encode_into(events, body, 1)
    if first is not events[-1] and (len(body) > ROW_BYTES or last - first[_EVENT_SEQ] >= SPAN or not job_seq):
        middle = len(events) // 2
        _add_rows(rows, events[:middle], job_seq)
        _add_rows(rows, events[middle:], job_seq)
    else:
        rows.append(with_checksum((first[_EVENT_SEQ], last, job_seq, first[_EVENT_AT], body)))


def rewrite(conn: sqlite3.Connection, rows: Iterable[Row], events: Iterable[EventRow]) -> None:
    """Replace `rows` with new rows for `events`."""
    conn.executemany("DELETE FROM events WHERE seq = ?", [(row[0],) for row in rows])
    conn.executemany(INSERT, pack(events))


def fault(row: Row) -> str | None:
    """Return the problem of a row, or None if it is undamaged."""
    if (error := codec.fault(row)) is not None:
        return error
    return None if row[BODY][0] == FORMAT else f"it has format {row[BODY][0]}, but this jobd supports format {FORMAT}"


def unpack(row: Row) -> list[EventRow]:
    """Return the events of an undamaged row."""
    return _decode(memoryview(row[BODY])[1:])


def job_id(row: Row) -> str:
    """Return the id of the job of an undamaged row."""
    return cast("str", unpack(row)[0][_EVENT_JOB_ID])


def highest_number(row: Row) -> int:
    """Return the highest event number in a damaged row. Damage may have changed it."""
    return max(number for number in (row[0], row[1], *_values(row, _EVENT_SEQ)) if isinstance(number, int))


def job_numbers(row: Row) -> set[int]:
    """Return the job number in each place of a damaged row. Damage may have changed it."""
    return {number for number in (row[JOB_SEQ], *_values(row, _EVENT_JOB)) if isinstance(number, int)}


def _values(row: Row, column: int) -> list[Any]:
    """Return a value of each event of a damaged row, or nothing if its events cannot be decoded."""
    with contextlib.suppress(msgspec.MsgspecError, ValueError, TypeError):
        return [event[column] for event in unpack(row) if len(event) > column]
    return []
