"""A proxy between clients and a daemon that drops responses, requests and connections as the X-Fault header says.

It records the dropped responses for comparison with those of the repeats.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Final

from tests.support.daemon_process import UnixConnection

FAULTS: Final = (
    "response lost",  # the daemon responds, the client receives nothing
    "response cut",  # the client receives half of the response
    "client gone",  # the request is sent, and its connection closed
    "request lost",
    "request cut",
)


class Proxy:
    """A proxy on a Unix socket in `directory`. `connect` returns connections through it."""

    def __init__(self, directory: Path, behind: str) -> None:
        self._path = str(directory / "proxy.sock")
        self._behind = behind
        self._listener = socket.socket(socket.AF_UNIX)
        self._threads: list[threading.Thread] = []
        self.lost: dict[str, tuple[int, Any]] = {}  # status and body of lost responses, by the X-Call of their requests

    def __enter__(self) -> Proxy:
        self._listener.bind(self._path)
        self._listener.listen(64)
        self._threads.append(threading.Thread(target=self._accept))
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()
        os.unlink(self._path)

    def connect(self) -> http.client.HTTPConnection:
        return UnixConnection(self._path)

    def _accept(self) -> None:
        with suppress(OSError):  # no listener
            while True:
                sock, _ = self._listener.accept()
                thread = threading.Thread(target=self._forward, args=(sock,))
                self._threads.append(thread)
                thread.start()

    def _forward(self, sock: socket.socket) -> None:
        """Forward the requests of one connection until one has a fault."""
        with closing(sock), closing(socket.socket(socket.AF_UNIX)) as behind, suppress(OSError, EOFError):
            behind.connect(self._behind)
            asking, answering = sock.makefile("rb"), behind.makefile("rb")
            with closing(asking), closing(answering):
                while True:
                    head, body, named = _message(asking)
                    fault = named.get("x-fault", "")
                    if fault == "request lost":
                        return
                    if fault == "request cut":
                        behind.sendall(head + body[: len(body) // 2])
                        return
                    behind.sendall(head + body)
                    if fault == "client gone":
                        return
                    response, reason, _ = _message(answering)
                    if fault:
                        self.lost[named["x-call"]] = (int(response.split()[1]), json.loads(reason))
                        if fault == "response cut":
                            sock.sendall((response + reason)[: (len(response) + len(reason)) // 2])
                        return
                    sock.sendall(response + reason)


def _message(stream: Any) -> tuple[bytes, bytes, dict[str, str]]:
    """Read head, body and fields of an HTTP message with a Content-Length. Raise EOFError at the end."""
    lines: list[bytes] = []
    while not lines or lines[-1] != b"\r\n":
        lines.append(stream.readline())
        if not lines[-1]:
            raise EOFError
    named = dict(_fields(lines[1:-1]))
    body = stream.read(int(named.get("content-length", 0)))
    return b"".join(lines), body, named


def _fields(lines: list[bytes]) -> Iterator[tuple[str, str]]:
    for line in lines:
        name, _, value = line.decode().partition(":")
        yield name.strip().lower(), value.strip()
