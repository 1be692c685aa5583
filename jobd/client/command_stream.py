"""Many calls over one long request: a line for each, answered by lines in the same order (POST /v1/commands).

Knows the wire of a stream and no call by name: what is asked, and whether it is asked again, is for aio.py to say.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, NamedTuple
from urllib.parse import unquote

import aiohttp
import msgspec
from msgspec import Struct

from jobd.client.errors import BadAnswer, JobdError, Unreachable
from jobd.client.protocol import NDJSON_TYPE, ApiRequest, ApiResponse

COMMANDS: Final = "/v1/commands"
LAST_S: Final = 5.0  # how long a stream that is closed may wait for its last answers

_VERBS: Final = frozenset({"start", "progress", "extend", "complete", "fail", "release", "cancel"})
_OF_A_JOB: Final = re.compile(r"/v1/jobs/(?P<id>[^/?]+)(?:/(?P<verb>[a-z-]+))?")
_BLANKS: Final = bytes.maketrans(b"\r\n", b"  ")

# How a stream is opened, with what is sent over it.
Open = Callable[[ApiRequest[Any], AsyncIterator[bytes]], AbstractAsyncContextManager[aiohttp.ClientResponse]]


CLAIM: Final = b'{"op":"claim"'
START: Final = b'{"op":"start"'


class _Status(Struct):
    status: int
    success: bool


_read_status: Final = msgspec.json.Decoder(_Status).decode


class _JobId(Struct):
    id: str


class _GrantId(Struct):
    lock_id: str
    job: _JobId


class _GrantIds(Struct):
    grants: list[_GrantId]


class _ClaimResponse(Struct):
    """As much of the answer to a claim as its grants need."""

    data: _GrantIds


class _StartResponse(Struct):
    """The same of a start."""

    data: _GrantId


def command_line(request: ApiRequest[Any]) -> bytes | None:
    """`request` as a line with its end, None where streams do not take it: what waits, and what looks at many jobs."""
    named = _named(request)
    if named is None:
        return None
    op, job_id = named
    said = {"op": op}
    if job_id is not None:
        said["id"] = job_id
    if (key := request.headers.get("Idempotency-Key")) is not None:
        said["idempotency_key"] = key
    head = msgspec.json.encode(said)
    body = (request.body or b"{}").translate(_BLANKS)
    return head + b"\n" if body == b"{}" else head[:-1] + b"," + body[1:] + b"\n"


def _named(request: ApiRequest[Any]) -> tuple[str, str | None] | None:
    """The request's op, and the job's id where its path gives it."""
    match request.method, request.path:
        case "POST", "/v1/jobs":
            return "create", None
        case "POST", "/v1/jobs/bulk":
            return "bulk", None
        case "POST", "/v1/claim":
            return None if request.wait_ms else ("claim", None)
    found = _OF_A_JOB.fullmatch(request.path)
    if found is None:
        return None
    if request.method == "GET" and found["verb"] is None:
        return "get", unquote(found["id"])
    if request.method == "POST" and found["verb"] in _VERBS:
        return found["verb"], unquote(found["id"])
    return None


class _Pending(NamedTuple):
    """Who waits for the next answer, to which line."""

    reply: asyncio.Future[ApiResponse]
    line: bytes


class CommandStream:
    """One stream after the other: where one breaks, the next call opens another. Belongs to one event loop."""

    def __init__(self, open_: Open) -> None:
        self._open = open_
        self._flow: _StreamConnection | None = None

    async def exchange(self, line: bytes, timeout_s: float) -> ApiResponse:
        """Send `line` and give its answer. Raises Unreachable where the stream breaks or nothing comes in time."""
        flow = self._flow
        if flow is None or flow.is_over:
            flow = self._flow = _StreamConnection(self._open)
        reply = flow.send(line)
        try:
            async with asyncio.timeout(timeout_s):
                return await reply
        except TimeoutError:
            flow.cut()
            raise Unreachable("No answer came over the stream in time.") from None

    async def close(self) -> None:
        """End the stream; what has been sent is answered."""
        flow, self._flow = self._flow, None
        if flow is not None:
            await flow.close()


class _StreamConnection:
    """One stream, from its opening to its end."""

    def __init__(self, open_: Open) -> None:
        self.is_over = False
        self._open = open_
        self._out = bytearray()
        self._has_out = asyncio.Event()
        self._is_closing = False
        self._waiting: deque[_Pending] = deque()
        self._running = asyncio.ensure_future(self._run())

    def send(self, line: bytes) -> asyncio.Future[ApiResponse]:
        reply: asyncio.Future[ApiResponse] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Pending(reply, line))
        self._out += line
        self._has_out.set()
        return reply

    def cut(self) -> None:
        self.is_over = True
        self._running.cancel()

    async def close(self) -> None:
        self._is_closing = True
        self._has_out.set()
        await asyncio.wait([self._running], timeout=LAST_S)
        self.cut()
        await asyncio.wait([self._running])

    async def _run(self) -> None:
        """Answers to those who wait. What has none when the stream ends was perhaps not done."""
        error: JobdError = Unreachable("The daemon ended the stream.")
        request = ApiRequest("POST", COMMANDS, lambda body: None, headers={"Content-Type": NDJSON_TYPE})
        try:
            async with self._open(request, self._body()) as response:
                if response.status != 200:
                    self._refused(response, await response.read())
                    return
                rest = b""
                while piece := await response.content.readany():
                    *lines, rest = (rest + piece).split(b"\n")
                    for line in lines:
                        self._answer(line)
        except (aiohttp.ClientError, OSError) as broken:
            error = Unreachable(f"The stream broke: {str(broken) or type(broken).__name__}.")
        except (msgspec.DecodeError, IndexError) as strange:
            error = BadAnswer(f"The stream's answer cannot be read ({strange}): is this the right port?")
        finally:
            self.is_over = True
            for waiting in self._waiting:
                if not waiting.reply.done():
                    waiting.reply.set_exception(error)

    async def _body(self) -> AsyncIterator[bytes]:
        """All that is there goes out at once, and then whatever comes."""
        while self._out or not self._is_closing:
            await self._has_out.wait()
            self._has_out.clear()
            if self._out:
                piece = bytes(self._out)
                self._out.clear()
                yield piece

    def _answer(self, line: bytes) -> None:
        waiting = self._waiting.popleft()
        if not waiting.reply.done():
            waiting.reply.set_result(ApiResponse(_read_status(line).status, {}, line))
        elif waiting.line.startswith((CLAIM, START)) and _read_status(line).success:
            self._give_back(line, is_claim=waiting.line.startswith(CLAIM))

    def _give_back(self, line: bytes, *, is_claim: bool) -> None:
        """Nobody waits for these grants any more: their jobs need not wait until the locks end."""
        decode = msgspec.json.decode
        grants = decode(line, type=_ClaimResponse).data.grants if is_claim else [decode(line, type=_StartResponse).data]
        for grant in grants:
            release = {"op": "release", "id": grant.job.id, "lock_id": grant.lock_id}
            self.send(msgspec.json.encode(release) + b"\n").cancel()

    def _refused(self, response: aiohttp.ClientResponse, body: bytes) -> None:
        headers = {name.lower(): value for name, value in response.headers.items()}
        for waiting in self._waiting:
            if not waiting.reply.done():
                waiting.reply.set_result(ApiResponse(response.status, headers, body))
