"""Stream commands over one request, one per line. Each gets one response line, in the same order.

The number of pending commands is limited: if a client does not read responses, its lines are not read either.
"""

from __future__ import annotations

import asyncio
from collections import deque
from functools import cache
from typing import Annotated, Any, Final, Literal

import msgspec
import structlog
from msgspec import Struct

from jobd.api.services import Services
from jobd.engine.envelope import Envelope
from jobd.http.decoding import Limits, RequestDecoder, make_body_type, malformed_json_error, validation_error
from jobd.http.http_app import HttpApp
from jobd.http.read_deadline import read_deadline, slow_client
from jobd.http.request import RequestContext, canceller
from jobd.http.response import SAFE_HEADERS, error_line, response_line
from jobd.http.routing import Route
from jobd.http.streaming import LineStream, finish
from jobd.http.worker_request import WorkerRequest
from jobd.model.api_call import LINES
from jobd.model.commands import STREAMED_COMMANDS, Cancel, Command, IdempotencyKey
from jobd.model.errors import ApiError, ApiException, invalid_request_error, too_large_error
from jobd.model.fields import doc
from jobd.model.responses import Response

AHEAD_WEIGHT: Final = 256  # of the pending commands of one stream; a bulk or claim weighs as much as its jobs
AHEAD_BYTES: Final = 1 << 20  # of pending lines
PIECE_BYTES: Final = 64 << 10  # of response lines per write
TURN_LINES: Final = 64  # lines read before other tasks run

log = structlog.get_logger("jobd.web")

OP_TEXT: Final = doc("The call that the line stands for.")
KEY_TEXT: Final = doc("Like the header `Idempotency-Key`. For create, bulk, start, claim and cancel.")


class StreamedCommand(Command, frozen=True, kw_only=True):
    """Send a stream of commands, one per line. Each gets a response line, in order, after its commit.

    `op` is the call that a line stands for. `id` is the job id in the path of the call; for `create`, it is that of the
    new job. The other fields are those of the call's body.
    """

    op: Annotated[str, OP_TEXT]
    id: Annotated[str | None, doc("Id of the job.")] = None
    idempotency_key: Annotated[str | None, KEY_TEXT] = None


class StreamedResponse(Struct, frozen=True, omit_defaults=True):
    """The response to a line: the response of its call, with the HTTP status."""

    success: Annotated[bool, doc("Whether the command succeeded.")]
    status: Annotated[int, doc("The HTTP status that the call would have.")]
    data: Annotated[Any, doc("The data of the response.")] = None
    replayed: Annotated[bool, doc("Present, and true, if a stored response was returned.")] = False
    error: Annotated[str, doc("The error code.")] = ""
    message: Annotated[str, doc("A human-readable message.")] = ""
    details: Annotated[dict[str, Any], doc("Machine-readable details of the error.")] = {}


class _LineKind(Struct, frozen=True):
    """The decoder and the route of one kind of line."""

    decoder: RequestDecoder
    route: Route


class DecodedLine(Struct, frozen=True):
    command: Any
    by: str
    job_id: str | None
    key: IdempotencyKey | None


# The fields that are decoded first, to determine the kind of a line.
_LineHeader: Final = msgspec.defstruct(
    "_LineHeader", [("op", Literal[tuple(STREAMED_COMMANDS)]), ("idempotency_key", str | None, None)]
)
_read_header: Final = msgspec.json.Decoder[Any](_LineHeader).decode


def _line_type(op: str, command: type[Command]) -> type[Any]:
    return make_body_type(
        command,
        None,
        extra_fields=[
            ("op", Annotated[Literal[op], OP_TEXT]),
            ("idempotency_key", Annotated[str | None, KEY_TEXT], None),
        ],
        suffix="Line",
    )


# The type of each kind of line.
LINE_TYPES: Final = {op: _line_type(op, command) for op, command in STREAMED_COMMANDS.items()}


@cache
def line_decoders(limits: Limits) -> dict[str, RequestDecoder]:
    return {
        op: RequestDecoder(command, None, limits, body_type=LINE_TYPES[op]) for op, command in STREAMED_COMMANDS.items()
    }


