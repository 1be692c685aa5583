"""The sequential specification of one job, written from the documented contract.

It shares no code with jobd's rules, so that it does not repeat their errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from tests.proof.linearizability.history import GRANTING, Operation, Outage, Terms

NEVER: Final = 1 << 80
MS: Final = 1_000_000
ROUNDING: Final = 2 * MS  # the daemon counts whole milliseconds
GRACE: Final = 30_000 * MS  # after a start, no lock of a processing job ends within this time
STALLED: Final = "(stalled)"
FINISHED: Final = ("completed", "failed", "cancelled")
MOVES: Final = {  # allowed transitions
    "queued": ("completed", "failed", "cancelled"),
    "processing": ("queued", "completed", "failed", "cancelled"),
    "failed": ("queued", "completed"),
    "cancelled": ("queued", "completed"),
}


class EndedGrant(NamedTuple):
    """The last grant that ended: by its holder (`verb` and `content`), or otherwise (`reason`)."""

    lock: str | None
    verb: str | None
    content: str
    reason: str


class ModelState(NamedTuple):
    """A job. `lock` starts with "?" if the response of the grant was lost, so that no client knows the lock.

    `key` is the key of the grant. The lock cannot have ended by itself before `safe_until` (ns). `last_token` outlives
    the job.
    """

    status: str = "absent"
    lock: str | None = None
    worker: str | None = None
    token: int | None = None
    key: str | None = None
    attempt: int = 0
    progress: int = 0
    stalls: int = 0
    error: str | None = None
    mark: str | None = None
    created_with: str = ""
    ended: EndedGrant | None = None
    safe_until: int = NEVER
    last_token: int = 0


class Expected(NamedTuple):
    """The expected response in a state, and the next state. Fields that are not in `seen` are not compared."""

    code: str
    seen: dict[str, Any]
    after: ModelState


class HistoryConditions(NamedTuple):
    """The constants of a history: the job's terms and the outages."""

    terms: Terms
    outages: tuple[Outage, ...] = ()


def step(state: ModelState, operation: Operation, world: HistoryConditions) -> ModelState | None:
    """Return the state after `operation`, or None if `state` does not explain its response. A lost call always fits."""
    expected = RULES[operation.verb](state, operation, world)
    response = operation.response
    if response is None:
        return expected.after
    if response.code != expected.code:
        return None
    for name, value in expected.seen.items():
        if (
            name in response.seen
            and response.seen[name] != value
            and not _has_cleared(name, response.seen[name], state, operation)
        ):
            return None
    return expected.after


def may_change(operation: Operation) -> bool:
    """Return whether this call, with this response, changes any state."""
    if operation.response is None:
        return True
    if operation.verb in ("get", "extend", "replay"):
        return False
    return operation.response.code in ("created", "granted", "alive", "done")


def comes_after(lost: Operation, other: Operation) -> bool:
    """Return whether a lost call can only take effect after `other`, which found no stored response of their key."""
    if lost.response is not None or lost.key is None or lost.verb in GRANTING:
        return False  # a repeat gets the response of the grant while it is current; see `_is_repeat`
    return lost.key == other.key and other.response is not None and other.verb != "replay"


def drifts(state: ModelState, operation_must_end_ns: int, world: HistoryConditions) -> Iterator[ModelState]:
    """Yield the states that time alone may cause before the next call, which ends by `operation_must_end_ns`."""
    if state.status != "processing" or state.lock is None:
        return
    if state.lock.startswith("?"):
        yield _queued(state, "undelivered", attempt=max(state.attempt - 1, 0))
    if operation_must_end_ns >= state.safe_until:
        yield _stalled(state, world.terms)


def _has_cleared(name: str, value: object, state: ModelState, operation: Operation) -> bool:
    """Return whether `value` is missing because the lock has expired. The grant stays until recovery."""
    cleared = name in ("worker", "token") and value is None and state.status == "processing"
    return cleared and (operation.return_ns or NEVER) >= state.safe_until


# -- what is shown ----------------------------------------------------------------------------------------------------


def _shown(state: ModelState) -> dict[str, Any]:
    shown = {
        "status": state.status,
        "attempt": state.attempt,
        "progress": state.progress,
        "stalls": state.stalls,
        "error": state.error,
        "mark": state.mark,
        "worker": state.worker,
        "token": state.token,
    }
    if state.token is None and state.lock is not None:
        del shown["token"]  # it was in the lost response
    return shown


def _success(after: ModelState, code: str = "done") -> Expected:
    return Expected(code, _shown(after), after)


def _error(state: ModelState, code: str, **seen: Any) -> Expected:
    return Expected(code, seen, state)


