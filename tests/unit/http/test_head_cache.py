"""Cached heads agree with aiohttp's parser, or are not used."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import HttpRequestParser, RawRequestMessage
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.streams import StreamReader
from hypothesis import given, settings
from hypothesis import strategies as st

from jobd.http.head_cache import MAX_HEAD_BYTES, MAX_HEADS, HeadCache
from jobd.http.request import RequestHead
from tests.support.http_harness import TOKEN, request_bytes
from tests.support.malformed_requests import HOSTILE

POST = request_bytes("POST", "/v1/jobs/a/complete", '{"n":1}')
GET = request_bytes("GET", "/v1/jobs?queue=a%20b&limit=5")


class Parser:
    """Return the parser of a connection of aiohttp."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._protocol = BaseProtocol(self._loop)
        self.begin()

    def begin(self) -> None:
        self._parser = HttpRequestParser(self._protocol, self._loop, 1 << 16, auto_decompress=False)

    def parse(self, data: bytes) -> list[tuple[Any, StreamReader]]:
        try:
            return list(self._parser.feed_data(data)[0])
        except HttpProcessingError:
            return []

    def close(self) -> None:
        self._loop.close()


@pytest.fixture
def parser() -> Any:
    parser = Parser()
    yield parser
    parser.close()


def learn(heads: HeadCache, parser: Parser, data: bytes) -> bool:
    [(parsed, payload)] = parser.parse(data)
    return heads.learn(data, parsed, payload)


def fields_of(head: RequestHead) -> tuple[Any, ...]:
    """Return a head in a form that ignores the order of different headers."""
    lines = sorted(head.headers.items(), key=lambda item: item[0].lower())
    return lines, head.version, head.keep_alive, head.has_body, head.is_json


@pytest.mark.parametrize(
    "data", [POST, GET, request_bytes("POST", "/v1/jobs", ""), request_bytes("POST", "/v1/jobs/a/cancel")]
)
def test_a_cached_head_gives_the_same_request_as_the_parser(parser: Parser, data: bytes) -> None:
    heads = HeadCache()
    assert heads.read(data) is None
    [(parsed, payload)] = parser.parse(data)
    assert heads.learn(data, parsed, payload)
    cached = heads.read(data)
    assert cached is not None
    assert (cached.method, cached.target) == (parsed.method, parsed.path)
    assert fields_of(cached.head) == fields_of(RequestHead.of(parsed, payload))
    assert cached.body == payload.read_nowait()


def test_the_first_line_and_the_body_may_differ(parser: Parser) -> None:
    heads = HeadCache()
    learn(heads, parser, POST)
    cached = heads.read(POST.replace(b"/a/complete", b"/b:2/fail").replace(b"1}", b"2}"))
    assert cached is not None
    assert (cached.target, cached.body) == ("/v1/jobs/b:2/fail", b'{"n":2}')


@pytest.mark.parametrize(
    "spoiled",
    [
        POST[:-1],
        POST + b" ",
        POST + POST,
        POST.replace(b"POST", b"PUT"),
        POST.replace(b"POST", b"post"),
        POST.replace(b"HTTP/1.1", b"HTTP/1.0"),
        POST.replace(b"HTTP/1.1", b"HTTP/1.1 "),
        POST.replace(b"POST ", b"POST  "),
        POST.replace(b"POST ", b"\r\nPOST "),
        POST.replace(b"/v1/jobs", b"http://localhost/v1/jobs"),
        POST.replace(b"/a/", b"/\xc3\xa4/"),
        POST.replace(b"/a/", b"/a\nb/"),
        POST.replace(b"/a/", b"/a#b/"),
        POST.replace(b"localhost", b"localhosts"),
        POST.replace(b"Length: 7", b"Length: 07"),
        b"",
        b"\r\n\r\n",
    ],
)
def test_heads_that_differ_or_are_unusual_are_not_cached(parser: Parser, spoiled: bytes) -> None:
    heads = HeadCache()
    learn(heads, parser, POST)
    assert heads.read(spoiled) is None


