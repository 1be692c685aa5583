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


@bug("answer-before-commit", Actor._write, breaks="responses leave before the commit", found_by=SIMULATION)
async def _(write: Any, self: Actor, decided: DecidedBatch) -> Any:
    for envelope, response in decided.replies:
        if isinstance(response, Response) and response.read is None and not response.unread_payloads:
            envelope.reply(response)
    return await write(self, decided)


@bug("io-error-taken-for-a-full-disk", Actor._write, breaks="the daemon goes on after a failed fsync", found_by=ACTOR)
async def _(write: Any, self: Actor, decided: DecidedBatch) -> Any:
    try:
        return await write(self, decided)
    except OSError as error:
        raise DiskFull(str(error)) from error


@bug("mailbox-dropped-at-the-end", Actor.stop, breaks="waiting commands get no response at the end", found_by=ACTOR)
def _(stop: Any, self: Actor) -> None:
    stop(self)
    self._mailbox.clear()


@bug("undelivered-grant-kept", Actor.undelivered, breaks="a grant that was never received stays", found_by=SIMULATION)
def _(undelivered: Any, self: Actor, response: Response) -> None: ...


@bug("abandoned-grant-kept", Decider.unreceived, breaks="a grant of a caller that left stays", found_by=SIMULATION)
def _(unreceived: Any, self: Decider, envelope: Envelope, response: Response, received: int) -> list[Undelivered]:
    return []


@bug(
    "token-reused-after-a-rollback",
    Decider.roll_back,
    breaks="a rejected batch returns its tokens",
    found_by=SIMULATION,
)
def _(roll_back: Any, self: Decider, decided: DecidedBatch) -> None:
    roll_back(self, decided)
    self.state.next_token -= sum(change.event.type == "granted" for change in decided.changes)


@bug("rollback-forgotten", Decider.roll_back, breaks="memory keeps what the disk rejected", found_by=SIMULATION)
def _(roll_back: Any, self: Decider, decided: DecidedBatch) -> None:
    roll_back(self, replace(decided, tx=Transaction(self.state, decided.at, Policy())))


@bug(
    "keys-not-rolled-back",
    IdempotencyStore.rollback,
    breaks="a rejected call is answered as if it was done",
    found_by=SIMULATION,
)
def _(rollback: Any, self: IdempotencyStore) -> None:
    self.commit()


_late_keys: WeakKeyDictionary[Decider, list[StoredResponse]] = WeakKeyDictionary()
_late_audit: WeakKeyDictionary[Decider, list[AuditEntry]] = WeakKeyDictionary()


@bug(
    "key-stored-after-its-change",
    Decider.batch,
    breaks="a key is in the transaction after its change",
    found_by=SIMULATION,
)
def _(batch: Any, self: Decider, decided: DecidedBatch, policy: Policy) -> Any:
    made: Batch = batch(self, decided, policy)
    late, _late_keys[self] = _late_keys.get(self, []), made.keys
    return replace(made, keys=late)


@bug(
    "audit-stored-after-its-change",
    Decider.batch,
    breaks="an operator's change has no audit entry",
    found_by=SIMULATION,
)
def _(batch: Any, self: Decider, decided: DecidedBatch, policy: Policy) -> Any:
    made: Batch = batch(self, decided, policy)
    late, _late_audit[self] = _late_audit.get(self, []), made.audit
    return replace(made, audit=late)


@bug(
    "jump-stored-as-expected",
    Decider.batch,
    breaks="the next start trusts a jump of the clock",
    found_by=ACTOR,
)
def _(batch: Any, self: Decider, decided: DecidedBatch, policy: Policy) -> Any:
    made: Batch = batch(self, decided, policy)
    return replace(made, numbers=replace(made.numbers, wall_ms=decided.at.now, expected_ms=decided.at.now))


@bug(
    "effect-twice-under-one-key",
    IdempotencyStore.find,
    breaks="a repeat in the same batch runs again",
    found_by=SIMULATION,
)
def _(find: Any, self: IdempotencyStore, digest: str, now: int) -> Any:
    return None if digest in self._added else find(self, digest, now)


@bug(
    "key-of-another-request",
    Decider._stored_response,
    breaks="a key answers any request with the first's",
    found_by=SIMULATION,
)
def _(stored_response: Any, self: Decider, decided: DecidedBatch, envelope: Envelope, key: IdempotencyKey) -> Any:
    row = self.keys.find(key.digest, decided.at.believed)
    return stored_response(self, decided, envelope, key if row is None else replace(key, body_hash=row.body_hash))


@bug(
    "key-dropped-with-its-first-grant",
    IdempotencyStore.ended,
    breaks="the key of a claim goes with the first of its grants",
    found_by=ACTOR,
)
def _(ended: Any, self: IdempotencyStore, lock_id: str) -> None:
    digest = self._by_lock.get(lock_id)
    ended(self, lock_id)
    if digest in self._grants:
        self._forget(self._grants[digest])


@bug("read-overtakes-its-own-stream", may_go_first, breaks="a read misses the command before it", found_by=ACTOR)
def _(may_go: Any, envelope: Envelope) -> bool:
    return bool(envelope.command.admission == "read")


@bug(
    "wall-clock-for-locks",
    Clock._advance,
    breaks="a step of the wall clock ends locks",
    found_by=ACTOR,
)
def _(advance: Any, self: Clock) -> int:
    boot, self._boot = self._boot, lambda: BootMs(self._wall())
    try:
        return int(advance(self))
    finally:
        self._boot = boot


@bug(
    "lease-time-runs-on-a-full-disk",
    FullDisk.escalate,
    breaks="locks expire while none can be extended",
    found_by=ACTOR,
)
async def _(escalate: Any, self: FullDisk, error: DiskFull) -> None:
    await escalate(self, error)
    self._clock.resume()


@bug(
    "all-locks-extended-in-one-batch",
    Actor._take_internal,
    breaks="a node that takes over with many running jobs loses its lease before it has responded",
    found_by="tests/unit/engine/test_actor.py",
)
def _(take: Any, self: Actor) -> list[Envelope]:
    return list(self._internal)


@bug(
    "deferred-commands-without-a-deadline",
    Actor.defer_internal,
    breaks="locks end before they are extended after a takeover, while every batch is slow",
    found_by="tests/unit/maintenance/test_restart_grace.py",
)
def _(defer: Any, self: Actor, command: Any, within_s: float) -> None:
    defer(self, command, 3_600.0)


@bug(
    "step-back-unnoticed",
    ClockMonitor.check,
    breaks="due jobs wait after the wall clock was set back",
    found_by=SIMULATION,
)
def _(check: Any, self: ClockMonitor) -> None:
    self._seen = self._moment()
    check(self)
