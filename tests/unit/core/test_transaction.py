"""A transaction: rising numbers, ordered times, undo, and secrets that depend only on the seed."""

from __future__ import annotations

from functools import reduce
from hashlib import blake2b
from operator import and_, or_
from typing import Any, get_args
from uuid import UUID

import pytest
from msgspec import Raw
from msgspec.structs import replace

from jobd.core import decide, transitions, views
from jobd.core.state import State
from jobd.core.transaction import Transaction
from jobd.model import commands as cmd
from jobd.model.clocks import LockMs
from jobd.model.errors import ApiError
from jobd.model.events import QueuePause
from jobd.model.job import COUNTER_MASK, DAY_MS, TOKEN_COUNTER_BITS, Job, Options, Policy, new_epoch
from jobd.model.responses import Response
from jobd.model.storage import Numbers
from tests.support.rule_harness import NOW, SEED, RuleHarness, snapshot

AT = cmd.Moment(NOW, LockMs(1_000), NOW - 1_000)
JOB = Job(1, "a", Options(), "queued", NOW, NOW, NOW)
MANY = range(1, 500)


def transaction(seed: bytes = SEED, at: cmd.Moment = AT, state: State | None = None) -> Transaction:
    tx = Transaction(state or State(), at, Policy())
    tx.begin(cmd.IssuedCommand(cmd.Ping(), "client", seed))
    return tx


def test_numbers_go_up_by_one() -> None:
    tx = transaction()
    assert [tx.job_number() for _ in range(3)] == [1, 2, 3]
    tokens = [tx.token() for _ in range(3)]
    assert [token - tokens[0] for token in tokens] == [0, 1, 2]
    tx.create(JOB, "created", b"null", "")
    for _ in range(2):
        tx.update(JOB, JOB, "updated")
    tx.set_pause("q", QueuePause(NOW), None)
    assert [change.seq for change in tx.changes] == [1, 2, 3, 4]
    assert (tx.changes[-1].job_seq, tx.changes[-1].job_id) == (0, "")


def test_a_full_counter_begins_an_epoch_of_the_trusted_time() -> None:
    for trusted, believed in ((None, NOW), (NOW - DAY_MS, NOW - DAY_MS)):
        state = State(Numbers(epoch=3, next_token=COUNTER_MASK))
        tx = transaction(at=cmd.Moment(NOW, LockMs(0), NOW, trusted), state=state)
        epoch = new_epoch(3, believed)
        assert epoch > 4
        tokens = [tx.token() for _ in range(3)]
        assert tokens == [
            (3 << TOKEN_COUNTER_BITS) + COUNTER_MASK,
            (epoch << TOKEN_COUNTER_BITS) + 1,
            (epoch << TOKEN_COUNTER_BITS) + 2,
        ]
        assert (state.epoch, state.next_token) == (epoch, 3)
        tx.undo()
        assert (state.epoch, state.next_token) == (3, COUNTER_MASK)


def test_updated_at_is_the_latest_time_of_a_row() -> None:
    """Also if the wall clock stepped back, or a repaired row has later times."""
    tx = transaction()

    def updated_at(job: Job, **fields: Any) -> int:
        tx.state.reindex(None, job)
        after = tx.update(job, replace(job, **fields), "updated")
        tx.state.reindex(after, None)
        return after.updated_at

    assert updated_at(replace(JOB, created_at=NOW - 9)) == NOW
    assert updated_at(replace(JOB, created_at=NOW + 1)) == NOW + 1
    ahead = replace(JOB, started_at=NOW + 2)
    assert updated_at(ahead) == NOW + 2
    assert updated_at(ahead, started_at=NOW + 3) == NOW + 3
    assert updated_at(ahead, started_at=None) == NOW
    ended = replace(JOB, finished_at=NOW + 4)
    assert updated_at(ended) == NOW + 4
    assert updated_at(ended, finished_at=NOW + 5, updated_at=NOW + 1) == NOW + 5
    assert updated_at(ended, finished_at=None) == NOW


def test_a_lock_id_cannot_be_guessed() -> None:
    """Its number is public; the secret is in the seed. The same seed gives the same id."""
    assert transaction().secret(7) == transaction().secret(7) == SEED.hex()  # of the first grant of a call
    assert len(bytes.fromhex(transaction().secret(7))) == 16
    many = [transaction(), transaction(), transaction(b"another seed")]
    for each in many:
        each.create(JOB, "created", b"null", "")
    secret = many[0].secret(7)
    assert len(bytes.fromhex(secret)) == 16
    assert secret == many[1].secret(7) == "99f9c72f3e7184376f6521f0f6ca9bff"
    assert secret not in {SEED.hex(), many[2].secret(7), many[0].secret(8)}
    assert len(many[0].secret(2**64 - 1)) == 32  # the greatest possible token


