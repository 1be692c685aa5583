"""The program jobd. Imports only what the command line needs; `serve` imports the daemon."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from jobd import __version__
from jobd.cli import exit_codes, terminal
from jobd.cli.daemon import store_commands
from jobd.cli.daemon.bench import bench
from jobd.cli.daemon.cluster import check_journal, cluster, join_command
from jobd.cli.daemon.dev import dev
from jobd.cli.daemon.settings import config_option, flag_options, read
from jobd.cli.params import SETTINGS, CommandGroup, json_option, number_option

if TYPE_CHECKING:
    from jobd.config import LoadedConfig

RULES: Final = files("jobd").joinpath("monitoring", "jobd.rules.yml")


@click.group(cls=CommandGroup, context_settings=SETTINGS)
@click.version_option(__version__, prog_name="jobd")
def jobd() -> None:
    """Run the daemon and maintain its files.

    \b
    Exit codes: 0 done, 1 failed, 2 usage, 3 daemon unreachable, 4 not found or rejected,
    5 unauthorized, 74 I/O error, 75 try again, 78 configuration, 130 interrupted (Ctrl-C).
    """


@click.command()
@config_option
@flag_options
def serve(config: str | None, flags: dict[str, str]) -> int:
    """Run the daemon in the foreground until SIGTERM.

    Flags override environment variables (JOBD_SECTION_KEY), which override the configuration file. SIGTERM and SIGINT
    stop the daemon gracefully, SIGHUP reloads the configuration, and SIGUSR1 writes all stacks to the log.
    """
    loaded = read(config, flags)
    gc.disable()  # until the start is complete, which creates no garbage
    _leave_out_rich()
    from jobd import daemon
    from jobd.config_loader import load

    return daemon.serve(loaded, lambda: load(flags, os.environ, config or loaded.path))


def _leave_out_rich() -> None:
    """Import structlog without rich, which only colours tracebacks and takes a tenth of the start."""
    modules: dict[str, Any] = sys.modules
    if "rich" not in modules:
        modules["rich"] = None
        try:
            import structlog  # noqa: F401
        finally:
            del modules["rich"]


@click.command("check-config")
@config_option
@flag_options
@json_option
def check_config(config: str | None, flags: dict[str, str], as_json: bool) -> None:
    """Check the configuration and print the effective values.

    Each value is printed with its source; secrets are not printed. Exit 78 if `jobd serve` would reject them. With
    journal.url, the database is checked as well: exit 78 if it has to be changed, 75 if it cannot be reached. The store
    is not opened: `jobd doctor` checks it.
    """
    from jobd.config import effective
    from jobd.config_checks import check_artifact_directory

    loaded = read(config, flags)
    check_artifact_directory(loaded.config.artifacts.url, loaded.own_directories)
    if as_json:
        terminal.emit_json({"path": loaded.path, "values": _values(loaded), "webhooks": _webhooks(loaded)})
    else:
        for line in effective(loaded).splitlines():
            terminal.emit(line)
    for warning in loaded.warnings:
        terminal.say(f"jobd: {warning}")
    if loaded.config.journal.url:
        check_journal(loaded.config.journal)


@click.command()
@click.option("--ui", is_flag=True, help="Run a busy daemon until Ctrl-C, and print a link to its dashboard.")
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="Copy the results to this directory.")
@number_option("--seed", "Seed of the pictures that the workers draw.", 1, kind=click.INT)
def demo(ui: bool, keep: Path | None, seed: int) -> int:
    """Kill a worker in the middle of a job and show the recovery.

    Starts a daemon and three workers, which draw pictures and films, and kills one worker with SIGKILL in the middle of
    a job. jobd requeues the job, and another worker completes it. Exit 0 only if every step was observed and every
    result is complete.

    With --ui, starts a daemon with jobs in every status and prints a link that signs a browser in to its dashboard.

    All files are in a temporary directory, which is removed at the end.
    """
    if ui:
        from jobd.cli.demo.live import show

        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: stop.set())
        return show(stop)
    from jobd.cli.demo.recovery import demonstrate

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    return demonstrate(keep, seed)


def _webhooks(loaded: LoadedConfig) -> list[dict[str, object]]:
    """Return the webhooks with the number of their secrets instead of the secrets."""
    from msgspec.structs import asdict

    return [
        {name: value for name, value in asdict(each.section).items() if name != "secret"}
        | {"secrets": len(each.endpoint.secrets)}
        for each in loaded.webhooks
    ]


def _values(loaded: LoadedConfig) -> dict[str, dict[str, object]]:
    """Return each key with its value and source. Durations are as in the file."""
    from jobd.config import Duration, show_duration, shown

    found: dict[str, dict[str, object]] = {}
    for key, source in loaded.sources.items():
        value = shown(loaded.config, key)
        found[key] = {"value": show_duration(value) if isinstance(value, Duration) else value, "source": source}
    return found


@click.command()
@click.argument("what", type=click.Choice(["rules", "dashboard"]))
def monitoring(what: str) -> None:
    """Print alerting rules for Prometheus or a dashboard for Grafana.

    \b
    jobd monitoring rules > /etc/prometheus/jobd.rules.yml
    jobd monitoring dashboard > jobd-dashboard.json
    """
    from jobd.monitoring.grafana import dashboard

    for line in (RULES.read_text("utf-8") if what == "rules" else dashboard()).splitlines():
        terminal.emit(line)


jobd.add_all("Daemon", serve, dev, check_config, demo, bench, monitoring)
jobd.add_all("Cluster", cluster, join_command)
jobd.add_all("Files", store_commands.backup_command, store_commands.restore_command, store_commands.doctor_command)


def main(argv: Sequence[str] | None = None) -> int:
    return exit_codes.run(jobd, "jobd", argv)


if __name__ == "__main__":
    sys.exit(main())
