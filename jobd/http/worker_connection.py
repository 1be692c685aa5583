"""Serve one connection of a worker: parse requests, send their commands to the actor, write responses in their order.

    bytes ──> _held ──> parser ──> _queue ──> _current ──> HttpApp.authorize ──┬ a command: send ──> actor ──> respond
              unparsed             parsed     one at a time                └ else: a task, handle
    the rest of a body that is not wanted: _dropped, read for LINGER_S

A request is started as soon as its head has arrived and the response to the previous one is written.

Invariants:

- At most one request is in progress: `_current`, or `_dropped`, whose response is written. So responses are in the
  order of the requests.
- Input is parsed only if it may belong to the body of the current request, or if no request is in progress. Other
  input waits in `_held`, unparsed. Reading pauses while `_held` or the unread body of a stream is over AHEAD_BYTES.
- After malformed input nothing more is parsed (`_is_broken`). The requests before it get their responses; the
  malformed one is not run.
- After a response with `close`, or of a request without keep-alive, no request is started (`_is_ending`).
- `respond` never raises into the actor. A bug becomes a 500.
- `on_lost` of a response with grants is called if the connection closes before the system has taken the first byte of
  it. Other grants stay locked until they expire, because the client may have read them.
- A client that stops reading is cut off by `ReadDeadline`, not by a limit on the whole response.

hangup.py describes half-closed connections.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from functools import partial
from typing import Any, Final, cast

import structlog
from msgspec.structs import replace

from jobd.http.hangup import HangupCheck, is_hung_up, is_probing
from jobd.http.http_app import HttpApp
from jobd.http.parser import AHEAD_BYTES, PIECE_BYTES, MalformedRequest, RequestParser, malformed_request, piece_size
from jobd.http.read_deadline import TLS_PIECE_BYTES, ReadDeadline, pieces, slow_client
from jobd.http.response import HTTP_VERSION, HttpResponse
from jobd.http.worker_request import WorkerRequest
from jobd.model.errors import ApiError
from jobd.model.responses import Response

LINGER_S: Final = 5.0  # to read the rest of a rejected body, without which the client would not get the response
# How long a response with grants waits for the client's system to acknowledge the probe, and the polling interval.
PROBE_S: Final = 5.0
PROBE_POLL_S: Final = 0.002

log = structlog.get_logger("jobd.web")


class WorkerConnection(asyncio.Protocol):
    """One connection of a worker listener. `open_connections` contains it while it is open."""

    __slots__ = (
        "_ahead", "_current", "_drained", "_dropped", "_hangup_check", "_held", "_idle_since", "_idle_timer",
        "_is_broken", "_is_ending", "_is_flushing", "_is_half_closed", "_is_reading_paused", "_is_scheduled",
        "_is_writing_paused", "_linger_timer", "_loop", "_open_connections", "_parser", "_queue", "_rest", "app",
        "transport",
    )  # fmt: skip

    def __init__(self, app: HttpApp[Any], open_connections: set[WorkerConnection]) -> None:
        self.app = app
        self.transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._open_connections = open_connections
        self._queue: list[WorkerRequest] = []  # parsed, not started
        self._parser = RequestParser(self._queue.append)
        self._held = b""  # input that is not parsed yet
        self._current: WorkerRequest | None = None
        self._dropped: WorkerRequest | None = None  # its response is written, the rest of its body is dropped
        self._ahead = 0  # bytes of the current response that were sent as a probe
        self._rest: Iterator[bytes | memoryview] | None = None  # of the current response
        self._is_broken = False  # the input is malformed, and no more of it is parsed
        self._is_ending = False  # no more requests are started
        self._is_flushing = False  # the current response waits for the client to read
        self._is_half_closed = False  # the client sends no more
        self._is_scheduled = False
        self._is_reading_paused = False
        self._is_writing_paused = False
        self._idle_since = self._loop.time()
        self._idle_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._hangup_check: HangupCheck | None = None
        self._drained: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Set the write buffer limits to the lowest, so that `pause_writing` reveals a client that reads slowly.

        With 0, a TLS transport would pause although its buffer is empty. Below its buffer is that of the TCP transport,
        which cannot be set: it has up to 80 KiB when writing resumes. A closed transport waits forever for its unsent
        data, except with TLS.
        """
        opened = self.transport = cast("asyncio.Transport", transport)  # uvloop's transports are no subclasses of it
        self._open_connections.add(self)
        opened.set_write_buffer_limits(0 if transport.get_extra_info("sslcontext") is None else 1)
        self._idle_timer = self._loop.call_later(self.app.limits.idle_s, self._check_idle)

    # -- input ---------------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Parse data, unless a request is in progress."""
        current = self._current
        if (
            self._queue
            or self._held
            or (current is not None and current.is_complete)
            or (len(data) > PIECE_BYTES and piece_size(data) < len(data))
        ):
            if not (self._is_broken or self._is_ending):
                self._held += data
                self.regulate_input()
        else:
            self._parse(data)

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        self._is_scheduled = False
        current = self._current
        if self.transport is None or self.transport.is_closing() or self._is_ending:
            self._held = b""
        elif current is None and self._queue:
            self._start(self._queue.pop(0))
        elif self._held and self._may_parse():
            size = piece_size(self._held)
            piece, self._held = self._held[:size], self._held[size:]
            self.regulate_input()
            self._parse(piece)
        if self._held and self._may_parse():
            self._schedule()
        if self._is_half_closed and not self._held:
            self._end_input()

    def _may_parse(self) -> bool:
        current = self._current
        return current is None or not (current.is_complete or self._is_body_full())

    def _parse(self, data: bytes) -> None:
        if self._is_broken:
            return
        try:
            self._parser.feed(data)
        except MalformedRequest as malformed:
            self._break(malformed.error)
        current = self._current
        if self._dropped is not None:
            self._drop()
        elif current is None:
            if self._queue:
                self._start(self._queue.pop(0))
        elif current.task is not None:
            current.wake()
            self.regulate_input()
        elif current.is_waiting:
            self._go_on_with_body(current)

    def _break(self, error: ApiError) -> None:
        """Respond to malformed input after the requests before it. The malformed request itself is not run."""
        self._is_broken = True
        self._held = b""
        incoming, self._parser.incoming = self._parser.incoming, None
        if incoming is not None:
            incoming.is_complete = True
        if incoming is not None and incoming is self._dropped:
            self._is_ending = True
        elif incoming is not None and incoming is self._current:
            incoming.break_off()
        else:
            if incoming is not None:
                self._queue.remove(incoming)
            self._queue.append(malformed_request(error))

    def regulate_input(self) -> None:
        """Pause reading while too much input waits."""
        transport = self.transport
        if transport is None or transport.is_closing():
            return
        is_full = len(self._held) > AHEAD_BYTES or self._is_body_full()
        if is_full != self._is_reading_paused and not self._is_half_closed:
            self._is_reading_paused = is_full
            if is_full:
                transport.pause_reading()
            else:
                transport.resume_reading()
        if self._held:
            self._schedule()

    def _is_body_full(self) -> bool:
        current = self._current
        return current is not None and current.task is not None and len(current.body) > AHEAD_BYTES

    # -- requests ------------------------------------------------------------------------------------------------------

    def _start(self, request: WorkerRequest) -> None:
        self._current = request
        request.connection = self
        self.app.pending.add(request)
        try:
            response = self.app.authorize(request) if request.error is None else self._malformed_response(request)
            if response is None:
                assert request.resolved is not None
                if request.resolved.route.handler is not None:
                    request.task = self._loop.create_task(self._run(request))
                    return
                if request.is_complete:
                    response = self.app.send(request, request.body, request)
                else:
                    response = self._wait_for_body(request)
        except Exception as bug:
            response = self.app.bug_response(request, bug)
        if response is not None:
            self._respond(request, response)
        elif self._is_half_closed:
            self._send_probe()

    def _malformed_response(self, request: WorkerRequest) -> HttpResponse:
        assert request.error is not None
        return self.app.error_response(request, request.error, close=True)

    def _wait_for_body(self, request: WorkerRequest) -> HttpResponse | None:
        limits = self.app.limits
        if len(request.body) > limits.body or self.app.announces_too_much(request):
            return self.app.error_response(request, self.app.body_too_large())
        request.send_continue()
        request.is_waiting = True
        request.timer = self._loop.call_later(limits.body_deadline_s, self._time_out, request)
        return None

    def _go_on_with_body(self, request: WorkerRequest) -> None:
        if not (request.is_complete or len(request.body) > self.app.limits.body):
            return
        assert request.timer is not None
        request.timer.cancel()
        request.is_waiting = False
        try:
            response = (
                self.app.send(request, request.body, request)
                if request.error is None
                else self._malformed_response(request)
            )
        except Exception as bug:
            response = self.app.bug_response(request, bug)
        if response is not None:
            self._respond(request, response)

    def _time_out(self, request: WorkerRequest) -> None:
        request.is_waiting = False
        self._respond(request, self.app.error_response(request, self.app.body_too_late()))

    async def _run(self, request: WorkerRequest) -> None:
        """Run the handler of a request. It is cancelled if the connection is lost."""
        try:
            response = await self.app.handle(request)
        except ConnectionError:
            request.abort()
            return
        except Exception as bug:
            response = self.app.bug_response(request, bug)
        if self._current is not request:  # the connection was lost
            return
        if response is None:
            self._finish(request, None)
        elif request.is_streamed:  # too late for a response
            request.abort()
        else:
            self._respond(request, response)

    # -- responses -----------------------------------------------------------------------------------------------------

    def respond(self, request: WorkerRequest, response: Response | ApiError) -> None:
        """Write the actor's response. Never raises, because an error here must not reach the actor."""
        prepared = request.prepared
        if prepared is not None and prepared[0] is response and not self.app.closing:
            self._write(request, prepared[1], prepared[2])
            return
        try:
            made = self.app.respond(request, response)
        except Exception as bug:
            self._loop.call_soon(self._fail, request, bug)
        else:
            self._write(request, made, made.encode(request))

    def _fail(self, request: WorkerRequest, bug: Exception) -> None:
        if self._current is request:
            self._respond(request, self.app.bug_response(request, bug))

    def _respond(self, request: WorkerRequest, response: HttpResponse) -> None:
        self._write(request, response, response.encode(request))

    def _write(self, request: WorkerRequest, response: HttpResponse, data: bytes, timeout_s: float = PROBE_S) -> None:
        transport, is_written, written = self.transport, False, 0
        if transport is not None and not transport.is_closing():
            if not (self._ahead and response.on_lost is not None and is_probing(transport)):
                data = data[self._ahead :] if self._ahead else data
                if (written := len(data)) <= TLS_PIECE_BYTES:
                    transport.write(data)
                else:
                    self._rest = pieces(transport, data)
                    written = self._write_rest(transport)
                is_written = not transport.is_closing()  # a failed write closes the transport
            elif timeout_s > 0:
                request.response = response
                left_s = timeout_s - PROBE_POLL_S
                request.timer = self._loop.call_later(PROBE_POLL_S, self._write, request, response, data, left_s)
                return
            else:
                transport.abort()
        if not is_written:
            if response.on_lost is not None:
                response.on_lost()
        elif self._is_writing_paused:
            assert transport is not None
            self._is_flushing = True
            if request.task is None:  # nothing reads the rest of the body
                request.is_dropped, request.body = True, b""
            request.is_written = transport.get_write_buffer_size() < written  # a part of it
            # `on_lost` would keep a copy of the payloads, the command would keep those of the request.
            request.envelope = request.prepared = None
            on_lost = None if request.is_written else response.on_lost
            request.response = response = replace(response, body=b"", on_lost=on_lost)
            cut_off = partial(self._cut_off, request, response)
            request.timer = ReadDeadline(transport, cut_off, self.app.actor.unread, len(data))
            return
        self._finish(request, response)

    def _write_rest(self, transport: asyncio.Transport) -> int:
        """Write the pieces of the current response until the transport pauses. Return how many bytes they have."""
        written, rest = 0, self._rest or iter(())
        while not self._is_writing_paused and (piece := next(rest, None)) is not None:
            transport.write(piece)
            written += len(piece)
        return written

    def _cut_off(self, request: WorkerRequest, response: HttpResponse) -> None:
        """Abort the connection of a client that has stopped reading. Grants of which it has read a part stay locked."""
        log.warning("response_cut_off", reason=slow_client(), by=request.by, grants=response.grants)
        self.abort()

    @property
    def unread_grants(self) -> int:
        """The number of grants in a response that waits for the client to read it."""
        response = self._current.response if self._is_flushing and self._current is not None else None
        return 0 if response is None else response.grants

    def pause_writing(self) -> None:
        self._is_writing_paused = True

    def resume_writing(self) -> None:
        self._is_writing_paused = False
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        current = self._current
        if current is not None and self._is_flushing:
            assert self.transport is not None and isinstance(current.timer, ReadDeadline)
            self._write_rest(self.transport)
            if self._is_writing_paused:
                current.timer.extend()
            else:
                self._finish(current, current.response)

    async def drain(self) -> None:
        """Wait until the client has read enough."""
        if self._is_writing_paused:
            self._drained = self._loop.create_future()
            await self._drained

    def _finish(self, request: WorkerRequest, response: HttpResponse | None) -> None:
        transport = self.transport
        self._end(request)
        if transport is None or transport.is_closing():
            return
        if not request.keep_alive or self.app.closing or (response is not None and response.close):
            self._is_ending = True
            self._queue.clear()
            self._held = b""
        if not request.is_complete and not (response is not None and response.close_at_once):
            request.is_dropped = True
            self._dropped = request
            self._linger_timer = self._loop.call_later(LINGER_S, transport.close)
            self.regulate_input()
        elif self._is_ending:
            transport.close()
        elif self._queue or self._held:
            self._schedule()
        elif self._is_half_closed:
            transport.close()
        else:
            self._idle_since = self._loop.time()

    def _end(self, request: WorkerRequest) -> None:
        request.envelope = None  # break the cycle, or only the garbage collector would free requests
        if request.timer is not None:
            request.timer.cancel()
            request.timer = None
        self._current = None
        self._ahead = 0
        self._rest = None
        self._is_flushing = False
        if request.task is None or request.task.done():
            self.app.pending.discard(request)
        else:
            request.task.add_done_callback(lambda _: self.app.pending.discard(request))

    def _drop(self) -> None:
        assert self._dropped is not None and self._linger_timer is not None and self.transport is not None
        if not self._dropped.is_complete:
            return
        self._linger_timer.cancel()
        self._dropped = None
        if self._is_ending or (self._is_half_closed and not (self._queue or self._held)):
            self.transport.close()
        elif self._queue:
            self._start(self._queue.pop(0))
        else:
            self._idle_since = self._loop.time()

    # -- closing -------------------------------------------------------------------------------------------------------

    def connection_lost(self, exc: BaseException | None) -> None:
        self._open_connections.discard(self)
        for timer in (self._idle_timer, self._linger_timer, self._hangup_check):
            if timer is not None:
                timer.cancel()
        self.transport = self._idle_timer = self._linger_timer = self._hangup_check = self._dropped = None
        self._queue.clear()
        self._held = b""
        self._parser.close()
        request = self._current
        if request is not None:
            envelope = request.envelope
            is_abandoned = request.cancel()
            self._end(request)
            if request.task is not None:
                request.task.cancel()
            if is_abandoned and envelope is not None:
                self.app.actor.abandon(envelope)

    def close(self) -> None:
        """Close the connection once its response is sent."""
        if self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def close_if_idle(self) -> None:
        """Close the connection if no request, or only a part of its head, has arrived."""
        if self._current is None and not self._queue and not self._held:
            self.close()

    def reject_if_incomplete(self) -> None:
        """Respond as after the deadline of a body, if the current request waits for its body."""
        request = self._current
        if request is not None and request.is_waiting:
            assert request.timer is not None
            request.timer.cancel()
            self._time_out(request)

    def _check_idle(self) -> None:
        """Close the connection if it has been idle for too long, else check again at the earliest time it can be."""
        left_s = self.app.limits.idle_s
        if self._current is None and self._dropped is None and not (self._queue or self._held):
            left_s += self._idle_since - self._loop.time()
            if left_s <= 0:
                self.close()
                return
        self._idle_timer = self._loop.call_later(left_s, self._check_idle)

    # -- half-closed connections ---------------------------------------------------------------------------------------

    def eof_received(self) -> bool:
        """Answer the requests that have arrived, then close. hangup.py describes it."""
        transport = self.transport
        if transport is None or transport.get_extra_info("sslcontext") is not None:
            return False
        if self._is_half_closed:  # asyncio calls this again when reading resumes
            return True
        is_idle = self._current is None and not self._queue and not self._held
        if is_idle or is_hung_up(transport):
            return False
        self._is_half_closed = True
        if not self._held:
            self._end_input()
        self._send_probe()
        self._hangup_check = HangupCheck(transport)
        return True

    def _end_input(self) -> None:
        incoming, self._parser.incoming = self._parser.incoming, None
        if incoming is not None:
            incoming.is_truncated = incoming.is_complete = True
            if incoming is self._current and incoming.task is not None:
                incoming.wake()
            elif incoming is self._current and incoming.is_waiting:
                self._go_on_with_body(incoming)
            elif incoming is self._dropped:
                self._drop()
        elif self._current is None and not self._queue and self.transport is not None:
            self.transport.close()

    def _send_probe(self) -> None:
        """Send the next bytes of the current response that are known already, so that a closed TCP client resets."""
        current, transport = self._current, self.transport
        if current is None or current.response is not None or transport is None or transport.is_closing():
            return
        if transport.get_extra_info("socket").family == socket.AF_UNIX:
            return
        if current.task is None:
            self._ahead = len(HTTP_VERSION)
            transport.write(HTTP_VERSION)
        elif probe := current.probe():
            transport.write(probe)
