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
    """The grants and stalls of one group by step, and its workers that died."""

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
    """Follows commits with `note`. In memory only. `dying` are the groups with stalls in the last ten minutes."""

    def __init__(self, presence: WorkerPresence) -> None:
        self.groups: OrderedDict[Group, GroupLosses] = OrderedDict()
        self.dying: dict[Group, None] = {}
        self.holders: OrderedDict[str, dict[str, None]] = OrderedDict()  # job -> workers that died with it
        self._presence = presence

    def note(self, changes: Sequence[Event]) -> None:
        for event in changes:
            if event.type == "granted":
                step, (_, group) = event.at // STEP_MS, self._of(event.by.removeprefix("worker:"))
                group.grants[step] = group.grants.get(step, 0) + 1
                if len(group.grants) > LATELY:
                    group.trim(event.at)
            elif event.type == "stalled":
                self._lost(event)

    def recent(self, now: int) -> Iterator[tuple[Group, GroupLosses]]:
        """Iterate over the groups with stalls in the last ten minutes."""
        for key in list(self.dying):
            if (group := self.groups.get(key)) is not None:
                group.trim(now)
                if group.stalls:
                    yield key, group
                    continue
            del self.dying[key]

    def _lost(self, event: Event) -> None:
        before, after = event.before, event.after
        if before is None or before.grant is None or after is None or after.ended is None:
            return
        if after.ended.rule != "recovery":
            return
        name, step = before.grant.worker, event.at // STEP_MS
        key, group = self._of(name)
        self.dying[key] = None
        group.stalls[step] = group.stalls.get(step, 0) + 1
        group.last_at = event.at
        group.workers[name] = WorkerLoss(event.at, max(before.updated_at - before.grant.acquired_at, 0))
        workers = self.holders.setdefault(event.job_id, {})
        workers[name] = None
        self.holders.move_to_end(event.job_id)
        if len(self.holders) > JOBS_KEPT:
            self.holders.popitem(last=False)

    def _of(self, name: str) -> tuple[Group, GroupLosses]:
        worker = self._presence.workers.get(name)
        key = ("", "") if worker is None else group_of(worker)
        group = self.groups.get(key)
        if group is None:
            group = self.groups[key] = GroupLosses()
            if len(self.groups) > GROUPS_KEPT:
                self.groups.popitem(last=False)
        return key, group


def group_of(worker: WorkerSeen) -> Group:
    about = worker.about
    return ("", "") if about is None else (about.host or "", about.version or "")
