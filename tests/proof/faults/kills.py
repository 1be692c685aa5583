"""kill -9 under load: nothing that was acknowledged is lost, and the daemon is ready again at once."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Final

from tests.proof.faults.harness import Counts, Trial, check
from tests.proof.faults.ledger import Ledger
from tests.proof.faults.load import load
from tests.proof.faults.store_check import checked_contents
from tests.proof.faults.strace import STRACE, SYNCS, WRITES, Strace, TracedCall
from tests.support.daemon_process import DaemonProcess

READY_S: Final = 2.0
LIVE_JOBS: Final = 100_000
INLINE: Final = '[store]\ncommit = "inline"\n'
START_WRITES: Final = 150  # of the log, by a start with a tail
LOAD_WRITES: Final = 600  # of the log, by a start and a load
APPEND_WRITES: Final = 16  # of the log in one transaction, at most; a slice makes more


def _ready_again(daemon: DaemonProcess, trial: Trial) -> float:
    """Return the seconds from a start after a kill until the daemon is ready."""
    began_s = time.monotonic()
    daemon.start()
    took_s = time.monotonic() - began_s
    assert took_s <= READY_S or not trial.timed, f"ready only {took_s:.2f} s after the kill"
    return took_s


@check(rounds=40)
def kill_under_load(trial: Trial) -> Counts:
    """kill -9 at any moment: nothing acknowledged is lost, no token is granted twice, ready again within 2 s."""
    ledger = Ledger()
    settled, slowest_s = 0, 0.0
    with DaemonProcess(trial.directory) as daemon:
        for number in range(trial.rounds):
            with load(daemon, ledger, f"round-{number}", 150 + 37 * (number % 7)):
                daemon.kill()
            ledger.check(checked_contents(daemon.store))
            slowest_s = max(slowest_s, _ready_again(daemon, trial))
            settled += ledger.settle(daemon)
        assert daemon.stop() == 0
    assert b"event=output_" not in daemon.log, "the file with the output was lost"
    checked = ledger.check(checked_contents(daemon.store))
    return {
        "kills": trial.rounds,
        "acknowledgements checked": checked,
        "tokens": len(ledger.tokens),
        "without a response, settled by a repeat": settled,
        "ms until ready, at most": round(slowest_s * 1000),
    }


@check(rounds=5)
def kill_with_many_jobs(trial: Trial) -> Counts:
    """The same with 100 000 live jobs."""
    ledger = Ledger()
    live = LIVE_JOBS if trial.timed else LIVE_JOBS // 10
    slowest_s = 0.0
    with DaemonProcess(trial.directory) as daemon:
        for start in range(0, live, 1000):
            jobs = [{"id": f"waiting-{number}", "queue": "waiting"} for number in range(start, start + 1000)]
            assert daemon.post("/v1/jobs/bulk", {"jobs": jobs}).status == 201
        for number in range(trial.rounds):
            with load(daemon, ledger, f"round-{number}", 200):
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


@check(rounds=20, needs=(STRACE,))
def kill_inside_slices(trial: Trial) -> Counts:
    """kill -9 before and inside a slice: the next start writes the tables from the journal, and nothing is lost."""
    ledger = Ledger()
    counts: Counter[str] = Counter()
    with DaemonProcess.not_started(trial.directory, INLINE) as daemon:
        for number in range(trial.rounds):
            daemon.variant, daemon.prefix = "one_slice", []
            daemon.start()
            ledger.settle(daemon)
            with load(daemon, ledger, f"tail-{number}", 150):
                daemon.kill()
            found = checked_contents(daemon.store)
            ledger.check(found)
            counts["events that the tables lacked"] += found.tail
            when = 1 + number * (LOAD_WRITES if number % 2 else START_WRITES) // trial.rounds
            daemon.variant = ""
            strace = Strace(daemon, (*SYNCS, *WRITES), f"pwrite64:signal=SIGKILL:when={when}", _log_of(daemon))
            daemon.launch()
            counts[_killed(daemon, ledger, f"round-{number}", strace)] += 1
            ledger.check(checked_contents(daemon.store))
        daemon.prefix = []
        daemon.start()
        ledger.settle(daemon)
        assert daemon.stop() == 0
    assert counts["killed in the slice of a start"], counts
    return {**counts, "acknowledgements checked": ledger.check(checked_contents(daemon.store))}


def _log_of(daemon: DaemonProcess) -> Path:
    return daemon.directory / f"{daemon.store.name}-wal"


def _killed(daemon: DaemonProcess, ledger: Ledger, name: str, strace: Strace) -> str:
    """Run a load until the daemon is killed. Return where that was."""
    if not daemon.gets_ready():
        return "killed in the slice of a start"
    with load(daemon, ledger, name):
        daemon.process.wait(150)
    *calls, last = strace.traced_calls()
    return "killed in a slice" if _transaction_writes(calls, last) > APPEND_WRITES else "killed in an append or a slice"


def _transaction_writes(calls: list[TracedCall], last: TracedCall) -> int:
    """Return the number of writes before `last` in its transaction."""
    mine = [seen.call for seen in calls if seen.thread == last.thread]
    return next((number for number, call in enumerate(reversed(mine)) if call in SYNCS), len(mine))
