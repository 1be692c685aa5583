"""Run the actor: take the waiting commands, decide them as a batch, commit it, then send the responses.

The actor holds the state (all live jobs), the mailbox (commands of callers), two lists of commands of the daemon
(`_internal`, decided before others; `_deferred`, one per batch until their deadline), the waiting claims, the full
disk and the reads of history. `run` is one task. Everything else puts a command into a list and returns.

    send, ask        > _mailbox  ┐             ┌──────────── DiskFull, BadRows: roll back, decide again
    enqueue_internal > _internal ┼> _take > preload > decide (batch.py) > _write > commit > _respond > waiters
    defer_internal   > _deferred ┘    │        │                             │                └> on_commit
                                      │        └ finished jobs, payloads,    └ other errors: _fail, DiskBroken
         a batch: weight 1,000, 8 MiB ┘          stored responses, late results

Invariants:

- Only the task of `run` decides commands and changes jobs, one batch after another. Three calls from outside change
  something else: `abandon` removes a waiting claim, `_note_quarantined` (called by the store) removes a damaged job at
  once, also while a batch is written, and `Leadership.on_epoch` raises the epoch of the tokens.
- Nothing is awaited between the decision of the first command of a batch and that of its last. What the decisions need
  and memory does not hold is read before, by `preload`.
- All commands of a batch are decided at one moment, which is read after `preload`. A batch that is decided again gets a
  new one.
- At most one batch is decided and not committed (`_under_way`). At most one is committed and has unsent responses
  (`_unsent`). `_unsent` is kept only if commands wait, so that its responses go out during the next write.
- A response is sent after the commit of its batch. Within a batch a command sees the changes of those before it, so
  reads wait for the commit too. A batch that writes nothing needs none.
- If commits are slow (`reads_first`), the reads of a batch are decided alone, before the rest of it. They see
  committed jobs only. So a read can be decided before an earlier command, unless it is `ordered` after it.
- A rejection by `send` itself is no decision: the command was never in the mailbox.
- After DiskFull, BadRows or a read that found damage, the state is as before the batch, and the disk has nothing of
  it. The whole batch is decided again, with other limits or with the damaged jobs in quarantine. Numbers that it used
  (jobs, events, tokens) stay used.
- After any other error of a turn, the outcome of the batch counts as unknown. Its callers get `outcome_unknown`, those
  of the mailbox a rejection, and `run` raises DiskBroken. Nothing is decided after that; `ended` is set. A new process
  starts from the disk.
- A command in `_internal` leaves it when it has a response other than `storage_full`. So the daemon's own commands
  survive a full disk.
- `_bytes` is the sum of the sizes in the mailbox. A command is accepted if mailbox and bytes are below its share of
  the limits (`SHARES`), so running jobs can report when creates are already rejected.
- Finished jobs that `preload` has read stay in memory at least until their batch is committed: `finished.trim` runs
  between batches.
- The loop of `run` does not wait to collect more commands. It reads the sockets empty (`_drain_sockets`) and takes
  what has arrived.

Other tasks wait while a batch is decided. The weights keep that to a few milliseconds.
"""

from __future__ import annotations

import asyncio
import math
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, Final

import structlog
from msgspec import UNSET, Struct
from msgspec.structs import replace

from jobd.core import quiet
from jobd.core.state import State
from jobd.core.stats import Histogram
from jobd.engine.batch import DecidedBatch, Decider
from jobd.engine.clock import Clock
from jobd.engine.disk_full import FullDisk, WriteLimit
from jobd.engine.envelope import SHARES, Envelope, Waiter, may_go_first
from jobd.engine.history import HistoryReader
from jobd.engine.idempotency import IdempotencyStore
from jobd.engine.preloading import Preloaded, needs_no_read, preload
from jobd.engine.unread_responses import RESPONSE_BYTES, UnreadResponses
from jobd.engine.waiting_claims import WaitingClaims
from jobd.model.clocks import MonotonicS
from jobd.model.commands import AnyCommand, Claim, Complete, IdempotencyKey, Operator, Undelivered
from jobd.model.errors import SHUTTING_DOWN, ApiError, not_leader_error
from jobd.model.events import Event
from jobd.model.job import Policy
from jobd.model.journal import JournalOutcomeUnknown, LeadershipLost
from jobd.model.responses import Grants, Response
from jobd.model.storage import BadRows, DiskFull, FormatNotRead, JobStorage, Quarantined

