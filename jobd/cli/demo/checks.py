"""The demo's judgement: every claim is checked against timelines, exit codes and files; who did what is shown.

Starts nothing and changes no job.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

from jobd.cli import exit_codes, tables, terminal
from jobd.cli.demo.demo_checks import check
from jobd.cli.demo.files import Broken, target_name
from jobd.cli.demo.main import Story, said
from jobd.cli.demo.processes import Stage
from jobd.client import JobInfo
from jobd.model.events import EventView


def judge(stage: Stage, story: Story, keep: Path | None) -> int:
    """Print who did what and what was checked; 0 where all of it was as it should be."""
    with stage.jobs() as client:
        jobs = list(reversed(list(client.iterate_jobs(limit=200))))
        lines = {job.id: client.timeline(job.id) for job in jobs}
        why = client.why(story.killed_job) if story.killed_job else None
    faults = {job.id: _fault(stage, story, job) for job in jobs}
    _show_jobs(jobs, lines, faults)
    if why is not None:
        terminal.emit("")
        terminal.emit(
            f"What happened to {story.killed_job}, whose worker {story.killed_worker} was killed (progress left out):"
        )
        tables.timeline([event for event in lines[story.killed_job] if event.type not in ("progress", "extended")])
        tables.why(why)
    claims = checks(story, jobs, lines, faults)
    for worker in stage.workers.values():
        worker.terminate()
    claims.append(("the daemon stopped cleanly when asked", stage.stop_daemon() == 0))
    if keep is not None:
        shutil.copytree(stage.results, keep, dirs_exist_ok=True)
        terminal.say(f"The results are in {keep}; a browser shows the films.")
    return _verdict(claims)


def _fault(stage: Stage, story: Story, job: JobInfo) -> str:
    """What is wrong with a job's result, read back from the disk and compared with its source; empty if nothing is."""
    kind = story.kinds[job.id]
    target = stage.results / target_name(kind, job.id)
    if job.status != "completed" or job.file_path != str(target):
        return f"{job.status}, result {job.file_path}"
    try:
        check(kind, stage.sources / job.id, target, said(job))
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
            (job.id, job.status, " then ".join(grants), job.attempt, job.stalls, terminal.span(took), result, proof)
        )
    terminal.emit("")
    terminal.table(["JOB", "STATUS", "WORKERS", ">ATTEMPTS", ">STALLS", ">TOOK", "RESULT", "CHECKED"], rows)


def checks(
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


def _verdict(claims: Sequence[tuple[str, bool]]) -> int:
    terminal.emit("")
    for claim, is_true in claims:
        terminal.emit(f"{'ok' if is_true else 'NOT SEEN':8}  {claim}")
    failed = sum(not is_true for _, is_true in claims)
    if failed:
        terminal.say(f"jobd demo: {failed} of {len(claims)} claims were not seen to be true")
    else:
        terminal.emit("All of it was seen, and nothing is left behind.")
    return exit_codes.FAILED if failed else exit_codes.DONE
