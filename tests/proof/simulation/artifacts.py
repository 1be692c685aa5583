"""The artifact store of a simulated machine. It survives crashes, fails and is slow on demand, and records owners.

A deletion that was sent takes effect even if its sender has ended or no longer waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from jobd.model.events import Event
from jobd.model.job import SECOND_MS, Job, LateResult, storage_key_error
from jobd.model.storage import Tombstone
from jobd.storage.artifacts.base import ArtifactStoreError, Deletion, Judge
from tests.support.memory_artifacts import MemoryArtifacts

if TYPE_CHECKING:
    from tests.proof.simulation.machine import Machine

MARGIN_S: Final = 120.0  # a request sent before a clock step may take effect after it


class Upload(Struct):
    """An object: the grant that stored it and the job that owns it. It is no longer checked if `is_lost`."""

    lock_id: str
    at_s: float  # loop time
    modified_at: int
    job_seq: int | None = None  # seq of the job completed with it, or with a late result that names it
    late_seq: int | None = None  # of that late result
    is_lost: bool = False


class SimArtifacts(MemoryArtifacts):
    """A simulated artifact store. `fault` is unreachable (every call fails), flaky (half of them fail) or slow."""

    def __init__(self, machine: Machine, dice: Random) -> None:
        super().__init__(machine.wall)
        self.fault: str | None = None
        self.uploads: dict[str, Upload] = {}
        self.relied_on: dict[int, str] = {}  # seq of a job that stored its object in time -> key
        self._locks: dict[int, str] = {}  # fencing token -> lock id, of all grants
        self._machine = machine
        self._dice = dice

    # -- workers ------------------------------------------------------------------------------------------------------

    def store(self, key: str | None, lock_id: str) -> None:
        """Store the result of a worker, before it completes its job."""
        if key is not None and storage_key_error(key) is None:
            self.upload(key)
            self.uploads[key] = Upload(lock_id, self._machine.loop.now_s, self.objects[key])
            self._machine.note("artifact", "stored", key)

    # -- the store ----------------------------------------------------------------------------------------------------

    async def delete(self, key: str, judge: Judge) -> Deletion:
        await self.pause()
        if self.fault == "unreachable" or (self.fault == "flaky" and self._dice.random() < 0.5):
            self._machine.fired["artifact store failed"] += 1
            raise ArtifactStoreError("simulated: it is unreachable")
        modified_at = self.objects.get(key)
        if modified_at is None:
            return Deletion("missing")
        verdict = judge(modified_at)
        self._machine.fired[f"artifact {verdict}"] += 1
        if verdict != "delete":
            return Deletion("left" if verdict == "leave" else "young", "", modified_at)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        loop.call_later(self._delay_s(), self._take_effect, key, modified_at, done.set_result)
        await done
        await self.pause()
        return Deletion("deleted")

    def _take_effect(self, key: str, modified_at: int, report: Callable[[None], object]) -> None:
        if self.objects.get(key) == modified_at:
            del self.objects[key]
            self._machine.note("artifact", "deleted", key)
            self._judge_deletion(key)
        try:
            report(None)
        except asyncio.InvalidStateError:  # the caller no longer waits
            self._machine.fired["artifact deleted, caller gone"] += 1

    async def pause(self) -> None:
        await asyncio.sleep(self._delay_s())

    def _delay_s(self) -> float:
        return self._dice.random() * (4.0 if self.fault == "slow" else 0.01)

    # -- S13: an artifact goes only if no job row names its key, and goes with its job --------------------------------

    def _judge_deletion(self, key: str) -> None:
        machine = self._machine
        for seq, relied_on in self.relied_on.items():
            job = machine.disk.jobs.get(seq)
            if relied_on == key and job is not None:
                machine.monitor.fail("S13", f"the object {key} of a job was deleted", job.id)
        self.uploads.pop(key, None)

    def committed(self, change: Event) -> None:
        """Apply a committed change to the expected owners of objects."""
        before, after = change.before, change.after
        if after is not None and after.grant is not None:
            self._locks[after.grant.fencing_token] = after.grant.lock_id
        if after is None and before is not None:
            self.relied_on.pop(before.seq, None)
            self._orphan(change, [its for its in self.uploads.values() if its.job_seq == before.seq])
            self._orphan(change, self._left_to(before))
            return
        if change.late is not None:
            self._assign_late_object(change, change.late)
            return
        if change.type != "completed" or after is None or after.result is None or before is None:
            return
        key, grant = after.result.storage_key, before.grant
        upload = None if key is None else self.uploads.get(key)
        if key is None or upload is None or grant is None or upload.lock_id != grant.lock_id:
            return
        upload.job_seq = after.seq
        if self._is_in_time(upload):
            self.relied_on[after.seq] = key

    def _left_to(self, job: Job) -> list[Upload]:
        """Return the object that `job` names, if its owner was deleted and its tombstone dropped because of `job`."""
        its = None if job.result is None else self.uploads.get(job.result.storage_key or "")
        return [its] if its is not None and its.job_seq in self._machine.monitor.deleted else []

    def _assign_late_object(self, change: Event, late: LateResult) -> None:
        """Give the object of a late result to its job while the late result is kept. It may have displaced another."""
        upload = self.uploads.get(late.result.storage_key or "")
        if upload is not None and upload.lock_id == self._locks.get(late.fencing_token):
            upload.job_seq, upload.late_seq = change.job_seq, late.seq
        gone = [its for its in self.uploads.values() if its.job_seq == change.job_seq and self._was_displaced(its)]
        self._orphan(change, gone)

    def _orphan(self, change: Event, uploads: list[Upload]) -> None:
        for upload in uploads:  # after a backward step of the clock it seems to belong to another job
            too_new = upload.modified_at > change.at + self._machine.scenario.margins.skew_ms
            upload.is_lost = upload.is_lost or too_new

    def _was_displaced(self, upload: Upload) -> bool:
        return upload.late_seq is not None and not self._is_kept(upload)

    def _is_kept(self, upload: Upload) -> bool:
        kept = self._machine.disk.late_results.get(upload.job_seq or 0, ())
        return any(late.seq == upload.late_seq for late in kept)

    def _is_in_time(self, upload: Upload) -> bool:
        """Return whether the object was named before it was old, with no clock step meanwhile or just before."""
        machine = self._machine
        age_s = machine.loop.now_s - upload.at_s
        return (
            machine.clocks_moved_s + MARGIN_S < upload.at_s
            and age_s < machine.scenario.margins.young_ms / SECOND_MS - 0.1
        )

    def restored(self) -> None:
        """Handle a restored older disk: its rows may name deleted objects and do not name later ones."""
        disk = self._machine.disk
        self.relied_on.clear()
        for key, upload in self.uploads.items():
            job = None if upload.job_seq is None else disk.jobs.get(upload.job_seq)
            names = job is not None and job.result is not None and job.result.storage_key == key
            number = upload.job_seq if upload.late_seq is None else -upload.late_seq
            if not names and not self._is_kept(upload) and number not in disk.tombstones:
                upload.is_lost = True

    def waiting(self) -> list[Tombstone]:
        """Return the tombstones, except those that wait for a late result of a quarantined job."""
        held = self._held()
        return [each for each in self._machine.disk.tombstones.values() if each.key not in held]

    def _held(self) -> set[str | None]:
        return {late.result.storage_key for kept in self._machine.disk.late_results.values() for late in kept}

    def leaked(self) -> list[str]:
        """Return objects of deleted jobs and deleted late results that no job names."""
        disk, deleted, held = self._machine.disk, self._machine.monitor.deleted, self._held()
        return [
            key
            for key, upload in self.uploads.items()
            if (upload.job_seq in deleted or self._was_displaced(upload))
            and not upload.is_lost
            and not disk.is_referenced(key)
            and key not in held
        ]
