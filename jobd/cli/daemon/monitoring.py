"""`jobd monitoring`: print the files for Prometheus and Grafana."""

from __future__ import annotations

from importlib.resources import files
from typing import Final

import click

from jobd.cli import terminal

FILES: Final = {"rules": "jobd.rules.yml", "dashboard": "grafana.json"}


@click.command()
@click.argument("what", type=click.Choice(list(FILES)))
def monitoring(what: str) -> None:
    """Print alerting rules for Prometheus or a dashboard for Grafana.

    \b
    jobd monitoring rules > /etc/prometheus/jobd.rules.yml
    jobd monitoring dashboard > jobd-dashboard.json
    """
    for line in files("jobd").joinpath("monitoring", FILES[what]).read_text("utf-8").splitlines():
        terminal.emit(line)
