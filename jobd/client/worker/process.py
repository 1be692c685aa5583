"""One run of a program as a process group of its own: started, fed, read, stopped with all its children.

Knows nothing of jobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import subprocess
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Final

from jobd.client.worker.aio_utils import first_of, settle, within
from jobd.client.worker.watchdog import Watchdog

KILLED_S: Final = 5.0  # after SIGKILL only a process stuck in the kernel is still there
POLL_S: Final = 0.05  # nothing tells when grandchildren end
PIECE_BYTES: Final = 64 << 10
# A child in another group may keep the output open, even write to it for ever. After the end of everything else we
# read on until it is silent for LINGER_S, or has said more than a pipe can hold.
LINGER_S: Final = 0.5
LINGER_BYTES: Final = 1 << 20

Feed = Callable[[bytes], Awaitable[None]]


class Program:
    """A running program; make one with `start`.

    `done` is done when it has ended, nothing of its process group is left and its output is read. `returncode` is then
    as subprocess has it: the exit status, negative for a signal.
    """

    def __init__(self, process: subprocess.Popen[bytes], kill_after_s: float, on_gone: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        self.done: Final[asyncio.Future[None]] = loop.create_future()
        self.returncode: int | None = None
        self._process = process
        self._kill_after_s = kill_after_s
        self._on_gone = on_gone
        self._kill_at: float | None = None  # loop time; set with the first SIGTERM
        self._readers: list[asyncio.Task[None]] = []
        self._read_bytes = 0
        self._enough_bytes = math.inf
        self._feeding = 0
        self._writer: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        environ: Mapping[str, str],
        stdin: bytes,
        on_stdout: Feed,
        on_stderr: Feed,
        *,
        kill_after_s: float,
        watchdog: Watchdog | None = None,
        token: int = 0,
    ) -> Program:
        """Start it. The feeds get its output piece by piece, and b"" at the end. Raises OSError.

        `watchdog` ends the program if this process is killed; `token` identifies it there.
        """

        def popen() -> subprocess.Popen[bytes]:
            if watchdog is not None:
                watchdog.starts(token)
            try:
                process = subprocess.Popen(
                    list(command),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    bufsize=0,
                    env=dict(environ),
                    start_new_session=True,
                )
            except OSError:
                on_gone()
                raise
            if watchdog is not None:
                watchdog.started(token, process.pid)
            return process

        def on_gone() -> None:
            if watchdog is not None:
                with contextlib.suppress(OSError):
                    watchdog.ended(token)

        program = cls(await asyncio.to_thread(popen), kill_after_s, on_gone)
        program._attend(stdin, on_stdout, on_stderr)
        return program

    def _attend(self, stdin: bytes, on_stdout: Feed, on_stderr: Feed) -> None:
        process = self._process
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        for pipe in (process.stdin, process.stdout, process.stderr):
            os.set_blocking(pipe.fileno(), False)
        self._writer = asyncio.ensure_future(self._write(process.stdin, stdin))
        self._readers = [
            asyncio.ensure_future(self._read(process.stdout, on_stdout)),
            asyncio.ensure_future(self._read(process.stderr, on_stderr)),
        ]
        exited = asyncio.get_running_loop().create_future()
        threading.Thread(target=_wait_for, args=(process.pid, exited), daemon=True).start()
        self._ending = asyncio.ensure_future(self._see_out(exited))

    async def stop(self, at_once: asyncio.Event) -> None:
        """SIGTERM to the whole group, SIGKILL after `kill_after_s` or `at_once`; returns when it is gone, or stuck."""
        self._terminate()
        await self._gone(self._kill_after_s, at_once)
        if not self.done.done():
            self.abort()
            await self._gone(KILLED_S, asyncio.Event())

    def abort(self) -> None:
        """SIGKILL to the whole group."""
        self._signal(signal.SIGKILL)

    # -----------------------------------------------------------------------------------------------------------------

    async def _gone(self, time_s: float, event: asyncio.Event) -> None:
        """Wait until it is gone, but neither longer than `time_s` nor after `event`."""
        patience = asyncio.ensure_future(within(time_s, event))
        await first_of(self.done, patience)
        patience.cancel()

    async def _write(self, pipe: IO[bytes], data: bytes) -> None:
        """Give the program its input. It need not read it."""
        rest = memoryview(data)
        with pipe, contextlib.suppress(BrokenPipeError):
            while rest:
                await _ready(pipe, to_write=True)
                with contextlib.suppress(BlockingIOError):
                    rest = rest[os.write(pipe.fileno(), rest) :]

    async def _read(self, pipe: IO[bytes], feed: Feed) -> None:
        """Pass on what the program says, no faster than it is taken."""
        piece = b"-"
        with pipe:
            while piece and self._read_bytes < self._enough_bytes:
                await _ready(pipe)
                try:
                    piece = os.read(pipe.fileno(), PIECE_BYTES)
                except BlockingIOError:
                    continue
                self._read_bytes += len(piece)
                self._feeding += 1
                await feed(piece)
                self._feeding -= 1

    async def _see_out(self, exited: asyncio.Future[None]) -> None:
        try:
            await self._end(exited)
        except Exception as bug:
            self.abort()
            self.done.set_exception(bug)
        else:
            self.done.set_result(None)

    async def _end(self, exited: asyncio.Future[None]) -> None:
        """From the program's exit until nothing of it is left."""
        await exited  # not reaped yet: as long as it is not, nobody else gets the number of its group
        await self._end_group()
        await self._end_output()
        if self._writer is not None:
            self._writer.cancel()
        await asyncio.to_thread(self._on_gone)
        self.returncode = self._process.wait()

    async def _end_group(self) -> None:
        """Stop the children that outlived the program: the next attempt must not meet them."""
        loop = asyncio.get_running_loop()
        while await asyncio.to_thread(has_members, self._process.pid):
            if self._kill_at is None:
                self._terminate()
            elif loop.time() >= self._kill_at:
                self.abort()
            await asyncio.sleep(POLL_S)

    async def _end_output(self) -> None:
        self._enough_bytes = self._read_bytes + LINGER_BYTES
        pending: set[asyncio.Task[None]] = set(self._readers)
        seen = -1
        while pending and (self._feeding or seen != self._read_bytes):
            seen = self._read_bytes
            _, pending = await asyncio.wait(pending, timeout=LINGER_S)
        for reader in pending:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)

    def _terminate(self) -> None:
        if self._kill_at is None:
            self._kill_at = asyncio.get_running_loop().time() + self._kill_after_s
            self._signal(signal.SIGTERM)
            self._signal(signal.SIGCONT)  # a stopped program hears of it too

    def _signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)


