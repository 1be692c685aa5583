"""jobctl submit: the command line of a new job, and waiting for its end."""

from __future__ import annotations

import sys
from typing import Any, Final

import click

from jobd.cli import exit_codes, terminal
from jobd.cli.connection import job_client, worker_options
from jobd.cli.params import DURATION, MOMENT, NAME, json_option, json_text, read_stdin

_WAIT_RETRY_FOR_S: Final = 60.0  # --wait survives a restart of the daemon


@click.command()
@click.argument("payload", required=False)
@click.option("--queue", type=NAME, metavar="NAME", help="Queue of the job (default: default).")
@click.option("--kind", metavar="KIND", help="What sort of work it is.")
@click.option("--id", "job_id", type=NAME, metavar="ID", help="The job's id; submitting the same job twice makes one.")
@click.option("--priority", type=int, metavar="N", help="-1000 to 1000, smaller runs first.")
@click.option("--delay", "delay_ms", type=DURATION, metavar="10s", help="Due this long from now.")
@click.option("--run-at", type=MOMENT, metavar="TIME", help="Due at this time (UTC).")
@click.option(
    "--expires",
    "expires_at",
    type=MOMENT,
    metavar="TIME",
    help="Fail it if it still waits then, or again (UTC).",
)
@click.option("--max-attempts", type=int, metavar="N", help="How often it may be tried (default: 1).")
@click.option("--max-stalls", type=int, metavar="N", help="How often its worker may go silent.")
@click.option("--on-stall", type=click.Choice(["auto", "requeue", "fail"]), help="What happens when it goes silent.")
@click.option("--stuck-after", "stuck_after_ms", type=DURATION, metavar="10m", help="Silence that counts as stuck.")
@click.option("--max-processing", "max_processing_ms", type=DURATION, metavar="30m", help="Ceiling of a lock; 0: none.")
@click.option("--backoff", type=click.Choice(["exponential", "fixed"]), help="How the wait between attempts grows.")
@click.option("--backoff-base", type=DURATION, metavar="1s", help="The first wait between attempts.")
@click.option("--backoff-max", type=DURATION, metavar="1h", help="The longest wait between attempts.")
@click.option("--no-jitter", is_flag=True, help="Wait exactly so long between attempts, not at random up to it.")
@click.option("--idempotency-key", type=NAME, metavar="KEY", help="The same key and job again changes nothing.")
@click.option("--wait", is_flag=True, help="Wait until it is finished; exit 0 if it completed, 1 otherwise.")
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
    **options: Any,
) -> int:
    """Create a job and print its id. PAYLOAD is JSON, or - for JSON on stdin.

    \b
    Examples:
      jobctl submit --queue video --kind transcode '{"file": "/srv/cat.mov"}'
      echo '[1, 2, 3]' | jobctl submit --id sums-2026-03 --max-attempts 3 -
    """
    text = read_stdin("the payload") if payload == "-" else payload
    body = None if text is None else json_text(text, "PAYLOAD")
    pause = {"kind": backoff, "base_ms": backoff_base, "max_ms": backoff_max, "jitter": False if no_jitter else None}
    pause = {name: value for name, value in pause.items() if value is not None}
    client = job_client()
    created = client.create_job(body, id=job_id, backoff=pause or None, **options)
    if not (wait and as_json):
        terminal.emit_json(created) if as_json else terminal.emit(created.id)
        sys.stdout.flush()
    return _wait_for(created.id, as_json) if wait else exit_codes.DONE


def _wait_for(job_id: str, as_json: bool) -> int:
    from jobd.cli.progress import until_finished

    job = until_finished(job_client(retry_for_s=_WAIT_RETRY_FOR_S), job_id)
    if as_json:
        terminal.emit_json(job)
    else:
        why = f": {job.error_message}" if job.error_message and job.status != "completed" else ""
        terminal.say(f"{job_id} {job.status}{why}")
    return exit_codes.DONE if job.status == "completed" else exit_codes.FAILED
