"""`jobctl submit`: create a job, and optionally wait for its end."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from jobd.cli import exit_codes, terminal
from jobd.cli.connection import job_client, worker_options
from jobd.cli.ctl.completion import KIND, QUEUE
from jobd.cli.ctl.wait import say_outcome, waiting_client
from jobd.cli.params import (
    DURATION,
    MAX_ATTEMPTS,
    MAX_STALLS,
    MOMENT_OR_DELAY,
    NAME,
    PRIORITY,
    json_option,
    json_text,
    naming_flags,
    read_stdin,
)

if TYPE_CHECKING:
    from jobd.cli.ctl.submit_lines import Content


@click.command()
@click.argument("payload", required=False)
@click.option("--queue", type=QUEUE, help="Queue of the job.  [default: default]")
@click.option("--kind", type=KIND, help="Kind of work; workers can claim by kind.")
@click.option(
    "--id", "job_id", type=NAME, metavar="ID", help="Id of the job. Repeating the same command creates it once."
)
@click.option("--priority", type=PRIORITY, metavar="N", help="Jobs with a smaller number run first.")
@click.option("--delay", "delay_ms", type=DURATION, help="Make the job due after this time, such as 10s.")
@click.option("--run-at", type=MOMENT_OR_DELAY, help="Make the job due at this time (UTC), or after a duration.")
@click.option(
    "--expires",
    "expires_at",
    type=MOMENT_OR_DELAY,
    help="Fail the job if it is still queued at this time (UTC), or after a duration.",
)
@click.option("--max-attempts", type=MAX_ATTEMPTS, metavar="N", help="Maximum number of attempts.  [default: 1]")
@click.option(
    "--max-stalls", type=MAX_STALLS, metavar="N", help="Maximum number of stalls; the next one fails the job."
)
@click.option("--on-stall", type=click.Choice(["auto", "requeue", "fail"]), help="What to do when the job stalls.")
@click.option(
    "--stall-after",
    "stall_after_ms",
    type=DURATION,
    help="Time without a report after which a job whose lock has expired is stalled.",
)
@click.option(
    "--progress-timeout",
    "progress_timeout_ms",
    type=DURATION,
    help="Progress timeout: the longest time without progress; 0: no limit.",
)
@click.option("--backoff", type=click.Choice(["exponential", "fixed"]), help="How the delay between attempts grows.")
@click.option("--backoff-base", type=DURATION, help="First delay between attempts.  [default: 10s]")
@click.option("--backoff-max", type=DURATION, help="Longest delay between attempts.  [default: 1h]")
@click.option("--no-jitter", is_flag=True, help="Use exactly these delays, instead of between half of them and all.")
@click.option(
    "--idempotency-key", type=NAME, metavar="KEY", help="Repeating the command with this key creates no second job."
)
@click.option("--text", "is_text", is_flag=True, help="PAYLOAD is any text, not JSON.")
@click.option("--lines", "is_lines", is_flag=True, help="Create a job for each line of stdin. A line is a payload.")
@click.option("--full", "is_full", is_flag=True, help="With --lines: a line is a JSON object with the fields of a job.")
@click.option("--wait", is_flag=True, help="Wait until the job is finished. Exit 0 if it is completed, else 1.")
@json_option
@worker_options
def submit(
    payload: str | None,
    backoff: str | None,
    backoff_base: int | None,
    backoff_max: int | None,
    no_jitter: bool,
    job_id: str | None,
    wait: bool,
    as_json: bool,
    is_text: bool,
    is_lines: bool,
    is_full: bool,
    **options: Any,
) -> int:
    """Create a job and print its id. PAYLOAD is JSON (with --text, any text), or - to read it from stdin.
    Without PAYLOAD, the payload is null.

    With --lines, create many jobs: each line of stdin is a payload. With --full, it has the fields of a create
    request, such as id and payload, and the options are for the fields that it does not have.

    \b
    Examples:
      jobctl submit --queue video --kind transcode '{"file": "/srv/cat.mov"}'
      echo '[1, 2, 3]' | jobctl submit --id sums-2026-03 --max-attempts 3 -
      find /srv -name '*.mov' | jobctl submit --queue video --lines --text
    """
    pause = {"kind": backoff, "base_ms": backoff_base, "max_ms": backoff_max, "jitter": False if no_jitter else None}
    pause = {name: value for name, value in pause.items() if value is not None}
    options |= _times(**options) | {"backoff": pause or None}
    if is_lines or is_full:
        unfit = {"PAYLOAD": payload not in (None, "-"), "--id": job_id, "--wait": wait}
        unfit |= {"--idempotency-key": options.pop("idempotency_key")}
        content = _content_of_lines(is_lines=is_lines, is_full=is_full, is_text=is_text, unfit=unfit)
        from jobd.cli.ctl.submit_lines import LineSubmitter

        LineSubmitter(job_client(), options, as_json=as_json).submit_all(sys.stdin.fileno(), content)
        return exit_codes.DONE
    text = read_stdin("the payload") if payload == "-" else payload
    if is_text and text is None:
        raise click.UsageError("--text needs PAYLOAD, or - for a text on stdin")
    body = text if is_text or text is None else json_text(text, "PAYLOAD", " or add --text,")
    client = job_client()
    with naming_flags():
        created = client.create_job(body, id=job_id, **options)
    if not (wait and as_json):
        terminal.emit_json(created) if as_json else terminal.emit(created.id)
        sys.stdout.flush()
    return _wait_for(created.id, as_json) if wait else exit_codes.DONE


def _content_of_lines(*, is_lines: bool, is_full: bool, is_text: bool, unfit: Mapping[str, object]) -> Content:
    """Return what the lines are. Raises UsageError for options that do not fit each other."""
    if not is_lines:
        raise click.UsageError("--full needs --lines")
    if is_full and is_text:
        raise click.UsageError("--full and --text are mutually exclusive: a line is a JSON object or a text")
    for name, value in unfit.items():
        if value:
            advice = "give each line an id with --full, and wait with jobctl wait"
            raise click.UsageError(f"--lines reads stdin and creates many jobs, so it does not take {name}: {advice}")
    return "full" if is_full else "text" if is_text else "json"


def _times(
    *, delay_ms: int | None, run_at: int | timedelta | None, expires_at: int | timedelta | None, **_: Any
) -> dict[str, int | None]:
    """Return the times of the request. A duration is sent as such, so a repeated command sends the same request."""
    if delay_ms is not None and run_at is not None:
        raise click.UsageError("--delay and --run-at are mutually exclusive: give one of them")
    expires_in_ms = None
    if isinstance(run_at, timedelta):
        delay_ms, run_at = _whole_ms(run_at), None
    if isinstance(expires_at, timedelta):
        expires_in_ms, expires_at = _whole_ms(expires_at), None
    return {"delay_ms": delay_ms, "run_at": run_at, "expires_at": expires_at, "expires_in_ms": expires_in_ms}


def _whole_ms(delay: timedelta) -> int:
    return delay // timedelta(milliseconds=1)


def _wait_for(job_id: str, as_json: bool) -> int:
    from jobd.cli.progress import bar

    client = waiting_client()
    with bar(job_id, unit="%") as advance:
        job = client.wait_for_job(job_id, on_poll=lambda job: advance(int(job.progress), 100))
    terminal.emit_json(job) if as_json else say_outcome(job)
    return exit_codes.DONE if job.status == "completed" else exit_codes.FAILED
