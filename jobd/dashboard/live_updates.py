"""A stream that tells an open page when there is news for it: that, and never what it is; the page then asks itself.

So nobody gets anything by it that he would not get without. It ends with the session that opened it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final
from urllib.parse import urlencode

import msgspec
import structlog
from aiohttp import hdrs, web

from jobd.api.events import EVENT_STREAM
from jobd.api.services import Services
from jobd.dashboard.context import Viewer
from jobd.dashboard.rendering import HEADERS
from jobd.engine.change_watchers import Watcher
from jobd.engine.event_feed import HEARTBEAT_S, RETRY_MS
from jobd.http.app import App
from jobd.http.request import RequestContext
from jobd.http.response import SAFE_HEADERS, RawBody
from jobd.http.streaming import probe_for_hangup, write
from jobd.model.commands import Command
from jobd.model.errors import ApiException, api_error
from jobd.model.job import JobId, QueueName
from jobd.model.responses import Response

# Between two pieces of news, however much happens: a page costs the daemon some ms.
MIN_INTERVAL_S: Final = 1.0
MIN_LIST_INTERVAL_S: Final = 2.0  # where the page is about more than one job
SESSION_CHECK_S: Final = 5.0  # after this time at most an ended session ends its stream

log = structlog.get_logger("jobd.dashboard")


class Subscription(Command, frozen=True, kw_only=True):
    """News of a job, of a queue, or of everything."""

    job_id: JobId | None = None
    queue: QueueName | None = None


def live_url(live: Subscription) -> str:
    """The address at which a page hears of it."""
    given = {name: value for name, value in msgspec.structs.asdict(live).items() if value is not None}
    return f"/live?{urlencode(given)}" if given else "/live"


async def live_stream(
    site: App[Services], visit: RequestContext, asked: Subscription, viewer: Callable[[], Viewer | None]
) -> web.StreamResponse | Response:
    """The stream. `viewer` says who asks, as of now."""
    if not _is_signed_in(viewer):
        raise api_error("unauthorized", "Nobody is signed in here.")
    if visit.method == hdrs.METH_HEAD:
        return Response(RawBody(EVENT_STREAM, b"", HEADERS))
    transport, request = visit.connection.transport, visit.request
    if transport is None or request is None:
        raise ConnectionResetError("the client is gone")
    watcher = site.services.feed.watch(queue=asked.queue, job_id=asked.job_id, cut=transport.abort)
    try:
        response = web.StreamResponse(
            headers={"Content-Type": EVENT_STREAM, "Server": "jobd", **SAFE_HEADERS, **HEADERS}
        )
        await response.prepare(request)
        probe_for_hangup(request, response)
        floor_s = MIN_LIST_INTERVAL_S if asked.job_id is None else MIN_INTERVAL_S
        try:
            await _send_events(response, watcher, viewer, floor_s)
            await response.write_eof()
        except Exception as error:
            if not (isinstance(error, ConnectionError) and visit.is_disconnected):  # then the page is closed
                log.info("live_cut_off", error=type(error).__name__)
            transport.abort()
            raise ConnectionResetError("live stream cut off") from None
        return response
    finally:
        watcher.leave()


async def _send_events(
    response: web.StreamResponse, watcher: Watcher, viewer: Callable[[], Viewer | None], floor_s: float
) -> None:
    clock = asyncio.get_running_loop().time
    await write(response, b"retry: %d\nevent: live\ndata:\n\n" % RETRY_MS)
    spoke_s = clock()
    while not watcher.over.is_set():
        has_news = await _wait(watcher.news, SESSION_CHECK_S)
        if not _is_signed_in(viewer):
            await write(response, b"event: end\ndata:\n\n")
            return
        if has_news and not watcher.over.is_set():
            watcher.news.clear()
            await write(response, b"event: change\ndata:\n\n")
            spoke_s = clock()
            await _wait(watcher.over, floor_s)
        elif clock() - spoke_s >= HEARTBEAT_S:
            await write(response, b": still here\n\n")
            spoke_s = clock()


async def _wait(happened: asyncio.Event, at_most_s: float) -> bool:
    """Whether it has, after this time at most."""
    try:
        async with asyncio.timeout(at_most_s):
            return await happened.wait()
    except TimeoutError:
        return False


def _is_signed_in(viewer: Callable[[], Viewer | None]) -> bool:
    """Whether who asked is still somebody. This is a look at the page, so the session does not end by idleness."""
    try:
        return viewer() is not None
    except ApiException:  # a token that is valid no more
        return False
