"""The job that runs here: `current_job()`."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Final

import msgspec
from msgspec import UNSET, Raw, UnsetType

from jobd.client.app.payload_codec import encode
from jobd.model.responses import JobView

logger = logging.getLogger("jobd.client")
_current: Final[ContextVar[JobContext | None]] = ContextVar("jobd_job", default=None)


_ARGUMENTS: Final = "$arguments"
_CHECKPOINT: Final = "$checkpoint"


@dataclass(slots=True)
class StoredCheckpoint:
    """The checkpoint of a job: the value of its task, and the arguments that `Retry` has changed.

    Without changed arguments it is the value alone, else an object with both.
    """

    own: bytes = b"null"
    changed: dict[str, Raw] = field(default_factory=dict)

    @classmethod
    def read(cls, body: Raw | UnsetType) -> StoredCheckpoint:
        if body is UNSET:
            return cls()
        try:
            both = msgspec.json.decode(body, type=dict[str, Raw])
            return cls(bytes(both[_CHECKPOINT]), msgspec.json.decode(both[_ARGUMENTS], type=dict[str, Raw]))
        except (msgspec.DecodeError, KeyError):
            return cls(bytes(body))

    @property
    def body(self) -> Raw:
        if not self.changed and f'"{_ARGUMENTS}"'.encode() not in self.own:
            return Raw(self.own)
        return Raw(msgspec.json.encode({_ARGUMENTS: self.changed, _CHECKPOINT: Raw(self.own)}))


class RunHere:
    """A run without a worker: nothing reads its progress, and nothing stops it. A run elsewhere overrides this."""

    @property
    def has_to_end(self) -> bool:
        """Whether the job is cancelled, its lock is lost, or the worker stops."""
        return False

    def report(self, progress: float, message: str | None, checkpoint: Raw | UnsetType) -> None:
        """Report progress without waiting. Raises Stopped if the function has to end and cannot be cancelled."""

    def add_output(self, text: str) -> None:
        """Add a line to the output of the job. Does not wait."""

    def set_result(self, **fields: Any) -> None:
        """Set fields of the job's result."""


class JobContext:
    """The job that runs here. Valid in the thread or task of the function, and in threads that copy the context."""

    def __init__(
        self,
        run: RunHere,
        *,
        id: str,
        queue: str,
        kind: str,
        attempt: int,
        max_attempts: int,
        created_at: datetime,
        scheduled_at: datetime | None = None,
        fencing_token: int = 0,
        headers: Mapping[str, str] = MappingProxyType({}),
        checkpoint: Raw | UnsetType = UNSET,
        is_call: bool = False,
    ) -> None:
        self._run = run
        self.is_call: Final = is_call  # the function was called: there is no job
        self.id: Final = id
        self.queue: Final = queue
        self.kind: Final = kind  # the name of the task
        self.attempt: Final = attempt
        self.max_attempts: Final = max_attempts
        self.is_last_attempt: Final = attempt >= max_attempts
        self.created_at: Final = created_at
        self.scheduled_at: Final = scheduled_at  # the time of the schedule that the job is for
        self.fencing_token: Final = fencing_token
        self.headers: Final = headers
        self.stored: Final = StoredCheckpoint.read(checkpoint)
        self._guard = threading.Lock()
        self._children: Counter[bytes] = Counter()

    @property
    def name(self) -> str:
        """The name of the task."""
        return self.kind

    @property
    def checkpoint(self) -> Any:
        """What the latest attempt saved with `progress`, as Python values. None if there is nothing."""
        return msgspec.json.decode(self.stored.own)

    def progress(self, percent: float, message: str | None = None, *, checkpoint: Any = UNSET) -> None:
        """Report progress, which renews the lock, and save `checkpoint` for the next attempt if this one fails.

        Does not wait; if several reports are pending, the latest is sent, with the latest checkpoint. A checkpoint is
        any value that JSON can express, up to 64 KiB; None removes it. Raises ValueError unless `percent` is from 0 to
        100, TypeError for a checkpoint that JSON cannot express, and Stopped in a plain function that has to return.
        """
        if not 0 <= percent <= 100:
            raise ValueError(f"percent must be from 0 to 100, not {percent!r}")
        if checkpoint is not UNSET:
            self.stored.own = encode(checkpoint)
        self._run.report(percent, message, UNSET if checkpoint is UNSET else self.stored.body)

    def log(self, text: str) -> None:
        """Add a line to the output of the job (see `jobctl output`), and log it to `jobd.client` at level info."""
        logger.info("job %s: %s", self.id, text)
        self._run.add_output(text)

    @property
    def cancelled(self) -> bool:
        """Whether the function has to return: the job was cancelled, its lock is lost, or the worker stops."""
        return self._run.has_to_end

    def set_result(
        self, *, download_url: str | None = None, file_path: str | None = None, storage_key: str | None = None
    ) -> None:
        """Set fields of the job's result, beside the return value."""
        self._run.set_result(download_url=download_url, file_path=file_path, storage_key=storage_key)

    def child_id(self, kind: str, payload: bytes) -> str:
        """Return the id of a job that this job creates. It is the same in each attempt.

        It is made of this job, the task, the arguments, and a counter of equal ones.
        """
        made_of = hashlib.blake2b(digest_size=16)
        for part in (self.id.encode(), kind.encode(), payload):
            made_of.update(len(part).to_bytes(8, "big") + part)
        key = made_of.digest()
        with self._guard:
            self._children[key] += 1
            count = self._children[key]
        return key.hex() if count == 1 else f"{key.hex()}-{count}"


def context_of(job: JobView, fencing_token: int, run: RunHere) -> JobContext:
    """Return the context of a job that was granted."""
    return JobContext(
        run,
        id=job.id,
        queue=job.queue,
        kind=job.kind,
        attempt=job.attempt,
        max_attempts=job.max_attempts,
        created_at=datetime.fromtimestamp(job.created_at / 1000, UTC),
        scheduled_at=None if job.scheduled_at is UNSET else datetime.fromtimestamp(job.scheduled_at / 1000, UTC),
        fencing_token=fencing_token,
        headers={} if job.headers is UNSET else job.headers,
        checkpoint=job.checkpoint,
    )


def current_job() -> JobContext:
    """Return the job that runs here. In a task that is called, it is a job of this call alone.

    Raises RuntimeError outside of a task.
    """
    context = _current.get()
    if context is None:
        raise RuntimeError(
            "current_job() is called outside of a task. A thread that a task starts has to copy its context: "
            "contextvars.copy_context().run(function)"
        )
    return context


def running_job() -> JobContext | None:
    """Return the job that runs here, or None."""
    return _current.get()


@contextlib.contextmanager
def entered(context: JobContext) -> Iterator[None]:
    """Make `context` the job that runs here."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)
