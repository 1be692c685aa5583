"""Read and write the webhook outbox: cursors of endpoints and their deliveries. Damaged rows are quarantined.

All calls block; the storage thread makes them. A plan reads the rows and returns what to write.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec.structs import astuple, replace

from jobd.model.job import DAY_MS
from jobd.model.responses import DeliveryState
from jobd.model.storage import OutboxWrite
from jobd.model.webhooks import DELIVERY_STATES, EVENTS_GONE, GAP_PENDING, MAX_BACKLOG, Delivery, Outbox, WebhookCursor
from jobd.storage.codec import SQL, Row, fault, insert, struct_row, with_checksum
from jobd.storage.damage.quarantine import undamaged_rows
from jobd.storage.database import Database

KEEP_ENDED: Final[dict[DeliveryState, int]] = {"delivered": 1_000, "dead-lettered": MAX_BACKLOG}  # per endpoint
KEEP_ENDED_MS: Final[dict[DeliveryState, int]] = {"delivered": 7 * DAY_MS, "dead-lettered": 30 * DAY_MS}
FORGET_MS: Final = 30 * DAY_MS  # for the cursor of an endpoint that is no longer configured

_PUT_CURSOR: Final = insert("webhooks", "REPLACE")
_PUT: Final = insert("deliveries", "REPLACE")
_PLACE: Final = "SELECT state FROM deliveries NOT INDEXED WHERE id = ?"
_BY_ID: Final = f"SELECT rowid, {SQL['deliveries']} FROM deliveries NOT INDEXED WHERE id = ?"
# Finds ids only; rows are read by id, because a column from an index would hide damage in the row.
_IDS: Final = "SELECT id FROM deliveries INDEXED BY deliveries_place WHERE endpoint = ? AND state = ?"


def cursor_row(cursor: WebhookCursor) -> Row:
    """Return the columns of a cursor with the checksum."""
    *columns, alerts, updated_at = astuple(cursor)
    return with_checksum((*columns, msgspec.json.encode(alerts), updated_at))


def cursor(row: Row) -> WebhookCursor:
    """Return the cursor of an undamaged row."""
    name, position, gone_to, next_delivery, alerts, updated_at, _ = row
    firing = msgspec.json.decode(alerts, type=dict[str, int])
    return WebhookCursor(name, position, gone_to, next_delivery, firing, updated_at)


def plan_opening(db: Database, names: list[str], now: int) -> tuple[OutboxWrite | None, tuple[Outbox, Outbox]]:
    """Read cursors and waiting deliveries of the endpoints. A new endpoint begins at the end of the event log.

    Return the cursors to write, the outbox with them, and the outbox if they cannot be written: without new endpoints.
    """
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
    changed = [each for name, each in cursors.items() if each is not known.get(name)]
    old = [name for name, each in known.items() if name not in names and each.updated_at < now - FORGET_MS]
    write = OutboxWrite(changed, forgotten=old) if changed or old else None
    outbox = Outbox(cursors, waiting, last, next_delivery)
    return write, (outbox, replace(outbox, cursors={name: cursors[name] for name in names if name in known}))


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
    rows = db.rows(f"SELECT rowid, {SQL['webhooks']} FROM webhooks NOT INDEXED")
    known = {row[0]: cursor(row) for row in undamaged_rows(db, "webhooks", rows)}
    return known, len(known) < len(rows)


def _waiting(db: Database, name: str) -> list[Delivery]:
    ids = [id_ for (id_,) in db.conn.execute(f"{_IDS} ORDER BY id", (name, "waiting"))]
    return [
        replace(each, body=b"") for first in range(0, len(ids), 100) for each in by_ids(db, ids[first : first + 100])
    ]


def by_ids(db: Database, ids: list[int]) -> list[Delivery]:
    """Return deliveries by id, in this order. Damaged ones are quarantined and left out."""
    db.check()
    rows = db.rows_one_by_one(_BY_ID, ids, "deliveries")
    return [Delivery(*row[:-1]) for row in undamaged_rows(db, "deliveries", rows)]


def plan_outcomes(db: Database, tried: list[Delivery], now: int) -> tuple[OutboxWrite | None, bool]:
    """Plan to store deliveries of one endpoint, and to delete the oldest of those that have ended.

    Also return whether that deletes events that the endpoint has never accepted. Its cursor then records a gap.
    """
    db.check()
    states = {each.id: next(iter(db.rows(_PLACE, (each.id,))), None) for each in tried}
    found = [each for each in tried if states[each.id] is not None]  # others were deleted
    dropped: set[int] = set()
    lost: set[str] = set()
    for name in dict.fromkeys(each.endpoint for each in found if each.state != "waiting"):
        for state in KEEP_ENDED:
            ended = {each.id: each for each in found if (each.endpoint, each.state) == (name, state)}
            entering = [id_ for id_ in ended if states[id_] != (state,)]
            going = _excess(db, name, state, entering)
            going |= _too_old(db, name, state, ended, going, now)
            dropped |= going
            if state == "dead-lettered" and any(_matters(db, ended, id_) for id_ in going):
                lost.add(name)
    cursors = [replace(each, gone_to=GAP_PENDING) for name in lost if (each := _cursor(db, name)) is not None]
    kept = [each for each in found if each.id not in dropped]
    write = OutboxWrite(cursors, kept, sorted(dropped)) if found else None
    return write, bool(lost)


def _excess(db: Database, name: str, state: DeliveryState, entering: list[int]) -> set[int]:
    """Return the ids of all but the latest deliveries in this state, to which `entering` change."""
    kept = KEEP_ENDED[state]
    window = (name, state, len(entering) + 1, max(kept - len(entering), 0))
    edges = [id_ for (id_,) in db.conn.execute(f"{_IDS} ORDER BY id DESC LIMIT ? OFFSET ?", window)]
    above = max(kept - len(entering), 0)  # stored ones above the window
    ids = sorted([*edges, *entering], reverse=True)
    if above + len(ids) <= kept:
        return set()
    edge = ids[kept - above]
    stored = db.conn.execute(f"{_IDS} AND id <= ?", (name, state, edge))
    return {id_ for (id_,) in stored} | {id_ for id_ in entering if id_ <= edge}


def _too_old(
    db: Database, name: str, state: DeliveryState, ended: dict[int, Delivery], going: set[int], now: int
) -> set[int]:
    """Return those of the two oldest deliveries in this state that are too old, except for those in `going`.

    Two are enough, because deliveries end one at a time.
    """
    found = db.conn.execute(f"{_IDS} ORDER BY id LIMIT ?", (name, state, len(going) + 2))
    oldest = sorted({*ended, *(id_ for (id_,) in found)} - going)[:2]
    before = now - KEEP_ENDED_MS[state]
    sql = "SELECT ifnull(ended_at, at) < ? FROM deliveries WHERE id = ?"
    return {
        id_
        for id_ in oldest
        if ((each.ended_at or each.at) < before if (each := ended.get(id_)) else _holds(db, sql, before, id_))
    }


def _matters(db: Database, ended: dict[int, Delivery], id_: int) -> bool:
    """Return whether a delivery is about an event or a gap."""
    if (each := ended.get(id_)) is not None:
        return each.seq > 0 or each.type == EVENTS_GONE
    return _holds(db, "SELECT seq > 0 OR type = ? FROM deliveries WHERE id = ?", EVENTS_GONE, id_)


def _holds(db: Database, condition: str, *args: str | int) -> bool:
    return bool(db.conn.execute(condition, args).fetchone()[0])


def _cursor(db: Database, name: str) -> WebhookCursor | None:
    rows = db.rows(f"SELECT {SQL['webhooks']} FROM webhooks NOT INDEXED WHERE name = ?", (name,))
    return cursor(rows[0]) if rows and fault(rows[0]) is None else None


def dead_letter_counts(db: Database, endpoint: str) -> tuple[int, int]:
    """Return how many deliveries of an endpoint are dead-lettered, and the id of the newest (0 if none)."""
    db.check()
    sql = f"SELECT count(*), ifnull(max(id), 0) FROM ({_IDS})"
    count, newest = db.conn.execute(sql, (endpoint, "dead-lettered")).fetchone()
    return count, newest


def plan_retry(db: Database, endpoint: str, id_: int, now: int) -> tuple[OutboxWrite | None, Delivery | None]:
    """Plan to requeue a delivery as if it had never been tried. The result is None if there is none with this id."""
    stored = [each for each in by_ids(db, [id_]) if each.endpoint == endpoint]
    if not stored:
        return None, None
    renewed = _renewed(stored[0], now)
    return OutboxWrite(deliveries=[renewed]), renewed


def plan_retries(
    db: Database, endpoint: str, upto: int, limit: int, now: int
) -> tuple[OutboxWrite | None, list[Delivery]]:
    """Plan to requeue the oldest `limit` dead-lettered deliveries with ids up to `upto`. The result has no bodies."""
    db.check()
    sql = f"{_IDS} AND id <= ? ORDER BY id LIMIT ?"
    ids = [id_ for (id_,) in db.conn.execute(sql, (endpoint, "dead-lettered", upto, limit))]
    renewed = [_renewed(each, now) for each in by_ids(db, ids) if each.endpoint == endpoint]
    write = OutboxWrite(deliveries=renewed) if renewed else None
    return write, [replace(each, body=b"") for each in renewed]


def _renewed(delivery: Delivery, now: int) -> Delivery:
    return replace(delivery, state="waiting", due_at=now, tries=0, ended_at=None)


def page(db: Database, endpoint: str, state: DeliveryState | None, before: int, limit: int) -> list[Delivery]:
    """Return up to `limit` deliveries of an endpoint with ids below `before`, newest first."""
    db.check()
    ids: list[int] = []
    for each in DELIVERY_STATES if state is None else (state,):
        args: tuple[Any, ...] = (endpoint, each, before, limit)
        ids += [id_ for (id_,) in db.conn.execute(f"{_IDS} AND id < ? ORDER BY id DESC LIMIT ?", args)]
    return by_ids(db, sorted(ids, reverse=True)[:limit])


def apply(db: Database, write: OutboxWrite) -> None:
    """Apply `write` in a transaction."""
    executemany = db.conn.executemany
    executemany(_PUT_CURSOR, map(cursor_row, write.cursors))
    executemany(_PUT, map(struct_row, write.deliveries))
    executemany("DELETE FROM deliveries WHERE id = ?", [(id_,) for id_ in write.dropped])
    for table, column in (("deliveries", "endpoint"), ("webhooks", "name")):
        executemany(f"DELETE FROM {table} WHERE {column} = ?", [(name,) for name in write.forgotten])
