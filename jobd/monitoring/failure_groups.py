"""Group failed jobs, and jobs that wait for a retry, by the fingerprint of their error.

The counts are in memory and follow committed changes. Jobs from before the start are read once, in small slices.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Literal, TypeVar

import structlog
from msgspec import Struct, field

from jobd.maintenance.stoppable_loop import StoppableLoop
from jobd.model.commands import Moment
from jobd.model.events import Event
from jobd.model.fingerprints import fingerprint
from jobd.model.job import DAY_MS, HOUR_MS, Job, first_line
from jobd.model.responses import FailureGroup, FailuresView
from jobd.model.storage import JobQuery, JobStorage

MAX_GROUPS: Final = 1_000  # errors beyond this are counted together
MAX_FORMER: Final = 1_000  # empty groups whose first occurrence is remembered
MAX_NAMES: Final = 20  # queues and kinds per group
MAX_IDS: Final = 20  # latest jobs kept per group
MAX_HOURS: Final = DAY_MS // HOUR_MS + 1  # hours that a day has a part of
SHOWN_IDS: Final = 5
SHOWN_NAMES: Final = 10
SHOWN_TEXT: Final = 500  # characters of a message; its first line is never shortened
SCAN: Final = 500  # rows scanned per read
LIMIT: Final = 50  # failed jobs per read
PAUSE_S: Final = 0.005  # between two reads
RETRY_S: Final = 5.0  # after a failed read

T = TypeVar("T")
log = structlog.get_logger("jobd.failures")


FailureState = Literal["failed", "retrying"]  # "retrying": queued with the error of its latest attempt


class GroupState(Struct):
    """The jobs with one error. `ids` maps the latest of them to the time of their failure.

    `ended` counts the failed jobs that ended in each of the latest MAX_HOURS hours with such a job.
    """

    first_at: int  # kept while the group is empty
    message: str = ""
    code: str | None = None
    jobs: Counter[FailureState] = field(default_factory=Counter)
    last_at: int = 0
    queues: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    ids: dict[str, int] = {}
    ended: Counter[int] = field(default_factory=Counter)

    def add(self, job: Job, state: FailureState, at: int) -> None:
        if at >= self.last_at:
            self.message = (job.error.message if job.error else None) or ""
            self.code = job.error.code if job.error else None
        self.first_at = min(self.first_at, at)
        self.last_at = max(self.last_at, at)
        self.jobs[state] += 1
        if state == "failed":
            self.ended[_hour(job)] += 1
            if len(self.ended) > MAX_HOURS:
                del self.ended[min(self.ended)]
        for names, name in ((self.queues, job.options.queue), (self.kinds, job.options.kind)):
            if name in names or len(names) < MAX_NAMES:
                names[name] += 1
        self.ids[job.id] = at
        if len(self.ids) > MAX_IDS:
            del self.ids[min(self.ids, key=self.ids.__getitem__)]

    def remove(self, job: Job, state: FailureState) -> bool:
        """Remove a job. Return False if no job of the group counts as `state`."""
        if self.jobs[state] == 0:
            return False
        self.jobs[state] -= 1
        self.ids.pop(job.id, None)
        if state == "failed":
            _subtract(self.ended, _hour(job))
        _subtract(self.queues, job.options.queue)
        _subtract(self.kinds, job.options.kind)
        return True

    def ended_before(self, at: int) -> int:
        """Return how many failed jobs ended before the hour of `at`, which is a day ago or less."""
        return self.jobs["failed"] - sum(count for hour, count in self.ended.items() if hour >= at // HOUR_MS)


class FailureGroups(StoppableLoop):
    """Follows commits with `committed`. `run` reads the earlier jobs: failed ones below `top`, and `live` ones."""

    def __init__(self, storage: JobStorage, moment: Callable[[], Moment], top: int, live: Iterable[Job] = ()) -> None:
        super().__init__()
        self._storage = storage
        self._moment = moment
        self._groups: dict[str, GroupState] = {}
        self._former: dict[str, int] = {}  # first occurrences of groups that are empty now
        self._other: Counter[FailureState] = Counter()  # jobs whose error has no group
        # Live jobs of the start that are not counted yet.
        self._unseen = {job.id: job for job in live if job.error is not None and job.status == "queued"}
        self._top = top
        # For each slice read, in descending order: the seq at which it ends (negated for bisect), and the last event
        # that it includes. Changes of its jobs up to that event are counted already.
        self._ends: list[int] = []
        self._known: list[int] = []
        self._below = top  # jobs below it are not read yet

    # -- changes -------------------------------------------------------------------------------------------------------

    def committed(self, changes: Sequence[Event]) -> None:
        for change in changes:
            before, after = change.before, change.after
            if (before is None or (before.error is None and before.status != "failed")) and (
                after is None or (after.error is None and after.status != "failed")
            ):
                continue  # nearly every change: avoid the calls below
            was, now = _failure_state(before), _failure_state(after)
            if was == "retrying" and self._unseen.pop(change.job_id, None) is not None:
                was = None
            if "failed" in (was, now) and change.seq <= self._last_counted(change.job_seq):
                # The slice has counted this failed job already.
                was, now = None if was == "failed" else was, None if now == "failed" else now
            self._count(change, was, now)

    def _count(self, change: Event, was: FailureState | None, now: FailureState | None) -> None:
        before, after = change.before, change.after
        if (
            before is not None
            and after is not None
            and was == now
            and (before.error, before.finished_at) == (after.error, after.finished_at)
        ):
            return
        if before is not None and was is not None:
            self._remove(before, was)
        if after is not None and now is not None:
            self._add(after, now, after.finished_at or change.at)
        if before is not None and was is not None:  # after `_add`, because both may be the same group
            self._forget_if_empty(_group_name(before))

    def _last_counted(self, job_seq: int) -> float:
        """Return the last event of the job that is counted already; infinity if the job is not read yet."""
        if job_seq >= self._top:
            return 0
        if job_seq < self._below:
            return float("inf")
        return self._known[bisect_left(self._ends, -job_seq)]

    def _add(self, job: Job, state: FailureState, at: int) -> None:
        group = self._group(job, at)
        if group is None:
            self._other[state] += 1
        else:
            group.add(job, state, at)

    def _remove(self, job: Job, state: FailureState) -> None:
        name = _group_name(job)
        group = None if name is None else self._groups.get(name)
        if group is None or not group.remove(job, state):
            self._other[state] = max(self._other[state] - 1, 0)

    def _forget_if_empty(self, name: str | None) -> None:
        group = None if name is None else self._groups.get(name)
        if name is None or group is None or group.jobs.total() > 0:
            return
        del self._groups[name]
        self._former[name] = group.first_at
        if len(self._former) > MAX_FORMER:
            del self._former[next(iter(self._former))]

    def _group(self, job: Job, at: int) -> GroupState | None:
        name = _group_name(job)
        if name is None:
            return None
        if name not in self._groups and len(self._groups) < MAX_GROUPS:
            self._groups[name] = GroupState(self._former.pop(name, at))
        return self._groups.get(name)

    # -- history -------------------------------------------------------------------------------------------------------

    @property
    def is_complete(self) -> bool:
        return self._below <= 0 and not self._unseen

    async def run(self) -> None:
        """Run until `stop`, or until all jobs are counted."""
        while not (self._stopping or self.is_complete):
            pause_s = PAUSE_S
            try:
                await self._slice()
            except Exception:
                log.exception("failures_not_read")
                pause_s = RETRY_S
            await self._pause(pause_s)

    async def _slice(self) -> None:
        if self._unseen:
            for _ in range(min(LIMIT, len(self._unseen))):
                _, job = self._unseen.popitem()
                self._add(job, "retrying", job.updated_at)
            return
        query = JobQuery(status="failed", limit=LIMIT, before=self._below, scan=SCAN, payloads=False)
        page = await self._storage.find_jobs(query)
        # No await below: nothing else changes before the slice is recorded.
        for job, _ in page.jobs:
            self._add(job, "failed", job.finished_at or job.updated_at)
        self._below = page.next_before or 0
        self._ends.append(-self._below)
        self._known.append(page.last_event)

    # -- view ----------------------------------------------------------------------------------------------------------

    def view(self, limit: int) -> FailuresView:
        """Return the `limit` largest groups."""
        largest = sorted(self._groups.items(), key=lambda each: (-each[1].jobs.total(), -each[1].last_at, each[0]))
        day_ago = self._moment().now - DAY_MS
        shown = [_shown(name, group, day_ago) for name, group in largest[:limit]]
        failed = sum(group.jobs["failed"] for group in self._groups.values()) + self._other["failed"]
        retrying = sum(group.jobs["retrying"] for group in self._groups.values()) + self._other["retrying"]
        return FailuresView(
            groups=shown,
            total=failed,
            retrying=retrying,
            other=failed - sum(group.count for group in shown),
            other_retrying=retrying - sum(group.retrying for group in shown),
            complete=self.is_complete,
        )

    def alike(self, message: str | None, code: str | None, job_id: str) -> FailureGroup | None:
        """Return the group of a failed job with this error. None: it has none, or not all jobs are counted yet."""
        name = fingerprint(message, code, job_id) or ""
        group = self._groups.get(name) if self.is_complete else None
        return None if group is None else _shown(name, group, self._moment().now - DAY_MS)


def _failure_state(job: Job | None) -> FailureState | None:
    if job is None or (job.error is None and job.status != "failed"):
        return None
    return "failed" if job.status == "failed" else "retrying" if job.status == "queued" else None


def _group_name(job: Job) -> str | None:
    error = job.error
    return None if error is None else fingerprint(error.message, error.code, job.id)


def _hour(job: Job) -> int:
    return (job.finished_at or job.updated_at) // HOUR_MS


def _subtract(counts: Counter[T], key: T) -> None:
    if counts[key] > 1:
        counts[key] -= 1
    else:
        del counts[key]


def _shown(name: str, group: GroupState, day_ago: int) -> FailureGroup:
    latest = sorted(group.ids, key=lambda job_id: -group.ids[job_id])
    return FailureGroup(
        fingerprint=name,
        message=group.message[: max(SHOWN_TEXT, len(first_line(group.message)))],
        error_code=group.code,
        count=group.jobs["failed"],
        older_than_day=group.ended_before(day_ago),
        retrying=group.jobs["retrying"],
        kinds=[kind for kind, _ in group.kinds.most_common(SHOWN_NAMES)],
        queues=[queue for queue, _ in group.queues.most_common(SHOWN_NAMES)],
        first_at=group.first_at,
        last_at=group.last_at,
        job_ids=latest[:SHOWN_IDS],
    )
