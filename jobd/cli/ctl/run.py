"""`jobctl run`: a worker that runs a program for each job."""

from __future__ import annotations

from typing import Final

import click

from jobd.cli import exit_codes
from jobd.cli.connection import current, worker_api_endpoints, worker_options
from jobd.cli.ctl.completion import KIND, QUEUE
from jobd.cli.params import DURATION, NAME, number_option

# The options of all workers.
LOCK_TTL: Final = click.option(
    "--lock-ttl", type=DURATION, default="60s", show_default=True, help="Lifetime of a lock; the worker renews it."
)
_AFTER_SIGTERM: Final = "How long a running job may continue after SIGTERM."
GRACE: Final = click.option("--grace", type=DURATION, default="30s", show_default=True, help=_AFTER_SIGTERM)
WORKER_NAME: Final = click.option("--name", type=NAME, help="Name of this worker.  [default: host and pid]")


@click.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "--queue",
    "queues",
    type=QUEUE,
    multiple=True,
    help="Claim jobs of this queue; may be repeated.  [default: default]",
)
@click.option("--kind", "kinds", type=KIND, multiple=True, help="Claim only jobs of this kind; may be repeated.")
@number_option("--concurrency", "Number of jobs to run at the same time.", 1)
@LOCK_TTL
@click.option("--timeout", type=DURATION, help="Time limit of a run: SIGTERM, and SIGKILL 10 s later.  [default: none]")
@click.option(
    "--progress-timeout",
    type=DURATION,
    default="0",
    help="Progress timeout: the lock is lost after this time without progress.  [default: none]",
)
@GRACE
@click.option("--once", is_flag=True, help="Exit after one job.")
@click.option(
    "--drain", is_flag=True, help="Exit when no job is due and no retry is awaited, and report how many are left."
)
@click.option("--no-output", is_flag=True, help="Do not send the output to the daemon (see jobctl output).")
@WORKER_NAME
@click.argument("command", metavar="CMD...", nargs=-1, required=True, type=click.UNPROCESSED)
@worker_options
def run(
    queues: tuple[str, ...],
    kinds: tuple[str, ...],
    concurrency: int,
    lock_ttl: int,
    timeout: int | None,
    progress_timeout: int,
    grace: int,
    once: bool,
    drain: bool,
    no_output: bool,
    name: str | None,
    command: tuple[str, ...],
) -> int:
    """Claim jobs and run CMD for each.

    CMD gets the payload as JSON on stdin and the job's fields in JOBD_JOB_* variables. To report, it prints lines such
    as "::progress 42 text", "::meta key=value" and "::result file_path=value"; other output is passed on, and the
    daemon keeps its end for `jobctl output`. Exit code 0 completes the job, any other code fails it. A run that exceeds
    --timeout fails with the error code "timeout". With --once or --drain, jobctl exits with 0 if all its jobs are
    completed in the end, else with 1. With --concurrency above 1, each line of output begins with the id of its job.

    \b
    Example: jobctl run --queue video --concurrency 2 -- ./convert.sh --quality high
    """
    _check_options(concurrency, timeout, once, drain)
    import asyncio
    import signal

    from jobd.client.worker.command_worker import CommandWorker

    worker = CommandWorker(
        worker_api_endpoints(current()),
        command,
        queues=queues or ("default",),
        kinds=kinds or None,
        concurrency=concurrency,
        lock_ttl_ms=lock_ttl,
        progress_timeout_ms=progress_timeout,
        timeout=timeout and timeout / 1000,
        grace_s=grace / 1000,
        once=once,
        drain=drain,
        keep_output=not no_output,
        name=name,
    )
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a parent may have left it ignored, which hides exit statuses
    code = asyncio.run(worker.run())
    return exit_codes.FAILED if code else exit_codes.DONE


def _check_options(concurrency: int, timeout: int | None, once: bool, drain: bool) -> None:
    if once and drain:
        raise click.UsageError("--once and --drain are mutually exclusive: give one of them")
    if once and concurrency > 1:
        raise click.UsageError("--once runs one job: omit --concurrency")
    if timeout == 0:
        raise click.UsageError("--timeout must be above 0; omit it for no limit")
