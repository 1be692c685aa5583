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
from jobd.http.head_cache import Heads, is_whole
from jobd.http.request import HttpRequest, RequestContext
from jobd.http.response import HTTP_VERSION, HttpResponse, PreparedResponse, abort_later
from jobd.http.routing import RouteMatch
from jobd.model.errors import ApiError
from jobd.model.responses import Response

PIECE: Final = 16 << 10  # bytes that are parsed in one turn of the loop, where they have
PIECE_LINES: Final = 2_000  # more lines than this
WRONG_HEAD: Final = (
    "its head or its framing is wrong (a line without a colon or with a forbidden character, a header that may come "
    "only once, such as Content-Length, given twice, chunks of a wrong length)"
)
# Bytes of bodies that are read while another request is being answered, and what one read gives.
AHEAD: Final = 256 << 10
# The delay between two checks whether the client of a half-closed connection has closed it. It doubles.
FIRST_CHECK_S: Final = 0.01
CHECK_S: Final = 1.0
# How long a response with grants waits until the client's system has received the probe, and between two looks at it.
PROBE_S: Final = 5.0
PROBE_LOOK_S: Final = 0.002

log = structlog.get_logger("jobd.web")


def begin(
    message: RawRequestMessage,
    payload: StreamReader,
    connection: RequestHandler,
    writer: AbstractStreamWriter,
    task: asyncio.Task[None],
) -> HttpRequest:
    """A request as aiohttp's loop hands it on."""
    assert isinstance(connection, ServerConnection)
    if not payload.is_eof():
        payload.on_eof(connection.free_place_soon)
    request = HttpRequest(message, payload, connection, writer, task, asyncio.get_running_loop())
    connection.note_begun(request)
    return request


class Flight:
    """A request on its short way. The actor takes it for the future that waits for the answer."""

    __slots__ = (
        "_connection",
        "_is_cancelled",
        "_is_over",
        "asked",
        "ctx",
        "held",
        "idle",
        "ready",
        "reply",
        "unread",
    )  # fmt: skip

    def __init__(self, connection: ServerConnection, ctx: RequestContext, idle: asyncio.Future[None]) -> None:
        self.ctx = ctx
        self.idle = idle  # what aiohttp's loop waits for meanwhile
        self.asked: Envelope | None = None
        self.ready: tuple[Response, HttpResponse] | None = None  # an answer that is not on the disk yet
        self.reply: HttpResponse | None = None
        self.held: asyncio.TimerHandle | None = None  # runs while the reply waits for the end of the probe
        self.unread: asyncio.TimerHandle | None = None  # runs while the client does not read the reply
        self._connection = connection
        self._is_over = False
        self._is_cancelled = False

    def done(self) -> bool:
        return self._is_over

    def cancelled(self) -> bool:
        return self._is_cancelled

    def prepare(self, answer: Response) -> None:
        reply = self._connection.prepared(self, answer)
        self.ready = None if reply is None else (answer, reply)

    def set_result(self, answer: Response | ApiError, /) -> None:
        self._is_over = True
        self._connection.answer(self, answer)

    def cancel(self) -> None:
        """The connection is gone."""
        self._is_cancelled = not self._is_over
        self._is_over = True
        if self.unread is not None:
            self.unread.cancel()
        if self.held is not None:
            self.held.cancel()
            assert self.reply is not None and self.reply.on_lost is not None
            self.reply.on_lost()


