"""Two daemons that compete for one store, socket or port, and a daemon that stops while requests are in flight."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from tests.proof.faults.harness import Counts, Trial, check, program
from tests.proof.faults.ledger import Ledger, caused_by_clients, events_pattern
from tests.proof.faults.load import load
from tests.proof.faults.store_check import StoreContents, checked_contents
from tests.support.daemon_process import ApiCalls, DaemonProcess, DaemonResponse, call, die_with_us
from tests.support.polling import poll_until

BUSY: Final = 75
RIVALS: Final = 4  # daemons that start at the same moment
WAITING_CLAIMS: Final = 8
STOPPED_S: Final = 10.0  # the longest stop if every request in flight can be answered


@contextmanager
def sigstopped(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Stop the process while the block runs."""
    process.send_signal(signal.SIGSTOP)
    try:
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def snapshot(directory: Path) -> dict[str, tuple[Any, ...]]:
    """Return everything in a directory, with contents and times."""
    return {
        path.name: (seen.st_ino, seen.st_mode, seen.st_size, seen.st_mtime_ns, path.is_file() and path.read_bytes())
        for path in directory.iterdir()
        for seen in (path.lstat(),)
    }


@check(rounds=5)
def two_daemons(trial: Trial) -> Counts:
    """A second daemon on the same store, socket or port exits with 75 and changes neither store nor socket."""
    rejected: Counter[str] = Counter()
    with DaemonProcess(_make_directory(trial, "first")) as first:
        assert first.post("/v1/jobs", {"id": "a"}).status == 201
        for number in range(trial.rounds):
            each = _contested_resources(_make_directory(trial, f"rival-{number}"), first)
            for want, second, culprit in each if trial.timed else itertools.islice(each, 3):
                with sigstopped(first.process):  # any change meanwhile is made by the second one
                    before = [snapshot(first.directory), snapshot(second.directory)]
                    code, log = second.failed_start()
                    assert code == BUSY, f"the same {want}: exit {code}\n{log}"
                    assert culprit in log, f"the same {want}: {log}"
                    after = [snapshot(first.directory), snapshot(second.directory)]
                after[1].pop(f"{second.store.name}.lock", None)  # a file for locks, not part of the store
                before[1].pop(f"{second.store.name}.lock", None)
                assert after == before, f"the same {want}: a file was changed"
                rejected[f"rejected for the same {want}"] += 1
            assert first.get("/v1/jobs/a").data["status"] == "queued"
            assert first.admin("GET", "stats").data["totalJobs"] == 1
        assert first.stop() == 0
    checked_contents(first.store)
    return {**rejected}


def _make_directory(trial: Trial, name: str) -> Path:
    directory = trial.directory / name
    directory.mkdir()
    return directory


def _contested_resources(directory: Path, first: DaemonProcess) -> Iterator[tuple[str, DaemonProcess, str]]:
    """Yield the name of each contested resource, the second daemon and its expected message.

    The store of the second daemon has a processing job.
    """
    holder = f"process {first.process.pid}"
    yield "store and sockets", DaemonProcess(directory, JOBD_STORE_PATH=str(first.store), **_sockets(first)), holder
    with DaemonProcess(directory) as early:
        assert early.post("/v1/jobs", {"id": "b"}).status == 201
        assert early.post("/v1/jobs/b/start", {"worker": "w", "lock_ttl_ms": 1000}).status == 200
        assert early.stop() == 0
    yield "worker socket", DaemonProcess(directory, JOBD_WORKER_SOCKET=first.socket), "[worker] cannot listen"
    yield (
        "admin socket",
        DaemonProcess(directory, JOBD_ADMIN_LISTEN=f"unix:{first.admin_socket}"),
        "[admin] cannot listen",
    )
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = f"127.0.0.1:{taken.getsockname()[1]}"
        advice = "Stop it, or set admin.listen to another address"
        yield "admin port", DaemonProcess(directory, JOBD_ADMIN_LISTEN=port), advice
    yield "store", DaemonProcess(directory, JOBD_STORE_PATH=str(first.store)), holder


def _sockets(daemon: DaemonProcess) -> dict[str, str]:
    return {"JOBD_WORKER_SOCKET": daemon.socket, "JOBD_ADMIN_LISTEN": f"unix:{daemon.admin_socket}"}


