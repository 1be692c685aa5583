"""Count the workers that died and the grants, by host and version of the worker, in steps of the last ten minutes.

A stall is a death of its worker, unless an operator took the job back or a backup was restored.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from msgspec import Struct, field

from jobd.core.stats import LATELY, STEP_MS, latest
from jobd.core.worker_presence import WorkerPresence, WorkerSeen
from jobd.model.events import Event

GROUPS_KEPT: Final = 10_000
JOBS_KEPT: Final = 10_000  # that lost a worker last

Group = tuple[str, str]  # host and version; empty if the worker does not say


class WorkerLoss(NamedTuple):
    """The latest loss of a worker: its wall time, and how long the worker reported after the grant."""

    at: int
    reported_ms: int


class GroupLosses(Struct):
    """The grants and stalls of one group by step, its workers that died, and when the last did."""

    group: Group
    grants: dict[int, int] = field(default_factory=dict)
    stalls: dict[int, int] = field(default_factory=dict)
    workers: dict[str, WorkerLoss] = field(default_factory=dict)
    last_at: int = 0

    def trim(self, now: int) -> None:
        """Forget what is more than ten minutes ago, or ahead of a clock that was set back."""
        last = now // STEP_MS
        self.grants, self.stalls = latest(self.grants, last, LATELY), latest(self.stalls, last, LATELY)
        oldest_ms = (last - LATELY + 1) * STEP_MS
        self.workers = {name: loss for name, loss in self.workers.items() if oldest_ms <= loss.at <= now}


class WorkerLosses:
    """Follows commits with `note`. In memory only."""

    def __init__(self) -> None:
        self.groups: dict[Group, GroupLosses] = {}
        self.holders: OrderedDict[str, dict[str, None]] = OrderedDict()  # job -> workers that died with it
        self._dying: dict[Group, GroupLosses] = {}  # the groups with stalls in the last ten minutes

    def note(self, changes: Sequence[Event], presence: WorkerPresence) -> None:
        for event in changes:
            if event.type == "granted":
                step, losses = event.at // STEP_MS, self._of(event.by.removeprefix("worker:"), presence)
                losses.grants[step] = losses.grants.get(step, 0) + 1
                if len(losses.grants) > LATELY:
                    losses.trim(event.at)
            elif event.type == "stalled":
                self._lost(event, presence)

    def recent(self, now: int) -> Iterator[GroupLosses]:
        """Iterate over the groups with stalls in the last ten minutes."""
        for group, losses in list(self._dying.items()):
            losses.trim(now)
            if losses.stalls:
                yield losses
            else:
                del self._dying[group]

    def _lost(self, event: Event, presence: WorkerPresence) -> None:
        before, ended = event.before, None if event.after is None else event.after.ended
        if before is None or before.grant is None or ended is None or ended.rule != "recovery":
            return
        name, step = before.grant.worker, event.at // STEP_MS
        losses = self._of(name, presence)
        self._dying[losses.group] = losses
        losses.last_at = event.at
        losses.stalls[step] = losses.stalls.get(step, 0) + 1
        losses.workers[name] = WorkerLoss(event.at, max(before.updated_at - before.grant.acquired_at, 0))
        self.holders.setdefault(event.job_id, {})[name] = None
        self.holders.move_to_end(event.job_id)
        if len(self.holders) > JOBS_KEPT:
            self.holders.popitem(last=False)

    def _of(self, name: str, presence: WorkerPresence) -> GroupLosses:
        worker = presence.workers.get(name)
        group = ("", "") if worker is None else group_of(worker)
        if group not in self.groups:
            self.groups[group] = GroupLosses(group)
            if len(self.groups) > GROUPS_KEPT:
                del self.groups[next(iter(self.groups))]
        return self.groups[group]


def group_of(worker: WorkerSeen) -> Group:
    about = worker.about
    return ("", "") if about is None else (about.host or "", about.version or "")
