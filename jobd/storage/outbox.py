"""Read and write the webhook outbox: cursors of endpoints and their deliveries. Damaged rows are quarantined.

All calls block; the storage thread makes them. Each write is one transaction.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec.structs import astuple, replace

from jobd.model.job import DAY_MS
from jobd.model.responses import DeliveryState
from jobd.model.storage import DiskFull
from jobd.model.webhooks import DELIVERY_STATES, EVENTS_GONE, GAP_PENDING, MAX_BACKLOG, Delivery, Outbox, WebhookCursor
from jobd.storage.codec import Row, fault, sealed
from jobd.storage.database import Database
from jobd.storage.quarantine import quarantine_rows
from jobd.storage.writers import insert

CURSOR_COLUMNS: Final = WebhookCursor.__struct_fields__
DELIVERY_COLUMNS: Final = Delivery.__struct_fields__
CURSOR_SQL: Final = f"{', '.join(CURSOR_COLUMNS)}, crc"
DELIVERY_SQL: Final = f"{', '.join(DELIVERY_COLUMNS)}, crc"

KEEP_ENDED: Final[dict[DeliveryState, int]] = {"delivered": 1_000, "given_up": MAX_BACKLOG}  # per endpoint
KEEP_ENDED_MS: Final[dict[DeliveryState, int]] = {"delivered": 7 * DAY_MS, "given_up": 30 * DAY_MS}
FORGET_MS: Final = 30 * DAY_MS  # for the cursor of an endpoint that is no longer configured

_PUT_CURSOR: Final = insert("webhooks", (*CURSOR_COLUMNS, "crc"), "REPLACE")
_INSERT: Final = insert("deliveries", (*DELIVERY_COLUMNS, "crc"))
_UPDATE: Final = (
    f"UPDATE deliveries SET {', '.join(f'{column} = ?' for column in (*DELIVERY_COLUMNS[1:], 'crc'))} WHERE id = ?"
)
_BY_ID: Final = f"SELECT {DELIVERY_SQL} FROM deliveries NOT INDEXED WHERE id = ?"
# Finds ids only; rows are read by id, because a column from an index would hide damage in the row.
_IDS: Final = "SELECT id FROM deliveries INDEXED BY deliveries_place WHERE endpoint = ? AND state = ?"


def cursor_row(cursor: WebhookCursor) -> Row:
    """Return the columns of a cursor in the order of CURSOR_COLUMNS, with the checksum."""
    *columns, alerts, updated_at = astuple(cursor)
    return sealed((*columns, msgspec.json.encode(alerts), updated_at))


def cursor(row: Row) -> WebhookCursor:
    """Return the cursor of an undamaged row."""
    name, position, gone_to, next_delivery, alerts, updated_at, _ = row
    firing = msgspec.json.decode(alerts, type=dict[str, int])
    return WebhookCursor(name, position, gone_to, next_delivery, firing, updated_at)


def delivery_row(delivery: Delivery) -> Row:
    """Return the columns of a delivery in the order of DELIVERY_COLUMNS, with the checksum."""
    return sealed(astuple(delivery))


def delivery(row: Row) -> Delivery:
    """Return the delivery of an undamaged row."""
    return Delivery(*row[:-1])


def open_outbox(db: Database, names: list[str], now: int) -> Outbox:
    """Return cursors and waiting deliveries of the endpoints. A new endpoint begins at the end of the journal."""
    db.check()
    last = db.numbers.next_event - 1
    known, some_damaged = _cursors(db)
    waiting = {name: _waiting(db, name) for name in names}
    (top,) = db.conn.execute("SELECT ifnull(max(id), 0) FROM deliveries").fetchone()
    next_delivery = max([top + 1, *(each.next_delivery for each in known.values())])
    cursors = {}
    for name in names:
        current = known.get(name)
        if current is None:
            position, gone_to = _begin(db, name, last) if some_damaged else (last, last)
            current = WebhookCursor(name, position, gone_to, next_delivery)
        cursors[name] = replace(current, updated_at=now) if current.updated_at < now - DAY_MS else current
    if changed := [each for name, each in cursors.items() if each is not known.get(name)]:
        try:
            db.commit(_put_cursors, db, changed)
        except DiskFull:
            if not known.keys() >= cursors.keys():
                raise
            # The cursors can be updated later, but alerts about the full disk must be delivered now.
            return Outbox(cursors, waiting, last, next_delivery)
    if old := [name for name, each in known.items() if name not in names and each.updated_at < now - FORGET_MS]:
        db.commit(_forget, db, old)
    return Outbox(cursors, waiting, last, next_delivery)


def _begin(db: Database, name: str, last: int) -> tuple[int, int]:
    """Return `position` and `gone_to` for an endpoint whose cursor may have been damaged.

    The endpoint continues after the last event in its outbox. If the outbox is empty, it continues at the end of the
    journal, and gets a message about the gap.
    """
    sql = "SELECT ifnull(max(seq), 0) FROM deliveries NOT INDEXED WHERE endpoint = ?"
    (reached,) = db.conn.execute(sql, (name,)).fetchone()
    return (reached, reached) if reached else (last, GAP_PENDING)


def _cursors(db: Database) -> tuple[dict[str, WebhookCursor], bool]:
    """Return the cursors by name, and whether some were damaged; the name of a damaged cursor is unknown."""
    known: dict[str, WebhookCursor] = {}
    damaged: list[tuple[int, Row, str]] = []
    for rowid, *columns in db.rows(f"SELECT rowid, {CURSOR_SQL} FROM webhooks NOT INDEXED"):
        row = tuple(columns)
        if (error := fault(row)) is None:
            known[row[0]] = cursor(row)
        else:
            damaged.append((rowid, row, error))
    quarantine_rows(db, "webhooks", (*CURSOR_COLUMNS, "crc"), damaged)
    return known, bool(damaged)


def _waiting(db: Database, name: str) -> list[Delivery]:
    ids = [id_ for (id_,) in db.conn.execute(f"{_IDS} ORDER BY id", (name, "waiting"))]
    return [
        replace(each, body=b"") for first in range(0, len(ids), 100) for each in by_ids(db, ids[first : first + 100])
    ]


def by_ids(db: Database, ids: list[int]) -> list[Delivery]:
    """Return deliveries by id, in this order. Damaged ones are quarantined and left out."""
    db.check()
    rows = db.rows_one_by_one(_BY_ID, ids, "deliveries")
    damaged = [(row[0], row, error) for row in rows if (error := fault(row)) is not None]
    quarantine_rows(db, "deliveries", (*DELIVERY_COLUMNS, "crc"), damaged)
    return [delivery(row) for row in rows if fault(row) is None]


def add(db: Database, moved: WebhookCursor, new: list[Delivery]) -> None:
    """Add deliveries to the outbox and move the cursor, in one transaction."""
    db.commit(_add, db, moved, new)


def _add(db: Database, moved: WebhookCursor, new: list[Delivery]) -> None:
    db.conn.executemany(_INSERT, map(delivery_row, new))
    _put_cursors(db, [moved])


def settle(db: Database, settled: list[Delivery], now: int) -> bool:
    """Store the results of deliveries of one endpoint, and delete the oldest of those that have ended.

    Return whether that deleted events that the endpoint has never accepted. Its cursor then records a gap.
    """
    return db.commit(_settle, db, settled, now)


def _settle(db: Database, settled: list[Delivery], now: int) -> bool:
    db.conn.executemany(_UPDATE, [(*row[1:], row[0]) for row in map(delivery_row, settled)])
    ended = {(each.endpoint, each.state) for each in settled if each.state != "waiting"}
    lost = {name for name, state in ended if _trim(db, name, state)}
    lost |= {name for name, _ in ended if _trim_by_age(db, name, now)}
    for name in lost:
        row = db.conn.execute(f"SELECT {CURSOR_SQL} FROM webhooks NOT INDEXED WHERE name = ?", (name,)).fetchone()
        if row is not None and fault(row) is None:
            _put_cursors(db, [replace(cursor(row), gone_to=GAP_PENDING)])
    return bool(lost)


def _trim(db: Database, name: str, state: DeliveryState) -> bool:
    """Delete all but the latest deliveries of this state. Return the result of `_drop`."""
    args = (name, state, KEEP_ENDED[state])
    edge = db.conn.execute(f"{_IDS} ORDER BY id DESC LIMIT 1 OFFSET ?", args).fetchone()
    return edge is not None and _drop(db, state, f"id IN ({_IDS} AND id <= ?)", (name, state, edge[0]))


def _trim_by_age(db: Database, name: str, now: int) -> bool:
    """Delete the two oldest deliveries of each state if they are too old. Return the result of `_drop`.

    Two are enough, because deliveries end one at a time.
    """
    is_lost = False
    for state, keep_ms in KEEP_ENDED_MS.items():
        for (oldest,) in db.conn.execute(f"{_IDS} ORDER BY id LIMIT 2", (name, state)).fetchall():
            condition = "id = ? AND ifnull(ended_at, at) < ?"
            is_lost |= _drop(db, state, condition, (oldest, now - keep_ms))
    return is_lost


def _drop(db: Database, state: DeliveryState, condition: str, args: tuple[Any, ...]) -> bool:
    """Delete deliveries. Return whether a dead-lettered one of them was about an event or a gap."""
    sql = f"DELETE FROM deliveries WHERE {condition} RETURNING seq > 0 OR type = ?"
    dropped = db.conn.execute(sql, (*args, EVENTS_GONE)).fetchall()
    return state == "given_up" and any(matters for (matters,) in dropped)


def dead_letter_counts(db: Database, endpoint: str) -> tuple[int, int]:
    """Return how many deliveries of an endpoint are dead-lettered, and the id of the newest (0 if none)."""
    db.check()
    sql = f"SELECT count(*), ifnull(max(id), 0) FROM ({_IDS})"
    count, newest = db.conn.execute(sql, (endpoint, "given_up")).fetchone()
    return count, newest


def retry(db: Database, endpoint: str, id_: int, now: int) -> Delivery | None:
    """Requeue a delivery as if it had never been tried. Return None if there is none with this id."""
    stored = [each for each in by_ids(db, [id_]) if each.endpoint == endpoint]
    if not stored:
        return None
    renewed = replace(stored[0], state="waiting", due_at=now, tries=0, ended_at=None)
    db.commit(_settle, db, [renewed], now)
    return renewed


def retry_all(db: Database, endpoint: str, upto: int, limit: int, now: int) -> list[Delivery]:
    """Requeue the oldest `limit` dead-lettered deliveries with ids up to `upto`. Return them without bodies."""
    db.check()
    sql = f"{_IDS} AND id <= ? ORDER BY id LIMIT ?"
    ids = [id_ for (id_,) in db.conn.execute(sql, (endpoint, "given_up", upto, limit))]
    renewed = [
        replace(each, state="waiting", due_at=now, tries=0, ended_at=None)
        for each in by_ids(db, ids)
        if each.endpoint == endpoint
    ]
    if renewed:
        db.commit(_settle, db, renewed, now)
    return [replace(each, body=b"") for each in renewed]


def page(db: Database, endpoint: str, state: DeliveryState | None, before: int, limit: int) -> list[Delivery]:
    """Return up to `limit` deliveries of an endpoint with ids below `before`, newest first."""
    db.check()
    ids: list[int] = []
    for each in DELIVERY_STATES if state is None else (state,):
        args: tuple[Any, ...] = (endpoint, each, before, limit)
        ids += [id_ for (id_,) in db.conn.execute(f"{_IDS} AND id < ? ORDER BY id DESC LIMIT ?", args)]
    return by_ids(db, sorted(ids, reverse=True)[:limit])


def _put_cursors(db: Database, cursors: list[WebhookCursor]) -> None:
    db.conn.executemany(_PUT_CURSOR, map(cursor_row, cursors))


def _forget(db: Database, names: list[str]) -> None:
    """Delete endpoints that were removed from the configuration long ago."""
    db.conn.executemany("DELETE FROM deliveries WHERE endpoint = ?", [(name,) for name in names])
    db.conn.executemany("DELETE FROM webhooks WHERE name = ?", [(name,) for name in names])
