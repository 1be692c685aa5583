"""The outbox on disk: atomic writes, damage, and limits."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from jobd.model.job import DAY_MS
from jobd.model.storage import DiskFull, OutboxStorage
from jobd.model.webhooks import GAP_PENDING, Delivery, WebhookCursor
from jobd.storage import outbox as webhook_tables
from jobd.storage.codec import fault
from jobd.storage.store import Store
from tests.support.factories import NOW, ChangeFactory
from tests.support.memory_storage import MemoryStorage
from tests.support.store_files import edit_store, fill, flip, make_store, open_store


def made(id_: int, endpoint: str = "e", **fields: Any) -> Delivery:
    message_id = f"evt_{id_}"
    new = Delivery(
        id_, endpoint, "waiting", "jobs/a", "job.failed", message_id, id_, NOW, NOW, 0, None, None, None, b'{"a":1}'
    )
    return replace(new, **fields)


async def planned(store: OutboxStorage, *deliveries: Delivery, name: str = "e", position: int = 9) -> None:
    top = max((each.id for each in deliveries), default=0)
    await store.plan_deliveries(WebhookCursor(name, position, 0, top + 1, {}, NOW), list(deliveries))


@pytest.fixture(params=["SQLite", "memory"])
async def storage(request: pytest.FixtureRequest, path: str) -> AsyncIterator[OutboxStorage]:
    """The storage of the daemon, then the storage in memory that other tests use."""
    if request.param == "memory":
        yield MemoryStorage()
        return
    async with open_store(path) as (store, _):
        yield store


def bare(*deliveries: Delivery) -> list[Delivery]:
    return [replace(each, body=b"") for each in deliveries]


def test_rows_are_the_same_after_encoding_and_decoding() -> None:
    cursor = WebhookCursor("zoë", 5, GAP_PENDING, 3, {"stuck_jobs": NOW}, NOW)
    assert webhook_tables.cursor(webhook_tables.cursor_row(cursor)) == cursor
    assert fault(webhook_tables.cursor_row(cursor)) is None


async def test_a_new_endpoint_begins_at_the_end_of_the_journal(path: str) -> None:
    maker = await make_store(path)
    async with open_store(path) as (store, _):
        last = maker.numbers.next_event - 1
        outbox = await store.open_outbox(["e", "f"], NOW)
        assert outbox.cursors == {name: WebhookCursor(name, last, last, 1, {}, NOW) for name in "ef"}
        assert (outbox.waiting, outbox.last, outbox.next_delivery) == ({"e": [], "f": []}, last, 1)
        await store.write(maker.any_batch(5))
    async with open_store(path) as (store, _):
        assert (await store.open_outbox(["e"], NOW + 5)).cursors["e"] == WebhookCursor("e", last, last, 1, {}, NOW)


async def test_added_deliveries_survive_a_restart_and_numbers_continue(path: str) -> None:
    async with open_store(path) as (store, _):
        await store.open_outbox(["e", "f"], NOW)
        first, second, other = made(1), made(2, subject="jobs/b"), made(3, "f")
        await planned(store, first, second, position=7)
        await planned(store, other, name="f")
        await store.store_outcomes([replace(first, state="delivered", ended_at=NOW + 1, status=204)], NOW + 1)
    async with open_store(path) as (store, _):
        outbox = await store.open_outbox(["e", "f"], NOW)
        assert outbox.waiting == {"e": bare(second), "f": bare(other)}
        assert outbox.cursors["e"].position == 7
        assert outbox.next_delivery == 4
        assert await store.deliveries([2, 99, 1]) == [
            second,
            replace(first, state="delivered", ended_at=NOW + 1, status=204),
        ]


async def test_numbers_of_deleted_deliveries_are_not_reused(store: Store) -> None:
    await store.open_outbox(["e"], NOW)
    await planned(store, made(1), made(2))
    store._connection.raw.execute("DELETE FROM deliveries")
    assert (await store.open_outbox(["e"], NOW)).next_delivery == 3


async def test_deliveries_and_cursor_are_written_in_one_transaction(store: Store) -> None:
    await store.open_outbox(["e"], NOW)
    await planned(store, made(1), position=1)
    big = [made(id_, body=b"x" * 4000) for id_ in range(2, 99)]
    (pages,) = store._connection.raw.execute("PRAGMA page_count").fetchone()
    store._connection.raw.execute(f"PRAGMA max_page_count = {pages + 5}")
    with pytest.raises(DiskFull):
        await planned(store, *big, position=98)
    outbox = await store.open_outbox(["e"], NOW)
    assert (outbox.cursors["e"].position, outbox.waiting["e"]) == (1, bare(made(1)))
    store._connection.raw.execute("PRAGMA max_page_count = 1000000")
    await planned(store, *big, position=98)
    assert len((await store.open_outbox(["e"], NOW)).waiting["e"]) == 98


async def test_pages_have_one_endpoint_and_state_newest_first(storage: OutboxStorage) -> None:
    states = ("waiting", "delivered", "dead-lettered")
    everything = [made(id_, "ef"[id_ % 2], state=states[id_ % 3]) for id_ in range(1, 40)]
    await planned(storage, *everything)
    own = [each for each in reversed(everything) if each.endpoint == "f"]
    assert await storage.list_deliveries("f", None, 1 << 60, 99) == own
    assert await storage.list_deliveries("f", None, own[4].id, 5) == own[5:10]
    dead_lettered = [each for each in own if each.state == "dead-lettered"]
    assert await storage.list_deliveries("f", "dead-lettered", dead_lettered[0].id, 2) == dead_lettered[1:3]
    assert await storage.list_deliveries("nobody", None, 1 << 60, 9) == []


async def test_a_retried_delivery_is_queued_as_if_it_were_new(storage: OutboxStorage) -> None:
    await planned(storage, made(1, state="dead-lettered", tries=9, ended_at=NOW, status=500, error="500"))
    renewed = await storage.resend_delivery("e", 1, NOW + 7)
    assert renewed == made(1, due_at=NOW + 7, status=500, error="500")
    assert await storage.deliveries([1]) == [renewed]
    assert await storage.resend_delivery("f", 1, NOW) is None
    assert await storage.resend_delivery("e", 2, NOW) is None


async def test_failed_deliveries_are_retried_oldest_first_up_to_an_id(storage: OutboxStorage) -> None:
    states = ("waiting", "delivered", "dead-lettered")
    everything = [made(id_, "ef"[id_ % 2], state=states[id_ % 3], tries=9, ended_at=NOW) for id_ in range(1, 40)]
    await planned(storage, *everything)
    lost = [each.id for each in everything if (each.endpoint, each.state) == ("e", "dead-lettered")]
    found = await storage.resend_dead_lettered("e", lost[-2], 2, NOW + 7)
    renewed = [made(id_, "e", due_at=NOW + 7) for id_ in lost[:2]]
    assert found == [replace(each, body=b"") for each in renewed]
    assert await storage.deliveries(lost[:2]) == renewed
    assert [each.id for each in await storage.resend_dead_lettered("e", lost[-2], 99, NOW)] == lost[2:-1]
    assert await storage.resend_dead_lettered("e", lost[-2], 99, NOW) == []
    left = await storage.list_deliveries("e", "dead-lettered", 1 << 60, 99)
    assert [each.id for each in left] == lost[-1:]
    assert len(await storage.list_deliveries("f", "dead-lettered", 1 << 60, 99)) > 1, (
        "those of other endpoints are not changed"
    )


async def test_only_the_latest_ended_deliveries_are_kept(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook_tables, "KEEP_ENDED", {"delivered": 5, "dead-lettered": 5})
    async with open_store(path) as (store, _):
        await planned(store, *(made(id_) for id_ in range(1, 41)))
        await planned(store, *(made(id_, "f", state="delivered", ended_at=NOW) for id_ in range(41, 51)), name="f")
        for id_ in range(1, 21):
            await store.store_outcomes([made(id_, state="delivered", ended_at=NOW)], NOW)
        await store.store_outcomes([made(id_, state="dead-lettered", ended_at=NOW) for id_ in range(21, 31)], NOW)
        assert [each.id for each in await store.list_deliveries("e", "delivered", 999, 99)] == [20, 19, 18, 17, 16]
        assert [each.id for each in await store.list_deliveries("e", "dead-lettered", 999, 99)] == [30, 29, 28, 27, 26]
        assert len(await store.list_deliveries("e", "waiting", 999, 99)) == 10  # waiting deliveries are never deleted
        assert len(await store.list_deliveries("f", "delivered", 999, 99)) == 10


async def test_deleting_a_failed_delivery_records_a_gap(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook_tables, "KEEP_ENDED", {"delivered": 2, "dead-lettered": 3})

    async def is_gap(*settled: Delivery, now: int = NOW) -> bool:
        cursor = await store.store_outcomes(list(settled), now)
        await store.finish_upkeep()
        (gone_to,) = store._connection.raw.execute("SELECT gone_to FROM webhooks WHERE name = 'e'").fetchone()
        assert cursor == (gone_to == GAP_PENDING)
        await planned(store)  # as if it were delivered
        return cursor

    async with open_store(path) as (store, _):
        await planned(store, *(made(id_) for id_ in range(1, 21)))
        assert not await is_gap(*(made(id_, state="delivered", ended_at=NOW) for id_ in range(1, 9)))
        assert not await is_gap(*(made(id_, state="dead-lettered", ended_at=NOW) for id_ in range(9, 12)))
        assert await store.dead_letter_counts("e") == (3, 11)
        assert await is_gap(made(12, state="dead-lettered", ended_at=NOW))
        assert [each.id for each in await store.list_deliveries("e", "dead-lettered", 99, 9)] == [12, 11, 10]
        assert not await is_gap(made(13, state="delivered", ended_at=NOW))
        assert await is_gap(made(14, state="delivered", ended_at=NOW + 31 * DAY_MS), now=NOW + 31 * DAY_MS), "by age"
        assert await store.dead_letter_counts("e") == (1, 12)
        assert await store.dead_letter_counts("f") == (0, 0)


async def test_deleting_alerts_and_tests_records_no_gap_but_deleting_a_gap_message_does(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook_tables, "KEEP_ENDED", {"delivered": 1, "dead-lettered": 1})
    async with open_store(path) as (store, _):
        types = ["problem.opened", "webhook.test", "events.gone", "job.failed"]
        lost = [made(id_, seq=0, type=type_, state="dead-lettered", ended_at=NOW) for id_, type_ in enumerate(types, 1)]
        await planned(store, *lost)
        assert [await store.store_outcomes([each], NOW) for each in lost[:1]] == [True], "one of them was a gap"
        await planned(store, *(replace(each, id=each.id + 10) for each in lost[:2]))
        assert await store.store_outcomes([replace(lost[0], id=11)], NOW) is False


async def test_old_ended_deliveries_are_deleted_by_age(store: Store) -> None:
    old = [made(id_, state="delivered", ended_at=NOW) for id_ in range(1, 7)]
    lost = [made(id_, state="dead-lettered", ended_at=NOW) for id_ in range(7, 9)]
    await planned(store, *old, *lost, *(made(id_) for id_ in range(10, 14)))
    for step in range(4):
        await store.store_outcomes([made(10 + step, state="delivered", ended_at=NOW + 8 * DAY_MS)], NOW + 8 * DAY_MS)
    assert [each.id for each in await store.list_deliveries("e", "delivered", 99, 99)] == [13, 12, 11, 10]
    assert len(await store.list_deliveries("e", "dead-lettered", 99, 99)) == 2


async def test_the_cursor_of_a_removed_endpoint_is_kept_for_a_while(store: Store) -> None:
    await store.open_outbox(["e", "f"], NOW)
    await planned(store, made(1), position=3)
    await store.open_outbox(["f"], NOW + 29 * DAY_MS)
    assert (await store.open_outbox(["f"], NOW + 29 * DAY_MS)).cursors["f"].updated_at == NOW + 29 * DAY_MS
    back = await store.open_outbox(["e"], NOW + 29 * DAY_MS)
    assert (back.cursors["e"].position, back.waiting["e"]) == (3, bare(made(1)))
    await store.open_outbox(["f"], NOW + 60 * DAY_MS)
    assert (await store.open_outbox(["e"], NOW + 60 * DAY_MS)).waiting["e"] == []
    assert await store.deliveries([1]) == []


async def test_known_endpoints_start_on_a_full_disk(maker: ChangeFactory, small_disk: Path) -> None:
    async with open_store(str(small_disk / "jobd.db")) as (store, _):
        await store.open_outbox(["e"], NOW)
        await planned(store, made(1), position=3)
        filler = fill(small_disk)
        with contextlib.suppress(DiskFull):
            while True:
                await store.write(maker.any_batch(50))
        outbox = await store.open_outbox(["e"], NOW + 2 * DAY_MS)
        assert (outbox.cursors["e"].position, outbox.waiting["e"]) == (3, bare(made(1)))
        assert (await store.open_outbox(["e", "f"], NOW + 2 * DAY_MS)).cursors == outbox.cursors
        filler.unlink()
        outbox = await store.open_outbox(["e", "f"], NOW + 2 * DAY_MS)
        assert outbox.cursors["f"].updated_at == NOW + 2 * DAY_MS


async def test_a_damaged_delivery_is_quarantined_and_blocks_nothing(path: str) -> None:
    async with open_store(path) as (store, _):
        await planned(store, made(1), made(2), made(3))
    flip(path, "deliveries", "body", "id", 2)
    async with open_store(path) as (store, _):
        outbox = await store.open_outbox(["e"], NOW)
        assert outbox.waiting["e"] == bare(made(1), made(3))
        assert store.take_faults() == ["deliveries 2: its checksum is wrong; the row was quarantined"]
        assert await store.deliveries([1, 2, 3]) == [made(1), made(3)]
        assert store.take_faults() == []


async def test_a_delivery_that_is_damaged_while_it_is_sent_gets_its_outcome(store: Store) -> None:
    await store.open_outbox(["e"], NOW)
    await planned(store, made(1))
    await store.finish_upkeep()
    store._connection.raw.execute("UPDATE deliveries SET state = CAST(x'ff' AS TEXT)")
    delivered = made(1, state="delivered", ended_at=NOW, status=204)
    await store.store_outcomes([delivered], NOW)
    assert await store.deliveries([1]) == [delivered]


async def test_a_damaged_cursor_continues_after_its_last_delivery(maker: ChangeFactory, path: str) -> None:
    async with open_store(path) as (store, _):
        await store.write(maker.batch([maker.create() for _ in range(9)]))
        await store.open_outbox(["e", "f"], NOW)
        await planned(store, made(1, seq=4), made(2, seq=6), position=8)
    with edit_store(path) as conn:
        conn.execute("UPDATE webhooks SET position = position + 1")
    async with open_store(path) as (store, _):
        outbox = await store.open_outbox(["e", "f", "g"], NOW)
        assert (outbox.cursors["e"].position, outbox.cursors["e"].gone_to) == (6, 6)
        for name in "fg":  # the owner of the damaged cursor is unknown, so both get a message
            assert (outbox.cursors[name].position, outbox.cursors[name].gone_to) == (9, GAP_PENDING)
        assert len(store.take_faults()) == 2
    async with open_store(path) as (store, _):
        assert (await store.open_outbox(["h"], NOW)).cursors["h"].gone_to == 9


async def test_an_unused_outbox_writes_nothing(store: Store) -> None:
    for table in ("webhooks", "deliveries"):
        assert store._connection.raw.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
