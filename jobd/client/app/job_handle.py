"""The handle of a job: wait for its result, cancel it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Final, Generic, TypeVar, cast

from jobd.client.app.job_context import running_job
from jobd.client.app.job_port import JobState
from jobd.client.app.task_registry import TaskDefinition
from jobd.model.job import Status

R_co = TypeVar("R_co", covariant=True)


class JobFailed(Exception):
    """The job has failed. The first line of `error_message` says why, and `error_code` is the class of the error."""

    def __init__(self, job_id: str, error_message: str, error_code: str | None) -> None:
        super().__init__(job_id, error_message, error_code)
        self.job_id: Final = job_id
        self.error_message: Final = error_message
        self.error_code: Final = error_code

    def __str__(self) -> str:
        return f"job {self.job_id} failed: {self.error_message}"


class JobCancelled(Exception):
    """The job was cancelled."""

    def __init__(self, job_id: str) -> None:
        super().__init__(job_id)
        self.job_id: Final = job_id

    def __str__(self) -> str:
        return f"job {self.job_id} was cancelled"


class JobHandle(Generic[R_co]):
    """A job that was created. If its task is a global of a module, the handle can be pickled."""

    def __init__(self, definition: TaskDefinition, id: str) -> None:
        self._definition = definition
        self._jobs = definition.registry.jobs
        self.id: Final = id

    def status(self) -> Status:
        """Return queued, processing, completed, failed or cancelled. Raises JobNotFound, Unreachable."""
        return cast(Status, self._jobs.get(self.id).status)

    async def astatus(self) -> Status:
        return cast(Status, (await self._jobs.aget(self.id)).status)

    def result(self, timeout: timedelta | float | None = None) -> R_co:
        """Wait until the job is finished, and return what the task returned.

        `timeout` is a timedelta or seconds; None: no limit. Raises JobFailed, JobCancelled, TimeoutError, and
        RuntimeError inside a task: its worker may have no other place for the job.
        """
        self._check_place()
        return self._value(self._jobs.wait(self.id, _seconds(timeout)))

    async def aresult(self, timeout: timedelta | float | None = None) -> R_co:  # noqa: ASYNC109 - as `result`
        self._check_place()
        return self._value(await self._jobs.await_end(self.id, _seconds(timeout)))

    def cancel(self, reason: str | None = None) -> bool:
        """Cancel the job. Return whether it was not finished yet."""
        return self._jobs.cancel(self.id, reason)

    async def acancel(self, reason: str | None = None) -> bool:
        return await self._jobs.acancel(self.id, reason)

    def _check_place(self) -> None:
        context = running_job()
        if context is not None and not context.is_call:
            raise RuntimeError(
                f"job {context.id} waits for job {self.id}. If all workers wait so, none is left for the others. "
                "Return the id, and let the caller wait"
            )

    def _value(self, job: JobState) -> R_co:
        if job.status == "failed":
            raise JobFailed(self.id, job.error_message or "unknown error", job.error_code)
        if job.status == "cancelled":
            raise JobCancelled(self.id)
        return cast(R_co, self._definition.codec.decode_result(job.metadata))

    def __repr__(self) -> str:
        return f"JobHandle({self._definition.name!r}, id={self.id!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, JobHandle) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __reduce__(self) -> Any:
        return JobHandle, (self._definition, self.id)


def _seconds(timeout: timedelta | float | None) -> float | None:
    return timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
