"""The units of systemd/ under a real systemd: activation, readiness, reload, watchdog, crashes, stops, exit code 78.

machine.py starts systemd. A warning of systemd about a unit is a failure, too.
"""

from __future__ import annotations

import http.client
import shutil
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from tests.proof.faults.daemons import check_all_answered, waiting_claim
from tests.proof.faults.harness import Counts, Trial, check
from tests.proof.faults.ledger import Ledger
from tests.proof.faults.load import load
from tests.proof.faults.machine import NEEDS, SERVICE, UNITS, SystemdMachine
from tests.proof.faults.store_check import StoreContents, checked_contents
from tests.support.daemon_process import TOKEN, DaemonResponse, call
from tests.support.polling import poll_until

SOCKETS: Final = UNITS[1:]
STATE: Final = "/var/lib/private/jobd"
CONFIG: Final = "/etc/jobd/config.toml"
CLIENTS: Final = 3
MAX_DOWNTIME_S: Final = 5.0  # after a crash: the longest delay of the unit, and a start
WATCHDOG_S: Final = 2


class ConnectingClients:
    """Clients that connect repeatedly while the block runs, and the outcome of each connection."""

    def __init__(self, machine: SystemdMachine) -> None:
        self._machine = machine
        self._stop = threading.Event()
        self.outcomes: Counter[str] = Counter()
        self._threads = [threading.Thread(target=self._connect) for _ in range(CLIENTS)]

    def __enter__(self) -> ConnectingClients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _connect(self) -> None:
        while not self._stop.is_set():
            try:
                outcome = str(self._machine.get("/readyz").status)
            except (OSError, http.client.HTTPException) as error:
                outcome = type(error).__name__
            self.outcomes[outcome] += 1
            time.sleep(0.01)

    @property
    def rejected(self) -> int:
        """Return how often the socket was missing or had no listener."""
        return self.outcomes["FileNotFoundError"] + self.outcomes["ConnectionRefusedError"]

    def wait_for_more(self, count: int) -> None:
        """Wait until this many more have connected, with any result."""
        least = self.outcomes.total() + count
        poll_until(lambda: self.outcomes.total() >= least)


def _check_copy(machine: SystemdMachine, copy: Path) -> StoreContents:
    """Check a copy of the store of a stopped daemon: SQLite cannot open files in another mount namespace."""
    shutil.copytree(machine.path(STATE), copy)
    return checked_contents(copy / "jobd.db")


def _is_stopped(machine: SystemdMachine) -> bool:
    return all(machine.show(unit, "ActiveState") == "inactive" for unit in UNITS)


def _ttl_ms(machine: SystemdMachine, job_id: str) -> int:
    assert machine.post("/v1/jobs", {"id": job_id, "queue": "reload"}).status == 201
    ttl_ms: int = machine.post(f"/v1/jobs/{job_id}/start", {"worker": "w"}).data["ttl_ms"]
    return ttl_ms


@check(rounds=4, needs=NEEDS)
def systemd_start(trial: Trial) -> Counts:
    """Started by its first client, ready when systemd says so, sockets stay open at a restart, down when stopped."""
    counts: Counter[str] = Counter()
    for number in range(trial.rounds):
        unix_only = number % 2 == 1
        directory = trial.directory / str(number)
        directory.mkdir()
        with SystemdMachine(directory, unix_only=unix_only) as machine:
            machine.run_checked("systemctl", "start", *SOCKETS)
            assert machine.show(SERVICE, "ActiveState") == "inactive"
            assert machine.get("/readyz").status == 200, "the first client has to start the daemon"
            machine.wait_until_ready()
            counts["started by a client"] += 1
            assert machine.post("/v1/jobs", {"id": "a"}).status == 201
            with ConnectingClients(machine) as clients:
                _check_restarts(machine, clients)
                counts["clients during restarts"] += clients.outcomes.total()
                _check_stays_down(machine, clients)
            machine.run_checked("systemctl", "start", *SOCKETS)
            assert _stats(machine, unix_only)["totalJobs"] == 1, "the first operator has to start the daemon"
            machine.wait_until_ready()
            counts["started by an operator"] += 1
            ids = _check_reloads(machine)
            counts["reloads"] += 2
            machine.run_checked("systemctl", "stop", *UNITS)
            assert list(_check_copy(machine, directory / "copy").jobs) == ["a", *ids]
    return {**counts}


