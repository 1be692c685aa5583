"""Lost responses: a proxy drops them, and the daemon is killed between its commit and its response."""

from __future__ import annotations

import http.client
import itertools
import json
import re
import select
import signal
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, Final

from tests.proof.faults.daemons import slow_disk
from tests.proof.faults.harness import Counts, Trial, check, program
from tests.proof.faults.ledger import JobRecord, Ledger, SentRequest, caused_by_clients, events_pattern
from tests.proof.faults.load import CLIENTS, LoadClient, load
from tests.proof.faults.proxy import FAULTS, Proxy
from tests.proof.faults.store_check import StoreContents, checked_contents
from tests.support.daemon_process import DaemonProcess, DaemonResponse, call, die_with_us
from tests.support.polling import poll_until

CALLS: Final = itertools.count(1)
LIFECYCLES: Final = 40
NOT_IDEMPOTENT: Final = frozenset({"progress", "extended"})  # without a key, these happen again


class RetryingClient(LoadClient):
    """A client behind a proxy that repeats each request until it gets a response, and compares it with the lost one."""

    def __init__(self, ledger: Ledger, name: str, stop: threading.Event, proxy: Proxy) -> None:
        super().__init__(ledger, name, stop)
        self._proxy = proxy
        self.faults: Counter[str] = Counter()
        self.compared = 0

    def _ask(self, connection: http.client.HTTPConnection, record: JobRecord, request: SentRequest) -> Any:
        if request.event == "created":  # with a key too; its id would be enough
            request = SentRequest(request.event, request.path, request.body, f"create-{record.job_id}")
        record.open = request
        first: tuple[int, Any] | None = None
        for _ in range(50):
            fault = self._random.choice(FAULTS) if self._random.random() < 0.4 else ""
            mark = f"call-{next(CALLS)}"
            more = {"X_Fault": fault} if fault else {}
            with closing(self._proxy.connect()) as line:
                try:
                    reply = call(line, "POST", request.path, request.body, X_Call=mark, **request.headers, **more)
                except (OSError, http.client.HTTPException, ValueError):  # ValueError: half of the JSON
                    assert fault, f"{request}: no response, and no fault"
                    self.faults[fault] += 1
                    lost = self._proxy.lost.pop(mark, None)
                    self._note_lost(record, request, lost)
                    first = first or lost
                    continue
            self._compare(request, first, reply)
            self._record(record, request, reply)
            return reply.data
        raise AssertionError(f"no response in 50 tries: {request}")

    def _note_lost(self, record: JobRecord, request: SentRequest, lost: tuple[int, Any] | None) -> None:
        """Record events that may occur once more: a repeated report, a released grant."""
        if lost is not None:
            assert lost[0] in (200, 201), f"{request} was rejected: {lost}"
        if request.event in NOT_IDEMPOTENT and lost is not None:
            record.note(request.event)
            record.open = request
        elif request.event in NOT_IDEMPOTENT or (request.event == "granted" and lost is None):
            record.note_optional(request.event)

    def _compare(self, request: SentRequest, first: tuple[int, Any] | None, reply: DaemonResponse) -> None:
        if first is None or request.event in NOT_IDEMPOTENT:
            return
        self.compared += 1
        if request.key is not None:
            assert (reply.status, reply.body) == first, f"{request}: first {first}, then {reply.status} {reply.body}"
            assert reply.headers["Idempotent-Replayed"] == "true"
        else:
            assert reply.data.pop("repeated") is True
            first[1]["data"].pop("repeated", None)
            assert reply.body == first[1], f"{request}: first {first[1]}, then {reply.body}"


@check(rounds=50)
def lost_responses(trial: Trial) -> Counts:
    """Responses, requests and connections are lost: a repeat gets the first response, and the effect happens once."""
    ledger = Ledger()
    stop = threading.Event()
    with DaemonProcess(trial.directory) as daemon, Proxy(trial.directory, daemon.socket) as proxy:
        each = [RetryingClient(ledger, f"client-{number}", stop, proxy) for number in range(CLIENTS)]
        with ThreadPoolExecutor(CLIENTS) as pool:
            done = [pool.submit(client.work, daemon.worker) for client in each]
            try:
                assert ledger.wait_for(trial.rounds * LIFECYCLES), daemon.log[-2000:]
            finally:
                stop.set()
            for one in done:
                one.result()
        assert daemon.stop() == 0
    store = checked_contents(daemon.store)
    checked = ledger.check(store)
    faults = sum((client.faults for client in each), Counter[str]())
    return {
        "acknowledgements checked": checked,
        "lost responses, identical when repeated": sum(client.compared for client in each),
        "grants taken back": _released_grants(ledger, store),
        **faults,
    }


def _released_grants(ledger: Ledger, store: StoreContents) -> int:
    """Return the grants that were not received; each must have ended as undelivered at once."""
    taken_back = 0
    for events in store.events.values():
        for event, after in itertools.pairwise([*events, None]):
            if event is None or event.type != "granted":
                continue
            assert event.grant is not None
            if event.grant.fencing_token not in ledger.tokens:
                assert after is not None, f"{event.job_id} is held, but no response had the grant"
                assert after.type == "undelivered", (
                    f"{event.job_id}: after a grant that was not delivered came {after.type}"
                )
                taken_back += 1
    return taken_back