async def _ready(pipe: IO[bytes], *, to_write: bool = False) -> None:
    """Wait until `pipe` can be read or written.

    The loop's own pipe transports are not for us: uvloop closes their descriptors twice, the second time perhaps one
    that another thread has just opened.
    """
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    add, remove = (loop.add_writer, loop.remove_writer) if to_write else (loop.add_reader, loop.remove_reader)
    add(pipe.fileno(), settle, ready)
    try:
        await ready
    finally:
        remove(pipe.fileno())


def _wait_for(pid: int, exited: asyncio.Future[None]) -> None:
    """Wait, in a thread, until the child has ended, and leave it unreaped."""
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
        exited.get_loop().call_soon_threadsafe(settle, exited)


def has_members(group: int) -> bool:
    """Whether a process of this group is alive. Zombies are not: they wait for their parent only."""
    with os.scandir("/proc") as entries:
        return any(entry.name.isdigit() and _is_alive_in(group, entry.path) for entry in entries)


def _is_alive_in(group: int, directory: str) -> bool:
    try:
        stat = Path(directory, "stat").read_bytes()
    except OSError:  # it has just ended
        return False
    state, _, pgrp = stat[stat.rindex(b")") + 2 :].split(b" ", 3)[:3]
    return int(pgrp) == group and state not in b"ZX"
