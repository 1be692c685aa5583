"""Parse requests with httptools, within the limits of a head.

httptools is llhttp without its lenient modes: it rejects bare line feeds, folded headers, control characters, spaces
before a colon, malformed lengths and chunks, and a Content-Length together with a Transfer-Encoding.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from httptools import HttpParserCallbackError, HttpParserError, HttpParserUpgrade, HttpRequestParser

from jobd.http.request import add_header, announces_body, without_authority
from jobd.http.worker_request import WorkerRequest
from jobd.model.errors import ApiError

MAX_LINE_BYTES: Final = 8190  # of the request target, and of the name and value of a header
MAX_OPEN_LINE_BYTES: Final = 2 * MAX_LINE_BYTES + 4  # of an incomplete line of a head: name, colon, blank, value, CR
MAX_HEADERS: Final = 128  # and trailers
MAX_FRAMING_BYTES: Final = 64 << 10  # between two pieces of a body: sizes and extensions of chunks, and trailers
# Input of more than PIECE_BYTES and PIECE_LINES is parsed in pieces of PIECE_BYTES, one per turn of the loop.
PIECE_BYTES: Final = 8 << 10
PIECE_LINES: Final = 1_000
AHEAD_BYTES: Final = 256 << 10  # that may wait unparsed; one read can exceed this
LONG_LINE: Final = f"a line of its head is over {MAX_LINE_BYTES} bytes"
WRONG_HEAD: Final = (
    "its head or its framing is wrong (a line without a colon or with a forbidden character, a repeated header that "
    "may occur only once, such as Content-Length, or chunks of a wrong length)"
)
_NO_NAMES: Final[frozenset[str]] = frozenset()
# Headers that may occur only once.
_SINGLE: Final = frozenset(
    ("content-length", "content-location", "content-range", "content-type", "etag", "host", "max-forwards", "server",
     "transfer-encoding", "user-agent")
)  # fmt: skip
_COMMON_NAMES: Final = (
    "Accept", "Accept-Encoding", "Accept-Language", "Authorization", "Connection", "Content-Encoding", "Content-Length",
    "Content-Type", "Expect", "Host", "Idempotency-Key", "Last-Event-ID", "Origin", "Transfer-Encoding", "User-Agent",
)  # fmt: skip
_LOWER: Final = {form.encode(): name.lower() for name in _COMMON_NAMES for form in (name, name.lower())}
# A request target other than a path: a URI with an authority. CONNECT and `OPTIONS *` have others.
_URI: Final = re.compile(
    rb"[a-z][a-z0-9+.-]*://([^/?#@]*@)?(\[[0-9a-f:.]+\]|[^/?#@\[\]:]+)(:[0-9]*)?([/?#].*)?", re.IGNORECASE
)
OLD_WEBSOCKET: Final = "sec-websocket-key1"  # requests with it have a body without a length


class MalformedRequest(Exception):
    """The input is not HTTP. `error` says why, without the input."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.error = ApiError("invalid_request", f"The request is not valid HTTP/1.1: {why}.")


def malformed_request(error: ApiError) -> WorkerRequest:
    """Return a request that stands for malformed input."""
    request = WorkerRequest("UNKNOWN", "/", "", {}, _NO_NAMES, "1.0", False, False)
    request.error = error
    request.is_complete = True
    return request


def piece_size(data: bytes) -> int:
    """Return how much of the input to parse in this turn of the loop. Many lines, such as short chunks, take long."""
    return PIECE_BYTES if len(data) > PIECE_BYTES and data.count(b"\r\n") > PIECE_LINES else len(data)


