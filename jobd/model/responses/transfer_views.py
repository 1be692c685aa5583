"""Export and import."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Struct

from jobd.model.commands import Import
from jobd.model.fields import doc
from jobd.model.responses import shared


class ExportPage(Struct):
    """A page of jobs, oldest first, in the form that an import takes. Options that the creator did not set are null."""

    jobs: Annotated[list[Import], doc("The jobs.")]
    next_cursor: shared.NextCursor


class Imported(Struct, frozen=True):
    """The result of one line of an import. `skipped`: the job existed before.

    `status` is that of the job afterwards, None if it is not known. `room` is the number of unfinished jobs that could
    be created before.
    """

    job_id: str
    skipped: bool
    status: str | None = None
    reason: str | None = None
    room: int = 0


class RejectedLine(Struct, frozen=True):
    """A line of an import that was rejected."""

    line: Annotated[int, doc("Number of the line, from 1.")]
    id: Annotated[str | None, doc("Id of the job. Null if the line has none.")]
    reason: Annotated[str, doc("Why the line was rejected.")]


class ImportResult(Struct, rename="camel"):
    """The result of an import."""

    imported: Annotated[int, doc("How many jobs were created.")] = 0
    skipped: Annotated[int, doc("How many lines have the id of an existing job.")] = 0
    refused_count: Annotated[int, doc("How many lines were rejected.")] = 0
    refused: Annotated[list[RejectedLine], doc("The first 1000 rejected lines.")] = []


class PreviewedLine(Struct, frozen=True):
    """What an import would do with a line."""

    line: Annotated[int, doc("Number of the line, from 1.")]
    id: Annotated[str | None, doc("Id of the job. Null if the line has none.")]
    what: Annotated[Literal["create", "skip", "reject"], doc("What an import would do with the line.")]
    status: Annotated[str | None, doc("Status of the job afterwards, or null.")]
    reason: Annotated[str | None, doc("Why, or null.")]


class ImportPreview(Struct, rename="camel"):
    """What an import would do."""

    would_import: Annotated[int, doc("How many jobs would be created.")] = 0
    would_skip: Annotated[int, doc("How many lines have the id of an existing job or of an earlier line.")] = 0
    would_reject: Annotated[int, doc("How many lines would be rejected.")] = 0
    lines: Annotated[list[PreviewedLine], doc("The first 10,000 lines.")] = []
    more: Annotated[bool, doc("Whether there are more lines than are shown.")] = False
    stops_at: Annotated[int | None, doc("The line at which the import would stop early, or null.")] = None
    stop_reason: Annotated[str | None, doc("Why it would stop there, or null.")] = None