@check(rounds=20)
def daemons_racing(trial: Trial) -> Counts:
    """Of daemons that start at the same moment one gets the store or socket; the others exit with 75."""
    rejected = 0
    for number in range(trial.rounds):
        directory = _make_directory(trial, f"race-{number}")
        shared = {"JOBD_WORKER_SOCKET": str(directory / "worker.sock")}
        if number % 2:
            shared["JOBD_STORE_PATH"] = str(directory / "jobd.db")
        each = [DaemonProcess(_make_directory(trial, f"race-{number}-{rival}"), **shared) for rival in range(RIVALS)]
        with ExitStack() as stack, ThreadPoolExecutor(RIVALS) as pool:
            for daemon in each:
                stack.push(daemon.__exit__)
                daemon.launch()
            ready = list(pool.map(DaemonProcess.gets_ready, each))
            assert ready.count(True) == 1, f"{ready.count(True)} of {RIVALS} are ready"
            winner = each.pop(ready.index(True))
            winner.socket = shared["JOBD_WORKER_SOCKET"]
            for loser in each:
                assert loser.process.wait(150) == BUSY, loser.log.decode()
                rejected += 1
            assert winner.post("/v1/jobs", {"id": "a"}).status == 201
            assert winner.admin("GET", "jobs/a").status == 200, "the socket is another daemon's"
            assert winner.stop() == 0
        checked_contents(winner.environ["JOBD_STORE_PATH"])
    return {"races": trial.rounds, "rejected": rejected}


# -- graceful stops ---------------------------------------------------------------------------------------------------


