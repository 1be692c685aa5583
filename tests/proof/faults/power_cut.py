"""A power cut under load: the file system of the store drops all writes that were not synced.

Disks that lose synced writes are not covered.
"""

from __future__ import annotations

import time
from typing import Final

from tests.proof.faults.harness import Counts, Trial, check
from tests.proof.faults.ledger import Ledger
from tests.proof.faults.load import load
from tests.proof.faults.mounts import LOOP_MOUNTS, loop_disk
from tests.proof.faults.store_check import checked_contents
from tests.support.daemon_process import DaemonProcess

DISK_BYTES: Final = 128 << 20
EXIT_IO: Final = 74


@check(rounds=40, needs=(LOOP_MOUNTS,))
def power_cut(trial: Trial) -> Counts:
    """The power is cut under load, unsynced data is gone: nothing acknowledged is lost."""
    ledger = Ledger()
    settled, forgotten, longest = 0, 0, 0
    with loop_disk(trial.directory / "disk", DISK_BYTES) as disk:
        store = disk.place / "jobd.db"
        with DaemonProcess(trial.directory, variant="one_slice", JOBD_STORE_PATH=str(store)) as daemon:
            for number in range(trial.rounds):
                with load(daemon, ledger, f"round-{number}", 150 + 37 * (number % 7)):
                    cut_s = time.monotonic()
                    disk.cut_power()
                    code = daemon.process.wait(150)
                assert code == EXIT_IO, f"exit code {code}:\n{daemon.log[-2000:].decode()}"
                daemon.kill()
                disk.unmount()
                disk.mount()
                # Responses after the cut do not count: without power they would not be sent. ext4 lets a pending
                # sync succeed although its blocks are lost.
                found = checked_contents(store)
                longest = max(longest, found.tail)
                ledger.check(found, until_s=cut_s)
                forgotten += ledger.forget_lost(found, cut_s)
                daemon.variant = "one_slice" if number % 2 else ""
                daemon.start()
                settled += ledger.settle(daemon)
            assert daemon.stop() == 0
        checked = ledger.check(checked_contents(store))
    return {
        "power cuts": trial.rounds,
        "acknowledgements checked": checked,
        "tokens": len(ledger.tokens),
        "with outcome unknown": ledger.codes["outcome_unknown"],
        "acknowledged after the cut and lost": forgotten,
        "events that the tables lacked, at most": longest,
        "without a response, settled by a repeat": settled,
    }
