"""The response that the actor returns."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from jobd.model.commands import AuditLog, Export, ListJobs
from jobd.model.job import Job
from jobd.model.responses.job_views import JobView


class EmptyResponse(Struct, frozen=True):
    """A success without data."""


class HistoryRead(Struct, frozen=True):
    """A read of history that the actor leaves to the storage.

    `timeline` is the seq of a job whose events are read (only the latest `events`, if set), `late` that of a job whose
    late results are read. `page`, `export` and `audit` are pages. `ended` is a finished job whose ending is read.
    """

    timeline: int | None = None
    events: int | None = None
    ended: Job | None = None
    late: int | None = None
    page: ListJobs | None = None
    export: Export | None = None
    audit: AuditLog | None = None


class Response(Struct, gc=False):
    """A success.

    `unread_payloads` has the job views that lack bodies, each with the key of one (model/job.py). `grants` has (job
    id, lock id) of each grant in the response, so that the grants of an undelivered response can be released. With
    `read`, the data comes from the storage; `scanned` is an upper bound of the number of jobs read for a page.
    `large_bytes` is the size of the large payloads and of the metadata that it shows.
    """

    data: Any
    status: int = 200
    unread_payloads: list[tuple[int, JobView]] = []
    grants: list[tuple[str, str]] = []
    read: HistoryRead | None = None
    scanned: int = 0
    replayed: bool = False  # a stored idempotent response
    large_bytes: int = 0