@pytest.mark.parametrize("name", ["Authorization", "Idempotency-Key"])
def test_tokens_and_keys_are_read_but_not_cached(parser: Parser, name: str) -> None:
    heads = HeadCache()
    assert learn(heads, parser, request_bytes("GET", "/v1/jobs", headers={name: TOKEN, "X-A": "b"}))
    assert TOKEN not in str(heads._heads)
    for value in (TOKEN, "another one", "x"):
        data = request_bytes("GET", "/v1/jobs", headers={name: value, "X-A": "b"})
        cached = heads.read(data)
        [(parsed, payload)] = parser.parse(data)
        assert cached is not None
        assert fields_of(cached.head) == fields_of(RequestHead.of(parsed, payload))
    for value in ("", " x", "x ", "x\ty", "x" * 400, "\xe4"):
        assert heads.read(request_bytes("GET", "/v1/jobs", headers={name: value, "X-A": "b"})) is None
    assert heads.read(request_bytes("GET", "/v1/jobs", headers={"X-A": "b"})) is None
    assert heads.read(request_bytes("GET", "/v1/jobs", headers={name.lower(): TOKEN, "X-A": "b"})) is None


@pytest.mark.parametrize("name", ["Authorization", "Idempotency-Key"])
@pytest.mark.parametrize("second", ["k", "l", ""])
def test_two_tokens_or_keys_are_left_to_the_parser(parser: Parser, name: str, second: str) -> None:
    heads = HeadCache()
    two = request_bytes("POST", "/v1/jobs", "{}", {name: f"k\r\nX-A: b\r\n{name}: {second}"})
    for data in (request_bytes("POST", "/v1/jobs", "{}", {name: "k", "X-A": "b"}), two):
        for parsed, payload in parser.parse(data):
            heads.learn(data, parsed, payload)
    assert heads.read(two) is None


@pytest.mark.parametrize("name", ["authorization", "Cookie", "Proxy-Authorization", "idempotency-key"])
def test_other_secrets_are_left_to_the_parser(parser: Parser, name: str) -> None:
    heads = HeadCache()
    for headers in ({name: TOKEN}, {"Authorization": "x", name: TOKEN}, {"Idempotency-Key": "x" * 400, "X-A": TOKEN}):
        data = request_bytes("GET", "/v1/jobs", headers=headers)
        assert learn(heads, parser, data)
        assert heads.read(data) is None
        assert heads._heads == {}


@pytest.mark.parametrize(
    "data",
    [
        request_bytes("GET", "/v1/jobs", headers={"Connection": "close"}),
        request_bytes("POST", "/v1/jobs", b"2\r\n{}\r\n0\r\n\r\n", {"Transfer-Encoding": "chunked"}).replace(
            b"Content-Length: 12\r\n", b""
        ),
        request_bytes("GET", "/v1/jobs", headers={"Connection": "Upgrade", "Upgrade": "websocket"}),
        request_bytes("GET", "/v1/jobs", headers={"X-Long": "x" * MAX_HEAD_BYTES}),
        request_bytes("GET", "/v1/jobs", headers={"X_Odd": "x"}),
        request_bytes("GET", "/v1/jobs", headers={"X-Tab": "a\tb"}),
        request_bytes("PUT", "/v1/jobs", "{}"),
        b"\r\n" + GET,
    ],
)
def test_unusual_requests_are_left_to_the_parser(parser: Parser, data: bytes) -> None:
    heads = HeadCache()
    learn(heads, parser, data)
    assert heads.read(data) is None


def test_half_a_request_or_two_are_left_to_the_parser(parser: Parser) -> None:
    heads = HeadCache()
    [(parsed, payload)] = parser.parse(POST[:-1])
    assert not heads.learn(POST[:-1], parsed, payload)
    parser.begin()
    (parsed, payload), _ = parser.parse(POST + GET)
    assert not heads.learn(POST + GET, parsed, payload)
    parser.begin()
    [(parsed, payload)] = parser.parse(POST + GET[:9])
    assert not heads.learn(POST + GET[:9], parsed, payload)
    assert not heads.learn(POST, object(), payload)
    assert heads.read(POST) is None


