"""Bugs in the actor, its batches, idempotency and the clock."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from msgspec.structs import replace

from jobd.core.transaction import Transaction
from jobd.engine.actor import Actor
from jobd.engine.batch import DecidedBatch, Decider
from jobd.engine.clock import Clock
from jobd.engine.disk_full import FullDisk
from jobd.engine.envelope import Envelope, may_go_first
from jobd.engine.idempotency import IdempotencyStore
from jobd.maintenance.clock_monitor import ClockMonitor
from jobd.model.clocks import BootMs
from jobd.model.commands import IdempotencyKey, Undelivered
from jobd.model.job import Policy
from jobd.model.responses import Response
from jobd.model.storage import AuditEntry, Batch, DiskFull, StoredResponse
from tests.proof.planted.registry import ACTOR, SIMULATION, bug


@bug(Actor._write, found_by=SIMULATION)
async def answer_before_commit(write: Any, self: Actor, decided: DecidedBatch) -> Any:
    """Responses leave before the commit."""
    for envelope, response in decided.replies:
        if isinstance(response, Response) and response.read is None and not response.unread_payloads:
            envelope.reply(response)
    return await write(self, decided)


@bug(Actor._write, found_by=ACTOR)
async def io_error_taken_for_a_full_disk(write: Any, self: Actor, decided: DecidedBatch) -> Any:
    """The daemon goes on after a failed fsync."""
    try:
        return await write(self, decided)
    except OSError as error:
        raise DiskFull(str(error)) from error


@bug(Actor.stop, found_by=ACTOR)
def mailbox_dropped_at_the_end(stop: Any, self: Actor) -> None:
    """Waiting commands get no response at the end."""
    stop(self)
    self._mailbox.clear()


@bug(Actor.undelivered, found_by=SIMULATION)
def undelivered_grant_kept(undelivered: Any, self: Actor, response: Response) -> None:
    """A grant that was never received stays."""


@bug(Decider.unreceived, found_by=SIMULATION)
def abandoned_grant_kept(
    unreceived: Any, self: Decider, envelope: Envelope, response: Response, received: int
) -> list[Undelivered]:
    """A grant of a caller that left stays."""
    return []


@bug(Decider.roll_back, found_by=SIMULATION)
def token_reused_after_a_rollback(roll_back: Any, self: Decider, decided: DecidedBatch) -> None:
    """A rejected batch returns its tokens."""
    roll_back(self, decided)
    self.state.next_token -= sum(change.type == "granted" for change in decided.changes)


@bug(Decider.roll_back, found_by=SIMULATION)
def rollback_forgotten(roll_back: Any, self: Decider, decided: DecidedBatch) -> None:
    """Memory keeps what the disk rejected."""
    roll_back(self, replace(decided, tx=Transaction(self.state, decided.at, Policy())))


@bug(IdempotencyStore.rollback, found_by=ACTOR)
def keys_not_rolled_back(rollback: Any, self: IdempotencyStore) -> None:
    """A rejected call is answered as if it was done."""
    self.commit()


_late_keys: WeakKeyDictionary[Decider, list[StoredResponse]] = WeakKeyDictionary()
_late_audit: WeakKeyDictionary[Decider, list[AuditEntry]] = WeakKeyDictionary()


@bug(Decider.batch, found_by=SIMULATION)
def key_stored_after_its_change(batch: Any, self: Decider, decided: DecidedBatch, policy: Policy) -> Any:
    """A key is in the transaction after its change."""
    made: Batch = batch(self, decided, policy)
    late, _late_keys[self] = _late_keys.get(self, []), made.keys
    return replace(made, keys=late)


@bug(Decider.batch, found_by=SIMULATION)
def audit_stored_after_its_change(batch: Any, self: Decider, decided: DecidedBatch, policy: Policy) -> Any:
    """An operator's change has no audit entry."""
    made: Batch = batch(self, decided, policy)
    late, _late_audit[self] = _late_audit.get(self, []), made.audit
    return replace(made, audit=late)


@bug(Decider.batch, found_by=ACTOR)
def jump_stored_as_expected(batch: Any, self: Decider, decided: DecidedBatch, policy: Policy) -> Any:
    """The next start trusts a jump of the clock."""
    made: Batch = batch(self, decided, policy)
    return replace(made, numbers=replace(made.numbers, wall_ms=decided.at.now, expected_ms=decided.at.now))


@bug(IdempotencyStore.find, found_by=SIMULATION)
def effect_twice_under_one_key(find: Any, self: IdempotencyStore, digest: str, now: int) -> Any:
    """A repeat in the same batch runs again."""
    return None if digest in self._added else find(self, digest, now)


@bug(Decider._stored_response, found_by=SIMULATION)
def key_of_another_request(
    stored_response: Any, self: Decider, decided: DecidedBatch, envelope: Envelope, key: IdempotencyKey
) -> Any:
    """A key answers any request with the first's."""
    row = self.keys.find(key.digest, decided.at.believed)
    return stored_response(self, decided, envelope, key if row is None else replace(key, body_hash=row.body_hash))


@bug(IdempotencyStore.ended, found_by=ACTOR)
def key_dropped_with_its_first_grant(ended: Any, self: IdempotencyStore, lock_id: str) -> None:
    """The key of a claim goes with the first of its grants."""
    digest = self._by_lock.get(lock_id)
    ended(self, lock_id)
    if digest in self._grants:
        self._forget(self._grants[digest])


@bug(may_go_first, found_by=ACTOR)
def read_overtakes_its_own_stream(may_go: Any, envelope: Envelope) -> bool:
    """A read misses the command before it."""
    return bool(envelope.command.admission == "read")


@bug(Clock._advance, found_by=ACTOR)
def wall_clock_for_locks(advance: Any, self: Clock) -> int:
    """A step of the wall clock ends locks."""
    boot, self._boot = self._boot, lambda: BootMs(self._wall())
    try:
        return int(advance(self))
    finally:
        self._boot = boot


@bug(FullDisk.escalate, found_by=ACTOR)
async def lease_time_runs_on_a_full_disk(escalate: Any, self: FullDisk, error: DiskFull) -> None:
    """Locks expire while none can be extended."""
    await escalate(self, error)
    self._clock.resume()


@bug(Actor._take_internal, found_by="tests/unit/engine/test_actor.py")
def all_locks_extended_in_one_batch(take: Any, self: Actor) -> list[Envelope]:
    """A node that takes over with many running jobs loses its lease before it has responded."""
    return list(self._internal)


@bug(Actor.defer_internal, found_by="tests/unit/maintenance/test_restart_grace.py")
def deferred_commands_without_a_deadline(defer: Any, self: Actor, command: Any, within_s: float) -> None:
    """Locks end before they are extended after a takeover, while every batch is slow."""
    defer(self, command, 3_600.0)


@bug(ClockMonitor.check, found_by=SIMULATION)
def step_back_unnoticed(check: Any, self: ClockMonitor) -> None:
    """Due jobs wait after the wall clock was set back."""
    self._seen = self._moment()
    check(self)
