"""Serve one connection: parse requests from bytes, and write the responses in the order of the requests.

On the fast path, a request that has arrived completely goes to the actor's mailbox as soon as it is parsed, and its
response is written as soon as the actor returns it. All other requests take the slow path, aiohttp's loop with a task
for each request, which costs twice as much: incomplete bodies, streams, pipelined requests and malformed input.
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
import select
import socket
import struct
import termios
from typing import Any, Final

import structlog
from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import RawRequestMessage
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import RequestHandler

from jobd.engine.mailbox import Envelope
from jobd.http.app import INTERNAL_ERROR, App
from jobd.http.head_cache import HeadCache, is_complete
from jobd.http.request import HttpRequest, RequestContext
from jobd.http.response import HTTP_VERSION, HttpResponse, PreparedResponse, abort_later
from jobd.http.routing import RouteMatch
from jobd.model.errors import ApiError
from jobd.model.responses import Response

# Input of more than PIECE bytes and PIECE_LINES lines is parsed in pieces of PIECE bytes, one per turn of the loop.
PIECE: Final = 16 << 10
PIECE_LINES: Final = 2_000
WRONG_HEAD: Final = (
    "its head or its framing is wrong (a line without a colon or with a forbidden character, a repeated header that "
    "may occur only once, such as Content-Length, or chunks of a wrong length)"
)
# Bytes of request bodies that may wait behind the current request. One read can exceed this.
AHEAD: Final = 256 << 10
# Delay between two checks whether the client has closed a half-closed connection. It doubles up to CHECK_S.
FIRST_CHECK_S: Final = 0.01
CHECK_S: Final = 1.0
# How long a response with grants waits for the client's system to acknowledge the probe, and the polling interval.
PROBE_S: Final = 5.0
PROBE_POLL_S: Final = 0.002

log = structlog.get_logger("jobd.web")


def make_request(
    message: RawRequestMessage,
    payload: StreamReader,
    connection: RequestHandler,
    writer: AbstractStreamWriter,
    task: asyncio.Task[None],
) -> HttpRequest:
    """Make the request object when aiohttp's loop starts to handle a request."""
    assert isinstance(connection, ServerConnection)
    if not payload.is_eof():
        payload.on_eof(connection.free_slot_soon)
    request = HttpRequest(message, payload, connection, writer, task, asyncio.get_running_loop())
    connection.record_start(request)
    return request


class PendingRequest:
    """A request on the fast path. The actor sets its response as it would set the result of a future."""

    __slots__ = (
        "_connection",
        "_is_cancelled",
        "_is_done",
        "ctx",
        "encoded",
        "envelope",
        "probe_timer",
        "response",
        "waiter",
        "write_timer",
    )

    def __init__(self, connection: ServerConnection, ctx: RequestContext, waiter: asyncio.Future[None]) -> None:
        self.ctx = ctx
        self.waiter = waiter  # the future that aiohttp's loop waits for meanwhile
        self.envelope: Envelope | None = None
        self.encoded: tuple[Response, HttpResponse] | None = None  # encoded before its commit
        self.response: HttpResponse | None = None
        self.probe_timer: asyncio.TimerHandle | None = None  # runs while the response waits for the probe
        self.write_timer: asyncio.TimerHandle | None = None  # aborts the connection if the client does not read
        self._connection = connection
        self._is_done = False
        self._is_cancelled = False

    def done(self) -> bool:
        return self._is_done

    def cancelled(self) -> bool:
        return self._is_cancelled

    def prepare(self, response: Response) -> None:
        http_response = self._connection.prepare(self, response)
        self.encoded = None if http_response is None else (response, http_response)

    def set_result(self, response: Response | ApiError, /) -> None:
        self._is_done = True
        self._connection.respond(self, response)

    def cancel(self) -> None:
        """Cancel the request because its connection is lost."""
        self._is_cancelled = not self._is_done
        self._is_done = True
        if self.write_timer is not None:
            self.write_timer.cancel()
        if self.probe_timer is not None:
            self.probe_timer.cancel()
            assert self.response is not None and self.response.on_lost is not None
            self.response.on_lost()