def test_the_cache_is_cleared_when_it_is_full(parser: Parser) -> None:
    heads = HeadCache()
    for number in range(MAX_HEADS):
        assert learn(heads, parser, request_bytes("GET", "/v1/jobs", headers={"X-Number": str(number)}))
    assert heads.read(request_bytes("GET", "/v1/jobs", headers={"X-Number": "0"})) is not None
    learn(heads, parser, POST)
    assert heads.read(request_bytes("GET", "/v1/jobs", headers={"X-Number": "0"})) is None
    assert heads.read(POST) is not None


def mostly(usual: str, *odd: str) -> st.SearchStrategy[str]:
    return st.integers(0, 9).flatmap(lambda n: st.sampled_from(odd) if n == 0 else st.just(usual))


NAMES = st.sampled_from(
    [
        "Content-Length",
        "content-length",
        "Transfer-Encoding",
        "Host",
        "Connection",
        "Expect",
        "X-A",
        "Authorization",
        "Idempotency-Key",
        "idempotency-key",
    ]
)
VALUES = st.sampled_from(["2", "4", "0", "02", "+2", "2, 2", "chunked", "x", "keep-alive", "close", "2 ", "", "2\r"])
HEADERS = st.lists(
    st.tuples(NAMES, VALUES, mostly(": ", ":", " : ", ":\t"), mostly("\r\n", "\n", "\r\n ", "\r")), max_size=2
)
LINES = mostly(
    "POST /v1/jobs HTTP/1.1", "GET /a?b HTTP/1.1", "POST / HTTP/1.0", "GET\t/ HTTP/1.1", "POST /\n HTTP/1.1", ""
)
ENDS = mostly("\r\n", "\n", "\r\n\r\n", "\n\r\n", "")
BODIES = mostly("{}", "", "{}\r\n", "2\r\n{}\r\n0\r\n\r\n", "\r\n\r\n", "GET / HTTP/1.1\r\nHost: x\r\n\r\n")


def request_of(line: str, length: str, headers: list[tuple[str, str, str, str]], end: str, body: str) -> bytes:
    fields = "".join(f"{name}{colon}{value}{stop}" for name, value, colon, stop in headers)
    return f"{line}\r\nHost: x\r\nContent-Length: {length}\r\n{fields}{end}{body}".encode()


REQUESTS = st.builds(request_of, LINES, mostly("2", "4", "0", "22"), HEADERS, ENDS, BODIES)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(taught=st.lists(REQUESTS, min_size=1, max_size=3), line=LINES, body=BODIES)
def test_a_cached_head_agrees_with_the_parser(taught: list[bytes], line: str, body: str) -> None:
    """Request smuggling needs two parsers that disagree. The cache always agrees with aiohttp's parser."""
    parser = Parser()
    try:
        heads = HeadCache()
        for data in taught:
            parser.begin()
            for parsed, payload in parser.parse(data):
                heads.learn(data, parsed, payload)
        others = [
            line.encode() + data[data.find(b"\r\n") : data.find(b"\r\n\r\n") + 4] + body.encode() for data in taught
        ]
        for data in (*taught, *others):
            cached = heads.read(data)
            if cached is None:
                continue
            parser.begin()
            [(parsed, payload)] = parser.parse(data)
            assert isinstance(parsed, RawRequestMessage)
            assert payload.is_eof()
            assert (cached.method, cached.target) == (parsed.method, parsed.path)
            assert fields_of(cached.head) == fields_of(RequestHead.of(parsed, payload))
            assert cached.body == payload.read_nowait()
            [(following, _)] = parser.parse(GET)  # and the parser keeps nothing of it for the next request
            assert following.path == "/v1/jobs?queue=a%20b&limit=5"
    finally:
        parser.close()


@pytest.mark.parametrize("name", HOSTILE)
def test_malformed_requests_are_not_cached(parser: Parser, name: str) -> None:
    heads = HeadCache()
    for parsed, payload in parser.parse(HOSTILE[name]):
        heads.learn(HOSTILE[name], parsed, payload)
    assert heads.read(HOSTILE[name]) is None
