"""jobd demo: a throw-away daemon, real workers on real files, one of them killed; ends with proof of what happened.

Only tells the story and judges it; the processes are demo_stage.py's, the files demo_files.py's.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final

import click

from jobd.cli import exits, show

if TYPE_CHECKING:
    from jobd.cli.demo_screen import Screen
    from jobd.cli.demo_stage import Stage
    from jobd.client import JobClient, JobInfo
    from jobd.events import EventView

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


@click.command()
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="Copy the results into this directory.")
@click.option("--seed", type=int, default=1, show_default=True, help="The source files follow from this number.")
def demo(keep: Path | None, seed: int) -> int:
    """Show a recovery: real workers, one is killed at work.

    Starts a daemon and three workers in a temporary directory, lets them convert some thirty files, kills one worker
    with SIGKILL in the middle of a job, and shows how its job is noticed, given to another worker and finished.
    Exit 0 only if all of that was seen and every result is right. Nothing is left behind.
    """
    from jobd.cli.demo_screen import screen
    from jobd.cli.demo_stage import Stage

    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGHUP, _leave)
    with Stage() as stage:
        with screen() as out:
            story = _play(stage, out, seed)
        return _judge(stage, story, keep)


def _leave(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


# ---------------------------------------------------------------------------------------------------------------------
# The play.


def _play(stage: Stage, out: Screen, seed: int) -> Story:
    from jobd.cli.demo_files import make_sources

    story = Story()
    made = make_sources(stage.sources, seed, **FILES)
    total = sum(path.stat().st_size for path in stage.sources.iterdir())
    out.say(f"{len(made)} files made to work on, {show.size(total)}, in {stage.sources}")
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
        out.say(f"{_said(job).get('worker', 'somebody')} completed {job.id} → {Path(job.file_path or '?').name}")
    elif job.status == "processing":
        out.say(f"the lock on {job.id} has expired")
    else:
        out.say(f"{job.id} is {job.status}{f': {job.error_message}' if job.error_message else ''}")


def _said(job: JobInfo) -> dict[str, object]:
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
                out.say(f"  next: {why.next.what.rstrip('.')}: {show.age(why.next.at)}")
            return


def _tell_recovery(client: JobClient, story: Story, out: Screen) -> None:
    stalled = next((event for event in client.timeline(story.killed_job) if event.type == "stalled"), None)
    if stalled is not None:
        story.told_recovery = True
        out.say(f"{stalled.by} took {story.killed_job} back: {stalled.from_} → {stalled.to}. {stalled.reason or ''}")
        out.say(f"  why {story.killed_job}? {client.why(story.killed_job).because}")


# ---------------------------------------------------------------------------------------------------------------------
# The judgement.


def _judge(stage: Stage, story: Story, keep: Path | None) -> int:
    """Print who did what and what was checked; 0 where all of it was as it should be."""
    from jobd.cli import tables

    with stage.jobs() as client:
        jobs = list(reversed(list(client.iterate_jobs(limit=200))))
        lines = {job.id: client.timeline(job.id) for job in jobs}
        why = client.why(story.killed_job) if story.killed_job else None
    faults = {job.id: _fault(stage, story, job) for job in jobs}
    _show_jobs(jobs, lines, faults)
    if why is not None:
        show.emit("")
        show.emit(
            f"What happened to {story.killed_job}, whose worker {story.killed_worker} was killed (progress left out):"
        )
        tables.timeline([event for event in lines[story.killed_job] if event.type not in ("progress", "extended")])
        tables.why(why)
    checks = _checks(story, jobs, lines, faults)
    for worker in stage.workers.values():
        worker.terminate()
    checks.append(("the daemon stopped cleanly when asked", stage.stop_daemon() == 0))
    if keep is not None:
        shutil.copytree(stage.results, keep, dirs_exist_ok=True)
        show.say(f"The results are in {keep}; a browser shows the films.")
    return _verdict(checks)


def _fault(stage: Stage, story: Story, job: JobInfo) -> str:
    """What is wrong with a job's result, read back from the disk and compared with its source; empty if nothing is."""
    from jobd.cli.demo_files import Broken, check, target_name

    kind = story.kinds[job.id]
    target = stage.results / target_name(kind, job.id)
    if job.status != "completed" or job.file_path != str(target):
        return f"{job.status}, result {job.file_path}"
    try:
        check(kind, stage.sources / job.id, target, _said(job))
    except (Broken, OSError, ValueError) as error:
        return str(error)
    return ""


def _show_jobs(jobs: Sequence[JobInfo], lines: dict[str, list[EventView]], faults: dict[str, str]) -> None:
    rows = []
    for job in jobs:
        grants = [str(event.details.get("worker")) for event in lines[job.id] if event.type == "granted"]
        result = Path(job.file_path).name if job.file_path else None
        took = (job.finished_at or job.updated_at) - (job.started_at or job.updated_at)
        proof = faults[job.id] or "right"
        rows.append(
            (job.id, job.status, " then ".join(grants), job.attempt, job.stalls, show.span(took), result, proof)
        )
    show.emit("")
    show.table(["JOB", "STATUS", "WORKERS", ">ATTEMPTS", ">STALLS", ">TOOK", "RESULT", "CHECKED"], rows)


def _checks(
    story: Story, jobs: Sequence[JobInfo], lines: dict[str, list[EventView]], faults: dict[str, str]
) -> list[tuple[str, bool]]:
    """Each claim of the demo, and whether it was seen to be true."""
    events = lines.get(story.killed_job, [])
    after = [event for event in events if event.type == "granted"][1:]
    others = [event for event in after if event.details.get("worker") != story.killed_worker]
    stalls = [event for event in events if event.type == "stalled" and event.to == "queued"]
    last = events[-1] if events else None
    newer = [event for event in others if int(event.details.get("fencing_token") or 0) > story.killed_token]
    finished = last is not None and last.type == "completed" and last.by == f"worker:{_worker(others)}"
    killed = story.killed_code == -signal.SIGKILL and story.killed_progress > 0
    return [
        (f"a worker was killed by SIGKILL in the middle of a job ({story.killed_job or 'none'})", killed),
        ("the daemon noticed by itself and put the job back into its queue", bool(stalls)),
        ("another worker got it, under a higher fencing token", bool(newer) and newer == after),
        ("that worker completed it", finished),
        (f"all {len(jobs)} jobs are completed", bool(jobs) and all(job.status == "completed" for job in jobs)),
        ("every result was compared with its source and is right", not any(faults.values())),
    ]


def _worker(grants: Sequence[EventView]) -> str:
    return str(grants[-1].details.get("worker")) if grants else ""


def _verdict(checks: Sequence[tuple[str, bool]]) -> int:
    show.emit("")
    for claim, is_true in checks:
        show.emit(f"{'ok' if is_true else 'NOT SEEN':8}  {claim}")
    failed = sum(not is_true for _, is_true in checks)
    if failed:
        show.say(f"jobd demo: {failed} of {len(checks)} claims were not seen to be true")
    else:
        show.emit("All of it was seen, and nothing is left behind.")
    return exits.FAILED if failed else exits.DONE
