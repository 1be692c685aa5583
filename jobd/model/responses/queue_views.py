"""Queues and their pauses."""

from __future__ import annotations

from typing import Annotated

from msgspec import Struct

from jobd.model.events import QueuePause
from jobd.model.fields import doc
from jobd.model.problems import Problem
from jobd.model.responses import shared
from jobd.model.responses.job_views import WhyView


class QueueView(Struct, frozen=True):
    """A queue: its jobs by status, and its pause."""

    name: shared.QueueText
    paused: shared.IsPaused
    queued: Annotated[int, doc("Number of queued jobs.")]
    processing: Annotated[int, doc("Number of processing jobs.")]
    completed: Annotated[int, doc("Number of completed jobs.")]
    failed: Annotated[int, doc("Number of failed jobs.")]
    cancelled: Annotated[int, doc("Number of cancelled jobs.")]
    oldest_due_at: Annotated[int | None, doc("When the oldest due job became due, in Unix ms, or null.")]
    paused_at: shared.PausedAt = None
    paused_by: shared.PausedBy = None
    pause_reason: shared.PauseReason = None
    paused_until: shared.PausedUntil = None

    @property
    def pause(self) -> QueuePause:
        return QueuePause(self.paused_at, self.paused_by, self.pause_reason, self.paused_until)


class QueueList(Struct):
    """A page of queues."""

    queues: Annotated[list[QueueView], doc("The queues, by name or the busiest first.")]
    next_cursor: shared.NextCursor = None


class PausedView(Struct, frozen=True):
    """The pause of a queue."""

    queue: shared.QueueText
    paused: shared.IsPaused
    paused_at: shared.PausedAt = None
    paused_by: shared.PausedBy = None
    pause_reason: shared.PauseReason = None
    paused_until: shared.PausedUntil = None

    @property
    def pause(self) -> QueuePause:
        return QueuePause(self.paused_at, self.paused_by, self.pause_reason, self.paused_until)


class KindWhy(Struct, frozen=True):
    """Why the due jobs of a kind wait."""

    kind: shared.KindText
    due: Annotated[int, doc("How many jobs of the kind are due.")]
    job_id: Annotated[str, doc("The job that has been due longest.")]
    why: Annotated[WhyView, doc("Why this job waits, and what happens next.")]


class QueueWhyView(Struct, frozen=True):
    """Why the due jobs of a queue wait."""

    queue: shared.QueueText
    because: Annotated[str, doc("The state of the queue, in words.")]
    kinds: Annotated[list[KindWhy], doc("Up to 100 kinds with due jobs, the one that has waited longest first.")]
    problems: Annotated[list[Problem], doc("Open problems of the queue that none of `kinds` names.")] = []
