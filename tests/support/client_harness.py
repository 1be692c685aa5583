"""Workers that run during a test, and a daemon that follows a script, for the tests of the clients."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from msgspec import Raw, json

from jobd.client import AsyncJobClient, CommandWorker, JobClient, JobdError, JobView, Worker
from jobd.client.worker.process import Program
from jobd.core.views import job_view
from jobd.model.clocks import LockMs
from jobd.model.commands import Moment
from jobd.model.job import Job, Options, Policy
from tests import ROOT
from tests.support.daemon_process import die_with_us
from tests.support.polling import wait_until
from tests.support.scripted_server import ReceivedRequest, ScriptedServer, Step, ok, serving

_NEW = Job(1, "j1", Options(), "queued", 1, 1, 1)
_VIEW = job_view(_NEW, Moment(1, LockMs(1), 0), Policy(), payload=Raw(b'{"a": 1}'))
JOB: dict[str, Any] = json.decode(json.encode(_VIEW)) | {"metadata": {"m": [1]}, "a_field_of_the_future": 1}


@contextlib.asynccontextmanager
async def running_worker(worker: Worker) -> AsyncIterator[asyncio.Task[None]]:
    """Run the worker during the block, then drain it."""
    serving = asyncio.create_task(worker.serve())
    try:
        yield serving
        worker.stop()
        await serving
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


async def finished(client: AsyncJobClient, queue: str, handler: Callable[[Any], Any], **job: Any) -> JobView:
    """Create a job, run a worker with this handler, and return the job when it has ended."""
    worker = Worker(client, queues=[queue])
    worker.handler()(handler)
    created = await client.create_job(queue=queue, **job)
    async with running_worker(worker):
        return await wait_until_finished(client, created.id)


def either(kind: str, where: str, *steps: Callable[[Any], Any], **options: Any) -> Any:
    """Call `steps` with a blocking or an asyncio client, or one over a stream. Return the result of the last one."""
    if kind == "sync":
        with JobClient(where, **options) as client:
            return [step(client) for step in steps][-1]

    async def run() -> Any:
        client = AsyncJobClient(where, **options)
        async with client.stream() if kind == "stream" else client as jobs:
            return [await step(jobs) for step in steps][-1]

    return asyncio.run(run())


def listen(
    kind: str, where: str, until: int | None = None, *, client: Mapping[str, Any] | None = None, **options: Any
) -> tuple[list[int], JobdError | None]:
    """Read events with one of the clients. Return their numbers up to `until`, and the error at the end."""
    found: list[int] = []
    settings = {"retry_for_s": 0, **(client or {})}

    async def read() -> None:
        async with AsyncJobClient(where, **settings) as jobs:
            async for event in jobs.events(**options):
                found.append(event.seq)
                if event.seq == until:
                    return

    try:
        if kind == "asyncio":
            asyncio.run(read())
            return found, None
        with JobClient(where, **settings) as jobs:
            for event in jobs.events(**options):
                found.append(event.seq)
                if event.seq == until:
                    break
    except JobdError as error:
        return found, error
    return found, None


async def wait_for_job(client: AsyncJobClient, job_id: str, condition: Callable[[JobView], bool]) -> JobView:
    """Wait until the job meets the condition, and return it."""
    seen: list[JobView] = []

    async def check() -> bool:
        seen.append(await client.get_job(job_id))
        return condition(seen[-1])

    await wait_until(check)
    return seen[-1]


async def wait_until_finished(client: AsyncJobClient, job_id: str) -> JobView:
    """Wait until the job has ended, and return it."""
    return await wait_for_job(client, job_id, lambda job: job.finished_at is not None)


async def event_types(client: AsyncJobClient, job_id: str) -> list[str]:
    """Return the types of the job's events."""
    return [event.type for event in await client.timeline(job_id)]


TTL_MS = 30  # the daemon itself does not allow one this short
GRANT = {
    "job": JOB,
    "lock_id": "secret",
    "fencing_token": 1,
    "lock_expires_at": 1,
    "ttl_ms": TTL_MS,
    "progress_due_at": None,
}


