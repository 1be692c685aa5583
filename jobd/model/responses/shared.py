"""Fields that several responses have."""

from __future__ import annotations

from typing import Annotated

from jobd.model.fields import doc

JobIdText = Annotated[str, doc("Id of the job.")]
QueueText = Annotated[str, doc("Name of the queue.")]
KindText = Annotated[str, doc("Kind of the job; selects the handler.")]
StatusText = Annotated[str, doc("Status of the job.")]
WorkerText = Annotated[str, doc("Name of the worker.")]
MessageText = Annotated[str, doc("A human-readable message.")]
FencingToken = Annotated[
    int,
    doc(
        "Rises with every grant of this store and stays below 2^53. A resource can reject requests with a lower token."
    ),
]
LockSecret = Annotated[str, doc("Secret of the grant. The worker sends it with every call about the job.")]
LockExpiresAt = Annotated[int, doc("When the lock expires unless it is renewed, in Unix ms.")]
TtlMs = Annotated[int, doc("How long the lock lasts after each progress report, in ms.")]
ProgressDueAt = Annotated[int | None, doc("When the progress timeout ends the lock, in Unix ms. Null: no timeout.")]
ProgressPercent = Annotated[int | float, doc("Progress in percent, 0 to 100.")]
ResultUrl = Annotated[str | None, doc("Where the result can be downloaded, as the worker gave it.")]
ResultPath = Annotated[str | None, doc("Where the result is stored, as the worker gave it.")]
ResultKey = Annotated[str | None, doc("Key of the artifact: relative, without a `..` segment.")]
NextCursor = Annotated[str | None, doc("Cursor of the next page. Null on the last page.")]
PausedAt = Annotated[int | None, doc("When the queue was paused, in Unix ms, or null.")]
PausedBy = Annotated[str | None, doc("The operator who paused the queue, as in `by` of events, or null.")]
PauseReason = Annotated[str | None, doc("Why the queue is paused, or null.")]
PausedUntil = Annotated[int | None, doc("When the daemon resumes the queue, in Unix ms, or null.")]
IsPaused = Annotated[bool, doc("Whether the queue is paused.")]
ReasonText = Annotated[str | None, doc("Reason given by the operator, or null.")]
Timestamp = Annotated[int, doc("Time of the response, in Unix ms.")]
DiskPath = Annotated[str | None, doc("Path of the store. Null for an in-memory store.")]
FreeBytes = Annotated[
    int | None, doc("Space on the disk of the store that is available to the daemon. Null for an in-memory store.")
]
TotalBytes = Annotated[int | None, doc("Size of the disk of the store. Null for an in-memory store.")]
CleanupRunning = Annotated[bool, doc("Whether a cleanup run is in progress.")]
SinceCleanup = Annotated[int | None, doc("Time since the last successful cleanup run, in ms, or null.")]
