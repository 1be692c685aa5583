"""Define the context that the dispatchers of all webhooks share."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from jobd.model.commands import Moment
from jobd.model.storage import OutboxStorage
from jobd.model.webhooks import Delivery, OpenProblems
from jobd.webhooks.message import Message
from jobd.webhooks.retry import RetryPolicy


class DispatchContext(Struct):
    """The dependencies of all dispatchers. Delivery numbers are never reused; `next_delivery` is the next one."""

    storage: OutboxStorage
    moment: Callable[[], Moment]
    source: str  # the CloudEvents source of this daemon
    may_write: Callable[[], bool]  # False while the disk is full: the remaining space is for jobs that end
    may_send: Callable[[], bool]  # False if another node may lead, which sends the same messages
    problems: Callable[[], OpenProblems | None]  # None until they are known
    chance: Callable[[], float]  # 0 to 1
    retry_policy: RetryPolicy = RetryPolicy()
    next_delivery: int = 1

    def new_delivery(self, message: Message, endpoint: str, at: Moment) -> Delivery:
        """Return the message as a waiting delivery with a new number."""
        id_, self.next_delivery = self.next_delivery, self.next_delivery + 1
        return Delivery(
            id=id_,
            endpoint=endpoint,
            state="waiting",
            subject=message.subject,
            type=message.type,
            message_id=message.message_id,
            seq=message.seq,
            at=at.aging,
            due_at=at.believed,
            tries=0,
            ended_at=None,
            status=None,
            error=None,
            body=message.body,
        )


class DeliveryStats(Struct):
    """Counters since the process started, and the latest results. Times in Unix ms.

    `failing_since` is the monotonic time of the first failure after the last success, in ms. A reload keeps it.
    """

    delivered: int = 0
    failed: int = 0  # attempts
    dead_lettered: int = 0
    gaps: int = 0
    failing_since: int | None = None
    last_success_at: int | None = None
    last_error: str | None = None
    last_error_at: int | None = None
