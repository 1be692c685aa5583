"""Stream to open pages when something has changed. The page then requests its own update.

Events carry no data, so the stream discloses nothing. It ends with the session that opened it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final
from urllib.parse import urlencode

import msgspec
import structlog

from jobd.api.services import Services
from jobd.dashboard.context import Viewer
from jobd.dashboard.rendering import HEADERS
from jobd.engine.change_watchers import Watcher
from jobd.engine.event_feed import HEARTBEAT_S, RETRY_MS
from jobd.http.http_app import HttpApp
from jobd.http.request import RequestContext
from jobd.http.response import SAFE_HEADERS, RawBody
from jobd.http.streaming import finish, write
from jobd.model.api_call import EVENT_STREAM
from jobd.model.commands import Command
from jobd.model.errors import ApiException, api_error
from jobd.model.fields import JobId, QueueName
from jobd.model.responses import Response

# Minimum time between two events: rendering a page costs the daemon some milliseconds.
MIN_INTERVAL_S: Final = 1.0
MIN_LIST_INTERVAL_S: Final = 2.0  # if the page shows more than one job
SESSION_CHECK_S: Final = 5.0  # a stream outlives its session by at most this

log = structlog.get_logger("jobd.dashboard")


class Subscription(Command, frozen=True, kw_only=True):
    """Subscribe to changes of one job, of one queue, or of everything."""

    job_id: JobId | None = None
    queue: QueueName | None = None


def live_url(subscription: Subscription) -> str:
    fields = {name: value for name, value in msgspec.structs.asdict(subscription).items() if value is not None}
    return f"/live?{urlencode(fields)}" if fields else "/live"


async def live_stream(
    app: HttpApp[Services],
    context: RequestContext,
    subscription: Subscription,
    current_viewer: Callable[[], Viewer | None],
) -> Response | None:
    """Stream events until the page closes or `current_viewer` is no longer signed in."""
    if not _is_signed_in(current_viewer):
        raise api_error("unauthorized", "Sign in first.")
    if context.method == "HEAD":
        return Response(RawBody(EVENT_STREAM, b"", HEADERS))
    watcher = app.services.feed.watch(queue=subscription.queue, job_id=subscription.job_id, cut=context.abort)
    try:
        context.start({"Content-Type": EVENT_STREAM, **SAFE_HEADERS, **HEADERS})
        interval_s = MIN_LIST_INTERVAL_S if subscription.job_id is None else MIN_INTERVAL_S
        try:
            await _send_events(context, watcher, current_viewer, interval_s)
            await finish(context)
        except Exception as error:
            if not (isinstance(error, ConnectionError) and context.is_disconnected):  # else the page was closed
                log.info("live_cut_off", error=type(error).__name__)
            context.abort()
            raise ConnectionResetError("live stream cut off") from None
        return None
    finally:
        watcher.leave()


async def _send_events(
    context: RequestContext,
    watcher: Watcher,
    current_viewer: Callable[[], Viewer | None],
    interval_s: float,
) -> None:
    clock = asyncio.get_running_loop().time
    await write(context, b"retry: %d\nevent: live\ndata:\n\n" % RETRY_MS)
    last_sent_s = clock()
    while not watcher.ended.is_set():
        has_changed = await _wait(watcher.changed, SESSION_CHECK_S)
        if not _is_signed_in(current_viewer):
            await write(context, b"event: end\ndata:\n\n")
            return
        if has_changed and not watcher.ended.is_set():
            watcher.changed.clear()
            await write(context, b"event: change\ndata:\n\n")
            last_sent_s = clock()
            await _wait(watcher.ended, interval_s)
        elif clock() - last_sent_s >= HEARTBEAT_S:
            await write(context, b": keep-alive\n\n")
            last_sent_s = clock()


async def _wait(event: asyncio.Event, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            return await event.wait()
    except TimeoutError:
        return False


def _is_signed_in(current_viewer: Callable[[], Viewer | None]) -> bool:
    """Return whether the viewer is still signed in. This counts as use, so an open page keeps its session alive."""
    try:
        return current_viewer() is not None
    except ApiException:  # the token was revoked
        return False
