"""Run each job where it is enqueued: `App(inline=True)`, for tests without a daemon."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from msgspec import UNSET, Raw, UnsetType

from jobd.client.app.job_context import JobContext, RunHere
from jobd.client.app.job_port import NewJob
from jobd.client.app.task_registry import TaskDefinition
from jobd.client.errors import JobNotFound
from jobd.client.outcomes import Retry, Snooze
from jobd.client.worker.error_text import failure_message

T = TypeVar("T")


@dataclass
class InlineJob(RunHere):
    """A job that has run here. A job that was snoozed stays queued."""

    status: str = "queued"
    metadata: Any = None
    error_message: str | None = None
    error_code: str | None = None
    checkpoint: Raw | UnsetType = UNSET

    def report(self, progress: float, message: str | None, checkpoint: Raw | UnsetType) -> None:
        self.checkpoint = checkpoint


class InlineJobs:
    """Jobs of this process. Arguments and results are encoded and decoded, as with a daemon.

    All attempts of a job follow at once, without their delays.
    """

    def __init__(self, tasks: Mapping[str, TaskDefinition]) -> None:
        self._tasks = tasks
        self._jobs: dict[str, InlineJob] = {}

    def create(self, jobs: Sequence[NewJob]) -> None:
        for new in jobs:
            if self._tasks[new.name].is_async:
                run_coroutine(self._run(new))
            else:
                with contextlib.suppress(StopIteration):  # it never waits
                    self._run(new).send(None)

    async def acreate(self, jobs: Sequence[NewJob]) -> None:
        for new in jobs:
            if self._tasks[new.name].is_async:
                await self._run(new)
            else:
                await asyncio.to_thread(self.create, [new])

    async def _run(self, new: NewJob) -> None:
        if new.id in self._jobs:
            return
        definition, job = self._tasks[new.name], InlineJob()
        self._jobs[new.id] = job
        max_attempts = new.options.get("max_attempts") or 1
        for attempt in range(1, max_attempts + 1):
            context = JobContext(
                job,
                id=new.id,
                queue=new.queue,
                kind=new.name,
                attempt=attempt,
                max_attempts=max_attempts,
                created_at=datetime.now(UTC),
                headers=new.headers,
                checkpoint=job.checkpoint,
            )
            try:
                run = definition.arun(context, new.payload) if definition.is_async else None
                job.metadata = definition.run(context, new.payload) if run is None else await run
            except Snooze:
                return
            except Exception as error:
                if isinstance(error, Retry) and error.changed:
                    job.checkpoint = error.checkpoint
                job.error_message, job.error_code = failure_message(error), type(error).__name__
                if definition.is_final(error):
                    break
            else:
                job.status, job.error_message, job.error_code = "completed", None, None
                return
        job.status = "failed"

    def get(self, job_id: str) -> InlineJob:
        if job_id not in self._jobs:
            raise JobNotFound(f"No job has the id {job_id}. An inline app has only the jobs that it created.")
        return self._jobs[job_id]

    async def aget(self, job_id: str) -> InlineJob:
        return self.get(job_id)

    def wait(self, job_id: str, timeout_s: float | None) -> InlineJob:
        job = self.get(job_id)
        if job.status == "queued":
            raise TimeoutError(f"Job {job_id} is queued, and an inline app runs no job later.")
        return job

    async def await_end(self, job_id: str, timeout_s: float | None) -> InlineJob:
        return self.wait(job_id, timeout_s)

    def cancel(self, job_id: str, reason: str | None) -> bool:
        job = self.get(job_id)
        is_queued = job.status == "queued"
        if is_queued:
            job.status = "cancelled"
        return is_queued

    async def acancel(self, job_id: str, reason: str | None) -> bool:
        return self.cancel(job_id, reason)

    def close(self) -> None:
        """Nothing is open."""

    async def aclose(self) -> None:
        """Nothing is open."""


def run_coroutine(work: Coroutine[Any, Any, T]) -> T:
    """Run `work` on a new event loop: in another thread, because this one may have a loop."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(contextvars.copy_context().run, asyncio.run, work).result()
