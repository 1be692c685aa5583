"""`jobd demo`: workers draw pictures, one of them is killed, and the recovery of its job is checked."""

from __future__ import annotations

import hashlib
import random
import shutil
import signal
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from jobd.cli import exit_codes, tables, terminal
from jobd.cli.demo.processes import HEIGHT, SIGNATURE, WIDTH, Sandbox
from jobd.client import JobClient, JobView
from jobd.model.events import EventView
from jobd.model.job import FINISHED
from jobd.model.times import duration

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

WORKERS: Final = ("w-1", "w-2", "w-3")
PICTURES: Final = 24
FILMS: Final = 3
FRAMES: Final = 16  # of a film
LOCK_TTL_MS: Final = 3_000  # short, so that the recovery takes seconds
CONFIG: Final = '[cleanup]\nrecover_every = "500ms"\n'
KILL_AT_PERCENT: Final = 20
DEADLINE_S: Final = 50.0
_POLL_S: Final = 0.1
# Points at the edge of the Mandelbrot set, where a zoom shows details.
_EDGES: Final = ((-0.743, 0.126), (0.2925, 0.0149), (-1.2501, 0.0218), (-0.7269, 0.1889))


@dataclass(slots=True)
class Observations:
    """What was observed: the latest reported state of each job, and the worker that was killed with its job."""

    seen: dict[str, str] = field(default_factory=dict)
    killed_worker: str = ""
    killed_job: str = ""
    killed_token: int = 0
    killed_progress: float = 0
    killed_code: int = 0
    recovery_seen: bool = False


@contextmanager
def _screen(sandbox: Sandbox) -> Iterator[Callable[[Sequence[JobView]], None]]:
    """Yield a function that shows the state of all jobs, where the terminal can draw."""
    if not terminal.may_draw(sys.stdout) or terminal.console().is_dumb_terminal:
        yield lambda jobs: None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns: list[Any] = [TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn()]
    with Progress(*columns, console=terminal.console(), transient=True) as progress:
        print_line = partial(progress.console.print, markup=False, highlight=False)
        plain, sandbox.print_line = sandbox.print_line, print_line
        yield partial(_update, progress, {})
    sandbox.print_line = plain


def _update(progress: Progress, bars: dict[str, TaskID], jobs: Sequence[JobView]) -> None:
    """Update the bars: one for all jobs, and one for each processing job."""
    shown = {"all jobs": 100 * sum(job.status in FINISHED for job in jobs) / len(jobs)}
    for job in jobs:
        if job.status == "processing":
            worker = job.lock.worker if job.lock else f"{job.worker} (lock expired)"
            shown[terminal.clip(f"  {job.id} on {worker}", 60)] = job.progress
    for text in bars.keys() - shown.keys():
        progress.remove_task(bars.pop(text))
    for text, percent in shown.items():
        if text not in bars:
            bars[text] = progress.add_task(text, total=100)
        progress.update(bars[text], completed=percent)