class ScriptedDaemon:
    """A daemon that grants one job and responds to calls on it by a script, whose last response repeats."""

    def __init__(self, **responses: list[Step]) -> None:
        self.server = ScriptedServer()
        self.server.always = self._respond
        self._responses = {"claim": [ok({"grants": [GRANT]}), ok({"grants": []})]} | responses
        self._state = ok({"lock_expires_at": 1, "ttl_ms": TTL_MS, "progress_due_at": None})

    def _respond(self, received: ReceivedRequest) -> Step:
        verb = received.path.rsplit("/", 1)[-1]
        responses = self._responses.get(verb, [self._state if verb in ("extend", "progress") else ok(JOB)])
        return responses.pop(0) if len(responses) > 1 else responses[0]

    def bodies(self, verb: str) -> list[Any]:
        return [received.json for received in self.server.received if received.path.endswith(f"/{verb}")]

    async def receive(self, verb: str, count: int = 1) -> None:
        """Wait until the daemon has received `count` calls of this verb."""
        await wait_until(lambda: len(self.bodies(verb)) >= count)


@contextlib.asynccontextmanager
async def working(
    directory: Path, handler: Callable[[Any], Any], *, responses: dict[str, list[Step]] | None = None, **options: Any
) -> AsyncIterator[ScriptedDaemon]:
    """Run a worker with this handler and a ScriptedDaemon during the block."""
    daemon = ScriptedDaemon(**(responses or {}))
    with serving(daemon.server, directory / "p") as endpoint:
        worker = Worker(endpoint, **options)
        worker.handler()(handler)
        async with running_worker(worker):
            yield daemon


async def nothing(task: Any) -> None:
    """Handle a job without work."""


class ProgramRun:
    """A program and its output."""

    def __init__(self) -> None:
        self.out = bytearray()
        self.err = bytearray()
        self.has_output = asyncio.Event()

    async def start(self, *command: str, stdin: bytes = b"", kill_after_s: float = 10, **environ: str) -> Program:
        async def on_out(piece: bytes) -> None:
            self.out += piece
            self.has_output.set()

        async def on_err(piece: bytes) -> None:
            self.err += piece

        return await Program.start(command, {**os.environ, **environ}, stdin, on_out, on_err, kill_after_s=kill_after_s)


class CommandRun:
    """A CommandWorker whose output goes to files and whose messages are collected."""

    def __init__(self, client: Any, directory: Path, queue: str, script: str, **options: Any) -> None:
        self.messages: list[str] = []
        self._out, self._err = directory / "out", directory / "err"
        self._fds = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in (self._out, self._err)]
        self.worker = CommandWorker(
            client,
            ["sh", "-c", script],
            queues=[queue],
            log=self.messages.append,
            stdout_fd=self._fds[0],
            stderr_fd=self._fds[1],
            **{"name": "run", **options},
        )

    async def run(self) -> int:
        try:
            return await self.worker.run(signals=False)
        finally:
            for fd in self._fds:
                os.close(fd)

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()


@contextlib.asynccontextmanager
async def python_program(*command: str, environ: dict[str, str] | None = None, **streams: Any) -> AsyncIterator[Any]:
    """Run Python with these arguments during the block, and kill it at the end. Yields its `subprocess.Popen`."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **(environ or {})}
    argv = [sys.executable, *command]
    process = await asyncio.to_thread(lambda: subprocess.Popen(argv, env=env, preexec_fn=die_with_us, **streams))
    try:
        yield process
    finally:
        process.kill()
        await asyncio.to_thread(process.wait)


def jobctl_run(socket: str, queue: str, *argv: str) -> list[str]:
    """Return the arguments of Python for `jobctl run`."""
    return ["-m", "jobd.cli.ctl.main", "run", "--socket", socket, "--queue", queue, *argv]


def watchdogs_of(pid: int) -> list[int]:
    """Return the watchdog processes of this process."""
    children = Path(f"/proc/{pid}/task").glob("*/children")
    pids = [int(each) for path in children for each in path.read_text().split()]
    return [each for each in pids if b"watchdog.py" in Path(f"/proc/{each}/cmdline").read_bytes()]


def is_alive(pid: int) -> bool:
    """Return whether the process is running and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
