"""Send the same bytes to two versions of the worker listener, and compare all that they send and execute.

`python -m tests.proof.http_differential --against DIR --cases 10000` compares with the listener of another tree of the
repository, and prints each kind of difference with its number and an example. A case is up to five requests, some of
them malformed, in one write, split at random or byte by byte, perhaps with the end of input after them. 40 connections
are open at a time. `test_http_differential.py` compares the ways to send within one version.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Final

import uvloop

from jobd.api.worker_routes import ROUTES
from jobd.http.decoding import Limits
from jobd.model.responses import Response
from tests.support.http_harness import HttpHarness
from tests.support.malformed_requests import EXTENDED, HOSTILE

CONNECTIONS: Final = 40
LIMITS: Final = Limits(body=20_000, body_deadline_s=2.0, idle_s=3.0)
WAYS: Final = ("whole", "split", "bytes")
SHORT: Final = 3_000  # bytes of a case that is sent byte by byte
_CASE_ID: Final = re.compile(r"\bc(\d+)-")
_LINES: Final = (
    b"X-A: b", b"X-A:b ", b"X-A:", b"Accept: */*", b"Connection: keep-alive", b"Connection: close",
    b"Expect: 100-continue", b"Expect: x", b"Content-Length: 0", b"Content-Length: 2",
    b"Content-Length: +2", b"Content-Length: 2 ",
    b"Content-Length:\t2", b"Content-Length: 2,2", b"Transfer-Encoding: chunked", b"Transfer-Encoding: Chunked",
    b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: identity", b"Transfer-Encoding: identity, chunked",
    b"Transfer-Encoding: chunked, identity", b"Transfer-Encoding:", b"Host: y", b"Host:",
    b"Upgrade: h2c\r\nConnection: Upgrade", b"Upgrade: websocket\r\nConnection: upgrade", b"Content-Encoding: gzip",
    b"Content-Type: text/plain", b"Idempotency-Key: k", b"Idempotency-Key: l", b"Authorization: Bearer x", b" folded",
    b"\tfolded", b"no colon", b": no name", b"X A: b", b"X-A : b", b"X-\xc3\xa4: b", b"X-A: \xc3\xa4", b"X-A: \x01",
    b"X-A: \x7f", b"X-A: a\rb", b"X-A: a\nb", b"X-A: a\x00b", b"Cookie: a=b", b"Trailer: X-T", b"User-Agent: a",
    b"Sec-WebSocket-Key1: x", b"X-L: " + b"a" * 8_184, b"X-L: " + b"a" * 8_190,
)  # fmt: skip
_STARTS: Final = (b"", b"", b"", b"", b"\r\n", b"\n", b" ", b"\x00")
_TARGETS: Final = (
    b"/v1/jobs", b"/v1/jobs", b"/v1/jobs", b"/v1/jobs/a%3Ab/cancel", b"/nowhere", b"http://x/v1/jobs", b"http://x@y/v1/jobs",
    b"*", b"/v1/jobs?queue=a", b"/v1/jobs#x", b"//v1/jobs", b"/v1/jobs\xff", b"x", b"/healthz", b"/v1/claim",
)  # fmt: skip
_METHODS: Final = (b"POST", b"POST", b"POST", b"GET", b"GET", b"HEAD", b"PUT", b"CONNECT", b"OPTIONS", b"get", b"PRI")
_VERSIONS: Final = (b"HTTP/1.1",) * 8 + (b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9", b"HTTP/1.2", b"HTTP/1.10", b"http/1.1")


def _chunks(body: bytes, dice: random.Random) -> bytes:
    """Encode a body in chunks, sometimes wrongly."""
    data = b""
    while body:
        size = dice.choice([1, 3, len(body)])
        piece, body = body[:size], body[size:]
        length = dice.choice(
            [b"%x", b"%x", b"%x", b"%X", b"0%x", b"%x;a=b", b'%x;a="b"', b"%x ", b" %x", b"+%x"]
        ) % len(piece)
        data += (
            length + dice.choice([b"\r\n"] * 20 + [b"\n", b"\r"]) + piece + dice.choice([b"\r\n"] * 20 + [b"\n", b""])
        )
    return data + dice.choice(
        [b"0\r\n\r\n"] * 8 + [b"0\r\nX-T: a\r\n\r\n", b"0\r\nContent-Length: 5\r\n\r\n", b"00\r\n\r\n", b"0\n\n"]
    )


def _valid(name: str, dice: random.Random) -> bytes:
    """Return a request that is executed."""
    body = b'{"id":"%b"}' % name.encode()
    head = b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    match dice.randrange(5):
        case 0:
            return b"GET /v1/jobs/%b HTTP/1.1\r\nHost: x\r\n\r\n" % name.encode()
        case 1:
            size = dice.choice([1, 3, 100])
            pieces = b"".join(
                b"%x\r\n%b\r\n" % (len(body[at : at + size]), body[at : at + size]) for at in range(0, len(body), size)
            )
            return head + b"Transfer-Encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n"
        case 2:
            body = body.ljust(dice.choice([9_000, 20_000]))
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def _unusual(name: str, dice: random.Random) -> bytes:
    """Return a request of parts that are combined at random."""
    body = dice.choice([b"", b'{"id":"%b"}' % name.encode(), b"{}", b"x" * 20_001])
    method, target = dice.choice(_METHODS), dice.choice(_TARGETS)
    lines = [b" ".join((method, target, dice.choice(_VERSIONS)))]
    lines += [b"Host: x"] * dice.choice([0] + [1] * 12 + [2])
    lines += [b"Content-Type: application/json"] * (dice.random() < 0.8)
    if body and dice.random() < 0.3:
        lines.append(b"Transfer-Encoding: chunked")
        body = _chunks(body, dice)
    elif body and dice.random() < 0.95:
        lines.append(b"Content-Length: %d" % (len(body) + dice.choice([0] * 10 + [1, -1])))
    lines += [dice.choice(_LINES) for _ in range(dice.choice([0, 0, 1, 1, 2]))]
    if dice.random() < 0.2:
        dice.shuffle(lines[1:])
    end = dice.choice([b"\r\n"] * 30 + [b"\n", b"\r", b"\r\r\n"])
    return dice.choice(_STARTS) + end.join(lines) + end + b"\r\n" + body


def _mutated(data: bytes, dice: random.Random) -> bytes:
    """Change some bytes."""
    changed = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 5])):
        at = dice.randrange(len(changed))
        match dice.randrange(4):
            case 0:
                changed[at] = dice.randrange(256)
            case 1:
                changed[at:at] = bytes([dice.choice(b"\r\n\t :;,\x00\x7f\xff0aA")])
            case 2:
                del changed[at]
            case _:
                changed[at:at] = changed[at : at + dice.randrange(30)]
        if not changed:
            break
    return bytes(changed)


def make_case(number: int) -> tuple[bytes, bool]:
    """Return the bytes of a case, and whether the client stops sending after them."""
    dice = random.Random(number)
    data = b""
    for part in range(dice.choice([1, 1, 2, 3, 5])):
        name = f"c{number}-{part}"
        kind = dice.random()
        if kind < 0.45:
            data += _valid(name, dice)
        elif kind < 0.75:
            data += _unusual(name, dice)
        elif kind < 0.93:
            data += _mutated(_valid(name, dice), dice)
        else:
            known = {key: text for key, text in {**HOSTILE, **EXTENDED}.items() if len(text) < 20_000}
            data += known[dice.choice(sorted(known))]
    last = b"GET /v1/jobs/c%d-last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % number
    return data + last, dice.random() < 0.1


async def _send(client: socket.socket, data: bytes, way: str, dice: random.Random) -> None:
    loop = asyncio.get_running_loop()
    if way == "whole":
        cuts = []
    elif way == "split" or len(data) > SHORT:
        cuts = sorted(dice.randrange(len(data)) for _ in range(dice.choice([1, 3, 8])))
    else:
        cuts = list(range(1, len(data)))
    for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
        try:
            await loop.sock_sendall(client, data[start:end])
        except ConnectionError:
            return
        await asyncio.sleep(0)


def parse_responses(data: bytes) -> list[Any]:
    """Split responses into status, headers but Date, and body. The rest that is no response comes last."""
    found: list[Any] = []
    while data.startswith(b"HTTP/1.1 ") and b"\r\n\r\n" in data:
        head, _, data = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = dict(sorted(line.lower().split(": ", 1) for line in lines))
        headers.pop("date", None)
        size = 0 if first.startswith("HTTP/1.1 100") else int(headers.get("content-length", "0"))
        is_head = not data.startswith(b"{") and size > 0
        body, data = (b"", data) if is_head else (data[:size], data[size:])
        found.append([first, headers, body.decode("latin-1")])
    return [*found, data.decode("latin-1")] if data else found


async def _run_case(harness: HttpHarness, number: int, way: str) -> list[Any]:
    data, is_half_closed = make_case(number)
    loop = asyncio.get_running_loop()
    received = b""
    with socket.socket(socket.AF_UNIX) as client:
        client.setblocking(False)
        client.connect(harness.path)
        try:
            async with asyncio.timeout(20):
                await _send(client, data, way, random.Random(f"{number} {way}"))
                if is_half_closed:
                    client.shutdown(socket.SHUT_WR)
                while True:
                    with contextlib.suppress(
                        ConnectionError
                    ):  # it had unread input; the response comes after this error
                        if not (piece := await loop.sock_recv(client, 1 << 16)):
                            break
                        received += piece
        except TimeoutError:
            received += b"timeout"
    return parse_responses(received)


async def _run(first: int, count: int, ways: tuple[str, ...]) -> list[Any]:
    with tempfile.TemporaryDirectory() as directory:
        async with HttpHarness(ROUTES, Path(directory), limits=LIMITS) as harness:
            harness.actor.respond = lambda command: Response(f"{type(command).__name__} {getattr(command, 'id', None)}")
            results: dict[tuple[int, str], list[Any]] = {}
            todo = [(number, way) for number in range(first, first + count) for way in ways]
            executed: dict[str, Counter[str]] = {}

            async def work() -> None:
                while todo:
                    number, way = todo.pop()
                    results[number, way] = await _run_case(harness, number, way)

            for way in ways:  # so that the commands of each way can be told apart
                own = [each for each in todo if each[1] == way]
                others = [each for each in todo if each[1] != way]
                todo[:] = own
                harness.actor.received.clear()
                await asyncio.gather(*(work() for _ in range(CONNECTIONS)))
                todo[:] = others
                executed[way] = Counter(
                    _CASE_ID.findall(" ".join(repr(each.command) for each in harness.actor.received))
                )
    return [[number, way, answers, executed[way][str(number)]] for (number, way), answers in sorted(results.items())]


def run(first: int, count: int, ways: tuple[str, ...] = WAYS) -> list[Any]:
    """Return number, way, responses and number of executed commands of each case."""
    return uvloop.run(_run(first, count, ways))


def _run_in(tree: Path, first: int, count: int) -> subprocess.Popen[bytes]:
    words = [sys.executable, __file__, "--first", str(first), "--cases", str(count)]
    return subprocess.Popen(
        words, cwd=tree, env={"PYTHONPATH": str(tree)}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )


def _shape(result: Any) -> str:
    """Return what identifies a kind of difference."""
    _, _, answers, executed = result
    return (
        " ".join(each[0].split(" ")[1] if isinstance(each, list) else repr(each[:20]) for each in answers)
        + f" ({executed} run)"
    )


def _compare(tree: Path, first: int, count: int) -> None:
    kinds: dict[str, list[Any]] = {}
    here = Path(__file__).parents[2]
    for start in range(first, first + count, 500):
        both = [_run_in(each, start, min(500, first + count - start)) for each in (tree, here)]
        old, new = (json.loads(process.communicate()[0]) for process in both)
        for before, after in zip(old, new, strict=True):
            if before != after:
                kinds.setdefault(f"{_shape(before)} -> {_shape(after)}", []).append((before, after))
        print(
            f"{start + 500 - first} cases, {sum(map(len, kinds.values()))} differ in {len(kinds)} ways",
            file=sys.stderr,
            flush=True,
        )
    for kind, found in sorted(kinds.items(), key=lambda each: -len(each[1])):
        before, after = found[0]
        case, what = make_case(before[0])[0][:1000], f"case {before[0]} {before[1]}"
        print(f"{len(found)}x {kind}\n  {what}: {case!r}\n  old {before[2:]!r}\n  new {after[2:]!r}\n"[:4000])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--cases", type=int, default=1_000)
    options = parser.parse_args()
    if options.against is not None:
        _compare(options.against.resolve(), options.first, options.cases)
    else:
        import structlog

        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
        json.dump(run(options.first, options.cases), sys.stdout)


if __name__ == "__main__":
    main()