class LineReader:
    """Decode the lines of a stream."""

    def __init__(self, app: HttpApp[Services]) -> None:
        self._authenticator = app.authenticator
        self._kinds = {
            op: _LineKind(decoder, app.routes[decoder.command]) for op, decoder in line_decoders(app.limits).items()
        }

    def read(self, line: bytes) -> DecodedLine:
        """Decode a line. Raises ApiException."""
        try:
            header = _read_header(line)
        except msgspec.ValidationError as error:
            raise validation_error(str(error), _LineHeader) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise malformed_json_error(error, line) from None
        kind = self._kinds[header.op]
        command: Any = kind.decoder.from_body(line)
        if command.can_wait and command.wait_ms:
            message = "a line of a stream cannot wait, because later lines would wait too. Omit it, or use a request."
            raise invalid_request_error("$.wait_ms", message)
        job_ids = command.job_ids()
        job_id = job_ids[0] if len(job_ids) == 1 else None
        by = command.sender() or "client"
        has_key = header.idempotency_key is not None and kind.route.key
        key = self._key(kind.route, job_id, header.idempotency_key, line) if has_key else None
        return DecodedLine(command, by, job_id, key)

    def _key(self, route: Route, job_id: str | None, key: str, line: bytes) -> IdempotencyKey:
        """Return the key in the scope of its call. A repetition must be the same line."""
        return self._authenticator.idempotency_key(key, route.method, route.path.replace("{id}", job_id or ""), line)


async def serve_command_stream(app: HttpApp[Services], ctx: RequestContext, _: Any) -> None:
    """Serve the stream until the body ends, the daemon stops, or the framing is malformed."""
    assert isinstance(ctx, WorkerRequest)
    ctx.send_continue()
    await _StreamSession(app, ctx).run()


class _PendingResponse:
    """The response to a line, in the order of the lines. The actor sets it as it would a future."""

    __slots__ = ("_is_cancelled", "_stream", "by", "envelope", "job_id", "response", "size", "weight")

    def __init__(self, stream: _StreamSession, size: int) -> None:
        self._stream = stream
        self._is_cancelled = False
        self.response: Response | ApiError | None = None
        self.envelope: Envelope | None = None
        self.by = "client"
        self.job_id: str | None = None
        self.size = size
        self.weight = 1

    def done(self) -> bool:
        return self._is_cancelled or self.response is not None

    def cancelled(self) -> bool:
        return self._is_cancelled

    def set_result(self, response: Response | ApiError, /) -> None:
        self.response = response
        self._stream.unread.add(_large_bytes(response))
        self.envelope = None  # avoid a reference cycle per line
        self._stream.has_responses.set()

    def cancel(self) -> None:
        """Mark the response as unwanted, unless it has arrived."""
        self._is_cancelled = self.response is None