log = structlog.get_logger("jobd.actor")

BATCH_WEIGHT: Final = 1_000  # commands of one batch; bulk creates and claims count by their jobs
BATCH_BYTES: Final = 8 << 20  # of the bodies of one batch; a larger body is a batch of its own
LATE_WEIGHT: Final = 50  # of a complete without a live grant, which needs a read of the journal
VIEW_WEIGHT: Final = 50  # of a call whose stored response has the payload and the metadata of a job
CLOCK_CHECK_S: Final = 1.0  # while a step of the wall clock could make a job due for which a claim waits
SEND_LATER: Final = 64  # if at most this many commands wait, they are written before the last responses are sent
SLOW_COMMIT_S: Final = 0.003  # after a commit that took at least this long, reads do not wait for the next one
COMMIT_BUCKETS_S: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
BATCH_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Bounds(Struct, frozen=True):
    """The limits of the mailbox, of waiting claims and of responses that are not read."""

    mailbox: int = 10_000  # commands
    inflight_bytes: int = 64 << 20
    parked_claims: int = 10_000
    claim_wait_ms: int = 60_000
    response_bytes: int = RESPONSE_BYTES


class DiskBroken(Exception):
    """A batch was not completed, and its outcome may be unknown. The process must end and start from the disk."""


class Actor:
    """Owns the state. `ask` puts a command into the mailbox and waits for its response; `run` decides and commits.

    `now_s` measures commits: monotonic seconds, precise to less than a millisecond. None: the loop's time.
    `before_batch` is called before a batch is taken, which waits for what it returns. An error of it ends `run`.
    """

    def __init__(
        self,
        disk: JobStorage,
        state: State,
        keys: IdempotencyStore,
        clock: Clock,
        policy: Policy,
        *,
        random: Callable[[int], bytes],
        bounds: Bounds | None = None,
        is_full: bool = False,
        has_reserve: bool = True,
        now_s: Callable[[], MonotonicS] | None = None,
        before_batch: Callable[[], Awaitable[None] | None] = lambda: None,
    ) -> None:
        loop_time: Callable[[], MonotonicS] = asyncio.get_running_loop().time  # type: ignore[assignment]
        self.disk = disk
        self.state = state
        self.policy = policy
        self.bounds = bounds or Bounds()
        self.waiting_claims = WaitingClaims(state.presence, partial(quiet.open_queues, state))
        self.full_disk = FullDisk(disk, clock, loop_time, is_full=is_full, has_reserve=has_reserve)
        self.slow_commit_s = SLOW_COMMIT_S
        self.before_batch = before_batch
        self.on_commit: list[Callable[[Sequence[Event]], None]] = [lambda changes: self.state.counters.note(changes)]
        self.commit_seconds = Histogram.empty(COMMIT_BUCKETS_S)
        self.batch_commands = Histogram.empty(BATCH_BUCKETS)
        self._clock = clock
        self._random = random
        self._loop_time = loop_time
        self._now_s = now_s or loop_time
        self._commit_s = 0.0  # that the latest one took
        self._mailbox: deque[Envelope] = deque()
        self._bytes = 0
        self._wake = asyncio.Event()
        self.unread = UnreadResponses(self.bounds.response_bytes, self._wake.set)
        self.ended = asyncio.Event()  # no more commands are decided
        self._stopping = False
        self._rejection = SHUTTING_DOWN
        self._internal: list[Envelope] = []
        self._deferred: list[Envelope] = []  # of the daemon too, by deadline
        self._unsent: DecidedBatch | None = None  # committed; its responses are sent while the next batch is written
        self._under_way: DecidedBatch | None = None  # decided, and perhaps not committed yet
        self._lost_disk: Exception | None = None
        disk.on_quarantined = self._note_quarantined
        state.too_old_for = disk.too_old_for
        self._decider = Decider(
            state, keys, self.waiting_claims, reject=self.full_disk.reject, unread=self.unread, loop_time=loop_time
        )
        self.job_waiters = self._decider.job_waiters
        self._history = HistoryReader(disk, clock.moment, self.unread)

    # -- asking -------------------------------------------------------------------------------------------------------

    async def ask(
        self,
        command: AnyCommand,
        *,
        by: str = "client",
        admin: bool = False,
        key: IdempotencyKey | None = None,
        size: int = 0,
        operator: Operator | None = None,
        expected: str | None = None,
    ) -> Response | ApiError:
        """Put `command` into the mailbox; return its response after the commit. `size` is that of its body, in bytes.

        With an `operator` it is kept in the audit log, in the same transaction. With an `expected` version it is done
        only if its job is still that one when it is decided.
        """
        future: asyncio.Future[Response | ApiError] = asyncio.get_running_loop().create_future()
        envelope = self.send(
            command, future, by=by, admin=admin, key=key, size=size, operator=operator, expected=expected
        )
        if isinstance(envelope, ApiError):
            return envelope
        try:
            return await future
        except asyncio.CancelledError:
            self.abandon(envelope)
            if future.done() and not future.cancelled() and isinstance(response := future.result(), Response):
                self.undelivered(response)  # its caller is gone
            raise

    def send(
        self,
        command: AnyCommand,
        waiter: Waiter,
        *,
        by: str = "client",
        admin: bool = False,
        key: IdempotencyKey | None = None,
        size: int = 0,
        operator: Operator | None = None,
        expected: str | None = None,
        ordered: bool = False,
    ) -> Envelope | ApiError:
        """Put `command` into the mailbox like `ask`, and return at once. `waiter` gets the response.

        `ordered`: the command is decided after the earlier ones of its sender.
        """
        rejection = self._reject_entry(command, size)
        if rejection is not None:
            return rejection
        seed = self._random(16)
        envelope = Envelope(command, by, seed, admin, operator, expected, key, size, [waiter], ordered)
        self._put(envelope)
        return envelope

    def abandon(self, envelope: Envelope) -> None:
        """Record that the caller of `envelope` is gone. Its claim stops waiting."""
        first = self.waiting_claims.waiting_with(envelope.key.digest) if envelope.key is not None else envelope
        if first is not None and first.is_abandoned:
            self.waiting_claims.remove(first, has_left=True)
            self.job_waiters.remove(first)

    def undelivered(self, response: Response) -> None:
        """Release the grants of a response whose connection closed before its first byte, if no other received them."""
        for command in self._decider.undelivered(response):
            self._put(self._internal_envelope(command))

    def enqueue_internal(self, command: AnyCommand) -> asyncio.Future[Response | ApiError]:
        """Add a command of the daemon, which is decided before others and stays until the disk has room for it.

        Return its response, which comes after the commit.
        """
        future: asyncio.Future[Response | ApiError] = asyncio.get_running_loop().create_future()
        self._internal.append(self._internal_envelope(command, future))
        self._wake.set()
        return future

    def defer_internal(self, command: AnyCommand, within_s: float) -> None:
        """Add a low-priority internal command.

        Until `within_s` has passed, each batch takes at most one, so other commands do not wait for it.
        """
        envelope = self._internal_envelope(command)
        envelope.deadline = self._loop_time() + within_s
        insort(self._deferred, envelope, key=attrgetter("deadline"))
        self._wake.set()

    def lose_disk(self, error: Exception) -> None:
        """End `run` with an error that occurred outside it, such as a failed commit of another write."""
        self._lost_disk = error
        self._wake.set()

    def end_claim_waits(self) -> None:
        """Let no more claims wait, and end the waits of others."""
        self._decider.may_wait = False
        self._wake.set()

    def stop(self) -> None:
        """Accept no more commands. `run` ends when the mailbox is empty."""
        self._stopping = True
        self.end_claim_waits()

    @property
    def waiting(self) -> int:
        """The number of commands in the mailbox and of reads of history in progress."""
        return len(self._mailbox) + len(self._history.reads)

    def _reject_entry(self, command: Any, size: int) -> ApiError | None:
        if self._stopping:
            return self._rejection
        room, bounds = SHARES[command.admission], self.bounds
        if self.waiting >= bounds.mailbox * room or self._bytes + size > bounds.inflight_bytes * room:
            return ApiError("overloaded", "Too many commands are waiting; try again in a second.")
        if self.unread.is_full and room < 1:
            return self.unread.rejection()
        if command.can_wait and command.wait_ms:
            if command.wait_ms > bounds.claim_wait_ms:
                message = f"wait_ms may be at most {bounds.claim_wait_ms} (limits.claim_wait), not {command.wait_ms}."
                return ApiError("invalid_request", message, {"field": "$.wait_ms"})
            if len(self.waiting_claims) + len(self.job_waiters) >= bounds.parked_claims:
                return ApiError("overloaded", "Too many requests are waiting for jobs; try again without wait_ms.")
        return None

    def _internal_envelope(self, command: AnyCommand, *waiters: Waiter) -> Envelope:
        return Envelope(command, "daemon", self._random(16), futures=[*waiters])

    def _put(self, envelope: Envelope) -> None:
        if not self._mailbox:
            self._wake.set()
        self._mailbox.append(envelope)
        self._bytes += envelope.size

    # -- the consumer -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the mailbox until `stop`. Raises DiskBroken if a commit fails, or `before_batch` does."""
        try:
            while (
                not self._stopping or self._mailbox or self._has_internal() or self.waiting_claims or self.job_waiters
            ):
                await self._serve_batch()
        finally:
            self.ended.set()
        await self._history.finish()

    async def _serve_batch(self) -> None:
        """Wait for commands, and serve them. Raises DiskBroken."""
        await self._wait_for_work()
        await self._drain_sockets()
        batch: list[Envelope] = []
        try:
            if (confirming := self.before_batch()) is not None:
                await confirming
            batch = self._take()
            if self._lost_disk is not None:
                raise self._lost_disk
            await self.full_disk.probe()
            if self.reads_first and not self._internal:
                batch = await self._serve_reads_first(batch)
            if batch or self._decider.has_due:
                await self._turn(batch)
        except Exception as error:
            self._fail(batch, error)
            raise DiskBroken(str(error)) from error
        self._end_waits()
        if self.job_waiters:
            self._end_job_waits()

    async def _wait_for_work(self) -> None:
        """Wait until a command arrives or a timer is due."""
        if not (self._mailbox or self._stopping or self._has_internal() or self._lost_disk):
            timer = None
            if (wait_s := self._wait_s()) is not None:
                timer = asyncio.get_running_loop().call_later(max(wait_s, 0), self._wake.set)
            await self._wake.wait()
            if timer is not None:
                timer.cancel()
                at = self._clock.moment()
                self.state.advance(at.now, at.lock_ms)
        self._wake.clear()

    async def _drain_sockets(self) -> None:
        """Let the event loop read all requests that have arrived, so that one commit includes them."""
        if self._unsent is not None:
            return  # responses wait until this batch is written
        while True:  # at least once: a turn with an inline commit does not yield otherwise
            waiting = len(self._mailbox)
            await asyncio.sleep(0)
            if not waiting < len(self._mailbox) < BATCH_WEIGHT:
                break

    def _has_internal(self) -> bool:
        """Return whether a command of the daemon can be decided now."""
        return bool(self._internal or self._deferred) and self.full_disk.write_limit != WriteLimit.ALL_WRITES

    def _wait_s(self) -> float | None:
        """Return the seconds until a wait ends, a job may become due for a waiting claim, or a probe is due."""
        waits = []
        if (deadline := self.waiting_claims.next_deadline()) is not None:
            waits.append(deadline - self._loop_time())
            now = self._clock.moment().now
            run_at, expiry = self.state.next_run_at(), self.state.next_expiry()
            if run_at is not None:
                waits.append((run_at - now) / 1000)
            if run_at is not None or (expiry is not None and expiry <= now):
                waits.append(CLOCK_CHECK_S)
        if (deadline := self.job_waiters.next_deadline()) is not None:
            waits.append(deadline - self._loop_time())
        if (probe_at := self.full_disk.probe_at) is not None:
            waits.append(probe_at - self._loop_time())
        return min(waits, default=None)

    def _take(self) -> list[Envelope]:
        """Take the commands of the daemon, then those in the mailbox, up to a batch that takes a few milliseconds."""
        batch, mailbox, weights, size = self._take_internal(), self._mailbox, 0, 0
        if len(batch) < len(self._internal):
            return batch  # the others come before the mailbox
        while mailbox and weights < BATCH_WEIGHT:
            envelope = mailbox[0]
            if size and size + envelope.size > BATCH_BYTES:
                break
            size += envelope.size
            mailbox.popleft()
            command = envelope.command
            if envelope.key is not None and command.stores_job:
                weights += VIEW_WEIGHT
            elif type(command) is Complete and not self.state.holds(command.id, command.lock_id):
                weights += LATE_WEIGHT
            else:
                weights += command.weight()
            batch.append(envelope)
        self._bytes -= size
        return batch

    def _take_internal(self) -> list[Envelope]:
        """Take the daemon's own commands: on a full disk all of them, so that rejected ones do not block the rest."""
        if self._deferred:
            due = bisect_right(self._deferred, self._loop_time(), key=attrgetter("deadline"))
            self._internal += self._deferred[: max(due, 1)]
            del self._deferred[: max(due, 1)]
        if self.full_disk.write_limit != WriteLimit.NONE:
            return list(self._internal)
        taken, weights = [], 0
        for envelope in self._internal:
            if weights >= BATCH_WEIGHT:
                break
            weights += envelope.command.weight()
            taken.append(envelope)
        return taken

    @property
    def reads_first(self) -> bool:
        """Whether commits are slow, so that reads are served before the next one."""
        return self._commit_s >= self.slow_commit_s

    async def _serve_reads_first(self, batch: list[Envelope]) -> list[Envelope]:
        """Serve the reads of `batch` from committed data, and return the other commands.

        They need not wait for the commit of their own batch, because no response has shown its changes.
        """
        reads = [envelope for envelope in batch if may_go_first(envelope)]
        if not reads:
            return batch
        await self._turn(reads, serves=False)
        self._send_responses()
        await asyncio.sleep(0)  # reads of history go to the disk before the commit
        return [envelope for envelope in batch if not may_go_first(envelope)]

    async def _turn(self, batch: list[Envelope], *, serves: bool = True) -> None:
        """Decide and write a batch and send its responses. Decide it again if the disk is full or rows are damaged."""
        while True:
            known, policy = await self._preload(batch), self._policy_now()
            decided = self._decider.decide(batch, self._clock.moment(), known, policy, serves=serves)
            self._under_way = decided
            if decided.is_large:
                self._put_back(batch, decided.left)
            self._send_meanwhile()
            self._prepare_meanwhile(decided)
            try:
                decided.fill(await self._write(decided))
                break
            except DiskFull as error:
                self._decider.roll_back(decided)
                await self.full_disk.escalate(error)
            except BadRows as bad:
                self._decider.roll_back(decided)
                await self._quarantine(bad.jobs)
            except FormatNotRead:
                self._decider.roll_back(decided)
        self._send_responses()  # of the batch before, if this one did not wait
        self._unsent, self._under_way = decided, None
        self.state.finished.trim()
        if not self._may_send_later(decided) or self.full_disk.write_limit != WriteLimit.NONE or self._internal:
            self._send_responses()

    def _put_back(self, batch: list[Envelope], left: list[Envelope]) -> None:
        """Move the commands of `batch` that were not decided back to the mailbox, and let the next batch follow."""
        del batch[len(batch) - len(left) :]
        for envelope in reversed(left):
            if envelope not in self._internal:
                self._mailbox.appendleft(envelope)
                self._bytes += envelope.size
        self._wake.set()

    def _may_send_later(self, decided: DecidedBatch) -> bool:
        """Return whether the waiting commands are enough for a batch of their own before the responses are sent."""
        waiting = len(self._mailbox)
        if self.disk.commits_inline or decided.is_large:
            return False  # no response is sent during an inline commit, and a large one is counted once it is sent
        return 0 < waiting <= SEND_LATER and 2 * waiting >= len(decided.replies)

    def _send_responses(self) -> None:
        """Send the responses of the last commit."""
        decided, self._unsent = self._unsent, None
        if decided is not None:
            self._respond(decided)

    def _send_meanwhile(self) -> None:
        """Send the responses of the last commit while the next batch is written."""
        if self._unsent is not None:
            asyncio.get_running_loop().call_soon(self._send_or_end)

    def _send_or_end(self) -> None:
        """Send the responses of the last commit, and let `run` end if a callback fails."""
        try:
            self._send_responses()
        except Exception as bug:
            self.lose_disk(bug)

    def _prepare_meanwhile(self, decided: DecidedBatch) -> None:
        """Encode the responses while the batch is written, if their payloads are in memory."""
        if self.disk.commits_inline and decided.writes:
            return  # the write returns the payloads
        if wanted := decided.wanted_payloads():
            decided.known.payloads |= self.disk.cached_payloads(wanted)
        if decided.writes and decided.known.payloads.keys() >= set(wanted):
            decided.fill({})
            asyncio.get_running_loop().call_soon(self._prepare, decided)

    def _prepare(self, decided: DecidedBatch) -> None:
        for envelope, response in decided.replies:
            if isinstance(response, Response) and response.read is None:
                envelope.prepare(response)

    async def _preload(self, batch: list[Envelope]) -> Preloaded:
        if needs_no_read(batch, self.state):
            return Preloaded()
        keys = self._decider.keys
        return await preload(batch, self.state, self.disk, keys, self.policy, before_read=self._send_meanwhile)

    def _policy_now(self) -> Policy:
        """Return the policy. On a full disk, late results and calls are not stored."""
        if self.full_disk.write_limit == WriteLimit.NONE:
            return self.policy
        return replace(self.policy, late_results="drop", late_queues={}, late_calls=False)

    async def _write(self, decided: DecidedBatch) -> dict[int, bytes]:
        """Write the batch in one transaction. Return the payloads that its responses need."""
        if decided.writes:
            batch = self._decider.batch(decided, self.policy)
            began_s = self._now_s()
            payloads = await self.disk.write(batch)
            self._commit_s = self._now_s() - began_s
            self.commit_seconds.add(self._commit_s, COMMIT_BUCKETS_S)
            self.batch_commands.add(len(decided.replies), BATCH_BUCKETS)
            self._decider.committed(decided)
            return payloads
        wanted = decided.wanted_payloads()
        if not wanted:
            return {}
        loaded = await self.disk.load([], wanted, [])
        if loaded.bad:
            raise BadRows(loaded.bad)
        if missing := [seq for seq in wanted if seq not in loaded.payloads]:
            raise LookupError(f"the disk has no payloads of jobs {missing}, and reports no damage")
        return {seq: payload.body for seq, payload in loaded.payloads.items()}

    def _respond(self, decided: DecidedBatch) -> None:
        """Send the responses, and call the `on_commit` callbacks."""
        for envelope, response in decided.replies:
            if isinstance(response, Response) and response.read is not None:
                self._history.start(envelope, response, self.policy)
                continue
            if (self._internal or not isinstance(response, Response)) and self._keep_if_disk_full(envelope, response):
                continue
            sent = envelope.reply(response)
            if sent < len(envelope.futures) and isinstance(response, Response) and response.grants:
                for command in self._decider.unreceived(envelope, response, sent):
                    self._put(self._internal_envelope(command))
        if decided.changes:
            for listener in self.on_commit:
                listener(decided.changes)
            if self.job_waiters:
                for envelope in self.job_waiters.take_ended(decided.changes):
                    self._put(envelope)

    def _keep_if_disk_full(self, envelope: Envelope, response: Response | ApiError) -> bool:
        """Keep an internal command that the full disk rejected, and forget one that was decided.

        Return whether it is kept.
        """
        is_internal = envelope in self._internal
        if isinstance(response, ApiError) and response.code == "storage_full":
            if not is_internal and isinstance(envelope.command, Undelivered):
                self._internal.append(envelope)
            return is_internal or isinstance(envelope.command, Undelivered)
        if is_internal:
            self._internal.remove(envelope)
        return False

    def _end_job_waits(self) -> None:
        """Let reads whose wait is over be decided without one, or all of them before the end."""
        until = self._loop_time() if self._decider.may_wait else MonotonicS(math.inf)
        for envelope in self.job_waiters.take_expired(until):
            self._put(envelope)

    def _end_waits(self) -> None:
        """Respond to waiting claims whose wait is over, or to all of them before the end: no grants."""
        waiting = self.waiting_claims
        late = waiting.take_expired(self._loop_time()) if self._decider.may_wait else waiting.take_all()
        for envelope in late:
            assert isinstance(envelope.command, Claim)
            directive = quiet.directive_for(self.state, envelope.command, is_last=True)
            envelope.reply(Response(Grants([], UNSET if directive is None else directive)))

    # -- faults --------------------------------------------------------------------------------------

    async def _quarantine(self, bad: dict[str, str]) -> None:
        for job_id in bad:
            if (job := self.state.get(job_id)) is not None:
                await self.disk.quarantine(job, bad[job_id])
            elif job_id not in self.state.quarantined:
                raise LookupError(f"the disk has bad rows of {job_id}, which is not a job: {bad[job_id]}")

    def _note_quarantined(self, quarantined: Quarantined) -> None:
        """Remove a job whose damaged rows were quarantined. The current batch may have changed its count already."""
        changes = self._under_way.changes if self._under_way is not None else []
        is_changed = any(change.job_id == quarantined.id for change in changes)
        if quarantined.id not in self.state.quarantined:
            log.error("job_quarantined", job_id=quarantined.id, reason=quarantined.reason)
        uncounted = None if is_changed else quarantined.uncounted
        self.state.quarantine(quarantined.id, quarantined.reason, uncounted, is_moved=quarantined.is_moved)

    def _fail(self, batch: list[Envelope], error: Exception) -> None:
        """Respond that the outcome of the current commands is unknown, and reject the waiting ones."""
        self._stopping = True
        self._send_or_end()
        unknown, undone = [*batch, *self._decider.served], [*self._mailbox]
        if isinstance(error, LeadershipLost | JournalOutcomeUnknown):
            log.warning("leadership_lost", reason=str(error), commands=len(batch))
            reason = "this node does not lead the cluster any more"
            self._rejection = not_leader_error(None)
            undone += self.waiting_claims.take_all() + self.job_waiters.take_all()
        else:
            log.critical("commit_failed", error=str(error), kind=type(error).__name__, commands=len(batch))
            reason = "the disk failed"
            unknown += self.waiting_claims.take_all()
            undone += self.job_waiters.take_all()
        message = f"The outcome is unknown because {reason}. Repeat the request with the same id or Idempotency-Key."
        for envelope in unknown:
            envelope.reply(ApiError("outcome_unknown", message, {"outcome": "unknown"}))
        for envelope in undone:
            envelope.reply(self._rejection)
        self._mailbox.clear()
