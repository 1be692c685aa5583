"""Count the bytes of responses that clients have not read, against limits.response_bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from jobd.model.commands import Command
from jobd.model.errors import ApiError

RESPONSE_BYTES: Final = 256 << 20
LARGE: Final = frozenset({"read", "grant"})  # admission classes of commands whose responses can be large


class UnreadResponses:
    """The bytes of responses that wait for their clients to read. `on_room` is called when they fall below the limit.

    A few more bytes than the limit can wait: the responses of a batch (batch.BATCH_PAYLOADS), or of a holder's calls.
    """

    __slots__ = ("_on_room", "bytes", "is_full", "limit")

    def __init__(self, limit: int = RESPONSE_BYTES, on_room: Callable[[], None] = lambda: None) -> None:
        self.limit = limit
        self.bytes = 0
        self.is_full = False
        self._on_room = on_room

    def add(self, size: int) -> None:
        self.bytes += size
        self.is_full = self.bytes >= self.limit

    def remove(self, size: int) -> None:
        self.bytes -= size
        if self.is_full and self.bytes < self.limit:
            self.is_full = False
            self._on_room()

    def rejection(self) -> ApiError:
        """Return the error of a command that is rejected while the limit is reached."""
        message = (
            f"Clients have not read {self.bytes} bytes of responses, and the limit is {self.limit} "
            "(limits.response_bytes). Read the open responses, or try again in a second."
        )
        return ApiError("overloaded", message)

    def reject(self, command: Command) -> ApiError | None:
        """Return why the response to `command` may not be added now; None if it may."""
        return self.rejection() if self.is_full and command.admission in LARGE else None
