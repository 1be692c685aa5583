"""Mutate explained histories into ones that no order explains. Each kind of mutant breaks one guarantee.

If the checker accepts a mutant, it cannot detect that error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import permutations
from random import Random
from typing import Any, Final

from msgspec.structs import replace

from tests.proof.linearizability.history import GRANTING, Operation, SeenResponse
from tests.proof.linearizability.model import HistoryConditions

History = list[Operation]
HOLDERS: Final = ("progress", "extend", "complete", "fail", "release")
OTHER_CLIENT: Final = 99


def _accepted(operation: Operation) -> bool:
    """Return whether the daemon accepted the call from the holder, not as a repeat."""
    return operation.verb in HOLDERS and _code(operation) in ("alive", "done")


def _granted(operation: Operation) -> bool:
    return operation.verb in GRANTING and _code(operation) == "granted"


def _code(operation: Operation) -> str:
    return operation.response.code if operation.response else ""


def _seen(operation: Operation) -> dict[str, Any]:
    return operation.response.seen if operation.response else {}


def _before(first: Operation, then: Operation) -> bool:
    """Return whether another call fits between the two."""
    return first.return_ns is not None and first.return_ns + 3 < then.call_ns


def _insert(history: History, verb: str, at_ns: int, response: SeenResponse, **body: Any) -> History:
    job = history[0].job
    return [*history, Operation(OTHER_CLIENT, verb, job, body, at_ns + 1, at_ns + 2, response)]


def _swap(history: History, old: Operation, **fields: Any) -> History:
    return [replace(each, **fields) if each is old else each for each in history]


def _uses(history: History) -> Iterator[tuple[Operation, Operation]]:
    """Return pairs of a grant and a call accepted with its lock, made after the response of the grant."""
    for grant in filter(_granted, history):
        for use in filter(_accepted, history):
            if use.lock == grant.lock and _before(grant, use):
                yield grant, use


def _no_deletion(history: History, after: Operation, until_ns: int) -> bool:
    """Return whether no deletion can have happened between `after` and `until_ns`."""
    return all(
        each.call_ns > until_ns or (each.return_ns is not None and each.return_ns < after.call_ns)
        for each in history
        if each.verb == "delete"
    )


# -- the kinds of mutants ---------------------------------------------------------------------------------------------


def granted_twice(history: History, world: HistoryConditions) -> Iterator[History]:
    """The job is granted again although the next call of its holder is accepted."""
    for grant, _ in _uses(history):
        yield _insert(
            history, "start", grant.return_ns or 0, SeenResponse("granted", {"lock": "mutant"}), worker="mutant"
        )


def old_lock_accepted(history: History, world: HistoryConditions) -> Iterator[History]:
    """A call is accepted with a lock after a later grant was already answered."""
    for first, second in permutations(filter(_granted, history), 2):
        if not _before(first, second):
            continue
        for late in history:
            if late.verb in HOLDERS and late.lock == first.lock and _before(second, late) and not _accepted(late):
                code = "alive" if late.verb in ("progress", "extend") else "done"
                yield _swap(history, late, return_ns=late.return_ns or late.call_ns + 1, response=SeenResponse(code))


def completion_lost(history: History, world: HistoryConditions) -> Iterator[History]:
    """A completed job that was not deleted is queued."""
    for done in history:
        end_ns = done.return_ns or 0
        if done.verb == "complete" and _accepted(done) and _no_deletion(history, done, end_ns + 2):
            yield _insert(history, "get", end_ns, SeenResponse("done", {"status": "queued"}))


def completion_without_call(history: History, world: HistoryConditions) -> Iterator[History]:
    """A result is seen without the call that stored it."""
    for done in history:
        if done.verb != "complete" or not _accepted(done):
            continue
        rest = [each for each in history if (each.verb, each.content) != (done.verb, done.content)]
        if any(_seen(each).get("mark") == done.body["metadata"]["by"] for each in rest):
            yield rest


def before_its_grant(history: History, world: HistoryConditions) -> Iterator[History]:
    """A call is accepted before its lock was granted."""
    for grant, use in _uses(history):
        yield _swap(history, use, call_ns=grant.call_ns - 2, return_ns=grant.call_ns - 1)


def token_goes_back(history: History, world: HistoryConditions) -> Iterator[History]:
    """The later of two grants has the smaller token."""
    for first, second in permutations(filter(_granted, history), 2):
        if _before(first, second):
            one, other = _seen(first), _seen(second)
            swapped = _swap(history, first, response=SeenResponse("granted", {**one, "token": other["token"]}))
            yield _swap(swapped, second, response=SeenResponse("granted", {**other, "token": one["token"]}))


def grant_without_response(history: History, world: HistoryConditions) -> Iterator[History]:
    """A lock is accepted that no response contained."""
    for grant, _ in _uses(history):
        yield [each for each in history if each is not grant]


def recovered_too_early(history: History, world: HistoryConditions) -> Iterator[History]:
    """A holder gets the error of a stall although its lock outlives the history."""
    if not world.terms.progress_timeout_ms:
        for _, use in _uses(history):
            yield _swap(history, use, response=SeenResponse("lock_lost", {"reason": "stalled"}))


def ended_twice(history: History, world: HistoryConditions) -> Iterator[History]:
    """Two calls end one grant, and neither gets the response of a repeat."""
    ends = {each.lock for each in history if _accepted(each) and each.verb in ("complete", "fail", "release")}
    for again in history:
        if _code(again) == "repeated" and again.lock in ends:
            yield _swap(history, again, response=SeenResponse("done"))


def created_twice(history: History, world: HistoryConditions) -> Iterator[History]:
    """Two calls create the job, without a deletion between them."""
    made = [each for each in history if _code(each) == "created"]
    for again in history:
        for first in made:
            end_ns = again.return_ns or 0
            if _code(again) == "existing" and _before(first, again) and _no_deletion(history, first, end_ns):
                yield _swap(history, again, response=SeenResponse("created"))


def attempts_miscounted(history: History, world: HistoryConditions) -> Iterator[History]:
    """More attempts are seen than there were calls."""
    for read in history:
        if read.verb == "get" and _code(read) == "done":
            yield _swap(history, read, response=SeenResponse("done", {**_seen(read), "attempt": len(history) + 1}))


def two_holders_seen(history: History, world: HistoryConditions) -> Iterator[History]:
    """Another worker is seen as the holder between a grant and a call that is accepted with its lock."""
    for grant, _ in _uses(history):
        yield _insert(history, "get", grant.return_ns or 0, SeenResponse("done", {"worker": "mutant"}))


def stale_answer(history: History, world: HistoryConditions) -> Iterator[History]:
    """A read before the job was created returns what a later one showed."""
    first_ns = min((each.call_ns for each in history if each.verb == "create"), default=0)
    for read in history:
        if read.verb == "get" and _code(read) == "done":
            yield _swap(history, read, call_ns=first_ns - 2, return_ns=first_ns - 1)


KINDS: Final[dict[str, Callable[[History, HistoryConditions], Iterator[History]]]] = {
    kind.__name__: kind
    for kind in (
        granted_twice,
        old_lock_accepted,
        completion_lost,
        completion_without_call,
        before_its_grant,
        token_goes_back,
        grant_without_response,
        recovered_too_early,
        ended_twice,
        created_twice,
        attempts_miscounted,
        two_holders_seen,
        stale_answer,
    )
}


def mutants(history: History, world: HistoryConditions, dice: Random) -> Iterator[tuple[str, History]]:
    """Yield one mutant of each kind that this history allows."""
    for name, kind in KINDS.items():
        if found := list(kind(history, world)) if history else []:
            yield name, dice.choice(found)
