"""The protocol of the clients, without IO: requests, responses, typed results, and retries."""

from __future__ import annotations

import functools
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Generic, TypeVar, cast
from urllib.parse import quote, urlencode

import msgspec
from msgspec import UNSET, Raw, Struct

from jobd.client.errors import ERRORS, BadResponse, InvalidRequest, JobdError, Unreachable
from jobd.model.responses import GrantView, JobView

T = TypeVar("T")
U = TypeVar("U")

JSON_TYPE: Final = "application/json"
NDJSON_TYPE: Final = "application/x-ndjson"
_KEY: Final = re.compile(r"[ -~]{1,200}")

# ---------------------------------------------------------------------------------------------------------------------
# Typed results that extend the daemon's own views.


class JobInfo(JobView):
    """A job. `payload` and `metadata` are the JSON text as received; the `_value` properties decode it."""

    def __repr__(self) -> str:
        """Show payload and metadata decoded, and leave out what the response does not have."""
        fields = ((name, getattr(self, name)) for name in self.__struct_fields__)
        shown = (f"{name}={_decoded(value)!r}" for name, value in fields if value is not UNSET)
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def payload_value(self) -> Any:
        """The payload as Python values. Raises msgspec.DecodeError for a value that Python cannot hold (1e999)."""
        return None if self.payload is UNSET else msgspec.json.decode(self.payload)

    @property
    def metadata_value(self) -> Any:
        """The metadata of the job's result as Python values, None if there is none."""
        return None if self.metadata is None else msgspec.json.decode(self.metadata)


def _decoded(value: Any) -> Any:
    """Decode JSON text. Text that Python cannot hold, and any other value, is returned as it is."""
    if not isinstance(value, Raw):
        return value
    try:
        return msgspec.json.decode(value)
    except (msgspec.DecodeError, RecursionError):
        return bytes(value)


class GrantInfo(GrantView):
    """A job that is yours until `lock_expires_at` (Unix ms). Every call on it needs the `lock_id`, which is secret."""

    job: JobInfo


class GrantList(Struct):
    grants: list[GrantInfo]


class JobInfoPage(Struct):
    """A page of jobs, newest first. `next_cursor` is None on the last one.

    If the daemon stopped its search before the page was full, `looked_to_at` (Unix ms) is when the oldest job that it
    examined was created.
    """

    jobs: list[JobInfo]
    next_cursor: str | None
    looked_to_at: int | None = None


class _Success(Struct, Generic[T]):
    """The shape of every success."""

    data: T


class _Outcome(Struct):
    """The part of a response that says whether the call succeeded, and the error if it did not."""

    success: bool | None = None
    error: str = ""
    message: str = ""
    details: dict[str, Any] | None = None


_decode_outcome: Final = msgspec.json.Decoder(_Outcome).decode


@functools.cache
def _decoder(shape: Any) -> msgspec.json.Decoder[_Success[Any]]:
    return msgspec.json.Decoder(_Success[shape])


def reader(shape: Any) -> Callable[[bytes], Any]:
    """Return a function that decodes the `data` of a response into `shape`. It ignores unknown fields."""
    return lambda body: _decoder(shape).decode(body).data


# ---------------------------------------------------------------------------------------------------------------------
# Requests and responses.


@dataclass(frozen=True, slots=True)
class ApiRequest(Generic[T]):
    """One call: what to send, and how to read the response.

    `wait_ms` is how long the daemon may delay its response. A `repeatable` request has the same effect if it is sent
    twice, because it only reads, has an id or an Idempotency-Key, or ends a grant.
    """

    method: str
    path: str
    read: Callable[[bytes], T] = field(repr=False)
    body: bytes | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict)
    wait_ms: int = 0
    repeatable: bool = True

    def then(self, select: Callable[[T], U]) -> ApiRequest[U]:
        """Return the same request with `select` of its result as the result."""
        return cast(ApiRequest[U], replace(cast(Any, self), read=lambda body: select(self.read(body))))