def _not_found(state: ModelState) -> Expected:
    return _error(state, "job_not_found")


# -- steps ------------------------------------------------------------------------------------------------------------


def _without_grant(state: ModelState, reason: str, verb: str | None = None, content: str = "") -> ModelState:
    ended = state.ended if state.lock is None else EndedGrant(state.lock, verb, content, reason)
    return state._replace(lock=None, worker=None, token=None, key=None, safe_until=NEVER, ended=ended)


def _queued(state: ModelState, reason: str, **fields: Any) -> ModelState:
    return _without_grant(state, reason)._replace(status="queued", progress=0, **fields)


def _stalled(state: ModelState, terms: Terms) -> ModelState:
    """Return the state after a stall: an attempt without progress does not count."""
    attempt = state.attempt if state.progress else max(state.attempt - 1, 0)
    counted = state._replace(stalls=state.stalls + 1)
    again = not state.progress or state.attempt < terms.max_attempts
    if terms.on_stall == "requeue" or (terms.on_stall == "auto" and again):
        return _queued(counted, "stalled", attempt=attempt)
    return _without_grant(counted, "stalled")._replace(status="failed", attempt=attempt, error=STALLED)


def _safe_until(operation: Operation, world: HistoryConditions) -> int:
    """Return the time until which a lock renewed by `operation` is certainly live."""
    if not world.terms.progress_timeout_ms:
        return NEVER
    until = operation.call_ns + world.terms.progress_timeout_ms * MS - ROUNDING
    for outage in world.outages:
        if operation.return_ns is not None and operation.return_ns <= outage.down_ns < until:
            until = outage.up_ns + GRACE - ROUNDING
    return until


# -- creators ---------------------------------------------------------------------------------------------------------


def _create(state: ModelState, operation: Operation, world: HistoryConditions) -> Expected:
    if state.status == "absent":
        return _success(
            ModelState(status="queued", created_with=operation.content, last_token=state.last_token), "created"
        )
    if state.created_with == operation.content:
        return _success(state, "existing")
    return _error(state, "job_exists", status=state.status)


def _get(state: ModelState, operation: Operation, world: HistoryConditions) -> Expected:
    return _not_found(state) if state.status == "absent" else _success(state)


def _cancel(state: ModelState, operation: Operation, world: HistoryConditions) -> Expected:
    if state.status == "absent":
        return _not_found(state)
    if state.status in FINISHED:
        return _error(state, "invalid_transition", status=state.status)
    return _success(_without_grant(state, "cancelled")._replace(status="cancelled"))


# -- grants -----------------------------------------------------------------------------------------------------------


def _start(state: ModelState, operation: Operation, world: HistoryConditions) -> Expected:
    if state.status == "absent":
        return _not_found(state)
    if state.status == "processing":
        if _is_repeat(state, operation):
            return _error(state, "the grant of its first call")
        return _error(state, "already_locked", worker=state.worker)
    if state.status != "queued":
        return _error(state, "invalid_transition", status=state.status)
    return _granted(state, operation, world)


def _claim(state: ModelState, operation: Operation, world: HistoryConditions) -> Expected:
    if state.status == "queued":
        return _granted(state, operation, world)
    return _error(state, "the grant of its first call" if _is_repeat(state, operation) else "nothing")


def _is_repeat(state: ModelState, operation: Operation) -> bool:
    """Return whether the current grant was made with this key, so that a repeat gets its response (`_replay`)."""
    return operation.key is not None and operation.key == state.key


def _granted(state: ModelState, operation: Operation, world: HistoryConditions) -> Expected:
    seen = operation.response.seen if operation.response else {}
    token = seen.get("token")
    if token is not None and token <= state.last_token:
        return _error(state, "a token that is greater than every earlier one")
    after = state._replace(
        status="processing",
        lock=seen.get("lock", f"?{operation.client}-{operation.call_ns}"),
        worker=operation.body["worker"],
        token=token,
        key=operation.key,
        attempt=state.attempt + 1,
        progress=0,
        safe_until=_safe_until(operation, world),
        last_token=token or state.last_token,
    )
    return _success(after, "granted")


def _replay(state: ModelState, operation: Operation, world: HistoryConditions) -> Expected:
    """Return the stored response of a repeated call; that of a grant only while the grant is current."""
    assert operation.response is not None
    if "lock" not in operation.response.seen:
        # It shows the job as it was. That response is checked at the call that got it first.
        return _error(
            state, "no such response" if operation.response.code == "unexplained replay" else operation.response.code
        )
    if state.lock != operation.lock:
        return _error(state, "no current grant")
    return _success(state, "granted")