def _check_restarts(machine: SystemdMachine, clients: ConnectingClients) -> None:
    """Check that the daemon is ready when systemctl returns, and that clients could always connect."""
    for _ in range(2):
        clients.wait_for_more(5)
        machine.run_checked("systemctl", "restart", SERVICE)
        assert machine.show(SERVICE, "ActiveState") == "active"
        assert machine.log.splitlines()[-1].count(" event=") == 1
        assert machine.get("/readyz").status == 200
    assert clients.rejected == 0, f"sockets were lost at a restart: {clients.outcomes}"
    assert machine.get("/v1/jobs/a").data["status"] == "queued"


def _check_stays_down(machine: SystemdMachine, clients: ConnectingClients) -> None:
    """Check that after a stop with its sockets clients do not start it, and that a start brings the sockets back."""
    machine.run_checked("systemctl", "stop", *UNITS)
    clients.wait_for_more(20)
    assert _is_stopped(machine), f"the daemon was started by a client\n{machine.console[-2000:]}"
    machine.run_checked("systemctl", "start", SERVICE)
    assert machine.get("/v1/jobs/a").data["status"] == "queued"
    machine.run_checked("systemctl", "stop", *UNITS)


def _stats(machine: SystemdMachine, unix_only: bool) -> dict[str, Any]:
    if unix_only:
        found: dict[str, Any] = machine.admin("GET", "stats").data
        return found
    with closing(machine.admin_port()) as connection:
        who = {"Authorization": f"Bearer {TOKEN}"}
        found = call(connection, "GET", "/admin/job-management/stats", **who).data
        return found


def _check_reloads(machine: SystemdMachine) -> list[str]:
    """Check that a reload is in force when systemctl returns, and that an invalid one changes nothing."""
    machine.path(CONFIG).write_text("[locks]\nttl = '5m'\n", encoding="utf-8")
    machine.run_checked("systemctl", "reload", SERVICE)
    assert _ttl_ms(machine, "b") == 300_000
    machine.path(CONFIG).write_text("[locks]\nttl = 'soon'\n", encoding="utf-8")
    machine.run_checked("systemctl", "reload", SERVICE)
    poll_until(lambda: "reload_failed" in machine.log)
    assert _ttl_ms(machine, "c") == 300_000
    machine.path(CONFIG).unlink()
    return ["b", "c"]


# -- crashes ----------------------------------------------------------------------------------------------------------


@check(rounds=10, needs=NEEDS)
def systemd_deaths(trial: Trial) -> Counts:
    """Killed ten times in a row, or hung: up again within seconds each time, clients can always connect."""
    slowest_s, hung_s = 0.0, 0.0
    with SystemdMachine(trial.directory) as machine:
        machine.drop_in(f"[Service]\nWatchdogSec={WATCHDOG_S}s\n")
        machine.run_checked("systemctl", "start", SERVICE)
        assert machine.post("/v1/jobs", {"id": "a"}).status == 201
        lock = {"lock_id": machine.post("/v1/jobs/a/start", {"worker": "w"}).data["lock_id"]}
        with ConnectingClients(machine) as clients:
            for number in range(trial.rounds):
                slowest_s = max(slowest_s, _downtime_s(machine, "KILL"))
                assert machine.post("/v1/jobs/a/progress", {**lock, "progress": number}).status == 200
            assert slowest_s <= MAX_DOWNTIME_S or not trial.timed, f"{slowest_s:.1f} s after a kill"
            hung_s = _downtime_s(machine, "STOP")
            assert "Watchdog timeout" in machine.console
            assert machine.post("/v1/jobs/a/complete", lock).status == 200
        assert hung_s <= 2 * WATCHDOG_S + MAX_DOWNTIME_S or not trial.timed, f"{hung_s:.1f} s after it hung"
        assert int(machine.show(SERVICE, "NRestarts")) == trial.rounds + 1
        assert clients.rejected == 0, f"sockets were lost: {clients.outcomes}"
        machine.run_checked("systemctl", "stop", *UNITS)
        store = _check_copy(machine, trial.directory / "copy")
        assert store.jobs["a"].status == "completed"
    return {
        "kills": trial.rounds,
        "ms until it was ready, at most": round(slowest_s * 1000),
        f"ms from a hang to readiness (watchdog {WATCHDOG_S} s)": round(hung_s * 1000),
        "clients during these": clients.outcomes.total(),
    }


