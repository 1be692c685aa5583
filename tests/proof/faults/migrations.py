"""A migration that is interrupted at any of its writes, and a store of a newer version."""

from __future__ import annotations

import glob
import hashlib
import random
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Final

from jobd.storage import store_file
from jobd.storage.schema import migrations
from tests.proof.faults.harness import Counts, Trial, check
from tests.proof.faults.ledger import Ledger
from tests.proof.faults.load import load
from tests.proof.faults.store_check import checked_contents, contents
from tests.proof.faults.strace import STRACE, SYNCS, WRITES, Strace
from tests.proof.faults.syscall_faults import EXIT_IO, FaultPosition
from tests.support.daemon_process import DaemonProcess
from tests.support.daemon_variants import AHEAD

OLD: Final = migrations.VERSION
NEWER: Final = migrations.VERSION + AHEAD
ERRORS: Final = (None, "EIO", "ENOSPC")
EXIT_CONFIG: Final = 78


def _stopped_store(trial: Trial, ledger: Ledger) -> Path:
    """Make the directory of a store of this version, after a graceful stop."""
    home = trial.directory / "stopped"
    home.mkdir()
    with DaemonProcess(home) as daemon:
        with load(daemon, ledger, "load", 150 if trial.timed else 50):
            pass
        assert daemon.stop() == 0
    ledger.check(checked_contents(daemon.store))
    return home


def _copy_store(old: Path, directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for name in ("jobd.db", "jobd.db.epoch"):
        shutil.copy2(old / name, directory / name)
    return directory


@check(rounds=50, needs=(STRACE,))
def migration_cut_short(trial: Trial) -> Counts:
    """kill -9 or a failing disk at any write of a migration: the old store is unchanged, or migrated with its copy."""
    ledger = Ledger()
    old = _stopped_store(trial, ledger)
    rows = _dump(old / "jobd.db")
    positions = _fault_positions(_copy_store(old, trial.directory / "measured"))
    chosen = random.Random(0).sample(positions, min(trial.rounds, len(positions)))
    counts: Counter[str] = Counter({"points and faults": len(positions), "tried": len(chosen)})
    for position in chosen:
        home = _copy_store(old, trial.directory / "migrated")
        try:
            counts[_migrate_with_fault(home, position)] += 1
            counts[_check_store(home / "jobd.db", rows, ledger)] += 1
            _check_next_start(home, ledger)
        except AssertionError as error:
            raise AssertionError(f"{position}: {error}") from error
    return dict(counts)


def _fault_positions(home: Path) -> list[FaultPosition]:
    """Return all writes and syncs of a start that migrates and of the stop after it, with the possible faults."""
    with DaemonProcess.not_started(home, variant="next_version") as daemon:
        strace = Strace(daemon, (*SYNCS, *WRITES))
        daemon.start()
        assert daemon.stop() == 0
    found = strace.traced_calls()
    (thread, _), *_ = Counter(seen.thread for seen in found).most_common()
    made = Counter(seen.call for seen in found if seen.thread == thread)
    return [
        FaultPosition(call, number, error) for call in made for number in range(1, made[call] + 1) for error in ERRORS
    ]


def _migrate_with_fault(home: Path, position: FaultPosition) -> str:
    with DaemonProcess.not_started(home, variant="next_version") as daemon:
        Strace(daemon, (*SYNCS, *WRITES), position.inject)
        daemon.launch()
        code = daemon.stop() if daemon.gets_ready() else daemon.process.wait(150)
        assert b"Traceback" not in daemon.log, daemon.log.decode()
    if position.error is None and code == -signal.SIGKILL:
        return "killed"
    assert code in (0, EXIT_IO), f"exit code {code}:\n{daemon.log.decode()}"
    return "failed with exit code 74" if code else "without effect"


def _check_store(path: Path, rows: list[str], ledger: Ledger) -> str:
    """Check that the store is either unchanged, with `rows`, or migrated with a copy of the old one."""
    version = store_file.peek(str(path))[1]
    copies = [Path(name) for name in glob.glob(f"{path}.v{OLD}-*")]
    for copy in copies:
        assert _dump(copy) == rows, f"{copy} differs from the old store"
    if version == OLD:
        assert _dump(path) == rows, "the rows have changed"
        return "left unchanged"
    assert version == NEWER, f"there is no version {version}"
    ledger.check(contents(path))
    assert copies, "the old store was not kept"
    return "migrated"


def _dump(path: Path) -> list[str]:
    with store_file.read_only(str(path)) as conn:
        return list(conn.iterdump())


def _check_next_start(home: Path, ledger: Ledger) -> None:
    """Check that the next start finishes the migration and leaves no partial copies."""
    with DaemonProcess(home, variant="next_version") as daemon:
        assert daemon.stop() == 0
    assert store_file.peek(str(daemon.store))[1] == NEWER
    ledger.check(contents(daemon.store))
    assert not glob.glob(f"{daemon.store}.tmp-*")
    assert glob.glob(f"{daemon.store}.v{OLD}-*"), "the old store was not kept"


@check(rounds=4)
def newer_schema(trial: Trial) -> Counts:
    """A store of a newer version is rejected with exit code 78 and not changed by a byte.

    In every second round the migration is only in its log.
    """
    ledger = Ledger()
    stopped = _stopped_store(trial, ledger)
    compared = 0
    for number in range(trial.rounds):
        home = _copy_store(stopped, trial.directory / "newer")
        with DaemonProcess(home, variant="next_version") as daemon:
            if number % 2:
                daemon.kill()
            else:
                assert daemon.stop() == 0
            before = _fingerprints(home)
            daemon.variant = ""
            code, log = daemon.failed_start()
            assert code == EXIT_CONFIG, log
            assert f"has schema version {NEWER}, but this jobd supports {migrations.VERSION}" in log
        assert _fingerprints(home) == before, "the files are not as they were"
        compared += len(before)
    return {"starts rejected": trial.rounds, "files compared": compared}


def _fingerprints(home: Path) -> dict[str, str]:
    """Hash all files of the directory except sockets and the lock file, which names its holder."""
    files = [file for file in home.iterdir() if file.is_file() and file.suffix != ".lock"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
