"""The calls of clients and their responses: one record for each call on a job with bounds of the time of its effect."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, Final

from msgspec import Struct, field
from msgspec.structs import replace

GRANTING: Final = ("start", "claim")


class SeenResponse(Struct, frozen=True):
    """A response reduced to its `code` and, in `seen`, the fields of the job that it showed."""

    code: str
    seen: dict[str, Any] = {}


class Operation(Struct, frozen=True):
    """One call on one job. Times are nanoseconds since boot.

    `response` is None if the outcome is unknown: the call may have taken effect at any time until `latest_ns` (None: at
    any later time), or not at all. `key` is its Idempotency-Key. `replayed`: the response was a stored one.
    """

    client: int
    verb: str
    job: str
    body: dict[str, Any]
    call_ns: int
    return_ns: int | None = None
    response: SeenResponse | None = None
    key: str | None = None
    replayed: bool = False
    latest_ns: int | None = None

    @property
    def lock(self) -> str:
        """Return the lock that a holder's call names, or that a response granted."""
        granted = self.response.seen.get("lock") if self.response else None
        return str(self.body.get("lock_id", granted))

    @property
    def content(self) -> str:
        """Return the body without its lock. Two calls of one verb with equal content are repeats."""
        return json.dumps({name: self.body[name] for name in sorted(self.body) if name != "lock_id"})


class Terms(Struct, frozen=True):
    """The options with which a job is created. `progress_timeout_ms` 0: its locks outlive the history."""

    max_attempts: int = 1
    progress_timeout_ms: int = 0
    on_stall: str = "auto"


class Outage(Struct, frozen=True):
    """A time in which the daemon was certainly down, from `down_ns` until its start at `up_ns`."""

    down_ns: int
    up_ns: int


class CallHistory(Struct):
    """All calls of one history, on a few jobs."""

    terms: dict[str, Terms]
    operations: list[Operation] = field(default_factory=list)
    outages: list[Outage] = field(default_factory=list)

    def of(self, job: str) -> list[Operation]:
        """Return the operations on `job` in the order of the calls, one for each effect."""
        mine = [self._bounded(operation) for operation in self.operations if operation.job == job]
        by_key: dict[str, list[Operation]] = {}
        for operation in mine:
            if operation.key is not None:
                by_key.setdefault(operation.key, []).append(operation)
        settled = [operation for operation in mine if operation.key is None]
        for tries in by_key.values():
            settled += _settle(sorted(tries, key=lambda each: each.call_ns))
        settled = [operation for operation in settled if operation.response or operation.verb != "get"]
        return sorted(settled, key=lambda each: each.call_ns)

    def _bounded(self, operation: Operation) -> Operation:
        """Bound a lost call by the end of its daemon."""
        if operation.response is not None:
            return operation
        ends = (outage.down_ns for outage in self.outages if outage.down_ns > operation.call_ns)
        return replace(operation, latest_ns=min(ends, default=None))


def _settle(tries: list[Operation]) -> Iterator[Operation]:
    """Settle calls with one key: a stored response shows the outcome of a first call whose own response was lost."""
    known = [each for each in tries if each.response and not each.replayed]
    replays = sorted((each for each in tries if each.replayed), key=lambda each: each.return_ns or 0)
    unknown = [each for each in tries if each.response is None]
    # Any of the lost calls may have had the effect: each counts from the first call until the end of the last.
    ends = [each.latest_ns for each in unknown]
    latest_ns = None if None in ends else max((end for end in ends if end is not None), default=None)
    unknown = [replace(each, call_ns=unknown[0].call_ns, latest_ns=latest_ns) for each in unknown]
    for replay in replays:
        assert replay.response is not None
        original = next((each for each in known if _is_same(each, replay)), None)
        if original is None and unknown:
            lost, *unknown = unknown
            original = replace(lost, return_ns=replay.return_ns, response=_effect(replay))
            known.append(original)
        yield replace(
            replay, verb="replay", response=replay.response if original else SeenResponse("unexplained replay")
        )
    if not any(each.verb in GRANTING for each in tries):
        if any(map(_is_stored, known)):
            unknown = []  # the key names the one call that had an effect; no other had or will have one
        known = [_differs_from_stored(each, known) for each in known]
    yield from known
    yield from unknown


def _differs_from_stored(operation: Operation, known: list[Operation]) -> Operation:
    """Mark a call that was decided again after a stored response of its key was sent, which nothing explains."""
    ends = (each.return_ns for each in known if _is_stored(each) and each is not operation)
    if any(end is not None and end < operation.call_ns for end in ends):
        return replace(operation, response=SeenResponse("decided again although stored"))
    return operation


def _is_stored(operation: Operation) -> bool:
    return operation.response is not None and operation.response.code in ("created", "done")


def _is_same(first: Operation, replay: Operation) -> bool:
    if first.verb in GRANTING:
        return first.lock == replay.lock
    return first.response == replay.response


def _effect(replay: Operation) -> SeenResponse:
    """Return the effect of the first call as its repeat shows it. A repeated grant shows the job as it is then."""
    assert replay.response is not None
    if replay.verb not in GRANTING:
        return replay.response
    return SeenResponse(replay.response.code, {name: replay.response.seen[name] for name in ("lock", "token")})


def overlapping(operations: Iterable[Operation]) -> int:
    """Count the calls that overlap in time with another one on the same job. A lost call counts by its start."""
    by_job: dict[str, list[tuple[int, int]]] = {}
    for each in operations:
        by_job.setdefault(each.job, []).append((each.call_ns, each.return_ns or each.call_ns))
    count = 0
    for spans in map(sorted, by_job.values()):
        ends = [-1]  # the latest end of all that began before
        for _, end in spans:
            ends.append(max(ends[-1], end))
        for index, (begin, end) in enumerate(spans):
            next_begin = spans[index + 1][0] if index + 1 < len(spans) else end + 1
            count += ends[index] >= begin or next_begin <= end
    return count
