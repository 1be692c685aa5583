"""Parse heads that arrive in one piece or in several."""

from __future__ import annotations

import pytest

from jobd.http.parser import MAX_HEADERS, MAX_LINE_BYTES, MalformedRequest, RequestParser
from jobd.http.worker_request import WorkerRequest

END = b"\r\n\r\n"


def is_accepted(*pieces: bytes) -> bool:
    found: list[WorkerRequest] = []
    parser = RequestParser(found.append)
    try:
        for piece in pieces:
            parser.feed(piece)
    except MalformedRequest:
        return False
    finally:
        parser.close()
    return len(found) == 1


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("end", [0, 1, 4, 5, 100])
@pytest.mark.parametrize(
    "head",
    [
        b"GET /%b HTTP/1.1\r\nHost: x" % (b"a" * (MAX_LINE_BYTES - 1)),
        b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: %b" % (b"a" * MAX_LINE_BYTES),
        b"GET / HTTP/1.1\r\nHost: x\r\n%b: b" % (b"a" * MAX_LINE_BYTES),
    ],
    ids=["target", "value", "name"],
)
def test_the_limit_of_a_line_does_not_depend_on_its_pieces(head: bytes, end: int, more: int) -> None:
    text = head.replace(b"aa", b"aa" + b"a" * more, 1) + END
    pieces = text[:20], text[20 : len(text) - end], text[len(text) - end :]
    assert is_accepted(text) is is_accepted(*filter(None, pieces)) is not bool(more)


def test_a_line_without_end_is_rejected() -> None:
    assert not is_accepted(b"GET / HTTP/1.1\r\nHost: x\r\nA: ", *[b"a" * 1_000] * 20)
    assert not is_accepted(b"GET / HTTP/1.1\r\nHost: x\r\n", *[b"a" * 1_000] * 20)


@pytest.mark.parametrize("name", ["Content-Type", "Host", "user-agent"])
def test_a_header_that_may_occur_only_once_is_named(name: str) -> None:
    parser = RequestParser(lambda request: None)
    with pytest.raises(MalformedRequest, match=f"the header {name.title()} occurs more than once"):
        parser.feed(f"GET / HTTP/1.1\r\n{name}: a\r\n{name}: b\r\n\r\n".encode())
    parser.close()


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize("trailers", [b"", b"X-A: 1\r\n", b"X-A: 1\r\nX-A: 2\r\n", b"X-B: 1\r\n" * MAX_HEADERS])
def test_a_request_does_not_inherit_the_trailers_of_the_one_before(trailers: bytes, size: int) -> None:
    head, plain = b"Host: x\r\nX-A: 0", b"GET / HTTP/1.1\r\nHost: x\r\nX-A: 0\r\nX-B: 0\r\n\r\n"
    chunked = b"POST / HTTP/1.1\r\n%b\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n%b\r\n" % (head, trailers)
    text, found = (chunked + plain) * 2, list[WorkerRequest]()
    parser = RequestParser(found.append)
    for at in range(0, len(text), size):
        parser.feed(text[at : at + size])
    parser.close()
    assert [(each.headers["x-a"], bytes(each.body), each.is_complete) for each in found] == [
        (b"0", b"a", True),
        (b"0", b"", True),
    ] * 2
    assert [set(each.headers) for each in found] == [{"host", "x-a", "transfer-encoding"}, {"host", "x-a", "x-b"}] * 2
    assert not any(each.repeated for each in found)


@pytest.mark.parametrize("trailers", [b"X-B: 1\r\n" * (MAX_HEADERS + 1), b"Host: x\r\nHost: y\r\n"])
def test_trailers_have_the_limits_of_headers(trailers: bytes) -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert is_accepted(head + b"0\r\n\r\n")
    assert not is_accepted(head + b"0\r\n" + trailers + b"\r\n")


def test_each_request_has_its_own_limits() -> None:
    found: list[WorkerRequest] = []
    parser = RequestParser(found.append)
    long_line = b"%b: %b" % (b"a" * 8_000, b"b" * 8_000)
    for _ in range(10):
        for piece in (b"POST / HTTP/1.1\r\nHost: x\r\n", long_line, b"\r\nTransfer-Encoding: chunked" + END):
            parser.feed(piece)
        parser.feed(b"0\r\n" + long_line + END)
    parser.close()
    assert [each.is_complete for each in found] == [True] * 10
