"""A client that contends with others: its next call, the lock that it uses, and whether it waits for the response.

All random choices come from its own generator.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any, Final

from tests.proof.linearizability.history import CallHistory, Operation, SeenResponse
from tests.proof.linearizability.model import MOVES
from tests.proof.linearizability.transport import (
    Connections,
    Exchange,
    Fate,
    Request,
    Unavailable,
    claimed,
    reduced_response,
)
from tests.support.daemon_process import DaemonProcess

READY_S: Final = 150.0
TRIES: Final = 5
ADMIN: Final = "/admin/job-management"
KEYED: Final = frozenset({"create", "start", "claim", "cancel", "force-fail", "force-reset", "transition"})
CROWD: Final = {
    "create": 8, "start": 8, "claim": 7, "claim-all": 2, "get": 6,
    "progress": 7, "extend": 2, "complete": 3, "fail": 5, "release": 5,
    "cancel": 1, "force-reset": 4, "force-fail": 1, "transition": 2, "delete": 2,
}  # fmt: skip
# Only recovery ends the grant of a silent worker.
ALONE: Final = {
    "create": 5, "start": 6, "claim": 9, "get": 3, "progress": 4, "extend": 3, "complete": 1, "fail": 1, "release": 1,
    "delete": 2,
}  # fmt: skip


class SharedContext:
    """What the clients of one history share: the daemon, the jobs, and the locks in responses so far."""

    def __init__(self, daemon: DaemonProcess, history: CallHistory, *, lossy: bool, alone: bool) -> None:
        self.daemon = daemon
        self.history = history
        self.lossy = lossy
        self.weights = ALONE if alone else CROWD
        self.faults: Counter[str] = Counter()
        self.up = threading.Event()
        self.up.set()
        self.locks: dict[str, list[str]] = {job: [] for job in history.terms}
        self._changed = threading.Condition()
        self._calls = 0

    def socket(self, admin: bool) -> str:
        return self.daemon.admin_socket if admin else self.daemon.socket

    def wait_for_calls(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._calls >= count, READY_S), "the clients are stuck"

    def note(self, operations: list[Operation]) -> None:
        """Record one call, on one job or on several."""
        with self._changed:
            self._calls += 1
            self._changed.notify_all()
            self.history.operations += operations
            for each in operations:
                if each.response is not None and each.response.code == "granted":
                    self.locks[each.job].append(each.lock)

    def count(self, fault: str) -> None:
        with self._changed:
            self.faults[fault] += 1


class ContendingClient:
    """A client. `run` makes calls, one after the other."""

    def __init__(self, context: SharedContext, number: int, dice: Random) -> None:
        self._context = context
        self._number = number
        self._dice = dice
        self._connections = Connections(context.socket)
        self._calls_made = 0
        self._endings: list[tuple[str, str, dict[str, Any]]] = []

    def run(self, calls: int) -> None:
        try:
            while self._calls_made < calls:
                self._call()
        finally:
            self._connections.close()

    def read(self, job: str) -> None:
        """Read `job` at the end, when no other call is pending."""
        self._ask("get", job, {}, fate="answered")
        self._connections.close()

    def _call(self) -> None:
        dice = self._dice
        if self._endings and dice.random() < 0.08:
            verb, job, body = dice.choice(self._endings)  # repeated, by any client
        else:
            job = dice.choice(list(self._context.history.terms))
            verb = dice.choices(list(self._context.weights), list(self._context.weights.values()))[0]
            body = self._body(verb, job)
        if "lock_id" in body and verb in ("complete", "fail", "release"):
            self._endings.append((verb, job, body))
        key = f"{job}-{self._number}-{self._calls_made}" if verb in KEYED and dice.random() < 0.6 else None
        is_lost = not self._ask(verb, job, body, key=key, fate=self._fate(verb))
        # A client usually repeats a call whose response was lost, and sometimes an answered one.
        for _ in range(3):
            if dice.random() >= (0.75 if is_lost else 0.04) or verb == "claim-all":
                return
            self._context.count("repeated")
            is_lost = not self._ask(verb, job, body, key=key, fate=self._fate(verb))

    def _fate(self, verb: str) -> Fate:
        if not self._context.lossy or self._dice.random() > 0.12:
            return "answered"
        fates: list[Fate] = ["hung up", "unread"] if verb in ("get", "delete") else ["hung up", "unread", "cut"]
        return self._dice.choice(fates)

    # -- requests --------------------------------------------------------------------------------------------------

    def _body(self, verb: str, job: str) -> dict[str, Any]:
        build: Callable[[str], dict[str, Any]] | None = {
            "create": self._creation,
            "start": self._worker,
            "claim": self._claim,
            "claim-all": self._claim_all,
            "transition": self._transition,
            "force-fail": self._operator_body,
            "force-reset": self._operator_body,
        }.get(verb)
        if build is not None:
            return build(job)
        return {} if verb in ("get", "delete", "cancel") else self._held(verb, job)

    @property
    def _unique_value(self) -> str:
        """Return a value that makes each call unique, unless it repeats another."""
        return f"c{self._number}-{self._calls_made}"

    def _creation(self, job: str) -> dict[str, Any]:
        terms = self._context.history.terms[job]
        return {
            "id": job,
            "queue": job,
            "payload": self._dice.choice(["one", "one", "one", "another"]),
            "max_attempts": terms.max_attempts,
            "progress_timeout_ms": terms.progress_timeout_ms,
            "max_stalls": 1000,
            "on_stall": terms.on_stall,
            "backoff": {"kind": "fixed", "base_ms": 0, "jitter": False},
        }

    def _worker(self, job: str) -> dict[str, Any]:
        return {"worker": self._unique_value}

    def _claim(self, job: str) -> dict[str, Any]:
        return {"worker": self._unique_value, "queues": [job], "wait_ms": self._dice.choice([0, 0, 2, 10, 30])}

    def _claim_all(self, job: str) -> dict[str, Any]:
        jobs = list(self._context.history.terms)
        return {"worker": self._unique_value, "queues": jobs, "limit": len(jobs), "wait_ms": self._dice.choice([0, 5])}

    def _operator_body(self, job: str) -> dict[str, Any]:
        return {"jobId": job, "reason": self._unique_value}

    def _transition(self, job: str) -> dict[str, Any]:
        begin = self._dice.choice(list(MOVES))
        return {**self._operator_body(job), "from": begin, "to": self._dice.choice(MOVES[begin])}

    def _held(self, verb: str, job: str) -> dict[str, Any]:
        """Return a call with the latest known lock, or sometimes with another client's or an older one."""
        locks = self._context.locks[job] or ["never-granted"]
        lock = locks[-1] if self._dice.random() < 0.7 else self._dice.choice(locks)
        body: dict[str, Any] = {"lock_id": lock}
        if verb == "progress":
            body["progress"] = self._dice.randint(0, 100)
        elif verb == "complete":
            body["metadata"] = {"by": self._unique_value}
        elif verb == "fail":
            body |= {"error_message": self._unique_value, "retry": self._dice.random() < 0.7, "retry_after_ms": 0}
        elif verb == "release":
            body["delay_ms"] = 0  # without it, the fifth release in a row without progress would delay the job
        return body

    # -- calls -------------------------------------------------------------------------------------------------------

    def _ask(self, verb: str, job: str, body: dict[str, Any], *, fate: Fate, key: str | None = None) -> bool:
        """Return whether a response came."""
        request = _request(verb, job, body, key)
        if fate == "cut":
            with suppress(Unavailable):
                self._connections.ask(request, fate)
            self._connections.close()
            self._context.count("request cut off")
            fate = "answered"
        exchange = self._exchange(request, fate)
        if exchange.reply is None:
            self._context.count(
                {"answered": "response lost with the daemon", "hung up": "disconnected"}.get(fate, "response not read")
            )
        self._calls_made += 1
        self._context.note(self._records(verb, job, request, exchange))
        return exchange.reply is not None

    def _exchange(self, request: Request, fate: Fate) -> Exchange:
        """Repeat a call until it may have had an effect. The daemon comes back after an outage."""
        for _ in range(TRIES):
            try:
                return self._connections.ask(request, fate)
            except Unavailable:
                self._connections.close()
                assert self._context.up.wait(READY_S), "the daemon does not come back"
        raise AssertionError("the daemon ended by itself")

    def _records(self, verb: str, job: str, request: Request, exchange: Exchange) -> list[Operation]:
        jobs = list(self._context.history.terms) if verb == "claim-all" else [job]
        return [self._record("claim" if verb == "claim-all" else verb, each, request, exchange) for each in jobs]

    def _record(self, verb: str, job: str, request: Request, exchange: Exchange) -> Operation:
        reply = exchange.reply
        answer: SeenResponse | None = None
        if reply is not None:
            answer = claimed(job, reply) if verb == "claim" else reduced_response(verb, reply)
        return Operation(
            client=self._number,
            verb=verb,
            job=job,
            body=request.body or {},
            call_ns=exchange.call_ns,
            return_ns=exchange.return_ns if reply is not None else None,
            response=answer,
            key=request.key,
            replayed=reply is not None and reply.headers.get("Idempotent-Replayed") == "true",
        )


def _request(verb: str, job: str, body: dict[str, Any], key: str | None) -> Request:
    if verb == "get":
        return Request("GET", f"/v1/jobs/{job}", None)
    if verb == "delete":
        return Request("DELETE", f"{ADMIN}/jobs/{job}", None, admin=True)
    if verb in ("force-fail", "force-reset", "transition"):
        return Request("POST", f"{ADMIN}/{verb}", body, admin=True, key=key)
    path = {"create": "/v1/jobs", "claim": "/v1/claim", "claim-all": "/v1/claim"}.get(verb, f"/v1/jobs/{job}/{verb}")
    return Request("POST", path, body, key=key)
