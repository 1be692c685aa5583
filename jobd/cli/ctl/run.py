"""jobctl run: the command line of a worker around any program. The worker itself is the client's."""

from __future__ import annotations

import click

from jobd.cli import exit_codes
from jobd.cli.connection import current, worker_endpoint, worker_options
from jobd.cli.params import DURATION, NAME


@click.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "--queue", "queues", type=NAME, metavar="NAME", multiple=True, help="Queue to work on; may be repeated.  [default]"
)
@click.option("--kind", "kinds", metavar="KIND", multiple=True, help="Only jobs of this kind; may be repeated.")
@click.option("--concurrency", type=click.IntRange(min=1), default=1, show_default=True, help="Jobs at a time.")
@click.option("--lock-ttl", type=DURATION, default="60s", show_default=True, help="Silence after which a job is lost.")
@click.option("--timeout", type=DURATION, help="How long a run may take; then SIGTERM, 10 s later SIGKILL.  [none]")
@click.option(
    "--max-processing",
    type=DURATION,
    default="0",
    help="Longest time without progress before the job is lost.  [0: no limit]",
)
@click.option("--grace", type=DURATION, default="30s", show_default=True, help="What SIGTERM leaves the running job.")
@click.option("--once", is_flag=True, help="End after one job.")
@click.option("--drain", is_flag=True, help="End when no job is due; say what is left.")
@click.option("--name", type=NAME, metavar="NAME", help="Name of this worker (default: host and pid).")
@click.argument("command", metavar="CMD...", nargs=-1, required=True, type=click.UNPROCESSED)
@worker_options
def run(
    queues: tuple[str, ...],
    kinds: tuple[str, ...],
    concurrency: int,
    lock_ttl: int,
    timeout: int | None,
    max_processing: int,
    grace: int,
    once: bool,
    drain: bool,
    name: str | None,
    command: tuple[str, ...],
) -> int:
    """Work on jobs by running CMD for each.

    CMD gets the payload as JSON on stdin and the job's fields as JOBD_JOB_* variables. Lines that it prints as
    "::progress 42 text", "::meta key=value" and "::result file_path=value" are for jobd, all others pass through.
    Exit 0 completes the job, any other code fails it. A run longer than --timeout fails with "timeout". With --once and
    --drain: exit 0 if all jobs were completed.

    \b
    Example: jobctl run --queue video --concurrency 2 -- ./convert.sh --quality high
    """
    if once and drain:
        raise click.UsageError("--once and --drain are two ways to end: give one")
    if once and concurrency > 1:
        raise click.UsageError("--once works on one job: leave out --concurrency")
    if timeout == 0:
        raise click.UsageError("--timeout must be above 0; leave it out for no limit")
    import asyncio

    from jobd.client.worker.command_worker import CommandWorker

    worker = CommandWorker(
        worker_endpoint(current()),
        command,
        queues=queues or ("default",),
        kinds=kinds or None,
        concurrency=concurrency,
        lock_ttl_ms=lock_ttl,
        max_processing_ms=max_processing,
        timeout=timeout and timeout / 1000,
        grace_s=grace / 1000,
        once=once,
        drain=drain,
        name=name,
    )
    code = asyncio.run(worker.run())
    return exit_codes.FAILED if code else exit_codes.DONE
