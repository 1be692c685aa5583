"""Decide a batch: all its commands in order, with the waiting claims that they make servable.

`Decider` holds the state, the idempotency keys, the waiting claims, the queues in which jobs became due
(`_became_due`), and for each grant of a keyed call the number of connections that may receive it (`_receivers`).
`DecidedBatch` is what one call of `decide` made: the transaction, the replies, and what else is to be written.

    envelopes   start(a)        claim           create(b)                               get(a)
    state       a processing    nothing is due  b queued, became due ──> b processing   a processing
    replies     grant of a      (waits)         created b                grant of b     view of a
                                   └───────────────────────────────────────┘
                └───────── one transaction, one record; the replies are sent after its commit ─────────┘

Invariants:

- `decide` is synchronous and reads nothing from the disk. `Preloaded` has the rows that it needs.
- Commands are decided in the order of `envelopes`. Each sees the changes of those before it, because the transaction
  applies a change to the state at once.
- After `decide`, the state is the former one with `decided.changes` applied. For a batch that `writes`, either
  `committed` or `roll_back` is called before the next `decide`, or the process ends. A batch that writes nothing is
  rolled back only if the payloads of its responses turn out to be damaged; then it has changed no job.
- `roll_back` restores jobs, pauses, keys and waiting claims. It does not restore numbers (they stay used), the time of
  the state, and what is known of workers. Jobs in quarantine stay out.
- Each envelope of the batch gets one reply, with three exceptions: a claim or a read that begins to wait, a repeated
  call that joins the wait of the first one, and a call for a grant whose caller is gone, which is not decided.
- Waiting claims come first. A job that becomes due is offered to them before the next command is decided, to the one
  with the lowest ticket over all queues. Without `serves`, or if the full disk rejects the claim, the queue stays in
  `_became_due`, and the next batch begins with it.
- A response is stored with a key only in the transaction of its change. For grants only the pairs of job and lock id
  are stored: a repeated call gets those that are still current, or is decided anew if none is. A dry run has no key.
- The grant of a keyed call is taken back (`Undelivered`) only if no connection has received it or may still do so,
  because its repetitions get the same grant.
- A bug in a rule costs one command: `decide.decide` has undone its changes, and the response is a 500. A rejection
  undoes nothing, because rules reject before they change something, or mean to keep it (docs/decisions/rejections.md).
- On a full disk, a command that may not write is rejected before its rule runs. Stored responses are returned before
  that check, and a late complete runs, because it then writes nothing.
- The audit entry of a call is in the batch of its change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from typing import Any, Final

import msgspec
import structlog
from msgspec import UNSET, Raw, Struct, field

from jobd.core import audit, decide, quiet, views
from jobd.core.rules import late_result_rules
from jobd.core.state import State
from jobd.core.transaction import Transaction
from jobd.engine.envelope import Envelope
from jobd.engine.idempotency import IdempotencyStore
from jobd.engine.job_waiters import JobWaiters
from jobd.engine.preloading import Preloaded
from jobd.engine.unread_responses import UnreadResponses
from jobd.engine.waiting_claims import WaitingClaims
from jobd.model import commands
from jobd.model.clocks import MonotonicS
from jobd.model.commands import AnyCommand, Command, IssuedCommand, Moment, Undelivered
from jobd.model.errors import ApiError
from jobd.model.events import Event
from jobd.model.job import LIVE, Policy
from jobd.model.responses import JobView, Response
from jobd.model.storage import AuditEntry, Batch, StoredResponse, audit_share, tombstones

log = structlog.get_logger("jobd.actor")

BATCH_PAYLOADS: Final = 8 << 20  # bytes of large payloads and metadata in the responses of one batch

_LIVE_OR_NEW: Final = frozenset({None, *LIVE})
# isinstance() is slow for structs
_DIRECTIVES: Final = frozenset({commands.QuietWorker, commands.ResumeWorker, commands.StopWorker})
_NOTED: Final = frozenset({Undelivered, commands.Tick, commands.EndGrants, commands.Report})


class DecidedBatch(Struct):
    """A decided batch: its transaction, and the responses to send once it is written."""

    at: Moment
    at_s: MonotonicS  # the same by the event loop
    known: Preloaded
    tx: Transaction
    replies: list[tuple[Envelope, Response | ApiError]] = field(default_factory=list)
    unread: list[tuple[int, JobView]] = field(default_factory=list)  # `unread_payloads` of the responses
    report: bytes | None = None
    tick: bool = False
    unmark: bool = False
    served: list[Envelope] = field(default_factory=list)  # waiting claims that got a grant
    began_waiting: list[Envelope] = field(default_factory=list)  # claims that began to wait
    audit: list[AuditEntry] = field(default_factory=list)
    large_bytes: int = 0  # of the responses
    is_large: bool = False  # so large that no more commands are decided
    left: list[Envelope] = field(default_factory=list)  # not decided, because the responses are large enough

    def reply(self, envelope: Envelope, response: Response | ApiError) -> None:
        """Add a response."""
        self.replies.append((envelope, response))
        if type(response) is Response and response.unread_payloads:
            self.unread += response.unread_payloads
            if response.large_bytes:
                self.large_bytes += response.large_bytes
                self.is_large = self.large_bytes >= BATCH_PAYLOADS

    @property
    def changes(self) -> list[Event]:
        return self.tx.changes

    @property
    def writes(self) -> bool:
        is_more = self.report is not None or self.tick or self.unmark
        return bool(self.changes or self.tx.checked or self.audit or is_more)

    def wanted_payloads(self) -> list[int]:
        """Return the keys of bodies that the responses need and that are not read yet."""
        created, known = self.tx.payloads, self.known.payloads
        return list({seq: None for seq, _ in self.unread if seq not in created and seq not in known})

    def fill(self, read: dict[int, bytes]) -> None:
        """Set the bodies in the job views of the responses, once."""
        if self.unread:
            _fill(self.unread, self.known.payloads | self.tx.payloads | read)
            self.unread = []


class Decider:
    """Decides batches over one state. `reject` returns why a command may not be written now (a full disk), or None."""

    def __init__(
        self,
        state: State,
        keys: IdempotencyStore,
        waiting_claims: WaitingClaims,
        *,
        reject: Callable[[Command], ApiError | None],
        unread: UnreadResponses | None = None,
        loop_time: Callable[[], MonotonicS],
    ) -> None:
        self.state = state
        self.keys = keys
        self.waiting_claims = waiting_claims
        self.job_waiters = JobWaiters()
        self.may_wait = True  # off once the daemon stops
        self.served: list[Envelope] = []  # the waiting claims that the latest batch serves
        self._reject = reject
        self._unread = unread or UnreadResponses()
        self._loop_time = loop_time
        self._became_due: dict[tuple[str, str], None] = {}
        # Lock id -> connections that have received or await the response to its keyed request. A response that was sent
        # before the start counts too.
        self._receivers: Counter[str] = Counter(keys.lock_ids())
        state.on_due = self._note_due
        state.on_quiet = state.presence.on_open = self._reopen

    @property
    def has_due(self) -> bool:
        """Whether jobs became due for which claims may wait."""
        return bool(self._became_due)

    def decide(
        self, envelopes: list[Envelope], at: Moment, known: Preloaded, policy: Policy, *, serves: bool = True
    ) -> DecidedBatch:
        """Decide a batch. Without `serves`, waiting claims get the jobs that became due in the next batch."""
        decided = DecidedBatch(
            at, self._loop_time(), known, Transaction(self.state, at, policy, known.requests, known.late)
        )
        if at.suspect != self.state.clock.suspect and self._reject(commands.Create()) is None:
            decided.tick = True  # the suspicion is written at once; on a full disk with the next batch
        self.served = decided.served
        self.state.advance(at.now, at.lock_ms)
        if serves:
            self._serve_waiting(decided)
        for index, envelope in enumerate(envelopes):
            if decided.is_large:
                decided.left = envelopes[index:]
                break
            if envelope.command.admission == "grant" and envelope.is_abandoned:
                continue  # no caller is left to receive the grant
            response = self._decide_one(decided, envelope)
            if response is not None:
                decided.reply(envelope, response)
            if serves and self._became_due:
                self._serve_waiting(decided)
        return decided

    def batch(self, decided: DecidedBatch, policy: Policy) -> Batch:
        """Return what to write for a decided batch."""
        keys, forgotten = self.keys.changed()
        # A queue whose pause or number of finished jobs changes. Events of queues have no status.
        changes = decided.changes
        queues = {each.queue for each in changes if each.to_status not in LIVE or each.from_status not in _LIVE_OR_NEW}
        queues.discard("")
        return Batch(
            changes=changes,
            numbers=self.state.numbers(decided.at.lock_ms, decided.at.believed, decided.at.clock),
            queues={queue: self.state.queue_row(queue) for queue in queues},
            keys=keys,
            forget_keys=forgotten,
            checked=decided.tx.checked,
            report=decided.report,
            payloads=decided.wanted_payloads(),
            unmark=decided.unmark,
            tombstones=tombstones(changes) if policy.artifacts else [],
            sweeps=policy.artifacts,
            audit=decided.audit,
        )

    def committed(self, decided: DecidedBatch) -> None:
        """Apply what follows from the commit of the batch."""
        self.keys.commit()
        self.state.clock = decided.at.clock
        if receivers := self._receivers:
            for lock_id in decided.tx.ended:
                receivers.pop(lock_id, None)
        if unvalidated := self.state.unvalidated:
            gone = [change.job_seq for change in decided.changes if change.after is None]
            for seq in (*gone, *decided.tx.checked):
                unvalidated.pop(seq, None)

    def roll_back(self, decided: DecidedBatch) -> None:
        """Undo the batch, because it was not written. Its numbers stay used."""
        self.keys.rollback()
        # Claims are restored before the jobs, which may become due for them.
        for envelope in decided.began_waiting:
            self.waiting_claims.remove(envelope)
        waiting_again = [each for each in decided.served if each not in decided.began_waiting and not each.is_abandoned]
        for envelope in waiting_again:
            self.waiting_claims.add(envelope)
        decided.tx.roll_back()
        # The job that a claim got may be in quarantine now, so any other job of its queues may be its next one.
        claims = [each.command for each in waiting_again]
        self._note_all_due({queue for claim in claims if isinstance(claim, commands.Claim) for queue in claim.queues})
        for envelope, response in decided.replies:
            if envelope.key is not None and isinstance(response, Response):
                self._count_receivers(envelope, response, -len(envelope.futures))

    def unreceived(self, envelope: Envelope, response: Response, received: int) -> list[Undelivered]:
        """Return the releases for a response that only `received` of its callers have received."""
        self._count_receivers(envelope, response, received - len(envelope.futures))
        return self.undelivered(response, closed=0) if received == 0 else []

    def undelivered(self, response: Response, *, closed: int = 1) -> list[Undelivered]:
        """Return the releases for a response of which `closed` connections ended before its first byte."""
        released = []
        for job_id, lock_id in response.grants:
            if lock_id in self._receivers:
                self._receivers[lock_id] -= closed
            if self._receivers.get(lock_id, 0) <= 0:
                released.append(Undelivered(id=job_id, lock_id=lock_id))
        return released

    # -- one command --------------------------------------------------------------------------------------------------

    def _decide_one(self, decided: DecidedBatch, envelope: Envelope) -> Response | ApiError | None:
        """Return the response to one command. None: its claim waits for work, or for an equal one that does."""
        command: Any = envelope.command
        kind = type(command)
        if self._unread.is_full and (rejection := self._unread.reject(command)) is not None:
            return rejection
        key = envelope.key
        if key is not None and command.dry_run:
            key = None  # a dry run may be repeated
        if key is not None:
            first = self.waiting_claims.waiting_with(key.digest)
            if first is not None and first is not envelope:
                return _join(first, envelope)
            known = self._stored_response(decided, envelope, key)
            if known is not None:
                return known  # on a full disk too
        rejection = self._reject(command)
        if rejection is not None and not (kind is commands.Complete and late_result_rules.is_late(self.state, command)):
            return rejection  # a late complete gets lock_lost on a full disk too, because it writes nothing
        if kind is commands.Claim:
            state = self.state
            is_closed = state.quiet or state.presence.directed or not command.limit
            state.presence.note_request(command, quiet.open_queues(state, command) if is_closed else None)
        elif kind is commands.Start:
            self.state.presence.note_request(command)
        elif kind in _NOTED and (rejection := self._note(decided, command)) is not None:
            return rejection
        response = self._decided(decided, envelope)
        if command.can_wait and command.wait_ms and self._waits(decided, envelope, response):
            return None
        if kind in _DIRECTIVES and isinstance(response, Response):
            self._tell(decided, response.data.worker)
        if self._unread.is_full and _is_large_repeat(decided.tx, response):
            return self._unread.rejection()
        if key is not None:
            self._store_response(decided, envelope, key, response)
        return response

    def _note(self, decided: DecidedBatch, command: AnyCommand) -> ApiError | None:
        """Record what `command` does in addition to its rule. Return an error if it is rejected."""
        if isinstance(command, Undelivered):
            if self._receivers.get(command.lock_id, 0) > 0:
                return ApiError("lock_lost", "Another connection has received this grant.")
        elif isinstance(command, commands.Tick):
            decided.tick = True
        elif isinstance(command, commands.EndGrants):
            decided.unmark = decided.unmark or command.last
        else:
            assert isinstance(command, commands.Report)
            decided.report = command.body
        return None

    def _decided(self, decided: DecidedBatch, call: IssuedCommand) -> Response | ApiError:
        """Decide one command. A bug in a rule costs one command."""
        tx = decided.tx
        ended = len(tx.ended)
        try:
            response = decide.decide(tx, call)
        except Exception:
            log.exception("rule_failed", command=type(call.command).__name__, by=call.by)
            message = "A rule failed for this command, and nothing was changed. See the log for details."
            return ApiError("internal_error", message)
        if len(tx.ended) > ended:
            for lock_id in tx.ended[ended:]:
                self.keys.ended(lock_id)
        if call.operator is not None:
            self._audit(decided, call, response, tx.changed())
        return response

    def _audit(
        self, decided: DecidedBatch, call: IssuedCommand, response: Response | ApiError, changes: list[Event]
    ) -> None:
        """Add the audit entry of a call. On a full disk, only changes get one."""
        audited = audit.entry(call, response, changes, decided.at.now)
        if audited is None:
            return
        if audit_share(audited.what, audited.outcome) == "changes" or self._reject(commands.Create()) is None:
            decided.audit.append(audited)

    # -- waiting claims ------------------------------------------------------------------------------------------------

    def _waits(self, decided: DecidedBatch, envelope: Envelope, response: Response | ApiError) -> bool:
        """Let a request with `wait_ms` wait if its response does not show what it waits for. Return whether it does."""
        command: Any = envelope.command
        if not self.may_wait or not isinstance(response, Response):
            return False
        if type(command) is not commands.Claim:
            unfinished = [job_id for job_id in command.job_ids() if job_id in self.state.jobs]
            if unfinished:
                envelope.deadline = envelope.deadline or decided.at_s + command.wait_ms / 1000
                self.job_waiters.add(envelope, unfinished)
            return bool(unfinished)
        if _is_answer(response):
            return False
        envelope.deadline = decided.at_s + command.wait_ms / 1000
        self.waiting_claims.add(envelope)
        decided.began_waiting.append(envelope)
        return True

    def _tell(self, decided: DecidedBatch, worker: str) -> None:
        """Answer the waiting claims of a worker that has a new directive."""
        for envelope in self.waiting_claims.of_worker(worker):
            self._serve(decided, envelope)
        self._reopen()

    def _reopen(self) -> None:
        """Let claims wait for the queues that are open to them now, and offer them the jobs that are due there."""
        for claim in self.waiting_claims.reopen():
            self._note_all_due(claim.queues)

    def _note_all_due(self, queues: Iterable[str]) -> None:
        for queue in queues:
            for kind in self.state.queued_kinds(queue):
                self._note_due(queue, kind)

    def _note_due(self, queue: str, kind: str) -> None:
        if self.waiting_claims.by_ticket:
            self._became_due[(queue, kind)] = None

    def _serve_waiting(self, decided: DecidedBatch) -> None:
        """Serve the waiting claims for which jobs became due, before any new claim.

        The claim that has waited longest is first, over all queues at once.
        """
        waiting: list[tuple[int, str, str]] = []  # ticket of the first claim, queue, kind
        while self._became_due or waiting:
            due, self._became_due = self._became_due, {}
            for queue, kind in due:
                self._line_up(waiting, queue, kind)
            if not waiting:
                return
            ticket, queue, kind = heappop(waiting)
            envelope = self.waiting_claims.first(queue, kind)
            if envelope is not None and (decided.is_large or self._may_not_serve(envelope.command)):
                # The jobs stay due for the claims until the next batch, or until the disk or the clients make room.
                self._became_due = dict.fromkeys([(queue, kind), *((queue, kind) for _, queue, kind in waiting)])
                return
            if envelope is not None and (envelope.ticket != ticket or self._serve(decided, envelope)):
                self._line_up(waiting, queue, kind)

    def _may_not_serve(self, claim: AnyCommand) -> bool:
        return self._unread.is_full or self._reject(claim) is not None

    def _line_up(self, waiting: list[tuple[int, str, str]], queue: str, kind: str) -> None:
        if (envelope := self.waiting_claims.first(queue, kind)) is not None:
            heappush(waiting, (envelope.ticket, queue, kind))

    def _serve(self, decided: DecidedBatch, envelope: Envelope) -> bool:
        """Serve a waiting claim. Return whether it got a grant or a directive."""
        response = self._decided(decided, envelope)
        if not isinstance(response, Response) or not _is_answer(response):
            return False
        self.waiting_claims.remove(envelope)
        decided.served.append(envelope)
        if envelope.key is not None:
            self._store_response(decided, envelope, envelope.key, response)
        decided.reply(envelope, response)
        return True

    # -- idempotency keys ---------------------------------------------------------------------------------------------

    def _stored_response(
        self, decided: DecidedBatch, envelope: Envelope, key: commands.IdempotencyKey
    ) -> Response | ApiError | None:
        """Return the stored response of a repeated call; None if the call is to be decided."""
        row = self.keys.find(key.digest, decided.at.expected)
        if row is None:
            if self.keys.has_room(decided.at.expected):
                return None
            return ApiError("overloaded", "Too many idempotency keys are in use; try again later, or without a key.")
        if row.body_hash != key.body_hash:
            return _key_reused()
        if row.grants is not None:
            return self._current_grants(decided, envelope, row.grants)
        stored = row if row.body is not None else decided.known.responses.get(key.digest)
        if stored is None or stored.body is None:
            message = "The stored response of this key is damaged. Check what the first request did and use a new key."
            return ApiError("internal_error", message)
        return Response(Raw(stored.body), status=stored.status, replayed=True)

    def _current_grants(
        self, decided: DecidedBatch, envelope: Envelope, grants: list[tuple[str, str]]
    ) -> Response | None:
        """Return the grants of the first call that are still current; None if there are none."""
        jobs = [self.state.jobs[job_id] for job_id, lock_id in grants if self.state.holds(job_id, lock_id)]
        if not jobs:
            return None
        response = views.granted(jobs, decided.at, decided.tx.policy, admin=envelope.admin)
        response.replayed = True
        if isinstance(envelope.command, commands.Start):
            response.data = response.data.grants[0]
        self._count_receivers(envelope, response, len(envelope.futures))
        return response

    def _store_response(
        self, decided: DecidedBatch, envelope: Envelope, key: commands.IdempotencyKey, response: Response | ApiError
    ) -> None:
        """Store the response to a keyed call in the transaction of its change, if there is one."""
        if not decided.tx.has_changed or not isinstance(response, Response):
            return
        if response.grants:
            self._count_receivers(envelope, response, len(envelope.futures))
            self.keys.add(StoredResponse(key.digest, key.body_hash, decided.at.expected, grants=list(response.grants)))
            return
        _fill(response.unread_payloads, decided.known.payloads | decided.tx.payloads)
        response.unread_payloads = []
        body = msgspec.json.encode(response.data)
        self.keys.add(StoredResponse(key.digest, key.body_hash, decided.at.expected, response.status, body))

    def _count_receivers(self, envelope: Envelope, response: Response, connections: int) -> None:
        if envelope.key is not None:
            for _, lock_id in response.grants:
                self._receivers[lock_id] += connections
                if self._receivers[lock_id] <= 0:  # perhaps of a grant that has ended or was not written
                    del self._receivers[lock_id]


def _is_answer(response: Response) -> bool:
    """Return whether the response to a claim has grants or a directive."""
    return bool(response.grants) or response.data.directive is not UNSET


def _fill(unread: list[tuple[int, JobView]], bodies: dict[int, bytes]) -> None:
    for key, view in unread:
        if key >= 0:
            view.payload = Raw(bodies[key])
        else:
            setattr(view, *views.body_field(key, bodies[key]))


def _join(first: Envelope, envelope: Envelope) -> ApiError | None:
    """Let the repeat of a waiting call wait for the same response. Return an error if its body differs."""
    assert first.key is not None and envelope.key is not None
    if first.key.body_hash != envelope.key.body_hash:
        return _key_reused()
    first.futures += [future for future in envelope.futures if future not in first.futures]
    return None


def _is_large_repeat(tx: Transaction, response: Response | ApiError) -> bool:
    """Return whether a large response only repeats the end of a grant, because the client lost the first, say."""
    return isinstance(response, Response) and response.large_bytes > 0 and not tx.has_changed


def _key_reused() -> ApiError:
    message = "This Idempotency-Key was used with another body. Use a new key for a new request."
    return ApiError("idempotency_key_reused", message)