@dataclass(frozen=True, slots=True)
class ApiResponse:
    """One response as received. Header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def with_query(path: str, **query: str | int | None) -> str:
    """Add a query to `path`, without the parameters that are None. The daemon rejects text that is not Unicode."""
    parameters = {name: value for name, value in query.items() if value is not None}
    return f"{path}?{urlencode(parameters, errors='surrogatepass')}" if parameters else path


def get(path: str, shape: type[T], **query: str | int | None) -> ApiRequest[T]:
    """Build a call that only reads."""
    return ApiRequest("GET", with_query(path, **query), reader(shape))


def post(
    path: str,
    shape: type[T],
    body: Mapping[str, Any],
    *,
    key: str | None = None,
    wait_ms: int = 0,
    method: str = "POST",
) -> ApiRequest[T]:
    """Build a call that changes something. Omits fields that are None; `key` is the Idempotency-Key.

    Raises InvalidRequest if a header cannot have the key or a text is not Unicode, and TypeError if JSON cannot express
    a field.
    """
    if key is not None and _KEY.fullmatch(key) is None:
        message = "Idempotency-Key must be 1 to 200 printable ASCII characters."
        raise InvalidRequest(message, details={"field": "Idempotency-Key"})
    fields = {name: value for name, value in body.items() if value is not None}
    headers = {"Content-Type": JSON_TYPE}
    if key is not None:
        headers["Idempotency-Key"] = key
    return ApiRequest(method, path, reader(shape), _encoded(fields), headers, wait_ms)


def _encoded(fields: Mapping[str, Any]) -> bytes:
    """Encode a JSON object. Raises InvalidRequest for a text with a lone surrogate, as os.listdir may return."""
    try:
        return msgspec.json.encode(fields)
    except UnicodeEncodeError as error:
        name = next((name for name, value in fields.items() if _has_surrogate(value)), "body")
        message = (
            f"{name} has the lone surrogate {error.object[error.start]!a}, which JSON cannot express. "
            "Escape it: text.encode(errors='backslashreplace').decode()"
        )
        raise InvalidRequest(message, details={"field": f"$.{name}"}) from None


def _has_surrogate(value: Any) -> bool:
    try:
        msgspec.json.encode(value)
    except UnicodeEncodeError:
        return True
    return False


def job_path(base: str, job_id: str, verb: str = "") -> str:
    """Return the path of a job. The ids `.` and `..` are escaped, because they mean directories in a path.

    The daemon rejects an id that is not Unicode.
    """
    if not job_id:
        raise InvalidRequest("The job id is empty.")
    name = quote(job_id, safe=":", errors="surrogatepass")
    if not name.strip("."):
        name = name.replace(".", "%2E")
    return f"{base}/{name}/{verb}" if verb else f"{base}/{name}"


def read_result(request: ApiRequest[T], response: ApiResponse) -> T:
    """Return the typed result. Raises the JobdError in the response, or BadResponse if it is not a response of jobd."""
    if response.status >= 400:
        raise_error(response)
    try:
        return request.read(response.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadResponse(
            f"{request.method} {request.path}: the response cannot be read ({error}).", status=response.status
        ) from error


def raise_error(response: ApiResponse) -> None:
    """Raise the error in `response`. Return for a success whose status is an error (health: 503 with the body)."""
    try:
        outcome = _decode_outcome(response.body)
    except (msgspec.DecodeError, RecursionError):
        outcome = _Outcome()
    if outcome.success:
        return
    if outcome.success is None or not outcome.error:
        raise _foreign_error(response)
    kind = ERRORS.get(outcome.error, JobdError)
    raise kind(
        outcome.message,
        code=outcome.error,
        details=outcome.details,
        status=response.status,
        retry_after_ms=_retry_after_ms(response, outcome.details or {}),
    )


def _foreign_error(response: ApiResponse) -> JobdError:
    """Return the error for a response from a proxy in front of the daemon, or from another program."""
    if response.status in (429, 500, 502, 503, 504):
        text = f"A proxy in front of the daemon responded with HTTP {response.status}."
        return Unreachable(text, status=response.status, retry_after_ms=_retry_after_ms(response, {}))
    return BadResponse(
        f"HTTP {response.status} without the daemon's error object: is this the right port?", status=response.status
    )


def _retry_after_ms(response: ApiResponse, details: Mapping[str, Any]) -> int | None:
    """Return the delay that the daemon asks for: `details.retry_after_ms` or the header (whole seconds)."""
    delay_ms = details.get("retry_after_ms")
    if isinstance(delay_ms, int) and delay_ms >= 0:
        return delay_ms
    header = response.headers.get("retry-after", "")
    return int(header) * 1000 if header.isascii() and header.isdigit() else None


# ---------------------------------------------------------------------------------------------------------------------
# Ids and lines.


def uuid7() -> str:
    """Return a new UUIDv7. UUIDv7s sort by creation time, to the millisecond."""
    bits = time.time_ns() // 1_000_000 << 80 | 0x7 << 76 | secrets.randbits(12) << 64 | 0b10 << 62
    digits = f"{bits | secrets.randbits(62):032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


_CHUNK_BYTES: Final = 64 << 10


def json_lines(items: Iterator[Mapping[str, Any] | bytes | str]) -> Iterator[bytes]:
    """Yield JSON lines in chunks of about 64 KiB. Mappings are encoded; bytes and text are lines already."""
    chunk = bytearray()
    for item in items:
        if isinstance(item, str):
            line = item.encode(errors="surrogatepass")  # the daemon rejects a line that is not Unicode
        else:
            line = item if isinstance(item, bytes) else _encoded(item)
        chunk += line.rstrip(b"\r\n") + b"\n"
        if len(chunk) >= _CHUNK_BYTES:
            yield bytes(chunk)
            chunk.clear()
    if chunk:
        yield bytes(chunk)
