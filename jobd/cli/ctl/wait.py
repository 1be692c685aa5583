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


@click.command()
@IDS
@click.option("--queue", type=QUEUE, metavar="NAME", help="Wait until this queue has no unfinished job.")
@click.option("--timeout", "timeout_ms", type=DURATION, help="Stop waiting after this time, such as 10m, and exit 1.")
@json_option
@worker_options
def wait(ids: tuple[str, ...], queue: str | None, timeout_ms: int | None, as_json: bool) -> int:
    """Wait until jobs are finished. Exit 0 if all are completed, else 1.

    With --queue, jobs that are created meanwhile count too. A queue that does not exist has no unfinished jobs. A job
    that does not exist, or is deleted before its end is seen, counts as not completed.

    \b
    Example: jobctl wait --queue video --timeout 10m
    """
    if bool(ids) == (queue is not None):
        raise click.UsageError("give either job IDs or --queue NAME")
    until_s = None if timeout_ms is None else time.monotonic() + timeout_ms / 1000
    text = "" if timeout_ms is None else duration(timeout_ms)
    client, counts = job_client(retry_for_s=RETRY_FOR_S), Counter[str]()

    def say_once(error: JobdError) -> None:
        client.on_retry = None
        terminal.say(f"{error.message.rstrip('.')}; waiting for the daemon")

    client.on_retry = say_once
    try:
        if queue is None:
            _wait_for_all(client, dict.fromkeys(ids), until_s, counts, text)
        else:
            while unfinished := _unfinished(client, queue):
                _wait_for_all(client, unfinished, until_s, counts, text)
    except TimeoutError as error:
        raise exit_codes.CliError(str(error), exit_codes.FAILED) from None
    if as_json:
        terminal.emit_json(counts)
    else:
        terminal.say(", ".join(f"{count} {status}" for status, count in counts.items()) or "no unfinished jobs")
    return exit_codes.DONE if counts.keys() <= {"completed"} else exit_codes.FAILED


def _unfinished(client: JobClient, queue: str) -> dict[str, None]:
    return {
        job.id: None for status in _UNFINISHED for job in client.iterate_jobs(queue=queue, status=status, limit=200)
    }


def _wait_for_all(
    client: JobClient, ids: Iterable[str], until_s: float | None, counts: Counter[str], timeout_text: str
) -> None:
    """Wait for one job after the other, and count their statuses. Raises TimeoutError."""
    from jobd.client.errors import JobNotFound

    for job_id in ids:
        timeout_s = None if until_s is None else max(until_s - time.monotonic(), 0.0)
        try:
            job = client.wait_for_job(job_id, timeout_s=timeout_s)
        except JobNotFound:
            terminal.say(f"{job_id} does not exist: it was never created, or was deleted")
            counts["not found"] += 1
            continue
        except TimeoutError as error:  # its message has the time that was left, not that of --timeout
            raise TimeoutError(
                str(error).replace(f" after {duration((timeout_s or 0) * 1000)}:", f" after {timeout_text}:")
            ) from None
        counts[job.status] += 1
        if job.status != "completed":
            say_outcome(job)


def say_outcome(job: JobView) -> None:
    why = f": {job.error_message}" if job.error_message and job.status != "completed" else ""
    terminal.say(terminal.one_line(f"{job.id} {job.status}{why}"))
