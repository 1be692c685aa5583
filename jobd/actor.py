"""The mailbox and its one consumer: take what waits, decide, write, answer.

The only place that changes state. It knows no SQL, no HTTP and no rule; an answer never runs ahead of the disk.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import msgspec
import structlog
from msgspec import Raw, Struct, field

from jobd import rules, views
from jobd.batch import BadRows, Batch, Disk, DiskFull, KeyRow, Page, Query
from jobd.book import Book
from jobd.commands import (
    Answer,
    AnyCommand,
    Bulk,
    Call,
    Claim,
    Create,
    Delete,
    EndGrants,
    Grants,
    JobPage,
    JobView,
    KeyUse,
    Look,
    Moment,
    OnJob,
    Refusal,
    Start,
    Tick,
    TimelineView,
    Undelivered,
)
from jobd.draft import Decision
from jobd.envelope import CREATES, ENDINGS, READS, Asked, named_ids, share, weight
from jobd.events import Change, view
from jobd.figures import Histogram
from jobd.job import Job, Policy
from jobd.keys import Keys
from jobd.parked import Parked

log = structlog.get_logger("jobd.actor")

BATCH_WEIGHT: Final = 1_000  # commands of one batch, bulk creates and claims counted by their jobs
PROBE_EVERY_S: Final = 1.0
COMMIT_BUCKETS_S: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
BATCH_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
HISTORY_READS: Final = 4  # looks at history that go on at the same time
MAX_TIMELINE: Final = 1_000

# How far a full disk has closed us.
OPEN: Final = 0
NO_CREATES: Final = 1
ONLY_ENDINGS: Final = 2
NOTHING: Final = 3


class Clock(Protocol):
    def moment(self) -> Moment: ...

    def hold(self) -> None:
        """Lease time stands still: a time in which we refuse writes counts as our own absence."""

    def resume(self) -> None: ...


class Bounds(Struct, frozen=True):
    """The limits of the mailbox and what waits beside it."""

    mailbox: int = 10_000  # commands
    inflight_bytes: int = 64 << 20
    parked_claims: int = 10_000
    claim_wait_ms: int = 60_000


class DiskBroken(Exception):
    """What the disk holds is unknown: the process has to end and start again from what is there."""


class _Again(Exception):
    """Memory learned something from the disk that the decisions did not know: decide again."""


class _Plan(Struct):
    """A decided batch: what to write, and what to tell whom afterwards."""

    at: Moment
    replies: list[tuple[Asked, Answer | Refusal]] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    checked: list[int] = field(default_factory=list)
    report: bytes | None = None
    tick: bool = False
    unmark: bool = False
    served: list[Asked] = field(default_factory=list)  # parked claims that this batch answers
    parked: list[Asked] = field(default_factory=list)  # claims that this batch parked
    payloads: dict[int, bytes] = field(default_factory=dict)  # of the jobs that this batch makes

    @property
    def writes(self) -> bool:
        return bool(self.changes or self.checked or self.report is not None or self.tick or self.unmark)


class Actor:
    """Owner of the book. `ask` puts a command into the mailbox and waits; `run` is the one consumer."""

    def __init__(
        self,
        disk: Disk,
        book: Book,
        keys: Keys,
        clock: Clock,
        policy: Policy,
        *,
        random: Callable[[int], bytes],
        bounds: Bounds | None = None,
        is_full: bool = False,
    ) -> None:
        self.disk = disk
        self.book = book
        self.policy = policy
        self.bounds = bounds or Bounds()
        self.on_commit: list[Callable[[Sequence[Change]], None]] = [self._note]
        self.commit_seconds = Histogram.empty(COMMIT_BUCKETS_S)
        self.batch_commands = Histogram.empty(BATCH_BUCKETS)
        self.turns = 0
        self.parked = Parked()
        self.closed_by_full_disk = NO_CREATES if is_full else OPEN
        self._keys = keys
        self._clock = clock
        self._random = random
        self._mailbox: deque[Asked] = deque()
        self._bytes = 0
        self._wake = asyncio.Event()
        self._stopping = False
        self._broken = False
        self._became_due: dict[tuple[str, str], None] = {}
        self._handed: Counter[str] = Counter()  # lock id -> connections that have or await its (keyed) answer
        self._answers: dict[str, KeyRow] = {}  # stored answers that this batch may replay
        self._hashes: dict[str, str] = {}
        self._first_payloads: dict[int, bytes] = {}
        self._looks: set[asyncio.Task[None]] = set()
        self._look_places = asyncio.Semaphore(HISTORY_READS)
        self._next_probe = 0.0
        book.on_due = self._note_due

    # -- asking -------------------------------------------------------------------------------------------------------

    async def ask(
        self,
        command: AnyCommand,
        *,
        by: str = "client",
        admin: bool = False,
        key: KeyUse | None = None,
        size: int = 0,
    ) -> Answer | Refusal:
        """Put `command` into the mailbox; the answer comes after its commit. `size` is that of its body, in bytes."""
        refusal = self._refuse_entry(command, size)
        if refusal is not None:
            return refusal
        future: asyncio.Future[Answer | Refusal] = asyncio.get_running_loop().create_future()
        asked = Asked(Call(command, by, self._random(16), admin), key, size, future)
        self._mailbox.append(asked)
        self._bytes += size
        self._wake.set()
        try:
            return await future
        except asyncio.CancelledError:
            self._abandoned(asked, future)
            raise

    def undelivered(self, answer: Answer) -> None:
        """A connection closed before the first byte of `answer`: its grants go back, if nobody else has them."""
        for job_id, lock_id in answer.grants:
            if lock_id in self._handed:
                self._handed[lock_id] -= 1
            if self._handed.get(lock_id, 0) <= 0:
                self._post(Undelivered(id=job_id, lock_id=lock_id))

    def stop(self) -> None:
        """No more commands come in; parked claims are answered empty; `run` ends when the mailbox is empty."""
        self._stopping = True
        self._wake.set()

    @property
    def waiting(self) -> int:
        """Commands in the mailbox."""
        return len(self._mailbox) + len(self._looks)

    def _refuse_entry(self, command: AnyCommand, size: int) -> Refusal | None:
        if self._stopping or self._broken:
            return Refusal("shutting_down", "The daemon is stopping; ask again in a moment.")
        room = share(command)
        if self.waiting >= self.bounds.mailbox * room or self._bytes + size > self.bounds.inflight_bytes * room:
            return Refusal("overloaded", "Too many commands wait already; try again after a second.")
        if isinstance(command, Claim) and command.wait_ms > self.bounds.claim_wait_ms:
            limit = self.bounds.claim_wait_ms
            message = f"wait_ms is {command.wait_ms}; at most {limit} (limits.claim_wait) is allowed."
            return Refusal("invalid_request", message, {"field": "$.wait_ms"})
        return None

    def _post(self, command: AnyCommand) -> None:
        """A command of our own, whose answer nobody needs."""
        future: asyncio.Future[Answer | Refusal] = asyncio.get_running_loop().create_future()
        self._mailbox.append(Asked(Call(command, "daemon", self._random(16)), None, 0, future))
        self._wake.set()

    def _abandoned(self, asked: Asked, future: asyncio.Future[Answer | Refusal]) -> None:
        """The caller was cancelled: nobody waits any more, or the answer was set and is not read."""
        if asked.ticket and asked.is_abandoned:
            self.parked.remove(asked)
        if future.done() and not future.cancelled() and isinstance(answer := future.result(), Answer):
            self.undelivered(answer)

    # -- the consumer -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the mailbox until `stop`. Raises DiskBroken where the outcome of a commit is unknown."""
        while True:
            await self._something_to_do()
            if self.closed_by_full_disk != OPEN:
                await self._probe()
            batch = self._take()
            if batch or self._became_due:
                await self._turn(batch)
            self._answer_late_claims()
            if self._stopping and not self._mailbox and not self.parked:
                break
        if self._looks:
            await asyncio.gather(*self._looks, return_exceptions=True)

    async def _something_to_do(self) -> None:
        if self._mailbox or self._became_due or self._stopping:
            self._wake.clear()
            return
        timer = None
        loop = asyncio.get_running_loop()
        if (wait_s := self._wait_s(loop.time())) is not None:
            timer = loop.call_later(max(wait_s, 0), self._wake.set)
        await self._wake.wait()
        self._wake.clear()
        if timer is not None:
            timer.cancel()
        self._advance(self._clock.moment())

    def _wait_s(self, loop_time: float) -> float | None:
        """Seconds until time itself gives us something to do: a claim's wait ends, a job becomes due, a probe."""
        waits = []
        if (deadline := self.parked.next_deadline()) is not None:
            waits.append(deadline - loop_time)
            if (run_at := self.book.next_run_at()) is not None:
                waits.append((run_at - self._clock.moment().now) / 1000)
        if self.closed_by_full_disk != OPEN:
            waits.append(self._next_probe - loop_time)
        return min(waits, default=None)

    def _take(self) -> list[Asked]:
        batch: list[Asked] = []
        weights = 0
        while self._mailbox and weights < BATCH_WEIGHT:
            asked = self._mailbox.popleft()
            self._bytes -= asked.size
            weights += weight(asked.call.command)
            batch.append(asked)
        return batch

    async def _turn(self, batch: list[Asked]) -> None:
        """One batch, from the mailbox to its answers."""
        self.turns += 1
        try:
            plan = await self._written(batch)
        except Exception as error:
            self._fail(batch, error)
            raise DiskBroken(str(error)) from error
        self._answer(plan)
        self.book.trim_finished()

    async def _written(self, batch: list[Asked]) -> _Plan:
        """Decide and write, again where the disk names a reason: bad rows once each, a full disk in its two steps."""
        while True:
            await self._load(batch)
            plan = self._decide(batch)
            try:
                await self._write(plan)
            except DiskFull:
                await self._take_back(plan)
                await self._close_further()
            except BadRows as bad:
                await self._take_back(plan)
                await self._set_aside(bad.jobs)
            except _Again:
                await self._take_back(plan)
            else:
                return plan

    async def _load(self, batch: list[Asked]) -> None:
        """Read what the decisions need and memory does not hold: finished jobs, stored answers, some payloads."""
        self._answers, self._hashes, self._first_payloads = {}, {}, {}
        book, now = self.book, self._clock.moment().now
        ids = [job_id for asked in batch for job_id in named_ids(asked.call.command)]
        unknown = [job_id for job_id in dict.fromkeys(ids) if not book.get(job_id) and job_id not in book.quarantined]
        digests = [asked.key.digest for asked in batch if asked.key is not None]
        stored = [digest for digest in digests if (row := self._keys.find(digest, now)) and row.grants is None]
        if unknown or stored:
            loaded = await self.disk.load(unknown, [], stored)
            self._answers = loaded.answers
            for job in loaded.jobs.values():
                book.loaded(job)
            for job_id, reason in loaded.bad.items():
                self._quarantine(job_id, reason)
        await self._load_payloads(batch)

    async def _load_payloads(self, batch: list[Asked]) -> None:
        """Payloads and request hashes that are needed before the decision, not after it."""
        wanted: dict[int, str] = {}
        for asked in batch:
            command = asked.call.command
            first = isinstance(command, (Create, Bulk, Delete)) or (asked.key and isinstance(command, OnJob))
            if first and not isinstance(command, Start):
                named = (self.book.get(job_id) for job_id in named_ids(command))
                wanted |= {job.seq: job.id for job in named if job is not None}
        if not wanted:
            return
        loaded = await self.disk.load([], list(wanted), [])
        for job_id, reason in loaded.bad.items():
            self._quarantine(job_id, reason)
        for seq, payload in loaded.payloads.items():
            self._first_payloads[seq] = payload.body
            self._hashes[wanted[seq]] = payload.request_hash

    # -- deciding -----------------------------------------------------------------------------------------------------

    def _decide(self, batch: list[Asked]) -> _Plan:
        plan = _Plan(self._clock.moment())
        self.book.request_hashes = dict(self._hashes)
        self._advance(plan.at)
        self._serve_parked(plan)
        for asked in batch:
            if asked.is_abandoned and asked.key is None and isinstance(asked.call.command, (Start, Claim)):
                continue  # nobody is left to take the grant
            answer = self._decide_one(plan, asked)
            if answer is not None:
                plan.replies.append((asked, answer))
            self._serve_parked(plan)
        return plan

    def _advance(self, at: Moment) -> None:
        self.book.advance(at.now, at.lease)

    def _decide_one(self, plan: _Plan, asked: Asked) -> Answer | Refusal | None:
        """The answer to one command, or None where it was parked."""
        command = asked.call.command
        refusal = self._refuse_on_full_disk(command)
        if refusal is not None:
            return refusal
        if isinstance(command, Undelivered) and self._handed.get(command.lock_id, 0) > 0:
            return Refusal("lock_lost", "Another connection has received this grant.")
        if asked.key is not None:
            first = self.parked.waiting_with(asked.key.digest)
            if first is not None and first is not asked:
                return _join(first, asked)
            known = self._known_answer(plan, asked, asked.key)
            if known is not None:
                return known
        decision = self._decided(plan, asked.call)
        plan.tick = plan.tick or isinstance(command, Tick)
        plan.unmark = plan.unmark or (isinstance(command, EndGrants) and command.last)
        if isinstance(command, (Start, Claim)):
            self.book.saw(command.worker, plan.at.now)
        if isinstance(command, Claim) and self._parks(command, decision):
            asked.deadline = asyncio.get_running_loop().time() + command.wait_ms / 1000
            self.parked.add(asked)
            plan.parked.append(asked)
            return None
        if asked.key is not None and decision.changes and isinstance(decision.answer, Answer):
            self._store_answer(plan, asked.key, decision.answer)
            self._hand(asked, decision.answer)
        return decision.answer

    def _decided(self, plan: _Plan, call: Call) -> Decision:
        """Ask the rules and take their steps in. A bug in a rule costs one command."""
        try:
            decision = rules.decide(self.book, call, plan.at, self.policy)
        except Exception:
            log.exception("rule_failed", command=type(call.command).__name__, by=call.by)
            message = "A rule failed on this command; nothing was changed. The log has the details."
            return Decision(Refusal("internal_error", message))
        for change in decision.changes:
            self.book.put(change)
            if change.payload is not None:
                plan.payloads[change.event.job_seq] = change.payload
            if change.before is not None and change.before.grant is not None and _grant_ended(change):
                self._keys.ended(change.before.grant.lock_id)
        plan.changes += decision.changes
        plan.checked += decision.checked
        plan.report = decision.report or plan.report
        return decision

    def _parks(self, claim: Claim, decision: Decision) -> bool:
        if not isinstance(decision.answer, Answer) or decision.answer.grants or claim.wait_ms == 0 or self._stopping:
            return False
        return len(self.parked) < self.bounds.parked_claims

    def _note_due(self, queue: str, kind: str) -> None:
        if self.parked:
            self._became_due[(queue, kind)] = None

    def _serve_parked(self, plan: _Plan) -> None:
        """Jobs became due while claims wait for them: those that wait longest get them, before anybody new."""
        while self._became_due:
            queue, kind = next(iter(self._became_due))
            del self._became_due[(queue, kind)]
            while (asked := self.parked.first(queue, kind)) is not None:
                if self._refuse_on_full_disk(asked.call.command) is not None:
                    break
                decision = self._decided(plan, asked.call)
                if not isinstance(decision.answer, Answer) or not decision.answer.grants:
                    break
                self.parked.remove(asked)
                plan.served.append(asked)
                plan.replies.append((asked, decision.answer))
                if asked.key is not None:
                    self._store_answer(plan, asked.key, decision.answer)
                    self._hand(asked, decision.answer)

    # -- idempotency keys ---------------------------------------------------------------------------------------------

    def _known_answer(self, plan: _Plan, asked: Asked, key: KeyUse) -> Answer | Refusal | None:
        """The stored answer of a repeated call, if there is one."""
        row = self._keys.find(key.digest, plan.at.now)
        if row is None:
            if self._keys.has_room(plan.at.now):
                return None
            return Refusal("overloaded", "Too many idempotency keys are in use; try again later, or without a key.")
        if row.body_hash != key.body_hash:
            return _key_reused()
        if row.grants is not None:
            return self._current_grants(plan, asked, row.grants)
        stored = row if row.answer is not None else self._answers.get(key.digest)
        if stored is None or stored.answer is None:
            return None
        return Answer(Raw(stored.answer), status=stored.status, replayed=True)

    def _current_grants(self, plan: _Plan, asked: Asked, grants: list[tuple[str, str]]) -> Answer | None:
        """The grants of the first call that are still current; None where none is: the call is judged anew."""
        answer = Answer(Grants([]), shows=[], grants=[], replayed=True)
        for job_id, lock_id in grants:
            job = self.book.jobs.get(job_id)
            if job is not None and job.grant is not None and job.grant.lock_id == lock_id:
                shown = views.job_view(job, plan.at, self.policy, admin=asked.call.admin)
                answer.data.grants.append(views.grant_view(job, plan.at, shown))
                answer.shows.append((job.seq, shown))
                answer.grants.append((job_id, lock_id))
        if not answer.grants:
            return None
        if isinstance(asked.call.command, Start):
            answer.data = answer.data.grants[0]
        self._hand(asked, answer)
        return answer

    def _store_answer(self, plan: _Plan, key: KeyUse, answer: Answer) -> None:
        if answer.grants:
            self._keys.add(KeyRow(key.digest, key.body_hash, plan.at.now, grants=list(answer.grants)))
            return
        still = []
        for seq, shown in answer.shows:
            payload = plan.payloads.get(seq) or self._first_payloads.get(seq)
            if payload is None:
                still.append((seq, shown))
            else:
                shown.payload = Raw(payload)
        answer.shows = still
        body = msgspec.json.encode(answer.data)
        self._keys.add(KeyRow(key.digest, key.body_hash, plan.at.now, answer.status, body))

    def _hand(self, asked: Asked, answer: Answer) -> None:
        for _, lock_id in answer.grants:
            self._handed[lock_id] += len(asked.futures)

    # -- writing ------------------------------------------------------------------------------------------------------

    async def _write(self, plan: _Plan) -> None:
        """One transaction; then the payloads that the answers show are at hand."""
        wanted = self._wanted_payloads(plan)
        payloads: dict[int, bytes] = {}
        if plan.writes:
            started = time.perf_counter()
            payloads = await self.disk.write(self._batch(plan, wanted))
            self.commit_seconds.add(time.perf_counter() - started, COMMIT_BUCKETS_S)
            self.batch_commands.add(len(plan.replies), BATCH_BUCKETS)
            self._keys.commit()
        elif wanted:
            loaded = await self.disk.load([], wanted, [])
            for job_id, reason in loaded.bad.items():
                self._quarantine(job_id, reason)
            if loaded.bad:
                raise _Again
            payloads = {seq: payload.body for seq, payload in loaded.payloads.items()}
        for _, answer in plan.replies:
            if isinstance(answer, Answer):
                self._fill(answer, payloads, plan.payloads)

    def _wanted_payloads(self, plan: _Plan) -> list[int]:
        wanted: dict[int, None] = {}
        for _, answer in plan.replies:
            if isinstance(answer, Answer):
                for seq, _shown in answer.shows:
                    if seq not in plan.payloads and seq not in self._first_payloads:
                        wanted[seq] = None
        return list(wanted)

    def _fill(self, answer: Answer, *sources: dict[int, bytes]) -> None:
        for seq, shown in answer.shows:
            found = next((source[seq] for source in (*sources, self._first_payloads) if seq in source), None)
            if found is not None:
                shown.payload = Raw(found)

    def _batch(self, plan: _Plan, payloads: list[int]) -> Batch:
        keys, forgotten = self._keys.changed()
        queues = {}
        for change in plan.changes:
            if change.event.job_seq == 0 or not (_is_live(change.before) and _is_live(change.after)):
                queues[change.event.queue] = self.book.queue_row(change.event.queue)
        return Batch(
            changes=plan.changes,
            numbers=self.book.numbers(plan.at.lease, plan.at.now),
            queues=queues,
            keys=keys,
            forget_keys=forgotten,
            checked=plan.checked,
            report=plan.report,
            payloads=payloads,
            unmark=plan.unmark,
        )

    def _answer(self, plan: _Plan) -> None:
        """Everything is on disk: tell everybody."""
        for asked, answer in plan.replies:
            if isinstance(answer, Answer) and answer.look is not None:
                self._start_look(asked, answer)
                continue
            told = asked.reply(answer)
            if isinstance(answer, Answer) and answer.grants and told < len(asked.futures):
                self._take_back_grants(asked, answer, told)
        for change in plan.changes:
            if change.before is not None and change.before.grant is not None and _grant_ended(change):
                self._handed.pop(change.before.grant.lock_id, None)
        for seq in plan.checked:
            self.book.suspects.pop(seq, None)
        if plan.changes:
            for listener in self.on_commit:
                listener(plan.changes)

    def _take_back_grants(self, asked: Asked, answer: Answer, told: int) -> None:
        """Some or all of those who asked have gone."""
        for job_id, lock_id in answer.grants:
            if asked.key is not None:
                self._handed[lock_id] -= len(asked.futures) - told
            if told == 0 and self._handed.get(lock_id, 0) <= 0:
                self._post(Undelivered(id=job_id, lock_id=lock_id))

    # -- when the disk refuses ----------------------------------------------------------------------------------------

    async def _take_back(self, plan: _Plan) -> None:
        """The batch was not written: its jobs are what the disk says. Numbers that it used stay used."""
        self._keys.rollback()
        ids = {change.event.job_id: None for change in plan.changes if change.event.job_seq}
        loaded = await self.disk.load(list(ids), [], [])
        for job_id in ids:
            self.book.swap(self.book.get(job_id), loaded.jobs.get(job_id))
            self.book.suspects = {seq: name for seq, name in self.book.suspects.items() if name in self.book.jobs}
        for job_id, reason in loaded.bad.items():
            self._quarantine(job_id, reason)
        for change in reversed(plan.changes):
            if change.event.job_seq == 0:
                self.book.set_paused(change.event.queue, change.event.type != "queue_paused")
        self._take_back_parking(plan)

    def _take_back_parking(self, plan: _Plan) -> None:
        for asked, answer in plan.replies:
            if asked.key is not None and isinstance(answer, Answer):
                for _, lock_id in answer.grants:
                    self._handed[lock_id] -= len(asked.futures)
        for asked in plan.parked:
            self.parked.remove(asked)
        for asked in plan.served:
            if asked not in plan.parked:
                self.parked.add(asked)

    async def _close_further(self) -> None:
        """A write hit the full disk: first creates go, then all that is no ending (with the ballast given up)."""
        self.closed_by_full_disk = min(self.closed_by_full_disk + 1, NOTHING)
        self._next_probe = asyncio.get_running_loop().time() + PROBE_EVERY_S
        if self.closed_by_full_disk == ONLY_ENDINGS:
            self._clock.hold()
            await self.disk.drop_ballast()
        log.error("disk_full", refused=("", "creates", "all but endings", "all writes")[self.closed_by_full_disk])

    async def _probe(self) -> None:
        """Once a second: is there room again? Then the ballast is made anew and everything is let in."""
        loop_time = asyncio.get_running_loop().time()
        if loop_time < self._next_probe:
            return
        self._next_probe = loop_time + PROBE_EVERY_S
        try:
            await self.disk.probe()
            if self.closed_by_full_disk >= ONLY_ENDINGS:
                self.closed_by_full_disk = ONLY_ENDINGS
                await self.disk.build_ballast()
        except DiskFull:
            return
        except Exception as error:
            self._fail([], error)
            raise DiskBroken(str(error)) from error
        if self.closed_by_full_disk >= ONLY_ENDINGS:
            self._clock.resume()
        self.closed_by_full_disk = OPEN
        log.info("disk_has_room", message="writes are taken again")

    def _refuse_on_full_disk(self, command: AnyCommand) -> Refusal | None:
        closed = self.closed_by_full_disk
        if closed == OPEN or isinstance(command, READS):
            return None
        if closed == NO_CREATES and not isinstance(command, CREATES):
            return None
        if closed == ONLY_ENDINGS and isinstance(command, ENDINGS):
            return None
        message = "The disk of the store is full; nothing was changed. Free some space: it is tried again every second."
        return Refusal("storage_full", message)

    async def _set_aside(self, bad: dict[str, str]) -> None:
        for job_id, reason in bad.items():
            job = self.book.get(job_id)
            if job is not None:
                await self.disk.quarantine(job, reason)
            self._quarantine(job_id, reason)

    def _quarantine(self, job_id: str, reason: str) -> None:
        log.error("job_quarantined", job_id=job_id, reason=reason)
        self.book.quarantine(job_id, reason)

    def _fail(self, batch: list[Asked], error: Exception) -> None:
        """What the disk holds is unknown: say so to those whose commands were under way, and let nobody else in."""
        self._broken = True
        log.critical("commit_failed", error=str(error), kind=type(error).__name__, commands=len(batch))
        message = "It is not known whether this was done: the disk failed. Ask again, with the same id or key."
        unknown = Refusal("outcome_unknown", message, {"outcome": "unknown"})
        for asked in batch:
            asked.reply(unknown)
        stopping = Refusal("shutting_down", "The daemon is stopping; ask again in a moment.")
        for asked in [*self._mailbox, *self.parked.take_all()]:
            asked.reply(stopping)
        self._mailbox.clear()

    # -- history and time ---------------------------------------------------------------------------------------------

    def _start_look(self, asked: Asked, answer: Answer) -> None:
        """History is read beside the batches, in small pages, by a few at a time."""
        task = asyncio.create_task(self._look(asked, answer))
        self._looks.add(task)
        task.add_done_callback(self._looks.discard)

    async def _look(self, asked: Asked, answer: Answer) -> None:
        assert answer.look is not None
        async with self._look_places:
            try:
                answer.data = await self._seen(answer.look, asked.call.admin)
            except Exception:
                log.exception("history_failed", command=type(asked.call.command).__name__)
                asked.reply(Refusal("internal_error", "Reading the history failed. The log has the details."))
                return
        asked.reply(answer)

    async def _seen(self, look: Look, admin: bool) -> TimelineView | JobPage:
        if look.timeline is not None:
            return TimelineView([view(event) for event in await self.disk.timeline(look.timeline)])
        assert look.page is not None
        asked = look.page
        before = None if asked.cursor is None else int(asked.cursor)
        page = await self.disk.find(Query(asked.status, asked.queue, asked.kind, asked.worker, asked.limit, before))
        for job_id, reason in page.bad.items():
            self._quarantine(job_id, reason)
        return self._page(page, admin)

    def _page(self, page: Page, admin: bool) -> JobPage:
        at = self._clock.moment()
        shown: list[JobView] = [
            views.job_view(job, at, self.policy, admin=admin, payload=Raw(payload)) for job, payload in page.jobs
        ]
        return JobPage(shown, None if page.next_before is None else str(page.next_before))

    def _answer_late_claims(self) -> None:
        """Claims whose wait is over, or all of them when we stop, are answered empty."""
        late = self.parked.take_all() if self._stopping else self.parked.take_late(asyncio.get_running_loop().time())
        for asked in late:
            asked.reply(Answer(Grants([])))

    def _note(self, changes: Sequence[Change]) -> None:
        for change in changes:
            self.book.figures.note(change)


def _join(first: Asked, asked: Asked) -> Refusal | None:
    """A parked call was repeated under its key: both wait for the one answer."""
    assert first.key is not None and asked.key is not None
    if first.key.body_hash != asked.key.body_hash:
        return _key_reused()
    first.futures += [future for future in asked.futures if future not in first.futures]
    return None


def _grant_ended(change: Change) -> bool:
    """Whether the grant that the job had before is no longer its current one."""
    before, after = change.before, change.after
    assert before is not None and before.grant is not None
    return after is None or after.grant is None or after.grant.lock_id != before.grant.lock_id


def _is_live(job: Job | None) -> bool:
    return job is None or job.status in ("queued", "processing")


def _key_reused() -> Refusal:
    message = "This Idempotency-Key was used with another body. Use a new key for a new request."
    return Refusal("idempotency_key_reused", message)
