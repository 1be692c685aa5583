"""What goes over the wire and back, without IO: requests, replies, typed results, and when to try again.

Opens no connection, reads no clock, waits for nothing; sync.py and aio.py do.
"""

from __future__ import annotations

import inspect
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar
from urllib.parse import quote, urlencode

import msgspec
from msgspec import UNSET, Struct

from jobd.client.errors import ERRORS, BadAnswer, InvalidRequest, JobdError, Unreachable
from jobd.model.responses import GrantView, JobView

T = TypeVar("T")
M = TypeVar("M", bound=Callable[..., Any])

JSON_TYPE: Final = "application/json"
NDJSON_TYPE: Final = "application/x-ndjson"

# ---------------------------------------------------------------------------------------------------------------------
# Typed results that say more than the daemon's own views.


class JobInfo(JobView):
    """A job. `payload` and `metadata` are the JSON text as it came; the `_value` properties decode it."""

    @property
    def payload_value(self) -> Any:
        """The payload as Python values. Raises msgspec.DecodeError where Python cannot hold it (1e999)."""
        return None if self.payload is UNSET else msgspec.json.decode(self.payload)

    @property
    def metadata_value(self) -> Any:
        """The metadata that the worker left, as Python values, None where there is none."""
        return None if self.metadata is None else msgspec.json.decode(self.metadata)


class GrantInfo(GrantView):
    """A job that is yours until `lock_expires_at` (Unix ms). `lock_id` is secret and goes with every call on it."""

    job: JobInfo


class JobInfoPage(Struct):
    """A page of jobs, newest first. `next_cursor` is None on the last one.

    `looked_to_at` (Unix ms): when the oldest job that was looked at was created, where the page is short for having
    looked at enough of those that do not match.
    """

    jobs: list[JobInfo]
    next_cursor: str | None
    looked_to_at: int | None = None


class Envelope(Struct, Generic[T]):
    """The shape of every success."""

    data: T


class _Outcome(Struct):
    """The shape of every answer, as far as it says whether the call was refused and why."""

    success: bool | None = None
    error: str = ""
    message: str = ""
    details: dict[str, Any] | None = None


_HEAD: Final = msgspec.json.Decoder(_Outcome)


def reader(shape: type[T]) -> Callable[[bytes], T]:
    """What decodes the `data` of an answer into `shape`; fields that `shape` does not know are skipped."""
    decoder = msgspec.json.Decoder(Envelope[shape])  # type: ignore[valid-type]

    def read(body: bytes) -> T:
        data: T = decoder.decode(body).data
        return data

    return read


# ---------------------------------------------------------------------------------------------------------------------
# Requests and replies.


@dataclass(frozen=True, slots=True)
class ApiRequest(Generic[T]):
    """One call: what to send, and how to read the answer.

    `wait_ms` is how long the daemon may hold the answer back. `repeatable` says that sending it twice does what
    sending it once does: it reads, carries an id or an Idempotency-Key, or is covered by the rule of repeated endings.
    """

    method: str
    path: str
    read: Callable[[bytes], T] = field(repr=False)
    body: bytes | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict)
    wait_ms: int = 0
    repeatable: bool = True


@dataclass(frozen=True, slots=True)
class ApiResponse:
    """One answer, as it came. Header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def signed(method: M, build: Callable[..., ApiRequest[Any]]) -> M:
    """`method` with the arguments of `build` beside self, for help() and editors."""
    asked = inspect.signature(build)
    me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    method.__signature__ = asked.replace(  # type: ignore[attr-defined]
        parameters=[me, *asked.parameters.values()], return_annotation=inspect.Signature.empty
    )
    return method


def get(path: str, read: Callable[[bytes], T], **query: str | int | None) -> ApiRequest[T]:
    """A call that only reads. Parts of the query that are None are left out."""
    asked = {name: value for name, value in query.items() if value is not None}
    return ApiRequest("GET", f"{path}?{urlencode(asked)}" if asked else path, read)


def post(
    path: str, read: Callable[[bytes], T], body: Mapping[str, Any], *, key: str | None = None, wait_ms: int = 0
) -> ApiRequest[T]:
    """A call that changes something. Fields that are None are left out; `key` is its Idempotency-Key.

    Raises TypeError where a field is nothing that JSON can say.
    """
    said = {name: value for name, value in body.items() if value is not None}
    headers = {"Content-Type": JSON_TYPE}
    if key is not None:
        headers["Idempotency-Key"] = key
    return ApiRequest("POST", path, read, msgspec.json.encode(said), headers, wait_ms)


def job_path(base: str, job_id: str, verb: str = "") -> str:
    """The path of a job. Dots are escaped where the id is nothing else, lest somebody take it for a directory."""
    if not job_id:
        raise InvalidRequest("The job id is empty.")
    name = quote(job_id, safe=":")
    if not name.strip("."):
        name = name.replace(".", "%2E")
    return f"{base}/{name}/{verb}" if verb else f"{base}/{name}"


def read_result(request: ApiRequest[T], reply: ApiResponse) -> T:
    """The typed result of `reply`. Raises the JobdError that it says, or BadAnswer where it says nothing we know."""
    if reply.status >= 400:
        raise_error(reply)
    try:
        return request.read(reply.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadAnswer(
            f"{request.method} {request.path}: the answer cannot be read ({error}).", status=reply.status
        ) from error


def raise_error(reply: ApiResponse) -> None:
    """Raise what `reply` refuses. Returns where it is a success in spite of its status (health: 503 with the body)."""
    try:
        head = _HEAD.decode(reply.body)
    except (msgspec.DecodeError, RecursionError):
        head = _Outcome()
    if head.success:
        return
    if head.success is None or not head.error:
        raise _not_ours(reply)
    kind = ERRORS.get(head.error, JobdError)
    raise kind(
        head.message,
        code=head.error,
        details=head.details,
        status=reply.status,
        retry_after_ms=_retry_after_ms(reply, head.details or {}),
    )


def _not_ours(reply: ApiResponse) -> JobdError:
    """An error that is not the daemon's: a proxy in front of it that cannot reach it, or another program."""
    if reply.status in (502, 503, 504):
        return Unreachable(f"Something in front of the daemon answered HTTP {reply.status}.", status=reply.status)
    return BadAnswer(
        f"HTTP {reply.status} without the daemon's error object: is this the right port?", status=reply.status
    )


