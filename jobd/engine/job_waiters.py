"""Requests that wait until jobs are finished, outside the mailbox. They cost nothing until one of their jobs ends."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence
from itertools import count
from typing import Any

from msgspec.structs import replace

from jobd.engine.envelope import Envelope
from jobd.model.clocks import MonotonicS
from jobd.model.events import Event
from jobd.model.job import LIVE


class JobWaiters:
    """Waiting requests by the jobs that they wait for. Those that are taken are to be decided again, without a wait."""

    def __init__(self) -> None:
        self._waiting: dict[Envelope, set[str]] = {}  # to the unfinished jobs
        self._by_job: dict[str, dict[Envelope, None]] = {}
        self._deadlines: list[tuple[MonotonicS, int, Envelope]] = []
        self._order = count()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, envelope: Envelope, job_ids: Collection[str]) -> None:
        """Let a request wait for the end of these jobs."""
        self.remove(envelope)
        self._waiting[envelope] = set(job_ids)
        for job_id in job_ids:
            self._by_job.setdefault(job_id, {})[envelope] = None
        heapq.heappush(self._deadlines, (envelope.deadline, next(self._order), envelope))

    def remove(self, envelope: Envelope) -> None:
        """Forget a request, if it waits."""
        for job_id in self._waiting.pop(envelope, ()):
            waiting = self._by_job[job_id]
            del waiting[envelope]
            if not waiting:
                del self._by_job[job_id]

    def take_ended(self, changes: Sequence[Event]) -> list[Envelope]:
        """Remove and return the requests that wait for no job after these changes."""
        ended = []
        for event in changes:
            if event.to_status in LIVE or event.job_id not in self._by_job:
                continue
            for envelope in self._by_job.pop(event.job_id):
                jobs = self._waiting[envelope]
                jobs.discard(event.job_id)
                if not jobs:
                    del self._waiting[envelope]
                    ended.append(envelope)
        return ended

    def next_deadline(self) -> MonotonicS | None:
        while self._deadlines and self._deadlines[0][2] not in self._waiting:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def take_expired(self, time: MonotonicS) -> list[Envelope]:
        """Remove and return the requests whose wait is over at loop time `time`. They do not wait again."""
        over = []
        while (deadline := self.next_deadline()) is not None and deadline <= time:
            envelope = heapq.heappop(self._deadlines)[2]
            self.remove(envelope)
            command: Any = envelope.command
            envelope.command = replace(command, wait_ms=0)
            over.append(envelope)
        return over

    def take_all(self) -> list[Envelope]:
        envelopes = list(self._waiting)
        self._waiting, self._by_job = {}, {}
        return envelopes
