"""The protocol of the clients, without IO: requests, responses and their results."""

from __future__ import annotations

import functools
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Generic, ParamSpec, TypeVar, cast
from urllib.parse import quote, urlencode

import msgspec
from msgspec import NODEFAULT, Struct

from jobd.client.errors import ERRORS, BadResponse, InvalidRequest, JobdError, Unreachable
from jobd.model.api_call import JSON, LINES, ApiCall
from jobd.model.commands import STREAMED_COMMANDS, Command

P = ParamSpec("P")
T = TypeVar("T")
U = TypeVar("U")

# Puts JSON on one line. A line end in JSON is white space, never part of a string, so this changes no value.
LINE_ENDS_TO_SPACES: Final = bytes.maketrans(b"\r\n", b"  ")
_KEY: Final = re.compile(r"[ -~]{1,200}")
_BRACES: Final = re.compile(r"\{(\w+)\}")


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


def reader_of(shape: Any, select: Callable[[Any], Any] | None = None) -> Callable[[bytes], Any]:
    """Return a function that decodes the `data` of a response into `shape`. It ignores unknown fields.

    A response of `bytes` or `str` is returned as it is. The result is `select` of it.
    """
    if shape is bytes:
        return bytes
    if shape is str:
        return bytes.decode
    if select is None:
        return lambda body: _decoder(shape).decode(body).data
    return lambda body: select(_decoder(shape).decode(body).data)


# ---------------------------------------------------------------------------------------------------------------------
# Requests and responses.


@dataclass(frozen=True, slots=True)
class ApiRequest(Generic[T]):
    """One call: what to send, and how to read the response.

    `wait_ms` is how long the daemon may delay its response. A `repeatable` request has the same effect if it is sent
    twice, because it only reads, has an id or an Idempotency-Key, or ends a grant. `op` is its name in a stream of
    commands, empty if a stream does not have the call, and `subject` the value in its path.
    """

    method: str
    path: str
    read: Callable[[bytes], T] = field(repr=False)
    body: bytes | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict)
    wait_ms: int = 0
    repeatable: bool = True
    op: str = ""
    subject: str | None = None

    def then(self, select: Callable[[T], U]) -> ApiRequest[U]:
        """Return the same request with `select` of its result as the result."""
        return cast(ApiRequest[U], replace(cast(Any, self), read=lambda body: select(self.read(body))))


@dataclass(frozen=True, slots=True)
class ApiResponse:
    """One response as received. Header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def lower_headers(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers}


_OPS: Final = {command: op for op, command in STREAMED_COMMANDS.items()}


@functools.cache
def _fields(command: type[Command]) -> tuple[tuple[str, str, Any], ...]:
    """Return name, name in JSON and default of the fields of `command`."""
    return tuple(
        (info.name, info.encode_name, info.default if info.default_factory is NODEFAULT else info.default_factory())
        for info in msgspec.structs.fields(command)
    )


def request_for(call: ApiCall[P, T], *args: P.args, **kwargs: P.kwargs) -> ApiRequest[T]:
    return request_of(call, call.command(*args, **kwargs))


def request_of(call: ApiCall[Any, T], command: Command, key: str | None = None) -> ApiRequest[T]:
    """Build the request that sends `command`. Fields that are None or have their default are omitted."""
    subject, fields = None, {}
    for name, json_name, default in _fields(type(command)):
        value = getattr(command, name)
        if f"{{{name}}}" in call.path:
            subject = value
        elif value is not None and value != default:
            fields[json_name] = value
    wait_ms = fields.get("wait_ms", 0) if command.can_wait else 0
    request = build(call, fields, subject, key=key, wait_ms=wait_ms)
    return replace(request, repeatable=True) if fields.get("dry_run") else request


def build(
    call: ApiCall[Any, T],
    fields: Mapping[str, Any],
    subject: str | int | None = None,
    *,
    key: str | None = None,
    has_id: bool = False,
    wait_ms: int = 0,
    shape: Any = None,
) -> ApiRequest[T]:
    """Build a request of `fields`, without those that are None. `subject` is the value in the path.

    `key` is the Idempotency-Key. By default, a call that accepts one gets a UUIDv7, unless it `has_id`,
    which makes it repeatable too. `shape` is the type of the response, by default the declared one.

    Raises InvalidRequest if a header cannot have the key or a text is not Unicode, and TypeError if JSON cannot express
    a field.
    """
    value = None if subject is None else str(subject)
    path = call.path if value is None else _filled(call.path, value)
    read = reader_of(shape or call.response, call.select)
    given = {name: value for name, value in fields.items() if value is not None}
    if call.method == "GET":
        query = {name: str(value).lower() if isinstance(value, bool) else value for name, value in given.items()}
        body, headers = None, {}
        path = f"{path}?{urlencode(query, errors='surrogatepass')}" if query else path
    else:
        body, headers = _encoded(given), {"Content-Type": JSON}
        if call.options.get("key") and not (has_id and key is None):
            headers["Idempotency-Key"] = uuid7() if key is None else checked_key(key)
    op = _OPS.get(call.command, "") if call.auth == "worker" and not wait_ms else ""
    return ApiRequest(call.method, path, read, body, headers, wait_ms or call.run_ms, call.repeatable, op, value)


def lines_request(call: ApiCall[Any, T]) -> ApiRequest[T]:
    """Build the request of a call whose body is a stream of JSON lines."""
    return ApiRequest(
        call.method, call.path, reader_of(call.response), headers={"Content-Type": LINES}, repeatable=False
    )


def checked_key(key: str) -> str:
    if _KEY.fullmatch(key) is None:
        message = "Idempotency-Key must be 1 to 200 printable ASCII characters."
        raise InvalidRequest(message, details={"field": "Idempotency-Key"})
    return key


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


def _filled(path: str, value: str) -> str:
    """Return `path` with `value` for its part in braces. `.` and `..` are escaped: they mean directories in a path.

    The daemon rejects a value that is not Unicode.
    """
    if not value:
        raise InvalidRequest(f"The {_BRACES.findall(path)[0]} in {path} is empty.")
    name = quote(value, safe=":", errors="surrogatepass")
    if not name.strip("."):
        name = name.replace(".", "%2E")
    return _BRACES.sub(lambda _: name, path)


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
