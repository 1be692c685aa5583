"""Response times: every response is in time (L1), and no claim waits while a job for it is due (L3).

Times are loop time. Delays that a fault explains are allowed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from jobd.core.quiet import open_queues
from jobd.engine.disk_full import WriteLimit
from jobd.engine.envelope import Envelope
from jobd.model.commands import AnyCommand, Claim
from jobd.model.job import SECOND_MS
from tests.proof.simulation.invariants import is_overdue
from tests.support.rule_harness import due_order

if TYPE_CHECKING:
    from tests.proof.simulation.machine import Machine, SimDaemon

AT_ONCE_S: Final = 3.0
# Seconds by which a fault may delay a response.
HELD_UP_S: Final = {"slow disk": 30.0, "freeze": 45.0, "process stopped": 60.0, "journal slow": 30.0}
LOOK_EVERY_S: Final = 0.8
MAX_SEEN_WAITING: Final = 3  # how often a claim may be seen waiting while its job is due


class ResponseTimes:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._asked_s: dict[int, float] = {}  # by the identity of a pending command
        faults = machine.scenario.faults
        self._longest_s = AT_ONCE_S + machine.holds_commands_s + sum(HELD_UP_S.get(fault, 0) for fault in faults)

    def sent(self, command: AnyCommand) -> None:
        loop, daemon = self.machine.loop, self.machine.daemon
        self._asked_s[id(command)] = loop.now_s
        if isinstance(command, Claim) and command.limit and command.wait_ms and daemon is not None:
            loop.call_later(LOOK_EVERY_S, self._check_claim, daemon, command, loop.now_s, 0)

    def answered(self, command: AnyCommand) -> None:
        waited_s = self.machine.loop.now_s - self._asked_s[id(command)]
        longest_s = self._longest_s + (command.wait_ms / SECOND_MS if isinstance(command, Claim) else 0)
        late = f"{type(command).__name__} was answered after {waited_s:.1f} s"
        self.machine.monitor.must(waited_s <= longest_s, "L1", late, getattr(command, "id", None))

    def forget(self, command: AnyCommand) -> None:
        """Stop timing a command: it has its response, or its caller has left."""
        del self._asked_s[id(command)]

    # -- claims that wait ---------------------------------------------------------------------------------------------

    def _check_claim(self, daemon: SimDaemon, command: Claim, since_s: float, seen: int) -> None:
        """Check repeatedly, until the claim has its response, that no job for it is due."""
        if self.machine.daemon is not daemon or not daemon.is_open or self._asked_s.get(id(command)) != since_s:
            return
        job_id = self._due_job(daemon, command)
        seen = 0 if job_id is None or self._is_delayed(daemon, since_s) else seen + 1
        late = f"a claim waits although {job_id} is due"
        self.machine.monitor.must(seen < MAX_SEEN_WAITING, "L3", late, job_id)
        self.machine.loop.call_later(LOOK_EVERY_S, self._check_claim, daemon, command, since_s, seen)

    def _due_job(self, daemon: SimDaemon, command: Claim) -> str | None:
        """Return the job that a waiting claim should have been granted."""
        asked: Envelope | None = next(
            (asked for asked, *_ in daemon.actor.waiting_claims.by_ticket.values() if asked.command is command),
            None,
        )
        if asked is None or asked.is_abandoned:
            return None
        state, now = daemon.state, self.machine.wall()
        order = due_order(state.jobs.values(), now, open_queues(state, command), command.kinds, state.paused)
        return next((job_id for job_id in order if not is_overdue(state.jobs[job_id], now)), None)

    def _is_delayed(self, daemon: SimDaemon, since_s: float) -> bool:
        """Return whether the disk is slow, or a clock step made the job due, which only the next command notices."""
        slow = self.machine.is_slow or daemon.actor.full_disk.write_limit != WriteLimit.NONE
        return slow or self.machine.clocks_moved_s >= since_s
