"""A load: lifecycles of every kind from several threads, with every response recorded in a ledger."""

from __future__ import annotations

import http.client
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any, Final

from tests.proof.faults.ledger import JobRecord, Ledger, SentRequest
from tests.support.daemon_process import ApiCalls, DaemonResponse, call

CLIENTS: Final = 6
ENDINGS: Final = ("completed", "failed", "retried", "released", "cancelled", "held")


class Disconnected(Exception):
    """No response, or `outcome_unknown`. The client stops."""


class Rejected(Exception):
    """A definite error. The client continues with another job."""


class LoadClient:
    """A client with one connection. Its job ids begin with `name`, which is unique in a store."""

    endings: Sequence[str] = ENDINGS

    def __init__(self, ledger: Ledger, name: str, stop: threading.Event) -> None:
        self._ledger = ledger
        self._name = name
        self._stop = stop
        self._random = random.Random(name)

    def work(self, connect: Callable[[], http.client.HTTPConnection], lifecycles: int = 100_000) -> None:
        """Run until stopped or disconnected."""
        with closing(connect()) as connection:
            for number in range(lifecycles):
                if self._stop.is_set():
                    return
                try:
                    self._lifecycle(connection, f"{self._name}-{number}")
                except Rejected:
                    continue
                except Disconnected:
                    return

    def _lifecycle(self, connection: http.client.HTTPConnection, job_id: str) -> None:
        payload = {"n": job_id, "fill": "x" * self._random.randrange(300)}
        record = self._ledger.begin(job_id, payload)
        ending = self._random.choice(self.endings)

        def ask(event: str, verb: str, body: dict[str, Any], key: str | None = None) -> Any:
            path = f"/v1/jobs/{job_id}/{verb}" if verb else "/v1/jobs"
            return self._ask(connection, record, SentRequest(event, path, body, key))

        ask("created", "", {"id": job_id, "payload": payload, "max_attempts": 2 if ending == "retried" else 1})
        lock = {"lock_id": ask("granted", "start", {"worker": self._name}, key=f"start-{job_id}")["lock_id"]}
        for step in range(self._random.randrange(3)):
            self._print(connection, job_id, {**lock, "text": f"{step}\n" * 1000})
            ask("progress", "progress", {**lock, "progress": 10 * step + 5, "message": f"step {step}"})
        if self._random.random() < 0.3:
            ask("extended", "extend", {**lock, "additional_ms": 1_200_000})
        if ending in ("failed", "retried"):
            ask(ending, "fail", {**lock, "error_message": "it broke", "error_code": "E1"})
        elif ending == "cancelled":
            ask(ending, "cancel", {"reason": "no more"}, key=f"cancel-{job_id}")
        elif ending != "held":
            ask(ending, "complete" if ending == "completed" else "release", lock)

    def _print(self, connection: http.client.HTTPConnection, job_id: str, body: dict[str, Any]) -> None:
        """Send output. It is no state, so its loss and its errors change nothing else."""
        try:
            reply = call(connection, "POST", f"/v1/jobs/{job_id}/output", body)
        except (OSError, http.client.HTTPException) as error:
            raise Disconnected from error
        assert reply.status == 200 or reply.error != "internal", reply.body

    def _ask(self, connection: http.client.HTTPConnection, record: JobRecord, request: SentRequest) -> Any:
        record.open = request
        try:
            reply = call(connection, "POST", request.path, request.body, **request.headers)
        except (OSError, http.client.HTTPException) as error:
            raise Disconnected from error
        self._record(record, request, reply)
        return reply.data

    def _record(self, record: JobRecord, request: SentRequest, reply: DaemonResponse) -> None:
        if reply.status in (200, 201):
            self._ledger.succeeded(record, request, reply.data)
            return
        code = reply.error
        if code == "outcome_unknown":
            self._ledger.codes[code] += 1
            raise Disconnected
        assert code in ("storage_full", "overloaded", "shutting_down"), f"{request} was rejected: {reply.body}"
        self._ledger.rejected(record, request, code)
        raise Disconnected if code == "shutting_down" else Rejected


@contextmanager
def load(daemon: ApiCalls, ledger: Ledger, name: str, changes: int = 0) -> Iterator[None]:
    """Run clients while the block runs, which begins after `changes` acknowledgements. `name` is unique in a store."""
    stop = threading.Event()
    with ThreadPoolExecutor(CLIENTS) as pool:
        each = [LoadClient(ledger, f"{name}-{number}", stop) for number in range(CLIENTS)]
        done = [pool.submit(client.work, daemon.worker) for client in each]
        try:
            assert not changes or ledger.wait_for(changes), getattr(daemon, "log", "")[-2000:]
            yield
        finally:
            stop.set()
    for one in done:
        one.result()  # errors that clients found


def work_alone(daemon: ApiCalls, ledger: Ledger, name: str, lifecycles: int) -> None:
    """Run one client for this many lifecycles, or until its connection breaks. The same `name` gives the same calls."""
    LoadClient(ledger, name, threading.Event()).work(daemon.worker, lifecycles)
