"""`jobctl worker`: run the tasks of an app."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from jobd import __version__
from jobd.cli import exit_codes
from jobd.cli.connection import current, worker_api_endpoints, worker_options
from jobd.cli.ctl.completion import QUEUE
from jobd.cli.ctl.run import GRACE, LOCK_TTL, WORKER_NAME
from jobd.cli.params import ConnectionOptions, number_option

if TYPE_CHECKING:
    from jobd.client.app.app import App
    from jobd.client.app.app_worker import AppWorker
    from jobd.client.app.daemon_jobs import DaemonJobs


@click.command()
@click.option(
    "--queues",
    type=QUEUE,
    multiple=True,
    help="Claim jobs of this queue; may be repeated, or a list with commas.  [default: the queues of the tasks]",
)
@number_option(
    "--concurrency", "Number of jobs to run at the same time in each process.  [default: 8; with --processes 1]"
)
@number_option("--processes", "Run N processes, and kill one whose task does not end at its timeout.  [default: none]")
@LOCK_TTL
@GRACE
@WORKER_NAME
@click.option("--supervised", type=int, hidden=True)
@click.argument("target", metavar="MODULE:APP")
@worker_options
def worker(
    queues: tuple[str, ...],
    concurrency: int | None,
    processes: int | None,
    lock_ttl: int,
    grace: int,
    name: str | None,
    supervised: int | None,
    target: str,
) -> int:
    """Run the tasks of an app until SIGTERM, then drain.

    MODULE:APP is a module and the name of its App, such as "shop.tasks:app". Modules are found from the current
    directory. stderr has a line for each job. A plain function that ignores its timeout keeps its slot; with
    --processes, its process is killed, and the attempt fails with the error code "timeout".

    \b
    Example: jobctl worker shop:app --processes 4
    """
    import asyncio
    import logging

    from jobd.client.app.worker_processes import ParentLink, WorkerProcesses
    from jobd.client.worker.claimer import default_name

    (app, jobs), options = load_app(target), current()
    if options.socket or options.url or not jobs.is_addressed:
        jobs.use(worker_api_endpoints(options))
    link = None if supervised is None else ParentLink(supervised)
    settings: dict[str, Any] = {"queues": [name for each in queues for name in each.split(",")] or None}
    settings |= {"concurrency": concurrency or (1 if processes else 8), "lock_ttl_ms": lock_ttl, "name": name}
    run = _app_worker(target, app, **settings, grace_s=grace / 1000, link=link)
    if not logging.getLogger().hasHandlers():
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    if link is not None:
        link.watch(run.stop)
    else:
        tasks = ", ".join(f"{task.name} ({task.queue})" for task in app.registry.tasks.values())
        click.echo(f"jobd {__version__}: app {app.name}, processes: {processes or 1}, tasks: {tasks}", err=True)
    if not processes:
        asyncio.run(run.serve(signals=True))
        return exit_codes.DONE
    given = ("--concurrency", settings["concurrency"]), ("--lock-ttl", f"{lock_ttl}ms"), ("--grace", f"{grace}ms")
    command = _child_command(target, options, *given, *(("--queues", each) for each in queues))
    client, log = jobs.asynchronous_client(), logging.getLogger("jobd.client").warning
    return asyncio.run(WorkerProcesses(client, command, processes, name or default_name(), log).run())


def _child_command(target: str, options: ConnectionOptions, *given: tuple[str, Any]) -> list[str]:
    connection = ("--socket", options.socket), ("--url", options.url), ("--token-file", options.token_file)
    flags = [str(part) for flag, value in (*given, *connection) if value for part in (flag, value)]
    return [sys.executable, "-m", "jobd.cli.ctl.main", "worker", target, *flags]


def _app_worker(target: str, app: App, **options: Any) -> AppWorker:
    from jobd.client.app.app_worker import AppWorker

    try:
        found = AppWorker(app.registry, app.include, **options, schedules=app.schedules, shows_runs=True)
        app.schedules.requests()
        return found
    except (TypeError, ValueError, ImportError) as error:
        raise exit_codes.CliError(f"{target}: {error}", exit_codes.CONFIG) from None


def load_app(target: str) -> tuple[App, DaemonJobs]:
    """Return the app of a program, and its access to the daemon. Raises CliError (78)."""
    from jobd.client.app.app import App
    from jobd.client.app.daemon_jobs import DaemonJobs

    module, _, name = target.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
        try:
            app = getattr(found, name or "app")
        except AttributeError as error:
            if hasattr(found, "__getattr__"):  # jobd.django makes its apps, and says which there are
                raise exit_codes.CliError(f"{target}: {error}", exit_codes.CONFIG) from None
            app = None
    except ModuleNotFoundError as error:
        where = f"{target}: there is no module {error.name!r}"
        raise exit_codes.CliError(f"{where}. Modules are found from {os.getcwd()}", exit_codes.CONFIG) from None
    except Exception as error:
        if type(error).__name__ != "ImproperlyConfigured":  # of Django, which only the app imports
            raise
        is_set = os.environ.get("DJANGO_SETTINGS_MODULE")
        text = str(error) if is_set else "set DJANGO_SETTINGS_MODULE to the settings of the project, as for manage.py"
        raise exit_codes.CliError(f"{target}: {text}", exit_codes.CONFIG) from None
    if not isinstance(app, App):
        apps = [each for each, value in vars(found).items() if isinstance(value, App)]
        hint = f"; write {module}:{apps[0]}" if apps else ""
        raise exit_codes.CliError(f"{target}: {module}.{name or 'app'} is no App{hint}", exit_codes.CONFIG)
    if not isinstance(app.registry.jobs, DaemonJobs):
        raise exit_codes.CliError(f"{target} has inline=True, so it runs its jobs itself", exit_codes.CONFIG)
    return app, app.registry.jobs
