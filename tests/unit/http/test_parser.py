"""Parse heads that arrive in one piece or in several."""

from __future__ import annotations

import pytest

from jobd.http.parser import MAX_LINE_BYTES, MalformedRequest, RequestParser
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
