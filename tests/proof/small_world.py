"""Explore breadth-first, with the real rules, every state that one job, three workers and an operator can reach.

`python -m tests.proof.small_world` explores all worlds and prints the number of states of each. There is no model: a
step is the real `decide`. Two states are equal if no rule can distinguish them: times are relative to now, tokens count
by their order, and all past times are equal.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Final

from msgspec import Struct
from msgspec.structs import replace

from jobd.core import decide, guards
from jobd.core.state import State
from jobd.core.transaction import Transaction
from jobd.model import commands as cmd
from jobd.model.clocks import LockMs
from jobd.model.errors import ApiError
from jobd.model.events import QueuePause
from jobd.model.job import (
    LIVE,
    STATUSES,
    TOKEN_COUNTER_BITS,
    BackoffOptions,
    Grant,
    Job,
    LatePolicy,
    LateResult,
    LockDeadlines,
    Policy,
    PreviousGrant,
    Result,
)
from jobd.model.responses import Response, Validation, WhyView
from jobd.model.storage import LateResultRows, Numbers, OpenedStore
from tests.proof.simulation.invariants import DecisionChecks
from tests.support.calls import COMMANDS, HOLDERS, Example, aimed
from tests.support.rule_harness import compare

NOW: Final = 1_700_000_000_000
LOCK_MS: Final = LockMs(1_000_000)
TICK_MS: Final = 1_000
ID: Final = "a"
WORKERS: Final = ("w-1", "w-2", "w-3")
SEED: Final = b"0123456789abcdef"
SOON: Final = 12  # ticks within which recovery alone must end every grant


# Fields of examples that would only add states.
PLAIN: Final = {
    **dict.fromkeys(("reason", "message", "error_code", "delay_ms", "additional_ms", "priority", "run_at", "until")),
    "file_path": None,
    "storage_key": None,
    "retry_after_ms": 0,
}


def _plain(examples: Iterable[Example]) -> tuple[cmd.AnyCommand, ...]:
    """Return the different commands of the examples about the job, the queue and the first worker of a world."""
    shown: dict[str, cmd.AnyCommand] = {}
    for command in (each.command for each in examples):
        name = WORKERS[0] if isinstance(command, cmd.TakeBack) else "default"
        plain = aimed(command, id=ID, name=name, **PLAIN)
        shown[repr(plain)] = plain
    return tuple(shown.values())


HOLDER_COMMANDS: Final = _plain(each for each in HOLDERS if not each.is_admin)
OPERATIONS: Final = _plain(
    each
    for each in COMMANDS
    if each.is_admin and each not in HOLDERS and not isinstance(each.command, cmd.Import | cmd.Transition)
    if each.command.admission != "read"
)

# Every job has one, of a grant before those of the world.
LATE: Final = LateResult(1, NOW, "w-old", 1, "of old", None, Result(file_path="/late"))


class World(Struct, frozen=True):
    """The constants of a world, with times in ticks: the daemon's policy and the job's options."""

    name: str
    ttl: int = 2
    stall_after: int = 1
    progress_due: int = 3
    keep: int = 1
    max_attempts: int = 1
    max_stalls: int = 1
    on_stall: Any = "auto"
    delay: int = 0
    expires: int | None = None
    grace: int = 0
    furthest: int = 0  # ticks by which the wall clock may be off, either way
    late: LatePolicy = "keep"

    def policy(self) -> Policy:
        kept_ms = self.keep * TICK_MS
        return Policy(
            lock_ttl_ms=self.ttl * TICK_MS,
            stall_after_ms=self.stall_after * TICK_MS,
            progress_timeout_ms=self.progress_due * TICK_MS,
            max_stalls=self.max_stalls,
            on_stall=self.on_stall,
            keep_completed_ms=kept_ms,
            keep_failed_ms=kept_ms,
            keep_cancelled_ms=kept_ms,
            late_results=self.late,
        )


WORLDS: Final = (
    World("plain"),
    World("two attempts, longer stall time", max_attempts=2, stall_after=3, progress_due=0),
    World("on_stall requeue", on_stall="requeue", max_stalls=0),
    World("on_stall fail", on_stall="fail", ttl=1, stall_after=0, progress_due=2),
    World("delayed, with an expiry", delay=1, expires=2),
    World("daemon downtime", grace=2, progress_due=2),
    World("late results adopted", ttl=1, stall_after=0, progress_due=0, late="adopt_if_unclaimed"),
    World("wall clock steps", ttl=1, stall_after=1, progress_due=0, furthest=1),
)


class WorldState(Struct, frozen=True):
    """One state: the job's row, whether its queue is paused, and the lock that each worker knows."""

    job: Job | None
    paused: bool
    locks: tuple[str | None, ...]
    next_token: int
    now: int
    lock_ms: LockMs

    @property
    def at(self) -> cmd.Moment:
        return cmd.Moment(self.now, self.lock_ms, self.now - int(self.lock_ms))

    def rebuilt(self) -> State:
        numbers = Numbers(next_token=self.next_token, next_job=2, next_event=1, lock_ms=self.lock_ms, wall_ms=self.now)
        core = State.opened(OpenedStore(numbers))
        if self.job is not None:
            core.reindex(None, self.job)
        if self.paused:
            core.set_paused("default", QueuePause(self.now, "admin"))
        core.advance(self.now, self.lock_ms)
        return core

    def transaction(self, core: State, policy: Policy) -> Transaction:
        """Return a transaction on `core` with the late result that the actor would read."""
        late = None if self.job is None else LateResultRows({self.job.seq: [LATE]})
        return Transaction(core, self.at, policy, late=late)

    def key(self, world: World) -> tuple[Any, ...]:
        """Return everything that the rules can distinguish in this state.

        Left out: the worker that knows a lock, older locks, which are never valid again, and the count of releases,
        because the shortest path to a state has too few of them to delay a job.
        """
        job, off, furthest = self.job, self.off, world.furthest
        if job is None:
            return (None, self.paused, off)
        return (
            job.status,
            self.paused,
            off,
            job.ended is not None and job.ended.lock_id in self.locks,
            job.grant is not None and job.grant.lock_id in self.locks,
            job.progress,
            min(job.attempt, job.options.max_attempts + 1),
            min(job.stalls, job.options.max_stalls + 1),
            job.options.max_attempts,
            self._wall(job.run_at, furthest),
            self._wall(job.expires_at, furthest),
            self._wall(job.created_at, furthest),
            self._wall(job.started_at, furthest),
            self._wall(job.finished_at, furthest),
            job.error and job.error.code,
            job.result is None,
            self._lock_ms(job.deadlines),
            _grant(job.grant),
            _ended(job.ended),
            world.late == "adopt_if_unclaimed" and job.ended is not None and job.updated_at == job.ended.at,
        )

    @property
    def off(self) -> int:
        """Return the ticks by which the wall clock was moved."""
        return (self.now - NOW - (self.lock_ms - LOCK_MS)) // TICK_MS

    def _wall(self, time_ms: int | None, furthest: int) -> int | None:
        """Clamp a past time, unless the wall clock may still step back before it."""
        return None if time_ms is None else max(-(self.off + furthest) * TICK_MS, time_ms - self.now)

    def _lock_ms(self, deadlines: LockDeadlines | None) -> tuple[Any, ...] | None:
        if deadlines is None:
            return None
        times = (deadlines.expires, deadlines.stall_due, deadlines.progress_due)
        return (*(None if time_ms is None else max(0, time_ms - self.lock_ms) for time_ms in times), deadlines.cleared)


