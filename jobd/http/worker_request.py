"""A request on a worker listener: its body, its response, and its place in the actor's mailbox."""

from __future__ import annotations

import asyncio
from typing import Any, Final, Protocol, cast

from jobd.http.http_app import MALFORMED_BODY, HttpApp
from jobd.http.read_deadline import ReadDeadline
from jobd.http.request import BodyError, RequestContext
from jobd.http.response import HttpResponse
from jobd.model.errors import ApiError
from jobd.model.responses import Response

NEXT_CHUNK: Final = b"0"  # the probe in a chunked body: a leading zero of the size of the next chunk


class RequestConnection(Protocol):
    app: HttpApp[Any]
    transport: asyncio.Transport | None

    def respond(self, request: WorkerRequest, response: Response | ApiError, /) -> None: ...
    def regulate_input(self) -> None: ...
    async def drain(self) -> None: ...


class WorkerRequest(RequestContext, eq=False):
    """A request on a worker listener. The actor sets its response as it would set the result of a future.

    `body` has the bytes that have arrived and were not read, `task` is that of a request with a handler, and `prepared`
    is the response that was encoded before its commit.
    """

    is_complete: bool = False
    body: bytes | bytearray = b""
    connection: RequestConnection = cast(Any, None)  # set once it is started
    is_waiting: bool = False  # for the rest of its body
    error: ApiError | None = None  # of a malformed request
    prepared: tuple[Response, HttpResponse, bytes] | None = None  # encoded before its commit
    response: HttpResponse | None = None
    is_written: bool = False
    task: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | ReadDeadline | None = None
    is_dropped: bool = False  # the rest of the body is not read
    _is_done: bool = False
    _is_cancelled: bool = False
    _arrival: asyncio.Future[None] | None = None

    # -- the actor's response ------------------------------------------------------------------------------------------

    def done(self) -> bool:
        return self._is_done

    def cancelled(self) -> bool:
        return self._is_cancelled

    def prepare(self, response: Response) -> None:
        http_response = self.connection.app.prepare(self, response)
        if http_response is not None:
            self.prepared = response, http_response, http_response.encode(self)

    def set_result(self, response: Response | ApiError, /) -> None:
        self._is_done = True
        self.connection.respond(self, response)

    def cancel(self) -> bool:
        """Cancel the request because its connection is lost. Return whether it waited for the actor."""
        self._is_cancelled = not self._is_done
        self._is_done = True
        if self.response is not None and not self.is_written and self.response.on_lost is not None:
            self.response.on_lost()
        return self._is_cancelled and self.envelope is not None

    # -- connection ----------------------------------------------------------------------------------------------------

    @property
    def transport(self) -> asyncio.Transport | None:
        return self.connection.transport

    # -- body ----------------------------------------------------------------------------------------------------------

    def add(self, piece: bytes) -> None:
        """Add a piece of the body. Nothing is added to a body over its limit."""
        if self.is_dropped or (self.is_waiting and len(self.body) > self.connection.app.limits.body):
            return
        if not self.body:
            self.body = piece
        elif isinstance(self.body, bytearray):
            self.body += piece
        else:
            self.body = bytearray(self.body + piece)

    def wake(self) -> None:
        """Wake the task that reads the body, because something has arrived."""
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    def break_off(self) -> None:
        """Fail the request, because the framing of its body is malformed."""
        self.error = MALFORMED_BODY
        self.keep_alive = False
        self.wake()

    async def read(self) -> bytes:
        while not self.body:
            if self.error is not None:
                raise BodyError
            if self.is_complete:
                return b""
            self._arrival = asyncio.get_running_loop().create_future()
            await self._arrival
        piece, self.body = bytes(self.body), b""
        self.connection.regulate_input()
        return piece

    # -- streamed response ---------------------------------------------------------------------------------------------

    @property
    def unsent_bytes(self) -> int:
        """The number of bytes that the system has not taken, because the client reads too slowly."""
        return self.open_transport().get_write_buffer_size()

    async def drain(self) -> None:
        self.open_transport()
        await self.connection.drain()

    def probe(self) -> bytes:
        """Return bytes that change nothing if they are sent now."""
        return NEXT_CHUNK if self._is_chunked else b""