def demonstrate(keep: Path | None, seed: int) -> int:
    """Run the demo and return the exit code: 0 if every check passed."""
    with Sandbox(CONFIG) as sandbox:
        with _screen(sandbox) as show:
            observed = observe(sandbox, show, seed)
        checks = _report(sandbox, observed)
        checks.append(("the daemon stopped cleanly on SIGTERM", sandbox.stop_daemon() == 0))
        if keep is not None:
            shutil.copytree(sandbox.results, keep, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.part"))
            terminal.say(f"The results are in {keep}. Open a film in a browser to watch it.")
    return verdict("jobd demo", checks)


# ---------------------------------------------------------------------------------------------------------------------
# The run


def observe(sandbox: Sandbox, show: Callable[[Sequence[JobView]], None], seed: int) -> Observations:
    observed = Observations()
    sandbox.say(f"jobd is running (pid {sandbox.start_daemon()})")
    with sandbox.jobs() as client:
        jobs = client.create_jobs(jobs_of(seed, PICTURES, FILMS))
        sandbox.say(f"{len(jobs)} jobs submitted in one transaction")
        for name in WORKERS:
            pid = sandbox.start_worker(name, "default", lock_ttl_ms=LOCK_TTL_MS)
            sandbox.say(f"worker {name} started (pid {pid})")
        _watch(sandbox, client, observed, show)
    return observed


def jobs_of(seed: int, pictures: int, films: int) -> list[dict[str, Any]]:
    """Return the jobs: one film first, so that there is a long job to kill, then the pictures and the other films."""
    rng = random.Random(seed)
    long = [_job(rng, "film", number, FRAMES) for number in range(1, films + 1)]
    return long[:1] + [_job(rng, "picture", number, 1) for number in range(1, pictures + 1)] + long[1:]


def _job(rng: random.Random, kind: str, number: int, frames: int) -> dict[str, Any]:
    """Return a job that draws `frames` pictures of a random place."""
    x, y = rng.choice(_EDGES)
    payload = {"x": x + rng.uniform(-0.02, 0.02) / frames, "y": y + rng.uniform(-0.02, 0.02) / frames}
    # Three attempts, because an attempt that stalls counts.
    return {"id": f"{kind}-{number:02}", "kind": kind, "payload": {**payload, "frames": frames}, "max_attempts": 3}


def _watch(
    sandbox: Sandbox, client: JobClient, observed: Observations, show: Callable[[Sequence[JobView]], None]
) -> None:
    """Poll until all jobs are finished. Kill a worker in the middle of a film."""
    until_s = time.monotonic() + DEADLINE_S
    while True:
        jobs = list(client.iterate_jobs(limit=200))
        show(jobs)
        for job in reversed(jobs):
            _show_change(sandbox, job, observed)
        if not observed.killed_worker:
            _kill_one(sandbox, client, jobs, observed)
        elif not observed.recovery_seen:
            _show_recovery(sandbox, client, observed)
        if all(job.status in FINISHED for job in jobs):
            return
        if time.monotonic() > until_s:
            sandbox.say(f"The jobs are not finished after {DEADLINE_S:.0f} s: this machine is too slow.")
            return
        time.sleep(_POLL_S)


def _show_change(sandbox: Sandbox, job: JobView, observed: Observations) -> None:
    state = f"processing:{job.lock.worker}" if job.status == "processing" and job.lock else job.status
    if state == observed.seen.get(job.id, "queued"):
        return
    observed.seen[job.id] = state
    if job.status == "processing" and job.lock:
        if job.kind == "film":  # pictures finish too soon
            sandbox.say(f"{job.lock.worker} started {job.id}, attempt {job.attempt} of {job.max_attempts}")
    elif job.status == "completed":
        sandbox.say(f"{_metadata(job).get('worker', '?')} completed {job.id} → {Path(job.file_path or '?').name}")
    elif job.status == "processing":
        sandbox.say(f"the lock on {job.id} has expired")
    else:
        sandbox.say(f"{job.id} is {job.status}{f': {job.error_message}' if job.error_message else ''}")


def _metadata(job: JobView) -> dict[str, object]:
    return job.metadata_value or {}


def _kill_one(sandbox: Sandbox, client: JobClient, jobs: Sequence[JobView], observed: Observations) -> None:
    for job in jobs:
        if job.kind == "film" and job.lock is not None and job.progress >= KILL_AT_PERCENT:
            observed.killed_worker, observed.killed_job = job.lock.worker, job.id
            observed.killed_token, observed.killed_progress = job.lock.fencing_token, job.progress
            pid = sandbox.workers[job.lock.worker].pid
            sandbox.say(f"KILL -9 {pid}: {job.lock.worker} dies in the middle of {job.id}, at {job.progress:.0f} %")
            observed.killed_code = sandbox.kill_worker(job.lock.worker)
            why = client.why(job.id)
            sandbox.say(f"  why {job.id}? {why.because}")
            if why.next is not None:
                at = "" if why.next.at is None else f": {terminal.age(why.next.at)}"
                sandbox.say(f"  next: {why.next.what.rstrip('.')}{at}")
            return


def _show_recovery(sandbox: Sandbox, client: JobClient, observed: Observations) -> None:
    stalled = next((event for event in client.timeline(observed.killed_job) if event.type == "stalled"), None)
    if stalled is not None:
        observed.recovery_seen = True
        sandbox.say(
            f"{stalled.by} recovered {observed.killed_job}: {stalled.from_} → {stalled.to}. {stalled.reason or ''}"
        )
        sandbox.say(f"  why {observed.killed_job}? {client.why(observed.killed_job).because}")


# ---------------------------------------------------------------------------------------------------------------------
# The checks


def _report(sandbox: Sandbox, observed: Observations) -> list[tuple[str, bool]]:
    """Print the jobs and the timeline of the killed one. Check these against timelines, exit codes and files."""
    with sandbox.jobs() as client:
        jobs = list(reversed(list(client.iterate_jobs(limit=200))))
        timelines = {job.id: client.timeline(job.id) for job in jobs}
        why = client.why(observed.killed_job) if observed.killed_job else None
    errors = {job.id: result_error(job, sandbox.results) for job in jobs}
    columns: terminal.Columns = {
        "JOB": "id",
        "STATUS": "status",
        "WORKERS": lambda job: " then ".join(
            str(event.details.get("worker")) for event in timelines[job.id] if event.type == "granted"
        ),
        ">ATTEMPTS": "attempt",
        ">STALLS": "stalls",
        ">TOOK": lambda job: duration((job.finished_at or job.updated_at) - (job.started_at or job.updated_at)),
        "RESULT": lambda job: errors[job.id] or Path(job.file_path or "").name,
    }
    terminal.emit("")
    terminal.table(columns, jobs)
    if why is not None:
        terminal.emit("")
        terminal.emit(f"The timeline of {observed.killed_job}, whose worker {observed.killed_worker} was killed:")
        tables.timeline(
            [event for event in timelines[observed.killed_job] if event.type not in ("progress", "extended")]
        )
        tables.why(why)
    return checks(observed, jobs, timelines, errors)


def result_error(job: JobView, results: Path) -> str:
    """Read the result of a job from the disk. Return its first problem, or an empty string."""
    if job.status != "completed" or job.file_path != str(results / f"{job.id}.png"):
        return f"{job.status}, result {job.file_path}"
    try:
        data = Path(job.file_path).read_bytes()
        if hashlib.sha256(data).hexdigest() != _metadata(job)["sha256"]:
            return "the checksum differs from the one that the worker reported"
        frames = [zlib.decompress(body) for body in _frames(data)]
    except (OSError, ValueError, LookupError, struct.error, zlib.error) as error:
        return str(error)
    expected = FRAMES if job.kind == "film" else 1
    if len(frames) != expected or any(len(frame) != (WIDTH + 1) * HEIGHT for frame in frames):
        return f"{len(frames)} frames instead of {expected}, or a frame of another size"
    return ""


def _frames(data: bytes) -> Iterator[bytes]:
    """Yield the compressed frames of a PNG. Raises ValueError if a checksum is wrong."""
    at = len(SIGNATURE)
    if data[:at] != SIGNATURE:
        raise ValueError("this is not a PNG")
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        if struct.pack(">I", zlib.crc32(kind + body)) != data[at + 8 + length : at + 12 + length]:
            raise ValueError(f"the checksum of a {kind.decode('ascii', 'replace')} chunk is wrong")
        if kind in (b"IDAT", b"fdAT"):
            yield body[4:] if kind == b"fdAT" else body
        at += 12 + length


def checks(
    observed: Observations, jobs: Sequence[JobView], timelines: dict[str, list[EventView]], errors: dict[str, str]
) -> list[tuple[str, bool]]:
    """Return each check of the demo with whether it was observed."""
    events = timelines.get(observed.killed_job, [])
    grants = [event for event in events if event.type == "granted"][1:]
    others = [event for event in grants if event.details.get("worker") != observed.killed_worker]
    newer = [event for event in others if int(event.details.get("fencing_token") or 0) > observed.killed_token]
    stalls = [event for event in events if event.type == "stalled" and event.to == "queued"]
    last = events[-1] if events else None
    finisher = f"worker:{others[-1].details.get('worker')}" if others else ""
    killed = observed.killed_code == -signal.SIGKILL and observed.killed_progress > 0
    return [
        (f"a worker was killed with SIGKILL in the middle of a job ({observed.killed_job or 'none'})", killed),
        ("the daemon detected this and requeued the job", bool(stalls)),
        ("another worker was granted the job, with a higher fencing token", bool(newer) and newer == grants),
        ("that worker completed it", last is not None and last.type == "completed" and last.by == finisher),
        (f"all {len(jobs)} jobs are completed", bool(jobs) and all(job.status == "completed" for job in jobs)),
        ("every result was read back from the disk and is complete", not any(errors.values())),
    ]


def verdict(program: str, checks: Sequence[tuple[str, bool]]) -> int:
    terminal.emit("")
    for check, was_seen in checks:
        terminal.emit(f"{'ok' if was_seen else 'NOT SEEN':8}  {check}")
    failed = sum(not was_seen for _, was_seen in checks)
    if failed:
        terminal.say(f"{program}: {failed} of {len(checks)} checks failed")
        return exit_codes.FAILED
    terminal.emit("All checks passed.")
    return exit_codes.DONE
