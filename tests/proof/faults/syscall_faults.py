"""Inject a fault into the first, second, … last sync and write of the storage thread, with strace.

Each position and fault is a round with its own store. The position may be in the start, a commit, a checkpoint or the
stop. The system calls of SQLite are counted, not assumed.
"""

from __future__ import annotations

import http.client
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.proof.faults.harness import Counts, Trial, check
from tests.proof.faults.ledger import Ledger, SentRequest
from tests.proof.faults.load import work_alone
from tests.proof.faults.store_check import checked_contents
from tests.proof.faults.strace import STRACE, SYNCS, WRITES, Strace, TracedCall
from tests.support.daemon_process import READY, DaemonProcess

ERRORS: Final = ("EIO", "ENOSPC", "EROFS")
ALL_POSITIONS: Final = 1_000_000  # rounds: one for each position
CONFIG: Final = '[store]\ncommit = "thread"\n'  # strace counts the calls of each thread separately
LIFECYCLES: Final = 3
PAYLOAD: Final = "x" * 200_000  # 50 pages each: 1000 pages make a checkpoint
LARGE_JOBS: Final = 26
EXIT_IO: Final = 74


@dataclass(frozen=True)
class FaultPosition:
    """The `number`th call of its name, counted from one; with `on`, all later ones fail too."""

    call: str
    number: int
    error: str | None  # None: killed
    is_persistent: bool = False

    @property
    def inject(self) -> str:
        what = "signal=SIGKILL" if self.error is None else f"error={self.error}"
        return f"{self.call}:{what}:when={self.number}{'+' if self.is_persistent else ''}"


@dataclass(frozen=True)
class DaemonExit:
    """How a daemon ended. `calls` start with the one that failed."""

    daemon: DaemonProcess
    ready: bool
    code: int
    asked_to_stop_s: float
    calls: list[TracedCall]

    def description(self) -> str:
        return f"exit code {self.code} after {self.calls[:1]}:\n{self.daemon.log.decode()}"

    def no_commit_was_affected(self) -> bool:
        """Return whether the failed call was not part of a commit, as far as the trace shows."""
        hit = self.calls[0]
        if hit.file == self.daemon.directory.name:
            # SQLite ignores this error when it creates a file, so the daemon syncs once more.
            return any(seen.file == hit.file and seen.call == "fsync" and not seen.injected for seen in self.calls)
        # After a failed checkpoint the pages are still in the log, and the next checkpoint writes them.
        # The pid in the lock file is informative: the lock is held without it.
        return hit.file in ("jobd.db", "jobd.db.lock") or hit.at_s >= self.asked_to_stop_s


Work = Callable[[DaemonProcess, Ledger, str], None]


def lifecycles(daemon: DaemonProcess, ledger: Ledger, name: str) -> None:
    work_alone(daemon, ledger, name, LIFECYCLES)


def large_jobs(daemon: DaemonProcess, ledger: Ledger, name: str) -> None:
    """Create enough for a checkpoint while the daemon runs, and for another one if that fails."""
    work_alone(daemon, ledger, f"{name}-before", 1)
    for number in range(LARGE_JOBS):
        if not _create(daemon, ledger, f"{name}-large-{number}"):
            return
    work_alone(daemon, ledger, f"{name}-after", 1)


def _create(daemon: DaemonProcess, ledger: Ledger, job_id: str) -> bool:
    """Create a large job; return False if its outcome is unknown."""
    record = ledger.begin(job_id, PAYLOAD)
    record.open = request = SentRequest("created", "/v1/jobs", {"id": job_id, "payload": PAYLOAD})
    try:
        reply = daemon.post(request.path, request.body)
    except (OSError, http.client.HTTPException):
        return False
    if reply.status == 201:
        ledger.succeeded(record, request, reply.data)
    elif reply.error == "storage_full":
        ledger.rejected(record, request, reply.error)
    else:
        assert reply.error == "outcome_unknown", reply.body
        ledger.codes[reply.error] += 1
        return False
    return True


def sweep(
    trial: Trial, *, calls: tuple[str, ...], errors: tuple[str | None, ...], work: Work, at_checkpoints: bool = False
) -> Counts:
    """Test `trial.rounds` of all positions, or all if they are fewer."""
    made = _count_calls(trial, calls, work, at_checkpoints)
    pool = [
        FaultPosition(call, number, error, on)
        for call in calls
        for number in range(1, made.get(call, 0) + 1)
        for error in errors
        for on in ((False,) if error is None else (False, True))
    ]
    chosen = random.Random(0).sample(pool, min(trial.rounds, len(pool)))
    counts: Counter[str] = Counter({"points and faults": len(pool), "tried": len(chosen)})
    for number, position in enumerate(chosen):
        directory = trial.directory / f"{number}"
        directory.mkdir()
        try:
            _round(directory, position, work, at_checkpoints, counts)
        except AssertionError as error:
            raise AssertionError(f"{position}: {error}") from error
        shutil.rmtree(directory)
    assert counts["not reached"] <= len(chosen) // 4, f"too many positions were not reached: {counts}"
    return dict(counts)


def _count_calls(trial: Trial, calls: tuple[str, ...], work: Work, at_checkpoints: bool) -> dict[str, int]:
    """Return the number of calls of each name; a fixed estimate in the test suite."""
    if not trial.timed:
        return {"fdatasync": 8, "pwrite64": 100}
    return Counter(seen.call for seen in _trace_calls(trial, calls, work, at_checkpoints))


def _traced_file(directory: Path, at_checkpoints: bool) -> Path | None:
    """Return the file to restrict to: checkpoints write the database, everything else the log."""
    return directory / "jobd.db" if at_checkpoints else None


