"""Any sequence of commands over the real rules and the real state: what must hold after every single step.

The harness compares rows with folded events, every order and counter with a recount, and tokens with those before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from msgspec import Raw
from msgspec.structs import replace

from jobd.core import decide, guards
from jobd.core.job_validation import counts, validate
from jobd.core.transaction import Transaction
from jobd.model import commands as cmd
from jobd.model.errors import ApiError
from jobd.model.job import (
    STATUSES,
    BackoffOptions,
    Failure,
    Grant,
    Job,
    LockDeadlines,
    Options,
    Policy,
    PreviousGrant,
    Result,
)
from jobd.model.responses import Response
from tests.proof.simulation.invariants import DecisionChecks
from tests.support.calls import COMMANDS
from tests.support.rule_harness import NOW, SEED, RuleHarness

# Short times, so that a few steps cross every boundary.
POLICY: Final = Policy(
    lock_ttl_ms=1_000,
    progress_timeout_ms=3_000,
    stall_after_ms=1_500,
    max_stalls=1,
    keep_completed_ms=2_000,
    keep_failed_ms=4_000,
    keep_cancelled_ms=1_000,
    live_jobs=5,
)

ids = st.sampled_from("aaabbc")
queues = st.sampled_from(["default", "default", "default", "q"])
kinds = st.sampled_from(["", "", "k"])
workers = st.sampled_from(["w-1", "w-2"])
waits = st.integers(0, 2_500)
maybe_wait = st.none() | waits
maybe_time = st.none() | st.integers(NOW - 3_000, NOW + 9_000)
rarely = st.sampled_from([None] * 6 + [NOW + 2_000, NOW + 9_000])
percents = st.sampled_from([0, 0.5, 50, 100])
maybe_text = st.none() | st.just("words")
some_ids = st.lists(ids, max_size=3)
slices = st.integers(1, 3)

# What the fields of the examples are drawn from. The other fields keep their values.
FIELDS: Final[dict[str, st.SearchStrategy[Any]]] = {
    "id": ids,
    "queue": queues,
    "queues": st.lists(queues, min_size=1, max_size=3),
    "kind": kinds,
    "kinds": st.none() | st.lists(kinds, min_size=1, max_size=2),
    "worker": workers,
    "name": queues,
    # Of the job's grants: the current one, the last that ended, or none that ever was.
    "lock_id": st.sampled_from(["current"] * 6 + ["ended", "never"]),
    "status": st.sampled_from(STATUSES),
    "from_": st.sampled_from(STATUSES),
    "to": st.sampled_from(STATUSES),
    "priority": st.integers(-1, 1),
    "progress": percents,
    "attempt": st.integers(0, 2),
    "stalls": st.integers(0, 2),
    "max_attempts": st.integers(1, 2),
    "max_stalls": st.sampled_from([None, 0]),
    "on_stall": st.sampled_from([None, "auto", "requeue", "fail"]),
    "backoff": st.builds(
        BackoffOptions, kind=st.sampled_from(["exponential", "fixed"]), base_ms=waits, jitter=st.booleans()
    ),
    "stall_after_ms": maybe_wait,
    "progress_timeout_ms": maybe_wait,
    "retry_after_ms": maybe_wait,
    "delay_ms": st.sampled_from([None] * 6 + [0, 1_500]),
    "lock_ttl_ms": st.none() | st.integers(1, 2_000),
    "additional_ms": st.none() | st.integers(1, 5_000),
    "run_at": st.sampled_from([None] * 6 + [NOW - 1_000, NOW + 2_000]),
    "expires_at": rarely,
    **dict.fromkeys(("created_at", "updated_at", "started_at", "finished_at"), maybe_time),
    "message": maybe_text,
    "reason": maybe_text,
    "storage_key": st.sampled_from([None, "k", "k", "k", "/k"]),
    "result": st.sampled_from([None, None, None, 1]),
    "limit": slices,
    "dry_run": st.sampled_from([False, False, False, True]),
    "updates": st.builds(
        cmd.Updates,
        error_message=maybe_text,
        priority=st.none() | st.integers(-1, 1),
        run_at=maybe_time,
        max_attempts=st.none() | st.integers(1, 3),
        storage_key=st.none() | st.just("k/1"),
        metadata=st.none() | st.just(Raw(b"null")) | st.just(Raw(b"[1]")),
    ),
}
# Fields whose values depend on the command.
OF_COMMANDS: Final[dict[type, dict[str, st.SearchStrategy[Any]]]] = {
    cmd.Create: {"id": st.none() | ids},
    cmd.Update: {"priority": st.none() | st.integers(-1, 1), "run_at": maybe_time, "max_attempts": st.none() | slices},
    cmd.Import: {"progress": st.none() | percents, "run_at": maybe_time, "expires_at": maybe_time},
    cmd.TakeBack: {"name": workers},
}


def varied(command: cmd.AnyCommand) -> st.SearchStrategy[Any]:
    """Return a strategy of commands like an example."""
    kind = type(command)
    drawn = {name: FIELDS[name] for name in kind.__struct_fields__ if name in FIELDS}
    return st.fixed_dictionaries(drawn | OF_COMMANDS.get(kind, {})).map(lambda values: replace(command, **values))


def varied_examples(select: Callable[[Any], bool]) -> st.SearchStrategy[Any]:
    """Return a strategy of commands like the examples that `select` accepts."""
    chosen = {type(example.command): varied(example.command) for example in COMMANDS if select(example.command)}
    return st.one_of([*chosen.values()])


creates = varied(cmd.Create())
grants = varied_examples(lambda command: command.admission == "grant")
holders = st.one_of(
    varied_examples(lambda command: hasattr(command, "lock_id")),
    st.builds(cmd.Undelivered, id=ids, lock_id=FIELDS["lock_id"]),
)
reads = st.one_of(
    varied_examples(lambda command: command.admission == "read"), st.builds(cmd.GetVersion, id=ids), st.just(cmd.Ping())
)
operators = varied_examples(
    lambda command: (
        command.admission not in ("read", "grant")
        and not hasattr(command, "lock_id")
        and not isinstance(command, cmd.Create | cmd.Bulk)
    )
)
of_time = st.one_of(
    st.builds(cmd.Recover, limit=slices),
    st.builds(cmd.Expire, limit=slices),
    st.builds(cmd.DeleteExpired, ids=some_ids),
    st.builds(cmd.RepairJobs, ids=some_ids),
    st.builds(cmd.ExtendAfterPause, ids=some_ids, grace_ms=waits),
    st.builds(cmd.KeepDue, jobs=st.dictionaries(ids, st.sampled_from([NOW, NOW + 2_000]), max_size=3)),
    st.builds(cmd.EndGrants, ids=some_ids, last=st.booleans()),
    st.just(cmd.Tick()),
    st.just(cmd.Report(body=b"{}")),
)


def weighted(*choices: tuple[int, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """Groups by weight, whatever their number of commands, so that sequences make progress."""
    return st.sampled_from([group for weight, group in choices for _ in range(weight)]).flatmap(lambda group: group)


commands = weighted(
    (3, creates),
    (1, st.builds(cmd.Bulk, jobs=st.lists(creates, min_size=1, max_size=3))),
    (5, grants),
    (5, holders),
    (2, operators),
    (2, of_time),
    (1, reads),
)


class TimeStep:
    """Time: `wall` and `lease` in ms; the wall clock may step."""

    def __init__(self, wall: int, lock_ms: int) -> None:
        self.wall, self.lock_ms = wall, lock_ms

    def __repr__(self) -> str:
        return f"Passes({self.wall}, {self.lock_ms})"


both_clocks = waits.map(lambda ms: TimeStep(ms, ms))
wall_steps = st.integers(-5_000, 5_000).map(lambda ms: TimeStep(ms, 0))
steps_of_a_run = st.tuples(weighted((6, commands), (2, both_clocks), (1, wall_steps)), st.booleans())
sequences = st.lists(steps_of_a_run, min_size=10, max_size=60)
long_sequences = st.lists(steps_of_a_run, min_size=100, max_size=150)


class PropertyRun(RuleHarness):
    """A harness that knows what each command may change."""

    def __init__(self) -> None:
        super().__init__(POLICY)

    def step(self, command: Any, *, admin: bool) -> None:
        if isinstance(command, TimeStep):
            self.now += command.wall
            self.lock_ms += command.lock_ms
            return
        self.decide(self._named(command), admin=admin, by="admin" if admin else "client")
        self._check_rows()

    def rule(self, tx: Transaction, call: cmd.IssuedCommand) -> Response | ApiError:
        """Decide, and check the decision with the invariants of the simulation."""
        answer = DecisionChecks().check(decide.decide, tx, call).answer
        if isinstance(answer, ApiError):
            assert answer.message.endswith(".") or "jobctl" in answer.message
        return answer

    def _named(self, command: cmd.AnyCommand) -> cmd.AnyCommand:
        """Choose an existing job, and replace the placeholder of its lock id."""
        job_id, name = getattr(command, "id", None), getattr(command, "lock_id", None)
        if job_id is None or isinstance(command, (cmd.Create, cmd.Import)):
            return command
        held = [job.id for job in self.rows.values() if job.grant is not None]
        if name == "current" and held and job_id not in held:
            job_id = held[self.now % len(held)]
        elif job_id not in self.rows and self.rows and name != "never":
            job_id = list(self.rows)[self.now % len(self.rows)]
        job = self.rows.get(job_id)
        if name == "current" and job is not None and job.grant is not None:
            return replace(command, id=job_id, lock_id=job.grant.lock_id)
        if name == "ended" and job is not None and job.ended is not None:
            return replace(command, id=job_id, lock_id=job.ended.lock_id)
        return replace(command, id=job_id)

    def _check_rows(self) -> None:
        for job in self.rows.values():
            assert (job.status == "processing") == (job.grant is not None) == (job.deadlines is not None)
            if job.deadlines is not None and job.deadlines.progress_due is not None:
                assert job.deadlines.expires <= job.deadlines.progress_due
            if job.seq not in self.state.unvalidated:
                bad = [issue for issue in validate(job, self.moment, self.policy).issues if counts(issue)]
                assert not bad or guards.is_stalled(job, self.moment.lock_ms), bad  # only recovery is left to do
            view = self.accept(cmd.Why(id=job.id))
            if job.status in ("queued", "processing") and job.options.queue not in self.state.paused:
                assert view.next is not None


@pytest.mark.slow
@settings(max_examples=50)
@given(sequences)
@example([(cmd.Create(id="a"), False), (cmd.Start(id="a", worker="w"), False), (TimeStep(1_500, 1_500), False),
          (cmd.Start(id="a", worker="w"), False)])  # fmt: skip
def test_any_sequence_of_commands(sequence: list[tuple[Any, bool]]) -> None:
    run = PropertyRun()
    for command, admin in sequence:
        run.step(command, admin=admin)


@pytest.mark.slow
@settings(max_examples=3, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(long_sequences)
def test_any_long_sequence_of_commands(sequence: list[tuple[Any, bool]]) -> None:
    run = PropertyRun()
    for command, admin in sequence:
        run.step(command, admin=admin)


@pytest.mark.slow
@settings(max_examples=12)
@given(sequences, st.integers(0, 10_000))
def test_every_job_ends_once_time_passes(sequence: list[tuple[Any, bool]], away: int) -> None:
    """Without workers, recovery alone ends every grant."""
    run = PropertyRun()
    for command, admin in sequence:
        run.step(command, admin=admin)
    run.advance(away)
    for _ in range(20):
        run.advance(POLICY.lock_ttl_ms + 5_000)
        run.accept(cmd.Recover(limit=9))
    assert not run.state.processing


odd_times = st.sampled_from([0, 1, 999, 1_000, 1_001, 5_000])
lock_deadlines = st.builds(
    LockDeadlines, expires=odd_times, stall_due=odd_times, progress_due=st.none() | odd_times, cleared=st.booleans()
)
hand_made = st.builds(
    Job,
    seq=st.just(900),
    id=st.just("a"),
    options=st.builds(Options, on_stall=st.sampled_from(["auto", "fail", "requeue", "?"]), queue=queues),
    status=st.sampled_from([*STATUSES, "odd", ""]),
    created_at=st.integers(NOW - 5, NOW + 5),
    updated_at=st.integers(NOW - 5, NOW + 5),
    run_at=st.integers(NOW - 5, NOW + 5),
    progress=st.sampled_from([-1, 0, 50, 101.5]),
    attempt=st.integers(0, 2),
    stalls=st.integers(0, 9),
    started_at=maybe_time,
    finished_at=maybe_time,
    expires_at=maybe_time,
    grant=st.none() | st.builds(
        Grant, lock_id=st.just("l"), fencing_token=st.just(1), worker=workers, acquired_at=st.just(NOW),
        ttl_ms=st.just(1_000), stall_after_ms=waits, progress_timeout_ms=waits,
    ),
    deadlines=st.none() | lock_deadlines,
    ended=st.none() | st.just(PreviousGrant("l", 1, "w", NOW, "r", "r", "release", "h")),
    result=st.none() | st.just(Result()) | st.just(Result("u")),
    error=st.none() | st.just(Failure(None)),
)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=120)
@given(hand_made, st.lists(st.tuples(commands, waits), min_size=1, max_size=6))
def test_rules_accept_any_manually_edited_row(job: Job, sequence: list[tuple[cmd.AnyCommand, int]]) -> None:
    """`decide` is total: for any state there is a response or an error, and the state remains usable."""
    rules = RuleHarness(POLICY)
    state = rules.state
    state.reindex(None, job)
    for number, (command, ms) in enumerate(sequence):
        rules.now += ms
        rules.lock_ms += ms
        state.advance(rules.now, rules.lock_ms)
        tx = Transaction(state, rules.moment, POLICY)
        call = cmd.IssuedCommand(_aimed(command), "client", number.to_bytes(16, "little"))
        assert isinstance(decide.decide(tx, call), (Response, ApiError))
        assert state.total() == sum(
            each.status in STATUSES for each in [*state.jobs.values(), *state.finished.values()]
        )


def _aimed(command: cmd.AnyCommand) -> cmd.AnyCommand:
    return replace(command, lock_id="l") if hasattr(command, "lock_id") else command


@settings(max_examples=100)
@given(hand_made)
def test_a_cleanup_run_leaves_no_row_that_it_could_repair(job: Job) -> None:
    rules = RuleHarness(POLICY)
    rules.state.reindex(None, job)
    rules.state.unvalidated[job.seq] = job.id

    def repair() -> Any:
        rules.state.advance(rules.now, rules.lock_ms)
        tx = Transaction(rules.state, rules.moment, POLICY)
        response = decide.decide(tx, cmd.IssuedCommand(cmd.RepairJobs(ids=["a"]), "cleanup", SEED))
        assert isinstance(response, Response)
        return response.data

    repair()
    repeated = repair()
    assert repeated.done == 0
    assert all(issue.field in ("status", "lock") for _, issue in repeated.issues)
