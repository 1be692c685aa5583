"""Presence of workers: for each, when it was last seen, its latest claim, its jobs, and its description of itself.

In memory only: after a start, only the holders of jobs are known. Ages are in lock time, so that a step of the wall
clock does not make a worker gone. The states of a worker, the first that holds:

    silent    it holds a job whose lock has expired
    busy      it holds a job
    waiting   a claim of it waits, or its connection closed less than LEFT_AFTER_MS ago, as a proxy may close it
    died      recovery or an operator took back its last job, and it was not heard since
    gone      it said goodbye, or the connection of its waiting claim closed, or it was not heard for its idle time
    idle      else
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from msgspec import Struct

from jobd.model.clocks import LockMs
from jobd.model.commands import About, Claim, GoodbyeReason, Start, WorkerState
from jobd.model.job import DAY_MS, MINUTE_MS, SECOND_MS, Job
from jobd.model.responses import DirectiveView

IDLE_AT_LEAST_MS: Final = 15 * SECOND_MS
IDLE_AT_MOST_MS: Final = 10 * MINUTE_MS  # also before the second claim, when the worker's rhythm is unknown
LEFT_AFTER_MS: Final = 10 * SECOND_MS
FORGOTTEN_AFTER_MS: Final = DAY_MS
WORKERS_KEPT: Final = 10_000  # workers that hold no job and wait for none
NAMES_KEPT: Final = 100_000  # queues and kinds over all claim sets
EVICTION_SCAN: Final = 16  # workers that are inspected for eviction when a new one is added

SetKey = tuple[tuple[str, ...], tuple[str, ...] | None]


class ClaimSet:
    """Queues and kinds (None: all) that at least one worker has claimed. Workers with equal sets share one.

    `queues` and `kinds` are as they were first sent. `claimed` is the lock time of the latest claim, `waiting` the
    number of claims that wait for a job now.
    """

    __slots__ = ("_kinds", "claimed", "kinds", "queues", "waiting", "workers")

    def __init__(self, queues: list[str], kinds: list[str] | None) -> None:
        self.queues = queues
        self.kinds = kinds
        self._kinds = None if kinds is None else frozenset(kinds)
        self.claimed = LockMs(0)
        self.waiting = 0
        self.workers: dict[str, None] = {}  # those whose latest claim this is

    def takes(self, kind: str) -> bool:
        return self._kinds is None or kind in self._kinds

    @property
    def names(self) -> int:
        """The number of names, as a measure of the memory that the set takes."""
        return len(self.queues) + len(self.kinds or ())

    @property
    def key(self) -> SetKey:
        """A key that is the same for equal sets, in any order."""
        return tuple(sorted(set(self.queues))), None if self.kinds is None else tuple(sorted(set(self.kinds)))


class WorkerSeen:
    """One worker. `jobs` are the jobs that it holds, `expired` those of them whose lock has expired.

    `first_seen_at` (wall time) is when it was first seen since the start, `last_seen_at` (wall time) and `heard` (lock
    time) when it was last seen, `asked` when its latest claim arrived, `claimed` until when it waited. The idle time
    `idle_ms` is twice the time between its last two claims.
    `claims` is None if no claim is remembered. `waiting` is the number of its claims that wait now. `left` (when the
    connection of a waiting claim closed), `goodbye` and `lost` (the latest job that was taken back from it) are None
    once it is heard again. `quiet_since` (wall time) is set while its claims can get no job. Its `claims` are then in
    no list of claim sets. `directive` waits for its next claims until it obeys; `obeyed` is the one that
    made it quiet. `told_rule` is the quiet rule that it knows of.
    """

    __slots__ = (
        "about", "asked", "claimed", "claims", "directive", "expired", "first_seen_at", "goodbye", "heard", "idle_ms",
        "jobs", "last_seen_at", "left", "lost", "obeyed", "quiet_since", "told_rule", "waiting",
    )  # fmt: skip

    def __init__(self) -> None:
        self.jobs: dict[str, None] = {}
        self.expired: dict[str, None] = {}
        self.first_seen_at = self.last_seen_at = 0
        self.heard = self.claimed = LockMs(0)
        self.asked: LockMs | None = None
        self.idle_ms = IDLE_AT_MOST_MS
        self.claims: ClaimSet | None = None
        self.waiting = 0
        self.about: About | None = None
        self.left: LockMs | None = None
        self.goodbye: GoodbyeReason | None = None
        self.lost: LostJob | None = None
        self.quiet_since: int | None = None
        self.directive: Directive | None = None
        self.obeyed: DirectiveView | None = None
        self.told_rule = ""

    @property
    def is_quiet(self) -> bool:
        return self.quiet_since is not None

    @property
    def is_resting(self) -> bool:
        """Whether it holds no job and no claim of it waits."""
        return not (self.jobs or self.waiting)


class Directive(Struct, eq=False):
    """What an operator wants of the process that has a worker's name: of `instance`, None if it is unknown.

    `told_at` is the lock time at which the process was last told.
    """

    view: DirectiveView
    instance: str | None
    told_at: LockMs | None = None

    @property
    def is_quieting(self) -> bool:
        return self.view.action != "resume"

    def is_over(self, claim: Claim) -> bool:
        """Return whether the worker obeys, as its claim shows, or the process is another one."""
        instance = None if claim.about is None else claim.about.instance
        if self.instance not in (None, instance) and instance is not None:
            return True
        return claim.is_quiet if self.view.action == "quiet" else self.view.action == "resume" and not claim.is_quiet


class LostJob(NamedTuple):
    """A job that recovery or an operator took back from a worker, its progress in percent, and the wall time."""

    id: str
    progress: float
    at: int


class WorkerPresence:
    """All workers that are remembered, and the claim sets by queue.

    `started_at` is the wall time of the start, None before the first `set_time`. All claims after `since` (lock time)
    are remembered. It is the start, unless claim sets had to be forgotten (`has_forgotten`).
    """

    def __init__(self, now: int = 0, lock_ms: LockMs = LockMs(0)) -> None:
        self.workers: OrderedDict[str, WorkerSeen] = OrderedDict()  # roughly by when they were last seen
        self.started_at: int | None = None
        self.since = lock_ms
        self.has_forgotten = False
        self.now = now
        self.lock_ms = lock_ms
        self.directed: set[WorkerSeen] = set()  # with a directive
        self.on_open: Callable[[], None] = lambda: None  # called when waiting claims may get jobs that they could not
        self._sets: dict[SetKey, ClaimSet] = {}
        self._of_queue: dict[str, dict[ClaimSet, None]] = {}
        self._names = 0
        self._names_kept = NAMES_KEPT

    # -- reading ------------------------------------------------------------------------------------------------------

    def state(self, worker: WorkerSeen) -> WorkerState:
        if worker.expired:
            return "silent"
        if worker.jobs:
            return "busy"
        has_left = worker.left is not None and self.lock_ms - worker.left >= LEFT_AFTER_MS
        if worker.waiting or (worker.left is not None and not has_left and worker.goodbye is None):
            return "waiting"
        if worker.lost is not None:
            return "died"
        is_gone = has_left or worker.goodbye is not None or self.lock_ms - worker.heard >= worker.idle_ms
        return "gone" if is_gone else "idle"

    def remembered(self, *, in_order: bool = False) -> Iterator[tuple[str, WorkerSeen]]:
        """Iterate over names and workers, without those that have been gone for a day.

        Workers can come and go between two steps. The order of `workers` takes ten times as long for the first step.
        """
        for name in list(self.workers if in_order else dict.keys(self.workers)):
            worker = self.workers.get(name)
            if worker is not None and (worker.heard > self.lock_ms - FORGOTTEN_AFTER_MS or not worker.is_resting):
                yield name, worker

    def heard_at(self, worker: WorkerSeen) -> int:
        """Return the wall time at which the worker was last seen; now while a claim of it waits."""
        return self.now if worker.waiting else min(worker.last_seen_at, self.now)

    def claim_sets(self, queue: str) -> Iterator[ClaimSet]:
        """Iterate over the sets that contain this queue."""
        return iter(self._of_queue.get(queue, ()))

    # -- changing -----------------------------------------------------------------------------------------------------

    def set_time(self, now: int, lock_ms: LockMs) -> None:
        self.now, self.lock_ms = now, lock_ms
        if self.started_at is None:
            self.started_at = now

    def note_seen(self, name: str, at: int) -> WorkerSeen:
        """Record that a worker was seen at wall time `at`: the time of the batch, or a time before the start."""
        worker = self.workers.get(name)
        if worker is None:
            worker = self.workers[name] = WorkerSeen()
            worker.first_seen_at = at
            self._make_room(name)
        else:
            self.workers.move_to_end(name)
        worker.last_seen_at = at
        worker.heard = self.lock_ms - (self.now - at)
        worker.left = worker.goodbye = worker.lost = None
        return worker

    def note_request(self, command: Start | Claim, queues: Sequence[str] | None = None) -> WorkerSeen:
        """Record that a worker requests a job. A claim can get jobs of `queues`, by default of all that it names."""
        worker = self.note_seen(command.worker, self.now)
        if command.about is not None:
            worker.about = command.about
        if isinstance(command, Claim):
            claims = worker.claims
            is_open = (queues is None or queues is command.queues) and worker.quiet_since is None
            if claims is None or not is_open or claims.queues != command.queues or claims.kinds != command.kinds:
                claims = self._note_claims(worker, command, command.queues if queues is None else queues)
            if worker.directive is not None and worker.directive.is_over(command):
                worker.obeyed = worker.directive.view if command.is_quiet else None
                self._end_directive(worker)
            if worker.asked is not None and self.lock_ms > worker.asked:  # not when this claim begins to wait
                worker.idle_ms = min(max(2 * (self.lock_ms - worker.asked), IDLE_AT_LEAST_MS), IDLE_AT_MOST_MS)
            claims.claimed = worker.claimed = worker.asked = self.lock_ms
        return worker

    def _note_claims(self, worker: WorkerSeen, command: Claim, takes: Sequence[str]) -> ClaimSet:
        """Record the queues and kinds of which a claim can get jobs; without any, the worker is quiet."""
        claims, queues = worker.claims, takes or command.queues
        was_quiet, worker.quiet_since = worker.is_quiet, None if takes else worker.quiet_since or self.now
        if claims is None or was_quiet != worker.is_quiet or (claims.queues, claims.kinds) != (queues, command.kinds):
            new = ClaimSet(list(queues), command.kinds)
            claims = self._shared(new) if takes else new
            self._assign(command.worker, worker, claims)
        return claims

    def begin_wait(self, command: Claim, queues: Sequence[str] | None = None) -> ClaimSet:
        """Record that a claim begins to wait for jobs of `queues`. Return the set to pass to `end_wait`."""
        worker = self.note_request(command, queues)
        claims = worker.claims if command.limit else ClaimSet(command.queues, None)  # which waits for no job
        assert claims is not None
        worker.waiting += 1
        claims.waiting += 1
        return claims

    def end_wait(self, name: str, claims: ClaimSet, *, has_left: bool) -> None:
        """Record that a wait has ended. `has_left`: because its connection closed. The worker was seen until now."""
        worker = self.note_seen(name, self.now)
        worker.waiting -= 1
        claims.waiting -= 1
        claims.claimed = worker.claimed = self.lock_ms
        if has_left:
            worker.left = self.lock_ms

    def note_left(self, name: str) -> None:
        """Record that the connection closed on which a worker would have received a job."""
        if (worker := self.workers.get(name)) is not None:
            worker.left = self.lock_ms

    def say_goodbye(self, name: str, instance: str | None, reason: GoodbyeReason) -> WorkerState:
        """Record that a worker ends, unless another instance of its name was heard later. Return its state."""
        worker = self.workers[name]
        if worker.about is None or worker.about.instance == instance:
            self.note_seen(name, self.now).goodbye = reason
            self._end_directive(worker)
        return self.state(worker)

    def _end_directive(self, worker: WorkerSeen) -> None:
        worker.directive = None
        self.directed.discard(worker)
        if worker.waiting:  # claims of another process of the name, which had to wait
            self.on_open()

    def direct(self, worker: WorkerSeen, directive: Directive) -> None:
        """Keep a directive for the next claims of a worker."""
        worker.directive = directive
        self.directed.add(worker)

    def note_lost(self, name: str, job: Job) -> None:
        """Record that a job was taken back from a worker that was not heard for too long."""
        if (worker := self.workers.get(name)) is not None:
            worker.lost = LostJob(job.id, job.progress, self.now)

    def add_job(self, name: str, job_id: str, at: int) -> None:
        """Record that a worker holds a job. An unknown worker was last seen at wall time `at`."""
        worker = self.workers.get(name) or self.note_seen(name, at)
        worker.jobs[job_id] = None
        worker.lost = None  # a dry run or a batch that was not written gives the job back

    def remove_job(self, name: str, job_id: str) -> None:
        """Record that a worker no longer holds this job."""
        if (worker := self.workers.get(name)) is not None:
            worker.jobs.pop(job_id, None)
            worker.expired.pop(job_id, None)

    def set_expired(self, name: str, job_id: str, expired: bool) -> None:
        """Record whether the lock of a job that this worker holds has expired."""
        if (worker := self.workers.get(name)) is None:
            return
        if expired:
            worker.expired[job_id] = None
        else:
            worker.expired.pop(job_id, None)

    # -- bounds -------------------------------------------------------------------------------------------------------

    def _make_room(self, new: str) -> None:
        """Forget workers that have been gone for a day, and the one seen longest ago if there are too many.

        A worker at the front that has a job or waits for one moves to the end, so that it is not inspected each time.
        """
        oldest = self.lock_ms - FORGOTTEN_AFTER_MS
        for _ in range(EVICTION_SCAN):
            name, worker = next(iter(self.workers.items()))
            if worker.heard > oldest and len(self.workers) <= WORKERS_KEPT:
                return
            if name == new:
                return
            if worker.is_resting:
                self._assign(name, worker, None)
                self.directed.discard(worker)
                del self.workers[name]
            else:
                self.workers.move_to_end(name)

    def _assign(self, name: str, worker: WorkerSeen, claims: ClaimSet | None) -> None:
        """Set `claims` as the set of the worker's latest claim."""
        if worker.claims is not None:
            worker.claims.workers.pop(name, None)
        worker.claims = claims
        if claims is not None:
            claims.workers[name] = None

    def _shared(self, made: ClaimSet) -> ClaimSet:
        """Return the shared set that is equal to `made`."""
        known = self._sets.get(key := made.key)
        if known is not None:
            return known
        if self._names > self._names_kept:
            self._forget_sets()
        self._sets[key] = made
        self._names += made.names
        for queue in key[0]:
            self._of_queue.setdefault(queue, {})[made] = None
        return made

    def _forget_sets(self) -> None:
        """Forget the quarter of the sets that was claimed longest ago, so that the cost of a new set does not grow.

        `since` moves forward, so that a forgotten claim does not look as if it never existed.
        """
        resting = sorted((each for each in self._sets.items() if not each[1].waiting), key=lambda each: each[1].claimed)
        for key, claims in resting[: len(resting) // 4 + 1]:
            del self._sets[key]
            self._names -= claims.names
            for queue in key[0]:
                del self._of_queue[queue][claims]
                if not self._of_queue[queue]:
                    del self._of_queue[queue]
            for name in list(claims.workers):
                self._assign(name, self.workers[name], None)
            self.since = max(self.since, claims.claimed)
            self.has_forgotten = True
        self._names_kept = max(NAMES_KEPT, self._names + self._names // 4)