def _grant(grant: Grant | None) -> tuple[Any, ...] | None:
    return None if grant is None else (grant.ttl_ms, grant.stall_after_ms, grant.progress_timeout_ms)


def _ended(ended: PreviousGrant | None) -> tuple[Any, ...] | None:
    """Replace the hash, which includes the lock id, by whether the failure allowed a retry."""
    if ended is None:
        return None
    return (ended.rule, ended.reason, ended.verb, ended.body_hash == guards.digest(_failing(ended.lock_id, True)))


def _failing(lock_id: str, retry: bool) -> cmd.Fail:
    return cmd.Fail(id=ID, lock_id=lock_id, error_message="e", retry=retry, retry_after_ms=0)


class Step(Struct, frozen=True):
    """A command, the worker that sends it (by number, or none), and whether its response arrives."""

    command: cmd.AnyCommand
    worker: int | None = None
    lost: bool = False
    admin: bool = False


class Exploration(DecisionChecks):
    """The exploration of one world. `states` maps the key of each state to the step that first reached it."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.policy = world.policy()
        self.states: dict[tuple[Any, ...], tuple[tuple[Any, ...] | None, Step | str]] = {}
        self.fired: dict[str, int] = {}
        self.played: set[type] = set()  # commands
        self.decisions = 0
        self._core: tuple[WorldState, State] | None = None  # of the last decision, if it changed nothing

    def run(self, limit: int | None = None) -> int:
        """Explore until no state is new, or `limit` states are known; return their number."""
        first = WorldState(None, False, (None,) * len(WORKERS), 1, NOW, LOCK_MS)
        self.states[self._key(first)] = (None, "the beginning")
        ahead = deque([first])
        while ahead and (limit is None or len(self.states) < limit):
            state = ahead.popleft()
            for how, after in self._next(state):
                key = self._key(after)
                if key not in self.states:
                    self.states[key] = (self._key(state), how)
                    self._check_state(after)
                    ahead.append(after)
        return len(self.states)

    def path(self, key: tuple[Any, ...]) -> list[Step | str]:
        """Return the steps that lead to a state."""
        steps: list[Step | str] = []
        at: tuple[Any, ...] | None = key
        while at is not None:
            at, how = self.states[at]
            steps.append(how)
        return steps[::-1]

    def _key(self, state: WorldState) -> tuple[Any, ...]:
        return state.key(self.world)

    # -- steps --------------------------------------------------------------------------------------------------------

    def _next(self, state: WorldState) -> Iterator[tuple[Step | str, WorldState]]:
        yield "a tick", replace(state, now=state.now + TICK_MS, lock_ms=state.lock_ms + TICK_MS)
        for ticks in (-1, 1):
            if abs(state.off + ticks) <= self.world.furthest:
                yield f"the wall clock steps by {ticks}", replace(state, now=state.now + ticks * TICK_MS)
        for step in self._steps(state):
            after = self._decide(state, step)
            if after is not None:
                yield step, after

    def _steps(self, state: WorldState) -> Iterator[Step]:
        """Return all commands that can be sent now."""
        yield from self._common_steps()
        for worker, name in enumerate(WORKERS):
            yield from (Step(cmd.Start(id=ID, worker=name), worker), Step(cmd.Claim(worker=name), worker))
            lock_id = state.locks[worker]
            if lock_id is not None and lock_id not in state.locks[:worker]:
                yield from (Step(command, worker) for command in self._holder_steps(lock_id))
        yield Step(cmd.Start(id=ID, worker=WORKERS[0]), 0, lost=True)
        yield from (Step(command) for command in self._holder_steps("a lock of long ago"))
        job = state.job
        if job is not None and job.grant is not None:
            lock_id = job.grant.lock_id
            yield Step(cmd.Undelivered(id=ID, lock_id=lock_id))
            yield Step(cmd.ExtendLock(id=ID, lock_id=lock_id), admin=True)
            yield Step(cmd.ReleaseLock(id=ID, lock_id=lock_id), admin=True)
        if job is not None and job.ended is not None:
            yield Step(cmd.Undelivered(id=ID, lock_id=job.ended.lock_id))
            yield Step(cmd.ReleaseLock(id=ID, lock_id=job.ended.lock_id), admin=True)

    def _common_steps(self) -> Iterator[Step]:
        world = self.world
        made = cmd.Create(id=ID, max_attempts=world.max_attempts, backoff=BackoffOptions(base_ms=TICK_MS))
        yield Step(replace(made, delay_ms=world.delay * TICK_MS or None))
        yield Step(cmd.Bulk(jobs=[made]))
        yield from (Step(cmd.Import(id=ID, status=status), admin=True) for status in STATUSES)
        for command in OPERATIONS:
            yield Step(aimed(command, max_attempts=world.max_attempts), admin=True)
        moves = ((here, there) for here in STATUSES for there in STATUSES if here != there)
        yield from (Step(cmd.Transition(id=ID, from_=here, to=there), admin=True) for here, there in moves)
        of_time: tuple[cmd.AnyCommand, ...] = (
            cmd.Recover(limit=1),
            cmd.Expire(limit=1),
            cmd.DeleteExpired(ids=[ID]),
            cmd.RepairJobs(ids=[ID]),
        )
        yield from (Step(command) for command in (*of_time, cmd.EndGrants(ids=[ID], last=True)))
        if world.grace:
            yield Step(cmd.ExtendAfterPause(ids=[ID], grace_ms=world.grace * TICK_MS))

    def _holder_steps(self, lock_id: str) -> Iterator[cmd.AnyCommand]:
        yield cmd.Progress(id=ID, lock_id=lock_id, progress=0)
        yield from (aimed(command, lock_id=lock_id) for command in HOLDER_COMMANDS)

    def _decide(self, state: WorldState, step: Step) -> WorldState | None:
        """Return the state after the real decision; None if nothing changed."""
        command = step.command
        if isinstance(command, cmd.Create) and self.world.expires is not None:
            command = replace(command, expires_at=state.now + self.world.expires * TICK_MS)
        core = state.rebuilt() if self._core is None or self._core[0] is not state else self._core[1]
        self._begin(state)
        call = cmd.IssuedCommand(command, "admin" if step.admin else "client", SEED, step.admin)
        decision = self.check(decide.decide, state.transaction(core, self.policy), call)
        self._core = None if decision.changes else (state, core)
        self.decisions += 1
        self.played.add(type(command))
        self._count(decision.answer)
        for change in decision.changes:
            self.fired[f"event {change.type}"] = self.fired.get(f"event {change.type}", 0) + 1
        locks = list(state.locks)
        if (
            isinstance(decision.answer, Response)
            and decision.answer.grants
            and not step.lost
            and step.worker is not None
        ):
            locks[step.worker] = decision.answer.grants[0][1]
        paused = "default" in core.paused
        if not decision.changes:
            return None
        return replace(state, job=core.get(ID), paused=paused, locks=tuple(locks), next_token=core.next_token)

    def _begin(self, state: WorldState) -> None:
        """Check each state by itself: time and tokens continue from it."""
        self._last_lock_ms = state.lock_ms
        self._last_token = (1 << TOKEN_COUNTER_BITS | state.next_token) - 1

    def _count(self, response: Response | ApiError) -> None:
        if isinstance(response, ApiError):
            name = f"error {response.code}"
            self.fired[name] = self.fired.get(name, 0) + 1
            self.must(response.code != "internal_error", "S8", response.message)

    # -- every state --------------------------------------------------------------------------------------------------

    def _check_state(self, state: WorldState) -> None:
        """Check what must hold in every state."""
        job = state.job
        core = state.rebuilt()
        rows = {} if job is None else {job.id: job}
        compare(core, rows, state.at)
        if job is None:
            return
        self.must((job.grant is not None) == (job.status == "processing"), "S1", f"a {job.status} job", ID)
        why = self._ask(core, state, cmd.Why(id=ID))
        assert isinstance(why, WhyView)
        ends = why.next is not None or state.paused
        self.must(ends or job.status not in LIVE, "promise 3", f"nothing will ever happen to it: {why}", ID)
        found = self._ask(core, state, cmd.Validate(id=ID))
        assert isinstance(found, Validation)
        self.must(found.can_proceed, "validation", f"{found.issues}", ID)
        self._ask(core, state, cmd.Get(id=ID))
        self._ask(core, state, cmd.Stats())
        if job.status == "processing":
            self._check_recovery_alone(state)

    def _ask(self, core: State, state: WorldState, command: cmd.AnyCommand) -> Any:
        self._begin(state)
        decision = self.check(
            decide.decide, state.transaction(core, self.policy), cmd.IssuedCommand(command, "client", SEED)
        )
        self.played.add(type(command))
        self.must(isinstance(decision.answer, Response) and not decision.changes, "S8", f"{decision.answer}", ID)
        assert isinstance(decision.answer, Response)
        return decision.answer.data

    def _check_recovery_alone(self, state: WorldState) -> None:
        """Check that recovery alone soon ends the grant."""
        for _ in range(SOON):
            state = replace(state, now=state.now + TICK_MS, lock_ms=state.lock_ms + TICK_MS)
            after = self._decide(state, Step(cmd.Recover(limit=1)))
            state = after or state
            if state.job is None or state.job.status != "processing":
                return
        self.fail("L2", f"recovery has not ended its grant after {SOON} ticks: {state.job}", ID)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proof.small_world", description=__doc__)
    parser.add_argument("--limit", type=int, default=None, help="states of each world, at most")
    given = parser.parse_args(arguments)
    total = 0
    for world in WORLDS:
        began_s = time.perf_counter()
        walk = Exploration(world)
        total += walk.run(given.limit)
        took_s = time.perf_counter() - began_s
        print(
            f"{len(walk.states):>8,} states {walk.decisions:>10,} decisions {took_s:>6.1f} s  {world.name}", flush=True
        )
    print(f"{total:>8,} states: every invariant holds in each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
