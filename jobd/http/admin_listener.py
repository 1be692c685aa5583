"""Serve an app with aiohttp: the admin listener, whose speed does not matter."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

import structlog
from aiohttp import web

from jobd.engine.unread_responses import UnreadResponses
from jobd.http.app import SUPPORTED_VERSIONS, App
from jobd.http.hangup import is_hung_up
from jobd.http.parser import AHEAD_BYTES, PIECE_BYTES, MalformedRequest, RequestParser, malformed_request, piece_size
from jobd.http.read_deadline import read_deadline, slow_client
from jobd.http.request import BodyError, RequestContext, add_header, without_authority
from jobd.http.response import HttpResponse
from jobd.http.server import HttpListener
from jobd.http.worker_request import WorkerRequest

LINGER_S: Final = 5.0  # to read the rest of a rejected body, without which the client would not get the response
CANCEL_GRACE_S: Final = 0.1  # for cancelled handlers, after the deadline of a stop
FLUSH_POLL_S: Final = 0.05
SERVER: Final = {"Server": "jobd"}  # in place of the versions of aiohttp and Python


log = structlog.get_logger("jobd.web")


class AdminRequest(RequestContext, eq=False):
    """A request on the admin listener. `streamed` is the response after `start`."""

    _request: web.Request = cast(Any, None)
    streamed: web.StreamResponse | None = None

    @classmethod
    def of(cls, request: web.Request) -> AdminRequest:
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
            request.keep_alive,
            request.can_read_body,
            _request=request,
        )

    @property
    def transport(self) -> asyncio.Transport | None:
        return self._request.transport

    @property
    def is_complete(self) -> bool:
        return self._request.content.is_eof()

    async def read(self) -> bytes:
        try:
            return await self._request.content.readany()
        except web.RequestPayloadError:
            raise BodyError from None

    async def start(self, headers: Mapping[str, str], length: int | None = None) -> None:
        self.streamed = web.StreamResponse(headers={**headers, **SERVER})
        self.streamed.content_length = length
        await self.streamed.prepare(self._request)

    async def write(self, piece: bytes) -> None:
        assert self.streamed is not None
        await self.streamed.write(piece)

    async def finish(self) -> None:
        assert self.streamed is not None
        await self.streamed.write_eof()
        await self._flush()

    async def send(self, response: HttpResponse, unread: UnreadResponses) -> web.StreamResponse:
        """Send a complete response. Aborts the connection of a client that does not read it."""
        made = web.Response(status=response.status, headers={**response.headers, **SERVER}, body=response.body)
        if response.close:
            made.force_close()
        try:
            async with read_deadline(self.transport, unread, len(response.body)):
                await made.prepare(self._request)
                await made.write_eof()
                await self._flush()
        except TimeoutError:
            log.warning("response_cut_off", reason=slow_client(), by=self.by)
            self.abort()
        if response.close_at_once and self.transport is not None:
            self.transport.close()
        return made

    async def _flush(self) -> None:
        """Wait until the system has taken all bytes: a closed transport would wait forever for the client."""
        # aiohttp has no call that waits for an empty buffer.
        while (transport := self.transport) is not None and transport.get_write_buffer_size():  # noqa: ASYNC110
            await asyncio.sleep(FLUSH_POLL_S)


class AdminListener(HttpListener):
    """The listener of the admin API and the dashboard: an application of aiohttp with one handler."""

    def __init__(self, app: App[Any]) -> None:
        super().__init__(app)

        @web.middleware
        async def handle(request: web.Request, handler: object) -> web.StreamResponse:
            return await self._handle(request)

        application = web.Application(middlewares=[handle])  # it also runs for targets without a route, such as *
        application.router.add_route("*", "/{path:[\\s\\S]*}", self._handle, expect_handler=_expect_nothing)
        self.busy: set[object] = set()  # transports with a request in progress
        self._runner = web.AppRunner(
            application,
            access_log=None,
            auto_decompress=False,
            handler_cancellation=True,
            keepalive_timeout=app.limits.idle_s,
            lingering_time=LINGER_S,
            logger=_quiet_logger(),
            read_bufsize=PIECE_BYTES,
            shutdown_timeout=CANCEL_GRACE_S,
        )

    async def protocol_factory(self) -> Callable[[], asyncio.Protocol]:
        if self._runner.server is None:
            await self._runner.setup()
        server = self._runner.server
        assert server is not None
        return lambda: _AdminConnection(self, server())

    @property
    def connections(self) -> int:
        return 0 if self._runner.server is None else len(self._runner.server.connections)

    def close_idle(self) -> None:
        if self._runner.server is not None:
            for connection in self._runner.server.connections:
                if connection.transport not in self.busy:  # aiohttp drops the input of a connection that it closes
                    connection.close()

    async def close_all(self) -> None:
        await self._runner.cleanup()

    async def abort_all(self) -> None:
        await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.transport is not None:
            request.transport.set_write_buffer_limits(0)  # writes show if the client has disconnected
        ctx, transport = AdminRequest.of(request), request.transport
        self.app.pending.add(ctx)
        self.busy.add(transport)
        try:
            response = self.app.authorize(ctx) or await self.app.handle(ctx)
            if response is not None:
                return await ctx.send(response, self.app.actor.unread)
            assert ctx.streamed is not None
            return ctx.streamed
        finally:
            self.busy.discard(transport)
            self.app.pending.discard(ctx)


class _Transport:
    """The transport of a connection, as aiohttp sees it. It reads unless aiohttp or the connection pauses it."""

    def __init__(self, transport: asyncio.Transport, on_resume: Callable[[], None]) -> None:
        self._transport = transport
        self._on_resume = on_resume
        self.is_paused = False  # by aiohttp
        self._is_full = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def pause_reading(self) -> None:
        self.is_paused = True
        self._regulate()

    def resume_reading(self) -> None:
        if self.is_paused:
            self.is_paused = False
            self._regulate()
            self._on_resume()

    def set_full(self, is_full: bool) -> None:
        """Pause reading while too much input waits."""
        if is_full != self._is_full:
            self._is_full = is_full
            self._regulate()

    def _regulate(self) -> None:
        if self.is_paused or self._is_full:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()


class _AdminConnection(asyncio.Protocol):
    """Reject malformed input as the worker listener does, and pass the rest on to the protocol of aiohttp.

    aiohttp would repeat the malformed line, which may contain a token, in its response and in its log. Input of many
    lines is passed on in pieces, one per turn of the loop, so that other connections do not wait for it.
    """

    def __init__(self, listener: AdminListener, protocol: asyncio.Protocol) -> None:
        self._listener = listener
        self._protocol = protocol
        self._loop = asyncio.get_running_loop()
        self._transport: _Transport | None = None
        self._parser = RequestParser(self._add)
        self._held = b""  # input that is not parsed yet
        self._is_scheduled = False
        self._is_ended = False  # the client sends no more
        self._is_broken = False
        self._unsupported: WorkerRequest | None = None  # of another version of HTTP

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = _Transport(cast("asyncio.Transport", transport), self._schedule)
        self._protocol.connection_made(cast("asyncio.Transport", self._transport))

    def data_received(self, data: bytes) -> None:
        if self._is_broken:
            return
        if self._held or piece_size(data) < len(data):
            self._hold(self._held + data)
            self._schedule()
        else:
            self._parse(data)

    def _hold(self, data: bytes) -> None:
        assert self._transport is not None
        self._held = data
        self._transport.set_full(len(data) > AHEAD_BYTES)

    def _schedule(self) -> None:
        """Go on in the next turn of the loop."""
        if self._held and not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        """Parse the next piece of the input that was held, unless aiohttp has not read enough."""
        self._is_scheduled = False
        transport = self._transport
        assert transport is not None
        if not self._held or transport.is_paused or transport.is_closing():
            return
        if is_hung_up(cast("asyncio.Transport", transport)):
            transport.abort()
            return
        size = piece_size(self._held)
        piece = self._held[:size]
        self._hold(self._held[size:])
        self._parse(piece)
        self._schedule()
        if self._is_ended and not self._held:
            transport.close()

    def _parse(self, data: bytes) -> None:
        try:
            self._parser.feed(data)
        except MalformedRequest as malformed:
            self._reject(malformed_request(malformed.error))
            return
        if self._unsupported is not None:
            self._reject(self._unsupported)
        else:
            self._protocol.data_received(data)

    def eof_received(self) -> bool | None:
        """Close the connection, after the input that was held. A TLS connection closes at once."""
        self._is_ended = True
        assert self._transport is not None
        if self._held and self._transport.get_extra_info("sslcontext") is None:
            return True
        return self._protocol.eof_received()

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._held = b""
        self._parser.close()
        self._protocol.connection_lost(exc)

    def _add(self, request: WorkerRequest) -> None:
        request.is_dropped = True  # aiohttp reads the body
        if request.version not in SUPPORTED_VERSIONS:
            self._unsupported = request

    def _reject(self, request: WorkerRequest) -> None:
        """Respond to malformed input, unless a response is in progress, and close the connection."""
        self._is_broken = True
        self._held = b""
        assert self._transport is not None
        if self._transport not in self._listener.busy or self._parser.incoming is not None:
            app = self._listener.app
            response = app.authorize(request) if request.error is None else app.error_response(request, request.error)
            assert response is not None
            request.keep_alive = False
            self._transport.write(response.encode(request))
        self._transport.close()


async def _expect_nothing(request: web.Request) -> None:
    """Leave the Expect header to the app, which sends `100 Continue` once the request is authorized."""


def _quiet_logger() -> logging.Logger:
    """Return aiohttp's logger without the text of exceptions, which may contain a token.

    Bad requests and clients that have disconnected are not logged.
    """
    logger = logging.getLogger("jobd.http.admin")
    if not logger.filters:
        logger.addFilter(_without_exception)
    return logger


def _without_exception(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    record.exc_info = None
    if error is not None:
        record.msg, record.args = f"{record.getMessage()}: {type(error).__name__}", ()
    is_client_error = isinstance(error, web.HTTPException | ConnectionError)
    return not is_client_error and "http_exceptions" not in type(error).__module__
