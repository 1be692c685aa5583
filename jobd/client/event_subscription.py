"""Subscriptions to events, without IO: the request, the reading of a stream, and the position to resume from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Final

import msgspec

from jobd.client.api_request import ApiRequest, ApiResponse, build, raise_error
from jobd.client.errors import BadResponse, JobdError
from jobd.client.retries import RetryOptions
from jobd.model.api_call import EVENT_STREAM, ApiCall
from jobd.model.events import StreamedEvent

# The daemon sends something at least every 15 s: a stream that is idle for longer is dead.
SILENCE_S: Final = 45.0
NODE_SILENCE_S: Final = 20.0  # of one of several nodes, as another may be the leader by now
# A lost stream is reconnected without a time limit.
RECONNECT: Final = RetryOptions(total_s=None)
_LINE_BYTES: Final = 16 << 20  # far above the longest event

_decode: Final = msgspec.json.Decoder(StreamedEvent).decode


class EventSubscription:
    """One stream of events, over one or more connections.

    `position` is the number of the last event that was read or skipped; None before the first connection.
    """

    def __init__(
        self,
        call: ApiCall[Any, Any],
        *,
        queue: str | Iterable[str] | None = None,
        job_id: str | Iterable[str] | None = None,
        type: str | Iterable[str] | None = None,
        after: int | None = None,
        last: int | None = None,
        follow: bool = True,
        on_lost: Callable[[JobdError], None] | None = None,
    ) -> None:
        self.position = after
        self.follow: Final = follow
        self.on_lost: Final = on_lost
        self._call = call
        self._filters = {"queue": _joined(queue), "job_id": _joined(job_id), "type": _joined(type)}
        self._last = last
        self._rest = b""
        self._next_position = after
        self._data = b""

    def request(self) -> ApiRequest[bytes]:
        """Return the request for a new connection. It resumes where the last one ended."""
        self._rest, self._data, self._next_position = b"", b"", self.position
        last = self._last if self.position is None else None
        follow = None if self.follow else "false"
        fields = {"last_event_id": self.position, "last": last, "follow": follow, **self._filters}
        return replace(build(self._call, fields, shape=bytes), headers={"Accept": EVENT_STREAM})

    def begin(self, response: ApiResponse) -> None:
        """Check the head of the response; only an error needs its `body`. Raises the JobdError in it."""
        if response.status >= 400:
            raise_error(response)
        content_type = response.headers.get("content-type", "")
        if response.status != 200 or not content_type.startswith(EVENT_STREAM):
            raise BadResponse(
                f"HTTP {response.status} with content type {content_type!r} is not a stream of events.",
                status=response.status,
            )

    def read(self, chunk: bytes) -> list[StreamedEvent]:
        """Return the events that end in `chunk`. Raises BadResponse if it cannot be read."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if len(self._rest) > _LINE_BYTES:
            raise BadResponse("The stream of events has a line without an end.")
        return [event for line in lines if (event := self._read_line(line.rstrip(b"\r"))) is not None]

    def _read_line(self, line: bytes) -> StreamedEvent | None:
        """Read a field of the current event, or the empty line that ends it."""
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
            raise BadResponse(f"An event of the stream cannot be read ({error}).") from error


def _joined(names: str | Iterable[str] | None) -> str | None:
    """Return a filter as the API takes it. An empty one selects everything."""
    text = names if names is None or isinstance(names, str) else ",".join(names)
    return text or None