def _retry_after_ms(reply: ApiResponse, details: Mapping[str, Any]) -> int | None:
    """The wait that the daemon asks for: the header (whole seconds) or `details.retry_after_ms`."""
    told = details.get("retry_after_ms")
    if isinstance(told, int) and told >= 0:
        return told
    header = reply.headers.get("retry-after", "")
    return int(header) * 1000 if header.isascii() and header.isdigit() else None


# ---------------------------------------------------------------------------------------------------------------------
# When to try again.

# These say that nothing was done, or that asking again tells. Everything else is a definite answer.
RETRIED: Final = frozenset({"unreachable", "overloaded", "shutting_down", "outcome_unknown"})


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When a call is tried again. `total_s` is the deadline over all tries (None: none, 0: one try only).

    The wait before a try is random between 0 and `base_s`, twice that, ... up to `max_s` (full jitter), and not
    shorter than a Retry-After. `timeout_s` is the time for one answer, beside what the daemon may hold it back.
    `codes` are the errors after which there is another try.
    """

    total_s: float | None = 30.0
    base_s: float = 0.1
    max_s: float = 5.0
    timeout_s: float = 30.0
    codes: frozenset[str] = RETRIED


class RetryState:
    """The tries of one call. Holds no clock: `now_s` is monotonic time, `chance` is random between 0 and 1."""

    def __init__(self, policy: RetryPolicy, request: ApiRequest[Any], now_s: float) -> None:
        self._policy = policy
        self._request = request
        self._deadline_s = None if policy.total_s is None else now_s + policy.total_s
        self._count = 0

    def timeout_s(self, now_s: float) -> float:
        """How long to wait for the answer of the next try: cut to what is left of the deadline after the first."""
        whole = self._policy.timeout_s + self._request.wait_ms / 1000
        if self._deadline_s is None or self._count == 0:
            return whole
        return min(whole, max(self._deadline_s - now_s, 0.1))

    def wait_s(self, error: JobdError, now_s: float, chance: float) -> float:
        """How long to wait before the next try. Raises `error` where there is to be none."""
        if error.code not in self._policy.codes or not self._request.repeatable:
            raise error
        wait_s: float = chance * min(self._policy.max_s, self._policy.base_s * 2.0 ** min(self._count, 32))
        if error.retry_after_ms is not None:
            wait_s += error.retry_after_ms / 1000
        if self._deadline_s is not None and now_s + wait_s >= self._deadline_s:
            raise error
        self._count += 1
        return wait_s


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that the client makes.


def uuid7() -> str:
    """A new UUIDv7: sorts by the time of its making, to the millisecond."""
    bits = time.time_ns() // 1_000_000 << 80 | 0x7 << 76 | secrets.randbits(12) << 64 | 0b10 << 62
    digits = f"{bits | secrets.randbits(62):032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


# ---------------------------------------------------------------------------------------------------------------------
# Streams.

_CHUNK_BYTES: Final = 64 << 10


def json_lines(items: Iterator[Mapping[str, Any] | bytes | str]) -> Iterator[bytes]:
    """Pieces of some 64 KiB of JSON lines. A mapping is encoded; bytes or text are a line as they are."""
    piece = bytearray()
    for item in items:
        if isinstance(item, str):
            line = item.encode()
        else:
            line = item if isinstance(item, bytes) else msgspec.json.encode(item)
        piece += line.rstrip(b"\r\n") + b"\n"
        if len(piece) >= _CHUNK_BYTES:
            yield bytes(piece)
            piece.clear()
    if piece:
        yield bytes(piece)
