"""Run a worker as several processes, and kill one whose task does not end at its timeout.

Each child is a worker of its own: it claims, keeps locks and drains by itself. It tells its parent over a socket which
grants it has, one line of JSON for each begin and end. The parent

- kills a child whose task is KILL_AFTER_S past its timeout, fails that attempt, and releases the child's other jobs;
- starts another child for one that was killed, but not for one that an operator stopped. The jobs of a child that
  crashed or was killed from outside are left to their stall rule, as those of any worker that dies;
- passes SIGTERM on. A child whose parent is gone reads the end of the socket, and drains.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from jobd.client.aio import AsyncJobClient
from jobd.client.errors import JobdError
from jobd.client.worker.aio_utils import within
from jobd.client.worker.lock_keeper import LockKeeper
from jobd.client.worker.runner import Execution, on_signals
from jobd.client.worker.service_thread import Log
from jobd.model.times import duration

KILL_AFTER_S: Final = 10.0  # after the timeout of a task, which was then asked to return
RESTART_S: Final = 1.0  # between the end of a child and the start of the next one
SUPERVISED: Final = "--supervised"  # the option that a child gets, with the descriptor of its socket
_KILLS_AT: Final = 3  # the third signal


class RunLine(msgspec.Struct):
    """What a child tells its parent about a run. One without a lock id has ended."""

    token: int
    job_id: str = ""
    lock_id: str = ""
    timeout_s: float | None = None


class ParentLink:
    """The socket to the parent, in the child."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.set_inheritable(False)  # a program that a task starts must not keep it open

    def watch(self, stop: Callable[[], None]) -> None:
        """Call `stop` when the parent is gone."""
        threading.Thread(target=self._wait, args=(stop,), name="jobd parent", daemon=True).start()

    def _wait(self, stop: Callable[[], None]) -> None:
        with contextlib.suppress(OSError):
            self._socket.recv(1)
        stop()

    def began(self, keeper: LockKeeper, execution: Execution) -> None:
        """Tell the parent that this run has begun, and later that it has ended."""
        grant = keeper.grant
        self._send(RunLine(grant.fencing_token, grant.job.id, grant.lock_id, execution.timeout_s))
        execution.done.add_done_callback(lambda _: self._send(RunLine(grant.fencing_token)))

    def _send(self, line: RunLine) -> None:
        with contextlib.suppress(OSError):  # the parent is gone
            self._socket.sendall(msgspec.json.encode(line) + b"\n")


@dataclass(slots=True)
class _ChildRun:
    line: RunLine
    limit: asyncio.TimerHandle | None


class WorkerProcesses:
    """Keep `count` children, each started by `command` with a name of its own, until SIGTERM or SIGINT."""

    def __init__(
        self,
        client: AsyncJobClient,
        command: Sequence[str],
        count: int,
        name: str,
        log: Log,
        *,
        kill_after_s: float = KILL_AFTER_S,
    ) -> None:
        self._client = client
        self._command = list(command)
        self._count = count
        self._name = name
        self._log = log
        self._kill_after_s = kill_after_s
        self._stopping = asyncio.Event()
        self._signals = 0
        self._children: set[asyncio.subprocess.Process] = set()
        self._code = 0

    async def run(self) -> int:
        """Work until stopped, or until a child ends with an error of its own. Return its exit code, else 0."""
        async with self._client:
            with on_signals(self.stop):
                await asyncio.gather(*(self._keep(number) for number in range(1, self._count + 1)))
        return self._code

    def stop(self) -> None:
        """Drain, as on SIGTERM. A second call ends the grace, a third kills the children."""
        self._signals += 1
        self._stopping.set()
        for child in self._children:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and its exit code is still to be read
                child.kill() if self._signals >= _KILLS_AT else child.terminate()

    async def _keep(self, number: int) -> None:
        while not self._stopping.is_set():
            code, has_run = await self._run_child(f"{self._name}-{number}")
            if code == 0:  # an operator stopped it
                return
            if code > 0 and not has_run and not self._stopping.is_set():  # it said why it cannot work
                self._code = code
                self.stop()
            await within(RESTART_S, self._stopping)

    async def _run_child(self, name: str) -> tuple[int, bool]:
        """Run a child to its end, and end its jobs if it was killed here. Return its status, and whether it ran any."""
        ours, theirs = socket.socketpair()
        with theirs:
            descriptor = theirs.fileno()
            child = await asyncio.create_subprocess_exec(
                *self._command,
                *("--name", name, SUPERVISED, str(descriptor)),
                pass_fds=[descriptor],
                start_new_session=True,  # a Ctrl-C reaches this process only
            )
        self._children.add(child)
        if self._stopping.is_set():  # since the child was started
            child.terminate()
        reader, writer = await asyncio.open_connection(sock=ours)
        runs: dict[int, _ChildRun] = {}
        has_run = False
        overdue: list[RunLine] = []
        try:
            while line := await reader.readline():
                has_run = True
                self._on_line(msgspec.json.decode(line, type=RunLine), runs, functools.partial(_kill, child, overdue))
            code = await child.wait()
        finally:
            self._children.discard(child)
            writer.close()
            for run in runs.values():
                if run.limit is not None:
                    run.limit.cancel()
        left = [run.line for run in runs.values()]
        if overdue:
            await self._end(name, overdue[0], [line for line in left if line is not overdue[0]])
        elif code < 0 and not self._stopping.is_set():
            jobs = f" while it ran {', '.join(line.job_id for line in left)}: its lock expires" if left else ""
            self._log(f"process {name} was ended by {signal.Signals(-code).name}{jobs}. Another one is started.")
        return code, has_run

    def _on_line(self, line: RunLine, runs: dict[int, _ChildRun], kill: Callable[[RunLine], None]) -> None:
        if not line.lock_id:
            ended = runs.pop(line.token, None)
            if ended is not None and ended.limit is not None:
                ended.limit.cancel()
            return
        limit = None
        if line.timeout_s is not None:
            limit = asyncio.get_running_loop().call_later(line.timeout_s + self._kill_after_s, kill, line)
        runs[line.token] = _ChildRun(line, limit)

    async def _end(self, name: str, overdue: RunLine, others: Sequence[RunLine]) -> None:
        """Fail the attempt that was over its timeout, and release the other jobs of its process."""
        limit, after = duration((overdue.timeout_s or 0) * 1000), duration(self._kill_after_s * 1000)
        message = f"The run took longer than its timeout of {limit}."
        message += f" It did not end within {after}, so its process was killed."
        self._log(f"job {overdue.job_id}: {message} Another process is started in place of {name}.")
        with contextlib.suppress(JobdError):  # it has ended, or its lock expires
            await self._client.fail_job(
                overdue.job_id, lock_id=overdue.lock_id, error_message=message, error_code="timeout"
            )
        for line in others:
            self._log(f"job {line.job_id} ran in the same process; it is put back.")
            with contextlib.suppress(JobdError):
                await self._client.release_job(line.job_id, lock_id=line.lock_id)


def _kill(child: asyncio.subprocess.Process, overdue: list[RunLine], line: RunLine) -> None:
    if not overdue:
        overdue.append(line)
        child.kill()
