"""The limits of `jobctl events`."""

from __future__ import annotations

from jobd.cli.ctl import event_commands as ctl_live
from jobd.model import commands, requests


def test_the_bounds_are_those_of_the_daemon() -> None:
    assert (ctl_live.MAX_SHOWN, ctl_live.MAX_NAMES) == (requests.MAX_BACK, commands.MAX_NAMES)
