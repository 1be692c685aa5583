"""Who waits, and for how long: every answer comes in time (L1), no claim waits while there is work for it (L3).

Looks on and changes nothing. Time is that of the loop; where a fault holds everybody up, waiting is no offence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from jobd.engine.disk_full import Closed
from jobd.engine.mailbox import Envelope
from jobd.model.commands import AnyCommand, Claim
from jobd.model.job import SECOND_MS
from tests.proof.simulation.promises import is_overdue
from tests.support.rule_harness import due_order

if TYPE_CHECKING:
    from tests.proof.simulation.machine import Daemon, Machine

AT_ONCE_S: Final = 3.0
# What may hold an answer up, by the fault, in seconds.
HELD_UP_S: Final = {"slow disk": 30.0, "freeze": 45.0}
LOOK_EVERY_S: Final = 0.8
LOOKS: Final = 3  # so often a claim may be seen waiting beside its work


class Patience:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._asked_s: dict[int, float] = {}  # by the identity of a command that is under way
        faults = machine.plan.faults
        self._longest_s = AT_ONCE_S + sum(HELD_UP_S.get(fault, 0) for fault in faults)

    def asked(self, command: AnyCommand) -> None:
        loop, daemon = self.machine.loop, self.machine.daemon
        self._asked_s[id(command)] = loop.now_s
        if isinstance(command, Claim) and command.wait_ms and daemon is not None:
            loop.call_later(LOOK_EVERY_S, self._look, daemon, command, loop.now_s, 0)

    def answered(self, command: AnyCommand) -> None:
        waited_s = self.machine.loop.now_s - self._asked_s[id(command)]
        longest_s = self._longest_s + (command.wait_ms / SECOND_MS if isinstance(command, Claim) else 0)
        late = f"{type(command).__name__} was answered after {waited_s:.1f} s"
        self.machine.watch.must(waited_s <= longest_s, "L1", late, getattr(command, "id", None))

    def forget(self, command: AnyCommand) -> None:
        """It is answered, or nobody waits any more."""
        del self._asked_s[id(command)]

    # -- claims that wait ---------------------------------------------------------------------------------------------

    def _look(self, daemon: Daemon, command: Claim, since_s: float, seen: int) -> None:
        """Whether there is work for a claim that waits, again and again until it is answered."""
        if self.machine.daemon is not daemon or not daemon.is_open or self._asked_s.get(id(command)) != since_s:
            return
        job_id = self._work_for(daemon, command)
        seen = 0 if job_id is None or self._is_held_up(daemon, since_s) else seen + 1
        late = f"a claim waits although {job_id} is due"
        self.machine.watch.must(seen < LOOKS, "L3", late, job_id)
        self.machine.loop.call_later(LOOK_EVERY_S, self._look, daemon, command, since_s, seen)

    def _work_for(self, daemon: Daemon, command: Claim) -> str | None:
        """The job that a parked claim should have got."""
        asked: Envelope | None = next(
            (asked for asked, *_ in daemon.actor.parked._all.values() if asked.call.command is command), None
        )
        if asked is None or asked.is_abandoned:
            return None
        book, now = daemon.book, self.machine.wall()
        order = due_order(book.jobs.values(), now, command.queues, command.kinds, book.paused)
        return next((job_id for job_id in order if not is_overdue(book.jobs[job_id], now)), None)

    def _is_held_up(self, daemon: Daemon, since_s: float) -> bool:
        """By the disk; or a clock was moved meanwhile, and what became due by that is noticed by the next command."""
        disk = self.machine.disk
        slow = bool(disk.full or disk.slowness_s or disk.slowed or daemon.actor.full_disk.closed != Closed.NOTHING)
        return slow or self.machine.clocks_moved_s >= since_s