class ServerConnection(RequestHandler):
    """aiohttp's connection with a short way, our error object where it would send text, and without its tracebacks.

    `_waiter` is aiohttp's: the future that its loop waits for while nothing is to be done, None while something is.
    """

    __slots__ = (
        "_ahead", "_flight", "_hangup_check", "_heads", "_is_between", "_is_half_closed", "_latest", "_rest",
        "_truncated", "_web",
    )  # fmt: skip

    def __init__(self, manager: web.Server, app: App[Any], heads: Heads, **options: Any) -> None:
        super().__init__(manager, **options)
        self._web = app
        self._heads = heads
        self._is_between = True  # all that came so far was read: with what comes next a request begins
        self._flight: Flight | None = None
        self._rest = bytearray()  # has been read, and is parsed in the next turns of the loop
        self._latest: HttpRequest | None = None  # the request that aiohttp's loop began last
        self._is_half_closed = False  # the client sends no more
        self._truncated: StreamReader | None = None  # the body whose end the client has not sent
        self._ahead = 0  # bytes of the pending response that were sent as a probe
        self._hangup_check: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Whatever of an answer the system does not take at once has a slow reader, for whom nobody waits for ever.

        A transport waits without an end where it is closed before all is written. That of TLS has a deadline there.
        """
        super().connection_made(transport)
        if transport.get_extra_info("sslcontext") is None:
            assert self.transport is not None
            self.transport.set_write_buffer_limits(0)

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """What is made of ever so many lines (chunks of one byte) is parsed piece by piece: others get their turns."""
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
        """aiohttp's parser gets what is not known already, its loop what does not go the short way."""
        waiter = self._waiter
        idle = None if waiter is None or waiter.done() else waiter
        if idle is not None and self._is_between and (whole := self._heads.read(data)) is not None:
            ctx = RequestContext(whole.method, whole.target, whole.head, self)
            if self._depart(ctx, whole.body):
                return
        before = len(self._messages)
        self._waiter = None  # it is not to be woken before we have seen what has come
        super().data_received(data)
        self._waiter = waiter
        if len(self._messages) > before and not isinstance(self._messages[-1][0], RawRequestMessage):
            self._keep_earlier()
            self._break_body()
        if self._messages and idle is None and not self._buffer_paused and self._is_far_ahead():
            self._pause_reading_for_buffer()
        is_one = len(self._messages) == before + 1
        self._is_between = self._is_between and is_one and self._heads.learn(data, *self._messages[-1])
        if idle is not None and self._messages and not (is_one and self._depart_parsed()):
            idle.set_result(None)

    def _keep_earlier(self) -> None:
        """Put requests that arrived in one segment with a malformed one before its error, so they are answered first.

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
        """The bytes are no HTTP any more. Whoever still reads a body hears of it; aiohttp's parser does not tell."""
        request = self._current_request
        if request is not None and not request.content.is_eof():
            request.content.set_exception(web.RequestPayloadError("the framing is broken"))
            request.content.feed_eof()  # there is nothing to be read and dropped before the end
            self.close()

    def _is_far_ahead(self) -> bool:
        """aiohttp lets up to 32 requests wait for the one before them, and does not count the bytes of their bodies."""
        return sum(payload.total_bytes for _, payload in self._messages) > AHEAD

    def _resume_reading_if_drained(self) -> None:
        """aiohttp's loop has taken one of those that waited."""
        if not self._is_far_ahead():
            super()._resume_reading_if_drained()

    def resume_reading(self, resume_parser: bool = True) -> None:
        """A body that is read asks for more each time: that costs a turn of the parser, so only where it has paused."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def free_place_soon(self) -> None:
        """The last of a body is being parsed, which had not come when its request was begun."""
        self._loop.call_soon(self._free_place)

    def _free_place(self) -> None:
        """The body has come of a request that was begun before it had.

        aiohttp's parser stops where 32 requests wait. It counts one when its body has come, and counts it back when it
        is begun: this one would count for ever, and in the end one request would wait for the bytes of the next.
        """
        if self._parser is not None:
            self._parser.message_consumed()
            self._parse(b"")

    # -- half-closed connections ---------------------------------------------------------------------------------------

    def eof_received(self) -> bool:  # type: ignore[override]
        """Answer the requests that have arrived, then close. TLS has no half-closed state and closes at once.

        A client that has closed its socket must not keep a grant. A Unix socket tells closed from half-closed clients.
        TCP does so only after a write: a closed client resets the connection. So the bytes with which every response
        begins are sent at once, and its grants are released if nothing else of it has been written.
        A response with grants continues after the client's system has acknowledged these bytes.
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

    def note_begun(self, request: HttpRequest) -> None:
        """Note that aiohttp's loop begins `request`."""
        self._latest = request
        if self._is_half_closed:
            request.is_truncated = request.content is self._truncated
            self._close_after_last()

    def _is_idle(self) -> bool:
        """Return whether no request is being answered or waits to be. An incomplete head does not count."""
        if self._flight is not None or self._messages:
            return False
        return self._latest is None or (self._waiter is not None and not self._waiter.done())

    def _truncate_body(self) -> None:
        """End a body that is incomplete."""
        request = self._latest if self._flight is None and not self._messages else None
        payload = self._messages[-1][1] if self._messages else None if request is None else request.content
        if payload is None or payload.is_eof():
            return
        self._truncated = payload
        if request is not None:
            request.is_truncated = True
        payload.feed_eof()

    def _close_after_last(self) -> None:
        """Let aiohttp's loop end after the current request, unless others wait."""
        if not self._messages and not self._message_tail:
            self.close()

    def _send_probe(self, transport: asyncio.Transport) -> None:
        """Send the next bytes of the current response that are certain, so that a closed client resets."""
        if self._flight is not None:
            if self._flight.reply is None:
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
                await asyncio.sleep(PROBE_LOOK_S)

    def _is_probing(self, transport: asyncio.Transport) -> bool:
        """Whether bytes are on their way whose receipt the client's system has neither acknowledged nor denied."""
        if transport.is_closing() or self._is_hung_up(transport):
            return False
        count = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        return bool(struct.unpack("i", count)[0])

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._hangup_check is not None:
            self._hangup_check.cancel()
        super().connection_lost(exc)
        self._latest = None  # it refers to this connection: break the cycle

    # -- the short way -------------------------------------------------------------------------------------------------

    def _depart_parsed(self) -> bool:
        """Send the one request that has come, if it is whole and may go the short way."""
        message, payload = self._messages[0]
        if not is_whole(message, payload) or message.upgrade:
            return False
        return self._depart(RequestContext.of(message, payload, self))

    def _depart(self, ctx: RequestContext, body: bytes | None = None) -> bool:
        """`body` is None where it has been parsed."""
        found = self._web.match(ctx)
        if found.resolved is not None and found.resolved.route.handler is not None:
            return False
        assert self._waiter is not None
        flight = self._flight = Flight(self, ctx, self._waiter)
        self._waiter = None
        self._request_in_progress = True
        self._send(flight, found, self._parsed_body() if body is None else body)
        return True

    def _parsed_body(self) -> bytes:
        assert self._parser is not None
        _, payload = self._messages.popleft()
        self._parser.message_consumed()
        return payload.read_nowait()

    def _send(self, flight: Flight, found: RouteMatch, body: bytes) -> None:
        try:
            sent = self._web.send(flight.ctx, found, body, flight)
        except Exception as bug:
            sent = self._refusal(flight.ctx, bug)
        if isinstance(sent, Envelope):
            flight.asked = sent
        else:
            self._leave(flight, sent)

    def prepared(self, flight: Flight, answer: Response) -> HttpResponse | None:
        return self._web.prepare(flight.ctx, answer)

    def answer(self, flight: Flight, answer: Response | ApiError) -> None:
        """The actor's answer leaves. Raises nothing: the actor has nothing to do with what goes wrong here."""
        if flight.ready is not None and flight.ready[0] is answer and not self._web.closing:
            self._leave(flight, flight.ready[1])
            return
        try:
            reply = self._web.respond(flight.ctx, answer)
        except Exception as bug:
            self._loop.call_soon(self._fail, flight, bug)
        else:
            self._leave(flight, reply)

    def _fail(self, flight: Flight, bug: Exception) -> None:
        if self._flight is flight:
            self._leave(flight, self._refusal(flight.ctx, bug))

    def _leave(self, flight: Flight, reply: HttpResponse, waits_s: float = PROBE_S) -> None:
        flight.reply, flight.held = reply, None
        transport = self.transport
        if self._ahead and reply.on_lost is not None and transport is not None and self._is_probing(transport):
            if waits_s > 0:
                flight.held = self._loop.call_later(PROBE_LOOK_S, self._leave, flight, reply, waits_s - PROBE_LOOK_S)
                return
            transport.abort()
        if reply.write(transport, self._ahead) and self.writing_paused:
            assert transport is not None
            flight.unread = abort_later(transport)
        else:
            self._land(flight)

    def resume_writing(self) -> None:
        super().resume_writing()
        flight = self._flight
        if flight is not None and flight.unread is not None:
            flight.unread.cancel()
            self._land(flight)

    def _land(self, flight: Flight) -> None:
        """The request is done with: aiohttp's loop has the connection again, with what has come meanwhile."""
        self._end_flight(flight)
        self._waiter = flight.idle
        if flight.reply is None or flight.reply.close or self._close or self._force_close:
            self.force_close()
        elif self._messages:
            flight.idle.set_result(None)
        else:
            self._stay()

    def _stay(self) -> None:
        """Wait for the next request, but not for ever."""
        closes_at = self._loop.time() + self._keepalive_timeout
        self._next_keepalive_close_time = closes_at
        if self._keepalive_handle is None:
            self._keepalive_handle = self._loop.call_at(closes_at, self._process_keepalive)

    def _end_flight(self, flight: Flight) -> None:
        flight.asked = None  # it knows the flight: a circle, and every request would be left to the garbage collector
        self._flight = None
        self._ahead = 0
        self._request_in_progress = False
        if self._handler_waiter is not None and not self._handler_waiter.done():  # a stop waits, and has not given up
            self._handler_waiter.set_result(None)
        self._web.request_finished()

    # -- ends ----------------------------------------------------------------------------------------------------------

    def force_close(self) -> None:
        """The end, also for a request that is on its short way. aiohttp calls this where the client has gone, too."""
        flight = self._flight
        if flight is not None:
            asked = flight.asked
            flight.cancel()
            self._end_flight(flight)
            if flight.cancelled() and asked is not None:
                self._web.actor.abandon(asked)
        super().force_close()

    def close_if_idle(self) -> None:
        """End the connection where no request, or only a part of its head, has come."""
        if self._waiter is not None and not self._waiter.done():
            self.force_close()

    # -- what is wrong -------------------------------------------------------------------------------------------------

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what is not HTTP, and to a bug."""
        assert isinstance(request, HttpRequest)
        if isinstance(exc, ConnectionError):
            raise exc
        return PreparedResponse(self._refusal(request.ctx, exc), request)

    def _refusal(self, ctx: RequestContext, exc: BaseException | None) -> HttpResponse:
        """Its own text stays out of it: it may hold a token."""
        if isinstance(exc, HttpProcessingError):
            line = f"a line of its head is over {self.max_line_size} bytes"
            why = line if isinstance(exc, LineTooLong) else WRONG_HEAD
            refusal = ApiError("invalid_request", f"The request is not valid HTTP/1.1: {why}.")
        else:
            self.log_exception("connection_bug", exc_info=exc)
            refusal = INTERNAL_ERROR
        return self._web.error_response(ctx, refusal, close=True)

    def log_exception(self, *args: Any, **kw: Any) -> None:
        exc = kw.get("exc_info")
        log.error("connection_bug", error=type(exc).__name__)

    def log_debug(self, *args: Any, **kw: Any) -> None:
        """aiohttp's own chatter about clients that went away."""


def _take_parsed(parser: object) -> list[tuple[RawRequestMessage, StreamReader]]:
    """Take the requests that aiohttp's parser has read before the malformed one.

    The parser keeps them in a list, and raises without them. The list is emptied, so that no request is read twice.
    """
    for kept in gc.get_referents(parser):
        if isinstance(kept, list) and kept and isinstance(kept[0], tuple) and type(kept[0][0]) is RawRequestMessage:
            taken = kept[:]
            kept.clear()
            return taken
    return []
