"""Notify watchers that a job, a queue or any job has changed, without saying what.

A change costs a watcher one lookup, so a slow watcher never falls behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from jobd.model.events import Event


class Watcher:
    """A watcher. `changed` is set after a change, `ended` when no more changes follow. Call `leave` in any case.

    It watches a job if `job_id` is set, else a queue if `queue` is set, else all jobs. `cut` closes its connection.
    """

    def __init__(self, watchers: Watchers, queue: str | None, job_id: str | None, cut: Callable[[], None]) -> None:
        self.queue = queue
        self.job_id = job_id
        self.changed = asyncio.Event()
        self.ended = asyncio.Event()
        self.cut = cut
        self._watchers = watchers
        watchers.add(self)

    def end(self) -> None:
        self.ended.set()
        self.changed.set()

    def leave(self) -> None:
        self._watchers.discard(self)


class Watchers:
    """All watchers, grouped by the job or queue that they watch."""

    def __init__(self) -> None:
        self._all: set[Watcher] = set()
        self._of_all: set[Watcher] = set()
        self._of_queue: dict[str, set[Watcher]] = {}
        self._of_job: dict[str, set[Watcher]] = {}

    def __len__(self) -> int:
        return len(self._all)

    def add(self, watcher: Watcher) -> None:
        self._all.add(watcher)
        self._group_of(watcher).add(watcher)

    def discard(self, watcher: Watcher) -> None:
        self._all.discard(watcher)
        group = self._group_of(watcher)
        group.discard(watcher)
        if not group and watcher.job_id is not None:
            del self._of_job[watcher.job_id]
        elif not group and watcher.queue is not None:
            del self._of_queue[watcher.queue]

    def _group_of(self, watcher: Watcher) -> set[Watcher]:
        if watcher.job_id is not None:
            return self._of_job.setdefault(watcher.job_id, set())
        if watcher.queue is not None:
            return self._of_queue.setdefault(watcher.queue, set())
        return self._of_all

    def notify(self, changes: Sequence[Event]) -> None:
        """Wake the watchers of these changes. A change of a queue wakes all, because every page shows the queues."""
        _wake(self._of_all)
        if len(self._of_all) == len(self._all):
            return
        for change in changes:
            if not change.job_id:
                _wake(self._all)
                return
            _wake(self._of_queue.get(change.queue, ()))
            _wake(self._of_job.get(change.job_id, ()))

    def touch(self, job_id: str) -> None:
        """Wake the watchers of one job."""
        _wake(self._of_job.get(job_id, ()))

    def end(self) -> None:
        for watcher in self._all:
            watcher.end()

    def cut(self) -> None:
        for watcher in list(self._all):
            watcher.cut()


def _wake(watchers: Iterable[Watcher]) -> None:
    for watcher in watchers:
        watcher.changed.set()
