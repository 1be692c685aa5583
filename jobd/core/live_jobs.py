"""Live jobs by id. Those to which nothing has happened since their creation are kept in short.

Pure. Whoever asks gets whole jobs; what they look like in memory is nobody's business but the book's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, KeysView, Mapping
from itertools import chain

from jobd.model.job import CompactJob, Job


class LiveJobs(Mapping[str, Job]):
    """Job by id. One kept in short is made whole anew each time that it is asked for: equal, not identical."""

    __slots__ = ("_short", "_whole")

    def __init__(self) -> None:
        self._short: dict[str, CompactJob] = {}
        self._whole: dict[str, Job] = {}

    def __getitem__(self, job_id: str) -> Job:
        short = self._short.get(job_id)
        return self._whole[job_id] if short is None else short.expand()

    def __contains__(self, job_id: object) -> bool:
        return job_id in self._short or job_id in self._whole

    def __iter__(self) -> Iterator[str]:
        return chain(self._short, self._whole)

    def __len__(self) -> int:
        return len(self._short) + len(self._whole)

    def find(self, job_id: str) -> Job | None:
        """The job, or None: as `get`, which takes three times as long."""
        short = self._short.get(job_id)
        return self._whole.get(job_id) if short is None else short.expand()

    def touched(self) -> KeysView[str]:
        """Ids of the jobs that are not kept in short."""
        return self._whole.keys()

    def waits(self, short: CompactJob) -> bool:
        """Whether `short` is what is kept of its job: nothing has happened to it since it came in."""
        return self._short.get(short.id) is short

    def keep(self, job: Job) -> None:
        self._short.pop(job.id, None)
        self._whole[job.id] = job

    def keep_short(self, job: CompactJob) -> None:
        self._whole.pop(job.id, None)
        self._short[job.id] = job

    def keep_all_short(self, jobs: Iterable[CompactJob]) -> None:
        """Only for jobs that are not here yet."""
        self._short.update({job.id: job for job in jobs})

    def drop(self, job_id: str) -> None:
        """Forget the job, if it is here."""
        if self._short.pop(job_id, None) is None:
            self._whole.pop(job_id, None)