def test_a_job_id_is_a_uuid_of_its_time_and_otherwise_random() -> None:
    seeds = [blake2b(number.to_bytes(8, "big"), digest_size=16).digest() for number in MANY]
    bulk = transaction()
    bulk.create(JOB, "created", b"null", "")
    first, others = [transaction(seed).job_id(1) for seed in seeds], [bulk.job_id(number) for number in MANY]
    for ids in (first, others):
        made = [UUID(job_id) for job_id in ids]
        assert len(set(made)) == len(made)
        assert {(each.version, each.variant) for each in made} == {(7, "specified in RFC 4122")}
        assert {each.int >> 80 for each in made} == {NOW}
        fixed = 0xF << 76 | 0x3 << 62
        random = (1 << 80) - 1 & ~fixed
        assert reduce(or_, (each.int for each in made)) & random == random
        assert reduce(and_, (each.int for each in made)) & random == 0
    assert transaction().job_id(1) == "018bcfe5-6800-7303-9323-334353637383"  # a replay gives the same
    assert bulk.job_id(2**64 - 1) != bulk.job_id(1) == others[0] == "018bcfe5-6800-70c3-ac7d-2a7019d304d6"


def test_a_job_id_is_valid_at_any_time() -> None:
    for now, shown in ((2**48 - 1, 2**48 - 1), (2**48 + 5, 5)):
        assert UUID(transaction(at=replace(AT, now=now)).job_id(1)).int >> 80 == shown


def test_the_random_fraction_is_uniform_and_depends_on_the_seed() -> None:
    thrown = [transaction().fraction(number) for number in MANY]
    assert 0 <= min(thrown) < 0.05
    assert 0.95 < max(thrown) < 1
    assert 0.4 < sum(thrown) / len(thrown) < 0.6
    assert transaction().fraction(1) == thrown[0] == 0.4781582210060446 != transaction(b"another seed").fraction(1)
    assert 0 <= transaction().fraction(2**64 - 1) < 1


# -- undo -------------------------------------------------------------------------------------------------------------


def test_undo_restores_everything_that_a_command_changed(rules: RuleHarness) -> None:
    """Rows, pauses, hashes, numbers and validated rows; the commands before it stay."""
    for job_id in ("a", "b", "c"):
        rules.held(job_id)
    rules.accept(cmd.Pause(name="p", reason="before"))
    rules.accept_admin(cmd.PutSchedule(id="s", every_ms=1_000, job=cmd.ScheduledJob()))
    before = snapshot(rules.state)
    tx = Transaction(rules.state, rules.moment, rules.policy)
    tx.begin(cmd.IssuedCommand(cmd.Ping(), seed=SEED))
    tx.update(rules.job("b"), replace(rules.job("b"), run_at=5), "updated")
    tx.change_schedule("s", "schedule_paused", "q", until=None)
    between = snapshot(rules.state)
    tx.begin(cmd.IssuedCommand(cmd.Ping(), seed=SEED))
    transitions.stall(tx, rules.job("a"), "It was slow.")
    tx.create(replace(JOB, id="new", seq=tx.job_number()), "imported", b"null", "hash")
    tx.token()
    tx.set_pause("p", QueuePause(NOW), None)
    tx.set_pause("p", None, None)
    tx.set_pause("q", QueuePause(NOW), None)
    tx.change_schedule("s", "schedule_deleted", "q")
    tx.checked.append(1)
    assert tx.has_changed
    tx.undo()
    assert not tx.has_changed
    assert (snapshot(rules.state), len(tx.changes), tx.checked) == (between, 2, [])
    assert list(rules.state.processing) == ["a", "b", "c"]
    tx.begin(cmd.IssuedCommand(cmd.Ping(), seed=SEED))
    tx.set_pause("p", None, None)
    numbers = rules.state.numbers(0, 0, rules.state.clock)
    tx.roll_back()
    assert rules.state.numbers(0, 0, rules.state.clock) == numbers, "a batch that was not written keeps its numbers"
    assert snapshot(rules.state) | {"next_event": before["next_event"]} == before


def test_undo_forgets_the_hash_of_an_undone_job_only(rules: RuleHarness) -> None:
    tx = Transaction(rules.state, rules.moment, rules.policy)
    assert isinstance(decide.decide(tx, cmd.IssuedCommand(cmd.Create(id="a"))), Response)
    assert set(tx.requests) == {"a"}
    assert isinstance(decide.decide(tx, cmd.IssuedCommand(cmd.Import(id="c"))), Response)
    assert isinstance(decide.decide(tx, cmd.IssuedCommand(cmd.Create(id="b"))), Response)
    tx.undo()
    assert set(tx.requests) == {"a"}
    assert isinstance(decide.decide(tx, cmd.IssuedCommand(cmd.Create(id="a"))), Response)


def test_undo_forgets_late_results_and_calls(rules: RuleHarness) -> None:
    lock_id = rules.held()
    rules.recover(rules.policy.lock_ttl_ms + rules.policy.stall_after_ms)
    for command in (cmd.Complete(id="a", lock_id=lock_id), cmd.Progress(id="a", lock_id=lock_id, progress=1)):
        tx = Transaction(rules.state, rules.moment, rules.policy)
        for _ in range(2):
            assert isinstance(decide.decide(tx, cmd.IssuedCommand(command)), ApiError)
            assert tx.has_changed, "it is known from the undone command"
            tx.undo()
        assert (tx.late.results.get(1, []), rules.state.late_results.get(1)) == ([], None)


