"""The envelope of a command: the waiter for its response, its idempotency key and its share of the mailbox."""

from __future__ import annotations

from typing import Final, Protocol

from msgspec import field

from jobd.model.clocks import MonotonicS
from jobd.model.commands import Admission, IdempotencyKey, IssuedCommand
from jobd.model.errors import ApiError
from jobd.model.responses import Response

# How full the mailbox may be when a command is accepted. Commands for running jobs and of operators are rejected last.
SHARES: Final[dict[Admission, float]] = {
    "create": 0.70,
    "read": 0.85,
    "grant": 0.85,
    "ping": 1.0,
    "change": 1.0,
    "ending": 1.0,
}


def may_go_first(envelope: Envelope) -> bool:
    """Return whether this is a read that may be decided before the rest of its batch.

    A Ping may not: it measures how long a command takes.
    """
    return envelope.command.admission == "read" and not envelope.ordered


class Waiter(Protocol):
    """The receiver of a response: a future, or the listener's request. `set_result` is called once and never raises.

    It may have a method `prepare`, which gets the response before the commit and never raises either.
    """

    def done(self) -> bool: ...
    def cancelled(self) -> bool: ...
    def set_result(self, response: Response | ApiError, /) -> None: ...


class Envelope(IssuedCommand, eq=False):
    """A call in the mailbox, with the receivers of its response.

    `futures` has several if its key is repeated while it waits. `size` is in bytes, as it counts towards
    limits.inflight_bytes. `ordered`: decided after the earlier commands of the same sender. `ticket` is the order of
    arrival among waiting claims, `deadline` the loop time at which such a claim gets a response without grants, or at
    which a deferred command of the daemon is decided before others.
    """

    key: IdempotencyKey | None = None
    size: int = 0
    futures: list[Waiter] = field(default_factory=list)
    ordered: bool = False
    ticket: int = 0
    deadline: MonotonicS = MonotonicS(0.0)

    @property
    def is_abandoned(self) -> bool:
        """Whether no caller waits for the response any more."""
        if len(self.futures) == 1:
            return self.futures[0].cancelled()
        return all(future.cancelled() for future in self.futures)

    def prepare(self, response: Response) -> None:
        """Let the waiters encode the response that they get if the commit succeeds."""
        for future in self.futures:
            make_ready = getattr(future, "prepare", None)
            if make_ready is not None:
                make_ready(response)

    def reply(self, response: Response | ApiError) -> int:
        """Send the response to the callers that still wait. Return their number."""
        futures = self.futures
        if len(futures) == 1 and not futures[0].done():
            futures[0].set_result(response)
            return 1
        sent = 0
        for future in futures:
            if not future.done():
                future.set_result(response)
                sent += 1
        return sent
