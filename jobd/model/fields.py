"""Types of the fields of requests and responses, with their bounds and descriptions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

from msgspec import Meta, Raw

from jobd.model.job import (
    CHECKPOINT_BYTES,
    DAY_MS,
    EARLIEST_MS,
    HEADER_BYTES,
    ID_PATTERN,
    LATEST_MS,
    MAX_HEADERS,
    MAX_PRIORITY,
    NEW_ID_PATTERN,
    SECOND_MS,
    YEAR_MS,
    JsonValue,
    Status,
)

MAX_NESTING: Final = 128  # levels of arrays and objects in a payload or in metadata
MAX_PAGE: Final = 200
MAX_TEXT: Final = 200  # characters of a search text
MAX_OPERATOR: Final = 64
PRINTABLE: Final = r"^[ -~]*$(?!\n)"  # ASCII


def doc(text: str, **bounds: Any) -> Meta:
    """Return the description of a field in the OpenAPI document, with its bounds."""
    return Meta(description=text, **bounds)


# `expected` describes a pattern in an error message.
_ID_TEXT: Final = {"expected": "1 to 200 characters of A-Z a-z 0-9 . _ : -"}
_NEW_ID_TEXT: Final = {"expected": "1 to 200 characters of A-Z a-z 0-9 . _ : - except . and .. alone"}
_PLAIN_TEXT: Final = {"expected": "text without control characters"}
_NEXT_CURSOR: Final = {"expected": "the `next_cursor` of the page before"}

# Types of request fields and of the job record. A value out of bounds is rejected, never clamped.
JobId = Annotated[str, Meta(pattern=ID_PATTERN, max_length=200, extra=_ID_TEXT)]
QueueName = Annotated[JobId, doc("Name of the queue.")]
_NewId = Annotated[str, Meta(pattern=NEW_ID_PATTERN, max_length=200, extra=_NEW_ID_TEXT)]
NewJobId = Annotated[_NewId, doc("Id of the job.")]
NewQueueName = Annotated[_NewId, doc("Name of the queue.")]
ScheduleId = Annotated[
    str,
    doc(
        "Id of the schedule.",
        pattern=NEW_ID_PATTERN,
        max_length=150,
        extra={"expected": "1 to 150 characters of A-Z a-z 0-9 . _ : - except . and .. alone"},
    ),
]
ScheduleSource = Annotated[
    str,
    doc(
        "The program or file that maintains the schedule, such as `app:shop`.",
        pattern=r"^[^\x00-\x1f\x7f]+$(?!\n)",
        min_length=1,
        max_length=200,
        extra=_PLAIN_TEXT,
    ),
]
_PlainText = Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f]*$(?!\n)", max_length=200, extra=_PLAIN_TEXT)]
Kind = Annotated[_PlainText, doc("Kind of the job; selects the handler.")]
WorkerName = Annotated[
    str,
    doc("Name of the worker.", pattern=r"^[^\x00-\x1f\x7f]+$(?!\n)", min_length=1, max_length=200, extra=_PLAIN_TEXT),
]
LockId = Annotated[
    str, doc("Secret of the grant. The worker sends it with every call about the job.", min_length=1, max_length=200)
]
Priority = Annotated[int, doc("Priority. Jobs with smaller values run first.", ge=-MAX_PRIORITY, le=MAX_PRIORITY)]
Percent = Annotated[float, doc("Progress in percent, 0 to 100.", ge=0, le=100)]
MaxAttempts = Annotated[int, doc("Maximum number of attempts.", ge=1, le=1000)]
MaxStalls = Annotated[int, doc("A job that stalls more often fails.", ge=0, le=1000)]
Count = Annotated[int, Meta(ge=0, le=1_000_000)]  # of attempts or stalls, which can exceed the maximum of the job
LockTtlMs = Annotated[
    int, doc("How long the lock lasts after the grant and after each progress report, in ms.", ge=SECOND_MS, le=DAY_MS)
]
AdditionalMs = Annotated[
    int, doc("How long the lock lasts from now on, at least, in ms. Default: the TTL of the grant.", ge=1, le=DAY_MS)
]
StallAfterMs = Annotated[
    int, doc("A job whose lock has expired is stalled this long after its latest report, in ms.", ge=0, le=YEAR_MS)
]
ProgressTimeoutMs = Annotated[
    int,
    doc(
        "Progress timeout, in ms: without a progress report, the lock ends after this time even if it is "
        "extended. 0: no timeout.",
        ge=0,
        le=YEAR_MS,
    ),
]
DelayMs = Annotated[int, Meta(ge=0, le=YEAR_MS)]
ExpiresInMs = Annotated[int, Meta(ge=1, le=YEAR_MS)]
UnixMs = Annotated[int, Meta(ge=EARLIEST_MS, le=LATEST_MS)]
Text = Annotated[str, Meta(max_length=4096)]
Location = Annotated[  # URL or path of the caller
    str, Meta(pattern=r"^[^\x00]*$", min_length=1, max_length=4096, extra={"expected": "text without NUL characters"})
]
DownloadUrl = Annotated[Location, doc("Where the result can be downloaded.")]
FilePath = Annotated[Location, doc("Where the result is stored.")]
StorageKey = Annotated[Location, doc("Key of the artifact: relative, without a `..` segment.")]
FailureCode = Annotated[_PlainText, doc("A code for the failure.")]

Fingerprint = Annotated[
    str,
    Meta(
        pattern=r"^[0-9a-f]{12}$(?!\n)",
        extra={"expected": "12 hexadecimal digits, as `jobctl failures` shows them"},
    ),
]
MomentMs = Annotated[int, Meta(ge=0, le=LATEST_MS)]  # Unix ms, up to the year 9999
OperatorName = Annotated[str, Meta(min_length=1, max_length=MAX_OPERATOR)]
Cursor = Annotated[
    str, doc("The `next_cursor` of the previous page.", pattern=r"^[0-9]{1,18}$(?!\n)", extra=_NEXT_CURSOR)
]
JobCursor = Annotated[  # in lists of finished jobs, the end of the last job, and its number
    str,
    doc("The `next_cursor` of the previous page.", pattern=r"^([0-9]{1,18}\.)?[0-9]{1,18}$(?!\n)", extra=_NEXT_CURSOR),
]
WorkerCursor = Annotated[  # the time of the worker's last request, and its name
    str, Meta(pattern=r"^[0-9]{1,18} ", max_length=220, extra=_NEXT_CURSOR)
]
RowCursor = Annotated[  # a table and a row of it
    str, Meta(pattern=r"^[a-z_]{1,20}:(-?[0-9]{1,18})?$(?!\n)", extra=_NEXT_CURSOR)
]
PlanCursor = Annotated[  # a status and a job with it
    str, Meta(pattern=r"^[a-z]{1,20}\.[0-9]{1,18}$(?!\n)", extra={"expected": "the `next_cursor` of the plan before"})
]
PageLimit = Annotated[int, doc("Maximum number of entries on the page.", ge=1, le=MAX_PAGE)]
BackupId = Annotated[
    str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}$(?!\n)", extra={"expected": "1 to 64 characters of A-Z a-z 0-9 . _ -"})
]
Payload = Annotated[Raw, doc(f"Any JSON, nested at most {MAX_NESTING} levels deep. jobd does not interpret it.")]
Metadata = Annotated[
    JsonValue, doc(f"Any JSON about the result, nested at most {MAX_NESTING} levels deep. It is stored as sent.")
]
Headers = Annotated[
    dict[Annotated[_PlainText, Meta(min_length=1)], Annotated[str, Meta(max_length=HEADER_BYTES)]],
    doc(f"Up to {MAX_HEADERS} texts that every grant has, {HEADER_BYTES} bytes in all.", max_length=MAX_HEADERS),
]
if TYPE_CHECKING:
    AnyJson = Any  # clients take Python values
else:
    AnyJson = Raw
Checkpoint = Annotated[
    AnyJson,
    doc(
        f"Any JSON of up to {CHECKPOINT_BYTES >> 10} KiB about the work so far. Every later grant has the latest "
        "one, until the job is completed or reset. null removes it."
    ),
]
Reason = Annotated[Text, doc("Human-readable reason. Shown in timelines and in the audit log.")]
DryRun = Annotated[bool, doc("Change nothing. The response is that of the change, or its error.")]
NamedJobId = Annotated[JobId, doc("Id of the job.")]
ErrorMessage = Annotated[str, doc("A human-readable error message.", min_length=1, max_length=4096)]
DueAt = Annotated[UnixMs, doc("When the job is due, in Unix ms.")]
GrantStallAfterMs = Annotated[
    StallAfterMs,
    doc("A job whose lock has expired is stalled this long after its latest report, in ms. Default: that of the job."),
]
GrantProgressTimeoutMs = Annotated[
    ProgressTimeoutMs,
    doc(
        "Progress timeout of this grant, in ms: without a progress report, the lock ends after this time "
        "even if it is extended. 0: no timeout. A timeout of the job takes precedence."
    ),
]

# Filters of jobs.
StatusFilter = Annotated[Status, doc("Only jobs in this status.")]
QueueFilter = Annotated[QueueName, doc("Only jobs of this queue.")]
KindFilter = Annotated[Kind, doc("Only jobs of this kind.")]
WorkerFilter = Annotated[WorkerName, doc("Only jobs that this worker holds or was the last to hold.")]
Since = Annotated[MomentMs, doc("Only jobs created at this time or later, in Unix ms.")]
Until = Annotated[MomentMs, doc("Only jobs created before this time, in Unix ms.")]
FinishedSince = Annotated[MomentMs, doc("Only jobs finished at this time or later, in Unix ms.")]
FinishedUntil = Annotated[MomentMs, doc("Only jobs finished before this time, in Unix ms.")]
SearchText = Annotated[
    str,
    doc("A text in the id, payload or error message. Case is ignored for A to Z.", min_length=1, max_length=MAX_TEXT),
]
ErrorFilter = Annotated[
    Fingerprint, doc("Fingerprint of an error, as `failures` returns it. Only failed jobs, unless `status` is given.")
]