class Claimers:
    """Workers that wait for jobs and hold them, and clients that create jobs, so that claims are answered steadily."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self._daemon = daemon
        self.tokens: set[int] = set()  # every grant that was received
        self.created: set[str] = set()
        self._lock = threading.Lock()

    def claim(self, number: int) -> None:
        with suppress(OSError, http.client.HTTPException), closing(self._daemon.worker()) as connection:
            while True:
                body = {"worker": f"c-{number}", "queues": ["claimed"], "limit": 3, "wait_ms": 60_000}
                reply = call(connection, "POST", "/v1/claim", body)
                if reply.status == 503:
                    assert reply.error == "shutting_down", reply.body
                    return
                with self._lock:
                    self.tokens |= {grant["fencing_token"] for grant in reply.data["grants"]}

    def create(self, name: str) -> None:
        with suppress(OSError, http.client.HTTPException), closing(self._daemon.worker()) as connection:
            for number in range(1_000_000):
                ids = [f"claimed-{name}-{number}-{each}" for each in range(4)]
                reply = call(
                    connection, "POST", "/v1/jobs/bulk", {"jobs": [{"id": one, "queue": "claimed"} for one in ids]}
                )
                if reply.status == 503:
                    assert reply.error == "shutting_down", reply.body
                    return
                assert reply.status == 201, reply.body
                self.created.update(ids)

    def check(self, store: StoreContents) -> int:
        """Check that every grant was received and every created job exists; return the number of grants."""
        assert self.created <= store.jobs.keys()
        mine = {token: job_id for token, job_id in store.tokens.items() if job_id.startswith("claimed-")}
        for token in mine.keys() - self.tokens:
            job = store.jobs[mine[token]]
            held = job.grant is not None and job.grant.fencing_token == token
            assert not held, f"{job.id} is held with token {token}, which no response contained"
        assert self.tokens <= mine.keys()
        return len(mine)


class HalfSentCreate:
    """A create with half of its body sent."""

    def __init__(self, daemon: DaemonProcess, job_id: str) -> None:
        self.job_id = job_id
        self._text = json.dumps({"id": job_id, "payload": "late"}).encode()
        self._connection = daemon.worker()
        self._connection.putrequest("POST", "/v1/jobs")
        self._connection.putheader("Content-Type", "application/json")
        self._connection.putheader("Content-Length", str(len(self._text)))
        self._connection.endheaders(self._text[:10])

    def send_rest(self) -> DaemonResponse:
        self._connection.send(self._text[10:])
        with closing(self._connection):
            return DaemonResponse(self._connection.getresponse())


def waiting_claim(daemon: ApiCalls) -> http.client.HTTPConnection:
    connection = daemon.worker()
    body = json.dumps({"worker": "parked", "queues": ["idle"], "wait_ms": 60_000})
    connection.request("POST", "/v1/claim", body, {"Content-Type": "application/json"})
    return connection


@contextmanager
def slow_disk(daemon: DaemonProcess, delay_ms: int) -> Iterator[None]:
    """Delay every fdatasync until the daemon ends."""
    inject = ["-e", "trace=fdatasync", "-e", f"inject=fdatasync:delay_enter={1000 * delay_ms}"]
    command = ["strace", "-f", "-q", "-o", "/dev/null", "-p", str(daemon.process.pid), *inject]
    with subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=die_with_us) as strace:
        try:
            tracer = f"TracerPid:\t{strace.pid}\n"
            while tracer not in Path(f"/proc/{daemon.process.pid}/status").read_text(encoding="utf-8"):
                assert strace.poll() is None, strace.stderr and strace.stderr.read()
            yield
        finally:
            strace.terminate()


def _rejects_connections(daemon: DaemonProcess) -> bool:
    try:
        with closing(daemon.worker()) as late:
            late.connect()
    except (FileNotFoundError, ConnectionRefusedError):
        return True
    except BlockingIOError:  # no connection was accepted for a while
        pass
    return False


@check(rounds=20, needs=(program("strace"),))
def graceful_stop(trial: Trial) -> Counts:
    """SIGTERM: listeners close, requests in flight are answered (waiting claims: no job), nothing else, exit 0."""
    ledger = Ledger()
    grants, slowest_s = 0, 0.0
    parked = f"\njobd_parked_claims {WAITING_CLAIMS}.0\n"
    with DaemonProcess(trial.directory) as daemon, ThreadPoolExecutor(WAITING_CLAIMS) as pool:
        claimers = Claimers(daemon)
        for number in range(trial.rounds):
            waiting = [waiting_claim(daemon) for _ in range(WAITING_CLAIMS)]
            poll_until(lambda: parked in daemon.admin("GET", "/metrics").body.decode())
            half = HalfSentCreate(daemon, f"half-{number}")
            with ExitStack() as stack:
                if number % 2:
                    stack.enter_context(slow_disk(daemon, 30))
                busy = [pool.submit(claimers.claim, each) for each in range(3)] + [
                    pool.submit(claimers.create, str(number))
                ]
                with load(daemon, ledger, f"round-{number}", 60):
                    began_s = time.monotonic()
                    daemon.process.send_signal(signal.SIGTERM)
                    poll_until(lambda: _rejects_connections(daemon))
                    assert daemon.process.poll() is None, "the stop did not wait for a half-sent request"
                    late = half.send_rest()
                    assert late.status == 201, late.body
                    assert daemon.process.wait(150) == 0
                    slowest_s = max(slowest_s, time.monotonic() - began_s)
                for connection in waiting:
                    with closing(connection):
                        assert DaemonResponse(connection.getresponse()).data == {"grants": []}
                for one in busy:
                    one.result()
            assert b"requests_cut_off" not in daemon.log
            store = checked_contents(daemon.store)
            assert store.payloads[half.job_id] == "late"
            ledger.check(store)
            check_all_answered(ledger, store)
            grants = claimers.check(store)
            daemon.start()
            ledger.settle(daemon)
        assert daemon.stop() == 0
    assert slowest_s <= STOPPED_S or not trial.timed, f"a stop took {slowest_s:.1f} s"
    checked = ledger.check(checked_contents(daemon.store))
    return {
        "stops": trial.rounds,
        "acknowledgements checked": checked,
        "grants by claim": grants,
        "waiting claims answered": trial.rounds * WAITING_CLAIMS,
        "ms until exit, at most": round(slowest_s * 1000),
    }


def check_all_answered(ledger: Ledger, store: StoreContents) -> None:
    """Check that a graceful stop left no change without a response."""
    for record in ledger.jobs.values():
        done = caused_by_clients(store.events.get(record.job_id, []))
        assert re.fullmatch(events_pattern(record.events), events_pattern(done)), (
            f"{record.job_id}: responses {record.events}, no response to {record.open}; the store has {done}"
        )
