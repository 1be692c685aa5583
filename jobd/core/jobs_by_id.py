"""The jobs in memory by id: all live ones, and the finished ones that were used last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Final

from jobd.model.job import Job, PackedJob, metadata_bytes

FINISHED_KEPT: Final = 1_000
FINISHED_BYTES: Final = 16 << 20  # of their metadata


class LiveJobs(Mapping[str, Job]):
    """Live jobs by id: packed, other queued and processing ones.

    Packed ones are expanded on each access: the values are equal, but not identical.
    """

    __slots__ = ("_full", "_packed", "_processing")

    def __init__(self, processing: dict[str, Job]) -> None:
        self._packed: dict[str, PackedJob] = {}
        self._full: dict[str, Job] = {}
        self._processing = processing

    def __getitem__(self, job_id: str) -> Job:
        if (job := self.find(job_id)) is None:
            raise KeyError(job_id)
        return job

    def __contains__(self, job_id: object) -> bool:
        return job_id in self._packed or job_id in self._processing or job_id in self._full

    def __iter__(self) -> Iterator[str]:
        return chain(self._packed, self.touched())

    def __len__(self) -> int:
        return len(self._packed) + len(self._full) + len(self._processing)

    def find(self, job_id: str) -> Job | None:
        """Return the job or None. Three times as fast as `get`."""
        if (short := self._packed.get(job_id)) is not None:
            return short.expand()
        return self._processing.get(job_id) or self._full.get(job_id)

    def touched(self) -> Iterator[str]:
        """Iterate over the ids of the jobs that are not packed."""
        return chain(self._full, self._processing)

    def waits(self, short: PackedJob) -> bool:
        """Return whether the job is still stored as `short`, that is, unchanged."""
        return self._packed.get(short.id) is short

    def keep(self, job: Job) -> None:
        """Add or replace a queued job."""
        self._packed.pop(job.id, None)
        self._full[job.id] = job

    def keep_packed(self, job: PackedJob) -> None:
        self._full.pop(job.id, None)
        self._packed[job.id] = job

    def keep_all_packed(self, jobs: Iterable[PackedJob]) -> None:
        """Add packed jobs that are not present yet."""
        self._packed.update({job.id: job for job in jobs})

    def drop(self, job_id: str) -> bool:
        """Remove the queued job if it is present. Return whether it was packed."""
        if self._packed.pop(job_id, None) is not None:
            return True
        self._full.pop(job_id, None)
        return False


class FinishedJobs(OrderedDict[str, Job]):
    """The finished jobs that were used last, by id, for repeated endings and quick reads."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes = 0  # of their metadata

    def keep(self, job: Job) -> None:
        """Add a job, or replace it. It is now the one that was used last."""
        if job.id in self:
            self.drop(job.id)
        self[job.id] = job
        if job.result is not None:
            self._bytes += metadata_bytes(job)

    def drop(self, job_id: str) -> None:
        self._bytes -= metadata_bytes(self.pop(job_id))

    def trim(self) -> None:
        """Drop the jobs above the limits. Called between batches."""
        while len(self) > FINISHED_KEPT or self._bytes > FINISHED_BYTES:
            self._bytes -= metadata_bytes(self.popitem(last=False)[1])