def _trace_calls(trial: Trial, calls: tuple[str, ...], work: Work, at_checkpoints: bool) -> list[TracedCall]:
    """Return the calls of a run without faults, of the thread that makes most of them."""
    directory = trial.directory / "measured"
    directory.mkdir()
    with DaemonProcess.not_started(directory, CONFIG) as daemon:
        strace = Strace(daemon, calls, only=_traced_file(directory, at_checkpoints))
        daemon.start()
        work(daemon, Ledger(), "work")
        assert daemon.stop() == 0
    found = strace.traced_calls()
    (thread, _), *_ = Counter(seen.thread for seen in found).most_common()
    shutil.rmtree(directory)
    return [seen for seen in found if seen.thread == thread]


def _round(directory: Path, position: FaultPosition, work: Work, at_checkpoints: bool, counts: Counter[str]) -> None:
    ledger = Ledger()
    with DaemonProcess.not_started(directory, CONFIG) as daemon:
        strace = Strace(daemon, (*SYNCS, *WRITES), position.inject, _traced_file(directory, at_checkpoints))
        daemon.launch()
        ready = daemon.gets_ready()
        if ready:
            work(daemon, ledger, "work")
            if position.error == "ENOSPC" and not position.is_persistent:
                _check_creates_accepted(daemon, ledger)
        asked_to_stop_s = time.time()
        code = _stop(daemon)
        calls = strace.traced_calls()
        hit = next((number for number, seen in enumerate(calls) if seen.injected), len(calls))
        ended = DaemonExit(daemon, ready, code, asked_to_stop_s, calls[hit:])
        counts[_check_exit(position, ended)] += 1
        if READY in daemon.log:
            ledger.check(checked_contents(daemon.store))
        daemon.prefix = []
        daemon.start()
        counts["without a response, settled by a repeat"] += ledger.settle(daemon)
        rejected = ledger.codes.total()
        lifecycles(daemon, ledger, "again")
        assert ledger.codes.total() == rejected, f"requests were rejected after the start: {ledger.codes}"
        assert daemon.stop() == 0
        counts["acknowledgements checked"] += ledger.check(checked_contents(daemon.store))
        counts["rejected with storage_full"] += ledger.codes["storage_full"]
        counts["with outcome unknown"] += ledger.codes["outcome_unknown"]


def _stop(daemon: DaemonProcess) -> int:
    """Stop the daemon, if it has not ended already, and return its exit code."""
    return code if (code := daemon.process.poll()) is not None else daemon.stop(signal.SIGTERM)


def _check_creates_accepted(daemon: DaemonProcess, ledger: Ledger) -> None:
    """Check that creates are accepted again without a restart after one call with a full disk."""
    if b"event=disk_full" in daemon.log:
        daemon.wait_for_log(b"event=disk_has_room")
        rejected = ledger.codes.total()
        lifecycles(daemon, ledger, "room")
        assert ledger.codes.total() == rejected, f"rejected although there is space: {ledger.codes}"


def _check_exit(position: FaultPosition, ended: DaemonExit) -> str:
    """Return the result in a word. Raise AssertionError if a promise is broken."""
    log, code, story = ended.daemon.log, ended.code, ended.description()
    no_room = position.error == "ENOSPC" and position.call in WRITES
    assert b"Traceback" not in log, story
    if position.error is None:
        assert code in (0, -signal.SIGKILL), story
        return "killed" if code else "not reached"
    if not ended.calls:
        assert code == 0, story
        return "not reached"
    if not ended.ready:
        assert code == EXIT_IO, story
        assert b"event=cannot_start" in log or b"event=stopped_by_disk" in log, story
        return "not started, exit code 74"
    if code == EXIT_IO and not no_room:
        assert b"event=stopped_by_disk" in log, story
        if b"event=commit_failed" in log:
            return "outcome unknown, exit code 74"
        assert b"event=stopping" in log, story
        return "failed after the last commit, exit code 74"
    assert code == 0, story
    if no_room:
        return "full disk, continues"
    if position.error == "ENOSPC" and b"event=reserve_file_missing" in log:
        return "no space for the reserve file, continues"
    assert ended.no_commit_was_affected(), story
    return "no commit hit, continues"


@check(rounds=ALL_POSITIONS, needs=(STRACE,))
def kill_at_each_write(trial: Trial) -> Counts:
    """kill -9 at any sync or write of the storage thread: nothing acknowledged is lost, the next start continues."""
    return sweep(trial, calls=(*SYNCS, *WRITES), errors=(None,), work=lifecycles)


@check(rounds=ALL_POSITIONS, needs=(STRACE,))
def failed_syncs(trial: Trial) -> Counts:
    """A sync fails (EIO, ENOSPC, EROFS): 503 outcome unknown, exit code 74, the next start continues."""
    return sweep(trial, calls=SYNCS, errors=ERRORS, work=lifecycles)


@check(rounds=120, needs=(STRACE,))
def failed_writes(trial: Trial) -> Counts:
    """A write fails: ENOSPC gives storage_full and the daemon continues; EIO and EROFS give exit code 74."""
    return sweep(trial, calls=WRITES, errors=ERRORS, work=lifecycles)


@check(rounds=25, needs=(STRACE,))
def failed_checkpoints(trial: Trial) -> Counts:
    """A checkpoint is killed or fails: nothing is lost, its data is still in the write-ahead log."""
    return sweep(trial, calls=(*SYNCS, *WRITES), errors=(None, *ERRORS), work=large_jobs, at_checkpoints=True)
