"""Listening to events, without IO: what is asked for, how a stream is read, and where it goes on when it breaks off.

Opens no connection and waits for nothing; sync.py and aio.py do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from jobd.client.errors import BadAnswer
from jobd.client.protocol import ApiRequest, ApiResponse, RetryPolicy, get, raise_error
from jobd.model.events import StreamedEvent

EVENTS: Final = "/v1/events"
ADMIN_EVENTS: Final = "/admin/job-management/events"
# The daemon breaks a silence after 15 s: a stream that is silent for longer is dead.
SILENCE_S: Final = 45.0
# Once a stream was there: whoever follows wants it back, however long that takes.
RECONNECT: Final = RetryPolicy(total_s=None)
_KIND: Final = "text/event-stream"
_LINE_BYTES: Final = 16 << 20  # no event is nearly as long

_decode: Final = msgspec.json.Decoder(StreamedEvent).decode


class EventSubscription:
    """One stream of events, over as many connections as it takes.

    `position`: every event up to this number was read, if it was wanted; None before the first connection.
    """

    def __init__(
        self,
        path: str,
        *,
        queue: str | Iterable[str] | None = None,
        job_id: str | Iterable[str] | None = None,
        type: str | Iterable[str] | None = None,
        after: int | None = None,
        last: int | None = None,
        follow: bool = True,
    ) -> None:
        self.position = after
        self.follow = follow
        self._path = path
        self._filters = {"queue": _joined(queue), "job_id": _joined(job_id), "type": _joined(type)}
        self._last = last
        self._rest = b""
        self._next_position = after
        self._data = b""

    def request(self) -> ApiRequest[bytes]:
        """What to send for a new connection: it goes on where the last one broke off."""
        self._rest, self._data, self._next_position = b"", b"", self.position
        last = self._last if self.position is None else None
        follow = None if self.follow else "false"
        asked = get(self._path, bytes, last_event_id=self.position, last=last, follow=follow, **self._filters)
        return ApiRequest(asked.method, asked.path, asked.read, headers={"Accept": _KIND})

    def begin(self, reply: ApiResponse) -> None:
        """Look at the head of the answer. `body` is needed of a refusal only. Raises the JobdError that it says."""
        if reply.status >= 400:
            raise_error(reply)
        kind = reply.headers.get("content-type", "")
        if reply.status != 200 or not kind.startswith(_KIND):
            raise BadAnswer(
                f"HTTP {reply.status} with {kind or 'nothing'} is no stream of events.", status=reply.status
            )

    def read(self, piece: bytes) -> list[StreamedEvent]:
        """The events that end in `piece`. Raises BadAnswer where it cannot be read."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        if len(self._rest) > _LINE_BYTES:
            raise BadAnswer("The stream of events has a line without an end.")
        return [event for line in lines if (event := self._take(line.rstrip(b"\r"))) is not None]

    def _take(self, line: bytes) -> StreamedEvent | None:
        """A field of the event that is coming, or the empty line that ends it."""
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"id" and value.isdigit():
            self._next_position = int(value)
        elif name == b"data":
            self._data = value
        elif not line:
            data, self._data, self.position = self._data, b"", self._next_position
            return self._event(data) if data else None
        return None

    def _event(self, data: bytes) -> StreamedEvent:
        try:
            return _decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadAnswer(f"An event of the stream cannot be read ({error}).") from error


def _joined(names: str | Iterable[str] | None) -> str | None:
    """A filter as the wire has it; one without names filters nothing."""
    text = names if names is None or isinstance(names, str) else ",".join(names)
    return text or None
