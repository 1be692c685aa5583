"""One run of a program as a process group of its own: started, fed, read, stopped with all its children.

Knows nothing of jobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Final

from jobd.client.waiting import first_of, settle, within

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

    def __init__(self, process: subprocess.Popen[bytes], kill_after_s: float) -> None:
        loop = asyncio.get_running_loop()
        self.done: Final[asyncio.Future[None]] = loop.create_future()
        self.returncode: int | None = None
        self._process = process
        self._kill_after_s = kill_after_s
        self._kill_at: float | None = None  # loop time; set with the first SIGTERM
        self._readers: list[asyncio.Task[None]] = []
        self._read_bytes = 0
        self._feeding = 0
        self._pipes = contextlib.ExitStack()
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
    ) -> Program:
        """Start it. The feeds get what it says piece by piece, and b"" at the end. Raises OSError."""
        process = await asyncio.to_thread(
            subprocess.Popen,
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=dict(environ),
            start_new_session=True,
        )
        program = cls(process, kill_after_s)
        exited = asyncio.get_running_loop().create_future()
        threading.Thread(target=_wait_for, args=(process.pid, exited), daemon=True).start()
        await program._write(stdin)
        await program._read(process.stdout, on_stdout)
        await program._read(process.stderr, on_stderr)
        program._ending = asyncio.ensure_future(program._end(exited))
        return program

    async def stop(self, at_once: asyncio.Event) -> None:
        """SIGTERM to the whole group, SIGKILL after `kill_after_s` or `at_once`; returns when it is gone, or stuck."""
        self._terminate()
        for patience in (within(self._kill_after_s, at_once), asyncio.sleep(KILLED_S)):
            waiting = asyncio.ensure_future(patience)
            await first_of(self.done, waiting)
            waiting.cancel()
            if self.done.done():
                return
            self.abort()

    def abort(self) -> None:
        """SIGKILL to the whole group."""
        self._signal(signal.SIGKILL)

    # -----------------------------------------------------------------------------------------------------------------

    async def _write(self, data: bytes) -> None:
        """Give the program its input; one that does not read it is not waited for."""
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, self._process.stdin)
        self._pipes.callback(transport.abort)
        transport.write(data)
        transport.write_eof()

    async def _read(self, pipe: IO[bytes] | None, feed: Feed) -> None:
        reader = asyncio.StreamReader(limit=PIECE_BYTES)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        self._pipes.callback(transport.close)
        self._readers.append(asyncio.ensure_future(self._pass_on(reader, feed)))

    async def _pass_on(self, reader: asyncio.StreamReader, feed: Feed) -> None:
        piece = b"-"
        while piece:
            piece = await reader.read(PIECE_BYTES)
            self._read_bytes += len(piece)
            self._feeding += 1
            await feed(piece)
            self._feeding -= 1

    async def _end(self, exited: asyncio.Future[None]) -> None:
        """From the program's exit until nothing of it is left."""
        await exited  # not reaped yet: as long as it is not, nobody else gets the number of its group
        await self._end_group()
        await self._end_output()
        self._pipes.close()
        self.returncode = self._process.wait()
        self.done.set_result(None)

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
        before = self._read_bytes
        while True:
            seen = self._read_bytes
            _, pending = await asyncio.wait(self._readers, timeout=LINGER_S)
            is_silent = self._read_bytes == seen and not self._feeding
            if pending and (is_silent or self._read_bytes - before > LINGER_BYTES):
                for reader in pending:
                    reader.cancel()
                await asyncio.gather(*pending, return_exceptions=True)
            if not pending or all(reader.done() for reader in pending):
                return

    def _terminate(self) -> None:
        if self._kill_at is None:
            self._kill_at = asyncio.get_running_loop().time() + self._kill_after_s
            self._signal(signal.SIGTERM)
            self._signal(signal.SIGCONT)  # a stopped program hears of it too

    def _signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)


def _wait_for(pid: int, exited: asyncio.Future[None]) -> None:
    """Wait, in a thread, until the child has ended, and leave it unreaped."""
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
        exited.get_loop().call_soon_threadsafe(settle, exited)


def has_members(group: int) -> bool:
    """Whether a process of this group is alive. Zombies are not: they wait for their parent only."""
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            stat = Path(entry.path, "stat").read_bytes()
        except OSError:
            continue
        state, _, pgrp = stat[stat.rindex(b")") + 2 :].split(b" ", 3)[:3]
        if int(pgrp) == group and state not in b"ZX":
            return True
    return False
