"""Which jobs a worker may get, and what it is told: directives by name, and quiet rules by host, version and queue.

A directive is for the process that has the name, which keeps it. The daemon remembers it until the process obeys, so a
lost response is repeated. A quiet rule is applied by the daemon to each claim, and the worker is told once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from msgspec import UNSET

from jobd.core.state import State
from jobd.core.worker_presence import WorkerSeen
from jobd.model.commands import About, Claim
from jobd.model.events import QuietRule
from jobd.model.job import SECOND_MS
from jobd.model.responses import DirectiveView

REPEAT_MS: Final = SECOND_MS  # a worker that does not obey is told at most this often, and its claims wait in between


def open_queues(state: State, claim: Claim) -> Sequence[str]:
    """Return the queues of which `claim` may get jobs. None, if its worker is to be quiet."""
    if not claim.is_quiet and not state.quiet and not state.presence.directed:  # the common case
        return claim.queues
    seen = state.presence.workers.get(claim.worker)
    directive = None if seen is None else seen.directive
    if claim.is_quiet or (directive is not None and directive.is_quieting and not directive.is_over(claim)):
        return ()
    closed = {rule.queue for rule in _covering(state, claim.about or (None if seen is None else seen.about))}
    return () if None in closed else [queue for queue in claim.queues if queue not in closed]


def directive_for(state: State, claim: Claim, *, is_last: bool = False) -> DirectiveView | None:
    """Return what to tell the worker of `claim` now. `is_last`: its wait ends anyway."""
    if not state.quiet and not state.presence.directed:
        return None
    seen = state.presence.workers[claim.worker]  # the claim was noted
    if (directive := seen.directive) is not None and not directive.is_over(claim):
        told_at = directive.told_at
        is_due = is_last or told_at is None or state.presence.lock_ms - told_at >= REPEAT_MS
        return directive.view if is_due else None
    if state.quiet and not claim.is_quiet and not open_queues(state, claim):
        rule = next(_covering(state, claim.about or seen.about))
        return DirectiveView("quiet", rule.by, rule.reason, rule.id) if seen.told_rule != rule.id else None
    return None


def note_told(state: State, worker: str, told: DirectiveView) -> None:
    """Record that a worker is told this."""
    seen = state.presence.workers[worker]
    if told.rule is not UNSET:
        seen.told_rule = told.rule
    else:
        assert seen.directive is not None
        seen.directive.told_at = state.presence.lock_ms


def workers_of(state: State, rule: QuietRule) -> int:
    """Return how many workers that are there match a rule."""
    presence = state.presence
    return sum(
        covers(rule, seen.about)
        and (rule.queue is None or (seen.claims is not None and rule.queue in seen.claims.queues))
        and presence.state(seen) not in ("died", "gone")
        for _, seen in presence.remembered()
    )


def quiet_takers(state: State, queue: str, kind: str) -> list[tuple[str, WorkerSeen]]:
    """Return the workers that would take these jobs but are quiet."""
    presence = state.presence
    return [
        (name, seen)
        for name, seen in presence.remembered()
        if seen.is_quiet
        and seen.claims is not None
        and queue in seen.claims.queues
        and seen.claims.takes(kind)
        and presence.state(seen) not in ("died", "gone")
    ]


def _covering(state: State, about: About | None) -> Iterator[QuietRule]:
    return (rule for rule in state.quiet.values() if covers(rule, about))


def covers(rule: QuietRule, about: About | None) -> bool:
    """Return whether the host and version of a worker match a rule."""
    host, version = (None, None) if about is None else (about.host, about.version)
    return rule.host in (None, host) and rule.version in (None, version)
