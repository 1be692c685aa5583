"""The life of problems: a finding opens one after a while, and it closes when it was not found for a while.

The key is the condition and the subject, so each subject has its own `since`. Boot time decides, because lock time
stands still on a full disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from heapq import heappush, heappushpop
from typing import Final, get_args

import structlog
from msgspec import Struct
from msgspec.structs import replace

from jobd.model.clocks import BootMs
from jobd.model.job import MINUTE_MS, SECOND_MS
from jobd.model.problems import Problem, Severity
from jobd.monitoring.problems.condition import Condition, Draft, Finding, problem_id, rank_of

HOLD_MS: Final = 30 * SECOND_MS  # a problem opens after its condition has held for this long
CLEAR_MS: Final = 60 * SECOND_MS  # it closes after its condition has been false for this long
CHANGES_AFTER_MS: Final = 30 * MINUTE_MS  # between two messages that a problem has become worse
SUBJECTS: Final = 100  # per condition
MOST: Final = 500
GROWN: Final = 10  # times as many jobs are a change
_WORST_FIRST: Final = get_args(Severity)

log = structlog.get_logger("jobd.problems")


class _Track(Struct):
    """A finding that may become a problem, or one that is open. `told` is what was last announced, and when."""

    condition: Condition
    problem: Problem
    first: BootMs
    seen: BootMs
    rank: tuple[int, int]
    is_open: bool = False
    changed_at: int = 0  # wall time
    told: tuple[Severity, int, BootMs] = ("notice", 0, BootMs(0))


class ProblemLife:
    """Follows the findings of evaluations with `find` and `update`. `listed`: the open problems that none hides."""

    def __init__(self, hold_ms: int = HOLD_MS, clear_ms: int = CLEAR_MS) -> None:
        self.listed: list[Problem] = []
        self.rest: dict[str, int] = {}  # condition -> subjects that are left out
        self.opened_total: Counter[tuple[str, Severity]] = Counter()
        self.closed: list[Problem] = []  # by the latest update, as `begun` are those that it listed
        self.begun: list[Problem] = []
        self.hold_ms = hold_ms
        self._clear_ms = clear_ms
        self._tracks: dict[str, _Track] = {}
        self._updated = BootMs(0)

    @property
    def opened(self) -> frozenset[str]:
        """The ids of all open problems, hidden ones too."""
        return frozenset(id_ for id_, track in self._tracks.items() if track.is_open)

    def open_problems(self) -> list[Problem]:
        """Return all open problems, hidden ones too, the worst first."""
        return [track.problem for track in self._open()]

    def _open(self) -> list[_Track]:
        return sorted((track for track in self._tracks.values() if track.is_open), key=_urgency)

    def changed_at(self, id_: str) -> int:
        """Return when an open problem last became much worse, in wall time; 0 if it did not."""
        return self._tracks[id_].changed_at

    def update(self, now: int, boot_ms: BootMs) -> bool:
        """Open and close problems, once `find` has applied the findings of all conditions.

        Return whether the list has other problems, or worse ones.
        """
        before = {each.id: each for each in self.listed}
        worse = False
        for id_, track in list(self._tracks.items()):
            is_over = track.seen != boot_ms
            if is_over and (not track.is_open or boot_ms - track.seen >= self._clear_ms):
                del self._tracks[id_]
            elif is_over:
                track.problem = replace(track.problem, over_since=track.problem.over_since or now)
            elif track.is_open:
                worse |= _becomes_worse(track, now, boot_ms)
            elif boot_ms - track.first >= self.hold_ms:
                track.is_open = True
                track.told = track.problem.severity, track.problem.jobs, boot_ms - CHANGES_AFTER_MS
        self._updated = boot_ms
        self._list()
        self.begun = [problem for problem in self.listed if before.pop(problem.id, None) is None]
        self.closed = list(before.values())
        self.opened_total.update((problem.condition, problem.severity) for problem in self.begun)
        return worse or bool(self.begun or self.closed)

    def write_log(self) -> Iterator[None]:
        """Log what the latest update opened and closed. Yields after each line."""
        for problem in self.begun:
            log.warning("problem_opened", id=problem.id, severity=problem.severity, title=problem.title)
            yield
        for problem in self.closed:
            log.info("problem_closed", id=problem.id, since=problem.since, title=problem.title)
            yield

    def find(
        self, condition: Condition, found: Iterable[Finding | Draft | None], now: int, boot_ms: BootMs
    ) -> Iterator[None]:
        """Apply all findings of one condition. Yields after each one.

        Those that are tracked already come first, so that no newcomer replaces one, and then the worst others.
        """
        tracked = {id_ for id_, track in self._tracks.items() if track.condition is condition}
        room = max(min(SUBJECTS - len(tracked), MOST - len(self._tracks)), 0)
        new: list[Draft] = []  # a heap, the least urgent first
        self.rest[condition.name] = 0
        for each in found:
            yield
            if each is None:
                continue
            draft = _draft(condition, each)
            if draft.id in tracked:
                self._note(condition, draft, now, boot_ms)
            elif len(new) < room:
                heappush(new, draft)
            else:
                heappushpop(new, draft)
                self.rest[condition.name] += 1
        for draft in sorted(new, reverse=True):
            self._note(condition, draft, now, boot_ms)
            yield

    def _note(self, condition: Condition, draft: Draft, now: int, boot_ms: BootMs) -> None:
        track = self._tracks.get(draft.id)
        problem = condition.problem(draft.id, draft.make(), now if track is None else track.problem.since)
        if track is None:
            track = self._tracks[draft.id] = _Track(condition, problem, boot_ms, boot_ms, draft.rank)
        track.problem, track.seen, track.rank = problem, boot_ms, draft.rank

    def find_again(self, condition: Condition, boot_ms: BootMs) -> None:
        """Apply the findings that one condition had at the latest update."""
        for track in self._tracks.values():
            if track.condition is condition and track.seen == self._updated:
                track.seen = boot_ms

    def _list(self) -> None:
        """List the open problems by urgency, without those that another one hides."""
        tracks = self._open()
        hidden: dict[str, list[str]] = {}  # id of the problem that hides -> ids of those that it hides
        gone: set[str] = set()
        by_queue: dict[tuple[str, str | None], list[Problem]] = {}
        for track in tracks:
            by_queue.setdefault((track.condition.name, track.problem.subject.queue), []).append(track.problem)
        for track in tracks:
            hider = track.problem
            for name in track.condition.hides:
                for other in by_queue.get((name, hider.subject.queue), ()):
                    if other.id not in gone and hider.subject.overlaps(other.subject):
                        hidden.setdefault(hider.id, []).append(other.id)
                        gone.add(other.id)
        rests = {name: count for name, count in self.rest.items() if count}
        self.listed = [
            replace(each, hides=hidden.get(each.id, []), rest=rests.pop(each.condition, 0))
            for each in (track.problem for track in tracks)
            if each.id not in gone
        ]


def _draft(condition: Condition, found: Finding | Draft) -> Draft:
    if isinstance(found, Draft):
        return found
    return Draft(rank_of(found.jobs, found.wait_ms), problem_id(condition.name, found.subject), lambda: found)


def _urgency(track: _Track) -> tuple[int, tuple[int, int], str]:
    return _WORST_FIRST.index(track.problem.severity), (-track.rank[0], -track.rank[1]), track.problem.id


def _becomes_worse(track: _Track, now: int, boot_ms: BootMs) -> bool:
    """Note a higher severity, or ten times as many jobs. At most every CHANGES_AFTER_MS."""
    severity, jobs, at = track.told
    problem = track.problem
    is_worse = _WORST_FIRST.index(problem.severity) < _WORST_FIRST.index(severity)
    if not (is_worse or problem.jobs >= GROWN * max(jobs, 1)) or boot_ms - at < CHANGES_AFTER_MS:
        return False
    track.told, track.changed_at = (problem.severity, problem.jobs, boot_ms), now
    return True
