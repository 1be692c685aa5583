"""Every sync takes half a second: health checks stay fast, the mailbox stays bounded, and excess requests get 503.

strace delays the syncs. The load comes from one thread with many sockets, so that it does not slow itself down.
"""

from __future__ import annotations

import http.client
import json
import re
import selectors
import socket
import statistics
import time
from collections import Counter
from contextlib import closing
from typing import Any, Final

from tests.proof.faults.harness import Counts, Trial, check
from tests.proof.faults.store_check import checked_contents
from tests.proof.faults.strace import STRACE, SYNCS, Strace
from tests.support.daemon_process import DaemonProcess, DaemonResponse, call

SYNC_US: Final = 500_000
FIRST_SLOW_SYNC: Final = 12  # of each thread; about as many as the start makes
COMMITS_INLINE: Final = 'jobd_commit_mode{mode="inline"} 1'
MAILBOX: Final = 100
CREATES: Final = 400
HELD: Final = 10
ANSWERS_MS: Final = 100.0  # 19 of 20 polls, because of other processes; none waits for a sync


class PendingRequest:
    """A pending request on its own connection."""

    def __init__(self, daemon: DaemonProcess, path: str, body: dict[str, Any]) -> None:
        self.path = path
        self.reply: DaemonResponse | None = None
        self.line = socket.socket(socket.AF_UNIX)
        self.line.settimeout(60)
        self.line.connect(daemon.socket)
        text = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: jobd\r\nContent-Type: application/json\r\nContent-Length: {len(text)}"
        self.line.sendall(head.encode() + b"\r\n\r\n" + text)

    def read(self) -> DaemonResponse:
        """Read the response, which has started to arrive."""
        response = http.client.HTTPResponse(self.line)
        response.begin()
        self.reply = DaemonResponse(response)
        self.line.close()
        return self.reply


@check(rounds=10, needs=(STRACE,))
def slow_disk(trial: Trial) -> Counts:
    """Every sync takes 500 ms: /healthz within 100 ms, a bounded mailbox, 503 beyond it, running jobs can report."""
    health_times_s: list[float] = []
    outcomes: Counter[str] = Counter()
    most_waiting = 0
    made: set[str] = set()
    with DaemonProcess.not_started(trial.directory, f"[limits]\nmailbox = {MAILBOX}\n") as daemon:
        Strace(daemon, SYNCS, f"fdatasync:delay_enter={SYNC_US}:when={FIRST_SLOW_SYNC}+")
        daemon.start()
        jobs = [{"id": f"held-{number}"} for number in range(HELD)]
        assert daemon.post("/v1/jobs/bulk", {"jobs": jobs}).status == 201
        grants = daemon.post("/v1/claim", {"worker": "w", "limit": HELD}).data["grants"]
        while COMMITS_INLINE in daemon.admin("GET", "/metrics").body.decode():  # until the first slow commit
            assert daemon.post("/v1/jobs", {"queue": "new"}).status == 201
        for number in range(trial.rounds):
            pending = [
                PendingRequest(daemon, "/v1/jobs", {"id": f"round-{number}-{each}", "queue": "new"})
                for each in range(CREATES)
            ]
            for grant in grants:  # they come last, with a full mailbox
                path = f"/v1/jobs/{grant['job']['id']}/progress"
                pending.append(PendingRequest(daemon, path, {"lock_id": grant["lock_id"], "progress": number % 100}))
            most_waiting = max(most_waiting, _read_all(daemon, pending, health_times_s))
            for one in pending:
                assert one.reply is not None
                outcomes[_check_response(one, one.reply)] += 1
                if one.reply.status == 201:
                    made.add(one.reply.data["id"])
        assert daemon.stop() == 0
    stored = checked_contents(daemon.store)
    assert {job_id for job_id in stored.jobs if job_id.startswith("round")} == made, "rejected jobs exist"
    assert outcomes["overloaded"], f"the load was too small: {outcomes}"
    assert most_waiting <= MAILBOX, f"{most_waiting} commands waited"
    usual_ms, slowest_ms = statistics.quantiles(health_times_s, n=20)[-1] * 1000, max(health_times_s) * 1000
    on_time = usual_ms <= ANSWERS_MS and slowest_ms < SYNC_US / 1000
    assert on_time or not trial.timed, f"/healthz took {usual_ms:.0f} ms, and {slowest_ms:.0f} ms at most"
    return {
        "bursts of 410": trial.rounds,
        "created": outcomes["created"],
        "rejected with overloaded": outcomes["overloaded"],
        "reports of running jobs accepted": outcomes["accepted"],
        "commands waiting, at most": most_waiting,
        "requests of /healthz": len(health_times_s),
        "ms for 19 of 20 of these": round(usual_ms),
        "ms for one of these, at most": round(slowest_ms),
    }


def _check_response(request: PendingRequest, reply: DaemonResponse) -> str:
    if request.path != "/v1/jobs":
        assert reply.status == 200, f"a report of a running job was rejected: {reply.body}"
        return "accepted"
    if reply.status == 201:
        return "created"
    assert (reply.status, reply.error) == (503, "overloaded"), reply.body
    assert int(reply.headers["Retry-After"]) >= 1
    return "overloaded"


def _read_all(daemon: DaemonProcess, pending: list[PendingRequest], health_times_s: list[float]) -> int:
    """Read all responses and poll the daemon in between; return the highest number of waiting commands."""
    waiting = 0
    with selectors.DefaultSelector() as selector, closing(daemon.worker()) as connection:
        for one in pending:
            selector.register(one.line, selectors.EVENT_READ, one)
        while selector.get_map():
            began_s = time.monotonic()
            assert call(connection, "GET", "/healthz").status == 200
            health_times_s.append(time.monotonic() - began_s)
            text = daemon.admin("GET", "/metrics").body.decode()
            found = re.search(r"^jobd_mailbox_commands (\d+)", text, re.MULTILINE)
            assert found is not None
            waiting = max(waiting, int(found[1]))
            for key, _ in selector.select(0.02):
                selector.unregister(key.fileobj)
                key.data.read()
    return waiting
