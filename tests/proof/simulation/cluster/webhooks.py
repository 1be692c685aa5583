"""A webhook of simulated nodes: the leader delivers, and the next one continues after its last message.

L6: every completed job is reported. It is reported again only if the result of the last attempt was not durable.
"""

from __future__ import annotations

import asyncio
from random import Random
from typing import TYPE_CHECKING, Any, Final

from jobd.engine.disk_full import WriteLimit
from jobd.model.journal import JournalOutcomeUnknown, LeadershipLost
from jobd.model.storage import OutboxWrite
from jobd.model.webhooks import Delivery, DeliveryOutcome, WebhookEndpoint
from jobd.webhooks.context import DispatchContext
from jobd.webhooks.manager import WebhookManager

if TYPE_CHECKING:
    from tests.proof.simulation.cluster.cluster import Cluster
    from tests.proof.simulation.cluster.node import LeaderDaemon, SimNode

HOOK: Final = WebhookEndpoint("hook", "https://hook.test/", (b"k" * 24,), frozenset({"job.completed"}))
QUIET_S: Final = 3_600  # everything is delivered within this time after the last fault


class Receiver:
    """Receives the messages of every leader, and rejects some of them. `accepted` has their event numbers."""

    def __init__(self, cluster: Cluster) -> None:
        self.accepted: set[int] = set()
        self.cluster = cluster
        self.dice = Random(f"{cluster.seed}: webhook")

    async def check_complete(self) -> None:
        """Wait until all messages were sent, and check that every completed job since the first cursor was reported."""
        for _ in range(QUIET_S):
            if not (missing := self._missing()) or self.cluster.monitor.first:
                return
            await asyncio.sleep(1.0)
        self.cluster.monitor.fail("L6", f"completed jobs were never reported: events {sorted(missing)[:5]}")

    def _missing(self) -> set[int]:
        batches = self.cluster.batches
        writes = (write for batch in batches for write in batch.writes if isinstance(write, OutboxWrite))
        cursors = [cursor.position for write in writes for cursor in write.cursors]
        events = (event for batch in batches for event in batch.changes)
        done = {
            event.seq for event in events if event.type == "completed" and event.seq > min(cursors, default=event.seq)
        }
        return done - self.accepted


class Sender:
    """The transport of one node."""

    def __init__(self, receiver: Receiver, node: SimNode) -> None:
        self._receiver = receiver
        self._node = node

    async def post(self, endpoint: WebhookEndpoint, delivery: Delivery) -> DeliveryOutcome:
        receiver, cluster = self._receiver, self._receiver.cluster
        known = cluster.disk.outbox.get(delivery.id)
        if cluster.leads(self._node):  # a former leader may finish its attempt
            cluster.monitor.must(known is not None, "L6", f"message {delivery.id} is sent before it is durable")
            is_done = known is not None and known.state == "delivered"
            cluster.monitor.must(not is_done, "L6", f"message {delivery.id} is sent again after its result was durable")
        await asyncio.sleep(receiver.dice.choice((0.01, 0.2, 3.0)))
        if receiver.dice.random() < 0.1:
            return DeliveryOutcome(500, "500: broken")
        cluster.count("webhook repeated" if delivery.seq in receiver.accepted else "webhook received")
        receiver.accepted.add(delivery.seq)
        return DeliveryOutcome(204)

    async def close(self) -> None: ...


def make_webhooks(receiver: Receiver, daemon: LeaderDaemon) -> WebhookManager:
    def may_send() -> bool:
        try:
            daemon.leadership.check()
        except (LeadershipLost, JournalOutcomeUnknown):
            return False
        return True

    context = DispatchContext(
        storage=daemon.node.disk,
        moment=daemon.clock.moment,
        source="/jobd/sim",
        may_write=lambda: daemon.actor.full_disk.write_limit == WriteLimit.NONE and not daemon.gone.is_set(),
        may_send=may_send,
        problems=lambda: None,
        chance=receiver.dice.random,
    )
    sender: Any = Sender(receiver, daemon.node)
    webhooks = WebhookManager(context, subscribe=daemon.actor.on_commit.append, make_transport=lambda endpoint: sender)
    webhooks.set_endpoints([HOOK])
    return webhooks
