"""The demo's story: files are made, jobs submitted, workers started, one of them killed, and what is seen is told.

Judges nothing; what it has seen is in a Story.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from jobd.cli import terminal
from jobd.cli.demo.demo_screen import Screen
from jobd.cli.demo.files import make_sources
from jobd.cli.demo.processes import Stage
from jobd.client import JobClient, JobInfo

WORKERS: Final = ("w-1", "w-2", "w-3")
FILES: Final = {"pictures": 12, "films": 3, "sales": 8, "logs": 8}
KILL_AT_PERCENT: Final = 20
DEADLINE_S: Final = 55.0
_LOOK_S: Final = 0.1


@dataclass(slots=True)
class Story:
    """What has been seen. `killed_*` tell of the worker that was killed and the job that it held."""

    kinds: dict[str, str] = field(default_factory=dict)  # job id to kind
    seen: dict[str, str] = field(default_factory=dict)  # job id to the state last told
    killed_worker: str = ""
    killed_job: str = ""
    killed_token: int = 0
    killed_progress: float = 0
    killed_code: int = 0
    told_recovery: bool = False


def play(stage: Stage, out: Screen, seed: int) -> Story:
    story = Story()
    made = make_sources(stage.sources, seed, **FILES)
    total = sum(path.stat().st_size for path in stage.sources.iterdir())
    out.say(f"{len(made)} files made to work on, {terminal.size(total)}, in {stage.sources}")
    out.say(f"jobd is up (pid {stage.start_daemon()})")
    with stage.jobs() as client:
        story.kinds = _submit(client, made)
        out.say(f"{len(made)} jobs submitted in one transaction")
        for name in WORKERS:
            out.say(f"worker {name} started (pid {stage.start_worker(name)})")
        _watch(stage, client, story, out)
    return story


def _submit(client: JobClient, made: Sequence[tuple[str, str]]) -> dict[str, str]:
    """One job a file, all or none. Three attempts: a job whose worker dies at work is worth another one."""
    jobs = [{"id": name, "kind": kind, "payload": {"file": name}, "max_attempts": 3} for kind, name in made]
    return {job.id: job.kind for job in client.create_jobs(jobs)}


def _watch(stage: Stage, client: JobClient, story: Story, out: Screen) -> None:
    """Look at all jobs again and again, until all are finished; kill a worker when its film is well under way."""
    until_s = time.monotonic() + DEADLINE_S
    while True:
        jobs = list(client.iterate_jobs(limit=200))
        out.update(jobs)
        for job in reversed(jobs):
            _tell(job, story, out)
        if not story.killed_worker:
            _kill_one(stage, client, jobs, story, out)
        elif not story.told_recovery:
            _tell_recovery(client, story, out)
        if all(job.status in ("completed", "failed", "cancelled") for job in jobs):
            return
        if time.monotonic() > until_s:
            out.say(f"not finished after {DEADLINE_S:.0f} s; this is too slow to go on")
            return
        time.sleep(_LOOK_S)


def _tell(job: JobInfo, story: Story, out: Screen) -> None:
    """Say what is new about a job since the last look; short jobs are often done between two looks."""
    state = f"processing:{job.lock.worker}" if job.status == "processing" and job.lock else job.status
    if state == story.seen.get(job.id, "queued"):
        return
    story.seen[job.id] = state
    if job.status == "processing" and job.lock:
        if job.kind == "film":  # the others are done before anybody has read that they began
            out.say(f"{job.lock.worker} works on {job.id}, attempt {job.attempt} of {job.max_attempts}")
    elif job.status == "completed":
        out.say(f"{said(job).get('worker', 'somebody')} completed {job.id} → {Path(job.file_path or '?').name}")
    elif job.status == "processing":
        out.say(f"the lock on {job.id} has expired")
    else:
        out.say(f"{job.id} is {job.status}{f': {job.error_message}' if job.error_message else ''}")


def said(job: JobInfo) -> dict[str, object]:
    """The metadata that the worker left."""
    return job.metadata_value or {}


def _kill_one(stage: Stage, client: JobClient, jobs: Sequence[JobInfo], story: Story, out: Screen) -> None:
    for job in jobs:
        if job.kind == "film" and job.lock is not None and job.progress >= KILL_AT_PERCENT:
            story.killed_worker, story.killed_job = job.lock.worker, job.id
            story.killed_token, story.killed_progress = job.lock.fencing_token, job.progress
            pid = stage.workers[job.lock.worker].pid
            out.say(f"KILL -9 {pid}: {job.lock.worker} dies in the middle of {job.id}, at {job.progress:.0f} %")
            story.killed_code = stage.kill_worker(job.lock.worker)
            why = client.why(job.id)
            out.say(f"  why {job.id}? {why.because}")
            if why.next is not None:
                at = "" if why.next.at is None else f": {terminal.age(why.next.at)}"
                out.say(f"  next: {why.next.what.rstrip('.')}{at}")
            return


def _tell_recovery(client: JobClient, story: Story, out: Screen) -> None:
    stalled = next((event for event in client.timeline(story.killed_job) if event.type == "stalled"), None)
    if stalled is not None:
        story.told_recovery = True
        out.say(f"{stalled.by} took {story.killed_job} back: {stalled.from_} → {stalled.to}. {stalled.reason or ''}")
        out.say(f"  why {story.killed_job}? {client.why(story.killed_job).because}")
