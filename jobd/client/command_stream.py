"""Send many calls over one long request (POST /v1/commands): one line per call, with responses in the same order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, NamedTuple

import aiohttp
import msgspec
from msgspec import Struct

from jobd.client.api_request import LINE_ENDS_TO_SPACES, ApiRequest, ApiResponse, lower_headers, reader_of
from jobd.client.apis import connection_reason
from jobd.client.errors import BadResponse, JobdError, Unreachable
from jobd.model.api_call import LINES
from jobd.model.responses import Grants, GrantView

COMMANDS: Final = "/v1/commands"
LARGE_BYTES: Final = 1 << 20  # the daemon's default limit of a body
CLOSE_S: Final = 5.0  # a closing stream waits this long for its last responses

# Opens a stream for a request with a body.
Open = Callable[[ApiRequest[Any], AsyncIterator[bytes]], AbstractAsyncContextManager[aiohttp.ClientResponse]]

CLAIM: Final = b'{"op":"claim"'
START: Final = b'{"op":"start"'


class _ResponseStatus(Struct):
    status: int
    success: bool


_read_status: Final = msgspec.json.Decoder(_ResponseStatus).decode


def is_large(request: ApiRequest[Any]) -> bool:
    """Return whether the daemon may reject the body because of its size. Such a body is not sent before it agrees."""
    return request.body is not None and len(request.body) > LARGE_BYTES


def command_line(request: ApiRequest[Any]) -> bytes | None:
    """Return `request` as a line, including its end.

    None if a stream does not support it: it waits, lists, or is so large that other calls would wait for it.
    """
    if not request.op or is_large(request):
        return None
    fields = {"op": request.op}
    if request.subject is not None:
        fields["id"] = request.subject
    if (key := request.headers.get("Idempotency-Key")) is not None:
        fields["idempotency_key"] = key
    head = msgspec.json.encode(fields)
    body = (request.body or b"{}").translate(LINE_ENDS_TO_SPACES)
    return head + b"\n" if body == b"{}" else head[:-1] + b"," + body[1:] + b"\n"


class _Pending(NamedTuple):
    response: asyncio.Future[ApiResponse]
    line: bytes


class CommandStream:
    """A stream that the next call opens again after it breaks. Belongs to one event loop."""

    def __init__(self, open_: Open) -> None:
        self._open = open_
        self._connection: _StreamConnection | None = None

    async def exchange(self, line: bytes, timeout_s: float) -> ApiResponse:
        """Send `line` and return its response. Raises Unreachable if the stream breaks or the timeout passes."""
        connection = self._connection
        if connection is None or connection.is_over:
            connection = self._connection = _StreamConnection(self._open)
        response = connection.send(line)
        try:
            async with asyncio.timeout(timeout_s):
                return await response
        except TimeoutError:
            connection.abort()
            error = Unreachable("The stream of commands had no response in time.")
            error.is_slow = True
            raise error from None

    async def close(self) -> None:
        """End the stream after all responses have arrived."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()


class _StreamConnection:
    """One stream, from its opening to its end."""

    def __init__(self, open_: Open) -> None:
        self.is_over = False
        self._open = open_
        self._out = bytearray()
        self._has_output = asyncio.Event()
        self._is_closing = False
        self._pending: deque[_Pending] = deque()
        self._running = asyncio.ensure_future(self._run())

    def send(self, line: bytes) -> asyncio.Future[ApiResponse]:
        response: asyncio.Future[ApiResponse] = asyncio.get_running_loop().create_future()
        self._pending.append(_Pending(response, line))
        self._out += line
        self._has_output.set()
        return response

    def abort(self) -> None:
        self.is_over = True
        self._running.cancel()

    async def close(self) -> None:
        self._is_closing = True
        self._has_output.set()
        await asyncio.wait([self._running], timeout=CLOSE_S)
        self.abort()
        await asyncio.wait([self._running])

    async def _run(self) -> None:
        """Deliver the responses. A line without a response when the stream ends may or may not have been applied."""
        error: JobdError = Unreachable("The daemon ended the stream of commands.")
        request = ApiRequest("POST", COMMANDS, lambda body: None, headers={"Content-Type": LINES})
        try:
            async with self._open(request, self._body()) as response:
                if response.status != 200:
                    self._reject(response, await response.read())
                    return
                rest = b""
                while piece := await response.content.readany():
                    *lines, rest = (rest + piece).split(b"\n")
                    for line in lines:
                        self._receive(line)
        except (aiohttp.ClientError, OSError) as broken:
            error = Unreachable(f"The stream of commands broke: {connection_reason(broken)}.")
        except (msgspec.DecodeError, IndexError) as invalid:
            error = BadResponse(f"The stream of commands cannot be read ({invalid}): is this the right port?")
        finally:
            self.is_over = True
            for pending in self._pending:
                if not pending.response.done():
                    pending.response.set_exception(error)

    async def _body(self) -> AsyncIterator[bytes]:
        """Yield the buffered lines, all at once, until the stream is closed and all responses have arrived.

        A response can cause another line, see `_release`.
        """
        while self._out or self._pending or not self._is_closing:
            await self._has_output.wait()
            self._has_output.clear()
            if self._out:
                piece = bytes(self._out)
                self._out.clear()
                yield piece

    def _receive(self, line: bytes) -> None:
        pending = self._pending.popleft()
        if not pending.response.done():
            pending.response.set_result(ApiResponse(_read_status(line).status, {}, line))
        elif pending.line.startswith((CLAIM, START)) and _read_status(line).success:
            self._release(line, is_claim=pending.line.startswith(CLAIM))
        if not self._pending:
            self._has_output.set()  # ends the body of a closing stream

    def _release(self, line: bytes, *, is_claim: bool) -> None:
        """Release grants whose call was cancelled, so that their jobs do not wait until the locks expire."""
        grants = reader_of(Grants)(line).grants if is_claim else [reader_of(GrantView)(line)]
        for grant in grants:
            release = {"op": "release", "id": grant.job.id, "lock_id": grant.lock_id}
            self.send(msgspec.json.encode(release) + b"\n").cancel()

    def _reject(self, response: aiohttp.ClientResponse, body: bytes) -> None:
        headers = lower_headers(response.headers.items())
        for pending in self._pending:
            if not pending.response.done():
                pending.response.set_result(ApiResponse(response.status, headers, body))
