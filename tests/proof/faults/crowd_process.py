"""Many connections from one process: `python -m tests.proof.faults.crowd_process KIND SOCKET COUNT`.

Prints a line of JSON when all are connected, stays until its stdin closes, and then prints the results.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
import sys
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, Final

from tests.support.malformed_requests import POST

LIST: Final = b"GET /v1/jobs?limit=200 HTTP/1.1\r\nHost: x\r\n\r\n"
HALF: Final = POST + b"Content-Length: 1000\r\n\r\n" + b'{"kind":'
SPARE: Final = 200  # descriptors for everything else
WANTED: Final = 16_384  # descriptors

Outcomes = Counter[str]


def connection_limit() -> int:
    """Raise the limit of descriptors and return how many connections this process and its children may hold."""
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # root may raise it
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(limit, WANTED), max(limit, WANTED)))
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    return limit - SPARE


async def _open(path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    while True:
        sock = socket.socket(socket.AF_UNIX)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        sock.setblocking(False)
        try:
            sock.connect(
                path
            )  # succeeds at once or not at all; asyncio would treat a full backlog as a pending connection
        except BlockingIOError:
            sock.close()
            await asyncio.sleep(0.01)  # let others connect first
        else:
            return await asyncio.open_unix_connection(sock=sock, limit=1_024)


async def idle(path: str, outcomes: Outcomes, is_there: asyncio.Event) -> None:
    """Connect and send nothing."""
    reader, _ = await _open(path)
    is_there.set()
    await reader.read()
    outcomes["closed by the daemon"] += 1


async def slow(path: str, outcomes: Outcomes, is_there: asyncio.Event) -> None:
    """Request a long list and read it slowly."""
    reader, writer = await _open(path)
    writer.write(LIST)
    assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
    is_there.set()
    while await reader.read(512):
        outcomes["small reads"] += 1
        await asyncio.sleep(0.1)
    outcomes["cut off"] += 1


async def half(path: str, outcomes: Outcomes, is_there: asyncio.Event) -> None:
    """Send a part of a body, wait for the error, repeat."""
    while True:
        reader, writer = await _open(path)
        writer.write(HALF)
        is_there.set()
        status = (await reader.readline()).split(b" ")[1:2]
        outcomes[f"responses {status[0].decode()}" if status else "closed without an answer"] += 1
        writer.close()


KINDS: Final[dict[str, Callable[[str, Outcomes, asyncio.Event], Coroutine[Any, Any, None]]]] = {
    "idle": idle,
    "slow": slow,
    "half": half,
}


async def main(kind: str, path: str, count: int) -> None:
    outcomes: Outcomes = Counter()
    assert count <= connection_limit(), f"the limit of open files is too low for {count} connections"
    tasks = []
    for _ in range(count):
        is_there = asyncio.Event()
        tasks.append(asyncio.ensure_future(KINDS[kind](path, outcomes, is_there)))
        if len(tasks) % 500 == 0 or len(tasks) == count:
            await is_there.wait()
    print(json.dumps({"count": count}), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    broken = [task for task in tasks if task.done() and task.exception() is not None]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if broken:
        raise AssertionError(f"{len(broken)} broken, the first: {broken[0].exception()!r}")
    print(json.dumps(outcomes), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
