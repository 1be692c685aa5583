"""Serve an app with aiohttp: the admin listener, whose speed does not matter.

The parser of aiohttp rejects malformed heads, as docs/decisions/http-listeners.md lists them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Final, cast

import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from msgspec.structs import replace

from jobd.engine.unread_responses import UnreadResponses
from jobd.http.http_app import HttpApp
from jobd.http.parser import LONG_LINE, PIECE_BYTES, WRONG_HEAD, MalformedRequest, malformed_request
from jobd.http.read_deadline import pieces, read_deadline, slow_client
from jobd.http.request import BodyError, RequestContext, add_header, announces_body, without_authority
from jobd.http.response import HttpResponse
from jobd.http.server import HttpListener
from jobd.http.worker_connection import LINGER_S

CANCEL_GRACE_S: Final = 0.1  # for cancelled handlers, after the deadline of a stop
# aiohttp drops input behind an upgrade that it does not support, and adds a trailer of a body to the next head.
ENDING_HEADERS: Final = ("transfer-encoding", "upgrade")

log = structlog.get_logger("jobd.web")


class AdminRequest(RequestContext, eq=False):
    """A request on the admin listener."""

    _request: web.BaseRequest = cast(Any, None)

    @classmethod
    def of(cls, request: web.BaseRequest) -> AdminRequest:
        headers: dict[str, bytes] = {}
        fields = [(name.lower().decode("utf-8", "surrogateescape"), value) for name, value in request.raw_headers]
        repeated = [name for name, value in fields if add_header(headers, name, value)]
        target = request.raw_path
        path, _, query = (target if target.startswith("/") else without_authority(target, headers)).partition("?")
        return cls(
            request.method,
            path,
            query,
            headers,
            frozenset(repeated),
            f"{request.version.major}.{request.version.minor}",
            request.keep_alive and request.method != "CONNECT" and headers.keys().isdisjoint(ENDING_HEADERS),
            announces_body(headers),
            _request=request,
        )

    @property
    def transport(self) -> asyncio.Transport | None:
        return self._request.transport

    @property
    def is_complete(self) -> bool:
        return self._request.content.is_eof()

    async def read(self) -> bytes:
        await asyncio.sleep(0)  # aiohttp parses more of its input in `readany`: other connections must have their turn
        try:
            return await self._request.content.readany()
        except web.RequestPayloadError:
            raise BodyError from None

    async def drop_body(self) -> None:
        """Read the rest of a body that is not wanted. Without that, the client might not get the response."""
        with contextlib.suppress(TimeoutError, BodyError):
            async with asyncio.timeout(LINGER_S):
                while not (self.is_complete or self.is_disconnected):
                    await self.read()

    async def drain(self) -> None:
        await cast(_AdminConnection, self._request.protocol).drained.wait()

    async def respond(self, response: HttpResponse | None, unread: UnreadResponses) -> None:
        """Send a complete response. Aborts the connection of a client that does not read it.

        While the client reads, only the transport keeps the bytes: the caller must not keep the response.
        """
        if response is None:
            return
        data, transport = response.encode(self), self.open_transport()
        response = replace(response, body=b"")
        if self.is_streamed:  # too late for a response
            transport.abort()
            return
        self.keep_alive &= not response.close
        try:
            async with read_deadline(transport, unread, len(data)) as extend:
                parts = pieces(transport, data)
                del data
                for part in parts:
                    transport.write(part)
                    del part
                    await self.drain()
                    extend()
        except TimeoutError:
            log.warning("response_cut_off", reason=slow_client(), by=self.by)
            transport.abort()
        if response.close_at_once:
            transport.close()


class _Sent(web.StreamResponse):
    """Tell aiohttp that the response is sent, and whether the connection stays open."""

    def __init__(self, ctx: RequestContext) -> None:
        super().__init__()
        self._ctx = ctx

    @property
    def keep_alive(self) -> bool:
        return self._ctx.keep_alive

    async def prepare(self, request: web.BaseRequest) -> None:
        pass

    async def write_eof(self, data: bytes = b"") -> None:
        pass


class AdminListener(HttpListener):
    """The listener of the admin API and the dashboard: a server of aiohttp with one handler."""

    def __init__(self, app: HttpApp[Any]) -> None:
        super().__init__(app)
        self._server = web.Server(self._handle, handler_cancellation=True)

    def protocol_factory(self) -> Callable[[], asyncio.Protocol]:
        return partial(_AdminConnection, self._server, self.app)

    @property
    def connections(self) -> int:
        return len(self._server.connections)

    def close_idle(self) -> None:
        busy = {ctx.transport for ctx in self.app.pending}
        for connection in self._server.connections:
            if connection.transport not in busy:  # aiohttp drops the input of a connection that it closes
                connection.close()

    async def close_all(self) -> None:
        await self.abort_all()

    async def abort_all(self) -> None:
        await self._server.shutdown(CANCEL_GRACE_S)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        ctx = AdminRequest.of(request)
        self.app.pending.add(ctx)
        try:
            await ctx.respond(await self._response(ctx), self.app.actor.unread)
        finally:
            self.app.pending.discard(ctx)
        await ctx.drop_body()
        return _Sent(ctx)

    async def _response(self, ctx: AdminRequest) -> HttpResponse | None:
        try:
            return self.app.authorize(ctx) or await self.app.handle(ctx)
        except ConnectionError:
            raise
        except Exception as bug:
            return self.app.bug_response(ctx, bug)


class _AdminConnection(web.RequestHandler):
    """A connection of aiohttp with the errors of the app. Those of aiohttp repeat input, which may contain a token."""

    def __init__(self, server: web.Server, app: HttpApp[Any]) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            access_log=cast(logging.Logger, None),  # aiohttp does not log requests then
            auto_decompress=False,
            keepalive_timeout=app.limits.idle_s,
            lingering_time=0,
            read_bufsize=PIECE_BYTES,
        )
        self.app = app
        self.drained = asyncio.Event()  # unless the client reads too slowly
        self.drained.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if transport.get_extra_info("sslcontext") is None:
            cast(asyncio.Transport, transport).set_write_buffer_limits(0)  # writes show if the client has disconnected
        super().connection_made(transport)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.drained.clear()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.drained.set()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Respond to malformed input. Another error closes the connection."""
        if not isinstance(exc, HttpProcessingError):
            raise exc or TimeoutError
        assert self.transport is not None
        error = MalformedRequest(LONG_LINE if isinstance(exc, LineTooLong) else WRONG_HEAD).error
        malformed = malformed_request(error)
        self.transport.write(self.app.error_response(malformed, error, close=True).encode(malformed))
        return _Sent(malformed)

    def log_exception(self, *_: object, exc_info: BaseException | None = None, **__: object) -> None:
        log.error("connection_bug", error=type(exc_info).__name__)