def test_undo_restores_the_latest_late_result(rules: RuleHarness) -> None:
    """Otherwise a plan from before the first late result could delete the job with it."""
    lock_ids = [rules.held()]
    for _ in range(2):
        rules.accept(cmd.ForceFail(id="a"))
        rules.accept(cmd.ForceReset(id="a"))
        lock_ids.append(rules.start())
    rules.accept(cmd.ForceFail(id="a"))
    rules.reject(cmd.Complete(id="a", lock_id=lock_ids[1]), "lock_lost")
    latest = rules.state.late_results.get(1)
    assert latest == rules.last().seq
    command = cmd.Complete(id="a", lock_id=lock_ids[2])
    tx = Transaction(rules.state, rules.moment, rules.policy, late=rules.known_late(command))
    assert isinstance(decide.decide(tx, cmd.IssuedCommand(command)), ApiError)
    assert rules.state.late_results.get(1) != latest
    tx.roll_back()
    assert rules.state.late_results.get(1) == latest


def test_a_dry_run_changes_nothing(rules: RuleHarness) -> None:
    rules.held()
    before = snapshot(rules.state)
    tx = Transaction(rules.state, rules.moment, rules.policy)
    tx.begin(cmd.IssuedCommand(cmd.Preview(limit=1), seed=SEED))
    tx.delete(tx.update(rules.job(), replace(rules.job(), run_at=5), "updated"))
    assert [change.type for change in tx.changed()] == ["updated", "deleted"]
    assert snapshot(rules.state) | {"next_event": before["next_event"]} == before
    tx.undo()
    assert (snapshot(rules.state), tx.changes, tx.ended) == (before, [], [])


def test_the_lock_of_a_deleted_job_has_ended(rules: RuleHarness) -> None:
    """Only a manual edit can leave a lock on a finished job."""
    lock_id = rules.held()
    row = rules.row(replace(rules.job(), status="failed"))
    tx = Transaction(rules.state, rules.moment, rules.policy)
    tx.begin(cmd.IssuedCommand(cmd.Ping(), seed=SEED))
    tx.delete(row)
    assert tx.ended == [lock_id]
    tx.undo()
    assert tx.ended == []


def test_undo_keeps_the_ended_locks_of_earlier_commands(rules: RuleHarness) -> None:
    first, second = rules.held("a"), rules.held("b")
    tx = Transaction(rules.state, rules.moment, rules.policy)
    decide.decide(tx, cmd.IssuedCommand(cmd.Complete(id="a", lock_id=first)))
    decide.decide(tx, cmd.IssuedCommand(cmd.Complete(id="b", lock_id=second)))
    assert tx.ended == [first, second]
    tx.undo()
    assert tx.ended == [first]


def test_a_batch_that_is_not_written_restores_the_counts_of_jobs_in_quarantine(rules: RuleHarness) -> None:
    """Their damaged rows could not be moved, so that the disk still counts finished ones."""
    rules.held("failed")
    rules.accept(cmd.ForceFail(id="failed"))
    lock_id = rules.held("held")
    tx = Transaction(rules.state, rules.moment, rules.policy)
    decide.decide(tx, cmd.IssuedCommand(cmd.Complete(id="held", lock_id=lock_id)))
    decide.decide(tx, cmd.IssuedCommand(cmd.ForceReset(id="failed")))
    for job_id in ("held", "failed"):
        rules.state.quarantine(job_id, "bad", is_moved=False)
    assert (rules.state.totals["completed"], rules.state.totals["failed"]) == (1, 0)
    tx.roll_back()
    assert (rules.state.totals["completed"], rules.state.totals["failed"]) == (0, 1)
    assert sum(rules.state.totals.values()) == sum(rules.state.counts["default"].values()) == 1


def test_a_rule_that_raises_leaves_nothing(rules: RuleHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    rules.held()
    before = snapshot(rules.state)
    monkeypatch.setattr(views, "job_response", lambda *_: 1 / 0)
    tx = Transaction(rules.state, rules.moment, rules.policy)
    with pytest.raises(ZeroDivisionError):
        decide.decide(tx, cmd.IssuedCommand(cmd.Cancel(id="a")))
    assert (snapshot(rules.state), tx.changes) == (before, [])


def test_every_command_has_a_rule() -> None:
    different = set(decide.RULES) ^ set(get_args(cmd.AnyCommand))
    assert not different, (
        f"{different} must be in RULES (core/decide.py) and in AnyCommand (model/commands/issued_command.py)"
    )


def test_undo_drops_the_payloads_of_new_jobs(rules: RuleHarness) -> None:
    tx = Transaction(rules.state, rules.moment, rules.policy)
    decide.decide(tx, cmd.IssuedCommand(cmd.Create(id="kept", payload=Raw(b"1"))))
    decide.decide(tx, cmd.IssuedCommand(cmd.Create(id="undone", payload=Raw(b"2"))))
    assert len(tx.payloads) == 2
    tx.undo()
    assert [change.job_seq for change in tx.changes] == list(tx.payloads)
