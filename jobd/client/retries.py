"""Retries, without IO: when a call is sent again, to which node, and which error is raised if no node serves it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from jobd.client.api_request import ApiRequest
from jobd.client.endpoint import Endpoint, parse_endpoint
from jobd.client.errors import JobdError, Unreachable

# After these errors nothing has changed, or repeating the request is safe. All other errors are final.
RETRIED: Final = frozenset({"unreachable", "overloaded", "shutting_down", "not_leader", "outcome_unknown"})
# After these errors, another node may serve the request.
_OTHER_NODE_MAY_SERVE: Final = RETRIED - {"overloaded"}
# After these errors the request may have been applied, the first one more likely.
_MAYBE_APPLIED: Final = ("outcome_unknown", "unreachable")
MIN_ATTEMPT_S: Final = 3.0  # for one of several nodes; as long as the lease of a leader
MAX_WAIT_S: Final = 2.0  # between two rounds over several nodes


@dataclass(frozen=True, slots=True)
class RetryOptions:
    """When a call is retried. `total_s` limits the time of all attempts (None: no limit, 0: one attempt only).

    The delay before a retry is random between 0 and `base_s`, which doubles with each attempt up to `max_s` (full
    jitter), plus the Retry-After of the response. `timeout_s` limits the wait for one response, in addition to the time
    that the daemon may delay it. Only errors with one of `codes` are retried.

    With several nodes, an attempt is a round over the nodes, which takes at most `timeout_s` if `total_s` is less.
    """

    total_s: float | None = 30.0
    base_s: float = 0.1
    max_s: float = 5.0
    timeout_s: float = 30.0
    codes: frozenset[str] = RETRIED


class NodeList:
    """The endpoints of the nodes of one jobd, and the node that the next call tries first. Thread-safe.

    If `follows_unlisted`, a leader that is not in the list gets requests and the token, provided that a node of the
    list named it and that its URL has the same scheme as that node's.
    """

    def __init__(self, endpoints: Sequence[Endpoint], *, follows_unlisted: bool = False) -> None:
        self.endpoints: Final = tuple(endpoints)
        self.first = self.endpoints[0]
        self._follows_unlisted = follows_unlisted

    @property
    def is_single(self) -> bool:
        """Whether there is one URL. It may be that of a load balancer, so no other node is contacted."""
        return len(self.endpoints) == 1

    def after(self, failed: Endpoint) -> Endpoint:
        index = self.endpoints.index(failed) + 1 if failed in self.endpoints else 0
        return self.endpoints[index % len(self.endpoints)]

    def leader(self, url: object, source: Endpoint) -> Endpoint | None:
        """Return the endpoint for the leader's `url` in a response of `source`. None if requests may not go there.

        A leader on the host of exactly one listed URL is that URL, because nodes have a URL for each API.
        """
        try:
            named = parse_endpoint(url) if isinstance(url, str) else None
        except ValueError:
            return None
        if named is None:
            return None
        listed = [each for each in self.endpoints if str(each) == str(named)]
        listed = listed or [each for each in self.endpoints if named.path is None and each.host == named.host]
        if len(listed) == 1:
            return listed[0]
        is_trusted = self._follows_unlisted and source in self.endpoints and named.scheme == source.scheme
        return (
            replace(named, token=source.token, operator=source.operator, client=source.client) if is_trusted else None
        )


class RetryState:
    """The attempts of one call. `endpoint` is the node of the next attempt.

    `now_s` is monotonic time, `chance` is random between 0 and 1.
    """

    def __init__(self, retry: RetryOptions, request: ApiRequest[Any], nodes: NodeList, now_s: float) -> None:
        self.endpoint = nodes.first
        self.is_redirected = False  # the next attempt follows a response by which nothing has changed, without a delay
        self._retry = retry
        self._request = request
        self._nodes = nodes
        self._attempt_s = retry.timeout_s + request.wait_ms / 1000
        self._deadline_s = math.inf if retry.total_s is None else now_s + retry.total_s
        self._count = 0
        self._errors: dict[Endpoint, JobdError] = {}  # the latest of each node, latest last
        self._worst: JobdError | None = None
        self._round: set[Endpoint] = set()  # the nodes that were tried since the last delay
        self._repeated: Endpoint | None = None  # the node that was tried twice since the last delay
        self._round_ends_s = now_s + self._attempt_s

    def timeout_s(self, now_s: float) -> float:
        """Return the timeout of the next attempt.

        The deadline limits it, except for the first attempt. If there are several nodes, each gets a share of the time;
        a leader that was slow gets all that is left.
        """
        timeout_s = self._attempt_s
        if not self._nodes.is_single and self.endpoint != self._repeated:
            share_s = self._retry.timeout_s / len(self._nodes.endpoints)
            timeout_s -= self._retry.timeout_s - max(share_s, min(self._retry.timeout_s, MIN_ATTEMPT_S))
        return min(timeout_s, max(self._ends_s - now_s, 0.1))

    def served(self) -> None:
        self._nodes.first = self.endpoint

    def wait_s(self, error: JobdError, now_s: float, chance: float) -> float:
        """Return the delay before the next attempt. Raises `error`, or one that names all nodes, if there is none."""
        if error.code not in _OTHER_NODE_MAY_SERVE and error.code != "bad_response":
            self.served()
        is_safe = self._request.repeatable or error.code == "not_leader"
        if error.code not in self._retry.codes or not is_safe:
            raise error
        self._record(error)
        following = self._following(error)
        if following is not None and now_s < self._ends_s:
            self.endpoint = following
            self.is_redirected = error.code not in _MAYBE_APPLIED
            return 0.0
        wait_s = self._delay_s(error, chance)
        if now_s + wait_s >= self._deadline_s:
            raise self._final(error) if self._nodes.is_single else self._summary()
        self._count += 1
        self._round.clear()
        self._repeated = None
        self.endpoint = self._nodes.first
        self.is_redirected = False
        return wait_s

    def _record(self, error: JobdError) -> None:
        self._errors.pop(self.endpoint, None)
        self._errors[self.endpoint] = error
        if self._worst is None or _likelihood_applied(error) >= _likelihood_applied(self._worst):
            self._worst = error
        self._round.add(self.endpoint)
        if isinstance(error, Unreachable) and self._nodes.first == self.endpoint:
            self._nodes.first = self._nodes.after(self.endpoint)

    @property
    def _ends_s(self) -> float:
        """When the current round has to end. The deadline does not limit the first attempt."""
        return self._deadline_s if self._count else max(self._deadline_s, self._round_ends_s)

    def _following(self, error: JobdError) -> Endpoint | None:
        """Return the next node of this round: the leader that the response names, else one that was not tried yet."""
        if self._nodes.is_single or error.code not in _OTHER_NODE_MAY_SERVE:
            return None
        leader = self._nodes.leader(error.details.get("leader"), self.endpoint)
        if leader is not None:
            if leader not in self._round:
                return leader
            earlier = self._errors[leader]
            if self._repeated is None and isinstance(earlier, Unreachable) and earlier.is_slow:
                self._repeated = leader
                return leader
        return next((each for each in self._nodes.endpoints if each not in self._round), None)

    def _delay_s(self, error: JobdError, chance: float) -> float:
        is_single = self._nodes.is_single
        max_s = self._retry.max_s if is_single else min(self._retry.max_s, MAX_WAIT_S)
        wait_s: float = chance * min(max_s, self._retry.base_s * 2.0 ** min(self._count, 32))
        if error.retry_after_ms is not None and (is_single or error.code not in _OTHER_NODE_MAY_SERVE):
            wait_s += error.retry_after_ms / 1000
        return wait_s

    def _final(self, error: JobdError) -> JobdError:
        """Return the error of a call to a single node: `error`, unless an earlier attempt may have been applied."""
        worst = self._worst
        if worst is None or worst.code != "outcome_unknown" or error.code == worst.code:
            return error
        message = f"{worst.message.rstrip('.')}. The latest attempt: {error.message}"
        return type(worst)(message, code=worst.code, details=worst.details, status=worst.status)

    def _summary(self) -> JobdError:
        """Return the error of the call: the one after which it was most likely applied, with the outcome of each URL.

        `details["tried"]` lists the outcomes.
        """
        worst = self._worst
        assert worst is not None
        tried = [
            {"url": str(node), "error": error.code, "message": _outcome(node, error)}
            for node, error in self._errors.items()
        ]
        outcomes = "; ".join(f"{each['url']}: {each['message'].rstrip('.')}" for each in tried)
        return type(worst)(
            f"No node served the request: {outcomes}.",
            code=worst.code,
            details={**worst.details, "tried": tried},
            status=worst.status,
            retry_after_ms=worst.retry_after_ms,
        )


def _likelihood_applied(error: JobdError) -> int:
    return len(_MAYBE_APPLIED) - _MAYBE_APPLIED.index(error.code) if error.code in _MAYBE_APPLIED else 0


def _outcome(node: Endpoint, error: JobdError) -> str:
    return error.message.removeprefix(f"The daemon at {node} cannot be reached: ")
