"""Decide a batch: all its commands in order, with the waiting claims that they make servable.

Also looks up and stores idempotency keys. Rows from the disk are passed in, and the plan says what to write.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Final

import msgspec
import structlog
from msgspec import Raw, Struct, field

from jobd.core import audit, decide, late_result_rules, views
from jobd.core.state import State
from jobd.core.transaction import Transaction
from jobd.engine.idempotency import Keys
from jobd.engine.mailbox import Envelope
from jobd.engine.waiting_claims import Parked
from jobd.model.commands import (
    AnyCommand,
    Call,
    Claim,
    Command,
    Complete,
    Create,
    EndGrants,
    IdempotencyKey,
    Moment,
    Report,
    Start,
    Tick,
    Undelivered,
    is_dry_run,
)
from jobd.model.errors import ApiError
from jobd.model.events import Change
from jobd.model.job import LIVE, Policy
from jobd.model.responses import Grants, Response
from jobd.model.storage import AuditEntry, Batch, LateResultRows, StoredResponse, audit_share, tombstones

log = structlog.get_logger("jobd.actor")

_GRANTING: Final = frozenset({Start, Claim})
_NOTED: Final = frozenset({Undelivered, Tick, EndGrants, Report})


class Known(Struct):
    """What was read from the disk for the decisions of one batch."""

    answers: dict[str, StoredResponse] = field(default_factory=dict)  # stored answers that may be replayed
    hashes: dict[str, str] = field(default_factory=dict)  # job id -> hash of the request that made it
    payloads: dict[int, bytes] = field(default_factory=dict)  # job seq -> payload
    late: LateResultRows = field(default_factory=LateResultRows)


class DecidedBatch(Struct):
    """A decided batch: what to write, and what to tell whom afterwards."""

    at: Moment
    known: Known
    tx: Transaction
    replies: list[tuple[Envelope, Response | ApiError]] = field(default_factory=list)
    report: bytes | None = None
    tick: bool = False
    unmark: bool = False
    served: list[Envelope] = field(default_factory=list)  # parked claims that this batch answers
    parked: list[Envelope] = field(default_factory=list)  # claims that this batch parked
    audit: list[AuditEntry] = field(default_factory=list)
    is_filled: bool = False  # the answers show all payloads that they have to

    @property
    def changes(self) -> list[Change]:
        return self.tx.changes

    @property
    def writes(self) -> bool:
        is_more = self.report is not None or self.tick or self.unmark
        return bool(self.changes or self.tx.checked or self.audit or is_more)

    def wanted_payloads(self) -> list[int]:
        """Job seqs whose payload the answers show and nobody has read yet."""
        if self.is_filled:
            return []
        answers = (answer for _, answer in self.replies if isinstance(answer, Response))
        seqs = dict.fromkeys(seq for answer in answers for seq, _ in answer.unread_payloads)
        return [seq for seq in seqs if seq not in self.tx.payloads and seq not in self.known.payloads]

    def fill(self, read: dict[int, bytes]) -> None:
        """Put the payloads into the job views of the answers, once."""
        if self.is_filled:
            return
        self.is_filled = True
        payloads = self.known.payloads | self.tx.payloads | read
        for _, answer in self.replies:
            if isinstance(answer, Response):
                for seq, shown in answer.unread_payloads:
                    shown.payload = Raw(payloads[seq])


class Decider:
    """Decides batches over one state. `refuse` may turn a command away before it is decided (a full disk)."""

    def __init__(
        self,
        state: State,
        keys: Keys,
        parked: Parked,
        *,
        refuse: Callable[[Command], ApiError | None],
        loop_time: Callable[[], float],
    ) -> None:
        self.state = state
        self.keys = keys
        self.parked = parked
        self.parking = True  # off once the daemon stops
        self.served: list[Envelope] = []  # parked claims of the latest plan: until it is on disk nobody else has them
        self._refuse = refuse
        self._loop_time = loop_time
        self._became_due: dict[tuple[str, str], None] = {}
        # Lock id -> connections that have or await its (keyed) answer; a daemon before us may have sent one, too.
        self._handed: Counter[str] = Counter(keys.lock_ids())
        state.on_due = self._note_due

    @property
    def has_due(self) -> bool:
        """Jobs became due that parked claims may be waiting for."""
        return bool(self._became_due)

    def decide(
        self, batch: list[Envelope], at: Moment, known: Known, policy: Policy, *, serves: bool = True
    ) -> DecidedBatch:
        """`serves`: parked claims get what has become due; where it is not, what they get waits for the next batch."""
        plan = DecidedBatch(at, known, Transaction(self.state, at, policy))
        if at.suspect != self.state.clock_suspect and self._refuse(Create()) is None:
            plan.tick = True  # durable with the first batch that knows it; on a full disk with the first that writes
        self.served = plan.served
        self.state.request_hashes = dict(known.hashes)
        self.state.late = known.late
        self.state.advance(at.now, at.lease)
        if serves:
            self._serve_parked(plan)
        for asked in batch:
            if type(asked.call.command) in _GRANTING and asked.key is None and asked.is_abandoned:
                continue  # nobody is left to take the grant
            answer = self._decide_one(plan, asked)
            if answer is not None:
                plan.replies.append((asked, answer))
            if serves and self._became_due:
                self._serve_parked(plan)
        return plan

    def batch(self, plan: DecidedBatch, policy: Policy) -> Batch:
        """The transaction of a plan."""
        keys, forgotten = self.keys.changed()
        queues = {change.event.queue for change in plan.changes if _touches_queue(change)}
        return Batch(
            changes=plan.changes,
            numbers=self.state.numbers(plan.at.lease, plan.at.believed, plan.at.suspect),
            queues={queue: self.state.queue_row(queue) for queue in queues},
            keys=keys,
            forget_keys=forgotten,
            checked=plan.tx.checked,
            report=plan.report,
            payloads=plan.wanted_payloads(),
            unmark=plan.unmark,
            tombstones=tombstones(plan.changes) if policy.artifacts else [],
            sweeps=policy.artifacts,
            audit=plan.audit,
        )

    def committed(self, plan: DecidedBatch) -> None:
        """The plan is on disk."""
        self.keys.commit()
        self.state.clock_suspect = plan.at.suspect
        for lock_id in plan.tx.ended:
            self._handed.pop(lock_id, None)
        for change in plan.changes:
            if change.after is None:
                self.state.suspects.pop(change.event.job_seq, None)
        for seq in plan.tx.checked:
            self.state.suspects.pop(seq, None)

    def roll_back(self, plan: DecidedBatch) -> None:
        """Undo the plan, because it was not written. Numbers that it used stay used."""
        self.keys.rollback()
        # First the claims that wait: the jobs that come back below may be due for them.
        for asked in plan.parked:
            self.parked.remove(asked)
        for asked in plan.served:
            if asked not in plan.parked:
                self.parked.add(asked)
        plan.tx.roll_back()
        for asked, answer in plan.replies:
            if asked.key is not None and isinstance(answer, Response):
                self._hand(asked, answer, -len(asked.futures))

    def not_told(self, asked: Envelope, answer: Response, told: int) -> list[Undelivered]:
        """Of those who asked only `told` still waited: the grants that nobody has received go back."""
        self._hand(asked, answer, told - len(asked.futures))
        return self.undelivered(answer, forgone=0) if told == 0 else []

    def undelivered(self, answer: Response, *, forgone: int = 1) -> list[Undelivered]:
        """`forgone` connections closed before the first byte of `answer`: what has to be released, if anything."""
        released = []
        for job_id, lock_id in answer.grants:
            if lock_id in self._handed:
                self._handed[lock_id] -= forgone
            if self._handed.get(lock_id, 0) <= 0:
                released.append(Undelivered(id=job_id, lock_id=lock_id))
        return released

    # -- one command --------------------------------------------------------------------------------------------------

    def _decide_one(self, plan: DecidedBatch, asked: Envelope) -> Response | ApiError | None:
        """The answer to one command, or None where it waits: parked, or for its first call that is parked."""
        command = asked.call.command
        key = asked.key
        if key is not None and is_dry_run(command):
            key = None  # nothing is done that could be done twice
        if key is not None:
            first = self.parked.waiting_with(key.digest)
            if first is not None and first is not asked:
                return _join(first, asked)
            known = self._known_answer(plan, asked, key)
            if known is not None:
                return known  # on a full disk too: what was done is not refused afterwards
        refusal = self._refuse(command)
        if refusal is not None and not (type(command) is Complete and late_result_rules.is_late(self.state, command)):
            return refusal  # who has lost the lock hears that on a full disk too: it writes nothing
        if type(command) is Claim or type(command) is Start:
            self.state.presence.asks(command)
        elif type(command) in _NOTED and (refusal := self._note(plan, command)) is not None:
            return refusal
        response = self._decided(plan, asked.call)
        if type(command) is Claim and self._parks(command, response):
            asked.deadline = self._loop_time() + command.wait_ms / 1000
            self.parked.add(asked)
            plan.parked.append(asked)
            return None
        if key is not None:
            self._keep_answer(plan, asked, key, response)
        return response

    def _note(self, plan: DecidedBatch, command: AnyCommand) -> ApiError | None:
        """Note what the batch does beside the change of `command`. Returns why it is refused, if it is."""
        if isinstance(command, Undelivered):
            if self._handed.get(command.lock_id, 0) > 0:
                return ApiError("lock_lost", "Another connection has received this grant.")
        elif isinstance(command, Tick):
            plan.tick = True
        elif isinstance(command, EndGrants):
            plan.unmark = plan.unmark or command.last
        elif isinstance(command, Report):
            plan.report = command.body
        return None

    def _decided(self, plan: DecidedBatch, call: Call) -> Response | ApiError:
        """Decide one command. A bug in a rule costs one command."""
        tx = plan.tx
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
            self._audit(plan, call, response, tx.changed())
        return response

    def _audit(self, plan: DecidedBatch, call: Call, response: Response | ApiError, changes: list[Change]) -> None:
        """What an operator changed is written with the change; all else, where the disk has room for it."""
        audited = audit.entry(call, response, changes, plan.at.now)
        if audited is None:
            return
        if audit_share(audited.what, audited.outcome) == "changes" or self._refuse(Create()) is None:
            plan.audit.append(audited)

    # -- parked claims ------------------------------------------------------------------------------------------------

    def _parks(self, claim: Claim, response: Response | ApiError) -> bool:
        if not self.parking or claim.wait_ms == 0:
            return False
        return isinstance(response, Response) and not response.grants

    def _note_due(self, queue: str, kind: str) -> None:
        if self.parked:
            self._became_due[(queue, kind)] = None

    def _serve_parked(self, plan: DecidedBatch) -> None:
        """Jobs became due while claims wait for them: who has waited longest is served first, before anybody new.

        Longest over all queues at once: a claim may take jobs of a queue for which another has waited longer.
        """
        waiting: list[tuple[int, str, str]] = []  # ticket of the first who waits, queue, kind
        while self._became_due or waiting:
            lanes, self._became_due = self._became_due, {}
            for queue, kind in lanes:
                self._line_up(waiting, queue, kind)
            if not waiting:
                return
            ticket, queue, kind = heappop(waiting)
            asked = self.parked.first(queue, kind)
            if asked is not None and self._refuse(asked.call.command) is not None:
                # They stay due for whoever waits, until the disk has room.
                self._became_due = dict.fromkeys([(queue, kind), *((queue, kind) for _, queue, kind in waiting)])
                return
            if asked is not None and (asked.ticket != ticket or self._serve(plan, asked)):
                self._line_up(waiting, queue, kind)

    def _line_up(self, waiting: list[tuple[int, str, str]], queue: str, kind: str) -> None:
        if (asked := self.parked.first(queue, kind)) is not None:
            heappush(waiting, (asked.ticket, queue, kind))

    def _serve(self, plan: DecidedBatch, asked: Envelope) -> bool:
        """Whether the parked claim got something."""
        response = self._decided(plan, asked.call)
        if not isinstance(response, Response) or not response.grants:
            return False
        self.parked.remove(asked)
        plan.served.append(asked)
        plan.replies.append((asked, response))
        if asked.key is not None:
            self._keep_answer(plan, asked, asked.key, response)
        return True

    # -- idempotency keys ---------------------------------------------------------------------------------------------

    def _known_answer(self, plan: DecidedBatch, asked: Envelope, key: IdempotencyKey) -> Response | ApiError | None:
        """The stored answer of a repeated call; None where it has to be judged."""
        row = self.keys.find(key.digest, plan.at.believed)
        if row is None:
            if self.keys.has_room(plan.at.believed):
                return None
            return ApiError("overloaded", "Too many idempotency keys are in use; try again later, or without a key.")
        if row.body_hash != key.body_hash:
            return _key_reused()
        if row.grants is not None:
            return self._current_grants(plan, asked, row.grants)
        stored = row if row.body is not None else plan.known.answers.get(key.digest)
        if stored is None or stored.body is None:
            message = "The stored response of this key is damaged. Check what the first request did and use a new key."
            return ApiError("internal_error", message)
        return Response(Raw(stored.body), status=stored.status, replayed=True)

    def _current_grants(self, plan: DecidedBatch, asked: Envelope, grants: list[tuple[str, str]]) -> Response | None:
        """The grants of the first call that are still current; None where none is: the call is judged anew."""
        answer = Response(Grants([]), unread_payloads=[], grants=[], replayed=True)
        for job_id, lock_id in grants:
            if self.state.holds(job_id, lock_id):
                job = self.state.jobs[job_id]
                shown = views.job_view(job, plan.at, plan.tx.policy, admin=asked.call.admin)
                answer.data.grants.append(views.grant_view(job, plan.at, shown))
                answer.unread_payloads.append((job.seq, shown))
                answer.grants.append((job_id, lock_id))
        if not answer.grants:
            return None
        if isinstance(asked.call.command, Start):
            answer.data = answer.data.grants[0]
        self._hand(asked, answer, len(asked.futures))
        return answer

    def _keep_answer(
        self, plan: DecidedBatch, asked: Envelope, key: IdempotencyKey, answer: Response | ApiError
    ) -> None:
        """The answer to a keyed call that changed something is stored in the transaction of the change."""
        if not plan.tx.has_changed or not isinstance(answer, Response):
            return
        if answer.grants:
            self._hand(asked, answer, len(asked.futures))
            self.keys.add(StoredResponse(key.digest, key.body_hash, plan.at.believed, grants=list(answer.grants)))
            return
        known = plan.known.payloads | plan.tx.payloads
        for seq, shown in answer.unread_payloads:
            shown.payload = Raw(known[seq])
        answer.unread_payloads = []
        body = msgspec.json.encode(answer.data)
        self.keys.add(StoredResponse(key.digest, key.body_hash, plan.at.believed, answer.status, body))

    def _hand(self, asked: Envelope, answer: Response, connections: int) -> None:
        if asked.key is not None:
            for _, lock_id in answer.grants:
                self._handed[lock_id] += connections


def _join(first: Envelope, asked: Envelope) -> ApiError | None:
    """A parked call was repeated under its key: both wait for the one answer."""
    assert first.key is not None and asked.key is not None
    if first.key.body_hash != asked.key.body_hash:
        return _key_reused()
    first.futures += [future for future in asked.futures if future not in first.futures]
    return None


def _touches_queue(change: Change) -> bool:
    """Whether it changes what the store keeps of its queue: whether that is paused, and how many jobs are finished."""
    before, after = change.before, change.after
    if before is None and after is None:
        return True
    return (after is not None and after.status not in LIVE) or (before is not None and before.status not in LIVE)


def _key_reused() -> ApiError:
    message = "This Idempotency-Key was used with another body. Use a new key for a new request."
    return ApiError("idempotency_key_reused", message)
