"""A worker that runs a program for each job. This is `jobctl run` without its command line."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shlex
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, Final

import msgspec
from msgspec import UNSET

from jobd.client.aio import AsyncJobClient
from jobd.client.endpoint import Address
from jobd.client.errors import JobdError
from jobd.client.worker.claimer import LOCK_TTL_MS, ClaimOptions, default_name, describe_claims, describe_process
from jobd.client.worker.error_text import MESSAGE_CHARACTERS
from jobd.client.worker.idle_reasons import pauses, remaining_jobs
from jobd.client.worker.lock_keeper import LockKeeper, describe_failure
from jobd.client.worker.process import Program
from jobd.client.worker.program_output import ControlLines, OutputFilter, OutputWriter, Tail, print_message
from jobd.client.worker.runner import Execution, WorkerRunner, on_signals, seconds
from jobd.client.worker.service_thread import Log, ServiceThread
from jobd.client.worker.watchdog import Watchdog
from jobd.model.responses import GrantView

PROGRESS_EVERY_S: Final = 0.2  # a program may report more often; the latest report is sent
LAST_LINE_CHARACTERS: Final = 200
PREFIX: Final = "JOBD_JOB_"
# Variables of the admin API, which a program does not get, and of an outer `jobctl run`.
REMOVED: Final = ("ADMIN_TOKEN", "ADMIN_READONLY_TOKEN", "JOBD_ADMIN_", PREFIX)
# The fields of a job in the environment of its program, as JOBD_JOB_<NAME>.
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
    """Claim jobs and run `command` for each, `concurrency` at a time.

    The program gets the payload as JSON on its stdin and the job's fields as JOBD_JOB_* variables. Its stdout can
    contain the control lines `::progress 42 text`, `::checkpoint JSON`, `::meta key=value` and
    `::result download_url|file_path|storage_key=value`, one per line. All other output is passed on, and so is stderr.
    Exit status 0 completes the job, any other fails it with the last lines of stderr.

    If the lock is lost, the job is cancelled, or the grace after `stop` has ended, the program's process group gets
    SIGTERM, and SIGKILL `kill_after_s` later. Children that outlive their program are stopped in the same way. A run
    that takes longer than `timeout` (a timedelta, or seconds) is stopped too, and its attempt fails with `error_code`
    "timeout". If this process is killed, a watchdog process stops the groups, with SIGKILL after at most half the TTL
    of the lock. The daemon keeps the end of the output, unless `keep_output` is False.

    `once` ends the worker after one job. `drain` ends it when no job is due, none is running, and no retry of an
    attempt that this worker failed is awaited. It then logs how many jobs are left, and why. With a `concurrency` above
    1, each line of output begins with the id of its job. `log` is called with one-line messages in another thread; by
    default they go to stderr. They say what the worker claims, which of its queues are paused at the start, and which
    jobs fail. Locks last `lock_ttl_ms` and are extended automatically in a separate thread. There is no progress
    timeout unless `progress_timeout_ms` sets one.
    """

    def __init__(
        self,
        client: AsyncJobClient | Address | None,
        command: Sequence[str],
        *,
        queues: Sequence[str] = ("default",),
        kinds: Sequence[str] | None = None,
        concurrency: int = 1,
        lock_ttl_ms: int = LOCK_TTL_MS,
        progress_timeout_ms: int = 0,
        timeout: timedelta | float | None = None,
        grace_s: float = 30.0,
        kill_after_s: float = 10.0,
        once: bool = False,
        drain: bool = False,
        keep_output: bool = True,
        name: str | None = None,
        log: Log | None = None,
        stdout_fd: int = 1,
        stderr_fd: int = 2,
    ) -> None:
        if not command:
            raise ValueError("a command is needed")
        self.name: Final = name or default_name()
        self._client = client
        self._command = list(command)
        self._options = ClaimOptions(
            worker=self.name,
            queues=[queues] if isinstance(queues, str) else list(queues),
            kinds=[kinds] if isinstance(kinds, str) else kinds,
            lock_ttl_ms=lock_ttl_ms,
            progress_timeout_ms=progress_timeout_ms,
            concurrency=concurrency,
            once=once,
            drain=drain,
        )
        self._timeout_s = seconds(timeout)
        self._grace_s = grace_s
        self._kill_after_s = kill_after_s
        self._keep_output = keep_output
        self._log = log or _print
        self._fds = (stdout_fd, stderr_fd)
        self._writers: list[OutputWriter] = []
        self._watchdog = Watchdog(min(kill_after_s, lock_ttl_ms / 2000))  # before another worker can have the job
        self._stop: Callable[[], None] | None = None

    def stop(self) -> None:
        """Stop as on SIGTERM: claim no more jobs, and let running programs end. Thread-safe.

        A second call ends the grace, a third kills the programs.
        """
        if self._stop is not None:
            self._stop()

    async def run(self, *, signals: bool = True) -> int:
        """Work until stopped (or `once`, `drain`) and return the exit status.

        With `signals`, SIGTERM and SIGINT stop it. The status is 1 if the program could not be started or, with `once`
        or `drain`, if a job that it ran is not completed in the end; else 0. Raises the JobdError that prevents
        claiming.
        """
        if (error := await asyncio.to_thread(_start_error, self._command[0])) is not None:
            self._log(f"cannot run {self._command[0]!r}: {error}. No job was claimed.")
            return 1
        client = self._client.twin() if isinstance(self._client, AsyncJobClient) else AsyncJobClient(self._client)
        options = replace(self._options, about=describe_process(self._options.concurrency))
        service = ServiceThread(f"jobd worker {self.name}")
        log = service.background(self._log)
        log(describe_claims(options, client))
        runner = WorkerRunner(
            client,
            options,
            functools.partial(self._begin, log),
            log,
            grace_s=self._grace_s,
            stop_s=self._kill_after_s,
            progress_every_s=PROGRESS_EVERY_S,
        )

        are_all_completed = True

        async def work() -> None:
            nonlocal are_all_completed
            async with client:
                self._writers = [OutputWriter(fd) for fd in self._fds]
                watching = asyncio.ensure_future(self._log_pauses(client, log))
                try:
                    await runner.run()
                finally:
                    watching.cancel()
                    for writer in self._writers:
                        writer.close()
                    await asyncio.to_thread(self._watchdog.close)
                if runner.start_error is not None:
                    log(f"cannot run {self._command[0]!r}: {runner.start_error}. Its job was released.")
                if options.drain and not runner.was_stopped and (left := await remaining_jobs(client, self._options)):
                    log(f"drained; {left}.")
                if options.once or options.drain:
                    are_all_completed = await _are_completed(client, runner.not_completed)

        self._stop = functools.partial(service.call, runner.stop)
        with on_signals(self._stop) if signals else contextlib.nullcontext():
            await service.run(work, runner.abandon)
        ran_none = options.once and not runner.ran_any
        return int(runner.start_error is not None or ran_none or not are_all_completed)

    async def _log_pauses(self, client: AsyncJobClient, log: Log) -> None:
        """Log the pauses of the queues, so that a worker that waits says why. A drain reports them at its end."""
        if not self._options.drain:
            for text in await pauses(client, self._options):
                log(text)

    async def _begin(self, log: Log, keeper: LockKeeper) -> Execution:
        job = keeper.grant.job
        stdout, stderr = self._writers
        prefix = f"{job.id}: ".encode() if self._options.concurrency > 1 else b""
        control_lines, tail = ControlLines(keeper.report), Tail()
        keep = keeper.output.add if self._keep_output else None
        out = OutputFilter(control_lines, lambda text: log(f"job {job.id}: {text}"), prefix=prefix, keep=keep)
        err = OutputFilter(None, log, prefix=prefix, keep=keep)

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
            watchdog=self._watchdog,
            token=keeper.grant.fencing_token,
        )
        return _ProgramExecution(program, control_lines, tail, self._timeout_s, log)


class _ProgramExecution(Execution):
    """The run of a program for one job. It `has_result` never: most programs exit with 0 on SIGTERM, too."""

    def __init__(
        self, program: Program, control_lines: ControlLines, tail: Tail, timeout_s: float | None, log: Log
    ) -> None:
        super().__init__(program.done, timeout_s)
        self._program = program
        self._control_lines = control_lines
        self._tail = tail
        self._log = log

    async def stop(self, at_once: asyncio.Event) -> None:
        await self._program.stop(at_once)

    def abort(self) -> None:
        self._program.abort()

    async def finish(self, keeper: LockKeeper, give_up: asyncio.Event) -> bool:
        """Complete the job if the exit status is 0, else fail it."""
        self.done.result()  # raises an error of jobd itself
        code = self._program.returncode
        if code == 0:
            return await keeper.complete(give_up, **self._control_lines.result)
        error_code, message = describe(code)
        if tail := self._tail.text:  # lists show the first line of the message, so it ends with the last line of stderr
            last = tail.rpartition("\n")[2][:LAST_LINE_CHARACTERS]
            message = f"{message[:-1]}: {last}" + (f"\nLast lines of stderr:\n{tail}" if tail != last else "")
        message = message[:MESSAGE_CHARACTERS]
        if (job := await keeper.fail(give_up, message, error_code=error_code)) is not None:
            self._log(describe_failure(job, error_code.replace("exit:", "exit status ").replace("signal:", "signal ")))
        return False

    def describe_timeout(self) -> str:
        last_lines = f" Last lines of stderr:\n{self._tail.text}" if self._tail.text else ""
        return f"{'' if self.done.done() else ' It cannot be killed.'}{last_lines}"


async def _are_completed(client: AsyncJobClient, job_ids: set[str]) -> bool:
    """Return whether these jobs are completed now: another worker may have run the retries of attempts made here."""
    for job_id in job_ids:
        try:
            if (await client.get_job(job_id)).status != "completed":
                return False
        except JobdError:  # deleted, or unknown
            return False
    return True


def _start_error(program: str) -> str | None:
    """Return why `program` cannot be started, or None if no reason is known in advance."""
    if shutil.which(program) is not None:
        return None
    if "/" in program:  # names without a slash are looked up in PATH only
        if os.path.isdir(program):
            return "it is a directory"
        if os.path.isfile(program):
            return f"it is not executable: chmod +x {shlex.quote(program)}"
    return "there is no such program"


def environment(grant: GrantView, inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the program's environment: the inherited one, and the job's fields without the secret `lock_id`.

    The variables of the admin API are removed: a program needs no admin token. The fields are UTF-8 in every locale.
    """
    values: dict[str, Any] = {field: getattr(grant.job, field) for field in FIELDS}
    values["fencing_token"] = grant.fencing_token
    values["worker"] = None if grant.job.lock is None else grant.job.lock.worker
    for name in ("headers", "checkpoint"):
        if (body := getattr(grant.job, name)) is not UNSET:
            values[name] = msgspec.json.encode(body).decode()
    texts = {name: os.fsdecode(str(value).encode()) for name, value in values.items() if value is not None}
    named = {f"{PREFIX}{name.upper()}": text for name, text in texts.items()}
    return {name: value for name, value in inherited.items() if not name.startswith(REMOVED)} | named


def describe(code: int | None) -> tuple[str, str]:
    """Return the `error_code` and the message for a return code of subprocess other than 0. None: it is unknown."""
    if code is None:
        return "exit:unknown", "The exit status of the program is unknown, because its worker did not reap it."
    if code > 0:
        return f"exit:{code}", f"The program ended with exit status {code}."
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal
        name = str(-code)
    return f"signal:{name}", f"The program was ended by {name}."


def _print(text: str) -> None:
    print_message(f"jobctl run: {text}")
