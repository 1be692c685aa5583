"""The storage of webhooks in memory. Nothing is trimmed."""

from __future__ import annotations

from msgspec.structs import replace

from jobd.model.responses import DeliveryState
from jobd.model.storage import Numbers, OutboxWrite, TableWrite
from jobd.model.webhooks import Delivery, Outbox, WebhookCursor


class MemoryOutbox:
    """The deliveries of a storage, which has these tables and calls `_enter` first in each method."""

    numbers: Numbers
    cursors: dict[str, WebhookCursor]
    outbox: dict[int, Delivery]

    async def _enter(self, name: str) -> None:
        raise NotImplementedError

    async def write_tables(self, write: TableWrite) -> None:
        raise NotImplementedError

    async def open_outbox(self, names: list[str], now: int) -> Outbox:
        await self._enter("open_outbox")
        last, next_id = self.numbers.next_event - 1, max(self.outbox, default=0) + 1
        next_id = max([next_id, *(each.next_delivery for each in self.cursors.values())])
        if new := [WebhookCursor(name, last, last, next_id, {}, now) for name in names if name not in self.cursors]:
            await self.write_tables(OutboxWrite(cursors=new))
        waiting = {
            name: [replace(each, body=b"") for each in self._outbox_of(name) if each.state == "waiting"]
            for name in names
        }
        return Outbox({name: self.cursors[name] for name in names}, waiting, last, next_id)

    async def plan_deliveries(self, moved: WebhookCursor, new: list[Delivery]) -> None:
        await self._enter("plan_deliveries")
        await self.write_tables(OutboxWrite([moved], new))

    async def store_outcomes(self, tried: list[Delivery], now: int) -> bool:
        await self._enter("store_outcomes")
        await self.write_tables(OutboxWrite(deliveries=[each for each in tried if each.id in self.outbox]))
        return False

    async def resend_delivery(self, endpoint: str, id_: int, now: int) -> Delivery | None:
        await self._enter("resend_delivery")
        found = await self._requeue([each for each in self._outbox_of(endpoint) if each.id == id_], now)
        return found[0] if found else None

    async def resend_dead_lettered(self, endpoint: str, upto: int, limit: int, now: int) -> list[Delivery]:
        await self._enter("resend_dead_lettered")
        failed = [each for each in self._outbox_of(endpoint) if each.state == "dead-lettered" and each.id <= upto]
        return [replace(each, body=b"") for each in await self._requeue(failed[:limit], now)]

    async def deliveries(self, ids: list[int]) -> list[Delivery]:
        await self._enter("deliveries")
        return [self.outbox[id_] for id_ in ids if id_ in self.outbox]

    async def dead_letter_counts(self, endpoint: str) -> tuple[int, int]:
        await self._enter("dead_letter_counts")
        failed = [each.id for each in self._outbox_of(endpoint) if each.state == "dead-lettered"]
        return len(failed), max(failed, default=0)

    async def list_deliveries(
        self, endpoint: str, state: DeliveryState | None, before: int, limit: int
    ) -> list[Delivery]:
        await self._enter("list_deliveries")
        found = [each for each in self._outbox_of(endpoint) if each.id < before and state in (None, each.state)]
        return found[::-1][:limit]

    def _outbox_of(self, endpoint: str) -> list[Delivery]:
        return [each for _, each in sorted(self.outbox.items()) if each.endpoint == endpoint]

    async def _requeue(self, found: list[Delivery], now: int) -> list[Delivery]:
        waiting = [replace(each, state="waiting", due_at=now, tries=0, ended_at=None) for each in found]
        if waiting:
            await self.write_tables(OutboxWrite(deliveries=waiting))
        return waiting