class RequestParser:
    """Parse the input of one connection, and pass each request to `add_request` once its head has arrived.

    `incoming` is the request whose body is not complete.

    The methods on_* are called by httptools.
    """

    __slots__ = (
        "_add_request", "_framing", "_headers", "_latest", "_line", "_parser", "_repeated", "_url",
        "incoming",
    )  # fmt: skip

    def __init__(self, add_request: Callable[[WorkerRequest], None]) -> None:
        self._add_request = add_request
        self._parser = HttpRequestParser(self)
        self._url = b""  # of the current head
        self._headers: dict[str, bytes] = {}  # of the current head, or the trailers of the current body
        self._repeated: list[str] = []
        self._line = 0  # bytes of the current line, if several pieces of input belong to one head
        self._framing = 0  # bytes since the last piece of the body
        self._latest: WorkerRequest | None = None  # the latest in the input that is being parsed
        self.incoming: WorkerRequest | None = None

    def feed(self, data: bytes) -> None:
        """Parse the next bytes. The connection gets the requests in them, and so those before a malformed one.

        Raises MalformedRequest.
        """
        was_in_head = self._url
        if self.incoming is not None:
            self._framing += len(data)
        try:
            while True:
                try:
                    self._parser.feed_data(data)
                    break
                except HttpParserUpgrade as upgrade:
                    data = data[upgrade.args[0] :]
                data = self._decline_upgrade(data)
        except HttpParserError as error:
            if isinstance(error.__context__, MalformedRequest):  # raised by a callback
                raise error.__context__ from None
            if isinstance(error, HttpParserCallbackError):
                raise  # a bug
            raise MalformedRequest(WRONG_HEAD) from None
        if self._url or self.incoming is not None:
            self._check_open(data, is_same_head=bool(was_in_head) and self._latest is None)
        self._latest = None

    def close(self) -> None:
        """Break the reference cycles."""
        del self._parser, self._add_request
        self._latest = self.incoming = None

    def on_url(self, url: bytes) -> None:
        self._url += url
        if len(self._url) > MAX_LINE_BYTES:
            raise MalformedRequest(LONG_LINE)

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(value) > MAX_LINE_BYTES:
            raise MalformedRequest(LONG_LINE)
        try:
            key = _LOWER[name]
        except KeyError:
            if len(name) > MAX_LINE_BYTES:
                raise MalformedRequest(LONG_LINE) from None
            key = name.lower().decode()
        headers = self._headers
        if key in headers:
            add_header(headers, key, value)
            self._repeated.append(key)
        else:
            headers[key] = value

    def on_headers_complete(self) -> None:
        headers, url, parser = self._headers, self._url, self._parser
        self._headers, self._url, self._framing = {}, b"", 0
        repeated = self._check_repeated(headers) if self._repeated or len(headers) > MAX_HEADERS else _NO_NAMES
        if self.incoming is not None:  # this is the head that `_decline_upgrade` has made
            return
        keep_alive = parser.should_keep_alive()
        # Only HTTP/1.1 keeps a connection alive without this header.
        version = "1.1" if keep_alive and "connection" not in headers else parser.get_http_version()
        method, target = parser.get_method().decode(), url.decode("utf-8", "surrogateescape")
        if (version == "1.1" and "host" not in headers) or OLD_WEBSOCKET in headers:
            raise MalformedRequest(WRONG_HEAD)
        if target[0] != "/":
            if not _is_uri(url, method):
                raise MalformedRequest(WRONG_HEAD)
            target = without_authority(target, headers)
        path, _, query = target.partition("?")
        self._latest = self.incoming = request = WorkerRequest(
            method,
            path,
            query,
            headers,
            repeated,
            version,
            keep_alive,
            announces_body(headers),
        )
        self._add_request(request)

    def on_body(self, piece: bytes) -> None:
        request = self.incoming
        assert request is not None
        self._framing = 0
        if request.body or request.is_dropped:
            request.add(piece)
        else:
            request.body = piece

    def on_message_complete(self) -> None:
        assert self.incoming is not None
        if self._headers:  # trailers
            self._check_repeated(self._headers)
            self._headers = {}
        self.incoming.is_complete = True
        self.incoming = None

    def _decline_upgrade(self, rest: bytes) -> bytes:
        """Ignore the Upgrade of the latest request, whose body httptools has skipped. Return the input after it."""
        request = self._latest
        assert request is not None
        if request.method == "CONNECT":  # the rest is not HTTP
            request.keep_alive = False
            return b""
        if request.has_body:
            self._parser = HttpRequestParser(self)
            self.incoming, request.is_complete = request, False
            length = request.headers.get("content-length")
            framing = b"Transfer-Encoding: chunked" if length is None else b"Content-Length: %b" % length
            self._parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n\r\n" % framing)
        return rest

    def _check_repeated(self, headers: dict[str, bytes]) -> frozenset[str]:
        """Check the number of headers or trailers. Return the names of those that are repeated."""
        repeated = frozenset(self._repeated)
        if len(headers) + len(self._repeated) > MAX_HEADERS:
            raise MalformedRequest(WRONG_HEAD)
        if not repeated.isdisjoint(_SINGLE):
            raise MalformedRequest(f"the header {min(repeated & _SINGLE).title()} occurs more than once")
        self._repeated.clear()
        return repeated

    def _check_open(self, data: bytes, is_same_head: bool) -> None:
        """Check an incomplete head or the framing of an incomplete body. `is_same_head`: it began before `data`."""
        if len(self._headers) + len(self._repeated) > MAX_HEADERS or (
            not self._url and self._framing > MAX_FRAMING_BYTES
        ):
            raise MalformedRequest(WRONG_HEAD)
        if self._url:
            at = data.rfind(b"\n")
            self._line = 0 if not is_same_head else self._line + len(data) if at < 0 else len(data) - at - 1
            if self._line > MAX_OPEN_LINE_BYTES:
                raise MalformedRequest(LONG_LINE)


def _is_uri(target: bytes, method: str) -> bool:
    return method == "CONNECT" or (target == b"*" and method == "OPTIONS") or _URI.fullmatch(target) is not None