# -- grants without a waiting caller -----------------------------------------------------------------------------------


@check(rounds=50, few=2, needs=(program("strace"),))
def lost_grants(trial: Trial) -> Counts:
    """Claims whose connection was closed: their jobs have no holder and keep their position and attempt."""
    counts = Counter[str]()
    with DaemonProcess(trial.directory) as daemon, slow_disk(daemon, 20):
        for number in range(trial.rounds):
            queue = f"q-{number}"
            ids = [f"{queue}-{each}" for each in range(6)]
            jobs = [{"id": job_id, "queue": queue} for job_id in ids]
            assert daemon.post("/v1/jobs/bulk", {"jobs": jobs}).status == 201
            for each in range(3):
                _disconnect(daemon, queue, f"key-{number}-{each}" if number % 2 else None, after_s=0.012 * each)
            granted = _claim_all(daemon, queue, len(ids))
            assert list(granted) == ids, f"another order: {list(granted)}"
            for job_id, grant in granted.items():
                assert grant["job"]["attempt"] == 1, "the attempt of a lost grant was not refunded"
                events = daemon.get(f"/v1/jobs/{job_id}/timeline").data["events"]
                seen = events_pattern(event["type"] for event in events)
                assert re.fullmatch("created;(granted;(undelivered|released);)*granted;", seen), seen
                counts["grants taken back"] += seen.count("undelivered;")
                counts["others"] += 1 + seen.count("released;")
        assert daemon.stop() == 0
    assert len(checked_contents(daemon.store).tokens) == counts.total()
    return {"claims with a closed connection": 3 * trial.rounds, "grants taken back": counts["grants taken back"]}


def _disconnect(daemon: DaemonProcess, queue: str, key: str | None, after_s: float) -> None:
    body = json.dumps({"worker": "gone", "queues": [queue], "limit": 2})
    fields = {"Content-Type": "application/json"} | ({} if key is None else {"Idempotency-Key": key})
    with closing(daemon.worker()) as connection:
        connection.request("POST", "/v1/claim", body, fields)
        time.sleep(after_s)  # the fault: the caller waits this long
        if select.select([connection.sock], [], [], 0)[0]:
            # The wait took longer than intended and the response arrived, so the grant is not lost.
            for grant in json.loads(connection.getresponse().read())["data"]["grants"]:
                _release(daemon, grant)


def _claim_all(daemon: DaemonProcess, queue: str, count: int) -> dict[str, Any]:
    """Claim until all jobs of a queue come together; return all grants by job, in order."""

    def claimed() -> dict[str, Any] | None:
        grants = daemon.post("/v1/claim", {"worker": "next", "queues": [queue], "limit": count}).data["grants"]
        if len(grants) == count:
            return {grant["job"]["id"]: grant for grant in grants}
        for grant in grants:
            _release(daemon, grant)
        return None

    return poll_until(claimed) or {}


def _release(daemon: DaemonProcess, grant: dict[str, Any]) -> None:
    path = f"/v1/jobs/{grant['job']['id']}/release"
    assert daemon.post(path, {"lock_id": grant["lock_id"]}).status == 200


# -- killed between commit and reply -----------------------------------------------------------------------------------


@check(rounds=30, few=3, needs=(program("strace"),))
def killed_before_reply(trial: Trial) -> Counts:
    """kill -9 between commit and response: a repeat returns the result, and nothing is done twice."""
    ledger = Ledger()
    applied = 0
    with DaemonProcess(trial.directory) as daemon:
        for number in range(trial.rounds):
            with load(daemon, ledger, f"round-{number}", 20):
                _kill_at_write(daemon, 1 + number)
                daemon.kill()
            store = checked_contents(daemon.store)
            ledger.check(store)
            daemon.start()
            done = [record for record in ledger.jobs.values() if record.open is not None and _was_done(record, store)]
            applied += len(done)
            for record in done:
                assert record.open is not None
                if record.open.key is not None:
                    reply = daemon.post(record.open.path, record.open.body, **record.open.headers)
                    assert reply.headers["Idempotent-Replayed"] == "true", reply.body
            ledger.settle(daemon)
        assert daemon.stop() == 0
    # The write at which a round kills may be a line of the log, and then each change of the round was answered.
    assert applied, "every change was answered"
    checked = ledger.check(checked_contents(daemon.store))
    return {
        "kills": trial.rounds,
        "acknowledgements checked": checked,
        "applied without a response, confirmed by a repeat": applied,
    }


def _was_done(record: JobRecord, store: StoreContents) -> bool:
    seen = caused_by_clients(store.events.get(record.job_id, []))
    return (
        record.open is not None
        and re.fullmatch(events_pattern([*record.events, record.open.event]), events_pattern(seen)) is not None
    )


def _kill_at_write(daemon: DaemonProcess, number: int) -> None:
    """Kill the daemon at the Nth write of its event loop's thread, which sends the responses."""
    inject = ["-e", "trace=write", "-e", f"inject=write:signal=SIGKILL:when={number}"]
    command = ["strace", "-q", "-o", "/dev/null", "-p", str(daemon.process.pid), *inject]
    with subprocess.Popen(command, preexec_fn=die_with_us) as strace:
        try:
            assert daemon.process.wait(150) == -signal.SIGKILL, daemon.log[-2000:]
        finally:
            strace.terminate()
