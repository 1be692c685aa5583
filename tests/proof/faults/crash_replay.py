"""Log every write of a daemon under load, then build and open the states that a crash could have left at any moment.

The states include more than real disks produce: any subset of the unsynced writes and of their sectors.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from jobd.model.job import TOKEN_COUNTER_BITS
from jobd.storage import store_file
from jobd.storage.offline import doctor
from jobd.storage.store import Store
from tests.proof.faults.crash_states import UNSYNCED_OUTCOMES, LoggedCall, ReplayedDisk, records
from tests.proof.faults.harness import Counts, Tool, Trial, check, program
from tests.proof.faults.ledger import Ledger
from tests.proof.faults.load import load
from tests.proof.faults.store_check import contents
from tests.support.daemon_process import DaemonProcess

COMPILER: Final = program("cc", "gcc")
HEADERS: Final = Tool("C headers", "libc6-dev", lambda: Path("/usr/include/stdio.h").exists())
SOURCE: Final = Path(__file__).with_name("writes.c")
BY_DAEMON: Final = 100  # one of this many states is tested with a daemon, all with the store


@check(rounds=2_000, few=10, needs=(COMPILER, HEADERS))
def unsynced_writes(trial: Trial) -> Counts:
    """A crash at any moment, unsynced writes dropped, partly kept or torn (512 bytes): nothing acknowledged is lost."""
    ledger = Ledger()
    log = _log_writes(trial, ledger, acknowledgements=200 if trial.timed else 40)
    states = [(cut, outcome) for cut in range(len(log) + 1) for outcome in UNSYNCED_OUTCOMES]
    chosen = sorted(random.Random(0).sample(states, min(trial.rounds, len(states))))
    counts: Counter[str] = Counter(
        {"writes and syncs logged": len(log), "acknowledged": ledger.acknowledged, "states": len(chosen)}
    )
    disk, taken = ReplayedDisk(), 0
    place = trial.directory / "state"
    place.mkdir()
    for number, (cut, outcome) in enumerate(chosen):
        for record in log[taken:cut]:
            disk.apply(record)
        taken = cut
        until_s = log[cut].time_s if cut < len(log) else float("inf")
        state = CrashState(place / "jobd.db", f"after {cut} of {len(log)} calls, unsynced ones {outcome}")
        state.write(disk.after_a_crash(outcome, f"{cut} {outcome}"))
        counts[f"with unsynced writes {outcome}"] += disk.has_unsynced()
        try:
            counts["acknowledgements checked"] += state.check(ledger, until_s, with_daemon=number % BY_DAEMON == 0)
        except AssertionError as error:
            raise AssertionError(f"{state.description}: {error}") from error
    return dict(counts)


def _log_writes(trial: Trial, ledger: Ledger, acknowledgements: int) -> list[LoggedCall]:
    """Log the writes of a store from its creation over three loads: one ends by kill -9, two by a stop."""
    library, log = trial.directory / "writes.so", trial.directory / "writes.log"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"], check=True)
    home = trial.directory / "logged"
    home.mkdir()
    environ = {"LD_PRELOAD": str(library), "WRITES_OF": str(home / "jobd.db"), "WRITES_LOG": str(log)}
    with DaemonProcess(home, variant="one_slice", **environ) as daemon:
        for number, ends_by in enumerate(("kill", "stop", "stop")):
            with load(daemon, ledger, f"load-{number}", acknowledgements):
                if ends_by == "kill":
                    daemon.kill()
            if ends_by == "stop":
                assert daemon.stop() == 0
            if number < 2:
                daemon.variant = ""
                daemon.start()
                ledger.settle(daemon)
    found = list(records(log))
    assert found, "the writes were not logged"
    return found


@dataclass(frozen=True)
class CrashState:
    """The store that a crash left at `path`, and how that state was built."""

    path: Path
    description: str

    def write(self, files: dict[str, bytes]) -> None:
        for old in self.path.parent.iterdir():
            old.unlink()
        for suffix, content in files.items():
            Path(f"{self.path}{suffix}").write_bytes(content)
            Path(f"{self.path}{suffix}").chmod(0o600)

    def check(self, ledger: Ledger, until_s: float, *, with_daemon: bool) -> int:
        """Check that the store has everything acknowledged before `until_s`."""
        path = str(self.path)
        if self.path.exists() and store_file.peek(path) != (0, 0):
            problems = doctor.check(path)
            assert not problems, f"the doctor finds {problems[:5]}"
        if with_daemon:
            with DaemonProcess(self.path.parent) as daemon:
                assert daemon.stop() == 0
        next_token = asyncio.run(_next_token(path))
        given = [token for token, at_s in ledger.granted_s.items() if at_s < until_s]
        assert next_token > max(given, default=0), f"token {next_token} would be given, and {max(given)} was"
        return ledger.check(contents(path), until_s=until_s)


async def _next_token(path: str) -> int:
    """Open the store; return the next token that it would issue."""
    store, opened = await Store.open(path)
    async with store:
        assert opened.faults == [], opened.faults
        return opened.numbers.epoch << TOKEN_COUNTER_BITS | opened.numbers.next_token