class _StreamSession:
    """One stream. `_slots` are the unwritten responses, in order."""

    def __init__(self, app: HttpApp[Services], ctx: WorkerRequest) -> None:
        self.has_responses = asyncio.Event()
        self.unread = app.actor.unread
        self._app = app
        self._ctx = ctx
        self._reader = LineReader(app)
        self._lines = LineStream(ctx, app.limits, idle_allowed=True)
        self._slots: deque[_PendingResponse] = deque()
        self._weight = 0
        self._bytes = 0
        self._has_capacity = asyncio.Event()
        self._is_read = False
        self._grants = 0  # in the piece that is being written

    async def run(self) -> None:
        self._ctx.start({"Content-Type": LINES, **SAFE_HEADERS})
        reading = asyncio.ensure_future(self._read())
        reading.add_done_callback(self._on_read_end)

        def end() -> None:
            reading.cancel()

        self._app.on_close.add(end)
        if self._app.closing:
            end()
        try:
            await self._write()
            if not reading.cancelled():
                reading.result()
            await finish(self._ctx)
        except ConnectionError:
            raise
        except TimeoutError:
            log.warning("command_stream_cut_off", reason=slow_client(), grants=self._grants)
            raise self._cut() from None
        except Exception as bug:  # too late for a 500, so abort the connection
            self._app.log_internal_error(self._ctx, bug)
            raise self._cut() from None
        finally:
            self._app.on_close.discard(end)
            reading.cancel()
            self._release_unwritten()

    # -- reading -------------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        try:
            count = 0
            async for line in self._lines:
                if line is None or line.strip():
                    self._handle_line(line)
                    while self._weight >= AHEAD_WEIGHT or self._bytes >= AHEAD_BYTES:
                        self._has_capacity.clear()
                        await self._has_capacity.wait()
                count += 1
                if count % TURN_LINES == 0:
                    await asyncio.sleep(0)
        except ApiException as rejected:  # the start of the next line is unknown
            self._reject(_PendingResponse(self, 0), rejected.error)
            self._ctx.keep_alive = False

    def _on_read_end(self, reading: asyncio.Future[None]) -> None:
        """Record that no more lines will arrive. A stop of the daemon cancels the task, perhaps before it starts."""
        self._is_read = True
        self.has_responses.set()
        if reading.cancelled():
            self._ctx.keep_alive = False

    def _handle_line(self, line: bytes | None) -> None:
        slot = _PendingResponse(self, 0 if line is None else len(line))
        try:
            if line is None:
                limit = self._app.limits.body
                raise too_large_error(f"The line is over {limit} bytes. Split it.", limit=limit)
            decoded = self._reader.read(line)
            slot.by = canceller(self._ctx) if type(decoded.command) is Cancel else decoded.by
            slot.job_id, slot.weight = decoded.job_id, decoded.command.weight()
            envelope = self._app.actor.send(
                decoded.command, slot, by=slot.by, key=decoded.key, size=slot.size, ordered=True
            )
        except ApiException as rejected:
            envelope = rejected.error
        if isinstance(envelope, Envelope):
            slot.envelope = envelope
            self._queue(slot)
        else:
            self._reject(slot, envelope)

    def _reject(self, slot: _PendingResponse, error: ApiError) -> None:
        slot.set_result(error)
        self._queue(slot)

    def _queue(self, slot: _PendingResponse) -> None:
        self._slots.append(slot)
        self._weight += slot.weight
        self._bytes += slot.size

    # -- writing -------------------------------------------------------------------------------------------------------

    async def _write(self) -> None:
        while not (self._is_read and not self._slots):
            await self.has_responses.wait()
            self.has_responses.clear()
            while self._slots and self._slots[0].response is not None:
                await self._write_piece()

    async def _write_piece(self) -> None:
        """Write the next responses in one piece. Release the grants in lines of which no byte was written."""
        piece, grants = self._next_piece()
        size = len(piece)
        self._has_capacity.set()
        self._grants = sum(len(response.grants) for _, response in grants)
        written = 0
        try:
            self._ctx.send(piece)
            del piece  # only the transport keeps the bytes
            # The rest is buffered behind bytes that the client has not read, and may never be sent.
            written = size + len(b"\r\n") - self._ctx.unsent_bytes
            if self._ctx.unsent_bytes:
                async with read_deadline(self._ctx.transport, self.unread, size):
                    await self._ctx.drain()
                written = size
        finally:
            for begins_at, response in grants:
                if begins_at >= written:
                    self._app.actor.undelivered(response)

    def _next_piece(self) -> tuple[bytes, list[tuple[int, Response]]]:
        """Return the next response lines, and the offset of each line with grants."""
        piece, grants = bytearray(), []
        while self._slots and len(piece) < PIECE_BYTES and (response := self._slots[0].response) is not None:
            slot = self._slots.popleft()
            self.unread.remove(_large_bytes(response))
            self._weight -= slot.weight
            self._bytes -= slot.size
            begins_at = len(piece)
            if isinstance(response, Response):
                try:
                    piece += response_line(response)
                    if response.grants:
                        grants.append((begins_at, Response(None, grants=response.grants)))  # without the payloads
                    continue
                except Exception as bug:
                    if response.grants:
                        self._app.actor.undelivered(response)
                    response = self._app.log_internal_error(self._ctx, bug)
            self._app.record_error(self._ctx.route, self._ctx.method, response, by=slot.by, job_id=slot.job_id)
            piece += error_line(response)
        return bytes(piece), grants

    # -- end -----------------------------------------------------------------------------------------------------------

    def _cut(self) -> ConnectionResetError:
        self._ctx.abort()
        return ConnectionResetError("command stream cut off")

    def _release_unwritten(self) -> None:
        for slot in self._slots:
            self.unread.remove(_large_bytes(slot.response))
            if isinstance(slot.response, Response) and slot.response.grants:
                self._app.actor.undelivered(slot.response)
            envelope, slot.envelope = slot.envelope, None
            slot.cancel()
            if slot.cancelled() and envelope is not None:
                self._app.actor.abandon(envelope)
        self._slots.clear()


def _large_bytes(response: Response | ApiError | None) -> int:
    return response.large_bytes if isinstance(response, Response) else 0