def _downtime_s(machine: SystemdMachine, signal_name: str) -> float:
    pid = machine.show(SERVICE, "MainPID")
    began_s = time.monotonic()
    machine.run_checked("kill", f"-{signal_name}", pid)
    machine.wait_until_ready(pid)
    assert machine.get("/readyz").status == 200
    return time.monotonic() - began_s


# -- stops -------------------------------------------------------------------------------------------------------------


@check(rounds=10, needs=NEEDS)
def systemd_stop(trial: Trial) -> Counts:
    """systemctl stop with requests in flight: all are answered, nothing else is done, success."""
    ledger = Ledger()
    with SystemdMachine(trial.directory) as machine:
        for number in range(trial.rounds):
            machine.run_checked("systemctl", "start", SERVICE)
            ledger.settle(machine)
            waiting = waiting_claim(machine)
            with load(machine, ledger, f"round-{number}", 150):
                machine.run_checked("systemctl", "stop", *UNITS)
            with closing(waiting):
                assert DaemonResponse(waiting.getresponse()).data == {"grants": []}
            assert machine.show(SERVICE, "Result") == "success"
            assert machine.show(SERVICE, "ExecMainStatus") == "0"
            store = _check_copy(machine, trial.directory / f"copy-{number}")
            checked = ledger.check(store)
            check_all_answered(ledger, store)
    return {"stops": trial.rounds, "acknowledgements checked": checked}


@check(rounds=3, needs=NEEDS)
def systemd_misconfigured(trial: Trial) -> Counts:
    """Exit 78 is retried only for connecting clients, every two seconds; the daemon starts once it is fixed."""
    by_clients = 0
    with SystemdMachine(trial.directory) as machine:
        for _ in range(trial.rounds):
            machine.path(CONFIG).write_text("[locks]\nttl = 15\n", encoding="utf-8")
            assert machine.run("systemctl", "start", SERVICE).returncode != 0
            assert machine.show(SERVICE, "ExecMainStatus") == "78"
            time.sleep(0.5)  # several times RestartSec
            assert machine.show(SERVICE, "NRestarts") == "0"
            assert machine.show(SERVICE, "ActiveState") == "failed", "it was started again"
            assert "locks.ttl" in machine.log.splitlines()[-1]
            by_clients += _count_client_starts(machine, 12.0 if trial.timed else 5.0)
            assert machine.get("/readyz").status == 200
            machine.run_checked("systemctl", "stop", *UNITS)
    return {"failed starts": trial.rounds, "starts by waiting clients": by_clients}


def _count_client_starts(machine: SystemdMachine, seconds: float) -> int:
    """Count the starts that clients cause in this time, or until the first one. Check that the socket stays open."""
    before, began_s, starts = machine.log.count("locks.ttl"), time.monotonic(), 0
    with ConnectingClients(machine):
        while (took_s := time.monotonic() - began_s) < seconds or not starts:
            time.sleep(0.1)
            starts = machine.log.count("locks.ttl") - before
        assert machine.show(SOCKETS[0], "ActiveState") != "failed"
        machine.path(CONFIG).write_text("", encoding="utf-8")  # fixed: the next client starts it
    assert starts <= took_s / 2 + 1, f"{starts} starts in {took_s:.0f} s"
    return starts
