"""A disk that fills up and gets space again while the daemon runs.

engine/disk_full.py documents what the daemon rejects at which step.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Final

from jobd.storage.files import RESERVE_FILE_BYTES
from tests.proof.faults.harness import Counts, Trial, check
from tests.proof.faults.ledger import JobRecord, Ledger, SentRequest
from tests.proof.faults.load import work_alone
from tests.proof.faults.mounts import MOUNTS, tmpfs
from tests.proof.faults.store_check import checked_contents
from tests.support.daemon_process import DaemonProcess, DaemonResponse
from tests.support.store_files import fill

FREE_BYTES: Final = 16 << 20  # the log may use 4 MiB before it is reused, and the jobs need more
HELD: Final = 12
FULL: Final = b"event=disk_full"
HAS_ROOM: Final = b"event=disk_has_room"
LEFT_BYTES: Final = 1 << 20  # appends fit, as the log already has 4 MiB; a slice with all jobs does not
JOBS: Final = 1_000
PAYLOAD: Final = "x" * 8_000
BULK: Final = 20


class RecordingClient:
    """A client that records its responses in the ledger."""

    def __init__(self, daemon: DaemonProcess, ledger: Ledger) -> None:
        self._daemon = daemon
        self._ledger = ledger

    def ask(self, event: str, record: JobRecord, verb: str, body: dict[str, Any]) -> DaemonResponse:
        path = f"/v1/jobs/{record.job_id}/{verb}" if verb else "/v1/jobs"
        record.open = request = SentRequest(event, path, body)
        reply = self._daemon.post(path, body)
        if reply.status in (200, 201):
            self._ledger.succeeded(record, request, reply.data)
        else:
            self._ledger.rejected(record, request, reply.error)
        return reply

    def create(self, job_id: str, fill: str = "") -> tuple[JobRecord, DaemonResponse]:
        payload = {"n": job_id, "fill": fill}
        record = self._ledger.begin(job_id, payload)
        return record, self.ask("created", record, "", {"id": job_id, "payload": payload})

    def create_and_start(self, job_id: str) -> tuple[JobRecord, str]:
        """Create and start a job; return it with its lock."""
        record, reply = self.create(job_id)
        assert reply.status == 201, reply.body
        reply = self.ask("granted", record, "start", {"worker": "w"})
        return record, reply.data["lock_id"]


@check(rounds=10, needs=(MOUNTS,))
def full_disk(trial: Trial) -> Counts:
    """Creates get storage_full, running jobs can end; when there is space, all continues without a restart."""
    ledger = Ledger()
    endings = 0
    with tmpfs(trial.directory / "disk", RESERVE_FILE_BYTES + FREE_BYTES) as place:
        store = place / "jobd.db"
        with DaemonProcess(trial.directory, JOBD_STORE_PATH=str(store)) as daemon:
            for number in range(trial.rounds):
                endings += _fill_and_free(daemon, ledger, place, f"round-{number}")
            assert daemon.stop() == 0
        checked = ledger.check(checked_contents(store))
    return {
        "times full": trial.rounds,
        "rejected with storage_full": ledger.codes["storage_full"],
        "jobs ended on the full disk": endings,
        "acknowledgements checked": checked,
    }


def _fill_and_free(daemon: DaemonProcess, ledger: Ledger, directory: Path, name: str) -> int:
    """Fill the disk, then free it; return how many jobs ended in between."""
    caller = RecordingClient(daemon, ledger)
    held = [caller.create_and_start(f"{name}-held-{number}") for number in range(HELD)]
    filler = fill(directory)
    created, extended = 0, 0
    # A log that was longer before accepts more writes without new space.
    while (reply := caller.create(f"{name}-new-{created}")[1]).status == 201:
        created += 1
    assert (reply.status, reply.error) == (507, "storage_full"), reply.body
    assert "rejected=creates" in daemon.wait_for_log(FULL)
    record, lock = held[0]
    while (
        reply := caller.ask("extended", record, "extend", {"lock_id": lock, "additional_ms": 900_000})
    ).status == 200:
        extended += 1
    assert reply.error == "storage_full", reply.body
    assert "rejected=all_but_endings" in daemon.wait_for_log(FULL)
    assert not Path(f"{directory}/jobd.db.ballast").exists()
    assert daemon.get(f"/v1/jobs/{record.job_id}").status == 200, "reads continue"
    for record, lock in held:
        reply = caller.ask("completed", record, "complete", {"lock_id": lock})
        assert reply.status == 200, f"an ending was rejected although the reserve file was released: {reply.body}"
    daemon.wait_for_log(HAS_ROOM)  # the space of the reserve file
    assert not Path(f"{directory}/jobd.db.ballast").exists()
    assert caller.create(f"{name}-before")[1].status == 201
    filler.unlink()
    daemon.wait_for_log(b"event=reserve_file_rebuilt")
    rejected = ledger.codes.total()
    work_alone(daemon, ledger, f"{name}-after", 5)
    assert ledger.codes.total() == rejected, f"rejected although there is space: {ledger.codes}"
    assert Path(f"{directory}/jobd.db.ballast").stat().st_blocks * 512 >= RESERVE_FILE_BYTES
    assert daemon.process.poll() is None
    return len(held)


@check(rounds=10, needs=(MOUNTS,))
def tiny_disk(trial: Trial) -> Counts:
    """The same on a disk of 1 MiB, which has no space for a reserve file."""
    checked = rejected = 0
    for number in range(trial.rounds):
        # Each on its own disk: after some rounds the write-ahead log alone would fill one of this size.
        ledger = Ledger()
        with tmpfs(trial.directory / f"disk-{number}", 1 << 20) as place:
            store = place / "jobd.db"
            with DaemonProcess(trial.directory, JOBD_STORE_PATH=str(store)) as daemon:
                _fill_and_free_tiny_disk(daemon, ledger, place)
                assert daemon.stop() == 0
            checked += ledger.check(checked_contents(store))
        rejected += ledger.codes["storage_full"]
    return {"times full": trial.rounds, "rejected with storage_full": rejected, "acknowledgements checked": checked}


def _fill_and_free_tiny_disk(daemon: DaemonProcess, ledger: Ledger, directory: Path) -> None:
    caller = RecordingClient(daemon, ledger)
    jobs = 0
    filler = fill(directory)
    while caller.create(f"new-{jobs}")[1].status == 201:
        jobs += 1
    daemon.wait_for_log(FULL)
    filler.unlink()
    daemon.wait_for_log(HAS_ROOM)
    rejected = ledger.codes.total()
    work_alone(daemon, ledger, "after", 2)
    assert ledger.codes.total() == rejected, f"rejected although there is space: {ledger.codes}"


@check(rounds=5, needs=(MOUNTS,))
def full_disk_at_a_slice(trial: Trial) -> Counts:
    """The journal fits and its slice does not: history is read, also after a kill, and deletions make space."""
    created = behind = 0
    for number in range(trial.rounds):
        ledger = Ledger()
        place = trial.directory / f"disk-{number}"
        with tmpfs(place, RESERVE_FILE_BYTES + 2 * FREE_BYTES):
            store = place / "jobd.db"
            with DaemonProcess(trial.directory, variant="one_slice", JOBD_STORE_PATH=str(store)) as daemon:
                _create_many(daemon, "old")
                for each in range(JOBS):
                    assert daemon.post(f"/v1/jobs/old-{each}/cancel").status == 200
                filler = fill(place)
                os.truncate(filler, filler.stat().st_size - LEFT_BYTES)
                _check_history(daemon)
                created += _create_until_full(RecordingClient(daemon, ledger))
                _check_history(daemon)
                daemon.kill()
                behind += _check_copy(store, trial.directory / f"copy-{number}", ledger)
                daemon.variant = ""
                daemon.start()
                _check_history(daemon)
                _delete_all(daemon, "old")
                daemon.wait_for_log(HAS_ROOM)
                _create_many(daemon, "new")
                filler.unlink()
                assert daemon.stop() == 0
            found = checked_contents(store)
            ledger.check(found)
            assert sum(job_id.startswith("new-") for job_id in found.jobs) == JOBS
            assert not any(job_id.startswith("old-") for job_id in found.jobs)
    return {"times full": trial.rounds, "created meanwhile": created, "events that no slice wrote": behind}


def _create_many(daemon: DaemonProcess, name: str) -> None:
    for start in range(0, JOBS, BULK):
        jobs = [{"id": f"{name}-{each}", "queue": name, "payload": PAYLOAD} for each in range(start, start + BULK)]
        reply = daemon.post("/v1/jobs/bulk", {"jobs": jobs})
        assert reply.status == 201, reply.body


def _create_until_full(caller: RecordingClient) -> int:
    created = 0
    while (reply := caller.create(f"meanwhile-{created}", PAYLOAD)[1]).status == 201:
        created += 1
    assert reply.error == "storage_full", reply.body
    assert created, "no append fitted"
    return created


def _check_history(daemon: DaemonProcess) -> None:
    """Read what only the tables have, although their slice cannot be written."""
    events = daemon.get("/v1/jobs/old-1/timeline").data["events"]
    assert [event["type"] for event in events] == ["created", "cancelled"], events


def _check_copy(store: Path, directory: Path, ledger: Ledger) -> int:
    """Check a copy of the store on a disk with space. Return the number of events in its tail."""
    directory.mkdir()
    for suffix in ("", "-wal", ".epoch"):
        shutil.copy2(f"{store}{suffix}", directory)
    found = checked_contents(directory / store.name)
    ledger.check(found)
    assert found.tail > JOBS, f"a slice was written: the tables lack {found.tail} events"
    return found.tail


def _delete_all(daemon: DaemonProcess, queue: str) -> None:
    more = True
    while more:
        plan = daemon.admin("POST", "plans", {"action": "delete", "filter": {"queue": queue}}).data
        more = plan["more"]
        result = daemon.admin("POST", f"plans/{plan['plan_id']}/apply").data
        assert result["applied"] == plan["count"], result