# -- holders: the latest grant wins -----------------------------------------------------------------------------------


def _grant_error(state: ModelState, operation: Operation) -> Expected | None:
    """Return None if `operation` names the latest grant, and otherwise the expected response."""
    if state.status == "absent":
        return _not_found(state)
    if state.status == "processing" and state.lock == operation.lock:
        return None
    ended = state.ended
    if ended is None or ended.lock != operation.lock:
        return _error(state, "lock_lost", status=state.status, worker=state.worker, reason="not_current")
    if ended.verb is None:
        return _error(state, "lock_lost", status=state.status, worker=state.worker, reason=ended.reason)
    is_repeat = operation.verb == ended.verb and operation.content == ended.content
    if is_repeat or (operation.verb == "release" and ended.verb in ("complete", "fail")):
        return _success(state, "repeated")
    return _error(state, "invalid_transition", status=state.status)


def _heartbeat(state: ModelState, operation: Operation, world: HistoryConditions) -> Expected:
    error = _grant_error(state, operation)
    if error is not None:
        return error
    if operation.response and operation.response.code == "progress_timeout":
        is_past = (operation.return_ns or NEVER) >= state.safe_until
        return _error(state, "progress_timeout" if is_past else "a lock that is alive")
    if operation.verb == "extend":
        return Expected("alive", {}, state)
    safe_until = max(state.safe_until, _safe_until(operation, world))  # no deadline ever moves back
    return Expected("alive", {}, state._replace(progress=operation.body["progress"], safe_until=safe_until))


def _ending(state: ModelState, operation: Operation, world: HistoryConditions) -> Expected:
    error = _grant_error(state, operation)
    if error is not None:
        return error
    verb, body = operation.verb, operation.body
    after = _without_grant(state, verb, verb, operation.content)
    if verb == "complete":
        return _success(after._replace(status="completed", progress=100, error=None, mark=body["metadata"]["by"]))
    if verb == "release":
        return _success(after._replace(status="queued", progress=0, attempt=max(state.attempt - 1, 0)))
    after = after._replace(error=body["error_message"])
    if body["retry"] and state.attempt < world.terms.max_attempts:
        return _success(after._replace(status="queued", progress=0))
    return _success(after._replace(status="failed"))


# -- operators --------------------------------------------------------------------------------------------------------


def _forced(state: ModelState, after: ModelState) -> Expected:
    return Expected("done", {"before": state.status, "status": after.status}, after)


def _force_fail(state: ModelState, operation: Operation, world: HistoryConditions) -> Expected:
    if state.status == "absent":
        return _not_found(state)
    if state.status in FINISHED:
        return _error(state, "invalid_transition", status=state.status)
    after = _without_grant(state, "force_failed")
    return _forced(state, after._replace(status="failed", error=operation.body["reason"]))


def _force_reset(state: ModelState, operation: Operation, world: HistoryConditions) -> Expected:
    if state.status == "absent":
        return _not_found(state)
    if state.status in ("queued", "completed"):
        return _error(state, "invalid_transition", status=state.status)
    return _forced(state, _queued(state, "force_reset", attempt=0, stalls=0, error=None))


def _transition(state: ModelState, operation: Operation, world: HistoryConditions) -> Expected:
    if state.status == "absent":
        return _not_found(state)
    to = operation.body["to"]
    if state.status != operation.body["from"] or to not in MOVES.get(state.status, ()):
        return _error(state, "invalid_transition", status=state.status)
    if to == "queued":
        return _forced(state, _queued(state, "transitioned", attempt=max(state.attempt - 1, 0)))
    after = _without_grant(state, "transitioned")._replace(status=to)
    if to == "completed":
        after = after._replace(progress=100, error=None)
    if to == "failed":
        after = after._replace(error=operation.body["reason"])
    return _forced(state, after)


def _delete(state: ModelState, operation: Operation, world: HistoryConditions) -> Expected:
    if state.status == "absent":
        return _not_found(state)
    if state.status not in FINISHED:
        return _error(state, "invalid_transition", status=state.status)
    return Expected("done", _shown(state), ModelState(last_token=state.last_token))


RULES: Final[dict[str, Callable[[ModelState, Operation, HistoryConditions], Expected]]] = {
    "create": _create,
    "get": _get,
    "cancel": _cancel,
    "start": _start,
    "claim": _claim,
    "replay": _replay,
    "progress": _heartbeat,
    "extend": _heartbeat,
    "complete": _ending,
    "fail": _ending,
    "release": _ending,
    "force-fail": _force_fail,
    "force-reset": _force_reset,
    "transition": _transition,
    "delete": _delete,
}
