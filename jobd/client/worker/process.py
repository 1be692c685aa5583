"""Run a program in its own process group: start it, write its input, read its output, stop it with its children."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Final

from jobd.client.worker import exec_program
from jobd.client.worker.aio_utils import call_on, done_within, first_of, settle
from jobd.client.worker.watchdog import Watchdog

KILLED_S: Final = 5.0  # for processes to end after SIGKILL, unless they hang in the kernel
READ_S: Final = 2.0  # for the rest of the output of a stopped program to be passed on; less than KILLED_S
POLL_S: Final = 0.05  # there is no notification of the end of grandchildren
PIECE_BYTES: Final = 64 << 10
# A child in another group may keep the output open, or even write to it forever. After all other processes have ended,
# reading stops when there is no output for LINGER_S, after LINGER_ROUNDS such times that end with all output passed on,
# or after LINGER_BYTES, which is more than a pipe can hold.
LINGER_S: Final = 0.5
LINGER_ROUNDS: Final = 10
LINGER_BYTES: Final = 1 << 20

Feed = Callable[[bytes], Awaitable[None]]


class Program:
    """A running program; create one with `start`.

    `done` is done when the program has ended, its process group is empty and its output is read. After `stop` or
    `abort`, it does not wait for longer than READ_S for a feed that does not take the output. `returncode` is then
    that of subprocess: the exit status, or negative for a signal. It is None if another part of this process, or the
    kernel because SIGCHLD is ignored, has reaped the program.
    """

    def __init__(self, process: subprocess.Popen[bytes], kill_after_s: float, on_gone: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        self.done: Final[asyncio.Future[None]] = loop.create_future()
        self.returncode: int | None = None
        self._process = process
        self._is_reaped = False
        self._kill_after_s = kill_after_s
        self._on_gone = on_gone
        self._kill_at_s: float | None = None  # loop time; set with the first SIGTERM
        self._readers: list[asyncio.Task[None]] = []
        self._read_bytes = 0
        self._enough_bytes = math.inf
        self._feeding = 0
        self._stopping = asyncio.Event()
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
        """Start a program. Raises OSError, and RuntimeError if no thread can be started; the program is then killed.

        The feeds get its output in pieces, and b"" at the end. `watchdog` stops the program if this process is
        killed; `token` identifies the program to the watchdog.
        """

        def popen() -> subprocess.Popen[bytes]:
            if watchdog is not None:
                watchdog.starting(token)
            try:
                process = _popen(command, environ)
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

        process = await asyncio.to_thread(popen)
        program = cls(process, kill_after_s, on_gone)
        try:
            program._watch(stdin, on_stdout, on_stderr)
        except RuntimeError:
            with process:  # closes its pipes, and waits for its end
                program.abort()
            on_gone()
            raise
        return program

    def _watch(self, stdin: bytes, on_stdout: Feed, on_stderr: Feed) -> None:
        process = self._process
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        for pipe in (process.stdin, process.stdout, process.stderr):
            os.set_blocking(pipe.fileno(), False)
        exited: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        threading.Thread(target=_wait_for, args=(process.pid, exited), daemon=True).start()
        self._writer = asyncio.ensure_future(self._write(process.stdin, stdin))
        self._readers = [
            asyncio.ensure_future(self._read(process.stdout, on_stdout)),
            asyncio.ensure_future(self._read(process.stderr, on_stderr)),
        ]
        self._ending = asyncio.ensure_future(self._finish(exited))

    async def stop(self, at_once: asyncio.Event) -> None:
        """Send SIGTERM to the whole group, and SIGKILL after `kill_after_s` or `at_once`.

        Return when the program has ended, or cannot be killed.
        """
        self._stopping.set()
        self._terminate()
        await done_within(self._kill_after_s, self.done, at_once)
        if not self.done.done():
            self.abort()
            await asyncio.wait([self.done], timeout=KILLED_S)

    def abort(self) -> None:
        """Send SIGKILL to the whole group."""
        self._stopping.set()
        self._signal(signal.SIGKILL)

    async def _write(self, pipe: IO[bytes], data: bytes) -> None:
        """Write the program's input. The program need not read it."""
        rest = memoryview(data)
        with pipe, contextlib.suppress(BrokenPipeError):
            while rest:
                await _ready(pipe, to_write=True)
                with contextlib.suppress(BlockingIOError):
                    rest = rest[os.write(pipe.fileno(), rest) :]

    async def _read(self, pipe: IO[bytes], feed: Feed) -> None:
        """Pass the program's output to the feed, at the speed of the feed."""
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

    async def _finish(self, exited: asyncio.Future[int | None]) -> None:
        try:
            await self._end(exited)
        except Exception as bug:
            self.abort()
            self.done.set_exception(bug)
        else:
            self.done.set_result(None)

    async def _end(self, exited: asyncio.Future[int | None]) -> None:
        """Wait for the program's exit, then for its group and its output."""
        status = await exited  # the program is not reaped yet, so the id of its group cannot be reused
        await self._end_group()
        await self._end_output()
        if self._writer is not None:
            self._writer.cancel()
        await asyncio.to_thread(self._on_gone)
        self._process.wait()
        self._is_reaped, self.returncode = True, status

    async def _end_group(self) -> None:
        """Stop children that outlive the program, because they could interfere with the next attempt."""
        loop = asyncio.get_running_loop()
        while await asyncio.to_thread(has_members, self._process.pid):
            if self._kill_at_s is None:
                self._terminate()
            elif loop.time() >= self._kill_at_s:
                self._signal(signal.SIGKILL)
            await asyncio.sleep(POLL_S)

    async def _end_output(self) -> None:
        """Read the rest of the output. A stopped program does not wait for a feed that is blocked."""
        rest = asyncio.ensure_future(self._read_rest())
        stopping = asyncio.ensure_future(self._stopping.wait())
        await first_of(rest, stopping)
        await asyncio.wait([rest], timeout=READ_S)
        for task in (rest, stopping, *self._readers):
            task.cancel()
        await asyncio.gather(rest, stopping, *self._readers, return_exceptions=True)

    async def _read_rest(self) -> None:
        self._enough_bytes = self._read_bytes + LINGER_BYTES
        pending: set[asyncio.Task[None]] = set(self._readers)
        seen, rounds = -1, 0
        while pending and (self._feeding or seen != self._read_bytes or self._has_output()) and rounds < LINGER_ROUNDS:
            seen = self._read_bytes
            _, pending = await asyncio.wait(pending, timeout=LINGER_S)
            rounds += not self._feeding

    def _has_output(self) -> bool:
        """Return whether a pipe has output or its end, which the readers had no time to read."""
        poll = select.poll()
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None and not pipe.closed:
                poll.register(pipe, select.POLLIN)
        return bool(poll.poll(0))

    def _terminate(self) -> None:
        if self._kill_at_s is None:
            self._kill_at_s = asyncio.get_running_loop().time() + self._kill_after_s
            self._signal(signal.SIGTERM)
            self._signal(signal.SIGCONT)  # a stopped program cannot handle SIGTERM

    def _signal(self, number: signal.Signals) -> None:
        if not self._is_reaped:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)


