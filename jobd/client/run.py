"""A worker around any program: one run of it for each job. This is `jobctl run` without its command line.

Speaks to the daemon only through shift.py and keeper.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

from msgspec import UNSET

from jobd.client.aio import AsyncJobClient
from jobd.client.claims import LOCK_TTL_MS, Wanted, default_name
from jobd.client.endpoint import Endpoint
from jobd.client.keeper import Keeper, Say
from jobd.client.leftover import left_behind
from jobd.client.output import Filter, Said, Sink, Tail
from jobd.client.program import Program
from jobd.client.protocol import GrantInfo
from jobd.client.shift import Effort, Shift, on_signals

PROGRESS_EVERY_S: Final = 0.2  # a program may report as often as it likes; this often it is sent
MESSAGE_CHARACTERS: Final = 4096
PREFIX: Final = "JOBD_JOB_"
# The fields of a job that its program finds in its environment, as JOBD_JOB_<NAME>.
FIELDS: Final = (
    "id",
    "queue",
    "kind",
    "priority",
    "attempt",
    "max_attempts",
    "stalls",
    "max_stalls",
    "created_at",
    "run_at",
    "started_at",
    "expires_at",
)


class CommandWorker:
    """Claims jobs and runs `command` for each, `concurrency` at a time.

    The program gets the payload as JSON on its stdin and the job's fields as JOBD_JOB_* variables. On its stdout lines
    `::progress 42 text`, `::meta key=value` and `::result download_url|file_path|storage_key=value` are for jobd; the
    rest of it, and stderr, is passed through. Exit 0 completes the job, anything else fails it with the last lines of
    stderr. A lost or cancelled job, and the end of the grace after `stop`, is a SIGTERM to the program's whole process
    group, `kill_after_s` later a SIGKILL; children that outlive their program are stopped in the same way.

    `once` ends after one job, `drain` when no job is due and none is running; it says then what is left, and why.
    `say` gets messages for people, one line each (stderr by default). Locks live `lock_ttl_ms` and are extended by
    themselves.
    """

    def __init__(
        self,
        client: AsyncJobClient | Endpoint | str | None,
        command: Sequence[str],
        *,
        queues: Sequence[str] = ("default",),
        kinds: Sequence[str] | None = None,
        concurrency: int = 1,
        lock_ttl_ms: int = LOCK_TTL_MS,
        grace_s: float = 30.0,
        kill_after_s: float = 10.0,
        once: bool = False,
        drain: bool = False,
        name: str | None = None,
        say: Say | None = None,
        stdout_fd: int = 1,
        stderr_fd: int = 2,
    ) -> None:
        if not command:
            raise ValueError("a command is needed")
        if concurrency < 1:
            raise ValueError("concurrency must be at least 1")
        self.name: Final = name or default_name()
        self._client = client
        self._command = list(command)
        self._wanted = Wanted(worker=self.name, queues=list(queues), kinds=kinds, lock_ttl_ms=lock_ttl_ms)
        self._once = once
        self._drain = drain
        self._concurrency = concurrency
        self._grace_s = grace_s
        self._kill_after_s = kill_after_s
        self._say = say or _say
        self._fds = (stdout_fd, stderr_fd)
        self._shift: Shift | None = None

    def stop(self) -> None:
        """As SIGTERM: claim no more, let running programs end; a second call ends the grace, a third kills them."""
        if self._shift is not None:
            self._shift.stop()

    async def run(self, *, signals: bool = True) -> int:
        """Work until stopped (or `once`, `drain`); with `signals` SIGTERM and SIGINT stop it. Gives the exit status.

        0, or 1 where the program could not be started, or, with `once` and `drain`, not every job was completed.
        Raises the JobdError that made claiming impossible.
        """
        if (fault := await asyncio.to_thread(_fault, self._command[0])) is not None:
            self._say(f"cannot run {self._command[0]!r}: {fault}. No job was claimed.")
            return 1
        async with contextlib.AsyncExitStack() as stack:
            client = self._client
            if not isinstance(client, AsyncJobClient):
                client = await stack.enter_async_context(AsyncJobClient(client))
            sinks = [Sink(fd) for fd in self._fds]
            for sink in sinks:
                stack.callback(sink.close)
            shift = self._shift = self._made(client, *sinks)
            if signals:
                stack.enter_context(on_signals(shift.stop))
            await shift.run()
            if self._drain and not shift.was_stopped and (left := await left_behind(client, self._wanted)):
                self._say(f"drained; {left}.")
        if shift.fault is not None:
            self._say(f"cannot run {self._command[0]!r}: {shift.fault}. Its job was given back.")
            return 1
        return int((self._drain or self._once) and (shift.not_completed > 0 or (self._once and not shift.completed)))

    def _made(self, client: AsyncJobClient, stdout: Sink, stderr: Sink) -> Shift:
        async def begin(keeper: Keeper) -> Effort:
            return await self._begin(keeper, stdout, stderr)

        return Shift(
            client,
            self._wanted,
            begin,
            self._say,
            concurrency=self._concurrency,
            grace_s=self._grace_s,
            stop_s=self._kill_after_s,
            once=self._once,
            drain=self._drain,
            progress_every_s=PROGRESS_EVERY_S,
        )

    async def _begin(self, keeper: Keeper, stdout: Sink, stderr: Sink) -> Effort:
        """Start the program for one job."""
        job = keeper.grant.job
        is_one_of_many = self._concurrency > 1
        said, tail = Said(keeper.report), Tail()
        out = Filter(said, lambda text: self._say(f"job {job.id}: {text}"), whole_lines=is_one_of_many)
        err = Filter(None, self._say, whole_lines=is_one_of_many)

        async def on_stdout(piece: bytes) -> None:
            await stdout.write(out.feed(piece) if piece else out.end())

        async def on_stderr(piece: bytes) -> None:
            tail.feed(piece)
            await stderr.write(err.feed(piece) if piece else err.end())

        payload = b"null" if job.payload is UNSET else bytes(job.payload)
        program = await Program.start(
            self._command,
            environment(keeper.grant, os.environ),
            payload + b"\n",
            on_stdout,
            on_stderr,
            kill_after_s=self._kill_after_s,
        )
        return _Run(program, said, tail)


class _Run:
    """One program at work on one job."""

    def __init__(self, program: Program, said: Said, tail: Tail) -> None:
        self._program = program
        self._said = said
        self._tail = tail
        self.done: Final = program.done
        self.stop: Final = program.stop
        self.abort: Final = program.abort

    async def finish(self, keeper: Keeper, give_up: asyncio.Event) -> bool:
        """Complete the job where the program ended with 0, else fail it."""
        self.done.result()  # raises what went wrong on our side
        code = self._program.returncode
        if code == 0:
            return await keeper.complete(give_up, **self._said.result)
        assert code is not None
        error_code, message = describe(code)
        if self._tail.text:
            message = f"{message} Last lines of stderr:\n{self._tail.text}"
        await keeper.fail(give_up, message[:MESSAGE_CHARACTERS], error_code=error_code)
        return False


def _fault(program: str) -> str | None:
    """Why `program` cannot be started, as far as that shows before it is tried."""
    if shutil.which(program) is not None:
        return None
    if "/" in program:  # a bare name is looked for in PATH alone
        if os.path.isdir(program):
            return "it is a directory"
        if os.path.isfile(program):
            return f"it is not executable: chmod +x {shlex.quote(program)}"
    return "there is no such program"


def environment(grant: GrantInfo, inherited: Mapping[str, str]) -> dict[str, str]:
    """The program's environment: what it inherits, and the job's fields. The `lock_id` stays a secret of ours."""
    values: dict[str, Any] = {field: getattr(grant.job, field) for field in FIELDS}
    values["fencing_token"] = grant.fencing_token
    values["worker"] = None if grant.job.lock is None else grant.job.lock.worker
    named = {f"{PREFIX}{name.upper()}": str(value) for name, value in values.items() if value is not None}
    return {name: value for name, value in inherited.items() if not name.startswith(PREFIX)} | named


def describe(code: int) -> tuple[str, str]:
    """The `error_code` and the sentence for an exit status other than 0, as subprocess has it."""
    if code > 0:
        return f"exit:{code}", f"The program ended with exit status {code}."
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal
        name = str(-code)
    return f"signal:{name}", f"The program was ended by {name}."


def _say(text: str) -> None:
    print(f"jobctl run: {text}", file=sys.stderr, flush=True)
