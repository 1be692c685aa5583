"""Giant, malformed, compressed and smuggled requests to every listener: 4xx or a closed connection, no delay elsewhere.

The requests are in tests/support/malformed_requests.py.
"""

from __future__ import annotations

import contextlib
import gzip
import http.client
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

from tests.proof.faults.harness import Counts, Trial, check
from tests.support.daemon_process import TOKEN, DaemonProcess, call, free_port
from tests.support.malformed_requests import EXPENSIVE, EXTENDED, HOSTILE, post

LAG_MS: Final = 20.0
ANSWERED_S: Final = 20.0  # bodies have 10 s to arrive
BOMB: Final = gzip.compress(bytes(64 << 20))  # 64 KB that would be 64 MiB

FRAMED: Final = ("length", "coding", "chunk size")  # cases in which the end of the request is ambiguous

Connect = Callable[[], socket.socket]


class NormalClient:
    """A normal client that sends requests continuously. `longest_wait` measures it while a block runs."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self._daemon = daemon
        self._stop = threading.Event()
        self._turn = threading.Condition()
        self._asked = 0
        self._worst_s = 0.0
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> NormalClient:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _ask(self) -> None:
        with closing(self._daemon.worker()) as connection:
            while not self._stop.is_set():
                began_s = time.perf_counter()
                assert call(connection, "GET", "/healthz").status == 200
                with self._turn:
                    self._worst_s = max(self._worst_s, time.perf_counter() - began_s)
                    self._asked += 1
                    self._turn.notify_all()

    @contextmanager
    def longest_wait(self) -> Iterator[list[float]]:
        """Yield a list that receives the longest wait in ms, after the block and the request pending at its end."""
        waits: list[float] = []
        self._wait_for_responses(1)
        with self._turn:
            self._worst_s = 0.0
        yield waits
        self._wait_for_responses(2)
        with self._turn:
            waits.append(self._worst_s * 1000)

    def _wait_for_responses(self, more: int) -> None:
        with self._turn:
            until = self._asked + more
            assert self._turn.wait_for(lambda: self._asked >= until or not self._thread.is_alive(), ANSWERED_S)
            assert self._thread.is_alive(), "the normal client got no response"


def status_of(connect: Connect, request: bytes) -> int:
    """Return the status of the response, or 0 if the connection was closed. Fail if neither happens in time."""
    received = response_head(connect, request)
    return int(received.split(b" ", 2)[1]) if received.startswith(b"HTTP/1.1 ") else 0


def response_head(connect: Connect, request: bytes) -> bytes:
    """Return the start of the response, at least its head; empty if the connection was closed."""
    with connect() as sock:
        sock.settimeout(ANSWERED_S)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(request)  # rejected before its end: the response was sent all the same
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while b"\r\n\r\n" not in received and (piece := sock.recv(65_536)):
                received += piece
    return received


def with_token(request: bytes) -> bytes:
    """Return the same request with the token."""
    first, end, rest = request.partition(b"\r\n")
    return first + end + f"Authorization: Bearer {TOKEN}\r\n".encode() + rest if b" HTTP/1" in first else request


def _requests() -> dict[str, bytes]:
    dear = {name: post(path, body) for name, (path, body) in EXPENSIVE.items()}
    bombs = {
        f"bomb {coding}": post("/v1/jobs", BOMB, f"Content-Encoding: {coding}")
        for coding in ("gzip", "deflate", "br", "zstd", "identity, gzip")
    }
    return {**HOSTILE, **EXTENDED, **dear, **bombs}


def _listeners(daemon: DaemonProcess, port: int) -> dict[str, Connect]:
    def unix(path: str) -> socket.socket:
        opened = socket.socket(socket.AF_UNIX)
        opened.connect(path)
        return opened

    return {
        "worker socket": lambda: unix(daemon.socket),
        "worker port": lambda: socket.create_connection(("127.0.0.1", port)),
        "admin socket": lambda: unix(daemon.admin_socket),
    }


@contextmanager
def running_daemon(directory: Path) -> Iterator[tuple[DaemonProcess, dict[str, Connect]]]:
    """Run a daemon with three listeners: two for workers, one for operators."""
    token, port = directory / "worker-token", free_port()
    token.write_text(TOKEN)
    environ = {"JOBD_WORKER_LISTEN": f"127.0.0.1:{port}", "JOBD_WORKER_TOKEN_FILE": str(token)}
    with DaemonProcess(directory, "", **environ) as daemon:
        yield daemon, _listeners(daemon, port)
        assert daemon.post("/v1/jobs", {"payload": "honest"}).status == 201
        assert daemon.stop() == 0
        assert b" level=error " not in daemon.log, daemon.log[-4000:]
        assert b"Traceback" not in daemon.log


@check(rounds=5)
def hostile_requests(trial: Trial) -> Counts:
    """Giant, malformed, compressed requests to each listener: 4xx or disconnect, others wait 20 ms at most."""
    statuses: Counter[int] = Counter()
    lags: dict[str, list[float]] = {}
    sys.setswitchinterval(0.0005)  # the normal client does not wait for this one
    with running_daemon(trial.directory) as (daemon, listeners), NormalClient(daemon) as probe:
        for _ in range(trial.rounds):
            for listener, connect in listeners.items():
                for name, request in _requests().items():
                    for sent in {request, with_token(request)} if listener != "worker socket" else {request}:
                        with probe.longest_wait() as waits:
                            status = status_of(connect, sent)
                        assert status == 0 or 400 <= status < 500, f"{name} on the {listener}: {status}"
                        statuses[status] += 1
                        lags.setdefault(f"{name} on the {listener}, {len(sent)} bytes", []).extend(waits)
    # The cost of a request occurs each time; interference by other processes does not.
    worst, slowest = max((statistics.median(waits), name) for name, waits in lags.items())
    assert worst <= LAG_MS or not trial.timed, f"{slowest} keeps honest clients waiting for {worst:.1f} ms"
    counts = {f"responses {status}" if status else "closed": count for status, count in sorted(statuses.items())}
    return {"requests": statuses.total(), **counts, "ms of waiting for other clients, at most": round(worst)}


@check(rounds=5)
def smuggled_requests(trial: Trial) -> Counts:
    """Pipelined requests are answered in order; nothing behind a malformed request is done."""
    requests = ended = 0
    with running_daemon(trial.directory) as (daemon, listeners):
        for number in range(trial.rounds):
            count = 100 + number % 400
            lines = b"".join(f"GET /v1/jobs/none-{n} HTTP/1.1\r\nHost: x\r\n\r\n".encode() for n in range(count))
            with listeners["worker socket"]() as sock:
                sock.settimeout(ANSWERED_S)
                sock.sendall(lines)
                with sock.makefile("rb") as received:
                    for n in range(count):
                        assert b" 404 " in received.readline()
                        headers = http.client.parse_headers(received)
                        assert f"There is no job none-{n}:" in received.read(int(headers["Content-Length"])).decode()
                requests += count
            for name, carrier in {**HOSTILE, **EXTENDED}.items():
                hidden = f"smuggled-{number}-{name.replace(' ', '-').replace(',', '')}"
                head = response_head(
                    listeners["worker socket"], carrier + post("/v1/jobs", f'{{"id":"{hidden}"}}'.encode())
                )
                is_over = not head or b"\r\nConnection: close\r\n" in head
                # With unambiguous framing it was a separate request after a rejected one.
                assert is_over or not any(word in name for word in FRAMED), f"{name}: {head!r}"
                assert not is_over or daemon.get(f"/v1/jobs/{hidden}").status == 404, f"smuggled behind {name}"
                ended += is_over
                requests += 1
    return {"requests": requests, "connections closed after a malformed one": ended}