async def _ready(pipe: IO[bytes], *, to_write: bool = False) -> None:
    """Wait until `pipe` can be read or written.

    The loop's pipe transports are not used, because uvloop closes their descriptors twice, and the second close can hit
    a descriptor that another thread has just opened.
    """
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    add, remove = (loop.add_writer, loop.remove_writer) if to_write else (loop.add_reader, loop.remove_reader)
    add(pipe.fileno(), settle, ready)
    try:
        await ready
    finally:
        remove(pipe.fileno())


def _popen(command: Sequence[str], environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start `command` through `exec_program`. Raises OSError if it cannot be executed."""
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as errors:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", exec_program.__file__, str(os.getpid()), str(writer), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                env=dict(environ),
                start_new_session=True,
                pass_fds=[writer],
            )
        finally:
            os.close(writer)
        error = errors.read()  # ends when the program is executed
    if error == exec_program.READY:
        return process
    _, output = process.communicate()
    if not error:  # for example, a new version of jobd has replaced the files of this one
        lines = output.decode(errors="replace").splitlines() or [f"exit status {process.returncode}"]
        raise OSError(errno.ENOEXEC, f"{exec_program.__file__} has failed: {lines[-1]}", command[0])
    number = int(error.removeprefix(exec_program.READY))
    raise OSError(number, os.strerror(number), command[0])


def _wait_for(pid: int, exited: asyncio.Future[int | None]) -> None:
    """Wait, in a thread, until the child has ended. Leave it unreaped. The result is its return code, if known.

    subprocess itself takes an unknown return code for 0.
    """
    status: int | None = None
    with contextlib.suppress(ChildProcessError):
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        if ended is not None:
            status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
    call_on(exited.get_loop(), settle, exited, status)


def has_members(group: int) -> bool:
    """Return whether a process of this group is alive. Zombies do not count."""
    with os.scandir("/proc") as entries:
        return any(entry.name.isdigit() and _is_alive_in(group, entry.path) for entry in entries)


def _is_alive_in(group: int, directory: str) -> bool:
    try:
        stat = Path(directory, "stat").read_bytes()
    except OSError:  # it has just ended
        return False
    state, _, pgrp = stat[stat.rindex(b")") + 2 :].split(b" ", 3)[:3]
    return int(pgrp) == group and state not in b"ZX"