class ServerConnection(RequestHandler):
    """aiohttp's connection with a fast path, with errors as JSON, and without logged tracebacks.

    `_waiter` belongs to aiohttp: the future that its loop waits for while it is idle, and None while it is busy.
    """

    __slots__ = (
        "_ahead",
        "_hangup_check",
        "_heads",
        "_is_between",
        "_is_half_closed",
        "_latest",
        "_pending",
        "_rest",
        "_truncated",
        "_web",
    )  # fmt: skip

    def __init__(self, manager: web.Server, app: App[Any], heads: HeadCache, **options: Any) -> None:
        super().__init__(manager, **options)
        self._web = app
        self._heads = heads
        self._is_between = True  # all input has been consumed: the next bytes begin a request
        self._pending: PendingRequest | None = None
        self._rest = bytearray()  # input to be parsed in the next turns of the loop
        self._latest: HttpRequest | None = None  # the latest request that aiohttp's loop started
        self._is_half_closed = False  # the client sends no more
        self._truncated: StreamReader | None = None  # the body whose end the client has not sent
        self._ahead = 0  # bytes of the pending response that were sent as a probe
        self._hangup_check: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Set the write buffer limits to 0, so that `writing_paused` reveals a client that reads slowly.

        A closed transport waits forever for its unsent data. TLS transports have a deadline for that.
        """
        super().connection_made(transport)
        if transport.get_extra_info("sslcontext") is None:
            assert self.transport is not None
            self.transport.set_write_buffer_limits(0)

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Parse data, in pieces if it has very many lines (such as chunks of one byte), so that other tasks run."""
        if not data or (not self._rest and (len(data) <= PIECE or data.count(b"\r\n") <= PIECE_LINES)):
            self._parse(data)
            return
        is_first = not self._rest
        self._rest += data
        if is_first:
            self._feed()

    def _feed(self) -> None:
        transport = self.transport
        piece = bytes(self._rest[:PIECE])
        del self._rest[:PIECE]
        if transport is not None:
            self._parse(piece)
        if transport is None or transport.is_closing():
            self._rest.clear()
        elif self._rest:
            transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._feed)
        elif not (self._reading_paused or self._buffer_paused):
            transport.resume_reading()

    def _parse(self, data: bytes) -> None:
        """Parse data, with aiohttp's parser if the head is not cached. Start its request on the fast or slow path."""
        waiter = self._waiter
        idle = None if waiter is None or waiter.done() else waiter
        if idle is not None and self._is_between and (cached := self._heads.read(data)) is not None:
            ctx = RequestContext(cached.method, cached.target, cached.head, self)
            if self._dispatch(ctx, cached.body):
                return
        before = len(self._messages)
        self._waiter = None  # aiohttp must not wake its loop before the path is chosen
        super().data_received(data)
        self._waiter = waiter
        if len(self._messages) > before and not isinstance(self._messages[-1][0], RawRequestMessage):
            self._keep_earlier()
            self._break_body()
        if self._messages and idle is None and not self._buffer_paused and self._is_far_ahead():
            self._pause_reading_for_buffer()
        is_one = len(self._messages) == before + 1
        self._is_between = self._is_between and is_one and self._heads.learn(data, *self._messages[-1])
        if idle is not None and self._messages and not (is_one and self._dispatch_parsed()):
            idle.set_result(None)

    def _keep_earlier(self) -> None:
        """Put requests that arrived in one segment with a malformed one before its error, to respond to them first.

        A request with an incomplete body, or with a transfer coding other than chunked, is the malformed one itself.
        """
        error = self._messages.pop()
        self._messages += _take_parsed(self._parser)
        if self._messages:
            message, payload = self._messages[-1]
            is_coded = isinstance(message, RawRequestMessage) and hdrs.TRANSFER_ENCODING in message.headers
            if not payload.is_eof() or (is_coded and payload is EMPTY_PAYLOAD):
                self._messages.pop()
        self._messages.append(error)

    def _break_body(self) -> None:
        """Fail the body that is being read, because the input is malformed. aiohttp's parser does not do that."""
        request = self._current_request
        if request is not None and not request.content.is_eof():
            request.content.set_exception(web.RequestPayloadError("the framing is broken"))
            request.content.feed_eof()  # aiohttp would read and drop the rest of the body
            self.close()

    def _is_far_ahead(self) -> bool:
        """Return whether the waiting requests have more than AHEAD bytes of bodies.

        aiohttp limits the number of waiting requests to 32, but not the bytes of their bodies.
        """
        return sum(payload.total_bytes for _, payload in self._messages) > AHEAD

    def _resume_reading_if_drained(self) -> None:
        """Resume reading after aiohttp's loop has taken a waiting request, unless too many bytes still wait."""
        if not self._is_far_ahead():
            super()._resume_reading_if_drained()

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Resume reading only if it is paused, because each read of a body calls this and runs the parser."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def free_slot_soon(self) -> None:
        """Call `_free_slot` after the parser has returned."""
        self._loop.call_soon(self._free_slot)

    def _free_slot(self) -> None:
        """Tell the parser that a request was consumed whose body has just arrived completely.

        aiohttp's parser stops at 32 waiting requests. It counts a request when its body is complete, and uncounts it
        when the loop starts the request. A request that was started before that would stay counted forever.
        """
        if self._parser is not None:
            self._parser.message_consumed()
            self._parse(b"")

    # -- half-closed connections ---------------------------------------------------------------------------------------

    def eof_received(self) -> bool:  # type: ignore[override]
        """Answer the requests that have arrived, then close. TLS has no half-closed state and closes at once.

        A client that has closed its socket must not keep a grant. A Unix socket distinguishes closed from half-closed
        clients. TCP does so only after a write: a closed client resets the connection. So the bytes with which every
        response begins are sent at once as a probe. A response with grants continues only after the client's system has
        acknowledged the probe; if nothing more of it was written, its grants are released.
        """
        transport = self.transport
        if transport is None or transport.get_extra_info("sslcontext") is not None:
            return False
        if self._is_half_closed:  # asyncio calls this again when reading resumes
            return True
        if self._is_idle() or self._is_hung_up(transport):
            return False
        self._is_half_closed = True
        self._truncate_body()
        self._close_after_last()
        if transport.get_extra_info("socket").family != socket.AF_UNIX:
            self._send_probe(transport)
        self._check_later(FIRST_CHECK_S)
        return True

    def record_start(self, request: HttpRequest) -> None:
        """Record that aiohttp's loop starts `request`."""
        self._latest = request
        if self._is_half_closed:
            request.is_truncated = request.content is self._truncated
            self._close_after_last()

    def _is_idle(self) -> bool:
        """Return whether no request is in progress or waiting. An incomplete head does not count."""
        if self._pending is not None or self._messages:
            return False
        return self._latest is None or (self._waiter is not None and not self._waiter.done())

    def _truncate_body(self) -> None:
        """End an incomplete body."""
        request = self._latest if self._pending is None and not self._messages else None
        payload = self._messages[-1][1] if self._messages else None if request is None else request.content
        if payload is None or payload.is_eof():
            return
        self._truncated = payload
        if request is not None:
            request.is_truncated = True
        payload.feed_eof()

    def _close_after_last(self) -> None:
        """Make aiohttp's loop end after the current request, unless others wait."""
        if not self._messages and not self._message_tail:
            self.close()

    def _send_probe(self, transport: asyncio.Transport) -> None:
        """Send the next bytes of the current response that are known already, so that a closed client resets."""
        if self._pending is not None:
            if self._pending.response is None:
                self._ahead = len(HTTP_VERSION)
                transport.write(HTTP_VERSION)
        elif self._latest is not None and self._latest.probe:
            transport.write(self._latest.probe)
            self._latest.ahead, self._latest.probe = len(self._latest.probe), b""
            self._latest.probed = self.wait_for_probe

    def _check_later(self, delay_s: float) -> None:
        self._hangup_check = self._loop.call_later(delay_s, self._check_hangup, delay_s)

    def _check_hangup(self, delay_s: float) -> None:
        """Abort if the client has closed. asyncio does not watch a connection after its end of file."""
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        if self._is_hung_up(transport):
            transport.abort()
        else:
            self._check_later(min(2 * delay_s, CHECK_S))

    @staticmethod
    def _is_hung_up(transport: asyncio.Transport) -> bool:
        """Return whether the client has closed its Unix socket, or reset the TCP connection."""
        poll = select.poll()
        poll.register(transport.get_extra_info("socket").fileno(), 0)
        return bool(poll.poll(0))

    async def wait_for_probe(self, transport: asyncio.Transport) -> None:
        """Wait until the client's system has acknowledged the probe, or the connection is gone."""
        ends_at_s = self._loop.time() + PROBE_S
        while self._is_probing(transport):
            if self._loop.time() >= ends_at_s:
                transport.abort()
            else:
                await asyncio.sleep(PROBE_POLL_S)

    def _is_probing(self, transport: asyncio.Transport) -> bool:
        """Return whether the client's system has neither acknowledged all sent bytes nor reset the connection."""
        if transport.is_closing() or self._is_hung_up(transport):
            return False
        count = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        return bool(struct.unpack("i", count)[0])

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._hangup_check is not None:
            self._hangup_check.cancel()
        super().connection_lost(exc)
        self._latest = None  # it refers to this connection: break the cycle

    # -- fast path -----------------------------------------------------------------------------------------------------

    def _dispatch_parsed(self) -> bool:
        """Dispatch the only parsed request, if it is complete and may take the fast path. Return whether it was."""
        message, payload = self._messages[0]
        if not is_complete(message, payload) or message.upgrade:
            return False
        return self._dispatch(RequestContext.of(message, payload, self))

    def _dispatch(self, ctx: RequestContext, body: bytes | None = None) -> bool:
        """Dispatch a request on the fast path unless its route has a handler. `body` None: take the parsed body."""
        match = self._web.match(ctx)
        if match.resolved is not None and match.resolved.route.handler is not None:
            return False
        assert self._waiter is not None
        pending = self._pending = PendingRequest(self, ctx, self._waiter)
        self._waiter = None
        self._request_in_progress = True
        self._send(pending, match, self._parsed_body() if body is None else body)
        return True

    def _parsed_body(self) -> bytes:
        assert self._parser is not None
        _, payload = self._messages.popleft()
        self._parser.message_consumed()
        return payload.read_nowait()

    def _send(self, pending: PendingRequest, match: RouteMatch, body: bytes) -> None:
        try:
            result = self._web.send(pending.ctx, match, body, pending)
        except Exception as bug:
            result = self._error_response(pending.ctx, bug)
        if isinstance(result, Envelope):
            pending.envelope = result
        else:
            self._write(pending, result)

    def prepare(self, pending: PendingRequest, response: Response) -> HttpResponse | None:
        return self._web.prepare(pending.ctx, response)

    def respond(self, pending: PendingRequest, response: Response | ApiError) -> None:
        """Write the actor's response. Raises nothing, because the actor is not concerned by errors here."""
        if pending.encoded is not None and pending.encoded[0] is response and not self._web.closing:
            self._write(pending, pending.encoded[1])
            return
        try:
            http_response = self._web.respond(pending.ctx, response)
        except Exception as bug:
            self._loop.call_soon(self._fail, pending, bug)
        else:
            self._write(pending, http_response)

    def _fail(self, pending: PendingRequest, bug: Exception) -> None:
        if self._pending is pending:
            self._write(pending, self._error_response(pending.ctx, bug))

    def _write(self, pending: PendingRequest, http_response: HttpResponse, timeout_s: float = PROBE_S) -> None:
        pending.response, pending.probe_timer = http_response, None
        transport = self.transport
        if self._ahead and http_response.on_lost is not None and transport is not None and self._is_probing(transport):
            if timeout_s > 0:
                pending.probe_timer = self._loop.call_later(
                    PROBE_POLL_S, self._write, pending, http_response, timeout_s - PROBE_POLL_S
                )
                return
            transport.abort()
        if http_response.write(transport, self._ahead) and self.writing_paused:
            assert transport is not None
            pending.write_timer = abort_later(transport)
        else:
            self._finish(pending)

    def resume_writing(self) -> None:
        super().resume_writing()
        pending = self._pending
        if pending is not None and pending.write_timer is not None:
            pending.write_timer.cancel()
            self._finish(pending)

    def _finish(self, pending: PendingRequest) -> None:
        """Return the connection to aiohttp's loop, which handles the requests that have arrived meanwhile."""
        self._end_pending(pending)
        self._waiter = pending.waiter
        if pending.response is None or pending.response.close or self._close or self._force_close:
            self.force_close()
        elif self._messages:
            pending.waiter.set_result(None)
        else:
            self._arm_keepalive()

    def _arm_keepalive(self) -> None:
        """Start the timer that closes an idle connection."""
        closes_at = self._loop.time() + self._keepalive_timeout
        self._next_keepalive_close_time = closes_at
        if self._keepalive_handle is None:
            self._keepalive_handle = self._loop.call_at(closes_at, self._process_keepalive)

    def _end_pending(self, pending: PendingRequest) -> None:
        pending.envelope = None  # break the reference cycle, or only the garbage collector would free requests
        self._pending = None
        self._ahead = 0
        self._request_in_progress = False
        if self._handler_waiter is not None and not self._handler_waiter.done():  # a shutdown waits for it
            self._handler_waiter.set_result(None)
        self._web.request_finished()

    # -- closing -------------------------------------------------------------------------------------------------------

    def force_close(self) -> None:
        """Close the connection, and cancel a request on the fast path. aiohttp calls this after a disconnect, too."""
        pending = self._pending
        if pending is not None:
            envelope = pending.envelope
            pending.cancel()
            self._end_pending(pending)
            if pending.cancelled() and envelope is not None:
                self._web.actor.abandon(envelope)
        super().force_close()

    def close_if_idle(self) -> None:
        """Close the connection if no request, or only a part of its head, has arrived."""
        if self._waiter is not None and not self._waiter.done():
            self.force_close()

    # -- errors --------------------------------------------------------------------------------------------------------

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Return the response to malformed HTTP, or to a bug."""
        assert isinstance(request, HttpRequest)
        if isinstance(exc, ConnectionError):
            raise exc
        return PreparedResponse(self._error_response(request.ctx, exc), request)

    def _error_response(self, ctx: RequestContext, exc: BaseException | None) -> HttpResponse:
        """Return the response to an error. It omits the text of `exc`, which may contain a token."""
        if isinstance(exc, HttpProcessingError):
            line = f"a line of its head is over {self.max_line_size} bytes"
            why = line if isinstance(exc, LineTooLong) else WRONG_HEAD
            error = ApiError("invalid_request", f"The request is not valid HTTP/1.1: {why}.")
        else:
            self.log_exception("connection_bug", exc_info=exc)
            error = INTERNAL_ERROR
        return self._web.error_response(ctx, error, close=True)

    def log_exception(self, *args: Any, **kw: Any) -> None:
        exc = kw.get("exc_info")
        log.error("connection_bug", error=type(exc).__name__)

    def log_debug(self, *args: Any, **kw: Any) -> None:
        """Drop aiohttp's messages about clients that disconnected."""


def _take_parsed(parser: object) -> list[tuple[RawRequestMessage, StreamReader]]:
    """Take the requests that aiohttp's parser has read before the malformed one.

    The parser holds them in an internal list and does not return them when it raises. Emptying the list
    prevents reading them twice.
    """
    for kept in gc.get_referents(parser):
        if isinstance(kept, list) and kept and isinstance(kept[0], tuple) and type(kept[0][0]) is RawRequestMessage:
            taken = kept[:]
            kept.clear()
            return taken
    return []
