"""The failed jobs of the store, grouped by the fingerprint of their error: counted as they fail and as they go.

Kept in memory, from committed changes; what was there before the start is looked at once, in small slices. Nothing is
looked for when somebody asks.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import Final

import structlog
from msgspec import Struct, field

from jobd.answers import FailureGroup, FailuresView
from jobd.batch import Disk, Query
from jobd.events import Change
from jobd.fingerprints import fingerprint
from jobd.job import Job

MOST_GROUPS: Final = 1_000  # beyond it errors that nobody has seen yet are counted together
MOST_NAMES: Final = 20  # queues and kinds of a group
MOST_IDS: Final = 20  # of the latest jobs of a group;
SHOWN_IDS: Final = 5  # so many are shown
SHOWN_NAMES: Final = 10
SHOWN_TEXT: Final = 500  # characters of a message
SCAN: Final = 500  # rows of history in one go
LIMIT: Final = 50  # failed jobs of these
PAUSE_S: Final = 0.005  # between two looks
AGAIN_S: Final = 5.0  # after a look that failed

log = structlog.get_logger("jobd.failures")


class Group(Struct):
    """Failed jobs with the same error. `ids` are the latest of them, with the time of their failure."""

    message: str = ""
    code: str | None = None
    count: int = 0
    first_at: int = 0
    last_at: int = 0
    queues: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    ids: dict[str, int] = {}

    def enter(self, job: Job, at: int) -> None:
        if self.count == 0 or at >= self.last_at:
            self.message = (job.error.message if job.error else None) or ""
            self.code = job.error.code if job.error else None
        self.first_at = at if self.count == 0 else min(self.first_at, at)
        self.last_at = max(self.last_at, at)
        self.count += 1
        for names, name in ((self.queues, job.options.queue), (self.kinds, job.options.kind)):
            if name in names or len(names) < MOST_NAMES:
                names[name] += 1
        self.ids[job.id] = at
        if len(self.ids) > MOST_IDS:
            del self.ids[min(self.ids, key=self.ids.__getitem__)]

    def leave(self, job: Job) -> None:
        self.count -= 1
        self.ids.pop(job.id, None)
        for names, name in ((self.queues, job.options.queue), (self.kinds, job.options.kind)):
            if names[name] > 1:
                names[name] -= 1
            else:
                del names[name]


class Failures:
    """`committed` is told of every commit; `run` looks at the jobs below `top`, which were there at the start."""

    def __init__(self, disk: Disk, top: int) -> None:
        self._disk = disk
        self._groups: dict[str, Group] = {}
        self._other = 0  # jobs whose error has no group of its own
        self._top = top
        # Of each slice that was looked at, from the top down: below which seq it ends (negated: bisect wants them
        # rising), and the last event that it knows of. What the jobs of a slice did before is counted already.
        self._ends: list[int] = []
        self._known: list[int] = []
        self._below = top  # jobs below it are still to be looked at
        self._wake = asyncio.Event()
        self._stopping = False

    # -- what happens -------------------------------------------------------------------------------------------------

    def committed(self, changes: Sequence[Change]) -> None:
        for change in changes:
            before, after = change.before, change.after
            was = before is not None and before.status == "failed"
            fails = after is not None and after.status == "failed"
            if (was or fails) and change.event.seq > self._known_of(change.event.job_seq):
                self._count(before if was else None, after if fails else None, change.event.at)

    def _count(self, before: Job | None, after: Job | None, at: int) -> None:
        if before is not None and after is not None and before.error == after.error:
            return
        if before is not None:
            self._leave(before)
        if after is not None:
            self._enter(after, after.finished_at or at)

    def _known_of(self, job_seq: int) -> float:
        """The last event that is counted of this job already; all of them, where it is still to be looked at."""
        if job_seq >= self._top:
            return 0
        if job_seq < self._below:
            return float("inf")
        return self._known[bisect_left(self._ends, -job_seq)]

    def _enter(self, job: Job, at: int) -> None:
        group = self._group(job)
        if group is None:
            self._other += 1
        else:
            group.enter(job, at)

    def _leave(self, job: Job) -> None:
        name = _name(job)
        group = None if name is None else self._groups.get(name)
        if name is None or group is None:
            self._other = max(self._other - 1, 0)
            return
        group.leave(job)
        if group.count <= 0:
            del self._groups[name]

    def _group(self, job: Job) -> Group | None:
        """None where all groups are taken, or where the job has no error (an import may bring some): by no name they
        could be found, so nothing could be done to just those."""
        name = _name(job)
        if name is None:
            return None
        if name not in self._groups and len(self._groups) < MOST_GROUPS:
            self._groups[name] = Group()
        return self._groups.get(name)

    # -- what was there -----------------------------------------------------------------------------------------------

    @property
    def is_whole(self) -> bool:
        """Whether all jobs have been looked at."""
        return self._below <= 0

    async def run(self) -> None:
        """Until `stop`, or until all jobs have been looked at."""
        while not (self._stopping or self.is_whole):
            pause_s = PAUSE_S
            try:
                await self._slice()
            except Exception:
                log.exception("failures_not_read")
                pause_s = AGAIN_S
            await self._pause(pause_s)

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()

    async def _slice(self) -> None:
        query = Query(status="failed", limit=LIMIT, before=self._below, scan=SCAN, payloads=False)
        page = await self._disk.find(query)
        # From here on nothing else happens before the end.
        for job, _ in page.jobs:
            self._enter(job, job.finished_at or job.updated_at)
        self._below = page.next_before or 0
        self._ends.append(-self._below)
        self._known.append(page.last_event)

    async def _pause(self, seconds: float) -> None:
        timer = asyncio.get_running_loop().call_later(seconds, self._wake.set)
        await self._wake.wait()
        timer.cancel()
        self._wake.clear()

    # -- what somebody asks -------------------------------------------------------------------------------------------

    def view(self, limit: int) -> FailuresView:
        """The `limit` largest groups."""
        largest = sorted(self._groups.items(), key=lambda each: (-each[1].count, -each[1].last_at, each[0]))
        shown = [_shown(name, group) for name, group in largest[:limit]]
        total = sum(group.count for group in self._groups.values()) + self._other
        return FailuresView(shown, total, total - sum(group.count for group in shown), self.is_whole)


def _name(job: Job) -> str | None:
    error = job.error
    return None if error is None else fingerprint(error.message, error.code)


def _shown(name: str, group: Group) -> FailureGroup:
    latest = sorted(group.ids, key=lambda job_id: -group.ids[job_id])
    return FailureGroup(
        fingerprint=name,
        message=group.message[:SHOWN_TEXT],
        error_code=group.code,
        count=group.count,
        kinds=[kind for kind, _ in group.kinds.most_common(SHOWN_NAMES)],
        queues=[queue for queue, _ in group.queues.most_common(SHOWN_NAMES)],
        first_at=group.first_at,
        last_at=group.last_at,
        job_ids=latest[:SHOWN_IDS],
    )
