"""Live jobs by id: whole to who asks, in short while nothing has happened to them."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from jobd.core.live_jobs import LiveJobs
from jobd.model.job import CompactJob, Job, Options

SHORT = CompactJob(1, "a", Options(), 1_000)
WHOLE = Job(2, "b", Options(), "processing", 1_000, 1_000, 1_000)


@pytest.fixture
def jobs() -> LiveJobs:
    jobs = LiveJobs()
    jobs.keep_short(SHORT)
    jobs.keep(WHOLE)
    return jobs


def test_it_is_a_mapping_of_whole_jobs(jobs: LiveJobs) -> None:
    assert jobs == {"a": SHORT.expand(), "b": WHOLE}
    assert (len(jobs), list(jobs), "a" in jobs, "b" in jobs, "c" in jobs) == (2, ["a", "b"], True, True, False)
    assert (jobs.find("a"), jobs.find("b"), jobs.find("c")) == (SHORT.expand(), WHOLE, None)
    with pytest.raises(KeyError):
        jobs["c"]
    assert jobs.touched() == {"b"}


def test_a_job_to_which_something_happens_is_kept_whole(jobs: LiveJobs) -> None:
    assert jobs.waits(SHORT)
    assert not jobs.waits(replace(SHORT))  # the same job, come in another time
    jobs.keep(replace(SHORT.expand(), attempt=1))
    assert not jobs.waits(SHORT)
    assert (len(jobs), jobs["a"].attempt, set(jobs.touched())) == (2, 1, {"a", "b"})


def test_a_job_that_comes_in_again_is_kept_in_one_form(jobs: LiveJobs) -> None:
    again = CompactJob(3, "b", Options(), 2_000)
    jobs.keep_short(again)
    assert (jobs["b"], jobs.waits(again), len(jobs), set(jobs.touched())) == (again.expand(), True, 2, set())


def test_a_job_is_forgotten_in_either_form(jobs: LiveJobs) -> None:
    for job_id in ("a", "b", "c"):
        jobs.drop(job_id)
    assert (len(jobs), jobs.waits(SHORT)) == (0, False)
