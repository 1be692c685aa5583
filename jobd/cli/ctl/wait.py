"""`jobctl wait`: wait until jobs are finished."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, Literal

import click

from jobd.cli import exit_codes, terminal
from jobd.cli.connection import job_client, worker_options
from jobd.cli.ctl.completion import IDS, QUEUE
from jobd.cli.params import DURATION, json_option
from jobd.model.times import duration

if TYPE_CHECKING:
    from jobd.client import JobClient, JobdError
    from jobd.model.responses import JobView

RETRY_FOR_S: Final = 60.0  # a wait survives a restart of the daemon
_UNFINISHED: Final[tuple[Literal["queued", "processing"], ...]] = ("queued", "processing")
NotCompleted = Literal["failed", "cancelled"]
_NOT_COMPLETED: Final[tuple[NotCompleted, ...]] = ("failed", "cancelled")


@click.command()
@IDS
@click.option("--queue", type=QUEUE, help="Wait until this queue has no unfinished job.")
@click.option("--timeout", "timeout_ms", type=DURATION, help="Stop waiting after this time, such as 10m, and exit 1.")
@json_option
@worker_options
def wait(ids: tuple[str, ...], queue: str | None, timeout_ms: int | None, as_json: bool) -> int:
    """Wait until jobs are finished. Exit 0 if all are completed, else 1.

    With --queue, jobs that are created meanwhile count too, but not jobs that finished before: give the IDs of jobs
    that may finish that early. A queue that does not exist has no unfinished jobs. A job that does not exist, or is
    deleted before its end is seen, counts as not completed.

    \b
    Examples:
      jobctl wait --queue video --timeout 10m
      ls /srv/*.mov | jobctl submit --queue video --lines --text | xargs jobctl wait
    """
    if bool(ids) == (queue is not None):
        raise click.UsageError("give either job IDs or --queue NAME")
    until_s = None if timeout_ms is None else time.monotonic() + timeout_ms / 1000
    text = "" if timeout_ms is None else duration(timeout_ms)
    client, ends = waiting_client(timeout_ms), dict[str, str]()
    try:
        if queue is None:
            _wait_for_all(client, dict.fromkeys(ids), until_s, ends, text)
        else:
            before = {status: _last_end(client, status) for status in _NOT_COMPLETED}
            while unfinished := _unfinished(client, queue):
                _wait_for_all(client, unfinished, until_s, ends, text)
            _add_unseen(client, queue, before, ends)
    except TimeoutError as error:
        raise exit_codes.CliError(str(error), exit_codes.FAILED) from None
    counts = Counter(ends.values())
    if as_json:
        terminal.emit_json(counts)
    else:
        terminal.say(", ".join(f"{count} {status}" for status, count in counts.items()) or "no unfinished jobs")
    return exit_codes.DONE if counts.keys() <= {"completed"} else exit_codes.FAILED


def waiting_client(timeout_ms: int | None = None) -> JobClient:
    """Return a client that waits for the daemon, for RETRY_FOR_S at most, and says so once."""
    client = job_client(retry_for_s=RETRY_FOR_S if timeout_ms is None else min(RETRY_FOR_S, timeout_ms / 1000))

    def say_once(error: JobdError) -> None:
        client.on_retry = None
        terminal.say(f"{error.message.rstrip('.')}; waiting for the daemon")

    client.on_retry = say_once
    return client


def _unfinished(client: JobClient, queue: str) -> dict[str, None]:
    return {
        job.id: None for status in _UNFINISHED for job in client.iterate_jobs(queue=queue, status=status, limit=200)
    }


def _last_end(client: JobClient, status: NotCompleted) -> int:
    """Return when the last job of any queue ended with `status`, by the clock of the daemon."""
    return next((job.finished_at or 0 for job in client.list_jobs(status=status, limit=1).jobs), 0)


def _add_unseen(client: JobClient, queue: str, before: dict[NotCompleted, int], ends: dict[str, str]) -> None:
    """Add the jobs of `queue` that were created and failed, or were cancelled, while others were waited for."""
    for status, last_end in before.items():
        for job in client.iterate_jobs(status=status):
            if (job.finished_at or 0) <= last_end:
                break
            if job.queue == queue and ends.get(job.id) != status:
                _add(job, ends)


def _wait_for_all(
    client: JobClient, ids: Iterable[str], until_s: float | None, ends: dict[str, str], timeout_text: str
) -> None:
    """Wait for one job after the other, and add their statuses to `ends`. Raises TimeoutError."""
    from jobd.client.errors import JobNotFound

    for job_id in ids:
        timeout_s = None if until_s is None else max(until_s - time.monotonic(), 0.0)
        try:
            job = client.wait_for_job(job_id, timeout_s=timeout_s)
        except JobNotFound:
            terminal.say(f"{job_id} does not exist: it was never created, or was deleted")
            ends[job_id] = "not found"
            continue
        except TimeoutError as error:  # its message has the time that was left, not that of --timeout
            raise TimeoutError(
                str(error).replace(f" after {duration((timeout_s or 0) * 1000)}:", f" after {timeout_text}:")
            ) from None
        _add(job, ends)


def _add(job: JobView, ends: dict[str, str]) -> None:
    ends[job.id] = job.status
    if job.status != "completed":
        say_outcome(job)


def say_outcome(job: JobView) -> None:
    why = f": {job.error_message}" if job.error_message and job.status != "completed" else ""
    terminal.say(terminal.one_line(f"{job.id} {job.status}{why}"))
