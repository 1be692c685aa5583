"""Stream events as Server-Sent Events, as fast as the client reads."""

from __future__ import annotations

from typing import Final, get_args

import structlog

from jobd.api.services import Services
from jobd.engine.event_feed import Subscriber
from jobd.http.http_app import HttpApp
from jobd.http.read_deadline import slow_client
from jobd.http.request import RequestContext
from jobd.http.response import SAFE_HEADERS
from jobd.http.streaming import finish, write
from jobd.model.api_call import EVENT_STREAM
from jobd.model.commands import MAX_NAMES
from jobd.model.errors import ApiException, invalid_request_error
from jobd.model.events import EventFilter, EventType
from jobd.model.job import is_job_id
from jobd.model.requests import MAX_NUMBER, EventsRequest

LAST_EVENT_ID: Final = "last-event-id"
# X-Accel-Buffering: otherwise nginx would delay events until its buffer is full.
STREAM_HEADERS: Final = {"Content-Type": EVENT_STREAM, "X-Accel-Buffering": "no", **SAFE_HEADERS}
_TYPES: Final = frozenset(get_args(EventType))

log = structlog.get_logger("jobd.web")


async def send_events(app: HttpApp[Services], ctx: RequestContext, query: EventsRequest) -> None:
    """Send the stream until the client disconnects or the daemon stops. Disconnects a client that reads too slowly."""
    event_filter, after = _event_filter(query), _after(query, ctx)
    subscriber = app.services.feed.listen(event_filter, follow=query.follow, cut=ctx.abort)
    try:
        first = await subscriber.begin(after, query.last or 0)
        ctx.start(STREAM_HEADERS)
        await _send_pieces(ctx, first, subscriber)
    finally:
        subscriber.leave()


async def _send_pieces(ctx: RequestContext, first: bytes, subscriber: Subscriber) -> None:
    piece = first
    try:
        while piece:
            await write(ctx, piece)
            piece = await subscriber.more()
        await finish(ctx)
    except Exception as error:
        # Too late for an error response. The client receives the error when it reconnects.
        _log_end(error, ctx)
        ctx.abort()
        raise ConnectionResetError("event stream cut off") from None


def _log_end(error: Exception, ctx: RequestContext) -> None:
    match error:
        case ApiException():
            log.info("event_stream_cut_off", reason=error.error.code)
        case TimeoutError():
            log.info("event_stream_cut_off", reason=slow_client())
        case ConnectionError() if ctx.is_disconnected:
            pass
        case _:
            log.error("event_stream_cut_off", error=type(error).__name__)


def _after(query: EventsRequest, ctx: RequestContext) -> int | None:
    """Return the event after which to continue. When a browser reconnects, it sends the header and the same query."""
    header = ctx.header(LAST_EVENT_ID).strip()
    if header:
        # Check the length first, because int() raises another error for thousands of digits.
        if (
            not (header.isascii() and header.isdigit())
            or len(header) > len(str(MAX_NUMBER))
            or int(header) > MAX_NUMBER
        ):
            raise invalid_request_error("Last-Event-ID", "must be the `id` of an event. To begin now, omit it.")
        return int(header)
    if query.last_event_id is not None and query.last is not None:
        raise invalid_request_error("$.last", "cannot be combined with `last_event_id`. Send one of them.")
    return query.last_event_id


def _event_filter(query: EventsRequest) -> EventFilter:
    types = _names("type", query.type)
    if unknown := sorted(types - _TYPES):
        raise invalid_request_error(
            "$.type", f"{unknown[0][:80]!r} is not an event type. Known types: {', '.join(sorted(_TYPES))}."
        )
    return EventFilter(_ids("queue", query.queue), _ids("job_id", query.job_id), types)


def _ids(field: str, text: str | None) -> frozenset[str]:
    names = _names(field, text)
    if not all(map(is_job_id, names)):
        raise invalid_request_error(
            f"$.{field}", "must be names, separated by commas, of 1 to 200 characters of A-Z a-z 0-9 . _ : - each."
        )
    return names


def _names(field: str, text: str | None) -> frozenset[str]:
    names = frozenset(text.split(",")) if text else frozenset()
    if len(names) > MAX_NAMES:
        raise invalid_request_error(f"$.{field}", f"must not have more than {MAX_NAMES} names.")
    return names
