"""kill -9 under load: nothing that was acknowledged is lost, and the daemon is ready again at once."""

from __future__ import annotations

import time
from typing import Final

from tests.proof.faults.harness import Check, Counts, Trial
from tests.proof.faults.ledger import Ledger
from tests.proof.faults.load import load
from tests.proof.faults.store_check import checked_contents
from tests.support.daemon_process import DaemonProcess

READY_S: Final = 2.0
LIVE_JOBS: Final = 100_000


def _ready_again(daemon: DaemonProcess, trial: Trial) -> float:
    """Return the seconds from a start after a kill until the daemon is ready."""
    began_s = time.monotonic()
    daemon.start()
    took_s = time.monotonic() - began_s
    assert took_s <= READY_S or not trial.timed, f"ready only {took_s:.2f} s after the kill"
    return took_s


def kill_under_load(trial: Trial) -> Counts:
    ledger = Ledger()
    settled, slowest_s = 0, 0.0
    with DaemonProcess(trial.directory) as daemon:
        for number in range(trial.rounds):
            with load(daemon, ledger, f"round-{number}"):
                assert ledger.wait_for(150 + 37 * (number % 7)), daemon.log[-2000:]
                daemon.kill()
            ledger.check(checked_contents(daemon.store))
            slowest_s = max(slowest_s, _ready_again(daemon, trial))
            settled += ledger.settle(daemon)
        assert daemon.stop() == 0
    checked = ledger.check(checked_contents(daemon.store))
    return {
        "kills": trial.rounds,
        "acknowledgements checked": checked,
        "tokens": len(ledger.tokens),
        "without a response, settled by a repeat": settled,
        "ms until ready, at most": round(slowest_s * 1000),
    }


def kill_with_many_jobs(trial: Trial) -> Counts:
    ledger = Ledger()
    live = LIVE_JOBS if trial.timed else LIVE_JOBS // 10
    slowest_s = 0.0
    with DaemonProcess(trial.directory) as daemon:
        for start in range(0, live, 1000):
            jobs = [{"id": f"waiting-{number}", "queue": "waiting"} for number in range(start, start + 1000)]
            assert daemon.post("/v1/jobs/bulk", {"jobs": jobs}).status == 201
        for number in range(trial.rounds):
            with load(daemon, ledger, f"round-{number}"):
                assert ledger.wait_for(200), daemon.log[-2000:]
                daemon.kill()
            slowest_s = max(slowest_s, _ready_again(daemon, trial))
            ledger.settle(daemon)
            waiting = daemon.get("/v1/queues").data["queues"]
            counts = next(queue for queue in waiting if queue["name"] == "waiting")
            assert counts["queued"] == live, f"{live} jobs had been acknowledged: {counts}"
        assert daemon.stop() == 0
    checked = ledger.check(checked_contents(daemon.store))
    return {
        "kills": trial.rounds,
        "live jobs": live,
        "acknowledgements checked": checked + live,
        "ms until ready, at most": round(slowest_s * 1000),
    }


CHECKS = (
    Check(
        "kill-under-load",
        "kill -9 at any moment: nothing acknowledged is lost, no token is granted twice, ready again within 2 s",
        kill_under_load,
        rounds=40,
        few=3,
    ),
    Check(
        "kill-with-many-jobs",
        "the same with 100 000 live jobs",
        kill_with_many_jobs,
        rounds=5,
    ),
)
