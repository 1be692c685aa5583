"""What tasks and handles need of the place where jobs are: a daemon, or this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from msgspec import Raw


@dataclass(slots=True)
class NewJob:
    """A job that is about to be created."""

    id: str
    name: str
    queue: str
    headers: dict[str, str]  # given with every grant; a function of `on_enqueue` may set some
    payload: Raw = field(repr=False)
    options: dict[str, Any] = field(repr=False)  # the other fields of the request
    is_derived: bool = field(default=False, repr=False)  # the id: an earlier attempt may have created the job


class JobState(Protocol):
    """The part of a job that a handle needs."""

    @property
    def status(self) -> str: ...
    @property
    def metadata(self) -> Any: ...
    @property
    def error_message(self) -> str | None: ...
    @property
    def error_code(self) -> str | None: ...


class JobPort(Protocol):
    """Create, read and cancel jobs. Each call has an asyncio version."""

    def create(self, jobs: Sequence[NewJob]) -> None:
        """Create all jobs or none."""

    async def acreate(self, jobs: Sequence[NewJob]) -> None: ...

    def get(self, job_id: str) -> JobState: ...

    async def aget(self, job_id: str) -> JobState: ...

    def wait(self, job_id: str, timeout_s: float | None) -> JobState:
        """Return the job when it is finished. Raises TimeoutError."""

    async def await_end(self, job_id: str, timeout_s: float | None) -> JobState: ...

    def cancel(self, job_id: str, reason: str | None) -> bool:
        """Cancel the job. Return whether it was not finished yet."""

    async def acancel(self, job_id: str, reason: str | None) -> bool: ...

    def close(self) -> None: ...

    async def aclose(self) -> None: ...
